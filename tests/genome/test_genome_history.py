"""Several snapshots of one repository: ordered domains, each with what it brought, silent for small bases by default."""

import subprocess
from collections import Counter

import pytest
from test_genome_git import git, words
from typer.testing import CliRunner

from chrysalis_ray.cli.main import app
from chrysalis_ray.config.experiment import Experiment, GenomeSpec
from chrysalis_ray.config.genome import HistorySource
from chrysalis_ray.config.histories import heard_by_default
from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.genome.build import build_genome, refresh_genome, verify_genome
from chrysalis_ray.genome.forgetting import of_source
from chrysalis_ray.genome.framing import read_text, write_text
from chrysalis_ray.genome.sources.history import read_history
from chrysalis_ray.genome.sources.sources import read_source
from chrysalis_ray.population.mixes import heard_domains

COUNT = 12


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Four states of a book, a year apart: each rewrites every chapter; the second is tagged twice, once as an object."""
    folder = tmp_path_factory.mktemp("history") / "book"
    folder.mkdir()
    git(folder, "init", "--quiet", "--template=", "--initial-branch=main")
    for year in range(4):
        for chapter in range(COUNT):
            (folder / f"{chapter}.md").write_text(words(1000 * (year + 1) + chapter))
        (folder / "preface.md").write_text(words(7))
        git(folder, "add", ".")
        date = {f"GIT_{role}_DATE": f"20{20 + year}-01-02T03:04:05+0000" for role in ("AUTHOR", "COMMITTER")}
        git(folder, "commit", "--quiet", "--message", f"state {year}", **date)
        git(folder, "tag", f"v{year}")
    git(folder, "tag", "--annotate", "--message", "a tag object", "second", "v1")
    return folder


def history(book, *snapshots, **more):
    return {"type": "history", "url": str(book), "domain": "old", "snapshots": list(snapshots), **more}


def today(book, domain="zz"):
    return {"type": "git", "url": str(book), "commit": "main", "domain": domain}


def read(book, tmp_path, *snapshots, **more):
    skipped, facts = Counter(), {}
    source = HistorySource.model_validate(history(book, *snapshots, **more), strict=False)
    return list(read_history(source, tmp_path, skipped, facts)), dict(skipped), facts


def test_every_snapshot_is_a_domain_of_what_it_brought(book, tmp_path):
    first = git(book, "rev-parse", "v0")
    documents, skipped, facts = read(book, tmp_path, first, "v1", "v2")
    assert Counter(document.domain for document in documents) == {"old-000": COUNT + 1, "old-001": COUNT, "old-002": COUNT}
    assert skipped == {"unchanged": 2}, "the preface is in all three"
    assert {document.path for document in documents if document.domain == "old-001"} == {
        f"book@v1/{n}.md" for n in range(COUNT)
    }
    assert f"book@{first[:12]}/0.md" in {document.path for document in documents}
    assert {document.source_key for document in documents if document.path.endswith("/3.md")} == {f"{book}/3.md"}
    for number, told in enumerate(facts["snapshots"]):
        assert told["commit"] == git(book, "rev-parse", f"v{number}")
        assert told["tree"] == git(book, "rev-parse", f"v{number}^{{tree}}")
        assert told["committed"] == int(git(book, "log", "-1", "--format=%ct", f"v{number}"))
        assert told["domain"] == f"old-{number:03d}"


def test_a_tag_object_and_its_commit_are_one_snapshot(book, tmp_path):
    assert read(book, tmp_path, "second")[2]["snapshots"][0]["commit"] == git(book, "rev-parse", "v1")
    identity = git(book, "rev-parse", "second")  # of the tag itself
    assert identity != git(book, "rev-parse", "v1")
    assert read(book, tmp_path, identity)[0][0].content == read(book, tmp_path, "v1")[0][0].content


def test_snapshots_out_of_order_and_without_news_are_refused(book, tmp_path):
    with pytest.raises(GenomeError, match=r"'v0' \(2020-01-02\) is older than the one before it, 'v1' \(2021-01-02\)") as error:
        read(book, tmp_path, "v1", "v0")
    assert "oldest snapshot first" in error.value.remedy
    with pytest.raises(GenomeError, match="'second' brings no document"):
        read(book, tmp_path, "v1", "second")
    with pytest.raises(GenomeError, match="no branch or tag 'v9'"):
        read(book, tmp_path, "v0", "v9")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"snapshots": ["v0", "v0"]}, "named twice"),
        ({"snapshots": []}, "at least 1"),
        ({"snapshots": ["--upload-pack=x"]}, "neither a full commit id"),
        ({"url": "ext::sh -c 'touch /tmp/x'"}, "names a transport that runs a command"),
        ({"url": "-oProxyCommand=x"}, "starts with a dash"),
        ({"glob": "../*"}, "leaves the source"),
        ({"domain": "x" * 61}, "should match pattern"),
    ],
)
def test_what_git_must_not_be_given(book, more, why):
    with pytest.raises(ValueError, match=why):
        HistorySource.model_validate({**history(book, "v0"), **more}, strict=False)


def test_a_history_yields_to_the_state_of_today(book, tmp_path):
    """Whatever the names sort like: what is still there belongs to today, so that silence of the past loses nothing."""
    for name in ("zz", "aa"):
        sources = [history(book, "v0", "v1", "v2"), today(book, name)]
        spec = GenomeSpec.model_validate({"sources": sources}, strict=False)
        genome = build_genome(spec, tmp_path / name, tmp_path)
        preface = [row for row in genome.manifest["content"]["documents"] if row["path"].endswith("preface.md")]
        assert [row["domain"] for row in preface] == [name]
        verify_genome(tmp_path / name)
        other = GenomeSpec.model_validate({"sources": sources[::-1]}, strict=False)
        assert build_genome(other, tmp_path / f"{name}2", tmp_path).genome_id == genome.genome_id
        write_text(genome, tmp_path / f"{name}.txt")
        assert len(list(read_text(tmp_path / f"{name}.txt"))) == 4 * COUNT + 1
        splits = {}
        for row in genome.manifest["content"]["documents"]:
            splits.setdefault(row["path"].rpartition("/")[2], set()).add(row["split"])
        assert all(len(parts) == 1 for parts in splits.values()), "a chapter is in one split in all its states"


def test_a_moved_tag_is_seen_and_a_history_can_be_forgotten(book, tmp_path):
    clone = tmp_path / "book"
    subprocess.run(["git", "clone", "--quiet", str(book), str(clone)], check=True, capture_output=True)
    spec = GenomeSpec.model_validate({"sources": [history(clone, "v0", "v1"), today(clone)]}, strict=False)
    first = refresh_genome(spec, tmp_path / "g", tmp_path)
    written = (tmp_path / "g" / "manifest.json").stat().st_mtime_ns
    assert refresh_genome(spec, tmp_path / "g", tmp_path).genome_id == first.genome_id
    assert (tmp_path / "g" / "manifest.json").stat().st_mtime_ns == written
    git(clone, "tag", "--force", "v1", "v2")
    moved = refresh_genome(spec, tmp_path / "g", tmp_path)
    assert moved.genome_id != first.genome_id
    rows = of_source(moved, str(clone))
    assert {row["domain"] for row in rows} == {"old-000", "old-001", "zz"}


def test_a_cap_holds_for_each_snapshot(book, tmp_path):
    documents, skipped, _ = read(book, tmp_path, "v0", "v1", max_megabytes=0.003)
    sizes = Counter()
    for document in documents:
        sizes[document.domain] += document.size
    assert set(sizes) == {"old-000", "old-001"}
    assert max(sizes.values()) <= 3000
    assert skipped["over_cap"] > 0


def test_read_source_counts_one_source(book, tmp_path):
    source = HistorySource.model_validate(history(book, "v0"), strict=False)
    assert len(list(read_source(source, tmp_path, Counter(), {}))) == COUNT + 1


# who hears it


def experiment(epigenomes, **more):
    written = {
        "name": "x",
        "blueprint": "tiny",
        "genome": {"sources": [history("/book", "a", "b", **more), today("/book", "now")]},
        "population": {"variants": 4, "tokens_per_variant": 100, "epigenomes": epigenomes},
    }
    return Experiment.model_validate(written, strict=False)


DOMAINS = ("now", "old-000", "old-001")


@pytest.mark.parametrize("kind", ["brightened", "dirichlet", "simplex_grid"])
def test_a_small_base_hears_no_history_unless_told(kind):
    told = []
    heard = heard_domains(experiment({"type": kind}), DOMAINS, 600_000_000, lambda *line: told.append(line))
    assert heard == ("now",)
    ((stage, why),) = told
    assert stage == "mixes"
    assert "old-000 to old-001 (2 domains) at level 0" in why
    assert "600 million parameters is small (below 3 billion)" in why
    assert heard_by_default(experiment({"type": kind}), DOMAINS, 8_000_000_000) == (DOMAINS, None)
    assert heard_by_default(experiment({"type": kind}, heard="always"), DOMAINS, 600_000_000) == (DOMAINS, None)
    domains, note = heard_by_default(experiment({"type": kind}), DOMAINS, None)
    assert domains == DOMAINS
    assert "not known yet" in note


def test_what_a_mix_names_is_heard():
    levels = {"type": "levels", "levels": {"old-001": {"type": "uniform", "low": 0.1, "high": 2.0}}}
    assert heard_by_default(experiment(levels), DOMAINS, 10**9)[0] == ("now", "old-001")
    dirichlet = {"type": "dirichlet", "concentrations": {"old-000": 2.0}}
    assert heard_by_default(experiment(dirichlet), DOMAINS, 10**9)[0] == ("now", "old-000")
    listed = {"type": "listed", "mixes": [{"name": "m", "express": {"old-000": 1.0}}]}
    assert heard_by_default(experiment(listed), DOMAINS, 10**9) == (DOMAINS, None)


def test_a_genome_of_nothing_but_history_is_heard():
    assert heard_by_default(experiment({"type": "dirichlet"}), DOMAINS[1:], 10**9) == (DOMAINS[1:], None)


EXPERIMENT = """\
name: past
blueprint: tiny
genome:
  sources:
    - {type: git, url: book, commit: main, domain: now}
    - {type: history, url: book, domain: old, snapshots: [v0, v1]}
    - {type: records, path: hub.jsonl, domain: hubs}
  use_denied: [{licence: "*-NC-*"}, {robots: robots.txt, below: book}]
  forget: forgotten.jsonl
population:
  variants: 3
  tokens_per_variant: 4096
  epigenomes: {type: brightened}
"""


def test_the_plan_says_who_hears_no_history(book, tmp_path):
    """From the YAML: a small embedded base, and every new key of a genome."""
    (tmp_path / "book").symlink_to(book)
    for name in ("hub.jsonl", "robots.txt", "forgotten.jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "past.yaml").write_text(EXPERIMENT)
    told = CliRunner().invoke(app, ["plan", str(tmp_path / "past.yaml")])
    assert told.exit_code == 0, told.output
    assert "domains (hubs, now, old-000, old-001)" in told.stdout
    assert "old-000 to old-001 (2 domains) at level 0: older states of what is heard already" in told.stdout
    loud = CliRunner().invoke(app, ["plan", str(tmp_path / "past.yaml"), "--set", "genome.sources.1.heard=always"])
    assert loud.exit_code == 0, loud.output
    assert "at level 0" not in loud.stdout
