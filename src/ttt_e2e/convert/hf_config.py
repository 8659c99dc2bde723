"""From a Hugging Face configuration to ours: which families are read, and what of them.

Llama, Qwen2 (and 2.5), Qwen3 and Mistral are one architecture with small differences: biases, norms on queries and
keys, the width of heads, and how rotary angles are stretched. Source: the configurations and models of transformers
5.23, whose defaults stand here for what an older file leaves out.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttt_e2e.config.schema import RopeScaling
from ttt_e2e.convert.start import Source
from ttt_e2e.errors import UserError

FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

_REQUIRED = object()
_MISTRAL_WINDOW = 4096


def read_source(config: Mapping[str, Any], where: Path) -> Source:
    """What `config`, the content of the file `where`, says of its model.

    Raises UserError for a family, or a feature of one, that is not supported, and for values that make no sense.
    """
    values = _Values(config, where)
    family = _family(values)
    width, heads = values.count("hidden_size"), values.count("num_attention_heads")
    head_width = values.count("head_dim", 128 if family == "qwen3" else None)
    mlp_width, layers = values.count("intermediate_size"), values.count("num_hidden_layers")
    bias = values.flag("attention_bias") if family in ("llama", "qwen3") else False
    rotation, reach = _rotation(values)
    reason = "the range of its rotary positions"
    sliding = _sliding_window(values, family, layers)
    if sliding is not None and sliding < reach:
        reach, reason = sliding, "the sliding window that it was trained with"
    shape: dict[str, Any] = dict(
        vocab_size=values.count("vocab_size"),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=values.count("num_key_value_heads", None),
        head_dim=None if head_width is None or head_width * heads == width else head_width,
        intermediate_size=mlp_width,
        rms_norm_eps=values.number("rms_norm_eps", 1e-6),
        qk_norm=family == "qwen3",
        pre_norm=True,
        post_norm=False,
        tie_word_embeddings=values.flag("tie_word_embeddings"),
        initializer_range=values.number("initializer_range", 0.02),
        attention_bias=bias or family == "qwen2",
        attention_out_bias=bias,
        **rotation,
    )
    return Source(family, shape, layers, mlp_width, reach, reason)


def _family(values: "_Values") -> str:
    family = values.get("model_type", "nothing")
    known = ", ".join(FAMILIES.values())
    if any("experts" in name for name in values.content) or "moe" in str(family) or family == "mixtral":
        raise UserError(f"{values.where} is a mixture of experts ({family}), which cannot be converted; {known} can.")
    if family not in FAMILIES:
        raise UserError(f"{values.where} says model_type {family!r}, which cannot be converted; {known} can.")
    if values.get("quantization_config", None) is not None:
        raise UserError(
            f"{values.where} describes a quantised checkpoint, which cannot be trained further; convert the one that "
            "it was made of."
        )
    for name in values.get("architectures", None) or []:
        if not str(name).endswith("ForCausalLM"):
            raise UserError(f"{values.where} describes a {name}; only a language model (ForCausalLM) can be converted.")
    for name, usual in (("hidden_act", "silu"), ("mlp_bias", False)):
        if values.get(name, usual) != usual:
            raise UserError(f"{values.where} has {name} = {values.get(name, usual)}; only {usual} can be converted.")
    return str(family)


def _rotation(values: "_Values") -> tuple[dict[str, Any], int]:
    """The fields of `ModelConfig` for rotary positions, and how many tokens they were made for."""
    content = values.get("rope_parameters", None) or values.get("rope_scaling", None) or {}
    if not isinstance(content, dict) or any(isinstance(value, dict) for value in content.values()):
        raise UserError(f"{values.where} has rotary positions other than one kind for all layers; that is unsupported.")
    rope = _Values({**{k: values.content[k] for k in ("rope_theta",) if k in values.content}, **content}, values.where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UserError(f"{values.where} has rope_type {kind!r}, which is unsupported; {', '.join(ROPE_TYPES)} are.")
    for name, usual in (("partial_rotary_factor", 1.0), ("truncate", True)):
        for place in (rope, values):
            if place.get(name, usual) != usual:
                raise UserError(f"{values.where} has {name} = {place.get(name, usual)}; only {usual} can be converted.")
    reach = values.count("max_position_embeddings")
    fields: dict[str, Any] = {"rope_theta": rope.number("rope_theta", 10_000.0)}
    if kind == "default":
        return fields, reach
    if kind == "linear":
        return fields | {"rope_scaling": RopeScaling("linear", rope.number("factor"))}, reach
    context = values.count("original_max_position_embeddings", None)
    context = context or rope.count("original_max_position_embeddings", reach)
    if kind == "llama3":
        slow, fast = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        return fields | {"rope_scaling": RopeScaling("llama3", rope.number("factor"), context, slow, fast)}, reach
    factor = rope.number("factor", reach / context)
    slow, fast = rope.number("beta_slow", 0.0) or 1.0, rope.number("beta_fast", 0.0) or 32.0
    scaling = RopeScaling("yarn", factor, context, slow, fast, _attention_factor(rope, factor))
    return fields | {"rope_scaling": scaling}, max(reach, int(factor * context))


def _attention_factor(rope: "_Values", factor: float) -> float:
    """YaRN's: what is said, or what follows from the factor by which the context was stretched."""
    said = rope.number("attention_factor", 0.0)
    if said:
        return said

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    one, other = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    return scale(one) / scale(other) if one and other else scale(1.0)


def _sliding_window(values: "_Values", family: str, layers: int) -> int | None:
    """The window that all layers have; None where they see everything.

    Qwen's layers have one from the layer `max_window_layers` on, and only if `use_sliding_window` says so.
    """
    if family == "mistral" and "sliding_window" not in values.content:
        return _MISTRAL_WINDOW  # null is none, but what is not said is transformers' default
    if values.get("sliding_window", None) is None or family == "llama":
        return None
    if family in ("qwen2", "qwen3") and not values.flag("use_sliding_window"):
        return None
    first = values.count("max_window_layers", 28, least=0) if family in ("qwen2", "qwen3") else 0
    by_depth = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    kinds = set(values.get("layer_types", None) or by_depth)
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise UserError(
            f"{values.where} has a sliding window in some layers only, which cannot be converted: here all "
            "have the same."
        )
    return values.count("sliding_window")


class _Values:
    """A JSON object, and what is said where a value is missing or of the wrong kind. null counts as missing."""

    def __init__(self, content: Mapping[str, Any], where: Path) -> None:
        self.content, self.where = content, where

    def get(self, name: str, default: Any) -> Any:
        value = self.content.get(name)
        if value is None and default is _REQUIRED:
            raise UserError(f"{self.where} lacks {name}; use an unaltered copy of the checkpoint.")
        return default if value is None else value

    def count(self, name: str, default: Any = _REQUIRED, least: int = 1) -> Any:
        value = self.get(name, default)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise UserError(f"{self.where} has {name} = {value!r}, which is no whole number from {least} on.")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        value = self.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise UserError(f"{self.where} has {name} = {value!r}, which is no number.")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise UserError(f"{self.where} has {name} = {value!r}, which is neither true nor false.")
        return value
