"""Tokenizers: a byte-level BPE that is trained here, or an existing one. Long texts are encoded in segments.

A tokenizer normalises a text, splits it into words and encodes each word by itself. So a text may be cut between two
words, if each side is normalised and split as in the whole text. That is tried out, with some text on both sides of the
cut, since a tokenizer may do anything. Where a text is one long word, as for Llama 2, a BPE may still be cut between
two characters that no token holds next to each other: they are never merged.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from ttt_e2e.data.text import CHUNK_BYTES, read_text, slices
from ttt_e2e.errors import UserError
from ttt_e2e.files import expand_user, read_json, write_text

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

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")  # of the transformers library
SEGMENT_CHARS = 1 << 14
_MAX_VOCAB_SIZE = 1 << 20  # four times the largest published ones
MAX_SEGMENT_CHARS = 1 << 24  # which take about two gigabytes while they are encoded
_CONTEXT_CHARS = 64  # that are looked at on each side of a cut
_TRIES = 32  # places for a cut after a word that are looked at in a block
_LINE_START = re.compile(r"\n(?=\S)")
_WORD_END = re.compile(r"\w(?= \w)|\w(?=[^\w\s])|[^\W\d](?=\d)")


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

    def __init__(
        self, backend: tokenizers.Tokenizer, name: str = "The tokenizer", bos_token: str | None = None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        self.special: dict[str, int] = {token.content: i for i, token in added.items() if token.special}
        # A special token comes first: a large vocabulary may spell such a name as an ordinary token.
        ids = [*map(self.special.get, _BOS_NAMES), *map(backend.token_to_id, _BOS_NAMES)]
        usual = next((token for token in ids if token is not None), None)
        named = None if bos_token is None else backend.token_to_id(bos_token)
        bos = usual if named is None else named
        if bos is None:
            raise UserError(f"{name} has no token that begins a document; add one of {', '.join(_BOS_NAMES)}.")
        self.backend = backend
        self.bos: int = bos
        self._names_bos = bos != usual
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
        """Load a `tokenizer.json`, a folder that has one, or a tokenizer by its name on Hugging Face.

        BOS is what the tokenizer_config.json beside it names, or else the token with one of the usual names.
        """
        path = expand_user(path_or_name)
        path = path / "tokenizer.json" if path.is_dir() else path
        if path.exists() or path.suffix == ".json" or path.is_absolute() or len(path.parts) > 2:
            text = read_text(path)
            try:
                backend = tokenizers.Tokenizer.from_str(text)
            except Exception as error:  # the library raises bare Exception
                raise UserError(f"{path} is not a tokenizer of the tokenizers library: {error}") from error
            return cls(backend, str(path), _named_bos(path.parent))
        try:
            backend = tokenizers.Tokenizer.from_pretrained(str(path_or_name))
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{path_or_name} is neither a file or folder here nor a tokenizer that could be downloaded from "
                f"Hugging Face ({reason}); check the name and the connection."
            ) from error
        from huggingface_hub import hf_hub_download

        folder = Path()
        with suppress(Exception):  # a tokenizer may come without it
            folder = Path(hf_hub_download(str(path_or_name), _SETTINGS[0])).parent
        return cls(backend, str(path_or_name), _named_bos(folder) if folder.name else None)

    def leave_out(self, first: int) -> None:
        """Do without the added tokens from the id `first` on, of which a model has no embedding.

        `vocab_size` is then `first`, and a text that needs one of these tokens is refused. Nothing changes where
        there are none, or where ordinary tokens or BOS are among them.
        """
        ordinary = self.backend.get_vocab(with_added_tokens=False).values()
        if max(self.bos, *ordinary) < first < self.vocab_size:
            self.vocab_size = first

    def encode(self, text: str) -> np.ndarray:
        """The token ids of `text` as an int64 array, without special ones.

        Raises UserError for lone surrogates, for tokens that were left out, and for a very long text without any place
        to cut it.
        """
        return np.concatenate([np.empty(0, np.int64), *self.encode_chunks(slices(text, CHUNK_BYTES))])

    def encode_chunks(self, chunks: Iterable[str]) -> Iterator[np.ndarray]:
        """Encode a text that comes in chunks, on several cores; yields int64 arrays of token ids.

        Joined, they equal the ids of the whole text, however it is split. Little more than a chunk is in memory, unless
        there is no place to cut the text. Raises UserError as `encode` does.
        """
        for batch in self._segments(chunks):
            before = self._encode_batch([context for context, _ in batch])
            both = self._encode_batch([context + segment for context, segment in batch])
            for (context, _), context_ids, ids in zip(batch, before, both, strict=True):
                found = np.array(ids[len(context_ids) if context else 0 :], np.int64)
                if found.max(initial=-1) >= self.vocab_size:
                    unknown = self.backend.id_to_token(int(found.max()))
                    raise UserError(f"The text holds {unknown!r}, of which the model has no embedding; remove it.")
                yield found

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in self._text_backend.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError as error:
            raise UserError("The text holds half of a surrogate pair; remove it.") from error

    def _segments(self, chunks: Iterable[str]) -> Iterator[list[tuple[str, str]]]:
        """Cut a text that comes in chunks; yields, for each chunk, the segments that it completes.

        Each comes with some of the text before it. A segment ends before the first unindented line after
        `SEGMENT_CHARS` characters or, if three times as many have none, after a word; and only where `_can_cut`. So the
        cuts depend on the text alone, not on how it was split into chunks.
        """
        margin = max(_CONTEXT_CHARS, *(len(t.content) for t in self.backend.get_added_tokens_decoder().values()), 0)
        size, text, start = SEGMENT_CHARS, "", 0
        block = place = size  # the first places for a cut at all, and for one before a line
        for chunk in chunks:
            text += chunk
            complete = []
            while True:
                line = _LINE_START.search(text, place - 1, block + 3 * size)
                if line and line.end() + margin <= len(text):
                    places = [line.end()]
                    place = line.end() + size // 16 + 1
                elif block + 3 * size + margin <= len(text):
                    words = _WORD_END.finditer(text, block, block + 3 * size)
                    places = [word.end() for word in islice(words, _TRIES)]
                    block = place = block + 3 * size
                else:
                    break
                cut = next((one for one in places if self._can_cut(text, one, margin)), None)
                if cut is not None:
                    complete.append((text[max(0, start - margin) : start], text[start:cut]))
                    start, block, place = cut, cut + size, cut + size
                elif block - start > MAX_SEGMENT_CHARS:
                    raise UserError(
                        f"The text has {MAX_SEGMENT_CHARS:,} characters without a place where this tokenizer's tokens "
                        "would be the same if it were cut there; break it into lines."
                    )
            unneeded = max(0, start - margin)
            text, start, block, place = text[unneeded:], start - unneeded, block - unneeded, place - unneeded
            if complete:
                yield complete
        if start < len(text):
            yield [(text[:start], text[start:])]

    def _can_cut(self, text: str, place: int, margin: int) -> bool:
        """Whether the tokens of `text` stay the same if it is cut before the character `place`."""
        found = []
        for size in (margin, margin - 1):  # without a common divisor, for tokenizers that count characters
            before = text[max(0, place - size) : place]
            both = before + text[place : place + margin]
            ids, all_ids = self._encode_batch([before, both])
            words, all_words = self._words(before), self._words(both)
            joined, all_joined = "".join(words), "".join(all_words)
            if ids != all_ids[: len(ids)] or not (
                words == all_words[: len(words)]
                or (all_joined.startswith(joined) and self._never_merges(all_joined[len(joined) - 1 : len(joined) + 1]))
            ):
                return False
            found.append((all_ids[len(ids) :], all_words[len(words) :]))
        return found[0] == found[1]

    def _words(self, text: str) -> list[str]:
        """What `text` is split into before each part is encoded by itself."""
        normalizer, splitter = self.backend.normalizer, self.backend.pre_tokenizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        return [text] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(text)]

    def _never_merges(self, pair: str) -> bool:
        """Whether the model encodes a word that contains `pair` as if it were cut between these two characters."""
        model = self.backend.model
        if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
            return False
        known = model.byte_fallback or not model.fuse_unk or all(model.token_to_id(one) is not None for one in pair)
        return len(pair) == 2 and known and pair not in self._spellings

    @cached_property
    def _text_backend(self) -> tokenizers.Tokenizer:
        """The backend, or a copy with names that no text holds for the special tokens that its model would spell."""

        def is_spelled(token: str, number: int) -> bool:
            with suppress(Exception):  # some models cannot encode what they do not know
                return any(found.id == number for found in self.backend.model.tokenize(token))
            return False

        names = {token: f"{token} {secrets.token_hex()}" for token, i in self.special.items() if is_spelled(token, i)}
        renamed = rename_special_tokens(self.backend, names) if names else self.backend
        renamed.encode_special_tokens = True
        return renamed

    @cached_property
    def _spellings(self) -> str:
        """All tokens of the model's vocabulary, one after the other."""
        return "\0".join(self.backend.get_vocab(with_added_tokens=False))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of token ids; special tokens are left out, an incomplete character becomes U+FFFD."""
        return self.backend.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=True)

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json`, complete or not at all, and beside it the name of BOS where that is needed."""
        if self._names_bos:
            settings = {"bos_token": self.backend.id_to_token(self.bos)}
            write_text(Path(path).with_name(_SETTINGS[0]), json.dumps(settings, indent=2) + "\n")
        write_text(Path(path), self.backend.to_str(pretty=True))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tokenizer's canonical JSON; tokenizers with the same digest encode alike."""
        canonical = json.dumps(json.loads(self.backend.to_str()), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def rename_special_tokens(backend: tokenizers.Tokenizer, names: Mapping[str, str]) -> tokenizers.Tokenizer:
    """A copy of `backend` whose special tokens have other names, by their old ones, and the same ids.

    It is not enough to have special tokens ignored: some models have them in their vocabulary. The copy has no
    post-processor.
    """
    content = json.loads(backend.to_str()) | {"post_processor": None}
    for token in content["added_tokens"]:
        if name := names.get(token["content"]):
            token |= {"content": name, "normalized": False, "single_word": False}
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if names.keys().isdisjoint([*pair, "".join(pair)])]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def _named_bos(folder: Path) -> str | None:
    """The token that the settings in `folder` name as BOS, if they name one."""
    for name in _SETTINGS:
        token = read_json(folder / name).get("bos_token") if (folder / name).is_file() else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None
