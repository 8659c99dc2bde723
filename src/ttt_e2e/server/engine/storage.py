"""Files on storage that several processes share: a folder, or a bucket of an S3-compatible service, by fsspec.

A file is whole or absent, and on the storage when a call returns. `swap` is what makes sharing safe: it replaces a file
only while that has the version which the caller has seen. S3 decides this itself, by If-Match and If-None-Match; in a
folder a lock does. Names have slashes, and no part of one begins with a dot.
"""

import asyncio
import fcntl
import hashlib
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.asyn import sync

from ttt_e2e.errors import UserError
from ttt_e2e.files import LOCK, atomic_path

_S3_OPTIONS: Mapping[str, Any] = {
    "use_listings_cache": False,  # others write, too
    "skip_instance_cache": True,  # each with the endpoint and credentials of its time
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 30, "retries": {"total_max_attempts": 2}},
}
_S3_ATTEMPTS = 2  # of a call, each with the attempts of the client library
_REMEDY = "see that it can be reached and written to, then send the request again"


class StorageError(UserError):
    """The storage cannot be reached or written to. A change that was being saved is saved as a whole or not at all."""


class ConflictError(Exception):
    """Another process has written the file in the meantime."""


class Stored(NamedTuple):
    """The content of a file, and its version for `Storage.swap`."""

    content: bytes
    version: str


