import re

import pytest
import yaml

from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.report.card import imago_card
from chrysalis_ray.report.lineage import adapter_name


def _front(card: str) -> dict:
    return yaml.safe_load(re.match(r"^---\n(.*?)^---$", card, re.DOTALL | re.MULTILINE)[1])


def test_the_head_is_what_the_hub_reads(judged: RunLayout) -> None:
    write_json(judged.base_manifest, read_json(judged.base_manifest) | {"type": "pretrained", "name": "Qwen/Qwen3-0.6B-Base"})
    head = _front(imago_card(judged.root))
    assert head["base_model"] == "Qwen/Qwen3-0.6B-Base"
    assert head["base_model_relation"] == "adapter"
    assert head["library_name"] == "peft"
    assert head["pipeline_tag"] == "text-generation"
    metric = head["model-index"][0]["results"][0]["metrics"][0]
    assert metric["value"] == pytest.approx(read_json(judged.verdict)["report"]["loss"]["ensemble"]["mean"], abs=1e-6)


def test_the_hub_library_accepts_it(judged: RunLayout) -> None:
    from huggingface_hub import ModelCardData
    from huggingface_hub.repocard_data import model_index_to_eval_results

    head = _front(imago_card(judged.root))
    name, results = model_index_to_eval_results(head["model-index"])
    assert (name, results[0].metric_type) == ("quickstart", "loss")
    told = ModelCardData(**{k: v for k, v in head.items() if k != "model-index"}).to_dict()
    assert told["library_name"] == "peft"


def test_an_embedded_base_has_no_hub_name(judged: RunLayout) -> None:
    assert "base_model" not in _front(imago_card(judged.root))


def test_parents_scores_and_the_exact_experiment(judged: RunLayout) -> None:
    card = imago_card(judged.root)
    for variant in ("v000-api_docs", "v001-code", "v002-comments", "v005-unicode"):
        assert f"| {variant} | 0.25 | `{adapter_name(judged.adapter(variant))}` |" in card
    assert f"```yaml\n{judged.experiment_yaml.read_text().rstrip()}\n```" in card
    assert "| **ensemble** | merge |" in card
    assert "lost 21.00% of the merge" in card
    assert "PeftModel.from_pretrained(base, '.')" in card
    assert "PSF-2.0" in card


def test_a_fallback_to_the_winner_names_one_parent(judged: RunLayout) -> None:
    verdict = read_json(judged.verdict)
    write_json(judged.verdict, verdict | {"chosen": verdict["winner"], "kind": "winner", "merging_helped": "no"})
    card = imago_card(judged.root)
    assert "the best of its population" in card
    assert f"| v000-api_docs | 1 | `{adapter_name(judged.adapter('v000-api_docs'))}` |" in card
    assert "merge" not in _front(card)["tags"]


def test_hostile_text_breaks_neither_tables_nor_fences(judged: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary0123456789")
    hostile = "a | b\n---\n# <script>alert(1)</script> `x` canary0123456789"
    write_json(judged.run_manifest, read_json(judged.run_manifest) | {"name": hostile})
    write_json(judged.verdict, read_json(judged.verdict) | {"sentences": [hostile]})
    judged.experiment_yaml.write_text("a: |\n  ```\n  ````\n  canary0123456789\n")
    card = imago_card(judged.root)
    assert "<script>" not in card.split("\n---\n", 1)[1]
    assert "canary" not in card
    assert _front(card)["library_name"] == "peft"
    assert len(re.findall(r"^`{5}", card, re.MULTILINE)) == 2


def test_no_verdict_no_card(trained: RunLayout) -> None:
    with pytest.raises(RunError, match="not judged yet"):
        imago_card(trained.root)


def test_the_card_says_where_the_data_came_from(judged: RunLayout) -> None:
    """Attribution: address and pin of every source, as text whatever they are called."""
    path = judged.genome / "manifest.json"
    sealed = read_json(path)
    sealed["content"]["sources"] = [
        {"recipe": {"type": "git", "url": "https://host/a|b"}, "commit": "4" * 40, "documents": 7},
        {"recipe": {"type": "python", "domains": ["code", "docs"]}, "documents": 1234},
        {"recipe": {"type": "folder", "path": "<b>\u202e"}, "documents": 1},
    ]
    write_json(path, sealed)
    card = imago_card(judged.root)
    for row in (
        f"| git https://host/a\\|b | commit {'4' * 40} | 7 |",
        "| python code, docs | what lay there | 1,234 |",
        r"| folder &lt;b&gt;\u202e | what lay there | 1 |",
    ):
        assert row in card


def test_the_use_policy_stands_on_the_card_or_it_says_that_there_is_none(judged: RunLayout) -> None:
    assert "wrote no use policy" in imago_card(judged.root)
    run = read_json(judged.run_manifest)
    run["experiment"]["use_policy"] = "For study.\n# Not for <b>harm</b>."
    write_json(judged.run_manifest, run)
    card = imago_card(judged.root)
    assert "## Use policy\n\nWho grew it wrote:\n\n> For study.\n> # Not for &lt;b&gt;harm&lt;/b&gt;.\n" in card
    assert "wrote no use policy" not in card
