"""A blueprint: the training recipe fitted to one model family and size (`blueprints/*.yaml`)."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from chrysalis_ray.config.adapters import Adapter, PeftAdapter, refuse_other_kinds
from chrysalis_ray.config.written import Count, Fraction, Names, Positive, Written
from chrysalis_ray.core.patterns import PLAIN, Patterns, hidden_key, means, nearest_key


class EmbeddedBase(Written):
    """A small Qwen3 built from its config on this machine: tokenizer trained on the genome, weights briefly pre-trained."""

    type: Literal["embedded"]
    hidden_size: Annotated[int, Field(ge=16, le=4096)] = 256
    layers: Annotated[int, Field(ge=1, le=64)] = 3
    heads: Annotated[int, Field(ge=1, le=64)] = 8
    key_value_heads: Annotated[int, Field(ge=1, le=64)] = 2
    head_size: Annotated[int, Field(ge=8, le=256)] = 32
    intermediate_size: Annotated[int, Field(ge=16, le=16384)] = 512
    vocabulary: Annotated[int, Field(ge=300, le=65536)] = 3072
    pretrain_tokens: Annotated[int, Field(ge=0)] = 120_000
    pretrain_learning_rate: Positive = 2e-2


class PretrainedBase(Written):
    """A causal language model from the Hugging Face hub or from a local folder. `chat_template` is a file of Jinja that renders
    conversations in place of the base's own, e.g. for a base that has none."""

    type: Literal["pretrained"]
    model: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    chat_template: Annotated[str, Field(min_length=1)] | None = None


Base = Annotated[EmbeddedBase | PretrainedBase, Field(discriminator="type")]


# Not among the inits, and why: adapter zero must change nothing, and a moved base must be found again bit for bit.
OTHER_INITS = {
    "corda": "needs a pass over data before peft can move a part of the base's weights into the adapter",
    "loftq": "quantises the base's weights and moves the error into the adapter",
    "lora_ga": "moves the first gradient out of the base's weights into the adapter",
    "milora": "moves the trailing part of the base's weights into the adapter",
    "mica": "takes B out of the base's weights and keeps it as it is",
    "orthogonal": "begins with a B that is not zero: its first columns alone, of a variant of lower rank, change the base",
    "true": "is peft's word for kaiming",
    "false": "begins with a B that is not zero, and adapter zero must change nothing",
}
# Inits that are peft's own: a part of the base's weights goes into the adapter.
MOVED_INITS = {"pissa": "the leading part", "olora": "a part"}


_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")  # the first number in a module's name


Rank = Annotated[int, Field(ge=1, le=1024)]


