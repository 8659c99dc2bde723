"""One text being read: split, saved, forked, diverging, and written on."""

import gc
import json
import math
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference import session as session_module
from ttt_e2e.inference import session_file as session_files
from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import session_facts
from ttt_e2e.inference.session_pool import SessionPool
from ttt_e2e.inference.streaming import forward, start_reading
from ttt_e2e.inference.text_digest import token_bytes
from ttt_e2e.inner_loop.compiled import compiled_functions
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.transformer import Transformer

TEXT = "Die Straße war naß – 雨が降った 🌧️. The rain had stopped; the street was still wet.\n" * 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 280)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    return small_model(vocab_size=tokenizer.vocab_size).eval().requires_grad_(False)


def tokens_of(count: int, seed: int = 0, vocabulary: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, count)


def same_state(one: Session, other: Session) -> bool:
    pairs = zip(one._state.read_state.loop.tensors(), other._state.read_state.loop.tensors(), strict=True)
    static = zip(one._state.read_state.static or (), other._state.read_state.static or (), strict=True)
    return (
        one.position == other.position
        and np.array_equal(one._state.pending, other._state.pending)
        and all(torch.equal(a, b) for a, b in pairs)
        and all(torch.equal(a, b) for x, y in static for a, b in zip(x, y, strict=True))
    )


def having_read(session: Session, tokens: np.ndarray | str) -> Session:
    session.read(tokens)
    return session


@pytest.mark.parametrize("learn", [True, False])
@given(cuts=st.lists(st.integers(0, 93), max_size=8))
@settings(max_examples=15, deadline=None)
def test_any_pieces_give_the_same_state_bit_for_bit(learn: bool, cuts: list[int]) -> None:
    model, tokens = small_model(), tokens_of(93)
    whole, split = Session(model, learn=learn), Session(model, learn=learn)
    expected = whole.read(tokens)
    losses = [split.read(piece) for piece in np.split(tokens, sorted(cuts))]
    assert np.array_equal(expected, np.concatenate(losses))
    assert same_state(whole, split)
    assert whole.info() == split.info()
    # A digest of the tokens, whoever read them; and of every one of them.
    assert whole.info().text_digest == having_read(Session(model, learn=not learn), tokens).info().text_digest
    for i in (0, 50, 92):
        assert whole.info().text_digest != having_read(Session(model), tokens[:i]).info().text_digest


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize(("dtype", "inner_lr", "atol"), [("float32", 0.1, 1e-5), ("float64", 1.0, 1e-6)])
def test_losses_are_those_of_sequence_loss(learn: bool, dtype: str, inner_lr: float, atol: float) -> None:
    # With random weights and an inner_lr of 1, learning amplifies float32's rounding tenfold in a hundred tokens.
    kind = getattr(torch, dtype)
    model, tokens = small_model(kind, inner_loop__lr=inner_lr), tokens_of(98)
    session = Session(model, learn=learn, dtype=kind)
    losses = np.concatenate((session.read(tokens), session.score_pending()))
    expected = sequence_loss(model, torch.tensor(tokens)[None], learn=learn, dtype=kind)
    np.testing.assert_allclose(losses, expected.nll_BT[0].numpy(), atol=atol)


def test_scoring_the_rest_changes_nothing() -> None:
    session = Session(small_model())
    session.read(tokens_of(14))
    before = session.fork()
    assert len(session.score_pending()) == session.pending == 3
    assert same_state(session, before)


def test_text_in_pieces_is_one_text(model: Transformer, tokenizer: Tokenizer) -> None:
    whole, split = Session(model, tokenizer), Session(model, tokenizer)
    expected = whole.read(TEXT)
    got = np.concatenate(list(split.read_stream(TEXT[i : i + 7] for i in range(0, len(TEXT), 7))))
    assert np.array_equal(expected, got)
    assert same_state(whole, split)
    assert len(expected) + whole.pending == len(tokenizer.encode(TEXT))  # BOS comes first: every token has a loss


