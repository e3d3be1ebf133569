"""Rows of tokens: packing laws, and every token of every document found again in a batch."""

import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError, ModelError
from chrysalis_ray.core.records import Change, Epigenome
from chrysalis_ray.genome.build import build_genome, verify_genome
from chrysalis_ray.genome.documents import SPLITS
from chrysalis_ray.genome.mix import plan_of
from chrysalis_ray.genome.packing import pack
from chrysalis_ray.genome.tokenizer import load_tokenizer
from chrysalis_ray.genome.tokens import open_tokens, tokenize_genome, verify_tokens

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A byte-level tokenizer: one token per byte, and an end token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i + 1 for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": END}}))
    return folder


def write_rows(folder, name, lengths):
    lines = [
        json.dumps({"text": f"{name}{i} ".ljust(n, random.Random(i).choice("abcdefg"))[:n]}) for i, n in enumerate(lengths)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return {"type": "jsonl", "path": f"{name}.jsonl", "domain": name}


def make_genome(folder, **lengths):
    sources = [write_rows(folder, name, of_name) for name, of_name in lengths.items()]
    spec = GenomeSpec.model_validate({"sources": sources, "split": {"select": 0.2, "report": 0.2}})
    return build_genome(spec, folder / "genome", folder)


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    random_ = random.Random(1)
    lengths = [random_.randrange(8, 200) for _ in range(60)]
    return make_genome(tmp_path_factory.mktemp("genome"), essays=lengths, notes=[17, 33, 16, 15, 8, 64, 65, 48, 49, 9, 10, 11])


# packing


@given(st.lists(st.integers(0, 70), max_size=60), st.integers(4, 32))
def test_packing_keeps_every_token_once_and_rows_full(lengths, row_length):
    packing = pack(np.array(lengths, dtype=np.int64), row_length)
    covered = [[] for _ in lengths]
    columns: dict[int, set[int]] = {}
    for d, start, n, row, column in zip(
        packing.document, packing.start, packing.length, packing.row, packing.column, strict=True
    ):
        assert n >= 2
        covered[d] += range(start, start + n)
        cells = set(range(column, column + n))
        assert max(cells) < row_length
        assert not cells & columns.setdefault(int(row), set())
        columns[int(row)] |= cells
    assert [sorted(cells) for cells in covered] == [list(range(n)) if n > 1 else [] for n in lengths]
    assert sorted(columns) == list(range(packing.rows))
    assert all(cells == set(range(len(cells))) for cells in columns.values()), "no gap before the padding"
    pairs = list(zip(packing.document.tolist(), packing.row.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs), "no row holds two pieces of one document"
    half_empty = sum(len(cells) <= row_length // 2 for cells in columns.values())
    assert half_empty <= 1, "two half-empty rows would have been one"


def test_best_fit_decreasing_fills_a_known_case():
    packing = pack(np.array([7, 6, 3, 2, 2], dtype=np.int64), 10)
    assert packing.rows == 2
    assert packing.row.tolist() == [0, 1, 0, 1, 1]


# batches


@pytest.mark.parametrize("sequence_length", [8, 16, 33, 256])
def test_every_document_is_found_again_and_labels_are_next_tokens(tmp_path, genome, tokenizer_folder, sequence_length):
    store = tokenize_genome(genome, tokenizer_folder, tmp_path / "tokens", sequence_length)
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = tokenizer.token_to_id(END)
    for domain in genome.domains:
        for split in SPLITS:
            batch = store.batch([(domain, row) for row in range(store.rows(domain, split))], split)
            check_rows(batch)
            assert (store.label_counts(domain, split) == (batch.labels != -100).sum(1)).all()
            assert store.label_counts(domain, split).min() >= 1
            assert store.token_count(domain, split) == (batch.document >= 0).sum()
            for ordinal, document in enumerate(genome.documents(domain, split)):
                expected = [*tokenizer.encode(document.text).ids, end]
                assert pieces_of(batch, ordinal, sequence_length, expected)
            assert store.document_count(domain, split) == ordinal + 1


def check_rows(batch):
    """Positions restart with every segment; labels are the next token inside it and nothing at its end."""
    for ids, positions, labels, document in zip(batch.input_ids, batch.position_ids, batch.labels, batch.document, strict=True):
        begins = [0] + [t for t in range(1, len(ids)) if document[t] != document[t - 1]]
        for start, stop in zip(begins, [*begins[1:], len(ids)], strict=True):
            assert positions[start:stop].tolist() == list(range(stop - start))
            if document[start] < 0:
                assert stop == len(ids)
                assert set(ids[start:stop].tolist()) == {0}
                assert set(labels[start:stop].tolist()) == {-100}
            else:
                assert labels[start : stop - 1].tolist() == ids[start + 1 : stop].tolist()
                assert labels[stop - 1] == -100


def pieces_of(batch, ordinal, sequence_length, expected):
    """Whether the pieces of document `ordinal`, in some order, are `expected` cut at the row length."""
    found = sorted(ids[document == ordinal].tolist() for ids, document in zip(batch.input_ids, batch.document, strict=True))
    cuts = [expected[at : at + sequence_length] for at in range(0, len(expected), sequence_length)]
    if len(cuts) > 1 and len(cuts[-1]) == 1:
        cuts[-2:] = [cuts[-2][:-1], cuts[-2][-1:] + cuts[-1]]
    return [piece for piece in found if piece] == sorted(cuts)


@given(st.lists(st.integers(6, 60), min_size=3, max_size=20), st.integers(4, 24))
@settings(max_examples=10, deadline=None)
def test_nothing_is_lost_for_any_lengths(tmp_path_factory, tokenizer_folder, lengths, sequence_length):
    folder = tmp_path_factory.mktemp("any")
    genome = make_genome(folder, rows=lengths)
    store = tokenize_genome(genome, tokenizer_folder, folder / "tokens", sequence_length)
    for split in SPLITS:
        check_rows(store.batch([("rows", row) for row in range(store.rows("rows", split))], split))
    assert sum(store.token_count("rows", split) for split in SPLITS) == sum(lengths) + len(lengths)
    shutil.rmtree(folder)


def test_a_batch_keeps_the_order_asked_for_across_domains(tmp_path, genome, tokenizer_folder):
    store = tokenize_genome(genome, tokenizer_folder, tmp_path / "tokens", 32)
    wanted = [("notes", 1), ("essays", 3), ("notes", 0), ("essays", 3)]
    batch = store.batch(wanted, "train")
    for place, row in enumerate(wanted):
        assert (batch.input_ids[place] == store.batch([row], "train").input_ids[0]).all()
        assert (batch.document[place] == store.batch([row], "train").document[0]).all()
    assert [str(a.dtype) for a in (batch.input_ids, batch.position_ids, batch.labels, batch.document)] == [
        "int64", "int64", "int64", "int32",
    ]  # fmt: skip
    assert store.batch([], "train").input_ids.shape == (0, 32)
    for bad in [("notes", -1), ("notes", store.rows("notes", "train")), ("note", 0)]:
        with pytest.raises(GenomeError, match="note"):
            store.batch([bad], "train")


def test_a_split_is_only_what_the_genome_says(tmp_path, genome, tokenizer_folder):
    store = tokenize_genome(genome, tokenizer_folder, tmp_path / "tokens", 64)
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    texts = {split: {d.text for d in genome.documents("notes", split)} for split in SPLITS}
    for split in SPLITS:
        batch = store.batch([("notes", row) for row in range(store.rows("notes", split))], split)
        for ids, document in zip(batch.input_ids, batch.document, strict=True):
            for ordinal in set(document.tolist()) - {-1}:
                text = tokenizer.decode(ids[document == ordinal].tolist(), skip_special_tokens=True)
                assert any(text in whole for whole in texts[split])


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_the_bytes_of_tokens_are_those_of_the_text(tmp_path_factory, texts):
    """With a tokenizer that merges some bytes and splits others, and one that never saw most characters."""
    folder = tmp_path_factory.getbasetemp() / "merging"
    if not folder.is_dir():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        tokenizer.train_from_iterator(["the bytes of the tokens of the text", "größer als größte"] * 3, trainer)
        folder.mkdir()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    tokenizer = load_tokenizer(folder)
    ids, sizes = tokenizer.encode_sized(texts)
    assert [own.tolist() for own in ids] == [own.tolist() for own in tokenizer.encode(texts)]
    for text, own, size in zip(texts, ids, sizes, strict=True):
        assert len(size) == len(own)
        assert size.min() >= 0
        assert int(size.sum()) == len(text.encode())


def test_held_out_rows_know_the_bytes_of_every_token_and_training_rows_do_not(tmp_path, genome, tokenizer_folder):
    store = tokenize_genome(genome, tokenizer_folder, tmp_path, 32)
    for domain in store.domains:
        batch = store.batch([(domain, row) for row in range(store.rows(domain, "select"))], "select")
        texts = [document.text for document in genome.documents(domain, "select")]
        for ordinal, text in enumerate(texts):
            assert int(batch.bytes[batch.document == ordinal].sum()) == len(text.encode())
        assert (store.batch([(domain, 0)], "train").bytes == -1).all()


def test_text_that_spells_a_special_token_stays_text(tmp_path, tokenizer_folder):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"{i}{END}{i}"}) for i in range(8)))
    spec = GenomeSpec.model_validate({"sources": [{"type": "jsonl", "path": "rows.jsonl", "domain": "rows"}]})
    genome = build_genome(spec, tmp_path / "genome", tmp_path)
    store = tokenize_genome(genome, tokenizer_folder, tmp_path / "tokens", 64)
    end = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).token_to_id(END)
    batch = store.batch([("rows", row) for row in range(store.rows("rows", "train"))], "train")
    assert (batch.input_ids == end).sum() == store.document_count("rows", "train")


