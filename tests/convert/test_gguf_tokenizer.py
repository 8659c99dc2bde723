"""Tokenizers of GGUF files, held against plain loops over the same vocabulary."""

import json
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, trainers

pytest.importorskip("gguf", reason="gguf, which writes the files, is missing")
regex = pytest.importorskip("regex", reason="regex, which splits words by Unicode's classes, is missing")

from gguf_helpers import SPECIAL, TEXT, vocabulary  # noqa: E402

from ttt_e2e.convert.gguf_tokenizer import write_tokenizer  # noqa: E402
from ttt_e2e.data.tokenizer import Tokenizer  # noqa: E402
from ttt_e2e.errors import UserError  # noqa: E402
from ttt_e2e.inference.load import end_tokens  # noqa: E402

# As the tokenizer.json files of GPT-2, Llama 3, Qwen 2.5 and Mistral Nemo have them.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {
    "gpt-2": GPT2,
    "smollm": GPT2,
    "llama-bpe": LLAMA3,
    "qwen2": LLAMA3.replace("{1,3}", ""),
    "tekken": TEKKEN,
}
MIXED = st.text(st.sampled_from(TEXT + "'sS \n\r\t  09é\u0301ǅʰ1２"), max_size=60) | st.text(max_size=20)


def entries(pre: str = "smollm", **changes: Any) -> dict[str, Any]:
    """The metadata of a byte-level BPE. Its last token, zebra with a space, is no result of its merges."""
    tokens, merges = vocabulary(420)
    tokens = [*tokens, "Ġzebra"]
    kinds = [3 if token in SPECIAL else 1 for token in tokens]
    found = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges, "bos_token_id": 0}
    return {f"tokenizer.ggml.{name}": value for name, value in (found | changes).items()}


def load(metadata: dict[str, Any], folder: Path) -> Tokenizer:
    write_tokenizer(metadata, folder, Path("model.gguf"))
    return Tokenizer.load(folder)


