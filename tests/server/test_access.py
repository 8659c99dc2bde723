"""Who may use the service and how much: keys, owners, other sites, rates, sizes of bodies."""

import functools
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from server_helpers import (
    PLAIN_TEXT,
    FakeEngine,
    TestClient,
    client_of,
    connection_to,
    error_of,
    log_lines,
    send_post,
    served,
    until,
)

from ttt_e2e.errors import UserError
from ttt_e2e.server.app import create_app
from ttt_e2e.server.keys import KEYS_VARIABLE, LOCAL, Keys, check_host, load_keys
from ttt_e2e.server.middleware.access import TokenBucket
from ttt_e2e.server.settings import Settings

ANNA, BERT = "a-long-key-for-anna-1", "another-key-for-bert"
OPERATOR = "the-key-of-the-operator"
KEYS = Keys({"anna": ANNA, "bert": BERT, "operator": OPERATOR})


def as_(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def keyed(engine: FakeEngine) -> Iterator[TestClient]:
    with client_of(engine, keys=KEYS, host="far.example") as client:
        yield client


# -- keys and owners ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/models", "/v1/sessions", "/v1/nothing", "/metrics"])
@pytest.mark.parametrize(
    "headers", [{}, as_("wrong"), as_(""), {"authorization": ANNA}, {"authorization": f"Basic {ANNA}"}, as_(ANNA + "x")]
)
def test_request_without_a_valid_key_is_refused(keyed: TestClient, path: str, headers: dict[str, str]) -> None:
    response = keyed.get(path, headers=headers)
    assert error_of(response, 401)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


def test_page_and_health_need_no_key(keyed: TestClient) -> None:
    assert keyed.get("/").status_code == keyed.head("/").status_code == keyed.get("/health").status_code == 200
    assert keyed.get("/health").json() == {"status": "ok"}


def test_sessions_of_another_key_look_like_missing_ones(keyed: TestClient) -> None:
    anna, bert = as_(ANNA), as_(BERT)
    made = keyed.post("/v1/sessions", headers=anna).json()["id"]
    missing = "sess-" + 32 * "0"
    assert [one["id"] for one in keyed.get("/v1/sessions", headers=anna).json()["data"]] == [made]
    assert keyed.get("/v1/sessions", headers=bert).json()["data"] == []

    def responses(session: str) -> Iterator[Any]:
        path = f"/v1/sessions/{session}"
        yield keyed.get(path, headers=bert)
        yield keyed.delete(path, headers=bert)
        yield keyed.post(f"{path}/fork", headers=bert)
        yield keyed.get(f"{path}/export", headers=bert)
        yield keyed.post(f"{path}/read", headers={**bert, **PLAIN_TEXT}, content="x")
        yield keyed.post(f"{path}/read", headers={**bert, **PLAIN_TEXT}, content=b"\xff")
        yield keyed.post(f"{path}/completions", headers=bert, json={"prompt": "x"})
        yield keyed.post("/v1/completions", headers=bert, json={"prompt": "x", "session": session})
        messages = [{"role": "user", "content": "x"}]
        yield keyed.post("/v1/chat/completions", headers=bert, json={"messages": messages, "session": session})

    for others, nobodys in zip(responses(made), responses(missing), strict=True):
        assert error_of(others, 404) == error_of(nobodys, 404)
    assert keyed.get(f"/v1/sessions/{made}", headers=anna).status_code == 200


def test_owners_are_hashes_of_keys() -> None:
    anna = KEYS.caller(f"bearer  {ANNA} ")
    assert anna is not None and anna.name == "anna"
    assert len(anna.owner) == 64 and ANNA not in anna.owner
    assert Keys().caller("") == LOCAL
    assert KEYS.caller("Bearer \udcff") is None


def test_load_keys_from_file_or_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# people\n\nanna {ANNA}\n  bert\t{BERT}\n")
    for keys in (load_keys(file, {}), load_keys(None, {KEYS_VARIABLE: f"anna {ANNA}, bert {BERT}"})):
        callers = [keys.caller(f"Bearer {key}") for key in (ANNA, BERT)]
        assert [caller and caller.name for caller in callers] == ["anna", "bert"]
    assert not load_keys(None, {}) and not load_keys(None, {KEYS_VARIABLE: " "})
    with pytest.raises(UserError, match="remove one of them"):
        load_keys(file, {KEYS_VARIABLE: f"anna {ANNA}"})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "empty"),
        ("# nothing\n", "holds no key"),
        (f"{ANNA}\n", "line 1: write a name and a key"),
        (f"\nanna {ANNA} x\n", "line 2: write a name and a key"),
        ("anna short\n", "16 to 512"),
        (f"anna {ANNA}ä\n", "ASCII"),
        (f"anna {ANNA}\nanna {BERT}\n", "twice"),
        (f"anna {ANNA}\nbert {ANNA}\n", "another name"),
    ],
)
def test_load_keys_rejects_invalid_files_without_quoting_them(tmp_path: Path, text: str, match: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(UserError, match=match) as caught:
        load_keys(file, {})
    assert ANNA not in str(caught.value)


def test_check_host_allows_other_machines_only_with_keys() -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        check_host(host, Keys())
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
        check_host(host, KEYS)
        with pytest.raises(UserError, match="--keys"):
            check_host(host, Keys())


def test_pages_of_other_sites_are_refused(client: TestClient) -> None:
    assert error_of(client.get("/v1/sessions", headers={"host": "evil.example"}), 403)["code"] == "wrong_host"
    for origin in ("https://evil.example", "null"):
        assert error_of(client.post("/v1/sessions", headers={"origin": origin}), 403)["code"] == "wrong_origin"
    assert client.post("/v1/sessions", headers={"origin": "http://localhost"}).status_code == 201
    for host in ("127.0.0.1:8000", "[::1]:8000", "localhost:1"):
        assert client.get("/v1/sessions", headers={"host": host}).status_code == 200


def test_page_policy_allows_only_its_own_script(client: TestClient) -> None:
    policy = client.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "["}, 403),
        ({"origin": "http://["}, 403),
        ({"content-type": "text/plain; charset*=utf-8''x; charset*0=y"}, 415),
    ],
)
def test_malformed_headers_are_refused(client: TestClient, headers: dict[str, str], status: int) -> None:
    session = client.post("/v1/sessions").json()["id"]
    response = client.post(f"/v1/sessions/{session}/read", content=b"a", headers={**PLAIN_TEXT, **headers})
    error_of(response, status)


