"""For the tests of replicas: a Ray of their own with the application on it, and a server for S3, as processes."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

KEY, OTHER_KEY = 24 * "k", 24 * "o"
_PATIENCE = 600.0
"""Seconds after which a test fails that waits for a process: many, for a machine on which much else is running."""

_PROGRAM = """
import contextlib, json, sys
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ttt_e2e.server.ray import RayOptions, app
folder, port, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
limits = {"num_cpus": 8, "include_dashboard": False, "object_store_memory": 200 << 20}
ray.init(**limits, log_to_driver=False, _temp_dir=folder)
with contextlib.suppress(ray.exceptions.GetTimeoutError):
    serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(app(RayOptions(threads=1, **options)))
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


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
    """The application for Ray, on a Ray of its own."""
    import json

    folder = tempfile.mkdtemp(prefix="ray")  # its sockets have no longer names
    options = {"storage": storage, "model": str(model), "replicas": replicas, "rate": 10**6, "max_sessions": 10**6}
    keys = {"TTT_E2E_API_KEYS": f"me {KEY}, you {OTHER_KEY}"}
    ray = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    # Its times are short for a machine on which much else is running.
    ray |= {"RAY_raylet_start_wait_time_s": str(round(_PATIENCE))}
    ray |= {f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S": str(_PATIENCE) for check in ("READY", "HEALTH")}
    port = free_port()
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, folder, str(port), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **variables, **keys, **ray, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    try:
        with ended(process):
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n", log.read_text()[-3000:]
            yield Cluster(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def s3_process() -> Iterator[tuple[str, dict[str, str]]]:
    """The URL of an empty bucket on a server that keeps all versions, and the variables that lead there."""
    import boto3

    port = free_port()
    variables = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "none")
    variables |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
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
