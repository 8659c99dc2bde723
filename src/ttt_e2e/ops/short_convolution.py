"""A short causal convolution of each channel along the tokens, then SiLU, as in Mamba 2 and Gated DeltaNet.

On a CPU, `conv2d` on [B, C, 1, T] with the channels last in memory is several times as fast as `conv1d`, which needs
two transpositions. Its weight gradient is slow in every layout, so it is written out as products and sums over blocks
of tokens; the gradient of x is a convolution again. On a GPU, for a compiler and for a single token, the convolution is
a plain sum of products.

Shapes: B sequences, T tokens, C channels, W tokens that an output sees, S = W - 1 + T tokens (earlier inputs first).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_e2e.ops import tuning
from ttt_e2e.ops.derivatives import last_derivative, wants_definition
from ttt_e2e.ops.elementwise import accumulation_dtype


def short_convolution(
    x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y_t = silu(bias + sum_i weight[:, i] x_{t - W + 1 + i}), and the state for the next tokens; differentiable once.

    Args:
        x_BTC: Inputs. Results have their dtype.
        weight_CW, bias_C: Weights, and biases or None.
        state: The W - 1 inputs before the first [B, W - 1, C]; None for zeros, at the start of a text.
    """
    x_BSC = _with_earlier(x_BTC, weight_CW, state)
    tokens = x_BTC.shape[1]
    if x_BTC.numel() == 0:  # no sequences, or no tokens
        y_BTC = x_BTC.clone()
    elif tokens == 1 or x_BTC.is_cuda or wants_definition():
        y_BTC = _sum_of_products(x_BSC, weight_CW, bias_C, tokens)
    else:
        bias_C = None if bias_C is None else bias_C.to(x_BSC.dtype)
        y_BTC = _ConvolutionSiLU.apply(x_BSC, weight_CW.to(x_BSC.dtype), bias_C)
    return y_BTC, x_BSC[:, tokens:].clone()


def short_convolution_reference(
    x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition of `short_convolution`."""
    x_BSC = _with_earlier(x_BTC, weight_CW, state)
    return _sum_of_products(x_BSC, weight_CW, bias_C, x_BTC.shape[1]), x_BSC[:, x_BTC.shape[1] :].clone()


def _with_earlier(x_BTC: Tensor, weight_CW: Tensor, state: Tensor | None) -> Tensor:
    if state is None:
        state = x_BTC.new_zeros(x_BTC.shape[0], weight_CW.shape[1] - 1, x_BTC.shape[2])
    return torch.cat((state.to(x_BTC.dtype), x_BTC), 1)


def _sum_of_products(x_BSC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, tokens: int) -> Tensor:
    x_wide, w_wide = x_BSC.to(accumulation_dtype(x_BSC.dtype)), weight_CW.to(accumulation_dtype(x_BSC.dtype))
    y_BTC = x_wide[:, :tokens] * w_wide[:, 0]
    for i in range(1, weight_CW.shape[1]):
        y_BTC = torch.addcmul(y_BTC, x_wide[:, i : i + tokens], w_wide[:, i])
    return F.silu(y_BTC if bias_C is None else y_BTC + bias_C).to(x_BSC.dtype)


class _ConvolutionSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSC: Tensor, weight_CW: Tensor, bias_C: Tensor | None) -> Tensor:
        sums_BTC = _convolve(x_BSC, weight_CW, bias_C)
        ctx.save_for_backward(x_BSC, weight_CW, sums_BTC)
        ctx.has_bias = bias_C is not None
        return F.silu(sums_BTC)

    @staticmethod
    @last_derivative
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_BSC, weight_CW, sums_BTC = ctx.saved_tensors
        (batch, tokens, channels), width = sums_BTC.shape, weight_CW.shape[1]
        padded = sums_BTC.new_zeros(batch, tokens + 2 * (width - 1), channels)
        g_BTC = padded[:, width - 1 : width - 1 + tokens]
        torch.ops.aten.silu_backward.grad_input(grads[0], sums_BTC, grad_input=g_BTC)
        grad_x = _convolve(padded, weight_CW.flip(1), None) if ctx.needs_input_grad[0] else None

        grad_weight = torch.zeros(width, channels, dtype=accumulation_dtype(g_BTC.dtype), device=g_BTC.device)
        grad_bias = torch.zeros_like(grad_weight[0])
        block = max(1, tuning.CONVOLUTION_BLOCK // (batch * channels))
        for start in range(0, tokens, block):
            part = g_BTC[:, start : start + block]
            grad_bias += part.sum((0, 1), dtype=grad_bias.dtype)
            for i in range(width):
                seen = x_BSC[:, start + i : start + i + part.shape[1]]
                grad_weight[i] += (part * seen).sum((0, 1), dtype=grad_weight.dtype)
        return grad_x, grad_weight.t().to(g_BTC.dtype), grad_bias.to(g_BTC.dtype) if ctx.has_bias else None


def _convolve(x_BSC: Tensor, weight_CW: Tensor, bias_C: Tensor | None) -> Tensor:
    """The convolution without padding, which has W - 1 tokens fewer than x."""
    x_BC1S = x_BSC.mT.unsqueeze(2)
    return F.conv2d(x_BC1S, weight_CW[:, None, None], bias_C, groups=x_BSC.shape[2]).squeeze(2).mT
