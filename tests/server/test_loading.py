"""Loading sessions from files that are damaged, crafted, or of another model."""

import json
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
from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import (
    MAX_HEADER_BYTES,
    VERSION,
    read_session_file,
    session_facts,
    write_session_file,
)
from ttt_e2e.server.engine.loading import SessionLoader

TOKENIZER = Tokenizer.train([""], 257)
MODEL = small_model(vocab_size=257).requires_grad_(False)
TEMPLATE = Session(MODEL, TOKENIZER)
TEXT = "Die Straße war naß – 雨が降った 🌧️."


def having_read(text: str = TEXT, template: Session = TEMPLATE) -> Session:
    session = template.fork()
    session.read(text)
    return session


MODELS: dict[str, dict[str, Any]] = {
    "window": dict(),
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
def test_read_info_rejects_invalid_facts(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "x.session"
    having_read().save(path)
    loader = SessionLoader(TEMPLATE)
    assert loader.read_info(path, "It") == having_read().info()
    with_fact(path, name, value)
    with pytest.raises(UserError, match=r"^It does not hold"):
        loader.read_info(path, "It")


def test_file_that_is_replaced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.session"
    having_read().save(path)
    replaced: list[bool] = []

    def slow(path: Path) -> dict[str, Any]:
        facts = session_facts(path)
        if not replaced:  # the tensors are read later than the facts
            replaced.append(True)
            having_read(TEXT * 2).save(path)
        return facts

    monkeypatch.setattr("ttt_e2e.inference.session_file.session_facts", slow)
    assert Session.load(path, MODEL, TOKENIZER).info() == having_read(TEXT * 2).info()


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_valid_session_is_loaded(tmp_path: Path, name: str, learn: bool) -> None:
    model = small_model(vocab_size=257, **{"sliding_window": 10, **MODELS[name]}).requires_grad_(False)
    template = Session(model, TOKENIZER, learn=learn)
    loader = SessionLoader(template)
    for length in (0, 3, 9, 40, 300):
        session = template.fork()
        session.read(np.random.default_rng(length).integers(0, 256, length))
        for precision in ("float32", "float16"):
            path = tmp_path / f"{length}{precision}"
            session.save(path, precision)  # type: ignore[arg-type]
            assert loader.read_info(path, "x") == session.info()
            loaded = loader.load(path, "x")
            assert loaded.info().text_digest == session.info().text_digest
            if precision == "float32":
                assert np.array_equal(loaded.read(TEXT), session.fork().read(TEXT))
    assert template.info() == loader.info  # unchanged


def crafted(change: Callable[[dict, dict], object]) -> Callable[[Path], None]:
    """A file with a valid digest, but altered facts or tensors."""

    def write(path: Path) -> None:
        having_read(TEXT * 2).save(path)
        facts, tensors = read_session_file(path)
        path.unlink()
        change(facts, tensors)
        write_session_file(path, {name: fact for name, fact in facts.items() if name != "sha256"}, tensors)

    return write


def with_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return crafted(lambda facts, tensors: tensors.update({name: change(tensors[name])}))


def with_facts(**facts: Any) -> Callable[[Path], None]:
    return crafted(lambda theirs, _: theirs.update(facts))


def broadcast_weights(facts: dict, tensors: dict) -> None:
    """A learned difference of a shape that would exhaust the memory when it is added to the weights."""
    facts["precision"] = "float16"
    for i in (0, 1):
        tensors[f"learned.{i}.w_in"] = torch.zeros(100_000, 1, 1, dtype=torch.float16)
        tensors[f"learned.{i}.w_out"] = torch.zeros(100_000, 1, 1, dtype=torch.float16)


@pytest.mark.parametrize(
    "write",
    [
        with_tensor("pending", lambda t: t + 1000),
        with_tensor("pending", lambda t: t - 1000),
        with_tensor("pending", lambda t: t[:0]),
        with_tensor("pending", lambda t: t.repeat(100)),
        with_tensor("pending", lambda t: t.float()),
        with_tensor("pending", lambda t: t[None]),
        with_tensor("fast.0.w_in", lambda t: t[:, :-1].contiguous()),
        with_tensor("fast.0.w_in", lambda t: t.repeat(2, 1, 1)),
        with_tensor("fast.1.w_out", lambda t: t.half()),
        with_tensor("fast.1.w_out", lambda t: t * float("nan")),
        with_tensor("loop.0.k", lambda t: t[:, :, :-1].contiguous()),
        with_tensor("static.2.v", lambda t: t.repeat(1, 1, 2, 1)),
        crafted(lambda facts, tensors: tensors.pop("static.0.k")),
        crafted(lambda facts, tensors: tensors.pop("pending")),
        crafted(broadcast_weights),
        crafted(lambda facts, tensors: facts.pop("position")),
        with_facts(position=35),
        with_facts(position=10**30),
        with_facts(position=-5),
        with_facts(position=True),
        with_facts(position="85"),
        with_facts(position=None),
        with_facts(precision=["float32"]),
        with_facts(precision="int8"),
        with_facts(state_digest=""),
        with_facts(state_digest="z" * 64),
        with_facts(state_digest=["0"] * 64),
        with_facts(state_bytes="many"),
        with_facts(state_bytes=-1),
        crafted(lambda facts, tensors: facts.pop("memory_bytes")),
        with_facts(text_digest="0" * 64),
        with_facts(tokens=1),
        with_facts(memory_bytes=0),
        with_facts(learn=None),
        with_facts(tokenizer=[]),
        with_facts(dtype="float64"),
        with_facts(model=None),
    ],
)
def test_crafted_files_are_rejected_without_naming_the_path(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "s")
    with pytest.raises(UserError) as caught:
        SessionLoader(TEMPLATE).load(tmp_path / "s", "The file")
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    "write",
    [
        crafted(lambda facts, tensors: tensors.update({f"{i}": torch.zeros(0) for i in range(10_000)})),
        crafted(lambda facts, tensors: tensors.update({"more": torch.zeros(1 << 20)})),
        crafted(lambda facts, tensors: tensors.pop("static.0.k")),
        with_tensor("fast.0.w_in", lambda t: t.repeat(99, 1, 1)),
        with_tensor("loop.0.k", lambda t: t.double()),
        with_tensor("pending", lambda t: t.repeat(10_000)),
        with_facts(model="0" * 64),
        with_facts(unfinished={}),
    ],
)
def test_no_tensor_is_made_of_a_file_with_another_layout(
    tmp_path: Path, write: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "s")
    loader = SessionLoader(TEMPLATE)
    monkeypatch.setattr("ttt_e2e.inference.session_file._sha256", lambda *_: pytest.fail("the tensors were made"))
    with pytest.raises(UserError):
        loader.load(tmp_path / "s", "The file")


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 1 << 62])
def test_long_header_is_not_parsed(tmp_path: Path, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = b"".join(b',"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(30_000))
    header = b'{"__metadata__":{"session":"{}"}' + tensors + b"}"
    assert len(header) > MAX_HEADER_BYTES
    (tmp_path / "s").write_bytes(length.to_bytes(8, "little") + header)
    loader = SessionLoader(TEMPLATE)
    monkeypatch.setattr("ttt_e2e.inference.session_file.safe_open", lambda *_: pytest.fail("it was parsed"))
    for load in (loader.load, loader.read_info):
        with pytest.raises(UserError, match="The file is not a session"):
            load(tmp_path / "s", "The file")


def test_facts_nested_deeply_are_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "s", {"session": "[" * 100_000})
    with pytest.raises(UserError, match="is not a session"):
        session_facts(tmp_path / "s")


def test_other_files_are_rejected_by_name(tmp_path: Path) -> None:
    path, loader = tmp_path / "s", SessionLoader(TEMPLATE)

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            loader.load(path, "The file")
        assert str(tmp_path) not in str(caught.value)

    refused("The file does not exist")
    path.write_bytes(b"\x80\x04pickle")
    refused("The file is not a session")
    save_file({"x": torch.zeros(3)}, path, {"session": json.dumps({"version": VERSION})})
    refused("altered")
    save_file({"x": torch.zeros(3)}, path, {"session": json.dumps({"version": 2})})
    refused("version 2.*read its text again")
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
    having_read(template=Session(MODEL, TOKENIZER, learn=False)).save(path)
    refused("learn = False, and this service uses True")
    path.unlink()
    other = small_model(vocab_size=257, seed=1).requires_grad_(False)
    having_read(template=Session(other, TOKENIZER)).save(path)
    refused("^The file belongs to another model")


def test_model_that_is_unfit_for_use_is_an_error() -> None:
    model = small_model(vocab_size=257).requires_grad_(False)
    model.embedding.fill_(float("nan"))
    with pytest.raises(Diverged, match="not fit for use"):
        SessionLoader(Session(model, TOKENIZER))
