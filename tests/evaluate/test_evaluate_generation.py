"""What candidates write together is what each writes alone under `model.generate`, token by token."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chrysalis_ray.config.blueprint import Lora
from chrysalis_ray.config.probes import read_probe
from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.evaluate.asking import _batches, ask_candidates
from chrysalis_ray.evaluate.probes import judge_probes
from chrysalis_ray.evaluate.questions import Prompt, Questions, Reader, questions_of
from chrysalis_ray.evaluate.subjects import Candidate, blend_of
from chrysalis_ray.seed.adapter import AdapterWeights, write_adapter
from chrysalis_ray.training import generation
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.solo import SoloPack

SHAPES = {"model.layers.0.self_attn.q_proj": (64, 48), "model.layers.1.mlp.down_proj": (48, 96)}
PROMPTS = ("import argparse", "x", "def parse_args(self, args=None):\n        return", "for key in sorted(")
MOST = (24, 7, 16, 24)
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("written"), []
    for number, rank in enumerate((2, 5)):
        generator = torch.Generator().manual_seed(number)
        factors = {
            module: (torch.randn(rank, width, generator=generator), torch.randn(height, rank, generator=generator))
            for module, (height, width) in SHAPES.items()
        }
        write_adapter(folder / str(number), AdapterWeights("tiny", None, rank, 0.3 * rank, False, tuple(SHAPES), factors))
        found.append(str(folder / str(number)))
    return found


def pack_of(base, slots=2, threads=1, lanes="compacted", held=None):
    engine = make_engine(0, "none", "fp32", "cpu")
    return Pack(load_base(base, "fp32"), tuple(SHAPES), slots, 5, engine, lanes=lanes, threads=threads, tokens_per_pass=held)


def questions(base, stop=()):
    encode = Reader(base).encode
    return Questions((), tuple(Prompt(tuple(encode([text])[0]), most, stop) for text, most in zip(PROMPTS, MOST, strict=True)))


def generated(base, folder=None, both=None):
    """What plain transformers and peft write to every prompt."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if folder:
        model = PeftModel.from_pretrained(model, folder, "first")
    if both:
        model.load_adapter(both, "second")
        model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "mean", combination_type="cat")
        model.set_adapter("mean")
    tokenizer, found = AutoTokenizer.from_pretrained(base), []
    for text, most in zip(PROMPTS, MOST, strict=True):
        ids = tokenizer(text, return_tensors="pt")
        whole = model.generate(**ids, max_new_tokens=most, do_sample=False)[0]
        found.append(whole[ids["input_ids"].shape[1] :].tolist())
    return found


@pytest.mark.parametrize(
    ("threads", "lanes", "held"),
    [(2, "compacted", None), (1, "fixed", None), (1, "compacted", 1), (2, "compacted", 1), (1, "fixed", 1)],
)
def test_every_candidate_writes_what_generate_writes(tiny_base, folders, threads, lanes, held):
    """With short passes one candidate after the other does."""
    candidates = [
        Candidate("base"),
        *(Candidate(str(number), folder) for number, folder in enumerate(folders)),
        blend_of("mean", folders),
    ]
    found = ask_candidates(
        pack_of(tiny_base, 2, threads, lanes, held), questions(tiny_base), candidates, Path, Reader(tiny_base).decode
    )
    expected = {
        "base": generated(tiny_base),
        "0": generated(tiny_base, folders[0]),
        "1": generated(tiny_base, folders[1]),
        "mean": generated(tiny_base, folders[0], folders[1]),
    }
    assert {name: said for name, (_, said) in found.items()} == expected
    assert len({str(said) for said in expected.values()}) == 4  # they are not all the same text
    assert len({len(ids) for said in expected.values() for ids in said}) > 1


def test_an_end_token_and_a_stop_word_end_a_text(tiny_base, folders, tmp_path):
    (whole,) = [said for _, said in ask_candidates(
        pack_of(tiny_base), questions(tiny_base), [Candidate("1", folders[1])], Path, Reader(tiny_base).decode
    ).values()]  # fmt: skip
    reader, pack = Reader(tiny_base), pack_of(tiny_base)
    text = reader.decode(whole[0])
    stop = text[len(text) // 2 :][:2]
    (stopped,) = [
        said
        for _, said in ask_candidates(
            pack, questions(tiny_base, (stop,)), [Candidate("1", folders[1])], Path, reader.decode
        ).values()
    ]
    assert stopped[0] == whole[0][: len(stopped[0])]
    assert stop in reader.decode(stopped[0])
    assert stop not in reader.decode(stopped[0][:-1])
    end = whole[2][3]  # from now on this token ends a text
    pack.shards.all[0].trunk.model.generation_config.eos_token_id = [0, end]
    ended = ask_candidates(pack, questions(tiny_base), [Candidate("1", folders[1])], Path, reader.decode)["1"][1]
    assert ended[2] == whole[2][: whole[2].index(end) + 1]


def test_an_adapter_that_cannot_be_packed_writes_as_peft_does(tiny_base, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), config).save_pretrained(tmp_path / "d")
    lora = Lora(rank=2, alpha=4, targets=("q_proj", "down_proj"), use_dora=True)
    pack = SoloPack(load_base(tiny_base, "fp32"), lora, make_engine(0, "none", "fp32", "cpu"))
    candidates = [Candidate("base"), Candidate("dora", str(tmp_path / "d"))]
    found = ask_candidates(pack, questions(tiny_base), candidates, Path, Reader(tiny_base).decode)
    assert found["base"][1] == generated(tiny_base)
    assert found["dora"][1] == generated(tiny_base, tmp_path / "d")


