"""Which row comes next: the mix plan against `datasets.interleave_datasets` and torch's WeightedRandomSampler, on equal shares.

    python benchmarks/mixer.py
    python benchmarks/mixer.py --samples 1000000 --json

Everybody mixes the same domains of row numbers in the same shares and hands out (domain, row); nobody reads text. Beside the
speed: how long the first sample after a position takes (there is no other way to resume), how far the drawn shares are from
those asked for, and how many rows came twice before their domain was through. Each number is the median of three.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
from datasets import Dataset, IterableDataset, disable_progress_bars, interleave_datasets
from torch import Generator
from torch.utils.data import WeightedRandomSampler

from chrysalis_ray.core.apportioned import apportioned
from chrysalis_ray.core.records import write_json
from chrysalis_ray.core.shares import Segment
from chrysalis_ray.genome import mix
from chrysalis_ray.genome.mix import MixPlan

RESULTS = Path(__file__).resolve().parent / "results"
FAR = 10**9
BATCH = 65_536
ROWS = {f"domain{k:02d}": int(3000 * 1.7**k) for k in range(12)}  # 3,000 to 1,028,000 rows; 2.5 million in all
LEVELS = {domain: 1.0 + k % 5 for k, domain in enumerate(ROWS)}
SHARES = {domain: level / sum(LEVELS.values()) for domain, level in LEVELS.items()}
Drawn = tuple[np.ndarray, np.ndarray]  # domain and row of each sample


def seconds(work: Callable[[], Any]) -> float:
    """Median of three."""
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


# ours ---------------------------------------------------------------------------------------------------------------


def planned(later: int = 0) -> MixPlan:
    """The plan; with `later` further segments, whose shares take turns."""
    names, turned = list(SHARES), list(SHARES.values())
    segments = [Segment(10_000 * k, dict(zip(names, turned[k:] + turned[:k], strict=True))) for k in range(1, later + 1)]
    return MixPlan(SHARES, ROWS, 17, segments)


def counted() -> MixPlan:
    """The plan of a mix with floors or caps: whole quotas of two billion rows."""
    return MixPlan(SHARES, ROWS, 17, quotas=apportioned(SHARES, 2 * FAR, {}))


def by_plan(plan: MixPlan, samples: int, batch: int) -> Drawn:
    parts = [plan.arrays(start, min(batch, samples - start)) for start in range(0, samples, batch)]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[2] for part in parts])


def access_seconds(plan: MixPlan, repeats: int = 300) -> float:
    """Mean over positions around 10^9, one sample each."""
    began = time.perf_counter()
    for number in range(repeats):
        plan.draw(FAR + 7919 * number, 1)
    return (time.perf_counter() - began) / repeats


# theirs -------------------------------------------------------------------------------------------------------------


def streams() -> IterableDataset:
    """Iterable datasets of row numbers, shuffled by a buffer, interleaved with probabilities."""

    def numbers(number: int, size: int) -> Iterator[dict[str, int]]:
        yield from ({"domain": number, "row": row} for row in range(size))

    made = [
        IterableDataset.from_generator(numbers, gen_kwargs={"number": number, "size": size}).shuffle(17, buffer_size=1000)
        for number, size in enumerate(ROWS.values())
    ]
    return interleave_datasets(made, probabilities=list(SHARES.values()), seed=17, stopping_strategy="all_exhausted")


def by_stream(samples: int) -> Drawn:
    pairs = [(row["domain"], row["row"]) for row in itertools.islice(streams(), samples)]
    drawn = np.array(pairs)
    return drawn[:, 0], drawn[:, 1]


def tables() -> list[Dataset]:
    """Map-style datasets of row numbers, each shuffled."""
    made = [
        Dataset.from_dict({"domain": np.full(size, number), "row": np.arange(size)})
        for number, size in enumerate(ROWS.values())
    ]
    return [table.shuffle(seed=17) for table in made]


def by_table(made: Sequence[Dataset], samples: int) -> Drawn:
    """The interleaved table is built whole, then read in large batches; the build counts for all it holds."""
    whole = interleave_datasets(list(made), probabilities=list(SHARES.values()), seed=17, stopping_strategy="first_exhausted")
    parts = [batch for batch in whole.with_format("numpy").iter(batch_size=BATCH)][: -(-samples // BATCH)]
    return np.concatenate([part["domain"] for part in parts]), np.concatenate([part["row"] for part in parts])


def by_torch(samples: int) -> Drawn:
    """A weight per row: the share of its domain over the rows of the domain."""
    sizes = np.array(list(ROWS.values()))
    weights = np.repeat(np.array(list(SHARES.values())) / sizes, sizes)
    sampler = WeightedRandomSampler(weights, samples, replacement=True, generator=Generator().manual_seed(17))  # type: ignore[arg-type]
    flat = np.fromiter(sampler, dtype=np.int64, count=samples)
    ends = np.cumsum(sizes)
    domain = np.searchsorted(ends, flat, "right")
    return domain, flat - (ends - sizes)[domain]


# comparison ---------------------------------------------------------------------------------------------------------


def quality(drawn: Drawn) -> dict[str, float]:
    """The largest difference from an asked share, and the share of first-epoch samples whose row had come already."""
    domain, row = drawn
    found = np.bincount(domain, minlength=len(ROWS)) / len(domain)
    twice, of = 0, 0
    for number, size in enumerate(ROWS.values()):
        first = row[domain == number][:size]
        twice, of = twice + len(first) - len(np.unique(first)), of + len(first)
    return {"worst_share_error": float(np.abs(found - list(SHARES.values())).max()), "repeated": twice / of}


def compare(samples: int, skip: int) -> dict[str, Any]:
    plan, changed, made = planned(), planned(32), tables()
    whole = len(by_table(made, 10**9)[0])
    few = min(samples, 100_000)
    rows: dict[str, dict[str, Any]] = {}
    rows["mix plan, batches of 65,536"] = {
        "samples_per_second": samples / seconds(lambda: by_plan(plan, samples, BATCH)),
        "access_at": FAR,
        "access_seconds": access_seconds(plan),
        **quality(by_plan(plan, samples, BATCH)),
    }
    rows["mix plan, steps of 32"] = {"samples_per_second": few / seconds(lambda: by_plan(plan, few, 32))}
    rows["mix plan of 33 segments"] = {
        "samples_per_second": samples / seconds(lambda: by_plan(changed, samples, BATCH)),
        "access_at": FAR,
        "access_seconds": access_seconds(changed),
    }
    whole_draws = counted()
    rows["mix plan with floors or caps"] = {
        "samples_per_second": samples / seconds(lambda: by_plan(whole_draws, samples, BATCH)),
        "access_at": FAR,
        "access_seconds": access_seconds(whole_draws),
        **quality(by_plan(whole_draws, samples, BATCH)),
    }
    rows["mix plan with caps, steps of 32"] = {"samples_per_second": few / seconds(lambda: by_plan(whole_draws, few, 32))}
    rows["interleave_datasets, iterable"] = {
        "samples_per_second": few / seconds(lambda: by_stream(few)),
        "access_at": skip,
        "access_seconds": seconds(lambda: next(iter(streams().skip(skip)))),
        **quality(by_stream(few)),
    }
    rows["interleave_datasets, table"] = {
        "samples_per_second": whole / seconds(lambda: by_table(made, whole)),
        **quality(by_table(made, whole)),
    }
    rows["WeightedRandomSampler"] = {
        "samples_per_second": samples / seconds(lambda: by_torch(samples)),
        "access_at": samples,
        "access_seconds": seconds(lambda: by_torch(samples)),
        **quality(by_torch(samples)),
    }
    built = seconds(lambda: (mix._pattern.cache_clear(), mix._turned.cache_clear(), planned()))
    return {"samples": samples, "domains": len(ROWS), "plan_seconds": built, "mixers": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--skip", type=int, default=100_000, help="the position that an iterable is asked to begin at")
    parser.add_argument("--json", action="store_true", help="keep the result in results/mixer.json")
    options = parser.parse_args(arguments)
    disable_progress_bars()
    found = compare(options.samples, options.skip)
    found["load"] = machine.load_now()
    print(f"{found['domains']} domains, {sum(ROWS.values()):,} rows; a plan is made in {1e3 * found['plan_seconds']:.1f} ms")
    ours = next(iter(found["mixers"].values()))["samples_per_second"]
    print(f"{'':32} {'samples/s':>12} {'of ours':>8} {'a position':>14} {'ms':>10} {'share error':>12} {'came twice':>11}")
    for name, row in found["mixers"].items():
        speed = row["samples_per_second"]
        at = f"{row['access_at']:>14,} {1e3 * row['access_seconds']:10.3f}" if "access_at" in row else f"{'-':>14} {'-':>10}"
        good = f"{row['worst_share_error']:12.5f} {row['repeated']:11.1%}" if "repeated" in row else ""
        print(f"{name:32} {speed:12,.0f} {speed / ours:8.1%} {at} {good}")
    if options.json:
        write_json(RESULTS / "mixer.json", {"machine": machine.describe(), **found})


if __name__ == "__main__":
    main()
