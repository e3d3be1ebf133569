"""Cross entropy of a frozen output head, on labelled tokens only, in chunks.

    hidden_ND   all tokens x width       index_K    which of them carry a label
    head_VD     vocabulary x width       labels_K, weights_K   one per labelled token

Logits are never whole: of one chunk [chunk, V] the loss and the gradient of the hidden state are taken, then it is dropped
(as in Liger and Cut Cross Entropy, arXiv 2411.09009). The head is frozen, so nothing else is needed of it.

A chunk never crosses from one variant to the next. Which GEMM kernel runs depends on its number of rows: with chunks of
its own a variant's bits do not depend on how many labels its neighbours have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chrysalis_ray.training.heads import PLAIN, HeadArithmetic, raw_logits
from chrysalis_ray.training.passes import logits_chunk

SCORED = 256  # tokens of logits at most where they are only scored, which reads them thrice: they stay near the core


@dataclass(frozen=True)
class Labelled:
    """The labelled tokens of a batch, variant-major. `counts` has one entry per lane and sums to K."""

    index_K: Tensor
    labels_K: Tensor
    weights_K: Tensor
    counts: tuple[int, ...]

    def chunks(self, size: int) -> Iterator[slice]:
        """Slices of at most `size` labelled tokens, none across two lanes."""
        return chunks_within(self.counts, size)


def chunks_within(counts: Sequence[int], size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` elements that respect the borders between groups of `counts` elements."""
    start = 0
    for count in counts:
        for offset in range(0, count, size):
            yield slice(start + offset, start + min(offset + size, count))
        start += count


class HeadCrossEntropy(torch.autograd.Function):
    """Sum of weighted token losses; the gradient with respect to `hidden` is made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_nd: Tensor,
        head_vd: Tensor,
        bias_v: Tensor | None,
        labelled: Labelled,
        chunk: int,
        arithmetic: HeadArithmetic,
    ) -> tuple[Tensor, Tensor]:
        grad_nd = torch.zeros_like(hidden_nd)
        losses_k = hidden_nd.new_empty(labelled.labels_K.shape, dtype=_wide(hidden_nd.dtype))
        weights_k = labelled.weights_K.to(losses_k.dtype)
        for part in labelled.chunks(chunk):
            index, labels = labelled.index_K[part], labelled.labels_K[part]
            logits_cv = arithmetic.apply(raw_logits(hidden_nd[index], head_vd, bias_v))
            head_slope = arithmetic.slope(logits_cv) if arithmetic != PLAIN else None
            logs_cv = torch.log_softmax(logits_cv, -1)  # as torch's own loss has it: nearly zero gradients tell how one rounds
            del logits_cv
            losses_k[part] = -logs_cv.gather(1, labels[:, None]).squeeze(1)
            slope_cv = logs_cv.exp_()  # softmax, then minus one at the label
            slope_cv.scatter_add_(1, labels[:, None], slope_cv.new_full((len(labels), 1), -1.0))
            if head_slope is not None:
                slope_cv.mul_(head_slope)
            grad_nd[index] = (slope_cv.to(head_vd.dtype) @ head_vd).mul_(weights_k[part, None])
        ctx.save_for_backward(grad_nd)
        ctx.mark_non_differentiable(losses_k)
        return (losses_k * weights_k).sum(), losses_k

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_nd,) = ctx.saved_tensors
        return grad_nd * grad_outputs[0].to(grad_nd.dtype), None, None, None, None, None


def head_cross_entropy(
    hidden_nd: Tensor,
    head_vd: Tensor,
    bias_v: Tensor | None,
    labelled: Labelled,
    chunk: int | None = None,
    arithmetic: HeadArithmetic = PLAIN,
) -> tuple[Tensor, Tensor]:
    """(sum of weight x loss, losses [K]) in nats; losses carry no gradient. fp64 stays fp64, anything else is fp32."""
    return HeadCrossEntropy.apply(hidden_nd, head_vd, bias_v, labelled, chunk or chunk_of(head_vd), arithmetic)


def chunk_of(head_vd: Tensor) -> int:
    """Labelled tokens whose logits are formed at a time, by the device and the vocabulary alone."""
    return logits_chunk(len(head_vd), on_gpu=head_vd.device.type != "cpu")


class TokenScores(NamedTuple):
    """How labelled tokens were predicted: losses in nats, and whether the label was the likeliest token (`likeliest`), the one
    that greedy decoding writes; where it was asked for, what the head was given of every token, on the CPU."""

    losses: Tensor
    hits: Tensor
    hidden: Tensor | None = None


@torch.no_grad()
def token_scores(
    hidden_nd: Tensor,
    head_vd: Tensor,
    bias_v: Tensor | None,
    labelled: Labelled,
    chunk: int | None = None,
    arithmetic: HeadArithmetic = PLAIN,
) -> TokenScores:
    """Losses and hits, both [K], of the labelled tokens, without a gradient; for evaluation."""
    losses_k = hidden_nd.new_empty(labelled.labels_K.shape, dtype=_wide(hidden_nd.dtype))
    hits_k = torch.empty_like(losses_k, dtype=torch.bool)
    for part in labelled.chunks(chunk or min(SCORED, chunk_of(head_vd))):
        logits_cv = arithmetic.apply(raw_logits(hidden_nd[labelled.index_K[part]], head_vd, bias_v))
        labels_c1 = labelled.labels_K[part, None]
        hits_k[part] = likeliest(logits_cv) == labels_c1.squeeze(1)
        logs_cv = torch.log_softmax(logits_cv, -1, out=logits_cv)  # in place: what is written is near already
        losses_k[part] = -logs_cv.gather(1, labels_c1).squeeze(1)
    return TokenScores(losses_k, hits_k)


def likeliest(values: Tensor) -> Tensor:
    """Where the largest of the last dimension stands, of equals the first: in bf16 two are equal at some tokens of a hundred.
    On a CPU numpy finds it several times as fast."""
    return values.argmax(-1) if values.device.type != "cpu" else torch.from_numpy(values.numpy().argmax(-1))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
