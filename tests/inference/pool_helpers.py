"""What the tests of session pools share: models, a session alone to compare with, and the events of a pool."""

import math

import numpy as np
import torch
from helpers import GEMMA, small_model
from inference_helpers import tokens_of, with_fast_weights

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.pool_requests import Done, Event, Losses, Token
from ttt_e2e.inference.sampling import SamplingOptions, sample
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_pool import SessionPool
from ttt_e2e.inference.streaming import ReadState, forward, read_mini_batch, start_reading
from ttt_e2e.model.transformer import Transformer

F64 = torch.float64
ONE_TOKENIZER = Tokenizer.train([""], 257)
RECURRENT = dict(suffix_layers=0, pattern=("mamba2", "gated-deltanet", "ttt-kvb", "titans"))
PATTERNS = {
    "window": dict(),
    "full": dict(pattern=("full",)),
    "recurrent": RECURRENT,
    "low rank": dict(fast_rank=2, inner_loop__learned_lr=True),
    "sinks": dict(attention_sink=True, num_key_value_heads=1),
    "as in Gemma": dict(attention_sink=True, num_key_value_heads=1, **GEMMA),
    "learning over others": dict(pattern=("gated-deltanet", "titans", "window", "window")),
}
SMALL = dict(mamba2__state_size=8, memory__num_persistent_tokens=3, sliding_window=10, mini_batch_size=5)


def model_of(name: str, dtype: torch.dtype = F64) -> Transformer:
    return small_model(dtype, **{**SMALL, **PATTERNS[name]}).requires_grad_(False)


MODELS = {name: model_of(name) for name in PATTERNS}


def read_alone(model: Transformer, text: np.ndarray, dtype: torch.dtype = F64) -> tuple[ReadState, np.ndarray, int]:
    """The state after the text's full mini-batches, their losses, and how many tokens these are."""
    state, losses, b = start_reading(model, 1, dtype), [np.empty(0)], model.config.mini_batch_size
    assert b is not None
    while len(text) > state.position + b:
        ids = torch.from_numpy(text[state.position : state.position + b + 1])[None]
        state, nll, _ = read_mini_batch(model, state, ids[:, :-1], ids[:, 1:], dtype=dtype)
        losses.append(nll[0].numpy())
    return state, np.concatenate(losses), state.position


def generate_alone(
    model: Transformer, text: np.ndarray, count: int, options: SamplingOptions, dtype: torch.dtype = F64
) -> list[int]:
    state, _, done = read_alone(model, text, dtype)
    ids, written = torch.from_numpy(text[done:])[None], []
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(count):
        logits, state = forward(model, state, ids, dtype)
        written.append(sample(logits[0, -1].float(), options, generator))
        ids = torch.tensor([[written[-1]]])
    return written


def assert_same_state(ours: ReadState, alone: ReadState, tolerance: float = 1e-9) -> None:
    assert ours.position == alone.position and ours.position_offsets_B is None
    torch.testing.assert_close(ours.tensors(), alone.tensors(), rtol=tolerance, atol=tolerance)


def run(pool: SessionPool) -> list[Event]:
    events = []
    for _ in range(1000):
        if not pool.busy:
            return events
        events += pool.step()
    raise AssertionError("the pool never ends")


def of(events: list[Event], id: int) -> tuple[np.ndarray, list[int], list[UserError | None]]:
    """A session's losses, the tokens it generated, and how its requests ended."""
    mine = [event for event in events if event.id == id]
    losses = np.concatenate([np.empty(0), *(event.losses for event in mine if isinstance(event, Losses))])
    return (
        losses,
        [event.token for event in mine if isinstance(event, Token)],
        [event.error for event in mine if isinstance(event, Done)],
    )


def pool_at(model: Transformer, lengths: list[int], max_batch: int = 16) -> SessionPool:
    """A pool whose sessions have read texts of these lengths."""
    pool = SessionPool(Session(model, dtype=F64), max_batch=max_batch)
    for i, length in enumerate(lengths):
        pool.submit_read(pool.add(), tokens_of(length, i))
    run(pool)
    return pool


def removed(pool: SessionPool, id: int) -> Session:
    session = pool.peek(id)
    pool.drop(id)
    return session


def poisoned(session: Session) -> Session:
    """The session with fast weights that are not numbers."""
    return with_fast_weights(session, lambda w: w * math.nan)
