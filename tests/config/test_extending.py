"""A blueprint that extends another: joined key by key, located in its own file, and never in a circle."""

from pathlib import Path

import pytest

from chrysalis_ray.config.blueprint import Blueprint, EmbeddedBase, PretrainedBase
from chrysalis_ray.config.loading import load_blueprint, load_experiment, shipped_blueprints
from chrysalis_ray.core.errors import ConfigError

PARENT = """\
name: parent
base: {type: pretrained, model: ./model, chat_template: chat.jinja}
lora: {rank: 4, alpha: 8, targets: [q_proj, v_proj]}
lanes: {sequence_length: 32}
body: {workers: 1, slots: 3}
"""


def write(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(texts))}.yaml"


def refused(path: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_blueprint(path)
    return caught.value.problems


def test_mappings_are_joined_and_everything_else_is_replaced(tmp_path: Path) -> None:
    child = write(tmp_path, child="name: child\nextends: parent.yaml\nlora: {rank: 2, targets: [o_proj]}\n", parent=PARENT)
    blueprint = load_blueprint(child)
    assert (blueprint.name, blueprint.lora.rank, blueprint.lora.alpha) == ("child", 2, 8)
    assert blueprint.lora.targets == ("o_proj",)
    assert (blueprint.lanes.sequence_length, blueprint.body.slots) == (32, 3)


def test_a_base_of_another_type_takes_nothing_over(tmp_path: Path) -> None:
    child = write(tmp_path, child="extends: parent.yaml\nbase: {type: embedded, layers: 2}\n", parent=PARENT)
    assert load_blueprint(child).base == EmbeddedBase(type="embedded", layers=2)


def test_grandparents_and_shipped_names(tmp_path: Path) -> None:
    texts = {"child": "name: child\nextends: middle.yaml\n", "middle": "extends: tiny\nlora: {rank: 2}\n"}
    blueprint = load_blueprint(write(tmp_path, **texts))
    tiny = load_blueprint(shipped_blueprints()["tiny"])
    assert blueprint == tiny.model_copy(update={"name": "child", "lora": tiny.lora.model_copy(update={"rank": 2})})


def test_paths_are_seen_from_the_file_that_says_them(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write(tmp_path / "shared", parent=PARENT)
    base = load_blueprint(write(tmp_path, child="extends: shared/parent.yaml\n")).base
    assert base == PretrainedBase(type="pretrained", model="./shared/model", chat_template="./shared/chat.jinja")
    hub = "extends: shared/parent.yaml\nbase: {model: owner/name, chat_template: mine.jinja}\n"
    base = load_blueprint(write(tmp_path, child=hub)).base
    assert base == PretrainedBase(type="pretrained", model="owner/name", chat_template="mine.jinja")


def test_a_mistake_is_located_in_the_file_that_has_it(tmp_path: Path) -> None:
    child = write(
        tmp_path, child="name: child\nextends: parent.yaml\nlora: {alhpa: 3}\n", parent=PARENT.replace("rank: 4", "rank: 0")
    )
    problems = refused(child)
    assert any(problem.startswith(f"{child}:3: lora.alhpa: unknown key") for problem in problems)
    assert any(problem.startswith(f"{tmp_path / 'parent.yaml'}:3: lora.rank: must be >= 1") for problem in problems)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"a": "extends: a.yaml\n"}, "a.yaml:1: extends: leads back to itself (a.yaml extends a.yaml)"),
        (
            {"a": "extends: b.yaml\n", "b": "name: b\nextends: c.yaml\n", "c": "extends: a.yaml\n"},
            "c.yaml:1: extends: leads back to itself (a.yaml extends b.yaml extends c.yaml extends a.yaml)",
        ),
        ({"a": "extends: tinny\n"}, "did you mean 'tiny'"),
        ({"a": "extends: 3\n"}, "a.yaml:1: extends: is no name"),
        ({"a": "extends: b.yaml\n", "b": "- a list\n"}, "b.yaml:1: the file is a list"),
        ({"a": 'extends: "x\\0y"\n'}, "no blueprint"),
        (
            {"s0": "extends: s1.yaml\n", **{f"s{n}": f"extends: s{n + 1}.yaml\n" for n in range(1, 20)}, "s20": PARENT},
            "is the 16th in a row",
        ),
    ],
    ids=["itself", "circle", "typo", "number", "list", "nul", "long"],
)
@pytest.mark.timeout(10)
def test_what_cannot_be_extended_is_refused_with_its_line(texts: dict[str, str], words: str, tmp_path: Path) -> None:
    assert any(words in problem for problem in refused(write(tmp_path, **texts)))


def test_what_set_replaces_lies_above_all(good: Path) -> None:
    write(good.parent, blueprint="name: child\nextends: tiny\nlora: {rank: 2}\n")
    loaded = load_experiment(good, ["blueprint.lora.rank=5"])
    assert (loaded.blueprint.lora.rank, loaded.blueprint.lora.alpha) == (5, 16)


def test_an_experiment_extends_nothing(good: Path) -> None:
    good.write_text(good.read_text() + "extends: tiny\n")
    with pytest.raises(ConfigError, match=r"unknown key 'extends'.*belongs to the blueprint"):
        load_experiment(good)


def test_every_shipped_blueprint_says_by_itself_only_what_differs() -> None:
    """Shared files are read by themselves too: what they say twice is a copy that can go stale."""
    shared = Path(shipped_blueprints()["tiny"]).parent / "shared"
    assert {path.name for path in shared.iterdir()} == {"lora.yaml", "small.yaml"}
    texts = [path.read_text() for name, path in shipped_blueprints().items() if name != "tiny"]
    assert all("extends: shared/" in text and "targets:" not in text for text in texts)
    for name, path in shipped_blueprints().items():
        blueprint = load_blueprint(path)
        assert isinstance(blueprint, Blueprint)
        assert blueprint.name == name
