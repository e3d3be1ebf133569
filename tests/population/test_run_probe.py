"""A probe on a real Ray: heats, the choice, the run by what was chosen; and whatever is killed, the same comes out."""

import json
import os
import signal
import subprocess
import sys

import pytest
from garden import adapters, cuts, end

from chrysalis_ray.config.loading import load_blueprint
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.store import Store
from chrysalis_ray.evaluate.contest import BARE, BITS, GAIN, Contest, Judged, decide
from chrysalis_ray.evaluate.scores import SelectScores, read_select

pytestmark = pytest.mark.ray

MINE = {
    "fast.yaml": "extends: ./blueprint.yaml\nname: fast\noptimizer: {learning_rate: 3e-2}\nlora: {rank: 6, alpha: 24}\n",
    "lazy.yaml": "extends: ./blueprint.yaml\nname: lazy\noptimizer: {learning_rate: 1e-9}\nlanes: {sequence_length: 64}\n",
}
SETTINGS = (
    "probe={candidates: [./fast.yaml, ./lazy.yaml], tokens: 2048, rows_per_domain: 24}",
    "population.search={}",
    "population.variants=2",
    "population.reports=2",
    "population.scheduler={type: fifo}",
    "tracking={wandb: disabled}",
)


@pytest.fixture(scope="module")
def probed(garden):
    for name, text in MINE.items():
        (garden.folder / name).write_text(text)
    return garden.run("probed", *SETTINGS)


def outcome(run):
    return json.loads((run / "probe" / "probe.json").read_text())


def test_the_choice_is_that_of_the_select_scores_of_two_heats(probed):
    probe = RunLayout(probed).probe()
    first, second = probe.heat("heat-00"), probe.heat("heat-01")
    assert not first.report_scores.exists()
    assert not second.report_scores.exists()
    scores = read_select(first.select_scores).candidates
    packed = {"./blueprint.yaml": scores["v000-mean"], "./fast.yaml": scores["v001-mean"], BARE: scores["seed"]}
    others = read_select(second.select_scores)
    alone = {"./lazy.yaml": others.of("v000-mean"), BARE: others.of("seed")}
    judged = [Judged("the base of both", SelectScores(rows)) for rows in (packed, alone)]
    told = {key: value for key, value in outcome(probed).items() if key != "question"}
    assert Contest.from_json(told) == decide(judged, "./blueprint.yaml", {}, bootstrap_samples=200, rng_seed=5)
    assert told["unit"] == GAIN  # rows of another length see other parts of the documents
    assert abs(told["standings"][2]["loss"]) < 1e-4  # a learning rate of nearly zero gains nothing, however long its rows
    assert told["winner"] == "./fast.yaml"  # thirty times the learning rate: what little there is to learn, it learns


def test_candidates_trained_equal_tokens_on_equal_rows_in_one_body(probed):
    heat = RunLayout(probed).probe().heat("heat-00")
    own, fast = (json.loads(heat.variant(name).read_text()) for name in ("v000-mean", "v001-mean"))
    assert (own["rng_seed"], own["epigenome"], own["steps"]) == (fast["rng_seed"], fast["epigenome"], fast["steps"])
    assert (fast["hyperparameters"]["rank"], fast["hyperparameters"]["alpha"]) == (6, 24)
    assert fast["hyperparameters"]["learning_rate"] == 3e-2
    assert {len(body["results"]) for _, body in Store(heat.store).cuts()} == {2}


def test_the_run_trains_what_was_chosen_and_keeps_the_choice(garden, probed):
    manifest = json.loads((probed / "run.json").read_text())
    assert manifest["chosen"]["probed"] is True
    assert manifest["chosen"]["reasons"][-1].startswith("probe: ./fast.yaml: better than ./blueprint.yaml by")
    assert manifest["experiment"]["experiment"]["probe"]["tokens"] == 2048
    for path in probed.glob("variants/*/variant.json"):
        assert json.loads(path.read_text())["hyperparameters"]["alpha"] == 24
    assert (probed / "verdict.json").exists()
    log = (garden.runs / "probed.log").read_text()
    assert "3 blueprints, 2,048 tokens each, in 2 heats, one after another; judged on select" in log
    before = {path: path.stat().st_mtime_ns for path in (probed / "probe").rglob("*.json")}
    garden.run("probed", *SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in (probed / "probe").rglob("*.json")} == before  # nothing tried again


def test_another_probe_does_not_take_over_the_directory(garden, probed):
    process = garden.start("probed", *SETTINGS, "probe.tokens=1024")
    assert process.wait(timeout=60) == 1
    assert "holds a probe of other candidates, text or budget" in garden.log("probed")


