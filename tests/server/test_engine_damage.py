"""Session files that are damaged, removed or replaced, while the engine runs and before it starts."""

import asyncio
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_helpers import (
    TEMPLATE,
    assert_same,
    export,
    file_of,
    generate,
    having_read,
    read,
    text_of,
    with_engine,
)

from ttt_e2e.errors import UserError
from ttt_e2e.inference.session import Session
from ttt_e2e.server.engine.database import DATABASE
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.records import DamagedSessionError


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def swapped(path: Path) -> None:
    """Put a sound session there that has read something else."""
    path.unlink()
    having_read(text_of(8)).save(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "one byte less": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": flipped,
    "flipped in place": lambda path: flip_in_place(path),
    "something else": lambda path: path.write_text("my notes"),
    "another session": swapped,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a dead link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


def flip_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 16]))


class Untouched:
    """A text that nobody may read."""

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("the text was read")


def test_damage_in_memory_is_found_before_a_text_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work(engine: Engine) -> None:
        sound, *ids = [(await engine.sessions.create("me")).id for _ in range(1 + len(DAMAGE))]
        await asyncio.gather(*(read(engine, "me", id, text_of(1, 3)) for id in (sound, *ids)))
        mended, both = [], having_read(text_of(1, 3), text_of(2, 3))
        for damaged, (kind, damage) in zip(ids, DAMAGE.items(), strict=True):
            path = file_of(tmp_path / "data", damaged)
            whole = path.read_bytes()
            damage(path)
            caplog.clear()
            for call in (
                anext(engine.read("me", damaged, Untouched())),
                generate(engine, "me", damaged, "Rain", learn=True),
                engine.sessions.summary("me", damaged),
                anext(engine.read("me", damaged, Untouched())),
            ):
                with pytest.raises(DamagedSessionError) as caught:
                    await call
                assert str(tmp_path) not in str(caught.value) and damaged not in str(caught.value)
            (line,) = [record for record in caplog.records if record.levelno == logging.ERROR]
            assert str(path) in line.getMessage(), kind
            if path.is_dir():
                path.rmdir()
            path.unlink(missing_ok=True)
            path.write_bytes(whole)  # the operator has put it back
            mended.append((await read(engine, "me", damaged, text_of(2, 3))).session)
        mended.append((await read(engine, "me", sound, text_of(2, 3))).session)
        assert {session and session.text_digest for session in mended} == {both.info().text_digest}
        for id in (sound, damaged):
            assert_same(await export(engine, "me", id, tmp_path), both)

    with_engine(tmp_path / "data", work)


def test_damage_on_disk_is_an_error_and_others_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work(engine: Engine) -> list[str]:
        ids = [(await engine.sessions.create("me")).id for _ in range(1 + len(DAMAGE))]
        await asyncio.gather(*(read(engine, "me", id, text_of(1)) for id in ids))
        return ids

    async def restarted(engine: Engine) -> None:
        for damaged in ids:
            for call in (
                read(engine, "me", damaged, "Rain"),
                generate(engine, "me", damaged, "Rain"),
                engine.sessions.fork("me", damaged),
                engine.sessions.export_session("me", damaged, tmp_path / "out"),
                engine.sessions.summary("me", damaged),
            ):
                with pytest.raises(DamagedSessionError):
                    await call
        assert sum(record.levelno == logging.ERROR for record in caplog.records) == len(ids)
        first, *others = await engine.sessions.summaries("me")
        assert first.error is None and all(summary.error and not summary.tokens for summary in others)
        await read(engine, "me", sound, text_of(2))
        assert_same(await export(engine, "me", sound, tmp_path), having_read(text_of(1), text_of(2)))
        for damaged in ids:
            await engine.sessions.delete("me", damaged)
        assert [summary.id for summary in await engine.sessions.summaries("me")] == [sound]

    sound, *ids = with_engine(tmp_path / "data", work)
    for damaged, damage in zip(ids, DAMAGE.values(), strict=True):
        damage(file_of(tmp_path / "data", damaged))
    with_engine(tmp_path / "data", restarted)


def test_file_that_was_only_touched_or_copied_is_sound(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        id = (await engine.sessions.create("me")).id
        await read(engine, "me", id, text_of(1))
        path = file_of(tmp_path / "data", id)
        path.touch()
        await read(engine, "me", id, text_of(2))
        path = file_of(tmp_path / "data", id)
        shutil.copy(path, tmp_path / "copy")
        shutil.move(tmp_path / "copy", path)
        await read(engine, "me", id, text_of(3))
        expected = having_read(text_of(1), text_of(2), text_of(3))
        assert_same(await export(engine, "me", id, tmp_path), expected)

    with_engine(tmp_path / "data", work)


def test_session_in_memory_can_still_be_forked_when_its_file_is_damaged(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        id = (await engine.sessions.create("me")).id
        await read(engine, "me", id, text_of(1))
        file_of(tmp_path / "data", id).unlink()
        fork = await engine.sessions.fork("me", id)
        await read(engine, "me", fork.id, text_of(2))
        assert_same(await export(engine, "me", fork.id, tmp_path), having_read(text_of(1), text_of(2)))

    with_engine(tmp_path / "data", work)


def test_sessions_of_another_model_are_not_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work(engine: Engine) -> str:
        return (await engine.sessions.create("me")).id

    async def other(engine: Engine) -> None:
        with pytest.raises(UserError, match="learn = True, and this service uses False") as caught:
            await read(engine, "me", id, "Rain")
        assert not isinstance(caught.value, DamagedSessionError) and not caplog.records
        assert (await engine.sessions.summary("me", id)).error is None

    id = with_engine(tmp_path, work)
    template = Session(TEMPLATE.model, TEMPLATE.tokenizer, learn=False, dtype=TEMPLATE.dtype)
    with_engine(tmp_path, other, template)


@pytest.mark.parametrize("how", ["removed", "moved", "replaced", "emptied", "database removed", "database replaced"])
def test_folder_that_is_lost_is_never_made_again(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tmp_path / "data"

    async def work(engine: Engine) -> None:
        id = (await engine.sessions.create("me")).id
        await read(engine, "me", id, text_of(1))
        if how == "removed":
            shutil.rmtree(data)
        elif how == "database removed":
            (data / DATABASE).unlink()
        elif how == "database replaced":
            shutil.copy(data / DATABASE, tmp_path / "copy")
            shutil.move(tmp_path / "copy", data / DATABASE)
        elif how == "emptied":
            for path in data.iterdir():
                path.unlink()
        else:
            data.rename(tmp_path / "elsewhere")
        if how == "replaced":
            shutil.copytree(tmp_path / "elsewhere", data)
        before = sorted(tmp_path.rglob("*"))
        assert engine.ready
        for call in (
            read(engine, "me", id, text_of(2)),
            engine.sessions.create("me"),
            engine.sessions.delete("me", id),
            generate(engine, "me", id, "Rain", learn=True, max_tokens=3),
        ):
            with pytest.raises(UserError, match="removed or replaced while the service was running") as caught:
                await call
            assert isinstance(caught.value.__cause__, OSError) and not engine.ready
        assert sorted(tmp_path.rglob("*")) == before
        assert [record.levelno for record in caplog.records].count(logging.ERROR) == 1

    with_engine(data, work)
