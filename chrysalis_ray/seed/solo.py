"""Adapters that no pack can hold, worn by a base through plain peft: DoRA, biases, whole modules, inits that move the base,
and other kinds than LoRA (`kinds.py`).

Tensors have the names of peft's own files without their prefix: ``model.layers.0.self_attn.q_proj.lora_A.weight``,
``....lora_magnitude_vector``, ``model.norm.weight``. What is left of a variant is a PEFT folder that plain peft loads on the
base as it is: pissa and olora, which move the base, leave s (B A - B0 A0), a plain LoRA of twice the rank.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chrysalis_ray.config.adapters import AdaLora, PeftAdapter
from chrysalis_ray.config.blueprint import MOVED_INITS, Lora
from chrysalis_ray.core.errors import MergeError, ModelError
from chrysalis_ray.core.patterns import PLAIN, Patterns
from chrysalis_ray.core.records import Hyperparameters, canonical_json
from chrysalis_ray.seed.adalora import Allocation, plain_adapter
from chrysalis_ray.seed.adapter import (
    CARD,
    CONFIG,
    PREFIX,
    WEIGHTS,
    AdapterWeights,
    read_adapter,
    read_config,
    weights_file,
    write_adapter,
    write_folder,
)
from chrysalis_ray.seed.kinds import constants_of, form_of_kind, peft_config, read_kind, write_kind
from chrysalis_ray.seed.tensors import parse_tensors, tensor_bytes
from chrysalis_ray.seed.zero import narrowing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

A_END = ".lora_A.weight"
NAME = "default"  # peft's name of the only adapter
FORM = ("use_dora", "lora_bias", "modules_to_save", "init")  # what of a blueprint's lora makes its variants solo


def form_of(worn: Lora | PeftAdapter) -> dict[str, Any]:
    """What a seed says of the kind of its adapter."""
    return worn.model_dump(mode="json", include=set(FORM)) if isinstance(worn, Lora) else form_of_kind(worn)


@dataclass(frozen=True)
class Moved:
    """What was moved out of the base: A0 [rank, in] and B0 [out, rank] of every module; their product counts `scale` times."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    scale: float


