"""The model that a system starts from: one converted model, in the shape of that system.

Every change of the shape leaves alone what the model computes, as far as a text fits the window: fast and static MLP
become the one MLP that they were split from, and a memory beside the window adds nothing before it is trained.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.model.transformer import Transformer

_SEED = 0  # of the memories

# Ends of the names of matrices through which a memory beside the window is added to the residual stream.
_GATES = ("mixer.w_out", "mixer.deltanet.w_out")


@torch.no_grad()
def in_shape_of(model: Transformer, config: ModelConfig) -> Transformer:
    """A copy of a converted `model` that has the mixers of `config`, and no suffix if `config` has none.

    Raises UserError if the model's fast MLPs are not parts of its MLPs (`parallel_mlp`), but were added to them.
    """
    if not (config.suffix_layers or model.config.parallel_mlp):
        raise UserError("Only a model that was converted with --fast split can be trained as one without fast MLPs.")
    weights = dict(model.named_parameters())
    copy = Transformer(config, torch.Generator().manual_seed(_SEED))
    own = dict(copy.named_parameters())
    for name, weight in own.items():
        plain = name.replace(".mixer.attention.", ".mixer.")
        block, _, rest = name.partition(".mixer.")
        if rest and plain == name and f"{block}.mixer.attention.w_out" in own:
            if name.endswith(_GATES):
                weight.zero_()
        elif name.endswith(".log_lr_scale") and name not in weights:
            continue
        elif not config.suffix_layers and name.endswith((".mlp.w_in", ".mlp.w_out")):
            weight.copy_(_whole(weights, name))
        else:
            weight.copy_(weights[plain])
    return copy


def _whole(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """A matrix of an MLP, with the hidden units that had become the fast one, which are the first."""
    static, fast = weights[name], weights.get(name.replace(".mlp.", ".fast."))
    if fast is None:
        return static
    if name.endswith("w_out"):
        return torch.cat([fast, static], 1)
    return torch.cat([part for parts in zip(fast.chunk(2), static.chunk(2), strict=True) for part in parts])
