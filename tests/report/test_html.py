import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from example_run import DOMAINS, write_branch

from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.report import card
from chrysalis_ray.report.charts import Curve, loss_chart, ticks
from chrysalis_ray.report.comparison import read_run
from chrysalis_ray.report.html import headline, write_report
from chrysalis_ray.report.lineage import lineage
from chrysalis_ray.report.metrics import append_metrics
from chrysalis_ray.report.page import POLICY

HOSTILE = "<script>alert('x')</script>\"'><img src=http://evil.example/x onerror=alert(1)>"
VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """Tags with attributes, text, and a check that what opens closes."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def _page(layout: RunLayout) -> tuple[Page, str]:
    text = write_report(layout.root).read_text(encoding="utf-8")
    page = Page(text)
    assert page.stack == []
    return page, text


def _fetches(page: Page, text: str) -> list[str]:
    """Everything a browser would ask a server for."""
    asked = [value for _, attributes in page.tags for name, value in attributes.items()
             if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href")]  # fmt: skip
    asked += re.findall(r"url\(\s*['\"]?([^)'\"]+)", text) + re.findall(r"@import[^;]*", text)
    return [value for value in asked if value and not value.startswith(("#", "data:"))]


def test_a_whole_run_on_one_page(judged: RunLayout) -> None:
    page, text = _page(judged)
    assert len(text.encode()) < 120_000
    assert _fetches(page, text) == []
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}) in page.tags
    assert page.count("svg") == 4
    assert page.count("h1") == 1
    assert page.count("script") == 1
    words = " ".join(page.words)
    for expected in ("Merging helped", "v005-unicode", "ASHA: not in the best half", "PeftModel", "nothing agreed", *DOMAINS):
        assert expected in words


def test_the_lineage_is_drawn_once_it_is_written(judged: RunLayout) -> None:
    write_json(judged.lineage, lineage(judged.root))
    page, _ = _page(judged)
    assert "flowchart LR" in "".join(page.words)


def test_every_picture_and_table_has_a_name(judged: RunLayout) -> None:
    page, _ = _page(judged)
    titles = {attributes["id"] for tag, attributes in page.tags if tag == "title" and "id" in attributes}
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes["aria-labelledby"] in titles
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert ("html", {"lang": "en"}) in page.tags


def test_what_was_said_of_a_mix_is_drawn_beside_its_shares(judged: RunLayout) -> None:
    before, _ = _page(judged)
    assert "prior" not in " ".join(before.words)
    path = judged.variant("v001-code")
    record = read_json(path)
    record["epigenome"] |= {"prior": "temperature(2)", "floors": {"unicode": 0.1}, "loss_weights": {"code": 3.0, HOSTILE: 1.0}}
    record["epigenome"] |= {"budget_rows": 64, "row_tokens": 64, "stages": [{"row": 32, "express": {"code": 0.0}}]}
    write_json(path, record)
    rows = [json.loads(line) | {"epigenome": None} for line in judged.metrics.read_text().splitlines()]
    judged.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, _ = _page(judged)
    words = " ".join(page.words)
    for expected in ("prior temperature(2); at least unicode 10.0%", "loss weights", HOSTILE, "stage, step", "every part of"):
        assert expected in words
    bars = [attributes["aria-label"] or "" for tag, attributes in page.tags if attributes.get("class") == "bar"]
    (staged,) = [label for label in bars if label.startswith("v001-code from step") and "from step 0" not in label]
    assert ", code " not in staged
    assert not any("v002-comments from step" in label for label in bars)


def test_hostile_names_are_text(layout: RunLayout) -> None:
    variants = write_branch(layout)
    for path in (layout.run_manifest, layout.base_manifest):
        write_json(path, read_json(path) | {"name": HOSTILE, "run_id": HOSTILE, "created": HOSTILE, "version": HOSTILE})
    record = read_json(layout.variant(variants[0].variant_id))
    record["epigenome"]["express"] = {HOSTILE: 1.0}
    record["hyperparameters"]["decay"] = HOSTILE
    write_json(layout.variant(variants[0].variant_id), record)
    append_metrics(layout.metrics, {"variant": variants[0].variant_id, "report": 1, "tokens": 10, "train_loss": 1.0,
                                    "select_loss": 2.0, "state": HOSTILE, "domain_tokens": {HOSTILE: 5}})  # fmt: skip
    write_json(layout.population_manifest, {"variants": {variants[1].variant_id: {"state": HOSTILE, "reason": HOSTILE}}})
    write_json(layout.select_scores, {"split": "select", "candidates": {variants[0].variant_id: [[HOSTILE, 0, 10.0, 5]]}})
    write_json(layout.merges_manifest, {
        "candidates": {HOSTILE: {"method": HOSTILE, "weights": {HOSTILE: 1.0}, "notes": {HOSTILE: HOSTILE}, "sha256": HOSTILE}},
        "failed": {HOSTILE + "2": HOSTILE},
    })  # fmt: skip
    write_json(layout.verdict, {"winner": HOSTILE, "chosen": HOSTILE, "kind": "merge", "merging_helped": HOSTILE,
                                "sentences": [HOSTILE], "select": {"loss": {HOSTILE: 1.0}},
                                "report": {"loss": {HOSTILE: {"mean": 1, "low": 0, "high": 2}}}})  # fmt: skip
    layout.experiment_yaml.write_text(f"name: {HOSTILE}\n</pre></code>{HOSTILE}")
    page, text = _page(layout)
    assert page.count("script") == 1
    assert page.count("img") == 0
    assert _fetches(page, text) == []
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert HOSTILE in "".join(page.words)


def test_nothing_in_a_page_turns_its_text_around_or_speaks_to_a_terminal(branched: RunLayout) -> None:
    hidden = "MIT\u202egpj.exe\x1b[2J\u200b"
    branched.experiment_yaml.write_text(f"name: {hidden}\n", encoding="utf-8")
    page, text = _page(branched)
    assert r"MIT\u202egpj.exe\x1b[2J\u200b" in "".join(page.words)
    assert not set(text) & set(hidden[3:4] + hidden[11:12] + hidden[-1])
    assert card._line(f"{hidden}|\nnext") == r"MIT\u202egpj.exe\x1b[2J\u200b\| next"


@pytest.mark.parametrize(("fixture", "expected"), [("branched", "not trained yet"), ("trained", "trained, not judged yet")])
def test_partial_runs_have_a_page(request: pytest.FixtureRequest, fixture: str, expected: str) -> None:
    layout = request.getfixturevalue(fixture)
    page, text = _page(layout)
    assert expected in " ".join(page.words)
    assert _fetches(page, text) == []


def test_a_run_just_started_has_a_page(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    write_json(layout.run_manifest, {"name": "young", "experiment": {}})
    page, _ = _page(layout)
    assert "No variants yet" in "".join(page.words)
    with pytest.raises(RunError):
        write_report(tmp_path / "nowhere")


def test_a_hundred_variants_stay_below_300_kilobytes(layout: RunLayout) -> None:
    pattern = write_branch(layout)[0].to_json()
    names = [f"v{k:03d}-some-longer-name-of-a-mix" for k in range(100)]
    for k, name in enumerate(names):
        write_json(layout.variant(name), pattern | {"variant_id": name, "index": k})
    write_json(layout.branch_manifest, {"variants": names})
    lines = [json.dumps({"variant": name, "report": r, "tokens": 4096 * r, "step": 8 * r, "state": "training",
                         "train_loss": 4 - r / 100 + k / 1000, "select_loss": 4 - r / 100 + k / 999,
                         "domain_tokens": dict.fromkeys(DOMAINS, 700 * r)})
             for r in range(1, 201) for k, name in enumerate(names)]  # fmt: skip
    layout.metrics.write_text("\n".join(lines) + "\n")
    page, text = _page(layout)
    assert len(text.encode()) < 300_000
    assert "36 variants with the highest loss are not shown" in " ".join(page.words)


def test_no_secret_reaches_the_page(judged: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-with-&-and-<>-in-it")
    run = read_json(judged.run_manifest)
    run["experiment"]["description"] = "canary-with-&-and-<>-in-it"
    run["name"] = "hf_abcdefghijklmnopqrstuvwxyz0123456789"
    write_json(judged.run_manifest, run)
    judged.experiment_yaml.unlink()
    _, text = _page(judged)
    assert "canary" not in text
    assert "hf_abc" not in text


def test_headlines_say_what_was_decided(judged: RunLayout) -> None:
    verdict = read_json(judged.verdict)
    told = {}
    for kind, helped in (("merge", "yes"), ("merge", "no"), ("merge", "unclear"), ("winner", "no")):
        write_json(judged.verdict, verdict | {"kind": kind, "merging_helped": helped,
                                              "chosen": "ensemble" if kind == "merge" else verdict["winner"]})  # fmt: skip
        told[kind, helped] = headline(read_run(judged.root))
        _page(judged)
    assert told["winner", "no"] == "Merging did not help; the best variant is released"
    assert told["merge", "no"] == "Merging did not help"
    assert len(set(told.values())) == 4


def test_one_diverged_variant_does_not_flatten_the_others() -> None:
    curves = [Curve("good", "v0", 0, [(1, 3.0), (2, 2.5)]), Curve("lost", "v1", 1, [(1, 3.0), (2, 4000.0)])]
    svg = loss_chart("losses", curves, "c")
    low, high = (float(value) for value in re.search(r'data-y="[^"]*,([-\d.e]+),([-\d.e]+)"', svg).groups())
    assert 2.3 < low < 2.5
    assert 3.0 < high < 3.2


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.1, 3.2), (-5, 1e9), (2.0, 2.0), (1e-9, 3e-9)])
def test_ticks_are_round_inside_and_few(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 8
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)
