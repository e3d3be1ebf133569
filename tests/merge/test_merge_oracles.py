"""Identities that every merge must keep, on populations of one seed and on independent ones.

The numbers O1 .. O14 are those of the merging identities: single, equal, one-hot, permutation, gauge, scaling, padding,
homogeneity, reconstruction, idempotence, orthogonality, anchor, determinism.
"""

from __future__ import annotations

import math
import typing

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from chrysalis_ray.config.merges import (
    METHOD_NAMES,
    BreadcrumbsMerge,
    ConsensusMerge,
    DareMerge,
    DellaMerge,
    EnsembleMerge,
    IsotropicMerge,
    Merge,
    ModelStockMerge,
    RegmeanMerge,
    SceMerge,
    SlerpMerge,
    TallMerge,
    TaskArithmeticMerge,
    TiesMerge,
    TsvMerge,
    WinnerMerge,
    WudiMerge,
)
from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.merge.core_space import NULL, canonical_basis
from chrysalis_ray.merge.per_layer import merge_adapters
from chrysalis_ray.merge.run import MergeResult, merge_modules
from chrysalis_ray.merge.table import BY_ENTRY, BY_INPUTS, IN_THE_CORE, SUMMARIES

SHAPES = {"a.q": (9, 12), "a.down": (12, 7)}  # out, in
METHOD_CONFIGS = [
    WinnerMerge(method="winner"),
    EnsembleMerge(method="ensemble"),
    EnsembleMerge(method="ensemble", weights="softmax", temperature=0.1),
    ConsensusMerge(method="consensus"),
    ConsensusMerge(method="consensus", support=1.0, coherence=0.2, weights="uniform"),
    EnsembleMerge(method="ensemble", weights="geometric_median"),
    EnsembleMerge(method="ensemble", rank="exact"),
    TaskArithmeticMerge(method="task_arithmetic"),
    SlerpMerge(method="slerp", weights="softmax", temperature=0.1),
    SlerpMerge(method="slerp", mean="chord"),
    ModelStockMerge(method="model_stock"),
    TsvMerge(method="tsv"),
    IsotropicMerge(method="isotropic"),
    WudiMerge(method="wudi"),
    WudiMerge(method="wudi", ridge=0.01, weights="softmax", temperature=0.1),
    RegmeanMerge(method="regmean"),
    RegmeanMerge(method="regmean", ridge=1.0, weights="softmax", temperature=0.1),
    RegmeanMerge(method="regmean", space="dense"),
    RegmeanMerge(method="regmean", space="dense", off_diagonal=0.5, ridge=0.0, weights="softmax", temperature=0.1),
    EnsembleMerge(method="ensemble", weights="geometric_median", per="module"),
    ConsensusMerge(method="consensus", per="module"),
    TiesMerge(method="ties", density=0.5),
    TiesMerge(method="ties", density=0.3, space="dense", weights="softmax", temperature=0.1),
    TiesMerge(method="ties", density=0.4, space="knots"),
    TiesMerge(method="ties", density=0.4, densities={"v0": 0.9, "v2": 0.2}),
    TiesMerge(method="ties", density=1.0, densities={"v1": 0.3}, space="dense", weights="softmax", temperature=0.1),
    DareMerge(method="dare", densities={"v0": 1.0, "v1": 0.7}),
    BreadcrumbsMerge(method="breadcrumbs", density=0.6, outliers=0.1, densities={"v1": 1.0, "v2": 0.3}, space="knots"),
    DellaMerge(method="della", space="knots", weights="softmax", temperature=0.1),
    TallMerge(method="tall", space="knots", rank="exact"),
    DareMerge(method="dare"),
    DareMerge(method="dare", space="dense", signs="elected", rng_seed=3),
    DellaMerge(method="della"),
    DellaMerge(method="della", space="dense", spread=0.3),
    BreadcrumbsMerge(method="breadcrumbs", density=0.6, outliers=0.1),
    BreadcrumbsMerge(method="breadcrumbs", density=0.5, outliers=0.2, space="dense", weights="softmax", temperature=0.1),
    BreadcrumbsMerge(method="breadcrumbs", density=0.7, space="knots", signs="elected", agreeing="sum"),
    TiesMerge(method="ties", density=0.5, agreeing="sum", weights="softmax", temperature=0.1),
    TallMerge(method="tall"),
    TallMerge(method="tall", space="dense", votes=1, threshold=0.2),
    SceMerge(method="sce"),
    SceMerge(method="sce", density=0.4),
    SceMerge(method="sce", density=0.3, space="dense", weights="softmax", temperature=0.1),
    SceMerge(method="sce", density=0.6, space="knots"),
]
ids = ["-".join(f"{key}={value}" for key, value in config.model_dump(exclude_unset=True).items()) for config in METHOD_CONFIGS]
every_method = pytest.mark.parametrize("config", METHOD_CONFIGS, ids=ids)
both_regimes = pytest.mark.parametrize("shared", [True, False], ids=["shared", "independent"])
oracle = settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Population(typing.NamedTuple):
    members: list
    scales: list
    anchor: dict
    anchor_scale: float
    scores: list
    names: list | None = None  # v0, v1, ... if not given

    def merge(self, config, rank=99, given=None) -> MergeResult:
        names = self.names or [f"v{number}" for number in range(len(self.members))]
        return merge_adapters(
            config, names, self.members, self.scales, self.anchor, self.anchor_scale, self.scores, rank, given,
            inputs=self.inputs(config),
        )  # fmt: skip

    def inputs(self, config):
        """What each member feeds its modules: made of what it changed, so that twins have the same and no factoring matters."""
        seed = dense(self.anchor, self.anchor_scale)
        changes = [{m: d - seed[m] for m, d in dense(*pair).items()} for pair in zip(self.members, self.scales, strict=True)]
        roots = [{m: root_of_inputs(change) for m, change in member.items()} for member in changes]
        return [{m: symmetric(root @ root.T) for m, root in member.items()} for member in roots] if whole(config) else roots

    def mean(self, module, weights):
        return sum(w * dense(m, s)[module] for w, m, s in zip(weights, self.members, self.scales, strict=True))


