"""Pretrained Transformers, converted into models that learn while they read.

They are Hugging Face checkpoints, or GGUF files, which `checkpoints` gives the same form.

Layouts differ only in that query, key and value are one matrix here, and so are gate and value of an MLP. Rotary pairs
are (i, i + K/2) in both, if all of a head turns. What a family multiplies by is folded into weights (`hf_config` has
the families). Neither of the two kinds of fast MLPs changes a prediction before the first update:

- "new": an MLP whose second matrix is zero, in front of the static one. The gradient of its first matrix is a multiple
  of the second, so the first inner step changes the second matrix only; from then on both learn.
- "split": the first hidden units of the pretrained MLP, whose other units stay static. Any units would do: their order
  has no meaning.

A window that is shorter than what the original sees would slide off the first token of a text, on which pretrained
attention relies: its layers get sinks in place of it, measured on a text (`calibration`).

With a `fast_rank`, what learns is an addition to the fast MLP, the second factor of which begins at zero. Tensors are
converted in blocks, so memory does not grow with the model.
"""

import hashlib
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ttt_e2e.config.schema import ModelConfig, replace
from ttt_e2e.convert.calibration import TEXT, SinkLosses, calibrate_sinks, calibration_ids
from ttt_e2e.convert.checkpoints import Checkpoint, open_checkpoint
from ttt_e2e.convert.hf_config import FAMILIES
from ttt_e2e.convert.hf_files import CONFIG
from ttt_e2e.convert.learning import LearningOptions, SourceModel, config_from_source
from ttt_e2e.convert.model_folder import model_folder, require_shapes
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.model.block import FastMLP
from ttt_e2e.model.checkpoint import TOKENIZER, copy_pretrained_metadata, finite
from ttt_e2e.model.cost import parameters
from ttt_e2e.model.transformer import parameter_shapes
from ttt_e2e.progress import ProgressBar

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BLOCK = 1 << 23  # numbers that are read at once
_SEED = 0  # of new fast MLPs and factors
_ALL = slice(None)
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class SliceCopy(NamedTuple):
    """A slice of a stored tensor that becomes rows of a parameter."""

    source: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    target: str
    target_row: int = 0
    rows: slice = _ALL
    columns: slice = _ALL
    factor: float = 1.0
    """What it is multiplied by."""
    offset: float = 0.0
    """What is added to it before."""


class HFConversion(NamedTuple):
    """The result of `convert_from_hf`."""

    config: ModelConfig
    family: str
    parameters: int
    dtype: str
    """Of the weights in the file."""
    has_tokenizer: bool
    unused_ids: int
    """Rows of the embedding that belong to no token of the tokenizer and were left out."""
    sink_losses: SinkLosses | None
    """What the sinks are worth on the calibration text; None if that was not measured."""


