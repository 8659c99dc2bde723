"""GGUF files are read as the library of llama.cpp reads them; what cannot be converted is refused in one sentence."""

import re
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

gguf = pytest.importorskip("gguf", reason="gguf, which writes the files, is missing")
transformers = pytest.importorskip("transformers", reason="transformers, which has the models, is missing")

from gguf_helpers import add_vocabulary, write_model  # noqa: E402

from ttt_e2e.cli.main import main  # noqa: E402
from ttt_e2e.convert.checkpoints import open_checkpoint  # noqa: E402
from ttt_e2e.convert.from_hf import convert_from_hf  # noqa: E402
from ttt_e2e.convert.gguf_files import is_gguf, read_gguf  # noqa: E402
from ttt_e2e.convert.learning import LearningOptions  # noqa: E402
from ttt_e2e.errors import UserError  # noqa: E402

CONFIG: dict[str, Any] = dict(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
)


def model(family: str = "Llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**{**CONFIG, **changes})
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("good") / "model.gguf", model(), "Q8_0")


def refused(path: Path, out: Path) -> str:
    """The message, one sentence, of a conversion that leaves nothing behind."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        convert_from_hf(path, out, LearningOptions(24, mini_batch_size=5))
    assert sorted(out.parent.rglob("*")) == before
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and message.endswith(".")
    return message


def test_metadata_and_tensors_are_those_of_the_library(good: Path) -> None:
    ours, theirs = read_gguf(good), gguf.GGUFReader(good)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            expected = field.contents()
            if isinstance(expected, float):
                assert np.float32(ours.metadata[name]) == np.float32(expected)
            else:
                assert ours.metadata[name] == expected
    assert len(ours.tensors) == len(theirs.tensors)
    by_place = {tensor.offset: tensor for tensor in ours.tensors.values()}
    for tensor in theirs.tensors:
        found = by_place[tensor.data_offset]
        assert (found.shape, found.dtype) == (tuple(tensor.shape[::-1].tolist()), tensor.tensor_type.name)
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(found._replace(interleaved=None).read(slice(None)).numpy(), expected)


def test_a_file_that_is_cut_short_anywhere_is_refused(good: Path, tmp_path: Path) -> None:
    content = good.read_bytes()
    header = min(tensor.offset for tensor in read_gguf(good).tensors.values())
    path = tmp_path / "cut.gguf"
    for length in [*range(4, header, 97), header, header + 1, len(content) - 40]:
        path.write_bytes(content[:length])
        assert "cut short" in refused(path, tmp_path / "out")
    path.write_bytes(content[:3])
    assert not is_gguf(path) and "is a file; give" in refused(path, tmp_path / "out")


def test_a_damaged_header_is_refused_or_harmless(good: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    content, folder = good.read_bytes(), tmp_path_factory.mktemp("damaged")
    header = min(tensor.offset for tensor in read_gguf(good).tensors.values())
    path = folder / "model.gguf"

    @settings(max_examples=150, deadline=None)
    @given(st.integers(4, header - 1), st.binary(min_size=1, max_size=9))
    def check(at: int, damage: bytes) -> None:
        path.write_bytes(content[:at] + damage + content[at + len(damage) :])
        try:
            with open_checkpoint(path):
                pass
        except UserError as error:
            assert str(path) in str(error)

    check()


def test_a_damaged_number_of_blocks_takes_no_memory(tmp_path: Path) -> None:
    gemma = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**CONFIG, head_dim=8))
    gemma.config.sliding_window = None
    for theirs in (model(), gemma):
        path = write_model(tmp_path / "model.gguf", theirs)
        content, name = path.read_bytes(), b".block_count"
        at = content.index(name) + len(name) + 4
        path.write_bytes(content[:at] + struct.pack("<I", 5_000_000) + content[at + 4 :])
        tracemalloc.start()
        try:
            assert "num_hidden_layers = 5000000, which is not a whole" in refused(path, tmp_path / "out")
            assert tracemalloc.get_traced_memory()[1] < 1e7
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"expert_count": 8}, "is a mixture of experts"),
        ({"rope__dimension_count": 4}, "rope.dimension_count = 4, but heads of width 8"),
        ({"attention__value_length": 16}, "attention.value_length = 16, but heads of width 8"),
        ({"attention__key_length": 7}, "but heads of width 7|heads of width 7, which cannot be"),
        ({"rope__scaling__type": "longrope"}, "of the type 'longrope', which is unsupported in GGUF"),
        (
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__yarn_attn_factor": 1.3},
            "yarn_attn_factor = 1.3, which programs read differently",
        ),
    ],
)
def test_models_that_are_not_supported_are_refused(tmp_path: Path, metadata: dict[str, Any], words: str) -> None:
    path = write_model(tmp_path / "model.gguf", model(), **metadata)
    assert re.search(words, refused(path, tmp_path / "out"))


def test_tensors_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "more.gguf", model(), tensors={"blk.0.ffn_sub_norm.weight": torch.ones(64)})
    assert "does not explain, such as blk.0.ffn_sub_norm.weight" in refused(path, tmp_path / "out")
    path = write_model(tmp_path / "bias.gguf", model(mlp_bias=True))
    assert "mlp_bias = True" in refused(path, tmp_path / "out")
    path = write_model(tmp_path / "rope.gguf", model(), tensors={"rope_freqs.weight": torch.tensor([1, 2, 1, 4.0])})
    assert "(rope_freqs) that are not Llama 3's" in refused(path, tmp_path / "out")
    path = write_model(tmp_path / "infinite.gguf", make_infinite(model()))
    assert "not finite numbers" in refused(path, tmp_path / "out")


def make_infinite(theirs: Any) -> Any:
    with torch.no_grad():
        theirs.model.norm.weight[3] = torch.inf
    return theirs


@pytest.mark.parametrize(
    ("architecture", "entries", "words"),
    [
        (
            "gemma3n",
            {},
            "architecture 'gemma3n', which cannot be converted; llama, qwen2, qwen3, gemma, gemma2, gemma3 can",
        ),
        ("llama", {"split.no": 0, "split.count": 3}, "is one of 3 parts of a model; join them first"),
        ("llama", {"general.type": "adapter"}, "is no model of its own, but of the type 'adapter'"),
        ("llama", {}, "holds a vocabulary and no weights"),
    ],
)
def test_files_without_a_whole_model_are_refused(
    tmp_path: Path, architecture: str, entries: dict[str, Any], words: str
) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    add_vocabulary(writer, 300)
    for name, value in entries.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint16)(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert words in refused(path, tmp_path / "out")


def test_unknown_quantisations_and_versions_are_refused(good: Path, tmp_path: Path) -> None:
    content = good.read_bytes()
    name = b"blk.1.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 16  # after the number of dimensions and both of them
    assert struct.unpack_from("<I", content, at) == (gguf.GGMLQuantizationType.Q8_0,)
    path = tmp_path / "model.gguf"
    for kind, shown in ((gguf.GGMLQuantizationType.I64, "I64"), (200, "200")):
        path.write_bytes(content[:at] + struct.pack("<I", kind) + content[at + 4 :])
        assert f"{name.decode()} in {path} is of the type {shown}, which" in refused(path, tmp_path / "out")
    for version in (struct.pack("<I", 1), struct.pack(">I", 3)):
        path.write_bytes(content[:4] + version + content[8:])
        assert "versions 2 and 3" in refused(path, tmp_path / "out")


def test_the_library_is_asked_for(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r'pip install "ttt-e2e\[gguf\]"'):
        convert_from_hf(good, tmp_path / "out")


def test_from_gguf_takes_gguf_files_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, words in ((tmp_path / "missing.gguf", "There is no file"), (tmp_path, "is not a GGUF file")):
        assert main(["convert", "from-gguf", str(source), str(tmp_path / "out")]) == 1
        assert words in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
