"""Listed mixes that are made of others: the laws of the operators hold for what is written, and nothing reaches the genome."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chrysalis_ray.config.epigenome import ListedMixes
from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.config.loading import load_experiment
from chrysalis_ray.core.records import Epigenome
from chrysalis_ray.core.shares import shares_of
from chrysalis_ray.genome.build import build_genome, verify_genome
from chrysalis_ray.genome.mix import plan_of
from chrysalis_ray.population.branch import Branching, branch_population
from chrysalis_ray.population.mixes import listed_levels
from chrysalis_ray.report.mixes import resolved_mix

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
DOMAINS = ("api_docs", "code", "comments", "docstrings", "reference", "unicode")
TOKENS = dict(zip(DOMAINS, (9000, 100, 4000, 70, 5, 1000), strict=True))
levels = st.dictionaries(st.sampled_from(DOMAINS), st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1).filter(
    lambda express: any(express.values())
)
factors = st.floats(1e-2, 1e2)


def listed(*mixes, rng_seed=17):
    spec = ListedMixes.model_validate({"type": "listed", "mixes": list(mixes)})
    return listed_levels(ListedMixes.model_validate(spec.model_dump()), rng_seed)  # what a run directory keeps says the same


def same(one, other):
    a, b = shares_of(one, TOKENS), shares_of(other, TOKENS)
    return all(math.isclose(a[domain], b[domain], rel_tol=1e-9, abs_tol=1e-12) for domain in DOMAINS)


@given(levels, factors, factors, st.data())
def test_dim_brighten_and_swap_are_the_operators(express, a, b, data):
    one, other = (data.draw(st.sampled_from(sorted(express))) for _ in range(2))
    made = listed(
        {"name": "start", "express": express},
        {"name": "copy", "like": "start"},
        {"name": "dimmed", "like": "start", "dim": {one: a}},
        {"name": "back", "like": "dimmed", "brighten": {one: a}},
        {"name": "twice", "like": "dimmed", "dim": {one: b}},
        {"name": "once", "like": "start", "dim": {one: a * b}},
        {"name": "swapped", "like": "start", "swap": [[one, other]]},
        {"name": "unswapped", "like": "swapped", "swap": [[other, one]]},
    )
    assert made["copy"] == made["unswapped"] == made["start"] == Epigenome(express)
    assert same(made["back"], made["start"])
    assert same(made["twice"], made["once"])
    assert made["swapped"].express == {**express, one: express[other], other: express[one]}
    assert made["dimmed"].express[one] == pytest.approx(express[one] / a)


@given(levels, levels, st.floats(0.01, 0.99))
def test_a_cross_lies_between_its_parents(one, other, weight):
    parents = ({"name": "one", "express": one}, {"name": "other", "express": other})
    made = listed(
        *parents,
        {"name": "middle", "cross": ["one", "other"]},
        {"name": "turned", "cross": ["other", "one"]},
        {"name": "near", "cross": ["one", "other"], "weight": weight},
        {"name": "far", "cross": ["other", "one"], "weight": 1 - weight},
        {"name": "copy", "like": "one"},
        {"name": "inbred", "cross": ["one", "copy"]},
    )
    assert same(made["middle"], made["turned"])
    assert same(made["near"], made["far"])
    assert same(made["inbred"], made["one"])
    heard = {domain for domain, level in (*one.items(), *other.items()) if level > 0.0}
    assert {domain for domain, level in made["near"].express.items() if level > 0.0} == heard
    assert made["one"].express == one


def test_a_mutation_is_of_its_name_and_the_experiments_seed():
    mixes = ({"name": "a", "express": {"code": 1, "unicode": 0}}, {"name": "b", "like": "a", "mutate": 0.5})
    first = listed(*mixes)["b"].express["code"]
    assert first == listed(*mixes)["b"].express["code"] != 1.0
    assert listed(*mixes, rng_seed=18)["b"].express["code"] != first
    assert listed(*mixes, {"name": "c", "like": "a", "mutate": 0.5})["c"].express["code"] != first
    assert listed(*mixes)["b"].express["unicode"] == 0.0


def branched(written, *settings, **known):
    loaded = load_experiment(EXPERIMENTS / "quickstart.yaml", [f"population.epigenomes={written}", *settings])
    return branch_population(Branching(loaded.experiment, loaded.blueprint, DOMAINS, "seed", "genome", "base", **known))


def test_a_child_inherits_what_its_parent_says_and_may_say_otherwise():
    first, quieter, own, cross = branched(
        "{type: listed, caps: {'*': 9}, mixes: ["
        "{name: first, express: {code: 4, unicode: 1}, floors: {unicode: 0.1}, stages: [{at: 0.5, express: {code: 1}}]},"
        "{name: quieter, like: first, dim: {code: 2}},"
        "{name: own, like: quieter, prior: size, floors: {}, caps: {code: 5}, swap: [[code, unicode]]},"
        "{name: between, cross: [first, quieter]}]}",
        "population.variants=4",
    )
    assert quieter.epigenome.express == {"code": 2.0, "unicode": 1.0}
    for inherits in (quieter, cross):
        for key in ("floors", "caps", "prior", "stages", "budget_rows"):
            assert getattr(inherits.epigenome, key) == getattr(first.epigenome, key)
    assert own.epigenome.express == {"code": 1.0, "unicode": 2.0}
    assert (own.epigenome.prior, own.epigenome.floors, own.epigenome.caps) == ("size", {}, {"code": 5.0})
    assert own.epigenome.stages == first.epigenome.stages
    roots = {"code": (math.sqrt(0.8) + math.sqrt(2 / 3)) / 2, "unicode": (math.sqrt(0.2) + math.sqrt(1 / 3)) / 2}
    total = sum(root**2 for root in roots.values())
    assert shares_of(Epigenome(cross.epigenome.express), dict.fromkeys(DOMAINS, 1)) == pytest.approx(
        {domain: roots.get(domain, 0.0) ** 2 / total for domain in DOMAINS}
    )
    assert [row.variant_id for row in (first, own, cross)] == ["v000-first", "v002-own", "v003-between"]
    start, later = resolved_mix(cross, cross.epigenome, dict.fromkeys(DOMAINS, 1e6)).parts  # drawn like any other
    assert (start.why, later.why) == ("start", "stage")
    assert set(start.shares) == {"code", "unicode"}


def test_a_long_line_of_crosses_is_read_at_once():
    """Two parents each, forty generations deep: every mix is made once."""
    line = ["{name: m0, express: {code: 1}}", "{name: m1, express: {unicode: 1}}"]
    line += [f"{{name: m{k}, cross: [m{k - 1}, m{k - 2}], floors: {{code: 0.1}}}}" for k in range(2, 42)]
    rows = branched(f"{{type: listed, floors: {{code: 0.1}}, mixes: [{', '.join(line)}]}}", "population.variants=42")
    assert shares_of(rows[-1].epigenome, dict.fromkeys(DOMAINS, 100))["code"] == pytest.approx(1 / 2, abs=0.3)


def test_a_list_without_parents_names_the_run_it_named():
    written = "{type: listed, mixes: [{name: a, express: {code: 1, unicode: 1}}]}"
    told = load_experiment(EXPERIMENTS / "quickstart.yaml", [f"population.epigenomes={written}"]).resolved()
    assert told["experiment"]["population"]["epigenomes"]["mixes"] == [{"name": "a", "express": {"code": 1.0, "unicode": 1.0}}]


def test_no_mix_made_of_others_changes_the_genome(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(60):
        words = " ".join(f"word{number * k % 97}" for k in range(40))
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Text {number} of sixty. {words}\n")
    spec = GenomeSpec.model_validate({"sources": [{"type": "folder", "path": "texts", "glob": "*.txt", "domain": "code"}]})
    genome = build_genome(spec, tmp_path / "genome", tmp_path)
    before = {path: path.read_bytes() for path in sorted(genome.folder.rglob("*")) if path.is_file()}
    tokens, rows = dict.fromkeys(DOMAINS, 9000), dict.fromkeys(DOMAINS, 70)
    variants = branched(
        "{type: listed, caps: {code: 1}, mixes: [{name: a, express: {code: 1, unicode: 2}}, {name: b, like: a, mutate: 1},"
        "{name: c, like: b, swap: [[code, unicode]], dim: {code: 3}}, {name: d, cross: [a, c], weight: 0.3}]}",
        tokens=tokens, rows=rows,
    )  # fmt: skip
    for variant in variants:
        drawn = plan_of(variant.epigenome, tokens, rows, 3).draw(0, variant.epigenome.budget_rows)
        assert 0 < sum(domain == "code" for domain, _, _ in drawn) <= 70
    assert verify_genome(genome.folder).genome_id == genome.genome_id
    assert {path: path.read_bytes() for path in before} == before
