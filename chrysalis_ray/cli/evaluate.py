"""`chrysalis evaluate`: what adapters from anywhere lose on held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from chrysalis_ray.cli.arguments import Adapters, Json
from chrysalis_ray.cli.outcome import print_json


def evaluate(
    adapters: Adapters,
    genome: Annotated[
        Path | None,
        typer.Option("--genome", metavar="RUN|DIR", help="A run directory, or the folder of a genome.", exists=True),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", metavar="DIR", help="The folder of their base; that of the run if not given.", exists=True),
    ] = None,
    split: Annotated[str, typer.Option("--split", metavar="SPLIT", help="Held-out text: select or report.")] = "select",
    probe: Annotated[
        list[Path] | None,
        typer.Option("--probe", metavar="FILE", help="A YAML of questions with answers. Repeatable.", exists=True),
    ] = None,
    lm_eval: Annotated[
        list[str] | None, typer.Option("--lm-eval", metavar="TASK", help="A task of lm-eval (an extra). Repeatable.")
    ] = None,
    lm_eval_path: Annotated[
        Path | None, typer.Option("--lm-eval-path", metavar="DIR", help="A folder with tasks of your own.", exists=True)
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="So many items of each lm-eval task.", min=1)
    ] = None,
    json: Json = False,
) -> None:
    """Judge LoRA adapters on the held-out text of a genome, on probes, or on tasks of lm-eval.

    Loss, perplexity, bits per byte and accuracy of each, beside the base, in one packed pass. Writes nothing.

    \b
    chrysalis evaluate alice/ bob/ --genome runs/quickstart
    chrysalis evaluate alice/ --base qwen3-0.6b/ --genome my-genome/ --split report
    chrysalis evaluate alice/ --genome runs/quickstart --probe plurals.yaml
    chrysalis evaluate alice/ bob/ --base qwen3-0.6b/ --lm-eval arc_easy --limit 200
    """
    if split not in ("select", "report"):
        raise typer.BadParameter(f"{split!r} is not a held-out split; select or report")
    from chrysalis_ray.config.probes import read_probe

    probes = [read_probe(path) for path in probe or ()]
    from chrysalis_ray.evaluate.alone import Tasks, evaluate_folders

    tasks = Tasks(tuple(lm_eval or ()), lm_eval_path, limit)
    found = evaluate_folders(adapters, genome, base, cast(Literal["select", "report"], split), probes, tasks)
    if json:
        print_json(found)
    else:
        print("\n".join(_lines(found)))


def _lines(found: dict[str, Any]) -> list[str]:
    """One line per candidate, the best first, and what diverged; probes and tasks below."""
    lines = _text_lines(found) + _agreement_lines(found) if "candidates" in found else [found["base"]]
    for probe, answers in found["probes"].items():
        lines.append(f"{probe}, right answers")
        for name, told in answers.items():
            per_byte = f", {told['accuracy_per_byte']:.1%} per byte" if "accuracy_per_byte" in told else ""
            interval = f"[{told['low']:.1%}, {told['high']:.1%}] of {told['items']}"
            apart = told.get("against")
            against = f", {apart['mean']:+.1%} [{apart['low']:+.1%}, {apart['high']:+.1%}] against the base" if apart else ""
            lines.append(f"{told['accuracy']:>9.1%} {interval}{per_byte}{against}  {name}")
    for task, told in found.get("lm_eval", {}).get("tasks", {}).items():
        lines.append(f"{task}, by lm-eval {found['lm_eval']['version']}")
        lines += [f"  {_metrics(metrics)}  {name}" for name, metrics in told["candidates"].items()]
    return [*lines, *(f"  diverged: {name}" for name in found.get("diverged", ()))]


def _metrics(metrics: dict[str, float]) -> str:
    """Metrics of a task, each with its standard error where there is one."""
    shown = []
    for key, value in metrics.items():
        metric, gap, kept = key.partition(" ")
        error = metrics.get(f"{metric}_stderr{gap}{kept}")
        if not metric.endswith("_stderr"):
            shown.append(f"{key} {value:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
    return ", ".join(shown)


def _text_lines(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['documents']} documents, {found['tokens']:,} tokens of {found['split']}; {found['base']}"]
    lines.append(f"{'loss':>9}{'perplexity':>13}{'bits/byte':>11}{'accuracy':>10}{'against the base':>32}")
    for name, told in sorted(found["candidates"].items(), key=lambda item: item[1]["loss"]):
        bits = "-" if told["bits_per_byte"] is None else f"{told['bits_per_byte']:.4f}"
        accuracy = "-" if told["accuracy"] is None else f"{told['accuracy']:.1%}"
        apart = found["against_base"].get(name)
        compared = f"{apart['mean']:+.4f} [{apart['low']:+.4f}, {apart['high']:+.4f}]" if apart else ""
        lines.append(f"{told['loss']:>9.4f}{told['perplexity']:>13.2f}{bits:>11}{accuracy:>10}{compared:>32}  {name}")
    return lines


def _agreement_lines(found: dict[str, Any]) -> list[str]:
    """How far each predicts from what the other adapters do; nothing where there is one alone."""
    lines = []
    for name, told in sorted(found["agreement"].items(), key=lambda item: item[1]["divergence"]["mean"]):
        apart = told["divergence"]
        kl = f"{apart['mean']:>9.4f} [{apart['low']:.4f}, {apart['high']:.4f}]"
        lines.append(f"{kl}{told['agreement']['mean']:>13.1%}{told['with_mixture']['mean']:>18.1%}  {name}")
    heads = f"{'KL(another || this), nats':<27}{'same token':>11}{'as their mixture':>18}"
    return [heads, *lines] if lines else []
