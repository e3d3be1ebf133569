"""The command line is a promise: verbs, arguments and flags are pinned here. Knobs belong into the YAML."""

from __future__ import annotations

import typer.main

from chrysalis_ray.cli.main import app

FROZEN = {
    "": ["--help", "--version", "-h"],
    "run": ["EXPERIMENT", "--address", "--dry-run", "--help", "--json", "--name", "--runs", "--set", "-h"],
    "plan": ["EXPERIMENT", "--help", "--json", "--measure", "--runs", "--set", "-h"],
    "report": ["RUN_DIRECTORY", "--help", "--json", "-h"],
    "merge": ["ADAPTER...", "--base", "--help", "--json", "--out", "--rank", "--seed-adapter", "--set", "--strategy", "--text",
              "--weights", "-h", "-o", "-s"],
    "fold": ["ADAPTER", "--base", "--help", "--json", "--out", "-h", "-o"],
    "audit": ["ADAPTER...", "--help", "--json", "--seed-adapter", "-h"],
    "evaluate": ["ADAPTER...", "--base", "--genome", "--help", "--json", "--limit", "--lm-eval", "--lm-eval-path", "--probe",
                 "--split", "-h"],
    "validate": ["FILE...", "--help", "-h"],
    "lineage": ["RUN_DIRECTORY", "--help", "--json", "--verify", "-h"],
    "schema": ["OF", "--help", "-h"],
    "doctor": ["--help", "--json", "-h"],
    "genome": ["--help", "-h"],
    "genome build": ["EXPERIMENT", "--help", "--json", "--out", "--set", "-h"],
    "genome verify": ["DIRECTORY", "--help", "--level", "--rebuild", "-h"],
    "genome show": ["DIRECTORY", "DOCUMENT", "--help", "--json", "-h"],
    "genome diff": ["BEFORE", "AFTER", "--help", "--json", "-h"],
    "genome export": ["DIRECTORY", "--help", "--out", "-h"],
    "genome exposure": ["RUN_DIRECTORY", "DOCUMENT", "--help", "--json", "-h"],
    "blueprint": ["--help", "-h"],
    "blueprint show": ["NAME|FILE", "--help", "--json", "-h"],
    "blueprint choose": ["BASE", "--gpu-memory", "--gpus", "--help", "--json", "--probe", "--runs", "--tokens", "--variants",
                         "-h"],
    "genome forget": ["DIRECTORY", "DOCUMENT...", "--help", "--json", "--licence", "--out", "--reason", "--runs", "--source",
                      "-h"],
}  # fmt: skip


def surface(command: object, path: str = "", parent: object = None) -> dict[str, list[str]]:
    """Every command below `command` with its arguments first and its flags sorted."""
    context = command.make_context(path, [], parent=parent, resilient_parsing=True)
    parameters = command.get_params(context)
    arguments = [
        parameter.metavar or parameter.name.upper() for parameter in parameters if parameter.param_type_name == "argument"
    ]
    flags = sorted(flag for parameter in parameters if parameter.param_type_name == "option" for flag in parameter.opts)
    found = {path: [*arguments, *flags]}
    for name, child in getattr(command, "commands", {}).items():
        found |= surface(child, f"{path} {name}".strip(), context)
    return found


def test_verbs_and_flags_are_frozen() -> None:
    assert surface(typer.main.get_command(app)) == FROZEN


def test_every_verb_has_an_example_in_its_help() -> None:
    root = typer.main.get_command(app)
    groups = {name: command for name, command in root.commands.items() if hasattr(command, "commands")}
    commands = {name: command for name, command in root.commands.items() if name not in groups}
    for name, group in groups.items():
        commands |= {f"{name} {verb}": command for verb, command in group.commands.items()}
    without = [name for name, command in commands.items() if "\b\nchrysalis " not in command.help]
    assert without == []