def test_a_base_whose_cache_is_wrong_is_refused(tiny_base, folders, monkeypatch):
    monkeypatch.setattr(generation.Past, "positions", lambda past, count: torch.arange(count)[None])  # each piece from 0
    with pytest.raises(ModelError, match="does not go on from its cache"):
        ask_candidates(pack_of(tiny_base), questions(tiny_base), [Candidate("b")], Path, Reader(tiny_base).decode)


def test_probes_by_generation_are_marked_by_what_was_written(tiny_base, folders, tmp_path):
    said = [Reader(tiny_base).decode(ids) for ids in generated(tiny_base, folders[0])]
    word = said[3].split()[0]
    probe = (
        "name: written\nkind: contains\nmax_new_tokens: 24\nitems:\n"
        f"  - {{prompt: {PROMPTS[3]!r}, answer: {word!r}}}\n  - {{prompt: {PROMPTS[3]!r}, answer: 'never written'}}\n"
    )
    match = (
        f"name: matched\nkind: exact_match\nby: generation\nmax_new_tokens: 24\nstop: [{said[3][6:8]!r}]\nitems:\n"
        f"  - {{prompt: {PROMPTS[3]!r}, answer: {said[3][: said[3].index(said[3][6:8])].strip()!r}}}\n"
        f"  - {{prompt: {PROMPTS[3]!r}, answer: other}}\n"
    )
    pattern = "name: found\nkind: regex\nitems:\n  - {prompt: x, pattern: '^zzz$'}\n  - {prompt: x, pattern: '(?s).+'}\n"
    probes = []
    for number, text in enumerate((probe, match, pattern)):
        (tmp_path / f"{number}.yaml").write_text(text)
        probes.append(read_probe(tmp_path / f"{number}.yaml"))
    candidates = [Candidate("base"), Candidate("0", folders[0])]
    told = judge_probes(pack_of(tiny_base), Reader(tiny_base), 256, probes, candidates, Path, "base")
    assert [told[name]["0"]["accuracy"] for name in ("written", "matched", "found")] == [0.5, 0.5, 0.5]
    assert told["matched"]["0"]["against"]["of"] == "base"


def test_a_conversation_is_asked_with_the_chat_template(tiny_base, tmp_path):
    (tmp_path / "chat.jinja").write_text(CHAT)
    (tmp_path / "p.yaml").write_text(
        "name: talk\nkind: regex\nitems:\n"
        "  - {messages: [{role: system, content: Be brief.}, {role: user, content: hi}], pattern: x}\n"
    )
    (tmp_path / "q.yaml").write_text(
        'name: told\nkind: exact_match\nitems:\n  - {messages: [{role: user, content: hi}], answer: " yes"}\n'
    )
    probe, told = read_probe(tmp_path / "p.yaml"), read_probe(tmp_path / "q.yaml")
    reader = Reader(tiny_base, tmp_path / "chat.jinja")
    asked = questions_of(reader, [probe, told], 256)
    assert reader.decode(asked.prompts[0].ids) == "system: Be brief.\nuser: hi\nassistant:"
    (row,) = asked.answered
    assert reader.decode(row.ids[: row.start]) == "user: hi\nassistant:"
    assert reader.decode(row.ids[row.start :]) == " yes"
    with pytest.raises(ModelError, match="chat template"):
        questions_of(Reader(tiny_base), [probe], 256)


def test_writing_is_no_silence(tiny_base, folders):
    """A body that writes for an hour gives a sign after every token, or it would be taken for dead."""
    pack, signs = pack_of(tiny_base), []
    for shard in pack.shards.all:
        shard.progress = lambda: signs.append(1)
    ask_candidates(pack, questions(tiny_base), [Candidate("first", folders[0])], Path, Reader(tiny_base).decode)
    assert len(signs) >= max(MOST)


def test_no_pass_writes_more_than_passes_may_hold(tiny_base, folders):
    lanes = []
    pack = pack_of(tiny_base, 4, held=10)
    pack.shards.all[0].trunk.register_forward_pre_hook(lambda _, given: lanes.append(tuple(given[0].shape)))
    candidates = [Candidate(str(number), folders[number % 2]) for number in range(4)]
    ask_candidates(pack, questions(tiny_base), candidates, Path, Reader(tiny_base).decode)
    longest = max(len(prompt.ids) for prompt in questions(tiny_base).prompts)
    at_once = max(1, 4 * 10 // (len(PROMPTS) * longest))
    assert {rows for rows, _ in lanes} <= {at_once * len(PROMPTS), at_once}  # rows of the trial of the cache are one a lane


def test_how_many_tokens_a_batch_has_is_the_same_for_every_worker_and_for_any_number_of_them():
    def told(*parts):
        return [tokens for *_, tokens in _batches(SimpleNamespace(parts=parts, whole=2), [3, 9, 4, 40, 7], 1)]

    assert told(0) == told(1) == told(0, 1)[::2] == told(0, 1)[1::2] == [4, 9, 40]
