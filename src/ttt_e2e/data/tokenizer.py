"""Tokenizers: a byte-level BPE that is trained here, or an existing one. Long texts are encoded in segments."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from ttt_e2e.data.text import CHUNK_BYTES, read_text, slices
from ttt_e2e.errors import UserError
from ttt_e2e.files import write_text

BOS = "<|bos|>"
_BOS_NAMES = (
    *(BOS, "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>"),
    *("<s>", "<bos>", "[BOS]", "<|endoftext|>", "<|end_of_text|>"),
)

# The split of GPT-4, but digits in pairs, which suits small vocabularies, and a run of spaces is kept whole except for
# its last space, which belongs to the word after it: an indentation is one token.
_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SEGMENT_CHARS = 1 << 14
_MAX_VOCAB_SIZE = 1 << 20  # four times the largest published ones
_LINE_START = re.compile(r"\n(?=\S)")


def segments(chunks: Iterable[str], min_chars: int) -> Iterator[list[str]]:
    """Cut a text that comes in chunks into segments; yield, for each chunk, the segments that it completes.

    A segment ends before the first unindented line after `min_chars` characters, or after 4 * `min_chars` characters.
    So the cuts depend on the text alone, not on how it was split into chunks.
    """
    max_chars = 4 * min_chars
    text = ""
    for chunk in chunks:
        text += chunk
        start, complete = 0, []
        while (line := _LINE_START.search(text, start + min_chars - 1, start + max_chars)) or len(
            text
        ) - start >= max_chars:
            end = line.end() if line else start + max_chars
            complete.append(text[start:end])
            start = end
        text = text[start:]
        if complete:
            yield complete
    if text:
        yield [text]


def check_vocab_size(vocab_size: int) -> None:
    """Raise UserError unless a tokenizer of `vocab_size` tokens can be trained; memory is taken for all at once."""
    if vocab_size < 257:
        raise UserError(f"A vocabulary of {vocab_size} is too small; 256 bytes and {BOS} need at least 257.")
    if vocab_size > _MAX_VOCAB_SIZE:
        raise UserError(f"A vocabulary of {vocab_size} is too large; choose at most {_MAX_VOCAB_SIZE}.")


class Tokenizer:
    """Text to token ids and back. Text never becomes a special token, even where it spells one.

    With a byte-level tokenizer, as `train` makes them, `decode(encode(text)) == text`.

    Attributes:
        bos: id of the token that begins every document.
        end_ids: ids that end a text which the model writes: `bos`, unless a pretrained model names others.
        special: ids of the special tokens by spelling.
        vocab_size: the largest id plus one.
    """

    def __init__(self, backend: tokenizers.Tokenizer, name: str = "The tokenizer") -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        self.special: dict[str, int] = {token.content: i for i, token in added.items() if token.special}
        # A special token comes first: a large vocabulary may spell such a name as an ordinary token.
        ids = [*map(self.special.get, _BOS_NAMES), *map(backend.token_to_id, _BOS_NAMES)]
        bos = next((token for token in ids if token is not None), None)
        if bos is None:
            raise UserError(f"{name} has no token that begins a document; add one of {', '.join(_BOS_NAMES)}.")
        self.backend = backend
        self.bos: int = bos
        self.end_ids = frozenset({bos})
        self.vocab_size: int = max(backend.get_vocab().values()) + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a byte-level BPE of at most `vocab_size` tokens, at least 257; fewer if the texts yield fewer."""
        check_vocab_size(vocab_size)
        backend = tokenizers.Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[BOS], initial_alphabet=byte_level.alphabet(), show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path_or_name: str | Path) -> "Tokenizer":
        """Load a `tokenizer.json`, a folder that has one, or a tokenizer by its name on Hugging Face."""
        path = Path(path_or_name).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if path.exists() or path.suffix == ".json" or path.is_absolute() or len(path.parts) > 2:
            text = read_text(path)
            try:
                backend = tokenizers.Tokenizer.from_str(text)
            except Exception as error:  # the library raises bare Exception
                raise UserError(f"{path} is not a tokenizer of the tokenizers library: {error}") from error
            return cls(backend, str(path))
        try:
            backend = tokenizers.Tokenizer.from_pretrained(str(path_or_name))
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{path_or_name} is neither a file or folder here nor a tokenizer that could be downloaded from "
                f"Hugging Face ({reason}); check the name and the connection."
            ) from error
        return cls(backend, str(path_or_name))

    def encode(self, text: str) -> np.ndarray:
        """The token ids of `text` as an int64 array, without special ones; raises UserError for lone surrogates."""
        return np.concatenate([np.empty(0, np.int64), *self.encode_chunks(slices(text, CHUNK_BYTES))])

    def encode_chunks(self, chunks: Iterable[str]) -> Iterator[np.ndarray]:
        """Encode a text that comes in chunks, on several cores; yields int64 arrays of token ids.

        Joined, they equal `encode` of the whole text, however it is split. Little more than a chunk is in memory.
        """
        for batch in segments(chunks, SEGMENT_CHARS):
            try:
                encodings = self.backend.encode_batch_fast(batch, add_special_tokens=False)
            except TypeError as error:
                raise UserError("The text holds half of a surrogate pair; remove it.") from error
            for encoding in encodings:
                yield np.array(encoding.ids, np.int64)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of token ids; special tokens are left out, an incomplete character becomes U+FFFD."""
        return self.backend.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=True)

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json`, complete or not at all."""
        write_text(Path(path), self.backend.to_str(pretty=True))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tokenizer's canonical JSON; tokenizers with the same digest encode alike."""
        canonical = json.dumps(json.loads(self.backend.to_str()), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()
