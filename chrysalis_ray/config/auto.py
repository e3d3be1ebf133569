"""`blueprint: auto` and `tokens_per_variant: auto`: what an experiment leaves to rules that know its base and this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from chrysalis_ray.config.blueprint import Base
from chrysalis_ray.config.experiment import Experiment
from chrysalis_ray.config.overrides import apply_overrides
from chrysalis_ray.config.problems import problem_at
from chrysalis_ray.config.resolve import Chosen, lacking, located
from chrysalis_ray.config.yaml_tree import Node, YamlRefused, parse_tree

AUTO = "auto"
NAME = "blueprint: auto"  # what the chosen text is called in messages
_TOKENS = ("population", "tokens_per_variant")

# Given an experiment, its base and the tokens of a variant (None where they are to be chosen too).
Chooser = Callable[[Experiment, Base, int | None], Chosen]


def is_auto(root: Node) -> bool:
    """Whether an experiment leaves its blueprint open."""
    return "blueprint" in root.entries and root.entries["blueprint"][1].value == AUTO


def without_auto_tokens(root: Node) -> tuple[Node, bool]:
    """The tree with a number where `tokens_per_variant: auto` stands, and whether it stood there."""
    section, key = _TOKENS
    if section not in root.entries or root.entries[section][1].kind != "map":
        return root, False
    where, population = root.entries[section]
    if key not in population.entries or population.entries[key][1].value != AUTO:
        return root, False
    spot, node = population.entries[key]
    numbered = replace(population, entries={**population.entries, key: (spot, replace(node, value=1))})
    return replace(root, entries={**root.entries, section: (where, numbered)}), True


def auto_tokens_problems(root: Node, is_open: bool) -> list[str]:
    """What is wrong with open tokens beside a blueprint that was named."""
    what = "auto goes with `blueprint: auto`, whose rules say how many; write a number of tokens"
    return [problem_at(root, _TOKENS, what)] if is_open else []


def choose_blueprint(
    experiment: Experiment | None, root: Node, path: Path, is_open: bool, choose: Chooser | None, problems: list[str]
) -> tuple[Experiment, Chosen] | None:
    """The experiment with a number of tokens, and the blueprint that `choose` has for it; None where there are problems.

    Raises ModelError where nothing is known of the base.
    """
    if experiment is None:
        return None
    if experiment.base is None:
        what = "auto is chosen for a base; add `base: {type: pretrained, model: Qwen/Qwen3-0.6B}`, or name a blueprint"
        problems.append(problem_at(root, ("blueprint",), what))
    elif choose is None:
        problems.append(problem_at(root, ("blueprint",), "auto needs somebody to choose; name a blueprint"))
    elif lack := lacking(experiment.base, located(experiment.base, path)):
        problems.append(problem_at(root, ("base", "model"), lack))
    if problems or experiment.base is None or choose is None:
        return None
    tokens = None if is_open else experiment.population.tokens_per_variant
    chosen = choose(experiment, located(experiment.base, path), tokens)
    if is_open:
        population = experiment.population.model_copy(update={"tokens_per_variant": chosen.tokens})
        experiment = experiment.model_copy(update={"population": population})
    return experiment, chosen


def chosen_tree(chosen: Chosen, patches: Sequence[str], problems: list[str]) -> Node:
    """The tree of a chosen blueprint with `patches` over it, as of ``--set blueprint.a=b``."""
    try:
        tree = parse_tree(chosen.text, NAME)
    except YamlRefused as refused:  # a text that somebody edited in run.json
        problems.append(f"{refused.where}: {refused.what}")
        return Node("map", NAME)
    root, misplaced = apply_overrides(tree.root, patches)
    problems += [*tree.problems, *misplaced]
    return root
