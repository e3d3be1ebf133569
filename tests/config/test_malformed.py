"""Every malformed file is refused with one typed error that names file, line, what is wrong and what was meant."""

from pathlib import Path

import pytest
from malformed import BLUEPRINT, CASES, EXPERIMENT, Case

from chrysalis_ray.config.domain_loss import limit_of
from chrysalis_ray.config.experiment import Evaluate
from chrysalis_ray.config.loading import experiment_schema, load_blueprint, load_experiment
from chrysalis_ray.core.errors import ConfigError


def test_the_good_files_are_good(good: Path) -> None:
    loaded = load_experiment(good)
    assert loaded.experiment.name == "good"
    assert loaded.text == EXPERIMENT
    assert loaded.blueprint_text == BLUEPRINT


def test_the_corpus_is_large_and_its_names_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 60


@pytest.mark.timeout(10)
@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_refused_with_file_line_and_what_was_meant(case: Case, good: Path) -> None:
    file = good.with_name("blueprint.yaml") if case.blueprint else good
    text = file.read_text()
    assert text.count(case.old) >= 1
    text = text.replace(case.old, case.new, 1)
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_experiment(good)
    where = f"{file}:"
    if case.at:
        where += f"{text[: text.index(case.at)].count(chr(10)) + 1}: "
    named = [problem for problem in caught.value.problems if problem.startswith(where)]
    assert any(all(word in problem for word in case.words) for problem in named), "\n".join(caught.value.problems)
    assert str(caught.value).count("\n") >= len(caught.value.problems)


@pytest.mark.parametrize("case", [case for case in CASES if case.blueprint], ids=lambda case: case.name.replace(" ", "-"))
def test_a_blueprint_alone_is_refused_too(case: Case, good: Path) -> None:
    file = good.with_name("blueprint.yaml")
    file.write_text(file.read_text().replace(case.old, case.new, 1))
    with pytest.raises(ConfigError) as caught:
        load_blueprint(file)
    assert any(all(word in problem for word in case.words) for problem in caught.value.problems)


def test_all_problems_of_both_files_come_at_once(good: Path) -> None:
    good.write_text(EXPERIMENT.replace("variants: 4", "variants: 0").replace("wandb: offline", "wandb: offlin"))
    blueprint = good.with_name("blueprint.yaml")
    blueprint.write_text(BLUEPRINT.replace("layers: 2", "layer: 2"))
    with pytest.raises(ConfigError) as caught:
        load_experiment(good)
    assert len(caught.value.problems) == 3
    assert str(caught.value).startswith(f"3 problems in {good}:")


def test_a_misspelt_key_is_not_called_missing_as_well(good: Path) -> None:
    good.write_text(EXPERIMENT.replace("variants: 4", "varients: 4"))
    with pytest.raises(ConfigError) as caught:
        load_experiment(good)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"# only a comment\n", "the file is empty"),
        (b"- a\n- b\n", "the file is a list; a mapping"),
        (b"just words\n", "the file is a scalar; a mapping"),
        (b"name: caf\xe9\n", ":1: experiment: byte 0xe9 is not UTF-8"),
        ("name: x\n".encode("utf-16"), ":1: experiment: byte 0xff is not UTF-8"),
        (b"\x00\x01\x02", "character U+0000"),
        (b"*a\n", "no anchor before it"),
        (b"&a [*a]\n", "a cycle"),
        (b"&a {b: *a}\n", "a cycle"),
        (b"{&a b: &a c}\n", "given twice"),
    ],
    ids=["empty", "comment", "list", "words", "latin1", "utf16", "nul", "alias", "cycle", "cycle-map", "twin-anchor"],
)
def test_files_that_are_no_mapping(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert words in caught.value.problems[0]
    assert caught.value.problems[0].startswith(f"{path}:")


def test_a_missing_file_names_its_neighbours(good: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file; did you mean '[^']*experiment\.yaml'"):
        load_experiment(good.with_name("experimnt.yaml"))
    (good.parent / "sub").mkdir()
    (good.parent / "sub" / "letters.yaml").write_text("name: letters")
    for asked in ("letters.yaml", "letters"):  # from the folder above, as new users do
        with pytest.raises(ConfigError, match=r"no such file; did you mean '[^']*sub/letters\.yaml'"):
            load_experiment(good.with_name(asked))
    with pytest.raises(ConfigError, match=r"there are \w+\.yaml, "):
        load_experiment(good.with_name("somethingelse.yaml"))
    with pytest.raises(ConfigError, match="not a file"):
        load_experiment(good.parent)
    with pytest.raises(ConfigError, match="no such file; there is no YAML file"):
        load_experiment(good.parent / "notes" / "x.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        load_experiment(Path("a\0b"))


@pytest.mark.parametrize(
    ("written", "limits"),
    [
        ("0.02", {"code": 0.02, "chats": 0.02}),
        ("null", {"code": None, "chats": None}),
        ("{code: 0, chats: null}", {"code": 0.0, "chats": None, "notes": 0.1}),
        ("{code: 0.5, '*': 0.02}", {"code": 0.5, "chats": 0.02, "notes": 0.02}),
        ("{code: 0.5, '*': null}", {"code": 0.5, "chats": None}),
    ],
)
def test_what_a_domain_may_lose_is_said_for_all_or_by_domain(good: Path, written: str, limits: dict[str, float | None]) -> None:
    good.write_text(EXPERIMENT.replace("confidence: 0.9}", f"max_domain_loss: {written}}}"))
    told = load_experiment(good).experiment.evaluate
    assert {domain: limit_of(told.max_domain_loss, domain) for domain in limits} == limits
    assert Evaluate.model_validate(told.model_dump(mode="json")) == told  # as a run keeps it
    shapes = experiment_schema()["$defs"]["Evaluate"]["properties"]["max_domain_loss"]["oneOf"]
    assert any(shape.get("type") == "object" for shape in shapes)
