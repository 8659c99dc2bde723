"""Chat templates that know functions, in the manner of well-known families, with the tokenizers of `chat_families`."""

from functools import cache
from typing import Any

from chat_families import FAMILIES, Family
from engine_helpers import TOKENIZER

from ttt_e2e.inference.load import ChatTemplate
from ttt_e2e.server.chat import TemplateFormat
from ttt_e2e.server.tool_calls import CallForm

_HERMES = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{%- endif %}
    {{- 'Functions:' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '\\nWrite calls as <tool_call>.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

_LLAMA = """{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{% set messages = messages[1:] %}{%- endif %}
{{- '<|eot_id|>' }}
{%- if tools %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nAnswer with a call of one of these:\\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}
    {{- messages[0].content + '<|eot_id|>' }}{% set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson + '<|eot_id|>' }}
    {%- elif message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + message.tool_calls[0].function.name }}
        {{- '", "parameters": ' + message.tool_calls[0].function.arguments | tojson + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

_MISTRAL = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and loop.first %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception('ids have nine characters') }}{%- endif %}
            {{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
            {{- ', "id": "' + call.id + '"}' + (', ' if not loop.last else '') }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- message.content + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]' + {'content': message.content} | tojson + '[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""


def _mistral_tokenizer() -> Any:
    backend = FAMILIES["mistral"].backend()
    names = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
    backend.add_special_tokens([*names])
    return backend


TOOL_FAMILIES = {
    "hermes": Family(_HERMES, FAMILIES["qwen2.5"].special, FAMILIES["qwen2.5"].make),
    "llama3.1": Family(_LLAMA, FAMILIES["llama3"].special, FAMILIES["llama3"].make),
    "mistral-v3": Family(_MISTRAL, FAMILIES["mistral"].special, _mistral_tokenizer),
}
_CALLS_ID = TOOL_FAMILIES["mistral-v3"].backend().token_to_id("[TOOL_CALLS]")
FORMS = {
    "hermes": CallForm(
        ('<tool_call>\n{"name": "',),
        ('", "arguments": ',),
        ('}\n</tool_call>\n<tool_call>\n{"name": "',),
        ("}\n</tool_call>",),
    ),
    "llama3.1": CallForm(('{"name": "',), ('", "parameters": ',), None, ("}",)),
    "mistral-v3": CallForm((_CALLS_ID, ' [{"name": "'), ('", "arguments": ',), ('}, {"name": "',), ("}]",)),
}


# For tests with a model, which reads a few tokens at a time. Calls are written as <f>NAME={...}</f>.
_SHORT = """{% for tool in tools or () %}{{ tool.function.name + ' ' }}{% endfor %}{% for m in messages %}\
{{ m.role[0] + ':' + m.content }}{% for call in m.tool_calls %}\
{{ '<f>' + call.function.name + '=' + call.function.arguments | tojson + '</f>' }}{% endfor %}{{ '\n' }}{% endfor %}\
{% if add_generation_prompt %}a:{% endif %}"""
SHORT_CHAT = TemplateFormat(ChatTemplate(_SHORT, {}), TOKENIZER)


@cache
def transformers_tokenizer(name: str) -> Any:
    """The tokenizer of transformers with the family's template."""
    import transformers

    family = TOOL_FAMILIES[name]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=family.backend(), chat_template=family.source, **family.special
    )
