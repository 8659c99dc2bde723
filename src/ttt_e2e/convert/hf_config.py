"""Hugging Face configurations: which families can be converted, and their settings under our names.

All of them are one architecture, Llama's, with small differences; `FAMILIES` says which. Source: the configurations and
models of transformers 5.24, whose defaults are used for what a file leaves out.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ttt_e2e.config.components import RopeScaling
from ttt_e2e.config.ranges import ranges_of
from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.convert.learning import Factors, SourceModel
from ttt_e2e.errors import UserError


class Family(NamedTuple):
    """What a family has other than Llama."""

    name: str
    windows: Literal["none", "always", "asked"] = "none"
    """When `sliding_window` means something: "asked", if `use_sliding_window` is set."""
    can_have_bias: bool = False
    """Whether its configuration can ask for biases of attention (`attention_bias`)."""
    settings: Mapping[str, Any] = {}
    """Settings of `ModelConfig` that are the same in the whole family."""
    defaults: Mapping[str, Any] = {}
    """What transformers takes for values that its config.json leaves out."""
    norms: Mapping[str, str] = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "mlp_norm"}
    """The norms of a block under their names there, and what they are called here."""
    is_fused: bool = False
    """Whether query, key and value are stored as one matrix, and gate and value of an MLP as another."""
    activation_name: str = "hidden_act"
    """What a config.json calls the activation of MLPs."""
    has_local_rope: bool = False
    """Whether layers with a sliding window have rotary positions of their own, which are not scaled."""
    norm_offset: float = 0.0
    """What is added to the weights of all norms."""


_BLOCK_OF_FOUR_NORMS = {
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "mixer_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
_OLMO2 = Family(
    "OLMo 2",
    can_have_bias=True,
    settings={"qk_norm": True, "qk_norm_joint": True, "pre_norm": False, "post_norm": True},
    defaults={"rms_norm_eps": 1e-5},
    norms={"post_attention_layernorm": "mixer_post_norm", "post_feedforward_layernorm": "mlp_post_norm"},
)
_GEMMA = Family(
    "Gemma",
    can_have_bias=True,
    settings={"hidden_act": "gelu_pytorch_tanh"},
    defaults={"head_dim": 256, "tie_word_embeddings": True},
    norm_offset=1.0,
)
_GEMMA2 = _GEMMA._replace(
    name="Gemma 2",
    windows="always",
    settings={**_GEMMA.settings, "post_norm": True},
    defaults={
        **_GEMMA.defaults,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    norms=_BLOCK_OF_FOUR_NORMS,
    activation_name="hidden_activation",
)
_GEMMA3 = _GEMMA2._replace(
    name="Gemma 3",
    settings={**_GEMMA2.settings, "qk_norm": True},
    defaults={
        **_GEMMA.defaults,
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 9216,
        "max_position_embeddings": 131_072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    has_local_rope=True,
)

FAMILIES = {
    "llama": Family("Llama", can_have_bias=True),
    "qwen2": Family("Qwen2", "asked", settings={"attention_bias": True}),
    "qwen3": Family("Qwen3", "asked", can_have_bias=True, settings={"qk_norm": True}, defaults={"head_dim": 128}),
    "mistral": Family("Mistral", "always", defaults={"sliding_window": 4096}),
    "ministral": Family("Ministral", "always", defaults={"sliding_window": 4096}),
    "smollm3": Family(
        "SmolLM3", "asked", can_have_bias=True, defaults={"rope_theta": 2e6, "tie_word_embeddings": True}
    ),
    "granite": Family("Granite", can_have_bias=True),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2._replace(
        name="OLMo 3",
        windows="always",
        defaults={**_OLMO2.defaults, "rope_theta": 5e5, "sliding_window": 4096, "sliding_window_pattern": 4},
        has_local_rope=True,
    ),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "phi3": Family(
        "Phi-3",
        "always",
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        is_fused=True,
    ),
}
_MISSING = {  # what families that people ask for have and our models have not
    "gemma3n": "layers that share keys and values, and embeddings for every layer",
    "ministral3": "queries that are scaled by their positions",
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")
MAX_LAYERS = int(ranges_of(ModelConfig)["num_hidden_layers"].high)  # of a damaged file, lists of all would fill memory

_REQUIRED = object()


def read_source(config: Mapping[str, Any], where: Path) -> SourceModel:
    """The model that `config`, the content of the file `where`, describes; raises UserError if it is unsupported.

    Of a Gemma 3 that also sees images it is the language model.
    """
    values = _Values(text_config(config), where)
    model_type = _model_type(values)
    family = FAMILIES[model_type]
    values = _Values({**family.defaults, **values.content}, where)  # a null in the file is no default
    layers = values.count("num_hidden_layers", most=MAX_LAYERS)
    bias = family.can_have_bias and values.flag("attention_bias")
    is_sliding = _sliding_layers(values, model_type, layers)
    rope, max_window, short_rope = _rope(values, model_type, is_sliding)
    reason = "the range of its rotary positions"
    max_context, windows = max_window, _trained_windows(values, model_type, is_sliding)
    if any(windows) and (sliding := values.count("sliding_window")) < max_window:
        some = "it was" if all(windows) else "some of its layers were"
        max_window, reason = sliding, f"the sliding window that {some} trained with"
    settings: dict[str, Any] = dict(
        vocab_size=values.count("vocab_size"),
        hidden_size=values.count("hidden_size"),
        num_hidden_layers=layers,
        num_attention_heads=values.count("num_attention_heads"),
        num_key_value_heads=values.count("num_key_value_heads", None),
        head_dim=values.count("head_dim", None),
        intermediate_size=values.count("intermediate_size"),
        rms_norm_eps=values.number("rms_norm_eps", 1e-6),
        qk_norm=False,
        pre_norm=True,
        post_norm=False,
        tie_word_embeddings=values.flag("tie_word_embeddings"),
        initializer_range=values.number("initializer_range", 0.02),
        attention_bias=bias,
        attention_out_bias=bias,
        **rope,
    )
    settings |= family.settings
    if model_type == "smollm3":
        settings["rope_pattern"] = _layers_with_rope(values, layers)
    source = SourceModel(
        model_type,
        settings,
        max_window,
        reason,
        max_context,
        windows,
        has_tied_head=settings["tie_word_embeddings"],
        short_rope=short_rope,
        norm_offset=family.norm_offset,
    )
    if model_type == "granite":
        return _fold_multipliers(source, values)
    return _with_gemmas_scales(source, values) if model_type.startswith("gemma") else source


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the language model alone, where a Gemma 3 also sees images."""
    text = config.get("text_config")
    if config.get("model_type") != "gemma3" or not isinstance(text, dict):
        return config
    outside = {name: config[name] for name in ("tie_word_embeddings", "quantization_config") if name in config}
    return {**text, **outside, "model_type": "gemma3_text"}


