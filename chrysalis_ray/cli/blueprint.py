"""`chrysalis blueprint`: look at a blueprint, and have one chosen for a base and a machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chrysalis_ray.cli.arguments import Json, Runs
from chrysalis_ray.cli.outcome import print_json, print_lines

if TYPE_CHECKING:
    from chrysalis_ray.config.blueprint import Blueprint
    from chrysalis_ray.training.planning.hardware import Hardware

USUAL_GPU_GIB = 80.0  # where --gpus asks for GPUs and there are none here


def show_blueprint(
    blueprint: Annotated[
        str | None, typer.Argument(metavar="NAME|FILE", help="A shipped blueprint, or a file.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Show a blueprint whole, or which there are.

    Every field, with what it extends and all defaults filled in; what the base weighs, and what an adapter does. Without a
    name: every shipped blueprint and its base.

    \b
    chrysalis blueprint show qwen3-1.7b
    """
    from chrysalis_ray.config.loading import load_blueprint, shipped_blueprints
    from chrysalis_ray.config.problems import nearest
    from chrysalis_ray.config.writing import blueprint_text
    from chrysalis_ray.core.errors import ConfigError

    shipped = shipped_blueprints()
    if blueprint is None:
        bases = {name: getattr(load_blueprint(path).base, "model", "an embedded one") for name, path in shipped.items()}
        print_json(bases) if json else print_lines(f"{name:20} {base}" for name, base in bases.items())
        return
    path = shipped.get(blueprint, Path(blueprint))
    if not path.exists():
        guess = f"; did you mean {close!r}?" if (close := nearest(blueprint, shipped)) else ""
        raise ConfigError(f"no blueprint {blueprint!r}: no file, and not one of those shipped ({', '.join(shipped)}){guess}")
    loaded = load_blueprint(path)
    if json:
        print_json(loaded.model_dump(mode="json"))
    else:
        print(blueprint_text(loaded, [str(path), *_sizes(loaded, path)]), end="")


def _sizes(blueprint: Blueprint, path: Path) -> list[str]:
    from chrysalis_ray.config.resolve import located
    from chrysalis_ray.training.planning.alone import adapter_parameters
    from chrysalis_ray.training.planning.shapes import shape_of

    shape = shape_of(located(blueprint.base, path))
    if shape is None:
        return []
    adapter = adapter_parameters(shape, blueprint, blueprint.rank)
    kind = "" if blueprint.adapter is None else f"{blueprint.adapter_type} "
    return [
        f"{shape.parameters / 1e6:,.1f} million parameters, {shape.parameters * 2 / 1e9:.1f} GB in bf16; an {kind}adapter of "
        f"rank {blueprint.rank} has {adapter / 1e6:.2f} million"
    ]


def choose_blueprint(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="A model of the Hugging Face hub, or a folder.", show_default=False)
    ],
    gpus: Annotated[
        int | None, typer.Option(min=0, max=4096, help="GPUs to choose for; those of this machine if not given.")
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1.0, max=4096.0, metavar="GIB", help="Memory of each; that of this machine's, else 80.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that each variant trains; chosen as well if not given.")
    ] = None,
    variants: Annotated[int, typer.Option(min=1, max=4096, help="Variants that train.")] = 8,
    probe: Annotated[
        Path | None,
        typer.Option(metavar="EXPERIMENT", help="Decide by a short population on this machine, on the text of an experiment."),
    ] = None,
    runs: Runs = Path("runs"),
    json: Json = False,
) -> None:
    """Choose a blueprint for a base.

    What `blueprint: auto` in an experiment would mean: YAML on stdout, a reason for everything chosen above it as comments.

    \b
    chrysalis blueprint choose Qwen/Qwen3-1.7B --gpus 8 --tokens 20000000 > mine.yaml
    chrysalis blueprint choose Qwen/Qwen3-0.6B --probe experiments/auto.yaml > mine.yaml
    """
    if probe is not None:
        if gpus is not None or gpu_memory is not None or tokens is not None:
            raise typer.BadParameter("a probe trains on this machine, by the experiment's budget: leave the others out")
        _choose_by_probe(base, probe, runs, json)
        return
    from chrysalis_ray.training.planning.choice import choose, named_base
    from chrysalis_ray.training.planning.hardware import Hardware

    machine = _machine(Hardware.local(), gpus, gpu_memory)
    chosen = choose(named_base(base), machine, variants=variants, tokens=tokens)
    if json:
        print_json({"text": chosen.text, "reasons": chosen.reasons, "tokens": chosen.tokens})
        return
    print(f"# chosen for {variants} variants of {chosen.tokens:,} tokens on {machine.line()}")
    print(chosen.text, end="")


def _choose_by_probe(base: str, experiment: Path, runs: Path, as_json: bool) -> None:
    """Print the blueprint that a probe of `base` chooses. What it leaves lies in the run directory `NAME-choice`."""
    import sys
    from json import dumps

    from chrysalis_ray.cli.story import TerminalStory
    from chrysalis_ray.config.claim import run_directory
    from chrysalis_ray.config.loading import load_experiment
    from chrysalis_ray.core.lock import sole_owner
    from chrysalis_ray.lifecycle import check_outside, decide_blueprint, library_output
    from chrysalis_ray.training.planning.choice import chooser, named_base

    told = ["blueprint=auto", f"base={dumps(named_base(base).model_dump(exclude_none=True))}"]
    name = f"{load_experiment(experiment, told, chooser()).experiment.name}-choice"
    loaded = load_experiment(experiment, told, chooser(runs, name))
    if loaded.experiment.probe is None:
        loaded = load_experiment(experiment, [*told, "probe={}"], chooser(runs, name))
    layout = run_directory(loaded, runs.absolute(), name)
    check_outside(loaded, None)
    with TerminalStory(sys.stderr) as story, sole_owner(layout.lock), library_output(layout.driver_log):
        chosen = decide_blueprint(loaded, layout, story, None).chosen
    assert chosen is not None
    if as_json:
        print_json({"text": chosen.text, "reasons": chosen.reasons, "tokens": chosen.tokens})
    else:
        print(f"# chosen by a probe on {experiment}; its heats lie in {layout.probe().root}")
        print(chosen.text, end="")


def _machine(here: Hardware, gpus: int | None, gpu_memory: float | None) -> Hardware:
    """This machine, or one with so many GPUs: what it does not say of them is taken from those here."""
    if gpus is None and gpu_memory is None:
        return here
    count = here.gpus or 1 if gpus is None else gpus
    if not count:
        return replace(here, gpus=0, gpu_memory=0, gpu_name="")
    each = int(gpu_memory * 2**30) if gpu_memory else here.gpu_memory or int(USUAL_GPU_GIB * 2**30)
    return replace(here, gpus=count, gpu_memory=each, cpus=max(here.cpus, 4 * count))
