"""A plain experiment of Ray Tune under ASHA, killed while it runs, and restored by Tune; run by the tests, not collected.

python restored_by_tune.py FOLDER first|restored

`first` ends itself by SIGKILL a while after all four trials have passed the first rung. Both print a line of JSON for every
report that is heard; `restored` also how many results every rung of the scheduler holds when Tune has resumed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.execution.tune_controller import TuneController

TRIALS, RUNG, REPORTS, SNAPSHOT_SECONDS = 4, 2, 8, 11


class Teller(tune.Callback):
    def __init__(self, kills: bool) -> None:
        self.kills = kills
        self.rung = 0

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        print(json.dumps({"trial": trial.config["size"], "report": result["training_iteration"]}), flush=True)
        self.rung += result["training_iteration"] == RUNG
        if self.kills and self.rung == TRIALS and result["training_iteration"] == RUNG:
            time.sleep(SNAPSHOT_SECONDS)  # Tune takes a snapshot every ten seconds at most
        if self.kills and self.rung == TRIALS and result["training_iteration"] == RUNG + 2:
            os.kill(os.getpid(), signal.SIGKILL)


def train(config: dict[str, float]) -> None:
    done, kept = 0, tune.get_checkpoint()
    if kept is not None:
        with kept.as_directory() as folder:
            done = int(Path(folder, "steps").read_text())
    for step in range(done + 1, REPORTS + 1):
        time.sleep(0.3)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "steps").write_text(str(step))
            tune.report({"loss": config["size"] / step}, checkpoint=tune.Checkpoint.from_directory(folder))


def rungs(scheduler: Any) -> list[int]:
    return [len(recorded) for _, recorded in scheduler._brackets[0]._rungs]


def main(folder: str, what: str) -> None:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    trainable = tune.with_resources(train, {"CPU": 0.4})
    if what == "first":
        scheduler = tune.schedulers.ASHAScheduler(max_t=REPORTS, grace_period=RUNG, reduction_factor=2)
        tune.Tuner(
            trainable,
            param_space={"size": tune.grid_search([float(size) for size in range(1, TRIALS + 1)])},
            tune_config=tune.TuneConfig(metric="loss", mode="min", scheduler=scheduler),
            run_config=tune.RunConfig(name="population", storage_path=folder, verbose=0, callbacks=[Teller(kills=True)]),
        ).fit()
        return
    resume = TuneController.resume

    def resume_and_tell(controller: Any, resume_config: Any) -> None:
        resume(controller, resume_config)
        print(json.dumps({"rungs": rungs(controller._scheduler_alg), "trials": len(controller._trials)}), flush=True)

    TuneController.resume = resume_and_tell  # type: ignore[method-assign]
    tune.Tuner.restore(str(Path(folder, "population")), trainable, resume_unfinished=True, resume_errored=True).fit()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
