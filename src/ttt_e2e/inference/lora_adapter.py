"""What a session has learned, as a LoRA adapter in the format of the library `peft`.

The fast MLPs of a model that was converted with `--fast split` are rows and columns of the original's MLPs, so what a
session has added to them can be added to the original: to a model of transformers, vLLM or SGLang that knows nothing of
this package, and learns nothing. For every MLP that learned

    gate_proj, up_proj, down_proj  +=  B A        A [r, in], B [out, r]

with the best B A of rank r: the r largest parts of the singular value decomposition. Every matrix has the same r, and
`lora_alpha` = r, so that nothing is scaled: some programs know only one of both.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path
from ttt_e2e.inference.session import Session
from ttt_e2e.model.checkpoint import save_safetensors
from ttt_e2e.ops.fast_mlp import FastWeights, Weights

_NAMES = ("gate_proj", "up_proj", "down_proj")


class Adapter(NamedTuple):
    """What `export_lora` wrote."""

    rank: int
    matrices: int
    parameters: int
    error: float
    """The norm of what the rank leaves out, relative to that of what was learned; 0 if nothing was."""


def check_split(config: ModelConfig) -> None:
    """Raise UserError if the fast MLPs of a model are no parts of its MLPs."""
    if not (config.suffix_layers and config.parallel_mlp):
        raise UserError(
            "The fast MLPs of this model are no parts of pretrained ones, so there is nothing that an adapter could be "
            "added to; convert the model with --fast split."
        )


@torch.no_grad()
def export_lora(session: Session, out: Path, base: str, rank: int | None = None) -> Adapter:
    """Write what `session` has learned to the folder `out`, as an adapter for the model `base`.

    Args:
        session: of a model whose fast MLPs are parts of its MLPs (`parallel_mlp`).
        out: the folder to write, whole or not at all.
        base: what the adapter names as its base, a folder or a name on Hugging Face.
        rank: of the adapter (r); None: as large as it takes to lose nothing.

    Raises:
        UserError: if `out` exists, if the session has learned nothing, or if the fast MLPs are no parts of others.
    """
    config, out = session.model.config, Path(out)
    check_split(config)
    if out.exists():
        raise UserError(f"{out} exists already; name a folder that does not.")
    changes = list(_changes(session))
    if not any(change.learned.any() for change in changes):
        raise UserError("This session has learned nothing yet; read a text of at least one mini-batch first.")
    full = max(min(change.learned.shape) for change in changes)
    if rank is None and config.fast_rank is not None:
        rank = 2 * config.fast_rank  # of the difference of two products
    rank = full if rank is None else min(rank, full)
    tensors, lost, learned = {}, 0.0, 0.0
    for name, change, (rows, columns) in changes:
        u, values, v = torch.linalg.svd(change.double(), full_matrices=False)
        root = values[:rank].sqrt()
        tensors[f"{name}.lora_A.weight"] = _padded(root[:, None] * v[:rank], rank, columns)
        tensors[f"{name}.lora_B.weight"] = _padded(u[:, :rank] * root, rows, rank)
        learned += float(values.square().sum())
        lost += float(values[rank:].square().sum())
    layers = range(config.prefix_layers, config.num_hidden_layers)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(_NAMES),
        "layers_to_transform": list(layers),
        "layers_pattern": "layers",
        "inference_mode": True,
    }
    with atomic_path(out) as part:
        part.mkdir()
        save_safetensors(tensors, part / "adapter_model.safetensors", {"format": "pt"})
        (part / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return Adapter(rank, len(changes), parameters, math.sqrt(lost / learned))


class _Change(NamedTuple):
    """What was learned of a matrix of an MLP."""

    name: str
    """Of the matrix, in an adapter."""
    learned: Tensor
    """The difference, float32: the first rows or columns of the whole matrix."""
    shape: tuple[int, int]
    """Of the whole matrix."""


def _changes(session: Session) -> Iterator[_Change]:
    config, width = session.model.config, session.model.config.intermediate_size
    now, before = session.state().read_state.loop.fast, session.model.initial_fast_weights(1)
    for i, pair in enumerate(zip(now, before, strict=True), config.prefix_layers):
        w_in, w_out = (new - old for new, old in zip(*map(_products, pair), strict=True))
        mlp = f"base_model.model.model.layers.{i}.mlp"
        gate, up = w_in.chunk(2)
        yield _Change(f"{mlp}.gate_proj", gate, (width, config.hidden_size))
        yield _Change(f"{mlp}.up_proj", up, (width, config.hidden_size))
        yield _Change(f"{mlp}.down_proj", w_out, (config.hidden_size, width))


def _products(weights: Weights) -> tuple[Tensor, Tensor]:
    """What the fast weights of one sequence, [1, ...], come to: both matrices, or what is added to them."""
    if isinstance(weights, FastWeights):
        return weights.w_in_BED[0], weights.w_out_BDF[0]
    up_in_ER, down_in_RD, up_out_DR, down_out_RF = (factor[0] for factor in weights)
    return up_in_ER @ down_in_RD, up_out_DR @ down_out_RF


def _padded(factor: Tensor, rows: int, columns: int) -> Tensor:
    """The factor in float32, with zeros below and to the right."""
    whole = torch.zeros(rows, columns)
    whole[: factor.shape[0], : factor.shape[1]] = factor
    return whole
