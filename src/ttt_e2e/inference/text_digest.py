"""Digest, size and kind of the text that a session has read."""

import hashlib
from typing import NamedTuple

import numpy as np
from tokenizers import decoders

from ttt_e2e.data.tokenizer import Tokenizer


class TextDigest(NamedTuple):
    """A digest of tokens, how many bytes of text they are, and whether they hold a chat: a value, which can be saved.

    The digest is a chain, since the state of a hash object cannot be saved: each link is the SHA-256 of the link before
    and of the next `link` tokens (int64, little-endian). So what is added must be whole links, except for the last.
    """

    digest: bytes = b""
    bytes: int = 0
    chat: bool = False  # such as begins once, with a system message
    tools: str = ""  # a digest of the functions that the chat has named to the model last

    def add(self, ids: np.ndarray, link: int, sizes: np.ndarray | None) -> "TextDigest":
        """The digest with more tokens, `link` of them hashed together. sizes: see `token_bytes`; None counts 0."""
        digest = self.digest
        for start in range(0, len(ids), link):
            digest = hashlib.sha256(digest + ids[start : start + link].astype("<i8").tobytes()).digest()
        return self._replace(digest=digest, bytes=self.bytes + (0 if sizes is None else int(sizes[ids].sum())))


def token_bytes(tokenizer: Tokenizer) -> np.ndarray | None:
    """How many bytes of text each token is, [V]; None for a tokenizer whose tokens are not made of bytes."""
    backend = tokenizer.backend
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    # Such a tokenizer writes every byte as one character. Added tokens are written in plain text, if at all.
    sizes = np.array([len(backend.id_to_token(i) or "") for i in range(tokenizer.vocab_size)])
    for i, added in backend.get_added_tokens_decoder().items():
        if i < len(sizes):
            sizes[i] = 0 if added.special else len(added.content.encode())
    return sizes
