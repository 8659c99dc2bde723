"""Tokenizers of Hugging Face checkpoints: texts read and written by converted models, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from hf_helpers import CASES, SHAPE, Pretrained, convert, logits
from tokenizers import decoders, models, pre_tokenizers

from ttt_e2e.convert.from_hf import convert_from_hf, describe
from ttt_e2e.convert.learning import LearningOptions
from ttt_e2e.errors import UserError
from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.session import Session

transformers = pytest.importorskip("transformers", reason="transformers, which writes the checkpoints, is missing")


def bpe(specials: list[str]) -> tokenizers.Tokenizer:
    """Bytes as tokens, as Llama 3 and Qwen have them, and special ones after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    return backend


@pytest.mark.parametrize(
    ("name", "specials", "bos"),
    [
        ("llama, tied, llama3", ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|begin_of_text|>"),
        ("qwen2, tied", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|endoftext|>"),
        ("llama", ["<s>", "</s>"], "<s>"),
        ("gemma3, windows in some layers", ["<pad>", "<eos>", "<bos>", "<end_of_turn>"], "<bos>"),
    ],
)
def test_converted_model_reads_and_writes_texts(tmp_path: Path, name: str, specials: list[str], bos: str) -> None:
    """With a vocabulary rounded up, as Qwen's is: the rows that no token names are left out."""
    family, changes, _ = CASES[name]
    backend, folder = bpe(specials), tmp_path / "checkpoint"
    size = backend.get_vocab_size()
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}ForCausalLM")
    theirs = kind(kind.config_class(**{**SHAPE, **changes, "vocab_size": size + 13})).eval()
    theirs.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": "{{ messages[0]['content'] }}", "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    window = changes.get("sliding_window", 64)
    done = convert_from_hf(folder, tmp_path / "out", LearningOptions(sliding_window=window, mini_batch_size=8))
    assert done.has_tokenizer and done.unused_ids == 13 and "13 ids" in " ".join(describe(done))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    model, tokenizer = load_model(tmp_path / "out", "cpu")
    assert tokenizer.bos == backend.token_to_id(bos)
    ids = torch.from_numpy(tokenizer.encode(f"A Straße, {bos} and back."))[None]
    assert backend.token_to_id(bos) not in ids
    with torch.no_grad():
        expected = theirs(ids).logits
    assert (logits(model, ids) - expected[..., :size])[:, :window].abs().max() < 1e-4
    session = Session(model, tokenizer)
    session.read("It rained all night. " * 4)
    assert session.info().text_bytes == 84
    written = list(Session(model, tokenizer).generate_tokens("And so", max_tokens=4, temperature=0.0))
    text = [tokenizer.bos, *tokenizer.encode("And so").tolist()]
    for token in written:
        with torch.no_grad():
            assert token == theirs(torch.tensor([text])).logits[0, -1, :size].argmax()
        text.append(token)
    assert len(written) == 4


def test_missing_tokenizer_is_reported(pretrained: Pretrained, tmp_path: Path) -> None:
    done = convert_from_hf(pretrained("llama")[1], tmp_path / "out")
    assert not done.has_tokenizer and "no tokenizer.json" in describe(done)[-1]


def test_tokenizers_that_do_not_fit_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    backend = bpe(["<s>"])
    backend.save(str(checkpoint / "tokenizer.json"))
    with pytest.raises(UserError, match="has 257 tokens, but its model has a vocabulary of 96"):
        convert(checkpoint, tmp_path)
    bpe([]).save(str(checkpoint / "tokenizer.json"))
    with pytest.raises(UserError, match="no token that begins a document"):
        convert(checkpoint, tmp_path)


def test_tokens_without_an_embedding_are_refused_in_a_text_alone(pretrained: Pretrained, tmp_path: Path) -> None:
    """The checkpoint loads in transformers, too, and there such a token is an index out of range."""
    theirs, folder = pretrained("llama")
    folder = Path(shutil.copytree(folder, tmp_path / "checkpoint"))
    backend = tokenizers.Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(["<s>", *map(chr, range(32, 127))])}, [])
    )
    backend.add_special_tokens(["<s>"])
    backend.add_tokens(["<extra>"])
    backend.add_special_tokens(["<pad>"])
    backend.save(str(folder / "tokenizer.json"))
    model, tokenizer = load_model(convert(folder, tmp_path))
    ids = tokenizer.encode("A text.")
    with torch.no_grad():
        assert (
            logits(model, torch.from_numpy(ids)[None]) - theirs(torch.from_numpy(ids)[None]).logits
        ).abs().max() < 1e-4
    assert model.config.vocab_size == tokenizer.vocab_size == 96
    session = Session(model, tokenizer)
    session.read("A text. " * 9)
    for text in ("A <extra> text", [backend.token_to_id("<pad>")]):
        with pytest.raises(UserError, match=r"'<extra>', of which the model has no embedding|from 0 to 95"):
            session.read(text)
