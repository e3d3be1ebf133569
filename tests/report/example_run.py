"""A small, whole run directory, made by formula: what the other rooms leave behind, without training anything."""

import hashlib
import json
import math
from pathlib import Path

from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import Epigenome, Hyperparameters, Variant, sha256_of, sha256_of_file, write_bytes, write_json
from chrysalis_ray.report.metrics import append_metrics

DOMAINS = ("api_docs", "code", "comments", "docstrings", "reference", "unicode")
STATES = ("finished", "finished", "finished", "stopped", "stopped", "finished", "evicted", "stopped")
STEPS, CHUNK, ROWS, LENGTH = 64, 8, 4, 128


def _adapter(folder: Path, word: str) -> str:
    """Bytes that stand for a PEFT folder; returns the name that `seed.adapter` gives such a folder."""
    write_bytes(folder / "adapter_config.json", json.dumps({"peft_type": "LORA", "word": word}).encode())
    write_bytes(folder / "adapter_model.safetensors", hashlib.sha256(word.encode()).digest() * 8)
    names = ("adapter_config.json", "adapter_model.safetensors")
    return sha256_of({name: sha256_of_file(folder / name) for name in names})


def _skill(index: int, domain: str) -> float:
    """Final loss of a variant on a domain: lower where it saw more of it, and a little by its learning rate."""
    home = DOMAINS[index % len(DOMAINS)]
    return 3.1 + 0.12 * DOMAINS.index(domain) - (0.45 if domain == home else 0.12) + 0.03 * ((index * 5) % 7)


def _losses(name: str, index: int | None) -> dict[str, float]:
    if name == "seed":
        return {domain: 3.9 + 0.12 * DOMAINS.index(domain) for domain in DOMAINS}
    if index is None:  # a merge: a little better than the mean of all, far better than none
        gain = {"ensemble": 0.18, "consensus": 0.05, "winner": 0.0}.get(name, 0.0)
        return {d: sum(_skill(k, d) for k in range(8)) / 8 - gain for d in DOMAINS}
    return {domain: _skill(index, domain) for domain in DOMAINS}


def _variant(index: int, genome_id: str, seed_sha256: str, base_sha256: str) -> Variant:
    home = DOMAINS[index % len(DOMAINS)]
    return Variant(
        variant_id=f"v{index:03d}-{home}",
        index=index,
        rng_seed=100 + index,
        seed_sha256=seed_sha256,
        genome_id=genome_id,
        base_sha256=base_sha256,
        hyperparameters=Hyperparameters(rank=(4, 8, 16)[index % 3], learning_rate=1e-3 * 1.4 ** (index - 3)),
        epigenome=Epigenome({domain: 4.0 if domain == home else 1.0 for domain in DOMAINS}),
        steps=STEPS,
        chunk_steps=CHUNK,
        rows_per_step=ROWS,
        sequence_length=LENGTH,
        parents=(seed_sha256,),
    )


def _write_genome_manifest(layout: RunLayout, shard_sha256: str) -> str:
    content = {
        "format": 1,
        "merkle_root": "5" * 64,
        "licences": dict.fromkeys(DOMAINS, "PSF-2.0"),
        "totals": {
            domain: {
                "train": {"documents": 34 + 7 * place, "bytes": 180_000 + 30_000 * place},
                "select": {"documents": 3, "bytes": 10_000},
                "report": {"documents": 3, "bytes": 10_000},
            }
            for place, domain in enumerate(DOMAINS)
        },
    }
    shards = {"shards/code-train.parquet": {"sha256": shard_sha256, "bytes": 28, "rows": 1}}
    genome_id = sha256_of(content)
    write_json(
        layout.genome / "manifest.json",
        {"genome_id": genome_id, "created": "2026-11-20T09:30:01Z", "shards": shards, "content": content},
    )
    return genome_id


