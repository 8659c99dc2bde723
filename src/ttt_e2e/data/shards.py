"""Token shards on disk, and the official zarr arrays: documents of token ids, mapped into memory, not loaded.

A folder holds `meta.json`, `tokenizer.json` and, for every shard of a split, `train-00000.bin` (little-endian uint16,
or uint32 for vocabularies of more than 65,536 tokens) and `train-00000.json` (names and lengths of its documents).
`meta.json` has the digests of all of them, and its own, which are compared when they are opened. Every document
begins with the BOS token.
"""

import hashlib
import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import InitVar, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path, check_digest, check_file, file_digest, read_json, write_text

FORMAT_VERSION = 2
_ZARR_SAMPLE = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that token ids of a vocabulary have on disk."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes a shard document by document. Its files appear when `close` is called, unless `stack` is ended before."""

    def __init__(self, stack: ExitStack, folder: Path, stem: str, dtype: np.dtype, bos: int) -> None:
        self._file = stack.enter_context(ExitStack())
        part = self._file.enter_context(atomic_path(folder / f"{stem}.bin"))
        self._handle = self._file.enter_context(part.open("wb"))
        self._hash = hashlib.sha256()
        self._index = folder / f"{stem}.json"
        self._dtype, self._bos, self._stem = dtype, bos, stem
        self._names: list[str] = []
        self._lengths: list[int] = []

    def write(self, name: str, tokens: Iterable[np.ndarray]) -> int:
        """Append a document, given as arrays of token ids without BOS; returns its length, BOS included."""
        length = 0
        for array in chain([np.array([self._bos])], tokens):
            data = array.astype(self._dtype).tobytes()
            self._hash.update(data)
            self._handle.write(data)
            length += len(array)
        self._names.append(name)
        self._lengths.append(length)
        return length

    def close(self) -> dict[str, Any]:
        """Move the shard to its place and return its entry for `meta.json`."""
        self._file.close()
        write_text(self._index, json.dumps({"names": self._names, "lengths": self._lengths}))
        return {
            "name": self._stem,
            "documents": len(self._names),
            "tokens": sum(self._lengths),
            "sha256": self._hash.hexdigest(),
            "index_bytes": self._index.stat().st_size,
            "index_sha256": file_digest(self._index),
        }


