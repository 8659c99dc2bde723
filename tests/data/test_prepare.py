"""`prepare`: resumed after any interruption, it is byte for byte the same; what cannot be prepared is refused."""

import errno
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_e2e.data import prepare as module
from ttt_e2e.data.prepare import Prepared, prepare
from ttt_e2e.data.shards import ShardWriter, TokenSet
from ttt_e2e.data.text import Document, slices, standard_library, standard_library_document
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError

LINES = standard_library_document("json").text.splitlines(keepends=True)


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    for index in range(5):
        (tmp_path / f"{index}.txt").write_text("".join(LINES[100 * index : 100 * index + 90]))
    rows = ["".join(LINES[600 + 10 * index :][:10]) for index in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return sorted(tmp_path.glob("*.*"))


def run(sources: list[Path], out: Path, **options: Any) -> Prepared:
    defaults: dict[str, Any] = {"vocab_size": 400, "val_share": 0.1, "shard_tokens": 2500, "progress": False}
    return prepare(sources, out, **defaults | options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stop(BaseException):
    pass


def stop_at(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    original, calls = getattr(owner, name), iter(range(10**9))

    def stopping(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == call:
            raise Stop
        return original(*arguments, **keywords)

    patch.setattr(owner, name, stopping)


def test_prepare_counts_and_a_second_call_changes_nothing(sources: list[Path], tmp_path: Path) -> None:
    prepared = run(sources, tmp_path / "out")
    assert sum(prepared.documents.values()) == 13
    assert prepared.documents["val"] >= 1
    assert prepared.vocab_size == 400
    for split in ("train", "val"):
        tokens = TokenSet.open(tmp_path / "out", split)
        assert (len(tokens), tokens.total) == (prepared.documents[split], prepared.tokens[split])
    assert prepared.characters == sum(len(line) for line in LINES[:490]) - sum(
        len("".join(LINES[100 * index + 90 : 100 * index + 100])) for index in range(4)
    ) + sum(len(line) for line in LINES[600:680])
    before = content(tmp_path / "out")
    assert run(sources, tmp_path / "out") == prepared
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (Tokenizer, "encode_chunks", (0, 3, 6, 12)),
        (Tokenizer, "train", (0,)),
        (ShardWriter, "close", (0, 1, 2)),
        (module, "_save_state", (0, 1, 2, 3)),
        (module, "write_text", (0, 1, 3, 5)),
    ],
)
def test_resumed_prepare_is_byte_for_byte_the_same(
    sources: list[Path], tmp_path: Path, owner: Any, name: str, calls: tuple[int, ...]
) -> None:
    run(sources, tmp_path / "whole")
    whole = content(tmp_path / "whole")
    assert len([name for name in whole if name.endswith(".bin")]) >= 4
    for call in calls:
        out = tmp_path / f"out{call}"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            stop_at(patch, owner, name, call)
            run(sources, out)
        if out.exists():
            assert not list(out.glob(".*"))
            (out / ".train-00000.bin.1.part").write_bytes(b"as kill -9 leaves it")
        run(sources, out)
        assert content(out) == whole


def test_finished_shards_are_not_made_again(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, Tokenizer, "encode_chunks", 5)
        run(sources, tmp_path / "out")
    encoded = []
    original = Tokenizer.encode_chunks

    def counting(self: Tokenizer, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        encoded.append(1)
        return original(self, pieces)

    monkeypatch.setattr(Tokenizer, "encode_chunks", counting)
    monkeypatch.setattr(Tokenizer, "train", None)
    run(sources, tmp_path / "out")
    assert len(encoded) < 13


def test_prepare_refuses_a_folder_of_another_preparation(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(sources, out)
    before = content(out)
    for options, sentence in [({"seed": 1}, "other seed"), ({"vocab_size": 500}, "other vocab_size")]:
        with pytest.raises(UserError, match=sentence):
            run(sources, out, **options)
    with pytest.raises(UserError, match="other sources"):
        run(sources[1:], out)
    sources[0].write_text("new\n")
    with pytest.raises(UserError, match="other sources"):
        run(sources, out)
    assert content(out) == before


@pytest.mark.parametrize(
    "content", [b"[]", b"{", b"\xff", b'{"config": {}}', b'{"sha256": "", "state": "{}"}', b"[" * 10**5]
)
def test_damaged_progress_is_refused(sources: list[Path], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "progress.json").write_bytes(content)
    with pytest.raises(UserError, match=r"progress.json is (truncated or )?altered|another version"):
        run(sources, tmp_path / "out")


def test_prepare_refuses_folders_with_other_files(sources: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds other files"):
        run(sources, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        run(sources, sources[0])


def test_bad_source_can_be_corrected(sources: list[Path], tmp_path: Path) -> None:
    text = sources[2].read_bytes()
    sources[2].write_bytes(text + b"\xff")
    with pytest.raises(UserError, match=rf"2.txt is not valid UTF-8 at byte {len(text)}"):
        run(sources, tmp_path / "out")
    sources[2].write_bytes(text)
    run(sources, tmp_path / "out")


def test_full_disk_can_be_resumed(sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ShardWriter, name: str, tokens: Iterable[np.ndarray]) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on the disk"):
        patch.setattr(ShardWriter, "write", full)
        run(sources, tmp_path / "out")
    run(sources, tmp_path / "whole")
    run(sources, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_sources_that_change_meanwhile_are_noticed(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Tokenizer.train

    def change(texts: Iterable[str], vocab_size: int) -> Tokenizer:
        sources[0].write_text("less\n")
        return train(texts, vocab_size)

    monkeypatch.setattr(Tokenizer, "train", change)
    with pytest.raises(UserError, match="sources changed"):
        run(sources, tmp_path / "out")


def test_validation_documents_are_held_out(sources: list[Path], tmp_path: Path) -> None:
    given = run(sources[1:], tmp_path / "given", val=sources[:1])
    assert given.documents["val"] == 1
    assert TokenSet.open(tmp_path / "given", "val").names == ["0.txt"]
    none = run(sources, tmp_path / "none", val_share=0)
    assert none.documents["val"] == 0
    with pytest.raises(UserError, match="no 'val' documents"):
        TokenSet.open(tmp_path / "none", "val")
    both = run(sources, tmp_path / "both", val=sources[:1])  # what is held out is not trained on
    assert both.documents == {**given.documents, "val": 1}
    assert "0.txt" not in TokenSet.open(tmp_path / "both").names
    with pytest.raises(UserError, match="no text to train on"):
        run(sources[:1], tmp_path / "nothing", val=sources[:1])
    with pytest.raises(UserError, match="val_share"):
        run(sources, tmp_path / "bad", val_share=1.0)


@pytest.mark.parametrize("documents", [1, 2])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_end_of_the_longest_text_is_held_out_if_there_are_few(tmp_path: Path, documents: int, suffix: str) -> None:
    text = "".join(LINES[:200])
    texts = [text, "".join(LINES[200:250])][:documents]
    if suffix == "txt":
        files = [tmp_path / f"{i}.txt" for i in range(documents)]
        for file, one in zip(files, texts, strict=True):
            file.write_text(one)
    else:
        files = [tmp_path / "a.jsonl"]
        files[0].write_text(
            "".join(json.dumps({"text": one, "title": f"{i}.txt"}) + "\n" for i, one in enumerate(texts))
        )
    prepared = run(files, tmp_path / "out")
    assert prepared.documents == {"train": documents, "val": 1} and prepared.divided == "0.txt"
    train, val = TokenSet.open(tmp_path / "out"), TokenSet.open(tmp_path / "out", "val")
    assert val.names == ["0.txt (end)"]
    beginning, end = (one.tokenizer().decode(one.document(0)[1:]) for one in (train, val))
    assert beginning + end == text and beginning.endswith("\n")
    assert 0.1 * sum(map(len, texts)) <= len(end) < 0.13 * sum(map(len, texts))


def test_resumed_prepare_of_a_divided_text_is_the_same(sources: list[Path], tmp_path: Path) -> None:
    assert run(sources[:1], tmp_path / "whole").divided
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, Tokenizer, "encode_chunks", 1)
        run(sources[:1], tmp_path / "out")
    run(sources[:1], tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@settings(max_examples=10)
@given(
    text=st.text(st.sampled_from("ab \né"), min_size=2, max_size=300),
    val_share=st.floats(0.001, 0.99),
    chunk=st.integers(1, 40),
)
def test_divided_text_is_complete(text: str, val_share: float, chunk: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        (Path(folder) / "a.txt").write_bytes(text.encode())
        patch.setattr(Document, "chunks", lambda document: slices(text, chunk))
        run([Path(folder) / "a.txt"], Path(folder) / "out", val_share=val_share)
        parts = [TokenSet.open(Path(folder) / "out", split) for split in ("train", "val")]
        beginning, end = (part.tokenizer().decode(part.document(0)[1:]) for part in parts)
    assert beginning + end == text and beginning and end


def test_text_of_one_character_cannot_be_divided(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="too little text to hold out"):
        run([tmp_path / "a.txt"], tmp_path / "out")
    assert run([tmp_path / "a.txt"], tmp_path / "none", val_share=0).documents == {"train": 1, "val": 0}


def test_tokenizer_is_trained_without_the_end_that_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aaaa bbbb " * 20_000 + "\n" + "zqzq " * 4_000)
    run([tmp_path / "a.txt"], tmp_path / "out")
    vocabulary = TokenSet.open(tmp_path / "out").tokenizer().backend.get_vocab()
    assert "Ġbbbb" in vocabulary and "zq" not in vocabulary


@pytest.mark.parametrize(("vocab_size", "sentence"), [(10**9, "too large"), (0, "too small"), (-(10**30), "too small")])
def test_vocabulary_is_bounded_before_anything_is_read(tmp_path: Path, vocab_size: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        run([tmp_path / "missing.txt"], tmp_path / "out", vocab_size=vocab_size)


def test_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="read twice"):
        run([tmp_path / "pipe"], tmp_path / "out")


def test_validation_sources_without_text_are_refused(sources: list[Path], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="validation sources hold no text"):
        run(sources, tmp_path / "out", val=[tmp_path / "in"])


def test_titles_and_file_names_are_escaped(tmp_path: Path) -> None:
    rows = [{"title": title, "text": "some text\n"} for title in ("half \ud800", "two\nlines", "雪 ☃")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff\n.txt"))
    file.write_text("more text\n")
    run([tmp_path / "a.jsonl", file], tmp_path / "out", val_share=0)
    assert TokenSet.open(tmp_path / "out").names == ["half \\ud800", "two\\nlines", "雪 ☃", "b\\udcff\\n.txt"]


def test_tokenizer_is_trained_without_validation_text(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("aaaa bbbb " * 20_000)
    (tmp_path / "val.txt").write_text("zqzq " * 20_000)
    sources, val = [tmp_path / "train.txt"], [tmp_path / "val.txt"]
    prepared = run(sources, tmp_path / "out", val=val, sample_chars=50_000)
    vocabulary = TokenSet.open(tmp_path / "out").tokenizer().backend.get_vocab()
    assert prepared.vocab_size == max(vocabulary.values()) + 1 < 400
    assert "Ġbbbb" in vocabulary
    assert "zq" not in vocabulary


def test_prepare_with_an_existing_tokenizer(sources: list[Path], tmp_path: Path) -> None:
    Tokenizer.train(LINES, 300).save(tmp_path / "tokenizer.json")
    prepared = run(sources, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer.json"))
    assert prepared.vocab_size == 300
    assert TokenSet.open(tmp_path / "out").tokenizer().digest == Tokenizer.load(tmp_path).digest


def test_prepare_refuses_sources_without_text(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="no text to train on"):
        run([tmp_path / "in"], tmp_path / "out")


def test_prepare_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first documents; which ones it has is tested in test_text.py."""
    monkeypatch.setattr(module, "standard_library", lambda: islice(standard_library(), 8))
    prepared = prepare(None, tmp_path / "out", vocab_size=1024, progress=False)
    assert prepared.tokens["train"] > 300_000
    assert prepared.tokens["val"] > 5_000
