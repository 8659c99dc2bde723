"""Sessions in files: exact continuation, precision, refusal of anything else."""

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_helpers import TEXT, having_read, same_state, tokens_of, with_fast_weights
from safetensors.torch import load_file, save_file

import ttt_e2e
from ttt_e2e.config.parse import to_dict
from ttt_e2e.config.schema import replace
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference import session as session_module
from ttt_e2e.inference import session_file as session_files
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import model_fingerprint, session_facts
from ttt_e2e.inner_loop.compiled import compiled_functions
from ttt_e2e.inner_loop.meta_loss import sequence_loss
from ttt_e2e.model.checkpoint import load_transformer, model_digest
from ttt_e2e.model.transformer import Transformer


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("read_before", [0, 3, 47])
def test_loaded_session_continues_exactly(
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


def test_a_file_says_whether_there_is_a_chat_and_of_which_functions(tmp_path: Path, model: Transformer) -> None:
    session, path = having_read(Session(model), tokens_of(20)), tmp_path / "a.session"
    state = session.state()
    chatting = session.with_state(state._replace(text=state.text._replace(chat=True, tools="0123")))
    chatting.read(tokens_of(20))
    chatting.save(path)
    assert Session.load(path, model).state().text == chatting.state().text
    assert (chatting.state().text.chat, chatting.state().text.tools) == (True, "0123")
    facts, tensors = chatting.pack()
    older = session.fork()
    older.unpack({name: value for name, value in facts.items() if name != "tools"}, tensors)  # a file of before
    assert older.state().text == chatting.state().text._replace(tools="")


@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e8]))
@settings(max_examples=10, deadline=None)
def test_float32_is_saved_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, seed: int, scale: float) -> None:
    model, path = small_model(), tmp_path_factory.mktemp("s") / "s"
    session = having_read(Session(model), tokens_of(40))
    generator = torch.Generator().manual_seed(seed)
    session = with_fast_weights(session, lambda w: scale * torch.randn(w.shape, generator=generator))
    start, now = model.initial_fast_weights(1)[0][0].detach(), session.state().read_state.loop.fast[0][0]
    differs = not torch.equal(start + (now - start), now)
    assert differs or scale > 1e6
    session.save(path)
    assert same_state(session, Session.load(path, model))


