"""The READMEs say what is: their trees, commands, links and files are checked against the repository."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer.main
import yaml

from chrysalis_ray.cli.main import app
from chrysalis_ray.config.blueprint import Blueprint
from chrysalis_ray.config.experiment import Experiment
from chrysalis_ray.config.loading import load_experiment
from chrysalis_ray.core.layout import RunLayout

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("chrysalis_ray", "blueprints", "experiments", "benchmarks", "tests", ".ci")
READMES = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md"))]
WHOLE = {Experiment: "experiments/quickstart.yaml", Blueprint: "blueprints/tiny.yaml"}
NOT_IN_TREE = {"README.md", "LICENSE", "pyproject.toml"}

each_readme = pytest.mark.parametrize("path", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())


def blocks(language: str, heading: str = "", text: str = README) -> list[str]:
    """Fenced blocks of a language, below a heading if one is given."""
    text = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0] if heading else text
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def unfenced(path: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The headings of a page as a link names them: lower case, no punctuation, dashes between words."""
    headings = re.findall(r"^#+ (.+)$", unfenced(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tree_paths(block: str) -> Iterator[str]:
    """The paths of a captioned tree, two spaces of indent for each level."""
    above: list[str] = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[:depth], line.split()[0]]
        yield "/".join(above)


def documented_commands() -> list[str]:
    """Every `chrysalis …` that a README, cluster.yaml or the head of an experiment shows, without its comment."""
    places = [*READMES, *ROOT.glob("experiments/*.yaml"), *ROOT.glob("blueprints/*.yaml"), ROOT / "cluster.yaml"]
    found: set[str] = set()
    for text in (path.read_text(encoding="utf-8") for path in places):
        found |= {match.strip() for match in re.findall(r"^(?:# )?(chrysalis [a-z][^#\n]*)", text, re.MULTILINE)}
        found |= {" ".join(match.split()) for match in re.findall(r"`(chrysalis [a-z][^`]*)`", text)}
        found |= set(re.findall(r"&& (chrysalis [^'\n]*)'", text))
    return sorted(found)


def documented_benchmarks() -> list[str]:
    """Every `python benchmarks/…` of a README, without its comment."""
    texts = [path.read_text(encoding="utf-8") for path in READMES]
    found = {shown for text in texts for shown in re.findall(r"^    (python benchmarks/\S+.*?)(?:  .*)?$", text, re.MULTILINE)}
    found |= {" ".join(match.split()) for text in texts for match in re.findall(r"`(python benchmarks/[^`]*)`", text)}
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
    words = words[: words.index(">")] if ">" in words else words
    stand_ins = {"plurals.yaml": tmp_path / "plurals.yaml"}  # files that the reader writes; folders end with a slash
    stand_ins["plurals.yaml"].touch()
    words = [str(stand_ins.get(word, tmp_path if word.startswith("runs/") or word.endswith("/") else word)) for word in words]
    placeholders = {"experiments/X.yaml", "EXPERIMENT", "VERB", "FILE"}
    assert not placeholders & set(words)
    parser, path = typer.main.get_command(app), "chrysalis"
    while hasattr(parser, "commands"):
        assert words, f"{command!r} names no verb"
        assert words[0] in parser.commands, f"no verb {words[0]!r}"
        path = words.pop(0)
        parser = parser.commands[path]
    if words:
        parser.make_context(path, words)


def test_commands_are_documented_in_number() -> None:
    verbs = {command.split()[1] for command in documented_commands()}
    assert verbs == set(typer.main.get_command(app).commands)


@pytest.mark.parametrize("command", documented_benchmarks())
def test_documented_benchmarks_have_the_flags_that_are_shown(command: str) -> None:
    file, *words = shlex.split(command.replace("[", " ").replace("]", " "))[1:]
    source = (ROOT / file).read_text(encoding="utf-8")
    flags = {word.replace("--no-", "--") for word in words if word.startswith("--")}
    assert [flag for flag in flags if f'"{flag}"' not in source] == []


@each_readme
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", unfenced(path)):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def test_the_first_page_leads_to_every_other() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in re.findall(r"\]\(([^)\s]+)\)", README)}
    assert [path for path in READMES[1:] if path not in linked] == []


@each_readme
def test_a_readme_begins_with_its_name_and_a_sentence(path: Path) -> None:
    title, paragraph = path.read_text(encoding="utf-8").split("\n\n")[:2]
    assert re.fullmatch(r"# \S.*", title)
    assert re.match(r"[A-Z][^`|#]*\.", paragraph)


@each_readme
def test_every_file_that_is_named_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    folders, kinds = "experiments|blueprints|tests|chrysalis_ray|benchmarks", "yaml|py|json|svg|jinja"
    named = set(re.findall(rf"\b((?:{folders})/[\w./-]+\.(?:{kinds}))", text))
    named |= set(re.findall(r"`((?:[\w.-]+/)*(?:cluster|constraints|pyproject)\.[a-z]+)`", text))
    missing = {name for name in named if not (ROOT / name).exists()}
    assert missing == ({"experiments/letters.yaml"} if path == ROOT / "README.md" else set())  # the one you write


def test_the_shown_experiment_is_valid(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    (tmp_path / "texts" / "letters").mkdir(parents=True)
    (tmp_path / "texts" / "letters" / "first.txt").write_text("Dear reader")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "letters.yaml").write_text(text)
    assert load_experiment(tmp_path / "experiments" / "letters.yaml").experiment.population.variants == 4


@pytest.mark.parametrize("text", [part for path in READMES[1:] for part in blocks("yaml", text=path.read_text("utf-8"))])
def test_shown_parts_of_an_experiment_or_a_blueprint_are_valid(text: str) -> None:
    """Each in the place of what the quickstart, or its blueprint, says of the same."""
    part = yaml.safe_load(text)
    kind = Experiment if set(part) <= set(Experiment.model_fields) else Blueprint
    whole = yaml.safe_load((ROOT / WHOLE[kind]).read_text(encoding="utf-8"))
    for key, value in part.items():
        whole[key] = {**whole.get(key, {}), **value}
    kind.model_validate(whole)


def test_every_benchmark_is_in_the_list() -> None:
    (block,) = blocks("", text=(ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8"))
    listed = {line.split()[0] for line in block.splitlines()}
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} - listed == set()


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake (quickstart|test-slow|test|check|bench|clean)\b", README)) <= targets
    assert {"quickstart", "test", "test-slow", "check", "bench", "clean"} <= targets


@each_readme
def test_extras_that_are_named_exist(path: Path) -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    shown = re.findall(r"-e '\.\[([\w,-]+)\]'", path.read_text(encoding="utf-8"))
    assert {extra for listed in shown for extra in listed.split(",")} <= extras


def test_ci_runs_check_and_check_runs_the_tests() -> None:
    assert "exec make check" in (ROOT / ".ci" / "run").read_text()
    assert "$(MAKE) test" in (ROOT / "Makefile").read_text()
