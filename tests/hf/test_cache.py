"""The cache: a batch of texts reads and generates as each session alone."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the transformers library is not installed")


from helpers import GEMMA
from transformers_helpers import generated, last_logits, learning_model, padded, prompts

from ttt_e2e.errors import UserError
from ttt_e2e.hf.cache import CACHE_NAME
from ttt_e2e.hf.export import wrap_model
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.streaming import forward, read_mini_batch, start_reading


@pytest.mark.parametrize("learn_from_writing", [False, True])
@pytest.mark.parametrize("chunk", [None, 7])
def test_greedy_batch_equals_each_session_alone(learn_from_writing: bool, chunk: int | None) -> None:
    model = learning_model()
    wrapped, rows = wrap_model(model), prompts()
    wrapped.config.learn_from_writing = learn_from_writing
    ids, mask = padded(rows)
    out = wrapped.generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0, prefill_chunk_size=chunk
    )
    expected = [generated(model, row, 20, learn_from_writing=learn_from_writing) for row in rows]
    assert out[:, ids.shape[1] :].tolist() == expected
    assert expected != [generated(model, row, 20, learn=False) for row in rows]  # learning shows


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": ("full",)},
        {"suffix_layers": 0, "pattern": ("full", "window"), "mini_batch_size": None},
        {"pattern": ("mamba2", "gated-deltanet", "window", "window"), "mamba2.state_size": 8, "mamba2.n_groups": 2},
        {"pattern": ("ttt-kvb", "titans", "window", "window"), "sliding_window": 10, "memory.lr": 0.1},
        {"suffix_layers": 4},
        {"fast_rank": 2, "inner_loop.learned_lr": True},
    ],
)
@pytest.mark.parametrize("learn", [True, False])
def test_greedy_batch_equals_each_session_alone_with_other_models(changes: dict[str, Any], learn: bool) -> None:
    model = learning_model(**changes)
    wrapped, rows = wrap_model(model), prompts()
    wrapped.config.learn_while_reading = learn
    ids, mask = padded(rows)
    out = wrapped.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert out[:, ids.shape[1] :].tolist() == [generated(model, row, 12, learn) for row in rows]


def test_continuing_with_the_cache_equals_continuing_the_session() -> None:
    """A second prompt after the first one's answer: both have become part of the text, and are learned from."""
    model = learning_model()
    wrapped, rows = wrap_model(model), prompts()
    ids, mask = padded(rows)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    first = wrapped.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    more = torch.tensor(np.stack(prompts((9,) * len(rows), seed=1)))
    ids = torch.cat((first.sequences, more), 1)
    mask = torch.cat((mask, torch.ones(len(rows), 8 + 9, dtype=mask.dtype)), 1)
    kept = copy.copy(first[CACHE_NAME])
    second = wrapped.generate(ids, attention_mask=mask, **{CACHE_NAME: first[CACHE_NAME]}, **options)
    for i, row in enumerate(rows):
        session = Session(model)
        session.read(row)
        session.read([*session.generate_tokens(max_tokens=8, temperature=0), *more[i].tolist()])
        assert second[i, ids.shape[1] :].tolist() == list(session.generate_tokens(max_tokens=8, temperature=0))
    again = wrapped.generate(ids, attention_mask=mask, **{CACHE_NAME: kept}, **options)  # the copy stayed as it was
    assert torch.equal(again, second)


@pytest.mark.parametrize("learn", [True, False])
def test_masked_tokens_after_the_end_of_a_row_are_forgotten(learn: bool) -> None:
    model = learning_model()
    wrapped, rows = wrap_model(model), prompts((7, 12))
    wrapped.config.learn_while_reading = learn
    ids, mask = padded(rows)
    cache = wrapped(ids, attention_mask=mask)[CACHE_NAME]
    wrote = torch.tensor([[3, 0, 0], [4, 5, 6]])  # the first row has ended after one token
    for column in wrote.split(1, 1):
        cache = wrapped(column, cache=cache, generated=True)[CACHE_NAME]
    mask = torch.cat((mask, torch.tensor([[1, 0, 0], [1, 1, 1]]), torch.ones(2, 2, dtype=mask.dtype)), 1)
    more = torch.tensor([[8, 9], [8, 9]])
    logits = wrapped(more, attention_mask=mask, cache=cache).logits[:, -1]
    for i, text in enumerate(([*rows[0], 3, 8, 9], [*rows[1], 4, 5, 6, 8, 9])):
        torch.testing.assert_close(logits[i], last_logits(model, np.array(text), learn), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_sink": True, **GEMMA},
        {"suffix_layers": 0, "pattern": ("full", "window"), "mini_batch_size": None},
    ],
)
def test_row_selected_from_a_batch_at_different_positions(changes: dict[str, Any]) -> None:
    model = learning_model(**changes)
    wrapped, rows = wrap_model(model), prompts((3, 4, 5, 6, 7))
    wrapped.config.learn_while_reading = False
    ids, mask = padded(rows)
    cache = wrapped(ids, attention_mask=mask)[CACHE_NAME]
    cache = wrapped(torch.full((5, 1), 3), cache=cache)[CACHE_NAME]
    cache.batch_select_indices(torch.tensor([0]))
    for token in (4, 5, 6):  # where it wrote, and what it wrote is masked later
        cache = wrapped(torch.tensor([[token]]), cache=cache, generated=True)[CACHE_NAME]
    mask = torch.cat((mask[:1], torch.tensor([[1, 1, 0, 0, 1, 1]])), 1)
    logits = wrapped(torch.tensor([[8, 9]]), attention_mask=mask, cache=cache).logits[0, -1]
    expected = last_logits(model, np.array([*rows[0], 3, 4, 8, 9]), learn=False)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_learning_can_be_switched_on_later() -> None:
    model = learning_model(suffix_layers=3)
    wrapped, rows = wrap_model(model), prompts((7, 12))
    wrapped.config.learn_while_reading = False
    ids, mask = padded(rows)
    cache = wrapped(ids, attention_mask=mask)[CACHE_NAME]
    cache = wrapped(torch.tensor([[3], [4]]), cache=cache)[CACHE_NAME]  # rows at different positions, read together
    wrapped.config.learn_while_reading = True
    more = torch.tensor(np.stack(prompts((30, 30), seed=2)))
    logits = wrapped(more, cache=cache).logits[:, -1]
    b = model.config.mini_batch_size
    assert b is not None
    for i, row in enumerate(rows):
        read = torch.tensor(np.concatenate((row, [3 + i])))[None]
        _, state = forward(model, start_reading(model, 1), read)
        left = more[i : i + 1]
        while left.shape[1] > b:
            state, _, _ = read_mini_batch(model, state, left[:, :b], left[:, 1 : b + 1])
            left = left[:, b:]
        torch.testing.assert_close(logits[i], forward(model, state, left)[0][0, -1], atol=1e-5, rtol=1e-5)


