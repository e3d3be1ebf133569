"""Real runs of a tiny experiment through the command line, each in a process of its own, on a real Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

EXPERIMENT = """\
name: tiny
rng_seed: 5
blueprint: ./blueprint.yaml
genome:
  sources:
    - {type: python, domains: [code, docstrings, reference], max_megabytes: 0.12}
population:
  variants: 4
  tokens_per_variant: 6144
  reports: 6
  search:
    learning_rate: {type: grid, values: [1e-2, 1e-5]}
    rank: {type: grid, values: [2, 4]}
  epigenomes: {type: brightened, level: 3.0}
  scheduler: {type: asha, grace_reports: 2, reduction_factor: 2}
evaluate: {rows_per_domain: 3, rows_per_report: 1, bootstrap_samples: 200}
"""

BLUEPRINT = """\
name: tiny-test
base:
  type: embedded
  hidden_size: 32
  layers: 2
  heads: 2
  key_value_heads: 1
  head_size: 16
  intermediate_size: 64
  vocabulary: 512
  pretrain_tokens: 2000
lora: {rank: 4, alpha: 8}
lanes: {sequence_length: 32, rows_per_step: 2}
body: {workers: 1, cpus_per_worker: 1, slots: 4, threads: 1}
"""


@dataclass
class Garden:
    """A folder with an experiment, and a way to run it as a user does."""

    folder: Path
    runs: Path

    def command(self, name, *settings, address=None):
        line = [
            sys.executable,
            "-m",
            "chrysalis_ray",
            "run",
            str(self.folder / "tiny.yaml"),
            "--runs",
            str(self.runs),
            "--name",
            name,
        ]
        for setting in settings:
            line += ["--set", setting]
        return line + (["--address", address] if address else [])

    def start(self, name, *settings, address=None):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if address:
            environment["RAY_AUTH_MODE"] = "disabled"
        log = (self.runs / f"{name}.log").open("ab")
        return subprocess.Popen(
            self.command(name, *settings, address=address), stdout=log, stderr=log, env=environment, start_new_session=True
        )

    def run(self, name, *settings, address=None):
        process = self.start(name, *settings, address=address)
        try:
            code = process.wait(timeout=400)
        finally:
            end(process)
        assert code == 0, self.log(name)
        return self.runs / name

    def log(self, name):
        return (self.runs / f"{name}.log").read_text()[-6000:]

    def wait_for(self, name, condition, process, seconds=240):
        """Wait until `condition(run directory)` holds while the process lives."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition(self.runs / name):
                return
            assert process.poll() is None, f"it ended before: {self.log(name)}"
            time.sleep(0.05)
        raise AssertionError(f"it took too long: {self.log(name)}")


def end(process):
    """End a driver and what it started; all of them are in its session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def cuts(run):
    return sorted((run / "store" / "cuts").glob("*.json"))


def adapters(run):
    """The bytes of every variant's weights."""
    return {path.parent.parent.name: path.read_bytes() for path in sorted(run.glob("variants/*/adapter/*.safetensors"))}


def population(run):
    return json.loads((run / "population.json").read_text())["variants"]
