"""Chat templates in the manner of well-known families, each with a small tokenizer of the family's kind."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.inference.load import ChatTemplate
from ttt_e2e.server.chat import TemplateFormat

CORPUS = 3 * (
    "The rain in Spain stays mainly in the plain. What is 2 + 3? It is 5.\nuser\nassistant\nsystem\n"
    "You are a helpful assistant. Hello there, how are you today? I am well.\n\nUser: Hi\nAssistant: Hey\n"
    "[INST] <<SYS>> Be kind. <</SYS>> [/INST] <|user|> <|assistant|> Ünïcödé 日本語 « quoted » text \t tab\n"
).splitlines(keepends=True)


def _byte_level(*special: str | AddedToken, pattern: str | None = None) -> tokenizers.Tokenizer:
    """As in GPT-2, or, with a pattern, Llama 3 and Qwen."""
    backend, level = tokenizers.Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([*split, level]), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=380, show_progress=False, initial_alphabet=level.alphabet())
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(list(special))
    return backend


def _sentencepiece(*special: str | AddedToken, scheme: str | None) -> tokenizers.Tokenizer:
    """With spaces by a pre-tokenizer and its scheme, or, as in the first Llama models, by a normalizer."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split("\n", "isolated")]
    )
    names = [*_SENTENCEPIECE, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(special_tokens=names, vocab_size=520, show_progress=False))
    content = json.loads(backend.to_str())
    content["added_tokens"] = []  # for the trainer the bytes are special tokens; they are not
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    if scheme is None:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None  # type: ignore[assignment]
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(list(special))
    return backend


GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    """A template, its special tokens by name, and how its tokenizer is made.

    system: whether it takes a system message. begins_once: whether BOS begins a conversation and not every question.
    """

    source: str
    special: dict[str, str]
    make: Callable[[], tokenizers.Tokenizer]
    system: bool = True
    begins_once: bool = True

    def chat(self) -> TemplateFormat:
        """Our format with it."""
        return TemplateFormat(ChatTemplate(self.source, self.special), Tokenizer(self.backend()))

    def backend(self) -> tokenizers.Tokenizer:
        """A new tokenizer of its kind."""
        return tokenizers.Tokenizer.from_str(_json(self.make))


@cache
def transformers_tokenizer(name: str) -> Any:
    """The tokenizer of transformers with the family's template."""
    import transformers

    family = FAMILIES[name]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=family.backend(), chat_template=family.source, **family.special
    )


@cache
def _json(make: Callable[[], tokenizers.Tokenizer]) -> str:
    return make().to_str()


_CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}DEFAULT{% endif %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

_QWEN = """{%- if tools %}{{- raise_exception("no tools here") }}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Q, a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

_LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

_LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

_MISTRAL = """{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}
{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- "[INST]" + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- message["content"] + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}"""

_MISTRAL_1 = """{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}\
{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""

_GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}\
{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

_PHI3 = """{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + \
'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}\
{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

_ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

_DEEPSEEK = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + \
'\n\n' }}{% elif message['role'] == 'assistant' %}{% set content = message['content'] %}{% if '</think>' in content %}\
{% set content = content.split('</think>')[-1] %}{% endif %}{{ 'Assistant: ' + content + eos_token }}\
{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

_COMMAND_R = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = 'You are Command, a helpful assistant.' %}{% endif %}\
{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system_message + '<|END_OF_TURN_TOKEN|>' }}\
{% for message in loop_messages %}{% set content = message['content'] %}{% if message['role'] == 'user' %}\
{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}\
{% elif message['role'] == 'assistant' %}\
{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""

_FALCON = """{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}\
{% if message['role'] == 'system' %}\
{{ 'System: ' + message['content'] }}{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] }}\
{% elif message['role'] == 'assistant' %}{{ 'Falcon: ' + message['content'] }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '\nFalcon:' }}{% endif %}"""

_VICUNA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}\
{% else %}{{ 'A chat between a curious user and an assistant. ' }}{% endif %}{% for message in messages %}\
{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] }}{% elif message['role'] == 'assistant' %}\
{{ ' ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"""

