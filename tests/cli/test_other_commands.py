"""`ttt-e2e generate`, `prepare`, `train`, `evaluate`, `info` and `presets` from end to end."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_helpers import TEXT, fails_to_compile, is_compilation_warning, run

from ttt_e2e.config.presets import PRESETS
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.inference.session_file import session_facts


def test_generate_learn_saves_the_text_that_was_printed(
    here: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("read", "geese.txt", "--save", "s", "--quiet", "--no-plot") == 0
    capsys.readouterr()
    options = ("--session", "s", "--top-k", 20, "--min-p", 0.01, "--max-tokens", 40, "--json", "--learn")
    assert run("generate", "The geese", *options, "--save", "long") == 0
    text = json.loads(capsys.readouterr().out)["text"]
    stop = text[8:11]
    assert run("generate", "The geese", *options, "--save", "short", "--stop", "%%", "--stop", stop) == 0
    assert json.loads(capsys.readouterr().out)["text"] == text[: text.index(stop)]
    read, short, long = (session_facts(here / name)["tokens"] for name in ("s", "short", "long"))
    prompt = Tokenizer.load(model_dir / "model").encode("The geese")
    assert read < short < long == read + len(prompt) + 40
    assert run("generate", "x", "--session", "long", "--max-tokens", 3) == 0


def test_evaluate_prints_a_table_or_json(here: Path, capsys: pytest.CaptureFixture[str], model_dir: Path) -> None:
    (here / "b.jsonl").write_text(json.dumps({"body": TEXT[:300], "title": "short"}) + "\n")
    assert run("evaluate", "geese.txt", "--max-tokens", 60, "--quiet") == 0
    assert "geese.txt" in capsys.readouterr().out
    options = ("--model", model_dir / "model", "--text-column", "body", "--json", "--quiet")
    assert run("evaluate", "b.jsonl", *options, "geese.txt") == 0
    report = json.loads(capsys.readouterr().out)
    assert [document["name"] for document in report["documents"]] == ["short", "geese.txt"]
    measured = report["measured"]
    assert run("info", model_dir / "model", "--json") == 0
    assert measured["model"] == json.loads(capsys.readouterr().out)["digest"]
    assert (measured["max_tokens"], measured["dtype"]) == (None, "float32")
    assert measured["machine"]["device"] == "cpu"


def test_prepare_train_and_extend(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("ttt_e2e.training.parallelize.compiled_functions", fails_to_compile)
    for i in range(4):
        (here / f"t{i}.txt").write_text(TEXT * (i + 1))
    texts = [f"t{i}.txt" for i in range(4)]
    assert run("prepare", *texts[:3], "--val", texts[3], "--out", "tokens", "--vocab-size", 280, "--quiet") == 0
    assert "ttt-e2e train" in capsys.readouterr().out
    shape = "vocab_size=280 hidden_size=16 num_hidden_layers=2 num_attention_heads=2 intermediate_size=16"
    small = "suffix_layers=1 sliding_window=16 mini_batch_size=8 context=32 batch=2 steps=2 eval_tokens=64"
    settings = f"{shape} {small}".split()
    assert run("train", "tiny", *settings, "--data", "tokens", "--out", "run", "--quiet", "--compile") == 0
    assert is_compilation_warning(capsys.readouterr().err)
    assert run("read", "geese.txt", "--model", "run/model", "--quiet", "--no-plot") == 0
    longer = "--from run/model --extend 64 batch=1 steps=1 --data tokens --out long --quiet"
    assert run("train", "tiny", *longer.split()) == 0
    assert json.loads((here / "long" / "config.json").read_text())["train"]["context"] == 64


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("train tniy", "'tiny'"),
        ("train tiny stepps=3", "'steps'"),
        ("train tiny steps=many", "whole number"),
        ("train tiny mini_batch_size=1024", "b <= k"),
        ("train tiny suffix_layers=9", "suffix of 9"),
        ("train tiny --extend 64", "--from"),
        ("train tiny --from nowhere", "nowhere"),
        ("train tiny", "tokens"),
    ],
)
def test_train_rejects_invalid_settings(here: Path, refused: Callable[..., str], argv: str, words: str) -> None:
    assert words in refused(*argv.split(), "--data", "tokens", "--out", "run")
    assert not (here / "run").exists()


def test_info_of_a_model_and_of_a_session(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert info["kind"] == "model" and info["hidden_size"] == 16 and info["inner_loop.lr"] == 1.0
    assert run("read", "geese.txt", "--save", "s", "--quiet", "--no-plot") == 0
    assert run("info", "s") == 0
    assert "session" in capsys.readouterr().out
    assert run("info", "nowhere") == 1
    assert "There is no model folder or session file nowhere; check the path." in capsys.readouterr().err


def test_presets_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("presets") == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^{name}\b", out, re.M) for name in PRESETS)
