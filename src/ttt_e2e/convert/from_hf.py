"""Pretrained Transformers from Hugging Face checkpoints, made into models that can learn while they read.

The layouts are the same but for what is put together here: query, key and value are one matrix, and so are gate and
value of an MLP. Rotary pairs are (i, i + K/2) in both. Fast MLPs are made in one of two ways, neither of which changes
a prediction before the first update:

- "new": an MLP whose second matrix is zero, in front of the static one. Its gradient in the first matrix is a multiple
  of the second, so the first inner step moves the second one alone; from then on both learn.
- "split": the first hidden units of the pretrained MLP, which stay beside the others. Any of the units would do: their
  order means nothing.

With a `fast_rank`, what learns is an addition to these, whose second factor begins at zero.

Tensors are read a part at a time and written at once, so that memory does not grow with the model.
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
from ttt_e2e.convert.model_folder import Put, model_folder, parameter_shapes
from ttt_e2e.convert.start import Start, model_config
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.model.checkpoint import TOKENIZER, copy_pretrained_metadata, read_json
from ttt_e2e.model.cost import parameters
from ttt_e2e.model.transformer import FastMLP

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BLOCK = 1 << 23  # numbers that are read at once
_SEED = 0  # of the fast MLPs that are new


class Part(NamedTuple):
    """Some rows of a parameter of ours, from `row` on, and the part of a tensor of theirs that they are."""

    target: str
    row: int
    source: str
    rows: slice
    columns: slice = slice(None)


class Converted(NamedTuple):
    """What came of it. dtype: of the weights, as in the file. tokenizer: whether the checkpoint had one.

    unnamed: rows of the embedding that no token of the tokenizer named, and which were left out.
    """

    config: ModelConfig
    family: str
    parameters: int
    dtype: str
    tokenizer: bool
    unnamed: int


def convert_from_hf(
    path_or_name: str | Path,
    out: Path,
    start: Start = Start(),  # noqa: B008 - a value
    *,
    dtype: str | None = None,
    progress: bool = False,
) -> Converted:
    """Write the model folder `out` from a checkpoint: its folder, or its name on Hugging Face.

    start: how it comes to learn. dtype: of the weights in the file, "float32" or "bfloat16"; None: bfloat16 if all of
    the checkpoint is, else float32. What the checkpoint has of `tokenizer.json` and `PRETRAINED_METADATA` is copied. Raises
    UserError if `out` exists, or for a checkpoint that is missing, not whole, not supported, or of other shapes than
    its configuration says; `out` is then not there.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists; name another folder for the model, or remove it first.")
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"Weights are written as {' or '.join(_DTYPES)}, not {dtype}.")
    folder = find_checkpoint(path_or_name)
    theirs = read_json(folder / CONFIG)
    source = read_source(theirs, folder / CONFIG)
    words = Tokenizer.load(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else None
    unnamed = _unnamed(words, source.shape["vocab_size"], folder)
    source.shape["vocab_size"] -= unnamed
    config = model_config(source, start)
    stored = stored_tensors(folder)
    parts = list(_parts(config))
    _check(stored, config, unnamed, folder)
    if dtype is None:
        dtype = "bfloat16" if {stored[part.source].dtype for part in parts} == {"BF16"} else "float32"
    notes = {
        "source": str(path_or_name),
        "source_family": source.family,
        "source_config_sha256": hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest(),
        "fast": start.fast,
    }
    with model_folder(out, config, _DTYPES[dtype], notes) as (part_folder, put):
        for part in tqdm(parts, "converting", disable=not progress, leave=False):
            for row, rows in _blocks(stored[part.source], part):
                put(part.target, row, rows)
        if start.fast == "new":
            _put_new(config, put)
        if config.fast_rank is not None:
            _put_factors(config, put)
        if words is not None:
            shutil.copyfile(folder / TOKENIZER, part_folder / TOKENIZER)
        copy_pretrained_metadata(folder, part_folder)
    return Converted(config, source.family, parameters(config), dtype, words is not None, unnamed)


def _unnamed(words: Tokenizer | None, vocab_size: int, folder: Path) -> int:
    """How many of the last ids no token has: embeddings are often rounded up to a size that suits a GPU."""
    if words is None:
        return 0
    if words.vocab_size > vocab_size:
        raise UserError(
            f"The tokenizer in {folder} has {words.vocab_size} tokens, but its model has a vocabulary of {vocab_size}; "
            "they do not belong together."
        )
    return vocab_size - words.vocab_size


# -- which tensor goes where -------------------------------------------------------------------------------------------


def _parts(config: ModelConfig) -> Iterator[Part]:
    """Where every number of ours comes from, but for what is new in the fast MLPs."""
    everything = slice(None)
    yield Part("embedding", 0, "model.embed_tokens.weight", slice(config.vocab_size))
    yield Part("final_norm.weight", 0, "model.norm.weight", everything)
    if not config.tie_word_embeddings:
        yield Part("head", 0, "lm_head.weight", slice(config.vocab_size))
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for i in range(config.num_hidden_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        yield Part(f"{ours}.mixer_norm.weight", 0, f"{theirs}.input_layernorm.weight", everything)
        yield Part(f"{ours}.mlp_norm.weight", 0, f"{theirs}.post_attention_layernorm.weight", everything)
        for kind, wanted in (("weight", True), ("bias", config.attention_bias)):
            for name, row in (("q", 0), ("k", queries), ("v", queries + keys)):
                if wanted:
                    yield Part(f"{ours}.mixer.{kind[0]}_qkv", row, f"{theirs}.self_attn.{name}_proj.{kind}", everything)
        yield Part(f"{ours}.mixer.w_out", 0, f"{theirs}.self_attn.o_proj.weight", everything)
        if config.attention_out_bias:
            yield Part(f"{ours}.mixer.b_out", 0, f"{theirs}.self_attn.o_proj.bias", everything)
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                yield Part(f"{ours}.mixer.{name}", 0, f"{theirs}.self_attn.{name}.weight", everything)
        in_suffix, split = i >= config.prefix_layers, config.parallel_mlp
        first = config.fast_intermediate_size if in_suffix and split else 0
        yield from _mlp(f"{ours}.mlp", f"{theirs}.mlp", slice(first, config.intermediate_size))
        if in_suffix and split:
            yield from _mlp(f"{ours}.fast", f"{theirs}.mlp", slice(first))
        elif in_suffix:
            # It reads the same residual stream as the MLP after it, which the pretrained norm has measured.
            yield Part(f"{ours}.fast_norm.weight", 0, f"{theirs}.post_attention_layernorm.weight", everything)


def _mlp(ours: str, theirs: str, units: slice) -> Iterator[Part]:
    """Some hidden units of an MLP: rows of gate and value, columns of what goes out."""
    hidden = units.stop - (units.start or 0)
    yield Part(f"{ours}.w_in", 0, f"{theirs}.gate_proj.weight", units)
    yield Part(f"{ours}.w_in", hidden, f"{theirs}.up_proj.weight", units)
    yield Part(f"{ours}.w_out", 0, f"{theirs}.down_proj.weight", slice(None), units)


def _check(stored: Mapping[str, StoredTensor], config: ModelConfig, unnamed: int, folder: Path) -> None:
    """Raise UserError unless the checkpoint has the tensors that its configuration asks for, and no others."""
    expected = _shapes(config, unnamed)
    missing = sorted(set(expected) - set(stored))
    if missing:
        more = " and more" if len(missing) > 3 else ""
        raise UserError(
            f"The checkpoint {folder} lacks {', '.join(missing[:3])}{more}, which its configuration asks for; use a "
            "complete copy."
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise UserError(
                f"{name} in {stored[name].file} has shape {list(stored[name].shape)}, but the configuration asks for "
                f"{list(shape)}; the two do not belong together."
            )
    # Old checkpoints of Llama hold the rotary rates too.
    extra = sorted(name for name in set(stored) - set(expected) if not name.endswith(".rotary_emb.inv_freq"))
    if config.tie_word_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        if not _equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"]):
            raise UserError(
                f"{folder / CONFIG} says that the output head is the embedding, but the checkpoint has another one; "
                "write tie_word_embeddings = false there if that is what was trained."
            )
    if extra:
        raise UserError(
            f"The checkpoint {folder} has tensors that its configuration does not explain, such as {extra[0]}; without "
            "them it would be another model."
        )


def _shapes(config: ModelConfig, unnamed: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors that are read."""
    width, hidden, vocab = config.hidden_size, config.intermediate_size, config.vocab_size + unnamed
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    outputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": width, "gate_proj": hidden}
    outputs |= {"up_proj": hidden, "down_proj": width, "embed_tokens": vocab, "lm_head": vocab}
    inputs = {"o_proj": queries, "down_proj": hidden}
    norms = {"q_norm": config.head_dim, "k_norm": config.head_dim}
    shapes: dict[str, tuple[int, ...]] = {}
    for part in _parts(config):
        layer, kind = part.source.split(".")[-2:]
        if layer not in outputs:
            shapes[part.source] = (norms.get(layer, width),)
        else:
            shapes[part.source] = (outputs[layer], inputs.get(layer, width)) if kind == "weight" else (outputs[layer],)
    return shapes


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape:
        return False
    step = max(1, _BLOCK // one.shape[1])
    pieces = (slice(row, row + step) for row in range(0, one.shape[0], step))
    return all(torch.equal(one.read(piece).float(), other.read(piece).float()) for piece in pieces)


# -- numbers -----------------------------------------------------------------------------------------------------------


def _blocks(stored: StoredTensor, part: Part) -> Iterator[tuple[int, Tensor]]:
    """The rows of `part`, some at a time, each with the row of ours that they begin at."""
    start, stop, _ = part.rows.indices(stored.shape[0])
    step = max(1, _BLOCK // (stored.shape[1] if len(stored.shape) > 1 else 1))
    for row in range(start, stop, step):
        yield part.row + row - start, stored.read(slice(row, min(row + step, stop)), part.columns)


def _put_new(config: ModelConfig, put: Put) -> None:
    """Fast MLPs that add nothing yet: the first matrix small and at random, the second zero."""
    generator = torch.Generator().manual_seed(_SEED)
    shapes = parameter_shapes(config)
    for i in range(config.prefix_layers, config.num_hidden_layers):
        for name in (f"blocks.{i}.fast.w_in", f"blocks.{i}.fast.w_out"):
            rows, columns = shapes[name]
            step = max(1, _BLOCK // columns)
            for row in range(0, rows, step):
                values = torch.zeros(min(step, rows - row), columns)
                put(
                    name,
                    row,
                    values.normal_(0.0, config.initializer_range, generator=generator) if "w_in" in name else values,
                )


def _put_factors(config: ModelConfig, put: Put) -> None:
    """Additions to the fast MLPs, as a model begins with them."""
    generator = torch.Generator().manual_seed(_SEED)
    for i in range(config.prefix_layers, config.num_hidden_layers):
        mlp = FastMLP(
            config.hidden_size, config.fast_intermediate_size, config.fast_rank
        )  # the matrices in it are not touched
        mlp.reset_factors(generator)
        for name, factor in mlp.named_parameters():
            if name not in ("w_in", "w_out"):
                put(f"blocks.{i}.fast.{name}", 0, factor.detach())


def describe(done: Converted) -> list[str]:
    """What there is to say about a conversion, a sentence a line."""
    config = done.config
    rank = "" if config.fast_rank is None else f", additions of rank {config.fast_rank}"
    lines = [
        f"{done.family}: {config.num_hidden_layers} blocks, {done.parameters:,} parameters in {done.dtype}",
        f"learns in its last {config.suffix_layers}, with {config.fast_intermediate_size} hidden units each{rank}",
        f"window {config.sliding_window}, mini-batch {config.mini_batch_size}",
    ]
    if done.unnamed:
        lines.append(f"{done.unnamed} ids that no token of the tokenizer has were left out of the vocabulary")
    if not done.tokenizer:
        lines.append("the checkpoint has no tokenizer.json: to read texts, put one beside it and convert again")
    return lines