def convert_from_hf(
    path_or_name: str | Path,
    out: Path,
    options: LearningOptions = LearningOptions(),  # noqa: B008 - immutable
    *,
    calibration_text: Path | None = None,
    given: Mapping[str, Tensor] | None = None,
    added: Mapping[str, Tensor] | None = None,
    dtype: str | None = None,
    progress: bool = False,
) -> HFConversion:
    """Convert a pretrained model to the model folder `out`, with its tokenizer and pretrained metadata.

    Args:
        path_or_name: a Hugging Face checkpoint's folder or its name there, or a GGUF file.
        out: the folder to write.
        options: how the model is to learn.
        given: parameters by name that take the place of converted ones; with sinks among them, nothing is calibrated.
        added: what is added to converted parameters, by name.
        calibration_text: what the sinks are measured on; None: a text that comes with the package.
        dtype: of the weights in the file, "float32" or "bfloat16". None: bfloat16 if all weights are and none
            has to be rounded, else float32.
        progress: show a progress bar.

    Raises:
        UserError: if `out` exists, for a checkpoint that is missing, incomplete or not supported, and for a calibration
            text that is shorter than the window.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists; name another folder for the model, or remove it first.")
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"Weights are written as {' or '.join(_DTYPES)}, not {dtype}.")
    with open_checkpoint(path_or_name) as checkpoint:
        text = calibration_text or TEXT
        return _convert(checkpoint, str(path_or_name), out, options, text, given or {}, added or {}, dtype, progress)


def _convert(
    checkpoint: Checkpoint,
    name: str,
    out: Path,
    options: LearningOptions,
    calibration_text: Path,
    given: Mapping[str, Tensor],
    added: Mapping[str, Tensor],
    dtype: str | None,
    progress: bool,
) -> HFConversion:
    where, source, stored, folder = checkpoint
    tokenizer = Tokenizer.load(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else None
    vocab_size = source.settings["vocab_size"]
    if tokenizer is not None:
        tokenizer.leave_out(vocab_size)
    tokens = vocab_size if tokenizer is None else tokenizer.vocab_size
    if tokens > vocab_size:
        raise UserError(
            f"The tokenizer in {where} has {tokens} tokens, but its model has a vocabulary of {vocab_size}; use the "
            "tokenizer that belongs to the model."
        )
    source.settings["vocab_size"] = tokens
    unused_ids = vocab_size - tokens  # embeddings are often rounded up to a size that suits a GPU
    config = config_from_source(source, options)
    has_sinks, ids_T = any(name.endswith(".sink_logit") for name in given), None
    if config.attention_sink and not has_sinks:
        if tokenizer is None:
            config = replace(config, {"attention_sink": False})
        else:
            ids_T = calibration_ids(tokenizer, calibration_text, config.sliding_window)
    copies = list(_slice_copies(config, source, unused_ids))
    _check_tensors(checkpoint, copies)
    copies = [copy for copy in copies if copy.target not in given]
    # Norms of 1 + weight would be rounded in bfloat16, and take next to no space.
    has_sums = FAMILIES[source.family].norm_offset != 0
    wide = {copy.target for copy in copies if has_sums and "norm" in copy.target}
    if dtype is None:
        others = [copy for copy in copies if copy.target not in wide]
        is_exact = not added and all(
            stored[copy.source].dtype == "BF16" and _is_power_of_two(copy.factor) for copy in others
        )
        dtype = "bfloat16" if is_exact else "float32"
    notes = {
        "source": name,
        "source_family": source.family,
        "source_config_sha256": hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest(),
        "fast": options.fast,
    }
    losses = None
    with model_folder(out, config, _DTYPES[dtype], notes, wide) as (part, write_rows, read):
        for copy in ProgressBar(copies, "converting", disable=not progress, leave=False):
            for rows in _row_blocks(copy.shape, copy.rows):
                row = copy.target_row + rows.start - (copy.rows.start or 0)
                weights = stored[copy.source].read(rows, copy.columns)
                if copy.factor != 1 or copy.offset:
                    weights = copy.factor * (weights.float() + copy.offset)
                if copy.target in added:
                    weights = weights.float() + added[copy.target][row : row + len(weights)]
                kept = torch.float32 if copy.target in wide else _DTYPES[dtype]
                write_rows(copy.target, row, finite(weights, kept, copy.source, f"The checkpoint {where}"))
        for parameter, row, values in _new_parameters(config, options.fast == "new"):
            if parameter not in given:
                write_rows(parameter, row, values)
        if ids_T is not None:
            context, short = source.max_context, source.short_rope
            if config.rope_scaling == short:
                context = min(context, short.original_max_position_embeddings or context)
            sinks, losses = calibrate_sinks(config, read, ids_T, context, source.trained_windows, progress)
            given = {**sinks, **given}
        for parameter, values in given.items():
            write_rows(parameter, 0, values)
        if tokenizer is not None:
            shutil.copyfile(folder / TOKENIZER, part / TOKENIZER)
        copy_pretrained_metadata(folder, part)
    return HFConversion(config, source.family, parameters(config), dtype, tokenizer is not None, unused_ids, losses)


def _slice_copies(config: ModelConfig, source: SourceModel, unused_ids: int) -> Iterator[SliceCopy]:
    """Where all parameters come from, except for what is new in the fast MLPs."""
    factors, family, offset = source.factors, FAMILIES[source.family], source.norm_offset
    vocab, width, hidden = config.vocab_size, config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    stored_vocab = vocab + unused_ids
    in_vocab, tokens = (stored_vocab, width), slice(vocab)
    yield SliceCopy(_EMBEDDING, in_vocab, "embedding", rows=tokens, factor=factors.embedding)
    yield SliceCopy("model.norm.weight", (width,), "final_norm.weight", offset=offset)
    if not config.tie_word_embeddings:
        head = _EMBEDDING if source.has_tied_head else _HEAD
        yield SliceCopy(head, in_vocab, "head", rows=tokens, factor=factors.head)
    for i in range(config.num_hidden_layers):
        block, layer = f"blocks.{i}", f"model.layers.{i}"
        attention = f"{layer}.self_attn"
        for name, norm in family.norms.items():
            yield SliceCopy(f"{layer}.{name}.weight", (width,), f"{block}.{norm}.weight", offset=offset)
        for name, row, count in (("q_proj", 0, queries), ("k_proj", queries, keys), ("v_proj", queries + keys, keys)):
            factor = factors.query if name == "q_proj" and not config.qk_norm else 1.0
            stored, length, first = f"{attention}.{name}", count, 0
            if family.is_fused:
                stored, length, first = f"{attention}.qkv_proj", queries + 2 * keys, row
            for start, stop, own in [(0, count, 1.0)] if name == "v_proj" else _turned_rows(config, count):
                rows, own = slice(first + start, first + stop), own * factor
                yield SliceCopy(f"{stored}.weight", (length, width), f"{block}.mixer.w_qkv", row, rows, factor=own)
                if config.attention_bias:
                    yield SliceCopy(f"{stored}.bias", (length,), f"{block}.mixer.b_qkv", row, rows, factor=own)
                row += stop - start
        out, factor = f"{attention}.o_proj", factors.residual
        yield SliceCopy(f"{out}.weight", (width, queries), f"{block}.mixer.w_out", factor=factor)
        if config.attention_out_bias:
            yield SliceCopy(f"{out}.bias", (width,), f"{block}.mixer.b_out", factor=factor)
        if config.qk_norm:
            for name, count in (("q_norm", queries), ("k_norm", keys)):
                length = count if config.qk_norm_joint else config.head_dim
                stored, own = f"{attention}.{name}.weight", factors.query if name == "q_norm" else 1.0
                yield SliceCopy(stored, (length,), f"{block}.mixer.{name}", factor=own, offset=offset)
        in_suffix = i >= config.prefix_layers
        fast_units = config.fast_intermediate_size if in_suffix and config.parallel_mlp else 0
        parts = {"mlp": (fast_units, hidden)}
        if fast_units:
            parts["fast"] = (0, fast_units)
        for part, (start, stop) in parts.items():  # rows of gate and value, columns of the second matrix
            for j, name in enumerate(("gate_proj", "up_proj")):
                stored, length, rows = f"{layer}.mlp.{name}.weight", hidden, slice(start, stop)
                if family.is_fused:
                    stored, length = f"{layer}.mlp.gate_up_proj.weight", 2 * hidden
                    rows = slice(j * hidden + start, j * hidden + stop)
                yield SliceCopy(stored, (length, width), f"{block}.{part}.w_in", j * (stop - start), rows)
            down, units = f"{layer}.mlp.down_proj.weight", slice(start, stop)
            yield SliceCopy(down, (width, hidden), f"{block}.{part}.w_out", columns=units, factor=factor)
        if in_suffix and not fast_units:
            # A new fast MLP reads the same residual stream as the MLP after it, so the pretrained norm suits it, too.
            stored = f"{layer}.post_attention_layernorm.weight"
            yield SliceCopy(stored, (width,), f"{block}.fast_norm.weight", offset=offset)


def _turned_rows(config: ModelConfig, count: int) -> Iterator[tuple[int, int, float]]:
    """Where `count` rows of queries or keys come from, in their order here: start, end and factor of every piece.

    If all of a head turns, rows stay where they are. Else the first 2 r rows of a head turn there, in pairs (i, i + r),
    and the others are not multiplied by the attention factor. Here all rows are pairs (i, i + K/2), of which the first
    r turn, and all are multiplied.
    """
    factors, half = config.rope_scaling.pair_factors, config.head_dim // 2
    r = sum(factor > 0 for factor in factors)
    if r == len(factors):
        yield 0, count, 1.0
        return
    still = 1 / config.rope_scaling.attention_factor
    for i in range(0, count, config.head_dim):
        yield i, i + r, 1.0
        yield i + 2 * r, i + r + half, still
        yield i + r, i + 2 * r, 1.0
        yield i + r + half, i + 2 * half, still


def _is_power_of_two(factor: float) -> bool:
    """Whether a product with it has the digits of the other factor."""
    return math.frexp(factor)[0] == 0.5


def _check_tensors(checkpoint: Checkpoint, copies: list[SliceCopy]) -> None:
    """Raise UserError unless the checkpoint has the tensors that its configuration requires, and no others."""
    where, stored = checkpoint.path, checkpoint.tensors
    found = {name: tensor.shape for name, tensor in stored.items()}
    unknown = require_shapes(found, {copy.source: copy.shape for copy in copies}, f"The checkpoint {where}")
    # Old checkpoints of Llama hold the rotary rates, too.
    unknown = [name for name in unknown if not name.endswith(".rotary_emb.inv_freq")]
    if checkpoint.source.has_tied_head and _HEAD in unknown:
        unknown.remove(_HEAD)
        head, embedding = stored[_HEAD], stored[_EMBEDDING]
        blocks = _row_blocks(embedding.shape, _ALL)
        pairs = ((head.read(rows).float(), embedding.read(rows).float()) for rows in blocks)
        if head.shape != embedding.shape or not all(torch.equal(*pair) for pair in pairs):
            raise UserError(
                f"{where / CONFIG} says that the output head is the embedding, but the checkpoint has another one; "
                "set tie_word_embeddings to false there if that is how it was trained."
            )
    if unknown:
        raise UserError(
            f"The checkpoint {where} has tensors that its configuration does not explain, such as {unknown[0]}; "
            "use a checkpoint and a configuration that belong together."
        )


def _row_blocks(shape: tuple[int, ...], rows: slice) -> Iterator[slice]:
    """Cut `rows` of a tensor into slices of about `_BLOCK` numbers."""
    start, stop, _ = rows.indices(shape[0])
    step = max(1, _BLOCK // math.prod(shape[1:]))
    return (slice(row, min(row + step, stop)) for row in range(start, stop, step))


def _new_parameters(config: ModelConfig, has_new_mlps: bool) -> Iterator[tuple[str, int, Tensor]]:
    """Rows of new fast MLPs, which add nothing yet; of additions to fast MLPs, and of rates, as in a new model."""
    for_mlps, for_factors = torch.Generator().manual_seed(_SEED), torch.Generator().manual_seed(_SEED)
    shapes = parameter_shapes(config)
    for i in range(config.prefix_layers, config.num_hidden_layers):
        fast = f"blocks.{i}.fast"
        for name, std in ((f"{fast}.w_in", config.initializer_range), (f"{fast}.w_out", 0.0)) if has_new_mlps else ():
            for rows in _row_blocks(shapes[name], _ALL):
                values = torch.zeros(rows.stop - rows.start, shapes[name][1])
                yield name, rows.start, values.normal_(0.0, std, generator=for_mlps) if std else values
        if config.fast_rank is not None:
            # Its matrices are allocated, but never touched.
            mlp = FastMLP(config.hidden_size, config.fast_intermediate_size, config.fast_rank, config.hidden_act)
            mlp.reset_factors(for_factors)
            for name, factor in mlp.named_parameters():
                if name not in ("w_in", "w_out"):
                    yield f"{fast}.{name}", 0, factor.detach()
        if (name := f"blocks.{i}.log_lr_scale") in shapes:
            yield name, 0, torch.zeros(shapes[name])


def describe(done: HFConversion) -> list[str]:
    """What to tell the user about a conversion, a sentence a line."""
    config = done.config
    rank = "" if config.fast_rank is None else f", additions of rank {config.fast_rank}"
    rank += ", at rates that training learns" if config.inner_loop.learned_lr else ""
    lines = [
        f"{done.family}: {config.num_hidden_layers} blocks, {done.parameters:,} parameters in {done.dtype}",
        f"learns in its last {config.suffix_layers}, with {config.fast_intermediate_size} hidden units each{rank}",
        f"window {config.sliding_window}, mini-batch {config.mini_batch_size}",
    ]
    if done.sink_losses is not None:
        full, without, with_sink = done.sink_losses
        lines.append(
            f"sinks: past the window {with_sink:.3f} nats per token on the calibration text, without them "
            f"{without:.3f}, with full attention {full:.3f}"
        )
    if done.unused_ids:
        lines.append(f"{done.unused_ids} ids that belong to no token of the tokenizer were left out of the vocabulary")
    if not done.has_tokenizer:
        lines.append("the checkpoint has no tokenizer.json; to read texts, put one beside it and convert again")
    return lines
