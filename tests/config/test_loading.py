import contextlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed import EXPERIMENT

from chrysalis_ray.config.blueprint import EmbeddedBase, PretrainedBase
from chrysalis_ray.config.loading import (
    blueprint_schema,
    experiment_schema,
    load_blueprint,
    load_experiment,
    shipped_blueprints,
)
from chrysalis_ray.config.population import Fifo, LogUniform
from chrysalis_ray.config.yaml_tree import YamlRefused, parse_tree
from chrysalis_ray.core.errors import ConfigError
from chrysalis_ray.core.records import canonical_json
from chrysalis_ray.training.planning.choice import chooser

REPOSITORY = Path(__file__).parents[2]
EXPERIMENTS = sorted((REPOSITORY / "experiments").glob("*.yaml"))
BLUEPRINTS = sorted((REPOSITORY / "blueprints").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_every_shipped_experiment_loads_and_its_first_line_runs_it(path: Path) -> None:
    loaded = load_experiment(path, choose=chooser())
    canonical_json(loaded.resolved())
    words = path.read_text().splitlines()[0].split()
    assert words[:3] == ["#", "chrysalis", "run"]
    assert (REPOSITORY / words[3]).resolve() == path
    assert loaded.experiment.name.replace("-", "_") == path.stem


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.name)
def test_every_shipped_blueprint_loads_and_its_first_line_names_an_experiment_of_it(path: Path) -> None:
    blueprint = load_blueprint(path)
    assert blueprint.name == path.stem
    words = path.read_text().splitlines()[0].split()
    assert words[:3] == ["#", "chrysalis", "run"]
    assert words[4::2] == ["--set"] * len(words[5::2])
    assert load_experiment(REPOSITORY / words[3], words[5::2]).blueprint == blueprint


