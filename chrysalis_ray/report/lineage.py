"""Lineage: genome -> base -> seed -> variants -> merges -> imago, each named by the sha256 of its bytes.

`lineage` writes down what is there now; `verify` computes every hash again and says what no longer fits. Nothing here trusts
a path that a manifest gives: only plain files below the folder they belong to are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import sha256_of, sha256_of_file
from chrysalis_ray.core.redaction import redact
from chrysalis_ray.report.kinds import adapter_of, is_lora_alone
from chrysalis_ray.report.reading import manifest, mapping

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
FORMAT = 1


def adapter_name(folder: Path) -> str | None:
    """The sha256 that names a PEFT folder (over the hashes of its config and weights), None where it is not whole."""
    if not all((folder / name).is_file() for name in ADAPTER_FILES):
        return None
    return sha256_of({name: sha256_of_file(folder / name) for name in ADAPTER_FILES})


def lineage(root: Path) -> dict[str, Any]:
    """Where the imago of a run comes from, as plain JSON for ``imago/lineage.json``. Stages not reached are absent."""
    layout = RunLayout(Path(root).absolute())
    run = manifest(layout.run_manifest)
    if run is None:
        raise RunError(
            f"{layout.root} is not a run directory: it holds no {layout.run_manifest.name}", "give the folder of a run"
        )
    experiment = mapping(run.get("experiment"))
    record: dict[str, Any] = {
        "format": FORMAT,
        "run": {key: run.get(key) for key in ("name", "run_id", "created", "version", "experiment_sha256")},
        "adapter": {} if is_lora_alone(experiment) else adapter_of(experiment),
        "genome": _genome(layout),
        "base": _base(layout),
        "seed": _adapter(layout.seed),
        "variants": _variants(layout),
        "merges": _merges(layout),
        "imago": _imago(layout),
    }
    return redact({key: value for key, value in record.items() if value})


def _run_of(layout: RunLayout) -> dict[str, Any]:
    run = manifest(layout.run_manifest)
    if run is None:
        raise RunError(
            f"{layout.root} is not a run directory: it holds no {layout.run_manifest.name}", "give the folder of a run"
        )
    return run


def _genome(layout: RunLayout) -> dict[str, Any] | None:
    sealed = manifest(layout.genome / "manifest.json")
    if sealed is None:
        return None
    shards = {name: mapping(value).get("sha256") for name, value in mapping(sealed.get("shards")).items()}
    return {
        "genome_id": sealed.get("genome_id"),
        "merkle_root": mapping(sealed.get("content")).get("merkle_root"),
        "shards": shards,
    }


def _base(layout: RunLayout) -> dict[str, Any] | None:
    base = manifest(layout.base_manifest)
    if base is None:
        return None
    files = {path.name: sha256_of_file(path) for path in _base_files(Path(str(base.get("path", ""))))}
    return {key: base.get(key) for key in ("name", "type", "revision", "sha256") if base.get(key)} | {"files": files}


def _adapter(folder: Path) -> dict[str, Any] | None:
    name = adapter_name(folder)
    return {"sha256": name} if name else None


def _variants(layout: RunLayout) -> dict[str, Any]:
    variants = {}
    for variant_id in (manifest(layout.branch_manifest) or {}).get("variants", []):
        record = manifest(layout.variant(variant_id)) or {}
        variants[variant_id] = {
            "recipe_sha256": sha256_of(record),
            "sha256": adapter_name(layout.adapter(variant_id)),
            "parents": record.get("parents", []),
            "genome_id": record.get("genome_id"),
            "base_sha256": record.get("base_sha256"),
            "seed_sha256": record.get("seed_sha256"),
        }
    return variants


def _merges(layout: RunLayout) -> dict[str, Any]:
    candidates = mapping((manifest(layout.merges_manifest) or {}).get("candidates"))
    return {
        name: {
            "sha256": adapter_name(layout.merge(name)) or mapping(value).get("sha256"),
            "method": mapping(value).get("method"),
            "weights": mapping(value).get("weights") or {},
        }
        for name, value in candidates.items()
        if _is_plain_name(name)
    }


def _imago(layout: RunLayout) -> dict[str, Any] | None:
    name = adapter_name(layout.imago)
    verdict = manifest(layout.verdict) or {}
    return {"sha256": name, "chosen": verdict.get("chosen"), "winner": verdict.get("winner")} if name else None


# verify -------------------------------------------------------------------------------------------------------------


def verify(root: Path) -> list[str]:
    """Hash everything again; one sentence per thing that does not fit, nothing when all is well.

    Checked: the genome's manifest and shards, the base's files, seed, variants and merges against what was recorded in
    ``lineage.json`` and in the stages' own manifests, and the links between them.
    """
    layout = RunLayout(Path(root).absolute())
    _run_of(layout)
    try:
        now = lineage(layout.root)
        recorded = manifest(layout.lineage)
        problems = [*_genome_problems(layout), *_link_problems(now, layout)]
    except RunError as error:  # a manifest that is no JSON any more
        return [error.message]
    if recorded is None:
        if layout.imago.is_dir():
            problems.append(f"{layout.lineage}: missing, though there is an imago")
        return problems
    for path, was, found in _differences(_hashes(recorded), _hashes(now)):
        problems.append(f"{path}: recorded as {_short(was)}, is {_short(found)}")
    return problems


def _genome_problems(layout: RunLayout) -> Iterator[str]:
    path = layout.genome / "manifest.json"
    sealed = manifest(path)
    if sealed is None:
        return
    identity = sha256_of(sealed.get("content"))
    if identity != sealed.get("genome_id"):
        yield f"{path}: sealed as genome {_short(sealed.get('genome_id'))}, its content is {_short(identity)}"
    for name, value in sorted(mapping(sealed.get("shards")).items()):
        shard = _below(layout.genome, name)
        sealed_as = mapping(value).get("sha256")
        found = sha256_of_file(shard) if shard is not None else None
        if found != sealed_as:
            yield f"{layout.genome / name}: sealed as {_short(sealed_as)}, is {_short(found)}"


def _link_problems(now: Mapping[str, Any], layout: RunLayout) -> Iterator[str]:
    """Every variant must come from this genome, base and seed; every merge must be what its manifest says."""
    seed = mapping(now.get("seed")).get("sha256")
    origins = {
        "genome_id": mapping(now.get("genome")).get("genome_id"),
        "base_sha256": mapping(now.get("base")).get("sha256"),
        "seed_sha256": seed,
    }
    for variant_id, record in mapping(now.get("variants")).items():
        for key, actual in origins.items():
            if record.get(key) != actual:
                place = layout.variant(variant_id)
                yield f"{place}: {key} is {_short(record.get(key))}, this run has {_short(actual)}"
    base = mapping(now.get("base"))
    if base and sha256_of(base["files"]) != base.get("sha256"):
        found = _short(sha256_of(base["files"]))
        yield f"{layout.base_manifest}: pinned as {_short(base.get('sha256'))}, its files are {found}"
    ends = mapping((manifest(layout.population_manifest) or {}).get("variants"))
    for variant_id, record in mapping(now.get("variants")).items():
        harvested = mapping(ends.get(variant_id)).get("adapter_sha256")
        if harvested and harvested != record["sha256"]:
            yield f"{layout.adapter(variant_id)}: harvested as {_short(harvested)}, is {_short(record['sha256'])}"
    written = mapping((manifest(layout.merges_manifest) or {}).get("candidates"))
    merges = mapping(now.get("merges"))
    for name, record in merges.items():
        said = mapping(written.get(name)).get("sha256")
        if said and record["sha256"] != said:
            yield f"{layout.merge(name)}: merged as {_short(said)}, is {_short(record['sha256'])}"
        strangers = sorted(set(record["weights"]) - set(mapping(now.get("variants"))) - {"seed"})
        if strangers:
            yield f"{layout.merges_manifest}: {name} was merged from {strangers[0]}, which is no variant of this run"


def _hashes(record: Any, path: str = "") -> dict[str, str]:
    """Every leaf of a lineage record that names content, by its place in the record."""
    if isinstance(record, Mapping):
        found: dict[str, str] = {}
        for key, value in record.items():
            place = f"{path}/{key}" if path else str(key)
            if isinstance(value, str) and (str(key).endswith(("sha256", "_id", "merkle_root")) or "/files/" in f"/{place}"
                                           or "/shards/" in f"/{place}"):  # fmt: skip
                found[place] = value
            else:
                found |= _hashes(value, place)
        return found
    return {}


def _differences(was: Mapping[str, str], now: Mapping[str, str]) -> Iterator[tuple[str, str | None, str | None]]:
    for place in sorted(was.keys() | now.keys()):
        if was.get(place) != now.get(place):
            yield place, was.get(place), now.get(place)


def _base_files(folder: Path) -> list[Path]:
    """What names a base: its weights, config and tokenizer."""
    if not folder.is_absolute() or not folder.is_dir():
        return []
    named = [*sorted(folder.glob("*.safetensors")), folder / "config.json", folder / "tokenizer.json"]
    return [path for path in named if path.is_file()]


def _below(folder: Path, name: str) -> Path | None:
    """The plain file `name` under `folder`; None if there is none, or if the name leads out of the folder."""
    path = folder / name
    inside = path.resolve().is_relative_to(folder.resolve())
    return path if inside and path.is_file() else None


def _is_plain_name(name: str) -> bool:
    return bool(name) and "/" not in name and not name.startswith(".")


def _short(sha256: Any) -> str:
    return str(sha256)[:16] if sha256 else "missing"


# drawing ------------------------------------------------------------------------------------------------------------


def mermaid(record: Mapping[str, Any]) -> str:
    """The lineage as a Mermaid flowchart. Names are quoted and stripped of what Mermaid would read as syntax."""
    lines = ["flowchart LR"]
    genome, base, seed = (mapping(record.get(key)) for key in ("genome", "base", "seed"))
    lines.append(_node("genome", "genome", genome.get("genome_id")))
    lines.append(_node("base", f"base {base.get('name', '')}", base.get("sha256")))
    lines.append(_node("seed", "seed", seed.get("sha256")))
    lines.append("  base --> seed")
    places = {}
    for k, (variant_id, variant) in enumerate(mapping(record.get("variants")).items()):
        places[variant_id] = f"v{k}"
        lines += [_node(f"v{k}", variant_id, variant.get("sha256")), f"  seed --> v{k}", f"  genome -.-> v{k}"]
    chosen = mapping(record.get("imago")).get("chosen")
    for k, (name, merge) in enumerate(mapping(record.get("merges")).items()):
        lines.append(_node(f"m{k}", f"{name} ({merge.get('method')})", merge.get("sha256")))
        lines += [
            f"  {places[v]} -- {weight:.3g} --> m{k}" for v, weight in mapping(merge.get("weights")).items() if v in places
        ]
        if name == chosen:
            lines.append(f"  m{k} ==> imago")
    if record.get("imago"):
        lines.append(_node("imago", "imago", mapping(record["imago"]).get("sha256")))
        lines += [f"  {places[chosen]} ==> imago"] if chosen in places else []
    return "\n".join(lines) + "\n"


def _node(key: str, label: str, sha256: Any) -> str:
    plain = "".join(letter if letter.isalnum() or letter in " ._-()/" else "_" for letter in label).strip()
    name = f"<br/>{str(sha256)[:12]}" if sha256 else ""
    return f'  {key}["{plain}{name}"]'
