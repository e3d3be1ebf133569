"""Submodules that are followed: pinned, fetched as any source is, and refused wherever an address could lead astray."""

import subprocess
from collections import Counter

import pytest
from test_genome_git import commit, git, words

from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.config.genome import GitSource
from chrysalis_ray.core.errors import GenomeCorrupt, GenomeError
from chrysalis_ray.genome.build import build_genome, verify_genome
from chrysalis_ray.genome.forgetting import of_source
from chrysalis_ray.genome.sources.git_source import read_git
from chrysalis_ray.genome.sources.git_submodules import DEEPEST, _followed_url


def store(folder, content):
    (folder / "blob").write_bytes(content)
    name = git(folder, "hash-object", "-w", "--no-filters", "blob")
    (folder / "blob").unlink()
    return name


def make(folder, files, links=(), modules=None, mode=None):
    """A repository of `files` with gitlinks (path, url, commit); `modules` is its .gitmodules, by default that of the links."""
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet", "--template=", "--initial-branch=main")
    if modules is None and links:
        modules = "".join(f'[submodule "{path}"]\n\tpath = {path}\n\turl = {url}\n' for path, url, _ in links)
    everything = {**files, **({".gitmodules": modules} if modules is not None else {})}
    for path, text in everything.items():
        git(folder, "update-index", "--add", "--cacheinfo", f"100644,{store(folder, text.encode())},{path}")
    for path, _, pinned in links:
        git(folder, "update-index", "--add", "--cacheinfo", f"160000,{pinned},{path}")
    tree = git(folder, "write-tree")
    if mode is not None:  # git itself would not put such a .gitmodules into its index
        lines = git(folder, "ls-tree", tree).replace("100644 blob", f"{mode} blob", 1) + "\n"
        done = subprocess.run(["git", "mktree"], cwd=folder, input=lines.encode(), capture_output=True, check=True)
        tree = done.stdout.decode().strip()
    made = git(folder, "commit-tree", "-m", "a message", tree)
    git(folder, "update-ref", "refs/heads/main", made)
    return made


def read(url, pinned, relative_to, submodules="follow", **more):
    more = more or {"domains_by": [{"domain": "code", "glob": "**/*.py"}, {"domain": "docs", "glob": "**/*.md"}]}
    source = GitSource.model_validate(
        {"type": "git", "url": str(url), "commit": pinned, "submodules": submodules, **more}, strict=False
    )
    skipped, facts = Counter(), {}
    documents = list(read_git(source, relative_to, skipped, facts))
    return documents, dict(skipped), facts


@pytest.fixture
def family(tmp_path):
    """A repository with a submodule that has one itself, all addresses relative."""
    inner = make(tmp_path / "inner", {"deep.md": words(1), "LICENSE": "x"})
    first = make(tmp_path / "child", {"one.py": words(2)}, [("lib/inner", "../inner", inner)])
    git(tmp_path / "child", "commit-tree", "-m", "later", git(tmp_path / "child", "write-tree"))
    pinned = make(tmp_path / "parent", {"top.py": words(3), "README.md": words(4)}, [("vendor/child", "../child", first)])
    return pinned, first, inner


def test_files_of_submodules_stand_below_their_paths_and_everything_is_recorded(family, tmp_path):
    pinned, child, inner = family
    for url in (tmp_path / "parent", "parent", f"file://{tmp_path}/parent"):
        documents, skipped, facts = read(url, pinned, tmp_path)
        assert {document.path: (document.text, document.domain) for document in documents} == {
            "parent/top.py": (words(3), "code"),
            "parent/README.md": (words(4), "docs"),
            "parent/vendor/child/one.py": (words(2), "code"),
            "parent/vendor/child/lib/inner/deep.md": (words(1), "docs"),
        }
        assert facts["commit"] == pinned
        assert facts["submodules"] == {"vendor/child": child}
        told = [(module["path"], module["commit"], module["objects_verified"] > 1) for module in facts["followed"]]
        assert told == [("vendor/child", child, True), ("vendor/child/lib/inner", inner, True)]
        assert skipped["unmatched"] == 3  # two .gitmodules, one LICENSE
    assert [module["url"] for module in read("parent", pinned, tmp_path)[2]["followed"]] == ["./child", "./inner"]
    recorded, _, facts = read("parent", pinned, tmp_path, "record")
    assert {document.path for document in recorded} == {"parent/top.py", "parent/README.md"}
    assert "followed" not in facts