def test_shipped_blueprints_are_found_by_bare_name() -> None:
    assert list(shipped_blueprints()) == [path.stem for path in BLUEPRINTS]
    assert (
        load_experiment(REPOSITORY / "experiments" / "quickstart.yaml").blueprint_path
        == REPOSITORY / "blueprints" / "tiny.yaml"
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E-4", 1e-4), ("+1e3", 1000.0), (".5", 0.5), ("1.", 1.0), ("-2", -2), ("010", 10), ("0x10", 16),
        ("0o10", 8), ("'1e-4'", "1e-4"), ("1_000", "1_000"), ("1:30", "1:30"), ("no", "no"), ("on", "on"), ("yes", "yes"),
        ("true", True), ("~", None), ("", None), ("2020-01-01", "2020-01-01"), ("1e-4x", "1e-4x"), (".inf", float("inf")),
        ("=", "="),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = parse_tree(f"a: {text}\n", "x").root.data()["a"]
    assert read == value
    assert type(read) is type(value)


def test_a_learning_rate_without_a_point_is_a_number() -> None:
    loaded = load_experiment(REPOSITORY / "experiments" / "quickstart.yaml", ["population.search.learning_rate.low=1e-4"])
    drawn = loaded.experiment.population.search.learning_rate
    assert isinstance(drawn, LogUniform)
    assert drawn.low == 1e-4


def test_the_experiment_overrides_the_blueprint(good: Path) -> None:
    text = EXPERIMENT + "body: {workers: 2}\nbase: {type: embedded, layers: 3}\n"
    good.write_text(text)
    loaded = load_experiment(good)
    assert (loaded.body.workers, loaded.body.slots, loaded.body.precision) == (2, 4, "fp32")
    assert isinstance(loaded.base, EmbeddedBase)
    assert (loaded.base.layers, loaded.base.hidden_size) == (3, EmbeddedBase(type="embedded").hidden_size)
    resolved = loaded.resolved()
    assert resolved["experiment"]["body"]["slots"] == 4
    assert resolved["experiment"]["base"]["layers"] == 3
    assert "body" not in resolved["blueprint"]


def test_the_hash_is_of_what_is_run_and_not_of_words(good: Path) -> None:
    first = load_experiment(good).resolved()["sha256"]
    good.write_text(
        "# another comment\n"
        + EXPERIMENT.replace("tags: [one, two]", "tags: [three]")
        + "description: new words\nuse_policy: for study\n"
    )
    assert load_experiment(good).resolved()["sha256"] == first
    good.write_text(EXPERIMENT.replace("rng_seed: 17", "rng_seed: 18"))
    assert load_experiment(good).resolved()["sha256"] != first
    good.write_text(EXPERIMENT)
    assert load_experiment(good, ["blueprint.lora.alpha=17"]).resolved()["sha256"] != first


def test_a_local_base_is_seen_from_the_file_that_names_it(good: Path) -> None:
    model = good.parent / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    good.write_text(EXPERIMENT + "base: {type: pretrained, model: ./model}\n")
    base = load_experiment(good).base
    assert isinstance(base, PretrainedBase)
    assert base.model == str(model)
    assert load_experiment(good).chat_template is None
    (good.parent / "chat.jinja").write_text("{{ messages }}")
    good.write_text(EXPERIMENT + "base: {type: pretrained, model: ./model, chat_template: chat.jinja}\n")
    assert load_experiment(good).chat_template == good.parent / "chat.jinja"


def test_two_sources_of_one_domain_join(good: Path) -> None:
    good.write_text(EXPERIMENT.replace("domain: chats}", "domain: notes}").replace("chats: 2, ", ""))
    assert len(load_experiment(good).experiment.genome.sources) == 3


def test_aliases_are_allowed_where_they_are_harmless(good: Path) -> None:
    text = EXPERIMENT.replace("{type: uniform, low: 8, high: 32}", "&a {type: uniform, low: 8, high: 32}")
    good.write_text(
        text.replace("    decay: {", "    warmup_fraction: {type: choice, values: [0.1]}\n    clip: *a\n    decay: {")
    )
    search = load_experiment(good).experiment.population.search
    assert search.clip == search.alpha
    changed = load_experiment(good, ["population.search.clip.low=1"]).experiment.population.search
    assert changed.clip != changed.alpha


# --set ----------------------------------------------------------------------------------------------------------------


def test_set_reaches_experiment_blueprint_lists_and_whole_sections(good: Path) -> None:
    loaded = load_experiment(
        good,
        [
            "name=other",
            "population.scheduler={type: fifo}",
            "genome.sources.0.domains=[code, docstrings]",
            "body.slots=2",
            "blueprint.lora.rank=4",
            "tracking.tags=[a=b]",
        ],
    )
    assert loaded.experiment.name == "other"
    assert loaded.experiment.population.scheduler == Fifo(type="fifo")
    assert loaded.experiment.genome.sources[0].domains == ("code", "docstrings")  # type: ignore[union-attr]
    assert loaded.body.slots == 2
    assert loaded.blueprint.lora.rank == 4
    assert loaded.experiment.tracking.tags == ("a=b",)
    assert loaded.text == EXPERIMENT


def test_set_can_name_another_blueprint(good: Path) -> None:
    assert load_experiment(good, ["blueprint=tiny"]).blueprint.name == "tiny"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("population.varients=3", "--set: population.varients: unknown key 'varients'; did you mean 'variants'"),
        ("population.variants=-3", "--set: population.variants: must be >= 1, not -3"),
        ("population.variants='3'", "--set: population.variants: '3' is text"),
        ("population.variants=", "--set: population.variants: nothing is empty; a whole number was meant"),
        ("population.variants", "not `dotted.path=value`"),
        ("=3", "not `dotted.path=value`"),
        ("a..b=3", "not `dotted.path=value`"),
        (".".join("a" * 5000) + "=3", "not `dotted.path=value`"),
        ("name.first=x", "--set: name.first: there is no 'first' below 'good'"),
        ("genome.sources.9.path=x", "--set: genome.sources.9.path: '9' is no position of a list of 3"),
        ("merge.x.rank=3", "'x' is no position of a list of 3"),
        ("tracking.tags=[a", "--set: tracking.tags: not YAML"),
        ("tracking.tags=&t [*t]", "a cycle"),
        ("name=!!python/name:os.system", "tag '!!python/name:os.system' is not allowed"),
        ("blueprint.lora.r=3", "--set: lora.r: unknown key 'r'; the name here is lora.rank"),
        ("lora.rank=3", "--set: lora: unknown key 'lora'; it belongs to the blueprint"),
        ("lr=1e-4", "the name here is optimizer.learning_rate of the blueprint"),
        ("blueprint=nowhere", "--set: blueprint: no blueprint 'nowhere'"),
    ],
)
def test_set_that_is_wrong_says_so(override: str, words: str, good: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(good, [override])
    assert words in str(caught.value)


# anything at all ------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab:-[]{}&*!|>'\"#%@`,?~.\\ \n\t01é\u2028\x85\ud800", max_size=80))
def test_any_text_is_a_tree_or_is_refused(text: str) -> None:
    with contextlib.suppress(YamlRefused):
        parse_tree(text, "x").root.data()


PIECES = ["", "\n", ": ", "- ", "{", "[", "*a", "&a", "null", "-1", "true", "'", "[]", "{}", "1e400", "\t"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, len(EXPERIMENT)), length=st.integers(0, 40), piece=st.sampled_from(PIECES))
def test_any_damage_to_a_good_file_is_a_config_error_or_harmless(good: Path, start: int, length: int, piece: str) -> None:
    good.write_text(EXPERIMENT[:start] + piece + EXPERIMENT[start + length :])
    with contextlib.suppress(ConfigError):
        load_experiment(good)


def test_schemas_name_every_field() -> None:
    assert set(experiment_schema()["properties"]) >= {"name", "blueprint", "genome", "population", "body", "merge"}
    budget = experiment_schema()["$defs"]["Population"]["properties"]["tokens_per_variant"]
    assert {"const": "auto"} in budget["anyOf"]
    assert set(blueprint_schema()["properties"]) >= {"extends", "base", "lora", "lanes", "genome", "body"}
    assert experiment_schema()["additionalProperties"] is False
