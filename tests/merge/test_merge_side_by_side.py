"""Modules side by side: in order, each with one thread, and nothing of it left behind."""

from __future__ import annotations

import threading

import pytest
import torch

from chrysalis_ray.merge.side_by_side import in_order


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_what_comes_out_is_in_order_and_every_worker_computes_alone(threads):
    both = threading.Barrier(threads, timeout=30)  # breaks unless as many items as threads are worked on at once

    def work(number):
        if number < threads:
            both.wait()
        return number, torch.get_num_threads()

    assert list(in_order(work, range(7))) == [(number, 1) for number in range(7)]
    assert list(in_order(work, [])) == []
    assert torch.get_num_threads() == threads


def test_the_first_failure_in_order_is_raised_and_the_rest_is_not_begun(threads):
    begun = []

    def work(number):
        begun.append(number)
        if number >= 2:
            raise ValueError(f"item {number}")
        return number

    with pytest.raises(ValueError, match="item 2"):
        list(in_order(work, range(1000)))
    assert len(begun) < 1000
    assert torch.get_num_threads() == threads
