"""Chat templates have what transformers gives to them, and nothing else."""

from typing import Any

import pytest

from ttt_e2e.errors import UserError
from ttt_e2e.inference.chat_template import JinjaTemplate, MessagesRefusedError
from ttt_e2e.inference.load import ChatTemplate

chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is missing")

TALK = [{"role": "user", "content": "<é> & 'ü'"}, {"role": "assistant", "content": "b"}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | tojson }}",
        "{{ messages | tojson(indent=2) }}",
        "{{ messages | tojson(ensure_ascii=True, sort_keys=True) }}",
        "{{ messages | tojson(separators=(',', ':')) }}",
        "{{ messages | tojson(True, 1, (';', '='), True) }}",
        "{{ strftime_now('%Y') }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}",
        "{% set x = 1 %}{%- generation -%} {% set x = 2 %}{{ x }} {%- endgeneration -%} {{ x }}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
        "{{ bos_token }}{{ pad_token }}{{ unk_token }}{{ eos_token is defined }}{{ sep_token is defined }}",
        "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ messages[0].nothing }}",
        "{{ date }} {% set ns = namespace(a=1) %}{% set ns.a = 3 %}{{ ns.a }}{{ dict(a=1) }}{{ range(3) | list }}",
        "  {% if true %}\n  a\n  {% endif %}\n{# c #}\nb\n\n",
        "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[0].role) }}{{ messages | map(attribute='role') | join }}",
    ],
)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_rendering_is_that_of_transformers(source: str, add_generation_prompt: bool) -> None:
    values = {"date": "today"}
    (theirs,), _ = chat_template_utils.render_jinja_template(
        [TALK], chat_template=source, add_generation_prompt=add_generation_prompt, **SPECIAL, **values
    )
    ours = JinjaTemplate(ChatTemplate(source, SPECIAL)).render(
        TALK, values, add_generation_prompt=add_generation_prompt
    )
    assert ours == theirs


def render(source: str, **values: Any) -> str:
    return JinjaTemplate(ChatTemplate(source, SPECIAL)).render(TALK, values)


def test_only_raise_exception_blames_the_messages() -> None:
    with pytest.raises(MessagesRefusedError, match="no such role"):
        render("{{ raise_exception('no such role') }}")
    for source in (
        "{{ nothing.there.atall }}",
        "{{ 1 / 0 }}",
        "{{ messages[0] + 1 }}",
        "{{ {}['x']['y'] }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages | tojson(indent=[]) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ range(10 ** 9) | list }}",
        "{% include 'x' %}",
    ):
        with pytest.raises(UserError, match="its own error") as caught:
            render(source)
        assert not isinstance(caught.value, MessagesRefusedError)


def test_values_cannot_replace_the_messages() -> None:
    assert render("{{ messages | length }}{{ bos_token }}", messages=[], bos_token="<b>") == "2<b>"


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ x | nosuchfilter }}", "{% generation %}", "{{", "{% x %}", "{{" + "(" * 9000]
)
def test_invalid_templates_are_refused(source: str) -> None:
    with pytest.raises(UserError, match="not a valid Jinja template"):
        JinjaTemplate(ChatTemplate(source, {}))
