"""Denials: by path, by licence, by a robots-like file; one no is a no everywhere, and silence is neither consent nor denial."""

import pytest

from chrysalis_ray.config.experiment import GenomeSpec
from chrysalis_ray.config.genome import Denial
from chrysalis_ray.core.errors import GenomeError
from chrysalis_ray.genome.build import build_genome, refresh_genome, verify_genome
from chrysalis_ray.genome.denial import rules_of


def words(name, count=50):
    return " ".join(f"{name}w{number}" for number in range(count))


@pytest.fixture
def place(tmp_path):
    for folder in ("notes", "notes/private", "copies"):
        (tmp_path / folder).mkdir()
    for number in range(10):
        (tmp_path / "notes" / f"{number}.txt").write_text(words(f"n{number}x"))
        (tmp_path / "copies" / f"{number}.txt").write_text(words(f"c{number}x"))
    (tmp_path / "notes" / "private" / "diary.txt").write_text(words("diary"))
    (tmp_path / "copies" / "found.txt").write_text(words("diary"))
    (tmp_path / "notes" / "shared.txt").write_text("SPDX-License-Identifier: CC-BY-NC-4.0\n" + words("shared"))
    return tmp_path


def spec(*denials, **more):
    sources = [{"type": "folder", "path": folder, "domain": folder, "licence": "CC0-1.0"} for folder in ("notes", "copies")]
    return GenomeSpec.model_validate({"sources": sources, "use_denied": list(denials), **more}, strict=False)


def denied(genome):
    rows = genome.manifest["content"]["documents"]
    found = {row["path"]: row["marks"]["use_denied"] for row in rows if "use_denied" in row.get("marks", {})}
    assert {row["path"] for row in rows if row["split"] == "excluded"} == set(found)
    return found


def test_paths_licences_and_reasons(place):
    rules = [{"paths": "notes/1.*"}, {"licence": "*-NC-*", "reason": "not for sale"}]
    genome = build_genome(spec(*rules), place / "g", place)
    verify_genome(place / "g")
    assert denied(genome) == {"notes/1.txt": "path notes/1.*", "notes/shared.txt": "not for sale"}
    assert denied(build_genome(spec(*rules, exclude=[]), place / "g2", place)) == denied(genome)
    assert build_genome(spec(*rules[::-1]), place / "g3", place).genome_id == genome.genome_id
    assert denied(build_genome(spec(), place / "g4", place)) == {}


def test_the_same_text_found_elsewhere_is_denied_too(place):
    """``copies`` sorts first, so the text stands under its name; the no was said of the other."""
    assert denied(build_genome(spec({"paths": "notes/private/**"}), place / "g", place)) == {
        "copies/found.txt": "path notes/private/**"
    }


def test_a_robots_file_speaks_of_what_is_below(place):
    (place / "notes" / "robots.txt").write_text("User-agent: *\nDisallow: /private/\nDisallow: /2.txt$\n")
    rule = {"robots": "notes/robots.txt", "below": "notes"}
    genome = refresh_genome(spec(rule), place / "g", place)
    assert denied(genome) == {
        "copies/found.txt": "notes/robots.txt: Disallow: /private/",
        "notes/2.txt": "notes/robots.txt: Disallow: /2.txt$",
    }
    (place / "notes" / "robots.txt").write_text("User-agent: *\nDisallow: /3\n")
    assert set(denied(refresh_genome(spec(rule), place / "g", place))) == {"notes/3.txt"}
    with pytest.raises(GenomeError, match=r"absent\.txt cannot be read"):
        build_genome(spec({"robots": "absent.txt"}), place / "g5", place)
    (place / "long.txt").write_bytes(b"#" * (4 * 2**20 + 1))
    with pytest.raises(GenomeError, match="no file of rules is so long"):
        build_genome(spec({"robots": "long.txt"}), place / "g5", place)
    assert not (place / "g5").exists()


@pytest.mark.parametrize(
    ("text", "no", "yes"),
    [
        ("", [], ["/", "/a"]),
        ("Disallow: /a", [], ["/a"]),  # of no group
        ("User-agent: *\nDisallow:", [], ["/a"]),
        ("User-agent: *\nDisallow: /", ["/", "/a/b"], []),
        ("User-agent: somebot\nDisallow: /", [], ["/a"]),
        ("User-agent: somebot\nUser-agent: GPTBot\nDisallow: /a", ["/a", "/ab"], ["/b"]),
        ("user-agent: somebot\nDisallow: /b\n\nUSER-AGENT: CCBot\ndisallow: /a # why\n", ["/a/x"], ["/b"]),
        ("User-agent: *\nDisallow: /a\nAllow: /a/b", ["/a", "/a/c"], ["/a/b", "/a/b/c"]),
        ("User-agent: *\nDisallow: /a\nAllow: /a", [], ["/a"]),
        ("User-agent: *\nDisallow: /*.txt$", ["/a.txt", "/b/c.txt"], ["/a.txt.md", "/a.md"]),
        ("User-agent: *\nDisallow: /a+b", ["/a+b"], ["/aab"]),
        ("User-agent: *\nAllow: /\n\nUser-agent: ClaudeBot\nDisallow: /", ["/a"], []),
        ("User-agent: *\nContent-Usage: train-ai=n\nAllow: /", ["/a"], []),
        ("User-agent: *\nContent-Usage: /docs/ train-ai=n", ["/docs/a"], ["/a"]),
        ("User-agent: *\nContent-Usage: /d/ train-ai=n\nContent-Usage: /d/open/ train-ai=y", ["/d/a"], ["/d/open/a"]),
        ("User-agent: somebot\nContent-Usage: train-ai=n", [], ["/a"]),
        ("Content-Usage: search=y, train-ai=n", ["/a"], []),
        ("Content-Usage: search=n", [], ["/a"]),
        ("User-agent: *\nDisallow: /a" + "*" * 50 + "b", ["/axxxb"], ["/axxx"]),
    ],
)  # fmt: skip
def test_rules_decide_as_the_standard_says(text, no, yes):
    rules = rules_of(text)
    assert all(rules(path) is not None for path in no)
    assert [path for path in yes if rules(path) is not None] == []


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ({}, "exactly one"),
        ({"paths": "a", "licence": "b"}, "exactly one"),
        ({"paths": "../a"}, "leaves the source"),
        ({"licence": "b", "below": "x"}, "belongs to `robots`"),
    ],
)
def test_a_denial_says_one_thing(written, why):
    with pytest.raises(ValueError, match=why):
        Denial.model_validate(written)


def test_a_domain_of_which_everything_is_denied_is_told(place):
    with pytest.raises(GenomeError, match=r"domain 'copies' has no document .*: 11 use_denied"):
        build_genome(spec({"paths": "copies/**"}), place / "g", place)
