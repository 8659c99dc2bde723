"""Standard Transformers trained by this package, converted into models that learn while they read.

The fast MLPs are made as in `from_hf`: new ones that add nothing yet, or a part of each trained MLP.
"""

import dataclasses
from pathlib import Path

import torch

from ttt_e2e.config.schema import ATTENTIONS, ModelConfig
from ttt_e2e.convert.learning import LearningOptions, SourceModel, config_from_source
from ttt_e2e.errors import UserError
from ttt_e2e.model.checkpoint import TOKENIZER, check_finite, load_config, load_transformer, save_model
from ttt_e2e.model.transformer import Transformer

# Settings of the new model that do not come from the standard one.
_REPLACED = (
    *("sliding_window", "mini_batch_size", "suffix_layers", "pattern", "static_mlp", "parallel_mlp"),
    *("fast_intermediate_size", "suffix_intermediate_size", "fast_rank"),
)
_SEED = 0  # of new fast MLPs and factors


def learning_config(config: ModelConfig, options: LearningOptions) -> ModelConfig:
    """The configuration of a standard model after its conversion.

    If `options` has no window, it is that of the model, or 8192 with full attention. Raises UserError for a model that
    has fast MLPs already or mixers other than attentions, and for a "new" fast MLP with `post_norm`: the norm after it
    would scale up the little that it adds at first.
    """
    if config.suffix_layers:
        raise UserError("This model has fast MLPs already; train it further with `ttt-e2e train --from`.")
    others = sorted(set(config.mixers) - set(ATTENTIONS))
    if others:
        raise UserError(f"Only a Transformer of attentions can be converted, not one with {', '.join(others)}.")
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _REPLACED}
    max_window = 2**62 if "full" in config.mixers else config.sliding_window
    source = SourceModel("ttt-e2e", settings, max_window, "the window it was trained with")
    return config_from_source(source, dataclasses.replace(options, sink="none"))


def warm_start(model: Transformer, config: ModelConfig) -> Transformer:
    """A copy of the standard `model` in the shape of `config`, as `learning_config` returns it.

    Without static MLPs in the suffix, the trained ones become the fast ones: dynamic evaluation. Until the first
    update, and as far as a window covers the text, the copy predicts the same.
    """
    trained = dict(model.named_parameters())
    converted = Transformer(config, torch.Generator().manual_seed(_SEED)).to(model.embedding)
    fast_units = config.fast_intermediate_size if config.parallel_mlp else 0
    with torch.no_grad():
        for name, weight in converted.named_parameters():
            if ".fast.up_" in name or ".fast.down_" in name or name.endswith(".log_lr_scale"):
                continue  # factors of additions and of learning rates, which change nothing yet
            is_fast, source = ".fast" in name, trained[name.replace(".fast", ".mlp")]
            if is_fast and config.static_mlp and not config.parallel_mlp:
                if name.endswith("fast_norm.weight"):
                    weight.copy_(source)
                elif name.endswith("w_out"):
                    weight.zero_()
            elif weight.shape == source.shape:
                weight.copy_(source)
            else:  # some of the hidden units: rows of gate and value in w_in, columns of w_out
                units = slice(fast_units) if is_fast else slice(fast_units, None)
                is_out = name.endswith("w_out")
                weight.copy_(source[:, units] if is_out else torch.cat([part[units] for part in source.chunk(2)]))
    return converted


def convert_from_standard(folder: Path, out: Path, options: LearningOptions) -> ModelConfig:
    """Convert the standard Transformer in `folder` to the model folder `out`; returns its configuration."""
    if out.exists():
        raise UserError(f"{out} exists; name another folder for the model, or remove it first.")
    config = learning_config(load_config(folder), options)
    tokenizer = folder / TOKENIZER
    model = load_transformer(folder)
    check_finite(model, f"The model in {folder}")
    converted = warm_start(model, config)
    notes = {"source": str(folder), "fast": options.fast}
    save_model(converted, out, tokenizer if tokenizer.is_file() else None, notes=notes)
    return config
