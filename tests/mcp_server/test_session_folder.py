"""The folder of sessions: every change against plain sessions and texts, with failures and kills in the middle."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from chat_families import FAMILIES
from engine_helpers import F64, MODEL, TEMPLATE, TOKENIZER, assert_same, text_of
from helpers import flipped, small_model, start_copy

from ttt_e2e.data.text import text_chunks
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.files import lock_beside
from ttt_e2e.inference.session import Session
from ttt_e2e.mcp_server import sessions as sessions_module
from ttt_e2e.mcp_server.sessions import SessionFolder
from ttt_e2e.reading.reading import Reading
from ttt_e2e.reading.resume import save_unfinished
from ttt_e2e.retrieval.notebook import Notebook

FIRST, SECOND = text_of(1, 30), "A zebra came.\n" + text_of(2, 30)
NEW = " The walrus came last.\n"

pytestmark = pytest.mark.usefixtures("one_thread")


def folder(path: Path) -> SessionFolder:
    """The sessions in `path`, as after a restart."""
    return SessionFolder(path / "sessions", TEMPLATE.fork())


@cache
def having_read(*texts: str) -> Session:
    session = TEMPLATE.fork()
    for text in texts:
        for _ in session.read_stream([text]):
            pass
    return session


def assert_holds(path: Path, name: str, *texts: str) -> None:
    """The session has read these texts, and its notebook has them."""
    assert_same(Session.load(path / f"sessions/{name}.session", MODEL, TOKENIZER), having_read(*texts))
    assert recorded(path, name) == "".join(texts)


def recorded(path: Path, name: str) -> str:
    with Notebook(path / f"sessions/{name}.session.notebook", create=False) as notebook:
        return "".join(notebook.text())


def names(path: Path) -> list[str]:
    return [one.name for one in folder(path).summaries()]


def answer(sessions: SessionFolder, name: str, prompt: str, **options: int) -> str:
    return "".join(sessions.ask(name, prompt, temperature=0, **options)[0])


def fail_at(call: int, error: BaseException) -> Callable[[int], None]:
    """A report that raises when it is called for this time."""
    calls = iter(range(1, 1000))

    def report(done: int) -> None:
        if next(calls) == call:
            raise error

    return report


# -- what works --------------------------------------------------------------------------------------------------------


def test_sessions_read_answer_and_find_after_a_restart(tmp_path: Path) -> None:
    reports: list[int] = []
    result = folder(tmp_path).read("book", [FIRST[:10], FIRST[10:]], reports.append)
    alone = TEMPLATE.fork()
    losses = np.concatenate([*alone.read_stream([FIRST]), alone.score_pending()])
    assert result.tokens == len(losses) == len(TOKENIZER.encode(FIRST)) and result.remark is None
    assert result.loss == pytest.approx(losses.mean(), rel=1e-6)
    assert reports == sorted(reports) and reports[-1] == len(FIRST.encode())
    second = folder(tmp_path).read("book", [SECOND])
    more = np.concatenate([*alone.read_stream([SECOND]), alone.score_pending()])
    assert second.tokens == len(TOKENIZER.encode(SECOND))
    assert second.loss == pytest.approx(more[-second.tokens :].mean(), rel=1e-6)
    assert_holds(tmp_path, "book", FIRST, SECOND)
    sessions = folder(tmp_path)
    expected = "".join(alone.generate("The rain", max_tokens=9, temperature=0))
    assert answer(sessions, "book", "The rain", max_tokens=9) == expected
    sessions.read("book", [NEW])
    assert "walrus" in sessions.recall("book", "the walrus", 1)[0].text
    assert_holds(tmp_path, "book", FIRST, SECOND, NEW)


def test_passages_name_their_documents(tmp_path: Path) -> None:
    sessions = folder(tmp_path)
    sessions.read("book", [NEW], document="walrus.txt")
    sessions.read("book", [NEW], document="walrus.txt")  # another file
    sessions.fork("book", "copy")
    sessions.read("copy", [NEW], document="walrus.txt", continues=True)
    sessions.read("copy", [SECOND])
    with Notebook(tmp_path / "sessions/copy.session.notebook", create=False) as notebook:
        documents = notebook.documents()
    assert documents == [(0, "walrus.txt"), (len(NEW), "walrus.txt"), (3 * len(NEW), "")]
    assert {one.document for one in sessions.recall("copy", "walrus", 9)} == {"walrus.txt"}
    assert sessions.recall("copy", "zebra", 1)[0].place_in_document[0] == 0


def test_a_sentence_without_spaces_is_found_by_its_parts(tmp_path: Path) -> None:
    sessions = folder(tmp_path)
    sessions.read("book", [SECOND, "船长看见白鲸在海里。\n"])
    (found,) = sessions.recall("book", "谁见过那条白鲸呢")
    assert "白鲸" in found.text


def test_a_question_goes_through_the_chat_template(tmp_path: Path) -> None:
    chat, tokenizer = FAMILIES["chatml"].chat(), Tokenizer(FAMILIES["chatml"].backend())
    model = small_model(F64, vocab_size=tokenizer.vocab_size, sliding_window=200).requires_grad_(False)
    sessions = SessionFolder(tmp_path, Session(model, tokenizer, dtype=F64), chat)
    sessions.read("book", ["The rain in Spain."])
    alone = Session(model, tokenizer, dtype=F64)
    alone.read("The rain in Spain.")

    def expected(question: str) -> str:
        ids = chat.prompt([{"role": "user", "content": question}], "text")
        assert isinstance(ids, list)
        return tokenizer.decode(list(alone.fork().generate_tokens(ids, max_tokens=6, temperature=0))).rstrip("\ufffd")

    assert answer(sessions, "book", "Who?", max_tokens=6) == expected("Who?")
    with_passage = expected("\n\n[0-18]\nThe rain in Spain.\n\nRain?")
    assert answer(sessions, "book", "Rain?", max_tokens=6) == with_passage
    assert answer(sessions, "book", "Rain?", max_tokens=6, passages=0) == expected("Rain?") != with_passage


def test_a_fork_is_independent(tmp_path: Path) -> None:
    sessions = folder(tmp_path)
    sessions.read("a", [FIRST])
    assert sessions.fork("a", "b").tokens == sessions.summary("a").tokens
    sessions.read("b", [SECOND])
    sessions.read("a", [NEW])
    assert_holds(tmp_path, "a", FIRST, NEW)
    assert_holds(tmp_path, "b", FIRST, SECOND)
    sessions.forget("a")
    assert names(tmp_path) == ["b"] and not list(tmp_path.glob("sessions/a.*"))
    assert_holds(tmp_path, "b", FIRST, SECOND)
    with pytest.raises(UserError, match=r"no session 'a'.*there are: b"):
        sessions.ask("a", "x")


def test_a_session_of_the_command_line_is_used(tmp_path: Path) -> None:
    sessions = folder(tmp_path)
    having_read(FIRST).save(tmp_path / "sessions/cli.session")
    assert not sessions.summary("cli").notebook
    with pytest.raises(UserError, match="no notebook"):
        sessions.recall("cli", "rain")
    assert not sessions.fork("cli", "copy").notebook
    with pytest.raises(ZeroDivisionError):
        sessions.read("cli", [SECOND], fail_at(1, ZeroDivisionError()))
    assert not sessions.summary("cli").notebook
    assert "not in its notebook" in str(sessions.read("cli", [SECOND]).remark)
    assert recorded(tmp_path, "cli") == SECOND


# -- what fails --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [1, 9])
def test_a_reading_that_fails_changes_nothing(tmp_path: Path, call: int) -> None:
    sessions = folder(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        sessions.read("book", [FIRST], fail_at(call, KeyboardInterrupt()))
    assert list(tmp_path.glob("sessions/*")) == [] == [*tmp_path.glob("sessions/.*")]
    sessions.read("book", [FIRST])
    with pytest.raises(ZeroDivisionError):
        sessions.read("book", [SECOND], fail_at(call, ZeroDivisionError()))
    assert_holds(tmp_path, "book", FIRST)
    sessions.read("book", [NEW])
    assert_holds(tmp_path, "book", FIRST, NEW)


def test_what_is_no_text_changes_nothing(tmp_path: Path) -> None:
    sessions = folder(tmp_path)
    sessions.read("book", [FIRST])
    (tmp_path / "late.txt").write_bytes(SECOND.encode() * 40 + b"\xff")
    (tmp_path / "early.txt").write_bytes(b"\xff")
    for text in (text_chunks(tmp_path / "late.txt", 1 << 10), text_chunks(tmp_path / "early.txt"), [""], []):
        for name in ("book", "new"):
            with pytest.raises(UserError):
                sessions.read(name, text)
    assert names(tmp_path) == ["book"]
    assert_holds(tmp_path, "book", FIRST)


def test_a_reading_that_diverges_changes_nothing(tmp_path: Path) -> None:
    model = small_model(F64, vocab_size=TOKENIZER.vocab_size, inner_loop__lr=1.0).requires_grad_(False)
    object.__setattr__(model.config.inner_loop, "lr", float("inf"))  # out of range: every update goes wrong
    sessions = SessionFolder(tmp_path, Session(model, TOKENIZER, dtype=F64))
    ids = TOKENIZER.encode(FIRST)
    sessions.read("book", [TOKENIZER.decode(ids[:2])])  # too short to be learned from
    before = sessions.summary("book")
    for count in (3, 5, 20):  # the last update is checked with and without a token that waits for its loss
        with pytest.raises(UserError, match=r"diverged.*unchanged"):
            sessions.read("book", [TOKENIZER.decode(ids[2 : 2 + count])])
        assert sessions.summary("book").tokens == before.tokens
        with Notebook(tmp_path / "book.session.notebook") as notebook:
            assert "".join(notebook.text()) == TOKENIZER.decode(ids[:2])


def test_a_session_that_another_process_changes_is_refused(tmp_path: Path) -> None:
    sessions = folder(tmp_path)
    sessions.read("book", [FIRST])
    with lock_beside(tmp_path / "sessions/book.session", ""):
        for change in (
            lambda: sessions.read("book", [SECOND]),
            lambda: sessions.fork("book", "other"),
            lambda: sessions.forget("book"),
        ):
            with pytest.raises(UserError, match="'book' is being changed by another process"):
                change()
        assert answer(sessions, "book", "The", max_tokens=3)
        assert sessions.recall("book", "rain")
    assert names(tmp_path) == ["book"]
    assert_holds(tmp_path, "book", FIRST)


def test_a_reading_waits_for_a_search_that_puts_the_notebook_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search holds the session for a moment, as another process might; within this one, nobody is refused."""
    sessions, forget, readings = folder(tmp_path), sessions_module.forget_unread, list[Future[object]]()
    sessions.read("book", [FIRST])
    save_unfinished(tmp_path / "sessions/book.session", Reading(having_read(FIRST).fork(), None, "", None))
    with ThreadPoolExecutor() as threads:

        def held(path: Path) -> None:
            readings.append(threads.submit(sessions.read, "book", [SECOND]))
            wait(readings, timeout=0.1)  # it would be refused by then
            forget(path)

        with monkeypatch.context() as patch:
            patch.setattr(sessions_module, "forget_unread", held)
            assert sessions.recall("book", "rain")
        readings[0].result()
    assert_holds(tmp_path, "book", FIRST, SECOND)


