"""A folder of sessions with names: what the tools of the server do, without the protocol.

The session NAME is the file NAME.session, with its notebook beside it, both as `ttt-e2e read --save --notebook` writes
them; so the commands can use them too. A change takes the session's lock, which keeps other processes out, and is whole
or nothing. What a killed process leaves is put right by the next change, by the rules of `reading.recording`. All this
blocks, and may be called from any thread.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

from ttt_e2e.data.text import slices
from ttt_e2e.errors import UserError
from ttt_e2e.files import lock_beside, remove_atomically, remove_stale_parts
from ttt_e2e.inference.divergence import Diverged
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_file import SessionInfo, read_session_file, session_facts
from ttt_e2e.reading.loss_curve import LossCurve
from ttt_e2e.reading.reading import Reading
from ttt_e2e.reading.recording import forget_unread, plan_recording, record_text
from ttt_e2e.reading.resume import save_unfinished, unfinished_facts
from ttt_e2e.retrieval.generate import DEFAULT_PASSAGES, find_passages, retrieve
from ttt_e2e.retrieval.notebook import Notebook, notebook_folder
from ttt_e2e.retrieval.passages import Passage
from ttt_e2e.server.chat import ChatFormat
from ttt_e2e.server.engine.chats import begin_chat

_SUFFIX = ".session"
_NAME = re.compile(r"\w(?:[\w .-]*[\w-])?")
_MAX_NAME_BYTES = 150  # file systems allow 255, and more is put behind and before it
_CHUNK_CHARS = 1 << 13  # between two reports of a reading


@dataclass(frozen=True)
class SessionSummary:
    """A session. Where it cannot be used, `error` says why, and nothing else is known.

    tokens: read so far. text_bytes: size of the text read, in UTF-8; null if the tokenizer does not work on bytes.
    saved: when it last changed, in UTC. notebook: whether its text can be searched.
    """

    name: str
    tokens: int = 0
    text_bytes: int | None = None
    saved: str = ""
    notebook: bool = False
    error: str | None = None


@dataclass(frozen=True)
class ReadingResult:
    """A text that was read and learned from.

    tokens: of the text. loss: their mean loss in nats per token, each measured before the model learned from it.
    remark: what is to be known about the notebook, if anything.
    """

    tokens: int
    loss: float
    remark: str | None
    session: SessionSummary


def no_report(done: int) -> None:
    """The report of a work that nobody follows."""


class SessionFolder:
    """The sessions in `folder`, which is created if it is missing, readable by its owner only.

    Methods raise UserError for an invalid name, for a session that is missing, damaged, of another model or in use by
    another process, and for a disk that is full or not writable; then nothing has changed.

    Args:
        folder: Of the sessions.
        template: A session with a tokenizer that has read nothing; its model, dtype and `learn` are those of new ones.
        chat: How a question becomes a prompt; None for a model that only continues texts.
    """

    def __init__(self, folder: Path, template: Session, chat: ChatFormat | None = None) -> None:
        self.folder, self.chat, self._template = Path(folder), chat, template
        self._mutexes: dict[str, threading.Lock] = {}  # by name
        self._info = template.info()  # hashes the model once: all sessions are copies of this one and share the digest
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Cannot keep sessions in {folder}: {error.strerror}; name another folder.") from error

    def summaries(self) -> list[SessionSummary]:
        """All sessions, sorted by name."""
        names = sorted(path.name.removesuffix(_SUFFIX) for path in self.folder.glob(f"*{_SUFFIX}") if path.is_file())
        return [self._summary(name) for name in names if _is_name(name)]

    def summary(self, name: str) -> SessionSummary:
        """Describe a session."""
        self._existing(name)
        return self._summary(name)

    def read(
        self,
        name: str,
        chunks: Iterable[str],
        report: Callable[[int], object] = no_report,
        *,
        document: str = "",
        continues: bool = False,
    ) -> ReadingResult:
        """Let a session read a text and record it in its notebook; a new one if there is none of this name.

        report: called after every mini-batch and at the end, with the bytes of the text that were read by then. What it
        raises ends the reading and leaves the session as it was, like any other error. document: the name of the text.
        continues: the text before it, if it has this name too, is continued. Raises UserError for a text without
        tokens, and if learning diverges.
        """
        path, notebook = self._path(name), notebook_folder(self._path(name))
        text = _CountedText(chunks)
        first = next(text, "")  # a stream that is not text is refused before anything is written
        with self._lock(name):
            has_notebook = notebook.exists()
            before = self._load(name, for_change=True) if path.exists() else None
            session = (before or self._template).fork()
            window = session.model.config.sliding_window
            recording = plan_recording(path, path if before else None, window, document, continues=continues)
            curve = LossCurve(skip=session.pending)
            try:
                # Before anything is recorded, the session file has to say where the text begins in the notebook.
                save_unfinished(path, Reading(session, None, name, None, notebook_start=recording.start))
                with closing(record_text(chain([first], text), recording)) as recorded:  # type: ignore[type-var]
                    for losses in session.read_stream(recorded):
                        curve.add(losses)
                        report(text.bytes_read)
                report(text.bytes_read)
                curve.add(session.score_pending())
                session.check()
                if not curve.tokens:
                    raise UserError("The text has no tokens; give another one.")
                session.save(path)
            except BaseException as error:
                with suppress(UserError):  # such as a full disk; then the file still says what is to be cut off
                    if before is None:
                        self._remove(path)
                    else:
                        forget_unread(path)
                        if not has_notebook and notebook.exists():
                            remove_atomically(notebook)
                        before.save(path)
                if isinstance(error, Diverged) and error.what:
                    raise UserError(
                        f"Learning diverged: {error.what}. The session is unchanged; give another text, or serve a "
                        "model with a smaller inner_loop.lr."
                    ) from error
                raise
        return ReadingResult(curve.tokens, curve.mean(), " ".join(recording.remarks) or None, self._summary(name))

    def ask(
        self,
        name: str,
        prompt: str,
        *,
        passages: int = DEFAULT_PASSAGES,
        max_tokens: int = 200,
        temperature: float = 0.8,
    ) -> tuple[Iterator[str], list[Passage] | None]:
        """The answer to a question, or the continuation of a text, in chunks. The session does not change.

        passages: at most so many of the session's notebook, if it has one, are put before the prompt. They are returned
        too, the best first; None if the notebook was not searched. Raises UserError for an empty prompt, numbers out of
        range, a damaged notebook and messages that a chat template refuses, and Diverged.
        """
        if not prompt:
            raise UserError("The prompt is empty; ask something, or give the beginning of a text.")
        session, sources = self._load(name), None
        if passages and notebook_folder(self._path(name)).exists():
            with self._notebook(name) as notebook:
                prompt, sources = retrieve(session, notebook, prompt, passages)
        if self.chat is None:
            return session.generate(prompt, max_tokens=max_tokens, temperature=temperature), sources
        message, chat = {"role": "user", "content": prompt}, self.chat
        session, ids = begin_chat(session, lambda before: chat.prompt([message], before))
        return session.generate(ids, max_tokens=max_tokens, stop=self.chat.stop, temperature=temperature), sources

    def recall(self, name: str, query: str, count: int = DEFAULT_PASSAGES) -> list[Passage]:
        """At most `count` passages of what a session has read that match `query`, the best first.

        Raises UserError as `Notebook` does, as for a session that has none.
        """
        with self._notebook(name) as notebook:
            return find_passages(notebook, query, count)

    def fork(self, name: str, new_name: str) -> SessionSummary:
        """Copy a session and its notebook to a new name. Raises UserError if there is a session of that name."""
        source, target = self._path(name), self._path(new_name)
        if source == target:
            raise UserError("A fork needs a name of its own; give another one.")
        with self._lock(name), self._lock(new_name):
            if target.exists():
                raise UserError(f"There is a session {new_name!r} already; choose another name, or forget it first.")
            session = self._load(name, for_change=True)
            # The notebook first: without a session it is a leftover, which the next fork or `forget` removes.
            if notebook_folder(target).exists():
                remove_atomically(notebook_folder(target))
            if notebook_folder(source).exists():
                recording = plan_recording(target, source, session.model.config.sliding_window)
                for _ in record_text((), recording):
                    pass
            session.save(target)
        return self._summary(new_name)

    def forget(self, name: str) -> None:
        """Remove a session and its notebook."""
        path = self._path(name)
        notebook = notebook_folder(path)
        if not notebook.exists():
            self._existing(name)
        with self._lock(name):
            self._remove(path)

    # -- names and files -----------------------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        if not _is_name(name):
            raise UserError(
                f"{name[:50]!r} is not a name for a session; use letters, digits, '_', '-', '.' and spaces, with a "
                f"letter or digit at the ends, in at most {_MAX_NAME_BYTES} bytes."
            )
        return self.folder / f"{name}{_SUFFIX}"

    def _existing(self, name: str) -> Path:
        path = self._path(name)
        if not path.exists():
            names = [summary.name for summary in self.summaries()]
            known = f"there are: {', '.join(names)}" if names else "there are none yet"
            raise UserError(f"There is no session {name!r}; read a text into it first ({known}).")
        return path

    @contextmanager
    def _lock(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Hold a session inside the block. Raises UserError if another process does; wait: for threads of this one."""
        path, mutex = self._path(name), self._mutexes.setdefault(name, threading.Lock())
        in_use = f"The session {name!r} is being changed by another process; try again when that has ended."
        if not mutex.acquire(blocking=wait):
            raise UserError(in_use)
        try:
            with lock_beside(path, in_use):
                remove_stale_parts(self.folder, notebook_folder(path).name)
                yield
        finally:
            mutex.release()

    @contextmanager
    def _notebook(self, name: str) -> Iterator[Notebook]:
        """The notebook of a session, without a text that a killed process has not read."""
        path = self._existing(name)
        if unfinished_facts(path):
            with suppress(UserError), self._lock(name, wait=False):  # unless the text is being read at this moment
                forget_unread(path)
        with Notebook(notebook_folder(path), create=False) as notebook:
            yield notebook

    def _load(self, name: str, *, for_change: bool = False) -> Session:
        """The session as it was saved. for_change: refuse one that `ttt-e2e read` has not read to the end."""
        path = self._existing(name)
        facts, tensors = read_session_file(path)
        if facts["dtype"] != self._info.dtype:
            raise UserError(
                f"The session {name!r} computes in {facts['dtype']}, and this server in {self._info.dtype}; "
                f"start the server with --dtype {facts['dtype']} to use it."
            )
        if for_change and facts.get("unfinished", {}).get("tokens"):
            raise UserError(
                f"The session {name!r} holds an unfinished reading of {facts['unfinished']['name']}; finish it with "
                "the `ttt-e2e read` that began it."
            )
        session = self._template.fork()
        session.learn = facts["learn"]
        session.unpack(facts, tensors, str(path))
        return session

    def _summary(self, name: str) -> SessionSummary:
        path = self._path(name)
        try:
            info = SessionInfo.from_facts(session_facts(path))
            saved = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        except UserError as error:
            return SessionSummary(name, error=str(error))
        except OSError as error:
            return SessionSummary(name, error=f"Cannot read {path}: {error.strerror}.")
        if info.model != self._info.model:
            return SessionSummary(name, error="It belongs to another model; start the server with that one to use it.")
        notebook = notebook_folder(path).is_dir()
        return SessionSummary(name, info.tokens, info.text_bytes, f"{saved:%Y-%m-%dT%H:%M:%SZ}", notebook)

    def _remove(self, path: Path) -> None:
        """Remove a session; the notebook first, so that a killed process leaves none that belongs to nothing."""
        try:
            if notebook_folder(path).exists():
                remove_atomically(notebook_folder(path))
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"Cannot remove {path}: {error.strerror}.") from error


def _is_name(name: str) -> bool:
    return len(name.encode("utf-8", "surrogatepass")) <= _MAX_NAME_BYTES and _NAME.fullmatch(name) is not None


class _CountedText(Iterator[str]):
    """A text in smaller chunks. bytes_read: of those before the last one taken, whose reading has not ended yet."""

    def __init__(self, chunks: Iterable[str]) -> None:
        self._parts = (part for chunk in chunks for part in slices(chunk, _CHUNK_CHARS))
        self.bytes_read = self._last = 0

    def __next__(self) -> str:
        self.bytes_read += self._last
        self._last = 0
        part = next(self._parts)
        self._last = len(part.encode("utf-8", "surrogatepass"))
        return part
