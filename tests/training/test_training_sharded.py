"""Data-parallel workers and a ZeRO-3-sharded base: the same adapters as one worker with the whole base. Real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sharded_worker import rows_of, train_case

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.training.disk import DiskFolder
from chrysalis_ray.training.engine import ShardedEngine, check_nvme

WORKER = Path(__file__).with_name("sharded_worker.py")
Result = dict[str, torch.Tensor]


def run(folder: Path, world: int, *cases: str) -> list[list[Result]]:
    """What every worker ended with, per case. One set of processes trains all cases in turn."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), str(rank), str(world), *cases],
            env={**environment, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [worker.communicate(timeout=550)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert not any(worker.returncode for worker in workers), "\n".join(output[-3000:] for output in said)
    return [[load_file(folder / f"{case}.{rank}.safetensors") for rank in range(world)] for case in range(len(cases))]


@pytest.fixture(scope="module")
def two_workers(tiny_base: Path, tiny_untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[Result]]:
    folder = tmp_path_factory.mktemp("workers")
    return run(
        folder,
        2,
        f"whole={tiny_base}",
        f"sharded={tiny_base}",
        f"offloaded={tiny_untied_base}",
        f"batches={tiny_base}",
        f"fixed={tiny_base}",
        f"strict={tiny_base}",
        f"strict-sharded={tiny_base}",
        f"solo={tiny_base}",
        f"whole-layered={tiny_base}",
        f"sharded-layered={tiny_base}",
        f"batches-layered={tiny_base}",
        f"fixed-layered={tiny_base}",
        f"patterns={tiny_base}",
        f"patterns-layered={tiny_base}",
        f"adalora={tiny_base}",
    )


OWN = ("own_share", "moments", "gradient_numbers")  # what differs from worker to worker


def assert_equal(found: list[Result], expected: Result) -> None:
    """Every worker within 1e-6 of `expected` (relative, for losses of several nats), and all workers the same bits.

    Of gradients each worker has those of its own slots, and together they have all.
    """
    for name, value in expected.items():
        if name in OWN:
            continue
        told = [worker[name] for worker in found if name in worker]
        assert len(told) == (1 if name.endswith("gradient") else len(found)), name
        for tensor in told:
            assert (tensor - value).abs().max().item() <= 1e-6 * max(1.0, value.abs().max().item()), name
            assert torch.equal(tensor, told[0]), name


def test_two_workers_equal_one(two_workers: list[list[Result]], tiny_base: Path) -> None:
    assert_equal(two_workers[0], train_case("whole", tiny_base))


def test_modules_of_other_ranks_and_ranks_that_are_taken_away_are_the_same_on_two_workers(
    two_workers: list[list[Result]], tiny_base: Path
) -> None:
    for place, case in ((12, "patterns"), (13, "patterns"), (14, "adalora")):
        assert_equal(two_workers[place], train_case(case, tiny_base))


@pytest.mark.slow
def test_four_workers_equal_one_with_a_base_that_is_whole_sharded_or_offloaded(
    tiny_base: Path, tiny_untied_base: Path, tmp_path: Path
) -> None:
    whole, sharded, offloaded = run(tmp_path, 4, f"whole={tiny_base}", f"sharded={tiny_base}", f"offloaded={tiny_untied_base}")
    assert_equal(whole, train_case("whole", tiny_base))
    assert_equal(sharded, train_case("whole", tiny_base))
    assert_equal(offloaded, train_case("whole", tiny_untied_base))


@pytest.mark.parametrize("case", ["batches", "fixed"])
def test_two_workers_equal_one_where_batches_differ(case: str, two_workers: list[list[Result]], tiny_base: Path) -> None:
    """Sums over workers are asked for by all of them in one order, whoever moves."""
    assert_equal(two_workers[("batches", "fixed").index(case) + 3], train_case(case, tiny_base))


def test_a_sharded_base_equals_a_whole_one(two_workers: list[list[Result]], tiny_base: Path) -> None:
    assert_equal(two_workers[1], train_case("whole", tiny_base))
    assert all(worker["own_share"] < 0.51 for worker in two_workers[1])


def test_an_untied_head_is_sharded_offloaded_and_gathered(two_workers: list[list[Result]], tiny_untied_base: Path) -> None:
    assert_equal(two_workers[2], train_case("whole", tiny_untied_base))
    assert all(worker["own_share"] < 0.51 for worker in two_workers[2])


def test_gradients_that_go_to_their_owners_layer_by_layer_are_the_same(
    two_workers: list[list[Result]], tiny_base: Path
) -> None:
    """To the bit where a step is one pass; the sums of several passes come in another order."""
    assert_equal(two_workers[8], train_case("whole", tiny_base))
    for case in (8, 9):
        for layered, whole in zip(two_workers[case], two_workers[case - 8], strict=True):
            assert_same_bits([layered], whole)
    assert_equal(two_workers[10], train_case("batches", tiny_base))
    assert_equal(two_workers[11], train_case("fixed", tiny_base))


def test_a_worker_holds_the_gradients_of_its_own_slots_and_of_one_layer(two_workers: list[list[Result]]) -> None:
    whole = two_workers[0][0]["gradient_numbers"].tolist()
    layered = [worker["gradient_numbers"].tolist() for worker in two_workers[8]]
    assert whole[1:] == [0, 0]
    row = whole[0] // 3
    assert layered == [[0, 2 * row, whole[0] // 2], [0, row, whole[0] // 2]]  # one of two layers, alike


def assert_same_bits(found: list[Result], expected: Result) -> None:
    """Every worker has the bits of `expected`, of gradients at least one."""
    for name, value in expected.items():
        told = [worker[name] for worker in found if name in worker]
        assert name in OWN or (told and all(torch.equal(tensor, value) for tensor in told)), name
        assert name.endswith("gradient") or len(told) == len(found), name


def test_virtual_workers_give_the_same_bits_on_one_worker_and_on_two(two_workers: list[list[Result]], tiny_base: Path) -> None:
    """Adapters, moments, gradients, losses and scores; and with a base that is sharded over the two."""
    strict = train_case("strict", tiny_base)
    assert_same_bits(two_workers[5], strict)
    assert_equal(two_workers[6], strict)  # and among them no bit differs


def test_a_solo_variant_is_the_same_on_two_workers(two_workers: list[list[Result]], tiny_base: Path) -> None:
    assert_equal(two_workers[7], train_case("solo", tiny_base))


def test_every_worker_keeps_the_moments_of_its_own_slots_alone(two_workers: list[list[Result]], tiny_base: Path) -> None:
    """And the bits are those of one worker that keeps them all: seeds hold every moment, and strict ones are equal above."""
    for case in (0, 1, 5, 6):
        first, second = (worker["moments"].item() for worker in two_workers[case])
        assert first == 2 * second > 0  # slots 0 and 2, and slot 1
    whole = train_case("strict", tiny_base)
    assert whole["moments"].item() == 1.5 * two_workers[5][0]["moments"].item()
    assert [worker["moments"].item() > 0 for worker in two_workers[7]] == [True, False]


@pytest.mark.slow
def test_virtual_workers_give_the_same_bits_on_four(two_workers: list[list[Result]], tiny_base: Path, tmp_path: Path) -> None:
    plain, sharded = run(tmp_path, 4, f"strict={tiny_base}", f"strict-sharded={tiny_base}")
    assert_same_bits(plain, two_workers[5][0])
    assert_same_bits(sharded, two_workers[6][0])


def lacks_libaio() -> str:
    try:
        check_nvme(torch.device("cpu"))
    except ModelError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_base_on_a_disk_gives_the_same_adapters(world: int, tiny_wide_base: Path, tmp_path: Path) -> None:
    """To the bit those of shards in memory. DeepSpeed's async_io is compiled for it the first time, which takes minutes."""
    if lack := lacks_libaio():
        pytest.skip(lack)
    sharded, on_disk = run(tmp_path, world, f"sharded={tiny_wide_base}", f"nvme={tiny_wide_base}")
    for plain, found in zip(sharded, on_disk, strict=True):
        assert_same_bits([found], plain)
        assert found["own_share"] < 0.05 < plain["own_share"]
    assert not any(tmp_path.glob("chrysalis-*"))  # it went with its workers


def test_a_base_on_a_disk_is_refused_in_the_words_of_deepspeed(tmp_path: Path) -> None:
    """Its async_io needs libaio, with headers. Nothing is compiled to find that out."""
    if not lacks_libaio():
        pytest.skip("libaio is here")
    engine = ShardedEngine(torch.device("cpu"), "nvme", "fp32", nvme_path=str(tmp_path))
    with pytest.raises(ModelError, match="async_io requires the dev libaio"):
        engine.prepare(torch.nn.Linear(30, 7))
    assert not any(tmp_path.iterdir())


def test_deepspeed_takes_the_settings_of_a_base_on_a_disk(tiny_base: Path, tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    engine = ShardedEngine(torch.device("cpu"), "nvme", "bf16", nvme_path=str(tmp_path))
    trunk, engine._disk = torch.nn.Linear(30, 7), DiskFolder(tmp_path, needed=1)
    zero = DeepSpeedZeroConfig(**engine._settings(trunk)["zero_optimization"])
    assert zero.offload_param is not None
    assert (zero.stage, zero.offload_param.device, zero.offload_param.nvme_path) == (3, "nvme", engine._disk.path)
    assert zero.offload_param.buffer_size == 210
    assert (zero.prefetch_bucket_size, zero.max_reuse_distance) == (0, 0)


@pytest.mark.slow
def test_a_worker_without_rows_takes_part_all_the_same(tiny_base: Path, tmp_path: Path) -> None:
    found, layered, sums = run(tmp_path, 3, f"whole={tiny_base}", f"whole-layered={tiny_base}", f"sums={tiny_base}")
    assert_equal(found, train_case("whole", tiny_base))
    assert_equal(layered, found[0] | found[1] | found[2])
    expected = torch.zeros(5, 1000)
    for part in (part for worker in range(3) for part in rows_of(worker).unbind(1)):
        expected += part  # in the order of the workers, whoever owns the row: to the bit
    assert_same_bits(sums, {f"{row}/gradient": expected[row] for row in range(5)})