def test_git_itself_checks_out_the_same_files(family, tmp_path):
    parent = str(tmp_path / "parent")
    git(tmp_path, "-c", "protocol.file.allow=always", "clone", "--quiet", "--recurse-submodules", parent, "checked out")
    root = tmp_path / "checked out"
    expected = {path.relative_to(root).as_posix(): path.read_bytes() for glob in ("*.py", "*.md") for path in root.rglob(glob)}
    documents, _, _ = read("parent", family[0], tmp_path)
    assert {document.path.removeprefix("parent/"): document.content for document in documents} == expected


def test_a_file_has_the_key_of_its_own_repository(family, tmp_path):
    """So it shares a split with itself, where its repository is a source too."""
    pinned, child, _ = family
    below = {document.doc_id: document.source_key for document in read("parent", pinned, tmp_path)[0]}
    alone = {document.doc_id: document.source_key for document in read("./child", child, tmp_path, "record")[0]}
    assert alone.items() <= below.items()


def test_globs_and_caps_are_of_the_whole(family, tmp_path):
    pinned, _, _ = family
    documents, _, _ = read("parent", pinned, tmp_path, domain="d", glob="vendor/**/*.md")
    assert [document.path for document in documents] == ["parent/vendor/child/lib/inner/deep.md"]
    spread = [document.path for document in read("parent", pinned, tmp_path, domain="d", max_megabytes=1.0)[0]]
    assert sorted(spread) == sorted(document.path for document in read("parent", pinned, tmp_path, domain="d")[0])


def test_a_genome_with_submodules_is_the_same_again_and_can_forget_them(family, tmp_path):
    pinned, _, _ = family
    (tmp_path / "notes").mkdir()
    for number in range(20, 28):
        (tmp_path / "notes" / f"{number}.txt").write_text(words(number))
    notes = {"type": "folder", "path": "notes", "domain": "d"}
    parent = {"type": "git", "url": "parent", "commit": pinned, "domain": "d", "submodules": "follow"}
    one = build_genome(GenomeSpec.model_validate({"sources": [parent, notes]}), tmp_path / "g1", tmp_path)
    two = build_genome(GenomeSpec.model_validate({"sources": [notes, parent]}), tmp_path / "g2", tmp_path)
    assert one.genome_id == two.genome_id == verify_genome(tmp_path / "g1").genome_id
    (line,) = [line for line in one.manifest["content"]["sources"] if line["recipe"]["type"] == "git"]
    assert [module["path"] for module in line["followed"]] == ["vendor/child", "vendor/child/lib/inner"]
    paths = {row["path"] for row in of_source(one, "parent")}
    assert paths >= {"parent/top.py", "parent/vendor/child/one.py", "parent/vendor/child/lib/inner/deep.md"}
    assert all(path.startswith("parent/") for path in paths)
    plain = GenomeSpec.model_validate({"sources": [{**parent, "submodules": "record"}, notes]})
    assert "submodules" not in plain.model_dump()["sources"][0]  # the recipe that it had before there was such a key


# attacks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "parent", "means"),
    [
        ("../b.git", "https://host/team/a.git", "https://host/team/b.git"),
        ("../../other/b", "https://me@host:8443/team/a/", "https://me@host:8443/other/b"),
        ("./b", "ssh://git@host/a", "ssh://git@host/a/b"),
        ("../b", "git@host:team/a", "git@host:team/b"),
        ("../b", "git@host:/team/a", "git@host:/team/b"),
        ("../b", "/srv/a", "/srv/b"),
        ("../b", "a", "./b"),
        ("../../b", "a", "../b"),
        ("../b", "~/a", "~/b"),
        ("../b", "file:///srv/a", "file:///srv/b"),
        ("../x:y", "a", "./x:y"),
        ("https://host/b", "https://host/a", "https://host/b"),
        ("git@host:b", "/srv/a", "git@host:b"),
        ("/srv/b", "/srv/a", "/srv/b"),
    ],
)
def test_addresses_are_resolved_as_git_does(url, parent, means):
    assert _followed_url(url, parent, "vendor") == means


