"""Files that are complete or absent, however a process ends, and verified when they are read; locks; JSON.

A file or a folder is written in a temporary folder, `.NAME.PID.part`, where libraries may have temporary files of their
own, and then moved to its place. What a killed process left is removed by `remove_stale_parts`, which `lock_beside`
calls.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ttt_e2e.errors import UserError

LOCK = ".lock"
_LOCK_POLL_SECONDS = 0.2
_REHASHED = 1 << 24  # bytes up to which a file is hashed each time that it is opened
_CLOCK_SECONDS = 2.0  # a file that was changed so recently may change again within the same tick of the disk's clock


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or a folder, which becomes `target` if the block ends without an exception.

    Only then is an existing `target` replaced (a file by one rename, a folder by two). A symbolic link stays, and what
    it leads to is replaced. What is replaced keeps its mode and, as far as the process may say so, its owner. After an
    exception the temporary path is removed and `target` is unchanged. Raises UserError if the disk is full or `target`
    cannot be written.
    """
    target = real_path(target)
    holder = _temporary(target, "part")
    part = holder / target.name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(holder)  # left by a killed process with the same id, which is common in containers
        holder.mkdir(mode=0o700)  # no more public than `target` will be, whatever its mode
        yield part
        _sync_tree(part)
        _keep_access(target, part)
        if target.is_dir():
            old = _temporary(target, "old")
            target.rename(old)
            part.rename(target)
            _remove(old)
        else:
            part.replace(target)
        _remove(holder)
        sync(target.parent)  # otherwise a power cut may undo the rename
    except OSError as error:
        _remove(holder)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"No space left on the disk while writing {target}; the previous one is kept.") from error
        if error.filename is None or Path(error.filename) in (part, *part.parents):
            raise UserError(f"Cannot write {target}: {error.strerror}. Choose another place.") from error
        raise
    except BaseException:
        _remove(holder)
        raise


def real_path(target: Path) -> Path:
    """The path that `target`, which may be a symbolic link, leads to. Raises UserError if it leads nowhere."""
    target = Path(target)
    real = Path(os.path.realpath(target)) if target.is_symlink() else target
    if real.is_symlink():
        raise UserError(f"{target} is a link that leads back to itself; choose another place.")
    return real


def _keep_access(old: Path, new: Path) -> None:
    """Give the file or folder `new`, and all in it, the modes and owners of what has these names in `old`."""
    for path in (new, *new.rglob("*")):
        try:
            before, now = (old / path.relative_to(new)).stat(), path.stat()
        except OSError:
            continue  # it is new
        if stat.S_IFMT(before.st_mode) == stat.S_IFMT(now.st_mode):
            with suppress(PermissionError):  # only root may give a file to another user
                os.chown(path, before.st_uid, before.st_gid)
            with suppress(PermissionError):  # a disk without modes
                path.chmod(stat.S_IMODE(before.st_mode))


def remove_atomically(target: Path) -> None:
    """Remove a file or a folder such that nobody ever finds half of it under its name."""
    part = _temporary(target, "part")
    target.rename(part)
    _remove(part)


def remove_stale_parts(folder: Path, *names: str) -> None:
    """Tidy up after killed processes that wrote files or folders called `names` (default: any) in `folder`.

    A folder that had been moved away, and was not replaced yet, is moved back.
    """
    some = "|".join(map(re.escape, names)) or ".+"
    temporary = re.compile(rf"\.({some})\.[0-9]+\.(part|old)")
    for path in folder.glob(".*"):
        if not (found := temporary.fullmatch(path.name)):
            continue
        if found[2] == "old" and path.is_dir() and not (folder / found[1]).exists():
            path.rename(folder / found[1])
        else:
            _remove(path)


def _temporary(target: Path, suffix: str) -> Path:
    return target.parent / f".{target.name}.{os.getpid()}.{suffix}"


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


