"""The baseline, as a competent user writes it by hand with Ray 2.60: a Tune trial and a TorchTrainer per variant.

    python benchmarks/handwritten.py RUN_DIRECTORY OUT.json --concurrency 2 --threads 1
    python benchmarks/handwritten.py RUN_DIRECTORY OUT.json --no-ray

It follows Ray's guide "Hyperparameter tuning with Ray Tune" for Train V2: a function trainable calls `TorchTrainer.fit()`,
`TuneReportCallback` carries the metrics to Tune. What was tuned in its favour:

* drivers take a resource of their own and no CPU, so that trials never wait for each other's CPUs (the plain script deadlocks);
* more CPUs are declared than there are, so that a stopped trial's placement group, which Ray frees only seconds later, does
  not hold up the next one; the dashboard runs, because without it Ray does not free it at all;
* Train's health check every 0.1 s instead of 2 s, preemption watcher and metrics off, Tune's loggers off;
* threads by environment, no runtime_env, so that Ray's prestarted workers are used;
* fused AdamW; a checkpoint holds the adapter alone.

`--no-ray` trains the same variants one after the other in one process without any scheduler: the least that sequential
training can cost. It is told beside the comparison, not in place of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from setting import Setting

from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import Variant, read_json, write_json

TUNED = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
SPARE_CPUS = 4


def worker_loop(config: dict[str, Any]) -> None:
    """What each Train worker runs."""
    import ray.train
    from peft_training import train_variant

    def report(metrics: dict[str, Any], model: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            ray.train.report(
                {**metrics, "trial_began": config["trial_began"]}, checkpoint=ray.train.Checkpoint.from_directory(folder)
            )

    train_variant(Variant.from_json(config["variant"]), Setting(**config["setting"]), report)


def trial(config: dict[str, Any]) -> None:
    """One Tune trial: a TorchTrainer of its own. It only drives."""
    from ray import train, tune
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    began = time.time()
    TorchTrainer(
        worker_loop,
        train_loop_config={**config, "trial_began": began},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=train.RunConfig(
            name=f"train-{tune.get_context().get_trial_id()}",
            storage_path=config["storage"],
            callbacks=[TuneReportCallback()],
            checkpoint_config=train.CheckpointConfig(num_to_keep=1),
        ),
    ).fit()


def scheduler_of(population: dict[str, Any]) -> Any:
    """The scheduler that the experiment names, with the same settings."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    spec = population["scheduler"]
    if spec["type"] == "fifo":
        return FIFOScheduler()
    assert spec["type"] == "asha", f"the baseline knows asha and fifo, not {spec['type']}"
    return ASHAScheduler(
        time_attr="report",
        max_t=population["reports"],
        grace_period=spec["grace_reports"],
        reduction_factor=spec["reduction_factor"],
        brackets=spec["brackets"],
    )


def run_with_ray(
    layout: RunLayout, variants: list[Variant], setting: Setting, concurrency: int, storage: Path
) -> dict[str, Any]:
    """Tune + TorchTrainer + PEFT. Seconds run from before Ray is imported to the end of the last trial."""
    os.environ.update(TUNED)
    os.environ["OMP_NUM_THREADS"] = str(setting.threads)
    population = read_json(layout.run_manifest)["experiment"]["experiment"]["population"]
    began = time.time()
    import ray
    from ray import tune

    ray.init(
        address="local",
        num_cpus=concurrency + SPARE_CPUS,
        resources={"trial": concurrency},
        include_dashboard=True,
        log_to_driver=False,
    )
    up = time.time()
    results = tune.Tuner(
        tune.with_resources(trial, {"CPU": 0, "trial": 1}),
        param_space={
            "variant": tune.grid_search([variant.to_json() for variant in variants]),
            "setting": asdict(setting),
            "storage": str(storage / "train"),
        },
        tune_config=tune.TuneConfig(metric="select_loss", mode="min", scheduler=scheduler_of(population)),
        run_config=tune.RunConfig(name="handwritten", storage_path=str(storage / "tune"), verbose=0),
    ).fit()
    ended = time.time()
    failed = [str(result.error) for result in results if result.error is not None]
    if failed:
        sys.exit(f"{len(failed)} of {len(variants)} trials failed, the first with:\n{failed[0]}")
    rows = [result.metrics for result in results]
    ray.shutdown()
    return {"began": began, "ray_up": up, "ended": ended, "variants": [told(row) for row in rows]}


def run_without_ray(variants: list[Variant], setting: Setting) -> dict[str, Any]:
    """One process, one variant after the other, each with a fresh model; seconds run from before the heavy imports."""
    began = time.time()
    from peft_training import train_variant

    last: dict[str, dict[str, Any]] = {}
    for variant in variants:
        trial_began = time.time()

        def report(metrics: dict[str, Any], model: Any, trial_began: float = trial_began) -> None:
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
            last[metrics["variant"]] = {**metrics, "trial_began": trial_began}

        train_variant(variant, setting, report)
    return {"began": began, "ray_up": began, "ended": time.time(), "variants": [told(row) for row in last.values()]}


def told(row: dict[str, Any]) -> dict[str, Any]:
    names = ("variant", "report", "steps", "select_loss", "trial_began", "training_began", "train_seconds", "evaluate_seconds")
    return {name: row[name] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="a run directory whose base, tokens, seed and branch are there")
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--concurrency", type=int, default=1, help="trials at a time")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of each worker")
    parser.add_argument("--no-ray", action="store_true", help="one process, one variant after the other, no scheduler")
    arguments = parser.parse_args()

    from chrysalis_ray.population.branch import read_branch

    layout = RunLayout(arguments.run.resolve())
    manifest = read_json(layout.run_manifest)["experiment"]
    setting = Setting(
        base_folder=read_json(layout.base_manifest)["path"],
        tokens_folder=str(layout.tokens),
        seed_folder=str(layout.seed),
        targets=tuple(manifest["blueprint"]["lora"]["targets"]),
        rows_per_report=manifest["experiment"]["evaluate"]["rows_per_report"],
        threads=arguments.threads,
    )
    variants = read_branch(layout)
    if arguments.no_ray:
        outcome = run_without_ray(variants, replace(setting, threads=os.cpu_count() or 1))
    else:
        with tempfile.TemporaryDirectory() as storage:
            outcome = run_with_ray(layout, variants, setting, arguments.concurrency, Path(storage))
    write_json(arguments.out, outcome)


if __name__ == "__main__":
    main()
