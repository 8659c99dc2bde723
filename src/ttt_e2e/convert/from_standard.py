"""Standard Transformers of this project, made into models that can learn while they read.

The two starts are those of `from_hf`: a new fast MLP that adds nothing yet, or a part of each trained MLP split off.
"""

import dataclasses
from pathlib import Path

import torch

from ttt_e2e.config.schema import ATTENTIONS, ModelConfig
from ttt_e2e.convert.start import Source, Start, model_config
from ttt_e2e.errors import UserError
from ttt_e2e.model.checkpoint import TOKENIZER, load_config, load_model, save_model
from ttt_e2e.model.transformer import Transformer

# What a model that learns has otherwise than the standard one that it was.
_DECIDED = (
    *("window", "mini_batch", "suffix_layers", "pattern", "static_mlp"),
    *("fast_mlp_width", "suffix_mlp_width", "parallel_mlp", "fast_rank"),
)
_SEED = 0  # of the fast MLPs and factors that are new


def learning_config(config: ModelConfig, start: Start) -> ModelConfig:
    """What a standard model of this `config` becomes.

    Without a window in `start` it is the model's own, or 8192 over full attention. Raises UserError for a model that
    learns already, for one with other mixers than attentions, and for "new" where a norm after the MLP would make much
    of the little that it adds at first.
    """
    if config.suffix_layers:
        raise UserError("This model has fast MLPs already; train it further with `ttt-e2e train --from`.")
    others = sorted(set(config.mixers) - set(ATTENTIONS))
    if others:
        raise UserError(f"Only a Transformer of attentions can be converted, not one with {', '.join(others)}.")
    if config.post_norm and start.fast == "new":
        raise UserError(
            "After its MLPs this model has norms (post_norm), which would blow up what a new fast MLP adds at first; "
            "split the MLPs instead (--fast split)."
        )
    shape = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _DECIDED}
    own = None if "full" in config.mixers else config.sliding_window
    source = Source(
        "ttt-e2e",
        shape,
        config.num_hidden_layers,
        config.intermediate_size,
        own or 2**62,
        "the window it was trained with",
    )
    return model_config(source, start)


def warm_start(model: Transformer, config: ModelConfig) -> Transformer:
    """The standard `model` in the shape of `config`, which may see less and may learn, see `learning_config`.

    Without static MLPs in the suffix, those of the model become the fast ones: dynamic evaluation. Where a window
    covers the text, it predicts the same, until the first update.
    """
    trained = dict(model.named_parameters())
    new = Transformer(config, torch.Generator().manual_seed(_SEED)).to(model.embedding)
    fast_units = config.fast_intermediate_size if config.parallel_mlp else 0
    with torch.no_grad():
        for name, weight in new.named_parameters():
            block, _, layer = name.rpartition(".mlp.")
            if ".fast.up_" in name or ".fast.down_" in name:
                continue  # an addition that begins at zero
            static = name.replace(".fast", ".mlp")
            if ".fast" in name and not config.static_mlp:
                weight.copy_(trained[static])
            elif ".fast" in name and not config.parallel_mlp:
                if name.endswith("fast_norm.weight"):
                    weight.copy_(trained[static])
                elif name.endswith("w_out"):
                    weight.zero_()
            elif ".fast." in name:
                weight.copy_(_units(trained[static], slice(fast_units), name))
            elif block and weight.shape != trained[name].shape:
                weight.copy_(_units(trained[name], slice(fast_units, None), layer))
            else:
                weight.copy_(trained[name])
    return new


def convert_from_standard(folder: Path, out: Path, start: Start) -> ModelConfig:
    """Write the model folder `out` from that of a standard Transformer; returns its configuration.

    Raises UserError as `learning_config` does, and if `out` exists or `folder` is no model.
    """
    if out.exists():
        raise UserError(f"{out} exists; name another folder for the model, or remove it first.")
    config = learning_config(load_config(folder), start)
    tokenizer = folder / TOKENIZER
    notes = {"source": str(folder), "fast": start.fast}
    save_model(warm_start(load_model(folder), config), out, tokenizer if tokenizer.is_file() else None, notes=notes)
    return config


def _units(weight: torch.Tensor, units: slice, name: str) -> torch.Tensor:
    """Some hidden units of a trained MLP: rows of gate and value side by side, or columns of what goes out."""
    if name.endswith("w_out"):
        return weight[:, units]
    gate, value = weight.chunk(2)
    return torch.cat((gate[units], value[units]))
