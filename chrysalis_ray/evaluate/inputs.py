"""What every adapter feeds the modules of its base, measured on text of its own: what `regmean` goes by.

One forward pass per adapter, over the held-out *select* rows of a run, in the body that holds the base, or over plain text for
adapters from anywhere. Of the inputs x of a module only x V is looked at, with V the input directions
that any of the adapters reads, so that the second moment is [columns of V, columns of V] and never [in, in]. A file holds, for
each module, a root of that moment (see `merge/inputs.py`): safetensors, fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.core.records import write_bytes
from chrysalis_ray.evaluate.heldout import Place, heldout_rows, rows_of_worker
from chrysalis_ray.merge.core_space import Factors, orthonormalise
from chrysalis_ray.merge.inputs import Roots, root_of_moment
from chrysalis_ray.seed.adapter import AdapterWeights, read_adapter
from chrysalis_ray.seed.linear import linear_shape
from chrysalis_ray.seed.tensors import parse_tensors, tensor_bytes
from chrysalis_ray.training.bank import Window
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.packed import PackedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chrysalis_ray.genome.tokens import TokenStore

WINDOW = 256  # tokens of one row of text
MOST_WINDOWS = 64  # rows of an adapter, spread evenly over its text: 16384 tokens
ROWS_AT_ONCE = 4
MAX_TEXT_BYTES = 64_000_000


def input_directions(adapters: Iterable[Mapping[str, Factors]]) -> dict[str, Tensor]:
    """Orthonormal V [in, columns] of every module: the span of the A of all adapters, in fp64."""
    rows: dict[str, list[Tensor]] = {}
    for adapter in adapters:
        for module in adapter:
            a_ri, b_or = adapter[module]
            if bool(a_ri.any()) and bool(b_or.any()):
                rows.setdefault(module, []).append(a_ri.to("cpu", torch.float64))
    directions = {}
    for module, parts in rows.items():
        basis, square = orthonormalise(torch.cat(parts).T)
        directions[module] = basis.apply(torch.eye(len(square), dtype=torch.float64))
    return directions


class Sums(Protocol):
    """Whoever sums up what comes into modules, of which it knows how many features they take."""

    sizes: dict[str, int]
    sums: dict[str, Tensor]
    tokens: dict[str, int]

    def add(self, module: str, x_TI: Tensor) -> None: ...


class Moments:
    """Sums of (x V)^T (x V) over tokens, module by module."""

    def __init__(self, directions: Mapping[str, Tensor]) -> None:
        self.directions = directions
        self.sizes = {module: len(v) for module, v in directions.items()}
        self.sums = {module: v.new_zeros(v.shape[1], v.shape[1]) for module, v in directions.items()}
        self.tokens = dict.fromkeys(directions, 0)

    def add(self, module: str, x_TI: Tensor) -> None:
        """Count the inputs x of one module, [tokens, in]."""
        seen_TQ = x_TI.detach().double() @ self.directions[module].to(x_TI.device)
        self.sums[module] += (seen_TQ.T @ seen_TQ).cpu()
        self.tokens[module] += len(x_TI)

    def roots(self) -> dict[str, Tensor]:
        """Root F of E[x x^T] of every module, fp32. Raises MergeError for what is not finite, and where nothing came in."""
        for module, total in self.sums.items():
            if not self.tokens[module] or not bool(torch.isfinite(total).all()):
                what = "is not finite" if self.tokens[module] else "was never called"
                raise MergeError(f"what came into module {module} {what}", "leave that adapter out, or give other text")
        return {
            module: root_of_moment(self.directions[module], total / self.tokens[module]).float()
            for module, total in self.sums.items()
        }


# in a run -----------------------------------------------------------------------------------------------------------


class Asking(Protocol):
    """A candidate of the body: its folder, the file to write (None: nobody asks), and the adapters whose directions count."""

    @property
    def folder(self) -> str | None: ...
    @property
    def inputs(self) -> str | None: ...
    @property
    def beside(self) -> tuple[str, ...]: ...


def keep_inputs(
    pack: Pack, tokens: TokenStore, candidates: Sequence[Asking], split: str, rows_per_domain: int, find: Callable[[str], Path]
) -> None:
    """Write what every candidate that was asked for feeds the modules of the base, for the merges that go by it.

    Each is put into the first slot in turn; `find` makes a path of what a candidate calls a folder. One whose inputs are not
    finite has no file. Collective, like `measure_slot`.
    """
    for candidate in candidates:
        if candidate.inputs is None or candidate.folder is None:
            continue
        adapters = [read_adapter(find(folder)).factors for folder in candidate.beside]
        own = read_adapter(find(candidate.folder))
        pack.load_adapter(0, own.factors, own.scale)
        try:
            roots = measure_slot(pack, 0, tokens, split, rows_per_domain, input_directions(adapters))
        except MergeError:
            continue
        if pack.engine.rank == 0:
            write_inputs(Path(candidate.inputs), roots)


def measure_slot(
    pack: Pack, slot: int, tokens: TokenStore, split: str, rows_per_domain: int, directions: Mapping[str, Tensor],
    batch_rows: int = 8,
) -> dict[str, Tensor]:  # fmt: skip
    """Roots for every module of `directions`, under the adapter of a slot, over the rows that `score_rows` reads.

    Tokens of no document do not count. Collective: every worker of a body calls it alike, and ends with the same roots.
    """
    moments = Moments(directions)
    listen(pack, slot, tokens, split, heldout_rows(tokens, split, rows_per_domain), moments, batch_rows)
    return moments.roots()


def listen(
    pack: Pack, slot: int, tokens: TokenStore, split: str, rows: Sequence[Place], moments: Sums, batch_rows: int = 8
) -> None:
    """Tell `moments` what comes into its modules under the adapter of a slot, over these rows; all workers end with the same
    sums. Collective."""
    place = pack.arrange([slot]).index(slot)
    shard = next(shard for shard in pack.shards.live if shard.window.rows.start <= place < shard.window.rows.stop)
    ear = _Ear(moments, place, shard.window)
    linears = [module for module in shard.trunk.modules() if isinstance(module, PackedLinear) and module.name in moments.sums]
    handles = [linear.register_forward_pre_hook(partial(ear.hear, linear.name)) for linear in linears]
    try:
        for group, spare in rows_of_worker(rows, batch_rows, pack.engine.parts, pack.engine.whole):
            batch = tokens.batch(group, split)
            ear.counts_T = torch.from_numpy((batch.document.reshape(-1) >= 0) & (not spare))
            pack.score([slot], batch)
    finally:
        for handle in handles:
            handle.remove()
    for module in sorted(moments.sums):
        total_QQ, tokens_seen = moments.sums[module].to(pack.engine.device), moments.tokens[module]
        counted = torch.tensor([tokens_seen], dtype=torch.float64, device=pack.engine.device)
        pack.engine.reduce(total_QQ)
        pack.engine.reduce(counted)
        moments.sums[module], moments.tokens[module] = total_QQ.cpu(), int(counted)


@dataclass
class _Ear:
    """Listens to what comes into the modules of the variant in one row of the bank, in the pass that computes it."""

    moments: Sums
    row: int
    window: Window
    counts_T: Tensor | None = None

    def hear(self, module: str, linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = self.window.rows
        if not rows.start <= self.row < rows.stop:
            return
        x_TI = args[0].reshape(rows.stop - rows.start, -1, args[0].shape[-1])[self.row - rows.start]
        assert self.counts_T is not None
        self.moments.add(module, x_TI[self.counts_T.to(x_TI.device)])


# from anywhere ------------------------------------------------------------------------------------------------------


def measure_inputs(
    model: PreTrainedModel, adapter: AdapterWeights, rows: Sequence[Sequence[int]], directions: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Roots for every module of `directions`, of the base with `adapter` on token rows. Raises MergeError for another base."""
    moments = Moments(directions)
    read_through(model, adapter, rows, moments)
    return moments.roots()


