"""For the tests of shared storage: a server for S3 in this process, where moto and s3fs are installed."""

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


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
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    server.start()
    patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    try:
        bucket = f"bucket-{secrets.token_hex(4)}"
        boto3.client("s3").create_bucket(Bucket=bucket)
        yield f"s3://{bucket}/some/prefix"
    finally:
        server.stop()