@pytest.mark.slow
def test_a_verb_chooses_for_a_base_and_leaves_a_blueprint(garden, probed):
    """The base is the one that was made for the runs above: an ordinary folder of transformers."""
    (base,) = {json.loads(path.read_text())["path"] for path in probed.glob("base.json")}
    line = [sys.executable, "-m", "chrysalis_ray", "blueprint", "choose", base, "--probe", str(garden.folder / "tiny.yaml"),
            "--runs", str(garden.runs)]  # fmt: skip
    text = (garden.folder / "tiny.yaml").read_text()
    probing = "probe: {tokens: 1024, ranks: [1], learning_rates: [1, 0.00001], rows_per_domain: 12}\n"
    (garden.folder / "tiny.yaml").write_text(text.replace("  tokens_per_variant: 768", "  tokens_per_variant: 8192") + probing)
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    finally:
        (garden.folder / "tiny.yaml").write_text(text)
    assert done.returncode == 0, done.stderr[-3000:]
    assert " s  probe    auto" in done.stderr
    written = garden.folder / "chosen.yaml"
    written.write_text(done.stdout)
    blueprint = load_blueprint(written)
    outcome = json.loads((garden.runs / "tiny-choice" / "probe" / "probe.json").read_text())
    assert outcome["winner"] == "auto"  # it learns, and a rate of nearly zero does not
    assert (blueprint.base.model, blueprint.optimizer.learning_rate) == (base, 2e-3)
    assert any(told["why"] == "worse" for told in outcome["standings"])


@pytest.mark.slow
def test_bases_with_other_tokenizers_are_compared_on_whole_documents(garden, probed):
    (garden.folder / "other.yaml").write_text(
        "extends: ./blueprint.yaml\nname: other\nbase: {vocabulary: 400, hidden_size: 48}\n"
    )
    run = garden.run("two-bases", *SETTINGS[1:], "probe={candidates: [./other.yaml], tokens: 512}")
    told = outcome(run)
    assert told["unit"] == BITS
    assert told["documents"] >= 20
    assert all(1 < standing["loss"] < 9 for standing in told["standings"])
    assert (
        json.loads((run / "base.json").read_text())["sha256"]
        == json.loads(
            next(path for path in sorted((run / "probe").glob("heat-*/base.json")) if _is_of(path, told["winner"])).read_text()
        )["sha256"]
    )


def _is_of(path, winner):
    return path.parent.name == ("heat-00" if winner == "./blueprint.yaml" else "heat-01")


@pytest.mark.slow
def test_a_probe_on_a_cluster_that_is_joined_chooses_for_it(garden, probed):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        sizes = (
            "hidden_size: 32, layers: 2, heads: 2, key_value_heads: 1, head_size: 16, intermediate_size: 64, vocabulary: 512"
        )
        told = ("blueprint=auto", f"base={{type: embedded, {sizes}, pretrain_tokens: 2000}}", *SETTINGS[1:],
                "population.tokens_per_variant=8192", "probe={tokens: 1024, ranks: [1, 2], learning_rates: [1]}")  # fmt: skip
        run = garden.run("on-cluster", *told, address=cluster.address)
    finally:
        cluster.shutdown()
    assert outcome(run)["winner"] in ("auto", "rank 16")
    manifest = json.loads((run / "run.json").read_text())
    assert "body: one worker that computes with 2 threads: there is no GPU" in manifest["chosen"]["reasons"]
    assert json.loads((run / "plan.json").read_text())["said"]["hardware"]["cpus"] == 2
    assert (run / "verdict.json").exists()


@pytest.mark.slow
def test_a_killed_probe_goes_on_and_chooses_the_same(garden, probed):
    process = garden.start("probe-killed", *SETTINGS)
    try:
        garden.wait_for("probe-killed", lambda run: len(cuts(run / "probe" / "heat-01")) >= 1, process)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        end(process)
    first = garden.runs / "probe-killed" / "probe" / "heat-00" / "evaluation" / "select.json"
    judged = first.stat().st_mtime_ns
    assert not (garden.runs / "probe-killed" / "run.json").exists()
    run = garden.run("probe-killed", *SETTINGS)
    assert first.stat().st_mtime_ns == judged  # the finished heat was not run again
    assert outcome(run) == outcome(probed)
    assert adapters(run) == adapters(probed)


def test_who_learned_from_a_document_in_a_heat_is_told(garden, probed):
    from chrysalis_ray.genome.build import open_genome
    from chrysalis_ray.population.witnesses import places_of_text, runs_of, witnesses

    runs = [layout for layout in runs_of([garden.runs]) if layout.root.is_relative_to(probed)]
    heats = [RunLayout(probed).probe().heat(name).root.resolve() for name in ("heat-00", "heat-01")]
    assert [layout.root for layout in runs] == [probed.resolve(), *heats]
    genome = open_genome(probed / "genome")
    trained = [row["doc_id"] for row in genome.manifest["content"]["documents"] if row["split"] == "train"]
    told = {witness.run: witness for witness in witnesses(runs, trained[:40])}
    assert [told[str(heat)].unknown for heat in heats] == [None, None]
    assert set(told[str(heats[0])].variants) == {"v000-mean", "v001-mean"}
    assert told[str(heats[0])].adapters == ("variants/v000-mean/adapter", "variants/v001-mean/adapter")
    places = places_of_text(genome, runs, [str(heats[0])])
    assert str(heats[0] / "genome") in places
    assert any(place.startswith(str(garden.runs / ".cache" / "tokens")) for place in places)
