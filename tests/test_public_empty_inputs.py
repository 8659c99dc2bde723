"""Public functions that are given nothing: the empty result, or one sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_model

from ttt_e2e import (
    Notebook,
    Session,
    SessionPool,
    UserError,
    evaluate_documents,
    load_model,
    override,
    preset,
    sequence_loss,
    train,
)
from ttt_e2e.data.text import Document
from ttt_e2e.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["geese"], 260)


def session(text: str = "") -> Session:
    made = Session(small_model(vocab_size=TOKENIZER.vocab_size), TOKENIZER)
    made.read(text)
    return made


def pool(request: Callable[[SessionPool, int], None]) -> list[Any]:
    made = SessionPool(Session(session().model))  # without a tokenizer there is no BOS to begin with
    request(made, made.add())
    return [getattr(event, "error", None) for event in made.step()]


@pytest.mark.parametrize("shape", [(0, 6), (2, 1), (2, 0), (0, 0), (0,)])
@pytest.mark.parametrize("learn", [True, False])
def test_the_loss_of_nothing_is_refused(shape: tuple[int, ...], learn: bool) -> None:
    with pytest.raises(ValueError, match="with B and T at least 1, not"):
        sequence_loss(session().model, torch.zeros(shape, dtype=torch.int64), learn=learn)


@pytest.mark.parametrize(
    "result",
    [
        lambda folder: session().read("").tolist(),
        lambda folder: session().read(np.empty(0)).tolist(),
        lambda folder: list(session("geese").read_stream([])),
        lambda folder: list(session("geese").read_stream(["", ""])),
        lambda folder: session().score_pending().tolist(),
        lambda folder: list(session().generate("", max_tokens=0)),
        lambda folder: SessionPool(session()).step(),
        lambda folder: Notebook(folder / "n").add("") or [],
        lambda folder: list(Notebook(folder / "n").record([])),
        lambda folder: list(Notebook(folder / "n").text()),
        lambda folder: Notebook(folder / "n").search("geese"),
        lambda folder: Notebook(folder / "n").search(""),
    ],
)
def test_nothing_gives_nothing(tmp_path: Path, result: Callable[[Path], list[Any]]) -> None:
    assert result(tmp_path) == []


def test_an_empty_read_and_prompt_change_nothing() -> None:
    one, other = session("grey geese flew"), session("grey geese flew")
    one.read([])
    assert one.info() == other.info()
    assert list(one.generate(max_tokens=3)) == list(other.generate("", max_tokens=3))
    assert pool(lambda made, id: made.submit_read(id, [])) == [None]
    (error,) = pool(lambda made, id: made.submit_generate(id, []))
    assert isinstance(error, UserError) and "no text to continue" in str(error)
    assert override(preset("tiny"), []) == preset("tiny")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: list(Session(session().model).generate_tokens([])), "no text to continue"),
        (lambda folder: list(session().generate("a", stop="")), "stop string is empty"),
        (lambda folder: evaluate_documents(session().model, TOKENIZER, [], progress=False), "no documents"),
        (
            lambda folder: evaluate_documents(session().model, TOKENIZER, [Document("x", "")], progress=False),
            "empty",
        ),
        (lambda folder: load_model(folder), "not a model folder"),
        (lambda folder: train(preset("tiny"), folder, folder / "out"), "not a folder of prepared tokens"),
        (lambda folder: preset(""), "no preset ''"),
        (lambda folder: override(preset("tiny"), [""]), "not a setting"),
        (lambda folder: Notebook(folder / "n").search("geese", 0), "at least one"),
    ],
)
def test_nothing_to_work_with_is_one_sentence(tmp_path: Path, call: Callable[[Path], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(tmp_path)
    assert "\n" not in str(caught.value)
