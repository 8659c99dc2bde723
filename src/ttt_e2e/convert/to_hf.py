"""A model folder of ours as one of the transformers library, which loads it once `ttt_e2e.hf` is imported."""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
import torch
from tokenizers import processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from ttt_e2e.config.parse import to_dict
from ttt_e2e.data.tokenizer import Tokenizer
from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path
from ttt_e2e.hf import TTTE2EConfig, TTTE2EForCausalLM
from ttt_e2e.inference.pretrained_metadata import chat_template
from ttt_e2e.inference.session import load_reader
from ttt_e2e.model.checkpoint import TOKENIZER
from ttt_e2e.model.transformer import Transformer


def convert_to_hf(folder: Path, out: Path) -> int:
    """Write the model in `folder` to `out` as transformers itself would save it; returns its number of parameters.

    The weights are float32, and all in memory at once. Raises UserError if `out` exists, and if `folder` is no model or
    has no tokenizer.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already; name a folder that does not.")
    model, tokenizer = load_reader(folder)
    with atomic_path(out) as part:
        hf_model(model, tokenizer.bos, tokenizer.ends).save_pretrained(part)
        hf_tokenizer(folder, tokenizer).save_pretrained(part)
        for weights in part.glob("*.safetensors"):  # which are made for their owner alone
            weights.chmod((part / "config.json").stat().st_mode)
    return sum(weight.numel() for weight in model.parameters())


def hf_model(model: Transformer, bos: int | None = None, ends: Iterable[int] = ()) -> TTTE2EForCausalLM:
    """`model` with the interface of transformers; it shares the weights.

    bos: what begins and ends documents, and pads. ends: all tokens that end a text which is written, `bos` among them.
    """
    config = TTTE2EConfig(to_dict(model.config), bos_token_id=bos, eos_token_id=bos, pad_token_id=bos)
    with torch.device("meta"):  # no weights are made, only to be replaced
        wrapped = TTTE2EForCausalLM(config)
    wrapped.model = model
    eos = sorted(ends) if len({*ends}) > 1 else bos
    wrapped.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=bos)
    return wrapped.eval()


def hf_tokenizer(folder: Path, tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer of the model in `folder` with the interface of transformers: a text begins with BOS there too.

    BOS also ends documents and pads, on the left. A chat template that the folder has comes along.
    """
    backend = tokenizers.Tokenizer.from_file(str(Path(folder) / TOKENIZER))
    bos = backend.id_to_token(tokenizer.bos)
    if backend.encode("a").ids[:1] != [tokenizer.bos]:
        begin = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos)]
        )
        before = [] if backend.post_processor is None else [backend.post_processor]
        backend.post_processor = processors.Sequence([*before, begin])
    template = chat_template(Path(folder))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=bos,
        pad_token=bos,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **({} if template is None else {"chat_template": template.source}),
    )