def write_branch(layout: RunLayout) -> list[Variant]:
    """run.json, genome, base, seed, branch: what stands there before training."""
    base_bytes = b"weights of a very small base" * 10
    base_files = {}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        write_bytes(layout.root / "base-files" / name, base_bytes)
        base_files[name] = hashlib.sha256(base_bytes).hexdigest()
    base_sha256 = sha256_of(base_files)
    experiment = {
        "name": "quickstart",
        "description": "eight variants, each brighter in one domain",
        "blueprint": {"name": "tiny", "lora": {"targets": ["q_proj", "v_proj"]}},
        "population": {"variants": 8, "tokens_per_variant": STEPS * ROWS * LENGTH},
        "tracking": {"wandb": "offline", "project": "chrysalis", "entity": None, "tags": ["nightly"]},
    }
    write_json(
        layout.run_manifest,
        {
            "name": "quickstart",
            "created": "2026-11-20T09:30:00Z",
            "version": "0.1.0",
            "experiment": experiment,
            "experiment_sha256": sha256_of(experiment),
            "run_id": "7f3ad001",
        },
    )
    said = {"body": {"gpus_per_worker": 0.0}, "memory": {"total": 700 << 20, "process": 500 << 20},
            "time": {"train_expected": 120.0, "expected": 140.0}}  # fmt: skip
    write_json(layout.plan, {"said": said, "came": {"peak_memory": 650 << 20, "wall_seconds": 150.0}})
    write_bytes(layout.experiment_yaml, b"# chrysalis run experiments/quickstart.yaml\nname: quickstart\nblueprint: tiny\n")
    shard = b"PAR1 text of the genome PAR1"
    write_bytes(layout.genome / "shards" / "code-train.parquet", shard)
    genome_id = _write_genome_manifest(layout, hashlib.sha256(shard).hexdigest())
    write_json(
        layout.base_manifest,
        {
            "path": str(layout.root / "base-files"),
            "sha256": base_sha256,
            "name": "chrysalis/embedded-qwen3",
            "type": "embedded",
            "parameters": 4_200_000,
            "layers": 4,
            "vocabulary": 4096,
        },
    )
    seed_sha256 = _adapter(layout.seed, "seed")
    variants = [_variant(index, genome_id, seed_sha256, base_sha256) for index in range(8)]
    for variant in variants:
        write_json(layout.variant(variant.variant_id), variant.to_json())
    write_json(layout.branch_manifest, {"variants": [variant.variant_id for variant in variants]})
    return variants


def metrics_row(variant: Variant, report: int, state: str = "training") -> dict:
    """One report of one variant, as the driver appends it."""
    step = report * CHUNK
    decay = math.exp(-step / 18)
    final = sum(_skill(variant.index, d) for d in DOMAINS) / len(DOMAINS)
    tokens = step * variant.tokens_per_step
    levels = variant.epigenome.express
    return {
        "variant": variant.variant_id,
        "report": report,
        "step": step,
        "tokens": tokens,
        "train_loss": final + 1.1 * decay + 0.03 * math.sin(variant.index + 2.0 * report),
        "select_loss": final + 0.9 * decay,
        "learning_rate": variant.hyperparameters.learning_rate * math.cos(step / STEPS * math.pi / 2),
        "gradient_norm": 0.4 + decay,
        "tokens_per_second": 9000.0 + 50 * variant.index,
        "seconds": 1.5,
        "state": state,
        "position": sha256_of([variant.variant_id, report]),
        "domain_tokens": {d: int(tokens * level / sum(levels.values()) * 0.995) for d, level in levels.items()},
        "epigenome": variant.epigenome.to_json(),
        "hyperparameters": variant.hyperparameters.to_json(),
    }


def write_training(layout: RunLayout, variants: list[Variant]) -> None:
    """metrics.jsonl, population.json, adapters. Stopped variants stop at half, the evicted one at a quarter."""
    ends = {}
    reports = {"finished": 8, "stopped": 4, "evicted": 2}
    for report in range(1, 9):
        for variant in variants:
            state = STATES[variant.index]
            if report <= reports[state]:
                append_metrics(layout.metrics, metrics_row(variant, report, state if report == reports[state] else "training"))
    for variant in variants:
        state = STATES[variant.index]
        adapter_sha256 = _adapter(layout.adapter(variant.variant_id), variant.variant_id)
        ends[variant.variant_id] = {
            "state": state,
            "position": sha256_of([variant.variant_id, reports[state]]),
            "step": reports[state] * CHUNK,
            "tokens": reports[state] * CHUNK * variant.tokens_per_step,
            "reason": {"stopped": "ASHA: not in the best half at report 4", "evicted": "loss is NaN"}.get(state),
            "chunks": reports[state],
            "adapter_sha256": adapter_sha256,
            "metrics": {"peak_memory": (640 + reports[state]) << 20},
        }
    write_json(layout.population_manifest, {"variants": ends, "wall_seconds": 131.5, "train_seconds": 110.0, "turns": 8})


