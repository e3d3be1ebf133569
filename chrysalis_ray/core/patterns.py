"""Ranks and alphas that some modules of an adapter have of their own: peft's `rank_pattern` and `alpha_pattern`.

A key is a module's name or the end of one, from a dot on. Of several that fit a module the longest counts. That is peft's rule,
the first that fits, where longer keys stand before shorter ones; it does not depend on the order in which JSON keeps keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

Value = TypeVar("Value", int, float)


class Geometry(Protocol):
    """What a variant's hyperparameters say of its adapter."""

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def use_rslora(self) -> bool: ...


class Kind(NamedTuple):
    """What a module has of its own; None: what the adapter has."""

    rank: int | None = None
    alpha: float | None = None

    def scale(self, own: Geometry) -> float:
        """How many times B A counts here: alpha/rank, or alpha/sqrt(rank) with rsLoRA (arXiv 2312.03732)."""
        rank = own.rank if self.rank is None else self.rank
        alpha = own.alpha if self.alpha is None else self.alpha
        return alpha / rank**0.5 if own.use_rslora else alpha / rank


@dataclass(frozen=True)
class Patterns:
    """`ranks` and `alphas` of the modules that these keys mean; all others have the adapter's own."""

    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.ranks or self.alphas)

    def kind_of(self, module: str) -> Kind:
        return Kind(_value(self.ranks, module), _value(self.alphas, module))

    def rank_of(self, module: str, rank: int) -> int:
        """The rank of a module in an adapter of `rank`."""
        own = _value(self.ranks, module)
        return rank if own is None else own

    def largest(self, rank: int) -> int:
        """The largest rank that a module may have in an adapter of `rank`."""
        return max(rank, *self.ranks.values()) if self.ranks else rank

    def written(self, modules: Iterable[str]) -> dict[str, Any]:
        """`rank_pattern` and `alpha_pattern` for peft, which takes the first key that fits, in any order of keys: where one
        would hide another the whole names of `modules`."""
        names = tuple(modules)
        return {"rank_pattern": _unhidden(self.ranks, names), "alpha_pattern": _unhidden(self.alphas, names)}

    def to_json(self) -> dict[str, Any]:
        """Nothing where there are no patterns."""
        told = {"ranks": dict(self.ranks), "alphas": dict(self.alphas)}
        return {name: values for name, values in told.items() if values}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Patterns:
        return cls(value.get("ranks", {}), value.get("alphas", {}))


PLAIN = Patterns()


def means(key: str, module: str) -> bool:
    """Whether a key means this module: by its name or the end of it."""
    return module == key or module.endswith(f".{key}")


def nearest_key(key: str, modules: Iterable[str]) -> str:
    """``did you mean 'q_proj'?`` by the ends of these modules' names that have as many parts as `key`; nothing if none is
    near."""
    parts = key.count(".") + 1
    ends = sorted({".".join(module.split(".")[-parts:]) for module in modules})
    close = difflib.get_close_matches(key, ends, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def hidden_key(pattern: Mapping[str, Any]) -> tuple[str, str] | None:
    """A key that would count for nothing because an earlier one means all that it means, as (earlier, hidden)."""
    keys = list(pattern)
    pairs = ((earlier, key) for place, key in enumerate(keys) for earlier in keys[:place])
    return next(((earlier, key) for earlier, key in pairs if means(earlier, key)), None)


def _value(pattern: Mapping[str, Value], module: str) -> Value | None:
    """The value of the longest key that means `module`."""
    key = max((key for key in pattern if means(key, module)), key=len, default=None)
    return None if key is None else pattern[key]


def _unhidden(pattern: Mapping[str, Value], modules: Iterable[str]) -> dict[str, Value]:
    if not any(means(short, key) for key in pattern for short in pattern if short != key):
        return dict(pattern)
    return {module: own for module in modules if (own := _value(pattern, module)) is not None}
