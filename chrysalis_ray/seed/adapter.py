"""A LoRA adapter as a PEFT folder: `adapter_config.json` and `adapter_model.safetensors`.

What is written loads in plain peft. What is read may come from outside, so that everything which would make `B @ A * scale`
a lie about the adapter (DoRA, biases, saved modules, inits that alter the base ...) is refused, each with its remedy.
Tensors: A_RI rank x in, B_OR out x rank.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.core.patterns import PLAIN, Patterns
from chrysalis_ray.core.records import canonical_json, sha256_of, sha256_of_file, write_bytes
from chrysalis_ray.seed.placing import put_in_place, sync_and_hash, take
from chrysalis_ray.seed.strangers import no_factor
from chrysalis_ray.seed.tensors import is_finite_number, parse_tensors, unique_keys, write_floats

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
PREFIX = "base_model.model."
MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
FACTOR = re.compile(rf"{re.escape(PREFIX)}(?P<module>{MODULE.pattern})\.lora_(?P<side>[AB])\.weight")
MAX_CONFIG_BYTES = 4_000_000

# keys of LoraConfig under which the delta is no longer B A scale, or the base no longer the base -> what to do about it
_CHANGES_THE_DELTA = {
    "use_dora": "train without DoRA, or merge that adapter into its base as a full model",
    "use_qalora": "train without QA-LoRA",
    "use_bdlora": "train without BD-LoRA",
    "lora_bias": "train with lora_bias: false",
    "modules_to_save": "train without modules_to_save: whole modules cannot be merged as low-rank deltas",
    "trainable_token_indices": "train without trainable tokens",
    "target_parameters": "target linear modules, not parameters",
    "layer_replication": "train on the base as it is, without layer_replication",
    "alora_invocation_tokens": "train a plain LoRA instead of an activated one",
    "arrow_config": "train a plain LoRA instead of an Arrow router",
    "kasa_config": "train a plain LoRA instead of KaSA",
    "monteclora_config": "train a plain LoRA instead of MonteCLoRA",
    "megatron_config": "train without Megatron layers",
}
_PLAIN_INITS = (True, False, "true", "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class AdapterWeights:
    """One LoRA adapter. `factors` maps a module name of the base ("model.layers.0.self_attn.q_proj") to (A_RI, B_OR), fp32.

    The delta of a module is `scale` x B A, with scale alpha/rank, or alpha/sqrt(rank) with `use_rslora` (arXiv 2312.03732).
    `fan_in_fan_out` tells peft that the base keeps its weights [in, out], as GPT-2 does; the factors are the same.
    """

    base_model: str
    revision: str | None
    rank: int
    alpha: float
    use_rslora: bool
    targets: tuple[str, ...]
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    fan_in_fan_out: bool = False
    dropout: float = 0.0  # in training; peft's lora_dropout, which says nothing about the delta
    patterns: Patterns = PLAIN  # only while it is written: what is read has one rank and one scale for all modules

    @property
    def scale(self) -> float:
        return self.alpha / math.sqrt(self.rank) if self.use_rslora else self.alpha / self.rank

    def delta(self, module: str) -> torch.Tensor:
        """What this adapter adds to the weight of `module`: [out, in]."""
        a_ri, b_or = self.factors[module]
        return self.scale * (b_or @ a_ri)


def write_adapter(
    folder: Path,
    weights: AdapterWeights,
    card: str | None = None,
    extra: Mapping[str, bytes] | None = None,
    like: Path | Mapping[str, Any] | None = None,
    ready: tuple[Path, str | None] | None = None,
) -> str:
    """Write a PEFT folder and return the sha256 over its config and weights; the same adapter gives the same bytes.

    `card` becomes README.md, `extra` further plain files. `like` is a folder that this function wrote, or a config: what peft
    says of every adapter is taken from there, so that peft, seconds of import, need not be asked again. `ready` is a file that
    holds these weights already, and its sha256 if known: it is linked, and must not be written to again. The folder is built
    beside its place and renamed; files that an older folder holds beside ours are kept. Raises MergeError for an adapter that
    plain peft could not load.
    """
    shapes = _checked_shapes(weights)
    files = {CONFIG: _config_bytes(weights, like)}
    for name, content in (extra or {}).items():
        if name in (*files, WEIGHTS, CARD) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise MergeError(f"{name!r} cannot be a file beside an adapter", "give a plain file name of your own")
        files[name] = content
    if card is not None:
        files[CARD] = card.encode()
    return write_folder(
        folder, files, lambda path: take(ready[0], path, ready[1]) if ready else _write_weights(path, weights, shapes)
    )


def write_folder(folder: Path, files: Mapping[str, bytes], stream_weights: Callable[[Path], str] | None = None) -> str:
    """The files of an adapter, all at once; returns its name. `stream_weights` writes the weights that are not among `files`,
    and returns their sha256."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        building.chmod(0o755)
        hashes = {WEIGHTS: stream_weights(building / WEIGHTS)} if stream_weights else {}
        for name, content in files.items():
            write_bytes(building / name, content)
            hashes[name] = sha256(content).hexdigest()
        put_in_place(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return sha256_of({name: hashes[name] for name in (CONFIG, WEIGHTS)})


def adapter_sha256(folder: Path) -> str:
    """The name of an adapter: sha256 over the hashes of its config and its weights."""
    return sha256_of({name: sha256_of_file(folder / name) for name in (CONFIG, WEIGHTS)})


def factor_name(module: str, side: str) -> str:
    """What peft calls A or B of a module."""
    return f"{PREFIX}{module}.lora_{side}.weight"


def _checked_shapes(weights: AdapterWeights) -> dict[str, tuple[int, ...]]:
    """The shapes of A and B under their names in the file. Raises MergeError for what plain peft could not load."""
    if not weights.factors:
        raise MergeError("the adapter has no factors")
    if not (is_finite_number(weights.alpha) and weights.alpha > 0 and weights.rank >= 1):
        raise MergeError(f"rank {weights.rank} and alpha {weights.alpha} must be positive numbers")
    shapes: dict[str, tuple[int, ...]] = {}
    for module, (a_ri, b_or) in weights.factors.items():
        if not MODULE.fullmatch(module):
            raise MergeError(f"{module!r} is not the name of a module")
        rank = weights.patterns.rank_of(module, weights.rank)
        if a_ri.ndim != 2 or b_or.ndim != 2 or a_ri.shape[0] != rank or b_or.shape[1] != rank:
            raise MergeError(
                f"module {module}: A {tuple(a_ri.shape)} and B {tuple(b_or.shape)} do not fit rank {rank}",
                f"A must be [{rank}, in] and B [out, {rank}]",
            )
        if not any(module == target or module.endswith(f".{target}") for target in weights.targets):
            raise MergeError(f"module {module} is none of the targets {', '.join(sorted(weights.targets))}")
        for side, tensor in (("A", a_ri), ("B", b_or)):
            shapes[factor_name(module, side)] = tuple(tensor.shape)
    return shapes


def _config_bytes(weights: AdapterWeights, like: Path | Mapping[str, Any] | None) -> bytes:
    own = {
        "base_model_name_or_path": weights.base_model,
        "revision": weights.revision,
        "r": weights.rank,
        "lora_alpha": int(weights.alpha) if float(weights.alpha).is_integer() else weights.alpha,
        "use_rslora": weights.use_rslora,
        "target_modules": sorted(weights.targets),
        "lora_dropout": weights.dropout,
        "fan_in_fan_out": weights.fan_in_fan_out,
        **weights.patterns.written(weights.factors),
    }
    known = _peft_config() if like is None else read_config(like) if isinstance(like, Path) else like
    plain = {**known, **own}
    return (json.dumps(json.loads(canonical_json(plain)), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _peft_config() -> dict[str, Any]:
    """What this version of peft writes into the config of a plain LoRA."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", inference_mode=True, bias="none").to_dict()


def _write_weights(path: Path, weights: AdapterWeights, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Write the factors, a module at a time, and return the file's sha256: they need not all be in memory."""
    factors_of = lru_cache(maxsize=1)(weights.factors.__getitem__)  # A and B of a module follow each other

    def tensor_of(name: str) -> torch.Tensor:
        found = FACTOR.fullmatch(name)
        assert found is not None, name
        return factors_of(found["module"])["AB".index(found["side"])]

    try:
        with path.open("wb") as stream:
            write_floats(stream, shapes, tensor_of, "format", "pt")
            stream.flush()
            return sync_and_hash(stream, path)
    except ValueError as error:
        raise MergeError(f"the adapter cannot be written: {error}", "leave out the variant that diverged") from error


# reading ------------------------------------------------------------------------------------------------------------


def read_adapter(folder: Path) -> AdapterWeights:
    """Read a PEFT LoRA folder of any peft version. Factors come as fp32; per-module ranks and alphas (`rank_pattern`,
    `alpha_pattern`) are folded into one rank and one alpha by exact rewriting.

    Raises MergeError for what is not a plain LoRA, or not whole.
    """
    config = read_config(folder)
    rank, alpha, use_rslora = geometry_of(folder, config)
    factors = _pair_factors(folder, _read_weights(folder))
    alphas = {module: by_pattern(folder, config, "alpha_pattern", module, alpha) for module in factors}
    ranks = {module: by_pattern(folder, config, "rank_pattern", module, rank) for module in factors}
    for module, (a_ri, b_or) in factors.items():
        if a_ri.shape[0] != ranks[module] or b_or.shape[1] != ranks[module]:
            raise MergeError(
                f"{folder}: module {module}: A is {tuple(a_ri.shape)}, B is {tuple(b_or.shape)}, by the config the rank is"
                f" {ranks[module]}",
                "the weights and the config of this adapter do not belong together",
            )
    if any(r != rank for r in ranks.values()) or any(a != alpha for a in alphas.values()):
        factors, rank, alpha = _even_out(factors, ranks, alphas, use_rslora)
    targets = named_targets(config)
    if not all(is_target(module, targets) for module in factors):
        targets = list(factors)
    return AdapterWeights(
        base_model=text_of(folder, config, "base_model_name_or_path") or "",
        revision=text_of(folder, config, "revision"),
        rank=rank,
        alpha=alpha,
        use_rslora=use_rslora,
        targets=tuple(sorted(targets)),
        factors=factors,
        fan_in_fan_out=config.get("fan_in_fan_out") is True,
        dropout=dropout_of(folder, config),
    )


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise MergeError(f"{folder} holds no {CONFIG}", "give the folder that peft's save_pretrained wrote")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise MergeError(f"{path} is {path.stat().st_size} bytes long: not an adapter config")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        reason = "it is not UTF-8 JSON" if isinstance(error, UnicodeDecodeError | RecursionError) else str(error)
        raise MergeError(f"{path} cannot be read: {reason}", "copy or export the adapter again") from error
    if not isinstance(config, dict):
        raise MergeError(f"{path} is not a JSON object", "copy or export the adapter again")
    return config


def geometry_of(folder: Path, config: Mapping[str, Any]) -> tuple[int, float, bool]:
    """Rank, alpha and use_rslora of a config, once nothing in it changes what B A scale means."""
    if config.get("peft_type") != "LORA":
        raise MergeError(f"{folder}: peft_type is {config.get('peft_type')!r}, not 'LORA'", "only LoRA adapters can be merged")
    for key, remedy in _CHANGES_THE_DELTA.items():
        if config.get(key):
            raise MergeError(f"{folder}: the adapter sets {key}", remedy)
    if config.get("bias", "none") != "none":
        raise MergeError(f"{folder}: the adapter trained biases (bias: {config['bias']!r})", "train with bias: none")
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise MergeError(
            f"{folder}: init_lora_weights {init!r} altered the base weights",
            "convert it with peft: save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    use_rslora = config.get("use_rslora", False)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= 65536:
        raise MergeError(f"{folder}: r is {rank!r}, not a whole number from 1 on")
    if not is_finite_number(alpha) or alpha <= 0:
        nothing = "leave that adapter out: it adds nothing to its base" if alpha == 0 else None
        raise MergeError(f"{folder}: lora_alpha is {alpha!r}, not a positive number", nothing)
    if not isinstance(use_rslora, bool):
        raise MergeError(f"{folder}: use_rslora is {use_rslora!r}, not true or false")
    return rank, float(alpha), use_rslora


def weights_file(folder: Path) -> Path:
    """Where the tensors lie. Raises MergeError if they are missing, or a pickle."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = sorted(p.name for p in folder.glob("adapter_model*") if p.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise MergeError(
                f"{folder} holds {pickled[0]}, a pickle, which can run code when it is read",
                "load and save it again with peft on a machine you can lose: save_pretrained(safe_serialization=True)",
            )
        raise MergeError(f"{folder} holds no {WEIGHTS}", "give the folder that peft's save_pretrained wrote")
    return path


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = weights_file(folder)
    try:
        tensors, _ = parse_tensors(path.read_bytes())
    except ValueError as error:
        raise MergeError(f"{path}: {error}", "copy or export the adapter again") from error
    return tensors


def _pair_factors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = FACTOR.fullmatch(name)
        if match is None:
            raise no_factor(folder, name)
        if tensor.ndim != 2:
            raise MergeError(f"{folder}: tensor {name!r} has shape {tuple(tensor.shape)}, not two dimensions")
        sides.setdefault(match["module"], {})[match["side"]] = tensor.to(torch.float32)
    factors = {}
    for module in sorted(sides):
        missing = {"A", "B"} - set(sides[module])
        if missing:
            raise MergeError(f"{folder}: module {module} has no lora_{missing.pop()}", "copy or export the adapter again")
        factors[module] = (sides[module]["A"], sides[module]["B"])
        if not all(bool(torch.isfinite(side).all()) for side in factors[module]):
            raise MergeError(f"{folder}: module {module} is beyond what fp32 holds")
    if not factors:
        raise MergeError(f"{folder}: {WEIGHTS} holds no tensor", "copy or export the adapter again")
    return factors


def by_pattern(folder: Path, config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of `rank_pattern` or `alpha_pattern` for one module. Plain names only: a regular expression from outside
    could take for ever."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise MergeError(f"{folder}: {key} is not a JSON object")
    for name, value in patterns.items():
        if not MODULE.fullmatch(name):
            raise MergeError(f"{folder}: {key} {name!r} is a regular expression", "write whole module names into the pattern")
        if not is_finite_number(value) or value <= 0:
            raise MergeError(f"{folder}: {key} {name!r} is {value!r}, not a positive number")
        if is_target(module, [name]):
            return value
    return default


def _even_out(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    use_rslora: bool,
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], int, float]:
    """The same deltas with one rank (zero rows and columns pad the smaller) and scale 1 or, with rsLoRA, sqrt(rank)."""
    rank = max(ranks.values())
    alpha = float(rank)
    scale = math.sqrt(rank) if use_rslora else 1.0
    even = {}
    for module, (a_ri, b_or) in factors.items():
        own = alphas[module] / (math.sqrt(ranks[module]) if use_rslora else ranks[module])
        short = rank - ranks[module]
        even[module] = (
            torch.nn.functional.pad(a_ri, (0, 0, 0, short)),
            torch.nn.functional.pad(b_or * (own / scale), (0, short)),
        )
    return even, rank, alpha


def named_targets(config: Mapping[str, Any]) -> list[str]:
    """The names that target_modules lists; none where it is a pattern or something else narrows it."""
    targets = config.get("target_modules")
    narrowed = any(config.get(key) is not None for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    if narrowed or not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        return []
    return targets


def is_target(module: str, targets: Iterable[str]) -> bool:
    return any(module == target or module.endswith(f".{target}") for target in targets)


def dropout_of(folder: Path, config: Mapping[str, Any]) -> float:
    value = config.get("lora_dropout", 0.0)
    if not is_finite_number(value) or not 0.0 <= value < 1.0:
        raise MergeError(f"{folder}: lora_dropout is {value!r}, not a share from 0 to below 1")
    return float(value)


def text_of(folder: Path, config: Mapping[str, Any], key: str) -> str | None:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise MergeError(f"{folder}: {key} is {value!r}, not text")
    return value