class Wardrobe:
    """A base without any adapter, remembered so that it can be had back to the bit."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.requires_grad_(False)
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._kept: list[tuple[Any, Tensor]] = []  # modules whose weights are moved, and those weights

    def wear(
        self,
        worn: Lora | PeftAdapter,
        hyperparameters: Hyperparameters,
        moved: Moved | None = None,
        draw: int = 0,
        steps: int | None = None,
    ) -> SoloAdapter:
        """Let peft put a fresh adapter on the base, or for one that moves the base and is no more fresh, move that again.

        What peft draws follows from `draw`; the A of a LoRA is replaced. `steps` is for kinds that plan theirs. Raises
        ModelError for what peft cannot do with this base.
        """
        from peft import get_peft_model

        self.undress()
        moves = isinstance(worn, Lora) and worn.init in MOVED_INITS and moved is None
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw)
            if moves or moved is not None:
                self._keep(worn)
            try:
                if isinstance(worn, Lora):
                    config = _lora_config(
                        worn, hyperparameters, moves, [name for name in self._modules if _is_target(name, worn)]
                    )
                else:
                    config = peft_config(worn, hyperparameters, steps)
                model = get_peft_model(self.model, config)
            except (TypeError, ValueError, UserWarning) as error:
                self.undress()
                where = "lora" if isinstance(worn, Lora) else "adapter"
                raise ModelError(
                    f"peft refuses this adapter on the base: {error}", f"look at {where} in the blueprint"
                ) from error
            self.model.eval()
            allocation = Allocation(model.base_model) if isinstance(worn, AdaLora) else None
            adapter = SoloAdapter(self.model, worn, hyperparameters, allocation)
            if not isinstance(worn, Lora):
                adapter.constants = constants_of(model, adapter.parameters)
        self._check(worn)
        if moves:
            adapter.moved = Moved({name: _factors(layer) for name, layer in adapter.layers.items()}, hyperparameters.scale)
        elif moved is not None:
            adapter.move(moved)
        return adapter

    def undress(self) -> None:
        """Have the base back as it was."""
        for name, module in list(self.model.named_modules()):
            if name in self._modules and self._modules[name] is not module:
                holder, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(holder), leaf, self._modules[name])
        for module, weight in self._kept:
            module.weight.data = weight
        self._kept = []
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        self.model.requires_grad_(False)

    def _keep(self, worn: Lora | PeftAdapter) -> None:
        """Give the targets copies of their weights, which are about to be moved; `undress` brings the own ones back."""
        from chrysalis_ray.seed.linear import stored_transposed

        for name, module in self._modules.items():
            if _is_target(name, worn):
                if stored_transposed(module):
                    self.undress()
                    raise ModelError(
                        f"{name} keeps its weight [in, out], and peft's {getattr(worn, 'init', '')} takes it for [out, in]",
                        "write init: kaiming",
                    )
                self._kept.append((module, module.weight.data))
                module.weight.data = module.weight.data.clone()

    def _check(self, worn: Lora | PeftAdapter) -> None:
        """Every module to save must be there, stand apart from the targets, and be tied to nothing."""
        from peft.utils.other import ModulesToSaveWrapper

        saved = [name for name, m in self.model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
        tied = getattr(self.model.config, "tie_word_embeddings", False)
        tables = (self._modules_of(self.model.get_input_embeddings()), self._modules_of(self.model.get_output_embeddings()))
        problem, of = None, "lora" if isinstance(worn, Lora) else "adapter"
        for wanted in worn.modules_to_save:
            if not any(name.endswith(wanted) for name in saved):
                problem = f"{of}.modules_to_save names {wanted!r}, and no module of the base ends so"
        for name in saved:
            if any(f"{part}.".startswith(f"{name}.") for part in self._modules if _is_target(part, worn)):
                problem = f"{name} of {of}.modules_to_save holds modules of {of}.targets"
            elif tied and self._modules[name] in tables:
                problem = f"{name} is tied: embedding and head of this base are one table, and cannot be trained apart"
        if problem:
            self.undress()
            raise ModelError(problem, "name other modules, such as norm (peft matches them by the end of their names)")

    def _modules_of(self, worn: nn.Module | None) -> nn.Module | None:
        """The module of the base in whose place `worn` stands."""
        return getattr(worn, "original_module", worn)


class SoloAdapter:
    """One adapter on a base: what peft trains of it, by name, and the modules that carry A and B, by theirs. `constants` is
    what its kind keeps beside (`kinds.py`)."""

    def __init__(
        self, model: PreTrainedModel, worn: Lora | PeftAdapter, own: Hyperparameters, allocation: Allocation | None = None
    ) -> None:
        from peft.tuners.lora import LoraLayer
        from peft.tuners.lycoris_utils import LycorisLayer

        self.model = model
        self.worn = worn
        self.moved: Moved | None = None
        self.constants: dict[str, Tensor] = {}
        self.allocation = allocation
        self.layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
        self._alphas: list[Any] = [m for m in model.modules() if isinstance(m, LycorisLayer)]
        self.parameters = {state_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        self.rescale(own)

    @property
    def head(self) -> nn.Module:
        """The output head, trained or not."""
        head: Any = self.model.get_output_embeddings()
        return head.modules_to_save[NAME] if hasattr(head, "modules_to_save") else head

    def rescale(self, own: Hyperparameters) -> None:
        """Count B A, or what a kind with an alpha has in its place, as often as its rank and alpha say."""
        patterns = self.worn.patterns if isinstance(self.worn, Lora) else PLAIN
        for name, layer in self.layers.items():  # AdaLoRA's divide by the rank themselves
            layer.scaling[NAME] = own.alpha if isinstance(self.worn, AdaLora) else patterns.kind_of(name).scale(own)
        for layer in self._alphas:
            layer.scaling[NAME] = own.scale

    def move(self, moved: Moved) -> None:
        """Take the moved part out of the base's weights, by the arithmetic with which peft's inits did."""
        for name, layer in self.layers.items():
            weight = layer.get_base_layer().weight
            a_ri, b_or = (factor.to(weight.device) for factor in moved.factors[name])
            weight.data = (weight.data.to(torch.float32) - moved.scale * b_or @ a_ri).to(weight.dtype)
        self.moved = moved


def state_name(parameter: str) -> str:
    """The name that peft's files have for a parameter of a base that wears an adapter."""
    for part in (f".modules_to_save.{NAME}", f".{NAME}"):
        parameter = parameter.replace(part, "", 1)
    return parameter.removesuffix(".weight") if parameter.endswith(".lora_magnitude_vector.weight") else parameter


