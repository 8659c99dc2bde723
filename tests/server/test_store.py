"""Sessions on disk: what killed processes leave, what is damaged, and what somebody has made up."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_model, with_fact
from safetensors.torch import save_file

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Diverged, Session
from ttt_e2e.inference.session_file import read_session_file, session_facts, write_session_file
from ttt_e2e.server.loading import Loader
from ttt_e2e.server.store import Store

TOKENIZER = Tokenizer.train([""], 257)
MODEL = small_model(vocab_size=257).requires_grad_(False)
FRESH = Session(MODEL, TOKENIZER)
TEXT = "Die Straße war naß – 雨が降った 🌧️."


def having_read(text: str = TEXT, fresh: Session = FRESH) -> Session:
    session = fresh.fork()
    session.read(text)
    return session


# -- the store ---------------------------------------------------------------------------------------------------------


def test_sessions_are_found_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "data")
    assert store.records() == [] and (tmp_path / "deep" / "data").stat().st_mode & 0o777 == 0o700
    fresh, read = store.add("me", FRESH), store.add("you", having_read())
    assert len({fresh.id, read.id}) == 2 and all(len(r.id) == 37 and r.id[:5] == "sess-" for r in (fresh, read))
    store.save(read.id, having_read(TEXT * 2))
    store.close()
    again = Store(tmp_path / "deep" / "data")
    assert again.records() == [fresh, read]
    assert Session.load(again.path(fresh.id), MODEL, TOKENIZER).info() == FRESH.info()
    loaded = Session.load(again.path(read.id), MODEL, TOKENIZER)
    assert loaded.info() == having_read(TEXT * 2).info()
    again.delete(read.id)
    assert again.records() == [fresh] and not again.path(read.id).exists()
    with pytest.raises(UserError, match="Cannot delete"):
        again.delete(read.id)


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    kept = store.add("me", having_read())
    store.close()
    stranger = "sess-" + 32 * "0"
    leftovers = [f".{kept.id}.session.77.part", f".{stranger}.json.77.part"]
    (tmp_path / ".tmp-x").mkdir()
    (tmp_path / ".tmp-x/export.session").write_text("somebody's text")
    leftovers += [f"{stranger}.session", f"{stranger}.changing", f"{kept.id}.changing"]
    others = ["notes.txt", "my.session", ".mine.part", "sess-other.json", f"sess-{32 * '1'}.session"]
    for name in (*leftovers, *others):
        (tmp_path / name).write_text("x")
    again = Store(tmp_path)
    assert again.records() == [kept] and "belongs to nobody" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*others, "lock", f"{kept.id}.json", f"{kept.id}.session"]
    )


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"id": 1}', '{"id": "sess-x", "owner": "me", "created": 1}']
    + [f'{{"id": "ID", "owner": "me", "created": {when}}}' for when in ("NaN", "Infinity", "-1", "1" + "0" * 400)],
)
def test_a_damaged_record_is_left_where_it_is(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    good, bad = store.add("me", FRESH), store.add("me", having_read())
    (tmp_path / f"{bad.id}.json").write_text(content.replace("ID", bad.id))
    store.close()
    again = Store(tmp_path)
    assert again.records() == [good] and again.path(bad.id).exists()
    assert f"{bad.id}.json is damaged" in caplog.text


def test_one_process_has_it_at_a_time(tmp_path: Path) -> None:
    opening = (
        f"import sys; from ttt_e2e.server.store import Store; s = Store({str(tmp_path)!r}); print('open', flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", f"{opening}; sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout and other.stdout.readline() == b"open\n"
        with pytest.raises(UserError, match="in use by another process"):
            Store(tmp_path)
        other.kill()
    Store(tmp_path).close()


def test_no_place_for_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("file", "file/data"):
        with pytest.raises(UserError, match="Cannot keep sessions"):
            Store(tmp_path / name)


def test_a_record_that_cannot_be_written_leaves_no_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise UserError("No space left.")

    store = Store(tmp_path)
    monkeypatch.setattr("ttt_e2e.server.store.write_text", full)
    with pytest.raises(UserError, match="No space"):
        store.add("me", having_read())
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


# -- loading -----------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "sliding_window": dict(),
    "full": dict(pattern=("full",)),
    "standard": dict(suffix_layers=0, mini_batch_size=None),
    "recurrent": dict(suffix_layers=0, pattern=("mamba2", "gated-deltanet", "ttt-kvb", "titans"), mamba2__state_size=8),
    "learning over others": dict(
        pattern=("ttt-kvb", "titans", "window", "window"), mamba2__state_size=8, memory__num_persistent_tokens=3
    ),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("memory_bytes", value) for value in (153.5, -1, 10**400, "9", None)),
        *(("text_digest", value) for value in (64 * "\ud800", "", 5)),
        *(("pending", True), ("learn", 1), ("dtype", 5), ("text_bytes", -1), ("learned_norm", "x")),
    ],
)
def test_a_file_that_says_what_cannot_be(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "x.session"
    having_read().save(path)
    loader = Loader(FRESH)
    assert loader.info_of(path, "It") == having_read().info()
    with_fact(path, name, value)
    with pytest.raises(UserError, match=r"^It does not hold"):
        loader.info_of(path, "It")


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.session"
    having_read().save(path)
    replaced: list[bool] = []

    def slow(path: Path) -> dict[str, Any]:
        facts = session_facts(path)
        if not replaced:  # what the file holds is read later than what it says of itself
            replaced.append(True)
            having_read(TEXT * 2).save(path)
        return facts

    monkeypatch.setattr("ttt_e2e.inference.session_file.session_facts", slow)
    assert Session.load(path, MODEL, TOKENIZER).info() == having_read(TEXT * 2).info()


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_sound_session_is_loaded(tmp_path: Path, name: str, learn: bool) -> None:
    model = small_model(vocab_size=257, **{"sliding_window": 10, **SETTINGS[name]}).requires_grad_(False)
    fresh = Session(model, TOKENIZER, learn=learn)
    loader = Loader(fresh)
    for length in (0, 3, 9, 40, 300):
        session = fresh.fork()
        session.read(np.random.default_rng(length).integers(0, 256, length))
        for precision in ("float32", "float16"):
            path = tmp_path / f"{length}{precision}"
            session.save(path, precision)  # type: ignore[arg-type]
            assert loader.info_of(path, "x") == session.info()
            loaded = loader.load(path, "x")
            assert loaded.info().text_digest == session.info().text_digest
            if precision == "float32":
                assert np.array_equal(loaded.read(TEXT), session.fork().read(TEXT))
    assert fresh.info() == loader.info  # it stays as it is


def made_up(change: Callable[[dict, dict], object]) -> Callable[[Path], None]:
    """A file with a right digest, but other facts or tensors."""

    def write(path: Path) -> None:
        having_read(TEXT * 2).save(path)
        facts, tensors = read_session_file(path)
        path.unlink()
        change(facts, tensors)
        write_session_file(path, {name: fact for name, fact in facts.items() if name != "sha256"}, tensors)

    return write


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return made_up(lambda facts, tensors: tensors.update({name: change(tensors[name])}))


def stated(**facts: Any) -> Callable[[Path], None]:
    return made_up(lambda theirs, _: theirs.update(facts))


def half_with_wide_weights(facts: dict, tensors: dict) -> None:
    """What was learned as a difference that would grow beyond all memory when it is added."""
    facts["precision"] = "float16"
    for i in (0, 1):
        tensors[f"learned.{i}.w_in"] = torch.zeros(100_000, 1, 1, dtype=torch.float16)
        tensors[f"learned.{i}.w_out"] = torch.zeros(100_000, 1, 1, dtype=torch.float16)


@pytest.mark.parametrize(
    "write",
    [
        changed("pending", lambda t: t + 1000),
        changed("pending", lambda t: t - 1000),
        changed("pending", lambda t: t[:0]),
        changed("pending", lambda t: t.repeat(100)),
        changed("pending", lambda t: t.float()),
        changed("pending", lambda t: t[None]),
        changed("fast.0.w_in", lambda t: t[:, :-1].contiguous()),
        changed("fast.0.w_in", lambda t: t.repeat(2, 1, 1)),
        changed("fast.1.w_out", lambda t: t.half()),
        changed("fast.1.w_out", lambda t: t * float("nan")),
        changed("loop.0.k", lambda t: t[:, :, :-1].contiguous()),
        changed("static.2.v", lambda t: t.repeat(1, 1, 2, 1)),
        made_up(lambda facts, tensors: tensors.pop("static.0.k")),
        made_up(lambda facts, tensors: tensors.pop("pending")),
        made_up(half_with_wide_weights),
        made_up(lambda facts, tensors: facts.pop("position")),
        stated(position=35),
        stated(position=10**30),
        stated(position=-5),
        stated(position=True),
        stated(position="85"),
        stated(position=None),
        stated(precision=["float32"]),
        stated(precision="int8"),
        stated(state_digest=""),
        stated(state_digest="z" * 64),
        stated(state_digest=["0"] * 64),
        stated(state_bytes="many"),
        stated(state_bytes=-1),
        made_up(lambda facts, tensors: facts.pop("memory_bytes")),
        stated(text_digest="0" * 64),
        stated(tokens=1),
        stated(memory_bytes=0),
        stated(learn=None),
        stated(tokenizer=[]),
        stated(dtype="float64"),
        stated(model=None),
    ],
)
def test_what_is_made_up_is_refused(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "s")
    with pytest.raises(UserError) as caught:
        Loader(FRESH).load(tmp_path / "s", "The file")
    assert str(tmp_path) not in str(caught.value)  # a client learns nothing of where things are


def test_what_is_none_is_refused_by_name(tmp_path: Path) -> None:
    path, loader = tmp_path / "s", Loader(FRESH)

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            loader.load(path, "The file")
        assert str(tmp_path) not in str(caught.value)

    refused("The file does not exist")
    path.write_bytes(b"\x80\x04pickle")
    refused("The file is no session")
    save_file({"x": torch.zeros(3)}, path, {"session": json.dumps({"version": 2})})
    refused("altered")
    save_file({"x": torch.zeros(3)}, path, {"session": "[" * 100_000})
    refused("The file")
    path.unlink()
    having_read().save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    refused("truncated")
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    refused("altered")
    path.unlink()
    having_read(fresh=Session(MODEL, TOKENIZER, learn=False)).save(path)
    refused("learn = False, and here it is True")
    path.unlink()
    other = small_model(vocab_size=257, seed=1).requires_grad_(False)
    having_read(fresh=Session(other, TOKENIZER)).save(path)
    refused("^The file belongs to another model")


def test_a_broken_model_is_not_served() -> None:
    model = small_model(vocab_size=257).requires_grad_(False)
    model.embedding.fill_(float("nan"))
    with pytest.raises(Diverged, match="not fit for use"):
        Loader(Session(model, TOKENIZER))
