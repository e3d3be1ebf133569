"""A run directory belongs to exactly one experiment, and a kill at any write leaves one that the same command takes up."""

import json
from pathlib import Path

import pytest

from chrysalis_ray.config.claim import another_body, claim_run, run_directory
from chrysalis_ray.config.loading import load_experiment
from chrysalis_ray.core import records
from chrysalis_ray.core.errors import RunError


@pytest.mark.parametrize("name", ["", ".", "..", "../elsewhere", "a/b", "/tmp/x", ".cache", "-x", "a b", "a\nb", "x" * 65])
def test_a_name_that_leads_elsewhere_is_refused(good: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="cannot name a run directory"):
        run_directory(load_experiment(good), tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_another_kind_is_left_alone(good: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"holds thesis\.tex"):
        run_directory(load_experiment(good), tmp_path / "runs", "mine")


class Killed(BaseException):
    """The process is gone."""


def test_a_kill_at_any_write_leaves_a_directory_that_is_taken_up(good: Path, tmp_path: Path, monkeypatch) -> None:
    loaded, replace = load_experiment(good), records.os.replace
    for survived in range(2):
        layout = run_directory(loaded, tmp_path, f"killed-{survived}")
        left = [survived]

        def until(source, target, left=left):
            if left[0] == 0:
                Path(source).with_name(".run.json.abcd_123").write_text("half a")  # a kill leaves the draft
                raise Killed
            left[0] -= 1
            replace(source, target)

        layout.root.mkdir()
        layout.lock.write_text("process 1 on here\n")
        with monkeypatch.context() as patch:
            patch.setattr(records.os, "replace", until)
            with pytest.raises(Killed):
                claim_run(loaded, layout)
        assert not layout.run_manifest.exists()
        again = run_directory(loaded, tmp_path, f"killed-{survived}")
        run_id = claim_run(loaded, again)
        assert claim_run(loaded, run_directory(loaded, tmp_path, f"killed-{survived}")) == run_id
        assert layout.experiment_yaml.read_text() == good.read_text()


def test_a_run_goes_on_with_another_body_that_computes_the_same(good: Path, tmp_path: Path) -> None:
    layout, plain = run_directory(load_experiment(good), tmp_path, "mine"), load_experiment(good)
    run_id = claim_run(plain, layout)
    assert another_body(plain, layout) is None
    doubled = load_experiment(good, ["body.workers=2", "body.gradients=sharded", "body.hang_seconds=60"])
    assert claim_run(doubled, layout) == run_id
    said = another_body(doubled, layout)
    assert said is not None
    assert said.startswith("workers 1 -> 2, gradients whole -> sharded, hang_seconds None -> 60.0: ")
    assert "within rounding" in said
    for other in ("body.slots=2", "body.precision=bf16", "body.lanes=fixed", "body.count=2"):
        with pytest.raises(RunError, match="holds another experiment"):
            claim_run(load_experiment(good, [other]), layout)


def test_another_experiment_and_a_damaged_manifest_are_refused(good: Path, tmp_path: Path) -> None:
    layout = run_directory(load_experiment(good), tmp_path, "mine")
    claim_run(load_experiment(good), layout)
    with pytest.raises(RunError, match=r"holds another experiment \(\w+, not \w+\): rng_seed is 17 there, 77 here\n"):
        claim_run(load_experiment(good, ["rng_seed=77"]), layout)
    many = [
        "rng_seed=77",
        "population.variants=2",
        "blueprint.lora.rank=2",
        "blueprint.lora.alpha=3",
        "merge=[{method: winner}]",
    ]
    with pytest.raises(RunError, match=r": blueprint\.lora\.alpha is 16\.0 there, 3\.0 here, .* and 2 more\n") as refused:
        claim_run(load_experiment(good, many), layout)
    assert len(refused.value.message) < 600
    manifest = json.loads(layout.run_manifest.read_text())
    layout.run_manifest.write_text(json.dumps({**manifest, "experiment_sha256": "0" * 64, "version": "0.0.1"}))
    with pytest.raises(RunError, match=r"it was begun by version 0\.0\.1, this is "):
        claim_run(load_experiment(good), layout)
    layout.run_manifest.write_text('{"name": "mine"')
    with pytest.raises(RunError, match="is damaged") as refused:
        claim_run(load_experiment(good), layout)
    assert "--name" in refused.value.remedy
