"""Fields of a request that this server does not act on: refused where they would change the answer, else ignored.

Clients of OpenAI, vLLM, TGI, llama.cpp and others send many fields; most do not concern the text. A field that does is
listed here with the values under which it changes nothing. The names of all that were ignored are told in a header.
"""

import difflib
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel

from ttt_e2e.server.errors import ApiError

Neutral = dict[str, tuple[Any, ...] | None]
HEADER = "x-ignored-fields"
_MAX_FIELDS = 100  # that are not declared
_MAX_NAMES, _MAX_NAME = 50, 64  # in the header, and characters of each name

# The fields that would change the answer, and the values under which they do not; null is always one.
_NEUTRAL: Neutral = {
    # of another endpoint of this server
    "messages": (),
    "prompt": (),
    "session": (),
    # OpenAI
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
    # vLLM and SGLang
    "add_generation_prompt": (True,),
    "add_special_tokens": (False, True),
    "allowed_token_ids": ([],),
    "bad_words": ([], ""),
    "chat_template": (),
    "continue_final_message": (False,),
    "custom_logit_processor": (),
    "documents": ([],),
    "ebnf": (),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json": (),
    "guided_regex": ("",),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "no_stop_trim": (False,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "regex": (),
    "repetition_penalty": (1,),
    "skip_special_tokens": (True,),
    "stop_regex": (),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    # TGI
    "adapter_id": (),
    "decoder_input_details": (False,),
    "do_sample": (True,),
    "max_new_tokens": (),
    "max_output_tokens": (),
    "return_full_text": (False,),
    "truncate": (),
    "typical_p": (1,),
    "watermark": (False,),
    # llama.cpp and others that sample as it does
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "grammar": ("",),
    "json_schema": ({},),
    "lora": ([],),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "n_indent": (0,),
    "n_predict": (),
    "n_probs": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "repeat_penalty": (1,),
    "samplers": ([],),
    "smoothing_factor": (0,),
    "t_max_predict_ms": (0,),
    "tfs": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "xtc_probability": (0,),
}
_ANY = None  # every value is harmless
# /v1/responses knows these fields only: its clients send what OpenAI documents.
RESPONSES: Neutral = {
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "client_metadata": _ANY,  # codex
    "context_management": ([],),
    "image": (),
    "include": ([], ["reasoning.encrypted_content"]),  # of reasoning, which no answer has
    "max_tool_calls": _ANY,
    "moderation": (),
    "prompt": (),
    "prompt_cache_key": _ANY,
    "prompt_cache_options": _ANY,
    "prompt_cache_retention": _ANY,
    "reasoning": _ANY,  # how much to spend on what no model here does
    "safety_identifier": _ANY,
    "service_tier": _ANY,
    "stream_options": ({}, {"include_obfuscation": False}, {"include_obfuscation": True}),
    "top_logprobs": (0,),
    "truncation": ("auto", "disabled"),
    "user": _ANY,
}
# Likewise /v1/messages.
MESSAGES: Neutral = {
    "billing_policy": _ANY,
    "cache_control": _ANY,
    "compaction": (),
    "container": (),
    "diagnostics": _ANY,
    "fallback_credit_token": _ANY,
    "fallbacks": ([],),
    "inference_geo": _ANY,
    "mcp_servers": ([],),
    "metadata": _ANY,
    "output_format": (),
    "prefill": (),
    "service_tier": _ANY,
    "speed": _ANY,
    "user_profile_id": _ANY,
    "workspace_id": _ANY,
}
_IN_MESSAGES: Neutral = {"audio": (), "function_call": ()}


def ignored_fields(body: BaseModel, only: Neutral | None = None) -> list[str]:
    """The names of the fields that `body` does not declare and that change nothing, those of messages among them.

    Raises ApiError for a field that would change the answer, for one that is spelt almost like a known one, and for too
    many of them. only: the fields of an API in which any others are errors.
    """
    if len(body.model_extra or {}) > _MAX_FIELDS:
        raise ApiError(
            400, f"The body has more than {_MAX_FIELDS} fields that are not known; omit them.", "invalid_value"
        )
    neutral = _NEUTRAL | {"best_of": (1, getattr(body, "n", 1))} if only is None else only
    known = [*type(body).model_fields, *neutral]
    for name in body.model_extra or {}:
        close = [] if name in neutral else difflib.get_close_matches(name[:_MAX_NAME], known, 1, cutoff=0.92)
        if close or (only is not None and name not in only):
            remedy = f"send {close[0]} if that is meant" if close else "omit it"
            message = f"{name[:_MAX_NAME]}: no such field; {remedy}."
            raise ApiError(400, message, "invalid_value", name[:_MAX_NAME])
    found = dict.fromkeys(_ignored(body, neutral))
    if only is not None:
        return list(found)
    if options := getattr(body, "stream_options", None):
        found |= dict.fromkeys(f"stream_options.{name}" for name in _ignored(options, {}))
    for index, message in enumerate(getattr(body, "messages", ())):
        found |= dict.fromkeys(f"messages.{name}" for name in _ignored(message, _IN_MESSAGES, f"messages.{index}."))
        for part in message.content if isinstance(message.content, list) else ():
            found |= dict.fromkeys(f"messages.content.{name}" for name in _ignored(part, {}))
    return list(found)


def ignored_header(names: list[str]) -> dict[str, str]:
    """The header that tells a client of ignored fields, if there are any."""
    shown = [quote(name[:_MAX_NAME], safe="", errors="replace") for name in names[:_MAX_NAMES]]
    return {HEADER: ", ".join([*shown, "..."] if len(names) > _MAX_NAMES else shown)} if names else {}


def _ignored(model: BaseModel, neutral: Neutral, prefix: str = "") -> Iterator[str]:
    """The fields of `model` that it does not declare and that are not null. prefix: where it is, in errors."""
    for name, value in (model.model_extra or {}).items():
        if value is not None:
            values = neutral.get(name)
            if values is not None and not any(_equal(value, harmless) for harmless in values):
                message = f"{prefix}{name}: this server does not support this value; omit {name}."
                raise ApiError(400, message, "invalid_value", prefix.partition(".")[0] or name)
            yield name


def _equal(value: Any, harmless: Any) -> bool:
    """Whether two values are equal in JSON, where true is not 1."""
    return isinstance(value, bool) == isinstance(harmless, bool) and bool(value == harmless)
