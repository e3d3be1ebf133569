"""The compiled kernel of sketches (`_sketching.c`), where the installation could build it. What it does is also done in arrays,
equal to the bit: without a compiler a genome takes longer and has the same id."""

from __future__ import annotations

from types import ModuleType

VERSION = 1  # of the kernel: another one is left alone; to be raised with every change of what it computes or is asked


def _built() -> ModuleType | None:
    try:
        from chrysalis_ray.genome import _sketching
    except ImportError:  # not compiled here, or for another machine
        return None
    return _sketching if _sketching.VERSION == VERSION else None


kernel = _built()