def test_bad_names_and_sessions_have_one_sentence(tmp_path: Path) -> None:
    sessions = folder(tmp_path)
    for name in ("", ".", "../book", "a/b", "a\0b", "a\nb", ".hidden", "end.", "x" * 151, "ü" * 80, "\ud800"):
        with pytest.raises(UserError, match="not a name for a session"):
            sessions.read(name, [FIRST])
    sessions.read("Büch 1.2_a-b", [FIRST])
    for text in ("fork", "forget"):
        with pytest.raises(UserError, match="no session 'gone'"):
            getattr(sessions, text)("gone", *(["new"] if text == "fork" else []))
    for new, why in (("Büch 1.2_a-b", "name of its own"), ("taken", "already")):
        having_read().save(tmp_path / "sessions/taken.session")
        with pytest.raises(UserError, match=why):
            sessions.fork("Büch 1.2_a-b", new)
    with pytest.raises(UserError, match="prompt is empty"):
        sessions.ask("taken", "")
    assert names(tmp_path) == ["Büch 1.2_a-b", "taken"]


def test_a_damaged_notebook_is_not_shown(tmp_path: Path) -> None:
    sessions = folder(tmp_path)
    sessions.read("book", [FIRST])
    file = tmp_path / "sessions/book.session.notebook/notebook.db"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="altered or damaged"):
        sessions.ask("book", "The rain")
    assert answer(sessions, "book", "The rain", max_tokens=3, passages=0)


