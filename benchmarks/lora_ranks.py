"""What an adapter loses by its rank: the loss on the continuation of texts that a session has read.

    python benchmarks/lora_ranks.py --model smollm2 BOOK.txt ...      # 8,192 tokens read, the next 4,096 scored

The model reads the beginning of every text with learning, and is then frozen. The continuation is scored with what was
learned, without it, and with what `ttt-e2e export lora` writes at every rank, all behind the same window. Nats per
token, means over texts; ± is the standard error of the difference to the session.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ttt_e2e.convert.named import find_model
from ttt_e2e.evaluation.documents import standard_error
from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.lora_adapter import export_lora
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import DTYPES
from ttt_e2e.inference.streaming import ReadState
from ttt_e2e.ops.fast_mlp import FastWeights


def with_adapter(session: Session, folder: Path) -> ReadState:
    """The session's state with the model's own fast weights and the adapter in `folder`."""
    tensors, config = load_file(folder / "adapter_model.safetensors"), session.model.config

    def change(layer: int, name: str) -> Tensor:
        matrix = f"base_model.model.model.layers.{layer}.mlp.{name}"
        return tensors[f"{matrix}.lora_B.weight"] @ tensors[f"{matrix}.lora_A.weight"]

    fast, width = [], config.fast_intermediate_size
    for layer, start in enumerate(session.model.initial_fast_weights(1), config.prefix_layers):
        into = torch.cat([change(layer, name)[:width] for name in ("gate_proj", "up_proj")])
        fast.append(FastWeights(start[0] + into, start[1] + change(layer, "down_proj")[:, :width]))
    state = session.state().read_state
    return state._replace(loop=state.loop._replace(fast=tuple(fast)))


@torch.no_grad()
def main() -> None:
    """Read, export, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--read", type=int, default=8192, help="tokens that are learned from (default: 8,192)")
    parser.add_argument("--scored", type=int, default=4096, help="tokens after them (default: 4,096)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    arguments = parser.parse_args()
    model, tokenizer = load_model(find_model(arguments.model), dtype=DTYPES[arguments.dtype])
    losses: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for path in arguments.texts:
        ids = np.concatenate([*tokenizer.encode_chunks([path.read_text()])])[: arguments.read + arguments.scored]
        session = Session(model, tokenizer, dtype=DTYPES[arguments.dtype])
        session.read(ids[: arguments.read])
        state, rest = session.state(), ids[arguments.read :]
        plain = tuple(type(value)(*(w.detach() for w in value)) for value in model.initial_fast_weights(1))
        fast = {
            "what was learned": state.read_state,
            "nothing of it": state.read_state._replace(loop=state.read_state.loop._replace(fast=plain)),
        }
        with TemporaryDirectory() as folder:
            for rank in arguments.ranks:
                name = f"rank {rank}"
                adapter = Path(folder) / str(rank)
                errors.setdefault(name, []).append(export_lora(session, adapter, "base", rank).error)
                fast[name] = with_adapter(session, adapter)
        for name, read_state in fast.items():
            frozen = Session(model, tokenizer, learn=False, dtype=session.dtype)
            frozen = frozen.with_state(state._replace(read_state=read_state))
            losses.setdefault(name, []).append(float(frozen.read(rest).mean()))
        print(path.name, *(f"{name} {some[-1]:.4f}" for name, some in losses.items()), flush=True)
    first = np.array(losses["what was learned"])
    for name, some in losses.items():
        difference = np.array(some) - first
        left_out = f"{np.mean(errors[name]):.1%}" if name in errors else ""
        error = standard_error(difference.tolist()) or 0.0
        print(f"{name:18} {np.mean(some):.4f}  {difference.mean():+.4f} ± {error:.4f}  {left_out}")


if __name__ == "__main__":
    main()
