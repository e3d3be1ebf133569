"""What a person says of a mix reaches the variants, and a mutation of levels is appended to what a trial goes on with."""

from dataclasses import replace
from pathlib import Path

import pytest

from chrysalis_ray.body.turn import next_position
from chrysalis_ray.config.loading import load_experiment
from chrysalis_ray.core.errors import ConfigError, GenomeError, RunError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import Change, Epigenome, Hyperparameters, Variant, read_json, write_json
from chrysalis_ray.population.branch import Branching, branch_population
from chrysalis_ray.population.mixes import never_drawn
from chrysalis_ray.report.mixes import resolved_mix

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
DOMAINS = ("api_docs", "code", "comments", "docstrings", "reference", "unicode")


def branching(*settings, tokens=None, rows=None):
    loaded = load_experiment(EXPERIMENTS / "quickstart.yaml", settings)
    return Branching(loaded.experiment, loaded.blueprint, DOMAINS, "seed", "genome", "base", tokens or {}, rows or {})


def mixes(written, *settings, tokens=None, rows=None):
    return branch_population(branching(f"population.epigenomes={written}", *settings, tokens=tokens, rows=rows))


def test_what_holds_for_all_is_spelt_out_by_domain():
    rows = mixes(
        "{type: brightened, prior: temperature(2), silence: [unicode, 'co[dm]*'], floors: {'*': 0.02, reference: 0.1},"
        " caps: {'*': 4}, loss_weights: {reference: 2}, replay: {share: 0.25}}"
    )
    mix = rows[1].epigenome
    loud = ["api_docs", "docstrings", "reference"]
    bright = {"docstrings": 4}  # in turn are those that are heard
    assert mix.express == {"api_docs": 1, "code": 0, "comments": 0, "reference": 1, "unicode": 0} | bright
    assert mix.prior == "temperature(2)"
    assert mix.floors == {"api_docs": 0.02, "docstrings": 0.02, "reference": 0.1}
    assert mix.caps == dict.fromkeys(loud, 4)
    assert mix.replay == dict.fromkeys(loud, 1.0)
    assert (mix.replay_share, mix.loss_weights) == (0.25, {"reference": 2})
    assert (mix.budget_rows, mix.row_tokens) == (rows[1].steps * rows[1].rows_per_step, rows[1].sequence_length)
    assert Variant.from_json(rows[1].to_json()) == rows[1]


def test_mixes_are_dealt_and_drawn_of_the_domains_that_are_heard():
    """Else a grid had a point where only the silenced sound, and a drawn mix the name of one."""
    heard = {"api_docs", "code", "comments"}
    silence = "silence: [docstrings, reference, unicode]"
    grid = mixes(f"{{type: simplex_grid, steps: 2, {silence}}}", "population.search={}", "population.variants=6")
    points = [tuple(sorted(variant.epigenome.express.items())) for variant in grid]
    assert len(set(points)) == 6
    drawn = mixes(f"{{type: dirichlet, concentration: 0.01, {silence}}}", "population.variants=12")
    for variant in (*grid, *drawn):
        assert {domain for domain, level in variant.epigenome.express.items() if level > 0.0} <= heard
        assert variant.variant_id[5:] in heard


def test_a_listed_mix_says_its_own_where_it_wants():
    rows = mixes(
        "{type: listed, prior: size, floors: {code: 0.1}, stages: [{at: 0.5, express: {code: 3}}], mixes: ["
        "{name: all, express: {code: 1, unicode: 1}},"
        "{name: own, express: {code: 1, unicode: 1}, prior: uniform, floors: {unicode: 0.3}, stages: []}]}"
    )
    first, second = rows[0].epigenome, rows[1].epigenome
    half = (rows[0].steps + 1) // 2 * rows[0].rows_per_step
    assert (first.prior, first.floors, first.stages) == ("size", {"code": 0.1}, (Change(half, {"code": 3.0}),))
    assert (second.prior, second.floors, second.stages) == ("uniform", {"unicode": 0.3}, ())
    assert second.budget_rows == 0


def test_what_a_mix_takes_back_makes_another_run_and_what_nobody_said_does_not():
    def named(own):
        written = f"{{type: listed, floors: {{code: 0.1}}, mixes: [{{name: a, express: {{code: 1, unicode: 1}}{own}}}]}}"
        return load_experiment(EXPERIMENTS / "quickstart.yaml", [f"population.epigenomes={written}"]).resolved()

    assert named("")["sha256"] != named(", floors: {}")["sha256"]
    epigenomes = named("")["experiment"]["population"]["epigenomes"]
    assert set(epigenomes) == {"type", "prior", "floors", "mixes"}
    assert set(epigenomes["mixes"][0]) == {"name", "express"}


