"""A session generates: tokens, text, stop strings, learning from what it generates."""

import numpy as np
import pytest
import torch
from helpers import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_helpers import TEXT, having_read, same_state, tokens_of
from pool_helpers import assert_same_state

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.streaming import forward, start_reading
from ttt_e2e.model.transformer import Transformer

_TOKENIZER = Tokenizer.train([""], 257)  # every byte is a token: most characters come in parts


def test_greedy_equals_reading_the_whole_text_for_each_token(model: Transformer, tokenizer: Tokenizer) -> None:
    session = Session(model, tokenizer, learn=False)
    session.read(tokens_of(50))
    prompt = tokens_of(7, seed=3)
    got = list(session.generate_tokens(prompt, max_tokens=20, temperature=0))
    text = [tokenizer.bos, *tokens_of(50), *prompt]
    for token in got:
        logits, _ = forward(model, start_reading(model, 1), torch.tensor([text]))
        assert int(logits[0, -1].argmax()) == token
        text.append(token)


def test_generate_depends_on_the_seed_and_does_not_change_the_session(model: Transformer, tokenizer: Tokenizer) -> None:
    session = Session(model, tokenizer)
    session.read(TEXT)
    before = session.fork()
    one, again, other = ("".join(session.generate("Rain", max_tokens=30, seed=seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert "".join(session.generate(tokenizer.encode("Rain"), max_tokens=30, seed=1)) == one
    assert same_state(session, before)


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_generate_yields_whole_characters(seed: int) -> None:
    tokenizer = _TOKENIZER
    ids = np.random.default_rng(seed).choice(tokenizer.encode(TEXT[:60]), 40)

    class Written(Session):
        def generate_tokens(self, *args: object, **options: object):  # type: ignore[no-untyped-def, override]
            return iter(ids.tolist())

    pieces = list(Written(small_model(vocab_size=tokenizer.vocab_size), tokenizer).generate())
    assert "".join(pieces) == tokenizer.decode(ids).rstrip("\ufffd")  # what was never finished is left out


def test_generate_rejects_missing_text_and_invalid_options(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="no text to continue"):
        next(Session(model).generate_tokens())
    with pytest.raises(UserError, match="top_p"):
        next(Session(model, tokenizer).generate_tokens("x", top_p=0))
    with pytest.raises(UserError, match="max_tokens"):
        next(Session(model, tokenizer).generate("x", max_tokens=-1))


def assert_same_reading(one: Session, other: Session) -> None:
    """Two sessions have read the same tokens, and have the same state up to rounding in float32."""
    assert one.info().text_digest == other.info().text_digest and one.pending == other.pending
    assert_same_state(one.state().read_state, other.state().read_state, 1e-4)


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("read_before", [0, 3, 40])
def test_learn_from_writing_equals_reading_what_was_generated(
    model: Transformer, tokenizer: Tokenizer, learn: bool, read_before: int
) -> None:
    session = having_read(Session(model, tokenizer, learn=learn), tokens_of(read_before))
    aside, plain = session.fork(), session.fork()
    prompt = tokens_of(7, seed=3)
    got = list(session.generate_tokens(prompt, max_tokens=23, temperature=0, learn_from_writing=True))
    plain.read([*prompt, *got])
    assert_same_reading(session, plain)
    # Each token was the likeliest by all that had been learned until then, its mini-batch included.
    aside.read(prompt)
    for token in got:
        state, _, pending = aside.state()
        logits, _ = forward(model, state, torch.tensor(pending)[None])
        assert int(logits[0, -1].argmax()) == token
        aside.read([token])


def test_learn_from_writing_changes_what_is_generated(model: Transformer, tokenizer: Tokenizer) -> None:
    def text(**options: bool) -> list[int]:
        return list(Session(model, tokenizer).generate_tokens("Rain", max_tokens=60, seed=1, **options))

    with_it, without = text(learn_from_writing=True), text()
    b = model.config.mini_batch_size
    assert b is not None and with_it[: b - 5] == without[: b - 5] and with_it != without


class ScriptedSession(Session):
    """Generates given tokens."""

    ids: np.ndarray

    def generate_tokens(self, *args: object, learn_from_writing: bool = False, **options: object):  # type: ignore
        for token in self.ids.tolist():
            if learn_from_writing:
                self.read([token])
            yield token


@given(
    text=st.text(st.sampled_from("the end.雨🌧"), max_size=25),
    stop=st.lists(st.sampled_from(["the end", "d", "en.", "雨🌧", "n the"]), max_size=2),
    broken=st.integers(0, 3),
    taken=st.integers(0, 25),
)
@settings(max_examples=60, deadline=None)
def test_session_continues_with_exactly_the_text_that_was_yielded(
    text: str, stop: list[str], broken: int, taken: int
) -> None:
    model, ids = small_model(vocab_size=_TOKENIZER.vocab_size), _TOKENIZER.encode(text)
    session = ScriptedSession(model, _TOKENIZER)
    session.ids = ids[: len(ids) - broken]
    pieces = session.generate("In ", stop=stop, learn_from_writing=True)
    given_out = "".join(piece for _, piece in zip(range(taken), pieces, strict=False))
    pieces.close()  # type: ignore[attr-defined]
    if taken:
        assert_same_reading(session, having_read(Session(model, _TOKENIZER), "In " + given_out))
    assert not any(s in given_out for s in stop)


def test_generate_ends_before_a_stop_string(model: Transformer, tokenizer: Tokenizer) -> None:
    session = having_read(Session(model, tokenizer), TEXT)
    before = session.fork()
    whole = "".join(session.generate("Rain", max_tokens=40, seed=1))
    stop = whole[10:14]
    cut = "".join(session.generate("Rain", max_tokens=40, seed=1, stop=stop))
    assert cut == whole[: whole.index(stop)]
    assert same_state(session, before)
    learned = having_read(before.fork(), "Rain")
    assert "".join(session.generate("Rain", max_tokens=0, learn_from_writing=True)) == ""
    assert same_state(session, learned)


def test_generate_checks_options_before_it_reads(model: Transformer, tokenizer: Tokenizer) -> None:
    session = Session(model, tokenizer)
    for options in ({"top_k": -1}, {"stop": ""}, {"max_tokens": -1}):
        with pytest.raises(UserError):
            next(session.generate("x" * 40, learn_from_writing=True, **options))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="warmth"):
        next(session.generate("x" * 40, learn_from_writing=True, warmth=1))
    assert same_state(session, Session(model, tokenizer))


def test_divergence_while_generating_restores_a_good_state(tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=tokenizer.vocab_size, inner_loop__lr=1e30)
    session = Session(model, tokenizer)
    with pytest.raises(Diverged):
        list(session.generate("Rain", max_tokens=30, learn_from_writing=True))
    with pytest.raises(Diverged):
        list(having_read(Session(model, tokenizer), tokens_of(6)).generate(max_tokens=1, temperature=0))
    assert session.position == 0 and np.isfinite(session.read([1, 2])).all()


def test_check_finds_a_last_update_that_diverged(tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=tokenizer.vocab_size, inner_loop__lr=1e30)
    for more in (1, 2):  # no token waits for its loss, or one does
        session = Session(model)
        session.check()
        session.read(tokens_of(model.config.mini_batch_size + more))
        before = session.fork()
        with pytest.raises(Diverged):
            session.check()
        assert same_state(session, before)
