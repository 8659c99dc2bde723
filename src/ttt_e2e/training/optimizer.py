"""The outer optimiser: AdamW on every tensor, a clip on the global norm, two learning rates by step."""

import math

import torch
from torch import nn

from ttt_e2e.config.schema import ModelConfig, TrainConfig
from ttt_e2e.model.mixers.base import Mixer


def learning_rate(step: int, config: TrainConfig) -> float:
    """The outer learning rate of the 0-based `step`: linear from `lr_init` to `lr`, then cosine to `lr_end`.

    The first step of a warm-up therefore runs at `lr_init`, which fills AdamW's moments and, at 0, changes
    nothing.
    """
    if step < config.warmup_steps:
        return config.lr_init + (config.lr - config.lr_init) * step / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    return config.lr_end + (config.lr - config.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))


def inner_learning_rate(step: int, config: TrainConfig, model: ModelConfig) -> float:
    """The inner learning rate of the 0-based `step`: linear from `inner_lr_init` to the model's."""
    if config.inner_warmup_steps == 0:
        return model.inner_loop.lr
    progress = min(1.0, (step + 1) / config.inner_warmup_steps)
    return config.inner_lr_init + (model.inner_loop.lr - config.inner_lr_init) * progress


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over every parameter of `model`, decay on norms and embeddings too, but not on what mixers exempt."""
    exempt = [
        getattr(module, name) for module in model.modules() if isinstance(module, Mixer) for name in module.undecayed
    ]
    ids = {id(parameter) for parameter in exempt}
    groups: list[dict] = [{"params": [p for p in model.parameters() if id(p) not in ids]}]
    if exempt:
        groups.append({"params": exempt, "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups,
        lr=config.lr_init,
        betas=config.betas,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


@torch.no_grad()
def clip_gradients(model: nn.Module, clip: float) -> float:
    """Scale all gradients together so that their global norm is at most `clip`; returns the norm before."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    # Not torch's clip_grad_norm_: that adds 1e-6 to the norm, which the published training does not.
    if norm >= clip and math.isfinite(norm):
        torch._foreach_mul_(gradients, clip / norm)
    return norm


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, clip: float) -> float:
    """One update of `model` from its gradients, which are cleared; returns their global norm.

    If that norm is not finite, nothing is changed.
    """
    norm = clip_gradients(model, clip)
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return norm
