"""Attention within rows of some hundred tokens on a CPU, some queries at a time.

A query sees nothing that comes after it. So a block of queries meets only the keys up to its own end: of the score matrix
little more than half is computed and kept, and what a block works on stays near the core. Which blocks there are follows from
the length of the row alone, never from what stands in it.

    rows N, heads H that share G keys     q [N, H, T, D]     k, v [N, G, T, D]     scores of a block [N x G, H / G x block, end]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 32  # queries; with 64 attention of a row of 256 tokens takes a tenth longer, whole it takes twice as long


class BlockAttention(torch.autograd.Function):
    """softmax(s Q K^T + mask) V for queries [N, H, T, D], keys and values [N, G, T, D], H a multiple of G: [N, T, H, D].

    `mask` [N, 1, T, T] is added; it must shut out all that comes later, and leave every token one at least.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        rows, heads, length, size = query.shape
        groups, wide = key.shape[1], value.shape[-1]
        k_btd, v_btd = key.reshape(-1, length, size), value.reshape(-1, length, wide)
        seen = query.new_empty(rows, length, heads, wide)
        kept = []
        for start, end in blocks(length):
            q_bqd = (query[:, :, start:end] * scale).reshape(rows * groups, -1, size)
            scores = torch.bmm(q_bqd, k_btd[:, :end].mT)
            scores.view(rows, heads, end - start, end).add_(mask[:, :, start:end, :end])
            shares = torch.softmax(scores, -1)
            seen[:, start:end] = torch.bmm(shares, v_btd[:, :end]).view(rows, heads, end - start, wide).transpose(1, 2)
            kept += [q_bqd, shares]
        ctx.save_for_backward(k_btd, v_btd, *kept)
        ctx.shape, ctx.scale = (rows, heads, groups, length), scale
        return seen

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, heads, groups, length = ctx.shape
        k_btd, v_btd, *kept = ctx.saved_tensors
        (grad_seen,) = grad_outputs
        grad_k, grad_v = torch.zeros_like(k_btd), torch.zeros_like(v_btd)
        grad_q = k_btd.new_empty(rows, heads, length, k_btd.shape[-1])
        for (start, end), q_bqd, shares in zip(blocks(length), kept[::2], kept[1::2], strict=True):
            grad_bqd = grad_seen[:, start:end].transpose(1, 2).reshape(rows * groups, -1, v_btd.shape[-1])
            grad_v[:, :end].baddbmm_(shares.mT, grad_bqd)
            grad_shares = torch.bmm(grad_bqd, v_btd[:, :end].mT)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
            grad_k[:, :end].baddbmm_(grad_scores.mT, q_bqd)
            grad_q[:, :, start:end] = torch.bmm(grad_scores, k_btd[:, :end]).view(rows, heads, end - start, -1)
        shape = (rows, groups, length, -1)
        return grad_q.mul_(ctx.scale), grad_k.view(shape), grad_v.view(shape), None, None


def see_by_blocks(q_NGTSD: Tensor, k_NGTD: Tensor, v_NGTD: Tensor, mask: Tensor) -> Tensor:
    """softmax(Q K^T + mask) V where nothing is learned, of scaled queries: [N, T, G, S, D], S heads sharing keys of each of G.

    `mask` [N, 1, T, T] is added, as in `BlockAttention`. Scores become shares where they lie.
    """
    rows, groups, length, shared, _ = q_NGTSD.shape
    q_BLD, k_BTD, v_BTD = q_NGTSD.flatten(2, 3).flatten(0, 1), k_NGTD.flatten(0, 1), v_NGTD.flatten(0, 1)
    seen_NTGSD = q_NGTSD.new_empty(rows, length, groups, shared, v_NGTD.shape[-1])
    for start, end in blocks(length):
        scores = torch.bmm(q_BLD[:, start * shared : end * shared], k_BTD[:, :end].mT)
        scores.view(rows, groups, end - start, shared, end).add_(mask[:, :, start:end, None, :end])
        torch.softmax(scores, -1, out=scores)
        block = torch.bmm(scores, v_BTD[:, :end]).view(rows, groups, end - start, shared, -1)
        seen_NTGSD[:, start:end] = block.transpose(1, 2)
    return seen_NTGSD


def blocks(length: int) -> Iterator[tuple[int, int]]:
    """Where blocks of queries start and end in a row."""
    return ((start, min(start + BLOCK, length)) for start in range(0, length, BLOCK))
