"""Replicas that are killed while they work: nothing acknowledged is lost, and no session is changed by two at once.

Clients read texts into 60 sessions, which they share, continue texts, and build chains of responses. A session's digest
after each text says in which order it has read which texts; and the server for S3 keeps all versions of its record, by
which every change can be checked to be made by the replica that held the session.
"""

import itertools
import json
import random
import statistics
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from stress_helpers import SECONDS, SEED, Figures

pytest.importorskip("ray", reason="the extra ray is not installed")
pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

import boto3
import httpx
import openai
from ray_helpers import KEY, cluster, s3_process
from test_service_kill import service

from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.session import Session

pytestmark = pytest.mark.stress

SESSIONS, CLIENTS, REPLICAS, KILLS = 60, 6, 3, 10


@dataclass
class Known:
    """What the clients know of a session. read: texts that it has read, by the number and the digest of its tokens."""

    read: dict[tuple[int, str], str] = field(default_factory=dict)
    doubtful: list[str] = field(default_factory=list)  # whose reading was not answered
    refused: list[str] = field(default_factory=list)


@dataclass
class Clients:
    """Clients of the service at `address`, and what they measure and learn."""

    address: str
    model: str
    sessions: dict[str, Known] = field(default_factory=dict)
    seconds: "defaultdict[str, list[float]]" = field(default_factory=lambda: defaultdict(list))
    failures: list[BaseException] = field(default_factory=list)
    unanswered: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)

    def work(self, number: int) -> None:
        try:
            choices, responses = random.Random(f"{SEED}/{number}"), dict[str, str]()
            with openai.OpenAI(base_url=f"{self.address}/v1", api_key=KEY, max_retries=0, timeout=300) as client:
                while not self.stopping.is_set():
                    kind = choices.choices(("read", "complete", "respond"), (6, 3, 1))[0]
                    started = time.perf_counter()
                    try:
                        getattr(self, kind)(client, choices, responses)
                        self.seconds[kind].append(time.perf_counter() - started)
                    except (openai.InternalServerError, openai.APIConnectionError):
                        self.unanswered += 1
        except BaseException as error:  # which a thread would only warn of
            self.failures.append(error)

    def read(self, client: openai.OpenAI, choices: random.Random, responses: dict[str, str]) -> None:
        known = self.sessions[id := choices.choice(list(self.sessions))]
        text = f"{choices.randrange(10**9)} geese flew over the lake.\n" * choices.randint(1, 3)
        known.doubtful.append(text)
        try:
            found: Any = client.post(
                f"/sessions/{id}/read",
                cast_to=object,
                content=text.encode(),
                options={"headers": {"content-type": "text/plain"}},
            )
        except openai.ConflictError:
            known.refused.append(text)
        else:
            known.read[found["session"]["tokens"], found["session"]["text_digest"]] = text
        known.doubtful.remove(text)

    def complete(self, client: openai.OpenAI, choices: random.Random, responses: dict[str, str]) -> None:
        id = choices.choice(list(self.sessions))
        client.completions.create(model=self.model, prompt="The", max_tokens=2, extra_body={"session": id})

    def respond(self, client: openai.OpenAI, choices: random.Random, responses: dict[str, str]) -> None:
        if len(responses) < 5:
            previous = choices.choice([None, *responses])
            made = client.responses.create(
                model=self.model, input="geese", max_output_tokens=3, previous_response_id=previous
            )
            responses[made.id] = made.output_text
        else:
            id = choices.choice(list(responses))
            assert client.responses.retrieve(id).output_text == responses[id], id


