"""The rules of `blueprint: auto`, one literal table. Plain arithmetic, no torch.

For every thing that is chosen the first rule that applies decides, from top to bottom, and its reason is told. `f` are the
facts, `f.made` what the rows above have chosen. Where a figure is from stands in the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from chrysalis_ray.config.blueprint import Blueprint
from chrysalis_ray.training.planning.hardware import Hardware
from chrysalis_ray.training.planning.shapes import ModelShape

SMALL = 2e9  # a base with fewer parameters gets a selected genome
RANKS = (8, 16, 32, 64)
USUAL_RANK = 16
LONG_ROW, SHORT_ROW, SHORTEST_ROW = 2048, 256, 32  # tokens: on GPUs, on CPUs, and where the budget is tiny
STEP_TOKENS, STEP_TOKENS_ON_CPU, MOST_ROWS = 32_768, 4096, 32
FEWEST_STEPS = 200  # of a variant's whole budget
PASS_TOKENS, PASS_TOKENS_ON_CPU = 4096, 512  # of one variant in one micro-step, on one worker
WEIGHTS_SHARE = 0.5  # of a GPU's memory that a whole base may take before workers share it
BYTES_PER_TOKEN = 4  # of English text, by tokenizers of 50,000 to 150,000 tokens
WITHOUT_BF16 = ("V100", "T4", "P100", "P40", "GTX", "RTX 2060", "RTX 2070", "RTX 2080", "TITAN")


@dataclass(frozen=True)
class Recipe:
    """A shipped blueprint and the sizes of its base."""

    blueprint: Blueprint
    shape: ModelShape


@dataclass
class Facts:
    """What the rules look at. `tokens` is what a variant shall train, None where that is chosen too; `megabytes` is the text of
    the genome, None where that is not known; with `rows_searched` variants differ in rows per step."""

    shape: ModelShape
    hardware: Hardware
    variants: int
    reports: int
    tokens: int | None
    megabytes: float | None
    recipes: tuple[Recipe, ...]
    rows_searched: bool = False
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.hardware.gpus > 0

    @property
    def small(self) -> bool:
        return self.shape.parameters < SMALL

    @property
    def billions(self) -> float:
        return self.shape.parameters / 1e9

    @property
    def budget(self) -> int:
        """Tokens that a variant trains."""
        return self.tokens or self.made["tokens"]

    # recipes

    @property
    def twin(self) -> Recipe | None:
        """The recipe for this very base; of two the first, which holds the whole base on one GPU."""
        return next((recipe for recipe in self.recipes if recipe.shape == self.shape), None)

    @property
    def relative(self) -> Recipe | None:
        """The recipe nearest in size of the same family."""
        return self._nearest([recipe for recipe in self.recipes if recipe.shape.family == self.shape.family])

    @property
    def stranger(self) -> Recipe:
        """The recipe nearest in size of any family."""
        found = self._nearest(self.recipes)
        assert found is not None
        return found

    @property
    def recipe(self) -> Recipe:
        return next(recipe for recipe in self.recipes if recipe.blueprint.name == self.made["recipe"])

    def _nearest(self, recipes: tuple[Recipe, ...] | list[Recipe]) -> Recipe | None:
        def distance(recipe: Recipe) -> float:
            larger, smaller = sorted((recipe.shape.parameters, self.shape.parameters), reverse=True)
            return larger / smaller

        return min(recipes, key=distance, default=None)

    # adapters

    @property
    def ranks(self) -> list[int]:
        """Those of `RANKS` that the smallest target matrix has room for."""
        room = min(min(sides) for sides in self.shape.linears().values())
        return [rank for rank in RANKS if rank <= room] or [room]

    def adapter(self, rank: int) -> int:
        """Parameters of an adapter on every linear layer."""
        return self.shape.lora_parameters(rank, tuple(self.shape.linears()))

    @property
    def roomy_rank(self) -> int | None:
        """The smallest rank whose adapter has a parameter for every token, None if none has."""
        return next((rank for rank in self.ranks if self.adapter(rank) >= (self.tokens or 0)), None)

    @property
    def parameters_per_variant(self) -> int:
        return self.adapter(self.made["lora.rank"])

    @property
    def whole_pass(self) -> int | None:
        """Tokens of one pass over the genome."""
        return None if self.megabytes is None else int(self.megabytes * 1e6 / BYTES_PER_TOKEN)

    # lanes

    @property
    def wished_row(self) -> int:
        return LONG_ROW if self.on_gpu else SHORT_ROW

    def row(self, longest: int) -> int:
        """The longest power of two within `longest` and within what the base attends to."""
        return _power(min(longest, self.shape.longest_row or longest))

    @property
    def row_in_budget(self) -> int:
        """A row short enough for `FEWEST_STEPS` steps, or as many as there are reports, of one row each."""
        return max(self.row(max(self.budget // max(FEWEST_STEPS, self.reports), 1)), SHORTEST_ROW)

    @property
    def length(self) -> int:
        return self.made["lanes.sequence_length"]

    @property
    def most_rows(self) -> int:
        return max(min((STEP_TOKENS if self.on_gpu else STEP_TOKENS_ON_CPU) // self.length, MOST_ROWS), 1)

    @property
    def rows_in_budget(self) -> int:
        return max(_power(max(self.budget // (max(FEWEST_STEPS, self.reports) * self.length), 1)), 1)

    @property
    def sharing(self) -> int:
        """Workers that may share a micro-step: as many as a whole base needs GPUs, or as there are GPUs for each variant."""
        if not self.on_gpu:
            return 1
        needed = self.shape.parameters * 2 / (WEIGHTS_SHARE * max(self.hardware.gpu_memory, 1))
        spare = self.hardware.gpus // self.variants
        return min(_power(self.hardware.gpus), max(_power_above(needed), _power(max(spare, 1))))

    @property
    def rows_per_pass(self) -> int:
        tokens = PASS_TOKENS * self.sharing if self.on_gpu else PASS_TOKENS_ON_CPU
        return max(min(_power(max(tokens // self.length, self.sharing, 1)), self.made["lanes.rows_per_step"]), 1)

    @property
    def has_bf16(self) -> bool:
        return not any(name in self.hardware.gpu_name for name in WITHOUT_BF16)

    @property
    def cores_per_gpu(self) -> int:
        return max(min(4, self.hardware.cpus // self.hardware.gpus), 1)


def _power(number: int) -> int:
    """The largest power of two that is not above `number`."""
    return 1 << (number.bit_length() - 1)


def _power_above(number: float) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max((int(-(-number // 1)) - 1).bit_length(), 0)


@dataclass(frozen=True)
class Rule:
    """`sets` is what is chosen: a field of the blueprint, or a section whose fields the value replaces; `recipe` and `tokens`
    are no fields. `why` is filled with the facts (`f`) and the value; an empty one tells nothing."""

    sets: str
    when: Callable[[Facts], bool]
    value: Callable[[Facts], Any]
    why: str


def _always(f: Facts) -> bool:
    return True


_PLANNED = {"count": "auto", "workers": "auto", "slots": "auto", "zero_stage": "auto", "offload": "auto",
            "activation_checkpointing": "auto", "lanes": "compacted"}  # fmt: skip
_ONE_PLACE = {"count": 1, "workers": 1, "slots": "auto", "zero_stage": 0, "offload": "none",
              "activation_checkpointing": "auto", "lanes": "compacted"}  # fmt: skip

RULES: tuple[Rule, ...] = (
    # optimizer, schedule and alpha start from a shipped blueprint
    Rule("recipe", lambda f: f.twin is not None, lambda f: f.twin.blueprint.name,  # type: ignore[union-attr]
         "start from {value}, which is shipped for this base"),
    Rule("recipe", lambda f: f.relative is not None, lambda f: f.relative.blueprint.name,  # type: ignore[union-attr]
         "start from {value}, of those shipped for {f.shape.family} the nearest to {f.billions:.3g} billion parameters"),
    Rule("recipe", _always, lambda f: f.stranger.blueprint.name,
         "none is shipped for {f.shape.family}; start from {value}, the nearest to {f.billions:.3g} billion parameters"),
    Rule("optimizer.learning_rate", lambda f: f.recipe.shape.family == f.shape.family,
         lambda f: f.recipe.blueprint.optimizer.learning_rate,
         "{value:g} is that of {f.made[recipe]}, where its source stands"),
    Rule("optimizer.learning_rate", lambda f: f.billions <= 13, lambda f: 2e-4,
         "{value:g}: QLoRA's up to 13 billion parameters (arXiv 2305.14314, table 9)"),
    Rule("optimizer.learning_rate", _always, lambda f: 1e-4,
         "{value:g}: QLoRA's above 13 billion parameters (arXiv 2305.14314, table 9)"),
    # the adapter
    Rule("lora.targets", _always, lambda f: list(f.shape.linears()),
         "every linear layer: attention alone falls behind (arXiv 2305.14314, figure 2; thinkingmachines.ai/blog/lora)"),
    Rule("lora.rank", lambda f: f.tokens is None, lambda f: min(USUAL_RANK, f.ranks[-1]),
         "{value}, usual; the budget follows from it"),
    Rule("lora.rank", lambda f: f.roomy_rank is not None, lambda f: f.roomy_rank,
         "{value} gives an adapter a parameter or more for each of {f.tokens:,} tokens (tinker-docs.thinkingmachines.ai, LoRA "
         "primer)"),
    Rule("lora.rank", _always, lambda f: f.ranks[-1],
         "{value} is the largest taken; {f.tokens:,} tokens are more than an adapter has parameters, so that it learns less of "
         "each (tinker-docs.thinkingmachines.ai, LoRA primer)"),
    # what it is fed
    Rule("tokens", lambda f: f.tokens is not None, lambda f: f.tokens, ""),
    Rule("tokens", lambda f: f.small or f.whole_pass is None, lambda f: f.parameters_per_variant,
         "{value:,} tokens for each variant, one for each parameter of its adapter"),
    Rule("tokens", _always, lambda f: max(f.whole_pass or 0, 1),
         "{value:,} tokens for each variant, about one pass over {f.megabytes:.0f} MB: a large base gets the full picture"),
    Rule("genome", lambda f: f.small, lambda f: {"exclude": ["near_duplicate"], "histories": "none"},
         "selected for a base of {f.billions:.3g} billion parameters: no near-duplicates, no older snapshots of a repository"),
    Rule("genome", _always, lambda f: {"exclude": [], "histories": "all"},
         "the whole of it, for a base of {f.billions:.3g} billion parameters"),
    # lanes
    Rule("lanes.sequence_length", lambda f: f.row_in_budget < f.row(f.wished_row), lambda f: f.row_in_budget,
         "{value}: longer rows would leave fewer than 200 optimizer steps, or than reports, of {f.budget:,} tokens"),
    Rule("lanes.sequence_length", lambda f: f.row(f.wished_row) < f.wished_row, lambda f: f.row(f.wished_row),
         "{value}: {f.shape.family} attends to {f.shape.longest_row:,} tokens"),
    Rule("lanes.sequence_length", lambda f: f.on_gpu, lambda f: f.wished_row, "{value}, usual on GPUs"),
    Rule("lanes.sequence_length", _always, lambda f: f.wished_row, "{value}: CPUs pay for attention over long rows"),
    Rule("lanes.rows_per_step", lambda f: f.rows_in_budget < f.most_rows, lambda f: f.rows_in_budget,
         "{value}: more would leave fewer than 200 optimizer steps, or than reports, of {f.budget:,} tokens"),
    Rule("lanes.rows_per_step", _always, lambda f: f.most_rows,
         "{value}: LoRA bears large batches worse than full training does (thinkingmachines.ai/blog/lora)"),
    Rule("lanes.rows_per_microstep", lambda f: f.rows_searched, lambda f: None,
         "left open: variants differ in rows per step, and a pass takes those of the smallest"),
    Rule("lanes.rows_per_microstep", lambda f: f.sharing > 1, lambda f: f.rows_per_pass,
         "{value}, so that up to {f.sharing} workers can share them"),
    Rule("lanes.rows_per_microstep", _always, lambda f: f.rows_per_pass, ""),
    # the body
    Rule("body.precision", lambda f: not f.on_gpu, lambda f: "fp32", "{value}: CPUs emulate bf16"),
    Rule("body.precision", lambda f: f.has_bf16, lambda f: "bf16", "{value}: half the memory of the base; adapters stay fp32"),
    Rule("body.precision", _always, lambda f: "fp32", "{value}: {f.hardware.gpu_name} has no bf16"),
    Rule("body", lambda f: f.on_gpu, lambda f: {**_PLANNED, "gpus_per_worker": 1.0, "cpus_per_worker": float(f.cores_per_gpu)},
         "GPUs; how many bodies, workers and slots, sharded or recomputing, the planner says"),
    Rule("body", _always, lambda f: {**_ONE_PLACE, "gpus_per_worker": 0.0, "cpus_per_worker": 1.0, "threads": f.hardware.cpus},
         "one worker that computes with {f.hardware.cpus} threads: there is no GPU"),
)  # fmt: skip
