"""The loader: every target once an epoch, and a position that can be restored."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.data.loader import SequenceLoader, val_sequences
from ttt_e2e.data.shards import TokenSet
from ttt_e2e.errors import UserError


def token_set(lengths: list[int], digest: str = "d", vocab_size: int | None = None) -> TokenSet:
    """Documents of `lengths` in two shards; the tokens of all of them are 0, 1, 2, ..."""
    ids = np.arange(sum(lengths), dtype=np.uint32)
    half = len(lengths) // 2
    border = sum(lengths[:half])
    return TokenSet(
        [ids[:border], ids[border:]],
        [str(index) for index in range(len(lengths))],
        [lengths[:half], lengths[half:]],
        bos=0,
        vocab_size=vocab_size,
        digest=digest,
        where="tokens",
    )


corpora = st.lists(st.integers(1, 60), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 12)


def epoch(loader: SequenceLoader) -> np.ndarray:
    return np.concatenate([next(loader).numpy() for _ in range(loader.windows)])


@settings(deadline=None)
@given(lengths=corpora, context=st.integers(1, 12), seed=st.integers(0, 5))
def test_epoch_has_every_target_at_most_once(lengths: list[int], context: int, seed: int) -> None:
    tokens = token_set(lengths)
    if not any(length > context for length in lengths):
        return
    loader = SequenceLoader(tokens, context, 1, seed)
    for _ in range(2):
        windows = epoch(loader)
        targets = windows[:, 1:].ravel()
        assert len(targets) == len(set(targets.tolist()))
        document = np.repeat(np.arange(len(lengths)), lengths)
        in_long = np.array(lengths)[document] > context
        counts = np.bincount(document[targets], minlength=len(lengths))
        for index, length in enumerate(lengths):
            if length > context:
                assert counts[index] == (length - 1) // context * context
        for window in windows:
            if in_long[window[0]]:
                np.testing.assert_array_equal(window, np.arange(window[0], window[0] + context + 1))
            else:
                # A packed window: whole documents from their first token on, but for its two ends.
                jumps = np.flatnonzero(np.diff(window) != 1)
                starts = np.concatenate([[0], np.cumsum(lengths)])
                assert set(window[jumps + 1]) <= set(starts)
                assert set(window[jumps] + 1) <= set(starts)
                assert not in_long[window].any()


@settings(max_examples=40, deadline=None)
@given(lengths=corpora, at=st.integers(0, 40), batch=st.integers(1, 5), other=st.integers(1, 5))
def test_loader_continues_exactly_from_a_restored_position(lengths: list[int], at: int, batch: int, other: int) -> None:
    tokens = token_set(lengths)
    loader = SequenceLoader(tokens, 4, batch, seed=3)
    for _ in range(at):
        next(loader)
    state = json.loads(json.dumps(loader.state()))
    expected = torch.cat([next(loader) for _ in range(2 * other)])
    restored = SequenceLoader(tokens, 4, other, seed=99)
    restored.load_state(state)
    assert restored.state() | {"batch": batch} == state
    found = torch.cat([next(restored) for _ in range(2 * batch)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@settings(deadline=None)
@given(lengths=corpora, batch=st.integers(1, 4), world_size=st.integers(1, 4))
def test_ranks_share_what_one_would_read(lengths: list[int], batch: int, world_size: int) -> None:
    tokens = token_set(lengths)
    whole = SequenceLoader(tokens, 4, batch * world_size, seed=1)
    ranks = [SequenceLoader(tokens, 4, batch, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(5):
        torch.testing.assert_close(torch.cat([next(rank) for rank in ranks]), next(whole))
    assert all(rank.state() | {"batch": batch * world_size} == whole.state() for rank in ranks)


def test_batches_are_int64_tensors() -> None:
    loader = SequenceLoader(token_set([100, 50, 3, 4]), 10, 3, seed=0)
    batch = next(loader)
    assert batch.shape == (3, 11)
    assert batch.dtype == torch.int64
    assert next(iter(loader)).shape == (3, 11)


def test_order_differs_by_seed_and_epoch_and_is_pinned() -> None:
    tokens = token_set([1000, 30])
    first, second = (epoch(SequenceLoader(tokens, 10, 1, seed)) for seed in (0, 1))
    assert first.tolist() != second.tolist()
    loader = SequenceLoader(tokens, 10, 1, seed=0)
    assert epoch(loader).tolist() != epoch(loader).tolist()
    assert first[:4, 0].tolist() == [118, 928, 38, 208]


def test_load_state_refuses_other_tokens_or_context() -> None:
    state = SequenceLoader(token_set([100]), 10, 1, seed=0).state()
    with pytest.raises(UserError, match="does not hold the tokens that the saved position"):
        SequenceLoader(token_set([100], digest="other"), 10, 1, seed=0).load_state(state)
    with pytest.raises(UserError, match="context of 10 tokens, not 11"):
        SequenceLoader(token_set([100]), 11, 1, seed=0).load_state(state)


def test_loader_refuses_too_few_tokens() -> None:
    with pytest.raises(UserError, match="10 tokens in 1 documents, too few for one sequence of 11"):
        SequenceLoader(token_set([10]), 10, 1, seed=0)
    assert SequenceLoader(token_set([11]), 10, 1, seed=0).windows == 1
    assert SequenceLoader(token_set([5, 6]), 10, 1, seed=0).windows == 1
    with pytest.raises(ValueError, match="invalid loader"):
        SequenceLoader(token_set([11]), 10, 0, seed=0)


def test_loader_refuses_tokens_outside_the_vocabulary() -> None:
    with pytest.raises(UserError, match="token 10, outside the vocabulary of 10"):
        next(SequenceLoader(token_set([11], vocab_size=10), 10, 1, seed=0))


def test_val_sequences_take_beginnings_first_within_the_limit() -> None:
    tokens = token_set([25, 1, 8])
    found = [(int(sequence[0]), len(sequence)) for sequence in val_sequences(tokens, 10, 1000)]
    assert found == [(0, 11), (26, 8), (10, 11), (20, 5)]
    assert [len(sequence) for sequence in val_sequences(tokens, 10, 17)] == [11, 8]  # 10 and 7 targets
    assert [len(sequence) for sequence in val_sequences(tokens, 10, 9)] == [8]  # the first is too long
    assert val_sequences(tokens, 10, 10)[0].dtype == np.int64
    with pytest.raises(UserError, match="no sequence to evaluate on within 5 tokens"):
        val_sequences(tokens, 10, 5)
