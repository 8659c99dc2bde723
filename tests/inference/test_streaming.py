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
