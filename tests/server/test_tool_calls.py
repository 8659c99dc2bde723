"""Functions in prompts and answers: how templates are told of them, how calls are written, and how they are found."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("transformers", reason="the transformers library is not installed")

from chat_families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_families import FORMS, TOOL_FAMILIES, transformers_tokenizer

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.grammar import Grammar, GrammarCompiler
from ttt_e2e.inference.load import ChatTemplate
from ttt_e2e.server.api.answers import Answer, ArgumentsPart, CallBegins, CallEnds, TextPart, parse_answer
from ttt_e2e.server.chat import ChatFormat, TemplateFormat
from ttt_e2e.server.tool_calls import HERMES, CallForm, Function, Tools, answer_grammar, visible

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Function("weather", "What it is like.", CITY, "tools.0.function.parameters")
TIME = Function("time", None, {"type": "object", "properties": {}}, "tools.1.function.parameters")
TOOLS = Tools((WEATHER, TIME))
QUESTION = {"role": "user", "content": "How is it in Rome?"}
each_family = pytest.mark.parametrize("name", TOOL_FAMILIES)


def calling(*calls: tuple[str, Any], content: str = "") -> dict[str, Any]:
    """An assistant's message, as transformers has it."""
    functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
    pairs = enumerate(functions)
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": f"{i:09}", "type": "function", "function": one} for i, one in pairs],
    }


def result(content: str, number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"{number:09}", "content": content}


def expected(name: str, messages: Sequence[dict[str, Any]], tools: Tools | None = TOOLS) -> list[int]:
    """What transformers gives."""
    ids: list[int] = transformers_tokenizer(name).apply_chat_template(
        list(messages), tools=tools and tools.definitions, add_generation_prompt=True, return_dict=False
    )
    return ids


def written(form: CallForm, *calls: tuple[str, str]) -> str:
    """Calls as the form writes them, without special tokens."""
    joined = visible(form.joint or ()).join(f"{name}{visible(form.middle)}{arguments}" for name, arguments in calls)
    return visible(form.begin) + joined + visible(form.end)


# -- prompts -----------------------------------------------------------------------------------------------------------


@each_family
def test_forms_are_found_in_templates(name: str) -> None:
    assert TOOL_FAMILIES[name].chat().call_form == FORMS[name]


def test_forms_of_other_templates() -> None:
    """A template that names no functions, or whose calls cannot be found in a text, has calls as Hermes models do."""
    for name in ("chatml", "llama2", "gemma"):
        assert FAMILIES[name].chat().call_form == HERMES
    assert ChatFormat().call_form is None
    hermes = TOOL_FAMILIES["hermes"]
    backend = hermes.backend()
    backend.add_special_tokens(["<call>", "<args>"])
    for old, new in (
        ("tool | tojson", "'...'"),
        ("call.function.arguments | tojson", "'<x>1</x>'"),
        ('<tool_call>\\n{"name": "', "<call>"),  # nothing of which is text
        ('", "arguments": ', "<args>"),
    ):
        source = hermes.source.replace(old, new)
        assert source != hermes.source
        assert TemplateFormat(ChatTemplate(source, hermes.special), Tokenizer(backend)).call_form == HERMES


@each_family
def test_prompts_are_those_of_transformers(name: str) -> None:
    chat, plain = TOOL_FAMILIES[name].chat(), Tools((TIME, WEATHER))
    system = {"role": "system", "content": "Be kind."}
    first = [QUESTION] if name == "mistral-v3" else [system, QUESTION]
    for messages in (
        first,
        [*first, calling(("weather", {"city": "Rome"})), result("sunny")],
        [QUESTION, calling(("time", {})), result("12"), {"role": "assistant", "content": "Noon."}, QUESTION],
    ):
        ours = chat.prompt(messages, "nothing", None, plain.definitions)
        assert [*ours] == expected(name, messages, plain) != expected(name, messages, None)
    two = [QUESTION, calling(("time", {}), ("weather", {"city": "日本"})), result("12"), result("wet", 1)]
    if FORMS[name].joint is None:
        with pytest.raises(UserError, match=r"messages\.1: the chat template refuses it"):
            chat.prompt(two, "nothing", None, plain.definitions)
    else:
        assert [*chat.prompt(two, "nothing", None, plain.definitions)] == expected(name, two, plain)


@each_family
def test_functions_and_results_cannot_contain_special_tokens(name: str) -> None:
    chat, special = TOOL_FAMILIES[name].chat(), Tokenizer(TOOL_FAMILIES[name].backend()).special

    def num_special(text: str) -> int:
        tools = Tools((WEATHER._replace(description=text),))
        messages = [QUESTION, calling(("weather", {"city": text})), result(text)]
        ids = chat.prompt(messages, "nothing", None, tools.definitions)
        return sum(i in special.values() for i in ids)

    assert num_special("x" + "x".join(special) + "x") == num_special("usual")


