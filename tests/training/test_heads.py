"""Heads that scale and cap their logits, and probes of what no config says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import SUPPORTED, write_family
from training_texts import TextTokens, new_pack, place_fresh, variant, weights
from transformers import PreTrainedModel

from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.heads import HeadArithmetic, arithmetic_of
from chrysalis_ray.training.lanes import label
from chrysalis_ray.training.loss import head_cross_entropy, token_scores
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.step import train_chunk
from chrysalis_ray.training.trunk import checkpoint_activations

CPU = torch.device("cpu")


@pytest.mark.parametrize("arithmetic", [HeadArithmetic(0.25), HeadArithmetic(1.0, 2.0), HeadArithmetic(3.0, 5.0)], ids=repr)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5)])
def test_chunks_of_scaled_and_capped_logits_equal_autograd(
    arithmetic: HeadArithmetic, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2 * 3 * 11, 16, dtype=dtype, requires_grad=True)
    head, bias = torch.randn(37, 16, dtype=dtype), torch.randn(37, dtype=dtype)
    labels = np.random.default_rng(0).integers(0, 37, (2, 3, 11))
    labels[0, :, ::2] = -100
    counts = (labels != -100).sum((1, 2))
    labelled = label(labels, [1 / count for count in counts], CPU)
    total, losses = head_cross_entropy(hidden, head, bias, labelled, chunk=5, arithmetic=arithmetic)
    (3.0 * total).backward()
    chunked, hidden.grad = hidden.grad, None
    logits = arithmetic.scale * (hidden @ head.T + bias)
    if arithmetic.cap is not None:
        logits = arithmetic.cap * torch.tanh(logits / arithmetic.cap)
    lanes = zip(logits.view(2, 33, 37), torch.from_numpy(labels), strict=True)
    plain = sum(torch.nn.functional.cross_entropy(lane, wanted.flatten()) for lane, wanted in lanes)
    (3.0 * plain).backward()
    assert abs(total.item() - plain.item()) <= tolerance
    assert (chunked - hidden.grad).abs().max() <= 10 * tolerance
    assert torch.equal(token_scores(hidden, head, bias, labelled, chunk=5, arithmetic=arithmetic).losses, losses)


def test_the_arithmetic_is_what_the_config_says() -> None:
    found = {name: arithmetic_of(SUPPORTED[name].config()) for name in ("qwen3", "gemma2", "granite", "cohere2")}
    assert found == {
        "qwen3": HeadArithmetic(),
        "gemma2": HeadArithmetic(1.0, 3.0),
        "granite": HeadArithmetic(0.25),
        "cohere2": HeadArithmetic(0.25),
    }


def test_a_head_that_does_more_than_its_config_says_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    model = load_base(write_family(SUPPORTED["granite"].config(), tmp_path / "granite", tiny_base), "fp32")
    linear = model.get_output_embeddings()
    linear.register_forward_hook(lambda module, arguments, output: 1.01 * output)  # one per cent
    with pytest.raises(ModelError, match="more than a matrix"):
        Pack(model, ["q_proj"], 1, 2, make_engine(0, "none", "fp32", "cpu"))


def test_a_base_of_nan_is_refused(tiny_base: Path) -> None:
    model = load_base(tiny_base, "fp32")
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        Pack(model, ["q_proj"], 1, 2, make_engine(0, "none", "fp32", "cpu"))


def test_targets_that_are_not_given_rows_are_refused(tiny_base: Path) -> None:
    def tokens_first() -> PreTrainedModel:
        model = load_base(tiny_base, "fp32")
        network = model.get_submodule("model.layers.0.mlp")
        plain = network.forward
        network.forward = lambda x: plain(x.transpose(0, 1)).transpose(0, 1)  # no leak, but no rows either
        return model

    engine = make_engine(0, "none", "fp32", "cpu")
    Pack(tokens_first(), ["q_proj"], 2, 2, engine)
    with pytest.raises(ModelError, match=r"model.layers.0.mlp.up_proj is given activations of shape \[48, 2, 48\]"):
        Pack(tokens_first(), ["up_proj"], 2, 2, engine)


def test_recomputed_layers_are_copied_for_every_thread(tiny_base: Path, tokens: TextTokens) -> None:
    """Each shard recomputes its own layers, whose packed modules look at its own rows of the bank."""
    kept = new_pack(tiny_base, 2, dtype=torch.float64)
    model = load_base(tiny_base, "fp64")
    checkpoint_activations(model)
    engine = make_engine(0, "none", "fp64", "cpu")
    spread = Pack(model, [t.name for t in kept.bank.targets], 2, 8, engine, dtype=torch.float64, threads=2)
    assert len(spread.shards.all) == 2
    for pack in (kept, spread):
        for slot in range(2):
            place_fresh(pack, slot, variant(slot))
        train_chunk(pack, [0, 1], tokens, 3)  # type: ignore[arg-type]
    for slot in range(2):
        left, right = weights(kept, slot), weights(spread, slot)
        assert max((left[name] - right[name]).abs().max().item() for name in left) <= 1e-12
