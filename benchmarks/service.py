"""Many sessions at once through the service, under load, and with the service killed.

    python benchmarks/service.py VAL.parquet --minutes 10            # 64 sessions read and write at once
    python benchmarks/service.py VAL.parquet --responses --part 600  # 64 streams of /v1/responses at once
    python benchmarks/service.py VAL.parquet --kills 20              # kill -9 at random moments

It starts `ttt-e2e serve` with the shipped model. Every session reads a text of its own, one part per request, and after
each part a streamed completion is requested. At the end:

- no request may have failed;
- every session must have read its own text only: its digest is that of a session that read the same parts without the
  service, and its fast weights are the same except for rounding;
- every session must predict the continuation of its own text better than eight others do, in nats per token.

With `--responses`, every session is a conversation: OpenAI's client sends the parts as questions, and the answers are
streamed, the most probable token each time. At the end every conversation must hold its own questions and the answers
that were streamed to its client, and a session that was asked the same alone must answer the same, except where two
tokens are equally probable but for rounding.

With `--kills`, the service is killed repeatedly. After each start every session must be what its last response said, or
what follows from the request that was running when the service was killed.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet
import torch
from openai import AsyncOpenAI, OpenAI
from tqdm import tqdm

from ttt_e2e.hardware import machine
from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.session import Session
from ttt_e2e.server.chat import ChatFormat

PLAIN_TEXT = {"content-type": "text/plain; charset=utf-8"}
_CONTINUATION = 256  # tokens
_OTHERS = 8  # other sessions that read a continuation


@dataclass
class Client:
    """What a client knows of its session: it has read `parts` parts of the text, and was then `acknowledged`."""

    text: str
    id: str = ""
    parts: int = 0
    acknowledged: dict[str, Any] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    read_seconds: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    between_tokens: list[float] = field(default_factory=list)


class Service:
    """`ttt-e2e serve` in a process, on a free port."""

    def __init__(self, data: Path, threads: int) -> None:
        self.data, self.threads = data, threads
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = (data.parent / "service.log").open("ab")

    def start(self) -> None:
        command = [sys.executable, "-m", "ttt_e2e", "serve", "--data", str(self.data), "--port", str(self.port)]
        command += ["--rate", "1000000", "--max-sessions", "1000", "--threads", str(self.threads)]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"The service did not start; see {self.log.name}.")
            time.sleep(0.05)

    def end(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait()


async def run_client(client: Client, http: httpx.AsyncClient, part: int, write: int, until: float) -> None:
    """Request reading and completions in turn."""
    if not client.id:
        client.acknowledged = (await http.post("/v1/sessions")).raise_for_status().json()
        client.id = client.acknowledged["id"]
    while time.monotonic() < until:
        text = client.text[client.parts * part : (client.parts + 1) * part]
        started = time.perf_counter()
        answer = await http.post(f"/v1/sessions/{client.id}/read", content=text.encode(), headers=PLAIN_TEXT)
        client.acknowledged = answer.raise_for_status().json()["session"]
        client.parts += 1
        client.read_seconds.append(time.perf_counter() - started)
        if write:
            await complete(client, http, write)


async def complete(client: Client, http: httpx.AsyncClient, write: int) -> None:
    """Request a streamed completion, and record when its tokens come."""
    body = {"prompt": "", "max_tokens": write, "stream": True, "seed": client.parts}
    last = time.perf_counter()
    times = client.first_token
    async with http.stream("POST", f"/v1/sessions/{client.id}/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if not event["choices"][0]["text"]:
                continue  # it has only the reason why the text ended
            now = time.perf_counter()
            times.append(now - last)
            times, last = client.between_tokens, now


async def ask_in_a_conversation(
    client: Client, official: AsyncOpenAI, model: str, part: int, write: int, until: float
) -> None:
    """Request streamed responses, and record when their tokens come."""
    client.id = (await official.conversations.create()).id
    while time.monotonic() < until:
        question, answer = client.text[client.parts * part : (client.parts + 1) * part], ""
        options: dict[str, Any] = {"conversation": client.id, "max_output_tokens": write, "temperature": 0}
        last, times = time.perf_counter(), client.first_token
        stream = await official.responses.create(model=model, input=question, stream=True, **options)
        async with stream:
            async for event in stream:
                if event.type == "response.output_text.delta":
                    answer += event.delta
                    now = time.perf_counter()
                    times.append(now - last)
                    times, last = client.between_tokens, now
                elif event.type == "error":
                    raise RuntimeError(event.message)
        if event.response.output_text != answer or event.response.conversation.id != client.id:
            raise RuntimeError(f"{client.id} was streamed {answer!r}, and the response at its end is {event.response}")
        client.parts += 1
        client.answers.append(answer)


async def ask_at_once(clients: list[Client], service: Service, part: int, write: int, seconds: float) -> list[Any]:
    """All clients at once; returns the errors."""
    async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", timeout=600, max_retries=0) as official:
        model = (await official.models.list()).data[0].id
        until = time.monotonic() + seconds
        asked = (ask_in_a_conversation(client, official, model, part, write, until) for client in clients)
        return [error for error in await asyncio.gather(*asked, return_exceptions=True) if error is not None]


def compare_answers(clients: list[Client], service: Service, part: int, write: int) -> dict[str, Any]:
    """Compare every conversation with what its client knows, and its answers with those of a session alone."""
    model, tokenizer = load_model()
    torch.set_num_threads(service.threads)
    template, chat = Session(model, tokenizer), ChatFormat()
    own = alike = digests = 0
    with OpenAI(base_url=f"{service.url}/v1", api_key="none", timeout=600) as official:
        for client in tqdm(clients, desc="asking alone"):
            session, said = template.fork(), []
            for i, answer in enumerate(client.answers):
                question = client.text[i * part : (i + 1) * part]
                said += [question, answer]
                prompt = chat.prompt([{"role": "user", "content": question}], "conversation" if i else "nothing")
                before = session.fork()
                made = session.generate(
                    prompt, max_tokens=write, stop=chat.stop, temperature=0, learn_from_writing=True
                )
                same = "".join(made) == answer
                alike += same
                if not same:
                    session = before
                    session.read(prompt)
                    session.read(answer)
            items = official.conversations.items.list(client.id, order="asc", limit=100)
            own += [part.text for item in items for part in item.content] == said
            found = httpx.get(f"{service.url}/v1/sessions/sess-{client.id[5:]}").raise_for_status().json()
            digests += found["text_digest"] == session.info().text_digest
    return {"own_conversations": own, "same_answers_alone": alike, "digests_equal": digests}


def read_alone(client: Client, part: int, template: Session) -> Session:
    """A session that read the same parts without the service."""
    session = template.fork()
    for i in range(client.parts):
        for _ in session.read_stream([client.text[i * part : (i + 1) * part]]):
            pass
    return session


def fast_weights(session: Session) -> torch.Tensor:
    return torch.cat([w.flatten() for pair in session.state().read_state.loop.fast for w in pair])


def compare(clients: list[Client], service: Service, part: int, folder: Path) -> dict[str, Any]:
    """Compare every session with one that read the same text without the service."""
    model, tokenizer = load_model()
    torch.set_num_threads(service.threads)
    template = Session(model, tokenizer)
    digests, differences, sessions = [], [], []
    start = fast_weights(template)
    for i, client in enumerate(tqdm(clients, desc="reading alone")):
        file = folder / f"{i}.session"
        file.write_bytes(httpx.get(f"{service.url}/v1/sessions/{client.id}/export", timeout=600).content)
        theirs, ours = Session.load(file, model, tokenizer), read_alone(client, part, template)
        digests.append(theirs.info().text_digest == ours.info().text_digest)
        ours_w, theirs_w = fast_weights(ours), fast_weights(theirs)
        differences.append(
            (float((ours_w - theirs_w).abs().max()), float((ours_w - theirs_w).norm() / (ours_w - start).norm()))
        )
        sessions.append(theirs)
    texts = [tokenizer.encode(c.text[c.parts * part : (c.parts + 2) * part])[:_CONTINUATION] for c in clients]
    choices, better, gains = random.Random(0), 0, []
    for i, ids in enumerate(tqdm(texts, desc="continuations")):
        others = choices.sample([j for j in range(len(clients)) if j != i], min(_OTHERS, len(clients) - 1))
        losses = []
        for session in (sessions[i], *(sessions[j] for j in others)):
            reader = session.fork()
            losses.append(float(np.concatenate([reader.read(ids), reader.score_pending()])[-len(ids) :].mean()))
        better += losses[0] < min(losses[1:])
        gains.append(statistics.fmean(losses[1:]) - losses[0])
    return {
        "digests_equal": sum(digests),
        "fast_weights_differ_by_at_most": max(a for a, _ in differences),
        "relative_to_what_was_learned": max(b for _, b in differences),
        "best_at_their_own_continuation": better,
        "better_at_it_than_others_by": statistics.fmean(gains),
    }


async def load(clients: list[Client], service: Service, part: int, write: int, seconds: float) -> list[BaseException]:
    """All clients at once; returns the errors."""
    limits = httpx.Limits(max_connections=len(clients))
    async with httpx.AsyncClient(base_url=service.url, timeout=600, limits=limits) as http:
        until = time.monotonic() + seconds
        done = await asyncio.gather(*(run_client(c, http, part, write, until) for c in clients), return_exceptions=True)
    return [error for error in done if isinstance(error, BaseException)]


def percentiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:  # the clients have failed
        return {"count": len(values)}
    cut = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50_ms": 1e3 * cut[49], "p99_ms": 1e3 * cut[98], "count": len(values)}


def under_load(clients: list[Client], service: Service, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    service.start()
    started = time.perf_counter()
    errors = asyncio.run(load(clients, service, args.part, args.write, 60 * args.minutes))
    seconds = time.perf_counter() - started
    metrics = httpx.get(f"{service.url}/metrics").text
    result = {
        "sessions": len(clients),
        "minutes": seconds / 60,
        "errors": [repr(error) for error in errors],
        "tokens_read": sum(c.acknowledged["tokens"] for c in clients),
        "tokens_written": float(metrics.split("\nttt_e2e_tokens_written_total ")[1].split()[0]),
        "read_request": percentiles([s for c in clients for s in c.read_seconds]),
        "first_token": percentiles([s for c in clients for s in c.first_token]),
        "between_tokens": percentiles([s for c in clients for s in c.between_tokens]),
        "server_errors": [line for line in metrics.splitlines() if "requests_total" in line and 'status="5' in line],
    }
    result |= compare(clients, service, args.part, folder)
    service.end(signal.SIGTERM)
    return result


def with_responses(clients: list[Client], service: Service, args: argparse.Namespace) -> dict[str, Any]:
    service.start()
    started = time.perf_counter()
    errors = asyncio.run(ask_at_once(clients, service, args.part, args.write, 60 * args.minutes))
    metrics = httpx.get(f"{service.url}/metrics").text
    result = {
        "streams": len(clients),
        "minutes": (time.perf_counter() - started) / 60,
        "errors": [repr(error) for error in errors],
        "responses": sum(len(c.answers) for c in clients),
        "first_token": percentiles([s for c in clients for s in c.first_token]),
        "between_tokens": percentiles([s for c in clients for s in c.between_tokens]),
        "server_errors": [line for line in metrics.splitlines() if "requests_total" in line and 'status="5' in line],
    }
    result |= compare_answers(clients, service, args.part, args.write)
    service.end(signal.SIGTERM)
    return result


def with_kills(clients: list[Client], service: Service, args: argparse.Namespace) -> dict[str, Any]:
    choices, wrong, checked, further = random.Random(args.seed), [], 0, 0
    _, tokenizer = load_model()
    service.start()
    for _ in tqdm(range(args.kills), desc="kills"):

        async def until_killed(moment: float = choices.uniform(0.5, args.kill_seconds)) -> None:
            work = asyncio.create_task(load(clients, service, args.part, 0, 1e9))
            await asyncio.sleep(moment)
            service.end(signal.SIGKILL)
            await work

        asyncio.run(until_killed())
        service.start()
        for client in clients:
            if not client.id:
                continue
            found = httpx.get(f"{service.url}/v1/sessions/{client.id}").json()
            file = httpx.get(f"{service.url}/v1/sessions/{client.id}/export")
            checked += 1
            same = found.get("text_digest") == client.acknowledged["text_digest"]
            if not same:  # the running request may have been done, but not answered
                text = client.text[client.parts * args.part : (client.parts + 1) * args.part]
                count = client.acknowledged["tokens"] + len(tokenizer.encode(text))
                if found.get("tokens") == count:
                    client.parts += 1
                    client.acknowledged = found
                    further += 1
                    same = True
            if not same or found["error"] or file.status_code != 200:
                wrong.append(client.id)
    return {"kills": args.kills, "sessions": len(clients), "checked": checked, "further": further, "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path, metavar="PARQUET", help="a parquet file with a column text")
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--responses", action="store_true", help="ask in conversations, over /v1/responses")
    parser.add_argument("--kills", type=int, help="kill the service N times instead")
    parser.add_argument("--kill-seconds", type=float, default=5.0, help="longest time between a start and a kill")
    parser.add_argument("--part", type=int, default=1500, help="characters per reading request")
    parser.add_argument("--write", type=int, default=32, help="tokens per completion")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    whole = [text for text in pyarrow.parquet.read_table(args.books, columns=["text"])["text"].to_pylist() if text]
    total, length = sum(map(len, whole)), sum(map(len, whole)) // args.sessions
    joined = "\n\n".join(whole)[:total]
    clients = [Client(joined[i * length : (i + 1) * length]) for i in range(args.sessions)]
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder) / "sessions", args.threads)
        if args.kills:
            result = with_kills(clients, service, args)
            started = [client for client in clients if client.id]  # the first kill may come before a session exists
            result |= compare(started, service, args.part, Path(folder))
            service.end(signal.SIGTERM)
        elif args.responses:
            result = with_responses(clients, service, args)
        else:
            result = under_load(clients, service, args, Path(folder))
    result |= {"seed": args.seed, "part": args.part, "threads": args.threads, "cores": os.cpu_count()}
    result["machine"] = machine()
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
