"""The floors of the house, kept by reading the source: who may import whom, which library enters through which door."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "chrysalis_ray"

FLOORS = {
    "core": 0,
    "config": 1,
    "genome": 2, "merge": 2, "seed": 2, "report": 2,
    "training": 3,
    "evaluate": 4,
    "body": 5,
    "population": 6,
    "lifecycle": 7,
    "cli": 8, "__main__": 9,
}  # fmt: skip

# library -> where it may be imported. When one of them changes, one room changes.
DOORS = {
    "ray": ("body/", "population/", "genome/ray_scan.py"),
    "ray.data": ("genome/ray_scan.py",),  # text, not training: a genome is built before there is a body
    "ray.tune": ("population/",),
    "ray.train": ("body/",),
    "deepspeed": ("training/engine.py",),
    "peft": ("seed/",),
    "datasets": ("genome/",),
    "lm_eval": ("evaluate/harness.py",),
    "wandb": ("report/", "population/listener.py"),
    "pyarrow": ("genome/",),
    "bitsandbytes": ("training/quantised.py",),
    "typer": ("cli/",),
    "yaml": ("config/",),
}

# Rooms, or files, that a laptop without torch can import.
WITHOUT_TORCH = ("core/", "config/", "report/", "cli/", "population/", "genome/", "lifecycle.py", "__main__.py",
                 "training/planning/", "training/memory.py", "training/passes.py", "evaluate/verdict.py")  # fmt: skip

DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc", "base_utils", "tools", "aliases"}
LONGEST_FILE = 400
LONGEST_FUNCTION = 60
ALLOWED_LENGTH: dict[str, str] = {}  # "room/file.py" or "room/file.py:function" -> reason
ALLOWED_BROAD = {
    "body/manifest.py": "the thread of a worker group hands whatever ended it to the trials that wait, as their error",
    "training/limbs.py": "a limb hands whatever ended its work to its worker, which raises it",
}
ALLOWED_CALLS = {("genome/sources/python_text.py", "compile"): "disassembles the standard library; the code is never run"}

FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "torch.load",
    "os.system",
    "yaml.load",
    "yaml.unsafe_load",
}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "telnetlib"}

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module with its line; ``from ray import tune`` counts as ``ray`` and ``ray.tune``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield node.module or "", node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def imports_on_loading(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """What is imported when the module itself is: not inside functions, not for type checkers only."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom | ast.If | ast.Try):
            yield from imports(node)


def dotted(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def test_the_floors_name_every_room() -> None:
    rooms = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if not path.name.startswith(("__init__", "__pycache__"))
    }
    assert rooms - {"py.typed"} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_imports_only_from_floors_below(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for module, line in imports(tree_of(path)):
        parts = module.split(".")
        if parts[0] == "chrysalis_ray" and len(parts) > 1 and parts[1] in FLOORS and parts[1] != room:
            assert FLOORS[parts[1]] < FLOORS[room], f"{name_of(path)}:{line} ({room}) imports {module}"


def test_no_file_comes_back_to_itself_by_imports() -> None:
    """Imports within functions and those for type checkers count, too."""
    known = {"chrysalis_ray." + name_of(path).removesuffix(".py").replace("/", "."): path for path in FILES}
    taken = {name: {module for module, _ in imports(tree_of(path))} & known.keys() for name, path in known.items()}
    while leaves := {name for name, others in taken.items() if not others & taken.keys()}:
        taken = {name: others for name, others in taken.items() if name not in leaves}
    assert taken == {}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_is_private_to_a_file_stays_there(path: Path) -> None:
    foreign = [module for module, _ in imports(tree_of(path)) if module.startswith("chrysalis_ray.")]
    names = {module.rpartition(".")[2] for module in foreign}
    assert {name for name in names if name.startswith("_")} <= {"__version__", "_sketching"}  # the compiled one


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_one_door(library: str) -> None:
    strangers = [
        f"{name_of(path)}:{line} imports {module}"
        for path in FILES
        for module, line in imports(tree_of(path))
        if (module == library or module.startswith(f"{library}.")) and not name_of(path).startswith(DOORS[library])
    ]
    assert strangers == []


@pytest.mark.parametrize("path", [path for path in FILES if name_of(path).startswith(WITHOUT_TORCH)], ids=name_of)
def test_light_rooms_import_no_torch_when_loaded(path: Path) -> None:
    heavy = {"torch", "transformers", "deepspeed", "peft", "safetensors.torch", "wandb", "datasets"}
    if room_of(path) != "population":
        heavy |= {"ray"}
    loaded = [
        f"{module}, line {line}"
        for module, line in imports_on_loading(tree_of(path))
        if module in heavy or module.split(".")[0] in heavy
    ]
    assert loaded == []


def test_core_is_standard_library_only() -> None:
    import sys

    for path in (PACKAGE / "core").glob("*.py"):
        foreign = (
            {module.split(".")[0] for module, _ in imports(tree_of(path))} - set(sys.stdlib_module_names) - {"chrysalis_ray"}
        )
        assert foreign == set(), path


def test_there_are_no_drawers() -> None:
    names = {path.stem for path in PACKAGE.rglob("*.py")} | {path.name for path in PACKAGE.rglob("*") if path.is_dir()}
    assert names & DRAWERS == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if name_of(path) not in ALLOWED_LENGTH:
        assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and f"{name_of(path)}:{node.name}" not in ALLOWED_LENGTH:
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{node.name}, line {node.lineno}"


def test_allowed_lengths_are_still_needed() -> None:
    known = {name_of(path) for path in FILES}
    assert {entry.partition(":")[0] for entry in ALLOWED_LENGTH} <= known
    assert all(len(reason) > 20 for reason in ALLOWED_LENGTH.values())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_errors_are_never_swallowed_wholesale(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            broad = node.type is None or re.search(r"\b(Base)?Exception\b", caught)
            raises = any(isinstance(child, ast.Raise) for child in ast.walk(node))  # as a typed error, or again
            assert not broad or raises or name_of(path) in ALLOWED_BROAD, f"except {caught}, line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_from_outside_is_executed(path: Path) -> None:
    tree = tree_of(path)
    assert {module.split(".")[0] for module, _ in imports(tree)} & FORBIDDEN_MODULES == set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        if (name_of(path), called) not in ALLOWED_CALLS:
            assert called not in FORBIDDEN_CALLS, f"{called}, line {node.lineno}"
        if called in ("np.load", "numpy.load"):
            assert "allow_pickle=False" in ast.unparse(node), f"line {node.lineno}"
        for keyword in node.keywords:
            word = (keyword.arg, ast.unparse(keyword.value))
            assert word not in {("trust_remote_code", "True"), ("shell", "True"), ("allow_pickle", "True")}, (
                f"line {node.lineno}"
            )