@contextmanager
def lock_beside(
    target: Path, in_use: str | None = None, waiting: Callable[[str], object] | None = None
) -> Iterator[IO[str]]:
    """Keep other processes that ask for this lock from `target`, a file or folder that need not exist, in the block.

    The lock is the file `.NAME.lock` beside it, because a lock on `target` would go when that is replaced. It is
    yielded open, and removed when the block ends; but what was written to it is kept if an exception ends the block or
    the process is killed, and the next process finds it there. What killed processes left beside `target` is removed.
    The folders above it are made; if an exception ends the block, those of them that are empty are removed again.
    Raises UserError with the message `in_use`, by default that `target` is being written, if the lock is held, and
    another one if it cannot be made. With `waiting` a lock that is held is waited for, and `waiting` is called with the
    message before.
    """
    in_use = in_use or f"{target} is being written by another process; wait until it has ended."
    target = Path(os.path.abspath(real_path(target)))  # noqa: PTH100 - "." and ".." have no name to put the lock beside
    with _remove_new_folders(target), _lock_beside(target, in_use, waiting) as lock:
        yield lock


@contextmanager
def _remove_new_folders(target: Path) -> Iterator[None]:
    """If an exception ends the block, remove the folders above `target` that it has made, as far as they are empty."""
    missing = [folder for folder in target.parents if not os.path.exists(folder)]  # noqa: PTH110 - no error for a name
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _lock_beside(target: Path, in_use: str, waiting: Callable[[str], object] | None) -> Iterator[IO[str]]:
    path = target.parent / f".{target.name}.lock"
    while True:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"Cannot write {target}: {error.strerror}. Choose another place.") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if waiting is None:
                lock.close()
                raise UserError(in_use) from error
            waiting(in_use)
            fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                break
        lock.close()  # whoever held it has removed it between the two calls
    with lock:
        remove_stale_parts(target.parent, target.name)
        try:
            yield lock
        except BaseException:
            if os.fstat(lock.fileno()).st_size == 0:
                path.unlink(missing_ok=True)
            raise
        path.unlink(missing_ok=True)


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


# -- verified files ----------------------------------------------------------------------------------------------------


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content`, plain values for JSON, and in its entry "sha256" the digest of all others."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def check_digest(content: Mapping[str, Any], path: Path) -> None:
    """Raise UserError unless `content`, the JSON object of the file `path`, is as `with_digest` made it."""
    if content.get("sha256") != with_digest(content)["sha256"]:
        raise UserError(f"{path} was altered after it was written: its digest does not match; use an unaltered copy.")


def read_verified_json(path: Path, format: str, version: int, remedy: str) -> dict[str, Any]:
    """The JSON object in the file `path`, made by `with_digest`, of this format and version; see `check_format`.

    Raises UserError if it is missing, damaged, altered, or of another format or version.
    """
    content = read_json(path)
    check_format(content, path, format, version, remedy)
    check_digest(content, path)
    return content


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expand_user(path: str | Path) -> Path:
    """`path` with a leading ~ replaced by the user's home, where there is one."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - that of pathlib raises an error without a home


def user_cache() -> Path:
    """The user's folder for what can be made again: `$XDG_CACHE_HOME/ttt-e2e`, or `~/.cache/ttt-e2e`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or expand_user("~/.cache"), "ttt-e2e")


def user_data() -> Path:
    """The user's folder for what must be kept: `$XDG_DATA_HOME/ttt-e2e`, or `~/.local/share/ttt-e2e`."""
    return Path(os.environ.get("XDG_DATA_HOME") or expand_user("~/.local/share"), "ttt-e2e")


def check_file(path: Path, size: int, sha256: str, remedy: str) -> None:
    """Raise UserError unless the file `path` has `size` bytes and this digest; remedy: such as "prepare it anew".

    A large file is read once: that it was right is noted in the user's cache folder, for as long as neither its inode
    nor its times change.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path} is missing; {remedy}.") from error
    if found.st_size != size:
        raise UserError(f"{path} is altered or cut short: it has {found.st_size} of {size} bytes; {remedy}.")
    facts = (os.path.realpath(path), found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, size, sha256)
    cache = user_cache() / "verified"
    note = cache / hashlib.sha256(repr(facts).encode()).hexdigest()
    if size > _REHASHED and note.exists():
        return
    if file_digest(path) != sha256:
        raise UserError(f"{path} was altered after it was written: its digest does not match; {remedy}.")
    if size > _REHASHED and time.time() - max(found.st_mtime, found.st_ctime) > _CLOCK_SECONDS:
        with suppress(OSError):  # no cache: it is hashed again next time
            cache.mkdir(parents=True, exist_ok=True)
            note.touch()
