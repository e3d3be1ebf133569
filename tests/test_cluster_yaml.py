"""cluster.yaml: Ray's own schema accepts it, it asks for a token everywhere, and opens nothing to the world."""

from __future__ import annotations

import ast
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILE = ROOT / "cluster.yaml"
EVERY_ADDRESS = ".".join("0000")  # spelled so that this file does not contain it


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def tracked_files() -> list[Path]:
    """Files that git keeps or would keep, where there is git; else every file outside hidden folders and runs."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file() and not any(part.startswith(".") for part in path.parts)]


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster))


def test_ray_would_refuse_a_mistake(cluster: dict[str, Any]) -> None:
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(cluster | {"idle_timeout_minuets": 5}))


def test_every_ray_command_shows_the_token(cluster: dict[str, Any]) -> None:
    commands = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert [command for command in commands if not command.startswith("export RAY_AUTH_MODE=token")] == []
    assert len([command for command in commands if "ray start" in command]) == 2
    assert cluster["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_dashboard_listens_on_loopback_only(cluster: dict[str, Any]) -> None:
    head = next(command for command in cluster["head_start_ray_commands"] if "--head" in command)
    assert "--dashboard-host=127.0.0.1" in head
    assert "--ray-client-server-port" not in head


def test_security_groups_are_ours_on_every_node(cluster: dict[str, Any]) -> None:
    assert "security_group" not in cluster["provider"]  # Ray would add SSH from everywhere to it
    for name, node in cluster["available_node_types"].items():
        assert node["node_config"]["SecurityGroupIds"] == ["sg-REPLACE-ME"], name
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required", name


def test_no_file_of_the_repository_names_every_address() -> None:
    assert [str(path) for path in tracked_files() if EVERY_ADDRESS.encode() in path.read_bytes()] == []


def test_no_code_binds_to_every_address() -> None:
    bad = []
    for path in (ROOT / "chrysalis_ray").rglob("*.py"):
        words = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        bad += [str(path) for word in words if word in (EVERY_ADDRESS, "::")]
    assert bad == []


def test_placeholders_fail_loudly(cluster: dict[str, Any], tmp_path: Path) -> None:
    guard = cluster["setup_commands"][0]
    home = tmp_path / "home"
    (home / "chrysalis_ray").mkdir(parents=True)
    shutil.copy(FILE, home / "chrysalis_ray")
    refused = subprocess.run(["bash", "-c", guard], env={"HOME": str(home)}, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "fill in the placeholders" in refused.stderr
    assert refused.stdout.count("REPLACE-ME") == FILE.read_text().count("REPLACE-ME") >= 8
    (home / "chrysalis_ray" / "cluster.yaml").write_text(FILE.read_text().replace("REPLACE-ME", "mine"))
    assert subprocess.run(["bash", "-c", guard], env={"HOME": str(home)}).returncode == 0


@pytest.mark.parametrize(
    "key", ["setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"]
)
def test_commands_are_valid_shell(cluster: dict[str, Any], key: str) -> None:
    for command in cluster[key]:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_versions_come_from_the_constraints_and_runs_lie_on_shared_storage(cluster: dict[str, Any]) -> None:
    setup = "\n".join(cluster["setup_commands"])
    assert "-c constraints.txt" in setup
    assert "mount -t nfs4" in setup
    assert cluster["idle_timeout_minutes"] > 0