@each_family
def test_a_conversation_with_calls_is_read_once(name: str) -> None:
    """What a session has read, the call that it wrote, and the prompts of new messages are the whole conversation."""
    family, chat = TOOL_FAMILIES[name], TOOL_FAMILIES[name].chat()
    messages = [
        QUESTION,
        calling(("weather", {"city": "Rome"})),
        result("wet"),
        {"role": "assistant", "content": "Wet"},
    ]
    ids = [*chat.prompt(messages[:1], "nothing", None, TOOLS.definitions)]
    call = written(FORMS[name], ("weather", '{"city": "Rome"}'))
    tokenizer = Tokenizer(family.backend())
    own = [i for i in FORMS[name].begin if isinstance(i, int)]
    whole = expected(name, messages[:3])
    after = [*chat.closing(), *chat.prompt(messages[2:3], "conversation", None, TOOLS.definitions)]
    assert whole[: len(ids)] == ids and whole[-len(after) :] == after
    said = whole[len(ids) : -len(after)]
    assert [i for i in said if i in tokenizer.special.values()] == own
    assert re.sub(', "id": "[0-9]{9}"', "", tokenizer.decode(said)).strip() == call.strip()
    more = [*chat.closing(), *chat.prompt([QUESTION], "conversation", None, TOOLS.definitions)]
    assert expected(name, [*messages, QUESTION])[-len(more) :] == more
    assert "weather" not in tokenizer.decode(more)  # it has been named


@pytest.mark.parametrize("name", ["chatml", "smollm2", "llama2", "gemma"])
def test_other_templates_are_given_calls_as_text(name: str) -> None:
    family, chat = FAMILIES[name], FAMILIES[name].chat()
    tokenizer = Tokenizer(family.backend())
    first = tokenizer.decode(chat.prompt([QUESTION], "nothing", None, TOOLS.definitions))
    for part in ("You can call these functions", json.dumps(CITY), "<tool_call>", "How is it in Rome?"):
        assert first.count(part) == 1
    assert chat.prompt([QUESTION], "conversation", None, TOOLS.definitions) == chat.prompt([QUESTION], "conversation")
    talk = [QUESTION, calling(("weather", {"city": "Rome"}), ("time", {})), result("wet"), result("12", 1)]
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
    text += '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    results = "<tool_response>\nwet\n</tool_response>\n<tool_response>\n12\n</tool_response>"
    plain = [QUESTION, {"role": "assistant", "content": text}, {"role": "user", "content": results}]
    assert chat.prompt(talk, "nothing") == chat.prompt(plain, "nothing")
    assert chat.prompt(talk[2:], "conversation") == chat.prompt(plain[2:], "conversation")
    assert ChatFormat().prompt(talk, "nothing") == ChatFormat().prompt(plain, "nothing")


@pytest.mark.parametrize("name", ["chatml", "hermes"])
def test_a_conversation_is_told_of_other_functions(name: str) -> None:
    family = (FAMILIES | TOOL_FAMILIES)[name]
    chat, tokenizer = family.chat(), Tokenizer(family.backend())
    for messages in ([QUESTION], [result("wet")], [{"role": "system", "content": "Hm"}, QUESTION]):
        told = tokenizer.decode(chat.prompt(messages, "other tools", None, TOOLS.definitions))
        assert told.count(json.dumps(CITY)) == 1 and "Functions:" not in told
        assert len(told) > len(tokenizer.decode(chat.prompt(messages, "conversation", None, TOOLS.definitions)))


# -- answers -----------------------------------------------------------------------------------------------------------

PIECES = ["{", "}", "[", "]", '"', "\\", '\\"', "a", "é", "\n</tool_call>", '{"name": "']
ARGUMENTS = st.lists(st.sampled_from(PIECES), max_size=5).map(lambda pieces: {"a": "".join(pieces), "b": [{}]})


