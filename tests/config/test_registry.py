"""A registry of sources: the experiment means what it would mean with the sources written in it."""

import json
from pathlib import Path

import pytest
from malformed import EXPERIMENT

from chrysalis_ray.config.loading import experiment_schema, load_experiment
from chrysalis_ray.config.registry import with_registries
from chrysalis_ray.config.yaml_tree import read_tree
from chrysalis_ray.core.errors import ConfigError
from chrysalis_ray.genome.build import build_genome
from chrysalis_ray.genome.recipe import recipe_of

REGISTRY = """\
# what all of us use
sources:
  - type: folder
    path: notes
    domain: notes
    glob: "**/*.md"
  - {type: jsonl, path: chats.jsonl, domain: chats}
"""
WRITTEN = EXPERIMENT[EXPERIMENT.index("    - type: folder") : EXPERIMENT.index("  split:")]


def with_registry(good: Path, written: str, text: str | None = None) -> Path:
    """The good experiment with its last two sources in a registry, the file `written`."""
    good.write_text(EXPERIMENT.replace(WRITTEN, f"    - {{type: registry, path: {written}}}\n"))
    if text is not None:
        (good.parent / written).parent.mkdir(exist_ok=True)
        (good.parent / written).write_text(text)
    return good


def refused(path: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    return caught.value.problems


def test_it_is_the_same_experiment_and_the_same_recipe(good: Path) -> None:
    inline = load_experiment(good)
    loaded = load_experiment(with_registry(good, "sources.yaml", REGISTRY))
    assert loaded.resolved()["sha256"] == inline.resolved()["sha256"]
    assert recipe_of(loaded.experiment.genome) == recipe_of(inline.experiment.genome)
    as_json = {"sources": [source.model_dump(mode="json") for source in inline.experiment.genome.sources[1:]]}
    assert (
        load_experiment(with_registry(good, "sources.json", json.dumps(as_json))).experiment.genome == inline.experiment.genome
    )
    other = load_experiment(with_registry(good, "sources.yaml", REGISTRY.replace("**/*.md", "*.md")))
    assert other.resolved()["sha256"] != inline.resolved()["sha256"]


def test_a_genome_is_built_of_what_it_lists(good: Path) -> None:
    for number in range(9):
        (good.parent / "notes" / f"{number}.md").write_text(" ".join(f"n{number}w{word}" for word in range(50)))
    (good.parent / "shared").mkdir()
    listed = REGISTRY.replace("path: notes", "path: ../notes").replace("chats.jsonl", "../chats.jsonl")
    loaded = load_experiment(with_registry(good, "shared/sources.yaml", listed))
    folders = loaded.experiment.genome.model_copy(update={"sources": loaded.experiment.genome.sources[1:2]})
    genome = build_genome(folders, good.parent / "g", loaded.folder)
    assert {row["path"] for row in genome.manifest["content"]["documents"]} > {f"notes/{number}.md" for number in range(9)}


def test_paths_are_seen_from_the_file_that_says_them(good: Path) -> None:
    (good.parent / "shared" / "data").mkdir(parents=True)
    listed = [
        {"type": "folder", "path": "notes", "domain": "notes"},
        {"type": "archive", "path": "../a.zip", "domain": "a"},
        {"type": "records", "path": "/far/hub.jsonl", "domain": "b"},
        {"type": "jsonl", "path": "~/chats.jsonl", "domain": "chats"},
        {"type": "dataset", "path": "owner/name", "domain": "d"},
        {"type": "dataset", "path": "data", "domain": "e"},
        {"type": "git", "url": "project", "commit": "main", "domain": "f"},
        {"type": "git", "url": "https://example.org/project", "commit": "main", "domain": "g"},
        {"type": "git", "url": "git@example.org:project", "commit": "main", "domain": "h"},
        {"type": "history", "url": "../old", "snapshots": ["v1"], "domain": "i"},
    ]
    path, problems = with_registry(good, "shared/sources.json", json.dumps({"sources": listed})), list[str]()
    root = with_registries(read_tree(path, str(path))[1].root, path, problems)
    assert problems == []
    assert [source.get("path") or source["url"] for source in root.data()["genome"]["sources"][1:]] == [
        "shared/notes", "a.zip", "/far/hub.jsonl", "~/chats.jsonl", "owner/name", "shared/data", "./shared/project",
        "https://example.org/project", "git@example.org:project", "./old",
    ]  # fmt: skip


def test_a_folder_that_is_linked_is_where_it_is(good: Path) -> None:
    """`..` in a list leads out of the folder that it is in, whatever links to that folder or the experiment were followed."""
    far = good.parent / "far" / "away" / "lists"
    far.mkdir(parents=True)
    (far.parent / "notes").mkdir()
    (good.parent / "shared").symlink_to(far)
    (good.parent / "deep" / "er").mkdir(parents=True)
    (good.parent / "deep" / "er" / "linked").symlink_to(good.parent)
    listed = {"sources": [{"type": "folder", "path": "../notes", "domain": "notes"}]}
    with_registry(good, "shared/sources.json", json.dumps(listed))
    for path in (good, good.parent / "deep" / "er" / "linked" / good.name):
        problems = list[str]()
        root = with_registries(read_tree(path, str(path))[1].root, path, problems)
        assert problems == []
        found = path.parent / root.data()["genome"]["sources"][1]["path"]
        assert found.resolve() == (far.parent / "notes").resolve()


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (REGISTRY.replace("domain: chats", "domian: chats"), 7, "did you mean 'domain'"),
        (REGISTRY.replace("domain: notes", "domain: 3"), 5, "text was meant"),
        (REGISTRY.replace("type: folder", "type: folders"), 3, "'folders' is not known"),
        (REGISTRY.replace('"**/*.md"', '"**/*.md'), 8, "unexpected end"),
        (REGISTRY.replace("sources:", "source:"), 2, "unknown key 'source'"),
        (REGISTRY + "  - {type: registry, path: sources.yaml}\n", 8, "is a registry itself"),
        ("sources: {}\n", 1, "no list of sources"),
        ("- {type: folder}\n", 1, "a list"),
        ("", 1, "empty"),
    ],
)
def test_what_is_wrong_in_it_is_told_with_its_own_line(good: Path, text: str, line: int, words: str) -> None:
    problems = refused(with_registry(good, "sources.yaml", text))
    assert any(f"sources.yaml:{line}: " in problem and words in problem for problem in problems), problems
    assert not any("at least 1 was meant" in problem for problem in problems)


def test_a_registry_that_is_not_there(good: Path) -> None:
    (problem,) = refused(with_registry(good, "nowhere.yaml"))
    assert problem.startswith(f"{good}:9: genome.sources.1.path: ")
    assert "nowhere.yaml: no such file" in problem
    good.write_text(good.read_text().replace("path: nowhere.yaml", "file: nowhere.yaml"))
    assert any("unknown key 'file'" in problem for problem in refused(good))


def test_an_editor_knows_of_it() -> None:
    items = experiment_schema()["$defs"]["GenomeSpec"]["properties"]["sources"]["items"]
    assert {"const": "registry"} in [each["properties"]["type"] for each in items["anyOf"] if "properties" in each]
