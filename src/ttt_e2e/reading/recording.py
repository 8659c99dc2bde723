"""A reading whose text is also noted: in which notebook, where the text begins in it, and what that holds before it.

A session file and its notebook are two things on the disk, and a process may be killed between any two writes. Here is
what keeps them together:

1. The session file is written first, as a reading of nothing yet, and says at which character of the notebook the text
   begins (see `unfinished`). Only then is the notebook touched.
2. Each piece of the text is noted before it is read. So a notebook may have more than its session, never less.
3. While nothing was read, what the notebook has beyond that character is cut. Once something was, the text is walked
   again from its beginning, and what the notebook already has is compared with it instead of noted twice.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path
from ttt_e2e.inference.session_file import session_facts
from ttt_e2e.reading.resume import leftovers, unfinished_reading
from ttt_e2e.retrieval.notebook import Notebook, notebook_folder


class Noting(NamedTuple):
    """How a text will be noted: in the notebook `folder`, from its character `begin` on.

    resumed: a reading goes on whose text begins there. Otherwise the notebook is first made anew if `anew`, as a copy
    of `source` (None: empty), and then cut to its first `begin` characters. remarks: sentences for people.
    """

    folder: Path
    begin: int
    resumed: bool = False
    anew: bool = False
    source: Path | None = None
    remarks: tuple[str, ...] = ()


def plan_noting(save: Path, session: Path | None, size: int) -> Noting:
    """How a reading that goes on with `session` (None: with none) and is saved to `save` will be noted.

    Read on in its own file, a session has its notebook go on too. In another file its notebook begins as a copy of that
    of `session`, and without a session it begins empty. Nothing is written here, except what a killed process left
    undone. size: as for `Notebook`. Raises UserError if a notebook that is needed is in use or not sound, if another
    folder has its name, and if the one to be replaced belongs to no session.
    """
    folder = notebook_folder(save)
    if going_on := unfinished_reading(save):
        begin = going_on.get("begin")
        # Without a notebook so far: `read_document` will say which option differs.
        return Noting(folder, 0 if begin is None else begin, resumed=True)
    source = None if session is None else notebook_folder(session)
    has = None if session is None else _characters(session, size)
    remarks = []
    if session is not None and has is None:
        remarks.append(f"What {session} has read before is not in its notebook; that begins with this text.")
    own = source is not None and source.resolve() == folder.resolve()
    if folder.exists() and not own:
        with Notebook(folder, size=size) as replaced:
            characters = replaced.characters
        if characters and not save.exists():
            raise UserError(
                f"There is a notebook {folder}, but no session {save} that it belongs to; "
                "save to another file, or remove the notebook to begin a new one."
            )
        if characters:
            remarks.append(f"The notebook {folder} begins anew, as the session {save} does.")
    return Noting(folder, has or 0, anew=not own, source=None if has is None else source, remarks=tuple(remarks))


def noted(pieces: Iterable[str], noting: Noting, size: int) -> Iterator[str]:
    """Pass the text on, each piece once it is in the notebook; for `read_document`, together with `noting.begin`.

    Nothing is written before the first piece is asked for: by then the session file says where the text begins. size:
    as for `Notebook`. Raises UserError as `Notebook` and `Notebook.noting` do.
    """
    if noting.anew and not noting.resumed:
        _make(noting.folder, noting.source, size)
    with Notebook(noting.folder, size=size) as notebook:
        if not noting.resumed:
            notebook.cut(noting.begin)
        yield from notebook.noting(pieces, at=noting.begin)


def forget_unread(session: Path) -> None:
    """Cut from a session file's notebook the text of which it has read nothing, before the file is written anew.

    So a killed process left them; the new file will not say where that text began. Raises UserError as `Notebook` does.
    """
    folder, begin = notebook_folder(session), _unread_from(session)
    if begin is not None and folder.exists():
        with Notebook(folder, create=False) as notebook:
            notebook.cut(begin)


def _unread_from(session: Path) -> int | None:
    """Where in the notebook a text begins of which the session in a file has read nothing yet; None: there is none."""
    unfinished = session_facts(session).get("unfinished")
    begin: int | None = unfinished.get("begin") if unfinished and not unfinished["tokens"] else None
    return begin


def _characters(session: Path, size: int) -> int | None:
    """How many characters the notebook of a session file has that belong to it; None if it has no notebook."""
    folder, begin = notebook_folder(session), _unread_from(session)
    if not folder.exists():
        return None
    with Notebook(folder, size=size) as notebook:
        return notebook.characters if begin is None else min(begin, notebook.characters)


def _make(folder: Path, source: Path | None, size: int) -> None:
    """Put a copy of the notebook `source`, or an empty one, in place of what notebook is in `folder`."""
    for left in leftovers(folder):
        shutil.rmtree(left)
    with ExitStack() as held:
        for used in filter(None, (folder if folder.exists() else None, source)):
            held.enter_context(Notebook(used, size=size))
        with atomic_path(folder) as part:
            if source is None:
                Notebook(part, size=size).close()
            else:
                shutil.copytree(source, part, ignore=shutil.ignore_patterns("lock", ".*"))
