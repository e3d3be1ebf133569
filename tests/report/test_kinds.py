"""What kind of adapter a run trained is told by its card, its lineage, its page and W&B."""

from __future__ import annotations

from typing import Any

import pytest
from test_card import _front

from chrysalis_ray.config.adapters import KINDS
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.report.card import imago_card
from chrysalis_ray.report.comparison import read_run
from chrysalis_ray.report.html import report_page
from chrysalis_ray.report.kinds import NAMES, adapter_of, kind_name
from chrysalis_ray.report.lineage import lineage


def told(layout: RunLayout, **blueprint: Any) -> RunLayout:
    run = read_json(layout.run_manifest)
    run["experiment"]["blueprint"] |= blueprint
    write_json(layout.run_manifest, run)
    return layout


def test_another_kind_is_named_everywhere(judged: RunLayout) -> None:
    plain = imago_card(judged.root)
    assert _front(plain)["tags"][0] == "lora"
    assert "adapter" not in lineage(judged.root)
    told(judged, adapter={"type": "ia3", "targets": None, "feedforward_modules": ["down_proj"], "modules_to_save": []})
    card = imago_card(judged.root)
    assert _front(card)["tags"][0] == "ia3"
    assert "A merge of IA3 adapters" in card
    assert lineage(judged.root)["adapter"] == {"type": "ia3", "feedforward_modules": ["down_proj"]}
    assert "; IA3</small>" in report_page(read_run(judged.root))


@pytest.mark.parametrize(
    ("lora", "name"),
    [
        ({"use_dora": True, "modules_to_save": ["norm"]}, "DoRA with modules_to_save"),
        ({"lora_bias": True}, "LoRA with lora_bias"),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {}}, "LoRA with rank_pattern"),
        ({"init": "kaiming", "use_dora": False, "modules_to_save": []}, "LoRA"),
    ],
)
def test_what_lora_has_beside_it_is_named(lora: dict[str, Any], name: str) -> None:
    assert kind_name({"blueprint": {"lora": lora}}) == name


def test_every_kind_has_a_name_and_a_moved_base_is_told() -> None:
    assert NAMES.keys() == KINDS.keys() | {"lora"}
    assert adapter_of({"blueprint": {"lora": {"init": "pissa"}}}) == {"type": "lora", "init": "pissa"}