def test_beam_search_equals_a_plain_search() -> None:
    """The same search, with every beam's logits made anew from its whole text."""
    model, beams, count = learning_model(), 3, 9
    wrapped, rows = wrap_model(model), prompts((8, 23))
    wrapped.config.learn_from_writing = True  # so that a beam's state depends on what it wrote itself
    ids, mask = padded(rows)
    out = wrapped.generate(
        ids, attention_mask=mask, max_new_tokens=count, num_beams=beams, do_sample=False, pad_token_id=0
    )
    for i, row in enumerate(rows):
        running: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(count):
            grown = []
            for score, tokens in running:
                p = last_logits(model, np.array([*row, *tokens])).log_softmax(-1)
                grown += [(score + float(p[token]), [*tokens, token]) for token in range(len(p))]
            running = sorted(grown, reverse=True)[:beams]
        assert out[i, ids.shape[1] :].tolist() == running[0][1]
    assert out[:, ids.shape[1] :].tolist() != [generated(model, row, count, learn_from_writing=True) for row in rows]


def test_row_left_behind_does_not_keep_the_memory_of_others() -> None:
    wrapped = wrap_model(learning_model())
    ids, mask = padded(prompts((6, 31, 31, 31)))
    texts = wrapped(ids, attention_mask=mask)[CACHE_NAME]._texts
    assert [text.border.position for text in texts] == [5, 30, 30, 30]
    assert [len(text.border.batch.state.tensors()[0]) for text in texts] == [1, 3, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_agree_with_a_sessions_losses(dtype: torch.dtype) -> None:
    """After every token of a text, in one call and in several of any size, masked columns left out."""
    model = learning_model().to(dtype)
    wrapped, rows = wrap_model(model), prompts()
    wrapped.compute_dtype = dtype
    ids, mask = padded(rows)
    whole = wrapped(ids, attention_mask=mask).logits
    cache, pieces = None, []
    for first, stop in ((0, 1), (1, 4), (4, 20), (20, 26), (26, 33)):
        out = wrapped(ids[:, first:stop], attention_mask=mask[:, :stop], cache=cache)
        cache, pieces = out[CACHE_NAME], [*pieces, out.logits]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=1e-4)
    last = wrapped(ids, attention_mask=mask, logits_to_keep=3).logits
    torch.testing.assert_close(last, whole[:, -3:], atol=1e-4, rtol=1e-4)
    assert not whole[mask == 0].any()
    for i, row in enumerate(rows):
        session = Session(model, dtype=dtype)
        losses = np.concatenate((session.read(row), session.score_pending()))
        p = whole[i, mask[i] == 1].log_softmax(-1)[:-1]
        found = -p[torch.arange(len(row) - 1), torch.from_numpy(row[1:])]
        np.testing.assert_allclose(found.numpy(), losses, atol=1e-4)


def test_divergence_leaves_the_cache_unchanged() -> None:
    wrapped = wrap_model(learning_model(inner_loop__lr=1e30))
    cache = wrapped(torch.arange(1, 4)[None])[CACHE_NAME]
    with pytest.raises(UserError, match=r"Learning diverged in row 0 of the batch: the loss at tokens 5 to 10 is"):
        wrapped(torch.arange(4, 30)[None], cache=cache)
    assert cache.get_seq_length() == 3
    wrapped.config.learn_while_reading = False
    assert wrapped(torch.arange(4, 30)[None], cache=cache).logits.isfinite().all()
