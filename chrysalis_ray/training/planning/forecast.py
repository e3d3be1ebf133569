"""What the plan said and what came: written into the run directory before the run, compared at its end. No torch.

`plan.json` holds the plan of the process that opened the run, and under `came` the peak memory of the first worker and, if
the run went through in one go, its wall time. What is `auto` in a body is settled here, once: the numbers stand in `run.json`,
and a run that is taken up again keeps its shape whatever has been measured since.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from chrysalis_ray.config.blueprint import BodyPatch
from chrysalis_ray.config.resolve import LoadedExperiment
from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import CacheLayout, RunLayout
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.training.planning.hardware import Hardware
from chrysalis_ray.training.planning.plan import clock, gib
from chrysalis_ray.training.planning.planner import plan


def settle_plan(
    loaded: LoadedExperiment,
    layout: RunLayout,
    cache: CacheLayout,
    tell: Callable[[str, str], None] = lambda name, line: None,
    look: Callable[[], Hardware] = Hardware.local,
) -> LoadedExperiment:
    """Write down what is planned, unless that was done before, and tell it; returns the experiment with numbers in its body.
    `look` finds the machine to plan for; it is asked where there is something to plan.

    Raises RunError where `run.json` holds a body that is none.
    """
    fresh = not layout.plan.exists()
    loaded = _settled(loaded, layout, cache, look)
    if fresh:
        for reason in read_json(layout.plan)["said"].get("chosen", ()):
            tell("chosen", reason)
    tell("plan", expected(layout))
    return loaded


def _settled(loaded: LoadedExperiment, layout: RunLayout, cache: CacheLayout, look: Callable[[], Hardware]) -> LoadedExperiment:
    manifest = read_json(layout.run_manifest)
    loaded = _as_settled(loaded, layout, manifest.get("slots"), manifest.get("body"), manifest.get("tokens_per_pass"))
    is_open = bool(loaded.open) or loaded.body.slots == "auto"
    if layout.plan.exists() and not is_open:
        return loaded
    planned = plan(loaded, look(), cache)
    body = {name: getattr(planned.body, name) for name in loaded.open}
    held = planned.body.tokens_per_pass if loaded.body.tokens_per_pass is None else None
    if is_open or held:
        slots = {"slots": planned.body.slots} if loaded.body.slots == "auto" else {}
        passes = {"tokens_per_pass": held} if held else {}
        write_json(layout.run_manifest, {**manifest, **slots, **passes, **({"body": body} if body else {})})
    write_json(layout.plan, {"said": planned.to_json()})
    return _as_settled(loaded, layout, planned.body.slots, body, held)


def _as_settled(loaded: LoadedExperiment, layout: RunLayout, slots: Any, body: Any, held: Any) -> LoadedExperiment:
    """`loaded` with the numbers of `run.json` where it says `auto`; as it is where none stand there. `held` are the tokens of
    a pass."""
    if loaded.body.tokens_per_pass is None and held is not None:
        if not isinstance(held, int) or isinstance(held, bool) or held < 1:
            raise RunError(
                f"{layout.run_manifest} holds passes of {held!r} tokens", "restore it, or give this run another --name"
            )
        loaded = loaded.with_body(tokens_per_pass=held)
    if loaded.body.slots == "auto" and slots is not None:
        if not isinstance(slots, int) or isinstance(slots, bool) or slots < 1:
            raise RunError(f"{layout.run_manifest} holds {slots!r} slots", "restore it, or give this run another --name")
        loaded = loaded.with_body(slots=slots)
    if loaded.open and body:
        try:
            numbers = BodyPatch.model_validate({name: body[name] for name in loaded.open}).model_dump()
        except (ValidationError, KeyError, TypeError) as error:
            raise RunError(
                f"{layout.run_manifest} holds no body where it was settled: {body!r}",
                "restore it, or give this run another --name",
            ) from error
        loaded = loaded.with_body(**{name: numbers[name] for name in loaded.open})
    return loaded


def expected(layout: RunLayout) -> str:
    """What the plan of this run says, in a sentence. What stands in its way is not told: a cluster may have more than this
    machine."""
    said = read_json(layout.plan)["said"]
    memory, time, slots = said.get("memory"), said.get("time"), said["slots_used"]
    parts = [f"{said['variants']} variants in {slots} slots"]
    if memory and time:
        parts += [f"{gib(memory['total'])} per worker", f"about {clock(time['expected'])}"]
    return f"{', '.join(parts)} ({_how(said)})"


def came(layout: RunLayout, seconds: float | None) -> str | None:
    """Keep what came beside what was said; a sentence with both, None where there was no plan.

    `seconds` is the wall time of a run that went through in one go, else None.
    """
    if not layout.plan.exists():
        return None
    content = read_json(layout.plan)
    told = {"peak_memory": peak_of_worker(layout), "wall_seconds": seconds}
    write_json(layout.plan, {**content, "came": {**content.get("came", {}), **{k: v for k, v in told.items() if v}}})
    return said_and_came(content["said"], told)


def said_and_came(said: Mapping[str, Any], told: Mapping[str, Any]) -> str | None:
    """ "memory of a worker: plan said 668 MiB, 655 MiB came; time: ..." None where nothing can be compared."""
    memory, time, parts = said.get("memory"), said.get("time"), []
    if memory and told.get("peak_memory"):
        on_gpu = (said["body"].get("gpus_per_worker") or 0) > 0
        expected = memory["total"] - (memory["process"] if on_gpu else 0)  # torch does not see the context of the driver
        parts.append(f"memory of a worker: plan said {gib(expected)}, {gib(told['peak_memory'])} came")
    if time and told.get("wall_seconds"):
        parts.append(f"time: plan said {clock(time['expected'])}, {clock(told['wall_seconds'])} came")
    if not parts:
        return None
    return f"{'; '.join(parts)} ({_how(said)})"


def _how(said: Mapping[str, Any]) -> str:
    return f"measured {said['measured']}" if said.get("measured") else "a guess; `chrysalis plan --measure` measures"


def peak_of_worker(layout: RunLayout) -> int | None:
    """The most memory that the first worker held after any turn, None where no turn told."""
    if not layout.population_manifest.exists():
        return None
    rows = read_json(layout.population_manifest)["variants"].values()
    peaks = [row["metrics"].get("peak_memory") or 0 for row in rows if row.get("metrics")]
    return max(peaks, default=0) or None
