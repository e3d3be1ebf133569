"""What the variants of a run train: LoRA, LoRA with something beside it, or another kind of adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chrysalis_ray.report.reading import mapping

NAMES = {
    "lora": "LoRA", "adalora": "AdaLoRA", "ia3": "IA3", "loha": "LoHa", "lokr": "LoKr", "vera": "VeRA", "oft": "OFT",
    "boft": "BOFT", "hra": "HRA", "miss": "MiSS", "fourierft": "FourierFT", "road": "RoAd", "delora": "DeLoRA",
    "ln_tuning": "LN tuning",
}  # fmt: skip
BESIDE = ("lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern")


def adapter_of(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """The kind under `type`, and what is set of it; for LoRA what makes it more than two factors of one rank on the base as
    it is.

    `experiment` is that of ``run.json``: the experiment and its blueprint as they were resolved.
    """
    blueprint = mapping(experiment.get("blueprint"))
    if adapter := mapping(blueprint.get("adapter")):
        return {key: value for key, value in adapter.items() if value not in (None, [], ())}
    lora = mapping(blueprint.get("lora"))
    beside = {key: lora[key] for key in ("use_dora", *BESIDE) if lora.get(key)}
    moved = {"init": lora["init"]} if lora.get("init") in ("pissa", "olora") else {}
    return {"type": "lora", **moved, **beside}


def is_lora_alone(experiment: Mapping[str, Any]) -> bool:
    return adapter_of(experiment) == {"type": "lora"}


def kind_name(experiment: Mapping[str, Any]) -> str:
    """``LoHa``, ``DoRA``, ``LoRA with modules_to_save``."""
    adapter = adapter_of(experiment)
    name = "DoRA" if adapter.get("use_dora") else NAMES.get(str(adapter.get("type")), str(adapter.get("type")))
    beside = [key for key in BESIDE if adapter.get(key)]
    return f"{name} with {' and '.join(beside)}" if beside else name
