"""`chrysalis fold`: an adapter folded into its base, as a model that needs no peft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chrysalis_ray.cli.arguments import Json
from chrysalis_ray.cli.outcome import print_json

KNOWN_BY = {
    "name": "the base is the one that the adapter names",
    "revision": "the base is the one that the adapter names, in its revision",
    "weights": "the base has the weights of the folder that the adapter names",
    "shapes": "nothing here says which base this is: it is taken because the adapter's modules fit it",
}


def fold(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="A PEFT LoRA folder, or a hub id like owner/adapter.", show_default=False)
    ],
    base: Annotated[Path, typer.Option(metavar="DIR", help="The base's folder: config.json and safetensors.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to make; nothing is ever overwritten.")],
    json: Json = False,
) -> None:
    """Fold an adapter into its base.

    Writes the model that both make together, each weight of the type it has in the base: a folder that transformers loads
    without peft. A block of rows is in memory at a time.

    \b
    chrysalis fold runs/quickstart/imago --base Qwen3-0.6B/ --out model
    """
    from chrysalis_ray.evaluate.fold import fold_adapter

    manifest = fold_adapter(adapter, base, out)
    if json:
        print_json(manifest)
        return
    lines = [f"{adapter}: {manifest['modules']} modules folded into {manifest['base']}", KNOWN_BY[manifest["base_known_by"]]]
    if manifest["untied"]:
        lines.append(f"the head was the embedding; now it has weights of its own, {manifest['untied']}")
    done = "this very model lay there already" if manifest.get("done_before") else "written"
    print("\n".join([*lines, f"{out}: {done}, {len(manifest['files'])} files"]))