def _lora_config(lora: Lora, own: Hyperparameters, moves: bool, modules: Sequence[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=own.rank,
        lora_alpha=own.alpha,  # type: ignore[arg-type]
        use_rslora=own.use_rslora,
        target_modules=list(lora.targets),
        lora_dropout=0.0,
        init_lora_weights=lora.init if moves else True,  # type: ignore[arg-type]
        use_dora=lora.use_dora,
        lora_bias=lora.lora_bias,
        modules_to_save=list(lora.modules_to_save) or None,
        **lora.patterns.written(modules),
        **narrowing(lora),
    )


def _is_target(module: str, worn: Lora | PeftAdapter) -> bool:
    meant = any(module == target or module.endswith(f".{target}") for target in worn.targets or ())
    return meant and (not isinstance(worn, Lora) or worn.takes(module))


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A[NAME].weight.data.clone(), layer.lora_B[NAME].weight.data.clone()


@contextmanager
def quiet() -> Iterator[None]:
    """Without peft's advice on what was chosen knowingly."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # refused a moment later
        warnings.filterwarnings("ignore", message=".*lora_bias=True. was passed but the targeted layer")
        warnings.filterwarnings("ignore", message=".*LoRA tensor.s. have invalid shape")  # a bias is no matrix
        warnings.filterwarnings(
            "ignore", message="Unsupported layer type .*Norm"
        )  # of ln_tuning, for which it is the right one
        warnings.filterwarnings("ignore", message="Failed to load the CUDA extension")  # of boft, which computes without it
        warnings.filterwarnings("ignore", message="Setting boft_n_butterfly_factor to 1")  # as it is
        warnings.filterwarnings("error", message="Invalid `oft_block_size`")  # peft would take another one
        yield


# folders ------------------------------------------------------------------------------------------------------------


def write_solo(
    folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], hyperparameters: Hyperparameters, seed: Path
) -> str:
    """The adapter in a solo seed as a PEFT folder; returns its sha256. `seed` is the folder of adapter zero."""
    if meta["solo"].get("type") == "adalora":
        return write_adapter(folder, plain_adapter(tensors, hyperparameters, read_adapter(seed)), like=seed)
    if "type" in meta["solo"]:
        return write_kind(folder, tensors, meta["solo"], hyperparameters, seed)
    zero, own = read_adapter(seed), hyperparameters
    worn = {name.removeprefix("weight/"): tensor for name, tensor in tensors.items() if name.startswith("weight/")}
    if meta["solo"]["init"] in MOVED_INITS:
        return write_adapter(folder, _unmoved(tensors, worn, meta["initial_scale"], own, zero), like=seed)
    config = {
        **read_config(seed),
        "r": own.rank, "lora_alpha": own.alpha, "use_rslora": own.use_rslora, "lora_dropout": own.dropout,
        "use_dora": meta["solo"]["use_dora"], "lora_bias": meta["solo"]["lora_bias"],
        "modules_to_save": meta["solo"]["modules_to_save"] or None,
        **Patterns.from_json(meta.get("patterns", {})).written(zero.factors),
    }  # fmt: skip
    named = {f"{PREFIX}{name}": tensor.to(torch.float32) for name, tensor in worn.items()}
    text = json.dumps(json.loads(canonical_json(config)), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    try:
        return write_folder(folder, {CONFIG: text.encode(), WEIGHTS: tensor_bytes(named, "format", "pt")})
    except ValueError as error:
        raise MergeError(f"the adapter cannot be written: {error}", "leave out the variant that diverged") from error


def _unmoved(
    tensors: Mapping[str, Tensor], worn: Mapping[str, Tensor], scale: float, own: Hyperparameters, zero: AdapterWeights
) -> AdapterWeights:
    """s B A - s0 B0 A0 as factors on the base that was not moved."""
    factors = {}
    for module in zero.factors:
        a_ri, b_or = worn[f"{module}.lora_A.weight"].float(), worn[f"{module}.lora_B.weight"].float()
        a0_ri, b0_or = tensors[f"initial/{module}.lora_A.weight"].float(), tensors[f"initial/{module}.lora_B.weight"].float()
        factors[module] = (torch.cat([a_ri, a0_ri]), torch.cat([b_or, b0_or * (-scale / own.scale)], 1))
    rank = 2 * own.rank
    alpha = own.scale * (rank**0.5 if own.use_rslora else rank)
    return replace(zero, rank=rank, alpha=alpha, use_rslora=own.use_rslora, factors=factors, dropout=own.dropout)


def is_plain(folder: Path) -> bool:
    """Whether an adapter is what `read_adapter` reads, as far as the kinds go that this file writes."""
    config = read_config(folder)
    return config.get("peft_type", "LORA") == "LORA" and not any(config.get(key) for key in FORM[:3])


def read_solo(folder: Path, worn: Lora | PeftAdapter) -> tuple[Hyperparameters, dict[str, Tensor]]:
    """Geometry and tensors of an adapter of the kind of `worn`. Raises MergeError for one that is not of that kind."""
    if not isinstance(worn, Lora):
        return read_kind(folder, worn)
    config = read_config(folder)
    for key in FORM[:3]:
        written = config.get(key) or (() if key == "modules_to_save" else False)
        wanted = getattr(worn, key)
        if (tuple(written) if isinstance(written, list) else written) != wanted:
            raise MergeError(f"{folder}: {key} is {written!r}, the blueprint says {wanted!r}", "give an adapter of this run")
    geometry = Hyperparameters(rank=config["r"], alpha=config["lora_alpha"], use_rslora=config.get("use_rslora", False))
    try:
        tensors, _ = parse_tensors(weights_file(folder).read_bytes())
    except ValueError as error:
        raise MergeError(f"{folder}: {error}", "copy or export the adapter again") from error
    named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    for key, pattern in worn.patterns.written(name.removesuffix(A_END) for name in named if name.endswith(A_END)).items():
        if (config.get(key) or {}) != pattern:
            raise MergeError(
                f"{folder}: {key} is {config.get(key)!r}, by the blueprint {pattern!r}", "give an adapter of this run"
            )
    return geometry, named


def release_adapter(source: Path, folder: Path, card: str | None = None) -> str:
    """The adapter of `source` in a folder of its own, with a card; returns its sha256. What is no plain LoRA is copied, as is
    one with ranks or alphas of some modules."""
    config = read_config(source)
    if is_plain(source) and not (config.get("rank_pattern") or config.get("alpha_pattern")):
        return write_adapter(folder, read_adapter(source), card=card)
    files = {name: (source / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    return write_folder(folder, {**files, **({CARD: card.encode()} if card is not None else {})})
