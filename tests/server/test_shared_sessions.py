"""Two engines over the same storage, as two replicas have them: each sees what the other has saved."""

import asyncio
import functools
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import (
    PATIENCE,
    TEMPLATE,
    HeldText,
    assert_same,
    collect,
    export,
    generate,
    having_read,
    read,
    text_of,
    until,
)

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from server_helpers import client_of

from ttt_e2e.server.engine import shared_store
from ttt_e2e.server.engine.engine import Engine
from ttt_e2e.server.engine.records import (
    DamagedNotebookError,
    LimitReachedError,
    SessionNotFoundError,
    TakenOverError,
)
from ttt_e2e.server.engine.shared_store import SharedStore
from ttt_e2e.server.engine.storage import StorageError


@asynccontextmanager
async def replicas(folder: Path, **options: Any) -> AsyncIterator[tuple[Engine, Engine]]:
    one, two = (Engine(TEMPLATE.fork(), SharedStore(str(folder)), **options) for _ in range(2))
    await one.start()
    await two.start()
    try:
        yield one, two
    finally:
        await one.stop(0)
        await two.stop(0)


def with_replicas(folder: Path, work: Callable[[Engine, Engine], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with replicas(folder / "shared", **options) as (one, two):
            await asyncio.wait_for(work(one, two), PATIENCE)

    asyncio.run(main())


@pytest.mark.parametrize("memory_bytes", [1, 1 << 30])
def test_session_goes_from_replica_to_replica(memory_bytes: int, tmp_path: Path) -> None:
    async def work(one: Engine, two: Engine) -> None:
        id, texts = (await one.sessions.create("me")).id, [text_of(seed) for seed in range(4)]
        for i, text in enumerate(texts):
            await read((one, two)[i % 2], "me", id, text)
        summaries = [await engine.sessions.summary("me", id) for engine in (one, two)]
        assert summaries[0].text_digest == summaries[1].text_digest
        for engine in (one, two):
            assert_same(await export(engine, "me", id, tmp_path), having_read(*texts))
        said = [await generate(engine, "me", id, "The", max_tokens=5) for engine in (one, two)]
        assert said[0] == said[1]
        await generate(two, "me", id, "The", max_tokens=5, learn=True)
        assert_same(await export(one, "me", id, tmp_path), await export(two, "me", id, tmp_path))

    with_replicas(tmp_path, work, memory_bytes=memory_bytes)


def test_notebook_goes_with_its_session_from_replica_to_replica(tmp_path: Path) -> None:
    async def work(one: Engine, two: Engine) -> None:
        id, whale, sea = (await one.sessions.create("me", notebook=True)).id, "The whale. ", "The sea. "
        await collect(one.read("me", id, [whale], "moby.txt"))
        assert (await two.recall("me", id, "whale", 1))[0].document == "moby.txt"
        fork = (await two.sessions.fork("me", id)).id
        await collect(two.read("me", id, [sea], "sea.txt"))
        for engine in (one, two):
            assert (await engine.recall("me", id, "sea", 1))[0].document == "sea.txt"
            assert (await engine.recall("me", fork, "whale", 1))[0].text == whale
            exported = tmp_path / "exported.tar"
            assert await engine.sessions.export_session("me", id, exported) == f"{id}.tar"
            made = await engine.sessions.import_session("you", exported)
            exported.unlink()
            assert made.notebook and made.notebook.documents == ["moby.txt", "sea.txt"]
            assert made.text_digest == (await engine.sessions.summary("me", id)).text_digest
        await one.sessions.delete("me", id)
        with pytest.raises(SessionNotFoundError):
            await two.recall("me", id, "sea", 1)
        assert (await two.recall("me", fork, "whale", 1))[0].text == whale  # it has a copy of its own

    with_replicas(tmp_path, work)


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_damaged_notebook_is_told_and_the_session_works_without_it(damage: str, tmp_path: Path) -> None:
    async def work(one: Engine, two: Engine) -> None:
        id = (await one.sessions.create("me", notebook=True)).id
        await collect(one.read("me", id, ["The whale. "], "moby.txt"))
        (file,) = (tmp_path / "shared").rglob("*.notebook")
        if damage == "altered":
            file.write_bytes(file.read_bytes().replace(b"whale", b"shale"))
        else:
            file.unlink()
        for refused in (
            lambda: two.recall("me", id, "whale", 1),
            lambda: two.sessions.export_session("me", id, tmp_path / "x"),
            lambda: two.sessions.fork("me", id),
            lambda: collect(two.read("me", id, ["The sea."])),
        ):
            with pytest.raises(DamagedNotebookError):
                await refused()
        assert "notebook is damaged" in str((await two.sessions.summary("me", id)).error)
        assert await generate(two, "me", id, "And", max_tokens=2)
        await two.sessions.delete("me", id)
        assert not list((tmp_path / "shared").rglob(id))

    with_replicas(tmp_path, work)


def test_notebook_that_another_replica_replaces_meanwhile_is_found(tmp_path: Path) -> None:
    async def work(one: Engine, two: Engine) -> None:
        id = (await one.sessions.create("me", notebook=True)).id
        await collect(one.read("me", id, ["The whale. "], "moby.txt"))
        store, loop, local_notebook = two.sessions.store, asyncio.get_running_loop(), two.sessions.store.local_notebook
        called = 0

        def replaced_before(notebook: Any) -> Any:
            nonlocal called
            called += 1
            if called == 1:
                reading = collect(one.read("me", id, ["The sea. "], "sea.txt"))
                asyncio.run_coroutine_threadsafe(reading, loop).result(PATIENCE)
            return local_notebook(notebook)

        store.local_notebook = replaced_before
        assert [source.document for source in await two.recall("me", id, "sea", 1)] == ["sea.txt"] and called == 2
        store._copies.clear()
        called = 0
        target = tmp_path / "exported.tar"
        await two.sessions.export_session("me", id, target)
        made = await one.sessions.import_session("me", target)
        current = await one.sessions.summary("me", id)
        assert (made.text_digest, made.notebook) == (current.text_digest, current.notebook)  # of one version

    with_replicas(tmp_path, work)


def test_notebook_that_another_replica_replaces_while_it_is_used_is_not_damaged(tmp_path: Path) -> None:
    async def work(one: Engine, two: Engine) -> None:
        id = (await one.sessions.create("me", notebook=True)).id
        await collect(one.read("me", id, ["The whale. "], "moby.txt"))
        store, files, loop = two.sessions.store, two.sessions._files, asyncio.get_running_loop()
        load, local_notebook, to_come = files.load, store.local_notebook, ["The sea. "]

        def replace() -> None:
            for text in to_come:
                to_come.clear()
                for meanwhile in (collect(one.read("me", id, [text], text)), two.sessions.slot("me", id)):
                    asyncio.run_coroutine_threadsafe(meanwhile, loop).result(PATIENCE)  # type: ignore[arg-type]

        @contextmanager
        def replaced_while_used(notebook: Any) -> Iterator[Path]:
            with local_notebook(notebook) as folder:
                replace()
                yield folder

        def replaced_after(slot: Any) -> Any:
            session = load(slot)
            replace()
            return session

        store.local_notebook = replaced_while_used
        assert [source.document for source in await two.recall("me", id, "whale", 1)] == ["moby.txt"]
        assert [source.document for source in await two.recall("me", id, "sea", 1)] == ["The sea."]
        files.load = replaced_after
        to_come.append("The land. ")
        await two.sessions.export_session("me", id, tmp_path / "exported.tar")
        made = await one.sessions.import_session("me", tmp_path / "exported.tar")
        current = await one.sessions.summary("me", id)
        assert (made.text_digest, made.notebook) == (current.text_digest, current.notebook) and not to_come

    with_replicas(tmp_path, work)


@pytest.mark.parametrize("when", ["found", "checked", "loaded"])
def test_session_that_another_replica_replaces_while_it_is_loaded(when: str, tmp_path: Path) -> None:
    """It is not damaged, and its former version is not used from then on."""

    async def work(one: Engine, two: Engine) -> None:
        id = (await one.sessions.create("me")).id
        await read(one, "me", id, text_of(1))
        loop, replaced = asyncio.get_running_loop(), False

        def replace(function: Callable[..., Any], *arguments: Any) -> Any:
            """In the thread that loads: another request of this replica has found the new version, too."""
            nonlocal replaced
            result = function(*arguments) if when == "loaded" else None
            if not replaced:
                replaced = True
                for meanwhile in (read(one, "me", id, text_of(2)), two.sessions.slot("me", id)):
                    asyncio.run_coroutine_threadsafe(meanwhile, loop).result(PATIENCE)  # type: ignore[arg-type]
            return result or function(*arguments)

        step = {"found": (two.sessions.store, "fingerprint"), "checked": (two.sessions._files._loader, "read_info")}
        owner, name = step.get(when, (two.sessions._files._loader, "load"))
        setattr(owner, name, functools.partial(replace, getattr(owner, name)))
        assert await generate(two, "me", id, "Rain", max_tokens=2) and replaced
        assert_same(await export(two, "me", id, tmp_path), having_read(text_of(1), text_of(2)))
        assert (await two.sessions.summary("me", id)).error is None

    with_replicas(tmp_path, work)


def test_one_replica_waits_for_the_other(tmp_path: Path) -> None:
    async def work(one: Engine, two: Engine) -> None:
        id, first, second = (await one.sessions.create("me")).id, HeldText(text_of(1)), text_of(2)
        reading = asyncio.create_task(collect(one.read("me", id, first)))
        await asyncio.to_thread(first.reached.wait, PATIENCE)
        waiting = asyncio.create_task(read(two, "me", id, second))
        looks = 0

        def find(owner: str, id: str) -> Any:
            nonlocal looks
            looks += 1
            return type(two.sessions.store).find(two.sessions.store, owner, id)

        two.sessions.store.find = find
        await until(lambda: looks > 2)
        assert not waiting.done()
        assert (await two.sessions.summary("me", id)).tokens == 1  # what only looks does not wait
        first.release.set()
        await asyncio.gather(reading, waiting)
        assert_same(await export(one, "me", id, tmp_path), having_read(first.text, second))

    with_replicas(tmp_path, work)


def test_failed_change_lets_the_session_go(tmp_path: Path) -> None:
    async def work(one: Engine, two: Engine) -> None:
        id = (await one.sessions.create("me")).id

        def broken() -> Any:
            yield text_of(1)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await collect(one.read("me", id, broken()))
        assert two.sessions.store.find("me", id).holder is None
        await read(two, "me", id, text_of(2))
        assert_same(await export(one, "me", id, tmp_path), having_read(text_of(2)))

    with_replicas(tmp_path, work)


def test_request_that_is_cancelled_while_it_claims_lets_the_session_go(tmp_path: Path) -> None:
    async def work(one: Engine, two: Engine) -> None:
        id, claim, reached = (await one.sessions.create("me")).id, one.sessions.store.claim, threading.Event()
        release = threading.Event()

        def held(record: Any) -> Any:
            reached.set()
            assert release.wait(PATIENCE)
            return claim(record)

        one.sessions.store.claim = held
        reading = asyncio.create_task(read(one, "me", id, text_of(1)))
        await asyncio.to_thread(reached.wait, PATIENCE)
        reading.cancel()
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert two.sessions.store.find("me", id).holder is None

    with_replicas(tmp_path, work)


def test_session_that_could_not_be_released_is_released_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_store, "BEAT_SECONDS", 0.01)

    async def work(one: Engine, two: Engine) -> None:
        id, store = (await one.sessions.create("me")).id, one.sessions.store
        store.release(store.claim(store.find("me", id)))
        with monkeypatch.context() as patch:
            claimed = store.claim(store.find("me", id))
            patch.setattr(store.storage, "swap", raise_away)
            with pytest.raises(StorageError):
                store.release(claimed)
        await until(lambda: two.sessions.store.find("me", id).holder is None)

    with_replicas(tmp_path, work)


def test_replica_that_comes_back_too_late_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(one: Engine, two: Engine) -> None:
        id, held = (await one.sessions.create("me")).id, HeldText(text_of(1))
        reading = asyncio.create_task(collect(one.read("me", id, held)))
        await asyncio.to_thread(held.reached.wait, PATIENCE)
        one.sessions.store._closed.set()  # no beat comes any more
        clock, step = time.monotonic, shared_store.LEASE_SECONDS
        monkeypatch.setattr(shared_store.time, "monotonic", lambda: clock() + step)
        assert not two.sessions.store.is_gone(one.sessions.store.holder)
        step *= 3
        await read(two, "me", id, text_of(2))
        held.release.set()
        with pytest.raises(TakenOverError):
            await reading
        for engine in (one, two):
            assert_same(await export(engine, "me", id, tmp_path), having_read(text_of(2)))
        await read(one, "me", id, text_of(3))
        assert_same(await export(two, "me", id, tmp_path), having_read(text_of(2), text_of(3)))

    with_replicas(tmp_path, work)


def test_sessions_are_counted_listed_and_deleted_everywhere(tmp_path: Path) -> None:
    async def work(one: Engine, two: Engine) -> None:
        ids = [(await engine.sessions.create("me")).id for engine in (one, two)]
        for engine in (one, two):
            assert [summary.id for summary in await engine.sessions.summaries("me")] == ids
            assert await engine.sessions.summaries("you") == []
            with pytest.raises(LimitReachedError):
                await engine.sessions.create("me")
            with pytest.raises(SessionNotFoundError):
                await engine.sessions.summary("you", ids[0])
        held = HeldText(text_of(1))
        reading = asyncio.create_task(collect(one.read("me", ids[0], held)))
        await asyncio.to_thread(held.reached.wait, PATIENCE)
        await two.sessions.delete("me", ids[0])
        held.release.set()
        with pytest.raises(SessionNotFoundError):
            await reading
        for engine in (one, two):
            assert [summary.id for summary in await engine.sessions.summaries("me")] == ids[1:]
            with pytest.raises(SessionNotFoundError):
                await engine.sessions.summary("me", ids[0])
        assert (await two.sessions.create("me")).id not in ids

    with_replicas(tmp_path, work, max_sessions=2)


def test_responses_and_conversations_continue_on_the_other_replica(tmp_path: Path) -> None:
    folder = str(tmp_path / "shared")
    with ExitStack() as stack:
        one, two = (stack.enter_context(client_of(Engine(TEMPLATE.fork(), SharedStore(folder)))) for _ in range(2))
        body = {"input": "Wie naß?", "max_output_tokens": 3}
        first = one.post("/v1/responses", json=body).json()
        second = two.post("/v1/responses", json={**body, "previous_response_id": first["id"]}).json()
        assert one.get(f"/v1/responses/{second['id']}").json() == second
        conversation = one.post("/v1/conversations", json={"metadata": {"a": "b"}}).json()["id"]
        for client in (two, one):
            assert client.post("/v1/responses", json={**body, "conversation": conversation}).status_code == 200
        items = two.get(f"/v1/conversations/{conversation}/items").json()["data"]
        assert [item["role"] for item in items] == ["assistant", "user"] * 2
        assert two.delete(f"/v1/responses/{first['id']}").status_code == 200
        gone = one.post("/v1/responses", json={**body, "previous_response_id": first["id"]})
        assert gone.json()["error"]["code"] == "response_not_found"


@pytest.mark.parametrize(
    ("path", "body", "lookups"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "?"}], "n": 2}, 1),
        ("/v1/completions", {"prompt": ["a", "b"], "notebook": False}, 1),
        ("/v1/completions", {"prompt": "a", "learn": True}, 2),  # and again once it holds the session
        ("/v1/messages", {"messages": [{"role": "user", "content": "?"}]}, 1),
    ],
)
def test_a_request_looks_its_session_up_once(
    path: str, body: dict[str, Any], lookups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client_of(Engine(TEMPLATE.fork(), SharedStore(str(tmp_path / "shared")))) as client:
        id, found = client.post("/v1/sessions", json={"notebook": True}).json()["id"], list[str]()
        find = SharedStore.find
        monkeypatch.setattr(SharedStore, "find", lambda *words: found.append(words[2]) or find(*words))
        assert client.post(path, json={**body, "session": id, "max_tokens": 2}).status_code == 200
    assert found == [id] * lookups


def test_storage_that_is_away_is_one_sentence_until_it_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mount"
    folder.write_text("nothing is mounted")
    with client_of(Engine(TEMPLATE.fork(), SharedStore(str(folder / "sessions")))) as client:

        def check_away() -> None:
            for answer in (client.post("/v1/sessions"), client.get("/v1/sessions")):
                assert answer.status_code == 503 and answer.json()["error"]["code"] == "storage"
                assert answer.json()["error"]["message"].startswith("The server cannot reach its storage; tell")
                assert str(tmp_path) not in answer.text

        check_away()
        assert client.post("/v1/completions", json={"prompt": "The", "max_tokens": 1}).status_code == 200
        folder.unlink()
        id = client.post("/v1/sessions").json()["id"]
        reading = {"content": text_of(1).encode(), "headers": {"content-type": "text/plain"}}
        assert client.post(f"/v1/sessions/{id}/read", **reading).status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr("ttt_e2e.server.engine.storage.Storage.swap", raise_away)
            tokens = client.get(f"/v1/sessions/{id}").json()["tokens"]
            answer = client.post(f"/v1/sessions/{id}/read", **reading)
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "storage"
        assert client.get(f"/v1/sessions/{id}").json()["tokens"] == tokens
        assert client.post(f"/v1/sessions/{id}/read", **reading).status_code == 200


def raise_away(*_: object) -> None:
    raise StorageError("The sessions' storage does not work.")
