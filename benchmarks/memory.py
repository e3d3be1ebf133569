"""Peak memory of N variants in training, without Ray: one packed process against N PEFT processes at once.

    python benchmarks/memory.py
    python benchmarks/memory.py --variants 8 --tokens 256 --json

What a base costs is paid once instead of N times; activations are paid N times on both sides. Memory is the sum of PSS, so
that pages that processes share (libraries) count once on both sides. Every process trains until all have taken a step.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine

from chrysalis_ray.core.records import write_json

RESULTS = Path(__file__).resolve().parent / "results"


def measure(shape: str, variants: int, tokens: int) -> dict[str, Any]:
    """MiB of both sides for a base of this shape."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        mine = [sys.executable, __file__]
        common = ["--shape", shape, "--variants", str(variants), "--tokens", str(tokens), "--folder", temporary]
        subprocess.run([*mine, "--role", "base", *common], check=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        sides = {
            role: machine.watch([*mine, "--role", role, *common], environment, folder / f"{role}.log").peak_bytes / 2**20
            for role in ("packed", "processes")
        }
    return {
        "base": shape,
        "variants": variants,
        "tokens_per_variant": tokens,
        "packed_mib": sides["packed"],
        "processes_mib": sides["processes"],
        "ratio": sides["processes"] / sides["packed"],
    }


def play(role: str, shape: str, variants: int, tokens: int, folder: Path) -> None:
    """What a child does: write the base, train packed, start N PEFT processes, or be one of them."""
    if role == "processes":
        mine = [sys.executable, __file__, "--role", "peft", "--shape", shape, "--variants", str(variants)]
        rest = ["--tokens", str(tokens), "--folder", str(folder)]
        children = [subprocess.Popen([*mine, *rest]) for _ in range(variants)]
        if any([child.wait() for child in children]):
            sys.exit("a PEFT process failed")
        return
    import packing

    packing.quieten()
    base = packing.shapes()[shape]
    if role == "base":
        packing.write_base(base, folder / "base")
        return
    rows = packing.draw_rows(variants if role == "packed" else 1, tokens, base.vocabulary)
    if role == "packed":
        held = packing.tokens_per_pass(base, packing.HERE_ON_CPU)
        step = packing.packed(folder / "base", rows, held=held)
    else:
        step = packing.sequential(folder / "base", rows)
    step()
    (folder / f"{role}-{os.getpid()}.trained").touch()
    while role == "peft" and len(list(folder.glob("peft-*.trained"))) < variants:
        step()
    for _ in range(5):
        step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variants", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="per variant and step")
    parser.add_argument("--shapes", nargs="+", default=["tiny", "wide"], choices=["tiny", "wide"])
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS / "memory.json", help="also write JSON, by default here")
    for name in ("--role", "--shape", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.role:
        play(asked.role, asked.shape, asked.variants, asked.tokens, Path(asked.folder))
        return
    print(f"{'base':<8}{'tokens':>8}{asked.variants:>5} processes{'packed':>14}{'ratio':>8}")
    rows = []
    for shape in asked.shapes:
        row = measure(shape, asked.variants, asked.tokens)
        rows.append(row)
        print(
            f"{shape:<8}{asked.tokens:>8}{row['processes_mib']:>11.0f} MiB{row['packed_mib']:>10.0f} MiB{row['ratio']:>7.2f}x"
        )
    if asked.json:
        write_json(asked.json, {"machine": machine.describe(), "rows": rows})


if __name__ == "__main__":
    main()
