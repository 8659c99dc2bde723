"""Texts sent as a body or in a form: what is accepted, and what happens when the disk is full."""

import gzip
import io
import tempfile
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

import starlette.formparsers
from server_helpers import PLAIN_TEXT, FakeEngine, TestClient, error_of

TEXT = "Die Straße war naß. " * 30


@pytest.fixture
def session(client: TestClient) -> str:
    return client.post("/v1/sessions").json()["id"]


def test_text_in_a_form(client: TestClient, engine: FakeEngine, session: str) -> None:
    path = f"/v1/sessions/{session}/read"
    assert client.post(path, files={"file": ("x.bin", TEXT.encode())}).json()["tokens"] == 120
    large = ("word " * 500_000).encode()  # more than a form keeps in memory
    assert client.post(path, files={"other": large}).json()["tokens"] == 500_000
    for form in (
        dict(files={"a": b"x", "b": b"y"}),
        dict(files={"a": b"x"}, data={"b": "y"}),
        dict(content=b"", headers={"content-type": "multipart/form-data"}),
        dict(content=b"junk", headers={"content-type": "multipart/form-data; boundary=x"}),
        dict(content=b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nhi\r\n--x--\r\n')
        | dict(headers={"content-type": "multipart/form-data; boundary=x"}),
        dict(content=b'--x\r\nContent-Disposition: form-data; name="\xff"; filename="b"\r\n\r\nhi\r\n--x--\r\n')
        | dict(headers={"content-type": "multipart/form-data; boundary=x; charset=undefined"}),
    ):
        assert "one file" in error_of(client.post(path, **form), 400)["message"]
    assert len(engine.all[session].text.split()) >= 500_000 and "junk" not in engine.all[session].text


def test_byte_order_mark_is_no_part_of_the_text(client: TestClient, engine: FakeEngine, session: str) -> None:
    content = b"\xef\xbb\xbf" + TEXT.encode()
    assert client.post(f"/v1/sessions/{session}/read", content=content, headers=PLAIN_TEXT).status_code == 200
    assert engine.all[session].text == TEXT.strip()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "The text is empty"),
        (b"\xff\xfehello", "The text is UTF-16, not UTF-8"),
        (b"good " * 300_000 + b"\xc3", "The text is not valid UTF-8 at byte 1500000"),
        (b"good\x00bad", "The text looks binary: byte 4 is zero"),
        (b"half \xed\xa0\x80 pair", "not valid UTF-8 at byte 5"),
        (gzip.compress(b"packed", mtime=0), "The text is compressed (gzip); decompress it first"),
        (b"%PDF-1.7\n", "The text is a PDF, not a text"),
        (b"\xef\xbb\xbf", "The text is empty"),
    ],
)
@pytest.mark.parametrize("form", [False, True])
def test_invalid_text_is_refused_as_a_whole(
    client: TestClient, engine: FakeEngine, session: str, content: bytes, message: str, form: bool
) -> None:
    body: dict[str, Any] = dict(files={"file": content}) if form else dict(content=content, headers=PLAIN_TEXT)
    assert message in error_of(client.post(f"/v1/sessions/{session}/read", **body), 400)["message"]
    assert engine.all[session].text == ""


@pytest.mark.parametrize(
    "kind",
    [
        *("", "application/json", "application/x-www-form-urlencoded", "text/html", "text/plain; charset=latin-1"),
        *("text", "garbage", "multipart/form-data/x"),  # not even content types
        *('text/plain; x="' + ";" * 60_000, "multipart/form-data; boundary=x" + ";a=b" * 10_000),  # slow to parse
    ],
)
def test_other_content_types_are_refused(client: TestClient, session: str, kind: str) -> None:
    headers = {"content-type": kind} if kind else {}
    error_of(client.post(f"/v1/sessions/{session}/read", content=b"x", headers=headers), 415)


def test_short_writes_lose_nothing(
    client: TestClient, engine: FakeEngine, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ShortWrites(io.BytesIO):
        def write(self, chunk: Any) -> int:
            return super().write(chunk[:3])

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: ShortWrites())
    client.post(f"/v1/sessions/{session}/read", content="all of it is kept", headers=PLAIN_TEXT)
    assert engine.all[session].text == "all of it is kept"


def test_full_disk_is_a_server_error(
    client: TestClient, engine: FakeEngine, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        def write(self, chunk: Any) -> int:
            raise OSError(28, "No space left on device")

    def no_folder(**_: Any) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    path = f"/v1/sessions/{session}/read"
    for temporary_file in (lambda **_: Full(), no_folder):
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "TemporaryFile", temporary_file)
            error_of(client.post(path, content=b"a", headers=PLAIN_TEXT), 503)
    with monkeypatch.context() as patch:  # a form's file is written by the parser first
        patch.setattr(starlette.formparsers.SpooledTemporaryFile, "write", Full.write)
        error_of(client.post(path, files={"file": ("x.txt", b"a")}), 503)
    assert engine.all[session].text == ""
