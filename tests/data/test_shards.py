"""Token shards and zarr arrays: what is written is read back, and damage is noticed."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers import flipped
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.data.prepare import prepare
from ttt_e2e.data.shards import ShardWriter, TokenSet, token_dtype
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def prepared(place: Path) -> Path:
    for index in range(6):
        (place / f"in{index}.txt").write_text(" ".join(WORDS[index:] * (10 + index)) + "\n")
    sources = sorted(place.glob("*.txt"))
    prepare(sources, place / "out", vocab_size=300, val_share=0.2, shard_tokens=150, progress=False)
    return place / "out"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepared(tmp_path)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("intact"))


def test_token_set_reads_what_prepare_wrote(folder: Path) -> None:
    found = {}
    for split in ("train", "val"):
        tokens = TokenSet.open(folder, split)
        tokenizer = tokens.tokenizer()
        assert len(tokens) == len(tokens.names) == len(tokens.lengths)
        assert tokens.total == tokens.lengths.sum()
        for index, name in enumerate(tokens.names):
            document = tokens.document(index)
            assert document[0] == tokens.bos == 0
            assert document.dtype == np.uint16
            np.testing.assert_array_equal(tokens.document(index, 3, 7), document[3:7])
            found[name] = tokenizer.decode(document)
    assert found == {path.name: path.read_text() for path in folder.parent.glob("*.txt")}
    assert len(list(folder.glob("train-*.bin"))) > 1


def test_token_dtype_is_wider_for_large_vocabularies() -> None:
    assert token_dtype(65536).itemsize == 2
    assert token_dtype(65537).itemsize == 4


def test_interrupted_shard_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ExitStack() as stack:
        ShardWriter(stack, tmp_path, "train-00000", np.dtype("<u2"), 0).write("a", [np.arange(5)])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_check_vocabulary_refuses_another_size(folder: Path) -> None:
    tokens = TokenSet.open(folder)
    assert tokens.vocab_size is not None
    tokens.check_vocabulary(tokens.vocab_size)
    for other in (tokens.vocab_size - 1, tokens.vocab_size + 1):
        with pytest.raises(UserError, match=f"set vocab_size = {tokens.vocab_size}"):
            tokens.check_vocabulary(other)


def test_open_refuses_damaged_folders(folder: Path) -> None:
    shard, index = folder / "train-00000.bin", folder / "train-00000.json"
    data, names = shard.read_bytes(), index.read_text()
    with pytest.raises(UserError, match="no 'test' documents, only: train, val"):
        TokenSet.open(folder, "test")
    for changed in (data[:-2], data + b"\0\0", b""):
        shard.write_bytes(changed)
        with pytest.raises(UserError, match="altered or cut short"):
            TokenSet.open(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00000.bin is missing"):
        TokenSet.open(folder)
    shard.write_bytes(data)
    index.write_text(names[:-3])
    with pytest.raises(UserError, match=r"train-00000.json is altered or cut short"):
        TokenSet.open(folder)
    index.write_text(names)
    Tokenizer.train(["other"], 257).save(folder / "tokenizer.json")
    with pytest.raises(UserError, match="not the tokenizer that made"):
        TokenSet.open(folder).tokenizer()
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"version": 99}))
    with pytest.raises(UserError, match="format version 99, and this ttt-e2e reads version 2; prepare it anew"):
        TokenSet.open(folder)
    (folder / "meta.json").write_text("[]")
    with pytest.raises(UserError, match=r"meta.json is altered"):
        TokenSet.open(folder)
    (folder / "meta.json").unlink()
    with pytest.raises(UserError, match="not a folder of prepared tokens"):
        TokenSet.open(folder)
    (folder / "progress.json").touch()
    with pytest.raises(UserError, match="is unfinished; run the same `ttt-e2e prepare` again"):
        TokenSet.open(folder)
    with pytest.raises(UserError, match="not a folder of prepared tokens"):
        TokenSet.open(folder / "nowhere")


@given(bit=st.integers(0, 1 << 30))
@settings(max_examples=60)
@pytest.mark.parametrize("name", ["meta.json", "train-00000.json", "train-00000.bin", "tokenizer.json"])
def test_a_flipped_bit_is_refused_or_changes_nothing(intact: Path, name: str, bit: int) -> None:
    def everything() -> tuple:
        tokens = TokenSet.open(intact)
        ids = [tokens.document(index).tolist() for index in range(len(tokens))]
        return ids, tokens.names, tokens.digest, tokens.bos, tokens.tokenizer().digest

    path, expected = intact / name, everything()
    content = path.read_bytes()
    path.write_bytes(flipped(content, bit % (8 * len(content))))
    try:
        assert everything() == expected
    except UserError:
        pass
    finally:
        path.write_bytes(content)


def test_open_zarr_reads_a_flat_array(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 100, 1000).astype(np.uint32)
    group = zarr.open_group(str(tmp_path / "z"), mode="w")
    group.create_array("train", data=ids, chunks=(64,))
    group.create_array("square", data=ids.reshape(10, 100))
    tokens = TokenSet.open_zarr(tmp_path / "z", "train", bos=1)
    assert (len(tokens), tokens.total, tokens.bos) == (1, 1000, 1)
    np.testing.assert_array_equal(tokens.document(0, 60, 140), ids[60:140])
    np.testing.assert_array_equal(tokens.document(0, 990, 2000), ids[990:])
    tokens.check_vocabulary(100)
    with pytest.raises(UserError, match="vocabulary of 50"):
        tokens.check_vocabulary(50)
    with pytest.raises(UserError, match="without a tokenizer"):
        tokens.tokenizer()
    with pytest.raises(UserError, match="no zarr array 'val'"):
        TokenSet.open_zarr(tmp_path / "z", "val", bos=1)
    with pytest.raises(UserError, match="is not a list of tokens"):
        TokenSet.open_zarr(tmp_path / "z", "square", bos=1)
    with pytest.raises(UserError, match="not a folder of zarr arrays"):
        TokenSet.open_zarr(tmp_path / "nowhere", "train", bos=1)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-3], lambda data: data[::-1], None])
def test_a_damaged_chunk_of_a_zarr_array_is_one_sentence(
    tmp_path: Path, damage: Callable[[bytes], bytes] | None
) -> None:
    ids = np.random.default_rng(0).integers(1, 100, 10_000).astype(np.uint16)
    group = zarr.open_group(str(tmp_path / "z"), mode="w")
    group.create_array("train", data=ids, chunks=(1000,))
    path = tmp_path / "z/train/c/5"
    if damage is None:
        path.unlink()
        with pytest.raises(UserError, match="lacks 1 of its 10 chunks"):
            TokenSet.open_zarr(tmp_path / "z", "train", bos=1)
        return
    path.write_bytes(damage(path.read_bytes()))
    tokens = TokenSet.open_zarr(tmp_path / "z", "train", bos=1)
    np.testing.assert_array_equal(tokens.document(0, 0, 5000), ids[:5000])
    with pytest.raises(UserError, match=r"cannot be read at token 4999.*copy it again") as caught:
        tokens.document(0, 4999, 5001)
    assert "\n" not in str(caught.value)
