"""Pretrained Transformers from Hugging Face checkpoints, converted into models that learn while they read.

Layouts differ only in that query, key and value are one matrix here, and so are gate and value of an MLP. Rotary pairs
are (i, i + K/2) in both. Fast MLPs are made in one of two ways, neither of which changes a prediction before the first
update:

- "new": an MLP whose second matrix is zero, in front of the static one. The gradient of its first matrix is a multiple
  of the second, so the first inner step changes the second matrix only; from then on both learn.
- "split": the first hidden units of the pretrained MLP, whose other units stay static. Any units would do: their order
  has no meaning.

With a `fast_rank`, what learns is an addition to the fast MLP, the second factor of which begins at zero.

Tensors are read in blocks that are written at once, so memory does not grow with the model.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.convert.hf_config import read_source
from ttt_e2e.convert.hf_files import CONFIG, StoredTensor, find_checkpoint, stored_tensors
from ttt_e2e.convert.learning import LearningOptions, config_from_source
from ttt_e2e.convert.model_folder import WriteRows, model_folder, parameter_shapes
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.files import read_json
from ttt_e2e.model.checkpoint import TOKENIZER, copy_pretrained_metadata
from ttt_e2e.model.cost import parameters
from ttt_e2e.model.transformer import FastMLP

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BLOCK = 1 << 23  # numbers that are read at once
_SEED = 0  # of new fast MLPs and factors
_ALL = slice(None)


class SliceCopy(NamedTuple):
    """A slice of a stored tensor that becomes rows of a parameter."""

    target: str
    target_row: int
    source: str
    rows: slice = _ALL
    columns: slice = _ALL


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


def convert_from_hf(
    path_or_name: str | Path,
    out: Path,
    options: LearningOptions = LearningOptions(),  # noqa: B008 - immutable
    *,
    dtype: str | None = None,
    progress: bool = False,
) -> HFConversion:
    """Convert a Hugging Face checkpoint to the model folder `out`, with its tokenizer and pretrained metadata.

    Args:
        path_or_name: the checkpoint's folder, or its name on Hugging Face.
        out: the folder to write.
        options: how the model is to learn.
        dtype: of the weights in the file, "float32" or "bfloat16". None: bfloat16 if the whole checkpoint is, else
            float32.
        progress: show a progress bar.

    Raises:
        UserError: if `out` exists, and for a checkpoint that is missing, incomplete, not supported or has tensors of
            other shapes than its configuration says. `out` is then not written.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists; name another folder for the model, or remove it first.")
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"Weights are written as {' or '.join(_DTYPES)}, not {dtype}.")
    folder = find_checkpoint(path_or_name)
    source = read_source(read_json(folder / CONFIG), folder / CONFIG)
    tokenizer = Tokenizer.load(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else None
    unused_ids = _count_unused_ids(tokenizer, source.settings["vocab_size"], folder)
    source.settings["vocab_size"] -= unused_ids
    config = config_from_source(source, options)
    stored = stored_tensors(folder)
    copies = list(_slice_copies(config))
    _check_tensors(stored, config, unused_ids, folder)
    if dtype is None:
        dtype = "bfloat16" if {stored[copy.source].dtype for copy in copies} == {"BF16"} else "float32"
    notes = {
        "source": str(path_or_name),
        "source_family": source.family,
        "source_config_sha256": hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest(),
        "fast": options.fast,
    }
    with model_folder(out, config, _DTYPES[dtype], notes) as (part, write_rows):
        for copy in tqdm(copies, "converting", disable=not progress, leave=False):
            for row, rows in _read_blocks(stored[copy.source], copy):
                write_rows(copy.target, row, rows)
        if options.fast == "new":
            _write_new_fast_mlps(config, write_rows)
        if config.fast_rank is not None:
            _write_factors(config, write_rows)
        if tokenizer is not None:
            shutil.copyfile(folder / TOKENIZER, part / TOKENIZER)
        copy_pretrained_metadata(folder, part)
    return HFConversion(config, source.family, parameters(config), dtype, tokenizer is not None, unused_ids)


def _count_unused_ids(tokenizer: Tokenizer | None, vocab_size: int, folder: Path) -> int:
    """How many of the last ids belong to no token: embeddings are often rounded up to a size that suits a GPU."""
    if tokenizer is None:
        return 0
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"The tokenizer in {folder} has {tokenizer.vocab_size} tokens, but its model has a vocabulary of "
            f"{vocab_size}; use the tokenizer that belongs to the model."
        )
    return vocab_size - tokenizer.vocab_size


