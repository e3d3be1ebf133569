"""All that an adapter feeds the modules of its base, as second moments E[x x^T], [in, in]: what `regmean` of `space: dense`
goes by.

In a run on rows of the variant's own mix, spread evenly over what it was trained on; for adapters from anywhere on plain text.
The moments of a file are measured so many modules at a time as `AT_ONCE` bytes hold (one at least), in a pass over the rows
each, and written at once: 8 x in^2 bytes of memory for a module, 4 x in^2 bytes of the file. A file is safetensors, fp32; it is
there when it is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import Variant, sync_folder
from chrysalis_ray.evaluate.inputs import listen, read_through
from chrysalis_ray.merge.core_space import Factors
from chrysalis_ray.merge.inputs import Inputs
from chrysalis_ray.seed.adapter import AdapterWeights, read_adapter
from chrysalis_ray.seed.tensors import write_floats
from chrysalis_ray.training.lanes import Feed
from chrysalis_ray.training.pack import Pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chrysalis_ray.evaluate.heldout import Place
    from chrysalis_ray.evaluate.subjects import OwnRows
    from chrysalis_ray.genome.tokens import TokenStore

AT_ONCE = 1 << 30  # bytes of the moments that are measured in one pass; a larger one has a pass of its own
SPARE = 1 << 28  # bytes that are left on a disk


class WholeMoments:
    """Sums of x^T x over tokens in fp64, module by module, where the inputs are computed."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        self.sums = {module: torch.zeros(size, size, dtype=torch.float64) for module, size in sizes.items()}
        self.tokens = dict.fromkeys(sizes, 0)

    def add(self, module: str, x_TI: Tensor) -> None:
        """Count the inputs x of one module, [tokens, in]."""
        x_TI = x_TI.detach().double()
        self.sums[module] = self.sums[module].to(x_TI.device).addmm_(x_TI.T, x_TI)
        self.tokens[module] += len(x_TI)

    def means(self) -> Iterator[tuple[str, Tensor]]:
        """E[x x^T] of every module in order, fp32, each let go of. Raises MergeError for what is not finite, and where nothing
        came in."""
        for module in sorted(self.sums):
            total_II = self.sums.pop(module)
            mean_II = (total_II / max(self.tokens[module], 1)).float()
            if not self.tokens[module] or not bool(torch.isfinite(mean_II).all()):
                what = "is not finite" if self.tokens[module] else "was never called"
                raise MergeError(f"what came into module {module} {what}", "leave that adapter out, or give other text")
            yield module, mean_II.triu() + mean_II.triu(1).T


Measure = Callable[[WholeMoments], None]  # lets the modules of these moments hear what comes in, over all rows


def measured(sizes: Mapping[str, int], measure: Measure) -> Iterator[tuple[str, Tensor]]:
    """E[x x^T] of every module in order, as many modules in a pass as there is memory for."""
    for group in groups(sizes):
        moments = WholeMoments(group)
        measure(moments)
        yield from moments.means()


