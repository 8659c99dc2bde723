"""The metrics of a run: odd lines are left out, and never end a run."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttt_e2e.training.metrics import MetricsWriter, read_metrics

ODD = [
    *(
        b"",
        b"[]",
        b"3",
        b"null",
        b'"step"',
        b"{}",
        b'{"loss": 1}',
        b'{"step": null}',
        b'{"step": "3"}',
        b'{"step": 1.5}',
    ),
    *(b'{"step": NaN}', b'{"step": 1, "loss": NaN}', b'{"step": 1, "loss": "x"}', b'{"step": 1, "loss": 1e999}'),
    *(
        b"\xff\xfe",
        b'{"step": 1',
        b"\0\0\0",
        b"[" * 100_000,
        b'{"step": true}',
        b'{"loss": ' + b"9" * 400 + b', "step": 1}',
    ),
]


@pytest.mark.parametrize("odd", ODD)
def test_odd_lines_are_left_out_with_a_warning(tmp_path: Path, odd: bytes) -> None:
    first, second = {"step": 1, "loss": 2.5}, {"step": 2, "eval": {"loss": 2.25}}
    lines = [json.dumps(first).encode(), odd, json.dumps(second).encode()]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.warns(UserWarning, match=r"Line 2 of .*metrics.jsonl cannot be read"):
        assert read_metrics(tmp_path) == [first, second]
    with pytest.warns(UserWarning), MetricsWriter(tmp_path, 1, {}, False, False) as metrics:
        metrics.write({"step": 2})
    assert read_metrics(tmp_path) == [first, {"step": 2}]


@given(st.binary(max_size=60))
def test_any_bytes_can_be_read(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    run = tmp_path_factory.mktemp("run")
    (run / "metrics.jsonl").write_bytes(content)
    with pytest.warns(UserWarning) if content.count(b"\n") else nullcontext():
        assert read_metrics(run) == []


def test_what_a_killed_process_has_not_finished_is_left_out(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert read_metrics(tmp_path) == [{"step": 1}]