# -- which tensor goes where -------------------------------------------------------------------------------------------


def _slice_copies(config: ModelConfig) -> Iterator[SliceCopy]:
    """Where all parameters come from, except for what is new in the fast MLPs."""
    yield SliceCopy("embedding", 0, "model.embed_tokens.weight", slice(config.vocab_size))
    yield SliceCopy("final_norm.weight", 0, "model.norm.weight")
    if not config.tie_word_embeddings:
        yield SliceCopy("head", 0, "lm_head.weight", slice(config.vocab_size))
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for i in range(config.num_hidden_layers):
        block, layer = f"blocks.{i}", f"model.layers.{i}"
        yield SliceCopy(f"{block}.mixer_norm.weight", 0, f"{layer}.input_layernorm.weight")
        yield SliceCopy(f"{block}.mlp_norm.weight", 0, f"{layer}.post_attention_layernorm.weight")
        for name, row in (("q_proj", 0), ("k_proj", queries), ("v_proj", queries + keys)):
            yield SliceCopy(f"{block}.mixer.w_qkv", row, f"{layer}.self_attn.{name}.weight")
            if config.attention_bias:
                yield SliceCopy(f"{block}.mixer.b_qkv", row, f"{layer}.self_attn.{name}.bias")
        yield SliceCopy(f"{block}.mixer.w_out", 0, f"{layer}.self_attn.o_proj.weight")
        if config.attention_out_bias:
            yield SliceCopy(f"{block}.mixer.b_out", 0, f"{layer}.self_attn.o_proj.bias")
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                yield SliceCopy(f"{block}.mixer.{name}", 0, f"{layer}.self_attn.{name}.weight")
        in_suffix = i >= config.prefix_layers
        fast_units = config.fast_intermediate_size if in_suffix and config.parallel_mlp else 0
        yield from _copy_mlp(f"{block}.mlp", f"{layer}.mlp", fast_units, config.intermediate_size)
        if fast_units:
            yield from _copy_mlp(f"{block}.fast", f"{layer}.mlp", 0, fast_units)
        elif in_suffix:
            # A new fast MLP reads the same residual stream as the MLP after it, so the pretrained norm suits it, too.
            yield SliceCopy(f"{block}.fast_norm.weight", 0, f"{layer}.post_attention_layernorm.weight")


def _copy_mlp(target: str, source: str, start: int, stop: int) -> Iterator[SliceCopy]:
    """Hidden units of an MLP: rows of gate and value, columns of the second matrix."""
    units = slice(start, stop)
    yield SliceCopy(f"{target}.w_in", 0, f"{source}.gate_proj.weight", units)
    yield SliceCopy(f"{target}.w_in", stop - start, f"{source}.up_proj.weight", units)
    yield SliceCopy(f"{target}.w_out", 0, f"{source}.down_proj.weight", columns=units)


