"""Models for programs that know nothing of this package, and what a session has learned as an adapter for them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import Pretrained, convert, tokens, with_tokenizer
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("transformers", reason="the transformers library is not installed")

from transformers import AutoModelForCausalLM

from ttt_e2e.cli.main import main
from ttt_e2e.errors import UserError
from ttt_e2e.hf.export import convert_to_hf
from ttt_e2e.inference.lora_adapter import export_lora
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.streaming import forward, start_reading
from ttt_e2e.model.checkpoint import load_transformer

PLAIN = [
    *("llama, tied, llama3", "llama, biases, linear", "llama, wide heads", "qwen2, yarn, sharded"),
    *("qwen3, wide heads, tied", "qwen3, biases, yarn", "granite, tied, biases"),
]


def logits(model: Any, ids_BT: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids_BT).logits


def frozen_logits(session: Session, ids_BT: Tensor) -> Tensor:
    """After each token of new texts, with what the session has learned and without learning more."""
    state = start_reading(session.model, len(ids_BT))
    learned = session.state().read_state.loop.fast
    fast = tuple(type(value)(*(w.expand(len(ids_BT), -1, -1) for w in value)) for value in learned)
    return forward(session.model, state._replace(loop=state.loop._replace(fast=fast)), ids_BT)[0]


def read_something(folder: Path, rate: float = 0.3) -> Session:
    session = Session(load_transformer(folder).requires_grad_(False))
    session.read(tokens(41, 1)[0].numpy())
    return session


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("rank", [None, 3])
def test_plain_model_is_the_original_again(pretrained: Pretrained, name: str, rank: int | None, tmp_path: Path) -> None:
    original, checkpoint = pretrained(name)
    folder = convert(with_tokenizer(checkpoint), tmp_path, fast_rank=rank)
    parameters = convert_to_hf(folder, tmp_path / "plain", plain=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert parameters == plain.num_parameters()
    assert "ttt" not in type(plain).__name__.lower()
    torch.testing.assert_close(logits(plain, tokens()), logits(original, tokens()), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("olmo2", {}, "qk_norm_joint = True"),
        ("smollm3", {}, r"rope_pattern = \(True, False"),
        ("phi3, short longrope", {}, "rope_scaling.rope_type = longrope"),
        ("llama", {"fast": "new"}, "two MLPs one after the other"),
    ],
)
def test_models_that_cannot_be_plain(
    pretrained: Pretrained, name: str, options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    folder = convert(with_tokenizer(pretrained(name)[1]), tmp_path, **options)
    with pytest.raises(UserError, match=f"cannot have {sentence}"):
        convert_to_hf(folder, tmp_path / "plain", plain=True)
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("name", ["llama, tied, llama3", "qwen2, tied", "qwen3, wide heads, tied"])
@pytest.mark.parametrize("fast_rank", [None, 3])
def test_adapter_gives_the_sessions_own_logits(
    pretrained: Pretrained, name: str, fast_rank: int | None, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="the library peft is not installed")
    checkpoint = pretrained(name)[1]
    session = read_something(convert(checkpoint, tmp_path, fast_rank=fast_rank, inner_lr=0.3, suffix=0.5))
    done = export_lora(session, tmp_path / "adapter", str(checkpoint))
    assert done.rank == (2 * fast_rank if fast_rank else 12) and done.matrices == 6 and done.error < 1e-4
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    before, expected = logits(base, tokens()), frozen_logits(session, tokens())
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert (before - expected).abs().max() > 0.02  # something was learned
    torch.testing.assert_close(logits(adapted, tokens()), expected, atol=1e-4, rtol=1e-4)
    assert len([*adapted.named_parameters()]) - len([*base.base_model.named_parameters()]) < 2 * 3 * 4 + 2


def test_smaller_ranks_lose_more(pretrained: Pretrained, tmp_path: Path) -> None:
    session = read_something(convert(pretrained("llama")[1], tmp_path, inner_lr=0.3))
    errors = [export_lora(session, tmp_path / f"r{rank}", "base", rank).error for rank in (1, 4, 9, 12, 99)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.05 and errors[-1] == errors[-2] < 1e-4
    settings = json.loads((tmp_path / "r99" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["layers_to_transform"]) == (12, 12, [3])


@pytest.mark.parametrize(("name", "fast_rank"), [("llama", None), ("qwen3, wide heads, tied", 3)])
def test_adapter_is_one_that_vllm_and_sglang_read(
    pretrained: Pretrained, name: str, fast_rank: int | None, tmp_path: Path
) -> None:
    """Their rules, from the sources of vLLM 0.32.0 and SGLang 0.5.23.

    vLLM (lora/peft_helper.py, lora/lora_model.py, lora/utils.py) takes names from the tensors, which must be LoRA's A
    and B of a module that it can adapt, and refuses biases, whole modules and DoRA, and a rank above --max-lora-rank,
    which is 1, 8, 16, 32, 64, 128, 256, 320 or 512. SGLang (srt/lora/lora.py, lora_config.py, lora_manager.py,
    mem_pool.py) needs a list of target modules, scales all matrices by lora_alpha / r, whatever a pattern says, fills
    buffers of r rows, so that no matrix may have fewer, and joins each layer's gate_proj with its up_proj.
    """
    session = read_something(convert(pretrained(name)[1], tmp_path, fast_rank=fast_rank, inner_lr=0.3, suffix=0.5))
    rank = export_lora(session, tmp_path / "adapter", "base", 8).rank
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    names = {"gate_proj", "up_proj", "down_proj"}
    assert settings["peft_type"] == "LORA" and settings["bias"] == "none"
    assert isinstance(settings["target_modules"], list) and set(settings["target_modules"]) == names
    assert settings["r"] == settings["lora_alpha"] == rank == 8
    changing = {"rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "use_rslora", "init_lora_weights"}
    assert not changing & settings.keys()
    tensors, found = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), set()
    for key, tensor in tensors.items():
        parts = re.fullmatch(r"base_model\.model\.model\.layers\.(\d+)\.mlp\.(\w+)\.lora_([AB])\.weight", key)
        assert parts and tensor.dim() == 2 and tensor.shape["AB".index(parts[3])] == rank, key
        found.add(parts.groups())
    layers = map(str, settings["layers_to_transform"])
    assert found == {(layer, name, one) for layer in layers for name in names for one in "AB"}


def test_adapters_that_cannot_be(pretrained: Pretrained, tmp_path: Path) -> None:
    checkpoint = pretrained("llama")[1]
    session = Session(load_transformer(convert(checkpoint, tmp_path)))
    with pytest.raises(UserError, match="has learned nothing yet"):
        export_lora(session, tmp_path / "adapter", "base")
    session = read_something(convert(checkpoint, tmp_path / "new", fast="new"))
    with pytest.raises(UserError, match="convert the model with --fast split"):
        export_lora(session, tmp_path / "adapter", "base")
    assert not (tmp_path / "adapter").exists()


def test_export_lora_command(
    pretrained: Pretrained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = with_tokenizer(pretrained("llama")[1])
    folder = convert(checkpoint, tmp_path, inner_lr=0.3)
    session, adapter, model = str(tmp_path / "a.session"), str(tmp_path / "adapter"), str(folder)
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 8)
    assert main(["read", str(text), "--model", model, "--save", session, "--quiet", "--no-plot", "--threads", "1"]) == 0
    capsys.readouterr()
    assert main(["export", "lora", session, adapter, "--model", model, "--rank", "2"]) == 0
    printed = capsys.readouterr().out
    assert f"3 matrices of rank 2, 480 parameters, for {checkpoint}; " in printed
    assert main(["export", "lora", session, adapter, "--model", model]) == 1
    assert "exists already" in capsys.readouterr().err
    parent = tmp_path / "parent"
    assert main(["export", "lora", str(tmp_path / "none"), str(parent / "adapter"), "--model", model]) == 1
    assert "does not exist" in capsys.readouterr().err and not parent.exists()
    monkeypatch.setattr("ttt_e2e.cli.export._SAME", ("granite",))
    assert main(["export", "lora", session, str(tmp_path / "other"), "--model", model]) == 1
    assert "name it: --base PLAIN" in capsys.readouterr().err
    assert main(["export", "lora", session, str(tmp_path / "other")]) == 1  # of no use with any base
    assert "convert the model with --fast split" in capsys.readouterr().err
    assert main(["export", "lora", session, str(tmp_path / "other"), "--rank", "many"]) == 2
    assert "'many' is not a whole number from 1 to 16777216, nor full" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
