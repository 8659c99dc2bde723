"""Masks of grammars, against the texts that they are about."""

import json
import math
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.inference.grammar import GrammarCompiler, json_rule, text_rule
from ttt_e2e.inference.sampling import SamplingOptions, sample

pytest.importorskip("llguidance", reason="the extra serve is not installed")
jsonschema = pytest.importorskip("jsonschema_rs", reason="jsonschema-rs is not installed")

TEXT = '{"name": "Straße", "n": [1, 2.5, true, null]} abc aab cab "abba" 雨\n'
TOKENIZER = Tokenizer.train([TEXT], 290)
SIZE = TOKENIZER.vocab_size + 10  # of a model whose vocabulary is rounded up
COMPILER = GrammarCompiler(TOKENIZER, SIZE)
SPELLED = [TOKENIZER.decode([i]).encode() for i in range(TOKENIZER.vocab_size)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text("ab", max_size=6), min_size=1, max_size=6), st.integers(0, 1 << 30), st.booleans())
def test_tokens_may_come_with_which_a_text_goes_on(words: list[str], seed: int, as_json: bool) -> None:
    """Against all texts of the grammar, written out."""
    texts = [(json.dumps(word) if as_json else f"x{word}").encode() for word in words]
    rule = json_rule({"enum": words}) if as_json else f"({' | '.join(text_rule(text.decode()) for text in texts)})"
    matcher, written = COMPILER.compile(f"start: {rule}").matcher(), b""
    generator = torch.Generator().manual_seed(seed)
    while not matcher.complete:
        logits = torch.randn(SIZE, generator=generator)
        masked = matcher.mask(logits)
        allowed = {i for i, part in enumerate(SPELLED) if part and any(t.startswith(written + part) for t in texts)}
        allowed |= TOKENIZER.end_ids if written in texts else set()
        found = {i for i in range(SIZE) if masked[i] > -math.inf}
        next_bytes = {text[len(written) : len(written) + 1] for text in texts if text.startswith(written)}
        # Of a text that cannot be another one, the library allows the usual tokens only.
        assert found == allowed if len(next_bytes) > 1 else found and found <= allowed
        assert all(masked[i] == logits[i] for i in found)
        token = sample(masked, SamplingOptions(), generator)
        if token in TOKENIZER.end_ids:
            break
        matcher.add(token)
        written += SPELLED[token]
    assert written in texts
    if matcher.complete:
        assert not any(text != written and text.startswith(written) for text in texts)


SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer", "minimum": -5, "maximum": 120},
            {"type": "string", "maxLength": 4},
            {"type": "string", "pattern": "^[a-c]{2,3}-[0-9]$"},
            {"type": "string", "format": "date"},
            {"enum": ["a b", 5, None, "é"]},
        ]
    ),
    lambda inner: st.one_of(
        st.tuples(inner, st.integers(0, 2)).map(
            lambda p: {"type": "array", "items": p[0], "minItems": p[1], "maxItems": 3}
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some}),
        st.tuples(st.dictionaries(st.sampled_from(['a"b', "é", "c"]), inner, min_size=1), st.booleans()).map(
            lambda p: {
                "type": "object",
                "properties": p[0],
                "required": [*p[0]] if p[1] else [],
                "additionalProperties": False,
            }
        ),
    ),
    max_leaves=4,
)


