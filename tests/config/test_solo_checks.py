"""A blueprint whose variants cannot be packed: what does not go with it is refused with the reason; its body has one slot."""

from pathlib import Path

import pytest

from chrysalis_ray.config.loading import load_blueprint, load_experiment
from chrysalis_ray.core.errors import ConfigError
from chrysalis_ray.training.planning.hardware import Hardware
from chrysalis_ray.training.planning.planner import plan

DORA = "blueprint.lora.use_dora=true"
KIND = "blueprint.adapter={type: loha, rank: 4}"
WINNER = "merge=[{method: winner}]"
ONE = "body={slots: 1}"


def refused(good: Path, *settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_experiment(good, list(settings))
    return "\n".join(caught.value.problems)


def test_a_pack_of_dora_is_refused_with_the_reason(good: Path) -> None:
    assert "4 variants cannot be packed: DoRA divides by the norm" in refused(good, DORA, WINNER)
    said = refused(good, DORA, ONE)
    assert "merge.1.method: ensemble adds up low-rank deltas" in said
    assert "merge.2.method: consensus adds up" in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("blueprint.lora.init=pissa", DORA), "moves the base"),
        (("blueprint.lora.lora_bias=true", DORA), "peft's DoRA has no lora_bias"),
        (("blueprint.lora.modules_to_save=[norm]", "blueprint.lora.freeze_a=true"), "freeze_a trains B alone"),
        ((KIND, "blueprint.lora.dropout=0.1"), "in whose place adapter puts loha"),
        ((KIND, "population.search.dropout={type: choice, values: [0.1]}"), "the variants train loha"),
        (("blueprint.adapter={type: ia3}",), "ia3 has no rank to search"),
        (
            ("blueprint.adapter={type: ia3, targets: [q_proj], feedforward_modules: [k_proj]}",),
            "'k_proj' is none of its targets",
        ),
        (
            ("blueprint.adapter={type: hra}", "population.search.rank={type: choice, values: [4, 5]}"),
            "an odd number of reflections",
        ),
        (("blueprint.adapter={type: adalora, target_r: 4}",), "4 of 4 ranks are to be left"),
        (("blueprint.adapter={type: adalora, target_r: 2, tinit: 9, tfinal: 7}",), "leave none of 16 steps"),
        (("blueprint.adapter={type: adalora, target_r: 2, modules_to_save: [norm]}",), "a plain LoRA, which has none"),
        (("blueprint.adapter={type: boft, boft_block_num: 4}",), "write one, and 0 for the other"),
        (("blueprint.adapter={type: hra, targets: [q_proj, q_proj]}",), "'q_proj' is named twice"),
        ((DORA, "evaluate.max_divergence=0.1"), "every merge would be refused"),
        ((DORA, "body={slots: 1, workers: 2, zero_stage: 3}"), "peft puts what is trained into its modules"),
        ((DORA, "body={slots: 1, offload: nvme, nvme_path: /nvme}"), "leave offload and nvme_path out"),
        ((KIND, "body={slots: 1, offload: cpu}"), "on a base that is whole (LoHa multiplies two products"),
        ((DORA, "body={slots: 1, quantization: nf4}"), "peft is given the base's linear modules as they are"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: tuple[str, ...], words: str, good: Path) -> None:
    assert words in refused(good, ONE, WINNER, *settings)


def test_a_moved_base_leaves_plain_adapters_that_can_be_merged(good: Path) -> None:
    assert load_experiment(good, ["blueprint.lora.init=olora", ONE]).blueprint.lora.is_low_rank


def test_a_body_that_says_nothing_has_one_slot_and_plan_says_why(good: Path) -> None:
    blueprint = good.with_name("blueprint.yaml")
    blueprint.write_text(blueprint.read_text().replace("  slots: 4\n", ""))
    assert load_experiment(good).body.slots == 8
    loaded = load_experiment(good, [DORA, WINNER])
    assert loaded.body.slots == 1
    planned = plan(loaded, Hardware.local())
    packed = plan(load_experiment(good, [ONE]), Hardware.local())
    assert any("DoRA" in note and "4 variants train one after another" in note for note in planned.notes)
    assert planned.memory is not None
    assert packed.memory is not None
    assert planned.memory.activations == 3 * packed.memory.activations
    assert planned.memory.bank > packed.memory.bank
    assert plan(load_experiment(good, [DORA, WINNER, "body={slots: auto}"]), Hardware.local()).slots_used == 1


