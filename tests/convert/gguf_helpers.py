"""GGUF files for the tests, written by the library of llama.cpp as llama.cpp's converter lays them out."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from tokenizers import models, pre_tokenizers, trainers
from torch import Tensor

TEXT = (
    "The year 2024 had 366 days, 2023 had 365. It's been 10,000 years; we've 42 zebras, don't you? "
    "def f(x):\n    return x ** 2  # 2024\n\n\n\tif 'a' != \"b\": pass\r\n"
    "Grüße aus Köln, naïve café. Ελληνικά Привет мир 你好，世界！ १२३ ½ Ⅷ 😀 "
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Where the scales of a block are, as float16, in the types that the library cannot write.
_SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def vocabulary(size: int) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE with SPECIAL first, as in SmolLM.

    It was trained on a text that was not split, so that any split forbids some of its tokens.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    model = json.loads(backend.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get)[:size], [" ".join(pair) for pair in model["merges"]]


def add_vocabulary(writer: GGUFWriter, size: int, pre: str = "smollm", unused: int = 0) -> None:
    """The tokenizer of a model with `size` tokens, and `unused` more that only round up its vocabulary."""
    tokens, merges = vocabulary(size)
    kinds = [TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + [f"[PAD{i}]" for i in range(unused)])
    writer.add_token_types(kinds + [TokenType.UNUSED] * unused)
    if merges:
        writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)


def write_model(
    path: Path,
    model: Any,
    kind: str = "F32",
    *,
    tokenizer: Callable[[GGUFWriter, int], None] = add_vocabulary,
    tensors: Mapping[str, Tensor] | None = None,
    **metadata: Any,
) -> Path:
    """Write a model of transformers, its matrices as `kind`.

    tokenizer: writes one for so many tokens. tensors: more of them. metadata: more settings of the architecture, "__"
    for every dot.
    """
    config = model.config
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    writer = GGUFWriter(path, arch)
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if head_dim != config.hidden_size // heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
        writer.add_attn_logit_softcapping(cap)
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        writer.add_final_logit_softcapping(cap)
    add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
    for name, value in ({"rope__dimension_count": head_dim} | metadata).items():
        add[type(value)](f"{arch}.{name.replace('__', '.')}", value)
    tokenizer(writer, config.vocab_size)
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            weight = interleaved(weight, heads if "q_proj" in name else keys)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight + 1
        add_tensor(writer, names.get_name(name, try_suffixes=(".weight", ".bias")), weight, kind)
    for name, weight in (tensors or {}).items():
        add_tensor(writer, name, weight, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """The rows of every head with rotary pairs side by side, as llama.cpp's converter permutes them."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def add_tensor(writer: GGUFWriter, name: str, weight: Tensor, kind: str) -> None:
    values, dtype = weight.detach().numpy().astype(np.float32), GGMLQuantizationType[kind]
    if weight.dim() == 1 or kind == "F32":  # vectors are never quantised
        writer.add_tensor(name, values)
    elif kind in _SCALES:
        writer.add_tensor(name, random_blocks(weight.shape, kind), raw_dtype=dtype)
    else:
        writer.add_tensor(name, gguf.quantize(values, dtype), raw_dtype=dtype)


def random_blocks(shape: torch.Size, kind: str) -> np.ndarray:
    """Random quantised weights [rows, bytes] of about 0.05; any bits are valid but for the scales."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    random = np.random.default_rng(shape[0])
    blocks = random.integers(0, 256, (shape[0], shape[1] // block, block_bytes), np.uint8)
    for at in _SCALES[kind]:
        scales = random.uniform(1e-4, 2e-4, blocks.shape[:2]) * (0.2 if kind == "Q6_K" else 1)
        blocks[..., at : at + 2] = scales.astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)