@settings(max_examples=25, deadline=None)
@given(SCHEMAS, st.integers(0, 1 << 30), st.sampled_from([0.0, 0.7, 5.0]))
def test_every_text_matches_the_schema(schema: dict[str, Any], seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    options = SamplingOptions(temperature=temperature, top_p=0.9, top_k=20, min_p=0.01)
    matcher, tokens = COMPILER.compile(f"start: {json_rule(schema)}").matcher(), []
    while not matcher.complete and len(tokens) < 300:
        token = sample(matcher.mask(3 * torch.randn(SIZE, generator=generator)), options, generator)
        if token in TOKENIZER.end_ids:
            break
        matcher.add(token)
        tokens.append(token)
    assert len(tokens) < 300
    text = TOKENIZER.decode(tokens)
    assert jsonschema.is_valid(schema, json.loads(text)), text
    assert "  " not in text.replace("  ", " ", text.count('"'))  # only strings have more than one space in a row


def test_matchers_of_a_grammar_are_independent() -> None:
    grammar = COMPILER.compile(f"start: {json_rule({'enum': ['a', 'b']})}")
    first, second = grammar.matcher(), grammar.matcher()
    for token in TOKENIZER.encode('"a"').tolist():
        first.add(token)
    assert first.complete and not second.complete
    assert second.mask(torch.zeros(SIZE))[TOKENIZER.bos] == -math.inf


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "foo"}, "Invalid type: foo"),
        ({"type": "string", "pattern": "("}, "regex parse error"),
        ({"type": "string", "format": "uri-reference"}, "Unknown format: uri-reference"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
        ({"$ref": "https://example.com/x"}, "does not fetch"),
        ({"$ref": "#"}, "no text matches it|NoExtension"),
        ({"not": {}}, 'Unimplemented keys: \\["not"\\]'),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "object", "properties": {f"a{i}": {} for i in range(4000)}}, "grammar size"),
        ({"enum": ["x" * 100_000]}, "more than 100,000 characters"),
    ],
)
def test_schemas_that_cannot_be_followed(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        COMPILER.compile(f"start: {json_rule(schema)}")
    assert str(caught.value).startswith("The schema ") and str(caught.value).endswith("; send a simpler one.")
    assert "\n" not in str(caught.value)


def test_annotations_are_no_obstacle() -> None:
    """Zod writes such `propertyNames` for each record, and Pydantic such a format for each `Path`."""
    any_name, path = {"propertyNames": {"type": "string"}}, {"type": "string", "format": "path"}
    record = {"type": "object", **any_name, "additionalProperties": {"type": "boolean"}}
    named = {"properties": any_name, "required": ["propertyNames"], "additionalProperties": False}
    for schema, right, wrong in (
        ({"anyOf": [record]}, {"a": True}, {"a": 1}),
        ({"$defs": {"const": record}, "$ref": "#/$defs/const"}, {"a": True}, {"a": 1}),
        ({"type": "object", **named}, {"propertyNames": ""}, {}),
        ({"const": any_name}, any_name, {}),
        ({"properties": {"enum": {"properties": {"a": record}}}}, {"enum": {"a": {}}}, {"enum": {"a": 5}}),
        ({"type": "array", "items": path, "uniqueItems": False}, ["a", "a"], [5]),
        ({"properties": {"format": path}}, {"format": "a"}, {"format": 5}),
        ({"enum": [{"format": "path"}]}, {"format": "path"}, {}),
    ):
        for value, matches in ((right, True), (wrong, False)):
            assert jsonschema.is_valid(schema, value) == matches
            matcher = COMPILER.compile(f"start: {json_rule(schema)}").matcher()
            tokens = TOKENIZER.encode(json.dumps(value)).tolist()
            assert all(matcher._state.consume_token(token) for token in tokens) == matches, (schema, value)


def test_schemas_that_are_nested_too_deeply() -> None:
    for depth in (300, 3000):
        schema: dict[str, Any] = {}
        for _ in range(depth):
            schema = {"items": schema}
        with pytest.raises(UserError, match=r"nested too deeply|recursion limit"):
            COMPILER.compile(f"start: {json_rule(schema)}")


def test_tokenizers_without_bytes_are_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2}, unk_token="<unk>"))
    backend.add_special_tokens(["<s>"])
    with pytest.raises(UserError, match="tokenizer of this model does not work with schemas"):
        GrammarCompiler(Tokenizer(backend), 3).compile(f"start: {json_rule({})}")