def test_a_template_of_the_tokenizer_is_kept_and_not_doubled(tmp_path, genome, tokenizer_folder):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    ids = [("<s>", tokenizer.token_to_id("<s>")), (END, tokenizer.token_to_id(END))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"<s> $A {END}", special_tokens=ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    store = tokenize_genome(genome, folder, tmp_path / "tokens", 512)
    batch = store.batch([("notes", row) for row in range(store.rows("notes", "train"))], "train")
    documents = store.document_count("notes", "train")
    assert (batch.input_ids == ids[0][1]).sum() == (batch.input_ids == ids[1][1]).sum() == documents
    assert set(batch.input_ids[(batch.position_ids == 0) & (batch.document >= 0)].tolist()) == {ids[0][1]}


# files


def test_tokens_are_reused_for_the_same_key_and_made_anew_for_another(tmp_path, genome, tokenizer_folder):
    first = tokenize_genome(genome, tokenizer_folder, tmp_path / "tokens", 32)
    written = (tmp_path / "tokens" / "manifest.json").stat().st_mtime_ns
    tokenize_genome(genome, tokenizer_folder, tmp_path / "tokens", 32)
    assert (tmp_path / "tokens" / "manifest.json").stat().st_mtime_ns == written
    again = tokenize_genome(genome, tokenizer_folder, tmp_path / "again", 32)
    assert again.manifest == first.manifest
    assert tokenize_genome(genome, tokenizer_folder, tmp_path / "tokens", 16).sequence_length == 16
    assert open_tokens(tmp_path / "tokens").sequence_length == 16


def test_changed_bytes_are_found(tmp_path, genome, tokenizer_folder):
    folder = tmp_path / "tokens"
    tokenize_genome(genome, tokenizer_folder, folder, 32)
    verify_tokens(folder)
    path = folder / "notes-train.input_ids.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    open_tokens(folder)
    with pytest.raises(GenomeCorrupt, match=r"notes-train\.input_ids\.npy: sha256"):
        verify_tokens(folder)
    path.write_bytes(content[:-1])
    with pytest.raises(GenomeCorrupt, match=r"notes-train\.input_ids\.npy: missing, or not the"):
        open_tokens(folder)
    path.write_bytes(b"x" * len(content))
    with pytest.raises(GenomeCorrupt, match="not the array"):
        open_tokens(folder)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"rows": ', '"rows": 1', 1))
    with pytest.raises(GenomeCorrupt, match="does not match its sha256"):
        open_tokens(folder)
    manifest.write_text("{")
    with pytest.raises(GenomeCorrupt, match="not a token manifest"):
        open_tokens(folder)
    manifest.unlink()
    with pytest.raises(GenomeError, match="no tokens"):
        open_tokens(folder)


def test_tokenizers_that_cannot_be_used(tmp_path, genome, tokenizer_folder):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a tokenizer"):
        tokenize_genome(genome, bad, tmp_path / "tokens", 32)
    shutil.copy(tokenizer_folder / "tokenizer.json", bad / "tokenizer.json")
    (bad / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    with pytest.raises(ModelError, match="lacks the end token '<eos>'"):
        tokenize_genome(genome, bad, tmp_path / "tokens", 32)
    (bad / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: not a JSON object"):
        tokenize_genome(genome, bad, tmp_path / "tokens", 32)
    with pytest.raises(GenomeError, match="sequence_length is 2"):
        tokenize_genome(genome, tokenizer_folder, tmp_path / "tokens", 2)
    assert not (tmp_path / "tokens").exists()


def test_no_epigenome_changes_the_genome(tmp_path, genome, tokenizer_folder):
    before = {path: path.read_bytes() for path in sorted(genome.folder.rglob("*")) if path.is_file()}
    store = tokenize_genome(genome, tokenizer_folder, tmp_path / "tokens", 32)
    tokens = {domain: store.token_count(domain, "train") for domain in store.domains}
    rows = {domain: store.rows(domain, "train") for domain in store.domains}
    rich = Epigenome(
        {"notes": 4.0, "essays": 0.0}, "temperature(2)", floors={"essays": 0.1}, caps={"notes": 3.0}, replay_share=0.2,
        replay={"essays": 1.0}, loss_weights={"notes": 2.0}, kept=0.5, budget_rows=40, row_tokens=32,
        stages=(Change(9, {"notes": 0.5}),), changes=(Change(20, {"essays": 2.0}),),
    )  # fmt: skip
    for epigenome in (Epigenome({"essays": 1.0}), Epigenome({"notes": 4.0, "essays": 0.1}), rich):
        drawn = plan_of(epigenome, tokens, rows, 0).draw(0, 40)
        store.batch([(domain, row) for domain, _, row in drawn], "train")
    assert verify_genome(genome.folder).genome_id == genome.genome_id
    assert {path: path.read_bytes() for path in before} == before


def test_opening_tokens_needs_no_tokenizer_torch_or_arrow():
    program = (
        "import sys, chrysalis_ray.genome.tokens;"
        "print(sorted({'torch', 'ray', 'pyarrow', 'datasets', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout.strip() == "[]"
