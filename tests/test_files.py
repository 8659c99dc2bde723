"""Files that are complete or absent; locks on folders; formats and versions."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ttt_e2e.errors import UserError
from ttt_e2e.files import (
    atomic_path,
    check_format,
    lock_folder,
    read_json,
    remove_atomically,
    remove_stale_parts,
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


def test_atomic_path_replaces_a_link_and_not_its_target(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("x")
    (tmp_path / "target").symlink_to(elsewhere)
    with atomic_path(tmp_path / "target") as part:
        part.mkdir()
        (part / "new").write_text("y")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["new"]
    assert (elsewhere / "kept").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "target"]


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