@pytest.mark.parametrize(
    ("url", "parent", "why"),
    [
        ("ext::sh -c touch% x", "https://host/a", "runs a command"),
        ("fd::17", "/srv/a", "runs a command"),
        ("--upload-pack=touch x", "https://host/a", "starts with a dash"),
        ("-oProxyCommand=touch", "/srv/a", "starts with a dash"),
        ("ssh://-oProxyCommand=touch/x", "https://host/a", "is no host"),
        ("git@-oProxyCommand=x:b", "https://host/a", "neither an address"),
        ("git@-host:b", "https://host/a", "ssh would read"),
        ("http://host/b", "https://host/a", "protocol 'http' is not used"),
        ("git://host/b", "https://host/a", "protocol 'git' is not used"),
        ("file:///etc", "https://host/a", "lies on this machine"),
        ("/etc", "https://host/a", "lies on this machine"),
        ("/etc", "git@host:a", "lies on this machine"),
        ("file:///home/me/private", "ssh://git@host/a", "lies on this machine"),
        ("https://localhost/b", "https://host/a", "lies on this machine"),
        ("ssh://git@LOCALHOST.:2222/home/me/private", "https://host/a", "lies on this machine"),
        ("me@127.1:private", "https://host/a", "lies on this machine"),
        ("https://0x7f000001/b", "git@host:a", "lies on this machine"),
        ("https://[::1]:8443/b", "https://host/a", "lies on this machine"),
        ("https://[::ffff:127.0.0.1]/b", "https://host/a", "lies on this machine"),
        ("https://169.254.169.254/latest", "https://host/a", "lies on this machine"),
        ("b", "/srv/a", "neither an address nor relative"),
        ("~/private", "/srv/a", "neither an address nor relative"),
        ("", "https://host/a", "no address"),
        ("https://me:secret@host/b", "https://host/a", "holds a password"),
        ("https://host/b\nx", "https://host/a", "no address"),
        ("../../../b", "https://host/team/a", "leads out of"),
        ("../../b", "git@host:a", "leads out of"),
        ("../..", "https://host/a", "leads out of"),
        ("../../b", "~/a", "leads out of"),
        ("../--upload-pack=x", "git@host:a", "ssh would read"),
    ],
)
def test_addresses_that_are_not_followed(url, parent, why):
    with pytest.raises(GenomeError, match=why) as error:
        _followed_url(url, parent, "vendor/x")
    assert "the submodule 'vendor/x' is not followed" in error.value.message
    assert "secret" not in str(error.value)
    assert "submodules: follow" in error.value.remedy


def test_nothing_that_a_submodule_says_of_itself_is_run(tmp_path):
    witness = tmp_path / "it ran"
    child = make(tmp_path / "child", {"one.py": words(1)})
    modules = (
        f'[submodule "../../x"]\n\tpath = vendor\n\turl = ../child\n\tupdate = !touch "{witness}"\n\tbranch = --upload-pack=x\n'
        f"[core]\n\tfsmonitor = touch {witness}\n\tsshCommand = touch {witness}\n[include]\n\tpath = {tmp_path}/more\n"
    )
    (tmp_path / "more").write_text('[submodule "y"]\n\tpath = vendor\n\turl = ext::sh\n')
    pinned = make(tmp_path / "parent", {"top.py": words(2)}, [("vendor", "", child)], modules)
    documents, _, _ = read("parent", pinned, tmp_path)
    assert [document.path for document in documents] == ["parent/top.py", "parent/vendor/one.py"]
    assert not witness.exists()
    assert not (tmp_path.parent / "x").exists()