def spellings() -> dict[int, str]:
    """GPT-2's characters for bytes: printable ones for themselves, then those from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def plain_bpe(text: str, metadata: dict[str, Any]) -> list[int]:
    """Words by the pattern, and in each the merge that comes first in the list, until there is none."""
    pre = metadata["tokenizer.ggml.pre"]
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    spelled = spellings()
    parts = regex.split(r"(\p{N})", text) if pre == "smollm" else [text]
    found = []
    for word in (word for part in parts for word in regex.findall(WORDS[pre], part)):
        symbols = [spelled[byte] for byte in word.encode()]
        if pre in ("llama-bpe", "tekken") and "".join(symbols) in ids:
            symbols = ["".join(symbols)]
        while pairs := [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]:
            _, i = min(pairs)
            symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
        found += [ids[symbol] for symbol in symbols]
    return found


@pytest.mark.parametrize("pre", WORDS)
def test_byte_level_tokens_are_those_of_a_plain_loop(tmp_path_factory: pytest.TempPathFactory, pre: str) -> None:
    metadata = entries(pre)
    tokenizer = load(metadata, tmp_path_factory.mktemp("tokenizer"))

    @settings(max_examples=60, deadline=None)
    @given(MIXED)
    @example(TEXT)
    @example(" zebra zebras 12345 I'LL e\u0301 AbC,\n\n  x")
    def check(text: str) -> None:
        normal = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        assert tokenizer.encode(text).tolist() == plain_bpe(normal, metadata)
        assert tokenizer.decode(tokenizer.encode(text)) == normal

    check()


def test_each_split_gives_other_tokens(tmp_path: Path) -> None:
    text = TEXT + " zebra I'LL e\u0301 AbC,\n\n  x"
    found = []
    for pre in WORDS:
        (tmp_path / pre).mkdir()
        found.append(tuple(load(entries(pre), tmp_path / pre).encode(text)))
    assert len(set(found)) == len(WORDS)


@pytest.mark.parametrize("has_merges", [True, False])
def test_sentencepiece_tokens_are_those_of_the_tokenizer_that_was_written(tmp_path: Path, has_merges: bool) -> None:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    names = ["<unk>", "<s>", "</s>", *bytes_]
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=names, show_progress=False, max_token_length=6)
    backend.train_from_iterator([TEXT * 2], trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    # SentencePiece has the pieces of merges first, by score, and then the characters.
    merged = ["".join(pair) for pair in model["merges"]]
    assert len(set(merged)) == len(merged)  # each piece is made in one way, so scores say all
    ranks = {token: i for i, token in enumerate(merged)}
    metadata: dict[str, Any] = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)],
        "scores": [-float(ranks.get(token, len(tokens))) for token in tokens],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    if has_merges:
        metadata["merges"] = [" ".join(pair) for pair in model["merges"]]
    ours = load({f"tokenizer.ggml.{name}": value for name, value in metadata.items()}, tmp_path)
    backend = tokenizers.Tokenizer.from_str(  # the bytes are no special tokens, but found when a character is unknown
        json.dumps(json.loads(backend.to_str()) | {"added_tokens": []})
    )
    for text in (TEXT, "  two spaces", "zebra 日本 12", "", "\n"):
        assert ours.encode(text).tolist() == backend.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos, ours.special) == (1, {"<unk>": 0, "<s>": 1, "</s>": 2})
    post = json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"]
    assert post["single"][0] == {"SpecialToken": {"id": "<s>", "type_id": 0}}


def test_end_ids_are_all_that_the_file_names_and_the_usual_ones(tmp_path: Path) -> None:
    metadata = entries("llama-bpe", bos_token_id=0, eos_token_id=2, eot_token_id=7, eom_token_id=9)
    tokenizer = load(metadata, tmp_path)
    assert end_tokens(tmp_path, tokenizer) == {0, 2, 7, 9}
    metadata["tokenizer.ggml.bos_token_id"] = 1
    tokenizer = load(metadata, tmp_path)
    assert tokenizer.bos == 1 and end_tokens(tmp_path, tokenizer) == {0, 1, 2, 7, 9}  # 0 is <|endoftext|>


def test_tokens_that_are_added_are_found_in_texts_unless_special(tmp_path: Path) -> None:
    metadata = entries()
    metadata["tokenizer.ggml.tokens"].append("<think>")
    metadata["tokenizer.ggml.token_type"].append(4)
    tokenizer = load(metadata, tmp_path)
    assert tokenizer.encode("a<think>").tolist() == [*plain_bpe("a", metadata), tokenizer.vocab_size - 1]
    assert "<think>" not in tokenizer.special
    assert tokenizer.encode("<|im_end|>").tolist() == plain_bpe("<|im_end|>", metadata)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre": "poro-chat"}, "by 'poro-chat' rules, which are not known here; convert the original"),
        ({"pre": "default"}, "by 'default' rules"),
        ({"model": "bert"}, "a tokenizer of the kind 'bert'"),
        ({"model": "llama"}, "is damaged: its tokenizer does not work"),
        ({"tokens": None}, "has no tokenizer"),
        ({"token_type": [1]}, "lists of its tokenizer do not belong together"),
        ({"tokens": ["a"] * 421}, "lists of its tokenizer do not belong together"),
        ({"merges": ["nowhere land"]}, "is damaged: its tokenizer does not work"),
        ({"merges": 3}, "is damaged: its tokenizer does not work"),
        ({"pre": ["smollm"]}, "is damaged: its tokenizer does not work"),
    ],
)
def test_tokenizers_that_do_not_work_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    if "model" in changes:
        changes["scores"] = None
    if changes.get("model") == "llama":
        changes["unknown_token_id"] = 10_000
    with pytest.raises(UserError, match=words) as caught:
        load(entries(**changes), tmp_path)
    assert "model.gguf" in str(caught.value) and not any(tmp_path.iterdir())


def test_a_tokenizer_without_bos_is_refused_by_the_name_of_the_file(tmp_path: Path) -> None:
    metadata = entries(bos_token_id=9999)
    metadata["tokenizer.ggml.tokens"][0] = "<other>"
    with pytest.raises(UserError, match=r"The tokenizer of model\.gguf has no token that begins a document"):
        load(metadata, tmp_path)
