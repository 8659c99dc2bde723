"""Recording a text in a notebook while it is read: which notebook, where the text begins in it, and what lies before.

A session file and its notebook are two things on the disk, and a process may be killed between any two writes. Three
rules keep them consistent:

1. The session file is written first, as an unfinished reading of zero tokens that says at which character of the
   notebook the text begins (see `resume`). Only then is the notebook changed.
2. Every chunk of the text is recorded before it is read. So a notebook may have more text than its session, never less.
3. While nothing was read, the notebook's text beyond that character is cut off. Once something was, the text is gone
   through again from its beginning and compared with what the notebook has, instead of being recorded twice.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ttt_e2e.errors import UserError
from ttt_e2e.reading.resume import unfinished_facts
from ttt_e2e.retrieval.documents import document_name
from ttt_e2e.retrieval.notebook import Notebook, notebook_folder, passage_size


class Recording(NamedTuple):
    """How a text will be recorded: in the notebook `folder`, from its character `start` on, as `document`."""

    folder: Path
    start: int
    size: int  # characters of a passage, as for `Notebook`
    document: str  # its name, as `document_name` gives it; "" if it has none
    continues: bool  # the document before it, if it has the same name
    resumed: bool = False  # an unfinished reading continues
    replaced: bool = False  # the notebook is first replaced by a copy of `source`, or by an empty one
    source: Path | None = None
    remarks: tuple[str, ...] = ()  # sentences for people


def plan_recording(
    save: Path, session: Path | None, window: int, document: str = "", *, continues: bool = False
) -> Recording:
    """Plan how a text is recorded that is read with the session file `session` (None: a new one) and saved to `save`.

    If `save` is `session`, the text is appended to its notebook. Otherwise the notebook of `save` starts as a copy of
    that of `session`, or empty without a session. Nothing is written here, except to finish what a killed process left
    undone. window: of the model, in tokens. document: the name of the text, if it has one. continues: the document
    before it, if it has this name, is continued. Raises UserError if a notebook that is needed is in use or damaged, if
    something else has its name, and if the one to be replaced belongs to no session.
    """
    folder, size, name = notebook_folder(save), passage_size(window), document_name(document)
    unfinished = unfinished_facts(save)
    if unfinished.get("tokens"):
        # If it was not recorded so far, `read_document` says that the options differ.
        return Recording(folder, unfinished["notebook_start"] or 0, size, name, continues, resumed=True)
    source, start, in_place, remarks = None, 0, False, []
    if session is not None:
        source = notebook_folder(session)
        in_place = source.resolve() == folder.resolve()
        if source.exists():
            with Notebook(source, size=size) as notebook:
                notebook.lock()
                unread_from, start = _unread_from(session), notebook.characters
            start = start if unread_from is None else min(unread_from, start)
        else:
            remarks.append(f"What {session} has read before is not in its notebook, which begins with this text.")
            source = None
    if folder.exists() and not in_place:
        with Notebook(folder, size=size) as notebook:
            notebook.lock()
            is_empty = notebook.characters == 0
        if not is_empty and not save.exists():
            raise UserError(
                f"There is a notebook {folder}, but no session {save} that it belongs to; "
                "save to another file, or remove the notebook to start a new one."
            )
        if not is_empty:
            remarks.append(f"The notebook {folder} is replaced, like the session {save}.")
    return Recording(folder, start, size, name, continues, replaced=not in_place, source=source, remarks=tuple(remarks))


def record_text(chunks: Iterable[str], recording: Recording) -> Iterator[str]:
    """Yield the chunks of the text, each after it was recorded.

    Nothing is written before the first chunk is asked for; by then the session file has to say where the text begins.
    Raises UserError as `Notebook` and `Notebook.record` do.
    """
    with Notebook(recording.folder, size=recording.size) as notebook:
        if recording.replaced:
            notebook.replace(recording.source, recording.size)
        if not recording.resumed:
            notebook.cut(recording.start)
        yield from notebook.record(
            chunks, start=recording.start, name=recording.document, continues=recording.continues
        )


def forget_unread(session: Path) -> None:
    """Cut the text of which a session file has read nothing off its notebook, before the file is written anew.

    A killed process left it; the new file will not say where that text began. Raises UserError as `Notebook` does.
    """
    folder, start = notebook_folder(session), _unread_from(session)
    if start is not None and folder.exists():
        with Notebook(folder) as notebook:
            notebook.cut(start)


def _unread_from(session: Path) -> int | None:
    """Where in the notebook a text begins of which the session file has read nothing yet; None if there is none."""
    unfinished = unfinished_facts(session)
    return None if unfinished.get("tokens") else unfinished.get("notebook_start")
