"""One poisoned variant of eight, on a real model trained on real text: consensus holds, the plain mean does not."""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chrysalis_ray.config.merges import ConsensusMerge, EnsembleMerge, TiesMerge
from chrysalis_ray.merge.run import merge_modules

COUNT, POISONED, STEPS, ROWS, TOKENS, RANK = 8, 5, 30, 4, 48, 4
PRETRAIN_STEPS = 60
TARGETS = ("q_proj", "v_proj", "down_proj")


class Population:
    """Eight adapters of one seed on a tiny Qwen3, each trained on its own part of Python's library; one can climb the loss."""

    def __init__(self, folder):
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [Path(module.__file__).read_text() for module in (argparse, contextlib, functools, io, textwrap)]
        ids = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
        rows = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
        self.held_out, self.rows = rows[:64], rows[64:]
        self.pretrain()
        self.modules = [name for name, _ in self.model.named_modules() if name.endswith(TARGETS)]
        generator = torch.Generator().manual_seed(1)
        self.seed = {}
        for name in self.modules:
            out, inn = self.model.get_submodule(name).weight.shape
            self.seed[name] = (torch.randn(RANK, inn, generator=generator) / inn**0.5, torch.zeros(out, RANK))

    def pretrain(self):
        """A base that random text no longer describes: what an adapter learns on it can be lost."""
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        for step in range(PRETRAIN_STEPS):
            rows = self.rows[8 * step % (len(self.rows) - 8) :][:8]
            optimizer.zero_grad()
            self.model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
        self.model.requires_grad_(False)

    def loss(self, factors, rows):
        """Mean loss in nats per token with the adapter in place, and its gradient if the factors want one."""
        state = {}
        for name, (a_ri, b_or) in factors.items():
            state[f"{name}.weight"] = self.model.get_submodule(name).weight + b_or @ a_ri
        return torch.func.functional_call(self.model, state, kwargs={"input_ids": rows, "labels": rows}).loss

    def train(self, number, sign):
        own = self.rows[number::COUNT]
        factors = copy.deepcopy(self.seed)
        leaves = [side.requires_grad_() for pair in factors.values() for side in pair]
        optimizer = torch.optim.Adam(leaves, lr=1e-2)
        for step in range(STEPS):
            start = step * ROWS % (len(own) - ROWS)
            optimizer.zero_grad()
            (sign * self.loss(factors, own[start : start + ROWS])).backward()
            optimizer.step()
        return {name: (a_ri.detach(), b_or.detach()) for name, (a_ri, b_or) in factors.items()}

    def merged_loss(self, config, members, scores):
        result = merge_modules(config, members, [1.0] * len(members), self.seed, 1.0, scores, RANK * COUNT)
        with torch.no_grad():
            return float(self.loss(result.factors, self.held_out)), result


@pytest.fixture(scope="module")
def trained(tiny_base):
    population = Population(tiny_base)
    clean = [population.train(number, 1.0) for number in range(COUNT)]
    poison = population.train(POISONED, -1.0)
    poisoned = [poison if number == POISONED else member for number, member in enumerate(clean)]
    with torch.no_grad():
        losses = [float(population.loss(member, population.held_out)) for member in poisoned]
        seed_loss = float(population.loss(population.seed, population.held_out))
    return population, clean, poisoned, losses, seed_loss


@pytest.mark.parametrize("judged", [True, False], ids=["judged", "unjudged"])
def test_consensus_holds_where_the_plain_mean_does_not(trained, judged):
    population, clean, poisoned, losses, seed_loss = trained
    consensus = ConsensusMerge(method="consensus")
    scores = losses if judged else None
    clean_loss, _ = population.merged_loss(consensus, clean, None)
    held, result = population.merged_loss(consensus, poisoned, scores)
    plain, _ = population.merged_loss(EnsembleMerge(method="ensemble"), poisoned, scores)
    clean_plain, _ = population.merged_loss(EnsembleMerge(method="ensemble"), clean, None)
    assert clean_loss < seed_loss - 0.03  # the population learned something that a merge can lose
    assert held < 1.02 * clean_loss
    assert held - clean_loss < 0.1 * (seed_loss - clean_loss)
    assert plain > 1.02 * clean_plain
    assert plain > seed_loss
    assert list(result.notes["held_out"]) == [str(POISONED)]
    assert result.weights[POISONED] == 0.0


def test_robust_weights_hold_the_poison_out_of_any_method(trained):
    population, clean, poisoned, losses, _ = trained
    for ties in (TiesMerge(method="ties", weights=weights) for weights in ("uniform", "robust")):
        harmed, _ = population.merged_loss(ties, poisoned, losses)
        whole, _ = population.merged_loss(ties, clean, None)
        assert (harmed < 1.02 * whole) == (ties.weights == "robust")
