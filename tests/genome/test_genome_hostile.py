"""Every hostile and malformed source in one list: each is refused by one typed error that says what to do, nothing it brings is
run, nothing outside the genome's folder is written, and the genome that lay there stays.

What each reader makes of damage in detail is in the tests of the readers; this is the list of what is tried.
"""

import json
import lzma
import os
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
from test_genome_archives import FILES, install, tarred, text, zipped
from test_genome_git import git, words
from test_genome_records import record
from test_genome_submodules import make
from typer.testing import CliRunner

from chrysalis_ray.cli.main import app
from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.genome.build import build_genome
from chrysalis_ray.genome.sources import archives

NOTES = {"type": "folder", "path": "notes", "domain": "d"}
RUN = "ext::sh -c touch% ran"  # what would leave a file, if anything ran it


def file(kind, content, name="file", **more):
    """A source that is one file of `content`."""

    def made(place):
        (place / name).write_bytes(content if isinstance(content, bytes) else content(place))
        return {"type": kind, "path": name, "domain": "d", **more}

    return made


def lines(*values):
    return "\n".join(value if isinstance(value, str) else json.dumps(value) for value in values).encode()


def written(**source):
    """A source that needs no file to be wrong."""
    return lambda place: {"domain": "d", **source}


def repository(**more):
    """A source that is a repository, with what `more` changes; a callable is given the place and the commit."""

    def made(place):
        pinned = make(place / "project", {"one.md": words(1), "two.md": words(2)})
        changed = {key: value(place, pinned) if callable(value) else value for key, value in more.items()}
        return {"type": "git", "url": "project", "commit": pinned, "domain": "d", **changed}

    return made


def flipped(place, pinned):
    path = next(path for path in sorted((place / "project" / ".git" / "objects").glob("??/*")))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(content))
    return "project"


def bundle_cut(place, pinned):
    git(place / "project", "bundle", "create", "--quiet", str(place / "cut"), "main")
    (place / "cut").write_bytes((place / "cut").read_bytes()[:-200])
    return "cut"


def submodule(modules):
    def made(place):
        child = make(place / "child", {"one.md": words(1)})
        pinned = make(place / "parent", {"two.md": words(2)}, [("vendor", "../child", child)], modules)
        return {"type": "git", "url": "parent", "commit": pinned, "submodules": "follow", "domain": "d"}

    return made


def module(url):
    return submodule(f'[submodule "v"]\n\tpath = vendor\n\turl = {url}\n')


def tar_entry(kind):
    return file("archive", tarred(entries=[("a.py", kind, "/etc/passwd")]))


def zip_link(place):
    with zipfile.ZipFile(place / "made", "w") as archive:
        entry = zipfile.ZipInfo("link.py")
        entry.create_system, entry.external_attr = 3, 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    return (place / "made").read_bytes()


def empty_folder(place):
    (place / "empty").mkdir()
    return {**NOTES, "path": "empty"}


def only_links(place):
    (place / "links").mkdir()
    (place / "links" / "loop").symlink_to(".")
    (place / "links" / "out.md").symlink_to("/etc/passwd")
    return {**NOTES, "path": "links"}


def with_code(place):
    (place / "set").mkdir()
    (place / "set" / "set.py").write_text(f"open({str(place / 'ran')!r}, 'w')\n")
    return {"type": "dataset", "path": "./set", "domain": "d"}


def tampered(place):
    install(place / "site", "wing", {"wing/a.py": text(1)}, tamper="wing/a.py")
    return {"type": "packages", "names": ["wing"], "domain": "d"}


def beside(**genome):
    """A good source, and something else of the genome that is wrong."""
    return lambda place: {"sources": [NOTES], **genome}


BLANKS = b" " * (archives.RATIO_COUNTS_FROM + 1)
TWICE = '[submodule "a"]\n\tpath = vendor\n\turl = ../child\n[submodule "b"]\n\tpath = vendor/\n\turl = ../x\n'
CHAT = {"messages_key": "messages", "name": "chats.jsonl"}

