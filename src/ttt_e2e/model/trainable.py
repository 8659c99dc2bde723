"""What of a model is trained, and low-rank additions to what is not.

`train.trainable` chooses by the names of the parameters. A matrix with an addition is parametrised: its module reads
W + (lora_alpha / r) B A under its name, as a `LowRankSum`, which the linear layers never form. In files the addition is
merged: the model in them is a plain one.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ttt_e2e.config.schema import ModelConfig, TrainConfig
from ttt_e2e.errors import UserError
from ttt_e2e.model.precision import Shapes, hold_in, is_static_matrix, product_matrices
from ttt_e2e.model.transformer import Transformer
from ttt_e2e.ops.elementwise import accumulation_dtype
from ttt_e2e.ops.linear import LowRankSum

# Trained beside low-rank additions, by the last part of their names; norms are, too.
_BESIDE_LORA = ("log_lr_scale", "sink_logit", "sink_value")


class Trainable(NamedTuple):
    """Names of parameters: those that are trained themselves, and the matrices that get an addition."""

    trained: list[str]
    adapted: list[str]


def choose_trainable(config: ModelConfig, train: TrainConfig, shapes: Shapes) -> Trainable:
    """What `train.trainable` means for a model whose parameters have these shapes.

    Raises UserError if the model has no suffix and only that is to be trained, and for additions that do not fit.
    """
    if train.trainable == "all":
        return Trainable([*shapes], [])
    if train.prefix_frozen and not config.suffix_layers:
        setting = "trainable=suffix" if train.trainable == "suffix" else "lora.layers=suffix"
        raise UserError(f"The model has no suffix, which {setting} would train; choose another, or convert the model.")
    candidates = [name for name in shapes if name not in ("embedding", "head")]
    if train.trainable == "last":
        first = config.num_hidden_layers - train.trained_layers
        if first < 0:
            raise UserError(
                f"trained_layers = {train.trained_layers}, but the model has {config.num_hidden_layers} blocks."
            )
        below = tuple(f"blocks.{i}." for i in range(first))
        return Trainable([name for name in candidates if not name.startswith(below)], [])
    if train.prefix_frozen:
        candidates = [name for name in candidates if not is_below_loop(name, config)]
    if train.trainable == "suffix":
        return Trainable(candidates, [])
    adapted = _targets(config, train, {name: shapes[name] for name in candidates})
    return Trainable([name for name in candidates if _beside_lora(name, config)], adapted)


def is_below_loop(name: str, config: ModelConfig) -> bool:
    """Whether the parameter is used before the mini-batch loop: by the embedding, the prefix, the first suffix mixer.

    The embedding counts, although it may be the head as well.
    """
    if not name.startswith("blocks."):
        return name == "embedding"
    _, block, part = name.split(".", 2)
    first = config.prefix_layers
    return int(block) < first or (int(block) == first and part.startswith("mixer"))


def set_trainable(model: Transformer, train: TrainConfig) -> None:
    """Freeze what `train` does not train, and give matrices the additions that it asks for.

    If `train` computes in bfloat16, frozen matrices that lose nothing by it are held in bfloat16: a model that was
    published in it takes half the memory, and no matrix is converted in every mini-batch. Raises UserError as
    `choose_trainable` does.
    """
    weights = dict(model.named_parameters())
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    trained, adapted = choose_trainable(model.config, train, shapes)
    frozen = weights.keys() - trained
    for name in frozen:
        weights[name].requires_grad_(False)
    products = frozen & product_matrices(model.config, shapes)
    hold_in(getattr(torch, train.dtype), (weights[name] for name in products), if_exact=True)
    for name in adapted:
        path, _, attribute = name.rpartition(".")
        addition = LowRankAddition(weights[name], train.lora.r, train.lora.lora_alpha)
        # "unsafe": it takes the place of a tensor, and is none.
        parametrize.register_parametrization(model.get_submodule(path), attribute, addition, unsafe=True)


class LowRankAddition(nn.Module):
    """W + (lora_alpha / r) B A as a parametrisation of W [E, D], with `peft`'s names, scale and start: B is zero."""

    def __init__(self, weight: Tensor, r: int, lora_alpha: float):
        super().__init__()
        rows, columns = weight.shape
        dtype = accumulation_dtype(weight.dtype)
        self.lora_A = nn.Parameter(torch.empty(r, columns, device=weight.device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(rows, r, device=weight.device, dtype=dtype))
        self.scaling = lora_alpha / r
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> LowRankSum:
        """The sum, in parts."""
        return LowRankSum(weight, self.lora_A, self.lora_B, self.scaling)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The sum as one matrix, in float32 (float64 if W is)."""
        return torch.addmm(weight.to(self.lora_A.dtype), self.lora_B, self.lora_A, alpha=self.scaling)


def lora_tensors(model: Transformer) -> dict[str, Tensor]:
    """Of every matrix NAME with an addition: the matrix itself, "NAME.original", "NAME.lora_A" and "NAME.lora_B"."""
    found: dict[str, Tensor] = {}
    for name, (original, addition) in _additions(model).items():
        found |= {f"{name}.original": original, f"{name}.lora_A": addition.lora_A, f"{name}.lora_B": addition.lora_B}
    return found


def plain_weights(model: Transformer) -> dict[str, Tensor]:
    """Parameters by name, additions merged: those of the plain model that computes the same."""
    merged = {name: addition.merged(original) for name, (original, addition) in _additions(model).items()}
    return {name: w for name, w in model.named_parameters() if ".parametrizations." not in name} | merged


def trained_weights(model: Transformer) -> dict[str, Tensor]:
    """Parameters that are trained, by name; an addition's are "NAME.lora_A" and "NAME.lora_B"."""
    own = {name: w for name, w in model.named_parameters() if ".parametrizations." not in name}
    return {name: w for name, w in (own | lora_tensors(model)).items() if w.requires_grad}


def _additions(model: Transformer) -> dict[str, tuple[Tensor, LowRankAddition]]:
    """Every matrix with an addition, by its name in the plain model, and the addition."""
    return {
        f"{path}.{name}": (of_name.original, of_name[0])
        for path, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for name, of_name in module.parametrizations.items()
    }


def _beside_lora(name: str, config: ModelConfig) -> bool:
    """Whether the parameter is trained beside low-rank additions: initial fast weights, norms, single numbers."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    if last.endswith("norm") or last in _BESIDE_LORA:
        return True
    return ".fast." in name and (config.fast_rank is None or not last.startswith("w_"))


def _targets(config: ModelConfig, train: TrainConfig, shapes: Shapes) -> list[str]:
    """The matrices that get an addition."""
    possible = [n for n, shape in shapes.items() if is_static_matrix(n, shape) and not _beside_lora(n, config)]
    chosen: set[str] = set()
    for target in train.lora.target_modules:
        found = [name for name in possible if target == "all-linear" or f".{name}".endswith(f".{target}")]
        if not found:
            endings = sorted({name.split(".", 2)[2] for name in possible})
            raise UserError(
                f"lora.target_modules={target} names no static matrix of the blocks that are trained; "
                f"there are: {', '.join(endings)}, or all-linear."
            )
        chosen |= {*found}
    for name in possible:
        if name in chosen and train.lora.r > min(shapes[name]):
            raise UserError(
                f"lora.r = {train.lora.r} is larger than {name}, which is {shapes[name][0]} x {shapes[name][1]}; "
                "choose a smaller rank, or other lora.target_modules."
            )
    return [name for name in possible if name in chosen]
