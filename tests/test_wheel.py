"""What `pip install .` installs works away from the checkout: the package, its compiled kernel where there is a compiler, and
the blueprints it ships."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from chrysalis_ray.genome.shingles import kept_shingles

ROOT = Path(__file__).parents[1]
BLUEPRINTS = {path.relative_to(ROOT).as_posix() for path in (ROOT / "blueprints").rglob("*") if path.is_file()}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel and a source distribution, built from a copy of what a checkout holds; no network."""
    return build(tmp_path_factory.mktemp("wheel"))


def build(folder: Path, **environment: str) -> Path:
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("chrysalis_ray", "blueprints"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    code = "import setuptools.build_meta as b; b.build_sdist('..'); b.build_wheel('..')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_wheel_holds_the_blueprints_inside_the_package_and_nothing_beside_it(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"chrysalis_ray"}
        for name in BLUEPRINTS:
            assert archive.read(f"chrysalis_ray/{name}") == (ROOT / name).read_bytes(), name
        recorded = archive.read(next(name for name in names if name.endswith("RECORD"))).decode()
    assert all(f"chrysalis_ray/{name}," in recorded for name in BLUEPRINTS)
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "chrysalis_ray").rglob("*.py")}
    assert modules - names == set()


def test_the_source_distribution_holds_them_where_they_lie(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert BLUEPRINTS - names == set()


@pytest.mark.parametrize("compiler", ["cc", "false"])
def test_the_kernel_is_compiled_where_it_can_be_and_done_without_where_not(tmp_path: Path, compiler: str) -> None:
    """Its source travels; a compiler that fails is one line of a warning."""
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    build(tmp_path, CC=compiler)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"chrysalis_ray/genome/_sketching.c", "chrysalis_ray/genome/_sketching.h"} <= names
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as installed:
        installed.extractall(tmp_path / "site")
    code = (
        "from chrysalis_ray.genome import native\n"
        "from chrysalis_ray.genome.shingles import kept_shingles\n"
        "print(native.kernel is not None, *kept_shingles(['one two three four five six seven eight nine ten'])[0])\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    kept = kept_shingles(["one two three four five six seven eight nine ten"])[0]
    assert len(kept) > 0
    assert told == [str(compiler != "false"), *map(str, kept)]


def test_an_installed_package_finds_and_reads_them_away_from_the_checkout(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "from chrysalis_ray.config.loading import load_blueprint, shipped_blueprints as shipped\n"
        "print(*(load_blueprint(path).name for path in shipped().values()))\n"
        "from chrysalis_ray.training.planning.choice import choose, named_base\n"
        "from chrysalis_ray.training.planning.hardware import Hardware\n"
        "print(choose(named_base('Qwen/Qwen3-1.7B'), Hardware(2, 1 << 34), variants=2).reasons[0])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert set(told[0].split()) == {Path(name).stem for name in BLUEPRINTS if name.count("/") == 1 and name.endswith(".yaml")}
    assert told[1] == "blueprint: start from qwen3-1.7b, which is shipped for this base"
