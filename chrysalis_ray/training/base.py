"""The frozen base: an ordinary model folder with a manifest, from the hub, from disk, or grown on this machine.

Whatever it is made from, the rest of the program sees a folder with ``config.json``, ``*.safetensors`` and
``tokenizer.json``. Nothing in it is run: no remote code, no pickle.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from chrysalis_ray.config.blueprint import Base, EmbeddedBase, PretrainedBase
from chrysalis_ray.core.errors import ModelError
from chrysalis_ray.core.layout import CacheLayout
from chrysalis_ray.core.records import read_json, sha256_of, sha256_of_file, sync_folder, write_json
from chrysalis_ray.core.written_paths import written_path
from chrysalis_ray.training.embedded import RECIPE, grow
from chrysalis_ray.training.flash import chosen_kernel, is_supported
from chrysalis_ray.training.planning.shapes import layers_of
from chrysalis_ray.training.quantised import quantise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chrysalis_ray.genome.build import Genome

MANIFEST = "base.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
HUB_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*", "merges*",
    "special_tokens_map.json", "chat_template*", "LICENSE*", "README.md",
)  # fmt: skip


def prepare_base(
    spec: Base, genome: Genome, cache: CacheLayout, rng_seed: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Make the base ready on this machine and describe it; a second call finds it ready.

    Returns path, sha256 (over weights, config and tokenizer), name, type, revision, parameters, layers, vocabulary and
    tokenizer_sha256. An embedded base is grown from the train split of the genome alone and kept in the cache under the
    hash of its recipe. Raises ModelError for a base that is missing, damaged or would need code of its own.
    """
    if isinstance(spec, EmbeddedBase):
        return _embedded(spec, genome, cache, rng_seed, progress)
    return _pretrained(spec, cache, progress)


def load_base(folder: Path | str, precision: str, quantization: str = "none", attention: str = "sdpa") -> PreTrainedModel:
    """The model of a folder, frozen and in evaluation mode. `precision` is fp32, bf16, or fp64 for checks of arithmetic.

    transformers chooses sdpa attention where the architecture allows it, else eager (Gemma 2 caps its scores); `attention`
    "flash" asks for FlashAttention 2 instead, and raises ModelError where it cannot be. With
    `quantization` nf4 or int8 its linear modules keep their weights in so few bits. Raises ModelError where the weights do not
    fill the model that the config describes.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        with _no_progress_bars(), Unfilled():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=DTYPES[precision],
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **_attention(folder, attention, precision),
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the base at {folder} cannot be loaded: {error}", "give a complete causal language model") from error
    model, report = loaded
    absent = sorted(report["missing_keys"])
    if absent or report["mismatched_keys"]:
        raise ModelError(
            f"the weights at {folder} leave {len(absent)} tensors of the model empty, such as {absent[:3]}, and "
            f"{len(report['mismatched_keys'])} have another shape",
            "give the whole checkpoint, with every shard that its index names",
        )
    model.requires_grad_(False)
    model.config.use_cache = False
    if quantization != "none":
        quantise(model, quantization)
    return model.eval()


class Unfilled(TorchFunctionMode):
    """Tensors without storage are not filled with random numbers. A model is made of such before its weights are read; to fill
    them changes nothing, and torch loads its compiler and sympy for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        tensor = args[0] if args else named.get("tensor")
        if getattr(func, "__module__", "") == "torch.nn.init" and isinstance(tensor, torch.Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **named)


def _attention(folder: Path | str, attention: str, precision: str) -> dict[str, str]:
    """What transformers is told about attention: nothing, unless FlashAttention is wanted."""
    from transformers import AutoConfig

    if attention == "sdpa":
        return {}
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    installed = find_spec("flash_attn") is not None
    kernel = chosen_kernel(attention, precision, torch.cuda.is_available(), installed, is_supported(config))
    return {"attn_implementation": kernel} if kernel else {}


def inspect_folder(folder: Path) -> dict[str, Any]:
    """What a model folder holds, checked without loading it: the entries of a base that lie in its files.

    Raises ModelError for what is absent, for pickled weights, and for a model or tokenizer that needs code of its own.
    """
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ModelError(f"the base at {folder} has no {name}", "save model and fast tokenizer with save_pretrained")
    config = _json(folder / "config.json")
    if "auto_map" in config:
        raise ModelError(
            f"the base at {folder} brings Python code of its own ({config['auto_map']})",
            "choose a model that transformers itself implements; remote code is never run",
        )
    weights = _weight_files(folder)
    vocabulary, layers = config.get("vocab_size"), layers_of(config, folder / "config.json")
    if not isinstance(vocabulary, int):
        raise ModelError(
            f"config.json at {folder} (model_type {config.get('model_type')!r}) gives no vocab_size",
            "choose a causal language model for text",
        )
    words = _tokenizer_size(folder / "tokenizer.json")
    if words > vocabulary:
        raise ModelError(
            f"the tokenizer at {folder} has {words} tokens, the model {vocabulary}", "give the model's own tokenizer"
        )
    hashes = {path.name: sha256_of_file(path) for path in (*weights, folder / "config.json", folder / "tokenizer.json")}
    return {
        "sha256": sha256_of(hashes),
        "parameters": sum(_parameters(path) for path in weights),
        "layers": layers,
        "vocabulary": vocabulary,
        "tokenizer_sha256": hashes["tokenizer.json"],
    }


