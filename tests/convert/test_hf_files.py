"""Sources that cannot be converted are refused by what they are: other formats, adapters, quantised weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ttt_e2e.convert.hf_files import find_checkpoint, find_config
from ttt_e2e.errors import UserError


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
