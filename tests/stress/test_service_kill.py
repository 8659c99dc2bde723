"""A service that is killed while it works: after the next start all is there that it had acknowledged, and no more."""

import contextlib
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers import start_command
from stress_helpers import PATIENCE, Figures, rounds

pytest.importorskip("fastapi", reason="the extra serve is not installed")

import httpx

from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.session import Session

pytestmark = pytest.mark.stress


@contextmanager
def service(data: Path, log: Path) -> Iterator[tuple[int, str]]:
    """The process id and address of `ttt-e2e serve` in a copy of this process."""
    begun = log.stat().st_size if log.exists() else 0
    argv = ["serve", "--port", "0", "--data", str(data), "--rate", "1000000", "--threads", "1"]
    with log.open("ab") as errors, Path(os.devnull).open("r+") as null:
        child = start_command(argv, null.fileno(), null.fileno(), errors.fileno())
    end = time.monotonic() + PATIENCE
    try:
        while True:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), f"the service has ended: {log.read_text()[-2000:]}"
            said = re.search(rb"^Serving .* at (http://[^ ,]+),", log.read_bytes()[begun:], re.M)
            with contextlib.suppress(httpx.TransportError):
                if said and httpx.get(f"{said[1].decode()}/health").status_code == 200:
                    break
            assert time.monotonic() < end, "the service does not start"
            time.sleep(0.01)
        yield child, said[1].decode()
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@dataclass
class Known:
    """What the clients know of a session: the texts that it has read, and what a request without an answer may do."""

    texts: list[str] = field(default_factory=list)
    pending: str | None = None  # a text whose reading was not acknowledged
    going: bool = False  # its deletion was not acknowledged
    sure: bool = True  # whether its creation was


class Oracle:
    """Digests of what sessions must have read."""

    def __init__(self, model: Path) -> None:
        self.model, self.tokenizer = load_model(model)
        self.digests: dict[tuple[str, ...], str] = {}

    def digest(self, texts: list[str]) -> str:
        key = tuple(texts)
        if key not in self.digests:
            session = Session(self.model, self.tokenizer, learn=False)
            for text in texts:
                session.read(text)
            self.digests[key] = session.info().text_digest
        return self.digests[key]


def work(address: str, choices: random.Random, mine: dict[str, Known], lock: threading.Lock, counts: Figures) -> None:
    """Requests until the service is gone; each is known before it is sent, and when it was answered."""
    with httpx.Client(base_url=address, timeout=PATIENCE) as client, contextlib.suppress(httpx.TransportError):
        while True:
            kind = choices.randrange(10)
            ids = [id for id, known in mine.items() if not known.going]
            if not ids or kind == 0:
                made = client.post("/v1/sessions")
                if made.status_code == 201:
                    mine[made.json()["id"]] = Known()
            elif kind < 6:
                id, text = choices.choice(ids), f"{choices.randrange(50)} geese flew over the lake.\n"
                mine[id].pending = text
                headers = {"content-type": "text/plain"}
                done = client.post(f"/v1/sessions/{id}/read", content=text.encode(), headers=headers)
                if done.status_code == 200:
                    mine[id].texts.append(text)
                if done.status_code != 503:
                    assert done.status_code == 200, done.text
                    mine[id].pending = None
            elif kind == 6:
                id = choices.choice(ids)
                made = client.post(f"/v1/sessions/{id}/fork")
                if made.status_code == 201:
                    mine[made.json()["id"]] = Known(list(mine[id].texts))
            elif kind == 7 and len(ids) > 2:
                id = choices.choice(ids)
                mine[id].going = True
                if client.delete(f"/v1/sessions/{id}").status_code == 200:
                    del mine[id]
            elif kind == 8:
                id = choices.choice(ids)
                exported = client.get(f"/v1/sessions/{id}/export").content
                made = client.post("/v1/sessions/import", content=exported)
                if made.status_code == 201:
                    mine[made.json()["id"]] = Known(list(mine[id].texts))
            else:
                body = {"prompt": "The", "max_tokens": 2, "session": choices.choice(ids)}
                assert client.post("/v1/completions", json=body).status_code in (200, 503)
            with lock:
                counts.add("operations")


def check(address: str, known: dict[str, Known], oracle: Oracle, where: str) -> None:
    """Compare the service with what was acknowledged, and let `known` be what it has."""
    with httpx.Client(base_url=address, timeout=PATIENCE) as client:
        found = {one["id"]: one for one in client.get("/v1/sessions").json()["data"]}
        for id, expected in list(known.items()):
            if id not in found:
                assert expected.going, f"{where}: {id} is gone"
                del known[id]
                continue
            possible = [expected.texts, *([[*expected.texts, expected.pending]] if expected.pending else [])]
            digests = [oracle.digest(texts) for texts in possible]
            assert found[id]["text_digest"] in digests, f"{where}: {id} has read something else"
            known[id] = Known(possible[digests.index(found[id]["text_digest"])])
        # A creation without an answer leaves a session that nobody knows of.
        for id in found.keys() - known.keys():
            assert client.delete(f"/v1/sessions/{id}").status_code == 200
        some = list(known)[:3]
        for id in some:  # what is on disk is whole
            assert client.get(f"/v1/sessions/{id}/export").status_code == 200
        for id in list(known)[20:]:
            assert client.delete(f"/v1/sessions/{id}").status_code == 200
            del known[id]


def test_killed_while_it_works(shipped: Path, tmp_path: Path, figures: Figures) -> None:
    data, log, oracle = tmp_path / "sessions", tmp_path / "log", Oracle(shipped)
    parts: list[dict[str, Known]] = [{}, {}, {}]
    lock, failures = threading.Lock(), []

    def guarded(*arguments: Any) -> None:
        try:
            work(*arguments)
        except BaseException as error:  # which a thread would only warn of
            failures.append(error)

    for name, choices in rounds():
        with service(data, log) as (child, address):
            known: dict[str, Any] = {id: one for part in parts for id, one in part.items()}
            check(address, known, oracle, name)
            parts = [{id: known[id] for id in part if id in known} for part in parts]
            seeds = [choices.random() for _ in parts]
            threads = [
                threading.Thread(target=guarded, args=(address, random.Random(seed), part, lock, figures))
                for seed, part in zip(seeds, parts, strict=True)
            ]
            for thread in threads:
                thread.start()
            time.sleep(choices.uniform(0.0, 1.5))
            gracefully = choices.random() < 0.2
            os.kill(child, signal.SIGTERM if gracefully else signal.SIGKILL)
            figures.add("orderly ends" if gracefully else "kills")
            if gracefully:
                _, status = os.waitpid(child, 0)
                assert os.waitstatus_to_exitcode(status) in (0, 1), name
            for thread in threads:
                thread.join()
        assert not failures, f"{name}: {failures}, the service's log ends with: {log.read_text()[-3000:]}"
        assert "Traceback" not in log.read_text(), f"{name}: {log.read_text()[-3000:]}"
    left = [path.name for path in data.iterdir() if path.name.startswith(".tmp-") or path.name.endswith(".part")]
    assert len(left) <= 3, left  # of the last kill; the next start removes it
