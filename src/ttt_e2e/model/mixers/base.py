"""The interface of every sequence mixer: `(x_BTD, positions, state, cache_view) -> (y_BTD, state)`.

Without a state it starts a text. A long text is mixed in parallel, and cut anywhere, down to single tokens, it gives
the same result. The state is a value, a named tuple of tensors whose first dimension is the batch: it is handed in and
a new one is handed back, so that keeping an old one is keeping a reference. The one exception is a donated state.

Shapes: B sequences, T tokens, S slots of a cache, D hidden size, K head dimension.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Positions(NamedTuple):
    """The rotary angles of T tokens: [T, 1, K/2], or [T, B, 1, K/2] where rows stand at different positions."""

    cos: Tensor
    sin: Tensor
    local: tuple[Tensor, Tensor] | None = None
    """Cosines and sines for the blocks of `rope_local_pattern`, if there are any."""

    def slice(self, start: int, stop: int) -> "Positions":
        """The angles of tokens `start` to `stop`."""
        local = None if self.local is None else (self.local[0][start:stop], self.local[1][start:stop])
        return Positions(self.cos[start:stop], self.sin[start:stop], local)


class CacheView(NamedTuple):
    """What attention has to know about the caches that it is given.

    A cache with S slots is filled from the right: a row that has read n tokens has max(0, S - n) empty slots in front.
    """

    seq_lens: Tensor | None = None
    """Tokens that each row has read, int64 [B], or 0-dim if all have read the same number. None: no slot is empty."""

    attn_mask_TS: Tensor | None = None
    """The mask that follows for all caches alike, where it is cheaper to make once; None: attention makes its own."""

    max_slots: int | None = None
    """Slots that full attention keeps. None: all. Windowed attention keeps its window, if not `keep_all`."""

    keep_all: bool = False
    """Whether attention keeps all keys and values: the caches after earlier tokens can be cut from them."""

    donated: bool = False
    """Whether the caches that are handed in may be overwritten."""


ALL_FILLED = CacheView()
"""No slot is empty, and nothing may be overwritten."""


class MixerCost(NamedTuple):
    """What one mixer costs after, and over, a number of tokens; see `model.cost`."""

    parameters: int
    cached: int  # numbers of its state in the compute dtype
    accumulated: int  # numbers of its state in float32
    text: int  # operations of reading all tokens from the start of a text
    training: int  # the same with the backward pass
    token: int  # operations of one token more


class Mixer(nn.Module):
    """A sequence mixer."""

    State: ClassVar[Any]  # the named tuple that `forward` hands back
    no_weight_decay: tuple[str, ...] = ()  # names of parameters

    def forward(
        self, x_BTD: Tensor, positions: Positions, state: Any | None = None, cache_view: CacheView = ALL_FILLED
    ) -> tuple[Tensor, Any]:
        """Mix `x_BTD` along the tokens.

        Args:
            x_BTD: normalised inputs [B, T, D].
            positions: rotary angles of the T tokens. Recurrent mixers ignore them.
            state: what the tokens before left behind; None at the start of a text.
            cache_view: what is known of the caches in `state`. Recurrent mixers ignore it.

        Returns:
            The outputs [B, T, D] and the state after the last token.
        """
        raise NotImplementedError

    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw every matrix from N(0, std^2) and set every vector to one."""
        reset_parameters(self.parameters(), std, generator)


@torch.no_grad()
def reset_parameters(parameters: Iterable[nn.Parameter], std: float, generator: torch.Generator | None) -> None:
    """Draw every matrix from N(0, std^2) and set every vector to one."""
    for parameter in parameters:
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, std, generator=generator)
