"""The outer optimizer: AdamW, clipping by the global norm, and the schedules of both learning rates."""

import math

import torch
from torch import nn

from ttt_e2e.config.schema import ModelConfig, TrainConfig
from ttt_e2e.model.mixers.base import Mixer
from ttt_e2e.training.parallelize import whole


def learning_rate(step: int, config: TrainConfig) -> float:
    """The outer learning rate of the 0-based `step`: linear from `lr_init` to `lr`, then cosine to `lr_end`.

    The first step of a warm-up therefore has `lr_init`; at 0 it only fills AdamW's moments.
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
    """AdamW over what is trained of `model`; weight decay leaves out learning rates and what mixers exempt.

    A group's "lr_factor" is what `optimizer_step` multiplies the learning rate by.
    """
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    exempt = [getattr(mixer, name) for mixer in mixers for name in mixer.no_weight_decay]
    rates = [parameter for name, parameter in model.named_parameters() if name.endswith(".log_lr_scale")]
    ids = {id(parameter) for parameter in (*exempt, *rates)}
    rates_factor = 1.0 if config.inner_lr_lr is None or config.lr == 0 else config.inner_lr_lr / config.lr
    groups: list[dict] = [
        {"params": [p for p in model.parameters() if p.requires_grad and id(p) not in ids], "lr_factor": 1.0},
        {"params": [p for p in exempt if p.requires_grad], "lr_factor": 1.0, "weight_decay": 0.0},
        {"params": [p for p in rates if p.requires_grad], "lr_factor": rates_factor, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr_init, betas=config.betas, eps=config.adam_eps, weight_decay=config.weight_decay, fused=True
    )


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients together so that their global norm is at most `max_norm`; returns the norm before."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    norm = float(whole(torch.nn.utils.get_total_norm(gradients)))
    # Not torch's clip_grad_norm_, which adds 1e-6 to the norm; the published training does not.
    if norm >= max_norm and math.isfinite(norm):
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float) -> float:
    """Clip, apply and clear the gradients of `model` if their norm is finite; returns it, from before the clip."""
    norm = clip_gradients(model, max_grad_norm)
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        optimizer.step()
        optimizer.zero_grad()
    return norm
