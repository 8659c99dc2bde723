"""Checkpoints of the official JAX implementation: their names and layouts, how they map to ours, and the conversion.

There, linear weights are [in, out] and stacked over layers, and rotary pairs are neighbours (2i, 2i + 1). Here they are
[out, in] with query, key and value (and gate and value) in one matrix, and rotary pairs are (i, i + K/2). The mapping
is linear and one to one, so it serves gradients and optimiser moments as well as weights.

Source: the repository test-time-training/e2e, commit a4fc478. A checkpoint of its trainer holds the weights, the
optimiser's state and the loader's position, and no configuration.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ttt_e2e.config.parse import override
from ttt_e2e.config.presets import preset
from ttt_e2e.config.schema import ModelConfig, RunConfig
from ttt_e2e.convert.model_folder import model_folder, parameter_shapes
from ttt_e2e.convert.orbax import find_step, stored_arrays
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.model.checkpoint import TOKENIZER

WEIGHTS_ITEM = "model_weights"
_HEAD = "language_model.lm_head.weight"
_MODEL = "language_model.model."
_EMBEDDING = _MODEL + "wte.weight"
_BLOCKS = _MODEL + "h.blocks."
_MIXER = _BLOCKS + "seq_modeling_block."
_MLP = _BLOCKS + "feed_forward."
_PRIME = _MODEL + "h.prime_storage."
_FAST = _PRIME + "feed_forward_prime."


class Part(NamedTuple):
    """A piece of an official array, and the rows of a parameter of ours that it becomes.

    source: the array's name; shape: its shape. layer: which index of its first axis; None: all of it. target: our name;
    row: the first of its rows. change: what makes our rows of it.
    """

    source: str
    shape: tuple[int, ...]
    layer: int | None
    target: str
    row: int
    change: Callable[[Tensor], Tensor]


def official_parts(config: ModelConfig) -> list[Part]:
    """All pieces of the official arrays that make up the model `config`, those of one array in a row."""
    layers, suffix, width, hidden = (
        config.num_hidden_layers,
        config.suffix_layers,
        config.hidden_size,
        config.intermediate_size,
    )
    head_width = config.head_dim
    queries, keys = config.num_attention_heads * head_width, config.num_key_value_heads * head_width
    parts = [
        Part(_EMBEDDING, (config.vocab_size, width), None, "embedding", 0, _same),
        Part(_MODEL + "ln_f.weight", (width,), None, "final_norm.weight", 0, _same),
    ]
    if not config.tie_word_embeddings:
        parts.append(Part(_HEAD, (width, config.vocab_size), None, "head", 0, _turned))

    def stacked(
        source: str,
        shape: tuple[int, ...],
        target: str,
        change: Callable[[Tensor], Tensor] = _same,
        row: int = 0,
        count: int = layers,
    ) -> None:
        """An array stacked over the last `count` layers."""
        first = layers - count
        parts.extend(
            Part(f"{source}.weight", (count, *shape), i, f"blocks.{first + i}.{target}", row, change)
            for i in range(count)
        )

    def pairs(turn: bool) -> Callable[[Tensor], Tensor]:
        return lambda weight: _halves(weight.T if turn else weight, head_width)

    stacked(_MIXER + "wq", (width, queries), "mixer.w_qkv", pairs(turn=True))
    stacked(_MIXER + "wk", (width, keys), "mixer.w_qkv", pairs(turn=True), row=queries)
    stacked(_MIXER + "wv", (width, keys), "mixer.w_qkv", _turned, row=queries + keys)
    stacked(_MIXER + "wo", (queries, width), "mixer.w_out", _turned)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            stacked(_MIXER + name, (head_width,), f"mixer.{name}", pairs(turn=False))
    for source, target, count in ((_MLP, "mlp", layers), (_FAST, "fast", suffix)):
        stacked(source + "w1", (width, hidden), f"{target}.w_in", _turned, count=count)
        stacked(source + "w3", (width, hidden), f"{target}.w_in", _turned, row=hidden, count=count)
        stacked(source + "w2", (hidden, width), f"{target}.w_out", _turned, count=count)
    for wanted, post in ((config.pre_norm, ""), (config.post_norm, "post_")):
        if wanted:
            stacked(f"{_BLOCKS}seq_{post}norm", (width,), f"mixer_{post}norm.weight")
            stacked(f"{_BLOCKS}ffn_{post}norm", (width,), f"mlp_{post}norm.weight")
            stacked(f"{_PRIME}ffn_prime_{post}norm", (width,), f"fast_{post}norm.weight", count=suffix)
    return parts


def state_dict_from_official(arrays: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict from the official flat parameter names and arrays, of any floating dtype.

    arrays: such as "language_model.model.wte.weight" [V, D]; per-layer arrays are stacked on their first axis. A name
    may carry anything in front of "language_model". Raises UserError for a missing, unknown or misshapen array.
    """
    named = {name[name.find("language_model") :]: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    parts = official_parts(config)
    require_shapes({name: tuple(array.shape) for name, array in named.items()}, parts, config)
    rows: dict[str, list[Tensor]] = {}
    for part in sorted(parts, key=lambda part: part.row):
        array = named[part.source]
        rows.setdefault(part.target, []).append(part.change(array if part.layer is None else array[part.layer]))
    return {name: torch.cat(pieces).contiguous() for name, pieces in rows.items()}


def require_shapes(found: Mapping[str, tuple[int, ...]], parts: Sequence[Part], config: ModelConfig) -> None:
    """Raise UserError unless the arrays `found` by name, with their shapes, are those of the model `config`."""
    expected = {part.source: part.shape for part in parts}
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"The official parameters lack {name!r}.")
        if found[name] != shape:
            raise UserError(f"{name!r} has shape {found[name]}; the configuration asks for {shape}.")
    # The official model has the weights of norms that are switched off, and does not use them.
    off = [_BLOCKS, _PRIME] if not (config.pre_norm and config.post_norm and config.qk_norm) else []
    unknown = sorted(
        name
        for name in found.keys() - expected.keys()
        if not (name.endswith("norm.weight") and name.startswith(tuple(off)))
    )
    if unknown:
        raise UserError(f"Unknown official parameters: {', '.join(unknown)}.")
    sizes = Counter[str]()
    for part in parts:
        sizes[part.target] += math.prod(part.shape if part.layer is None else part.shape[1:])
    ours = {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
    others = sorted(name for name in ours.keys() | sizes.keys() if ours.get(name) != sizes.get(name))
    if others:
        raise UserError(
            f"No official model has such a {others[0]}: they have attention in all blocks, no biases, and in those of "
            "the suffix a fast and a static MLP, equally wide, in turn; change the settings that say otherwise."
        )


def _same(weight: Tensor) -> Tensor:
    return weight


def _turned(weight: Tensor) -> Tensor:
    return weight.T


def _halves(rows: Tensor, head_width: int) -> Tensor:
    """Rows of neighbouring rotary pairs, reordered head by head to the pairs (i, i + K/2)."""
    heads = rows.unflatten(0, (-1, head_width))
    return torch.cat((heads[:, 0::2], heads[:, 1::2]), 1).flatten(0, 1)


# -- a checkpoint as a model folder ------------------------------------------------------------------------------------


class Converted(NamedTuple):
    """What was converted: the step's folder, its number of parameters, and what the weights are kept in."""

    step: Path
    parameters: int
    dtype: str


def convert_from_official(
    folder: Path,
    out: Path,
    *,
    step: int | None = None,
    preset_name: str | None = None,
    settings: Sequence[str] = (),
    tokenizer: str | None = None,
    progress: bool = False,
) -> Converted:
    """Write the model folder `out` from a checkpoint of the official trainer.

    folder: of a step, or of steps, of which the last complete one is taken unless `step` names another. preset_name and
    settings ("NAME=VALUE"): see `official_config`. tokenizer: what made the training tokens, as for
    `Tokenizer.load`; it is put into the folder. progress: show a bar.

    Weights stay in bfloat16 if all of them are, else they are float32. The optimiser's state is left alone. At any time
    about one layer of one array is in memory; of arrays that were stored in one piece, that piece.

    Raises UserError if `out` exists, if the checkpoint is missing, incomplete, damaged or of another shape, if the
    configuration is not known, or if tensorstore is not installed.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already; name a folder that does not.")
    found = find_step(folder, WEIGHTS_ITEM, step)
    arrays = stored_arrays(found / WEIGHTS_ITEM)
    shapes = {name: array.shape for name, array in arrays.items()}
    config = official_config(shapes, preset_name, settings)
    parts = official_parts(config)
    require_shapes(shapes, parts, config)
    tokens = None if tokenizer is None else Tokenizer.load(tokenizer)
    if tokens is not None and tokens.vocab_size != config.vocab_size:
        raise UserError(
            f"The tokenizer {tokenizer} has {tokens.vocab_size} tokens, the checkpoint's vocabulary "
            f"{config.vocab_size}; name the one that made its training tokens."
        )
    halved = all(array.dtype == "bfloat16" for array in arrays.values())
    dtype = torch.bfloat16 if halved else torch.float32
    notes = {"from": "a checkpoint of the official implementation", "step": found.name, "preset": preset_name}
    with model_folder(out, config, dtype, notes) as (part_folder, put):
        bar = tqdm(total=len(parts), unit="array", disable=not progress)
        for source, pieces in itertools.groupby(parts, key=lambda part: part.source):
            read = arrays[source].open()
            for part in pieces:
                put(part.target, part.row, part.change(read(part.layer)))
                bar.update()
        bar.close()
        if tokens is not None:
            tokens.save(part_folder / TOKENIZER)
    count = sum(int(np.prod(shape)) for shape in parameter_shapes(config).values())
    return Converted(found, count, str(dtype).removeprefix("torch."))


def official_config(
    shapes: Mapping[str, tuple[int, ...]], preset_name: str | None, settings: Sequence[str]
) -> ModelConfig:
    """The configuration of a checkpoint with arrays of these shapes.

    They tell vocabulary, widths, layers, heads, suffix and whether the head is tied. The rest is that of the preset,
    changed by `settings`; without a preset these must name what a checkpoint does not say and released models differ
    in: pattern, rope_theta and, where it has them, window and mini_batch. What they do not name is as released: rms
    norms everywhere, inner_lr 1, inner_clip 1, norm_eps 1e-6.

    Raises UserError if something is missing or contradicts the shapes.
    """
    told = _told_by(shapes)
    if preset_name is not None:
        base = preset(preset_name)
    else:
        named = dict(setting.removeprefix("model.").partition("=")[::2] for setting in settings)
        needed = ["pattern", "rope_theta"]
        needed += ["window"] if "window" in named.get("pattern", "window") else []
        needed += ["mini_batch"] if told["suffix_layers"] else []
        missing = [name for name in needed if name not in named]
        if missing:
            raise UserError(
                f"The checkpoint does not say {', '.join(missing)}: name a preset with --preset, or give them as "
                "NAME=VALUE, such as pattern=window rope_theta=500000 window=8192 mini_batch=1024."
            )
        base = RunConfig(ModelConfig(**told, mini_batch_size=1024 if told["suffix_layers"] else None))
    config = override(base, list(settings))
    model = config.model
    if config.train != base.train:
        raise UserError("A model folder has no training settings; leave those of train out.")
    differing = [name for name, value in told.items() if getattr(model, name) != value]
    if differing:
        ours = ", ".join(f"{name} {told[name]}" for name in differing)
        theirs = ", ".join(str(getattr(model, name)) for name in differing)
        raise UserError(
            f"The checkpoint has {ours}, where the configuration has {theirs}; name another preset or other values."
        )
    return model


def _told_by(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of `ModelConfig` that the arrays' shapes tell."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in shapes:
            raise UserError(f"The checkpoint has no {name!r}; it is none of the official implementation.")
        if len(shapes[name]) != axes:
            raise UserError(f"{name!r} has shape {shapes[name]}; the official implementation's has {axes} axes.")
        return shapes[name]

    vocab_size, width = shape(_EMBEDDING, 2)
    layers, _, mlp_width = shape(_MLP + "w1.weight", 3)
    _, head_width = shape(_MIXER + "q_norm.weight", 2)
    prime = _FAST + "w1.weight"
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // head_width,
        "intermediate_size": mlp_width,
        "suffix_layers": shape(prime, 3)[0] if prime in shapes else 0,
        "tie_word_embeddings": _HEAD not in shapes,
    }
