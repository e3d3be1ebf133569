"""Measure this machine for one experiment, in processes of their own: seconds, then figures instead of guesses.

As many processes as the body has workers. Where memory gives out the slots are halved and all of them start anew, so that
each measurement is that of a fresh process. No torch in here.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chrysalis_ray.config.blueprint import EmbeddedBase
from chrysalis_ray.config.population_checks import largest_rank
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.core.errors import ModelError, error_line
from chrysalis_ray.core.layout import CacheLayout
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.training.passes import threads_of
from chrysalis_ray.training.planning.footprint import USABLE
from chrysalis_ray.training.planning.hardware import Hardware
from chrysalis_ray.training.planning.measured import FORMAT, Measurement, keep_measurement, question_of
from chrysalis_ray.training.planning.placement import place
from chrysalis_ray.training.planning.planner import allowed_slots, with_largest_steps
from chrysalis_ray.training.planning.shapes import ModelShape, config_of, shape_of
from chrysalis_ray.training.planning.slots import settle

OUT_OF_MEMORY = 86  # exit code of a process that ran out of memory and says so
KILLED = -9  # what the system does to a process when memory is gone
PATIENCE_SECONDS = 900.0
LOOK_SECONDS = 1.0  # at each of seven or so loads


def measure(
    loaded: LoadedExperiment,
    hardware: Hardware,
    cache: CacheLayout,
    room: int | None = None,
    look: float = LOOK_SECONDS,
    progress: Callable[[str], None] = lambda line: None,
) -> Measurement:
    """Measure what `loaded` would build on this machine and keep it in the cache.

    `room` is what a worker may use of main memory beyond its imports, in bytes; by default its share of what the machine
    has. `look` is about how many seconds each load is looked at. Raises ModelError for a base that cannot be used, a body
    that this machine cannot hold, and where not even one slot fits.
    """
    loaded = with_largest_steps(loaded)
    shape = shape_of(loaded.base)
    if shape is None:
        raise ModelError(
            f"the sizes of {getattr(loaded.base, 'model', 'the base')} are not known on this machine",
            "download its config.json first (a folder, or the hub's cache)",
        )
    loaded, _ = place(loaded, hardware, shape, cache)
    loaded, _ = settle(loaded, hardware, shape, None)
    _check_workers(loaded, hardware)
    asked = slots = _slots_to_ask(loaded)
    if room is None and not loaded.body.gpus_per_worker:  # CUDA maps far more than there is
        room = int(hardware.memory * USABLE / (loaded.body.workers or 1))
    while True:
        progress(f"measuring {slots} slots on this machine")
        answer = _attempt(loaded, shape, slots, room, look)
        if answer is not None:
            break
        if slots == 1:
            raise ModelError(
                "not even one slot fits into memory",
                "lower lanes.rows_per_microstep, set activation_checkpointing: true, or take a smaller base",
            )
        progress(f"{slots} slots ran out of memory")
        slots //= 2
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    question = question_of(loaded, shape, hardware)
    told = Measurement.from_json({**answer, "question": question, "asked": asked, "date": date, "format": FORMAT})
    keep_measurement(cache, told)
    return told


def _check_workers(loaded: LoadedExperiment, hardware: Hardware) -> None:
    """Every worker of the body must find its place here."""
    workers, gpus = loaded.body.workers or 1, loaded.body.gpus_per_worker or 0.0
    remedy = "measure on the machine that will train, or leave --measure out: the plan is then an estimate"
    if gpus > 0 and hardware.gpus < workers:
        raise ModelError(f"the body has {workers} workers with a GPU each, this machine has {hardware.gpus} GPUs", remedy)
    if gpus == 0 and hardware.cpus < workers:
        raise ModelError(f"the body has {workers} workers, this machine has {hardware.cpus} CPU cores", remedy)


def _slots_to_ask(loaded: LoadedExperiment) -> int:
    """As many as there will be; of `auto` the most that there can be."""
    variants, written = loaded.experiment.population.variants, loaded.body.slots
    if written == "auto":
        return 1 if loaded.blueprint.worn.solo else allowed_slots(loaded.experiment.population)[-1]
    return min(written or 1, variants)


def _attempt(loaded: LoadedExperiment, shape: ModelShape, slots: int, room: int | None, look: float) -> dict[str, Any] | None:
    """What the processes found, None where one of them ran out of memory."""
    with tempfile.TemporaryDirectory(prefix="chrysalis-measure-") as temporary:
        folder = Path(temporary)
        order = order_of(loaded, shape, slots, room, look, folder)
        write_json(folder / "order.json", order)
        codes = _run(folder, order["workers"])
        if any(code in (OUT_OF_MEMORY, KILLED) for code in codes):
            return None
        if any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            said = (folder / f"{failed}.log").read_text(encoding="utf-8", errors="replace")
            raise ModelError(
                f"the measurement ended with {codes[failed]}: {error_line(said)}", "see whether `chrysalis run` does"
            )
        return read_json(folder / "answer.json")


def order_of(
    loaded: LoadedExperiment, shape: ModelShape, slots: int, room: int | None, look: float, folder: Path
) -> dict[str, Any]:
    """What the processes are told; the fields are those of `measured_order.Order`."""
    body, lanes = loaded.body, loaded.blueprint.lanes
    return {
        "base": _base_of(loaded, shape, folder),
        "worn": loaded.blueprint.worn.model_dump(mode="json"),
        "rank": largest_rank(loaded),
        "optimizer": loaded.blueprint.optimizer.type,
        "vocabulary": shape.vocabulary,
        "slots": slots,
        "rows": lanes.rows_per_microstep or lanes.rows_per_step,
        "length": lanes.sequence_length,
        "microsteps": lanes.microsteps,
        "tokens_per_pass": body.tokens_per_pass,
        "precision": body.precision,
        "threads": threads_of(body),
        "workers": body.workers or 1,
        "zero_stage": body.zero_stage or 0,
        "offload": body.offload or "none",
        "nvme_path": body.nvme_path,
        "gradients": body.gradients or "whole",
        "compile": bool(body.compile),
        "activation_checkpointing": bool(body.activation_checkpointing),
        "on_gpu": (body.gpus_per_worker or 0) > 0,
        "began": time.time(),
        "room": room,
        "look": look,
        "folder": str(folder),
    }


def _base_of(loaded: LoadedExperiment, shape: ModelShape, folder: Path) -> dict[str, Any]:
    """Where the base is: a folder with weights, a config, or the few numbers of an embedded one."""
    if isinstance(loaded.base, EmbeddedBase):
        return {"type": "embedded", "spec": loaded.base.model_dump(mode="json")}
    config = config_of(loaded.base)
    if config is None:  # known by its table of sizes alone
        write_json(folder / "base" / "config.json", shape.to_config())
        return {"type": "config", "path": str(folder / "base")}
    whole = any(config.parent.glob("*.safetensors"))
    return {"type": "folder" if whole else "config", "path": str(config.parent)}


def _run(folder: Path, workers: int) -> list[int]:
    """Start the processes, wait for all; exit codes by rank. When one fails the others, which wait for it, are ended."""
    threads = {"GOMP_SPINCOUNT": "1000", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "chrysalis_ray.training.measuring", str(folder / "order.json")]
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(workers):
            log = stack.enter_context((folder / f"{rank}.log").open("wb"))
            environment = {**os.environ, **threads, "LOCAL_RANK": str(rank)}
            process = subprocess.Popen([*command, str(rank)], env=environment, stdout=log, stderr=subprocess.STDOUT)
            processes.append(process)
        try:
            return _wait(processes)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:  # whoever fails first tells why: the others lose their partner and wait
            return [code or 0 for code in codes]
        time.sleep(0.1)
    raise ModelError(
        f"the measurement took longer than {PATIENCE_SECONDS:.0f} s", "lower body.slots or lanes.rows_per_microstep"
    )
