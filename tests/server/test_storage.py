"""Files on shared storage, in a folder and on a server for S3: whole, and replaced by who has seen the last one."""

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shared_helpers import s3_server

from ttt_e2e.errors import UserError
from ttt_e2e.server.engine.storage import ConflictError, Storage, StorageError


@pytest.fixture(scope="module")
def bucket() -> Iterator[Storage]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as url:
        yield Storage(url)


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return Storage(str(tmp_path / "deep/folder"))
    storage = copy.copy(request.getfixturevalue("bucket"))  # a client for S3 takes a second to make
    storage._root += f"/{request.node.name}"
    return storage


def test_files(storage: Storage) -> None:
    assert storage.read("a/b") is None and storage.names("a") == [] and storage.read_all(["a/b"]) == {}
    storage.write("a/b", b"one")
    with storage.new_file("a/c/d") as path:
        path.write_bytes(b"two")
    found = storage.read("a/b")
    assert found is not None and found.content == b"one"
    assert storage.names("a") == ["a/b", "a/c/d"] and storage.names("a/c") == ["a/c/d"]
    assert storage.read_all(["a/c/d", "a/none", "a/b"]) == {"a/b": b"one", "a/c/d": b"two"}
    with storage.local_copy("a/c/d") as path:
        assert path.read_bytes() == b"two"
    with pytest.raises(FileNotFoundError), storage.local_copy("a/none"):
        pass
    with pytest.raises(ZeroDivisionError), storage.new_file("a/e") as path:
        path.write_bytes(b"half")
        raise ZeroDivisionError
    storage.remove(["a/b", "a/none"])
    storage.remove([])
    assert storage.names("") == ["a/c/d"]


def test_only_who_has_seen_the_last_version_replaces_a_file(storage: Storage) -> None:
    first = storage.swap("x", b"1", None)
    second = storage.swap("x", b"2", first)
    for old in (None, first):
        with pytest.raises(ConflictError):
            storage.swap("x", b"3", old)
    found = storage.read("x")
    assert found is not None and found == (b"2", second)
    storage.remove(["x"])
    with pytest.raises(ConflictError):  # a deleted file does not come back
        storage.swap("x", b"3", second)
    assert storage.read("x") is None


def test_nothing_is_lost_among_many_writers(storage: Storage) -> None:
    rounds = 5
    storage.swap("count", b"0/", None)

    def add(name: str) -> None:
        done = 0
        while done < rounds:
            found = storage.read("count")
            assert found is not None
            count = int(found.content.split(b"/")[0])
            try:
                storage.swap("count", f"{count + 1}/{name}{done}".encode(), found.version)
                done += 1
            except ConflictError:
                pass

    threads = [threading.Thread(target=add, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = storage.read("count")
    assert found is not None and found.content.startswith(b"15/")


def test_answer_that_was_lost_is_no_conflict(bucket: Storage) -> None:
    """The client library sends a request again whose answer does not come, though it may have been carried out."""
    storage = bucket
    first = storage.swap("x", b"1", None)
    assert storage.swap("x", b"1", None) == first
    second = storage.swap("x", b"2", first)
    assert storage.swap("x", b"2", first) == second


def test_storage_without_conditions_is_refused(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.check_swaps()
    assert storage.names("") == []

    def swap(name: str, content: bytes, version: str | None) -> str:
        storage.write(name, content)
        return "version"

    monkeypatch.setattr(storage, "swap", swap)
    with pytest.raises(UserError, match="ignores If-Match and If-None-Match"):
        storage.check_swaps()
    assert storage.names("") == []


def calls(storage: Storage) -> dict[str, Any]:
    return {
        "read": lambda: storage.read("x"),
        "swap": lambda: storage.swap("x", b"1", None),
        "write": lambda: storage.write("x", b"1"),
        "remove": lambda: storage.remove(["x"]),
    }


def test_storage_that_is_away(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name, call in calls(Storage(str(tmp_path / "file"))).items():
        with pytest.raises(StorageError, match="file") as caught:
            call()
        assert isinstance(caught.value.__cause__, OSError), name
    with pytest.MonkeyPatch.context() as patch:
        with s3_server(patch) as url:
            storage = Storage(url)
            storage.write("x", b"1")
            elsewhere = copy.copy(storage)
            elsewhere._root = "no-such-bucket/x"
            for call in calls(elsewhere).values():
                with pytest.raises(StorageError, match=r"does not work .*bucket.*; see that"):
                    call()
        for call in calls(storage).values():
            with pytest.raises(StorageError, match="Could not connect"):
                call()


@pytest.mark.parametrize("url", ["gs://bucket/x", "memory://x", "https://host/x"])
def test_other_storages_are_refused(url: str) -> None:
    with pytest.raises(UserError, match=r"no way to share sessions in .*; give a folder, or s3://"):
        Storage(url)
