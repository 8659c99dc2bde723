"""Write a model folder for the transformers library, which loads it once `ttt_e2e.hf` is imported."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tokenizers
import torch
from tokenizers import processors
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from ttt_e2e.config.parse import to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path, read_json
from ttt_e2e.hf import TTTE2EConfig, TTTE2EForCausalLM
from ttt_e2e.hf.card import model_card
from ttt_e2e.hf.plain import plain_model
from ttt_e2e.inference.load import load_model
from ttt_e2e.model.checkpoint import (
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    check_finite,
    copy_pretrained_metadata,
)
from ttt_e2e.model.transformer import Transformer


def convert_to_hf(folder: Path, out: Path, *, plain: bool = False) -> int:
    """Write the model in `folder` to `out` as transformers itself would save it; returns its number of parameters.

    The weights are float32, and all in memory at once. The tokenizer keeps the special tokens, settings and chat
    templates that the model came with; without any, BOS also ends documents and pads, on the left. For the tokenizer a
    text begins with BOS, as for the model. README.md is a card to complete. With `plain` the model is one of
    transformers' own (`hf.plain`), and a tokenizer that came from there begins a text as it did there: other programs
    know a tokenizer by what it makes of a text, and add a BOS by rules of their own.

    Raises UserError if `out` exists, if a weight is not a finite number, if `folder` is not a model with a tokenizer,
    or if the model cannot be plain.
    """
    if out.exists():
        raise UserError(f"{out} exists already; name a folder that does not.")
    model, tokenizer = load_model(folder)
    check_finite(model, f"The model in {folder}")
    theirs = _tokenizer(folder, tokenizer.bos, as_it_came=plain)
    with atomic_path(out) as part:
        ends = tokenizer.end_ids
        written: PreTrainedModel = wrap_model(model, tokenizer.bos, ends, theirs.eos_token_id, theirs.pad_token_id)
        if plain:
            written = plain_model(model, written.generation_config)
        written.save_pretrained(part)
        theirs.save_pretrained(part)
        parameters = sum(weight.numel() for weight in written.parameters())
        notes = read_json(folder / "config.json").get("notes", {})
        (part / "README.md").write_text(model_card(model.config, parameters, notes, plain=plain))
        for weights in part.glob("*.safetensors"):  # the library makes them readable for their owner alone
            weights.chmod((part / "config.json").stat().st_mode)
    return parameters


def _tokenizer(folder: Path, bos: int, as_it_came: bool) -> PreTrainedTokenizerFast:
    """The library's tokenizer for the model in `folder`, which begins every text with the token `bos`.

    as_it_came: not so if it came from the library and begins no text with one.
    """
    with TemporaryDirectory() as copy:  # without config.json, which the library would take for one of its own
        shutil.copyfile(folder / TOKENIZER, Path(copy) / TOKENIZER)
        copy_pretrained_metadata(folder, Path(copy))
        files = [file for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS) if (file := Path(copy) / name).is_file()]
        named = {name for file in files for name, value in read_json(file).items() if value is not None}
        bos_token = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER)).id_to_token(bos)
        defaults: dict[str, Any] = {"padding_side": "left", "clean_up_tokenization_spaces": False}
        if "eos_token" not in named:
            defaults |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), bos_token)
        defaults = {name: value for name, value in defaults.items() if name not in named}
        theirs = PreTrainedTokenizerFast.from_pretrained(copy, **defaults)
    backend = theirs.backend_tokenizer
    if not (as_it_came and files) and theirs("a")["input_ids"][:1] != [bos]:
        begin = processors.TemplateProcessing(
            single=f"{bos_token} $A", pair=f"{bos_token} $A $B", special_tokens=[(bos_token, bos)]
        )
        before = [] if backend.post_processor is None else [backend.post_processor]
        backend.post_processor = processors.Sequence([*before, begin])
    return theirs


def wrap_model(
    model: Transformer,
    bos: int | None = None,
    end_ids: Iterable[int] = (),
    eos: int | None = None,
    pad: int | None = None,
) -> TTTE2EForCausalLM:
    """`model` with the interface of transformers; it shares the weights.

    Args:
        model: the model.
        bos: the token that begins documents.
        end_ids: all tokens that end a generated text, `bos` among them.
        eos, pad: the tokens that end a text and that pad one; None: `bos`.
    """
    tokens: dict[str, Any] = {
        "bos_token_id": bos,
        "eos_token_id": bos if eos is None else eos,
        "pad_token_id": bos if pad is None else pad,
    }
    with torch.device("meta"):  # no weights are allocated that would be replaced at once
        wrapped = TTTE2EForCausalLM(TTTE2EConfig(to_dict(model.config), **tokens))
    wrapped.model = model
    ends = {"eos_token_id": sorted(end_ids)} if len({*end_ids}) > 1 else {}
    wrapped.generation_config = GenerationConfig(**tokens | ends)
    return wrapped.eval()
