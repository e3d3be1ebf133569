"""Sources together: one genome whatever their order, the bytes they hold, and what hostile ones are answered."""

import gzip
import hashlib
import io
import itertools
import json
import os
import tarfile
import zipfile
from collections import Counter

import pytest
from test_genome_git import git, words

from chrysalis_ray.config.experiment import FolderSource, GenomeSpec
from chrysalis_ray.config.genome import ArchiveSource, GitSource
from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.genome.build import build_genome, refresh_genome, verify_genome
from chrysalis_ray.genome.documents import PARTS
from chrysalis_ray.genome.sources.archives import read_archive
from chrysalis_ray.genome.sources.fingerprints import fingerprints
from chrysalis_ray.genome.sources.git_source import read_git
from chrysalis_ray.genome.sources.sources import read_folder
from chrysalis_ray.genome.tombstones import FILE

# every sort of text that a byte can go wrong in
TEXTS = {
    "plain.txt": words(1).encode(),
    "crlf.txt": words(2).replace(" ", "\r\n").encode(),
    "cr.txt": words(3).replace(" ", "\r").encode(),
    "mixed.txt": b"one\r\n" + words(4).encode() + b"\rtwo\n\n\r\n",
    "bom.txt": b"\xef\xbb\xbf" + words(5).encode(),
    "bom_twice.txt": b"\xef\xbb\xbf\xef\xbb\xbf" + words(6).encode(),
    "bom_inside.txt": words(7).encode() + b"\xef\xbb\xbf" + words(8).encode(),
    "latin.txt": b"d\xe9j\xe0 vu " + words(9).encode(),
    "bom_latin.txt": b"\xef\xbb\xbfd\xe9j\xe0 " + words(10).encode(),
    "overlong.txt": b"\xc0\xaf" + words(11).encode(),
    "surrogate.txt": b"\xed\xa0\x80" + words(12).encode(),
    "separators.txt": "\u2028\u0085\x0b\x0c\x1c".encode() + words(13).encode(),
    "no_newline.txt": words(14).rstrip().encode(),
    "astral.txt": "\U0001f98b\u200d\u0301".encode() + words(15).encode(),
}


def contents(documents):
    return {document.path.rpartition("/")[2]: document.content for document in documents}


