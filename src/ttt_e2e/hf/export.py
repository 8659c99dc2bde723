"""Write a model folder for the transformers library, which loads it once `ttt_e2e.hf` is imported."""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
import torch
from tokenizers import processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from ttt_e2e.config.parse import to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path
from ttt_e2e.hf import TTTE2EConfig, TTTE2EForCausalLM
from ttt_e2e.inference.load import chat_template, load_model
from ttt_e2e.model.checkpoint import TOKENIZER
from ttt_e2e.model.transformer import Transformer


def convert_to_hf(folder: Path, out: Path) -> int:
    """Write the model in `folder` to `out` as transformers itself would save it; returns its number of parameters.

    The weights are float32, and all in memory at once. For the tokenizer a text begins with BOS, which also ends
    documents and pads, on the left; a chat template in the folder is kept. Raises UserError if `out` exists, or if
    `folder` is not a model with a tokenizer.
    """
    if out.exists():
        raise UserError(f"{out} exists already; name a folder that does not.")
    model, tokenizer = load_model(folder)
    template = chat_template(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    bos_token = backend.id_to_token(tokenizer.bos)
    if backend.encode("a").ids[:1] != [tokenizer.bos]:
        begin = processors.TemplateProcessing(
            single=f"{bos_token} $A", pair=f"{bos_token} $A $B", special_tokens=[(bos_token, tokenizer.bos)]
        )
        before = [] if backend.post_processor is None else [backend.post_processor]
        backend.post_processor = processors.Sequence([*before, begin])
    with atomic_path(out) as part:
        wrap_model(model, tokenizer.bos, tokenizer.end_ids).save_pretrained(part)
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=bos_token,
            eos_token=bos_token,
            pad_token=bos_token,
            padding_side="left",
            clean_up_tokenization_spaces=False,
            **({} if template is None else {"chat_template": template.source}),
        ).save_pretrained(part)
        for weights in part.glob("*.safetensors"):  # the library makes them readable for their owner alone
            weights.chmod((part / "config.json").stat().st_mode)
    return sum(weight.numel() for weight in model.parameters())


def wrap_model(model: Transformer, bos: int | None = None, end_ids: Iterable[int] = ()) -> TTTE2EForCausalLM:
    """`model` with the interface of transformers; it shares the weights.

    bos: the token that begins and ends documents, and pads. end_ids: all tokens that end a generated text, `bos` among
    them.
    """
    config = TTTE2EConfig(to_dict(model.config), bos_token_id=bos, eos_token_id=bos, pad_token_id=bos)
    with torch.device("meta"):  # no weights are allocated that would be replaced at once
        wrapped = TTTE2EForCausalLM(config)
    wrapped.model = model
    eos = sorted(end_ids) if len({*end_ids}) > 1 else bos
    wrapped.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=bos)
    return wrapped.eval()
