"""What the passages of a notebook are searched by: their words, and their meaning if an embedding is given.

Words are made here and not by a tokenizer of SQLite, so that they are the same with each of its versions. They are
compared regardless of case, accents and typographic forms. In scripts without spaces between words, every character
is indexed together with the next one; so a query of any length is found as consecutive entries of the index.

Shapes: N passages, D dimensions of the embedding.
"""

import re
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ttt_e2e.errors import UserError

Embed = Callable[[list[str]], np.ndarray]
"""Texts to vectors, float [texts, D], of any length: only their directions count."""

PROBE = ["Which embedding is this?"]  # its vector tells one embedding from another
_RANK_OFFSET = 60  # of reciprocal rank fusion (Cormack, Clarke, Büttcher 2009): score = sum of 1 / (60 + rank)

# Letters of Thai, Lao, Burmese, Korean and Khmer, of Japanese and Chinese, in this order of Unicode.
_NO_SPACES = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0edf\u1000-\u1049\u1050-\u109f\u1100-\u11ff\u1780-\u17d3\u17dc\u17dd"
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff"
)
# Marks are part of a word: Python's \w lacks them, and would cut words of Hindi and Tamil at their vowels.
_MARKS = re.sub(
    f"[{_NO_SPACES}]", "", "".join(c for c in map(chr, range(0x1_0000)) if unicodedata.category(c).startswith("M"))
)
_RUN = re.compile(f"[{_NO_SPACES}]+")
_WORD = re.compile(rf"[^\W_{_NO_SPACES}]+(?:[{_MARKS}]+[^\W_{_NO_SPACES}]*)*|{_RUN.pattern}")
# Accents, points of Hebrew, vowel signs of Arabic, and characters that show nothing.
_IGNORED = re.compile(
    "[\u0300-\u036f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u064b-\u065f\u0670"
    "\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f\u00ad\u200b-\u200f\u2060\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]"
)
_NOT_DECOMPOSED = str.maketrans(
    {"ł": "l", "ø": "o", "đ": "d", "ħ": "h", "ŧ": "t", "ı": "i", "æ": "ae", "œ": "oe"}
)  # by Unicode; casefold makes "ss" of "ß"


def index_words(text: str) -> str:
    """The words of a text as they are indexed, separated by spaces.

    A run of a script without spaces becomes its pairs of characters, each beginning one further, and its last one:
    "abcd" would become "ab bc cd d".
    """
    return " ".join(_WORD.findall(_RUN.sub(lambda run: f" {_pairs(run[0])} {run[0][-1]} ", _fold(text))))


def match_expression(query: str) -> str:
    """What FTS5 is asked for, to find passages with any word of `query`; "" if there is none.

    Whatever `query` holds is a word or is left out; nothing in it is syntax. A run of a script without spaces is one
    word, found inside longer runs too.
    """
    return " OR ".join(map(_match_word, dict.fromkeys(_WORD.findall(_fold(query)))))


def _match_word(word: str) -> str:
    if not _RUN.match(word):
        return f'"{word}"'
    if len(word) == 1:
        return f'"{word}" *'  # every entry that begins with it
    return f'"{_pairs(word)}"'  # these entries, one after the other


def with_parts(query: str) -> str:
    """`query` and, after it, all pairs of characters in its runs of scripts without spaces.

    Such a run may be a whole sentence, which no passage repeats; passages that share a part of it are found as well.
    """
    return " ".join([query, *map(_pairs, _RUN.findall(_fold(query)))])


def _fold(text: str) -> str:
    """The text as it is compared, regardless of case, accents and typographic forms."""
    text = _IGNORED.sub("", unicodedata.normalize("NFKD", text)).casefold().translate(_NOT_DECOMPOSED)
    return unicodedata.normalize("NFC", text)


def _pairs(run: str) -> str:
    return " ".join(run[i : i + 2] for i in range(len(run) - 1))


def pack_vector(vector_D: np.ndarray) -> bytes:
    """A float32 vector as bytes with a checksum."""
    data = vector_D.astype("<f4").tobytes()
    return zlib.crc32(data).to_bytes(4, "little") + data


def unpack_vector(packed: object) -> np.ndarray | None:
    """The vector that `pack_vector` has packed; None if it was altered, or if there is none."""
    if not isinstance(packed, bytes) or zlib.crc32(packed[4:]).to_bytes(4, "little") != packed[:4]:
        return None
    return np.frombuffer(packed, "<f4", offset=4)


def unit_vectors(embed: Embed, texts: list[str]) -> np.ndarray:
    """The embedding of texts, normalized, float32 [texts, D]. Raises UserError if it has another shape."""
    vectors_ND = np.asarray(embed(texts), np.float32)
    if vectors_ND.ndim != 2 or len(vectors_ND) != len(texts):
        raise UserError(
            f"The embedding gave an array {list(vectors_ND.shape)} for {len(texts)} texts; "
            f"it must be [{len(texts)}, D], one row per text."
        )
    return vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12)


def reciprocal_ranks(scores_N: np.ndarray) -> np.ndarray:
    """1 / (60 + rank) for each positive score, the best having rank 1; 0 for the others. Their sums fuse rankings."""
    ranks_N = np.empty(len(scores_N))
    ranks_N[np.argsort(-scores_N, kind="stable")] = np.arange(1, len(scores_N) + 1)
    return np.where(scores_N > 0, 1 / (_RANK_OFFSET + ranks_N), 0.0)


def fuse(rows: list[tuple[int, bytes]], word_scores: dict[int, float], query_D: np.ndarray) -> dict[int, float] | None:
    """The scores of passages by words and by meaning together; None if a vector was altered.

    rows: the number of each passage, and its packed vector.
    """
    if not rows:
        return word_scores
    vectors = [unpack_vector(vector) for _, vector in rows]
    vectors_ND = np.array([one_D for one_D in vectors if one_D is not None and one_D.shape == query_D.shape])
    if len(vectors_ND) < len(rows):
        return None
    by_words_N = np.array([word_scores.get(number, 0.0) for number, _ in rows])
    scores_N = reciprocal_ranks(by_words_N) + reciprocal_ranks(vectors_ND @ query_D)
    return {number: float(score) for (number, _), score in zip(rows, scores_N, strict=True) if score > 0}


def load_embed(folder: Path) -> Embed:
    """The embedding that the library model2vec has saved in `folder`; nothing is downloaded.

    Raises UserError if model2vec is missing, or if the folder holds no embedding.
    """
    try:
        from model2vec import StaticModel
    except ImportError as error:
        raise UserError('Embeddings need model2vec: pip install "ttt-e2e[embeddings]".') from error
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder} holds no embedding; give a folder that model2vec has saved.")
    try:
        return StaticModel.from_pretrained(folder).encode
    except Exception as error:  # the library documents none
        raise UserError(
            f"{folder} is not an embedding of model2vec ({error}); give a folder that it has saved."
        ) from error
