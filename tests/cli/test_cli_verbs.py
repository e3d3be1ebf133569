"""The verbs as a user meets them: a process, its exit code, its streams, and what it imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = "experiments/quickstart.yaml"

# Runs the console script in a process that says, last, which heavy libraries it imported.
WATCHED = """
import atexit, sys
heavy = {"torch", "ray", "transformers", "wandb", "datasets"}
atexit.register(lambda: print("HEAVY", sorted(heavy & set(sys.modules)), file=sys.stderr))
from chrysalis_ray.cli.main import main
main()
"""


def chrysalis(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


def run_folder(tmp_path: Path) -> Path:
    """The smallest run directory there can be: one that was opened and no more."""
    content = {"name": "young", "run_id": "0a1b2c3d", "created": "2026-11-20T12:00:00+00:00", "version": "0.1.0",
               "experiment_sha256": "0" * 64, "experiment": {}}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["--version"], ["plan", QUICKSTART], ["run", QUICKSTART, "--dry-run"], ["doctor"],
     ["schema"], ["validate", QUICKSTART], ["blueprint", "show", "tiny"], ["blueprint", "choose", "Qwen/Qwen3-8B"],
     ["plan", QUICKSTART, "--set", "blueprint=auto", "--set", "base={type: embedded}"]],
    ids=" ".join,
)  # fmt: skip
def test_light_verbs_import_nothing_heavy(arguments: list[str]) -> None:
    done = chrysalis(*arguments)
    assert (done.returncode, done.stderr) == (0, "HEAVY []\n")
    assert done.stdout


def test_report_imports_nothing_heavy_and_writes_one_page(tmp_path: Path) -> None:
    done = chrysalis("report", str(run_folder(tmp_path)))
    assert (done.returncode, done.stderr) == (0, "HEAVY []\n")
    assert (tmp_path / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")
    done = chrysalis("report", str(tmp_path), "--json")
    assert json.loads(done.stdout)["run_id"] == "0a1b2c3d"


def test_json_is_json() -> None:
    plan = json.loads(chrysalis("plan", QUICKSTART, "--json", "--set", "population.variants=5").stdout)
    assert (plan["variants"], plan["fits"]) == (5, True)
    assert {finding["name"] for finding in json.loads(chrysalis("doctor", "--json").stdout)["findings"]} >= {"torch", "ray"}
    schema = json.loads(chrysalis("schema", "blueprint").stdout)
    assert schema["additionalProperties"] is False


def test_a_plan_that_does_not_fit_exits_3() -> None:
    huge = ["blueprint.base.hidden_size=4096", "blueprint.base.intermediate_size=16384", "blueprint.base.layers=64",
            "blueprint.lora.rank=1024", "population.variants=512", "body.slots=512"]  # fmt: skip
    done = chrysalis("plan", QUICKSTART, *(word for patch in huge for word in ("--set", patch)))
    assert done.returncode == 3
    assert "does not fit" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["bogus"], ["run"], ["plan", QUICKSTART, "--bogus"], ["plan", "experiments/quickstrat.yaml"],
     ["report", "/no/such/folder"], ["plan", QUICKSTART, "--set", "population.varinats=3"],
     ["run", QUICKSTART, "--set", "rng_seed=-1"], ["validate", "Makefile"], ["blueprint", "show", "tinny"],
     ["blueprint", "choose"], ["blueprint", "choose", "Qwen/Qwen3-8B", "--gpus", "-1"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_and_wrong_files_exit_2(arguments: list[str]) -> None:
    done = chrysalis(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_a_typo_is_told_with_what_was_meant(tmp_path: Path) -> None:
    done = chrysalis("plan", QUICKSTART, "--set", "population.varinats=3")
    assert "variants" in done.stderr
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((ROOT / QUICKSTART).read_text().replace("reports:", "raports:"))
    done = chrysalis("validate", QUICKSTART, str(wrong))
    assert done.returncode == 2
    assert f"{wrong}:" in done.stderr
    assert "reports" in done.stderr
    assert done.stdout == f"{QUICKSTART}: a valid experiment\n"


def test_a_base_that_cannot_be_looked_at_hides_no_mistake_of_other_files(tmp_path: Path) -> None:
    base = "blueprint: auto\nbase: {type: pretrained, model: ./model}"
    auto, wrong = tmp_path / "auto.yaml", tmp_path / "wrong.yaml"
    auto.write_text((ROOT / QUICKSTART).read_text().replace("blueprint: tiny", base))
    wrong.write_text((ROOT / QUICKSTART).read_text().replace("reports:", "raports:"))
    done = chrysalis("validate", str(auto), str(wrong))
    assert done.returncode == 2
    assert f"{auto}:7: base.model: no folder {tmp_path / 'model'}" in done.stderr
    assert f"{wrong}:" in done.stderr
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    assert chrysalis("validate", str(auto)).returncode == 1  # the file is well, its base is not
    done = chrysalis("validate", str(auto), str(wrong))
    assert done.returncode == 2
    assert "num_attention_heads is None" in done.stderr
    assert f"{wrong}:" in done.stderr


def test_a_failure_is_a_message_with_a_remedy_and_no_traceback(tmp_path: Path) -> None:
    done = chrysalis("report", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "\nremedy: " in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in chrysalis("report", str(tmp_path), CHRYSALIS_TRACEBACK="1").stderr


@pytest.mark.parametrize(("sent", "code", "told"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_ctrl_c_and_sigterm_say_how_to_go_on(sent: signal.Signals, code: int, told: str, tmp_path: Path) -> None:
    metrics = run_folder(tmp_path) / "metrics.jsonl"
    os.mkfifo(metrics)
    command = [sys.executable, "-m", "chrysalis_ray", "report", str(tmp_path)]
    child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with metrics.open("w"):  # returns once the verb has opened the other end: it is now inside its work
        child.send_signal(sent)
        error = child.communicate(timeout=30)[1]
    assert (child.returncode, error.splitlines()[-1]) == (code, f"{told}: run the same command again to go on")
    assert "Traceback" not in error


TIDIES = """
import sys, time
from chrysalis_ray.cli.outcome import verb
@verb
def work():
    try:
        print("at work", flush=True)
        time.sleep(60)
    finally:
        print("tidying", flush=True)
        sys.stdin.readline()
        print("tidy", flush=True)