def test_sessions_that_cannot_be_used_are_listed_with_the_reason(tmp_path: Path) -> None:
    sessions = folder(tmp_path)
    for name in ("damaged", "good"):
        sessions.read(name, [FIRST])
    file = tmp_path / "sessions/damaged.session"
    file.write_bytes(flipped(file.read_bytes(), 8 * 400))
    other = small_model(F64, seed=1, vocab_size=TOKENIZER.vocab_size).requires_grad_(False)
    Session(other, TOKENIZER, dtype=F64).save(tmp_path / "sessions/other.session")
    Session(MODEL, TOKENIZER).save(tmp_path / "sessions/rounded.session")
    half = TEMPLATE.fork()
    save_unfinished(tmp_path / "sessions/unfinished.session", Reading(half, None, "a book", None, tokens=7))
    errors = {one.name: one.error for one in sessions.summaries()}
    assert list(errors) == ["damaged", "good", "other", "rounded", "unfinished"]
    assert errors["damaged"] and "another model" in str(errors["other"]) and errors["good"] is None
    for name, why in {
        "damaged": "altered|not a session",
        "other": "another model",
        "rounded": "--dtype float32",
        "unfinished": "unfinished reading of a book",
    }.items():
        before = (tmp_path / f"sessions/{name}.session").read_bytes()
        for change in (lambda name=name: sessions.read(name, [NEW]), lambda name=name: sessions.fork(name, "new")):
            with pytest.raises(UserError, match=why):
                change()
        assert (tmp_path / f"sessions/{name}.session").read_bytes() == before
        sessions.forget(name)
    assert names(tmp_path) == ["good"]


