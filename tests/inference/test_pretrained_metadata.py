"""Chat templates with special tokens, and the tokens that end a text."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from helpers import small_model
from tokenizers import decoders, models, pre_tokenizers

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.load import chat_template, end_tokens, load_model
from ttt_e2e.inference.pool_requests import Token
from ttt_e2e.inference.sampling import SamplingOptions
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_pool import SessionPool
from ttt_e2e.model.checkpoint import PRETRAINED_METADATA, save_model

pytest.importorskip("jinja2", reason="Jinja is not installed")

from ttt_e2e.server.chat import ChatFormat, load_chat_format

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = """{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\n" + message.content | trim + "<|im_end|>" + "\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n" }}{% endif %}"""
TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello {{ 7 * 7 }}"}]


def byte_tokenizer(special: list[str] = SPECIAL) -> Tokenizer:
    """Bytes as tokens, and special ones after them."""
    backend = tokenizers.Tokenizer(
        models.BPE({b: i for i, b in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return Tokenizer(backend)


def write(folder: Path, **files: Any) -> Path:
    """`folder` with these files, by name without suffix."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


# -- chat templates ----------------------------------------------------------------------------------------------------

TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {% if message.role not in ["system", "user", "assistant"] %}{{ raise_exception("no such role") }}{% endif %}
<{{ message.role }}>{{ message.content | tojson }}
{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""


def prompt_of(chat: ChatFormat) -> str:
    return byte_tokenizer().backend.decode([*chat.prompt(TALK, "nothing")], skip_special_tokens=False)


def test_chat_template_is_found_where_models_keep_it(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True}
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    for template in (TEMPLATE, named):
        write(tmp_path, tokenizer_config={**config, "chat_template": template})
        chat = load_chat_format(tmp_path, byte_tokenizer())
        assert prompt_of(chat) == '<s><system>"Be kind."\n<user>"Hello {{ 7 * 7 }}"\n<assistant>'
        assert chat.stop == ("</s>",)
    with pytest.raises(UserError, match="no such role"):
        chat.prompt([{"role": "developer", "content": ""}], "nothing")
    (tmp_path / "other.jinja").write_text("{{ messages[0].content }}!")
    assert prompt_of(load_chat_format(tmp_path, byte_tokenizer(), tmp_path / "other.jinja")) == "Be kind.!"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[1].content }}?")  # where newer ones have it
    assert prompt_of(load_chat_format(tmp_path, byte_tokenizer())) == "Hello {{ 7 * 7 }}?"
    (tmp_path / "chat_template.jinja").unlink()
    write(tmp_path, tokenizer_config={"chat_template": {"default": "x"}})
    with pytest.raises(UserError, match="is not a string"):
        chat_template(tmp_path)
    write(tmp_path, tokenizer_config={"chat_template": ["x", {}, {"name": "rag", "template": "y"}]})
    assert chat_template(tmp_path) is None
    write(tmp_path, tokenizer_config=config)  # a template of one's own for a model without, which spells its tokens
    (tmp_path / "other.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    chat = load_chat_format(tmp_path, byte_tokenizer(), tmp_path / "other.jinja")
    assert prompt_of(chat) == "<s>Be kind.</s>" and chat.stop == ("</s>",)
    write(tmp_path, special_tokens_map={"bos_token": "<x>", "unk_token": {"content": "<unk>"}, "sep_token": None})
    found = chat_template(tmp_path, "x")
    assert found is not None
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").unlink()
    assert chat_template(tmp_path) is None
    assert load_chat_format(tmp_path, byte_tokenizer()).stop == ("\nUser:",)


# -- the end of a text -------------------------------------------------------------------------------------------------


def test_end_tokens_are_bos_and_those_in_the_settings(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    bos, end = tokenizer.special["<|endoftext|>"], tokenizer.special["<|im_end|>"]
    assert end_tokens(tmp_path, tokenizer) == {bos} == tokenizer.end_ids
    write(tmp_path, generation_config={"eos_token_id": [end, bos, 999, -1, None, "x"]})
    assert end_tokens(tmp_path, tokenizer) == {bos, end}
    write(tmp_path, generation_config={"eos_token_id": 3}, tokenizer_config={"eos_token": {"content": "<|im_end|>"}})
    assert end_tokens(tmp_path, tokenizer) == {bos, end, 3}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json"):
        end_tokens(tmp_path, tokenizer)


def test_generation_ends_with_an_end_token(tmp_path: Path) -> None:
    """In a session, in a pool, and wherever the model is copied to."""
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    model = small_model(vocab_size=tokenizer.vocab_size)
    greedy = {"max_tokens": 12, "temperature": 0.0}
    text = list(Session(model, tokenizer).generate_tokens("Once", **greedy))
    third = text.index(text[2])
    write(tmp_path, generation_config={"eos_token_id": text[third]})
    save_model(model, tmp_path / "model", tmp_path / "tokenizer.json")
    loaded, knowing = load_model(tmp_path / "model")
    session = Session(loaded, knowing)
    assert list(session.generate_tokens("Once", **greedy)) == text[:third]
    pool = SessionPool(session)
    pool.submit_generate(pool.add(), knowing.encode("Once"), max_tokens=12, options=SamplingOptions(temperature=0.0))
    events = [event for _ in range(14) for event in pool.step()]
    assert [event.token for event in events if isinstance(event, Token)] == text[:third]
    assert not pool.busy


def test_metadata_is_copied_into_models_and_exports(tmp_path: Path) -> None:
    """Into a trained model, and to transformers."""
    transformers = pytest.importorskip("transformers", reason="the transformers library is not installed")
    from ttt_e2e.hf.export import convert_to_hf

    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    end = tokenizer.special["<|im_end|>"]
    write(tmp_path, generation_config={"eos_token_id": end}, tokenizer_config={"eos_token": "<|im_end|>"})
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    save_model(small_model(vocab_size=tokenizer.vocab_size), tmp_path / "model", tmp_path / "tokenizer.json")
    present = [name for name in PRETRAINED_METADATA if (tmp_path / name).is_file()]
    assert len(present) == 3
    for name in present:
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / name).read_bytes()
    convert_to_hf(tmp_path / "model", tmp_path / "hf")
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert settings.eos_token_id == sorted({tokenizer.bos, end})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.chat_template == CHATML
