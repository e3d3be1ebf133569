"""The page on judging: units, the bound, and the variants before they were merged."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from test_html import HOSTILE, _page

from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import MIXTURE, read_json, write_json
from chrysalis_ray.report.comparison import read_run
from chrysalis_ray.report.judgement import audit_section, label_heights, metric_tables, with_others
from chrysalis_ray.report.sections import report_split


def test_every_candidate_is_told_in_every_unit_that_is_known(judged: RunLayout) -> None:
    comparison = read_run(judged.root)
    text = metric_tables(comparison, comparison.variants)
    code, unicode = (text[text.index(f"<h3>{domain}</h3>") :] for domain in ("code", "unicode"))
    losses = comparison.variants[0].domain_losses
    for unit in (losses["code"], math.exp(losses["code"]), losses["code"] / 4 / math.log(2), 1 / losses["code"]):
        assert f"data-v='{unit!r}'" in code
    assert "<td data-v=''>–</td>" in unicode  # nobody counted its bytes
    above = text[: text.index("<details>")]
    assert above.count("<td data-v=''>–</td>") == len(comparison.variants) + 3 + 1  # so that no mean of them is told
    mean = sum(losses.values()) / len(losses)
    assert f"data-v='{math.exp(mean)!r}'" in above
    assert above.count("class='chosen'") == 1
    page, _ = _page(judged)
    assert "In other units" in " ".join(page.words)


def test_the_mixture_stands_beside_what_is_told_on_report(judged: RunLayout) -> None:
    comparison = read_run(judged.root)
    assert comparison.bound is not None
    text = report_split(comparison, 64)
    assert f"<b>{MIXTURE}</b>: all asked together" in text
    assert f"{comparison.bound.mean:.3f}" in text


def test_the_audit_shows_who_pulls_and_whereto(judged: RunLayout) -> None:
    comparison = read_run(judged.root)
    text = audit_section(comparison, comparison.variants)
    assert text.count('<g class="point">') == 8
    assert "34%" in text
    assert "4% by chance for 8" in text
    assert "a ridge is needed" in text
    assert "<li>outlier: v007-code</li>" in text
    assert "length 30, cosine +0.026" in text


def test_a_run_that_was_judged_before_there_were_units_and_audits_has_its_page(judged: RunLayout) -> None:
    judged.audit.unlink()
    verdict = read_json(judged.verdict)
    del verdict["select"]["metrics"], verdict["report"]["loss"][MIXTURE]
    write_json(judged.verdict, verdict)
    page, _ = _page(judged)
    words = " ".join(page.words)
    assert "In other units" not in words
    assert "Before merging" not in words
    assert MIXTURE not in words
    assert "On text that chose nothing" in words


@pytest.mark.parametrize("wrong", ["names", "shapes", "numbers", "nothing"])
def test_an_audit_that_somebody_touched_breaks_nothing(judged: RunLayout, wrong: str) -> None:
    audit = read_json(judged.audit)
    if wrong == "names":
        audit |= {"findings": [HOSTILE, 7], "adapters": [row | {"name": HOSTILE} for row in audit["adapters"]]}
    elif wrong == "shapes":
        audit |= {"adapters": [row | {"cosines": [1.0]} for row in audit["adapters"]], "agreement": [1]}
    elif wrong == "numbers":
        audit |= {"adapters": [row | {"norm": "long", "rank": None} for row in audit["adapters"]], "condition": "ill"}
    else:
        audit = {"adapters": [{}, {}, {}]}
    write_json(judged.audit, audit)
    page, text = _page(judged)
    assert page.count("script") == 1
    assert page.count("img") == 0
    assert ("Before merging" in " ".join(page.words)) is True
    assert ('class="chart pull"' in text) == (wrong == "names")


def test_the_cosine_with_the_others_is_that_of_the_vectors() -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 7)) * np.array([[1], [3], [0.2], [5], [0]])
    norms = np.linalg.norm(vectors, axis=1)
    lengths = np.where(norms > 0, norms, 1.0)
    cosines = (vectors @ vectors.T / np.outer(lengths, lengths)).tolist()
    for place in range(4):
        others = np.delete(vectors, place, 0).sum(0)
        expected = vectors[place] @ others / norms[place] / np.linalg.norm(others)
        assert with_others(place, norms.tolist(), cosines) == pytest.approx(expected)
    assert with_others(4, norms.tolist(), cosines) == 0.0


def test_names_of_points_close_together_do_not_overlap() -> None:
    points = [(100.0, 200.0), (110.0, 203.0), (120.0, 198.0), (300.0, 200.0)]
    heights = label_heights(points)
    near = sorted(heights[:3])
    assert all(below - above >= 12.0 for above, below in itertools.pairwise(near))
    assert heights[3] == 200.0
    assert max(heights) <= 203.0
