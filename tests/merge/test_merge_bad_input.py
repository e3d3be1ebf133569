"""Input that is wrong, hostile or half there: one typed error, whatever the method, and nothing written or lost."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chrysalis_ray.config.merges import EnsembleMerge, TiesMerge
from chrysalis_ray.core.errors import MergeError
from chrysalis_ray.evaluate.folders import audit_folders, merge_folders
from chrysalis_ray.evaluate.vocabulary import TOKENIZER
from chrysalis_ray.seed.adapter import CONFIG, WEIGHTS, AdapterWeights, read_adapter, write_adapter

PLAIN = EnsembleMerge(method="ensemble")
TENSOR = "base_model.model.layers.0.q.lora_A.weight"


def adapter(rng_seed: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(rng_seed)
    factors = {
        f"layers.{n}.q": (torch.randn(2, 8, generator=generator), torch.randn(6, 2, generator=generator)) for n in (0, 1)
    }
    return AdapterWeights("org/base", None, 2, 4.0, False, ("q",), factors)


@pytest.fixture
def two(tmp_path):
    for number in (0, 1):
        write_adapter(tmp_path / f"a{number}", adapter(number))
    return tmp_path


def everything(folder: Path):
    found = {}
    for path in sorted(folder.rglob("*")):
        plain = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = path.read_bytes() if plain else os.lstat(path).st_mode
    return found


def assert_refused(folder: Path, *words: str) -> None:
    before = everything(folder)
    names = [str(folder / "a0"), str(folder / "a1")]
    for spec in (PLAIN, TiesMerge(method="ties", space="dense")):
        with pytest.raises(MergeError) as refused:
            merge_folders(names, spec, folder / "out")
        assert all(word in str(refused.value) for word in words)
    with pytest.raises(MergeError):
        audit_folders(names)
    assert everything(folder) == before


def header_of(folder: Path) -> tuple[dict, bytes]:
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(folder: Path, header: bytes, data: bytes) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + data)


def lie(key: str, value: object):
    def change(header: dict) -> None:
        header[TENSOR][key] = value

    return change


LIES = {
    "offsets beyond the end": lie("data_offsets", [0, 10**12]),
    "offsets backwards": lie("data_offsets", [64, 0]),
    "offsets below zero": lie("data_offsets", [-64, 0]),
    "offsets of another": lambda h: h[TENSOR].update(
        data_offsets=h["base_model.model.layers.1.q.lora_A.weight"]["data_offsets"]
    ),
    "offsets that are text": lie("data_offsets", ["0", "64"]),
    "three offsets": lie("data_offsets", [0, 32, 64]),
    "no offsets": lambda h: h[TENSOR].pop("data_offsets"),
    "a shape that overflows": lie("shape", [2**40, 2**40]),
    "a shape below zero": lie("shape", [-2, -8]),
    "a shape of fractions": lie("shape", [2.5, 8]),
    "a shape of another size": lie("shape", [4, 8]),
    "a shape of one number": lie("shape", [16]),
    "a shape in three dimensions": lie("shape", [2, 4, 2]),
    "a type nobody knows": lie("dtype", "F128"),
    "a type of another size": lie("dtype", "F64"),
    "whole numbers": lie("dtype", "I32"),
    "truth values": lie("dtype", "BOOL"),
    "a tensor that is a list": lambda h: h.update({TENSOR: [1, 2]}),
    "metadata that is a list": lambda h: h.update(__metadata__=[1]),
    "metadata of numbers": lambda h: h.update(__metadata__={"format": 7}),
    "a path for a module": lambda h: h.update({"base_model.model.../../x.lora_A.weight": h.pop(TENSOR)}),
    "an absolute path": lambda h: h.update({"/etc/passwd": h.pop(TENSOR)}),
    "a name of nothing": lambda h: h.update({"": h.pop(TENSOR)}),
    "a name in another script": lambda h: h.update({TENSOR.replace("q", "\N{CYRILLIC SMALL LETTER A}"): h.pop(TENSOR)}),
    "a name with a line in it": lambda h: h.update({TENSOR.replace("q", "q\n"): h.pop(TENSOR)}),
    "another prefix": lambda h: h.update({TENSOR.removeprefix("base_model."): h.pop(TENSOR)}),
    "a magnitude": lambda h: h.update({TENSOR.replace("lora_A.weight", "lora_magnitude_vector.weight"): h.pop(TENSOR)}),
    "a whole module": lambda h: h.update({"base_model.model.lm_head.weight": h.pop(TENSOR)}),
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_is_refused(two, name):
    header, data = header_of(two / "a1")
    LIES[name](header)
    with_header(two / "a1", json.dumps(header).encode(), data)
    assert_refused(two)


@pytest.mark.parametrize(
    "raw",
    [b"", b"\0" * 8, b"\xff" * 8, b"\xff" * 4096, struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 4) + b"null",
     struct.pack("<Q", 10**9) + b"{}", struct.pack("<Q", 100_000) + b"[" * 100_000, struct.pack("<Q", 3) + b"\xff\xfe\x00",
     b"PK\x03\x04" + b"\0" * 60, b"\x80\x04\x95" + b"\0" * 60],
    ids=["nothing", "zeros", "ones", "many ones", "no tensor", "null", "a gigabyte", "deep", "no text", "a zip", "a pickle"],
)  # fmt: skip
def test_bytes_that_are_no_safetensors_are_refused(two, raw):
    (two / "a1" / WEIGHTS).write_bytes(raw)
    assert_refused(two)


def test_a_file_cut_anywhere_is_refused(two):
    whole = (two / "a1" / WEIGHTS).read_bytes()
    for size in (1, 7, 8, 9, 60, len(whole) // 3, len(whole) - 64, len(whole) - 1):
        (two / "a1" / WEIGHTS).write_bytes(whole[:size])
        assert_refused(two)
    (two / "a1" / WEIGHTS).write_bytes(whole + b"\0")
    assert_refused(two)


def test_a_flipped_bit_is_refused_or_another_number():
    """Safetensors has no checksum: a bit of a number is another number, which the hash in the manifest tells; never a crash."""
    torch.manual_seed(0)
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for number in (0, 1):
            write_adapter(folder / f"a{number}", adapter(number))
        whole = (folder / "a1" / WEIGHTS).read_bytes()
        refused = 0
        for place in range(0, len(whole), 23):
            (folder / "a1" / WEIGHTS).write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
            try:
                read_adapter(folder / "a1")
            except MergeError:
                refused += 1
        assert 5 < refused < len(whole) // 23


def test_a_tensor_named_twice_is_refused(two):
    header, data = header_of(two / "a1")
    entry = json.dumps(header)[1:-1]
    with_header(two / "a1", f"{{{entry}, {entry}}}".encode(), data)
    assert_refused(two, "twice")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_number_that_is_none_is_refused(two, value, side):
    header, data = header_of(two / "a1")
    start = header[TENSOR.replace("lora_A", f"lora_{side}")]["data_offsets"][0]
    with_header(two / "a1", json.dumps(header).encode(), data[:start] + struct.pack("<f", value) + data[start + 4 :])
    assert_refused(two, "finite")


CONFIGS = {
    "twins": b'{"peft_type": "LORA", "r": 2, "r": 2, "lora_alpha": 4, "target_modules": ["q"]}',
    "a path for a base": {"base_model_name_or_path": "../../../../etc/passwd"},
    "a base that is a list": {"base_model_name_or_path": ["org/base"]},
    "another base": {"base_model_name_or_path": "org/other"},
    "another revision": {"revision": ["main"]},
    "code for a type": {"peft_type": "__import__('os').system('true')"},
    "an expression for a rank": {"r": "1+1"},
    "a rank beyond": {"r": 10**30},
    "another rank": {"r": 3},
    "not a number for alpha": b'{"peft_type": "LORA", "r": 2, "lora_alpha": NaN, "target_modules": ["q"]}',
    "a pattern that takes for ever": {"rank_pattern": {"(a+)+$": 2}},
    "a path in a pattern": {"alpha_pattern": {"../q": 2}},
    "a dropout of everything": {"lora_dropout": 1.0},
    "deep": b'{"a": ' * 5000 + b"1" + b"}" * 5000,
    "nothing": b"",
    "not text": b"\xff\xfe{}",
    "not an object": b"[1, 2]",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_lies_is_refused(two, name):
    path, change = two / "a1" / CONFIG, CONFIGS[name]
    path.write_bytes(change if isinstance(change, bytes) else json.dumps({**json.loads(path.read_text()), **change}).encode())
    (two / "a0" / CONFIG).write_text(json.dumps({**json.loads((two / "a0" / CONFIG).read_text()), "revision": "main"}))
    assert_refused(two)


def test_targets_from_outside_are_never_taken_for_patterns(two):
    """A regular expression that takes for ever is not tried, and one that means other modules changes nothing."""
    path = two / "a1" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": "(a|aa)+$", "exclude_modules": "(b+)+$"}))
    merge_folders([str(two / "a0"), str(two / "a1")], PLAIN, two / "out")
    assert sorted(read_adapter(two / "out").factors) == ["layers.0.q", "layers.1.q"]


@pytest.mark.parametrize("what", ["weights a folder", "config a folder", "a pipe", "a device", "a dangling link", "a pickle",
                                  "a pickle beside nothing"])  # fmt: skip
def test_what_is_no_file_is_refused(two, what):
    folder = two / "a1"
    weights, config = folder / WEIGHTS, folder / CONFIG
    if what in ("weights a folder", "a pipe", "a device", "a dangling link"):
        weights.unlink()
    if what == "weights a folder":
        weights.mkdir()
    elif what == "config a folder":
        config.unlink()
        config.mkdir()
    elif what == "a pipe":
        os.mkfifo(weights)
    elif what == "a device":
        weights.symlink_to("/dev/zero")
    elif what == "a dangling link":
        weights.symlink_to(two / "nowhere")
    elif what == "a pickle":
        weights.rename(folder / "adapter_model.bin")
    elif what == "a pickle beside nothing":
        weights.rename(folder / "adapter_model.pt")
    assert_refused(two)


def tokenizer(words, **more):
    vocabulary = {"type": "WordLevel", "vocab": {word: n for n, word in enumerate(words)}, "unk_token": "a"}
    added = [{"id": len(words), "content": "<|end|>"}]
    return json.dumps({"version": "1.0", "model": vocabulary, "added_tokens": added, **more})


def test_adapters_that_bring_other_tokenizers_are_refused(two):
    (two / "a0" / TOKENIZER).write_text(tokenizer("abc"))
    (two / "a1" / TOKENIZER).write_text(tokenizer("abd"))
    assert_refused(two, "tokenizers")
    (two / "a1" / TOKENIZER).write_text(tokenizer("abc", added_tokens=[{"id": 3, "content": "<|stop|>"}]))
    assert_refused(two, "tokenizers")
    for broken in (b"{", b"[]", b"\xff", b'{"model": 1, "model": 2}', b'{"added_tokens": [1]}'):
        (two / "a1" / TOKENIZER).write_bytes(broken)
        assert_refused(two, "no tokenizer")
    (two / "a1" / TOKENIZER).write_text(tokenizer("abc", padding={"length": 9}, truncation={"max_length": 7}))
    merge_folders([str(two / "a0"), str(two / "a1")], PLAIN, two / "padded")
    (two / "a1" / TOKENIZER).unlink()
    merge_folders([str(two / "a0"), str(two / "a1")], PLAIN, two / "silent")


def test_tensors_of_nothing_are_refused(two):
    """A ZeRO-3 run that never gathered its adapter saves such."""
    module = "base_model.model.layers.1.q"
    for a_shape, b_shape in (((2, 0), (6, 2)), ((2, 8), (0, 2)), ((0, 8), (6, 0)), ((0,), (0,))):
        tensors = {f"{module}.lora_A.weight": torch.ones(a_shape), f"{module}.lora_B.weight": torch.ones(b_shape)}
        save_file(tensors, two / "a1" / WEIGHTS)
        assert_refused(two)


def test_other_shapes_are_named(two):
    wide = replace(adapter(1), factors={m: (torch.cat([a, a], 1), b) for m, (a, b) in adapter(1).factors.items()})
    write_adapter(two / "a1", wide)
    assert_refused(two, "layers.0.q", "shapes")
