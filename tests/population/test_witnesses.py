"""Who learned from what is to be forgotten: variants, what was merged from them, the base, and where the text still lies."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from chrysalis_ray.body.turn import first_position
from chrysalis_ray.cli.main import app
from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.core.layout import CACHE, CacheLayout, RunLayout
from chrysalis_ray.core.records import Epigenome, Hyperparameters, Variant, write_json
from chrysalis_ray.core.store import Store
from chrysalis_ray.genome.build import build_genome, open_genome
from chrysalis_ray.genome.exposure import ordinal_of
from chrysalis_ray.genome.mix import MixPlan, shares_of
from chrysalis_ray.genome.tokens import open_tokens, tokenize_genome
from chrysalis_ray.population.branch import write_branch
from chrysalis_ray.population.witnesses import places_of_text, runs_of, witnesses
from chrysalis_ray.report.metrics import append_metrics

ROWS, CHUNK = 2, 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run directory as a killed run leaves it: `v000` trained on a; `v001` took over its first chunk and went on with b;
    `v002` never reported. A merge of each, and v001 came out."""
    folder = tmp_path_factory.mktemp("witnesses")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    for domain in ("a", "b"):
        lines = [json.dumps({"text": " ".join(f"{domain}{n}w{w}" for w in range(12 + n))}) for n in range(16)]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines))
    sources = [{"type": "jsonl", "path": f"{domain}.jsonl", "domain": domain} for domain in ("a", "b")]
    layout = RunLayout(folder / "runs" / "one")
    genome = build_genome(GenomeSpec.model_validate({"sources": sources}), layout.genome, folder)
    tokenize_genome(genome, folder, layout.tokens, 64)
    write_json(layout.run_manifest, {"experiment": {"experiment": {}, "blueprint": {"lora": {"init": "kaiming"}}}})
    write_json(layout.base_manifest, {"type": "pretrained"})
    variants = [
        Variant(f"v00{n}", n, 100 + n, "seed", genome.genome_id, "base", Hyperparameters(), Epigenome({"a": 1.0}), 6, CHUNK,
                ROWS, 64)
        for n in range(3)
    ]  # fmt: skip
    write_branch(layout, variants)
    start, store = first_position(variants[0]), Store(layout.store)
    turns = [
        {"p0": ("v000", start, 0, {"a": 1.0})},
        {"q0": ("v000", "p0", 1, {"a": 1.0}), "q1": ("v001", "p0", 1, {"b": 1.0})},
    ]
    for number, turn in enumerate(turns):
        results = {
            target: {"variant_id": who, "origin": origin, "chunk": chunk, "seed": store.put(target.encode())}
            for target, (who, origin, chunk, _) in turn.items()
        }
        store.commit_cut(number, {"results": results, "turn": number})
        for target, (who, _, chunk, express) in turn.items():
            row = {"variant": who, "report": chunk + 1, "position": target, "epigenome": {"express": express}}
            append_metrics(layout.metrics, row)
    for name in ("v000", "v001"):
        layout.adapter(name).mkdir(parents=True)
    merged = {"first": {"v000": 1.0}, "second": {"v000": 0.0, "v001": 1.0}, "both": {"v000": 0.5, "v001": 0.5}}
    write_json(layout.merges_manifest, {"candidates": {name: {"weights": weights} for name, weights in merged.items()}})
    layout.imago.mkdir()
    write_json(layout.verdict, {"chosen": "second"})
    return layout.root.parent


def by_hand(layout: RunLayout, doc_id: str) -> dict[str, int]:
    """Tokens of the document in every row that a variant's history drew."""
    genome, store = open_genome(layout.genome), open_tokens(layout.tokens)
    domain, split, ordinal = ordinal_of(genome.manifest["content"]["documents"], doc_id)
    assert split == "train"
    histories = {"v000": [(100, {"a": 1.0}, 0, 6)], "v001": [(100, {"a": 1.0}, 0, 3), (101, {"b": 1.0}, 3, 6)]}
    sizes = {name: store.token_count(name, "train") for name in store.domains}
    rows = {name: store.rows(name, "train") for name in store.domains}
    found = dict.fromkeys(histories, 0)
    for name, stretches in histories.items():
        for rng_seed, express, start, stop in stretches:
            plan = MixPlan(shares_of(Epigenome(express), sizes), rows, rng_seed)
            for of, _, row in plan.draw(start * ROWS, (stop - start) * ROWS):
                if of == domain:
                    found[name] += int((store.arrays[domain, "train"]["document"][row] == ordinal).sum())
    return {name: tokens for name, tokens in found.items() if tokens}


def test_every_document_has_the_witnesses_that_counting_finds(runs):
    (layout,) = runs_of([runs])
    documents = open_genome(layout.genome).manifest["content"]["documents"]
    told_of = set()
    for row in documents:
        (witness,) = witnesses([layout], {row["doc_id"]})
        counted = by_hand(layout, row["doc_id"]) if row["split"] == "train" else {}
        assert {name: seen["tokens"] for name, seen in witness.variants.items()} == counted
        told_of |= {row["domain"]} if counted else set()
        carriers = {f"variants/{name}/adapter" for name in counted}
        carriers |= {"merges/both"} if counted else set()
        carriers |= {"merges/first"} if "v000" in counted else set()
        carriers |= {"merges/second", "imago"} if "v001" in counted else set()
        assert set(witness.adapters) == carriers
        assert (witness.unknown, witness.base, witness.documents) == (None, False, 1)
    assert told_of == {"a", "b"}


