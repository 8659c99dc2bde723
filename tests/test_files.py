"""Files that are complete or absent; locks on folders; formats and versions."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import flipped
from hypothesis import given
from hypothesis import strategies as st

from ttt_e2e import files
from ttt_e2e.errors import UserError
from ttt_e2e.files import (
    atomic_path,
    check_file,
    check_format,
    lock_beside,
    lock_folder,
    read_json,
    read_verified_json,
    remove_atomically,
    remove_stale_parts,
    with_digest,
    write_text,
)


def test_atomic_path_replaces_a_file_and_a_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "file", "one")
    write_text(tmp_path / "a" / "file", "two")
    assert (tmp_path / "a" / "file").read_text() == "two"
    for text in ("one", "two"):
        with atomic_path(tmp_path / "folder") as part:
            part.mkdir()
            (part / text).write_text(text)
    assert [f.name for f in (tmp_path / "folder").iterdir()] == ["two"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "folder"]


@pytest.mark.parametrize("exists", [True, False])
def test_atomic_path_follows_links(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "disk").mkdir()
    for name in ("folder", "file"):
        (tmp_path / name).symlink_to(tmp_path / "between")
        (tmp_path / "between").unlink(missing_ok=True)
        (tmp_path / "between").symlink_to(Path("disk", name))  # relative, and a link to a link
        real = tmp_path / "disk" / name
        if name == "folder":
            if exists:
                real.mkdir()
                (real / "old").write_text("x")
            with atomic_path(tmp_path / name) as part:
                part.mkdir()
                (part / "new").write_text("y")
            assert [path.name for path in real.iterdir()] == ["new"]
        else:
            if exists:
                real.write_text("x")
            write_text(tmp_path / name, "y")
            assert real.read_text() == "y"
        assert (tmp_path / name).readlink() == tmp_path / "between" and (tmp_path / "between").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["file", "folder"]


def test_atomic_path_refuses_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="leads back to itself"):
        write_text(tmp_path / "loop", "x")
    assert (tmp_path / "loop").is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o666, 0o400])
def test_modes_survive_and_new_files_follow_the_umask(tmp_path: Path, mode: int) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "new", "x")
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
        (tmp_path / "new").chmod(mode)
        with atomic_path(tmp_path / "new") as part:
            assert part.parent.stat().st_mode & 0o777 == 0o700  # while it is written, it is nobody else's
            part.write_text("y")
        assert (tmp_path / "new").stat().st_mode & 0o777 == mode
        (tmp_path / "folder").mkdir(mode=0o700)
        (tmp_path / "folder" / "old").touch(0o600)
        with atomic_path(tmp_path / "folder") as part:
            part.mkdir()
            for name in ("old", "new"):
                (part / name).write_text("x")
        found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("folder/*")}
        assert found == {"old": 0o600, "new": 0o640} and (tmp_path / "folder").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_owners_survive(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "x")
    os.chown(tmp_path / "file", 12345, 23456)
    write_text(tmp_path / "file", "y")
    status = (tmp_path / "file").stat()
    assert (status.st_uid, status.st_gid) == (12345, 23456)


def test_a_folder_that_was_moved_away_and_not_replaced_yet_is_moved_back(tmp_path: Path) -> None:
    """As after a kill between the two renames."""
    (tmp_path / ".folder.12.old").mkdir()
    (tmp_path / ".folder.12.part").mkdir()
    (tmp_path / ".folder.12.old" / "file").write_text("x")
    remove_stale_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "file").read_text() == "x"


LOCK = """
import sys
from pathlib import Path
from ttt_e2e.files import lock_beside
with lock_beside(Path(sys.argv[1]), "in use") as lock:
    print(lock.read(), flush=True)
    sys.stdin.read()
