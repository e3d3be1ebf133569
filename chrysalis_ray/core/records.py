"""What the program writes: frozen dataclasses and canonical JSON.

Canonical JSON here means UTF-8, sorted keys, no spaces, no NaN: two equal records have equal bytes, so that a sha256 names
them. Everything the program leaves on disk is written by `write_json` (temporary file, fsync, rename): a reader sees the
old file or the new one, never half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


def canonical_json(value: Any) -> bytes:
    """Bytes of `value` with sorted keys and no spaces. Raises ValueError on NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_of(value: Any) -> str:
    """Hex sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that a reader never sees half of it, even across a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def is_draft(path: Path) -> bool:
    """Whether `path` is named like a temporary file of `write_bytes`, which a kill can leave behind."""
    return re.fullmatch(r"\..+\.[a-z0-9_]{8}", path.name) is not None


def sync_folder(path: Path) -> None:
    """fsync a folder, so that a name just created in it survives a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Indented, sorted JSON for people to open; atomic like `write_bytes`."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """The parsed content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


MIXTURE = "mixture of variants"  # the candidate that asks all variants at once: no variant and no merge can bear such a name

# Optimizer classes of torch.optim that treat every number of a row alike, and what each remembers of every number.
MOMENTS: dict[str, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "nadam": ("exp_avg", "exp_avg_sq"),
    "radam": ("exp_avg", "exp_avg_sq"),
    "adamax": ("exp_avg", "exp_inf"),
    "adagrad": ("sum",),
    "adadelta": ("square_avg", "acc_delta"),
    "rmsprop": ("square_avg",),
    "sgd": ("momentum_buffer",),
}


@dataclass(frozen=True)
class Hyperparameters:
    """What may differ from variant to variant beside its epigenome. Plain numbers and words, safe to hash and to ship.

    `rank` x `alpha` give the LoRA scale alpha/rank (alpha/sqrt(rank) with `use_rslora`, arXiv 2312.03732). `clip` is a
    maximum gradient norm per variant (0 turns clipping off). `warmup_fraction`, `decay`, `final_fraction` and
    `decay_fraction` shape the learning rate over the variant's whole budget of optimizer steps.

    `optimizer` is a key of MOMENTS; `momentum` is that of sgd. B learns `plus_ratio` times as fast as A (LoRA+, arXiv
    2402.12354), and A not at all with `freeze_a` (LoRA-FA, arXiv 2308.03303). `dropout` is the share of x that A does not
    see in training.
    """

    rank: int = 8
    alpha: float = 16.0
    use_rslora: bool = False
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float = 1.0
    decay: str = "cosine"  # constant | linear | cosine | wsd
    warmup_fraction: float = 0.05
    optimizer: str = "adamw"
    momentum: float = 0.9
    plus_ratio: float = 1.0
    freeze_a: bool = False
    dropout: float = 0.0
    final_fraction: float = 0.0
    decay_fraction: float = 0.1

    @property
    def scale(self) -> float:
        return self.alpha / self.rank**0.5 if self.use_rslora else self.alpha / self.rank

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Hyperparameters:
        return cls(**{f.name: value[f.name] for f in fields(cls) if f.name in value})


@dataclass(frozen=True)
class Change:
    """From row `row` of a variant on (counted from its first step) the domains named here stand at these levels."""

    row: int
    express: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return {"row": self.row, "express": dict(self.express)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Change:
        return cls(row=int(value["row"]), express=dict(value["express"]))


@dataclass(frozen=True)
class Epigenome:
    """How strongly each domain of the genome is expressed: the data mix of one variant. `core.shares` makes shares of it.

    `express` maps a domain to a level in [0, inf); the share of a domain is level x prior, normalised. The prior is
    ``uniform`` (every domain alike), ``size`` (proportional to its tokens), ``temperature(T)`` or ``unimax(EPOCHS)``.

    `floors` are least shares, `caps` most epochs over the whole budget; a part `replay_share` of all rows is drawn by the
    levels `replay` instead. A label of a domain weighs `loss_weights` in the loss (1 where none is given). `kept` is the
    share of every domain's rows that is drawn at all. `stages` were written before the first step, `changes` were appended
    while the variant trained; both ascend. `budget_rows` rows of `row_tokens` tokens are the whole training, 0 where nothing
    depends on it. `rows` says how many rows each domain holds in training, of which epochs are counted; it is empty where
    nothing depends on it, and in mixes that were branched before caps were exact.
    """

    express: Mapping[str, float]
    prior: str = "uniform"
    floors: Mapping[str, float] = field(default_factory=dict)
    caps: Mapping[str, float] = field(default_factory=dict)
    replay_share: float = 0.0
    replay: Mapping[str, float] = field(default_factory=dict)
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    kept: float = 1.0
    budget_rows: int = 0
    row_tokens: int = 0
    rows: Mapping[str, int] = field(default_factory=dict)
    stages: tuple[Change, ...] = ()
    changes: tuple[Change, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Only what was set: a mix of levels and prior alone has two keys."""
        told: dict[str, Any] = {"express": dict(self.express), "prior": self.prior}
        for name in ("floors", "caps", "replay", "loss_weights", "rows"):
            if value := getattr(self, name):
                told[name] = dict(value)
        for name, unset in (("replay_share", 0.0), ("kept", 1.0), ("budget_rows", 0), ("row_tokens", 0)):
            if getattr(self, name) != unset:
                told[name] = getattr(self, name)
        for name in ("stages", "changes"):
            if changes := getattr(self, name):
                told[name] = [change.to_json() for change in changes]
        return told

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Epigenome:
        plain = {f.name: value[f.name] for f in fields(cls) if f.name in value}
        for name in ("express", "floors", "caps", "replay", "loss_weights", "rows"):
            if name in plain:
                plain[name] = dict(plain[name])
        for name in ("stages", "changes"):
            if name in plain:
                plain[name] = tuple(Change.from_json(change) for change in plain[name])
        return cls(**plain)


@dataclass(frozen=True)
class Variant:
    """One member of the population, self-contained: everything needed to train it alone, by anyone, later.

    `variant_id` is stable and independent of the body that hosts it. `steps` is the whole budget in optimizer steps,
    `chunk_steps` the steps between two reports. A step consumes `rows_per_step` rows of `sequence_length` tokens.
    """

    variant_id: str
    index: int
    rng_seed: int
    seed_sha256: str
    genome_id: str
    base_sha256: str
    hyperparameters: Hyperparameters
    epigenome: Epigenome
    steps: int
    chunk_steps: int
    rows_per_step: int
    sequence_length: int
    parents: tuple[str, ...] = field(default=())

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.sequence_length

    @property
    def chunks(self) -> int:
        """Reports until the whole budget is spent."""
        return self.steps // self.chunk_steps

    def to_json(self) -> dict[str, Any]:
        return {
            **{
                f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("hyperparameters", "epigenome", "parents")
            },
            "hyperparameters": self.hyperparameters.to_json(),
            "epigenome": self.epigenome.to_json(),
            "parents": list(self.parents),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Variant:
        plain = {f.name: value[f.name] for f in fields(cls) if f.name in value}
        plain["hyperparameters"] = Hyperparameters.from_json(value["hyperparameters"])
        plain["epigenome"] = Epigenome.from_json(value["epigenome"])
        plain["parents"] = tuple(value.get("parents", ()))
        return cls(**plain)
