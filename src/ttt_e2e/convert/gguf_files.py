"""GGUF files, the format of llama.cpp: their metadata, and their tensors under the names of Hugging Face.

The library `gguf` turns quantised tensors back into floats, some rows at a time. The header is read here: the library's
own reader makes an array of NumPy for every token and every merge, which took 5 seconds and 160 MB for SmolLM2's 49,152
tokens.

Layout, all of it little-endian: "GGUF", the version, the number of tensors and of metadata entries; the entries; name,
shape (innermost dimension first), type and offset of every tensor; the tensors. Source: docs/gguf.md of ggml.
"""

import math
import os
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ttt_e2e.convert.gguf_rope import rope_parameters
from ttt_e2e.convert.hf_config import MAX_LAYERS
from ttt_e2e.errors import UserError
from ttt_e2e.files import expand_user

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# The types of metadata values, as format characters of `struct`.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
_ROPE_FACTORS = "rope_freqs.weight"  # what llama3 scaling divides the rotary rates by
_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FOUR_NORMS = {  # of a block, in Gemma 2 and 3
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BLOCKS_OF_27B = {"gemma2": 46, "gemma3": 62}


class GGUFTensor(NamedTuple):
    """A tensor of a GGUF file that is read in parts."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """Such as "BF16" or "Q4_K"."""
    offset: int
    """In the file."""
    num_bytes: int
    interleaved: int | None = None
    """The width of a head, if the rows of each are ordered for rotary pairs (2i, 2i + 1), as llama.cpp's Llama has
    them. They are read in the order for pairs (i, i + K/2)."""

    def read(self, rows: slice, columns: slice = slice(None)) -> Tensor:
        """Some of its rows and, of a matrix, columns, in float32. The file is closed again to free its memory."""
        from gguf import GGMLQuantizationType, dequantize

        kind = GGMLQuantizationType[self.dtype]
        order = np.arange(self.shape[0])
        if self.interleaved:
            order = order.reshape(-1, self.interleaved // 2, 2).swapaxes(1, 2).ravel()
        is_matrix = len(self.shape) > 1
        stored = np.memmap(self.file, np.uint8, "r", self.offset, (self.shape[0] if is_matrix else 1, self.row_bytes))
        if is_matrix:
            return torch.from_numpy(dequantize(stored[order[rows]], kind))[:, columns]
        return torch.from_numpy(dequantize(np.array(stored), kind)[0][order[rows]])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a matrix, or of the whole vector."""
        return self.num_bytes // (self.shape[0] if len(self.shape) > 1 else 1)


class GGUFModel(NamedTuple):
    """The contents of a GGUF file that holds a model of a family that can be converted."""

    metadata: dict[str, Any]
    config: dict[str, Any]
    """What would be in the config.json of the same model at Hugging Face."""
    tensors: dict[str, GGUFTensor]
    """By the names that they have there; those that are unknown there have their own names."""


def is_gguf(path: str | Path) -> bool:
    """Whether `path` is a GGUF file, by its first bytes."""
    path = expand_user(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def require_gguf(path: Path) -> None:
    """Raise UserError unless `path` is a GGUF file."""
    if not path.exists():
        raise UserError(f"There is no file {path}; give a GGUF file.")
    if not is_gguf(path):
        raise UserError(f"{path} is not a GGUF file; `ttt-e2e convert from-hf` takes checkpoints in safetensors.")


def read_gguf(path: Path) -> GGUFModel:
    """Read a GGUF file but for its weights.

    Raises UserError if the file is damaged or incomplete, if the model is not of a supported family, if its weights are
    quantised in an unknown way, and if the library `gguf` is missing.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError('GGUF files need the library gguf: pip install "ttt-e2e[gguf]".') from error
    with path.open("rb") as file:
        header = _Header(file, path)
        metadata, stored = header.read()
    architecture = metadata.get("general.architecture")
    if metadata.get("split.count", 1) != 1:
        raise UserError(
            f"{path} is one of {metadata['split.count']} parts of a model; join them first, with llama.cpp's "
            "`llama-gguf-split --merge FIRST OUT`."
        )
    if (kind := metadata.get("general.type", "model")) not in ("model", "vocab"):
        raise UserError(f"{path} is no model of its own, but of the type {kind!r}; give the file of the model itself.")
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise UserError(
            f"{path} has the architecture {architecture!r}, which cannot be converted; {known} can (that of a Mistral "
            "is called llama)."
        )
    if not stored:
        raise UserError(f"{path} holds a vocabulary and no weights; give the file of the whole model.")
    factors = stored.pop(_ROPE_FACTORS, None)
    config = _config(metadata, stored, path, None if factors is None else factors.read(slice(None)).double().numpy())
    tensors = {}
    for name, tensor in stored.items():
        if architecture == "llama" and re.fullmatch(r"blk\.\d+\.attn_[qk]\.(weight|bias)", name):
            tensor = tensor._replace(interleaved=config["head_dim"])
        tensors[_name(name, _BLOCK_NAMES | (_FOUR_NORMS if architecture in _BLOCKS_OF_27B else {}))] = tensor
    return GGUFModel(metadata, config, tensors)


def _name(name: str, block_names: dict[str, str]) -> str:
    """The name of a tensor at Hugging Face; its own if it has none there."""
    if found := re.fullmatch(r"(\w+)\.(weight|bias)", name):
        return f"{_MODEL_NAMES.get(found[1], found[1])}.{found[2]}"
    if (found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)) and found[2] in block_names:
        return f"model.layers.{found[1]}.{block_names[found[2]]}.{found[3]}"
    return name


def _config(
    metadata: dict[str, Any], tensors: dict[str, GGUFTensor], path: Path, rope_factors: np.ndarray | None
) -> dict[str, Any]:
    """The settings as in a config.json. What the metadata lack is missing here; `hf_config` checks all values."""
    architecture = metadata["general.architecture"]

    def get(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{name}", default)
        # Settings that can differ between blocks are a number for each.
        return value[0] if isinstance(value, list) and value and value.count(value[0]) == len(value) else value

    width, heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length")
    if head_dim is None and isinstance(width, int) and isinstance(heads, int) and heads:
        head_dim = width // heads
    for name in ("attention.value_length", "rope.dimension_count"):
        if get(name, head_dim) != head_dim:
            raise UserError(
                f"{path} has {architecture}.{name} = {get(name)}, but heads of width {head_dim}; only models where "
                "both are the same can be converted."
            )
    if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
        raise UserError(f"{path} has heads of width {head_dim}, which cannot be; use an unaltered copy.")
    if get("attention.layer_norm_rms_epsilon") is None:  # a config.json has a default
        raise UserError(f"{path} lacks {architecture}.attention.layer_norm_rms_epsilon; use an unaltered copy.")
    window = get("attention.sliding_window") or None
    config = {
        "model_type": "mistral" if architecture == "llama" and window else architecture,
        "vocab_size": tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else None,
        "hidden_size": width,
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope_parameters(get, head_dim, rope_factors, path),
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": 0,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "num_experts": get("expert_count"),
    }
    if architecture in _BLOCKS_OF_27B:
        # The scale of queries is not in the file; llama.cpp (src/llama-model.cpp) takes it from the number of blocks.
        is_27b = config["num_hidden_layers"] == _BLOCKS_OF_27B[architecture] and isinstance(width, int)
        config["query_pre_attn_scalar"] = width // heads if is_27b else head_dim
        config |= {name: get(name) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    if architecture == "gemma3":
        config |= {"model_type": "gemma3_text", "rope_local_base_freq": get("rope.freq_base_swa")}
        blocks = config["num_hidden_layers"]
        if window is None and isinstance(blocks, int) and blocks <= MAX_LAYERS:
            config["layer_types"] = ["full_attention"] * blocks
    return {name: value for name, value in config.items() if value is not None}


class _Header:
    """Reads what comes before the tensors of a GGUF file, checking that nothing is cut short or out of range."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path, self._size = file, path, os.fstat(file.fileno()).st_size

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        """All metadata, and all tensors by the names that they have in the file."""
        self._take(len(_MAGIC))
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise UserError(
                f"{self._path} is GGUF of version {version}, or written for big-endian machines; versions 2 and 3 for "
                "little-endian ones can be read."
            )
        num_tensors, num_entries = self._scalar("Q"), self._scalar("Q")
        metadata = {}
        for _ in range(num_entries):
            name = self._string()
            metadata[name] = self._value(self._scalar("I"))
        infos = []
        for _ in range(num_tensors):
            name, dimensions = self._string(), self._scalar("I")
            shape = self._scalars("Q", dimensions)[::-1]
            infos.append((name, tuple(shape), self._scalar("I"), self._scalar("Q")))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise self._damaged(f"an alignment of {alignment}")
        start = -(-self._file.tell() // alignment) * alignment
        return metadata, {name: self._tensor(name, shape, kind, start + at) for name, shape, kind, at in infos}

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        try:
            dtype = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[dtype]
            dequantize(np.zeros((1, block_bytes), np.uint8), dtype)
        except (ValueError, KeyError, NotImplementedError) as error:
            kinds = {one.value: one.name for one in GGMLQuantizationType}
            raise UserError(
                f"{name} in {self._path} is of the type {kinds.get(kind, kind)}, which the library gguf cannot "
                "dequantise; use another file of the same model, such as Q8_0 or Q4_K_M."
            ) from error
        if len(shape) not in (1, 2) or min(shape) < 1 or shape[-1] % block:
            raise self._damaged(f"{name} of shape {list(shape)} in {dtype.name}")
        num_bytes = math.prod(shape) // block * block_bytes
        if offset + num_bytes > self._size:
            raise UserError(
                f"{self._path} is cut short: it has {self._size:,} bytes, and {name} would end at "
                f"{offset + num_bytes:,}; fetch it again."
            )
        return GGUFTensor(self._path, shape, dtype.name, offset, num_bytes)

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self._path} is damaged: it has {what}; use an unaltered copy.")

    def _take(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise UserError(f"{self._path} is damaged or cut short inside its header; fetch it again.")
        return self._file.read(count)

    def _scalars(self, kind: str, count: int) -> list[Any]:
        values = struct.unpack(f"<{count}{kind}", self._take(count * struct.calcsize(kind)))
        # A setting such as 1e-5 was rounded to float32 when it was written; this is the shortest number that is rounded
        # to the same.
        return [float(str(np.float32(value))) for value in values] if kind == "f" else list(values)

    def _scalar(self, kind: str) -> Any:
        return self._scalars(kind, 1)[0]

    def _string(self) -> str:
        try:
            return self._take(self._scalar("Q")).decode()
        except UnicodeDecodeError as error:
            raise self._damaged("text that is not UTF-8") from error

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, count = self._scalar("I"), self._scalar("Q")
            if kind == _STRING:
                return [self._string() for _ in range(count)]
            if kind in _SCALARS:
                return self._scalars(_SCALARS[kind], count)
        elif kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        raise self._damaged(f"a value of the unknown type {kind}")
