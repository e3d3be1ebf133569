"""Held-out losses of a packed pass equal those of each adapter alone, document by document; any number of workers agrees."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import Qwen3Config, Qwen3ForCausalLM

from chrysalis_ray.core.errors import EvaluationError
from chrysalis_ray.evaluate.heldout import heldout_rows, score_rows
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.pack import Pack

LENGTH, VOCABULARY = 16, 40
TARGETS = ("q_proj", "down_proj")
LAYOUT = {"a": [[5, 6], [16], [9, 3], [4]], "b": [[7, 7], [10]]}  # lengths of the documents of each row


@dataclass(frozen=True)
class Batch:
    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    document: np.ndarray
    bytes: np.ndarray


class Rows:
    """Random tokens in rows; document 1 of domain a goes on in the row after its own."""

    sequence_length = LENGTH
    domains = ("a", "b")

    def __init__(self):
        rng = np.random.default_rng(0)
        self._rows, self.texts = {}, {}
        for domain, rows in LAYOUT.items():
            number = 0
            for index, lengths in enumerate(rows):
                row = SimpleNamespace(ids=np.zeros(LENGTH, int), positions=np.zeros(LENGTH, int), labels=np.full(LENGTH, -100),
                                      document=np.full(LENGTH, -1))  # fmt: skip
                start = 0
                for length in lengths:
                    ids, end = rng.integers(0, VOCABULARY, length), start + length
                    row.ids[start:end], row.positions[start:end], row.labels[start : end - 1] = ids, range(length), ids[1:]
                    document = 1 if domain == "a" and index == 1 else number
                    row.document[start:end] = document
                    self.texts.setdefault((domain, document), []).append(ids)
                    start, number = end, number + 1
                row.positions[start:] = range(LENGTH - start)
                self._rows[domain, index] = row

    def rows(self, domain, split):
        return len(LAYOUT[domain]) if split == "select" else 0

    def batch(self, domain_rows, split):
        rows = [self._rows[key] for key in domain_rows]
        parts = [np.stack([getattr(row, name) for row in rows]) for name in ("ids", "positions", "labels", "document")]
        return Batch(*parts, bytes=1 + parts[0] % 3)


def base_model():
    torch.manual_seed(0)
    config = Qwen3Config(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
                         num_key_value_heads=1, vocab_size=VOCABULARY, max_position_embeddings=32)  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def adapters():
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    shapes = {"self_attn.q_proj": (16, 16), "mlp.down_proj": (16, 24)}
    return [
        {
            f"model.layers.{layer}.{name}": (normal(rank, i), normal(o, rank))
            for layer in (0, 1)
            for name, (o, i) in shapes.items()
        }
        for rank in (1, 3, 2)
    ]


def scores(batch_rows=8, rows_per_domain=9, lanes="compacted"):
    pack = Pack(base_model(), TARGETS, 4, 3, make_engine(0, "none", "fp32", "cpu"), lanes=lanes)
    for slot, factors in enumerate(adapters()):
        pack.load_adapter(slot, factors, 2.0)
    return score_rows(pack, [2, 0, 1], Rows(), "select", rows_per_domain, batch_rows)


@pytest.mark.parametrize("lanes", ["compacted", "fixed"])
def test_packed_scores_are_those_of_each_adapter_alone(lanes):
    packed, texts = scores(lanes=lanes), Rows().texts
    assert list(packed) == [2, 0, 1]
    for slot, factors in enumerate(adapters()):
        dense = copy.deepcopy(base_model())
        with torch.no_grad():
            for module, (a_ri, b_or) in factors.items():
                dense.get_submodule(module).weight += 2.0 * (b_or @ a_ri)
            for score in packed[slot]:
                expected, count = 0.0, 0
                for ids in texts[score.domain, score.document]:
                    logits = dense(torch.from_numpy(ids)[None]).logits[0, :-1]
                    expected += float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="sum"))
                    count += len(ids) - 1
                assert score.tokens == count
                assert score.loss_sum == pytest.approx(expected, rel=1e-5)
        assert {(score.domain, score.document) for score in packed[slot]} == set(texts)
        assert packed[slot] == sorted(packed[slot], key=lambda score: (score.domain, score.document))


def test_the_size_of_a_batch_changes_nothing_that_counts():
    one, all_at_once = scores(batch_rows=1), scores()
    for slot in one:
        assert [(s.domain, s.document, s.tokens) for s in one[slot]] == [
            (s.domain, s.document, s.tokens) for s in all_at_once[slot]
        ]
        np.testing.assert_allclose([s.loss_sum for s in one[slot]], [s.loss_sum for s in all_at_once[slot]], rtol=1e-6)


def test_rows_are_spread_over_each_domain():
    assert heldout_rows(Rows(), "select", 2) == [("a", 0), ("a", 2), ("b", 0), ("b", 1)]
    assert len(heldout_rows(Rows(), "select", 99)) == 6


@pytest.mark.parametrize("split", ["train", "report"])
def test_nothing_held_out_is_refused(split):
    with pytest.raises(EvaluationError, match=split):
        heldout_rows(Rows(), split, 4)


def _plain(by_slot):
    return [[[s.domain, s.document, s.tokens, s.loss_sum] for s in rows] for rows in by_slot.values()]


def _worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own = _plain(scores(batch_rows=1, rows_per_domain=3))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(own))
    dist.destroy_process_group()


@pytest.fixture
def _one_thread():
    """Workers compute with one thread each; another number of threads rounds otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_two_workers_end_with_the_scores_of_one(tmp_path):
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second == _plain(scores(batch_rows=1, rows_per_domain=3))
