"""Requests made up from the service's own description: none brings it down, and every answer is as described."""

from typing import Any

import hypothesis
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from server_helpers import FakeEngine

from ttt_e2e.server.app import Settings, create_app
from ttt_e2e.server.limits import Limits

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

HERE = {"host": "localhost"}
app = create_app(FakeEngine(), Settings("tiny", limits=Limits(rate=1 << 30)))  # type: ignore[arg-type]
schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=HERE)
schemathesis.checks.load_all_checks()
# Not among what is checked: fields that are sound, each by itself, may contradict each other, and any text of ours may
# name a session that is not there.
UNTRUE = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]


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
def test_made_up_requests(case: Any) -> None:
    case.call_and_validate(headers=HERE, excluded_checks=UNTRUE)
