"""Models and a working folder for the stress tests, which run only when they are asked for: `pytest -m stress`."""

import importlib
import json
import pkgutil
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import made_up_tokens, small_model
from stress_helpers import TEXT, Figures

import ttt_e2e
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.inference import load
from ttt_e2e.model.checkpoint import save_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of milliseconds, which takes the place of the shipped one."""
    torch.set_num_threads(1)  # copies of a process with more could wait for ever
    for module in pkgutil.walk_packages(ttt_e2e.__path__, "ttt_e2e."):
        if not re.search(r"triton|__main__|server\.ray$", module.name):
            importlib.import_module(module.name)  # not in every copy
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train([TEXT], 290)
    tokenizer.save(folder / "t.json")
    changes = {"mini_batch_size": 16, "sliding_window": 32, "initializer_range": 0.05}
    save_model(small_model(vocab_size=tokenizer.vocab_size, **changes), folder / "tiny", folder / "t.json")
    return folder / "tiny"


@pytest.fixture
def shipped(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(load, "shipped_model", lambda: model_folder)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return model_folder


@pytest.fixture
def fresh(tmp_path: Path) -> "Iterator[Fresh]":
    yield Fresh(tmp_path)


class Fresh:
    """Folders that are equal at the beginning of each round: with a text, rows, tokens, and what a test adds."""

    def __init__(self, parent: Path) -> None:
        self.template, self._folder = parent / "template", parent / "here"
        self.template.mkdir()
        (self.template / "text.txt").write_text(TEXT)
        rows = "".join(json.dumps({"text": f"{i} geese. " * 9, "title": str(i)}) + "\n" for i in range(20))
        (self.template / "rows.jsonl").write_text(rows)
        made_up_tokens(self.template, 30)
        (self.template / "texts.jsonl").unlink()

    def __call__(self) -> Path:
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.copytree(self.template, self._folder, symlinks=True)
        return self._folder


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Iterator[Figures]:
    figures = Figures(request.node.name)
    yield figures
    figures.show()
