"""Git repositories as sources: pinned, fetched without running anything, every object hashed again."""

import hashlib
import os
import shutil
import subprocess

import pytest

from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.config.genome import GitSource, refused_url
from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError
from chrysalis_ray.genome.build import build_genome, verify_genome
from chrysalis_ray.genome.documents import PARTS
from chrysalis_ray.genome.sources import git_local, git_objects, git_program, git_source
from chrysalis_ray.genome.sources.git_objects import ObjectReader, fetch, tree_entries, tree_of_commit
from chrysalis_ray.genome.sources.git_source import read_git

# Ids of the repository below, made with git 2.39.5. Whatever machine makes it again, they must come out.
FIRST = "6bb7ea4abc949e8bc5c9a90623db8d1f2b67a805"
SECOND = "644a77cdc600cf2fb8719e53dfa61a7129180df8"
TREE = "1f2ec20c673a50d2f896ce26e6c2cfb95e3e8974"
SHA256_COMMIT = "815cf4fcdd6e73cd847f393edf221fc84c7ad8681d9484b13811235deecd5391"

DATE = "2026-01-02T03:04:05+0000"
WHO = {f"GIT_{role}_{what}": value for role in ("AUTHOR", "COMMITTER") for what, value in
       (("NAME", "A. Larva"), ("EMAIL", "larva@example.org"), ("DATE", DATE))}  # fmt: skip
NO_CONFIG = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 123456\n"


def git(folder, *arguments, **variables):
    environment = {"PATH": os.environ["PATH"], "HOME": os.devnull, **WHO, **NO_CONFIG, **variables}
    done = subprocess.run(["git", *arguments], cwd=folder, env=environment, capture_output=True, check=True)
    return done.stdout.decode("utf-8", "replace").strip()


def words(number, count=80):
    """Text of its own: no two numbers share a run of words."""
    return " ".join(f"n{number}w{hashlib.sha256(f'{number} {i}'.encode()).hexdigest()[:6]}" for i in range(count)) + "\n"


FILES = {
    b"README.md": words(1).encode(),
    b"LICENSE": b"Permission is hereby granted, free of charge, to any person obtaining a copy of this software ... "
    b"The above copyright notice and this permission notice shall be included in all copies ...\n",
    b"src/one.py": b"# SPDX-License-Identifier: Apache-2.0\n" + words(2).encode(),
    b"src/two.py": words(3).replace(" ", "\r\n").encode(),
    b"src/bom.py": b"\xef\xbb\xbf" + words(4).encode(),
    b"docs/caf\xc3\xa9.md": words(5).encode(),
    b"docs/caf\xe9.md": words(6).encode(),
    b"docs/latin.md": b"d\xe9j\xe0 vu " + words(7).encode(),
    b"docs/empty.md": b"",
    b"data/picture.png": b"\x89PNG\r\n\x1a\n\0\0\0\0",
    b"data/weights.md": LFS,
}