def _metrics(losses: dict[str, float]) -> dict[str, dict[str, float | None]]:
    """A loss in every unit, four bytes to a token; accuracy falls with the loss. Of unicode nobody counted the bytes."""
    return {
        domain: {
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": None if domain == "unicode" else loss / 4 / math.log(2),
            "accuracy": 1 / loss,
        }
        for domain, loss in losses.items()
    }


def write_audit(layout: RunLayout, names: list[str]) -> None:
    """What eight changes look like of which the last is long and points elsewhere."""
    last = len(names) - 1
    rows = []
    for place, name in enumerate(names):
        cosines = [1.0 if other == place else 0.02 if last in (other, place) else 0.5 for other in range(len(names))]
        rows.append(
            {"name": name, "sha256": "a" * 64, "rank": 8, "alpha": 16.0, "use_rslora": False, "modules": 21,
             "norm": 30.0 if place == last else 10.0 + place, "effective_rank": 3.0 + 0.1 * place, "cosines": cosines}
        )  # fmt: skip
    agreement = {
        "survived_energy": 0.81,
        "sign_agreement": 0.2,
        "sign_agreement_energy": 0.34,
        "sign_agreement_by_chance": 0.01,
    }
    write_json(
        layout.audit,
        {"adapters": rows, "principal_cosine": 0.97, "condition": 41000.0, "mean_kept_by_rank": 0.93, "agreement": agreement,
         "agreement_by_chance": 0.0426, "findings": ["one cohort: averages lose little", f"outlier: {names[last]}"]},
    )  # fmt: skip


def write_judgement(layout: RunLayout, variants: list[Variant]) -> None:
    """Scores, merges, verdict, imago."""
    merges = ("winner", "ensemble", "consensus")
    names: dict[str, int | None] = {"seed": None, **{v.variant_id: v.index for v in variants}, **dict.fromkeys(merges)}
    losses = {name: _losses(name, index) for name, index in names.items()}
    losses["winner"] = losses[variants[0].variant_id]
    for path, split in ((layout.select_scores, "select"), (layout.report_scores, "report")):
        documents = {
            name: [[domain, document, loss * 100, 100] for domain, loss in by_domain.items() for document in range(3)]
            for name, by_domain in losses.items()
        }
        write_json(path, {"split": split, "candidates": documents})
    weights = {variant.variant_id: 1 / 4 for variant in variants if STATES[variant.index] == "finished"}
    candidates = {}
    for name, residual in (("winner", 0.0), ("ensemble", 0.21), ("consensus", 0.34)):
        candidates[name] = {
            "method": name,
            "weights": {variants[0].variant_id: 1.0} if name == "winner" else weights,
            "rank": 16,
            "residual": residual,
            "captured_energy": 1 - residual**2,
            "notes": {"gate": 0.41} if name == "consensus" else {},
            "sha256": _adapter(layout.merge(name), name),
        }
    write_json(
        layout.merges_manifest, {"candidates": candidates, "failed": {"consensus-strict": "nothing agreed: support 0.9"}}
    )
    mean = {name: sum(by_domain.values()) / len(by_domain) for name, by_domain in losses.items()}
    mean["mixture of variants"] = mean["ensemble"] - 0.05
    write_audit(layout, [variant.variant_id for variant in variants])
    report = {name: {"mean": loss + 0.02, "low": loss - 0.05, "high": loss + 0.09} for name, loss in mean.items()}
    write_json(
        layout.verdict,
        {
            "winner": variants[0].variant_id,
            "chosen": "ensemble",
            "kind": "merge",
            "merging_helped": "yes",
            "sentences": [
                "Merging helped: ensemble reaches 3.29 on text that chose nothing, the best variant 3.36.",
                "The difference is -0.07, with 95 % confidence between -0.10 and -0.03.",
            ],
            "select": {"loss": mean, "domains": losses, "metrics": {name: _metrics(own) for name, own in losses.items()}},
            "report": {
                "loss": report,
                "difference": {"against": variants[0].variant_id, "mean": -0.07, "low": -0.10, "high": -0.03},
                "confidence": 0.95,
            },
        },
    )
    _adapter(layout.imago, "ensemble")