REFUSED = {
    # folders
    "a folder that is not there": (written(type="folder", path="nowhere"), "no folder"),
    "a file where a folder was meant": (lambda place: {**NOTES, "path": "notes/0.txt"}, "no folder"),
    "an empty folder": (empty_folder, "no document"),
    "links only, in a loop and out of it": (only_links, "no document"),
    "a glob that leaves": (written(type="folder", path="notes", glob="../**/*"), "leaves the folder"),
    # JSON lines, conversations
    "a file that is not there": (written(type="jsonl", path="nowhere"), "no file"),
    "a line that is no JSON": (file("jsonl", lines({"text": "a"}, "{")), "file:2"),
    "a line that is a list": (file("jsonl", lines([1])), "file:1"),
    "a line without its key": (file("jsonl", lines({"body": "a"})), "no key 'text'"),
    "a text that is a number": (file("jsonl", lines({"text": 3})), "file:1"),
    "a lone surrogate": (file("jsonl", b'{"text": "\\ud800"}'), "surrogate"),
    "a line that is not UTF-8": (file("jsonl", b'{"text": "caf\xe9"}'), "file:1"),
    "a line nested without end": (file("jsonl", b'{"text": ' + b"[" * 100_000), "file:1"),
    "nothing but blank lines": (file("jsonl", b"\n\n"), "no document"),
    "a message without a role": (file("jsonl", lines({"messages": [{"content": "a"}]}), **CHAT), "chats.jsonl:1"),
    "a conversation that is a text": (file("jsonl", lines({"messages": "hello"}), **CHAT), "chats.jsonl:1"),
    # records of hubs
    "a record of unknown keys": (file("records", lines({"colour": "red"})), "file:1: no hub record"),
    "a record that says a thing twice": (file("records", b'{"action": "a", "action": "b"}'), "twice"),
    "a record that ends before it starts": (file("records", lines(record(1, start="2026-09-01"))), "before it starts"),
    "a place that is none": (file("records", lines(record(1, place="Berlin"))), "place"),
    # archives
    "no archive": (file("archive", b"hello"), "cannot be read as a zip or tar"),
    "half an archive": (file("archive", zipped()[:300]), "cannot be read as a zip or tar"),
    "another archive than was pinned": (file("archive", zipped(), sha256="0" * 64), "another file"),
    "a name above the archive": (file("archive", zipped({**FILES, "a/../../ran": b"x"})), "leads out of the archive"),
    "a name from the root": (file("archive", tarred({**FILES, "/tmp/ran": b"x"})), "leads out of the archive"),
    "a name with backslashes": (file("archive", zipped({**FILES, "..\\ran": b"x"})), "leads out of the archive"),
    "a symbolic link in a tar": (tar_entry(tarfile.SYMTYPE), "link or a device"),
    "a hard link in a tar": (tar_entry(tarfile.LNKTYPE), "link or a device"),
    "a device in a tar": (tar_entry(tarfile.BLKTYPE), "link or a device"),
    "a symbolic link in a zip": (file("archive", zip_link), "link or a device"),
    "a zip bomb": (file("archive", zipped({"a.py": BLANKS})), "refused as a bomb"),
    "a tar bomb": (file("archive", lambda place: lzma.compress(tarred({"a.py": BLANKS}))), "refused as a bomb"),
    # data sets
    "a data set that brings code": (with_code, "cannot be read"),
    "a table that is none": (file("dataset", b"PAR1 no PAR1", name="a.parquet"), "cannot be read"),
    "a data file of an unknown kind": (file("dataset", b"x", name="a.pickle"), "is none of"),
    # packages
    "a package that is not installed": (written(type="packages", names=["nunpy"]), "did you mean 'numpy'"),
    "a package that was tampered with": (tampered, "is not the file that its package installed"),
    # repositories
    "no repository": (written(type="git", url="notes", commit="main"), "repository"),
    "a transport that runs a command": (written(type="git", url=RUN, commit="main"), "runs a command"),
    "an address that is an option": (written(type="git", url="--upload-pack=touch ran", commit="main"), "starts with a dash"),
    "a host that is an option": (written(type="git", url="ssh://-oProxyCommand=touch/x", commit="main"), "is no host"),
    "a password in an address": (written(type="git", url="https://me:secret@host/x", commit="main"), "holds a password"),
    "a commit that is an option": (repository(commit="--upload-pack=touch ran"), "neither a full commit id"),
    "a branch that is not there": (repository(commit="nowhere"), "nowhere"),
    "a commit that is not there": (repository(commit="0" * 40), "0000000"),
    "an object with a flipped bit": (repository(url=flipped), "project"),
    "a bundle that was cut": (repository(url=bundle_cut), "bundle"),
    "a glob that matches nothing": (repository(glob="**/*.rs"), "no document"),
    "a snapshot named twice": (written(type="history", url="notes", snapshots=["a", "a"]), "named twice"),
    # submodules
    "a submodule that runs a command": (module(RUN), "runs a command"),
    "a submodule whose address is an option": (module("--upload-pack=touch ran"), "starts with a dash"),
    "a submodule that is nowhere": (module("../nowhere"), "no repository"),
    "a submodule of two addresses": (submodule(TWICE), "two urls"),
    "a .gitmodules that is no such file": (submodule('[submodule "v"\n'), ".gitmodules cannot be read"),
    # what else a genome is told
    "a registry that is not there": (beside(sources=[{"type": "registry", "path": "nowhere.yaml"}]), "no such file"),
    "rules that are not there": (beside(use_denied=[{"robots": "nowhere.txt"}]), "nowhere.txt"),
    "tombstones that are not there": (beside(forget="nowhere.jsonl"), "nowhere.jsonl"),
    "two sources of one text": (beside(sources=[NOTES, {**NOTES, "domain": "e"}]), "holds nothing that no other domain holds"),
    "everything excluded": (beside(use_denied=[{"paths": "notes/**"}]), "leaves in"),
}  # fmt: skip