class Lora(Written):
    """`init` draws the A of adapter zero as peft does, or takes it from the data (EVA, arXiv 2410.07170); B is zero.

    Of the modules that `targets` mean those are left out that `exclude` means (names or their ends), and those of other layers
    than `layers`, counted from 0: peft's exclude_modules and layers_to_transform. Modules that `rank_pattern` and
    `alpha_pattern` mean, by their names or the ends of them, have ranks and alphas of their own, in all variants.

    `use_dora` (arXiv 2402.09353), `lora_bias`, `modules_to_save` and the inits `pissa` (arXiv 2404.02948) and `olora` (arXiv
    2406.01775) are those of peft; such variants train one after another, each alone on the base.
    """

    init: Literal["kaiming", "gaussian", "eva", "pissa", "olora"] = "kaiming"
    rank: Rank = 8
    alpha: Positive = 16.0
    use_rslora: bool = False
    plus_ratio: Positive = 1.0  # LoRA+: how many times as fast as A does B learn
    freeze_a: bool = False  # LoRA-FA
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    exclude: Names = ()
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    alpha_pattern: dict[str, Positive] = Field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False
    modules_to_save: Names = ()  # trained whole, by the end of the name

    @field_validator("init", mode="before")
    @classmethod
    def _keeps_the_base(cls, init: object) -> object:
        word = str(init).lower().replace("-", "_") if isinstance(init, (str, bool)) else ""
        name, _, iterations = word.partition("_niter")
        if what := OTHER_INITS.get(name):
            raise ValueError(f"{init!r} {what}; write eva or kaiming")
        if iterations and name in MOVED_INITS:
            raise ValueError(f"{init!r} draws at random where it looks; write {name}, which is exact, or eva or kaiming")
        return init

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _names_that_count(cls, pattern: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        targets: tuple[str, ...] = info.data.get("targets", ())
        for key in pattern:
            if not _NAME.fullmatch(key):
                raise ValueError(
                    f"{key!r} is a regular expression or no name; write names of modules or the ends of them, such as q_proj "
                    "or layers.0.self_attn.q_proj"
                )
            if targets and not any(means(target, key) or means(key, target) for target in targets):
                guess = nearest_key(key, (f"{key.rpartition('.')[0]}.{target}" for target in targets)) or "; leave it out"
                raise ValueError(f"{key!r} means none of lora.targets ({', '.join(targets)}){guess}")
        if found := hidden_key(pattern):
            raise ValueError(f"{found[0]!r} means all that {found[1]!r} means, and the first that fits counts; write it after")
        return pattern

    @property
    def patterns(self) -> Patterns:
        return Patterns(self.rank_pattern, self.alpha_pattern)

    @property
    def solo(self) -> str | None:
        """Why a variant of this kind cannot share a base with others, None where it can."""
        if self.use_dora:
            return "DoRA divides by the norm of W + B A, row by row: no low-rank path beside a base that variants share"
        if self.lora_bias:
            return "lora_bias trains a vector beside B, for which a pack of A and B has no place"
        if self.modules_to_save:
            return f"{', '.join(self.modules_to_save)} are trained whole: parts of the base, which variants of a pack share"
        if moved := MOVED_INITS.get(self.init):
            return f"{self.init} moves {moved} of the base's weights into the adapter, and variants of a pack share the base"
        return None

    @property
    def is_narrowed(self) -> bool:
        """Whether some of the modules that targets mean are left out."""
        return bool(self.exclude) or self.layers is not None

    def takes(self, module: str) -> bool:
        """Whether a module that targets mean is not left out, as peft decides it."""
        if any(module == out or module.endswith(f".{out}") for out in self.exclude):
            return False
        if self.layers is None or module in self.targets:  # a whole name is meant whatever its layer
            return True
        layer = _LAYER.match(module)
        return layer is not None and int(layer[1]) in self.layers

    @property
    def is_low_rank(self) -> bool:
        """Whether what is left of a variant is a plain LoRA adapter. That of a moved base is: its rank doubles."""
        return not (self.use_dora or self.lora_bias or self.modules_to_save)


OptimizerType = Literal["adamw", "adam", "nadam", "radam", "adamax", "adagrad", "adadelta", "rmsprop", "sgd"]
Decay = Literal["constant", "linear", "cosine", "wsd"]


# Not among them, and why: the adapter of a variant is one flat row of numbers.
OTHER_OPTIMIZERS = {
    "muon": "orthogonalises matrices, and a variant's adapter is one flat row",
    "adafactor": "factors matrices, and a variant's adapter is one flat row",
    "lbfgs": "evaluates the loss several times a step",
    "rprop": "has step sizes that follow no schedule",
    "asgd": "keeps an average of weights that no adapter would show",
    "sparseadam": "needs sparse gradients",
}


class Optimizer(Written):
    """A class of torch.optim and its settings. `beta2` is also adadelta's rho and rmsprop's alpha; `momentum` is sgd's."""

    type: OptimizerType = "adamw"
    learning_rate: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    epsilon: Positive = 1e-8
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    clip: Annotated[float, Field(ge=0.0)] = 1.0

    @field_validator("type", mode="before")
    @classmethod
    def _rows_have_no_matrices(cls, type_: object) -> object:
        if isinstance(type_, str) and (what := OTHER_OPTIMIZERS.get(type_.lower())):
            raise ValueError(f"{type_!r} {what}; write one of {', '.join(get_args(OptimizerType))}")
        return type_


class Schedule(Written):
    """Warmup, then `decay` down to `final_fraction` of the learning rate; wsd decays over the last `decay_fraction` alone."""

    decay: Decay = "cosine"
    warmup_fraction: Fraction = 0.05
    final_fraction: Fraction = 0.0
    decay_fraction: Fraction = 0.1

    @model_validator(mode="after")
    def _room_for_the_decay(self) -> Schedule:
        if self.decay == "wsd" and self.warmup_fraction + self.decay_fraction > 1.0:
            raise ValueError(
                f"warmup_fraction ({self.warmup_fraction:g}) and decay_fraction ({self.decay_fraction:g}) are more than all "
                "steps; write fractions that sum to at most 1"
            )
        if self.decay == "constant" and self.final_fraction > 0.0:
            raise ValueError("constant never decays to final_fraction; leave it out, or write decay: linear or cosine")
        return self


class Lanes(Written):
    """How a variant's tokens reach the GPU: `rows_per_step` rows of `sequence_length` tokens make one optimizer step, taken
    `rows_per_microstep` at a time (the rest is gradient accumulation)."""

    sequence_length: Annotated[int, Field(ge=8, le=1_048_576)] = 128
    rows_per_step: Count = 4
    rows_per_microstep: Count | None = None

    @model_validator(mode="after")
    def _whole_microsteps(self) -> Lanes:
        if self.rows_per_microstep and self.rows_per_step % self.rows_per_microstep:
            raise ValueError(
                f"rows_per_step ({self.rows_per_step}) must be a multiple of rows_per_microstep ({self.rows_per_microstep})"
            )
        return self

    @property
    def microsteps(self) -> int:
        return -(-self.rows_per_step // (self.rows_per_microstep or self.rows_per_step))


class BodyPatch(Written):
    """A morpheme: the fields of a body that this file sets; what it leaves out comes from the floor below.

    `count` bodies of this shape stand at once, each with a copy of the base; `slots` are those of each."""

    count: Annotated[int, Field(ge=1, le=1024)] | None = None
    workers: Count | None = None
    gpus_per_worker: Annotated[float, Field(ge=0.0, le=16.0)] | None = None
    cpus_per_worker: Annotated[float, Field(gt=0.0, le=1024.0)] | None = None
    slots: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] | None = None  # auto: the planner chooses
    zero_stage: Literal[0, 3] | None = None
    offload: Literal["none", "cpu", "nvme"] | None = None
    nvme_path: Annotated[str, Field(min_length=1)] | None = None  # a folder on a fast disk of every node, for offload: nvme
    precision: Literal["fp32", "bf16"] | None = None
    quantization: Literal["none", "nf4", "int8"] | None = None
    attention: Literal["sdpa", "flash"] | None = None
    lanes: Literal["compacted", "fixed"] | None = None
    activation_checkpointing: bool | None = None
    compile: bool | None = None  # torch.compile for what lies between the packed modules
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    tokens_per_pass: Count | None = None  # what one pass holds of several variants; left out, the planner chooses
    virtual_workers: Count | None = None  # the arithmetic of so many workers, to the bit, however many there are
    gradients: Literal["whole", "sharded"] | None = None  # on several workers: of all slots, or of a worker's own and one layer
    hang_seconds: Annotated[float, Field(ge=5.0, le=86400.0)] | None = None  # after so long without progress a body is killed


Auto = Literal["auto"]


class OpenBody(BodyPatch):
    """A body as people write it: what is `auto` the planner chooses, by what this machine has, and says why."""

    count: Annotated[int, Field(ge=1, le=1024)] | Auto | None = None  # type: ignore[assignment]
    workers: Count | Auto | None = None  # type: ignore[assignment]
    zero_stage: Literal[0, 3, "auto"] | None = None  # type: ignore[assignment]
    offload: Literal["none", "cpu", "nvme", "auto"] | None = None  # type: ignore[assignment]
    activation_checkpointing: bool | Auto | None = None  # type: ignore[assignment]


class Selection(Written):
    """What of a genome a base of this size is fed. Documents with the marks of `exclude` are left out beside those that the
    experiment leaves out, unless it says itself which; `histories: none` keeps one snapshot of each repository."""

    exclude: tuple[str, ...] = ()
    histories: Literal["all", "none"] = "all"


class Blueprint(Written):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    description: str = ""
    base: Base
    lora: Lora = Lora()
    adapter: Adapter | None = None  # of another kind, in the place of lora
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    lanes: Lanes = Lanes()
    genome: Selection = Selection()
    body: OpenBody = OpenBody()

    @field_validator("lora")
    @classmethod
    def _no_twin_targets(cls, lora: Lora) -> Lora:
        if len(set(lora.targets)) != len(lora.targets):
            raise ValueError("lora.targets names a module twice")
        return lora

    @field_validator("adapter", mode="before")
    @classmethod
    def _a_kind_that_can_train(cls, adapter: object) -> object:
        return refuse_other_kinds(adapter)

    @property
    def worn(self) -> Lora | PeftAdapter:
        """The kind of adapter that variants train: `adapter` with its targets, else `lora`."""
        if self.adapter is None:
            return self.lora
        return self.adapter.aimed_at(self.lora.targets)

    @property
    def patterns(self) -> Patterns:
        """Modules of its variants whose ranks and alphas are their own."""
        return self.lora.patterns if self.adapter is None else PLAIN

    @property
    def adapter_type(self) -> str:
        """What variants train, in peft's word."""
        return "lora" if self.adapter is None else self.adapter.type

    @property
    def rank(self) -> int:
        """That of its variants where the search space says nothing; 1 for a kind without one."""
        return self.lora.rank if self.adapter is None else getattr(self.adapter, "rank", 1)

    @property
    def alpha(self) -> float:
        return self.lora.alpha if self.adapter is None else getattr(self.adapter, "alpha", 1.0)
