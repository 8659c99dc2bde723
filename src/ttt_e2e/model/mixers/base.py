"""What every sequence mixer is: `(x_BTD, place, state) -> (y_BTD, state)`.

With no state it starts a text. Over many tokens it works in parallel; in pieces, down to token by token, it gives the
same result. The state is a value, a named tuple of tensors with the batch first: handed in, handed back, never changed
in place, so that keeping a copy of it is keeping a reference; unless its owner gives it away (`Place.in_place`).

Shapes: B sequences, T tokens, D width, K head width.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Place(NamedTuple):
    """Where tokens stand: the cosines and sines of their rotary angles, [T, 1, K/2] each.

    They are [T, B, 1, K/2] where every sequence has positions of its own; tokens come first either way.

    empty: how many of the first slots of every cache of fixed size hold no token yet, a 0-dim int32 tensor; None where
    caches hold tokens only. bias_TS: which keys each token may see, made once for all blocks where that helps.
    read_B: how many tokens each sequence has read, int64, where caches that hold fewer tokens than others begin with
    slots that hold none; None where there are no such slots.
    in_place: whether nobody needs the states any more that are handed in, nor their memory.
    """

    cos: Tensor
    sin: Tensor
    empty: Tensor | None = None
    attn_mask_TS: Tensor | None = None
    seq_lens_B: Tensor | None = None
    in_place: bool = False

    def slice(self, start: int, stop: int) -> "Place":
        """The part for tokens `start` to `stop`."""
        return self._replace(cos=self.cos[start:stop], sin=self.sin[start:stop])


class Mixer(nn.Module):
    """A sequence mixer. `State` names the tensors that it hands on; `undecayed` its parameters without weight decay."""

    State: ClassVar[Any]
    undecayed: ClassVar[tuple[str, ...]] = ()

    def forward(self, x_BTD: Tensor, place: Place, state: Any | None) -> tuple[Tensor, Any]:
        """Mix x along the tokens, going on from `state` (None: from the start of a text); the state after them."""
        raise NotImplementedError

    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw every matrix from N(0, std^2) and set every vector to one."""
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, std, generator=generator)
