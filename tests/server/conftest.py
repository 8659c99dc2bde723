"""Fixtures of the service's tests."""

import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from server_helpers import FakeEngine, TestClient


@pytest.fixture
def engine() -> "FakeEngine":
    from server_helpers import FakeEngine

    return FakeEngine()


@pytest.fixture
def client(
    engine: "FakeEngine", tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> "Iterator[TestClient]":
    """A client of the service over `engine`, which leaves no temporary file behind."""
    from server_helpers import client_of

    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with client_of(engine) as client:
        yield client
    assert list(folder.iterdir()) == []