def _fold_multipliers(source: SourceModel, values: "_Values") -> SourceModel:
    """The model with Granite's multipliers as factors of its weights."""
    names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
    embedding, attention, residual, logits = (values.number(name, 1.0) for name in names)
    if logits == 0:
        raise UserError(f"{values.where} has logits_scaling = 0, by which nothing can be divided.")
    settings, heads = dict(source.settings), source.settings["num_attention_heads"]
    head_dim = settings["head_dim"] or settings["hidden_size"] / heads
    # Scores are multiplied by `attention` there, and divided by the root of a head's width here.
    factors = Factors(embedding, attention * math.sqrt(head_dim), residual, 1 / logits)
    settings["tie_word_embeddings"] = source.has_tied_head and factors.embedding == factors.head
    return source._replace(settings=settings, factors=factors)


def _with_gemmas_scales(source: SourceModel, values: "_Values") -> SourceModel:
    """The model with Gemma's scale of the embedding, of the queries, and its caps."""
    settings = source.settings | {"embedding_multiplier": math.sqrt(source.settings["hidden_size"])}
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if values.get(name, None) is not None:
            settings[name] = values.number(name)
    head_dim = settings["head_dim"] or settings["hidden_size"] / settings["num_attention_heads"]
    scalar = values.number("query_pre_attn_scalar", head_dim)
    if scalar <= 0:
        raise UserError(f"{values.where} has query_pre_attn_scalar = {scalar}, which is not above 0.")
    return source._replace(settings=settings, factors=Factors(query=math.sqrt(head_dim / scalar)))


def _model_type(values: "_Values") -> str:
    family = values.get("model_type", "nothing")
    known = ", ".join(family.name for family in FAMILIES.values())
    # A field such as num_experts may say that there are none; num_experts_per_tok counts those of a token.
    counts = [value for name, value in values.content.items() if "experts" in name and "per_tok" not in name]
    has_experts = any(value is True or value not in (None, False, 0, 1, []) for value in counts)
    if has_experts or "moe" in str(family) or family == "mixtral":
        raise UserError(f"{values.where} is a mixture of experts ({family}), which cannot be converted; {known} can.")
    if family in _MISSING:
        raise UserError(
            f"{values.where} says model_type {family!r}, which cannot be converted: it has {_MISSING[family]}; "
            f"{known} can."
        )
    if family not in FAMILIES:
        raise UserError(f"{values.where} says model_type {family!r}, which cannot be converted; {known} can.")
    if (quantization := values.get("quantization_config", None)) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UserError(
            f"{values.where} describes a quantised checkpoint{f' ({method})' if method else ''}, which cannot be "
            "trained further; convert the one that it was made from."
        )
    for name in values.get("architectures", None) or []:
        if not str(name).endswith("ForCausalLM"):
            raise UserError(f"{values.where} describes a {name}; only a language model (ForCausalLM) can be converted.")
    activation = FAMILIES[family].settings.get("hidden_act", "silu")
    wanted = {FAMILIES[family].activation_name: activation, "mlp_bias": False, "use_bidirectional_attention": False}
    if family == "gemma3_text":
        wanted["attn_logit_softcapping"] = None
    for name, usual in wanted.items():
        value = values.get(name, usual)
        # The first files of Gemma say "gelu", by which they mean the approximation; transformers reads them so, too.
        if value != usual and (family, value) != ("gemma", "gelu"):
            raise UserError(f"{values.where} has {name} = {value}; only {usual} can be converted.")
    return str(family)


