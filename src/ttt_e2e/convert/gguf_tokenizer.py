"""The tokenizer of a GGUF file, as the files that a Hugging Face checkpoint has for it.

A GGUF file holds the vocabulary, and a byte-level BPE its merges. How a text is split into words before is only named,
by `tokenizer.ggml.pre`; the splits here are those of the tokenizer.json files that llama.cpp took the names from
(src/llama-vocab.cpp). What transformers makes of a GGUF file differs from these: it splits SmolLM's digits as GPT-2
does, has no NFC for Qwen, and no `ignore_merges` for Llama 3.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.model.checkpoint import GENERATION, TOKENIZER, TOKENIZER_CONFIG

# Values of tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
# llama.cpp ends a text at a token with one of these names, too; files name the end of an answer alone.
_END_NAMES = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


class _Split(NamedTuple):
    """How a byte-level BPE splits a text into words."""

    pattern: str | None
    """A word. None: the words of GPT-2."""
    lone_digits: bool = False
    """Every digit is cut off before."""
    nfc: bool = False
    """The text is normalised before."""
    ignore_merges: bool = False
    """A word that is a token is that token, whatever the merges are."""
    begins: bool = False
    """A text begins with BOS, if the file does not say."""


def _words(digits: str) -> str:
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


_GPT2 = _Split(None)
_SMOLLM = _Split(None, lone_digits=True)
_LLAMA3 = _Split(_words(r"\p{N}{1,3}"), ignore_merges=True, begins=True)
_QWEN2 = _Split(_words(r"\p{N}"), nfc=True)
_TEKKEN = _Split(
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    ignore_merges=True,
    begins=True,
)
_SPLITS = {
    "gpt-2": _GPT2,
    **dict.fromkeys(("smollm", "starcoder", "refact"), _SMOLLM),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _LLAMA3._replace(ignore_merges=False, begins=False)),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2._replace(nfc=False),
    "tekken": _TEKKEN,
}


def write_tokenizer(metadata: dict[str, Any], folder: Path, path: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json of the GGUF file `path` to `folder`.

    Raises UserError if the metadata lack a tokenizer, if it is damaged, or if it is of an unknown kind.
    """
    read = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    tokens = read.get("tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{path} has no tokenizer; give a file of the same model that has one.")
    kinds = read.get("token_type", [_NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise UserError(f"{path} is damaged: the lists of its tokenizer do not belong together; use an unaltered copy.")
    # Ids that only round up the size of the vocabulary.
    used = max((i for i, kind in enumerate(kinds) if kind != _UNUSED), default=-1) + 1
    tokens, kinds = tokens[:used], kinds[:used]

    def named(name: str) -> int | None:
        i = read.get(f"{name}_token_id")
        return i if isinstance(i, int) and 0 <= i < len(tokens) else None

    bos, ends = named("bos"), [named(name) for name in ("eos", "eot", "eom")]
    special = {i for i in (bos, *ends) if i is not None}
    special |= {i for i, kind in enumerate(kinds) if kind in (_UNKNOWN, _CONTROL)}
    try:
        backend = _backend(read, tokens, kinds, special, bos, path)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is damaged: its tokenizer does not work ({error}); use an unaltered copy.") from error
    backend.save(str(folder / TOKENIZER))
    # It is checked here because whoever loads the file cannot name `path`.
    Tokenizer(backend, f"The tokenizer of {path}", None if bos is None else tokens[bos])

    names = {"bos": bos, "eos": ends[0], "unk": named("unknown"), "pad": named("padding")}
    settings: dict[str, Any] = {f"{name}_token": tokens[i] for name, i in names.items() if i is not None}
    settings |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        settings["chat_template"] = template
    _write_json(folder / TOKENIZER_CONFIG, settings)
    all_ends = dict.fromkeys([*ends, *(i for i in sorted(special) if tokens[i] in _END_NAMES)])
    ids = {f"{name}_token_id": names[name] for name in ("bos", "pad") if names[name] is not None}
    _write_json(folder / GENERATION, ids | {"eos_token_id": [i for i in all_ends if i is not None]})


def _backend(
    read: dict[str, Any], tokens: list[str], kinds: list[int], special: set[int], bos: int | None, path: Path
) -> tokenizers.Tokenizer:
    is_byte_level = read.get("model") == "gpt2"
    backend = _byte_level(read, tokens, path) if is_byte_level else _llama(read, tokens, kinds, path)
    backend.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in sorted(special)])
    others = [i for i, kind in enumerate(kinds) if kind == _USER_DEFINED and i not in special]
    backend.add_tokens([AddedToken(tokens[i], special=False, normalized=False) for i in others])
    begins = _SPLITS[read["pre"]].begins if is_byte_level else True
    if read.get("add_bos_token", begins) and bos is not None:
        begin = tokens[bos]
        backend.post_processor = processors.TemplateProcessing(
            single=[begin, "$A"], pair=[begin, "$A", begin, "$B"], special_tokens=[(begin, bos)]
        )
    return backend


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _byte_level(read: dict[str, Any], tokens: list[str], path: Path) -> tokenizers.Tokenizer:
    """A byte-level BPE, as of GPT-2, Llama 3 and Qwen."""
    split = _SPLITS.get(read.get("pre", ""))
    if split is None:
        raise UserError(
            f"{path} splits texts into words by {read.get('pre', 'no')!r} rules, which are not known here; convert the "
            "original checkpoint, with `ttt-e2e convert from-hf`, or a newer file."
        )
    backend = tokenizers.Tokenizer(
        models.BPE(_ids(tokens), _pairs(read.get("merges", ())), ignore_merges=split.ignore_merges)
    )
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    before: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.lone_digits else []
    if split.pattern is not None:
        before.append(pre_tokenizers.Split(Regex(split.pattern), "isolated"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _llama(read: dict[str, Any], tokens: list[str], kinds: list[int], path: Path) -> tokenizers.Tokenizer:
    """A BPE of SentencePiece, as of Llama 2 and Mistral: characters, with bytes for those that are no tokens."""
    if read.get("model") != "llama":
        raise UserError(
            f"{path} has a tokenizer of the kind {read.get('model')!r}; only gpt2 and llama can be converted."
        )
    merges = _pairs(read["merges"]) if "merges" in read else _merges_by_score(tokens, kinds, read["scores"])
    unknown = read.get("unknown_token_id", 0)
    backend = tokenizers.Tokenizer(
        models.BPE(_ids(tokens), merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    has_prefix = read.get("add_space_prefix", True)
    escape = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), escape]) if has_prefix else escape
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if has_prefix else parts)
    return backend


def _ids(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _pairs(merges: Iterable[str]) -> list[tuple[str, str]]:
    return [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]


def _merges_by_score(tokens: list[str], kinds: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece has no list of merges: of two neighbours that are a token together, the best token is merged."""
    known = {token: i for i, token in enumerate(tokens) if kinds[i] == _NORMAL}
    found = []
    for token, i in known.items():
        for at in range(1, len(token)):
            if token[:at] in known and token[at:] in known:
                found.append((-scores[i], i, token[:at], token[at:]))
    return [(left, right) for _, _, left, right in sorted(found)]
