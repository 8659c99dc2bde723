"""Checkpoints of the official JAX implementation: how their arrays map to our parameters, and their conversion.

There, linear weights are [in, out] and stacked over layers, and rotary pairs are neighbours (2i, 2i + 1). Here, linear
weights are [out, in], with query, key and value (and gate and value) in one matrix, and rotary pairs are (i, i + K/2).
The mapping is linear and one to one, so it can also be used for gradients and optimizer moments.

Source: the repository test-time-training/e2e, commit a4fc478. Checkpoints of its trainer hold the weights, the
optimizer's state and the position in the data, but no configuration.
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

from ttt_e2e.config.parse import override
from ttt_e2e.config.presets import preset
from ttt_e2e.config.schema import ModelConfig, RunConfig
from ttt_e2e.convert.model_folder import Shapes, model_folder, require_shapes
from ttt_e2e.convert.orbax import find_step, stored_arrays
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.model.checkpoint import TOKENIZER, finite
from ttt_e2e.model.cost import parameters
from ttt_e2e.model.transformer import parameter_shapes
from ttt_e2e.progress import ProgressBar

WEIGHTS_ITEM = "model_weights"
_HEAD = "language_model.lm_head.weight"
_MODEL = "language_model.model."
_EMBEDDING = _MODEL + "wte.weight"
_BLOCKS = _MODEL + "h.blocks."
_MIXER = _BLOCKS + "seq_modeling_block."
_MLP = _BLOCKS + "feed_forward."
_PRIME = _MODEL + "h.prime_storage."
_FAST = _PRIME + "feed_forward_prime."


class ArrayCopy(NamedTuple):
    """An official array, or a layer of it, and the rows of our parameter that it becomes."""

    source: str
    shape: tuple[int, ...]
    """Of the whole array."""
    layer: int | None
    """Index on the first axis; None: the whole array."""
    target: str
    target_row: int = 0
    transform: Callable[[Tensor], Tensor] = lambda weight: weight


def _array_copies(config: ModelConfig) -> list[ArrayCopy]:
    """How the official arrays make up the model `config`; the copies of an array are next to each other."""
    layers, suffix, head_dim = config.num_hidden_layers, config.suffix_layers, config.head_dim
    vocab, width, hidden = config.vocab_size, config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    final_norm = ArrayCopy(_MODEL + "ln_f.weight", (width,), None, "final_norm.weight")
    copies = [ArrayCopy(_EMBEDDING, (vocab, width), None, "embedding"), final_norm]
    if not config.tie_word_embeddings:
        copies.append(ArrayCopy(_HEAD, (width, vocab), None, "head", 0, torch.t))

    def stacked(source: str, shape: tuple[int, ...], target: str, *row_and_transform: Any, count: int = layers) -> None:
        """Add an array that is stacked over the last `count` layers."""
        for i in range(count):
            target_name = f"blocks.{layers - count + i}.{target}"
            copies.append(ArrayCopy(f"{source}.weight", (count, *shape), i, target_name, *row_and_transform))

    def split_pairs(rows: Tensor) -> Tensor:
        """Reorder rows, head by head, from rotary pairs (2i, 2i + 1) to (i, i + K/2)."""
        heads = rows.unflatten(0, (-1, head_dim))
        return torch.cat((heads[:, 0::2], heads[:, 1::2]), 1).flatten(0, 1)

    stacked(_MIXER + "wq", (width, queries), "mixer.w_qkv", 0, lambda weight: split_pairs(weight.T))
    stacked(_MIXER + "wk", (width, keys), "mixer.w_qkv", queries, lambda weight: split_pairs(weight.T))
    stacked(_MIXER + "wv", (width, keys), "mixer.w_qkv", queries + keys, torch.t)
    stacked(_MIXER + "wo", (queries, width), "mixer.w_out", 0, torch.t)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            stacked(_MIXER + name, (head_dim,), f"mixer.{name}", 0, split_pairs)
    for source, target, count in ((_MLP, "mlp", layers), (_FAST, "fast", suffix)):
        stacked(source + "w1", (width, hidden), f"{target}.w_in", 0, torch.t, count=count)
        stacked(source + "w3", (width, hidden), f"{target}.w_in", hidden, torch.t, count=count)
        stacked(source + "w2", (hidden, width), f"{target}.w_out", 0, torch.t, count=count)
    for wanted, post in ((config.pre_norm, ""), (config.post_norm, "post_")):
        if wanted:
            stacked(f"{_BLOCKS}seq_{post}norm", (width,), f"mixer_{post}norm.weight")
            stacked(f"{_BLOCKS}ffn_{post}norm", (width,), f"mlp_{post}norm.weight")
            stacked(f"{_PRIME}ffn_prime_{post}norm", (width,), f"fast_{post}norm.weight", count=suffix)
    return copies


def state_dict_from_official(arrays: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict from official arrays of any floating dtype. Raises UserError for arrays that do not fit `config`.

    arrays: by name, such as "language_model.model.wte.weight" [V, D]; what stands before "language_model" is ignored.
    Arrays of layers are stacked on their first axis.
    """
    named = {name[name.find("language_model") :]: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    copies = _array_copies(config)
    _check_arrays({name: tuple(array.shape) for name, array in named.items()}, copies, config)
    rows: dict[str, list[Tensor]] = {}
    for copy in sorted(copies, key=lambda copy: copy.target_row):
        array = named[copy.source]
        rows.setdefault(copy.target, []).append(copy.transform(array if copy.layer is None else array[copy.layer]))
    return {name: torch.cat(parts).contiguous() for name, parts in rows.items()}


def _check_arrays(found: Shapes, copies: Sequence[ArrayCopy], config: ModelConfig) -> None:
    """Raise UserError unless the arrays whose shapes were `found` are those of the model `config`."""
    expected = {copy.source: copy.shape for copy in copies}
    unknown = require_shapes(found, expected, "The official checkpoint")
    if not (config.pre_norm and config.post_norm and config.qk_norm):
        # The official model also has the weights of norms that are switched off.
        norms = (name for name in unknown if name.startswith((_BLOCKS, _PRIME)) and name.endswith("norm.weight"))
        unknown = sorted({*unknown} - {*norms})
    if unknown:
        raise UserError(f"The official checkpoint has unknown parameters: {', '.join(unknown)}.")
    sizes = Counter({name: -math.prod(shape) for name, shape in parameter_shapes(config).items()})
    for copy in copies:
        sizes[copy.target] += math.prod(copy.shape if copy.layer is None else copy.shape[1:])
    differing = sorted(name for name, difference in sizes.items() if difference)
    if differing:
        raise UserError(
            f"No official model has such a {differing[0]}: all blocks have attention without biases, and in the suffix "
            "a fast and then a static MLP of the same width; change the settings that say otherwise."
        )


class OfficialConversion(NamedTuple):
    """The result of `convert_from_official`."""

    step: Path
    """Folder of the step that was converted."""
    parameters: int
    dtype: str
    """Of the weights in the file."""


def convert_from_official(
    folder: Path,
    out: Path,
    *,
    step: int | None = None,
    preset_name: str | None = None,
    settings: Sequence[str] = (),
    tokenizer: str | None = None,
    progress: bool = False,
) -> OfficialConversion:
    """Convert the weights in a checkpoint of the official trainer to the model folder `out`.

    They are written in bfloat16 if all of them are, else in float32. About a layer of an array is in memory at a time,
    or a whole chunk of arrays that are stored in chunks of several layers.

    Args:
        folder: of a step, or of several steps.
        out: the folder to write.
        step: which of several; None: the last complete one.
        preset_name, settings: see `official_config`.
        tokenizer: the tokenizer of the training tokens, as for `Tokenizer.load`; it is copied into `out`.
        progress: show a progress bar.

    Raises:
        UserError: if `out` exists, settings are missing, or the checkpoint is incomplete, damaged or of another shape.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists; name another folder for the model, or remove it first.")
    found = find_step(folder, WEIGHTS_ITEM, step)
    arrays = stored_arrays(found / WEIGHTS_ITEM)
    shapes = {name: array.store.shape for name, array in arrays.items()}
    config = official_config(shapes, preset_name, settings)
    copies = _array_copies(config)
    _check_arrays(shapes, copies, config)
    loaded = None if tokenizer is None else Tokenizer.load(tokenizer)
    if loaded is not None and loaded.vocab_size != config.vocab_size:
        raise UserError(
            f"The tokenizer {tokenizer} has {loaded.vocab_size} tokens, but the checkpoint has a vocabulary of "
            f"{config.vocab_size}; name the tokenizer of its training tokens."
        )
    dtype = torch.bfloat16 if all(array.store.dtype.name == "bfloat16" for array in arrays.values()) else torch.float32
    notes = {"from": "a checkpoint of the official implementation", "step": found.name, "preset": preset_name}
    with model_folder(out, config, dtype, notes) as (part, write_rows, _):
        bar = ProgressBar(copies, unit="array", disable=not progress)
        for (source, is_stacked), group in itertools.groupby(bar, lambda copy: (copy.source, copy.layer is not None)):
            for copy, values in zip(group, arrays[source].read(is_stacked), strict=True):
                weights = finite(values, dtype, source, f"The checkpoint {found}")
                write_rows(copy.target, copy.target_row, copy.transform(weights))
        if loaded is not None:
            loaded.save(part / TOKENIZER)
    return OfficialConversion(found, parameters(config), str(dtype).removeprefix("torch."))


def official_config(shapes: Shapes, preset_name: str | None, settings: Sequence[str]) -> ModelConfig:
    """The configuration of a checkpoint whose arrays have the given `shapes`, by name.

    The shapes determine vocabulary, widths, layers, heads, suffix and whether the head is tied. All other settings are
    those of the preset, changed by `settings` ("NAME=VALUE"). Without a preset, `settings` must include those that
    differ between the released models: pattern, rope_theta and, where they apply, sliding_window and mini_batch_size.
    """
    from_shapes = _settings_from_shapes(shapes)
    if preset_name is not None:
        base = preset(preset_name)
    else:
        named = dict(setting.removeprefix("model.").partition("=")[::2] for setting in settings)
        needed = ["pattern", "rope_theta"]
        needed += ["sliding_window"] if "window" in named.get("pattern", "window") else []
        needed += ["mini_batch_size"] if from_shapes["suffix_layers"] else []
        missing = [name for name in needed if name not in named]
        if missing:
            raise UserError(
                f"The checkpoint does not tell {', '.join(missing)}: name a preset with --preset, or give them as "
                "NAME=VALUE, such as pattern=window rope_theta=500000 sliding_window=8192 mini_batch_size=1024."
            )
        base = RunConfig(ModelConfig(**from_shapes, mini_batch_size=1024 if from_shapes["suffix_layers"] else None))
    config = override(base, list(settings))
    model = config.model
    if config.train != base.train:
        raise UserError("A model folder has no settings of training; leave out those that begin with train.")
    differing = [name for name, value in from_shapes.items() if getattr(model, name) != value]
    if differing:
        found = ", ".join(f"{name} {from_shapes[name]}" for name in differing)
        ours = ", ".join(str(getattr(model, name)) for name in differing)
        raise UserError(f"The checkpoint has {found}, where the configuration has {ours}; change the preset or values.")
    return model


def _settings_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """The settings of `ModelConfig` that follow from the arrays' shapes."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != axes:
            raise UserError(f"There is no {name!r} with {axes} axes; give a checkpoint of the official implementation.")
        return shapes[name]

    vocab_size, hidden_size = shape(_EMBEDDING, 2)
    layers, _, intermediate_size = shape(_MLP + "w1.weight", 3)
    _, head_dim = shape(_MIXER + "q_norm.weight", 2)
    fast = _FAST + "w1.weight"
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // head_dim,
        "intermediate_size": intermediate_size,
        "suffix_layers": shape(fast, 3)[0] if fast in shapes else 0,
        "tie_word_embeddings": _HEAD not in shapes,
    }
