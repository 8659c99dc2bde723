"""For the tests of replicas: a Ray of their own with the application on it, and a server for S3, as processes."""

import contextlib
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

KEY, OTHER_KEY = 24 * "k", 24 * "o"
_PATIENCE = 600.0
"""Seconds after which a test fails that waits for a process: many, for a machine on which much else is running."""

_PROGRAM = """
import contextlib, json, sys
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ttt_e2e.server.ray import app
port, options = int(sys.argv[1]), json.loads(sys.argv[2])
for _ in range(5):
    with contextlib.suppress(ConnectionError):  # it is still starting
        ray.init(log_to_driver=False)
        break
else:
    print("no Ray", flush=True)
    sys.exit()
with contextlib.suppress(ray.exceptions.GetTimeoutError):
    serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(app({"threads": 1, **options}))
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""

_S3_PROGRAM = """
import sys
from moto.server import main
from shared_helpers import make_puts_atomic
make_puts_atomic()
main(sys.argv[1:])
"""


@dataclass
class Cluster:
    """An application that is served at `address`."""

    address: str
    process: psutil.Process

    def replicas(self) -> list[psutil.Process]:
        """The processes of its replicas."""
        found = []
        for process in self.process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "Replica:default:Replica" in " ".join(process.cmdline()):
                    found.append(process)
        return found


def free_ports(count: int) -> list[int]:
    """As many ports that nobody uses, all different, and none that the system gives to those who name no port."""
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < count:
            port = random.randrange(20_000, 32_768)  # Ray's workers have those below
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
    return found


@contextmanager
def ended(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """At the end, a process and all its children have ended."""
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
            if process.stdin is not None:
                process.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(60)
            for one in (*children, process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        process.wait()


@contextmanager
def cluster(storage: str, model: Path, log: Path, replicas: int, variables: dict[str, str]) -> Iterator[Cluster]:
    """The application for Ray, on a Ray of its own; skips the test where Ray does not start."""
    folder = tempfile.mkdtemp(prefix="ray")  # its sockets have no longer names
    options = {"storage": storage, "model": str(model), "replicas": replicas, "rate": 10**6, "max_sessions": 10**6}
    keys = {"TTT_E2E_API_KEYS": f"me {KEY}, you {OTHER_KEY}"}
    ray = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    # Its times are short for a machine on which much else is running.
    ray |= {"RAY_raylet_start_wait_time_s": str(round(_PATIENCE))}
    ray |= {f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S": str(_PATIENCE) for check in ("READY", "HEALTH")}
    # Nor does it wait long for ports that it has to choose itself.
    named = ("port", "node-manager-port", "object-manager-port", "dashboard-agent-grpc-port")
    named += ("dashboard-agent-listen-port", "runtime-env-agent-port", "metrics-export-port")
    port, *others = free_ports(1 + len(named))
    ports = dict(zip(named, others, strict=True))
    head = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    head += ["--num-cpus=8", f"--object-store-memory={200 << 20}", "--include-dashboard=false"]
    head += [f"--temp-dir={folder}", "--node-ip-address=127.0.0.1", *(f"--{name}={one}" for name, one in ports.items())]
    ray |= {"RAY_ADDRESS": f"127.0.0.1:{ports['port']}"}
    environment = {**os.environ, **variables, **keys, **ray, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = [sys.executable, "-c", _PROGRAM, str(port), json.dumps(options)]
    try:
        with ExitStack() as stack:
            out = stack.enter_context(log.open("wb"))
            without = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
            nodes = subprocess.Popen(head, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=without)
            stack.enter_context(ended(nodes))
            process = subprocess.Popen(
                program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, env=environment
            )
            stack.enter_context(ended(process))
            assert process.stdout is not None
            said = process.stdout.readline()
            if said == b"no Ray\n":
                pytest.skip("Ray itself does not start: it gives its processes half a minute each")
            assert said == b"ready\n", log.read_text()[-3000:]
            yield Cluster(f"http://127.0.0.1:{port}", psutil.Process(nodes.pid))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def s3_process() -> Iterator[tuple[str, dict[str, str]]]:
    """The URL of an empty bucket on a server that keeps all versions, and the variables that lead there."""
    import boto3

    (port,) = free_ports(1)
    variables = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "none")
    variables |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    process = subprocess.Popen(
        [sys.executable, "-c", _S3_PROGRAM, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    with ended(process):
        end = time.monotonic() + _PATIENCE
        while True:
            assert process.poll() is None and time.monotonic() < end, "the server for S3 does not start"
            with contextlib.suppress(httpx.TransportError):
                httpx.get(variables["AWS_ENDPOINT_URL"])
                break
            time.sleep(0.1)
        os.environ.update(variables)
        bucket = f"bucket-{secrets.token_hex(4)}"
        client = boto3.client("s3")
        client.create_bucket(Bucket=bucket)
        client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        yield f"s3://{bucket}/sessions", variables
