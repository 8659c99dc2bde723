"""What vLLM computes with an adapter of `ttt-e2e export lora`, beside the session that it was made of.

    python benchmarks/lora_vllm.py book.session NEXT.txt --model smollm2 --base plain --adapter lora

The text is scored in stretches that fit the model's window, each behind BOS alone, with learning off: by vLLM in
float32 with the base and with base and adapter, and by the model in float32 with and without what the session has
learned. Mean nats per token, and the largest difference of two log probabilities of a token of the text.
docs/tutorials/convert.md has the commands that write base and adapter.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from vllm import LLM, SamplingParams, TokensPrompt  # type: ignore[import-not-found]
from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

from ttt_e2e.cli.common import model_folder
from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.streaming import forward, start_reading

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM 0.32 knows for --max-lora-rank


@torch.no_grad()
def main() -> None:
    """Score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("session", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--stretches", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of a stretch, BOS among them; at most the window")
    arguments = parser.parse_args()
    model, tokenizer = load_model(model_folder(arguments.model))
    fast = Session.load(arguments.session, model, tokenizer).state().read_state.loop.fast
    ids = np.concatenate([*tokenizer.encode_chunks([arguments.text.read_text()])])
    step = arguments.tokens - 1
    texts = [np.array([tokenizer.bos, *ids[i * step : (i + 1) * step]]) for i in range(arguments.stretches)]
    rank = json.loads((Path(arguments.adapter) / "adapter_config.json").read_text())["r"]
    other = LLM(
        arguments.base,
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        lora_target_modules=["gate_up_proj", "down_proj"],  # with the head among them, prompts get no log probabilities
        max_lora_rank=min(one for one in MAX_RANKS if one >= rank),
        max_model_len=arguments.tokens + 1,
    )
    prompts = [TokensPrompt(prompt_token_ids=text.tolist()) for text in texts]
    options = SamplingParams(max_tokens=1, prompt_logprobs=0)
    for name, adapter in (("nothing that was learned", None), ("what was learned", arguments.adapter)):
        ours: list[Tensor] = []
        for text in texts:
            state = start_reading(model, 1)
            if adapter:
                state = state._replace(loop=state.loop._replace(fast=fast))
            logits = forward(model, state, torch.tensor(text)[None])[0][0]
            ours.append(logits[:-1].log_softmax(-1).gather(1, torch.tensor(text[1:, None]))[:, 0])
        request = LoRARequest("learned", 1, adapter) if adapter else None
        theirs = [
            torch.tensor([found[int(id)].logprob for id, found in zip(text[1:], one.prompt_logprobs[1:], strict=True)])
            for text, one in zip(texts, other.generate(prompts, options, lora_request=request), strict=True)
        ]
        one, two = torch.cat(ours), torch.cat(theirs)
        losses = f"{-float(one.mean()):.5f}, vLLM {-float(two.mean()):.5f}"
        apart = float((one - two).abs().max())
        print(f"{name}: {losses} nats per token; log probabilities differ by {apart:.2g} at most", flush=True)


if __name__ == "__main__":
    main()