def run(address: str, seconds: float, kill: Any, figures: Figures) -> Clients:
    with httpx.Client(base_url=address, headers={"authorization": f"Bearer {KEY}"}, timeout=300) as client:
        clients = Clients(address, client.get("/v1/models").raise_for_status().json()["data"][0]["id"])
        for _ in range(SESSIONS):
            clients.sessions[client.post("/v1/sessions").raise_for_status().json()["id"]] = Known()
        threads = [threading.Thread(target=clients.work, args=(number,)) for number in range(CLIENTS)]
        end = time.monotonic() + seconds
        for thread in threads:
            thread.start()
        while time.monotonic() < end and not clients.failures:
            time.sleep(min(seconds / (KILLS + 1), max(0.0, end - time.monotonic())))
            if time.monotonic() < end:
                kill()
        clients.stopping.set()
        for thread in threads:
            thread.join()
        assert not clients.failures, clients.failures
        for id, known in clients.sessions.items():
            found = client.get(f"/v1/sessions/{id}").raise_for_status().json()
            check_history(id, known, (found["tokens"], found["text_digest"]))
    return clients


TEMPLATE: Session


def check_history(id: str, known: Known, last: tuple[int, str]) -> None:
    """Each acknowledged text follows the ones before it, with doubtful ones in between, and nothing else was read."""
    session, doubtful = TEMPLATE.fork(), list(known.doubtful)
    for (tokens, digest), text in [*sorted(known.read.items()), (last, "")]:
        found = step(session, text, digest, doubtful)
        assert found is not None, f"{id}: after {tokens} tokens it has read something else; refused: {known.refused}"
        session = found


def step(session: Session, text: str, digest: str, doubtful: list[str]) -> Session | None:
    """The session once it has read `text`, after as many doubtful texts as it takes for this digest."""
    after = session.fork()
    after.read(text)
    if after.info().text_digest == digest:
        return after
    for one in list(doubtful):
        between = session.fork()
        between.read(one)
        doubtful.remove(one)
        if (found := step(between, text, digest, doubtful)) is not None:
            return found
        doubtful.append(one)
    return None


def check_holders(url: str, figures: Figures) -> None:
    """Every record was replaced by the replica that held the session, or by one that began to hold it."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    pages = client.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=f"{prefix}/sessions/")
    records = defaultdict[str, list[dict[str, Any]]](list)
    for version in (version for page in pages for version in page.get("Versions", [])):
        if version["Key"].endswith("/record.json"):
            body = client.get_object(Bucket=bucket, Key=version["Key"], VersionId=version["VersionId"])["Body"]
            records[version["Key"]].append(json.loads(body.read()))
    for name, versions in records.items():
        versions.sort(key=lambda one: one["generation"])
        assert [one["generation"] for one in versions] == list(range(1, len(versions) + 1)), name
        for old, new in itertools.pairwise(versions):
            writer = new["writer"].partition("/")[0]
            if writer == new["holder"]:
                assert old["file"] == new["file"], name
                figures.add("take-overs", old["holder"] not in (None, writer))
            else:
                assert (old["holder"], new["holder"]) == (writer, None), name
        figures.add("versions of records", len(versions))


def say(figures: Figures, what: str, clients: Clients) -> None:
    for kind, seconds in sorted(clients.seconds.items()):
        cuts = statistics.quantiles(seconds, n=100)
        figures.add(f"{what} {kind}", len(seconds))
        for name, value in (("p50", cuts[49]), ("p99", cuts[98]), ("most", max(seconds))):
            figures.counts[f"ms {name} of {what} {kind}"] = round(1000 * value)


def test_replicas_are_killed(shipped: Path, tmp_path: Path, figures: Figures) -> None:
    global TEMPLATE
    TEMPLATE = Session(*load_model(shipped), learn=False)
    choices = random.Random(SEED)
    with service(tmp_path / "one", tmp_path / "log") as (_, address):
        say(figures, "one process:", run(address, SECONDS / 5, lambda: None, figures))
    with s3_process() as (url, variables), cluster(url, shipped, tmp_path / "ray", REPLICAS, variables) as replicas:

        def kill() -> None:
            running = replicas.replicas()
            if len(running) > 1:
                choices.choice(running).kill()
                figures.add("kills")

        clients = run(replicas.address, SECONDS, kill, figures)
        say(figures, "replicas:", clients)
        figures.add("unanswered", clients.unanswered)
        figures.add("refused", sum(len(known.refused) for known in clients.sessions.values()))
        check_holders(url, figures)
    assert figures.counts.get("kills", 0) > 0
