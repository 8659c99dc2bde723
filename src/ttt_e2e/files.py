"""Files that are complete or absent, however a process ends; locks on folders; JSON files and their format versions.

A file or a folder is written under a temporary name, `.NAME.PID.part`, and then renamed. What a killed process left
under such names is removed by `remove_stale_parts`.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ttt_e2e.errors import UserError

LOCK = ".lock"
_LOCK_POLL_SECONDS = 0.2


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or a folder, which becomes `target` if the block ends without an exception.

    Only then is an existing `target` replaced (a file by one rename, a folder by two). After an exception the temporary
    path is removed and `target` is unchanged. Raises UserError if the disk is full or `target` cannot be written.
    """
    target = Path(target)
    part = _temporary(target, "part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)  # left by a killed process with the same id, which is common in containers
        yield part
        _sync_tree(part)
        if target.is_dir():
            old = _temporary(target, "old")
            target.rename(old)
            part.rename(target)
            _remove(old)
        else:
            part.replace(target)
        sync(target.parent)  # otherwise a power cut may undo the rename
    except OSError as error:
        _remove(part)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"No space left on the disk while writing {target}; the previous one is kept.") from error
        if error.filename is None or Path(error.filename) in (part, *part.parents):
            raise UserError(f"Cannot write {target}: {error.strerror}. Choose another place.") from error
        raise
    except BaseException:
        _remove(part)
        raise


def remove_atomically(target: Path) -> None:
    """Remove a file or a folder such that nobody ever finds half of it under its name."""
    old = _temporary(target, "old")
    target.rename(old)
    _remove(old)


def remove_stale_parts(folder: Path, *names: str) -> None:
    """Remove what killed processes left in `folder` while they wrote files or folders called `names` (default: any)."""
    some = "|".join(map(re.escape, names)) or ".+"
    temporary = re.compile(rf"\.({some})\.[0-9]+\.(part|old)")
    for path in folder.glob(".*"):
        if temporary.fullmatch(path.name):
            _remove(path)


def _temporary(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{suffix}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.is_symlink() or path.exists():
        path.unlink()


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(path: Path) -> None:
    for one in (path, *path.rglob("*")):
        sync(one)


def lock_folder(folder: Path, in_use: str, wait_seconds: float = 0.0) -> IO[bytes]:
    """Lock `folder` until the returned file is closed or the process ends.

    in_use: the message of the UserError that is raised if another process has held the lock for `wait_seconds`.
    """
    lock = (folder / LOCK).open("ab")
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                lock.close()
                raise UserError(in_use) from error
            time.sleep(_LOCK_POLL_SECONDS)


def write_text(target: Path, text: str) -> None:
    """Write `text` to `target` as UTF-8, complete or not at all."""
    with atomic_path(target) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`. Raises UserError if the file is missing or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; use a complete copy of the folder.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is truncated or altered: it is not JSON ({error}); use a complete copy.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is altered: it does not hold a JSON object; use a complete copy.")
    return content


def check_format(content: Mapping[str, Any], path: Path, format: str, version: int, remedy: str) -> None:
    """Raise UserError unless `content`, the JSON object of the file or folder `path`, is of this format and version.

    format: such as "ttt-e2e model". remedy: what to do about an older version, such as "convert the model again".
    """
    if content.get("format") != format:
        raise UserError(f"{path} is not a {format}; give one that ttt-e2e has written.")
    found = content.get("version")
    if found != version:
        is_older = isinstance(found, int) and found < version
        raise UserError(
            f"{path} is a {format} of format version {found}, and this ttt-e2e reads version {version}; "
            f"{remedy if is_older else 'update ttt-e2e'}."
        )
