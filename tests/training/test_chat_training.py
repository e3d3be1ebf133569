"""Conversations beside text: a packed variant learns the answers as it would alone; an embedded base can talk."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training_against_peft import largest_difference, train_alone
from training_texts import LENGTH, new_pack, place_fresh, variant, weights

from chrysalis_ray.config.blueprint import EmbeddedBase
from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.core.records import Epigenome
from chrysalis_ray.evaluate.heldout import score_rows
from chrysalis_ray.genome.build import Genome, build_genome
from chrysalis_ray.genome.chat import load_chat_tokenizer
from chrysalis_ray.genome.tokens import TokenStore, tokenize_genome
from chrysalis_ray.training.embedded import END, TEMPLATE, grow
from chrysalis_ray.training.lanes import Feed
from chrysalis_ray.training.step import train_chunk


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Genome:
    """What argparse's methods do, asked and answered, beside its code."""
    root = tmp_path_factory.mktemp("chats")
    (root / "code").mkdir()
    for number, block in enumerate(inspect.getsource(argparse).split("\n\n\n")):
        (root / "code" / f"{number}.txt").write_text(block)
    told = [(name, inspect.getdoc(value)) for name, value in vars(argparse).items() if inspect.isclass(value)]
    lines = []
    for name, told_of_it in told:
        if told_of_it and f"class {name}" in inspect.getsource(argparse):
            asked = {"role": "user", "content": f"What is argparse.{name}?"}
            lines.append(json.dumps({"messages": [asked, {"role": "assistant", "content": told_of_it}]}))
    (root / "chats.jsonl").write_text("\n".join(lines))
    sources = [
        {"type": "folder", "path": "code", "domain": "code"},
        {"type": "jsonl", "path": "chats.jsonl", "domain": "chats", "messages_key": "messages"},
    ]
    spec = GenomeSpec.model_validate({"sources": sources, "split": {"select": 0.2, "report": 0.2}})
    return build_genome(spec, root / "genome", root)


@pytest.fixture(scope="module")
def talking_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "talking"
    shutil.copytree(tiny_base, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def store(genome: Genome, talking_base: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return tokenize_genome(genome, talking_base, tmp_path_factory.mktemp("tokens"), LENGTH)


def test_packed_conversations_equal_separate_peft(tiny_base: Path, store: TokenStore) -> None:
    """Same rows, same labels: the loss of a step is the mean over its answers' tokens and those of its text."""
    members = [
        replace(variant(slot, rank=rank), epigenome=Epigenome(express), rows_per_step=rows, steps=8)
        for slot, (rank, express, rows) in enumerate(
            [(4, {"chats": 1.0}, 1), (8, {"chats": 2.0, "code": 1.0}, 3), (2, {"code": 1.0}, 2)]
        )
    ]
    pack = new_pack(tiny_base, 3, dtype=torch.float64)
    for slot, member in enumerate(members):
        place_fresh(pack, slot, member)
    metrics = train_chunk(pack, range(3), store, 8, rows_per_microstep=2)
    for slot, member in enumerate(members):
        alone = train_alone(tiny_base, pack, member, store, torch.float64)  # type: ignore[arg-type]
        assert largest_difference(weights(pack, slot), alone) <= 1e-12
        steps = list(Feed(member, store).steps(0, 8))
        assert sum(metrics[slot].domain_tokens.values()) == sum(step.labels for step in steps)
    answers = metrics[0].domain_tokens["chats"]
    assert 0 < answers < metrics[0].tokens - 8  # questions, roles and padding are not among them


def test_only_answers_are_judged(tiny_base: Path, store: TokenStore) -> None:
    pack = new_pack(tiny_base, 1)
    place_fresh(pack, 0, variant(0))
    scores = score_rows(pack, [0], store, "select", 1000)[0]
    for domain in ("chats", "code"):
        judged = sum(score.tokens for score in scores if score.domain == domain)
        assert judged == store.label_counts(domain, "select").sum()


def test_an_embedded_base_learns_to_talk_where_there_are_conversations(genome: Genome, tmp_path: Path) -> None:
    """Its answers are marked as they are told apart without marks, and end with its end token."""
    spec = EmbeddedBase(
        type="embedded", hidden_size=16, layers=1, heads=1, key_value_heads=1, head_size=16, intermediate_size=16,
        vocabulary=300, pretrain_tokens=512,
    )  # fmt: skip
    grow(spec, genome, 0, tmp_path / "base", lambda line: None)
    chat = load_chat_tokenizer(tmp_path / "base")
    assert chat.template == TEMPLATE
    documents = list(genome.documents("chats", "train"))
    marked = chat.encode(documents)
    for ids, learned in marked:
        text = chat.tokenizer.decode(ids[learned].tolist())
        assert text.endswith(END)
        assert "What is argparse." in chat.tokenizer.decode(ids[~learned].tolist())
        assert "What is argparse." not in text
    grown = replace(chat, template=re.sub(r"\{% (end)?generation %\}", "", TEMPLATE))
    grown.tokenizer.chat_template = grown.template
    for (ids, learned), (other_ids, other) in zip(marked, grown.encode(documents), strict=True):
        assert ids.tolist() == other_ids.tolist()
        assert other.sum() == learned.sum() + 1  # and the newline after the turn
        assert (other[:-1] == learned[:-1]).all()