class Storage:
    """The files below `url`: a folder, or s3://BUCKET/PREFIX with the credentials and endpoint of AWS's variables.

    Nothing is read or written before the first call. Methods can be called from any thread; they raise StorageError.
    """

    def __init__(self, url: str) -> None:
        protocol = fsspec.utils.get_protocol(url)
        if protocol not in ("file", "s3"):
            raise UserError(f"There is no way to share sessions in {url}; give a folder, or s3://BUCKET/PREFIX.")
        self.url, self._is_s3 = url.rstrip("/"), protocol == "s3"
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url, **(_S3_OPTIONS if self._is_s3 else {}))
        except ImportError as error:
            raise UserError('Sessions on S3 need s3fs; install it with: pip install "ttt-e2e[s3]"') from error
        self._root: str = root.rstrip("/")
        if self._is_s3:
            self._fs.retries = _S3_ATTEMPTS

    def read(self, name: str) -> Stored | None:
        """A file, or None if there is none with this name."""
        with self._reaching():
            try:
                if self._is_s3:
                    return Stored(*sync(self._fs.loop, self._get_object, name))
                content = self._fs.cat_file(self._path(name))
                return Stored(content, _digest(content))
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise
                return None

    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """The files with these names, without those that are missing."""
        if not self._is_s3:
            return {name: found.content for name in names if (found := self.read(name)) is not None}
        with self._reaching():
            answers = sync(self._fs.loop, self._get_objects, names)
            for error in answers:
                if isinstance(error, BaseException) and not isinstance(error, FileNotFoundError):
                    raise error
        return {name: one[0] for name, one in zip(names, answers, strict=True) if isinstance(one, tuple)}

    def names(self, prefix: str) -> list[str]:
        """The names of all files below `prefix`, a folder, in order."""
        with self._reaching(), suppress(FileNotFoundError):
            found = [self._name(path) for path in self._fs.find(self._path(prefix))]
            return sorted(name for name in found if "/." not in f"/{name}")
        return []

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, whatever is there."""
        with self.new_file(name) as path:
            path.write_bytes(content)

    def swap(self, name: str, content: bytes, version: str | None) -> str:
        """Replace a small file that has this version, or create it if `version` is None; returns its new version.

        `content` differs from every other one. Raises ConflictError if the file has another version or is missing.
        """
        with self._reaching():
            if not self._is_s3:
                return self._swap_locked(name, content, version)
            condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
            try:
                bucket, key = self._key(name)
                return str(self._fs.call_s3("put_object", Bucket=bucket, Key=key, Body=content, **condition)["ETag"])
            except OSError as error:
                if _code(error) not in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"):
                    raise
                found = self.read(name)
                if found is None or found.content != content:  # else the answer to an earlier attempt was lost
                    raise ConflictError from error
                return found.version

    @contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """A path on this machine for a file that does not exist yet; it is on the storage when the block has ended."""
        with self._reaching():
            if self._is_s3:
                with tempfile.TemporaryDirectory(prefix="ttt-e2e-") as folder:
                    path = Path(folder) / "new"
                    yield path
                    self._fs.put_file(str(path), self._path(name))
            else:
                with atomic_path(Path(self._path(name))) as part:
                    yield part

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A path on this machine with the content of a file, inside the block.

        Raises FileNotFoundError if there is none, or if the block fails because it was removed in the meantime.
        """
        if not self._is_s3:
            path = Path(self._path(name))
            if not path.is_file():
                raise FileNotFoundError(name)
            try:
                yield path
            except UserError as error:
                if path.is_file():
                    raise
                raise FileNotFoundError(name) from error
            return
        with tempfile.TemporaryDirectory(prefix="ttt-e2e-") as folder:
            path = Path(folder) / "copy"
            try:
                with self._reaching():
                    self._fs.get_file(self._path(name), str(path))
            except StorageError as error:
                if _code(error.__cause__) in ("NoSuchKey", "404"):
                    raise FileNotFoundError(name) from error
                raise
            yield path

    def remove(self, names: Sequence[str]) -> None:
        """Remove files, of which some may be missing."""
        if not names:
            return
        with self._reaching():
            if self._is_s3:
                sync(self._fs.loop, self._fs._bulk_delete, [self._path(name) for name in names])
                return
            for path in (Path(self._path(name)) for name in names):
                path.unlink(missing_ok=True)
                with suppress(OSError):  # not empty
                    path.parent.rmdir()

    def check_swaps(self) -> None:
        """Raise UserError if the storage ignores conditions: then two processes could overwrite each other's files."""
        name, content = f"probe-{secrets.token_hex(8)}", secrets.token_bytes(8)
        version = self.swap(name, content, None)
        try:
            for wrong in (None, f'"{32 * "0"}"'):
                with suppress(ConflictError):
                    self.swap(name, content + b" again", wrong)
                    raise UserError(
                        f"{self.url} ignores If-Match and If-None-Match, without which replicas could overwrite each "
                        "other's sessions; use a storage that supports conditional writes."
                    )
            self.swap(name, content + b" next", version)
        finally:
            self.remove([name])

    async def _get_object(self, name: str) -> tuple[bytes, str]:
        bucket, key = self._key(name)
        response = await self._fs._call_s3("get_object", Bucket=bucket, Key=key)
        async with response["Body"] as body:
            return await body.read(), response["ETag"]

    async def _get_objects(self, names: Sequence[str]) -> list[tuple[bytes, str] | BaseException]:
        return await asyncio.gather(*map(self._get_object, names), return_exceptions=True)

    def _swap_locked(self, name: str, content: bytes, version: str | None) -> str:
        root = Path(self._root)
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (root / LOCK).open("ab") as lock:  # the system releases it if this process is killed
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self.read(name)
            if version != (found.version if found else None):
                raise ConflictError
            self.write(name, content)
        return _digest(content)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            if isinstance(error, StorageError) or not isinstance(error.__cause__, OSError):
                raise
            raise StorageError(str(error)) from error.__cause__
        except self._errors() as error:
            raise self._unreachable(error) from error

    def _errors(self) -> tuple[type[Exception], ...]:
        if not self._is_s3:
            return (OSError,)
        from aiohttp import ClientError as ConnectionFailed
        from botocore.exceptions import BotoCoreError, ClientError

        return OSError, BotoCoreError, ClientError, ConnectionFailed

    def _unreachable(self, error: Exception) -> StorageError:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        return StorageError(f"The sessions' storage {self.url} does not work ({reason}); {_REMEDY}.")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _name(self, path: str) -> str:
        return path.removeprefix(f"{self._root}/")

    def _key(self, name: str) -> tuple[str, str]:
        bucket, key, _ = self._fs.split_path(self._path(name))
        return bucket, key


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _code(error: BaseException | None) -> str | None:
    """S3's name for an error."""
    while error is not None:
        if isinstance(code := getattr(error, "response", {}).get("Error", {}).get("Code"), str):
            return code
        error = error.__cause__
    return None
