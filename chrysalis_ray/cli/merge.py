"""`chrysalis merge`: LoRA adapters from anywhere into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from chrysalis_ray.cli.arguments import Adapters, Json, SeedAdapter
from chrysalis_ray.cli.outcome import print_json

LITTLE = 0.9  # of the energy: a cut that keeps less is worth a warning


def is_config(name: str) -> bool:
    """Whether what was given is a YAML file and no adapter."""
    return name.endswith((".yaml", ".yml"))


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no list of numbers; for example --weights 0.5,0.25,0.25") from error


def merge(
    adapters: Adapters,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to make; nothing is ever overwritten.")],
    strategy: Annotated[
        str | None, typer.Option("--strategy", "-s", metavar="METHOD", help="How, e.g. ensemble, consensus, slerp, ties, tsv.")
    ] = None,
    seed_adapter: SeedAdapter = None,
    weights: Annotated[
        str | None, typer.Option(metavar="W1,W2,...", help="How much each adapter counts; divided by their sum.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The base's folder; only methods that measure inputs load it.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text", metavar="FILE", help="Plain text like an adapter's training data: one for all, or one for each."
        ),
    ] = None,
    rank: Annotated[
        str | None, typer.Option(metavar="R", help="Rank of the result, or `exact`; the largest that goes in if not given.")
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method, as under `merge:`. Repeatable."),
    ] = None,
    json: Json = False,
) -> None:
    """Merge LoRA adapters into one.

    Any PEFT LoRA folders or hub ids of one base, which is not loaded; or one YAML as mergekit reads it, where it means the same
    for adapters. Writes a PEFT folder with merge.json beside the weights.

    \b
    chrysalis merge alice/ bob/ --strategy ensemble --weights 2,1 --out both
    chrysalis merge a/ b/ c/ --strategy ties --set density=0.3 --rank 32 --out three
    chrysalis merge mergekit.yaml --out four
    """
    given = _numbers(weights)
    if (base is None) != (not text):
        raise typer.BadParameter("--base and --text belong together: inputs are those of a base on some text")
    if any(is_config(name) for name in adapters):
        if len(adapters) > 1 or any((strategy, seed_adapter, weights, set, base)):
            raise typer.BadParameter("a config says all of it: give nothing but --out and --rank beside it")
        manifest, remarks = _merge_config(Path(adapters[0]), out, rank)
    else:
        manifest, remarks = _merge_named(adapters, strategy, out, seed_adapter, given, rank, set, base, text), ()
    if json:
        print_json(manifest)
    else:
        print("\n".join([*_lines(manifest, out), *remarks]))


def _merge_named(
    adapters: list[str], strategy: str | None, out: Path, seed_adapter: str | None, given: list[float] | None,
    rank: str | None, set: list[str] | None, base: Path | None, text: list[Path] | None,
) -> dict[str, Any]:  # fmt: skip
    if strategy is None:
        raise typer.BadParameter("give a --strategy, for example ensemble")
    from chrysalis_ray.config.merges import read_merge

    spec = read_merge(strategy, [*(set or []), *([f"rank={rank}"] if rank is not None else [])])
    from chrysalis_ray.evaluate.folders import Texts, merge_folders

    texts = Texts(base, tuple(text)) if base is not None and text else None
    return merge_folders(adapters, spec, out, seed_adapter, given, texts)


def _merge_config(path: Path, out: Path, rank: str | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The merge that a mergekit config asks for, and what of it was left aside."""
    from chrysalis_ray.config.mergekit import read_mergekit

    recipe = read_mergekit(path, rank)
    from chrysalis_ray.evaluate.folders import merge_folders

    manifest = merge_folders(recipe.adapters, recipe.spec, out, recipe.seed_adapter, recipe.given, base_model=recipe.base_model)
    return manifest, recipe.remarks


def _lines(manifest: dict[str, Any], out: Path) -> list[str]:
    """What was merged, how well the rank holds it, and what a person should know."""
    names, notes = manifest["adapters"], manifest["notes"]
    around = f" around {manifest['seed_adapter']}" if manifest["seed_adapter"] else ""
    lines = [f"{notes['method']} of {len(names)} adapters of {manifest['base_model'] or 'an unnamed base'}{around}"]
    lines += [f"  {weight:8.4f}  {name}" for weight, name in zip(manifest["weights"], names, strict=True)]
    least = min(manifest["per_module"].items(), key=lambda item: -item[1]["residual"])
    lines.append(
        f"rank {manifest['rank']} holds {manifest['captured_energy']:.1%} of it (residual {manifest['residual']:.4f}; worst "
        f"{least[0]}, {least[1]['residual']:.4f})"
    )
    if manifest["captured_energy"] < LITTLE:
        lines.append("  that is little: give a larger --rank, `--rank exact`, or a method that stays in the mean's rank")
    lines += [f"  held out: {name}: {reason}" for name, reason in notes.get("held_out", {}).items()]
    lines += [
        f"  {name} lacks {count} modules; they count as zero"
        for name, count in notes.get("modules_missing_as_zero", {}).items()
    ]
    done = "this very merge lay there already" if manifest.get("done_before") else "written"
    return [*lines, f"{out}: {done} (sha256 {manifest['sha256'][:16]})"]