_GRANITE = """{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|start_of_role|>assistant<|end_of_role|>' }}
        {%- generation %}{{- message['content'] + '<|end_of_text|>' }}{% endgeneration %}{{- '\n' }}
    {%- else %}
        {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"""

_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SENTENCEPIECE = ("<unk>", "<s>", "</s>")
_S = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _flagged(*contents: str, **flags: bool) -> list[AddedToken]:
    return [AddedToken(content, special=True, **flags) for content in contents]


_PHI_TOKENS = _flagged("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", rstrip=True)

FAMILIES = {
    "chatml": Family(
        _CHATML.replace("DEFAULT", ""), {"eos_token": "<|im_end|>"}, lambda: _byte_level(*_IM), system=True
    ),
    "smollm2": Family(
        _CHATML.replace("DEFAULT", "{{ '<|im_start|>system\nYou are a helpful AI.<|im_end|>\n' }}"),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        lambda: _byte_level(*_IM),
    ),
    "qwen2.5": Family(
        _QWEN, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, lambda: _byte_level(*_IM, pattern=GPT4)
    ),
    "llama2": Family(_LLAMA2, _S, lambda: _sentencepiece(*_SENTENCEPIECE, scheme=None), begins_once=False),
    "llama2-normalized": Family(
        _LLAMA2, _S, lambda: _sentencepiece(*_flagged(*_SENTENCEPIECE, normalized=True), scheme=None)
    ),
    "llama2-first": Family(_LLAMA2, _S, lambda: _sentencepiece(*_SENTENCEPIECE, scheme="first"), begins_once=False),
    "llama3": Family(
        _LLAMA3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        lambda: _byte_level(
            "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", pattern=GPT4
        ),
    ),
    "mistral": Family(_MISTRAL, _S, lambda: _sentencepiece(*_SENTENCEPIECE, "[INST]", "[/INST]", scheme="always")),
    "mistral-first": Family(_MISTRAL_1, _S, lambda: _sentencepiece(*_SENTENCEPIECE, scheme="first"), system=False),
    "gemma": Family(
        _GEMMA,
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        lambda: _sentencepiece(*_SENTENCEPIECE, "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", scheme="never"),
        system=False,
    ),
    "phi3": Family(
        _PHI3,
        {**_S, "eos_token": "<|endoftext|>"},
        lambda: _sentencepiece(*_SENTENCEPIECE, "<|endoftext|>", *_PHI_TOKENS, scheme=None),
    ),
    "phi3-first": Family(
        _PHI3,
        {**_S, "eos_token": "<|endoftext|>"},
        lambda: _sentencepiece(*_SENTENCEPIECE, "<|endoftext|>", *_PHI_TOKENS, scheme="first"),
    ),
    "zephyr": Family(_ZEPHYR, _S, lambda: _sentencepiece(*_SENTENCEPIECE, scheme="first")),
    "deepseek": Family(
        _DEEPSEEK,
        {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
        lambda: _byte_level("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", pattern=GPT4),
    ),
    "command-r": Family(
        _COMMAND_R,
        {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"},
        lambda: _byte_level(
            *("<s>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
            *("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        ),
    ),
    "falcon": Family(_FALCON, {"eos_token": "<|endoftext|>"}, lambda: _byte_level("<|endoftext|>")),
    "vicuna": Family(_VICUNA, _S, lambda: _sentencepiece(*_SENTENCEPIECE, scheme=None)),
    "granite": Family(
        _GRANITE,
        {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>"},
        lambda: _byte_level(
            AddedToken("<|end_of_text|>", lstrip=True, special=True), "<|start_of_role|>", "<|end_of_role|>"
        ),
    ),
}
