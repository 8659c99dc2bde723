"""Give every fast MLP as many hidden units again: python runs/widen.py MODEL OUT

The output weights of the new units are zero, so the model computes the same until it learns; they learn from the first
update on.
"""

import sys
from pathlib import Path

import torch
from torch.nn.functional import pad

from ttt_e2e import Transformer
from ttt_e2e.config.schema import replace
from ttt_e2e.model.checkpoint import load_transformer, save_model


def widen(folder: Path, out: Path) -> None:
    """Write to `out` the model of `folder`, its fast MLPs twice as wide."""
    old, noise = load_transformer(folder), torch.Generator().manual_seed(0)
    weights, width = old.state_dict(), old.config.fast_intermediate_size
    fast = [f"blocks.{i}.fast." for i in range(old.config.prefix_layers, old.config.num_hidden_layers)]
    std = weights[fast[-1] + "w_in"].std()
    for name in fast:
        w_in = weights[name + "w_in"].view(2, width, -1)  # gate and value
        more = std * torch.randn(w_in.shape, generator=noise)
        weights[name + "w_in"] = torch.cat([w_in, more], 1).flatten(0, 1)
        weights[name + "w_out"] = pad(weights[name + "w_out"], (0, width))
    model = Transformer(replace(old.config, {"fast_intermediate_size": 2 * width}))
    model.load_state_dict(weights)
    save_model(model, out, folder / "tokenizer.json")


if __name__ == "__main__":
    widen(Path(sys.argv[1]), Path(sys.argv[2]))
