"""A model without what transformers' own models lack: no window, no updates, and fast MLPs where they begin.

Such a checkpoint needs nothing of this package. It predicts what the model predicts with learning off, as far as a text
fits the model's window; beyond it, it goes on seeing all of the text. It is what an adapter of a session is added to.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from ttt_e2e.config.components import RopeScaling
from ttt_e2e.config.parse import flatten
from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.model.transformer import Transformer

_MAX_POSITIONS = 8192  # what a plain model says that it can see, at least: models here have no such setting

# Settings that the plain model has by another name, and those that do not change a prediction before the first update.
_EXPRESSED = {
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "suffix_intermediate_size", "fast_intermediate_size", "fast_rank", "parallel_mlp"),
    *("pattern", "sliding_window", "attention_sink", "suffix_layers", "mini_batch_size", "initializer_range"),
    *("rope_theta", "rms_norm_eps", "qk_norm", "attention_bias", "attention_out_bias", "tie_word_embeddings"),
}
_SECTIONS = ("inner_loop.", "mamba2.", "gated_deltanet.", "memory.", "rope_scaling.")


@torch.no_grad()
def plain_model(model: Transformer, generation: GenerationConfig) -> PreTrainedModel:
    """`model` as a Llama, Qwen 2 or Qwen 3 of transformers, in float32, that generates with the tokens in `generation`.

    Raises UserError if it has what none of the three has.
    """
    config = model.config
    tokens = {f"{name}_token_id": getattr(generation, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    theirs = _configuration(config, tokens)
    with torch.device("meta"):  # no weights are allocated that would be replaced at once
        plain = AutoModelForCausalLM.from_config(theirs)
    weights = {name: weight.float().clone() for name, weight in _weights(model)}  # parts of one matrix, in one memory
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()  # one parameter again, where the two have one memory
    plain.generation_config = generation
    return plain.eval()


def _configuration(config: ModelConfig, tokens: dict[str, Any]) -> LlamaConfig | Qwen2Config | Qwen3Config:
    refused = next(_not_expressed(config), None)
    if refused is not None:
        raise UserError(f"A plain model of transformers cannot have {refused}; leave --plain out.")
    scaling = config.rope_scaling
    seen = max(_MAX_POSITIONS, config.sliding_window)
    if scaling.original_max_position_embeddings is not None:
        seen = max(seen, int(scaling.factor * scaling.original_max_position_embeddings))
    names = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("intermediate_size", "initializer_range", "rms_norm_eps"),
    )
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    settings |= {
        "max_position_embeddings": seen,
        "rope_parameters": {"rope_theta": config.rope_theta, **_rope_parameters(scaling)},
        "tie_word_embeddings": config.tie_word_embeddings,
        **tokens,
    }
    if config.attention_bias and not config.attention_out_bias:
        return Qwen2Config(**settings)
    return (Qwen3Config if config.qk_norm else LlamaConfig)(**settings, attention_bias=config.attention_bias)


def _not_expressed(config: ModelConfig) -> Iterator[str]:
    """What of a model none of the three families has."""
    standard = flatten(ModelConfig(8, 8, 1, 1, 8, post_norm=False))
    for name, value in flatten(config).items():
        if name not in _EXPRESSED and not name.startswith(_SECTIONS) and value != standard[name]:
            yield f"{name} = {value}"
    width = config.fast_intermediate_size + config.suffix_intermediate_size
    if others := set(config.mixers) - {"window", "full"}:
        yield f"the mixer {min(others)}"
    if config.rope_scaling.rope_type == "longrope":
        yield "rope_scaling.rope_type = longrope"
    if config.suffix_layers and not config.parallel_mlp:
        yield "two MLPs one after the other (--fast new)"
    elif config.suffix_layers and width != config.intermediate_size:
        yield "MLPs of two widths"
    if config.attention_bias != config.attention_out_bias and (config.qk_norm or config.attention_out_bias):
        yield "these biases of attention"


def _rope_parameters(scaling: RopeScaling) -> dict[str, Any]:
    """The scaling of rotary positions, with the names that transformers has for it."""
    given = asdict(scaling)
    names = {
        "default": "",
        "linear": "factor",
        "llama3": "factor original_max_position_embeddings low_freq_factor high_freq_factor",
        "yarn": "factor original_max_position_embeddings attention_factor",
    }[scaling.rope_type].split()
    if scaling.rope_type == "yarn":
        given |= {"beta_slow": scaling.low_freq_factor, "beta_fast": scaling.high_freq_factor}
        names += ["beta_slow", "beta_fast"]
    return {"rope_type": scaling.rope_type, **{name: given[name] for name in names}}


def _weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    config = model.config
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield "model.embed_tokens.weight", model.embedding
    yield "model.norm.weight", model.final_norm.weight
    if not config.tie_word_embeddings:
        yield "lm_head.weight", model.get_parameter("head")
    for i, block in enumerate((*model.prefix, *model.suffix)):
        layer = f"model.layers.{i}"
        own = dict(block.named_parameters())
        yield f"{layer}.input_layernorm.weight", own["mixer_norm.weight"]
        yield f"{layer}.post_attention_layernorm.weight", own["mlp_norm.weight"]
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            parts = own[f"mixer.{kind[0]}_qkv"].split([queries, keys, keys])
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                yield f"{layer}.self_attn.{name}.{kind}", part
        yield f"{layer}.self_attn.o_proj.weight", own["mixer.w_out"]
        if config.attention_out_bias:
            yield f"{layer}.self_attn.o_proj.bias", own["mixer.b_out"]
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            yield f"{layer}.self_attn.{name}.weight", own[f"mixer.{name}"]
        w_out: Tensor = own["mlp.w_out"]
        w_in = own["mlp.w_in"].chunk(2)
        if "fast.w_in" in own:
            fast_in: Tensor = own["fast.w_in"]
            fast_out: Tensor = own["fast.w_out"]
            if config.fast_rank is not None:
                fast_in = fast_in + own["fast.up_in"] @ own["fast.down_in"]
                fast_out = fast_out + own["fast.up_out"] @ own["fast.down_out"]
            w_in = tuple(torch.cat(both) for both in zip(fast_in.chunk(2), w_in, strict=True))
            w_out = torch.cat([fast_out, w_out], 1)
        yield f"{layer}.mlp.gate_proj.weight", w_in[0]
        yield f"{layer}.mlp.up_proj.weight", w_in[1]
        yield f"{layer}.mlp.down_proj.weight", w_out