def seen(folder):
    """Everything below `folder` as it is: names, kinds, dates and bytes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        told = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[path.relative_to(folder)] = (told.st_mode, told.st_mtime_ns if not path.is_dir() else 0, content)
    return found


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of notes, and the genome made of them."""
    place = tmp_path_factory.mktemp("good")
    (place / "notes").mkdir()
    for number in range(9):
        (place / "notes" / f"{number}.txt").write_text(words(number))
    build_genome(GenomeSpec.model_validate({"sources": [NOTES]}, strict=False), place / "g", place)
    return place


@pytest.fixture
def place(tmp_path, good, monkeypatch):
    """Where sources are made, with a home, a current and a temporary folder that nothing may be left in."""
    for name in ("home", "here", "scratch", "run", "place/notes"):
        (tmp_path / name).mkdir(parents=True)
    for number in range(9):
        (tmp_path / "place" / "notes" / f"{number}.txt").write_bytes((good / "notes" / f"{number}.txt").read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.syspath_prepend(str(tmp_path / "place" / "site"))
    return tmp_path / "place"


@pytest.mark.parametrize(("made", "why"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_by_one_error_and_nothing_else_happens(place, good, made, why):
    told = made(place)
    genome = told if "sources" in told else {"sources": [told]}
    experiment = {
        "name": "hostile",
        "blueprint": "tiny",
        "genome": genome,
        "population": {
            "variants": 2,
            "tokens_per_variant": 4096,
            "epigenomes": {"type": "listed", "mixes": [{"name": "even", "express": {"d": 1}}]},
        },
    }
    (place / "hostile.yaml").write_text(json.dumps(experiment, indent=1))
    out = place.parent / "run" / "g"
    for path in (path for path in (good / "g").rglob("*") if path.is_file()):
        (out / path.relative_to(good / "g")).parent.mkdir(parents=True, exist_ok=True)
        (out / path.relative_to(good / "g")).write_bytes(path.read_bytes())
    before = seen(place.parent)
    done = CliRunner().invoke(app, ["genome", "build", str(place / "hostile.yaml"), "--out", str(out)])
    assert (done.exit_code in (1, 2), done.stdout) == (True, ""), done.output
    assert isinstance(done.exception, SystemExit)
    heads = [line.split(": ")[0] for line in done.stderr.splitlines() if line.startswith(("error: ", "remedy: "))]
    if done.exit_code == 1:
        assert heads == ["error", "remedy"], done.stderr
    else:  # what is wrong stands with its line, which is where the remedy belongs
        assert heads == ["error"]
        assert "hostile.yaml:" in done.stderr
    assert why in done.stderr
    assert "Traceback" not in done.stderr
    caches = (Path("run/g/.lock"), Path("run/g/scan"))  # what was looked through before it was refused
    assert {path: told for path, told in seen(place.parent).items() if not {path, path.parent} & {*caches}} == before


def test_the_list_is_long_and_the_good_source_among_them_is_good(place, good):
    """What is refused above is not refused because nothing is ever built here."""
    assert len(REFUSED) >= 50
    genome = build_genome(GenomeSpec.model_validate({"sources": [NOTES]}, strict=False), place / "g", place)
    assert genome.genome_id == json.loads((good / "g" / "manifest.json").read_text())["genome_id"]