def test_a_fork_goes_its_own_way() -> None:
    session = Session(small_model())
    session.read(tokens_of(20))
    fork, kept = session.fork(), session.fork()
    fork.read(tokens_of(20, seed=1))
    assert same_state(session, kept)
    assert fork.position > session.position


def test_info(model: Transformer, tokenizer: Tokenizer) -> None:
    session = Session(model, tokenizer)
    fresh = session.info()
    assert (fresh.tokens, fresh.position, fresh.pending, fresh.text_bytes, fresh.learned_norm) == (1, 0, 0, 0, 0.0)
    session.read(TEXT)
    info = session.info()
    assert info.text_bytes == len(TEXT.encode())
    assert info.tokens == 1 + len(tokenizer.encode(TEXT)) == info.position + info.pending + 1
    flat = [
        torch.cat([w.flatten() for pair in fast for w in pair])
        for fast in (session._state.read_state.loop.fast, model.initial_fast_weights(1))
    ]
    assert info.learned_norm == pytest.approx(float((flat[0] - flat[1]).norm()), rel=1e-5) and info.learned_norm > 0
    caches = 2 * 4 * model.config.num_hidden_layers * model.config.sliding_window * model.config.hidden_size
    assert info.memory_bytes == 4 * flat[0].numel() + caches
    assert having_read(Session(model, tokenizer, learn=False), TEXT).info().learned_norm == 0
    assert Session(model).info().text_bytes is None


@pytest.mark.parametrize("text", ["Straße 雨 🌧️", "<|bos|>", "\x00\x7f\xa0"])
def test_bytes_of_tokens(text: str, tokenizer: Tokenizer) -> None:
    sizes = token_bytes(tokenizer)
    assert sizes is not None and sizes[tokenizer.bos] == 0
    assert sizes[tokenizer.encode(text)].sum() == len(text.encode())


def test_reset_forgets_everything_but_not_in_forks(model: Transformer, tokenizer: Tokenizer) -> None:
    session = having_read(Session(model, tokenizer), TEXT)
    fork = session.fork()
    session.reset()
    assert same_state(session, Session(model, tokenizer)) and session.info() == Session(model, tokenizer).info()
    assert same_state(fork, having_read(session, TEXT))


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("read_before", [0, 3, 47])
def test_saved_and_loaded_goes_on_as_if_uninterrupted(
    tmp_path: Path, model: Transformer, tokenizer: Tokenizer, learn: bool, read_before: int
) -> None:
    tokens = tokens_of(160)
    session = Session(model, tokenizer, learn=learn)
    session.read(tokens[:read_before])
    session.save(tmp_path / "a.session")
    loaded = Session.load(tmp_path / "a.session", model, tokenizer)
    assert loaded.learn == learn and loaded.info() == session.info()
    assert same_state(session, loaded)
    assert np.array_equal(session.read(tokens[read_before:]), loaded.read(tokens[read_before:]))
    assert same_state(session, loaded)


@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e8]))
@settings(max_examples=10, deadline=None)
def test_float32_is_kept_bit_for_bit_where_a_difference_would_not_be(
    tmp_path_factory: pytest.TempPathFactory, seed: int, scale: float
) -> None:
    model, path = small_model(), tmp_path_factory.mktemp("s") / "s"
    session = having_read(Session(model), tokens_of(40))
    generator = torch.Generator().manual_seed(seed)
    fast = [type(w)(*(scale * torch.randn(t.shape, generator=generator) for t in w)) for w in session._state.read_state.loop.fast]
    session._state = session._state._replace(read_state=session._state.read_state._replace(loop=session._state.read_state.loop._replace(fast=tuple(fast))))
    start = model.initial_fast_weights(1)[0].w_in_BED.detach()
    differs = not torch.equal(start + (fast[0].w_in_BED - start), fast[0].w_in_BED)
    assert differs or scale > 1e6
    session.save(path)
    assert same_state(session, Session.load(path, model))


