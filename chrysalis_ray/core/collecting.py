"""Python's collector of garbage, and times when there is none to be found."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage() -> Iterator[None]:
    """For a block that imports much. What is imported stays, and a collector that goes through all of it again and again takes
    as long as a quarter of the imports; afterwards it looks at what comes later alone."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
