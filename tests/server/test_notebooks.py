"""Notebooks of sessions in the engine: what becomes of them with the session, and what is refused."""

import asyncio
import io
import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from engine_helpers import PATIENCE, STORY, collect, generate, hold_saving, text_of, with_engine

from ttt_e2e.errors import UserError
from ttt_e2e.retrieval.notebook import Notebook, notebook_folder
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.notebooks import Limits, as_sources, import_notebook
from ttt_e2e.server.engine.records import (
    DamagedNotebookError,
    LimitReachedError,
    NoNotebookError,
    SessionNotFoundError,
    Source,
)

WHALE = "The whale was white, the sea wide. "  # a passage of its own


async def reader(engine: Engine, *texts: tuple[str, str], owner: str = "me") -> str:
    """The id of a session with a notebook that has read texts, each with its name."""
    id = (await engine.sessions.create(owner, notebook=True)).id
    for text, name in texts:
        await collect(engine.read(owner, id, [text], name))
    return id


async def whales(engine: Engine, id: str, owner: str = "me") -> list[Source]:
    return await engine.recall(owner, id, "whale", 5)


def folders(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.notebook")}


def test_a_notebook_is_saved_forked_and_deleted_with_its_session(tmp_path: Path) -> None:
    async def first(engine: Engine) -> tuple[str, str]:
        id = await reader(engine, (WHALE, "moby.txt"))
        (found,) = await whales(engine, id)
        assert found == Source("moby.txt", 0, len(WHALE), len(WHALE), WHALE, found.score)
        fork = (await engine.sessions.fork("me", id)).id
        assert len(folders(tmp_path)) == 1  # which they share
        await collect(engine.read("me", id, [text_of(1)], "more.txt"))
        await generate(engine, "me", id, "And", max_tokens=3, learn=True)
        assert len(folders(tmp_path)) == 2
        with pytest.raises(SessionNotFoundError):
            await engine.recall("you", id, "whale", 3)
        with pytest.raises(NoNotebookError):
            await whales(engine, (await engine.sessions.create("me")).id)
        return id, fork

    async def second(engine: Engine) -> None:
        summaries = {one.id: one for one in await engine.sessions.summaries("me")}
        kept = [summaries[one].notebook for one in (id, fork)]
        assert [one and one.documents for one in kept] == [["moby.txt", "more.txt"], ["moby.txt"]]
        assert kept[0] and kept[0].characters == len(WHALE) + len(text_of(1))
        assert await whales(engine, id) and await whales(engine, fork)
        assert (await engine.recall("me", id, text_of(1), 1))[0].document == "more.txt"
        await engine.sessions.delete("me", id)
        assert len(folders(tmp_path)) == 1 and await whales(engine, fork)
        await engine.sessions.delete("me", fork)
        assert not folders(tmp_path)

    id, fork = with_engine(tmp_path, first)
    with_engine(tmp_path, second)


def test_a_reading_that_fails_leaves_the_notebook_as_it_was(tmp_path: Path) -> None:
    def failing() -> Iterator[str]:
        yield WHALE
        raise UserError("This text ends here.")

    class Failing:
        def __iter__(self) -> Iterator[str]:
            return failing()

    async def work(engine: Engine) -> None:
        id = await reader(engine, (WHALE, "moby.txt"))
        before = await engine.sessions.summary("me", id), folders(tmp_path)
        with pytest.raises(UserError, match="ends here"):
            await collect(engine.read("me", id, Failing(), "b.txt"))
        with pytest.raises(LimitReachedError, match="A notebook holds at most 1,000 bytes"):
            await collect(engine.read("me", id, [WHALE * 30], "b.txt"))
        reading = asyncio.ensure_future(collect(engine.read("me", id, [WHALE], "b.txt")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert (await engine.sessions.summary("me", id), folders(tmp_path)) == before
        assert not list(tmp_path.glob(".tmp*"))

    with_engine(tmp_path, work, max_notebook_bytes=1000)


def test_a_notebook_is_saved_after_the_client_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(engine: Engine) -> None:
        id = await reader(engine, (WHALE, "moby.txt"))
        saving, release = hold_saving(monkeypatch)
        reading = asyncio.create_task(collect(engine.read("me", id, [text_of(1)], "more.txt")))
        assert await asyncio.to_thread(saving.wait, PATIENCE)
        reading.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await reading
        summary = await engine.sessions.summary("me", id)
        assert summary.notebook and summary.notebook.documents == ["moby.txt", "more.txt"]
        assert summary.text_bytes == len((WHALE + text_of(1)).encode())
        assert (await engine.recall("me", id, text_of(1), 1))[0].document == "more.txt"
        assert not list(tmp_path.glob(".tmp*"))

    with_engine(tmp_path, work)


def test_passages_come_before_the_question_and_are_not_learned(tmp_path: Path) -> None:
    """What a session learns from an answer with passages is the question and the answer, as without a notebook."""

    async def work(engine: Engine) -> None:
        id = await reader(engine, (STORY * 3, "story.txt"))
        text, sources = await engine.retrieve(await engine.sessions.slot("me", id), "rain")
        fork = (await engine.sessions.fork("me", id)).id
        options = {"max_tokens": 4, "learn": True}
        assert sources == [] or (text.endswith("rain") and sources[0].text in text)
        answer, _ = await generate(engine, "me", id, "[0-9]\n" + STORY + "rain", kept="rain", **options)
        summary = await engine.sessions.summary("me", id)
        await collect(engine.read("me", fork, ["rain" + answer]))
        other = await engine.sessions.summary("me", fork)
        assert summary.text_bytes == other.text_bytes == len((STORY * 3 + "rain" + answer).encode())

    with_engine(tmp_path, work)


@pytest.mark.parametrize("damage", ["flip", "missing", "another"])
def test_a_damaged_notebook_is_told_and_the_session_works_without_it(tmp_path: Path, damage: str) -> None:
    async def work(engine: Engine) -> None:
        id = await reader(engine, (WHALE, "moby.txt"))
        other = await reader(engine, (text_of(2), "other.txt"))
        paths = [next(tmp_path.glob(f"{one}.*.notebook")) / "notebook.db" for one in (id, other)]
        if damage == "flip":
            content = bytearray(paths[0].read_bytes())
            content[content.index(b"whale")] ^= 1
            paths[0].write_bytes(content)
        elif damage == "missing":
            paths[0].unlink()
        else:
            paths[0].write_bytes(paths[1].read_bytes())  # a valid one, of another user perhaps
        slot = await engine.sessions.slot("me", id)
        for refused in (
            lambda: whales(engine, id),
            lambda: engine.retrieve(slot, "whale"),
            lambda: engine.sessions.export_session("me", id, tmp_path.parent / "x"),
            lambda: collect(engine.read("me", id, [WHALE])),
        ):
            with pytest.raises(DamagedNotebookError) as caught:
                await refused()
            assert str(tmp_path) not in str(caught.value)
        assert "notebook is damaged" in str((await engine.sessions.summary("me", id)).error)
        assert await generate(engine, "me", id, "And", max_tokens=2)
        await engine.sessions.delete("me", id)
        assert await engine.recall("me", other, text_of(2), 1)

    with_engine(tmp_path, work)


def test_an_imported_notebook_keeps_documents_of_one_name_apart(tmp_path: Path) -> None:
    """As `ttt-e2e read` records two files of the same name from two folders."""
    with Notebook(tmp_path / "n") as notebook:
        for text, name in ((text_of(1), ""), (WHALE, "README.md"), (WHALE, "README.md")):
            list(notebook.record([text], name=name))
        documents = notebook.documents()
    made = import_notebook(tmp_path / "n", tmp_path / "made", Limits(400, 1 << 20))
    assert made.record.documents == ["README.md", "README.md"]
    with Notebook(tmp_path / "made", create=False) as notebook:
        assert notebook.documents() == documents and len(documents) == 2
        first, second = as_sources(notebook, notebook.search("whale", 2))
    assert (first.start, first.stop) == (second.start, second.stop) == (0, len(WHALE))


def test_export_and_import_carry_the_notebook(tmp_path: Path) -> None:
    """The tar is what the commands use, and is imported with the documents' names."""
    target = tmp_path / "export.tar"

    async def work(engine: Engine) -> None:
        id = await reader(engine, (WHALE * 20, "moby.txt"), (text_of(1), "more.txt"))
        assert await engine.sessions.export_session("me", id, target) == f"{id}.tar"
        with tarfile.open(target) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and newer
            archive.extractall(tmp_path / "out")
        session = tmp_path / "out" / f"{id}.session"
        with Notebook(notebook_folder(session), create=False) as notebook:
            assert "".join(notebook.text()) == WHALE * 20 + text_of(1)
        made = await engine.sessions.import_session("you", target)
        exported = await engine.sessions.summary("me", id)
        assert (made.text_digest, made.notebook) == (exported.text_digest, exported.notebook)
        query = f"whale {text_of(1)}"
        assert await engine.recall("you", made.id, query, 20) == await engine.recall("me", id, query, 20)
        alone = await engine.sessions.import_session("you", session)  # without the notebook beside it
        assert alone.notebook is None

        def archive_of(members: dict[str, bytes]) -> Path:
            with tarfile.open(tmp_path / "made.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
                for name, content in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
            return tmp_path / "made.tar"

        name, valid = f"{id}.session", session.read_bytes()
        database = f"{name}.notebook/notebook.db"
        notebook_bytes = (tmp_path / "out" / database).read_bytes()
        flipped = notebook_bytes.replace(b"The whale", b"The while")
        sneaky = tmp_path / "sneaky.db"
        sneaky.write_bytes(notebook_bytes)
        with closing(sqlite3.connect(sneaky)) as db:
            db.execute("CREATE TRIGGER t AFTER INSERT ON passages BEGIN DELETE FROM passages; END")
        kept = await engine.sessions.summaries("you"), folders(tmp_path)
        for members, match in (
            ({database: notebook_bytes}, "no .session file"),
            ({name: valid, "other.session": valid}, "more than one session"),
            ({name: valid, "../evil": b"x"}, "and nothing else"),
            ({name: valid, database: flipped}, "notebook is damaged"),
            ({name: valid, database: b""}, "notebook is damaged"),
            ({name: valid, database: b"x" * 5000}, "notebook is damaged"),
            ({name: valid, database: sneaky.read_bytes()}, "notebook is damaged"),
            ({name: valid[:-1]}, "session"),
        ):
            with pytest.raises(UserError, match=match) as caught:
                await engine.sessions.import_session("you", archive_of(members))
            assert str(tmp_path) not in str(caught.value)
        whole = target.read_bytes()
        for content in (whole[:700], whole[:-3000], whole[:512] + b"x" * 2000):
            (tmp_path / "cut.tar").write_bytes(content)
            with pytest.raises(UserError):
                await engine.sessions.import_session("you", tmp_path / "cut.tar")
        assert (await engine.sessions.summaries("you"), folders(tmp_path)) == kept
        assert not list(tmp_path.glob(".tmp*"))

    with_engine(tmp_path, work)


def test_what_a_killed_service_leaves_is_removed_at_the_next_start(tmp_path: Path) -> None:
    async def first(engine: Engine) -> str:
        return await reader(engine, (WHALE, "moby.txt"))

    id = with_engine(tmp_path, first)
    (kept,) = folders(tmp_path)
    leftover = kept[: -len("0" * 16 + ".notebook")] + "0" * 16 + ".notebook"
    foreign = f"{id}.00000000-{'0' * 16}.notebook"
    for name in (leftover, foreign):
        (tmp_path / name).mkdir()

    async def second(engine: Engine) -> None:
        assert folders(tmp_path) == {kept, foreign} and await whales(engine, id)

    with_engine(tmp_path, second)


def test_sessions_without_notebooks_are_as_before(tmp_path: Path) -> None:
    async def work(engine: Engine) -> None:
        id = (await engine.sessions.create("me")).id
        await collect(engine.read("me", id, iter([WHALE])))  # chunks that can be taken once
        assert (await engine.sessions.summary("me", id)).notebook is None and not folders(tmp_path)
        assert await engine.sessions.export_session("me", id, tmp_path / "x") == f"{id}.session"

    with_engine(tmp_path, work)
