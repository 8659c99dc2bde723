"""Files of Hugging Face checkpoints: where they are found, and what is refused: other formats, and what is damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_helpers import Pretrained, change_config, convert
from safetensors.torch import load_file, save_file

from ttt_e2e.convert.from_hf import convert_from_hf
from ttt_e2e.convert.hf_files import find_checkpoint, find_config
from ttt_e2e.errors import UserError

# -- other formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("model.ggml", b"lmgg", "GGML"),
        ("model.onnx", b"\x08\x07", "ONNX"),
        ("tf_model.h5", b"\x89HDF\r\n\x1a\n", "HDF5"),
        ("flax_model.msgpack", b"\x81", "MessagePack"),
        ("pytorch_model.bin", b"\x80\x02}", "pickle"),
        ("consolidated.00.pth", b"PK\3\4" + bytes(26) + b"consolidated/data.pkl", "pickle"),
        ("model.ckpt", b"", "pickle"),
    ],
)
def test_weights_of_other_formats_are_refused_by_name(tmp_path: Path, name: str, content: bytes, kind: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / name).write_bytes(content)
    for source in (folder, folder / name):
        for refuse in (find_checkpoint, find_config):
            with pytest.raises(UserError, match=f"{kind}.*, which cannot be converted; give .* in safetensors"):
                refuse(source)


def test_gguf_is_asked_for_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "model-Q8_0.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    for source, words in (
        (tmp_path, r"only as GGUF; give the file to convert, such as .*model-Q8_0\.gguf\."),
        ("owner/Model-7B-GGUF", "by its name, GGUF files; fetch one of them"),
        ("missing.gguf", "There is no file missing.gguf"),
    ):
        with pytest.raises(UserError, match=words):
            find_checkpoint(source)


def test_adapters_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')
    save_file({"lora_A": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is an adapter, such as LoRA, for owner/base; merge it"):
        find_checkpoint(tmp_path)


def test_settings_are_found_whatever_the_format_of_the_weights(tmp_path: Path) -> None:
    for name in ("config.json", "model.gguf", "pytorch_model.bin"):
        (tmp_path / name).write_text("{}")
    assert find_config(tmp_path) == find_config(tmp_path / "config.json") == tmp_path / "config.json"


# -- names -------------------------------------------------------------------------------------------------------------


def test_name_is_found_in_the_cache(pretrained: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache/models--someone--something"
    revision = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(pretrained("llama, one key head, sharded")[1], cache / "snapshots" / revision)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    convert_from_hf("someone/something", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["notes"]["source"] == "someone/something"
    next((cache / "snapshots" / revision).glob("*.safetensors")).unlink()
    with pytest.raises(
        UserError, match=r"something .*not complete in the Hugging Face cache|which .* lists, is missing"
    ):
        convert_from_hf("someone/something", tmp_path / "other")
    with pytest.raises(
        UserError, match="someone/else is not a folder here, is not complete in the Hugging Face cache and"
    ):
        convert_from_hf("someone/else", tmp_path / "other")
    for nothing in ("nowhere", "a/b/c"):
        with pytest.raises(UserError, match=f"There is no folder {nothing}; give"):
            convert_from_hf(nothing, tmp_path / "other")


# -- damaged files -----------------------------------------------------------------------------------------------------


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_damaged_files_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    shard = shards(checkpoint)[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(UserError, match=f"{shard.name} is truncated or not a safetensors file"):
        convert(checkpoint, tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name}, which model.safetensors.index.json lists, is missing"):
        convert(checkpoint, tmp_path)
    tensors = load_file(shards(checkpoint)[0])
    save_file({name + "x": weight for name, weight in tensors.items()}, shard)
    with pytest.raises(UserError, match=r"places .* in a file that does not have it"):
        convert(checkpoint, tmp_path)
    index = checkpoint / "model.safetensors.index.json"
    for broken in ("{", '{"weight_map": []}', '{"weight_map": {"a": "../a.safetensors"}}'):
        index.write_text(broken)
        with pytest.raises(UserError, match=r"is not JSON|does not list the files of the weights"):
            convert(checkpoint, tmp_path)
    index.unlink()
    with pytest.raises(UserError, match=r"has no weights: neither model.safetensors nor"):
        convert(checkpoint, tmp_path)
    (checkpoint / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json is missing"):
        convert(checkpoint, tmp_path)
    with pytest.raises(UserError, match="is a file; give the folder"):
        convert(checkpoint / "generation_config.json", tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists; name another folder"):
        convert(checkpoint, tmp_path)


def test_unexpected_tensors_are_refused(pretrained: Pretrained, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pretrained("llama")[1], tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"{name} in .* is of type I8: a quantised checkpoint"):
        convert(folder, tmp_path)
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / "model.safetensors")
    assert convert(folder, tmp_path).is_dir()  # Llama 1 has them; they follow from the configuration
    change_config(folder, tie_word_embeddings=True)
    tied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tied, folder / "model.safetensors")
    assert convert_from_hf(folder, tmp_path / "tied").config.tie_word_embeddings


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused(
    pretrained: Pretrained, tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    folder = Path(shutil.copytree(pretrained("llama, one key head, sharded")[1], tmp_path / "checkpoint"))
    file = sorted(folder.glob("*.safetensors"))[1]
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"{name} that are not finite numbers"):
        convert(folder, tmp_path)
    assert not (tmp_path / "out").exists()


def test_weights_that_bfloat16_cannot_hold_are_refused(pretrained: Pretrained, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pretrained("llama")[1], tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 3.4e38
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model.norm.weight that are not finite numbers in torch.bfloat16"):
        convert(folder, tmp_path, dtype="bfloat16")