def _rope(values: "_Values", model_type: str, is_sliding: list[bool]) -> tuple[dict[str, Any], int, RopeScaling | None]:
    """The settings of `ModelConfig` for rotary positions, how many tokens they are made for, and `short_rope`."""
    content = values.get("rope_parameters", None) or values.get("rope_scaling", None) or {}
    local: dict[str, Any] = {}
    if FAMILIES[model_type].has_local_rope and isinstance(content, dict):
        if "full_attention" in content or "sliding_attention" in content:
            content, sliding = (content.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
        else:  # older files
            sliding = {}
        local = _local_rope(values, sliding, is_sliding)
    if not isinstance(content, dict) or any(isinstance(value, dict) for value in content.values()):
        raise UserError(
            f"{values.where} has more than one kind of rotary positions; only a single one can be converted."
        )
    rope = _Values({**{k: values.content[k] for k in ("rope_theta",) if k in values.content}, **content}, values.where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if model_type == "phi3" and kind in ("su", "yarn"):  # as its older files call it
        kind = "longrope"
    if kind not in ROPE_TYPES:
        raise UserError(f"{values.where} has rope_type {kind!r}, which is unsupported; {', '.join(ROPE_TYPES)} are.")
    for name, usual in (("partial_rotary_factor", 1.0), ("truncate", True)):
        for place in (rope, values):
            can_vary = model_type == "phi3" and name == "partial_rotary_factor"
            if place.get(name, usual) != usual and not can_vary:
                raise UserError(f"{values.where} has {name} = {place.get(name, usual)}; only {usual} can be converted.")
    max_positions = values.count("max_position_embeddings")
    settings: dict[str, Any] = {"rope_theta": rope.number("rope_theta", 10_000.0)} | local
    share = rope.number("partial_rotary_factor", values.number("partial_rotary_factor", 1.0))
    if kind == "default" and share != 1:
        pair_factors = _pair_factors(values, share, settings["rope_theta"], None)
        return settings | {"rope_scaling": RopeScaling("longrope", pair_factors=pair_factors)}, max_positions, None
    if kind in ("default", "dynamic"):  # dynamic scaling changes nothing within `max_positions`, where the window stays
        return settings, max_positions, None
    if kind == "linear":
        return settings | {"rope_scaling": RopeScaling("linear", rope.number("factor"))}, max_positions, None
    original = values.count("original_max_position_embeddings", None)
    original = original or rope.count("original_max_position_embeddings", max_positions)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        scaling = RopeScaling("llama3", rope.number("factor"), original, low, high)
        return settings | {"rope_scaling": scaling}, max_positions, None
    factor = rope.number("factor", max_positions / original)
    if kind == "longrope":
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
        attention_factor = rope.number("attention_factor", usual)
        long, short = (
            RopeScaling(
                "longrope",
                original_max_position_embeddings=original,
                pair_factors=_pair_factors(values, share, settings["rope_theta"], rope.numbers(name)),
                attention_factor=attention_factor,
            )
            for name in ("long_factor", "short_factor")
        )
        return settings | {"rope_scaling": long}, max_positions, short
    low, high = rope.number("beta_slow", 0.0) or 1.0, rope.number("beta_fast", 0.0) or 32.0
    one, other = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    one, other = (one, other) if one and other else (1.0, 0.0)
    log = math.log(max(1.0, factor))
    attention_factor = rope.number("attention_factor", 0.0) or (0.1 * one * log + 1) / (0.1 * other * log + 1)
    scaling = RopeScaling("yarn", factor, original, low, high, attention_factor)
    return settings | {"rope_scaling": scaling}, max(max_positions, int(factor * original)), None


def _local_rope(values: "_Values", content: Any, is_sliding: list[bool]) -> dict[str, Any]:
    """The settings for rotary positions of layers with a sliding window; `content` is what a newer file has on them."""
    rope = _Values(content if isinstance(content, dict) else {"rope_type": content}, values.where)
    if (kind := rope.get("rope_type", "default")) != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{values.where} stretches the rotary positions of layers with a sliding window ({kind}); only those of "
            "the other layers can be stretched."
        )
    theta = values.number("rope_local_base_freq", values.number("rope_theta"))
    return {"rope_local_pattern": tuple(is_sliding), "rope_local_base_freq": rope.number("rope_theta", theta)}


def _pair_factors(
    values: "_Values", share: float, theta: float, factors: tuple[float, ...] | None
) -> tuple[float, ...]:
    """The factors of all rotary pairs of a head, if a share of the head turns, with these factors (None: 1).

    There the powers of theta are spread over those pairs that turn, here over all.
    """
    head_dim = values.count("head_dim", None) or values.count("hidden_size") // values.count("num_attention_heads")
    turning, pairs = int(head_dim * share) // 2, head_dim // 2
    factors = (1.0,) * turning if factors is None else factors
    if len(factors) != turning or turning > pairs:
        raise UserError(f"{values.where} has {len(factors)} factors for {turning} rotary pairs; use an unaltered copy.")
    turned = (factor * theta ** (i / turning - i / pairs) for i, factor in enumerate(factors))
    return (*turned, *(0.0,) * (pairs - turning))


def _layers_with_rope(values: "_Values", layers: int) -> tuple[bool, ...]:
    """Which layers of a SmolLM3 have rotary positions: those where `no_rope_layers` is 1."""
    interval = values.count("no_rope_layer_interval", 4)
    by_depth = [int((i + 1) % interval != 0) for i in range(layers)]

    def is_valid(value: Any) -> bool:
        return isinstance(value, list) and len(value) >= layers and all(x in (0, 1) for x in value)

    given = values.get("no_rope_layers", by_depth, is_valid, "not 0 or 1 for each of its layers")
    return tuple(map(bool, given[:layers]))


def _sliding_layers(values: "_Values", model_type: str, layers: int) -> list[bool]:
    """Which layers have the sliding window, if there is one."""
    types = values.get("layer_types", None, lambda value: isinstance(value, list), "not a list")
    kinds = ("full_attention", "sliding_attention")
    if types is not None and (len(types) < layers or any(name not in kinds for name in types)):
        raise UserError(
            f"{values.where} has layer_types that do not say full_attention or sliding_attention for each of its "
            "layers; a hybrid cannot be converted."
        )
    family = FAMILIES[model_type]
    if types is not None:
        return [name == "sliding_attention" for name in types[:layers]]
    if model_type == "smollm3":
        return [not rope for rope in _layers_with_rope(values, layers)]
    if "sliding_window_pattern" in family.defaults:  # the last of so many layers has none
        every = values.count("sliding_window_pattern")
        return [(i + 1) % every != 0 for i in range(layers)]
    # Qwen's layers have one from `max_window_layers` on.
    first = values.count("max_window_layers", 28, least=0) if family.windows == "asked" else 0
    return [i >= first for i in range(layers)]


def _trained_windows(values: "_Values", model_type: str, is_sliding: list[bool]) -> tuple[int | None, ...]:
    """The sliding window of every layer; None for those that see everything."""
    kind = FAMILIES[model_type].windows
    is_asked = kind == "always" or (kind == "asked" and values.flag("use_sliding_window"))
    if not is_asked or values.get("sliding_window", None) is None:
        return (None,) * len(is_sliding)
    window = values.count("sliding_window")
    return tuple(window if sliding else None for sliding in is_sliding)


class _Values(NamedTuple):
    """The values of a JSON object, checked as they are asked for. null counts as missing."""

    content: Mapping[str, Any]
    where: Path

    def get(self, name: str, default: Any, is_valid: Callable[[Any], bool] = lambda value: True, what: str = "") -> Any:
        value = self.content.get(name)
        if value is None and default is _REQUIRED:
            raise UserError(f"{self.where} lacks {name}; use an unaltered copy of the checkpoint.")
        if value is not None and not is_valid(value):
            raise UserError(f"{self.where} has {name} = {value!r}, which is {what}.")
        return default if value is None else value

    def count(self, name: str, default: Any = _REQUIRED, least: int = 1, most: float = math.inf) -> Any:
        what = f"not a whole number of at least {least}" + (f" and at most {most}" if most < math.inf else "")
        return self.get(name, default, lambda value: type(value) is int and least <= value <= most, what)

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        value = self.get(name, default, lambda x: type(x) in (int, float) and math.isfinite(x), "not a number")
        return float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        def is_valid(value: Any) -> bool:
            return isinstance(value, list) and all(type(x) in (int, float) and math.isfinite(x) for x in value)

        return tuple(map(float, self.get(name, _REQUIRED, is_valid, "not a list of numbers")))

    def flag(self, name: str) -> bool:
        return self.get(name, False, lambda value: type(value) is bool, "neither true nor false")