def groups(sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Neighbours in the order of names whose moments are `AT_ONCE` bytes at most together, or one alone."""
    found: list[dict[str, int]] = []
    room = 0
    for module in sorted(sizes):
        room -= 8 * sizes[module] ** 2
        if not found or room < 0:
            found.append({})
            room = AT_ONCE - 8 * sizes[module] ** 2
        found[-1][module] = sizes[module]
    return found


def input_sizes(adapters: Iterable[Mapping[str, Factors]]) -> dict[str, int]:
    """How many features every module takes that any of the adapters has."""
    sizes: dict[str, int] = {}
    for adapter in adapters:
        for module in adapter:
            if module not in sizes:
                sizes[module] = adapter[module][0].shape[1]
    return sizes


def refuse_too_little_room(folder: Path, sizes: Sequence[Mapping[str, int]]) -> int:
    """The bytes of the moments of these adapters. Raises MergeError if the disk of `folder` has no room for them."""
    wanted = 4 * sum(size**2 for own in sizes for size in own.values())
    free = shutil.disk_usage(folder).free
    if wanted + SPARE > free:
        raise MergeError(
            f"whole inputs of {len(sizes)} adapters are {wanted / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB left",
            "make room, merge fewer adapters, or take `space: core`, which needs next to nothing",
        )
    return wanted


def write_moments(path: Path, sizes: Mapping[str, int], moments: Iterator[tuple[str, Tensor]]) -> None:
    """A file of moments, whole or absent. Raises MergeError as `moments` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.part")

    def next_of(name: str) -> Tensor:
        module, moment_II = next(moments)
        assert module == name
        return moment_II

    try:
        with building.open("wb") as stream:
            write_floats(stream, {module: (size, size) for module, size in sizes.items()}, next_of, "format", "pt")
            stream.flush()
            os.fsync(
                stream.fileno()
            )  # scores that stand for it are synced too: after a power cut nobody would measure it again
        building.replace(path)
        sync_folder(path.parent)
    finally:
        building.unlink(missing_ok=True)


def open_moments(path: Path) -> Mapping[str, Tensor]:
    """The moments of a file, each read when it is asked for. Raises MergeError for anything else."""
    if not path.is_file():
        raise MergeError(
            f"there is no {path.name}: what that adapter feeds the modules was not measured, as it was not finite or the disk "
            "had no room for it",
            "make room on the disk, or take `space: core`",
        )
    return _Stored(path)


class _Stored(Mapping[str, Tensor]):
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise MergeError(f"{path}: {error}", "delete it, and measure the inputs again") from error
        self._names = sorted(self._file.keys())

    def __getitem__(self, module: str) -> Tensor:
        if module not in self._names:
            raise KeyError(module)
        return self._file.get_tensor(module)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


# in a run -----------------------------------------------------------------------------------------------------------


class Asking(Protocol):
    """A candidate of the body: its folder, and the rows that it is asked about (None: nobody asks)."""

    @property
    def folder(self) -> str | None: ...
    @property
    def own(self) -> OwnRows | None: ...


def keep_whole_inputs(
    pack: Pack, tokens: TokenStore, candidates: Sequence[Asking], most_rows: int, find: Callable[[str], Path]
) -> None:
    """Write what every candidate that was asked feeds the modules of the base on `most_rows` rows of its own.

    Each is put into the first slot in turn. One whose inputs are not finite has no file. Collective, like `listen`.
    """
    for candidate in candidates:
        if candidate.own is None or candidate.folder is None:
            continue
        adapter = read_adapter(find(candidate.folder))
        pack.load_adapter(0, adapter.factors, adapter.scale)
        rows = rows_of(candidate.own, tokens, most_rows)
        sizes = {target.name: target.in_features for target in pack.bank.targets}

        def measure(moments: WholeMoments, rows: Sequence[Place] = rows) -> None:
            listen(pack, 0, tokens, "train", rows, moments)

        moments = measured(sizes, measure)
        try:
            if pack.engine.rank == 0:
                write_moments(Path(candidate.own.file), sizes, moments)
            else:
                for _ in moments:
                    pass
        except MergeError:
            continue


def throw_away(layout: RunLayout) -> None:
    """Remove what `keep_whole_inputs` wrote, whole or not: it is large, and nobody asks for it once the merges are made."""
    each = layout.whole_inputs("*")
    for path in (*each.parent.glob(each.name), *each.parent.glob(f".{each.name}.part")):
        path.unlink(missing_ok=True)


def rows_of(own: OwnRows, tokens: TokenStore, most_rows: int) -> list[Place]:
    """Rows of the train split, spread evenly over what the variant was trained on; the same whoever asks."""
    plan = Feed(Variant.from_json(own.variant), tokens).plan
    count = min(most_rows, own.rows)
    drawn = [plan.draw(place * own.rows // count, 1)[0] for place in range(count)]
    return [(domain, row) for domain, _, row in drawn]


# from anywhere ------------------------------------------------------------------------------------------------------


def measured_files(
    folder: Path,
    load: Callable[[], PreTrainedModel],
    readers: Sequence[tuple[AdapterWeights, Sequence[Sequence[int]]]],
    everyone: Sequence[Mapping[str, Factors]],
) -> Inputs:
    """What each of `readers`, an adapter and token rows, feeds the modules that any of `everyone` has: a file each in `folder`.

    Those that lie there are not measured again, and the base is loaded only for others. Raises MergeError for a base of other
    modules, and a disk without room.
    """
    sizes = input_sizes(everyone)
    files = [folder / f"inputs-{number}.safetensors" for number in range(len(readers))]
    absent = [number for number, file in enumerate(files) if not file.is_file()]
    if absent:
        refuse_too_little_room(folder, [sizes] * len(absent))
        model = load()
        for number in absent:
            adapter, rows = readers[number]

            def measure(moments: WholeMoments, adapter: AdapterWeights = adapter, rows: Sequence[Sequence[int]] = rows) -> None:
                read_through(model, adapter, rows, moments)

            write_moments(files[number], sizes, measured(sizes, measure))
    return [open_moments(file) for file in files]