"""


def test_lock_beside_is_left_only_with_something_in_it(tmp_path: Path) -> None:
    target, lock = tmp_path / "s", tmp_path / ".s.lock"
    with lock_beside(target, "in use"), pytest.raises(UserError, match="in use"):
        lock_beside(target, "in use").__enter__()
    assert not lock.exists()
    with pytest.raises(KeyError), lock_beside(target, "in use"):
        raise KeyError
    assert not lock.exists()
    with pytest.raises(KeyError), lock_beside(target, "in use") as file:
        file.write("something")
        file.flush()
        raise KeyError
    (tmp_path / "link").symlink_to(target)
    command = [sys.executable, "-c", LOCK, str(tmp_path / "link")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "something\n"
        with pytest.raises(UserError, match="in use"):
            lock_beside(target, "in use").__enter__()
        process.kill()
        process.wait()
    with lock_beside(target, "in use") as file:
        assert file.read() == "something"
    assert not lock.exists()


def test_folders_made_for_a_lock_go_when_nothing_came_of_it(tmp_path: Path) -> None:
    target = tmp_path / "kept" / "new" / "newer" / "s"
    (tmp_path / "kept").mkdir()
    with pytest.raises(KeyError), lock_beside(target, "in use"):
        assert target.parent.is_dir()
        raise KeyError
    assert [*tmp_path.rglob("*")] == [tmp_path / "kept"]
    with pytest.raises(KeyError), lock_beside(target, "in use"):
        (tmp_path / "kept" / "new" / "other").touch()  # by another process
        raise KeyError
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "new", "other"]
    with lock_beside(target, "in use"):
        pass
    assert target.parent.is_dir()


@given(data=st.data())
def test_altered_json_is_refused_or_means_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("json") / "file"
    content = {"format": "ttt-e2e x", "version": 1, "numbers": [1, 2.5, -1e-05, None, True], "text": "é\n", "more": {}}
    text = json.dumps(with_digest(content), indent=1).encode()
    bit = data.draw(st.integers(0, 8 * len(text) - 1))
    path.write_bytes(flipped(text, bit))
    try:
        found = read_verified_json(path, "ttt-e2e x", 1, "write it again")
    except UserError:
        return
    assert found == with_digest(content)


def test_json_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("[" * 100_000)
    with pytest.raises(UserError, match="truncated or altered"):
        read_json(tmp_path / "file")


def test_check_file_reads_a_large_file_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_REHASHED", 10)
    digest, hashed = files.file_digest, []
    monkeypatch.setattr(files, "file_digest", lambda path: hashed.append(path) or digest(path))
    path = tmp_path / "shard"
    path.write_bytes(b"x" * 100)
    expected = hashlib.sha256(b"x" * 100).hexdigest()
    written = path.stat().st_ctime
    monkeypatch.setattr("time.time", lambda: written + 1)
    for _ in range(2):  # so new that it might change within a tick of the clock
        check_file(path, 100, expected, "make it again")
    assert len(hashed) == 2
    monkeypatch.setattr("time.time", lambda: written + 3)
    for _ in range(2):
        check_file(path, 100, expected, "make it again")
    assert len(hashed) == 3
    path.write_bytes(b"x" * 99 + b"y")
    os.utime(path, (written + 1, written + 1))  # within the same tick of the disk's clock it would not be noticed
    with pytest.raises(UserError, match="digest does not match; make it again"):
        check_file(path, 100, expected, "make it again")
    path.write_bytes(b"x" * 99)
    with pytest.raises(UserError, match="99 of 100 bytes; make it again"):
        check_file(path, 100, expected, "make it again")
    path.unlink()
    with pytest.raises(UserError, match="is missing; make it again"):
        check_file(path, 100, expected, "make it again")


def test_atomic_path_ignores_what_a_killed_process_of_the_same_id_left(tmp_path: Path) -> None:
    left = tmp_path / f".folder.{os.getpid()}.part"
    left.mkdir()
    (left / "half").write_text("x")
    with atomic_path(tmp_path / "folder") as part:
        part.mkdir()
    assert [*tmp_path.iterdir()] == [tmp_path / "folder"] and not [*(tmp_path / "folder").iterdir()]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux tells which file a descriptor is")
def test_atomic_path_flushes_everything_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that was written is on the disk before the rename is, and that before the block has ended."""
    flushed: list[str] = []
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_path(tmp_path / "folder") as part:
        part.mkdir()
        (part / "file").write_text("new")
        assert flushed == []
    assert flushed == [part.name, "file", tmp_path.name]


