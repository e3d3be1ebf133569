import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chrysalis_ray.body.morphology import Morphology
from chrysalis_ray.config.blueprint import EmbeddedBase, PretrainedBase
from chrysalis_ray.config.loading import load_experiment
from chrysalis_ray.config.resolve import BODY_FLOOR
from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.training.passes import KEPT_ON_CPU
from chrysalis_ray.training.planning.choice import chooser
from chrysalis_ray.training.planning.hardware import GIB, Hardware
from chrysalis_ray.training.planning.judged import heard_bytes, judged_bytes
from chrysalis_ray.training.planning.planner import optimizer_steps, plan
from chrysalis_ray.training.planning.shapes import KNOWN, read_shape, shape_of

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
LAPTOP = Hardware(cpus=2, memory=16 * GIB)
CLUSTER = Hardware(cpus=256, memory=2000 * GIB, gpus=16, gpu_memory=80 * GIB, gpu_name="NVIDIA H100 80GB HBM3", nodes=2)
QUICKSTART = EXPERIMENTS / "quickstart.yaml"


@pytest.fixture(autouse=True)
def no_models_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@given(st.integers(1, 10**9), st.integers(1, 64), st.integers(8, 4096), st.integers(1, 200))
def test_steps_are_whole_chunks_within_the_budget(tokens: int, rows: int, length: int, reports: int) -> None:
    steps, chunk = optimizer_steps(tokens, rows, length, reports)
    assert steps >= chunk >= 1
    assert steps % chunk == 0
    total = max(tokens // (rows * length), 1)
    assert steps <= total
    assert steps // chunk == min(reports, total)
    assert total - steps < reports


def test_steps_of_the_quickstart() -> None:
    assert optimizer_steps(49152, 4, 128, 8) == (96, 12)
    assert optimizer_steps(49152 + 511, 4, 128, 8) == (96, 12)
    with pytest.raises(ValueError, match="reports 0"):
        optimizer_steps(49152, 4, 128, 0)


def test_parameters_of_qwen3_are_those_that_were_counted() -> None:
    shape = KNOWN["Qwen/Qwen3-0.6B"]
    linear = sum(inner * outer for inner, outer in shape.linears().values()) * shape.layers
    assert round(linear / 1e6, 1) == 440.4
    assert round(shape.embedding_parameters / 1e6, 1) == 155.6
    assert round(shape.lora_parameters(16, tuple(shape.linears())) / 1e6, 2) == 10.09
    assert shape.parameters == 596_049_920
    assert KNOWN["Qwen/Qwen3-8B"].parameters == 8_190_735_360


def test_training_flops_of_qwen3_are_those_of_the_roofline() -> None:
    shape = KNOWN["Qwen/Qwen3-0.6B"]
    flops = shape.training_flops(shape.lora_parameters(16, tuple(shape.linears())), 512)
    assert flops == pytest.approx(2.65e9, rel=0.05)


def test_embedded_parameters_match_the_real_model() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    base = EmbeddedBase(type="embedded", hidden_size=64, layers=2, heads=4, key_value_heads=2, head_size=16, vocabulary=512)
    config = Qwen3Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=512,
        vocab_size=512, tie_word_embeddings=True,
    )  # fmt: skip
    shape = shape_of(base)
    assert shape is not None
    assert Qwen3ForCausalLM(config).num_parameters() == shape.parameters


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_experiment_fits_a_cluster_and_is_told_in_words_and_json(path: Path) -> None:
    planned = plan(load_experiment(path, choose=chooser(hardware=CLUSTER)), CLUSTER)
    assert planned.fits, planned.obstacles
    assert planned.exit_code == 0
    assert planned.steps == planned.chunk_steps * planned.reports
    told = json.loads(json.dumps(planned.to_json(), allow_nan=False))
    assert told["memory"]["total"] == planned.memory.total  # type: ignore[union-attr]
    assert told["fits"] is True
    assert any(line.startswith("memory per worker:") for line in planned.lines())


def test_the_quickstart_fits_a_laptop_and_eight_billion_parameters_do_not() -> None:
    assert plan(load_experiment(QUICKSTART), LAPTOP).fits
    refused = plan(load_experiment(EXPERIMENTS / "two_nodes.yaml"), LAPTOP)
    assert refused.exit_code == 3
    assert "a body needs 16 GPUs (workers 16 x 1), there are 0" in refused.obstacles
    assert any(line.startswith("does not fit: ") for line in refused.lines())


def test_what_does_not_fit_a_gpu_is_refused_with_both_figures_and_a_remedy() -> None:
    small = replace(CLUSTER, gpu_memory=8 * GIB, gpu_name="NVIDIA A10")
    loaded = load_experiment(EXPERIMENTS / "sweep_asha.yaml")
    refused = plan(loaded, small)
    assert not refused.fits
    assert "a GPU gives 7.4 GiB of 8.0 GiB; lower body.slots" in refused.obstacles[0]
    fewer = load_experiment(EXPERIMENTS / "sweep_asha.yaml", ["body.slots=2", "blueprint.lanes.rows_per_microstep=1"])
    assert plan(fewer, small).fits


