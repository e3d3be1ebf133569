"""Whether a blueprint whose variants cannot share a base fits the body, the search space and the merges around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from chrysalis_ray.config.adapters import AdaLora, Boft, Hra, PeftAdapter
from chrysalis_ray.config.blueprint import MOVED_INITS, Lora
from chrysalis_ray.config.population import Choice, Grid
from chrysalis_ray.config.population_checks import step_sizes
from chrysalis_ray.config.problems import Finding
from chrysalis_ray.config.resolve import LoadedExperiment


def check_solo(loaded: LoadedExperiment) -> Iterator[Finding]:
    """Every problem, as (path in the file where it was written, what is wrong and meant)."""
    worn = loaded.blueprint.worn
    if worn.solo is None:
        return
    if isinstance(worn, Lora):
        yield from _kinds(loaded, worn)
    else:
        yield from _adapter(loaded, worn)
    yield from _body(loaded, worn.solo)
    if loaded.experiment.evaluate.max_divergence is not None:
        yield (
            ("evaluate", "max_divergence"),
            "a base that wears one adapter at a time compares none with its members, so that every merge would be refused; "
            "leave it out",
        )
    if not worn.is_low_rank:
        yield from _merges(loaded, worn)
    for position, merge in enumerate(loaded.experiment.merge):
        if worn.is_low_rank and merge.method == "regmean":
            yield (
                ("merge", position, "method"),
                "regmean asks what variants feed the modules, which is measured in a pack; leave it out here",
            )


def _kinds(loaded: LoadedExperiment, lora: Lora) -> Iterator[Finding]:
    if lora.init in MOVED_INITS and not lora.is_low_rank:
        yield (
            ("lora", "init"),
            f"{lora.init} moves the base, and what is left of such a variant is a plain LoRA only without use_dora, lora_bias "
            "and modules_to_save; write init: kaiming, or leave those out",
        )
    if lora.use_dora and lora.lora_bias:
        yield ("lora", "lora_bias"), "peft's DoRA has no lora_bias; leave one of the two out"
    drawn = loaded.experiment.population.search.freeze_a
    may_freeze = lora.freeze_a or (isinstance(drawn, (Choice, Grid)) and True in drawn.values)
    if may_freeze and lora.modules_to_save:
        yield ("lora", "freeze_a"), "freeze_a trains B alone, modules_to_save whole modules; leave one of the two out"


def _adapter(loaded: LoadedExperiment, worn: PeftAdapter) -> Iterator[Finding]:
    """What goes with `adapter` of what is written beside it."""
    lora, plain, name = loaded.blueprint.lora, Lora(), loaded.blueprint.adapter_type
    for field in ("init", "use_rslora", "plus_ratio", "freeze_a", "dropout", "use_dora", "lora_bias", "modules_to_save"):
        if getattr(lora, field) != getattr(plain, field):
            yield ("lora", field), f"is for LoRA, in whose place adapter puts {name}; leave it out, or leave adapter out"
    search, own = loaded.experiment.population.search, type(worn).model_fields
    for field in ("rank", "alpha"):
        if getattr(search, field) is not None and field not in own:
            yield ("population", "search", field), f"{name} has no {field} to search; leave it out"
    for field in ("plus_ratio", "freeze_a", "dropout"):
        if getattr(search, field) is not None:
            yield ("population", "search", field), f"is for LoRA, and the variants train {name}; leave it out"
    ranks = [int(value) for value in getattr(search.rank, "values", ()) if isinstance(value, (int, float))]
    if isinstance(worn, Hra) and any(rank % 2 for rank in ranks):
        yield ("population", "search", "rank"), "an odd number of reflections cannot begin as none; write even ranks"
    twins = [target for target in worn.targets or () if (worn.targets or ()).count(target) > 1]
    if twins:
        yield ("adapter", "targets"), f"{twins[0]!r} is named twice"
    for inner in getattr(worn, "feedforward_modules", None) or ():
        if inner not in (worn.targets or ()):
            yield ("adapter", "feedforward_modules"), f"{inner!r} is none of its targets ({', '.join(worn.targets or ())})"
    if isinstance(worn, AdaLora):
        yield from _adalora(loaded, worn, ranks or [worn.rank])
    if getattr(worn, "boft_block_num", 0) and getattr(worn, "boft_block_size", 0):
        yield ("adapter", "boft_block_num"), "boft_block_size x boft_block_num is the width; write one, and 0 for the other"
    elif isinstance(worn, Boft) and not (worn.boft_block_num or worn.boft_block_size):
        yield ("adapter", "boft_block_size"), "boft_block_size and boft_block_num are 0; write one of them"


def _adalora(loaded: LoadedExperiment, worn: AdaLora, ranks: Sequence[int]) -> Iterator[Finding]:
    """Ranks must be there to be taken away, and steps to do it in."""
    population, lanes = loaded.experiment.population, loaded.blueprint.lanes
    steps = population.tokens_per_variant // (step_sizes(population.search, lanes)[-1] * lanes.sequence_length)
    if worn.target_r >= min(ranks):
        yield ("adapter", "target_r"), f"{worn.target_r} of {min(ranks)} ranks are to be left: nothing is taken; write fewer"
    if worn.tinit + worn.tfinal >= steps:
        yield (
            ("adapter", "tinit"),
            f"tinit ({worn.tinit}) and tfinal ({worn.tfinal}) leave none of {steps} steps to take ranks away in; write fewer",
        )
    if worn.modules_to_save:
        yield ("adapter", "modules_to_save"), "what is left of AdaLoRA is a plain LoRA, which has none; leave it out"


def _body(loaded: LoadedExperiment, reason: str) -> Iterator[Finding]:
    body = loaded.body
    if body.slots not in (1, "auto"):
        yield ("body", "slots"), f"{body.slots} variants cannot be packed: {reason}; write slots: 1 (they train in turn)"
    if body.zero_stage == 3:
        yield (
            ("body", "zero_stage"),
            "3 shards the frozen base, and here peft puts what is trained into its modules; write zero_stage: 0",
        )
    if body.quantization != "none":
        yield (
            ("body", "quantization"),
            f"peft is given the base's linear modules as they are, not {body.quantization}; write quantization: none",
        )


def _merges(loaded: LoadedExperiment, worn: Lora | PeftAdapter) -> Iterator[Finding]:
    """Only the winner is no sum of deltas."""
    what = loaded.blueprint.adapter_type
    if isinstance(worn, Lora):
        what = "use_dora" if worn.use_dora else "lora_bias" if worn.lora_bias else "modules_to_save"
    for position, merge in enumerate(loaded.experiment.merge):
        if merge.method != "winner":
            written = "merge" in loaded.experiment.model_fields_set
            yield (
                ("merge", position, "method") if written else ("merge",),
                f"{merge.method} adds up low-rank deltas, and variants with {what} are more than that; "
                "write merge: [{method: winner}]",
            )
            if not written:
                return
