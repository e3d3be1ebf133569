"""A small base grown on this machine: tokenizer and weights from the train split of the genome, nothing else.

It is what lets the whole program run in minutes with no network and no GPU. Every domain gives the same number of tokens,
so that the base prefers none and the variants' mixes have something to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from chrysalis_ray.config.blueprint import EmbeddedBase
from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.genome.chat import as_plain_text
from chrysalis_ray.training.muon import Muon

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import Qwen3ForCausalLM

    from chrysalis_ray.genome.build import Genome

RECIPE = 3  # raise it when the same spec would grow another base
END = "<|endoftext|>"
LENGTH = 128  # tokens in a row of pre-training
ROWS = 4  # rows in a step: at this size many small steps teach more than few large ones
CHARACTERS = 400_000  # of each domain, for the tokenizer
# How this base writes a conversation down: no word of its own but the end token, and its answers marked.
TEMPLATE = (
    "{% for message in messages %}{{ message.role + ':\\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
CHOICE = 2  # times the tokens needed are read of each domain, and rows drawn from them


def grow(spec: EmbeddedBase, genome: Genome, rng_seed: int, folder: Path, progress: Callable[[str], None]) -> None:
    """Train a tokenizer and a Qwen3 of `spec` and save both to `folder`. The same arguments give the same base here."""
    from transformers import PreTrainedTokenizerFast

    progress(f"training a tokenizer of {spec.vocabulary} tokens on {len(genome.domains)} domains")
    tokenizer = train_tokenizer(genome, spec.vocabulary)
    template = {"chat_template": TEMPLATE} if genome.chats else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, **template).save_pretrained(folder)
    tokenizer.encode_special_tokens = True  # text that spells the end token is text
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng_seed)
        model = build(spec, _end_id(tokenizer))
        steps = spec.pretrain_tokens // (ROWS * LENGTH)
        if steps:
            rows = training_rows(genome, tokenizer, steps * ROWS, rng_seed)
            pretrain(model, rows, spec.pretrain_learning_rate, progress)
    model.save_pretrained(folder)


def train_tokenizer(genome: Genome, vocabulary: int) -> Tokenizer:
    """A byte-level BPE: no text is out of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for domain in genome.domains for text in _head(genome, domain)), trainer)
    return tokenizer


def _head(genome: Genome, domain: str) -> Iterator[str]:
    """Train texts of a domain, up to the characters that the tokenizer needs."""
    left = CHARACTERS
    for text in _texts(genome, domain):
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _texts(genome: Genome, domain: str) -> Iterator[str]:
    """The train texts of a domain; conversations as the template will write them."""
    chat = domain in genome.chats
    return (as_plain_text(document) if chat else document.text for document in genome.documents(domain, "train"))


def build(spec: EmbeddedBase, end_id: int) -> Qwen3ForCausalLM:
    """A Qwen3 of this geometry with random weights, head tied to the embedding."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=spec.vocabulary,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.key_value_heads,
            head_dim=spec.head_size,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=end_id,
            pad_token_id=end_id,
        )
    )


def training_rows(genome: Genome, tokenizer: Tokenizer, count: int, rng_seed: int) -> Tensor:
    """`count` rows of LENGTH + 1 tokens, the domains in equal parts and mixed, int64. Small domains are read again."""
    generator = torch.Generator().manual_seed(rng_seed)
    shares = []
    for number, domain in enumerate(genome.domains):
        wanted = count // len(genome.domains) + (number < count % len(genome.domains))
        pieces = torch.tensor(list(islice(_pieces(genome, tokenizer, domain), wanted * CHOICE)), dtype=torch.int64)
        if wanted and not len(pieces):
            raise ModelError(
                f"domain {domain!r} has no {LENGTH + 1} tokens of training text to grow a base on",
                "add text to it, or use a pretrained base",
            )
        order = torch.cat([torch.randperm(len(pieces), generator=generator) for _ in range(-(-wanted // max(1, len(pieces))))])
        shares.append(pieces[order[:wanted]])
    rows = torch.cat(shares)
    return rows[torch.randperm(len(rows), generator=generator)]


def _pieces(genome: Genome, tokenizer: Tokenizer, domain: str) -> Iterator[list[int]]:
    """The train documents of a domain, end to end, cut into rows."""
    end, pending = _end_id(tokenizer), list[int]()
    for text in _texts(genome, domain):
        pending += [*tokenizer.encode(text).ids, end]
        whole = len(pending) // (LENGTH + 1) * (LENGTH + 1)
        for start in range(0, whole, LENGTH + 1):
            yield pending[start : start + LENGTH + 1]
        pending = pending[whole:]


def _end_id(tokenizer: Tokenizer) -> int:
    end_id = tokenizer.token_to_id(END)
    assert end_id is not None
    return end_id


def pretrain(model: Qwen3ForCausalLM, rows: Tensor, learning_rate: float, progress: Callable[[str], None]) -> None:
    """One pass over `rows`, ROWS at a time, with a short warmup and a linear decay over the last 60 %.

    Matrices learn by Muon (momentum orthogonalised by Newton-Schulz, arXiv 2502.16982, scaled to AdamW's step size),
    embeddings and norms by AdamW: with so few steps, Muon ends about 0.5 nats per token lower than AdamW alone.
    """
    steps = len(rows) // ROWS
    optimizers = _optimizers(model)
    model.train()
    for step in range(steps):
        batch = rows[step * ROWS : (step + 1) * ROWS]
        factor = min(1.0, (step + 1) / max(1, steps // 20), (1.0 - step / steps) / 0.6 + 0.02)
        logits = model(input_ids=batch[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate * factor
            optimizer.step()
        if (step + 1) % max(1, steps // 5) == 0:
            progress(f"pre-training the base: step {step + 1} of {steps}, loss {loss.item():.2f}")
    model.eval()


def _optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for everything else."""
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if parameter.ndim == 2 and "embed" not in name]
    rest = [parameter for name, parameter in named if parameter.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, momentum=0.95),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
