"""Every benchmark runs to its end at its smallest size: a figure that nobody can reproduce is worth nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

# benchmark -> its smallest size, and what it must say; those that run whole experiments are left to `make bench`.
SMALLEST = {
    "packing.py": ("--shapes tiny --variants 3 --lanes 16 --seconds 0.1", "tokens"),
    "ridge.py": ("--variants 1 2 3 4 --lanes 16 64 --seconds 0.1", "ridge"),
    "memory.py": ("--variants 2 --tokens 16 --shapes tiny", "MiB"),
    "gradients.py": ("--workers 2 --slots 2 --rank 4", "sharded"),
    "judge.py": ("--candidates 3 --members 2 --rows 4 --lengths 16 --repeats 1", "blend"),
    "merge.py": ("--adapters 2 --rank 2 --ours ensemble --peft --repeats 1", "ensemble"),
    "mixer.py": ("--samples 20000 --skip 1000", "samples/s"),
    "dedup.py": ("--megabytes 0.2", "pairs"),
    "genome.py": ("--megabytes 1 --processes 1", "verify"),
    "methods.py": ("--seeds 1 --set population.tokens_per_variant=2048 --set population.variants=4", "select chose"),
    "installed.py": ("--megabytes 0.2 --no-tokens", "verify"),
}
WHOLE_RUNS = {"population.py", "controller.py", "plan_accuracy.py", "recovery.py"}
PARTS = {"handwritten.py", "setting.py", "peft_training.py", "training_stage.py", "machine.py", "chunks.py", "ridge_plot.py"}


def test_every_benchmark_is_run_here_or_named() -> None:
    assert {path.name for path in BENCHMARKS.glob("*.py")} == set(SMALLEST) | WHOLE_RUNS | PARTS


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_runs_to_its_end(name: str) -> None:
    words, said = SMALLEST[name]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *words.split()], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stdout
