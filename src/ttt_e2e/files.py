"""Files that are whole or not there: everything is written beside its place and then renamed into it."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ttt_e2e.errors import UserError


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a path to write a file or a folder to; it becomes `target` when the block ends without an exception.

    An existing `target` is replaced only then (a file in one rename, a folder in two). On any exception what was
    written is removed and `target` is as before. Raises UserError if the disk is full or the place is not writable.
    """
    target = Path(target)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)  # of a process of the same number that was killed, as in a container
        yield part
        _sync(part)
        if target.is_dir():
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            target.rename(old)
            part.rename(target)
            old.unlink() if old.is_symlink() else shutil.rmtree(old)
        else:
            part.replace(target)
        sync(target.parent)  # a power cut may otherwise undo the rename
    except OSError as error:
        _remove(part)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"No space left on the disk while writing {target}; what was there before is kept."
            ) from error
        if error.filename is None or Path(error.filename) in (part, *part.parents):
            raise UserError(f"Cannot write {target}: {error.strerror}. Choose another place.") from error
        raise
    except BaseException:
        _remove(part)
        raise


def write_text(target: Path, text: str) -> None:
    """Write `text` to `target` as UTF-8, whole or not at all."""
    with atomic_path(target) as part:
        part.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    for part in (path, *path.rglob("*")):
        sync(part)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk and not in memory alone."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.is_symlink() or path.exists():
        path.unlink()