def zipped(files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tarred(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def write_texts(folder, texts=TEXTS):
    folder.mkdir(parents=True)
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    return folder


def commit(folder):
    git(folder, "init", "--quiet", "--template=", "--initial-branch=main")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "all")
    return folder


# bytes


def test_every_reader_keeps_every_byte(tmp_path):
    folder = write_texts(tmp_path / "texts")
    (tmp_path / "a.zip").write_bytes(zipped(TEXTS))
    (tmp_path / "a.tgz").write_bytes(gzip.compress(tarred(TEXTS)))
    skipped, facts = Counter(), {}
    by_folder = read_folder(FolderSource(type="folder", path="texts", domain="d"), tmp_path, skipped)
    by_zip, by_tar = (
        read_archive(ArchiveSource(type="archive", path=name, domain="d"), tmp_path, skipped, facts)
        for name in ("a.zip", "a.tgz")
    )
    commit(folder)
    by_git = read_git(GitSource(type="git", url="texts", commit="main", domain="d"), tmp_path, skipped, facts)
    for documents in (by_folder, by_zip, by_tar, by_git):
        assert contents(documents) == TEXTS
    assert +skipped == {}


def test_what_was_read_is_what_comes_back_from_the_shards(tmp_path):
    write_texts(tmp_path / "texts")
    spec = GenomeSpec.model_validate({"sources": [{"type": "folder", "path": "texts", "domain": "d"}]})
    genome = build_genome(spec, tmp_path / "g", tmp_path)
    verify_genome(tmp_path / "g")
    assert contents(d for part in PARTS for d in genome.documents("d", part)) == TEXTS


def test_names_that_are_no_utf8_are_read_and_told_apart(tmp_path):
    names = [b"caf\xe9.txt", b"caf\xc3\xa9.txt", b"caf\\xe9.txt", b"a\nb.txt", b"-rf.txt", b"\xff\xfe.txt"]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, name in enumerate(names):
        with open(os.path.join(os.fsencode(folder), name), "wb") as stream:
            stream.write(words(number).encode())
    spec = GenomeSpec.model_validate({"sources": [{"type": "folder", "path": "texts", "domain": "d"}]})
    genome = refresh_genome(spec, tmp_path / "g", tmp_path)
    written = (tmp_path / "g" / "manifest.json").stat().st_mtime_ns
    assert refresh_genome(spec, tmp_path / "g", tmp_path).genome_id == genome.genome_id
    assert (tmp_path / "g" / "manifest.json").stat().st_mtime_ns == written, "such a name must not make every build a rebuild"
    paths = {row["path"].partition("/")[2] for row in genome.manifest["content"]["documents"]}
    assert paths == {"caf\\xe9.txt", "café.txt", "a\nb.txt", "-rf.txt", "\\xff\\xfe.txt"}
    verify_genome(tmp_path / "g")
    in_tar = {os.fsdecode(name): words(number).encode() for number, name in enumerate(names)}
    stream = io.BytesIO()
    with tarfile.open(
        fileobj=stream, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for name, content in in_tar.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    (tmp_path / "a.tar").write_bytes(stream.getvalue())
    source = ArchiveSource(type="archive", path="a.tar", domain="d")
    with pytest.raises(GenomeError, match="the member"):  # a backslash could be a way out on another system
        list(read_archive(ArchiveSource(type="archive", path="b.tar", domain="d"), hostile(tmp_path), Counter(), {}))
    assert len(list(read_archive(source, tmp_path, Counter(), {}))) == len(names)


def hostile(tmp_path):
    (tmp_path / "b.tar").write_bytes(tarred({"..\\up.txt": b"x"}))
    return tmp_path


def test_links_of_every_kind_lead_nowhere_and_end(tmp_path):
    """Loops of one, of two and through a parent; a link to itself; absolute and climbing ones; a deep chain."""
    folder = write_texts(tmp_path / "texts", {"a.txt": words(1).encode()})
    (tmp_path / "outside.txt").write_text("a secret " + words(99))
    (folder / "deep").mkdir()
    links = {
        "self": "self", "one": "two", "two": "one", "deep/up": "..", "deep/here": ".", "root": "/",
        "climb.txt": "../outside.txt", "absolute.txt": str(tmp_path / "outside.txt"), "inside.txt": "a.txt",
        "proc.txt": "/proc/self/environ",
    }  # fmt: skip
    for name, target in links.items():
        (folder / name).symlink_to(target)
    for number in range(60):
        (folder / f"chain{number}").symlink_to(f"chain{number + 1}")
    skipped = Counter()
    documents = list(read_folder(FolderSource(type="folder", path="texts", domain="d"), tmp_path, skipped))
    assert sorted(document.path for document in documents) == ["texts/a.txt", "texts/inside.txt"]
    assert skipped["outside"] in (2, 3)  # /proc/self/environ is a regular file of no size


def test_a_folder_that_cannot_be_listed_is_counted(tmp_path, monkeypatch):
    folder = write_texts(tmp_path / "texts", {"a.txt": words(1).encode()})
    (folder / "locked").mkdir()
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    skipped = Counter()
    assert len(list(read_folder(FolderSource(type="folder", path="texts", domain="d"), tmp_path, skipped))) == 1
    assert skipped == {"unreadable": 1}


def test_a_glob_never_leaves_the_folder(tmp_path):
    write_texts(tmp_path / "texts", {"a.txt": words(1).encode()})
    (tmp_path / "up.txt").write_text(words(2))
    for glob in ("../*.txt", "/etc/*", "**/../up.txt", "texts/../../*"):
        source = FolderSource(type="folder", path="texts", domain="d", glob=glob)
        assert list(read_folder(source, tmp_path, Counter())) == []


# order


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    """Sources of every kind that needs no network, three of which hold the same texts."""
    import datasets

    root = tmp_path_factory.mktemp("kinds")
    write_texts(root / "texts", {f"{number}.md": words(100 + number).encode() for number in range(12)})
    write_texts(root / "repository", {f"{number}.md": words(200 + number).encode() for number in range(12)})
    (root / "repository" / "shared.md").write_bytes(words(100).encode())
    commit(root / "repository")
    git(root / "repository", "tag", "v1")
    for number in range(12):
        (root / "repository" / f"{number}.md").write_bytes(words(300 + number).encode())
    commit(root / "repository")
    (root / "a.zip").write_bytes(
        zipped({f"z/{n}.md": words(400 + n).encode() for n in range(12)} | {"s.md": words(100).encode()})
    )
    (root / "lines.jsonl").write_text("\n".join(json.dumps({"text": words(500 + n)}) for n in range(12)))
    datasets.Dataset.from_dict({"text": [words(600 + n) for n in range(12)]}).to_parquet(root / "rows.parquet")
    hub = [{"kind": "food", "action": words(700 + n), "consent": {"training": n != 5}} for n in range(12)]
    (root / "hub.jsonl").write_text("\n".join(json.dumps(record) for record in hub))
    (root / "robots.txt").write_text("User-agent: *\nDisallow: /3.md\n")
    (root / FILE).write_text(json.dumps({"doc_id": "b" * 64, "reason": "x", "date": "2026-01-01"}))
    return root, [
        {"type": "folder", "path": "texts", "domain": "texts", "licence": "CC0-1.0"},
        {"type": "git", "url": "repository", "commit": "main", "domain": "today", "licence": "MIT"},
        {"type": "history", "url": "repository", "snapshots": ["v1"], "domain": "old", "licence": "MIT"},
        {"type": "archive", "path": "a.zip", "domain": "texts", "licence": "0BSD"},
        {"type": "jsonl", "path": "lines.jsonl", "domain": "lines", "max_megabytes": 0.007},
        {"type": "dataset", "path": "./rows.parquet", "domain": "rows"},
        {"type": "records", "path": "hub.jsonl", "domain": "hubs"},
    ]


def test_any_order_of_sources_of_every_kind_is_one_genome(every_kind, tmp_path):
    root, sources = every_kind
    denials = [{"robots": "robots.txt", "below": "texts"}, {"paths": "**/4.md"}, {"paths": "texts/3.md", "reason": "a letter"}]
    ids, identities = set(), set()
    orders = [sources, sources[::-1], *([*sources[turn:], *sources[:turn]] for turn in (2, 5))]
    for number, (order, said) in enumerate(zip(orders, itertools.cycle([denials, denials[::-1]]), strict=False)):
        written = {"sources": order, "use_denied": said, "forget": FILE, "exclude": ["secret"] * (1 + number % 2)}
        genome = build_genome(GenomeSpec.model_validate(written, strict=False), tmp_path / str(number), root, 1 + number % 2)
        ids.add(genome.genome_id)
        identities.add(tuple(shard["sha256"] for _, shard in sorted(genome.manifest["shards"].items())))
    assert len(ids) == 1
    assert len(identities) == 1
    verify_genome(tmp_path / "0")
    content = genome.manifest["content"]
    assert content["skipped"]["duplicate"] == 3
    shared = [row for row in content["documents"] if row["doc_id"] == content_id(words(100))]
    assert [(row["domain"], row["path"]) for row in shared] == [("texts", "a.zip/s.md")]
    denied = {row["path"]: row["marks"]["use_denied"] for row in content["documents"] if "use_denied" in row.get("marks", {})}
    assert {"texts/3.md", "texts/4.md", "hub.jsonl#6", "repository/4.md", "repository@v1/4.md", "a.zip/z/4.md"} == set(denied)
    assert denied["texts/3.md"] == "a letter; robots.txt: Disallow: /3.md"


def content_id(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_change_of_any_source_is_seen(every_kind, tmp_path):
    """Every file that a source, a denial or the forget list names: touched in content, the fingerprint is another."""
    root, sources = every_kind
    spec = GenomeSpec.model_validate(
        {"sources": sources, "use_denied": [{"robots": "robots.txt"}], "forget": FILE}, strict=False
    )
    before = fingerprints(spec, root)
    assert before == fingerprints(spec, root)
    for name in ("texts/3.md", "a.zip", "lines.jsonl", "rows.parquet", "hub.jsonl", "robots.txt", FILE):
        kept = (root / name).read_bytes()
        (root / name).write_bytes(kept + b" ")
        assert fingerprints(spec, root) != before, name
        (root / name).write_bytes(kept)
        before = fingerprints(spec, root)


# git


def test_a_submodule_that_would_run_a_command_is_named_and_not_followed(tmp_path):
    """``ext::`` in .gitmodules, ``update = !command``, a name that climbs: none of it is read, let alone run."""
    folder, witness = write_texts(tmp_path / "repository", {"a.md": words(1).encode()}), tmp_path / "witness"
    run = f"sh -c touch% {witness}"
    (folder / ".gitmodules").write_text(
        f'[submodule "../../../x"]\n\tpath = vendor\n\turl = ext::{run}\n\tupdate = !touch {witness}\n'
        f'[submodule "b"]\n\tpath = -oProxyCommand=touch\n\turl = -oProxyCommand=touch {witness}\n'
    )
    (folder / ".lfsconfig").write_text(f"[lfs]\n\turl = ext::{run}\n")
    (folder / ".gitattributes").write_text("* filter=lfs diff=lfs merge=lfs\n")
    git(folder, "init", "--quiet", "--template=", "--initial-branch=main")
    git(folder, "add", "--all")
    for path in ("vendor", "-oProxyCommand=touch"):
        git(folder, "update-index", "--add", "--cacheinfo", f"160000,{'12' * 20},{path}")
    git(folder, "commit", "--quiet", "--message", "all")
    facts = {}
    source = GitSource(type="git", url=f"file://{folder}", commit="main", domain="d", glob="**/*.md")
    documents = list(read_git(source, tmp_path, Counter(), facts))
    assert [document.path for document in documents] == ["repository/a.md"]
    assert facts["submodules"] == {"vendor": "12" * 20, "-oProxyCommand=touch": "12" * 20}
    assert not witness.exists()


# data sets


def test_a_single_data_file_of_every_kind(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    rows = datasets.Dataset.from_dict({"text": [words(number) for number in range(12)], "other": list(range(12))})
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_json(tmp_path / "rows.jsonl")
    rows.to_csv(tmp_path / "rows.csv", index=False)
    for name in ("rows.parquet", "rows.jsonl", "rows.csv"):
        source = {"type": "dataset", "path": f"./{name}", "domain": "rows"}
        genome = build_genome(GenomeSpec.model_validate({"sources": [source]}), tmp_path / f"g-{name}", tmp_path)
        assert {d.text for part in PARTS for d in genome.documents("rows", part)} == {words(number) for number in range(12)}
    (tmp_path / "rows.bin").write_bytes(b"x")
    for name, why in (("rows.bin", "is none of .parquet"), ("absent.parquet", "is no folder and no file")):
        source = {"type": "dataset", "path": f"./{name}", "domain": "rows"}
        with pytest.raises(GenomeError, match=why):
            build_genome(GenomeSpec.model_validate({"sources": [source]}), tmp_path / "g", tmp_path)


def test_a_data_set_that_brings_code_is_refused_and_the_code_is_not_run(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.py").write_text(f"open({str(tmp_path / 'witness')!r}, 'w')\n")
    source = {"type": "dataset", "path": "./rows", "domain": "rows"}
    with pytest.raises(GenomeError, match="cannot be read") as error:
        build_genome(GenomeSpec.model_validate({"sources": [source]}), tmp_path / "g", tmp_path)
    assert "need their own code are not run" in error.value.remedy
    assert not (tmp_path / "witness").exists()