def test_several_documents_at_once_and_one_that_nobody_holds(runs):
    (layout,) = runs_of([runs])
    documents = open_genome(layout.genome).manifest["content"]["documents"]
    trained = [row["doc_id"] for row in documents if row["split"] == "train"]
    (witness,) = witnesses([layout], set(trained))
    each = [by_hand(layout, doc_id) for doc_id in trained]
    for name, seen in witness.variants.items():
        assert seen["tokens"] == sum(counted.get(name, 0) for counted in each)
        assert seen["steps"] == list(range(6))
    assert witnesses([layout], {"0" * 64}) == []


def test_an_embedded_base_and_an_adapter_zero_made_from_data_are_named(runs):
    (layout,) = runs_of([runs])
    before = layout.base_manifest.read_bytes(), layout.run_manifest.read_bytes()
    trained = next(r for r in open_genome(layout.genome).manifest["content"]["documents"] if r["split"] == "train")
    try:
        write_json(layout.base_manifest, {"type": "embedded"})
        write_json(layout.run_manifest, {"experiment": {"experiment": {}, "blueprint": {"lora": {"init": "eva"}}}})
        (witness,) = witnesses([layout], {trained["doc_id"]})
        assert witness.base
        assert "seed" in witness.adapters
    finally:
        layout.base_manifest.write_bytes(before[0])
        layout.run_manifest.write_bytes(before[1])


def test_a_run_whose_history_is_lost_is_told_not_left_out(runs):
    (layout,) = runs_of([runs])
    trained = next(r for r in open_genome(layout.genome).manifest["content"]["documents"] if r["split"] == "train")
    kept = layout.metrics.read_bytes()
    try:
        layout.metrics.write_bytes(b"".join(line for line in kept.splitlines(keepends=True) if b'"p0"' not in line))
        (witness,) = witnesses([layout], {trained["doc_id"]})
        assert "is in no report any more" in (witness.unknown or "")
    finally:
        layout.metrics.write_bytes(kept)


def test_where_the_text_lies(runs):
    """In the run, in the genome itself, and in tokens of it that runs share or had begun to make; not in those of another."""
    (layout,) = runs_of([runs])
    genome, cache = open_genome(layout.genome), CacheLayout(layout.root.parent / CACHE)
    inside = [str(layout.genome), str(layout.tokens)]
    assert places_of_text(genome, [layout], [str(layout.root)]) == sorted(inside)
    assert places_of_text(genome, [layout], []) == [str(layout.genome)]
    try:
        for name, key in (("1" * 64, genome.genome_id), ("2" * 64, "of another")):
            write_json(cache.tokens(name) / "manifest.json", {"key": {"genome_id": key}})
        (cache.tokens("3" * 64) / "pieces").mkdir(parents=True)
        shared = [str(cache.tokens("1" * 64)), str(cache.tokens("3" * 64))]
        assert places_of_text(genome, [layout], [str(layout.root)]) == sorted([*inside, *shared])
    finally:
        shutil.rmtree(cache.root)


def test_a_run_named_twice_is_one(runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    assert [layout.root for layout in runs_of([Path("runs"), runs, Path("nowhere")])] == [(runs / "one").resolve()]


def test_the_verb_names_them_and_says_that_weights_stay(runs, tmp_path):
    (layout,) = runs_of([runs])
    documents = open_genome(layout.genome).manifest["content"]["documents"]
    row = next(row for row in documents if row["split"] == "train" and "v001" in by_hand(layout, row["doc_id"]))
    arguments = ["genome", "forget", str(layout.root), row["path"], "--reason", "asked", "--runs", str(runs)]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "g")])
    assert done.exit_code == 0, done.output
    for words in ("1 of", "v001: ", "merges/second", "imago", "weights are not unlearned", str(layout.tokens)):
        assert words in done.stdout
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json", "--out", str(tmp_path / "g2")]).stdout)
    assert told["genome_id"] == open_genome(tmp_path / "g").genome_id == open_genome(tmp_path / "g2").genome_id
    assert told["runs"][0]["variants"]["v001"]["tokens"] == by_hand(layout, row["doc_id"])["v001"]
    shown = CliRunner().invoke(app, ["genome", "show", str(tmp_path / "g")])
    assert "forgotten on " in shown.stdout
    assert "(asked)" in shown.stdout
    asked = CliRunner().invoke(app, ["genome", "show", str(tmp_path / "g"), row["path"]])
    assert asked.exit_code == 1
    assert "was forgotten on" in asked.stderr
    again = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "g")])
    assert again.exit_code == 1
    assert "a genome never changes" in again.stderr
    nothing = CliRunner().invoke(app, ["genome", "forget", str(layout.root), "--reason", "x", "--out", str(tmp_path / "g3")])
    assert nothing.exit_code == 1
    assert "nothing to forget" in nothing.stderr
    assert not (tmp_path / "g3").exists()
