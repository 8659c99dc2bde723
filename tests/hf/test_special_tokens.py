"""Special tokens and settings of a tokenizer that came from transformers, and goes back there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import kinds

pytest.importorskip("transformers", reason="the transformers library is not installed")

import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import ttt_e2e.hf
from ttt_e2e.convert.from_hf import convert_from_hf
from ttt_e2e.convert.learning import LearningOptions
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.hf.export import convert_to_hf
from ttt_e2e.inference.load import load_model
from ttt_e2e.model.checkpoint import PRETRAINED_METADATA

LLAMA2 = "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]{{ eos_token }}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ANGLE = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "__type": "AddedToken"}
# name: the kind of tokenizer, its special tokens, its settings, whether it begins a text with BOS, ends of a generation
FAMILIES: dict[str, tuple[str, list[str], dict[str, Any], bool, Any]] = {
    "llama2": (
        "llama2",
        [],
        {"bos_token": {**ANGLE, "content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
        | {"add_bos_token": True, "add_eos_token": False, "model_max_length": 4096, "padding_side": "right"},
        True,
        2,
    ),
    "mistral": (
        "metaspace first False",
        ["[INST]", "[/INST]"],
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": ["[INST]"]},
        True,
        2,
    ),
    "llama3": (
        "gpt4",
        ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "model_input_names": ["input_ids"]},
        True,
        [331, 332],
    ),
    "qwen": (
        "qwen",
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
        | {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "split_special_tokens": False},
        False,
        [330, 332],
    ),
    "smollm": (
        "smollm",
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
        }
        | {"chat_template": CHATML},
        False,
        332,
    ),
    "bert-like": (
        "bert",
        ["[PAD]", "[MASK]"],
        {"bos_token": "[BOS]", "eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
        | {"sep_token": "[SEP]", "mask_token": "[MASK]"},
        False,
        None,
    ),
}


def checkpoint(family: str, folder: Path) -> Path:
    """A small Llama with the tokenizer of a family."""
    kind, specials, settings, begins, ends = FAMILIES[family]
    backend = Backend.from_str(kinds()[kind].to_str())
    backend.add_special_tokens(specials)
    if begins:
        bos = settings["bos_token"] if isinstance(settings["bos_token"], str) else "<s>"
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=max(backend.get_vocab().values()) + 1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=ends)
    model.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    full = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(full))
    if "chat_template" not in settings:
        (folder / "chat_template.jinja").write_text(LLAMA2)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path, Path]:
    """A family, its checkpoint, that as a model of ours, and this written for transformers again."""
    where = tmp_path_factory.mktemp("family")
    folder = checkpoint(request.param, where / "theirs")
    convert_from_hf(folder, where / "ours", LearningOptions(sliding_window=32, mini_batch_size=8))
    convert_to_hf(where / "ours", where / "back")
    return request.param, folder, where / "ours", where / "back"


def test_special_tokens_and_settings_survive(both: tuple[str, Path, Path, Path]) -> None:
    _, theirs, ours, back = both
    before, after = AutoTokenizer.from_pretrained(theirs), AutoTokenizer.from_pretrained(back)
    assert after.special_tokens_map == before.special_tokens_map
    assert after.all_special_tokens == before.all_special_tokens and after.all_special_ids == before.all_special_ids
    assert after.get_added_vocab() == before.get_added_vocab()
    names = ("model_max_length", "split_special_tokens", "chat_template", "clean_up_tokenization_spaces")
    for name in names:
        assert getattr(after, name) == getattr(before, name), name
    assert after.padding_side == json.loads((theirs / "tokenizer_config.json").read_text()).get("padding_side", "left")
    talk = [{"role": "user", "content": "The street was still wet."}]
    for tokenize in (True, False):
        shown = [one.apply_chat_template(talk, tokenize=tokenize, return_dict=False) for one in (before, after)]
        assert shown[0] == shown[1]
    for name in PRETRAINED_METADATA:
        assert (ours / name).is_file() == (theirs / name).is_file()


def test_text_begins_with_the_models_bos(both: tuple[str, Path, Path, Path]) -> None:
    """As for a session, whether or not the tokenizer did it itself."""
    family, theirs, ours, back = both
    before, after = AutoTokenizer.from_pretrained(theirs), AutoTokenizer.from_pretrained(back)
    _, tokenizer = load_model(ours)
    assert tokenizer.bos == (before.bos_token_id if before.bos_token else before.convert_tokens_to_ids("<|bos|>"))
    text = "The street was  still wet;\nagain."
    plain = before(text, add_special_tokens=False)["input_ids"]
    assert after(text)["input_ids"] == [tokenizer.bos, *plain] and tokenizer.encode(text).tolist() == plain
    assert (before(text)["input_ids"] == after(text)["input_ids"]) == FAMILIES[family][3]


def test_plain_model_has_the_tokenizer_as_it_was(both: tuple[str, Path, Path, Path], tmp_path: Path) -> None:
    """Llama.cpp's converter knows a tokenizer by the digest of a text's tokens, BOS among them where it is one."""
    _, theirs, ours, _ = both
    convert_to_hf(ours, tmp_path / "plain", plain=True)
    before, after = AutoTokenizer.from_pretrained(theirs), AutoTokenizer.from_pretrained(tmp_path / "plain")
    text = "The street was  still wet;\nagain."
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.special_tokens_map == before.special_tokens_map


def test_end_tokens_survive(both: tuple[str, Path, Path, Path]) -> None:
    family, _, ours, back = both
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(back), AutoTokenizer.from_pretrained(back)
    named = FAMILIES[family][4]
    ends = model.generation_config.eos_token_id
    ends = {*ends} if isinstance(ends, list) else {ends}
    assert ends == load_model(ours)[1].end_ids
    assert {*(named if isinstance(named, list) else [named] if named else [])} | {tokenizer.eos_token_id} <= ends
    assert model.config.eos_token_id == tokenizer.eos_token_id and isinstance(model, ttt_e2e.hf.TTTE2EForCausalLM)


@given(text=st.text("ab. the雨\n<s>", max_size=30))
@settings(max_examples=20, deadline=None)
def test_decoded_text_is_what_transformers_decodes(text: str) -> None:
    for kind in ("llama2", "metaspace first True", "gpt4", "bert", "t5"):
        backend = kinds()[kind]
        ids = Tokenizer(backend).encode(text)
        theirs = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
        assert Tokenizer(backend).decode(ids) == theirs.decode(ids.tolist(), skip_special_tokens=True)