def _check_tensors(stored: Mapping[str, StoredTensor], config: ModelConfig, unused_ids: int, folder: Path) -> None:
    """Raise UserError unless the checkpoint has the tensors that its configuration requires, and no others."""
    expected = _expected_shapes(config, unused_ids)
    missing = sorted(set(expected) - set(stored))
    if missing:
        more = " and more" if len(missing) > 3 else ""
        raise UserError(
            f"The checkpoint {folder} lacks {', '.join(missing[:3])}{more}, which its configuration requires; use a "
            "complete copy."
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise UserError(
                f"{name} in {stored[name].file} has shape {list(stored[name].shape)}, but the configuration requires "
                f"{list(shape)}; use a checkpoint and a configuration that belong together."
            )
    # Old checkpoints of Llama hold the rotary rates, too.
    extra = sorted(name for name in set(stored) - set(expected) if not name.endswith(".rotary_emb.inv_freq"))
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        if not _equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"]):
            raise UserError(
                f"{folder / CONFIG} says that the output head is the embedding, but the checkpoint has another one; "
                "set tie_word_embeddings to false there if that is how it was trained."
            )
    if extra:
        raise UserError(
            f"The checkpoint {folder} has tensors that its configuration does not explain, such as {extra[0]}; "
            "use a checkpoint and a configuration that belong together."
        )


def _expected_shapes(config: ModelConfig, unused_ids: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors that are read."""
    width, hidden, vocab = config.hidden_size, config.intermediate_size, config.vocab_size + unused_ids
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    outputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": width, "gate_proj": hidden}
    outputs |= {"up_proj": hidden, "down_proj": width, "embed_tokens": vocab, "lm_head": vocab}
    inputs = {"o_proj": queries, "down_proj": hidden}
    norms = {"q_norm": config.head_dim, "k_norm": config.head_dim}
    shapes: dict[str, tuple[int, ...]] = {}
    for copy in _slice_copies(config):
        layer, kind = copy.source.split(".")[-2:]
        if layer not in outputs:
            shapes[copy.source] = (norms.get(layer, width),)
        else:
            shapes[copy.source] = (outputs[layer], inputs.get(layer, width)) if kind == "weight" else (outputs[layer],)
    return shapes


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape:
        return False
    step = max(1, _BLOCK // one.shape[1])
    blocks = (slice(row, row + step) for row in range(0, one.shape[0], step))
    return all(torch.equal(one.read(rows).float(), other.read(rows).float()) for rows in blocks)


# -- numbers -----------------------------------------------------------------------------------------------------------


def _read_blocks(stored: StoredTensor, copy: SliceCopy) -> Iterator[tuple[int, Tensor]]:
    """The rows of a copy in blocks, each with the row of the target that it begins at."""
    start, stop, _ = copy.rows.indices(stored.shape[0])
    step = max(1, _BLOCK // (stored.shape[1] if len(stored.shape) > 1 else 1))
    for row in range(start, stop, step):
        yield copy.target_row + row - start, stored.read(slice(row, min(row + step, stop)), copy.columns)


def _write_new_fast_mlps(config: ModelConfig, write_rows: WriteRows) -> None:
    """Fast MLPs that add nothing yet: the first matrix random, the second zero."""
    generator = torch.Generator().manual_seed(_SEED)
    shapes = parameter_shapes(config)
    for i in range(config.prefix_layers, config.num_hidden_layers):
        for name, std in ((f"blocks.{i}.fast.w_in", config.initializer_range), (f"blocks.{i}.fast.w_out", 0.0)):
            rows, columns = shapes[name]
            step = max(1, _BLOCK // columns)
            for row in range(0, rows, step):
                values = torch.zeros(min(step, rows - row), columns)
                write_rows(name, row, values.normal_(0.0, std, generator=generator) if std else values)


def _write_factors(config: ModelConfig, write_rows: WriteRows) -> None:
    """The factors of the additions to the fast MLPs, initialised as in a new model."""
    generator = torch.Generator().manual_seed(_SEED)
    for i in range(config.prefix_layers, config.num_hidden_layers):
        # Its matrices are allocated, but never touched.
        mlp = FastMLP(config.hidden_size, config.fast_intermediate_size, config.fast_rank)
        mlp.reset_factors(generator)
        for name, factor in mlp.named_parameters():
            if name not in ("w_in", "w_out"):
                write_rows(f"blocks.{i}.fast.{name}", 0, factor.detach())


def describe(done: HFConversion) -> list[str]:
    """What to tell the user about a conversion, a sentence a line."""
    config = done.config
    rank = "" if config.fast_rank is None else f", additions of rank {config.fast_rank}"
    lines = [
        f"{done.family}: {config.num_hidden_layers} blocks, {done.parameters:,} parameters in {done.dtype}",
        f"learns in its last {config.suffix_layers}, with {config.fast_intermediate_size} hidden units each{rank}",
        f"window {config.sliding_window}, mini-batch {config.mini_batch_size}",
    ]
    if done.unused_ids:
        lines.append(f"{done.unused_ids} ids that belong to no token of the tokenizer were left out of the vocabulary")
    if not done.has_tokenizer:
        lines.append("the checkpoint has no tokenizer.json; to read texts, put one beside it and convert again")
    return lines
