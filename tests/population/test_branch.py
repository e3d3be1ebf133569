"""Branching is a pure function: the same YAML gives the same variants on every machine."""

import json
import math
from pathlib import Path

import pytest

from chrysalis_ray.body.turn import first_position, next_position
from chrysalis_ray.config.loading import load_experiment
from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import Variant
from chrysalis_ray.genome.mix import MixPlan, shares_of
from chrysalis_ray.population.branch import Branching, branch_population, read_branch, write_branch

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
DOMAINS = ("api_docs", "code", "comments", "docstrings", "reference", "unicode")


def branched(*settings, name="quickstart"):
    loaded = load_experiment(EXPERIMENTS / f"{name}.yaml", settings)
    return branch_population(Branching(loaded.experiment, loaded.blueprint, DOMAINS, "seed", "genome", "base"))


def test_the_same_arguments_give_the_same_variants_and_another_rng_seed_others():
    assert branched() == branched()
    assert branched()[0].hyperparameters != branched("rng_seed=18")[0].hyperparameters
    assert branched()[0].rng_seed != branched("rng_seed=18")[0].rng_seed


def test_more_variants_leave_the_first_ones_as_they_are():
    assert branched("population.variants=12")[:8] == branched()


def test_grids_are_crossed_and_dealt_and_the_rest_is_drawn_within_its_range():
    rows = branched(
        "population.search={rank: {type: grid, values: [2, 4]}, clip: {type: grid, values: [0.5, 1.0]},"
        " learning_rate: {type: log_uniform, low: 1e-4, high: 1e-3}}"
    )
    settings = [row.hyperparameters for row in rows]
    assert [(s.rank, s.clip) for s in settings] == [(2, 0.5), (2, 1.0), (4, 0.5), (4, 1.0)] * 2
    assert all(1e-4 <= s.learning_rate <= 1e-3 for s in settings)
    assert len({s.learning_rate for s in settings}) == 8
    assert {s.alpha for s in settings} == {16.0}  # alpha is what the blueprint says, whatever the rank


def test_each_kind_of_mix_does_what_it_says():
    bright = branched()
    assert bright[1].epigenome.express == {domain: 4.0 if domain == "code" else 1.0 for domain in DOMAINS}
    listed = branched(
        "population.epigenomes={type: listed, mixes: [{name: a, express: {code: 1}}, {name: b, express: {code: 2}}]}"
    )
    assert [row.variant_id for row in listed[:3]] == ["v000-a", "v001-b", "v002-a"]
    drawn = branched("population.epigenomes={type: dirichlet, concentration: 0.3}")
    assert all(sum(row.epigenome.express.values()) == pytest.approx(1.0, abs=1e-5) for row in drawn)
    assert len({json.dumps(row.epigenome.to_json()) for row in drawn}) == 8


def test_a_simplex_grid_is_every_mix_once_crossed_with_the_other_grids():
    rows = branched(
        "population.epigenomes={type: simplex_grid, steps: 2}",
        "population.search={rank: {type: grid, values: [2, 4]}}",
        "population.variants=42",
    )
    points = [tuple(row.epigenome.express[domain] for domain in DOMAINS) for row in rows]
    assert points[0] == (1, 0, 0, 0, 0, 0)
    assert all(sum(point) == 1 and set(point) <= {0, 0.5, 1} for point in points)
    assert len(set(points)) == 21 == math.comb(2 + 5, 5)
    assert len({(row.hyperparameters.rank, point) for row, point in zip(rows, points, strict=True)}) == 42


def test_levels_are_drawn_within_their_ranges_and_the_other_domains_stay_at_one():
    levels = "{code: {type: log_uniform, low: 0.1, high: 10}, unicode: {type: grid, values: [0, 2]}}"
    rows = branched(f"population.epigenomes={{type: levels, levels: {levels}}}")
    assert [row.epigenome.express["unicode"] for row in rows] == [0, 2] * 4
    assert all(0.1 <= row.epigenome.express["code"] <= 10 for row in rows)
    assert len({row.epigenome.express["code"] for row in rows}) == 8
    assert all(row.epigenome.express[domain] == 1 for row in rows for domain in DOMAINS if domain not in ("code", "unicode"))


def test_a_dirichlet_mix_leans_to_the_domains_of_large_concentration():
    rows = branched("population.epigenomes={type: dirichlet, concentrations: {code: 15}}", "population.variants=200")
    shares = [row.epigenome.express["code"] for row in rows]
    assert sum(shares) / len(shares) == pytest.approx(15 / 20, abs=0.02)  # its own over the sum of all: 15 + 5 x 1


def test_sobol_variants_fill_every_range_evenly():
    rows = branched(
        "population.searcher={type: sobol}",
        "population.search={learning_rate: {type: log_uniform, low: 1e-4, high: 1e-2}, rank: {type: choice, values: [2, 4]}}",
        "population.epigenomes={type: levels, levels: {code: {type: uniform, low: 0, high: 1}}}",
        "population.variants=16",
    )
    parts = [math.log(row.hyperparameters.learning_rate / 1e-4) / math.log(100) for row in rows]
    assert sorted(int(part * 16) for part in parts) == list(range(16))
    assert sorted(int(row.epigenome.express["code"] * 16) for row in rows) == list(range(16))
    assert [row.hyperparameters.rank for row in rows].count(4) == 8


