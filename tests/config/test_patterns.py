"""Ranks and alphas of some modules, beside the base, the search space and the body they are for."""

from pathlib import Path

import pytest

from chrysalis_ray.config.blueprint import Lora
from chrysalis_ray.config.loading import load_experiment
from chrysalis_ray.core.errors import ConfigError
from chrysalis_ray.core.patterns import Kind, Patterns
from chrysalis_ray.training.planning.hardware import Hardware
from chrysalis_ray.training.planning.planner import plan
from chrysalis_ray.training.planning.shapes import KNOWN


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("blueprint.lora.rank_pattern={v_proj: 48}",), "rank 48 is above 32"),
        (("blueprint.lora.rank_pattern={v_proj: 4}", "blueprint.lora.init=pissa", "body={slots: 1}"), "one scale is kept"),
        (("blueprint.lora.rank_pattern={v_porj: 4}",), "none of lora.targets (q_proj, v_proj); did you mean 'v_proj'?"),
        (
            ("blueprint.lora.alpha_pattern={layers.0.self_attn.q_prj: 4}",),
            "did you mean 'layers.0.self_attn.q_proj'?",
        ),
        (("blueprint.lora.rank_pattern={embed_tokens: 4}",), "(q_proj, v_proj); leave it out"),
        (("blueprint.lora.rank_pattern={v_proj: 2, q_proj: 4}",), "gives every target its own"),
        (("blueprint.lora.alpha_pattern={v_proj: 2, q_proj: 4}",), "gives every target its own"),
        (("blueprint.adapter={type: loha}", "blueprint.lora.alpha_pattern={q_proj: 4}"), "in whose place adapter stands"),
        (
            ("blueprint.lora.init=gaussian", "population.search={}", "merge=[{method: winner}]",
             "blueprint.lora.rank_pattern={q_proj: 4}"),
            "one rank for all",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_with_patterns_is_refused(settings: tuple[str, ...], words: str, good: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_experiment(good, list(settings))
    assert words in "\n".join(caught.value.problems)


def test_a_plan_counts_the_parameters_that_patterns_leave(good: Path) -> None:
    """hidden 64, q 64, k and v 32, two layers; the first layer's v has rank 4, the second's 16."""
    setting = "blueprint.lora.rank_pattern={layers.1.self_attn.v_proj: 16, v_proj: 4}"
    planned = [plan(load_experiment(good, settings), Hardware.local()) for settings in ([], [setting])]
    assert "in all variants of their own rank or alpha: layers.1.self_attn.v_proj 16, v_proj 4" in planned[1].notes
    whole, own = (each.lora_parameters for each in planned)
    assert (whole, own) == (2 * 8 * (64 + 64 + 64 + 32), 2 * 8 * (64 + 64) + (4 + 16) * (64 + 32))
    assert load_experiment(good, [setting]).blueprint.patterns.largest(8) == 16


def test_parameters_of_a_known_base_by_layer_and_parent() -> None:
    shape, targets = KNOWN["Qwen/Qwen3-0.6B"], ("q_proj", "down_proj")
    q, down = 1024 + 2048, 1024 + 3072
    patterns = Patterns({"layers.3.mlp.down_proj": 32, "mlp.down_proj": 2}, {"q_proj": 1.0})
    assert shape.lora_parameters(8, targets, None, patterns) == 28 * 8 * q + (27 * 2 + 32) * down
    assert shape.lora_parameters(8, targets, (3, 4), patterns) == 2 * 8 * q + (2 + 32) * down
    assert shape.lora_parameters(8, targets, (3, 4)) == 2 * 8 * (q + down)


def test_the_longest_key_counts_and_scales_are_those_of_the_module() -> None:
    lora = Lora(rank=8, alpha=16.0, rank_pattern={"layers.0.mlp.up_proj": 2, "up_proj": 4}, alpha_pattern={"down_proj": 1.0})
    own, kinds = lora.patterns, ("layers.0.mlp.up_proj", "layers.10.mlp.up_proj", "layers.0.mlp.down_proj", "group_proj")
    assert [own.kind_of(f"model.{name}") for name in kinds] == [Kind(2), Kind(4), Kind(None, 1.0), Kind()]
    assert [own.kind_of(f"model.{name}").scale(lora) for name in kinds] == [8.0, 4.0, 0.125, 2.0]
    rslora = lora.model_copy(update={"use_rslora": True})
    assert own.kind_of("model.layers.10.mlp.up_proj").scale(rslora) == 8.0
    assert Patterns.from_json(own.to_json()) == own
    assert not Patterns().to_json()
