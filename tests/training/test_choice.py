"""`blueprint: auto`: rules that always give a sound blueprint, with a reason for each choice, which a run keeps."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chrysalis_ray.config.blueprint import Base, Blueprint, EmbeddedBase, PretrainedBase
from chrysalis_ray.config.claim import claim_run, run_directory
from chrysalis_ray.config.loading import load_blueprint, load_experiment, shipped_blueprints
from chrysalis_ray.config.resolve import Chosen
from chrysalis_ray.config.writing import blueprint_text
from chrysalis_ray.core.errors import ConfigError, ModelError, RunError
from chrysalis_ray.core.layout import CACHE, CacheLayout
from chrysalis_ray.core.records import read_json, write_json
from chrysalis_ray.training.planning import choice, rules
from chrysalis_ray.training.planning.choice import choose, chooser
from chrysalis_ray.training.planning.forecast import settle_plan
from chrysalis_ray.training.planning.hardware import GIB, Hardware
from chrysalis_ray.training.planning.planner import plan
from chrysalis_ray.training.planning.rules import FEWEST_STEPS, RULES, Rule
from chrysalis_ray.training.planning.shapes import KNOWN, shape_of

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
LAPTOP = Hardware(cpus=2, memory=16 * GIB)
SMALL_BASE, LARGE_BASE = "Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"


@pytest.fixture(autouse=True)
def no_models_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def pretrained(model: str) -> PretrainedBase:
    return PretrainedBase(type="pretrained", model=model)


def gpus(count: int, gibibytes: float = 80, name: str = "NVIDIA H100 80GB HBM3") -> Hardware:
    return Hardware(cpus=8 * count, memory=64 * count * GIB, gpus=count, gpu_memory=int(gibibytes * GIB), gpu_name=name)


def read(chosen: Chosen, tmp_path: Path) -> Blueprint:
    path = tmp_path / "chosen.yaml"
    path.write_text(chosen.text)
    return load_blueprint(path)


def auto(*settings_: str, name: str = "three_mixes", hardware: Hardware = LAPTOP, base: str = SMALL_BASE, **where: object):
    told = ["blueprint=auto", f"base={{type: pretrained, model: {base}}}", *settings_]
    return load_experiment(EXPERIMENTS / f"{name}.yaml", told, chooser(hardware=hardware, **where))  # type: ignore[arg-type]


# the rules ----------------------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    base=st.sampled_from(
        [*map(pretrained, KNOWN), EmbeddedBase(type="embedded"), EmbeddedBase(type="embedded", hidden_size=16, head_size=8)]
    ),
    cpus=st.integers(1, 256),
    count=st.integers(0, 64),
    gibibytes=st.floats(8, 192),
    variants=st.integers(1, 4096),
    reports=st.integers(1, 500),
    tokens=st.none() | st.integers(1, 10**11),
    megabytes=st.none() | st.floats(0, 1e5),
)
def test_any_base_machine_and_budget_gets_a_sound_blueprint(
    base: Base,
    cpus: int,
    count: int,
    gibibytes: float,
    variants: int,
    reports: int,
    tokens: int | None,
    megabytes: float | None,
) -> None:
    machine = Hardware(cpus=cpus, memory=16 * GIB, gpus=count, gpu_memory=int(gibibytes * GIB) if count else 0, gpu_name="X")
    chosen = choose(base, machine, variants=variants, reports=reports, tokens=tokens, megabytes=megabytes)
    blueprint, shape = _parsed(chosen.text), shape_of(base)
    assert shape is not None
    lanes, body = blueprint.lanes, blueprint.body
    assert blueprint.base == base
    assert lanes.sequence_length <= (shape.longest_row or lanes.sequence_length)
    assert lanes.rows_per_microstep is not None
    assert lanes.rows_per_step % lanes.rows_per_microstep == 0
    assert blueprint.lora.rank <= min(min(sides) for sides in shape.linears().values())
    assert (
        shape.lora_parameters(1, blueprint.lora.targets) == sum(sum(sides) for sides in shape.linears().values()) * shape.layers
    )
    assert (body.gpus_per_worker == 1.0) == (count > 0)
    assert body.cpus_per_worker is not None
    assert body.cpus_per_worker * max(count, 1) <= max(cpus, count)
    assert chosen.tokens == tokens or (tokens is None and chosen.tokens >= 1)
    steps = chosen.tokens // (lanes.sequence_length * lanes.rows_per_step)
    assert steps >= min(FEWEST_STEPS, reports) or lanes.sequence_length <= 32
    subjects = [reason.partition(":")[0] for reason in chosen.reasons]
    assert len(set(subjects)) == len(subjects) >= 8
    assert all("{" not in reason and reason.partition(": ")[2] for reason in chosen.reasons)
    assert choose(base, machine, variants=variants, reports=reports, tokens=tokens, megabytes=megabytes) == chosen


def _parsed(text: str) -> Blueprint:
    from chrysalis_ray.config.yaml_tree import parse_tree

    return Blueprint.model_validate(parse_tree(text, "x").root.data(), strict=True)


def test_every_row_of_the_table_is_the_first_to_apply_somewhere() -> None:
    """A rule that never decides is a rule that nobody needs; one that always applies ends each group."""
    deciding: set[Rule] = set()
    machines = [LAPTOP, gpus(1, 24), gpus(8), gpus(1, 16, "Tesla T4")]
    bases: list[Base] = [*map(pretrained, KNOWN), EmbeddedBase(type="embedded")]
    budgets = itertools.product((None, 2000, 10**6, 10**11), (None, 100.0), (False, True))
    for base, machine, budget in itertools.product(bases, machines, budgets):
        deciding |= _deciding(base, machine, *budget)
    strangers = {rule for rule in RULES if "none is shipped" in rule.why or "QLoRA's" in rule.why}  # see the test below
    assert set(RULES) - deciding == strangers
    last = {rule.sets: rule for rule in RULES}
    assert all(rule.when is rules._always for rule in last.values())


def _deciding(base: Base, machine: Hardware, tokens: int | None, megabytes: float | None, searched: bool) -> set[Rule]:
    shape = shape_of(base)
    assert shape is not None
    facts, found = rules.Facts(shape, machine, 4, 8, tokens, megabytes, choice._recipes(), searched), set()
    for rule in RULES:
        if rule.sets not in facts.made and rule.when(facts):
            facts.made[rule.sets] = rule.value(facts)
            found.add(rule)
    return found


def test_a_family_without_a_blueprint_is_told_so_and_learns_by_its_size(tmp_path: Path) -> None:
    sizes = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    chosen = choose(pretrained(str(tmp_path)), gpus(1), variants=4, tokens=10**7)
    blueprint = read(chosen, tmp_path)
    assert blueprint.lora.targets == ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert blueprint.lanes.sequence_length == 1024  # its table of positions
    assert blueprint.optimizer.learning_rate == 2e-4
    assert any("none is shipped for gpt2" in reason for reason in chosen.reasons)
    large = {"model_type": "llamalike", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
             "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(large))
    assert read(choose(pretrained(str(tmp_path)), gpus(8), variants=4), tmp_path).optimizer.learning_rate == 1e-4


@pytest.mark.parametrize("name", [name for name in shipped_blueprints() if name not in ("tiny", "qwen3-8b-zero3")])
def test_for_a_shipped_base_the_shipped_recipe_is_taken(name: str, tmp_path: Path) -> None:
    shipped = load_blueprint(shipped_blueprints()[name])
    chosen = read(choose(shipped.base, gpus(1), variants=8, tokens=26_214_400), tmp_path)
    assert (chosen.optimizer, chosen.schedule) == (shipped.optimizer, shipped.schedule)
    assert (chosen.lora.targets, chosen.lora.alpha) == (shipped.lora.targets, shipped.lora.alpha)
    assert chosen.genome == shipped.genome
    assert chosen.lanes.sequence_length == shipped.lanes.sequence_length


def test_small_bases_get_a_selected_genome_and_a_budget_by_their_adapter() -> None:
    small, large = (
        auto("population.tokens_per_variant=auto", hardware=gpus(1), base=name) for name in (SMALL_BASE, LARGE_BASE)
    )
    shape = KNOWN[SMALL_BASE]
    targets = small.blueprint.lora.targets
    assert small.experiment.population.tokens_per_variant == shape.lora_parameters(16, targets) == 10_092_544
    assert "near_duplicate" in small.experiment.genome.exclude
    assert "near_duplicate" not in large.experiment.genome.exclude
    assert large.experiment.population.tokens_per_variant == 600_000_000 // 4  # one pass over three sources of 200 MB
    told = plan(small, gpus(1))
    assert any(reason.startswith("genome: selected for a base of 0.596") for reason in told.chosen)
    assert any(reason == "genome: documents marked near_duplicate are left out" for reason in told.chosen)


def test_what_the_experiment_says_of_its_genome_stands(good_git: Path) -> None:
    loaded = load_experiment(good_git, choose=chooser(hardware=LAPTOP))
    assert [getattr(source, "commit", None) for source in loaded.experiment.genome.sources] == ["v2", "v3"]
    assert loaded.experiment.genome.exclude == ("secret",)
    assert loaded.selected == (
        f"genome: {good_git.parent / 'repository'} at v1 is left out: the first snapshot written stands",
    )


@pytest.fixture
def good_git(tmp_path: Path) -> Path:
    """Three snapshots of one repository, of which the mixes name the domain of the last."""
    repository = tmp_path / "repository"
    repository.mkdir()
    path = tmp_path / "experiment.yaml"
    sources = "".join(
        f"    - {{type: git, url: {repository}, commit: {commit}, domain: {domain}}}\n"
        for commit, domain in (("v2", "code"), ("v1", "older"), ("v3", "newest"))
    )
    path.write_text(
        f"name: snapshots\nblueprint: auto\nbase: {{type: embedded}}\ngenome:\n  exclude: [secret]\n  sources:\n{sources}"
        "population:\n  variants: 2\n  tokens_per_variant: 40000\n  epigenomes: {type: listed, mixes: [{name: a, express: "
        "{code: 1, newest: 1}}]}\n"
    )
    return path


def test_ranks_grow_with_the_budget_and_gpus_without_bf16_get_fp32(tmp_path: Path) -> None:
    ranks = [
        read(choose(pretrained(SMALL_BASE), gpus(1), variants=8, tokens=n), tmp_path).lora.rank for n in (10**6, 10**7, 10**8)
    ]
    assert ranks == [8, 16, 64]
    old = choose(pretrained(SMALL_BASE), gpus(1, 16, "Tesla T4"), variants=8)
    assert read(old, tmp_path).body.precision == "fp32"
    assert "body.precision: fp32: Tesla T4 has no bf16" in old.reasons


# in an experiment ---------------------------------------------------------------------------------------------------


def test_the_text_reads_back_as_the_blueprint_it_was_written_from(tmp_path: Path) -> None:
    for path in shipped_blueprints().values():
        blueprint = load_blueprint(path)
        written = tmp_path / "written.yaml"
        written.write_text(blueprint_text(blueprint, ["a comment\nof two lines: {x}"]))
        assert load_blueprint(written) == blueprint


def test_auto_is_planned_with_its_reasons_and_set_reaches_into_it() -> None:
    loaded = auto("blueprint.lora.rank=4", hardware=gpus(2))
    assert loaded.blueprint.lora.rank == 4
    planned = plan(loaded, gpus(2))
    assert planned.fits, planned.obstacles
    lines = planned.lines()
    assert "chosen: blueprint: start from qwen3-0.6b, which is shipped for this base" in lines
    assert any(line.startswith("chosen: body.count and body.workers: auto: 2 bodies of 1 worker") for line in lines)
    assert loaded.resolved()["experiment"]["body"]["count"] == "auto"


def test_searched_batch_sizes_keep_a_pass_as_small_as_the_smallest() -> None:
    told = ["blueprint=auto", "base={type: embedded}"]
    loaded = load_experiment(EXPERIMENTS / "batch_sizes.yaml", told, chooser(hardware=LAPTOP))
    assert loaded.blueprint.lanes.rows_per_microstep is None
    assert plan(loaded, LAPTOP).fits


@pytest.mark.parametrize(
    ("overrides", "choosing", "words"),
    [
        (["base=", "population.tokens_per_variant=auto"], True, "blueprint: auto is chosen for a base"),
        ([], False, "blueprint: auto needs somebody to choose"),
        (["population.variants=0"], True, "population.variants: must be >= 1"),
        (["population.tokens_per_variant=100"], True, "only 3 optimizer steps of 32"),
        (["population.tokens_per_variant=automatic"], True, "'automatic' is text"),
        (["blueprint.lora.rank=0"], True, "lora.rank: must be >= 1"),
        (["blueprint.lora.rnak=2"], True, "did you mean 'rank'"),
        (["blueprint=tiny", "population.tokens_per_variant=auto"], True, "auto goes with `blueprint: auto`"),
    ],
)
def test_what_cannot_be_chosen_for_is_one_typed_error(overrides: list[str], choosing: bool, words: str) -> None:
    told = ["blueprint=auto", "base={type: embedded}", *overrides]
    with pytest.raises(ConfigError) as caught:
        load_experiment(EXPERIMENTS / "quickstart.yaml", told, chooser(hardware=LAPTOP) if choosing else None)
    assert words in str(caught.value)


def test_an_experiment_without_a_base_is_told_what_to_add() -> None:
    with pytest.raises(ConfigError, match=r"auto is chosen for a base; add `base: \{type: pretrained"):
        load_experiment(EXPERIMENTS / "quickstart.yaml", ["blueprint=auto"], chooser(hardware=LAPTOP))


def choose_of_hub(tmp_path: Path, **told: str) -> subprocess.CompletedProcess[str]:
    """`chrysalis blueprint choose` of a model that only the hub has."""
    code = (
        "from chrysalis_ray.cli.main import app; import sys;"
        "sys.argv = ['chrysalis', 'blueprint', 'choose', 'someone/unheard-of']; app(prog_name='chrysalis')"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), **told}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_a_hub_model_without_network_is_a_typed_error_with_a_remedy(tmp_path: Path) -> None:
    """Whether the hub's client is told so or finds out, which it does without asking again and again."""
    with socket.socket() as nobody:  # bound, but nobody listens: a connection is refused
        nobody.bind(("127.0.0.1", 0))
        refused = choose_of_hub(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{nobody.getsockname()[1]}")
    for done in (choose_of_hub(tmp_path, HF_HUB_OFFLINE="1"), refused):
        assert done.returncode == 1
        assert done.stdout == ""
        assert "needs the sizes of someone/unheard-of" in done.stderr
        assert "remedy: check name and network" in done.stderr
        assert "Traceback" not in done.stderr
    assert "the Hugging Face hub cannot be reached" in refused.stderr
    assert "Retrying" not in refused.stderr


def test_a_hub_that_is_busy_is_asked_again(tmp_path: Path) -> None:
    config = json.dumps(
        {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
         "vocab_size": 1000, "max_position_embeddings": 2048}
    ).encode()  # fmt: skip
    asked: list[str] = []

    class Busy(BaseHTTPRequestHandler):
        def answer(self) -> None:
            if not self.path.endswith("config.json"):  # the client wants to know more than we do
                self.send_error(404)
                return
            asked.append(self.command)
            self.send_response(503 if len(asked) <= 2 else 200)
            told = {"X-Repo-Commit": "0" * 40, "ETag": '"' + "1" * 40 + '"', "Content-Length": str(len(config))}
            for name, value in told.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(config)

        do_HEAD = do_GET = answer

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = choose_of_hub(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert asked == ["HEAD", "HEAD", "HEAD", "GET"]
    assert "someone/unheard-of" in done.stdout


def test_a_broken_config_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": -1, "num_attention_heads": 2}')
    with pytest.raises(ModelError, match="hidden_size is -1"):
        choose(pretrained(str(tmp_path)), LAPTOP, variants=2)
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 99,
            "sliding_window": 4}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    with pytest.raises(ModelError, match="4 tokens"):
        choose(pretrained(str(tmp_path)), LAPTOP, variants=2)


# in a run -----------------------------------------------------------------------------------------------------------


def test_a_run_keeps_what_was_chosen_whatever_the_rules_say_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = ["blueprint=auto", "base={type: embedded}", "population.tokens_per_variant=auto"]
    quickstart = EXPERIMENTS / "quickstart.yaml"
    first = load_experiment(quickstart, told, chooser(tmp_path, hardware=LAPTOP))
    layout = run_directory(first, tmp_path, None)
    run_id = claim_run(first, layout)
    said: list[tuple[str, str]] = []
    settle_plan(first, layout, CacheLayout(tmp_path / CACHE), lambda name, line: said.append((name, line)))
    assert first.chosen is not None
    assert [line for name, line in said if name == "chosen"][: len(first.chosen.reasons)] == list(first.chosen.reasons)
    assert read_json(layout.plan)["said"]["chosen"][: len(first.chosen.reasons)] == list(first.chosen.reasons)
    assert read_json(layout.run_manifest)["experiment"]["blueprint"]["lora"]["rank"] == first.blueprint.lora.rank

    other = tuple(rule for rule in RULES if rule.sets != "lora.rank")
    always = Rule("lora.rank", lambda f: True, lambda f: 2, "{value}, by other rules")
    monkeypatch.setattr(choice, "RULES", (*other[:3], always, *other[3:]))
    again = load_experiment(quickstart, told, chooser(tmp_path, hardware=gpus(8)))
    assert again.blueprint == first.blueprint
    assert again.experiment == first.experiment
    assert claim_run(again, layout) == run_id
    settled = settle_plan(again, layout, CacheLayout(tmp_path / CACHE), lambda name, line: said.append((name, line)))
    assert isinstance(settled.body.slots, int)
    fresh = load_experiment(quickstart, told, chooser(tmp_path, "another", LAPTOP))
    assert fresh.blueprint.lora.rank == 2 != first.blueprint.lora.rank
    with pytest.raises(RunError, match="holds another experiment"):
        claim_run(fresh, layout)


def test_what_was_chosen_for_another_question_is_not_taken(tmp_path: Path) -> None:
    """The same name, another base: `plan` must not tell of the old one, and the run is refused."""
    quickstart, told = EXPERIMENTS / "quickstart.yaml", ["blueprint=auto", "base={type: embedded}"]
    first = load_experiment(quickstart, told, chooser(tmp_path, hardware=LAPTOP))
    layout = run_directory(first, tmp_path, None)
    claim_run(first, layout)
    other = load_experiment(
        quickstart, ["blueprint=auto", "base={type: pretrained, model: Qwen/Qwen3-8B}"], chooser(tmp_path, hardware=gpus(1))
    )
    assert other.blueprint.name == "auto-qwen3-8b"
    assert load_experiment(quickstart, told, chooser(tmp_path, hardware=gpus(1))).blueprint == first.blueprint
    with pytest.raises(RunError, match="holds another experiment"):
        claim_run(other, layout)


def test_an_edited_or_damaged_choice_is_never_taken_silently(tmp_path: Path) -> None:
    told = ["blueprint=auto", "base={type: embedded}"]
    quickstart = EXPERIMENTS / "quickstart.yaml"
    first = load_experiment(quickstart, told, chooser(tmp_path, hardware=LAPTOP))
    layout = run_directory(first, tmp_path, None)
    claim_run(first, layout)
    manifest = read_json(layout.run_manifest)
    edited = {**manifest, "chosen": {**manifest["chosen"], "text": manifest["chosen"]["text"].replace("rank: 8", "rank: 7")}}
    write_json(layout.run_manifest, edited)
    with pytest.raises(RunError, match="holds another experiment"):
        claim_run(load_experiment(quickstart, told, chooser(tmp_path, hardware=LAPTOP)), layout)
    write_json(layout.run_manifest, {**manifest, "chosen": {**manifest["chosen"], "text": "lora: [\n"}})
    with pytest.raises(ConfigError, match="blueprint: auto:"):
        load_experiment(quickstart, told, chooser(tmp_path, hardware=LAPTOP))
    layout.run_manifest.write_text("{")
    with pytest.raises(RunError, match="is damaged"):
        claim_run(load_experiment(quickstart, told, chooser(tmp_path, hardware=LAPTOP)), layout)