def test_not_enough_main_memory_is_refused() -> None:
    assert "main memory" in plan(load_experiment(QUICKSTART), replace(LAPTOP, memory=GIB // 2)).obstacles[0]


def test_zero_shards_the_base_and_not_the_adapters() -> None:
    path = EXPERIMENTS / "two_nodes.yaml"
    whole_lanes = "body.tokens_per_pass=1000000"
    eight, sixteen = (plan(load_experiment(path, [f"body.workers={n}", whole_lanes]), CLUSTER).memory for n in (8, 16))
    whole = plan(load_experiment(path, ["body.zero_stage=0"]), CLUSTER).memory
    assert sixteen.base < eight.base < whole.base / 4  # type: ignore[union-attr]
    assert sixteen.bank == eight.bank == whole.bank  # type: ignore[union-attr]
    assert sixteen.activations < eight.activations  # type: ignore[union-attr]


def test_workers_share_the_moments_out_but_not_the_gradients() -> None:
    path = EXPERIMENTS / "quickstart.yaml"
    one, two = (plan(load_experiment(path, [f"body.workers={count}"]), CLUSTER).memory for count in (1, 2))
    assert one is not None
    assert two is not None
    assert two.bank == one.bank * 12 // 16  # of 16 bytes a parameter 8 are moments


def test_offload_moves_the_shard_to_main_memory() -> None:
    path = EXPERIMENTS / "two_nodes.yaml"
    kept = plan(load_experiment(path), CLUSTER).memory
    moved = plan(load_experiment(path, ["body.offload=cpu"]), CLUSTER).memory
    assert moved.base < kept.base  # type: ignore[union-attr]
    assert moved.host - kept.host == kept.base - moved.base  # type: ignore[union-attr]


def test_variants_beyond_the_slots_take_turns_in_one_body() -> None:
    packed = plan(load_experiment(EXPERIMENTS / "sweep_asha.yaml", ["body.slots=24"]), CLUSTER)
    turns = plan(load_experiment(EXPERIMENTS / "sweep_asha.yaml", ["body.slots=8"]), CLUSTER)
    assert (turns.bodies, turns.bodies_at_once, turns.slots_used) == (1, 1, 8)
    assert turns.time.train_most >= packed.time.train_most  # type: ignore[union-attr]
    assert "8 variants of 24, which take turns, in 8 slots" in "\n".join(turns.lines())
    assert "take turns" not in "\n".join(packed.lines())


def test_several_bodies_share_the_variants_and_each_has_the_base_once_more() -> None:
    whole = plan(load_experiment(EXPERIMENTS / "sweep_asha.yaml", ["body.slots=24"]), CLUSTER)
    shared = plan(load_experiment(EXPERIMENTS / "sweep_asha.yaml", ["body.slots=6", "body.count=4"]), CLUSTER)
    assert (shared.bodies, shared.bodies_at_once, shared.slots_used) == (4, 4, 6)
    assert shared.time.train_most < 0.5 * whole.time.train_most  # type: ignore[union-attr]
    assert shared.memory.base == whole.memory.base  # type: ignore[union-attr]
    assert "4 bodies at once: 24 variants in 6 slots on 1 worker x 1 GPU each" in "\n".join(shared.lines())
    few = replace(CLUSTER, gpus=3)
    assert (
        "of 4 bodies 3 have room"
        in plan(load_experiment(EXPERIMENTS / "sweep_asha.yaml", ["body.slots=6", "body.count=4"]), few).obstacles[0]
    )


def test_it_says_when_packing_does_not_help_in_time() -> None:
    long = plan(load_experiment(EXPERIMENTS / "three_mixes.yaml"), CLUSTER)
    assert 2000 < long.time.ridge_tokens < 7000  # type: ignore[union-attr]
    assert any("packing will not make the steps themselves faster" in note for note in long.notes)
    lanes = ["blueprint.lanes.sequence_length=256", "blueprint.lanes.rows_per_microstep=1"]
    short = plan(load_experiment(EXPERIMENTS / "three_mixes.yaml", lanes), CLUSTER)
    assert any("packing makes steps about 3.0 times faster" in note for note in short.notes)
    assert any("packing will not" in note for note in plan(load_experiment(QUICKSTART), LAPTOP).notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["body.threads=2"], "its 2 rows shared by 2 processes"),
        (["body.threads=2", "blueprint.lanes={sequence_length: 64, rows_per_step: 1}"], "one row of 64 tokens is too short"),
        (["body.threads=2", "blueprint.lanes={sequence_length: 256, rows_per_step: 1}"], "has 2 threads in its operations"),
        (["body.threads=1"], None),
        (["body={threads: 2, lanes: fixed}"], None),
    ],
)
def test_it_says_how_a_variant_trains_that_is_left_alone(changes: list[str], words: str | None) -> None:
    notes = [note for note in plan(load_experiment(QUICKSTART, changes), LAPTOP).notes if "left alone" in note]
    assert len(notes) == (words is not None)
    assert words is None or words in notes[0]