@pytest.mark.parametrize(
    ("modules", "mode", "why"),
    [
        (None, None, "the submodule 'vendor' has no url in .gitmodules"),
        ('[submodule "v"]\n\tpath = other\n\turl = ../child\n', None, "has no url in .gitmodules"),
        ('[submodule "v"]\n\tpath = vendor\n', None, "has no url in .gitmodules"),
        ('[submodule "v"\n', None, ".gitmodules cannot be read"),
        ("../child", "120000", ".gitmodules is no file"),
        (
            '[submodule "a"]\n\tpath = vendor\n\turl = ../child\n[submodule "b"]\n\tpath = vendor/\n\turl = ../x\n',
            None,
            "two urls",
        ),
        (
            '[submodule "a"]\n\tpath = vendor\n\turl = ../nowhere\n',
            "100644",
            "the submodule 'vendor' of parent: .*no repository",
        ),
        ('[submodule "a"]\n\tpath = vendor\n\turl = ext::sh -c x\n', None, "runs a command"),
    ],
)
def test_gitmodules_that_say_nothing_of_use(tmp_path, modules, mode, why):
    child = make(tmp_path / "child", {"one.py": words(1)})
    pinned = make(tmp_path / "parent", {"top.py": words(2)}, [("vendor", "", child)], modules or "", mode)
    with pytest.raises(GenomeError, match=why):
        read("parent", pinned, tmp_path)
    assert len(read("parent", pinned, tmp_path, "record")[0]) == 1


def test_a_pinned_commit_that_is_not_there_and_a_damaged_object(family, tmp_path):
    pinned, child, _ = family
    lost = make(tmp_path / "lost", {"top.py": words(9)}, [("vendor", "../child", "12" * 20)])
    with pytest.raises(GenomeError, match=r"the submodule 'vendor' of lost: .*is missing"):
        read("lost", lost, tmp_path)
    blob = git(tmp_path / "inner", "rev-parse", "main:deep.md")
    path = tmp_path / "inner" / ".git" / "objects" / blob[:2] / blob[2:]
    path.chmod(0o644)
    path.write_bytes((tmp_path / "child" / ".git" / "objects" / child[:2] / child[2:]).read_bytes())
    with pytest.raises(GenomeCorrupt, match=r"the submodule 'vendor/child/lib/inner' of .*hash"):
        read("parent", pinned, tmp_path)


def test_recursion_that_does_not_end_soon_is_refused(tmp_path):
    first = make(tmp_path / "snake", {"a.py": words(1)})
    git(tmp_path / "snake", "update-index", "--add", "--cacheinfo", f"160000,{first},tail")
    modules = store(tmp_path / "snake", b'[submodule "t"]\n\tpath = tail\n\turl = ../snake/\n')
    git(tmp_path / "snake", "update-index", "--add", "--cacheinfo", f"100644,{modules},.gitmodules")
    pinned = commit(tmp_path / "snake", "-p", first)
    with pytest.raises(GenomeError, match="'tail' is the repository that it stands in"):
        read("snake", pinned, tmp_path)
    below = make(tmp_path / "r0", {"a.py": words(2)})
    for depth in range(1, DEEPEST + 2):
        below = make(tmp_path / f"r{depth}", {"a.py": words(2 + depth)}, [("s", f"../r{depth - 1}", below)])
        if depth == DEEPEST:
            assert len(read(f"r{depth}", below, tmp_path)[0]) == DEEPEST + 1
    with pytest.raises(GenomeError, match=f"more than {DEEPEST} deep"):
        read(f"r{DEEPEST + 1}", below, tmp_path)


def test_a_bomb_of_submodules_is_refused(tmp_path, monkeypatch):
    """Two of the next level in each: 2^levels of them cost their author nothing."""
    monkeypatch.setattr("chrysalis_ray.genome.sources.git_source.MOST", 5)
    below = make(tmp_path / "b0", {"a.py": words(1)})
    for depth in range(1, 4):
        links = [("x", f"../b{depth - 1}", below), ("y", f"../b{depth - 1}", below)]
        below = make(tmp_path / f"b{depth}", {"a.py": words(1 + depth)}, links)
    with pytest.raises(GenomeError, match="after 5 others"):
        read("b3", below, tmp_path)


def test_the_yaml_says_follow_or_record():
    with pytest.raises(ValueError, match=r"record.*follow"):
        GitSource.model_validate({"type": "git", "url": "a", "commit": "b", "domain": "d", "submodules": "yes"})