@pytest.mark.parametrize(("precision", "rounding"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_precision_is_half_the_size_and_nearly_the_same(
    tmp_path: Path, model: Transformer, tokenizer: Tokenizer, precision: str, rounding: float
) -> None:
    session = having_read(Session(model, tokenizer), TEXT)
    session.save(tmp_path / "whole")
    session.save(tmp_path / "half", precision)  # type: ignore[arg-type]
    fast = sum(w.numel() for pair in model.initial_fast_weights(1) for w in pair)
    assert (tmp_path / "whole").stat().st_size - (tmp_path / "half").stat().st_size == pytest.approx(2 * fast, abs=200)
    loaded = Session.load(tmp_path / "half", model, tokenizer)
    assert not same_state(session, loaded)
    pairs = zip(session._state.read_state.loop.fast, loaded._state.read_state.loop.fast, model.initial_fast_weights(1), strict=True)
    for now, back, start in ((w, v, w0) for pair in pairs for w, v, w0 in zip(*pair, strict=True)):
        # Half a unit of what was learned, and the last bits of float32 and of the smallest halves.
        assert ((now - back).abs() <= rounding * (now - start).abs() + 3e-7 * now.abs() + 1e-7).all()
    after, expected = loaded.read(TEXT)[:60], session.read(TEXT)[:60]
    assert not np.array_equal(after, expected)
    assert float(after.mean()) == pytest.approx(float(expected.mean()), abs=1e-2)
    # What was not learned is not rounded either.
    fresh = Session(model, tokenizer)
    fresh.save(tmp_path / "fresh", precision)  # type: ignore[arg-type]
    assert same_state(fresh, Session.load(tmp_path / "fresh", model, tokenizer))


def test_precisions_that_do_not_fit(tmp_path: Path) -> None:
    session = having_read(Session(small_model()), tokens_of(20))
    with pytest.raises(UserError, match=r"'int8'.*float16"):
        session.save(tmp_path / "s", "int8")  # type: ignore[arg-type]
    fast = [type(w)(*(t + 1e6 for t in w)) for w in session._state.read_state.loop.fast]
    session._state = session._state._replace(read_state=session._state.read_state._replace(loop=session._state.read_state.loop._replace(fast=tuple(fast))))
    with pytest.raises(UserError, match="too large for float16"):
        session.save(tmp_path / "s", "float16")
    assert not (tmp_path / "s").exists()


def test_compiled_saved_and_read_on_plainly(
    tmp_path: Path, model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(session_module, "compiled_functions", lambda device: compiled_functions(device, "aot_eager"))
    tokens = tokens_of(60)
    plain, compiled = Session(model, tokenizer), Session(model, tokenizer, compile=True)
    assert compiled.compiled and not plain.compiled
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Going on without compilation")
        for read_before in (8, 32):  # in the first window, and after it
            part = tokens[compiled.position + compiled.pending : read_before]
            np.testing.assert_allclose(compiled.read(part), plain.read(part), atol=1e-4)
            compiled.save(tmp_path / "s")
            loaded = Session.load(tmp_path / "s", model, tokenizer)
            assert same_state(compiled, loaded) and not loaded.compiled
            expected = plain.fork().read(tokens[read_before:])
            np.testing.assert_allclose(loaded.read(tokens[read_before:]), expected, atol=1e-4)
        loaded = Session.load(tmp_path / "s", model, tokenizer, compile=True)
        assert np.array_equal(loaded.read(tokens[32:]), compiled.read(tokens[32:]))


def test_where_nothing_is_compiled() -> None:
    assert not Session(small_model(suffix_layers=0), compile=True).compiled
    assert not Session(small_model(), learn=False, compile=True).compiled
    with pytest.warns(UserWarning, match="needs a window everywhere, not full"):
        assert not Session(small_model(pattern=("full",)), compile=True).compiled


def test_a_standard_model_reads_and_is_saved(tmp_path: Path) -> None:
    model = small_model(suffix_layers=0, pattern=("full",), mini_batch_size=None, vocab_size=50)
    session, tokens = Session(model), tokens_of(20)
    assert not session.learn
    session.read(tokens)
    session.save(tmp_path / "s")
    rest = Session.load(tmp_path / "s", model).score_pending()
    expected = sequence_loss(model, torch.tensor(tokens)[None]).nll_BT[0]
    np.testing.assert_allclose(rest, expected.numpy(), atol=1e-5)


def test_refused_session_files(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    session = Session(model, tokenizer)
    session.read(tokens_of(30))
    good = tmp_path / "good.session"
    session.save(good)
    data = good.read_bytes()

    def refused(content: bytes, match: str, with_model: Transformer = model) -> None:
        bad = tmp_path / "bad.session"
        bad.write_bytes(content)
        with pytest.raises(UserError, match=match):
            Session.load(bad, with_model, tokenizer)

    for cut in (0, 5, 100, len(data) // 2, len(data) - 1):
        refused(data[:cut], "truncated")
    refused(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], "altered")
    refused(data.replace(b'position\\": 30', b'position\\": 31'), "altered")
    refused(b"\x80\x04pickle", "not a session")
    refused(data.replace(b'version\\": 3', b'version\\": 2'), "version 2, and this ttt-e2e reads version 3; read its text again")
    refused(data.replace(b'version\\": 3', b'version\\": 4'), "version 4, and this ttt-e2e reads version 3; update")
    save_file({"x": torch.zeros(3)}, tmp_path / "foreign")
    refused((tmp_path / "foreign").read_bytes(), "not a session")
    refused(data, "another model", small_model(seed=1, vocab_size=tokenizer.vocab_size))
    refused(data, "another model", small_model(vocab_size=tokenizer.vocab_size, inner_loop__lr=0.5))
    with pytest.raises(UserError, match="another tokenizer"):
        Session.load(good, model, Tokenizer.train(["aaa bbb aaa bbb"], 260))
    with pytest.raises(UserError, match="does not exist"):
        Session.load(tmp_path / "nowhere", model, tokenizer)


def test_saving_never_replaces_something_else(tmp_path: Path) -> None:
    session = Session(small_model())
    (tmp_path / "diary.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    for target in ("diary.txt", "folder"):
        with pytest.raises(UserError, match=target):
            session.save(tmp_path / target)
    assert (tmp_path / "diary.txt").read_text() == "mine"


def test_a_full_disk_keeps_the_session_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    session = Session(model)
    session.save(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    session.read(tokens_of(20))

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session_files, "save_safetensors", full)
    with pytest.raises(UserError, match="No space left"):
        session.save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["s"]


def test_divergence_returns_to_the_last_good_state() -> None:
    model, tokens = small_model(inner_loop__lr=1e30), tokens_of(60)
    session = Session(model)
    with pytest.raises(Diverged, match=r"at tokens 5 to 10") as caught:
        session.read(tokens)
    assert caught.value.position == session.position == 0  # the very first update was the bad one
    assert all(torch.isfinite(t).all() for t in session._state.read_state.loop.tensors())
    fresh = Session(model)
    fresh.read(tokens[:1])
    assert same_state(session, fresh)


def test_divergence_right_after_loading_says_that_nothing_earlier_is_known(tmp_path: Path) -> None:
    model, tokens = small_model(inner_loop__lr=1e30), tokens_of(60)
    session = Session(model)
    session.read(tokens[:6])  # the update that will turn out bad
    session.save(tmp_path / "s")
    loaded = Session.load(tmp_path / "s", model)
    with pytest.raises(Diverged, match=r"after 5 tokens") as caught:
        loaded.read(tokens[6:])
    assert "no earlier one is known" in str(caught.value) and loaded.position == 5


def test_divergence_later_keeps_what_was_learned_before(tmp_path: Path) -> None:
    model, tokens = small_model(), tokens_of(60)
    session = Session(model)
    session.read(tokens[:31])
    good = session.fork()
    session.read(tokens[31:36])  # this update will turn out bad
    fast = [type(w)(*(t * math.nan for t in w)) for w in session._state.read_state.loop.fast]
    session._state = session._state._replace(read_state=session._state.read_state._replace(loop=session._state.read_state.loop._replace(fast=tuple(fast))))
    with pytest.raises(Diverged, match="35 to 40"):
        session.read(tokens[36:])
    assert session.position == 30
    assert same_state(session, good) and session.info() == good.info()
    session.save(tmp_path / "kept")
    assert np.isfinite(Session.load(tmp_path / "kept", model).read(tokens[31:])).all()


def test_a_broken_model_is_not_called_divergence_of_learning() -> None:
    model = small_model()
    with torch.no_grad():
        model.embedding.fill_(math.nan)
    with pytest.raises(Diverged, match="nothing was learned"):
        Session(model).read(tokens_of(20))


@pytest.mark.parametrize("bad", [[-1], [50], [0.5], [[1, 2]]])
def test_ids_that_are_none(bad: list) -> None:
    with pytest.raises(UserError, match="0 to 49"):
        Session(small_model()).read(np.array(bad))


# -- generation --------------------------------------------------------------------------------------------------------


def test_greedy_equals_reading_everything_anew(model: Transformer, tokenizer: Tokenizer) -> None:
    session = Session(model, tokenizer, learn=False)
    session.read(tokens_of(50))
    prompt = tokens_of(7, seed=3)
    got = list(session.generate_tokens(prompt, max_tokens=20, temperature=0))
    text = [tokenizer.bos, *tokens_of(50), *prompt]
    for token in got:
        logits, _ = forward(model, start_reading(model, 1), torch.tensor([text]))
        assert int(logits[0, -1].argmax()) == token
        text.append(token)


def test_generation_is_decided_by_its_seed_and_changes_nothing(model: Transformer, tokenizer: Tokenizer) -> None:
    session = Session(model, tokenizer)
    session.read(TEXT)
    before = session.fork()
    one, again, other = ("".join(session.generate("Rain", max_tokens=30, seed=seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert same_state(session, before)


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_text_comes_in_whole_characters(seed: int) -> None:
    tokenizer = _TOKENIZER
    ids = np.random.default_rng(seed).choice(tokenizer.encode(TEXT[:60]), 40)

    class Written(Session):
        def generate_tokens(self, *args: object, **options: object):  # type: ignore[no-untyped-def, override]
            return iter(ids.tolist())

    pieces = list(Written(small_model(vocab_size=tokenizer.vocab_size), tokenizer).generate())
    assert "".join(pieces) == tokenizer.decode(ids).rstrip("\ufffd")  # what was never finished is left out


_TOKENIZER = Tokenizer.train([""], 257)  # every byte is a token: most characters come in parts


def test_writing_that_cannot_be(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="no text to continue"):
        next(Session(model).generate_tokens())
    with pytest.raises(UserError, match="top_p"):
        next(Session(model, tokenizer).generate_tokens("x", top_p=0))
    with pytest.raises(UserError, match="max_tokens"):
        next(Session(model, tokenizer).generate("x", max_tokens=-1))


def test_a_session_holds_no_more_than_it_says_and_costs_the_same_all_along(model: Transformer) -> None:
    session, ids = Session(model), np.random.default_rng(0).integers(0, model.config.vocab_size, 5000)
    session.read(ids[:100])
    before = weakref.ref(session.state().read_state.loop.fast[0][0])
    operations = []
    for part in (ids[100:200], ids[200:4800], ids[4800:4900]):
        with FlopCounterMode(display=False) as counter:
            session.read(part)
        operations.append(counter.get_total_flops())
    gc.collect()
    assert before() is None and operations[0] == operations[2]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in session.state().read_state.tensors()}
    b, window = session.mini_batch_size, model.config.sliding_window
    # A cache is cut from one that has room for a mini-batch more.
    assert sum(held.values()) <= session.info().memory_bytes * (window + b) / window
    assert session.state().pending.base is None
    pool = SessionPool(session)
    taken = pool.peek(pool.add(session)).state()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in taken.read_state.tensors()}
    assert sum(held.values()) == session.info().memory_bytes and taken.pending.base is None


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("read_before", [0, 3, 40])
def test_what_is_written_becomes_part_of_the_session(
    model: Transformer, tokenizer: Tokenizer, learn: bool, read_before: int
) -> None:
    session = having_read(Session(model, tokenizer, learn=learn), tokens_of(read_before))
    aside, plain = session.fork(), session.fork()
    prompt = tokens_of(7, seed=3)
    got = list(session.generate_tokens(prompt, max_tokens=23, temperature=0, learn_from_writing=True))
    plain.read([*prompt, *got])
    assert same_state(session, plain) and session.info() == plain.info()
    # Each token was the likeliest by all that had been learned until then, its mini-batch included.
    aside.read(prompt)
    for token in got:
        logits, _ = forward(model, aside._state.read_state, torch.tensor(aside._state.pending)[None])
        assert int(logits[0, -1].argmax()) == token
        aside.read([token])


def test_learning_from_writing_makes_a_difference(model: Transformer, tokenizer: Tokenizer) -> None:
    def text(**options: bool) -> list[int]:
        return list(Session(model, tokenizer).generate_tokens("Rain", max_tokens=60, seed=1, **options))

    with_it, without = text(learn_from_writing=True), text()
    b = model.config.mini_batch_size
    assert b is not None and with_it[: b - 5] == without[: b - 5] and with_it != without


class Writing(Session):
    """Writes given tokens, learning from them if it is asked to."""

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
def test_the_session_goes_on_with_exactly_the_text_given_out(
    text: str, stop: list[str], broken: int, taken: int
) -> None:
    model, ids = small_model(vocab_size=_TOKENIZER.vocab_size), _TOKENIZER.encode(text)
    session = Writing(model, _TOKENIZER)
    session.ids = ids[: len(ids) - broken]
    pieces = session.generate("In ", stop=stop, learn_from_writing=True)
    given_out = "".join(piece for _, piece in zip(range(taken), pieces, strict=False))
    pieces.close()  # type: ignore[attr-defined]
    if taken:
        assert same_state(session, having_read(Session(model, _TOKENIZER), "In " + given_out))
    assert not any(s in given_out for s in stop)


def test_stop_strings_and_the_session_as_it_was(model: Transformer, tokenizer: Tokenizer) -> None:
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


def test_options_are_refused_before_anything_is_read(model: Transformer, tokenizer: Tokenizer) -> None:
    session = Session(model, tokenizer)
    for options in ({"top_k": -1}, {"stop": ""}, {"max_tokens": -1}):
        with pytest.raises(UserError):
            next(session.generate("x" * 40, learn_from_writing=True, **options))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="warmth"):
        next(session.generate("x" * 40, learn_from_writing=True, warmth=1))
    assert same_state(session, Session(model, tokenizer))


def test_divergence_while_writing_leaves_a_sound_session(tokenizer: Tokenizer) -> None:
    model = small_model(vocab_size=tokenizer.vocab_size, inner_loop__lr=1e30)
    session = Session(model, tokenizer)
    with pytest.raises(Diverged):
        list(session.generate("Rain", max_tokens=30, learn_from_writing=True))
    with pytest.raises(Diverged):
        list(having_read(Session(model, tokenizer), tokens_of(6)).generate(max_tokens=1, temperature=0))
    assert session.position == 0 and np.isfinite(session.read([1, 2])).all()


def test_models_to_read_with(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    from ttt_e2e.model.checkpoint import save_model

    tokenizer.save(tmp_path / "t.json")
    Tokenizer.train([TEXT], 270).save(tmp_path / "other.json")
    save_model(model, tmp_path / "good", tmp_path / "t.json")
    save_model(model, tmp_path / "mismatched", tmp_path / "other.json")
    save_model(model, tmp_path / "without", None)
    loaded, _ = load_model(tmp_path / "good")
    assert not any(weight.requires_grad for weight in loaded.parameters())
    for name, match in (
        ("mismatched", "vocabulary"),
        ("without", "no tokenizer"),
        ("nowhere", "no model folder"),
    ):
        with pytest.raises(UserError, match=match):
            load_model(tmp_path / name)


def test_a_session_file_is_safetensors(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    session = Session(model, tokenizer)
    session.read(TEXT)
    session.save(tmp_path / "s")
    tensors = load_file(tmp_path / "s")
    assert tensors["fast.0.w_in"].dtype == torch.float32
    facts = session_facts(tmp_path / "s")
    assert json.dumps(facts) and facts["position"] == session.position