def test_paired_variants_share_the_order_of_their_rows_and_nothing_else():
    paired, alone = branched("population.paired=true"), branched()
    assert len({row.rng_seed for row in paired}) == 1
    assert len({row.rng_seed for row in alone}) == 8
    assert [row.hyperparameters for row in paired] == [row.hyperparameters for row in alone]
    assert len({first_position(row) for row in paired}) == 1
    assert len({next_position(first_position(row), row) for row in paired}) == 8


def test_paired_variants_see_equal_rows_where_their_mixes_are_equal():
    """And where the mixes differ, the j-th row they read of a domain is the same."""
    rows = {domain: 40 + number for number, domain in enumerate(DOMAINS)}
    listed = "{name: a, express: {code: 1, unicode: 1}}, {name: b, express: {code: 3, unicode: 1}}"
    mixes = f"population.epigenomes={{type: listed, mixes: [{listed}]}}"

    def stream(variant):
        return MixPlan(shares_of(variant.epigenome, rows), rows, variant.rng_seed).draw(0, 200)

    first, other_mix, same_mix, *_ = (stream(variant) for variant in branched("population.paired=true", mixes))
    assert first == same_mix
    code = [[row for row in drawn if row[0] == "code"] for drawn in (first, other_mix)]
    assert code[0] == code[1][: len(code[0])]
    alone = [stream(variant) for variant in branched(mixes)]
    assert alone[0] != alone[2]


def test_the_budget_is_whole_reports_and_never_above_what_was_asked():
    for variant in branched():
        assert variant.steps % variant.chunk_steps == 0
        assert variant.steps // variant.chunk_steps == 8
        assert variant.steps * variant.tokens_per_step <= 49152


def test_reports_are_equally_many_tokens_whatever_the_batch():
    rows = branched("population.search.rows_per_step={type: grid, values: [1, 2, 3, 8]}")
    assert [row.rows_per_step for row in rows] == [1, 2, 3, 8] * 2
    assert {row.chunk_steps * row.tokens_per_step for row in rows} == {96 * 64}  # the budget's 96, whole steps of all sizes
    assert {row.steps // row.chunk_steps for row in rows} == {8}
    assert all(row.steps * row.tokens_per_step <= 49152 for row in rows)
    assert not hasattr(rows[0].hyperparameters, "rows_per_step")


def test_variants_are_self_contained_files(tmp_path):
    layout, variants = RunLayout(tmp_path), branched()
    write_branch(layout, variants)
    assert read_branch(layout) == variants
    assert Variant.from_json(json.loads(layout.variant(variants[3].variant_id).read_text())) == variants[3]
    layout.variant(variants[3].variant_id).write_text("{")
    with pytest.raises(RunError, match=r"branch\.json"):
        read_branch(layout)


def test_every_recipe_of_a_blueprint_reaches_the_variants_and_can_be_searched():
    chosen = {
        "lora.plus_ratio": 16, "lora.freeze_a": True, "lora.dropout": 0.1,
        "optimizer.type": "rmsprop", "optimizer.momentum": 0.8,
        "schedule.decay": "wsd", "schedule.final_fraction": 0.2, "schedule.decay_fraction": 0.3,
    }  # fmt: skip
    rows = branched(*(f"blueprint.{path}={json.dumps(value)}" for path, value in chosen.items()))
    for path, value in chosen.items():
        name = "optimizer" if path == "optimizer.type" else path.partition(".")[2]
        assert {getattr(row.hyperparameters, name) for row in rows} == {value}
    searched = branched(
        "population.search={optimizer: {type: grid, values: [adamw, sgd]}, freeze_a: {type: grid, values: [true, false]},"
        " dropout: {type: uniform, low: 0, high: 0.3}, plus_ratio: {type: log_uniform, low: 1, high: 32},"
        " final_fraction: {type: choice, values: [0.0, 0.1]}}"
    )
    settings = [row.hyperparameters for row in searched]
    assert [(s.optimizer, s.freeze_a) for s in settings[:3]] == [("adamw", True), ("adamw", False), ("sgd", True)]
    assert all(0 <= s.dropout <= 0.3 and 1 <= s.plus_ratio <= 32 and s.final_fraction in (0.0, 0.1) for s in settings)
    assert len({s.dropout for s in settings}) == len(settings)


def test_a_variant_written_before_there_were_recipes_is_read():
    written = branched()[0].to_json()
    for name in ("optimizer", "momentum", "plus_ratio", "freeze_a", "dropout", "final_fraction", "decay_fraction"):
        del written["hyperparameters"][name]
    assert Variant.from_json(written) == branched()[0]
