"""Adapters of other kinds than LoRA: `adapter:` in a blueprint. Each trains in a solo body, by plain peft.

A class has the fields of peft's config class of that kind, by their names and with their defaults, but for `rank` (peft's r)
and `targets` (target_modules), which are called here as they are for LoRA. What peft draws at random while it trains (dropout)
and what would leave the base changed (bias) is not among them; a test holds every class against peft's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from chrysalis_ray.config.written import Count, Names, Positive, Written

RENAMED = {"rank": "r", "targets": "target_modules"}  # name here -> name in peft


class PeftAdapter(Written):
    """What all kinds have. Without `targets` those of `lora` are meant, or `usual`; the end of a module's name will do."""

    type: str
    targets: Annotated[Names, Field(min_length=1)] | None = None
    modules_to_save: Names = ()  # trained whole beside the adapter

    usual: ClassVar[tuple[str, ...]] = ()  # targets where the blueprint names none, if those of LoRA would not suit
    linear: ClassVar[bool] = True  # whether its targets are linear modules
    reason: ClassVar[str] = ""  # why a pack cannot hold it
    renamed: ClassVar[Mapping[str, str]] = RENAMED
    is_low_rank: ClassVar[bool] = False

    def aimed_at(self, targets: Sequence[str]) -> Self:
        """The same with the targets that it means where the blueprint's LoRA would have `targets`."""
        return self.model_copy(update={"targets": self.targets or self.usual or tuple(targets)})

    @property
    def solo(self) -> str:
        """Why a variant of this kind cannot share a base with others."""
        return self.reason

    def settings(self, rank: int, alpha: float, steps: int | None = None) -> dict[str, Any]:
        """The arguments of peft's config class, of a variant of this rank and alpha that trains so many steps."""
        own = self.model_dump(exclude={"type", "rank", "alpha"})
        if "rank" in type(self).model_fields:
            own["rank"] = rank
        if "alpha" in type(self).model_fields:
            own["alpha"] = alpha
        told = {self.renamed.get(name, name): list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        return {**told, "modules_to_save": list(self.modules_to_save) or None}


Average = Annotated[float, Field(gt=0.0, lt=1.0)]


class AdaLora(PeftAdapter):
    """Singular values that are taken away where they matter least, arXiv 2303.10512: from `rank` in every module to `target_r`
    on average. `tinit` steps at the beginning and `tfinal` at the end take nothing away, between them every `deltaT`-th does.

    What is left is a plain LoRA, whose modules have different ranks.
    """

    type: Literal["adalora"]
    rank: Count = 12
    alpha: Positive = 8.0
    target_r: Count = 8
    tinit: Annotated[int, Field(ge=0)] = 0
    tfinal: Annotated[int, Field(ge=0)] = 0
    deltaT: Count = 1
    beta1: Average = 0.85
    beta2: Average = 0.85
    orth_reg_weight: Annotated[float, Field(ge=0.0)] = 0.5

    reason = "AdaLoRA adds to each variant's loss and takes ranks away from its modules, and rows of a pack have one shape"
    is_low_rank = True
    renamed: ClassVar[Mapping[str, str]] = {**RENAMED, "rank": "init_r", "alpha": "lora_alpha"}

    def settings(self, rank: int, alpha: float, steps: int | None = None) -> dict[str, Any]:
        return {**super().settings(rank, alpha), "total_step": steps or self.tinit + self.tfinal + 1}


class Ia3(PeftAdapter):
    """(IA)^3, arXiv 2205.05638: what targets give, or are given if they are `feedforward_modules`, is scaled by a vector."""

    type: Literal["ia3"]
    feedforward_modules: Names | None = None  # down_proj, if it is a target

    usual = ("k_proj", "v_proj", "down_proj")
    reason = "IA3 scales what a module gives or is given: no low-rank path beside a base that variants share"

    def aimed_at(self, targets: Sequence[str]) -> Self:
        aimed = super().aimed_at(targets)
        assert aimed.targets is not None
        inner = tuple(target for target in aimed.targets if target.rpartition(".")[2] == "down_proj")
        return aimed if self.feedforward_modules is not None else aimed.model_copy(update={"feedforward_modules": inner})


class LoHa(PeftAdapter):
    """The entrywise product of two products of factors, arXiv 2108.06098."""

    type: Literal["loha"]
    rank: Count = 8
    alpha: Positive = 8.0

    reason = "LoHa multiplies two products of factors entry by entry, and a pack adds one product"


class LoKr(PeftAdapter):
    """A Kronecker product, arXiv 2212.10650, 2309.14859."""

    type: Literal["lokr"]
    rank: Count = 8
    alpha: Positive = 8.0
    decompose_both: bool = False
    decompose_factor: Annotated[int, Field(ge=-1)] = -1

    reason = "LoKr adds a Kronecker product, and a pack adds a product of factors"


class Vera(PeftAdapter):
    """Two vectors a module around two random matrices that all modules share, arXiv 2310.11454."""

    type: Literal["vera"]
    rank: Count = 256
    projection_prng_key: Annotated[int, Field(ge=0)] = 0
    d_initial: float = 0.1

    reason = "VeRA trains vectors around matrices that all modules share, and a pack holds factors of each module's own"


class Oft(PeftAdapter):
    """What targets are given is turned in blocks, arXiv 2306.07280."""

    type: Literal["oft"]
    oft_block_size: Count = 32
    coft: bool = False
    eps: Positive = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: Count = 5

    reason = "OFT turns the weights of the base, which variants of a pack share"


class Boft(PeftAdapter):
    """What targets are given is turned in blocks, and what they give is scaled, arXiv 2311.06243.

    With one butterfly factor: peft computes more only by CUDA code that it compiles when it is first used, else with one.
    """

    type: Literal["boft"]
    boft_block_size: Annotated[int, Field(ge=0)] = 4
    boft_block_num: Annotated[int, Field(ge=0)] = 0

    reason = "BOFT turns the weights of the base, which variants of a pack share"


class Hra(PeftAdapter):
    """A chain of Householder reflections, arXiv 2405.17484; an even number of them, so that they can begin as none."""

    type: Literal["hra"]
    rank: Annotated[int, Field(ge=2, multiple_of=2)] = 8
    apply_GS: bool = False

    reason = "HRA reflects the weights of the base, which variants of a pack share"


class Miss(PeftAdapter):
    """One shard of a matrix over and over, arXiv 2409.15371."""

    type: Literal["miss"]
    rank: Count = 64
    mini_r: Count = 1
    init_weights: Literal[True, "bat", "mini"] = True

    reason = "MiSS adds sums of what a module is given by one matrix, and a pack adds a product of factors"


class FourierFt(PeftAdapter):
    """A change given by a few entries of its spectrum, arXiv 2405.03003; they begin at zero, where peft would draw them."""

    type: Literal["fourierft"]
    n_frequency: Count = 1000
    scaling: Positive = 150.0
    random_loc_seed: Annotated[int, Field(ge=0)] = 777

    reason = "FourierFT adds a matrix that its spectrum gives, and a pack adds a product of factors"

    def settings(self, rank: int, alpha: float, steps: int | None = None) -> dict[str, Any]:
        return {**super().settings(rank, alpha), "init_weights": True}


class Road(PeftAdapter):
    """What targets give is turned in planes, arXiv 2409.00119."""

    type: Literal["road"]
    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: Annotated[int, Field(ge=2, multiple_of=2)] = 64

    reason = "RoAd turns what a module gives: no low-rank path beside a base that variants share"


class Delora(PeftAdapter):
    """A product of factors whose rows are normed, and a bound that is trained, arXiv 2503.18225."""

    type: Literal["delora"]
    rank: Count = 8
    delora_lambda: Count = 15

    reason = "DeLoRA divides by the norms of its factors, and a pack adds their plain product"


class LnTuning(PeftAdapter):
    """Norms, trained whole, arXiv 2312.11420."""

    type: Literal["ln_tuning"]

    usual = ("input_layernorm", "post_attention_layernorm", "norm")
    linear = False
    reason = "ln_tuning trains norms whole: parts of the base, which variants of a pack share"


KINDS: dict[str, type[PeftAdapter]] = {
    "adalora": AdaLora, "ia3": Ia3, "loha": LoHa, "lokr": LoKr, "vera": Vera, "oft": Oft, "boft": Boft, "hra": Hra,
    "miss": Miss, "fourierft": FourierFt, "road": Road, "delora": Delora, "ln_tuning": LnTuning,
}  # fmt: skip

Adapter = Annotated[
    AdaLora | Ia3 | LoHa | LoKr | Vera | Oft | Boft | Hra | Miss | FourierFt | Road | Delora | LnTuning,
    Field(discriminator="type"),
]

# Kinds of peft that are not among them, and why.
_TOKENS = "puts vectors of its own before a row, and a row here is several documents, of which only the first would see them"
_MIXES = "chooses between adapters that were trained before, for each input; train those here, and it with peft"
_UNTRIED = "was not tried here"
OTHER_KINDS = {
    "lora": "is what a blueprint means by lora; write it there",
    "prompt_tuning": _TOKENS, "multitask_prompt_tuning": _TOKENS, "p_tuning": _TOKENS, "prefix_tuning": _TOKENS,
    "adaption_prompt": _TOKENS, "cpt": _TOKENS, "cartridge": _TOKENS,
    "xlora": _MIXES, "poly": _MIXES,
    "trainable_tokens": "trains rows of the embedding; write modules_to_save: [embed_tokens] under lora for all of it",
    "osf": "takes apart the base's weights and trains a part of them, so that the base would have to be found again",
    "beft": _UNTRIED, "lily": _UNTRIED, "frod": _UNTRIED, "pvera": _UNTRIED, "glora": _UNTRIED, "vblora": _UNTRIED,
    "unilora": _UNTRIED, "randlora": _UNTRIED, "hira": _UNTRIED, "shira": _UNTRIED, "c3a": _UNTRIED, "waveft": _UNTRIED,
    "gralora": _UNTRIED, "tinylora": _UNTRIED, "psoft": _UNTRIED, "peanut": _UNTRIED, "shadow": _UNTRIED,
    "supertuning": _UNTRIED, "deft": _UNTRIED, "adamss": _UNTRIED,
}  # fmt: skip


def refuse_other_kinds(adapter: object) -> object:
    """`adapter` as it was written. Raises ValueError for a kind of peft that cannot be trained here."""
    written = adapter.get("type") if isinstance(adapter, dict) else None
    name = written.lower().replace("-", "_") if isinstance(written, str) else ""
    if why := OTHER_KINDS.get(name):
        raise ValueError(f"{written!r} {why}; the kinds are {', '.join(KINDS)}")
    return adapter