def _embedded(
    spec: EmbeddedBase, genome: Genome, cache: CacheLayout, rng_seed: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Grow a base beside its final place, describe it last, and rename it there."""
    recipe = {"recipe": RECIPE, "spec": spec.model_dump(mode="json"), "genome": genome.genome_id, "rng_seed": rng_seed}
    digest = sha256_of(recipe)
    folder = cache.base(digest)
    ready = _ready(folder, digest, folder)
    if ready is not None:
        return ready
    folder.parent.mkdir(parents=True, exist_ok=True)
    growing = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        grow(spec, genome, rng_seed, growing, progress)
        described = {"name": f"embedded-{digest[:12]}", "type": "embedded", "revision": None, **inspect_folder(growing)}
        write_json(
            growing / MANIFEST, {"recipe_sha256": digest, "recipe": recipe, "files": _stamps(growing), "base": described}
        )
        growing.chmod(0o755)
        if folder.exists() and _ready(folder, digest, folder) is None:
            shutil.rmtree(folder)  # damaged: a file is missing or of another size
        _put_in_place(growing, folder, digest)
    finally:
        shutil.rmtree(growing, ignore_errors=True)
    return {"path": str(folder), **described}


def _put_in_place(growing: Path, folder: Path, digest: str) -> None:
    """Rename `growing` to `folder`, unless another run that shares the cache was first with the same base."""
    try:
        if not folder.exists():
            growing.rename(folder)
            sync_folder(folder.parent)
    except OSError:
        if _ready(folder, digest, folder) is None:
            raise


def _pretrained(spec: PretrainedBase, cache: CacheLayout, progress: Callable[[str], None]) -> dict[str, Any]:
    """Find a model folder on disk or on the hub; its description is cached for as long as its files stay as they are."""
    local = written_path(spec.model)
    if local.is_dir():
        folder, revision = local.resolve(), None
    else:
        progress(f"fetching {spec.model} from the Hugging Face hub")
        folder = _download(spec)
        revision = folder.name
    digest = sha256_of({"type": "pretrained", "folder": str(folder)})
    note = cache.base(digest)
    ready = _ready(note, digest, folder)
    if ready is not None:
        return ready
    progress(f"checking the base at {folder}")
    described = {"name": spec.model, "type": "pretrained", "revision": revision, **inspect_folder(folder)}
    write_json(note / MANIFEST, {"recipe_sha256": digest, "files": _stamps(folder), "base": described})
    return {"path": str(folder), **described}


def _download(spec: PretrainedBase) -> Path:
    """The snapshot folder of a hub model, named by the commit it is pinned to."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(spec.model, revision=spec.revision, allow_patterns=list(HUB_FILES)))
    except HFValidationError as error:
        raise ModelError(
            f"base.model {spec.model!r} is neither a folder here nor the name of a hub model",
            "give a folder that exists, or owner/name",
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelError(
            f"{spec.model} (revision {spec.revision or 'newest'}) cannot be fetched from the Hugging Face hub: {error}",
            "check name, revision and network (HF_TOKEN for gated models); without network copy the model folder here and give "
            "its path as base.model",
        ) from error


def _ready(note: Path, digest: str, folder: Path) -> dict[str, Any] | None:
    """The description of a base made before, if its files are still those."""
    if not (note / MANIFEST).is_file():
        return None
    manifest = read_json(note / MANIFEST)
    if manifest.get("recipe_sha256") != digest or manifest.get("files") != _stamps(folder):
        return None
    return {"path": str(folder), **manifest["base"]}


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Size and modification time of every model file: enough to see that a folder is as it was hashed."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files if not path.name.startswith(".")}


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; all shards of its index must be there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_json(index).get("weight_map", {}).values()))
        absent = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if absent or not names:
            raise ModelError(
                f"the base at {folder} lacks {len(absent)} of {len(names)} weight shards: {absent[:3]}", "copy it whole"
            )
        return [folder / name for name in names]
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "none either"
        raise ModelError(
            f"the base at {folder} has no safetensors weights (pickled .bin files: {pickled})",
            "pickles are never opened: convert the model with save_pretrained",
        )
    return weights


def _json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "copy the model folder again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object", "copy the model folder again")
    return value


def _parameters(path: Path) -> int:
    """Elements in a safetensors file, from its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is no whole safetensors file: {error}", "copy the model folder again") from error
    return sum(int(torch.Size(shape).numel()) for shape in shapes)


def _tokenizer_size(path: Path) -> int:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8")).get_vocab_size(with_added_tokens=True)
    except Exception as error:  # the tokenizers library raises bare Exception for every fault of a file
        raise ModelError(f"{path} is no tokenizer: {error}", "save the fast tokenizer with save_pretrained") from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
