"""Something else in the place of an attribute of a library, for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def instead(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Inside this block `owner.name` is `stand_in`. Raises AttributeError where there is nothing of this name."""
    own = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, own)
