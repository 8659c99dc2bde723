"""What the tests of Hugging Face checkpoints share: checkpoints that transformers itself has written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from torch import Tensor

from ttt_e2e.convert.from_hf import convert_from_hf
from ttt_e2e.convert.learning import LearningOptions
from ttt_e2e.inference.streaming import forward, start_reading
from ttt_e2e.model.transformer import Transformer

SHAPE: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=128,
    initializer_range=0.15,
    rms_norm_eps=1e-5,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=32, beta_fast=4.0)
MULTIPLIERS = dict(embedding_multiplier=12.0, attention_multiplier=0.4, residual_multiplier=0.22, logits_scaling=2.0)
LONGROPE = dict(rope_type="longrope", rope_theta=500.0, short_factor=[1.0, 1.1, 1.2, 1.5], long_factor=[1.0, 2.0, 3, 7])
TOKENS = dict(pad_token_id=None, bos_token_id=0, eos_token_id=0)
SHARDED = "20KB"
# name: family, what is other than in SHAPE, the size of a shard
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {}, "1GB"),
    "llama, one key head, sharded": ("Llama", {"num_key_value_heads": 1}, SHARDED),
    "llama, tied, llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}, SHARDED),
    "llama, biases, linear": (
        "Llama",
        {"attention_bias": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}},
        "1GB",
    ),
    "llama, dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}},
        "1GB",
    ),
    "llama, wide heads": ("Llama", {"head_dim": 12, "num_key_value_heads": 4}, "1GB"),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}, "1GB"),
    "qwen2, yarn, sharded": ("Qwen2", {"rope_parameters": YARN}, SHARDED),
    "qwen3, wide heads, tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}, "1GB"),
    "qwen3, biases, yarn": (
        "Qwen3",
        {"head_dim": 16, "attention_bias": True, "rope_parameters": YARN | {"attention_factor": 1.3}},
        SHARDED,
    ),
    "mistral, wide heads": ("Mistral", {"sliding_window": None, "head_dim": 12}, "1GB"),
    "granite, tied, biases": ("Granite", {"tie_word_embeddings": True, "attention_bias": True, **MULTIPLIERS}, "1GB"),
    "granite, wide heads": ("Granite", {"head_dim": 12, **MULTIPLIERS}, SHARDED),
    "phi3, sliding window": ("Phi3", {"sliding_window": 24, **TOKENS}, SHARDED),
    "phi3, short longrope": (
        "Phi3",
        {"original_max_position_embeddings": 60, "rope_parameters": LONGROPE, **TOKENS},
        "1GB",
    ),
    "phi3, long longrope": (
        "Phi3",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": LONGROPE | {"attention_factor": 1.3},
            **TOKENS,
            "tie_word_embeddings": True,
        },
        SHARDED,
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1, 0], **TOKENS}, "1GB"),
    "smollm3, biases, interval": (
        "SmolLM3",
        {"no_rope_layer_interval": 3, "attention_bias": True, "tie_word_embeddings": False, **TOKENS},
        SHARDED,
    ),
    "smollm3, windows in some layers": (
        "SmolLM3",
        {"use_sliding_window": True, "sliding_window": 24, "no_rope_layer_interval": 2, **TOKENS},
        "1GB",
    ),
    "qwen3, windows in some layers": (
        "Qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
        "1GB",
    ),
    "ministral, windows in some layers": (
        "Ministral",
        {"head_dim": 8, "sliding_window": 24, "layer_types": ["full_attention", "sliding_attention"] * 2},
        SHARDED,
    ),
    "ministral, sliding window": ("Ministral", {"sliding_window": 24, "head_dim": 12}, "1GB"),
    "olmo2": ("Olmo2", TOKENS, "1GB"),
    "olmo2, biases, tied, one key head": (
        "Olmo2",
        {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1, **TOKENS},
        SHARDED,
    ),
    "phi3, partly turned": (
        "Phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}, **TOKENS},
        "1GB",
    ),
    "phi3, partly turned, longrope": (
        "Phi3",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": LONGROPE
            | {"partial_rotary_factor": 0.75, "short_factor": [1.0, 1.1, 1.4], "long_factor": [1.0, 2.5, 6.0]},
            **TOKENS,
        },
        SHARDED,
    ),
    "mistral, sliding window": ("Mistral", {"sliding_window": 24, "rope_parameters": {"rope_theta": 1e4}}, SHARDED),
}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
CASES |= {
    "olmo3, windows in some layers": (
        "Olmo3",
        {
            "sliding_window": 24,
            "rope_parameters": {**TWO_ROPES, "full_attention": YARN | {"attention_factor": 1.3}},
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            **TOKENS,
        },
        "1GB",
    ),
    "olmo3, biases, tied, sliding window": (
        "Olmo3",
        {
            "sliding_window": 24,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention"] * 4,
            **TOKENS,
        },
        SHARDED,
    ),
    "gemma, one key head": ("Gemma", {"head_dim": 12, "num_key_value_heads": 1, **TOKENS}, "1GB"),
    "gemma, biases, linear": (
        "Gemma",
        {
            "head_dim": 8,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
            **TOKENS,
        },
        SHARDED,
    ),
    "gemma2, windows in some layers": (
        "Gemma2",
        {
            "head_dim": 12,
            "sliding_window": 24,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
            **TOKENS,
        },
        "1GB",
    ),
    "gemma2, biases, sliding window": (
        "Gemma2",
        {
            "head_dim": 8,
            "sliding_window": 24,
            "query_pre_attn_scalar": 8,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
            "layer_types": ["sliding_attention"] * 4,
            **TOKENS,
        },
        SHARDED,
    ),
    "gemma3, windows in some layers": (
        "Gemma3",
        {
            "head_dim": 12,
            "sliding_window": 24,
            "query_pre_attn_scalar": 20,
            "rope_parameters": TWO_ROPES,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            **TOKENS,
        },
        "1GB",
    ),
    "gemma3, sliding window": (
        "Gemma3",
        {
            "head_dim": 8,
            "sliding_window": 24,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention"] * 4,
            **TOKENS,
        },
        SHARDED,
    ),
    "gemma3, capped logits": (
        "Gemma3",
        {
            "head_dim": 8,
            "layer_types": ["full_attention"] * 4,
            "sliding_window": 60,
            "final_logit_softcapping": 2.0,
            **TOKENS,
        },
        "1GB",
    ),
}
Pretrained = Callable[[str], tuple[Any, Path]]


def with_tokenizer(folder: Path) -> Path:
    """A tokenizer of letters beside the checkpoint in `folder`."""
    letters = ["<s>", *(chr(i) for i in range(33, 127)), "Ġ"]
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<s>"}))
    return folder


def tokens(length: int = 60, batch: int = 2) -> Tensor:
    return torch.randint(96, (batch, length), generator=torch.Generator().manual_seed(0))


def logits(model: Transformer, text: Tensor) -> Tensor:
    return forward(model, start_reading(model, len(text)), text)[0]


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def convert(folder: Path, tmp_path: Path, dtype: str | None = None, **options: Any) -> Path:
    convert_from_hf(
        folder,
        tmp_path / "out",
        LearningOptions(**{"sliding_window": 60, "mini_batch_size": 5, **options}),
        dtype=dtype,
    )
    return tmp_path / "out"