# -- kills -------------------------------------------------------------------------------------------------------------


def kills(work: Callable[[], object]) -> Iterator[int]:
    """Do the work in copies of this process: the first is killed at its first fsync, rename or removal, and so on.

    Yields after each; ends when one was not killed.
    """
    for number in range(1, 100):

        def killed(number: int = number) -> None:
            calls = iter(range(1, 1000))

            def counted(function: Callable[..., object]) -> Callable[..., object]:
                def call(*args: object, **options: object) -> object:
                    if next(calls) == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **options)

                return call

            for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
                setattr(os, name, counted(getattr(os, name)))
            work()

        process = start_copy(killed)
        process.join()
        if process.exitcode == 0:
            return
        assert process.exitcode == -signal.SIGKILL
        yield number
    raise AssertionError("it never ends")


def test_a_killed_reading_changes_nothing(tmp_path: Path) -> None:
    first, second = FIRST[:40], SECOND[:40]
    folder(tmp_path).read("book", [first])
    for number in kills(lambda: folder(tmp_path).read("book", [second])):
        sessions = folder(tmp_path)
        done = sessions.summary("book").tokens > having_read(first).info().tokens
        assert bool(sessions.recall("book", "zebra")) == done, number
        sessions.read("book", [NEW])
        assert_holds(tmp_path, "book", first, *[second] * done, NEW)
        sessions.forget("book")
        sessions.read("book", [first])
    assert number > 5
    assert_holds(tmp_path, "book", first, second)


def test_a_killed_first_reading_leaves_a_name_that_can_be_used(tmp_path: Path) -> None:
    first = FIRST[:40]
    for number in kills(lambda: folder(tmp_path).read("book", [first])):
        done = bool(names(tmp_path)) and folder(tmp_path).summary("book").tokens > 1
        folder(tmp_path).read("book", [NEW])
        assert_holds(tmp_path, "book", *[first] * done, NEW)
        folder(tmp_path).forget("book")
        assert list(tmp_path.glob("sessions/*")) == [] == [*tmp_path.glob("sessions/.*")], number


def test_a_killed_fork_or_removal_can_be_repeated(tmp_path: Path) -> None:
    sessions = folder(tmp_path)
    sessions.read("a", [FIRST])
    for _ in kills(lambda: folder(tmp_path).fork("a", "b")):
        if "b" not in names(tmp_path):
            sessions.fork("a", "b")
        for name in ("a", "b"):
            assert_holds(tmp_path, name, FIRST)
        sessions.forget("b")
    for _ in kills(lambda: folder(tmp_path).forget("b")):
        if "b" in names(tmp_path):
            sessions.forget("b")
        sessions.fork("a", "b")
    assert names(tmp_path) == ["a"]
    assert sorted(path.name for path in tmp_path.glob("sessions/*")) == ["a.session", "a.session.notebook"]
