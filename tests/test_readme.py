"""The README says what is: its trees, its commands and its files are checked against the repository."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from chrysalis_ray.cli.main import app
from chrysalis_ray.config.loading import load_experiment
from chrysalis_ray.core.layout import RunLayout

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_IN_TREE = {"README.md", "LICENSE", "pyproject.toml"}


def blocks(language: str, heading: str = "") -> list[str]:
    """Fenced blocks of a language, below a heading if one is given."""
    text = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0] if heading else README
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def tree_paths(block: str) -> Iterator[str]:
    """The paths of a captioned tree, two spaces of indent for each level."""
    above: list[str] = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[:depth], line.split()[0]]
        yield "/".join(above)


def documented_commands() -> list[str]:
    """Every `chrysalis …` that the README, cluster.yaml or the head of an experiment shows, without its comment."""
    places = [README, *(path.read_text() for path in (*ROOT.glob("experiments/*.yaml"), *ROOT.glob("blueprints/*.yaml")))]
    places.append((ROOT / "cluster.yaml").read_text())
    found: set[str] = set()
    for text in places:
        found |= {match.strip() for match in re.findall(r"^(?:# )?(chrysalis [a-z][^#\n]*)", text, re.MULTILINE)}
        found |= set(re.findall(r"`(chrysalis [a-z][^`]*)`", text))
        found |= set(re.findall(r"&& (chrysalis [^'\n]*)'", text))
    return sorted(found)


def test_the_tree_is_true_and_complete() -> None:
    (block,) = blocks("text", "The house")
    paths = list(tree_paths(block))
    assert [path for path in paths if not (ROOT / path).exists()] == []
    rooms = {f"chrysalis_ray/{path.name}" for path in (ROOT / "chrysalis_ray").iterdir() if (path / "__init__.py").is_file()}
    assert rooms - set(paths) == set()
    top = {path.name for path in ROOT.iterdir() if not path.name.startswith(".") and not path.name.endswith(".egg-info")}
    assert top - set(paths) - NOT_IN_TREE - {"runs", "build", "dist", "shared"} == set()


def test_the_tree_of_a_run_is_the_layout() -> None:
    (block,) = blocks("text", "A run directory")
    shown = {path.removeprefix("runs/quickstart/") for path in tree_paths(block)} - {"runs/quickstart"}
    layout = RunLayout(Path("/run"))
    names = {
        getattr(layout, name).relative_to(layout.root).parts[0]
        for name, value in vars(RunLayout).items()
        if isinstance(value, property)
    }
    assert shown - names == set()
    assert names - shown - {"tune", "bodies", "report.json"} == set()


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_parse(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)[1:]
    words = [str(tmp_path) if word.startswith("runs/") else word for word in words]
    placeholders = {"experiments/X.yaml", "EXPERIMENT", "VERB", "FILE"}
    assert not placeholders & set(words)
    parser, path = typer.main.get_command(app), "chrysalis"
    while hasattr(parser, "commands"):
        assert words[0] in parser.commands, f"no verb {words[0]!r}"
        path = words.pop(0)
        parser = parser.commands[path]
    if words:
        parser.make_context(path, words)


def test_commands_are_documented_in_number() -> None:
    verbs = {command.split()[1] for command in documented_commands()}
    assert verbs == set(typer.main.get_command(app).commands)


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"\b((?:experiments|blueprints|tests|chrysalis_ray)/[\w./-]+\.(?:yaml|py))", README))
    named |= set(re.findall(r"`((?:[\w.-]+/)*(?:cluster|constraints|pyproject)\.[a-z]+)`", README))
    assert {name for name in named if not (ROOT / name).exists()} == {"experiments/letters.yaml"}  # the one you write


def test_the_shown_experiment_is_valid(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "texts" / "letters").mkdir(parents=True)
    (tmp_path / "texts" / "letters" / "first.txt").write_text("Dear reader")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "letters.yaml").write_text(text)
    assert load_experiment(tmp_path / "experiments" / "letters.yaml").experiment.population.variants == 4


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake (quickstart|test-slow|test|check|bench|clean)\b", README)) <= targets
    assert {"quickstart", "test", "test-slow", "check", "bench", "clean"} <= targets


def test_ci_runs_check_and_check_runs_the_tests() -> None:
    assert "exec make check" in (ROOT / ".ci" / "run").read_text()
    assert "$(MAKE) test" in (ROOT / "Makefile").read_text()
