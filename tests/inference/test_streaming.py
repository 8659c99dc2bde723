"""Reading mini-batch by mini-batch: what is made once for all layers."""

import pytest
import torch
from helpers import GEMMA, small_model

from ttt_e2e.inference import streaming
from ttt_e2e.model.mixers.base import CacheView


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_sink": True},
        {"attention_sink": True, **GEMMA},
        {"pattern": ("full", "window", "window", "window")},
    ],
)
def test_one_mask_for_all_layers_is_the_mask_of_each(
    changes: dict, learn: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = small_model(**changes), torch.randint(50, (2, 31), generator=torch.Generator().manual_seed(0))
    made = []

    def read() -> list[torch.Tensor]:
        state, found = streaming.start_reading(model, 2, dtype), []
        for start in range(0, 30, 5):
            tokens, targets = text[:, start : start + 5], text[:, start + 1 : start + 6]
            state, losses, _ = streaming.read_mini_batch(model, state, tokens, targets, learn=learn, dtype=dtype)
            made.append(streaming._cache_view(model, state, 5, dtype).attn_mask_TS is not None)
            found.append(losses)
        return found + state.tensors()

    ours = read()
    assert made == [not changes.get("pattern") and position >= 12 for position in range(5, 31, 5)]
    monkeypatch.setattr(streaming, "_cache_view", lambda *_: CacheView())
    for one, other in zip(ours, read(), strict=True):
        assert torch.equal(one, other)


F64 = torch.float64
WIDE = {"sliding_window": 20}  # of four mini-batches
ATTENTIONS: dict[str, dict] = {
    "window": WIDE,
    "window no multiple of b": {"sliding_window": 13},
    "sinks": {"attention_sink": True, **WIDE},
    "sinks, grouped heads": {
        "attention_sink": True,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 11,
    },
    "local windows": {"attention_sink": True, **GEMMA, **WIDE},
    "full attention": {"pattern": ("full",), **WIDE},
    "one of them full": {"pattern": ("full", "window", "window", "window"), **WIDE},
    "all suffix": {"suffix_layers": 4, **WIDE},
    "parallel MLPs of low rank": {"fast_rank": 2, "parallel_mlp": True, **WIDE},
}


@pytest.mark.parametrize("start", [0, 3, 31])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_prefix_of_several_mini_batches_at_once(name: str, start: int) -> None:
    """Losses, norms and the state after every mini-batch are those of reading one by one, from wherever it begins."""
    model, text = (
        small_model(F64, **ATTENTIONS[name]),
        torch.randint(50, (2, 100), generator=torch.Generator().manual_seed(0)),
    )
    plain = streaming.start_reading(model, 2, F64)
    if start:  # tokens that came before, in one odd mini-batch or several
        for part in text[:, :start].split(7, 1):
            plain, _, _ = streaming.read_mini_batch(model, plain, part, part, dtype=F64)
    ours, text, ahead, taken = plain, text[:, start:], [], []
    for first in range(0, 35, 5):
        tokens, targets = text[:, first : first + 5], text[:, first + 1 : first + 6]
        if not ahead:
            ahead = streaming.read_ahead(model, ours, text[:, first : first + 22], F64)
            taken.append(len(ahead))
        plain, *expected = streaming.read_mini_batch(model, plain, tokens, targets, dtype=F64)
        ours, *found = streaming.read_mini_batch(model, ours, tokens, targets, dtype=F64, prefix=ahead.pop(0))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours.tensors(), plain.tensors(), rtol=1e-10, atol=1e-12)
    assert min(taken) == min(4, model.config.sliding_window // 5)


@pytest.mark.parametrize(
    "changes", [{"pattern": ("window", "window", "gated-deltanet", "window"), **WIDE}, {"sliding_window": 9}]
)
def test_nothing_is_read_ahead(changes: dict) -> None:
    """Neither by a recurrent mixer, nor where only one mini-batch is there or fits in a window."""
    model, tokens = small_model(F64, **changes), torch.zeros(1, 30, dtype=torch.int64)
    assert streaming.read_ahead(model, streaming.start_reading(model, 1, F64), tokens, F64) == []
    model = small_model(F64, **WIDE)
    assert streaming.read_ahead(model, streaming.start_reading(model, 1, F64), tokens[:, :9], F64) == []