work()
"""


def test_a_second_sigterm_does_not_end_the_tidying_that_the_first_began() -> None:
    """`timeout` sends two: to the process, and to its group."""
    command = [sys.executable, "-c", TIDIES]
    child = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in ("at work\n", "tidying\n"):
        assert child.stdout is not None
        assert child.stdout.readline() == line
        child.send_signal(signal.SIGTERM)
    said, error = child.communicate("go on\n", timeout=30)
    assert (said, child.returncode) == ("tidy\n", 143)
    assert error == "\nterminated: run the same command again to go on\n"


LOSES = """
import time
from chrysalis_ray.cli.outcome import verb
from chrysalis_ray.core.errors import BodyError
@verb
def work():
    try:
        print("at work", flush=True)
        time.sleep(60)
    except KeyboardInterrupt as error:
        raise BodyError("the body was lost", "see errors.log") from error
work()
"""


def test_what_a_sigterm_ended_first_is_not_told_as_an_error_of_its_own() -> None:
    """A supervisor sends it to all processes of a run: a body may be gone before the driver stops."""
    child = subprocess.Popen([sys.executable, "-c", LOSES], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "at work\n"
    child.send_signal(signal.SIGTERM)
    _, error = child.communicate(timeout=30)
    assert (child.returncode, error) == (143, "\nterminated: run the same command again to go on\n")


def test_lineage_prints_what_emerged(tmp_path: Path) -> None:
    assert chrysalis("lineage", str(run_folder(tmp_path))).returncode == 1
    (tmp_path / "imago").mkdir()
    (tmp_path / "imago" / "lineage.json").write_text('{"genome": {"id": "4f"}, "parents": ["v000", "v001"]}')
    done = chrysalis("lineage", str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "genome\n  id  4f\nparents\n  0  v000\n  1  v001\n")
    assert json.loads(chrysalis("lineage", str(tmp_path), "--json").stdout)["genome"] == {"id": "4f"}


def test_a_chosen_blueprint_is_a_file_to_write_down_and_use(tmp_path: Path) -> None:
    told = chrysalis("blueprint", "choose", "Qwen/Qwen3-1.7B", "--gpus", "8", "--gpu-memory", "40", "--tokens", "20000000")
    assert told.stdout.startswith("# chosen for 8 variants of 20,000,000 tokens on ")
    assert "8 x GPU of 40 GiB" in told.stdout.splitlines()[0]
    assert "# optimizer.learning_rate: 0.001 is that of qwen3-1.7b" in told.stdout
    mine = tmp_path / "mine.yaml"
    mine.write_text(told.stdout)
    assert chrysalis("validate", str(mine)).stdout == f"{mine}: a valid blueprint\n"
    shown = json.loads(chrysalis("blueprint", "show", str(mine), "--json").stdout)
    assert (shown["lora"]["rank"], shown["body"]["count"], shown["name"]) == (32, "auto", "auto-qwen3-1.7b")
    chosen = json.loads(chrysalis("blueprint", "choose", "Qwen/Qwen3-1.7B", "--json").stdout)
    assert set(chosen) == {"text", "reasons", "tokens"}


def test_a_blueprint_is_shown_whole_with_what_its_base_weighs() -> None:
    shown = chrysalis("blueprint", "show", "qwen3-1.7b").stdout
    assert "# 1,720.6 million parameters, 3.4 GB in bf16; an adapter of rank 16 has 17.43 million" in shown
    assert "sequence_length: 2048" in shown
    assert "near_duplicate" in shown
    missed = chrysalis("blueprint", "show", "tinny").stderr
    assert "not one of those shipped (gemma-2-2b, " in missed
    assert missed.endswith("tiny); did you mean 'tiny'?\nHEAVY []\n")


def test_without_a_name_every_shipped_blueprint_is_listed_with_its_base() -> None:
    shipped = sorted(path.stem for path in (Path(__file__).parents[2] / "blueprints").glob("*.yaml"))
    lines = chrysalis("blueprint", "show").stdout.splitlines()
    assert sorted(line.split()[0] for line in lines) == shipped
    assert "qwen3-0.6b           Qwen/Qwen3-0.6B" in lines
    assert sorted(json.loads(chrysalis("blueprint", "show", "--json").stdout)) == shipped
