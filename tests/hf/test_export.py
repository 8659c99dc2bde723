"""Model folders written for the transformers library, and what it does with them."""

import argparse
import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the transformers library is not installed")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers_helpers import TEXT, learning_model, load

import ttt_e2e.hf
from ttt_e2e.cli import convert as command
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.hf.cache import CACHE_NAME
from ttt_e2e.hf.card import model_card
from ttt_e2e.hf.export import convert_to_hf, wrap_model
from ttt_e2e.inference.session import Session


def test_loading_and_saving_again_changes_nothing(converted: Path, folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert isinstance(model, ttt_e2e.hf.TTTE2EForCausalLM) and not model.training
    expected = wrap_model(load(folder)).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    names = sorted(path.name for path in converted.iterdir() if path.name != "README.md")
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    for name in set(names) - {"tokenizer_config.json"}:
        assert (tmp_path / name).read_bytes() == (converted / name).read_bytes(), name
    before, after = (json.loads((place / "tokenizer_config.json").read_text()) for place in (converted, tmp_path))
    assert {key: after[key] for key in before} == before  # the library adds where it was loaded from
    assert len({path.stat().st_mode for path in converted.iterdir()}) == 1
    config = AutoConfig.from_pretrained(converted)
    assert (config.vocab_size, config.hidden_size) == (load(folder).config.vocab_size, 16)


def test_card_is_one_of_the_hub(converted: Path, folder: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(converted / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ttt-e2e", "test-time-training"],
    }
    parameters = sum(weight.numel() for weight in load(folder).parameters())
    assert f"| parameters | {parameters:,} |" in card.text and "| window | 12 tokens |" in card.text
    code = re.search("```python\n(.*)```", card.text, re.S)
    assert code is not None
    exec(code[1].replace("OWNER/NAME", str(converted)).replace("max_new_tokens=50", "max_new_tokens=3"), {})
    notes = {"source": "owner/base", "tokens": 1234567}
    plain = ModelCard(model_card(load(folder).config, parameters, notes, plain=True))
    assert plain.data.base_model == "owner/base" and "ttt_e2e" not in plain.text and "1,234,567 tokens" in plain.text


def test_tokenizer_is_the_models_with_bos_in_front(converted: Path, folder: Path) -> None:
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(converted)
    assert theirs(TEXT)["input_ids"] == [ours.bos, *ours.encode(TEXT)]
    assert theirs.decode(theirs(TEXT)["input_ids"], skip_special_tokens=True) == TEXT
    batch = theirs(["A bird", TEXT], padding=True, return_tensors="pt")
    assert batch["attention_mask"][0].tolist() == sorted(batch["attention_mask"][0].tolist())  # on the left
    assert Tokenizer.load(converted).bos == ours.bos == theirs.eos_token_id == theirs.pad_token_id


def test_pipeline_generates_what_a_session_generates(converted: Path, folder: Path) -> None:
    from transformers import pipeline  # imports much more than the rest, which not every process needs

    model, tokenizer = load(folder), Tokenizer.load(folder)
    write = pipeline("text-generation", str(converted), device="cpu")
    texts = [TEXT[:90], TEXT[40:250]]
    found = write(texts, max_new_tokens=10, do_sample=False, return_full_text=False, batch_size=2)
    for text, (answer,) in zip(texts, found, strict=True):
        expected = "".join(Session(model, tokenizer).generate(text, max_tokens=10, temperature=0))
        assert answer["generated_text"].startswith(expected)  # which waits for the last character's bytes


def test_bfloat16_applies_to_products_and_not_to_weights(converted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.compute_dtype == torch.bfloat16
    ids = torch.arange(1, 40)[None]
    logits = model(ids).logits
    exact = AutoModelForCausalLM.from_pretrained(converted)(ids).logits
    assert logits.dtype == torch.bfloat16 and not torch.equal(logits.float(), exact)
    torch.testing.assert_close(logits.float(), exact, atol=0.3, rtol=0.1)


def test_to_hf_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = parser.parse_args(["to-hf", str(folder), str(tmp_path / "out")])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ttt_e2e.hf.export", None)  # as if its import had failed
        with pytest.raises(UserError, match=r'needs that library: pip install "ttt-e2e\[hf\]"'):
            command.run(arguments)
    assert command.run(arguments) == 0
    count = sum(weight.numel() for weight in load(folder).parameters())
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: {count:,} parameters, for transformers\n"
    assert AutoConfig.from_pretrained(tmp_path / "out").model == load(folder).config


def test_invalid_input_is_rejected(folder: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        convert_to_hf(folder, converted)
    with pytest.raises(UserError, match="is not a model folder"):
        convert_to_hf(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config = json.loads((converted / "config.json").read_text())
    with pytest.raises(UserError, match="field settings of config"):
        len(ttt_e2e.hf.TTTE2EConfig(**{**config, "settings": {"hidden_size": "wide"}}).model.mixers)
    wrapped = wrap_model(learning_model())
    ids = torch.arange(1, 9)[None]
    with pytest.raises(UserError, match="use_cache=True"):
        wrapped.generate(ids, use_cache=False, max_new_tokens=2)
    with pytest.raises(UserError, match="cache of its own"):
        wrapped.generate(ids, cache_implementation="static", max_new_tokens=2)
    for name in ("cache", "past_key_values"):  # under the library's older name, too
        with pytest.raises(UserError, match="give a ReadingCache"):
            wrapped(ids, **{name: DynamicCache()})
    with pytest.raises(UserError, match="cache is of 1 texts, the input of 2"):
        wrapped(ids.repeat(2, 1), cache=wrapped(ids)[CACHE_NAME])
    with pytest.raises(UserError, match=r"mask has shape \[1, 3\]; give one of \[1, 8\], or of \[1, 8\]"):
        wrapped(ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(UserError, match="whole numbers from 0 to 49"):
        wrapped(ids + 45)
    with pytest.raises(UserError, match="cannot be removed"):
        wrapped(ids)[CACHE_NAME].crop(-1)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        wrapped.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=2)
