"""The indexes of a notebook's passages: of their words (bm25s), and of their meaning if an embedding is given.

Both are kept in the folder of the notebook and rebuilt when text was added. Passages are given as `digests`, each of
which stands for its passage and all before it, and a function `text_of(i)` that reads passage i.

Shapes: N passages, D dimensions of the embedding.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path

Embed = Callable[[list[str]], np.ndarray]
"""Texts to vectors, float [texts, D], of any length: only their directions count."""

_VERSION = 1  # of the rules for words, and of the files
_EMBED_BATCH = 256
_RANK_OFFSET = 60  # of reciprocal rank fusion (Cormack, Clarke, Büttcher 2009): score = sum of 1 / (60 + rank)
_PROBE = ["Which embedding is this?"]

# A word, or a single character in scripts without spaces between words.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


def words(text: str) -> list[str]:
    """The words of a text, numbers included and punctuation not, as they are compared: regardless of case."""
    return _WORD.findall(text.casefold())


def word_index(folder: Path, digests: list[str], text_of: Callable[[int], str]) -> Any:
    """The bm25s index (method "lucene", k1 1.5, b 0.75) of at least one passage, from `folder` or rebuilt.

    Raises UserError if bm25s is missing.
    """
    try:
        import bm25s
    except ImportError as error:
        raise UserError('Searching a notebook needs bm25s: pip install "ttt-e2e[notebook]".') from error
    folder = folder / "index"
    about = {"version": _VERSION, "passages": len(digests), "digest": digests[-1]}
    try:
        saved = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        if saved == about | {"files": _files(folder)}:
            return bm25s.BM25.load(folder, show_progress=False)
    except (OSError, ValueError):
        pass  # missing or broken: rebuild it
    vocabulary = {"": 0}  # for passages without words: bm25s divides by their mean length
    ids = [[vocabulary.setdefault(w, len(vocabulary)) for w in words(text_of(i)) or [""]] for i in range(len(digests))]
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index((ids, vocabulary), show_progress=False)
    with atomic_path(folder) as part:
        index.save(part, show_progress=False)
        (part / "about.json").write_text(json.dumps(about | {"files": _files(part)}), encoding="utf-8")
    return index


def passage_vectors(
    folder: Path, digests: list[str], full: int, text_of: Callable[[int], str], embed: Embed
) -> np.ndarray:
    """Unit vectors of at least one passage, float32 [N, D].

    full: number of passages that will never change. Their vectors are kept in `folder`, and used again if `embed` is
    the same, which is tested on a fixed sentence. Raises UserError if `embed` does not return vectors.
    """
    path = folder / "vectors.safetensors"
    probe_1D = unit_vectors(embed, _PROBE)
    kept_ND = np.empty((0, probe_1D.shape[1]), np.float32)
    try:
        with safe_open(path, "np") as file:
            saved_ND, saved_1D = file.get_tensor("vectors"), file.get_tensor("probe")
            digest = (file.metadata() or {}).get("digest")
        fits = 0 < len(saved_ND) <= full and digests[len(saved_ND) - 1] == digest
        if fits and saved_1D.shape == probe_1D.shape and np.allclose(saved_1D, probe_1D, atol=1e-5):
            kept_ND = saved_ND
    except (SafetensorError, OSError):
        pass  # missing or broken: compute them
    parts = [kept_ND]
    for start in range(len(kept_ND), len(digests), _EMBED_BATCH):
        stop = min(start + _EMBED_BATCH, len(digests))
        parts.append(unit_vectors(embed, [text_of(i) for i in range(start, stop)]))
    all_ND = np.concatenate(parts)
    if len(kept_ND) < full:
        with atomic_path(path) as part:
            save_file({"vectors": all_ND[:full], "probe": probe_1D}, part, {"digest": digests[full - 1]})
    return all_ND


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


def _files(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of an index."""
    files = sorted(file for file in folder.iterdir() if file.name != "about.json")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