def test_stages_begin_with_whole_steps_and_match_keeps_a_part_of_the_rows():
    one = branching()
    tokens, length = one.experiment.population.tokens_per_variant, one.blueprint.lanes.sequence_length
    stages, match = f"stages: [{{at_tokens: {tokens // 4 + 1}, express: {{code: 3}}}}]", f"match: {{repetition: {8 * tokens}}}"
    rows = mixes(f"{{type: dirichlet, {stages}, {match}}}")
    for variant in rows:
        assert variant.epigenome.kept == 1 / 8
        (stage,) = variant.epigenome.stages
        assert stage.row % variant.rows_per_step == 0
        assert 0 <= stage.row * length - tokens / 4 <= 2 * variant.tokens_per_step


@pytest.mark.parametrize("steps", [11, 12, 17])
def test_what_validates_has_its_stages_where_reports_are_equally_long(steps):
    """Steps that do not divide into reports are not trained, and a stage after them, or on top of another, would be lost."""
    written = branching().blueprint.lanes
    tokens = steps * written.rows_per_step * written.sequence_length + 5
    lanes, quarter = ("population.reports=6", f"population.tokens_per_variant={tokens}"), tokens // 4
    valid = 0
    for at in (0.36, 0.4, 0.48, 0.6, 0.84, 0.9, 0.95):
        stages = f"stages: [{{at: 0.34, express: {{code: 2}}}}, {{at: {at}, express: {{code: 3}}}}]"
        try:
            (variant, *_) = mixes(f"{{type: dirichlet, {stages}}}", *lanes)
        except ConfigError:
            continue
        valid += 1
        one, other = (stage.row // variant.rows_per_step for stage in variant.epigenome.stages)
        assert 0 < one < other < variant.steps
    assert valid
    (variant, *_) = mixes(f"{{type: dirichlet, stages: [{{at_tokens: {quarter}, express: {{code: 3}}}}]}}", *lanes)
    assert 0 <= variant.epigenome.stages[0].row * variant.sequence_length - quarter < variant.tokens_per_step


def test_caps_that_the_genome_cannot_keep_are_refused_at_branching():
    tokens = dict.fromkeys(DOMAINS, 1000)
    with pytest.raises(GenomeError, match=r"v000-api_docs: the caps allow"):
        mixes("{type: brightened, caps: {'*': 0.5}}", tokens=tokens)
    assert mixes("{type: brightened, caps: {'*': 99}}", tokens=tokens)


TOKENS, HELD = dict.fromkeys(DOMAINS, 9000), dict.fromkeys(DOMAINS, 90)


@pytest.mark.parametrize(
    ("written", "more", "counted"),
    [
        ("{type: brightened}", (), False),
        ("{type: brightened, stages: [{at: 0.5, express: {code: 2}}]}", (), False),
        ("{type: brightened, caps: {code: 9}}", (), True),
        ("{type: brightened, floors: {code: 0.1}}", (), True),
        ("{type: brightened, prior: unimax(9)}", (), True),
        ("{type: listed, mixes: [{name: a, express: {code: 1, unicode: 0.0001}}]}", (), True),
        ("{type: brightened}", ("population.scheduler={type: pbt, mutate: [levels], level_strength: 0.3}",), True),
    ],
)
def test_a_mix_carries_the_rows_of_its_domains_where_its_draws_depend_on_them(written, more, counted):
    """A mix of levels alone is written as it ever was."""
    for variant in mixes(written, *more, tokens=TOKENS, rows=HELD):
        assert variant.epigenome.rows == (HELD if counted else {})
        assert Variant.from_json(variant.to_json()) == variant
        if counted:
            assert variant.epigenome.budget_rows == variant.steps * variant.rows_per_step


def test_a_domain_that_is_never_drawn_is_told_and_stands_in_the_report():
    listed = "{type: listed, caps: {code: 0.01}, mixes: [{name: a, express: {code: 1, unicode: 1}}]}"
    rows = mixes(listed, "population.variants=3", tokens=TOKENS, rows=HELD)
    why = "its cap of 0.01 epochs of 90 rows is less than a row"
    assert list(never_drawn(rows, TOKENS)) == [f"v000-a and 2 others: 'code' is never drawn: {why}"]
    assert f"no row of code: {why}" in resolved_mix(rows[0], rows[0].epigenome, TOKENS).words
    assert list(never_drawn(mixes("{type: brightened}", tokens=TOKENS, rows=HELD), TOKENS)) == []


def test_a_mix_that_was_proposed_before_rows_were_counted_stays_as_it_was(tmp_path):
    from chrysalis_ray.population.propose import keep_proposal

    layout = RunLayout(tmp_path)
    write_json(layout.branch_manifest, {"variants": []})
    capped = "{type: brightened, caps: {'*': 9}}"
    before, now = (mixes(capped, tokens=TOKENS, rows=rows)[0] for rows in ({}, HELD))
    assert keep_proposal(layout, before) == before
    assert keep_proposal(layout, now) == before
    assert read_json(layout.branch_manifest) == {"variants": [before.variant_id]}
    with pytest.raises(RunError, match="with other values now"):
        keep_proposal(layout, replace(now, epigenome=replace(now.epigenome, caps={"code": 1.0})))


# a trial's levels ---------------------------------------------------------------------------------------------------


def variant(name, index, mix):
    return Variant(name, index, 100 + index, "seed", "genome", "base", Hyperparameters(), mix, 12, 3, 2, 16)


def trial(tmp_path, own, config, chunk=0):
    """A trial as Tune makes it, but for omega, which it asks who it is."""
    from chrysalis_ray.population.trial import VariantTrial

    made = VariantTrial.__new__(VariantTrial)
    made.config, made.variant, made.chunk, made.position = config, own, chunk, "p"
    write_json(tmp_path / own.variant_id / "variant.json", own.to_json())
    return made


def test_new_levels_are_appended_where_the_trial_stands(tmp_path):
    own = variant("v000", 0, Epigenome({"code": 1.0, "notes": 1.0}))
    made = trial(tmp_path, own, {}, chunk=2)
    made._configure({"level.code": 1.0, "level.notes": 1.0, "learning_rate": 5e-4})
    assert made.variant.epigenome is own.epigenome  # nothing changed
    made._configure({"level.code": 3.0, "level.notes": 1.0})
    assert made.variant.epigenome == replace(own.epigenome, changes=(Change(2 * 3 * 2, {"code": 3.0}),))
    made.chunk = 3
    made._configure({"level.code": 3.0, "level.notes": 0.0})
    assert [change.row for change in made.variant.epigenome.changes] == [12, 18]
    assert next_position("p", made.variant) != next_position("p", own)
    start = trial(tmp_path, own, {})
    start._configure({"level.code": 3.0, "level.notes": 1.0})
    assert start.variant.epigenome == Epigenome({"code": 3.0, "notes": 1.0})  # before the first row there is no past


def test_who_takes_over_anothers_weights_goes_on_from_the_schedule_that_led_there(tmp_path):
    own = variant("v000", 0, Epigenome({"code": 1.0}))
    donor = variant("v001", 1, Epigenome({"notes": 1.0}, changes=(Change(6, {"notes": 2.0}),)))
    write_json(tmp_path / "position.json", {"variant": donor.to_json(), "position": "q", "chunk": 2})
    bred = trial(tmp_path, own, {"level.code": 0.5, "level.notes": 1.5})
    bred.load_checkpoint(str(tmp_path))
    assert bred.variant.epigenome == replace(
        donor.epigenome, changes=(*donor.epigenome.changes, Change(12, {"code": 0.5, "notes": 1.5}))
    )
    assert (bred.variant.variant_id, bred.variant.rng_seed, bred.variant.parents) == ("v000", 100, ("q",))
    copied = trial(tmp_path, own, {"learning_rate": 1e-4})  # levels are not bred: it keeps its own mix, as it always did
    copied.load_checkpoint(str(tmp_path))
    assert copied.variant.epigenome == own.epigenome


def test_pbt_breeds_levels_by_the_operator_of_the_epigenome():
    import random

    from chrysalis_ray.genome.epigenome import mutate, normalise
    from chrysalis_ray.population import search

    loaded = load_experiment(
        EXPERIMENTS / "quickstart.yaml",
        ["population.scheduler={type: pbt, mutate: [levels], level_strength: 0.4, perturb_every_reports: 2}"],
    )
    population = loaded.experiment.population
    assert search.mutable_fields(population, ("b", "a")) == ("level.a", "level.b")
    assert search.mutations(population) == {}
    scheduler = search.make_scheduler(population)
    config = {"level.a": 1.0, "level.b": 3.0, "level.c": 0.0, "variant": "v"}
    random.seed(3)
    bred = scheduler._custom_explore_fn(config)
    random.seed(3)
    import numpy as np

    mix = Epigenome({"a": 1.0, "b": 3.0, "c": 0.0})
    expected = normalise(mutate(mix, np.random.default_rng(random.getrandbits(64)), 0.4)).express
    assert bred == {"variant": "v", **{f"level.{domain}": level for domain, level in expected.items()}}
    assert bred["level.c"] == 0.0
    assert bred["level.a"] != 1.0
