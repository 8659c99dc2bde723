"""Mamba 2 and Gated DeltaNet against transformers' PyTorch implementations of them, on a CPU.

    python benchmarks/mixers.py                    # forward, and forward with backward, of both layers
    python benchmarks/mixers.py --mixers mamba2 --length 8192 --rounds 5

Needs transformers. Each of our layers has the weights of the layer of transformers that it is compared with
(`Mamba2Mixer`, and Qwen3-Next's `Qwen3NextGatedDeltaNet`), and gets the same input. The backward pass computes the
gradients of the input and of all weights. Both take turns in one process, round after round; the ratio is taken within
each round, and the median over rounds is printed. "off by" is the largest difference between the two outputs, divided
by the largest output.
"""

import argparse
import json
import os

# As in meta_step.py: a thread that sleeps between short operations costs more than it saves.
os.environ.setdefault("OMP_WAIT_POLICY", "active")
# transformers warns that its layers are slow without their CUDA libraries, which is what is measured here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.hardware import machine
from ttt_e2e.model.mixers.base import Positions
from ttt_e2e.model.mixers.gated_deltanet import GatedDeltaNet
from ttt_e2e.model.mixers.mamba2 import Mamba2

TARGET = 1.0  # theirs / ours
NOWHERE = Positions(torch.empty(0), torch.empty(0))  # neither layer looks at positions

Layer = Callable[[Tensor], Tensor]


def make_mamba2(config: ModelConfig) -> tuple[nn.Module, nn.Module]:
    ours = Mamba2(config)
    ours.reset_parameters(config.initializer_range, torch.Generator().manual_seed(0))
    theirs_config = Mamba2Config(  # chunk_size is left at its default, 256
        hidden_size=config.hidden_size,
        expand=config.mamba2.expand,
        num_heads=ours.heads,
        head_dim=config.head_dim,
        state_size=config.mamba2.state_size,
        n_groups=config.mamba2.n_groups,
        conv_kernel=config.mamba2.conv_kernel,
        layer_norm_epsilon=config.rms_norm_eps,
        num_hidden_layers=1,
    )
    theirs = Mamba2Mixer(theirs_config, layer_idx=0)
    theirs.load_state_dict(
        {
            "in_proj.weight": ours.w_in,
            "conv1d.weight": ours.conv_weight[:, None],
            "conv1d.bias": ours.conv_bias,
            "A_log": ours.a_log,
            "dt_bias": ours.dt_bias,
            "D": ours.d_skip,
            "norm.weight": ours.norm,
            "out_proj.weight": ours.w_out,
        }
    )
    return ours, theirs


def make_gated_deltanet(config: ModelConfig) -> tuple[nn.Module, nn.Module]:
    ours = GatedDeltaNet(config)
    ours.reset_parameters(config.initializer_range, torch.Generator().manual_seed(0))
    heads, value_heads, width = (
        config.num_attention_heads,
        config.mamba2.expand * config.num_attention_heads,
        config.head_dim,
    )
    theirs_config = Qwen3NextConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=1,
        linear_num_key_heads=heads,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=width,
        linear_value_head_dim=width,
        linear_conv_kernel_dim=config.mamba2.conv_kernel,
        rms_norm_eps=config.rms_norm_eps,
        layer_types=["linear_attention"],
    )
    theirs = Qwen3NextGatedDeltaNet(theirs_config, layer_idx=0)

    def by_head(*parts: Tensor) -> Tensor:
        """The rows of all parts that belong to the first key head, then those of the second, and so on."""
        return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 1)

    rows = (heads * width, heads * width, value_heads * width, value_heads * width)
    theirs.load_state_dict(
        {
            "in_proj_qkvz.weight": by_head(*ours.w_in.split(rows)),
            "in_proj_ba.weight": by_head(*ours.w_ba.chunk(2)),
            "conv1d.weight": ours.w_conv[:, None],
            "A_log": ours.a_log,
            "dt_bias": ours.dt_bias,
            "norm.weight": ours.norm,
            "out_proj.weight": ours.w_out,
        }
    )
    return ours, theirs


PAIRS = {"mamba2": make_mamba2, "gated-deltanet": make_gated_deltanet}


@torch.no_grad()
def forward(layer: Layer, x_BTD: Tensor) -> Tensor:
    return layer(x_BTD)


def forward_backward(layer: Layer, x_BTD: Tensor) -> None:
    layer(x_BTD).sum().backward()


def seconds(run: Callable[[Layer, Tensor], object], layer: Layer, x_BTD: Tensor) -> float:
    start = time.perf_counter()
    run(layer, x_BTD)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    shape = dict(hidden_size=args.width, num_attention_heads=args.heads)
    config = ModelConfig(
        vocab_size=1,
        num_hidden_layers=1,
        intermediate_size=1,
        mini_batch_size=None,
        pattern=tuple(args.mixers),
        **shape,
    )
    generator = torch.Generator().manual_seed(1)
    x_BTD = torch.randn(args.batch, args.length, args.width, generator=generator).requires_grad_()
    rows = []
    print("| mixer | what | ours, ms | transformers, ms | theirs / ours | target | off by |")
    print("|---|---|---|---|---|---|---|")
    for name in args.mixers:
        ours, theirs = PAIRS[name](config)
        layers: dict[str, Layer] = {"ours": lambda x, ours=ours: ours(x, NOWHERE, None)[0], "theirs": theirs}
        expected = forward(layers["theirs"], x_BTD)
        off = ((forward(layers["ours"], x_BTD) - expected).abs().max() / expected.abs().max()).item()
        for what, run in (("forward", forward), ("forward + backward", forward_backward)):
            for layer in layers.values():
                seconds(run, layer, x_BTD)
            times: dict[str, list[float]] = {key: [] for key in layers}
            for _ in range(args.rounds):
                for key, layer in layers.items():
                    times[key].append(seconds(run, layer, x_BTD))
            row = {
                "mixer": name,
                "what": what,
                "ours_seconds": statistics.median(times["ours"]),
                "theirs_seconds": statistics.median(times["theirs"]),
                "ratio": statistics.median(t / o for o, t in zip(times["ours"], times["theirs"], strict=True)),
                "target": TARGET,
                "off_by": off,
            }
            rows.append(row)
            print(
                f"| {name} | {what} | {1e3 * row['ours_seconds']:.1f} | {1e3 * row['theirs_seconds']:.1f} "
                f"| {row['ratio']:.2f} | >= {TARGET} | {off:.1e} |",
                flush=True,
            )
    result = {
        "config": {
            **shape,
            "mamba2.expand": config.mamba2.expand,
            "mamba2.state_size": config.mamba2.state_size,
            "dtype": "float32",
        },
        "batch": args.batch,
        "length": args.length,
        "threads": args.threads,
        "rounds": args.rounds,
        "machine": {
            **machine(),
            "transformers": transformers.__version__,
        },
        "seed": 0,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