def read_through(model: PreTrainedModel, adapter: AdapterWeights, rows: Sequence[Sequence[int]], moments: Sums) -> None:
    """Tell `moments` what comes into its modules while the base with `adapter` reads token rows. Raises MergeError for another
    base."""
    with adapted(model, adapter, moments), torch.no_grad():
        for start in range(0, len(rows), ROWS_AT_ONCE):
            batch = rows[start : start + ROWS_AT_ONCE]
            for length in sorted({len(row) for row in batch}):
                ids = torch.tensor([row for row in batch if len(row) == length], device=model.device)
                model(input_ids=ids, use_cache=False)


@contextmanager
def adapted(model: PreTrainedModel, adapter: AdapterWeights, moments: Sums) -> Iterator[None]:
    """The model with the adapter beside its modules while the context lasts, telling `moments` what comes in."""
    handles = []
    try:
        for module in sorted({*moments.sizes, *adapter.factors}):
            place = _linear(model, module, moments.sizes.get(module), adapter.factors.get(module))
            handles.append(place.register_forward_hook(_hook(adapter, module, moments, model.device)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(adapter: AdapterWeights, module: str, moments: Sums, device: torch.device) -> Any:
    factors = adapter.factors.get(module)
    a_ri, b_or = (side.to(device) for side in factors) if factors is not None else (None, None)

    def add_delta(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        if module in moments.sums:
            moments.add(module, x.reshape(-1, x.shape[-1]))
        if a_ri is None or b_or is None:
            return output
        return output + (adapter.scale * (x @ a_ri.to(x.dtype).T)) @ b_or.to(x.dtype).T

    return add_delta


def _linear(model: PreTrainedModel, module: str, size: int | None, factors: Factors | None) -> nn.Module:
    """The module of the base by its name. Raises MergeError if there is none, or of other sizes."""
    remedy = "give the folder of the very base that these adapters were trained on"
    try:
        place = model.get_submodule(module)
    except AttributeError as error:
        raise MergeError(f"the base has no module {module}", remedy) from error
    shape = linear_shape(place)
    wanted_in = ({size} if size is not None else set()) | ({factors[0].shape[1]} if factors else set())
    wanted_out = {factors[1].shape[0]} if factors else set()
    if shape is None or wanted_in - {shape[1]} or wanted_out - {shape[0]}:
        has = "not linear" if shape is None else f"[{shape[0]}, {shape[1]}]"
        raise MergeError(f"module {module} of the base is {has}; the adapters have {wanted_out or '?'} x {wanted_in}", remedy)
    return place


def read_rows(text: Path, base_folder: Path) -> list[list[int]]:
    """At most `MOST_WINDOWS` rows of `WINDOW` tokens, spread evenly over a text file. Raises MergeError for no text."""
    from transformers import AutoTokenizer

    if not text.is_file() or text.stat().st_size > MAX_TEXT_BYTES:
        raise MergeError(f"{text} is no text file of at most {MAX_TEXT_BYTES} bytes", "give plain text in UTF-8")
    try:
        written = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MergeError(f"{text} is not UTF-8 (byte {error.start})", "save it as UTF-8") from error
    tokenizer = AutoTokenizer.from_pretrained(str(base_folder), local_files_only=True, trust_remote_code=False)
    ids = tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    rows = [row for row in rows if len(row) == WINDOW] or rows
    if not rows:
        raise MergeError(f"{text} holds no text", "give text of the kind that the adapter was trained on")
    count = min(len(rows), MOST_WINDOWS)
    return [rows[place * len(rows) // count] for place in range(count)]


def write_inputs(path: Path, roots: Roots) -> None:
    """Keep the roots of one adapter; the same roots give the same bytes."""
    write_bytes(path, tensor_bytes({module: root.float() for module, root in roots.items()}, "format", "pt"))


def read_inputs(path: Path) -> dict[str, Tensor]:
    """Roots that `write_inputs` kept. Raises MergeError for anything else."""
    try:
        return parse_tensors(path.read_bytes())[0]
    except (OSError, ValueError) as error:
        raise MergeError(f"{path}: {error}", "delete it, and measure the inputs again") from error
