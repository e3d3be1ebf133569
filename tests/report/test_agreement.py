"""How far candidates are from their members stands on the page, where a verdict tells it."""

from __future__ import annotations

from test_html import HOSTILE, _page

from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.report.agreement import agreement_section
from chrysalis_ray.report.comparison import read_run


def told(layout: RunLayout, majority: float | None) -> dict:
    """A verdict that tells of the seed, the winner, two merges and one that nobody knows."""
    verdict = read_json(layout.verdict)
    members = [verdict["winner"], HOSTILE]
    verdict["report"]["agreement"] = {
        name: {
            "members": members,
            "divergence": {"mean": apart, "low": apart - 0.01, "high": apart + 0.02},
            "beyond_spread": {"mean": apart - 0.0125, "low": 0.0, "high": 1.0},
            "spread": 0.0125,
            "agreement": {"mean": 0.875, "low": 0.8, "high": 0.9},
            "with_mixture": {"mean": 0.9375, "low": 0.9, "high": 0.95},
            "with_majority": majority,
            "majorities": 0.96875,
            "by_member": {
                member: {"divergence": apart + 0.001, "agreement": 0.8125, "loss": {"mean": -0.25, "low": -0.5, "high": 0.125}}
                for member in members
            },
        }
        for name, apart in {"seed": 0.5, verdict["winner"]: 0.125, "ensemble": 0.0625, "consensus": 0.25, "gone": 9.0}.items()
    }
    write_json(layout.verdict, verdict)
    return verdict


def test_the_page_tells_how_far_everybody_is_from_the_members(judged: RunLayout) -> None:
    verdict = told(judged, 0.984375)
    page, text = _page(judged)
    words = " ".join(page.words)
    assert "Do they still do what their members do?" in words
    section = agreement_section(read_run(judged.root))
    above = section[: section.index("<details>")]
    assert above.count("<tr") == 1 + 4  # heads, seed, winner, two merges
    (chosen,) = (row for row in above.split("<tr") if "class='chosen'" in row)
    for cell in ("0.0625", "0.0525", "0.0825", "0.0125", "87.5%", "93.8%", "98.4%", "data-v='2'"):
        assert cell in chosen
    assert "ensemble" in chosen
    assert f"KL(variant || {verdict['winner']})" in words
    assert "<td data-v='-0.25'>-0.2500</td><td data-v='-0.5'>-0.5000</td><td data-v='0.125'>+0.1250</td>" in section
    assert HOSTILE in words
    assert HOSTILE not in text
    assert "gone" not in section


def test_a_run_of_which_nobody_was_compared_has_its_page(judged: RunLayout) -> None:
    page, _ = _page(judged)
    assert agreement_section(read_run(judged.root)) == ""
    told(judged, None)  # no token where more than half agree
    assert "<td data-v=''>–</td>" in agreement_section(read_run(judged.root))
    verdict = read_json(judged.verdict)
    verdict["report"]["agreement"] = {"ensemble": "much", "seed": {"divergence": [1, 2], "by_member": {"v": None}}}
    write_json(judged.verdict, verdict)
    assert "ensemble" in agreement_section(read_run(judged.root))
    assert page.words
