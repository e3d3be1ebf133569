"""File names are anybody's: no verb lets one speak to the terminal, forge a line or hide what it is."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from chrysalis_ray.cli.main import app
from chrysalis_ray.core.printable import printable, printable_json, printable_lines
from tests.cli.test_cli_genome import EXPERIMENT
from tests.core.test_core_joiners import IN_USE

# what is on disk -> how it is shown
NAMES = {
    b"\x1b]0;owned\x07.txt": r"notes/\x1b]0;owned\x07.txt",
    b"a\nerror: all is lost.txt": r"notes/a\nerror: all is lost.txt",
    "\u202etxt.exe".encode(): r"notes/\u202etxt.exe",
    "\x9b31mred.txt".encode(): r"notes/\x9b31mred.txt",
    b"\xff\x1b[2J.txt": r"notes/\xff\x1b[2J.txt",
    "caf\u00e9 \u65e5\u672c.txt".encode(): "notes/caf\u00e9 \u65e5\u672c.txt",
    "\u0645\u06cc\u200c\u062e\u0648\u0627.txt".encode(): "notes/\u0645\u06cc\u200c\u062e\u0648\u0627.txt",  # Persian
    "pay\u200cpal.txt".encode(): r"notes/pay\u200cpal.txt",
}


def chrysalis(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def is_plain(text: str) -> bool:
    """Whether nothing in `text` is hidden, joiners aside that a script or an emoji is written with."""
    left = IN_USE.sub("", text)
    return not any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in left if character != "\n")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(EXPERIMENT.replace("notes, licence", "notes, glob: '**/*', licence"))
    folder = os.fsencode(tmp_path / "notes")
    os.mkdir(folder)
    for number, name in enumerate([*NAMES, b"plain1.txt", b"plain2.txt", b"plain3.txt"]):
        with open(folder + b"/" + name, "w") as stream:
            stream.write(" ".join(f"n{number}w{word}" for word in range(50)))
    assert chrysalis("genome", "build", tmp_path / "small.yaml", "--out", tmp_path / "g").exit_code == 0
    return tmp_path


def test_no_verb_prints_what_a_terminal_obeys(place: Path) -> None:
    rows = json.loads((place / "g" / "manifest.json").read_text())["content"]["documents"]
    by_shown = {printable(row["path"]): row for row in rows}
    assert set(NAMES.values()) <= set(by_shown)
    for shown in NAMES.values():
        row = by_shown[shown]
        for wanted in (row["doc_id"], row["path"], shown):
            told = chrysalis("genome", "show", place / "g", wanted)
            assert told.exit_code == 0, told.output
            assert f"path       {shown}\n" in told.stdout
            assert is_plain(told.stdout)
        told = chrysalis("genome", "show", place / "g", row["doc_id"], "--json")
        assert is_plain(told.stdout)
        assert json.loads(told.stdout)["path"] == row["path"]  # for programs nothing is lost
    for name in NAMES:
        with open(os.fsencode(place / "notes") + b"/" + name, "a") as stream:
            stream.write(" and more")
    assert chrysalis("genome", "build", place / "small.yaml", "--out", place / "h").exit_code == 0
    told = chrysalis("genome", "diff", place / "g", place / "h")
    assert is_plain(told.stdout)
    assert all(f"changed   {shown}\n" in told.stdout for shown in NAMES.values())
    assert "\nerror: all is lost" not in told.stdout


def test_no_error_prints_what_a_terminal_obeys(place: Path) -> None:
    asked = chrysalis("genome", "show", place / "g", "txt")  # part of every path
    assert (asked.exit_code, is_plain(asked.stderr)) == (1, True)
    assert "there is notes/" in asked.stderr
    unknown = chrysalis("genome", "show", place / "g", "\x1b[2J\udcff")
    assert (unknown.exit_code, is_plain(unknown.stderr)) == (1, True)
    manifest = json.loads((place / "g" / "manifest.json").read_text())
    for name in manifest["shards"]:  # every shard holds what another genome sealed
        (place / "g" / name).unlink()
    for number, name in enumerate(NAMES):
        with open(os.fsencode(place / "notes") + b"/" + name, "w") as stream:
            stream.write(" ".join(f"other{number}w{word}" for word in range(50)))
    assert chrysalis("genome", "build", place / "small.yaml", "--out", place / "h").exit_code == 0
    for name in manifest["shards"]:
        (place / "g" / name).write_bytes((place / "h" / name).read_bytes())
    verified = chrysalis("genome", "verify", place / "g")
    assert verified.exit_code == 1
    assert "is not as sealed" in verified.stderr or "is missing" in verified.stderr
    assert is_plain(verified.stderr)
    assert verified.stderr.count("\n") == 2  # the error and the remedy: no name makes a line of its own
    assert chrysalis("genome", "forget", place / "g", "nothing\x1b[2J", "--reason", "r", "--out", place / "f").exit_code == 1


@given(st.text())
def test_what_is_printable_shows_everything_and_json_means_what_it_meant(name: str) -> None:
    assert is_plain(printable(name))
    assert "\n" not in printable(name)
    assert printable_lines(name).split("\n") == [printable(line) for line in name.split("\n")]
    assert is_plain(printable_json({name: [name]}))
    assert json.loads(printable_json({name: [name]})) == {name: [name]}
    if is_plain(name) and "\n" not in name:
        assert printable(name) == name
    printable(name).encode()  # what cannot be written is written out
