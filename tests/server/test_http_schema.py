"""Requests generated from the OpenAPI schema: none is a server error, and every response matches the schema."""

from typing import Any

import hypothesis
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from server_helpers import FakeEngine

from ttt_e2e.server.app import create_app
from ttt_e2e.server.settings import Settings

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

HERE = {"host": "localhost"}
app = create_app(FakeEngine(), Settings("tiny", requests_per_minute=1 << 30))  # type: ignore[arg-type]
REFUSALS = [400, 401, 403, 404, 405, 413, 415]
config = schemathesis.config.SchemathesisConfig.from_dict(
    {"checks": {"negative_data_rejection": {"expected-statuses": REFUSALS}}}
)
schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=config, headers=HERE)
schemathesis.checks.load_all_checks()
# Not checked: whether valid requests are accepted. Valid fields may contradict each other, and sessions may not exist.
EXCLUDED = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]


@pytest.mark.slow
@schema.parametrize()
@hypothesis.settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
def test_generated_requests(case: Any) -> None:
    case.call_and_validate(headers=HERE, excluded_checks=EXCLUDED)
