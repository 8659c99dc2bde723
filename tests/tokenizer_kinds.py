"""Tokenizers of all kinds, small, as the families of pretrained models have them."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = (
    "The street was still wet; the rain had stopped, again and again.\n\nA bird sang  in the tree's crown (1,234 times)"
    "\r\n    x = foo_bar(12) + 3\n\tIt's Straße 42, naïve café. 雨が降る。雨。 Ωμέγα! http://a.b/c?d=e\n"
)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
GPT4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SP_SPECIALS = ["<unk>", "<s>", "</s>"]
SP_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _trained(
    model: Any,
    trainer: Any,
    normalizer: Any = None,
    splitter: Any = None,
    decoder: Any = None,
    added: Sequence[str | AddedToken] = (),
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if splitter is not None:
        backend.pre_tokenizer = splitter
    if decoder is not None:
        backend.decoder = decoder
    backend.train_from_iterator([TEXT] * 2, trainer)
    backend.add_tokens(list(added))
    return backend


def _bytes(splitter: Any, added: Sequence[str | AddedToken] = (), normalizer: Any = None) -> tokenizers.Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|bos|>"], initial_alphabet=alphabet, show_progress=False
    )
    return _trained(models.BPE(), trainer, normalizer, splitter, decoders.ByteLevel(), added)


def _split(pattern: str, behavior: str = "isolated") -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior), byte_level])


def _pieces(normalizer: Any, splitter: Any, decoder: Any, byte_fallback: bool = True) -> tokenizers.Tokenizer:
    """A BPE like those of sentencepiece."""
    specials = SP_SPECIALS + (SP_BYTES if byte_fallback else [])
    trainer = trainers.BpeTrainer(vocab_size=len(specials) + 90, special_tokens=specials, show_progress=False)
    model = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback)
    backend = tokenizers.Tokenizer(_trained(model, trainer, normalizer, splitter).model)  # bytes are no added tokens
    if normalizer is not None:
        backend.normalizer = normalizer
    if splitter is not None:
        backend.pre_tokenizer = splitter
    backend.decoder = decoder
    backend.add_special_tokens(SP_SPECIALS)
    return backend


def _unigram(splitter: Any, normalizer: Any = None) -> tokenizers.Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=SP_SPECIALS, unk_token="<unk>", show_progress=False)
    return _trained(models.Unigram(), trainer, normalizer, splitter, decoders.Metaspace())


def _llama2_decoder() -> Any:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def _word_pieces(normalizer: Any) -> tokenizers.Tokenizer:
    specials = ["[UNK]", "[CLS]", "[SEP]", "[BOS]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=specials, show_progress=False)
    splitter = pre_tokenizers.BertPreTokenizer()
    return _trained(models.WordPiece(unk_token="[UNK]"), trainer, normalizer, splitter, decoders.WordPiece())


def _suffixed() -> tokenizers.Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>"], end_of_word_suffix="</w>", show_progress=False
    )
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True)])
    return _trained(
        models.BPE(unk_token="<unk>", end_of_word_suffix="</w>", fuse_unk=True),
        trainer,
        normalizers.Lowercase(),
        splitter,
        decoders.BPEDecoder("</w>"),
    )


def _words() -> tokenizers.Tokenizer:
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>"], show_progress=False)
    return _trained(models.WordLevel(unk_token="<unk>"), trainer, None, pre_tokenizers.Whitespace())


def _runs(*flags: str) -> list[AddedToken]:
    """Added tokens that are ordinary text: runs of spaces and line ends, and words."""
    contents = ["  ", "    ", "\n\n", "\n\tIt", "street was", "<tag>", "the"]
    return [AddedToken(content, **dict.fromkeys(flags, True)) for content in contents]


def _metaspace(scheme: str, split: bool) -> tuple[Any, Any]:
    splitter = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    own = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme, split=split)]
    return splitter, decoders.Sequence(own)


@cache
def kinds() -> dict[str, tokenizers.Tokenizer]:
    """Tokenizers by the kind that they are of; all have a BOS."""
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    replace = normalizers.Replace(" ", "▁")
    found = {
        "gpt2": _bytes(GPT2),
        "roberta": _bytes(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "gpt4": _bytes(_split(GPT4)),
        "smollm": _bytes(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), GPT2])),
        "qwen": _bytes(_split(GPT4), normalizer=normalizers.NFC()),
        "bytes without words": _bytes(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        "words of a fixed length": _bytes(_split(r"(?m:.{4})")),
        "gpt-neox": _bytes(GPT2, _runs("normalized")),
        "added tokens": _bytes(_split(GPT4), _runs()),
        "added tokens that strip": _bytes(_split(GPT4), _runs("lstrip", "rstrip")),
        "added words": _bytes(_split(GPT4), _runs("single_word")),
        "strip": _bytes(_split(GPT4), normalizer=normalizers.Strip()),
        "replaced runs": _bytes(_split(GPT4), normalizer=normalizers.Replace(Regex(r"\s{2,}"), " ")),
        "llama2": _pieces(prepend, None, _llama2_decoder()),
        "llama2 with added tokens": _pieces(prepend, None, _llama2_decoder()),
        "llama2 without bytes": _pieces(prepend, None, _llama2_decoder(), byte_fallback=False),
        "gemma": _pieces(
            replace,
            pre_tokenizers.Split(" ", "merged_with_previous"),
            decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        ),
        "unigram": _unigram(pre_tokenizers.Metaspace(), normalizers.NFKC()),
        "unigram without words": _unigram(pre_tokenizers.Metaspace(split=False)),
        "t5": _unigram(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])),
        "bert": _word_pieces(normalizers.BertNormalizer()),
        "bert cased": _word_pieces(normalizers.BertNormalizer(lowercase=False)),
        "gpt": _suffixed(),
        "words": _words(),
    }
    for scheme in ("always", "first", "never"):
        for split in (True, False):
            splitter, decoder = _metaspace(scheme, split)
            found[f"metaspace {scheme} {split}"] = _pieces(None, splitter, decoder)
    found["llama2 with added tokens"].add_tokens(_runs())
    found["metaspace first and added tokens"] = _pieces(None, *_metaspace("first", False))
    found["metaspace first and added tokens"].add_tokens(_runs())
    found["metaspace always and added tokens"] = _pieces(None, *_metaspace("always", True))
    found["metaspace always and added tokens"].add_tokens(_runs())
    return found
