"""Fixtures that several rooms share: tiny real things on disk."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import signal
import textwrap
from pathlib import Path

import hypothesis
import pytest

# How long an example takes is a matter of the machine and of what else it does.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

# A runner in the background ignores Ctrl-C, and what it starts inherits that: tests that interrupt a child need the default.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def library_text() -> list[str]:
    """Source text that every Python carries."""
    return [Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, contextlib, functools, io, textwrap)]


def write_tiny_base(folder: Path, *, hidden_size: int = 48, tie_word_embeddings: bool = True) -> Path:
    """A two-layer Qwen3 with random weights and a byte-level BPE tokenizer of 512 words, saved as an ordinary model folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(library_text(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>").save_pretrained(
        folder
    )
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=hidden_size,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=tie_word_embeddings,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer Qwen3 (hidden 48, vocabulary 512, tied head) with its tokenizer."""
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tied")


@pytest.fixture(scope="session")
def tiny_wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with hidden states so wide that DeepSpeed writes its matrices to a disk: shards below 1 MiB stay in memory."""
    return write_tiny_base(tmp_path_factory.mktemp("base") / "wide", hidden_size=8192)


@pytest.fixture(scope="session")
def tiny_untied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a head of its own."""
    return write_tiny_base(tmp_path_factory.mktemp("base") / "untied", tie_word_embeddings=False)