def test_early_stopping_narrows_time_only_from_below() -> None:
    stopped = plan(load_experiment(QUICKSTART), LAPTOP).time
    whole = plan(load_experiment(QUICKSTART, ["population.scheduler={type: fifo}"]), LAPTOP).time
    assert stopped.train_most == whole.train_most == whole.train_least  # type: ignore[union-attr]
    assert stopped.train_least == pytest.approx(20 / 64 * whole.train_most, rel=0.3)  # type: ignore[union-attr]


def test_an_unknown_model_says_when_figures_come(tmp_path: Path) -> None:
    override = "base={type: pretrained, model: someone/unheard-of}"
    planned = plan(load_experiment(QUICKSTART, [override]), LAPTOP)
    assert planned.memory is None
    assert planned.fits
    assert "config.json of someone/unheard-of" in planned.notes[0]
    snapshot = tmp_path / "hub" / "models--someone--unheard-of" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 512}
    (snapshot / "config.json").write_text(json.dumps(sizes))
    assert (
        plan(load_experiment(QUICKSTART, [override]), LAPTOP).parameters
        == shape_of(PretrainedBase(type="pretrained", model=str(snapshot))).parameters
    )  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read"),
        ("[]", "holds no mapping"),
        ('{"hidden_size": -1, "num_attention_heads": 2}', "hidden_size is -1"),
        ("[" * 10**5, "read"),
    ],
)
def test_a_broken_config_is_one_typed_error(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ModelError, match=words):
        read_shape(path, "x")


def test_this_machine_has_processors_and_memory() -> None:
    here = Hardware.local()
    assert here.cpus >= 1
    assert here.memory > 100 << 20
    assert "CPU cores" in here.line()


def test_the_body_of_the_floor_is_the_morphology_of_the_floor() -> None:
    assert Morphology() >> BODY_FLOOR == Morphology()


def test_planning_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; import chrysalis_ray.training.planning.planner, chrysalis_ray.config.loading;"
        "print([name for name in ('torch', 'ray', 'numpy', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_bank_has_room_for_the_moments_of_the_optimizer() -> None:
    def bank(*settings: str) -> int:
        memory = plan(load_experiment(QUICKSTART, settings), LAPTOP).memory
        assert memory is not None
        return memory.bank

    adamw = bank()
    assert bank("blueprint.optimizer.type=sgd") == adamw * 12 // 16
    assert bank("blueprint.optimizer.type=adadelta") == adamw
    searched = "population.search.optimizer={type: choice, values: [adam, rmsprop]}"
    assert bank("blueprint.optimizer.type=sgd", searched) == adamw


def test_searched_batch_sizes_are_planned_for_by_what_a_pass_takes() -> None:
    """Memory by the rows of the smallest step, steps by the largest, and a word on that."""
    searched = load_experiment(EXPERIMENTS / "batch_sizes.yaml")
    fixed = load_experiment(
        EXPERIMENTS / "batch_sizes.yaml",
        [
            "blueprint.lanes={sequence_length: 64, rows_per_step: 8, rows_per_microstep: 1}",
            "population.search={learning_rate: {type: grid, values: [2e-3, 8e-3]}}",
        ],
    )
    one, other = plan(searched, LAPTOP), plan(fixed, LAPTOP)
    assert (one.steps, one.chunk_steps) == (other.steps, other.chunk_steps) == (48, 8)
    assert one.memory == other.memory
    assert any(note.startswith("steps of 1, 2, 4, 8 rows") for note in one.notes)
    assert not any(note.startswith("steps of") for note in other.notes)


def test_what_judging_holds_is_counted_where_it_is_more_than_training_holds() -> None:
    """Hidden states of 15 candidates on 48 rows, a layer for each of two threads, and passes of 8192 tokens in each."""
    loaded = load_experiment(QUICKSTART)
    shape = shape_of(loaded.base)
    heard = 15 * 48 * 64 * 256 * 4
    assert heard_bytes(shape, loaded) == heard
    passes, worn = 2 * 8192 * (3 * 256 + 64) * 4, 2 * shape.layer_parameters * 4
    assert judged_bytes(shape, loaded, 8) == heard + passes + worn
    memory = plan(loaded, LAPTOP).memory
    assert memory.judging == heard + passes + worn > memory.activations + memory.logits
    assert memory.total == memory.base + memory.bank + memory.process + memory.judging
    assert any(f"judging {memory.judging >> 20} MiB, process" in line for line in plan(loaded, LAPTOP).lines())
    much = load_experiment(QUICKSTART, ["evaluate.rows_per_domain=1000"])
    assert heard_bytes(shape, much) == KEPT_ON_CPU
    apart = plan(much, LAPTOP).memory.total - plan(loaded, LAPTOP).memory.total
    assert apart == KEPT_ON_CPU - heard
    long = load_experiment(QUICKSTART, ["blueprint.lanes.rows_per_step=48"])
    memory = plan(long, LAPTOP).memory
    assert memory.total == memory.base + memory.bank + memory.process + memory.activations + memory.logits


def test_nobody_is_heard_where_one_variant_is_all_there_is() -> None:
    alone = load_experiment(QUICKSTART, ["population.variants=1"])
    assert heard_bytes(shape_of(alone.base), alone) == 0