@dataclass(eq=False, repr=False)
class TokenSet:
    """The documents of a split, `len()` of them: arrays of token ids on disk, of which only slices are read."""

    arrays: list[Any]
    """The token ids of every shard."""
    names: list[str]
    """The documents' names."""
    shard_lengths: InitVar[list[list[int]]]
    """Tokens per document, shard by shard."""
    bos: int
    """Id of the token that begins every document."""
    vocab_size: int | None
    """None if it is not known (zarr)."""
    digest: str
    """Changes with the tokens or their tokenizer."""
    where: str
    """The folder."""
    tokenizer_digest: str | None = None
    """Of the `tokenizer.json` in the folder; None if there is none (zarr)."""

    def __post_init__(self, shard_lengths: list[list[int]]) -> None:
        self.lengths = np.array([length for shard in shard_lengths for length in shard], np.int64)
        """Tokens per document."""
        self.total = int(self.lengths.sum())
        self._shard = np.repeat(np.arange(len(self.arrays)), [len(shard) for shard in shard_lengths])
        self._starts = np.concatenate([np.cumsum([0, *shard])[:-1] for shard in shard_lengths])
        self._id_limit = self.vocab_size

    @classmethod
    def open(cls, folder: Path, split: str = "train") -> "TokenSet":
        """Open a split ("train" or "val") of a folder of `prepare`; raises UserError if it is not intact."""
        folder = Path(folder)
        if (folder / "progress.json").exists() and not (folder / "meta.json").exists():
            raise UserError(f"{folder} is unfinished; run the same `ttt-e2e prepare` again to complete it.")
        if not (folder / "meta.json").is_file():
            raise UserError(f"{folder} is not a folder of prepared tokens; write it with `ttt-e2e prepare`.")
        meta = read_json(folder / "meta.json")
        if (version := meta.get("version")) != FORMAT_VERSION:
            found = f"{folder} has format version {version}, and this ttt-e2e reads version {FORMAT_VERSION}"
            raise UserError(f"{found}; prepare it anew.")
        check_digest(meta, folder / "meta.json")
        shards = meta["splits"].get(split)
        if not shards:
            present = ", ".join(name for name, entries in meta["splits"].items() if entries)
            raise UserError(
                f"{folder} has no {split!r} documents, only: {present}; prepare it anew, with --val or --val-share."
            )
        dtype = np.dtype(meta["dtype"])
        arrays, names, lengths = [], [], []
        for shard in shards:
            path, remedy = folder / f"{shard['name']}.bin", f"prepare {folder} anew"
            check_file(path.with_suffix(".json"), shard["index_bytes"], shard["index_sha256"], remedy)
            check_file(path, shard["tokens"] * dtype.itemsize, shard["sha256"], remedy)
            index = read_json(path.with_suffix(".json"))
            arrays.append(np.memmap(path, dtype, "r"))
            names += index["names"]
            lengths.append(index["lengths"])
        digest = _digest(meta["tokenizer"], shards)
        return cls(arrays, names, lengths, meta["bos"], meta["vocab_size"], digest, str(folder), meta["tokenizer"])

    @classmethod
    def open_zarr(cls, path: Path, split: str, bos: int) -> "TokenSet":
        """Open an official token array, the 1-D integer array of a split in a zarr group, as one document.

        Raises UserError if it is not one, or lacks a part, which zarr would read as zeros.
        """
        try:
            import zarr
        except ImportError as error:
            raise UserError(f'Reading {path} needs zarr: pip install "ttt-e2e[zarr]".') from error
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"{path} is not a folder of zarr arrays; check the path.")
        try:
            array = zarr.open_array(str(path / split), mode="r")
        except Exception as error:  # zarr raises a different one for every way of not being an array
            raise UserError(f"{path} has no zarr array {split!r}; check the path and the split's name.") from error
        if array.ndim != 1 or array.dtype.kind not in "iu" or array.shape[0] == 0:
            raise UserError(f"{path / split} is not a list of tokens: its shape is {array.shape}, {array.dtype}.")
        if missing := array.nchunks - array.nchunks_initialized:
            raise UserError(f"{path / split} lacks {missing} of its {array.nchunks} chunks; copy it again.")
        length = int(array.shape[0])
        tokens = cls([array], [split], [[length]], bos, None, "", str(path))
        ends = [tokens.document(0, start, start + 1024).tolist() for start in (0, max(0, length - 1024))]
        tokens.digest = _digest(str(array.dtype), [length, *ends])
        return tokens

    def __len__(self) -> int:
        return len(self.names)

    def document(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document in their dtype on disk: a view of the mapped file, or a copy from zarr.

        Raises UserError for a damaged chunk of a zarr array, as far as zarr notices.
        """
        length, first = int(self.lengths[index]), int(self._starts[index])
        stop = length if stop is None else min(stop, length)
        try:
            return self.arrays[self._shard[index]][first + start : first + stop]
        except Exception as error:  # zarr raises a different one for every way of being damaged
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{self.where} cannot be read at token {first + start} ({reason}); it is damaged: copy it again."
            ) from error

    def check_ids(self, ids: np.ndarray) -> np.ndarray:
        """Return `ids`; raise UserError if one of them is not in the vocabulary, as far as that is known."""
        if self._id_limit is not None and ids.max() >= self._id_limit:
            raise UserError(
                f"{self.where} holds token {ids.max()}, outside the vocabulary of {self._id_limit}; it may have been "
                "altered. Prepare it anew."
            )
        return ids

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer of these tokens; raises UserError if it is missing or another one."""
        if self.tokenizer_digest is None:
            raise UserError(f"{self.where} comes without a tokenizer; name the one that made its tokens.")
        path = Path(self.where) / "tokenizer.json"
        tokenizer = Tokenizer.load(path)
        if tokenizer.digest != self.tokenizer_digest:
            raise UserError(
                f"{path} is not the tokenizer that made the tokens beside it; put that one back, or prepare them anew."
            )
        return tokenizer

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise UserError unless these tokens have a vocabulary of `vocab_size`.

        If it is not known (zarr), the first million tokens must be in it, and `check_ids` checks the others.
        """
        if self.vocab_size is None:
            largest = max(int(self.document(0, 0, _ZARR_SAMPLE).max()), self.bos)
            if largest >= vocab_size:
                raise UserError(
                    f"{self.where} holds token {largest}, but the model has a vocabulary of {vocab_size}; "
                    "set vocab_size to that of the tokenizer that made the tokens."
                )
            self._id_limit = vocab_size
        elif self.vocab_size != vocab_size:
            raise UserError(
                f"{self.where} was made with a vocabulary of {self.vocab_size}, but the model has "
                f"{vocab_size}; set vocab_size = {self.vocab_size} or prepare the data with the model's tokenizer."
            )


def open_tokens(folder: Path, split: str, tokenizer: Tokenizer | None) -> TokenSet:
    """Open a split of a prepared folder or, given the tokenizer that made them, of the official zarr arrays."""
    folder = Path(folder)
    if tokenizer is None:
        return TokenSet.open(folder, split)
    if (folder / "meta.json").exists():
        raise UserError(f"{folder} has its own tokenizer; leave --tokenizer out.")
    return TokenSet.open_zarr(folder, split, tokenizer.bos)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
