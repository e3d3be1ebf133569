"""What pydantic cannot see: whether the parts of a blueprint, and of an experiment with it, fit together.

Each check yields (path, what is wrong and meant).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from chrysalis_ray.config.blueprint import Base, Blueprint, EmbeddedBase
from chrysalis_ray.config.domain_loss import check_domain_loss
from chrysalis_ray.config.epigenome_checks import check_epigenomes
from chrysalis_ray.config.experiment import DatasetSource, FolderSource, GenomeSpec, JsonlSource, PythonSource, Source
from chrysalis_ray.config.genome import (
    GitSource,
    HistorySource,
    PackagesSource,
    PackedSource,
    RecordsSource,
    is_remote,
)
from chrysalis_ray.config.lora_checks import check_lora
from chrysalis_ray.config.population_checks import check_population, rows_at_once
from chrysalis_ray.config.problems import Finding, Location, problem_at, suggestion
from chrysalis_ray.config.resolve import LoadedExperiment, is_local, lacking
from chrysalis_ray.config.search_checks import check_search
from chrysalis_ray.config.selection import check_selection
from chrysalis_ray.config.solo_checks import check_solo
from chrysalis_ray.config.yaml_tree import Node
from chrysalis_ray.core.written_paths import written_path

QWEN3_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QWEN3_NORMS = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm")


def check_blueprint(blueprint: Blueprint, tree: Node) -> list[str]:
    """Problems inside a blueprint alone."""
    findings = [*_base(blueprint.base), *_targets(blueprint), *check_selection(blueprint), *_lone_body(blueprint, tree)]
    return [problem_at(tree, path, what) for path, what in findings]


def check_experiment(loaded: LoadedExperiment, tree: Node, blueprint_tree: Node) -> list[str]:
    """Problems of an experiment together with its blueprint."""
    here = [
        *(_base(loaded.experiment.base) if loaded.experiment.base else ()),
        *_local_base(loaded),
        *_sources(loaded.experiment.genome, loaded.folder),
        *_lists(loaded.experiment.genome, loaded.folder),
        *_kinds(loaded.experiment.genome),
        *check_search(loaded, domains_of(loaded.experiment.genome)),
        *check_epigenomes(loaded, domains_of(loaded.experiment.genome)),
        *check_domain_loss(loaded.experiment.evaluate, domains_of(loaded.experiment.genome)),
        *check_population(loaded),
        *_truth_as_number(tree),
    ]
    lines = [problem_at(tree, path, what) for path, what in here]
    there = [*_base(loaded.blueprint.base), *_targets(loaded.blueprint), *check_selection(loaded.blueprint)]
    there += _truth_as_number(blueprint_tree)
    lines += [problem_at(blueprint_tree, path, what) for path, what in there]
    for path, what in (
        *_body(loaded),
        *_base_in_body(loaded),
        *_lanes(loaded),
        *_chat_template(loaded),
        *check_lora(loaded),
        *check_solo(loaded),
    ):
        home = tree if _depth(tree, path) >= _depth(blueprint_tree, path) else blueprint_tree
        lines.append(problem_at(home, path, what))
    return lines


def _depth(tree: Node, path: Location) -> int:
    """How many parts of a path are written in this tree."""
    return next(count for count in range(len(path), -1, -1) if _written(tree, path[:count]))


def _written(tree: Node, path: Location) -> bool:
    node = tree
    for part in path:
        if node.kind != "map" or part not in node.entries:
            return False
        node = node.entries[str(part)][1]
    return True


# base and blueprint -------------------------------------------------------------------------------------------------


def _base(base: Base) -> Iterator[Finding]:
    if not isinstance(base, EmbeddedBase):
        return
    if base.heads % base.key_value_heads:
        divisors = [str(n) for n in range(1, base.heads + 1) if base.heads % n == 0]
        yield (
            ("base", "key_value_heads"),
            (f"{base.key_value_heads} does not divide heads ({base.heads}); write one of {', '.join(divisors)}"),
        )
    if base.head_size % 2:
        yield ("base", "head_size"), f"{base.head_size} is odd; rotary positions need an even size, e.g. {base.head_size + 1}"


def _local_base(loaded: LoadedExperiment) -> Iterator[Finding]:
    if what := lacking(loaded.experiment.base or loaded.blueprint.base, loaded.base):
        yield ("base", "model"), what


def _chat_template(loaded: LoadedExperiment) -> Iterator[Finding]:
    file = loaded.chat_template
    if file is not None and not file.is_file():
        yield ("base", "chat_template"), f"no file {file}; a Jinja template was meant, such as blueprints/chatml.jinja"


def _targets(blueprint: Blueprint) -> Iterator[Finding]:
    base = blueprint.base
    known_family = isinstance(base, EmbeddedBase) or base.model.startswith("Qwen/Qwen3-")
    section, worn = "lora" if blueprint.adapter is None else "adapter", blueprint.worn
    known = QWEN3_LINEARS if blueprint.adapter is None or blueprint.adapter.linear else QWEN3_NORMS
    for position, target in enumerate(worn.targets or ()):
        if target in ("all-linear", "all"):
            yield (section, "targets", position), f"{target!r} is not a module; name them: {', '.join(known)}"
        elif known_family and target.rpartition(".")[2] not in known:
            what = "linear layer" if known is QWEN3_LINEARS else "norm"
            yield (section, "targets", position), f"{target!r} is no {what} of Qwen3; {suggestion(target, known)}"


def _lone_body(blueprint: Blueprint, tree: Node) -> Iterator[Finding]:
    yield from _truth_as_number(tree)
    offload = blueprint.body.offload
    if offload in ("cpu", "nvme") and blueprint.body.zero_stage == 0:
        yield ("body", "offload"), f"{offload} offload is part of zero_stage 3; {_without_stage_3(blueprint)}"


def _without_stage_3(blueprint: Blueprint) -> str:
    """What to do where what is written is part of stage 3."""
    if reason := blueprint.worn.solo:
        return f"leave offload and nvme_path out, since variants here train by plain peft, on a base that is whole ({reason})"
    return "set zero_stage: 3, or leave offload out"


def _truth_as_number(tree: Node) -> Iterator[Finding]:
    """`zero_stage: false` would pass as 0: Python says so, the person did not."""
    if _written(tree, ("body", "zero_stage")) and isinstance(tree.entries["body"][1].entries["zero_stage"][1].value, bool):
        yield ("body", "zero_stage"), "is true/false; 0 or 3 was meant"


# body ---------------------------------------------------------------------------------------------------------------


def _body(loaded: LoadedExperiment) -> Iterator[Finding]:
    body = loaded.body
    workers, gpus = body.workers or 1, body.gpus_per_worker or 0.0
    if body.zero_stage == 3 and workers == 1 and body.offload == "none" and not {"workers", "offload"} & set(loaded.open):
        yield (
            ("body", "zero_stage"),
            "3 shards the base over workers, and workers is 1; set workers: 2 or more, or offload: cpu",
        )
    if body.offload in ("cpu", "nvme") and body.zero_stage != 3 and "zero_stage" not in loaded.open:
        yield (
            ("body", "offload"),
            f"{body.offload} offload is part of zero_stage 3; zero_stage is {body.zero_stage}: "
            + _without_stage_3(loaded.blueprint),
        )
    if body.offload == "cpu" and gpus == 0:
        yield (
            ("body", "offload"),
            ("cpu offload moves the base off a GPU, but gpus_per_worker is 0; set gpus_per_worker: 1 or offload: none"),
        )
    if body.virtual_workers and body.virtual_workers % workers:
        yield (
            ("body", "virtual_workers"),
            f"{body.virtual_workers} virtual workers cannot be shared evenly by {workers} workers; "
            f"write a multiple of {workers}",
        )
    if body.virtual_workers and body.lanes != "fixed":
        yield (
            ("body", "virtual_workers"),
            f"they are for equal bits, which {body.lanes} lanes do not keep; write lanes: fixed, or leave virtual_workers out",
        )
    if body.gradients == "sharded" and (lack := _unsharded(loaded)):
        yield ("body", "gradients"), f"sharded gradients go to their owners layer by layer, and {lack}; write gradients: whole"
    if body.zero_stage == 3 and body.quantization != "none":
        yield (
            ("body", "quantization"),
            f"zero_stage 3 shards weights as they are, not {body.quantization}; write zero_stage: 0, or quantization: none",
        )
    if body.attention == "flash" and (gpus == 0 or body.precision != "bf16"):
        lack = "gpus_per_worker is 0" if gpus == 0 else f"precision is {body.precision}"
        yield ("body", "attention"), f"flash runs on a GPU in bf16, and {lack}; write attention: sdpa, or change that"
    if gpus > 1 and gpus != int(gpus):
        yield ("body", "gpus_per_worker"), (f"{gpus:g} is a fraction above 1; a worker drives one GPU or a part of it: write 1")
    elif gpus > 1:
        yield (
            ("body", "gpus_per_worker"),
            (f"a worker drives one GPU, not {gpus:g}; write workers: {int(gpus) * workers}, gpus_per_worker: 1"),
        )
    if 0 < gpus < 1 and workers > 1:
        yield (
            ("body", "gpus_per_worker"),
            (f"{workers} workers would share a GPU, which NCCL refuses; write gpus_per_worker: 1, or workers: 1"),
        )


def _unsharded(loaded: LoadedExperiment) -> str | None:
    """Why gradients of this body cannot be sharded."""
    body = loaded.body
    if body.workers == 1 and "workers" not in loaded.open:
        return "workers is 1"
    if loaded.blueprint.worn.solo:
        return "a variant that trains alone has one owner"
    if body.virtual_workers:
        return "virtual workers keep theirs apart until all can be added in order"
    return "layers are compiled as a whole" if body.compile else None


def _base_in_body(loaded: LoadedExperiment) -> Iterator[Finding]:
    """Where the base lies, and what is compiled of it."""
    body = loaded.body
    if (body.offload == "nvme") != (body.nvme_path is not None):
        lack = (
            "offload: nvme needs a folder" if body.offload == "nvme" else f"nvme_path is for offload: nvme, not {body.offload}"
        )
        yield ("body", "nvme_path"), f"{lack}; write both, such as nvme_path: /nvme/chrysalis, or neither"
    elif body.nvme_path is not None and not Path(body.nvme_path).is_absolute():
        yield ("body", "nvme_path"), f"{body.nvme_path} is not absolute; a folder that every node has was meant"
    if body.compile and (body.lanes != "fixed" or body.zero_stage == 3 or loaded.blueprint.worn.solo):
        missing = "a pack of fixed lanes" if body.lanes != "fixed" or loaded.blueprint.worn.solo else "zero_stage: 0"
        yield (
            ("body", "compile"),
            f"shapes and modules must stay as they are compiled: that needs {missing}; write that",
        )


def _lanes(loaded: LoadedExperiment) -> Iterator[Finding]:
    lanes, workers = loaded.blueprint.lanes, loaded.body.workers or 1
    micro = rows_at_once(loaded)
    name = "rows_per_microstep" if lanes.rows_per_microstep else "rows_per_step"
    if micro % workers and loaded.experiment.population.search.rows_per_step and not lanes.rows_per_microstep:
        yield (
            ("body", "workers"),
            (
                f"{workers} workers cannot share the {micro} rows of the smallest step in population.search.rows_per_step; "
                f"write workers that divide {micro}, or lanes.rows_per_microstep: {math.ceil(micro / workers) * workers} "
                "in the blueprint"
            ),
        )
    elif micro % workers:
        yield (
            ("body", "workers"),
            (
                f"{workers} workers cannot share the {micro} rows of lanes.{name} evenly; write workers that divide {micro}, "
                f"or lanes.{name}: {math.ceil(micro / workers) * workers} in the blueprint"
            ),
        )


# genome -------------------------------------------------------------------------------------------------------------


def _sources(genome: GenomeSpec, folder: Path) -> Iterator[Finding]:
    for position, source in enumerate(genome.sources):
        at = ("genome", "sources", position)
        if isinstance(source, PythonSource):
            twins = sorted({name for name in source.domains if source.domains.count(name) > 1})
            if twins:
                yield (*at, "domains"), f"{twins[0]!r} is named twice"
            continue
        if isinstance(source, PackedSource | HistorySource):
            yield from _packed_source(source, at, folder)
            continue
        if not source.path.strip() or "\0" in source.path:
            yield (*at, "path"), "is no path; a file, a folder or a hub id was meant"
            continue
        if isinstance(source, FolderSource) and (source.glob.startswith("/") or ".." in Path(source.glob).parts):
            yield (
                (*at, "glob"),
                (f"{source.glob!r} leaves the folder; write a pattern below it, e.g. '**/*.md', and the folder as `path`"),
            )
        yield from _source_path(source, (*at, "path"), folder)


def _lists(genome: GenomeSpec, folder: Path) -> Iterator[Finding]:
    """The files beside the sources: what was forgotten, and who denies what."""
    named: list[tuple[Location, str | None, str]] = [
        (("genome", "forget"), genome.forget, "a list such as forgotten.jsonl"),
        *(
            (("genome", "use_denied", place, "robots"), denial.robots, "a file in the manner of robots.txt")
            for place, denial in enumerate(genome.use_denied)
        ),
    ]
    for at, path, meant in named:
        if path is not None and not (folder / written_path(path)).is_file():
            yield at, f"no file {folder / written_path(path)} (paths start at the experiment's folder); {meant} was meant"


def _kinds(genome: GenomeSpec) -> Iterator[Finding]:
    """A domain is text or conversations: only these have tokens that are not learned."""
    first: dict[str, bool] = {}
    for position, source in enumerate(genome.sources):
        of_source = _domains_of_source(source)
        chat = getattr(source, "messages_key", None) is not None
        for domain in of_source:
            if first.setdefault(domain, chat) != chat:
                kinds = "conversations here, text in another source" if chat else "text here, conversations in another source"
                at: Location = ("genome", "sources", position)
                path = (*at, "domain") if getattr(source, "domain", None) == domain else at
                yield path, f"the domain {domain!r} would hold {kinds}; give one of them a domain of its own"


def _source_path(
    source: FolderSource | JsonlSource | DatasetSource | RecordsSource, at: Location, folder: Path
) -> Iterator[Finding]:
    target = folder / written_path(source.path)
    try:
        is_folder, is_file = target.is_dir(), target.is_file()
    except (OSError, ValueError) as error:
        yield at, f"{source.path!r} cannot be looked up ({error})"
        return
    relative = "" if Path(source.path).is_absolute() else " (paths start at the experiment's folder)"
    if isinstance(source, FolderSource) and not is_folder:
        other = "; it is a file: write its folder, and its name as `glob`" if is_file else ""
        yield at, f"no folder {target}{relative}{other}"
    elif isinstance(source, JsonlSource | RecordsSource) and not is_file:
        other = "; it is a folder: name one file in it, or use type: folder" if is_folder else ""
        yield at, f"no file {target}{relative}{other}"
    elif isinstance(source, DatasetSource) and is_local(source.path) and not (is_folder or is_file):
        yield at, f"no folder {target}{relative}; a data set of the hub is written NAME or OWNER/NAME"


def _packed_source(source: PackedSource | HistorySource, at: Location, folder: Path) -> Iterator[Finding]:
    if isinstance(source, PackagesSource):
        return
    is_git = isinstance(source, GitSource | HistorySource)
    key = "url" if is_git else "path"
    if is_git and is_remote(source.named):
        return
    target = folder / written_path(source.named)
    try:
        there = target.is_file() or (is_git and target.is_dir())
    except (OSError, ValueError) as error:
        yield (*at, key), f"{source.named!r} cannot be looked up ({error})"
        return
    if not there:
        what = "repository or bundle" if is_git else "archive"
        relative = "" if Path(source.named).is_absolute() else " (paths start at the experiment's folder)"
        yield (*at, key), f"no {what} {target}{relative}"


def domains_of(genome: GenomeSpec) -> tuple[str, ...]:
    """Every domain that some source provides, sorted. Two sources of one domain join their documents."""
    named = {domain for source in genome.sources for domain in _domains_of_source(source)}
    return tuple(sorted(named))


def _domains_of_source(source: Source) -> tuple[str, ...]:
    if isinstance(source, PythonSource):
        return source.domains
    if isinstance(source, PackedSource):
        return tuple(domain for _, domain in source.patterns)
    if isinstance(source, HistorySource):
        return source.domains
    return (source.domain,)
