"""Population based training on a packed population, through unmodified Ray Tune: an exploit really copies a row."""

import json

import pytest
import torch
from garden import cuts, population

from chrysalis_ray.body.turn import first_position, next_position
from chrysalis_ray.core.records import Variant
from chrysalis_ray.core.store import Store
from chrysalis_ray.genome.tokens import open_tokens
from chrysalis_ray.seed.soul import unpack_seed
from chrysalis_ray.training.base import load_base
from chrysalis_ray.training.engine import make_engine
from chrysalis_ray.training.pack import Pack
from chrysalis_ray.training.step import train_chunk

pytestmark = pytest.mark.ray

SETTINGS = (
    "population.scheduler={type: pbt, perturb_every_reports: 1, quantile: 0.5}",
    "population.search.learning_rate={type: log_uniform, low: 1e-5, high: 1e-2}",
    "population.search.rank={type: grid, values: [2, 4]}",
)


LEVELS = (
    "population.scheduler={type: pbt, perturb_every_reports: 1, quantile: 0.5, mutate: [learning_rate, levels], "
    "level_strength: 0.7}",
    *SETTINGS[1:],
    "population.epigenomes={type: brightened, level: 3.0, floors: {code: 0.1}, loss_weights: {code: 2}}",
)


@pytest.fixture(scope="module", params=["bred", pytest.param("bred-levels", marks=pytest.mark.slow)])
def bred(garden, request):
    return garden.run(request.param, *(LEVELS if request.param == "bred-levels" else SETTINGS))


def results(run):
    """Every chunk of every cut, by the position it led to."""
    return {target: entry for _, body in Store(run / "store").cuts() for target, entry in body["results"].items()}


def exploits(run):
    """(variant, donor, origin, target) of every chunk that started from somebody else's position."""
    known = results(run)
    return [
        (entry["variant_id"], known[entry["origin"]]["variant_id"], entry["origin"], target)
        for target, entry in known.items()
        if entry["origin"] in known and known[entry["origin"]]["variant_id"] != entry["variant_id"]
    ]


def test_all_variants_end_and_some_took_over_anothers_weights(bred):
    assert {row["state"] for row in population(bred).values()} == {"finished"}
    assert exploits(bred)
    metrics = [json.loads(line) for line in (bred / "metrics.jsonl").read_text().splitlines()]
    variant, *_, target = exploits(bred)[0]
    row = next(line for line in metrics if line["position"] == target)
    first = Variant.from_json(json.loads((bred / "variants" / variant / "variant.json").read_text()))
    assert row["hyperparameters"]["learning_rate"] != first.hyperparameters.learning_rate


def test_a_chunk_after_an_exploit_is_the_donors_row_trained_on(bred):
    """Take the donor's seed from the store, train the chunk alone in this process: the same row comes out."""
    store, known = Store(bred / "store"), results(bred)
    kept = [e for e in exploits(bred) if (bred / "store" / "blobs" / known[e[2]]["seed"][:2] / known[e[2]]["seed"]).exists()]
    ends = [e for e in kept if (bred / "store" / "blobs" / known[e[3]]["seed"][:2] / known[e[3]]["seed"]).exists()]
    assert ends, "no exploit whose seeds are both still in the store"
    _, donor, origin, target = ends[-1]
    start, _ = unpack_seed(store.get(known[origin]["seed"]))
    after, meta = unpack_seed(store.get(known[target]["seed"]))
    variant = Variant.from_json(meta["variant"])
    assert next_position(origin, variant) == target
    assert origin in variant.parents
    assert donor != variant.variant_id
    base = json.loads((bred / "base.json").read_text())
    targets = json.loads((bred / "seed" / "adapter_config.json").read_text())["target_modules"]
    torch.set_num_threads(1)
    pack = Pack(load_base(base["path"], "fp32"), targets, 1, 4, make_engine(0, "none", "fp32", "cpu"))
    _, donor_meta = unpack_seed(store.get(known[origin]["seed"]))
    pack.place(0, variant, start, donor_meta)
    train_chunk(pack, [0], open_tokens(bred / "tokens"), variant.chunk_steps)
    mine, _ = pack.harvest(0)
    assert set(mine) == set(after)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-5, atol=1e-6)
        if name.startswith("weight/") and name.endswith("lora_B"):
            assert not torch.equal(tensor, start[name])


def test_bred_levels_are_appended_to_the_mix(bred):
    """Every take-over goes on with the donor's schedule and a change at the row where it happened."""
    metrics = {row["position"]: row for row in map(json.loads, (bred / "metrics.jsonl").read_text().splitlines())}
    if bred.name == "bred":
        assert all(set(row["epigenome"]) == {"express", "prior"} for row in metrics.values())
        return
    for _, _, origin, target in exploits(bred):
        before, after = metrics[origin], metrics[target]
        row = before["report"] * (before["tokens"] // before["report"] // 32)  # rows of 32 tokens
        past = before["epigenome"].get("changes", [])
        assert after["epigenome"]["changes"][: len(past)] == past
        assert after["epigenome"]["changes"][-1]["row"] == row
        assert after["epigenome"]["express"] == before["epigenome"]["express"]


def test_positions_chain_from_the_shared_seed(bred):
    known = results(bred)
    for name, row in population(bred).items():
        variant = Variant.from_json(json.loads((bred / "variants" / name / "variant.json").read_text()))
        position, length = row["position"], 0
        while position in known:
            position, length = known[position]["origin"], length + 1
        assert position == first_position(variant)
        assert length == 6
    assert len(cuts(bred)) >= 6


def test_exposure_is_what_counting_by_hand_finds(bred):
    """`genome exposure` of some documents against drawing every row of every history, take-overs included."""
    from chrysalis_ray.core.layout import RunLayout
    from chrysalis_ray.genome.build import open_genome
    from chrysalis_ray.genome.exposure import ordinal_of
    from chrysalis_ray.population.ancestry import Ancestry
    from chrysalis_ray.population.exposure import exposure
    from chrysalis_ray.training.lanes import Feed

    layout = RunLayout(bred)
    genome, tokens, ancestry = open_genome(layout.genome), open_tokens(layout.tokens), Ancestry(layout)
    drawn: dict[str, list[tuple[int, str, int, str]]] = {}  # variant -> (step, domain, row, trained by)
    for name in ancestry.variants:
        for chunk in ancestry.history(name):
            feed = Feed(chunk.variant, tokens)
            for step in chunk.steps:
                drawn.setdefault(name, []).extend((step, *row, chunk.variant.variant_id) for row in feed.step(step).rows)
    assert any(who != name for name, rows in drawn.items() for *_, who in rows), "no take-over to tell of"
    documents = [row for row in genome.manifest["content"]["documents"] if row["split"] == "train"]
    seen = 0
    for row in documents[:: max(1, len(documents) // 12)]:
        domain, _, ordinal = ordinal_of(genome.manifest["content"]["documents"], row["doc_id"])
        held = (tokens.arrays[domain, "train"]["document"] == ordinal).sum(axis=1)
        told = exposure(layout, genome, tokens, row["doc_id"])
        for name, rows in drawn.items():
            by_hand = [(step, int(held[number])) for step, of, number, _ in rows if of == domain and held[number]]
            assert told[name]["steps"] == sorted({step for step, _ in by_hand})
            assert told[name]["tokens"] == sum(count for _, count in by_hand)
            seen += len(by_hand)
    assert seen