@pytest.mark.parametrize(("precision", "rounding"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_precision_halves_the_fast_weights(
    tmp_path: Path, model: Transformer, tokenizer: Tokenizer, precision: str, rounding: float
) -> None:
    session = having_read(Session(model, tokenizer), TEXT)
    session.save(tmp_path / "whole")
    session.save(tmp_path / "half", precision)  # type: ignore[arg-type]
    fast = sum(w.numel() for pair in model.initial_fast_weights(1) for w in pair)
    assert (tmp_path / "whole").stat().st_size - (tmp_path / "half").stat().st_size == pytest.approx(2 * fast, abs=200)
    loaded = Session.load(tmp_path / "half", model, tokenizer)
    assert not same_state(session, loaded)
    pairs = zip(
        *(s.state().read_state.loop.fast for s in (session, loaded)), model.initial_fast_weights(1), strict=True
    )
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


def test_save_rejects_unknown_and_overflowing_precision(tmp_path: Path) -> None:
    session = having_read(Session(small_model()), tokens_of(20))
    with pytest.raises(UserError, match=r"'int8'.*float16"):
        session.save(tmp_path / "s", "int8")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="too large for float16"):
        with_fast_weights(session, lambda w: w + 1e6).save(tmp_path / "s", "float16")
    assert not (tmp_path / "s").exists()


def test_compiled_session_is_saved_like_any_other(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    model = small_model(vocab_size=tokenizer.vocab_size, num_hidden_layers=2).eval().requires_grad_(False)
    monkeypatch.setattr(session_module, "compiled_functions", lambda device: compiled_functions(device, "aot_eager"))
    tokens = tokens_of(60)
    plain, compiled = Session(model, tokenizer), Session(model, tokenizer, compile=True)
    assert compiled.compiled and not plain.compiled
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Continuing without compilation")
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


def test_session_of_a_standard_model_is_saved(tmp_path: Path) -> None:
    model = small_model(suffix_layers=0, pattern=("full",), mini_batch_size=None, vocab_size=50)
    session, tokens = Session(model), tokens_of(20)
    assert not session.learn
    session.read(tokens)
    session.save(tmp_path / "s")
    rest = Session.load(tmp_path / "s", model).score_pending()
    expected = sequence_loss(model, torch.tensor(tokens)[None]).nll_BT[0]
    np.testing.assert_allclose(rest, expected.numpy(), atol=1e-5)


def test_load_rejects_damaged_foreign_and_old_files(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
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
    refused(
        data.replace(b'version\\": 4', b'version\\": 3'),
        "version 3, and this ttt-e2e reads version 4; read its text again",
    )
    refused(data.replace(b'version\\": 4', b'version\\": 5'), "version 5, and this ttt-e2e reads version 4; update")
    save_file({"x": torch.zeros(3)}, tmp_path / "foreign")
    refused((tmp_path / "foreign").read_bytes(), "not a session")
    refused(data, "another model", small_model(seed=1, vocab_size=tokenizer.vocab_size))
    refused(data, "another model", small_model(vocab_size=tokenizer.vocab_size, inner_loop__lr=0.5))
    with pytest.raises(UserError, match="another tokenizer"):
        Session.load(good, model, Tokenizer.train(["aaa bbb aaa bbb"], 260))
    with pytest.raises(UserError, match="does not exist"):
        Session.load(tmp_path / "nowhere", model, tokenizer)


def test_save_never_replaces_another_kind_of_file(tmp_path: Path) -> None:
    session = Session(small_model())
    (tmp_path / "diary.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    for target in ("diary.txt", "folder"):
        with pytest.raises(UserError, match=target):
            session.save(tmp_path / target)
    assert (tmp_path / "diary.txt").read_text() == "mine"


def test_save_on_a_full_disk_keeps_the_old_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_session_file_is_safetensors_with_json_facts(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    session = Session(model, tokenizer)
    session.read(TEXT)
    session.save(tmp_path / "s")
    tensors = load_file(tmp_path / "s")
    assert tensors["fast.0.w_in"].dtype == torch.float32
    facts = session_facts(tmp_path / "s")
    assert json.dumps(facts) and facts["position"] == session.position


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            "static.0.k static.0.v static.1.k static.1.v static.2.k static.2.v loop.0.k loop.0.v "
            "fast.0.w_in fast.0.w_out fast.1.w_in fast.1.w_out",
        ),
        (
            {"fast_rank": 2, "num_hidden_layers": 1, "suffix_layers": 1},
            "static.0.k static.0.v fast.0.up_in fast.0.down_in fast.0.up_out fast.0.down_out",
        ),
        (
            {"suffix_layers": 0, "pattern": ("mamba2", "gated-deltanet", "ttt-kvb", "titans"), "sliding_window": 10},
            "static.0.conv static.0.ssm static.1.conv static.1.rule "
            "static.2.k static.2.v static.2.w_in static.2.w_out "
            "static.2.pending_k static.2.pending_v static.2.pending_theta "
            "static.3.k static.3.v static.3.w_in static.3.w_out static.3.momentum_in static.3.momentum_out "
            "static.3.pending_k static.3.pending_v static.3.pending_theta static.3.pending_eta static.3.pending_keep",
        ),
    ],
)
def test_tensor_names_on_disk_never_change(tmp_path: Path, changes: dict, expected: str) -> None:
    having_read(Session(small_model(**changes)), tokens_of(60)).save(tmp_path / "s")
    assert set(load_file(tmp_path / "s")) == {"pending", *expected.split()}


def test_tensor_names_are_in_the_order_of_the_fields() -> None:
    for kind, names in session_files.TENSOR_NAMES.items():
        assert [field.rpartition("_")[0] for field in kind._fields] == names.split()  # type: ignore[attr-defined]


def test_sessions_of_older_models_stay_readable() -> None:
    """The shipped model's configuration is older than some settings, which at their defaults change no fingerprint."""
    folder = Path(ttt_e2e.__file__).parent / "shipped"
    config = json.loads((folder / "config.json").read_text())["model"]
    model = load_transformer(folder)
    assert to_dict(model.config).keys() > config.keys()
    expected = hashlib.sha256(f"{model_digest(model)} {json.dumps(config, sort_keys=True)}".encode()).hexdigest()
    assert model_fingerprint(model) == expected
    model.config = replace(model.config, {"rope_pattern": (True, False)})
    assert model_fingerprint(model) != expected