def test_a_default_that_does_not_fit_is_told_where_its_section_is_written(good: Path) -> None:
    assert "--set: adapter.target_r: 8 of 4 ranks" in refused(good, "blueprint.adapter={type: adalora}", WINNER, ONE)
    blueprint = good.with_name("blueprint.yaml")
    text = blueprint.read_text()
    blueprint.write_text(f"{text}adapter: {{type: adalora}}\n")
    assert f"blueprint.yaml:{len(text.splitlines()) + 1}: adapter.target_r: " in refused(good, WINNER, ONE)


def test_another_kind_of_adapter_stands_in_the_place_of_lora(good: Path) -> None:
    with pytest.raises(ConfigError, match="LoHa multiplies two products"):
        load_experiment(good, [KIND, WINNER])
    with pytest.raises(ConfigError, match="ensemble adds up low-rank deltas, and variants with loha"):
        load_experiment(good, [KIND, ONE])
    loaded = load_experiment(good, [KIND, WINNER, ONE])
    worn = loaded.blueprint.worn
    assert worn.targets == loaded.blueprint.lora.targets  # lora's, where it names none
    assert (loaded.blueprint.rank, loaded.blueprint.alpha, loaded.body.slots) == (4, 8.0, 1)
    assert loaded.resolved()["blueprint"]["adapter"]["rank"] == 4
    plain = load_experiment(good).resolved()["blueprint"]  # as before there were such fields: runs go on under their hash
    assert not {"adapter", "exclude", "layers"} & {*plain, *plain["lora"]}
    planned = plan(loaded, Hardware.local())
    assert any("4 variants train one after another" in note for note in planned.notes)
    assert "adapter loha rank 8" in planned.lines()[1]  # the largest that is searched
    assert planned.lora_parameters == 2 * 8 * 2 * (64 + 64 + 64 + 32)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("init: gaussian", "the spread of gaussian is 1/rank"),
        ("layers: [0, 2]", "2 is no layer: the base has 2"),
    ],
)
def test_a_lora_that_does_not_fit_base_or_ranks_is_refused_at_its_line(written: str, words: str, good: Path) -> None:
    blueprint = good.with_name("blueprint.yaml")
    blueprint.write_text(blueprint.read_text().replace("  rank: 8\n", f"  rank: 8\n  {written}\n"))
    assert f"blueprint.yaml:13: lora.{written.partition(':')[0]}: " in refused(good)
    assert words in refused(good)


def test_layers_and_one_rank_for_all_make_a_smaller_plan_and_may_be_gaussian(good: Path) -> None:
    one_rank = ("population.search.rank={type: choice, values: [8]}", "blueprint.lora.layers=[1]")
    whole, half = (plan(load_experiment(good, [one_rank[0], *more]), Hardware.local()) for more in ((), one_rank[1:]))
    assert whole.lora_parameters == 2 * (half.lora_parameters or 0)
    assert "is for LoRA" in refused(good, KIND, WINNER, ONE, "blueprint.lora.layers=[1]")
    blueprint = good.with_name("blueprint.yaml")
    blueprint.write_text(blueprint.read_text().replace("  rank: 8\n", "  rank: 8\n  init: gaussian\n"))
    good.write_text(good.read_text().replace("    rank: {type: choice, values: [4, 8]}\n", ""))
    assert load_experiment(good).blueprint.lora.init == "gaussian"


def test_a_solo_body_is_never_told_to_shard_the_base(good: Path) -> None:
    """Every way to ask for what is part of stage 3 is answered by what can be written, in the blueprint alone as well."""
    for stage in ("", ", zero_stage: 0", ", zero_stage: 3"):
        for offload in ("cpu", "nvme, nvme_path: /nvme"):
            said = refused(good, DORA, WINNER, f"body={{slots: 1, offload: {offload}{stage}}}")
            assert "set zero_stage: 3" not in said
    blueprint = good.with_name("blueprint.yaml")
    text = blueprint.read_text().replace("  rank: 8\n", "  rank: 8\n  use_dora: true\n")
    blueprint.write_text(text.replace("  slots: 4", "  slots: 1\n  zero_stage: 0\n  offload: cpu"))
    with pytest.raises(ConfigError, match="leave offload and nvme_path out"):
        load_blueprint(blueprint)
