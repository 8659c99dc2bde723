"""For the tests of shared storage: a server for S3, where moto and s3fs are installed."""

import logging
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def make_puts_atomic() -> None:
    """Let moto compare the version and write as one step, as S3 does: between the two, another thread could write."""
    from moto.s3.responses import S3Response

    put, mutex = S3Response.put_object, threading.Lock()

    def put_object(response: S3Response) -> object:
        with mutex:
            return put(response)

    if put.__module__ != __name__:  # once
        S3Response.put_object = put_object  # type: ignore[assignment, method-assign]


@contextmanager
def s3_server(patch: pytest.MonkeyPatch, port: int = 0) -> Iterator[str]:
    """The URL of an empty bucket on a server that keeps it in memory; the variables of AWS lead there."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "none")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    make_puts_atomic()
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    server.start()
    patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    try:
        bucket = f"bucket-{secrets.token_hex(4)}"
        boto3.client("s3").create_bucket(Bucket=bucket)
        yield f"s3://{bucket}/some/prefix"
    finally:
        server.stop()