# -- limits ------------------------------------------------------------------------------------------------------------


def test_token_bucket_refills_evenly() -> None:
    now = 0.0
    bucket = TokenBucket(60, lambda: now)
    assert [bucket.take() for _ in range(60)] == [0.0] * 60
    assert bucket.take() == pytest.approx(1.0)
    now = 0.5
    assert bucket.take() == pytest.approx(0.5)
    now = 1.0
    assert bucket.take() == 0.0 and bucket.take() > 0
    now = 1000.0
    assert [bucket.take() > 0 for _ in range(61)] == [False] * 60 + [True]


def test_rate_is_limited_per_key(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = functools.partial(TokenBucket, clock=lambda: 0.0)
    monkeypatch.setattr("ttt_e2e.server.middleware.access.TokenBucket", stopped)
    with client_of(engine, keys=KEYS, requests_per_minute=3) as client:
        assert [client.get("/v1/models", headers=as_(ANNA)).status_code for _ in range(3)] == [200] * 3
        response = client.get("/v1/models", headers=as_(ANNA))
        error_of(response, 429)
        assert response.headers["retry-after"] == "20"
        assert client.get("/v1/models", headers=as_(BERT)).status_code == 200
        assert client.get("/health", headers=as_(ANNA)).status_code == 200


def test_requests_without_a_valid_key_are_limited_per_address(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = functools.partial(TokenBucket, clock=lambda: 0.0)
    monkeypatch.setattr("ttt_e2e.server.middleware.access.TokenBucket", stopped)
    monkeypatch.setattr("ttt_e2e.server.middleware.access._MAX_ADDRESSES", 2)
    app = create_app(engine, Settings("tiny", KEYS, refusals_per_minute=2))  # type: ignore[arg-type]

    def client(address: str) -> TestClient:
        return TestClient(app, base_url="http://localhost", client=(address, 5))

    def statuses(address: str, headers: dict[str, str]) -> list[int]:
        return [client(address).get("/v1/models", headers=headers).status_code for _ in range(3)]

    with log_lines() as lines:
        assert statuses("10.0.0.1", as_("wrong")) == [401, 401, 429]
    assert [json.loads(line)["status"] for line in lines] == [401, 401]
    response = client("10.0.0.1").post("/v1/models", headers={"origin": "http://evil.example"}, content="x" * 9)
    assert "address" in error_of(response, 429)["message"]
    assert response.headers["retry-after"] == "30" and response.headers["connection"] == "close"
    assert statuses("10.0.0.1", as_(ANNA)) == [200] * 3
    assert client("10.0.0.1").get("/health").status_code == 200
    assert statuses("2001:db8::1", {}) == [401, 401, 429]
    assert statuses("2001:db8::2", {}) == [429] * 3  # anybody can choose the rest of such an address
    assert statuses("2001:db8:0:1::2", {}) == [401, 401, 429]  # the third address; the first one is forgotten
    assert statuses("10.0.0.1", {}) == [401, 401, 429]


def test_metrics_are_for_the_operator(keyed: TestClient, client: TestClient) -> None:
    assert error_of(keyed.get("/metrics", headers=as_(ANNA)), 403)["code"] == "not_the_operator"
    assert "ttt_e2e_requests_total" in keyed.get("/metrics", headers=as_(OPERATOR)).text
    assert client.get("/metrics").status_code == 200


def test_open_requests_are_limited_per_key(engine: FakeEngine) -> None:
    engine.hold_from = 2
    with client_of(engine, keys=KEYS, open_requests=2) as client, ThreadPoolExecutor(2) as pool:
        body = {"prompt": "x", "max_tokens": 4}
        responses = [pool.submit(client.post, "/v1/completions", json=body, headers=as_(ANNA)) for _ in range(2)]
        until(lambda: engine.running == 2)
        error_of(client.get("/v1/models", headers=as_(ANNA)), 429)
        assert client.get("/v1/models", headers=as_(BERT)).status_code == 200
        engine.hold_from = math.inf
        assert [response.result().status_code for response in responses] == [200, 200]
        assert client.get("/v1/models", headers=as_(ANNA)).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_body_size_is_limited(engine: FakeEngine, chunked: bool) -> None:
    with client_of(engine, body_bytes=1000) as client:
        session = client.post("/v1/sessions").json()["id"]

        def body(size: int) -> Any:
            return (b"a " * 10 for _ in range(size // 20)) if chunked else b"a " * (size // 2)

        for path, kind in (
            (f"/v1/sessions/{session}/read", "text/plain"),
            ("/v1/sessions/import", "application/octet-stream"),
            ("/v1/completions", "application/json"),
        ):
            response = client.post(path, content=body(2000), headers={"content-type": kind})
            assert error_of(response, 413)["code"] == "too_large"
        response = client.post(f"/v1/sessions/{session}/read", content=body(1000), headers=PLAIN_TEXT)
        assert response.json()["tokens"] == 500
        assert engine.all[session].text.count("a") == 500
        form = {"file": ("x.txt", b"a " * 1000)}
        error_of(client.post(f"/v1/sessions/{session}/read", files=form), 413)


def test_session_file_may_be_larger_than_a_text(engine: FakeEngine) -> None:
    with client_of(engine, body_bytes=1000, file_bytes=3000) as client:
        path, headers = "/v1/sessions/import", {"content-type": "application/octet-stream"}
        assert client.post(path, content=b"session:" + b"a " * 1000, headers=headers).status_code == 201
        response = client.post(path, content=b"session:" + b"a " * 2000, headers=headers)
        assert "--max-body" in error_of(response, 413)["message"]


def test_response_to_a_large_body_arrives_over_a_socket(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttt_e2e.server.middleware.access.DRAIN_SECONDS", 60.0)
    body = b"a " * 2_000_000
    with served(engine, body_bytes=1000) as address:
        for _ in range(5):
            with connection_to(address) as connection:
                send_post(connection, "/v1/completions", body, {})
                response = b""
                while part := connection.recv(1 << 16):
                    response += part
            assert b"413" in response.splitlines()[0] and b"more than 1,000 bytes" in response
        with connection_to(address) as connection:
            lines = {"content-length": str(len(body)), "expect": "100-continue"}
            send_post(connection, "/v1/completions", b"", lines)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413")  # without asking for the body


def test_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_bytes(b"\xef\xbb\xbfanna 0123456789abcdef\n")
    caller = load_keys(tmp_path / "keys.txt", {}).caller("Bearer 0123456789abcdef")
    assert caller is not None and caller.name == "anna"