@settings(max_examples=25)
@given(
    st.sampled_from(sorted(FORMS)),
    st.lists(st.sampled_from(["<tool_", "{", '"name', " ", "\n", "ab", "é"]), max_size=4).map("".join),
    st.lists(st.tuples(st.sampled_from(["a", "weather-2"]), ARGUMENTS), max_size=3),
    st.lists(st.integers(1, 30)),
)
def test_calls_are_found_however_the_text_is_cut(
    name: str, before: str, calls: list[tuple[str, dict[str, Any]]], cuts: list[int]
) -> None:
    form = FORMS[name]
    calls = calls[:1] if form.joint is None else calls
    spelled = [(called, json.dumps(arguments)) for called, arguments in calls]
    text = before + (written(form, *spelled) if calls else "")
    whole, cut = parse_answer(text, form, []), Answer(form)
    parts, at = [], 0
    for size in [*cuts, len(text)]:
        parts += cut.add(text[at : at + size])
        at += size
    parts += cut.end()
    assert [(call.name, call.arguments, call.complete) for call in whole.calls] == [(*one, True) for one in spelled]
    assert whole.text == (before.rstrip() if calls else before)
    assert (cut.text, [call.arguments for call in cut.calls]) == (whole.text, [call.arguments for call in whole.calls])
    assert "".join(part.text for part in parts if isinstance(part, TextPart)) == whole.text
    assert whole.called == bool(calls)
    begun, ended = ([p.number for p in parts if isinstance(p, kind)] for kind in (CallBegins, CallEnds))
    assert begun == ended == [*range(len(calls))]
    for number, (_, arguments) in enumerate(spelled):
        told = [part.text for part in parts if isinstance(part, ArgumentsPart) and part.number == number]
        assert "".join(told) == arguments


def test_calls_that_are_cut_off() -> None:
    text = written(HERMES, ("weather", '{"city": "Rome"}'))
    for end in range(len(text)):
        answer = parse_answer(text[:end], HERMES, [])
        assert answer.called == (end >= text.index("}}") + 1)
        if answer.calls:
            assert answer.text == "" and text.startswith(answer.calls[0].arguments, text.index('{"city'))
        else:
            assert answer.text == ("" if text[:end].startswith('<tool_call>\n{"name": "') else text[:end])
    ids: list[str] = []
    assert parse_answer(text, HERMES, ids).calls == parse_answer(text, HERMES, ids).calls
    assert re.fullmatch("[0-9a-f]{9}", ids[0]) and len(ids) == 1


# -- grammars ----------------------------------------------------------------------------------------------------------


def accepts(grammar: Grammar, tokenizer: Tokenizer, tokens: Sequence[int]) -> bool | None:
    """Whether the grammar accepts the text; None if it is the beginning of one."""
    matcher = grammar.matcher()
    for token in tokens:
        if matcher.mask(torch.zeros(tokenizer.vocab_size))[token] != 0:
            return False
        matcher.add(token)
    return True if matcher.mask(torch.zeros(tokenizer.vocab_size))[tokenizer.bos] == 0 else None


@each_family
def test_grammars_of_answers(name: str) -> None:
    form, tokenizer = FORMS[name], Tokenizer(TOOL_FAMILIES[name].backend())
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    special = [i for i in form.begin if isinstance(i, int)]

    def ids(before: str, *calls: tuple[str, str], after: str = "") -> list[int]:
        text = written(form, *calls) if calls else ""
        return [*tokenizer.encode(before), *(special if calls else ()), *tokenizer.encode(text + after)]

    one, other = ("weather", '{"city": "Rome"}'), ("time", "{}")
    text, call, two = ids("It is wet."), ids("", one), ids("", one, other)
    if name == "mistral-v3":  # its tokenizer begins with a space that the form has already
        call, two = (
            [special[0], *tokenizer.encode(written(form, *calls).lstrip())] for calls in ((one,), (one, other))
        )
    wrong = [ids("", ("wetter", "{}")), ids("", ("weather", "{}")), ids("", ("weather", '{"city": 5}'))]
    more = form.joint is not None
    free, required, single, named = (
        compiler.compile(answer_grammar(tools, form, None))
        for tools in (
            TOOLS,
            Tools(TOOLS.functions, "required"),
            Tools(TOOLS.functions, "required", parallel=False),
            Tools(TOOLS.functions, "weather", named=True),
        )
    )

    def found(grammar: Grammar, *texts: list[int]) -> list[bool | None]:
        return [accepts(grammar, tokenizer, text) for text in texts]

    assert found(free, text, call, two, [*text, *call]) == [True, True, more, True]
    assert found(required, text, call, two, [*text, *call]) == [False, True, more, False]
    assert found(single, text, call, two) == found(named, text, call, two) == [False, True, False]
    assert found(named, ids("", other)) == [False]
    for grammar in (free, required, named):
        assert found(grammar, *wrong, [*call, *tokenizer.encode(" x")]) == [False] * 4
        assert found(grammar, call[:-1]) == [None]
    either = compiler.compile(answer_grammar(TOOLS, form, {"type": "boolean"}))
    assert found(either, ids("true"), call, text) == [name != "mistral-v3", True, False]