@st.composite
def populations(draw, shared, sizes=(1, 5)):
    """1 to 5 adapters of mixed ranks and scales: branched from one seed (trained or fresh), or drawn independently."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    trained = draw(st.booleans())
    count = draw(st.integers(*sizes))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rank = draw(st.integers(1, 3))
    anchor = {m: (normal(rank, i), normal(o, rank) * trained) for m, (o, i) in SHAPES.items()}
    members = []
    for _ in range(count):
        own = rank if shared else draw(st.integers(1, 3))
        drawn = {m: (normal(own, i), normal(o, own)) for m, (o, i) in SHAPES.items()}
        branched = {m: (anchor[m][0] + 0.1 * a, anchor[m][1] + b) for m, (a, b) in drawn.items()} if shared else drawn
        members.append(branched)
    scales = [draw(st.sampled_from([0.5, 1.0, 2.0])) for _ in range(count)]
    scores = [1.0 + 0.05 * draw(st.integers(0, 9)) + 0.001 * n for n in range(count)]
    return Population(members, scales, anchor, draw(st.sampled_from([0.5, 1.0])), scores)


def root_of_inputs(change):
    """[in, in]: white noise that lies a little more where the change reads."""
    generator = torch.Generator().manual_seed(change.shape[1])
    noise = torch.randn(change.shape[1], change.shape[1], generator=generator, dtype=torch.float64)
    return noise + 2.0 * change.T @ change @ noise / max(float((change**2).sum()), 1e-9)


def whole(config):
    """Whether a method goes by the whole moments of the inputs."""
    return config.method == "regmean" and config.space == "dense"


def symmetric(matrix):
    return (matrix + matrix.T) / 2


def dense(adapter, scale=1.0):
    return {module: scale * (b.double() @ a.double()) for module, (a, b) in adapter.items()}


def assert_same(result: MergeResult, expected: dict, tolerance=2e-6):
    got = dense(result.factors)
    size = max(float(value.norm()) for value in expected.values()) + 1e-30
    assert got.keys() == expected.keys()
    for module in expected:
        assert float((got[module] - expected[module]).norm()) <= tolerance * max(size, 1e-3), module


@every_method
@both_regimes
@oracle
@given(data=st.data())
def test_o1_a_single_adapter_is_itself(config, shared, data):
    population = data.draw(populations(shared, (1, 1)))
    result = population.merge(config)
    assert_same(result, dense(population.members[0], population.scales[0]))
    assert result.weights == [1.0]


@every_method
@both_regimes
@oracle
@given(data=st.data(), count=st.integers(2, 5))
def test_o2_equal_adapters_are_the_adapter(config, shared, data, count):
    population = data.draw(populations(shared, (1, 1)))
    many = Population(
        population.members * count, population.scales * count, population.anchor, population.anchor_scale, [1.0] * count
    )
    assert_same(many.merge(config), dense(population.members[0], population.scales[0]))


@both_regimes
@oracle
@given(data=st.data())
def test_o3_one_hot_weights_are_the_winner(shared, data):
    population = data.draw(populations(shared, (2, 5)))
    best = min(range(len(population.scores)), key=population.scores.__getitem__)
    expected = dense(population.members[best], population.scales[best])
    cold = EnsembleMerge(method="ensemble", weights="softmax", temperature=1e-7)
    for config in (WinnerMerge(method="winner"), cold):
        result = population.merge(config)
        assert_same(result, expected)
        assert result.weights[best] == 1.0
    assert result.notes["members"] == 1


@every_method
@both_regimes
@oracle
@given(data=st.data())
def test_o3_whoever_counts_alone_is_what_comes_out_of_every_method(config, shared, data):
    """Members without weight neither vote nor trim nor divide."""
    population = data.draw(populations(shared, (2, 4)))
    own = data.draw(st.integers(0, len(population.members) - 1))
    given_weights = [float(number == own) for number in range(len(population.members))]
    alone = config if config.method == "winner" else config.model_copy(update={"per": "adapter"})
    result = population.merge(alone, given=given_weights)
    assert_same(result, dense(population.members[own], population.scales[own]))


@every_method
@both_regimes
@oracle
@given(data=st.data(), order=st.randoms(use_true_random=False))
def test_o4_the_order_of_members_does_not_matter(config, shared, data, order):
    population = data.draw(populations(shared, (2, 5)))
    places = list(range(len(population.members)))
    order.shuffle(places)
    members, scales, scores = (
        [column[p] for p in places] for column in (population.members, population.scales, population.scores)
    )
    names = [f"v{place}" for place in places]
    shuffled = Population(members, scales, population.anchor, population.anchor_scale, scores, names)
    assert_same(shuffled.merge(config), dense(population.merge(config).factors))


@every_method
@both_regimes
@oracle
@given(data=st.data(), rng_seed=st.integers(0, 999), c=st.sampled_from([1e-3, 3.0, 1e3]))
def test_o5_the_factoring_of_an_adapter_does_not_matter(config, shared, data, rng_seed, c):
    population = data.draw(populations(shared, (1, 4)))
    generator = torch.Generator().manual_seed(rng_seed)

    def gauge(a_ri, b_or):
        rank = a_ri.shape[0]
        g = c * (torch.eye(rank, dtype=torch.float64) + 0.4 * torch.rand(rank, rank, generator=generator, dtype=torch.float64))
        return torch.linalg.inv(g) @ a_ri, b_or @ g

    other = population._replace(
        members=[{m: gauge(*ab) for m, ab in member.items()} for member in population.members],
        anchor={m: gauge(*ab) for m, ab in population.anchor.items()},
    )
    assert_same(other.merge(config), dense(population.merge(config).factors))


@every_method
@both_regimes
@oracle
@given(data=st.data(), c=st.sampled_from([0.25, 3.0, 16.0]))
def test_o6_alpha_can_be_rewritten_into_b(config, shared, data, c):
    population = data.draw(populations(shared, (1, 4)))
    other = population._replace(
        members=[{m: (a, b / c) for m, (a, b) in member.items()} for member in population.members],
        scales=[scale * c for scale in population.scales],
    )
    assert_same(other.merge(config), dense(population.merge(config).factors))


@every_method
@both_regimes
@oracle
@given(data=st.data(), extra=st.integers(1, 4))
def test_o7_padding_a_rank_changes_nothing(config, shared, data, extra):
    population = data.draw(populations(shared, (1, 4)))
    pad = torch.nn.functional.pad
    members = [
        {m: (pad(a, (0, 0, 0, extra)), pad(b, (0, extra))) for m, (a, b) in member.items()} for member in population.members
    ]
    assert_same(population._replace(members=members).merge(config), dense(population.merge(config).factors))


@every_method
@both_regimes
@oracle
@given(data=st.data(), c=st.sampled_from([-1.0, 0.25, -3.0]))
def test_o8_longer_deltas_have_a_longer_merge_and_opposite_ones_the_opposite(config, shared, data, c):
    population = data.draw(populations(shared, (2, 4)))
    other = population._replace(scales=[c * scale for scale in population.scales], anchor_scale=c * population.anchor_scale)
    assert_same(other.merge(config), {m: c * delta for m, delta in dense(population.merge(config).factors).items()})


@both_regimes
@oracle
@given(data=st.data(), rank=st.integers(1, 14))
def test_o9_the_mean_is_exact_and_the_residual_is_the_measured_one(shared, data, rank):
    population = data.draw(populations(shared, (2, 5)))
    config = EnsembleMerge(method="ensemble")
    expected = {m: population.mean(m, [1 / len(population.members)] * len(population.members)) for m in SHAPES}
    result = population.merge(config, rank)
    assert {a.shape[0] for a, _ in result.factors.values()} == {rank}
    got = dense(result.factors)
    error = math.sqrt(
        sum(float((got[m] - expected[m]).norm()) ** 2 for m in SHAPES) / sum(float(d.norm()) ** 2 for d in expected.values())
    )
    assert abs(error - result.residual) < 3e-6
    assert result.captured_energy == pytest.approx(1 - result.residual**2)
    best = sum(float((torch.linalg.svdvals(d)[rank:] ** 2).sum()) for d in expected.values())
    assert result.residual == pytest.approx(math.sqrt(best / sum(float(d.norm()) ** 2 for d in expected.values())), abs=1e-7)
    assert population.merge(config, 99).residual < 1e-9
    assert_same(population.merge(config, 99), expected)


@both_regimes
@oracle
@given(data=st.data())
def test_o9_a_mean_of_means_is_the_mean(shared, data):
    """However it is bracketed, as long as nothing is cut in between; and weights that are multiples are the same weights."""
    population = data.draw(populations(shared, (3, 5)))
    members = len(population.members)
    weights = [float(data.draw(st.integers(1, 4))) for _ in range(members)]
    config = EnsembleMerge(method="ensemble", rank="exact")
    flat = population.merge(config, given=weights)
    assert_same(population.merge(config, given=[7.0 * weight for weight in weights]), dense(flat.factors))
    cut = data.draw(st.integers(1, members - 1))
    parts = []
    for own in (slice(0, cut), slice(cut, None)):
        part = population._replace(
            members=population.members[own], scales=population.scales[own], scores=population.scores[own]
        )
        parts.append(part.merge(config, given=weights[own]).factors)
    pair = population._replace(members=parts, scales=[1.0, 1.0], scores=[1.0, 1.0])
    assert_same(pair.merge(config, given=[sum(weights[:cut]), sum(weights[cut:])]), dense(flat.factors), tolerance=4e-6)


@every_method
@both_regimes
@oracle
@given(data=st.data())
def test_o10_merging_a_merge_with_itself_is_idempotent(config, shared, data):
    population = data.draw(populations(shared, (2, 4)))
    once = population.merge(config)
    again = Population([once.factors] * 2, [1.0, 1.0], population.anchor, population.anchor_scale, [1.0, 1.0])
    assert_same(again.merge(config), dense(once.factors), tolerance=4e-6)


@oracle
@given(rng_seed=st.integers(0, 10**6), trained=st.booleans())
def test_o11_what_only_one_member_holds_returns_to_the_seed(rng_seed, trained):
    generator = torch.Generator().manual_seed(rng_seed)
    left = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64)).Q
    sizes = torch.tensor([3.0, 1.0], dtype=torch.float64)
    anchor = {"q": (right[:, 8:].T, left[:, 8:10] * trained)}
    members = []
    for n in range(3):
        own = sizes + 0.3 * n
        a_ri = torch.cat([anchor["q"][0], right[:, 2 * n : 2 * n + 2].T])
        members.append({"q": (a_ri, torch.cat([anchor["q"][1], left[:, 2 * n : 2 * n + 2] * own], dim=1))})
    population = Population(members, [1.0] * 3, anchor, 1.0, [1.0] * 3)
    config = ConsensusMerge(method="consensus", support=0.6, coherence=0.0)
    result = population.merge(config)
    assert_same(result, dense(anchor), tolerance=1e-5)
    stored = [{m: (a.float(), b.float()) for m, (a, b) in member.items()} for member in members]
    assert population._replace(members=stored).merge(config).notes["survived_energy"] < 1e-9
    assert result.notes["survived_energy"] < 1e-12


@both_regimes
@oracle
@given(data=st.data())
def test_consensus_of_no_demands_is_the_exact_mean(shared, data):
    population = data.draw(populations(shared, (1, 5)))
    config = ConsensusMerge(method="consensus", support=0.0, coherence=0.0)
    result = population.merge(config)
    assert_same(result, {m: population.mean(m, result.weights) for m in SHAPES})
    if len(population.members) > 1:
        assert result.notes["survived_energy"] == pytest.approx(1.0)


@both_regimes
@oracle
@given(data=st.data())
def test_opposite_changes_return_to_the_seed(shared, data):
    population = data.draw(populations(shared, (1, 1)))
    seed, member = dense(population.anchor, population.anchor_scale), dense(population.members[0], population.scales[0])
    opposite = {m: low_rank(2 * seed[m] - member[m]) for m in SHAPES}
    pair = Population(
        [population.members[0], opposite], [population.scales[0], 1.0], population.anchor, population.anchor_scale, [1.0, 1.0]
    )
    assert_same(pair.merge(ConsensusMerge(method="consensus")), seed, tolerance=1e-5)


@every_method
@both_regimes
@oracle
@given(data=st.data())
def test_o13_around_the_seed_equals_changes_from_the_seed_plus_the_seed(config, shared, data):
    population = data.draw(populations(shared, (1, 4)))
    seed = dense(population.anchor, population.anchor_scale)
    changes = []
    for member, scale in zip(population.members, population.scales, strict=True):
        change = {}
        for m in SHAPES:
            (a, b), (a0, b0) = member[m], population.anchor[m]
            change[m] = (torch.cat([a, a0]), torch.cat([scale * b, -population.anchor_scale * b0], dim=1))
        changes.append(change)
    names = [f"v{number}" for number in range(len(changes))]
    from_base = merge_adapters(
        config, names, changes, [1.0] * len(changes), None, 1.0, population.scores, 99, inputs=population.inputs(config)
    )
    moved = dense(from_base.factors)
    assert_same(population.merge(config), {m: moved[m] + seed[m] for m in SHAPES}, tolerance=5e-6)


@every_method
@both_regimes
@oracle
@given(data=st.data(), rank=st.integers(1, 6))
def test_o14_the_same_merge_has_the_same_bits(config, shared, data, rank):
    population = data.draw(populations(shared, (2, 4)))
    one, two = population.merge(config, rank), population.merge(config, rank)
    assert one.to_json() == two.to_json()
    for module, factors in one.factors.items():
        assert all(torch.equal(x, y) for x, y in zip(factors, two.factors[module], strict=True))


def low_rank(matrix):
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return s.sqrt()[:, None] * vt, u * s.sqrt()


def two_adapters():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return [{m: (normal(2, i), normal(o, 2)) for m, (o, i) in SHAPES.items()} for _ in range(2)]


def test_table_and_config_know_the_same_methods():
    schema = TypeAdapter(Merge).json_schema()
    tables = [*IN_THE_CORE, *BY_ENTRY, *BY_INPUTS]
    assert set(tables) == set(schema["discriminator"]["mapping"]) == set(METHOD_NAMES)
    assert len(tables) == len(set(tables))
    assert set(BY_ENTRY) < set(SUMMARIES) <= set(METHOD_NAMES)
    assert {config.method for config in METHOD_CONFIGS} == set(METHOD_NAMES)


def test_the_canonical_basis_is_orthonormal_and_spans_the_increments():
    increments = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    increments[:, 5:] = 0
    left, right = canonical_basis(increments)
    assert (left.shape, right.shape) == ((8, 5), (6, 6))
    torch.testing.assert_close(left.T @ left, torch.eye(5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(left @ (left.T @ increments @ right) @ right.T, increments, atol=1e-12, rtol=0)
    assert canonical_basis(0 * increments)[0].shape == (8, 0)
    assert NULL < 1e-9


def test_independent_members_agree_as_often_as_coins():
    generator = torch.Generator().manual_seed(0)
    members = [{"q": (torch.randn(8, 80, generator=generator), torch.randn(90, 8, generator=generator))} for _ in range(4)]
    notes = merge_modules(ConsensusMerge(method="consensus"), members, [1.0] * 4, None, 1.0, [1.0] * 4, 32).notes
    assert notes["sign_agreement_by_chance"] == 0.125
    assert 0.09 < notes["sign_agreement"] < 0.16
    assert 0.0 < notes["survived_energy"] < 1.0
    assert max(abs(notes["cosines"][0][n]) for n in (1, 2, 3)) < 0.1


def test_a_member_without_a_module_counts_as_zero_there_and_it_is_said():
    one, two = two_adapters()
    del two["a.q"]
    result = merge_modules(EnsembleMerge(method="ensemble"), [one, two], [1.0, 1.0], None, 1.0, [1.0, 1.0], 8)
    assert_same(result, {"a.q": dense(one)["a.q"] / 2, "a.down": (dense(one)["a.down"] + dense(two)["a.down"]) / 2})
    assert result.notes["modules_missing_as_zero"] == {"1": 1}


def test_a_population_that_did_not_move_is_its_seed():
    one, _ = two_adapters()
    fresh = {m: (a, 0 * b) for m, (a, b) in one.items()}
    for config in METHOD_CONFIGS:
        result = Population([fresh, fresh], [1.0, 1.0], fresh, 1.0, [1.0, 1.0]).merge(config, 4)
        assert_same(result, dense(fresh))
        assert result.residual == 0.0


@every_method
@both_regimes
@oracle
@given(data=st.data())
def test_a_member_that_is_the_seed_draws_towards_it_and_turns_nothing(config, shared, data):
    """However the seed is factored: what is left of it by rounding has no direction that a method could follow."""
    population = data.draw(populations(shared, (2, 3)))
    pad = torch.nn.functional.pad
    stayed = [
        {m: (pad(a, (0, 0, 0, extra)), pad(b, (0, extra))) for m, (a, b) in population.anchor.items()} for extra in (0, 2)
    ]
    one, two = (
        population._replace(
            members=[*population.members, copy],
            scales=[*population.scales, population.anchor_scale],
            scores=[*population.scores, 1.2],
        )
        for copy in stayed
    )
    assert_same(two.merge(config), dense(one.merge(config).factors))


def test_the_rank_of_the_config_comes_first():
    config = EnsembleMerge(method="ensemble", rank=3)
    result = merge_modules(config, two_adapters(), [1.0, 1.0], None, 1.0, [1.0, 1.0], 8)
    assert result.rank == 3
    assert {b.shape[1] for _, b in result.factors.values()} == {3}


def test_softmax_weights_follow_the_formula():
    config = EnsembleMerge(method="ensemble", weights="softmax", temperature=0.5)
    result = merge_modules(config, two_adapters(), [1.0, 1.0], None, 1.0, [2.0, 1.0], 8)
    assert result.weights == pytest.approx([math.exp(-2) / (1 + math.exp(-2)), 1 / (1 + math.exp(-2))])


def test_among_equal_scores_the_first_wins():
    result = merge_modules(WinnerMerge(method="winner"), two_adapters(), [1.0, 1.0], None, 1.0, [1.0, 1.0], 8)
    assert result.weights == [1.0, 0.0]


@pytest.mark.parametrize("wrong", ["no members", "fewer scales", "nan score", "nan factor", "other shape", "ranks differ"])
def test_what_cannot_be_merged_is_refused(wrong):
    members, scales, scores = two_adapters(), [1.0, 1.0], [1.0, 2.0]
    if wrong == "no members":
        members, scales, scores = [], [], []
    elif wrong == "fewer scales":
        scales = [1.0]
    elif wrong == "nan score":
        scores[1] = math.nan
    elif wrong == "nan factor":
        members[0]["a.q"][0][0, 0] = math.inf
    elif wrong == "other shape":
        members[1]["a.q"] = (torch.ones(2, 5), torch.ones(9, 2))
    elif wrong == "ranks differ":
        members[1]["a.q"] = (torch.ones(2, 12), torch.ones(9, 3))
    with pytest.raises(MergeError):
        merge_modules(
            EnsembleMerge(method="ensemble", weights="softmax", temperature=1.0), members, scales, None, 1.0, scores, 4
        )