def make_repository(folder, object_format="sha1"):
    """Two commits; a symbolic link, a submodule entry, names and texts of every kind. Written with plumbing: no file system
    can spoil a name."""
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet", "--template=", f"--object-format={object_format}", "--initial-branch=main")

    def add(mode, path, content):
        stored = subprocess.run(
            ["git", "hash-object", "-w", "--stdin", "--no-filters"], cwd=folder, input=content, capture_output=True, check=True
        ).stdout.strip()
        stage(mode, stored, path)

    def stage(mode, name, path):
        line = b"%s %s\t%s\0" % (mode, name, path)
        subprocess.run(["git", "update-index", "-z", "--index-info"], cwd=folder, input=line, check=True)

    for path, content in FILES.items():
        add(b"100644", path, content)
    first = commit(folder)
    add(b"120000", b"link.md", b"../../../etc/passwd")
    add(b"100755", b"src/run.py", words(8).encode())
    stage(b"160000", b"12" * (len(first) // 2), b"vendor/other")
    second = commit(folder, "-p", first)
    git(folder, "update-ref", "refs/heads/main", second)
    git(folder, "update-ref", "refs/heads/old", first)
    return first, second


def commit(folder, *arguments):
    return git(folder, "commit-tree", "-m", "a message", *arguments, git(folder, "write-tree"))


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("git") / "larva"
    make_repository(folder)
    return folder


def source(url, commit=SECOND, **more):
    more = more or {"domains_by": [{"domain": "code", "glob": "**/*.py"}, {"domain": "docs", "glob": "**/*.md"}]}
    return GitSource.model_validate({"type": "git", "url": str(url), "commit": commit, **more})


def read(url, relative_to, **more):
    from collections import Counter

    skipped, facts = Counter(), {}
    documents = list(read_git(source(url, **more), relative_to, skipped, facts))
    return documents, dict(skipped), facts


def test_ids_are_what_git_says_on_any_machine(origin, tmp_path):
    assert (git(origin, "rev-parse", "old"), git(origin, "rev-parse", "main")) == (FIRST, SECOND)
    assert git(origin, "rev-parse", "main^{tree}") == TREE
    assert make_repository(tmp_path / "sha256", "sha256")[1] == SHA256_COMMIT


def test_a_pinned_commit_is_read_byte_for_byte(origin, tmp_path):
    documents, skipped, facts = read(f"file://{origin}", tmp_path)
    found = {document.path.removeprefix("larva/"): document for document in documents}
    for path, content in FILES.items():
        shown = "docs/caf\\xe9.md" if path == b"docs/caf\xe9.md" else path.decode()
        if shown.endswith((".py", ".md")) and content:
            assert found.pop(shown).content == content, path
    assert found.pop("src/run.py").content == words(8).encode()
    assert found == {}
    assert skipped == {"symlink": 1, "empty": 1, "unmatched": 2}
    assert facts == {
        "commit": SECOND,
        "tree": TREE,
        "object_format": "sha1",
        "submodules": {"vendor/other": "12" * 20},
        "objects_verified": facts["objects_verified"],
    }
    assert facts["objects_verified"] == 1 + 5 + 1 + len(documents) + 1  # commit, trees, licence, documents, the empty file


def test_licences_come_from_the_tag_then_the_nearest_file_and_say_so(origin, tmp_path):
    documents, _, _ = read(origin, tmp_path, domain="all", licence="BSD-3-Clause")
    licences = {document.path: (document.licence, document.evidence) for document in documents}
    assert licences["larva/src/one.py"] == ("Apache-2.0", "tag")
    assert licences["larva/docs/latin.md"] == ("MIT", "file LICENSE")


@pytest.mark.parametrize(
    ("place", "named"),
    [("HEAD", "path"), ("HEAD", "file"), ("packed-refs", "path"), ("objects/info/alternates", "path"), ("index", "path")],
)
def test_a_pipe_in_a_repository_is_not_waited_for(origin, tmp_path, monkeypatch, place, named):
    """Git opens whatever lies where a file should, and waits for what a pipe never says."""
    subprocess.run(["cp", "-r", origin, tmp_path / "piped"], check=True)
    git(tmp_path / "piped", "gc", "--quiet")
    if place == "index":
        (tmp_path / "piped" / ".git" / "objects" / "pack" / f"pack-{'0' * 40}.pack").write_bytes(b"PACK")
    pipe = tmp_path / "piped" / ".git" / (f"objects/pack/pack-{'0' * 40}.idx" if place == "index" else place)
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    for module in (git_local, git_objects):
        monkeypatch.setattr(module, "PATIENCE", 0.5)
    url, told = f"file://{tmp_path}/piped" if named == "file" else tmp_path / "piped", []
    for pinned in (SECOND, "main"):
        try:
            read(url, tmp_path, commit=pinned)
        except GenomeCorrupt as error:
            told.append(error.message)
    assert told
    assert all("is not done after 0.5 seconds" in message for message in told)
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path / "piped") not in running, "what git started is ended too"


@pytest.mark.parametrize("kind", ["path", "relative", "file", "bare", "bundle", "sha256"])
def test_every_way_to_name_a_repository_gives_the_same_documents(origin, tmp_path, kind):
    url, pinned = origin, SECOND
    if kind == "relative":
        url = os.path.relpath(origin, tmp_path)
    elif kind == "file":
        url = f"file://{origin}"
    elif kind == "bare":
        git(tmp_path, "clone", "--quiet", "--bare", str(origin), "larva.git")
        url = tmp_path / "larva.git"
    elif kind == "bundle":
        git(origin, "bundle", "create", "--quiet", str(tmp_path / "larva"), "--all")
        url = tmp_path / "larva"
    elif kind == "sha256":
        make_repository(tmp_path / "larva", "sha256")
        url, pinned = tmp_path / "larva", SHA256_COMMIT
    documents, _, _ = read(url, tmp_path, commit=pinned)
    expected, _, _ = read(origin, tmp_path)
    assert [(d.doc_id, d.path, d.domain) for d in documents] == [(d.doc_id, d.path, d.domain) for d in expected]


def test_a_branch_is_resolved_and_the_id_it_had_is_sealed(origin, tmp_path):
    _, _, facts = read(origin, tmp_path, commit="old")
    assert facts["commit"] == FIRST
    assert facts["resolved"] == "'old' was this commit when the genome was built"
    git(origin, "tag", "-a", "-m", "one", "v1", FIRST)
    assert read(origin, tmp_path, commit="v1")[2]["commit"] == FIRST
    tag = git(origin, "rev-parse", "v1")
    assert tag != FIRST
    assert read(origin, tmp_path, commit=tag)[2]["commit"] == FIRST
    git(origin, "tag", "main", FIRST)
    with pytest.raises(GenomeError, match="'main' is a branch") as error:
        read(origin, tmp_path, commit="main")
    assert "refs/heads/main" in error.value.remedy
    assert read(origin, tmp_path, commit="refs/heads/main")[2]["commit"] == SECOND
    git(origin, "tag", "-d", "main")


@pytest.mark.parametrize("commit", ["nowhere", "0" * 40])
def test_a_commit_that_is_not_there(origin, tmp_path, commit):
    with pytest.raises(GenomeError) as error:
        read(origin, tmp_path, commit=commit)
    assert commit in str(error.value) or str(origin) in str(error.value)


# integrity


def test_one_flipped_byte_in_any_object_is_found(origin, tmp_path):
    """Every object of the commit in turn is replaced by itself with one bit flipped, correctly packed: only a hash can tell."""
    import zlib

    store = tmp_path / "store"
    fetch(str(origin), SECOND, store)
    objects = sorted((store / "objects").glob("??/*"))
    assert len(objects) == 19  # a commit, 5 trees, 13 files and links

    def everything():
        with ObjectReader(store) as reader:
            _, tree = tree_of_commit(reader, SECOND)
            names = [entry.name for entry in tree_entries(reader, tree) if entry.mode != 0o160000]
            assert all(blob.content is not None for blob in reader.objects(names, 10**6))

    everything()
    for path in objects:
        good = path.read_bytes()
        raw = bytearray(zlib.decompress(good))
        body = raw.index(0) + 1
        if len(raw) == body:  # the empty file
            continue
        raw[body + (len(raw) - body) // 2] ^= 1
        path.chmod(0o644)
        path.write_bytes(zlib.compress(bytes(raw)))
        with pytest.raises(GenomeCorrupt):
            everything()
        path.write_bytes(good)
    everything()


def test_damage_of_a_pack_or_bundle_is_never_a_wrong_document(origin, tmp_path):
    bundle = tmp_path / "larva"
    git(origin, "bundle", "create", "--quiet", str(bundle), "main", "old")
    good = bundle.read_bytes()
    expected = read(bundle, tmp_path)[0]
    refused = 0
    positions = range(7, len(good), len(good) // 24)
    for position in positions:
        bundle.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        try:
            assert read(bundle, tmp_path)[0] == expected  # a letter of a branch's name: nothing that is read
        except GenomeError:
            refused += 1
    assert refused >= len(positions) - 4
    bundle.write_bytes(good[: len(good) * 2 // 3])
    with pytest.raises(GenomeError, match="bundle"):
        read(bundle, tmp_path)


def test_a_store_that_dies_in_the_middle_says_so(origin, tmp_path):
    store = tmp_path / "store"
    fetch(str(origin), SECOND, store)
    for path in (store / "objects").glob("??/*"):
        if path.stat().st_size > 400:  # a file, not a tree
            path.chmod(0o644)
            path.write_bytes(path.read_bytes()[:200])
    with ObjectReader(store) as reader:
        _, tree = tree_of_commit(reader, SECOND)
        names = [entry.name for entry in tree_entries(reader, tree) if entry.mode != 0o160000]
        with pytest.raises(GenomeCorrupt, match="git object"):
            list(reader.objects(names, 10**6))


# nothing of a repository runs


def test_nothing_that_a_repository_brings_along_is_run(origin, tmp_path):
    witness = tmp_path / "it ran"
    hostile = tmp_path / "larva"
    shutil.copytree(origin, hostile)
    script = f"#!/bin/sh\ntouch '{witness}'\nexit 0\n"
    (hostile / ".git" / "hooks").mkdir(exist_ok=True)
    for hook in (
        "post-checkout",
        "post-merge",
        "reference-transaction",
        "pre-receive",
        "fsmonitor-watchman",
        "post-index-change",
    ):
        (hostile / ".git" / "hooks" / hook).write_text(script)
        (hostile / ".git" / "hooks" / hook).chmod(0o755)
    run = hostile / ".git" / "run.sh"
    run.write_text(script)
    run.chmod(0o755)
    for key in ("core.fsmonitor", "core.sshCommand", "uploadpack.packObjectsHook", "core.gitProxy", "core.alternateRefsCommand",
                "diff.external", "filter.lfs.smudge", "filter.lfs.process", "credential.helper", "core.pager"):  # fmt: skip
        git(hostile, "config", key, str(run))
    (hostile / ".git" / "info").mkdir(exist_ok=True)
    (hostile / ".git" / "info" / "attributes").write_text("* filter=lfs diff=lfs\n")
    git(hostile, "config", "remote.origin.url", f"ext::{run}")
    git(hostile, "config", "remote.origin.promisor", "true")
    git(hostile, "config", "protocol.ext.allow", "always")
    git(hostile, "config", "core.hooksPath", str(hostile / ".git" / "hooks"))
    documents, _, _ = read(hostile, tmp_path)
    assert len(documents) == 9
    for path in (hostile / ".git" / "objects").glob("??/*"):  # a missing object that the repository would have fetched for us
        if path.name.startswith(git(hostile, "rev-parse", "main:src/run.py")[2:]):
            path.unlink()
    with pytest.raises(GenomeError):
        read(hostile, tmp_path)
    assert not witness.exists()


def test_the_users_own_configuration_is_not_read(origin, tmp_path, monkeypatch):
    witness = tmp_path / "it ran"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".gitconfig").write_text(f'[url "ext::touch {witness}"]\n insteadOf = "{origin}"\n')
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.ext::touch {witness}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", str(origin))
    assert len(read(origin, tmp_path)[0]) == 9
    assert not witness.exists()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("--upload-pack=touch x", "starts with a dash"),
        ("-oProxyCommand=touch x", "starts with a dash"),
        ("ext::sh -c touch% x", "runs a command"),
        ("fd::17", "runs a command"),
        ("ssh://-oProxyCommand=touch/x", "is no host"),
        ("ssh://me@-oProxyCommand=touch/x", "is no host"),
        ("-me@host:repository", "starts with a dash"),
        ("me@-host:repository", "ssh would read"),
        ("http://host/repository", "protocol 'http' is not used"),
        ("git://host/repository", "protocol 'git' is not used"),
        ("ftp://host/repository", "protocol 'ftp' is not used"),
        ("https://me:secret@host/repository", "holds a password"),
        ("https://host/repo\nsitory", "is no address"),
        ("", "is no address"),
    ],
)
def test_addresses_that_git_must_not_be_given(url, why):
    assert why in refused_url(url)
    with pytest.raises(ValueError, match=why):
        source(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://host/a/b.git",
        "https://me@host:8443/b",
        "ssh://git@host:22/b",
        "git@host:a/b.git",
        "file:///a/b",
        "../b",
        "~/b",
        "/a/b",
    ],
)
def test_addresses_that_are_good(url):
    assert refused_url(url) is None


@pytest.mark.parametrize("commit", ["-x", "--upload-pack=x", "a..b", "a b", "", "a:b", "a^", "HEAD~1", "a\nb"])
def test_commits_that_are_no_names(commit):
    with pytest.raises(ValueError, match="neither a full commit id"):
        source("https://host/b", commit=commit)


def test_no_git_is_told(origin, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GenomeError, match="needs the `git` program") as error:
        read(origin, tmp_path)
    assert "install git" in error.value.remedy


@pytest.mark.parametrize("name", [b"..", b".", b".git", b".GIT", b"a/b", b""])
def test_a_tree_with_a_name_that_is_none_is_refused(tmp_path, name):
    git(tmp_path, "init", "--quiet", "--bare", "larva.git")
    store = tmp_path / "larva.git"
    blob = git(store, "hash-object", "-w", "--stdin")
    content = b"100644 " + name + b"\0" + bytes.fromhex(blob)
    (tmp_path / "tree").write_bytes(content)
    tree = git(store, "hash-object", "-w", "-t", "tree", "--literally", str(tmp_path / "tree"))
    with ObjectReader(store) as reader, pytest.raises(GenomeCorrupt, match="no file name"):
        list(tree_entries(reader, tree))


def test_a_tree_that_holds_itself_a_thousandfold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("chrysalis_ray.genome.sources.git_objects.MAX_ENTRIES", 500)
    git(tmp_path, "init", "--quiet", "--bare", "larva.git")
    store = tmp_path / "larva.git"
    inner, mode = git(store, "hash-object", "-w", "--stdin"), b"100644"
    for _ in range(8):
        (tmp_path / "tree").write_bytes(b"".join(mode + b" %d\0" % n + bytes.fromhex(inner) for n in range(10)))
        inner, mode = git(store, "hash-object", "-w", "-t", "tree", str(tmp_path / "tree")), b"40000"
    with ObjectReader(store) as reader, pytest.raises(GenomeError, match="more than 500 entries"):
        list(tree_entries(reader, inner))


def tree_of(store, entries):
    (store / "tree").write_bytes(b"".join(mode + b" " + name + b"\0" + bytes.fromhex(of) for mode, name, of in entries))
    return git(store, "hash-object", "-w", "-t", "tree", str(store / "tree"))


def test_names_without_end_are_refused(tmp_path, monkeypatch):
    """A name of a megabyte, in a tree that stands a hundred times in another: a few kilobytes of a pack."""
    monkeypatch.setattr(git_objects, "MAX_PATH_BYTES", 10_000_000)
    git(tmp_path, "init", "--quiet", "--bare", "larva.git")
    store = tmp_path / "larva.git"
    long = tree_of(store, [(b"100644", b"n" * 1_000_000, git(store, "hash-object", "-w", "--stdin"))])
    few, many = ([(b"40000", b"%03d" % number, long) for number in range(count)] for count in (9, 100))
    with ObjectReader(store) as reader:
        assert len(list(tree_entries(reader, tree_of(store, few)))) == 9
        found = tree_entries(reader, tree_of(store, many))
        with pytest.raises(GenomeError, match="paths of more than 10000000 bytes"):
            print(len(list(found)))
    for _ in range(50):  # and one below the other
        long = tree_of(store, [(b"40000", b"d" * 10_000, long), (b"100644", b"file", few[0][2])])
    with ObjectReader(store) as reader, pytest.raises(GenomeError, match="paths of more than 10000000 bytes"):
        list(tree_entries(reader, long))


def test_one_file_under_names_without_end_is_refused(tmp_path, monkeypatch):
    git(tmp_path, "init", "--quiet", "--bare", "larva.git")
    store = tmp_path / "larva.git"
    (tmp_path / "file").write_text(words(1, 1000))
    size = (tmp_path / "file").stat().st_size
    blob = git(store, "hash-object", "-w", str(tmp_path / "file"))
    tree = tree_of(store, [(b"100644", b"%03d.txt" % number, blob) for number in range(100)])
    commit = git(store, "commit-tree", "-m", "copies", tree)
    assert len(read(store, tmp_path, commit=commit, domain="all")[0]) == 100
    monkeypatch.setattr(git_source, "MAX_COPIED_BYTES", 99 * size)
    assert len(read(store, tmp_path, commit=commit, domain="all")[0]) == 100
    monkeypatch.setattr(git_source, "MAX_COPIED_BYTES", 99 * size - 1)
    with pytest.raises(GenomeError, match="over and over"):
        read(store, tmp_path, commit=commit, domain="all")


# in a genome


def test_a_genome_of_two_commits_keeps_a_file_in_one_split(origin, tmp_path):
    old = {**source(origin, FIRST, domain="before").model_dump(), "licence": "MIT"}
    new = {**source(origin, SECOND, domain="after", glob="**/*.py").model_dump(), "licence": "MIT"}
    (tmp_path / "notes").mkdir()
    for number in range(20, 26):
        (tmp_path / "notes" / f"{number}.txt").write_text(words(number))
    notes = {"type": "folder", "path": "notes", "domain": "after"}
    one = build_genome(GenomeSpec.model_validate({"sources": [old, new, notes]}, strict=False), tmp_path / "g1", tmp_path)
    two = build_genome(GenomeSpec.model_validate({"sources": [notes, new, old]}, strict=False), tmp_path / "g2", tmp_path)
    assert one.genome_id == two.genome_id
    verify_genome(tmp_path / "g1")
    commits = {line["commit"] for line in one.manifest["content"]["sources"] if "commit" in line}
    assert commits == {FIRST, SECOND}
    parts = {}
    for domain in one.domains:
        for part in PARTS:
            for document in one.documents(domain, part):
                assert parts.setdefault(document.source_key, part) == part
    marks = {row["path"]: set(row.get("marks", ())) for row in one.manifest["content"]["documents"]}
    assert marks["larva/data/weights.md"] == {"lfs_pointer"}
    assert marks["larva/docs/latin.md"] == {"not_utf8"}
    assert parts[f"{origin}/data/weights.md"] == parts[f"{origin}/docs/latin.md"] == "excluded"


def test_a_source_needs_a_domain_and_only_one_way_to_it(origin):
    for more in ({"licence": "MIT"}, {"domain": "a", "domains_by": [{"domain": "b", "glob": "*"}]}):
        with pytest.raises(ValueError, match="either `domain` or `domains_by`"):
            source(origin, **more)
    with pytest.raises(ValueError, match="leaves the source"):
        source(origin, domain="a", glob="../*")


def test_a_capped_repository_gives_a_spread(origin, tmp_path):
    spec = GenomeSpec.model_validate(
        {"sources": [{"type": "git", "url": str(origin), "commit": SECOND, "domain": "d", "max_megabytes": 0.0045}]}
    )
    genome = build_genome(spec, tmp_path / "g", tmp_path)
    content = genome.manifest["content"]
    assert sum(row["bytes"] for row in content["documents"]) <= 4500
    assert content["skipped"]["over_cap"] > 0


def test_a_ctrl_c_after_git_is_done_stays_a_ctrl_c(monkeypatch, tmp_path):
    whole = subprocess.Popen.communicate

    def then_interrupted(self, *arguments, **settings):
        first = self.returncode is None
        said = whole(self, *arguments, **settings)
        if first:
            raise KeyboardInterrupt
        return said

    monkeypatch.setattr(subprocess.Popen, "communicate", then_interrupted)
    for patience in (None, 60.0):
        with pytest.raises(KeyboardInterrupt):
            git_program.git(["version"], tmp_path, patience)