@pytest.mark.parametrize(
    ("error", "raised", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError, "No space left on the disk while writing"),
        (OSError(errno.EIO, "Input/output error"), UserError, "Cannot write .*: Input/output error"),
        (OSError(errno.ENOENT, "No such file", "elsewhere.txt"), OSError, "elsewhere.txt"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_atomic_path_keeps_the_old_file_on_an_error(
    tmp_path: Path, error: BaseException, raised: type[BaseException], sentence: str | None
) -> None:
    target = tmp_path / "file"
    target.write_text("before")
    with pytest.raises(raised, match=sentence), atomic_path(target) as part:
        part.write_text("half")
        raise error
    assert target.read_text() == "before"
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_atomic_path_rejects_a_place_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        write_text(tmp_path / "file" / "below", "text")


def test_remove_stale_parts_removes_only_temporary_names(tmp_path: Path) -> None:
    kept = [".a.part", ".a.12.parts", ".a.x.part", "a.12.part", ".hidden", "a"]
    for name in (*kept, ".a.12.part", ".b.12.old"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".a.b.3.part").mkdir()
    remove_stale_parts(tmp_path, "a")
    assert not (tmp_path / ".a.12.part").exists()
    assert (tmp_path / ".b.12.old").exists() and (tmp_path / ".a.b.3.part").exists()
    remove_stale_parts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_remove_atomically_removes_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    remove_atomically(tmp_path / "folder")
    assert not [*tmp_path.iterdir()]


def test_lock_folder_excludes_other_processes_until_it_is_closed(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from ttt_e2e.files import lock_folder; "
        "lock_folder(Path(sys.argv[1]), 'in use')"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with lock_folder(tmp_path, "in use"):
        with pytest.raises(UserError, match="in use"):
            lock_folder(tmp_path, "in use", wait_seconds=0.1)
        assert "in use" in subprocess.run(command, capture_output=True, text=True).stderr
    assert subprocess.run(command).returncode == 0


@pytest.mark.parametrize(
    ("data", "sentence"),
    [(None, "is missing"), (b'{"a": ', "truncated or altered"), (b"\xff", "truncated or altered"), (b"[]", "object")],
)
def test_read_json_rejects_what_is_not_an_object(tmp_path: Path, data: bytes | None, sentence: str) -> None:
    if data is not None:
        (tmp_path / "file").write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        read_json(tmp_path / "file")
    write_text(tmp_path / "file", json.dumps({"a": 1}))
    assert read_json(tmp_path / "file") == {"a": 1}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"format": "ttt-e2e other", "version": 2}, "is not a ttt-e2e model"),
        ({"version": 2}, "is not a ttt-e2e model"),
        ({"format": "ttt-e2e model", "version": 1}, "format version 1, .* reads version 2; convert it again"),
        ({"format": "ttt-e2e model", "version": 3}, "format version 3, .* reads version 2; update ttt-e2e"),
        ({"format": "ttt-e2e model"}, "format version None, .* update ttt-e2e"),
    ],
)
def test_check_format_names_the_version_and_the_remedy(content: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_format(content, Path("config.json"), "ttt-e2e model", 2, "convert it again")
    check_format({"format": "ttt-e2e model", "version": 2}, Path("config.json"), "ttt-e2e model", 2, "convert it again")


def test_read_json_ignores_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_read_json_rejects_what_is_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(UserError, match="is not JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("name", [".", "..", "a/..", "a/.", "/"])
def test_a_lock_beside_a_folder_without_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a/a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    with lock_beside(Path(name), "in use"), pytest.raises(UserError, match="in use"), lock_beside(Path(name), "in use"):
        pass
    assert not list(tmp_path.rglob(".*"))
