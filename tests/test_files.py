"""Files that are whole or not there."""

import errno
import os
from pathlib import Path

import pytest

from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path, write_text


def test_replaces_a_file_and_a_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "file", "one")
    write_text(tmp_path / "a" / "file", "two")
    assert (tmp_path / "a" / "file").read_text() == "two"
    for text in ("one", "two"):
        with atomic_path(tmp_path / "folder") as part:
            part.mkdir()
            (part / text).write_text(text)
    assert [f.name for f in (tmp_path / "folder").iterdir()] == ["two"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "folder"]


def test_a_link_is_replaced_and_what_it_leads_to_is_left_alone(tmp_path: Path) -> None:
    there = tmp_path / "elsewhere"
    there.mkdir()
    (there / "kept").write_text("x")
    (tmp_path / "target").symlink_to(there)
    with atomic_path(tmp_path / "target") as part:
        part.mkdir()
        (part / "new").write_text("y")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["new"]
    assert (there / "kept").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "target"]


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path: Path) -> None:
    left = tmp_path / f".folder.{os.getpid()}.part"
    left.mkdir()
    (left / "half").write_text("x")
    with atomic_path(tmp_path / "folder") as part:
        part.mkdir()
    assert [*tmp_path.iterdir()] == [tmp_path / "folder"] and not [*(tmp_path / "folder").iterdir()]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux tells which file a number is")
def test_a_power_cut_finds_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that was written is on the disk before the rename is, and that before the block has ended."""
    done: list[str] = []
    synced = os.fsync

    def fsync(number: int) -> None:
        done.append(Path(f"/proc/self/fd/{number}").readlink().name)
        synced(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_path(tmp_path / "folder") as part:
        part.mkdir()
        (part / "file").write_text("new")
        assert done == []
    assert done == [part.name, "file", tmp_path.name]


@pytest.mark.parametrize(
    ("error", "raised", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError, "No space left on the disk while writing"),
        (OSError(errno.EIO, "Input/output error"), UserError, "Cannot write .*: Input/output error"),
        (OSError(errno.ENOENT, "No such file", "elsewhere.txt"), OSError, "elsewhere.txt"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_what_was_there_stays(
    tmp_path: Path, error: BaseException, raised: type[BaseException], sentence: str | None
) -> None:
    target = tmp_path / "file"
    target.write_text("before")
    with pytest.raises(raised, match=sentence), atomic_path(target) as part:
        part.write_text("half")
        raise error
    assert target.read_text() == "before"
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        write_text(tmp_path / "file" / "below", "text")
