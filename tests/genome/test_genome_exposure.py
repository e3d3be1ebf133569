"""The mix inverted: where a row stands, and which steps saw a document, against counting by hand."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.core.records import Change, Epigenome
from chrysalis_ray.genome.build import build_genome
from chrysalis_ray.genome.epigenome import appended
from chrysalis_ray.genome.exposure import Sighting, Stretch, ordinal_of, sightings, tokens_by_row
from chrysalis_ray.genome.mix import BLOCK, MixPlan, permuted, plan_of, unpermuted
from chrysalis_ray.genome.tokens import tokenize_genome


@given(st.integers(1, 500), st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6))
def test_a_permutation_can_be_undone(size, key):
    values, sizes = np.arange(size), np.full(size, size)
    keys = np.broadcast_to(np.array(key, np.uint64), (size, 6))
    image = permuted(values, sizes, keys)
    assert sorted(image.tolist()) == list(range(size))
    assert (unpermuted(image, sizes, keys) == values).all()


plans = st.builds(
    MixPlan,
    st.fixed_dictionaries({"a": st.floats(0.01, 5), "b": st.floats(0.01, 5)}),
    st.fixed_dictionaries({"a": st.integers(1, 60), "b": st.integers(1, 900)}),
    st.integers(0, 2**32 - 1),
)


@settings(deadline=None, max_examples=40)
@given(plans, st.integers(0, 3 * BLOCK), st.integers(0, 2 * BLOCK), st.data())
def test_positions_are_those_that_drawing_finds(plan, start, length, data):
    domain = data.draw(st.sampled_from(plan.domains))
    row = data.draw(st.integers(0, int(plan.rows[plan.domains.index(domain)]) - 1))
    drawn = plan.draw(start, length)
    expected = [start + at for at, (name, _, number) in enumerate(drawn) if (name, number) == (domain, row)]
    assert plan.positions_of(domain, row, start, start + length) == expected


def test_positions_far_out_cost_no_search():
    plan = MixPlan({"a": 1.0, "b": 2.0}, {"a": 1000, "b": 70_000}, 5)
    far = 10**12
    for at, (domain, _, row) in enumerate(plan.draw(far, 64)):
        assert far + at in plan.positions_of(domain, row, far, far + 64)


def test_rows_and_domains_that_are_not_there():
    plan = MixPlan({"a": 1.0}, {"a": 10}, 5)
    assert plan.positions_of("b", 0, 0, 100) == []
    with pytest.raises(GenomeError, match="rows 0 to 9, not 10"):
        plan.positions_of("a", 10, 0, 100)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exposure")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    for domain in ("notes", "essays"):
        lines = [json.dumps({"text": " ".join(f"{domain}{n}w{w}" for w in range(5 + 3 * n))}) for n in range(14)]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines))
    sources = [{"type": "jsonl", "path": f"{domain}.jsonl", "domain": domain} for domain in ("notes", "essays")]
    genome = build_genome(GenomeSpec.model_validate({"sources": sources}), folder / "genome", folder)
    return genome, tokenize_genome(genome, folder, folder / "tokens", 32)


STAGED = Epigenome({"notes": 1.0, "essays": 3.0}, stages=(Change(31, {"notes": 5.0}),), changes=(Change(100, {"essays": 0.5}),))
HISTORY = [
    Stretch("donor", 7, Epigenome({"notes": 1.0, "essays": 3.0}), 0, 40, 3),
    Stretch("self", 8, Epigenome({"notes": 2.0, "essays": 1.0}), 40, 60, 3),
    Stretch("self", 8, Epigenome({"notes": 2.0}), 60, 75, 3),
]
SCHEDULED = [  # stages inside a stretch, changes appended between two, a subset of every domain
    Stretch("donor", 7, STAGED, 0, 40, 3),
    Stretch("self", 8, appended(STAGED, 120, {"essays": 9.0}), 40, 60, 3),
    Stretch("self", 8, replace(STAGED, kept=0.4), 60, 90, 3),
]


def counted(history, store, domain, ordinal):
    """Sightings by drawing every row of the history and looking into it."""
    sizes = {name: store.token_count(name, "train") for name in store.domains}
    rows = {name: store.rows(name, "train") for name in store.domains}
    found = Counter()
    for stretch in history:
        plan = plan_of(stretch.epigenome, sizes, rows, stretch.rng_seed)
        for step in range(stretch.start, stretch.stop):
            drawn = plan.draw(step * stretch.rows_per_step, stretch.rows_per_step)
            batch = store.batch([(name, row) for name, _, row in drawn], "train")
            for (name, _, _), documents in zip(drawn, batch.document, strict=True):
                if name == domain:
                    found[step, stretch.variant_id] += int((documents == ordinal).sum())
    return [Sighting(step, count, who) for (step, who), count in sorted(found.items()) if count]


@pytest.mark.parametrize("history", [HISTORY, SCHEDULED], ids=["levels", "schedules"])
@pytest.mark.parametrize("domain", ["notes", "essays"])
def test_every_sighting_of_every_document_is_found(tokens, domain, history):
    genome, store = tokens
    rows = genome.manifest["content"]["documents"]
    seen = 0
    for number, document in enumerate(genome.documents(domain, "train")):
        assert ordinal_of(rows, document.doc_id) == (domain, "train", number)
        by_row = tokens_by_row(store, domain, number)
        assert sum(by_row.values()) == len(document.content)  # a token per byte
        found = sightings(history, store, domain, by_row)
        assert found == counted(history, store, domain, number)
        seen += len(found)
    assert seen > 20


def test_a_document_that_the_genome_lacks(tokens):
    with pytest.raises(GenomeError, match="no document 00"):
        ordinal_of(tokens[0].manifest["content"]["documents"], "00")
