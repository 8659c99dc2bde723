"""What vLLM computes with an adapter of `ttt-e2e export lora`, beside the session that it was made of.

    python benchmarks/lora_vllm.py book.session NEXT.txt --model smollm2 --base plain --adapter lora

The text is scored in stretches that fit the model's window, each behind BOS alone, with learning off: by vLLM in
float32 with the base and with base and adapter, and by the model in float32 with and without what the session has
learned. Mean nats per token, and the largest difference of two log probabilities of a token of the text.
docs/tutorials/convert.md has the commands that write base and adapter.
"""

import json
from pathlib import Path

import torch
from lora_text import open_text
from torch import Tensor
from vllm import LLM, SamplingParams, TokensPrompt  # type: ignore[import-not-found]
from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM 0.32 knows for --max-lora-rank


@torch.no_grad()
def main() -> None:
    """Score and print."""
    arguments, texts, logits = open_text(__doc__)
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
            log_p = logits(text, learned=adapter is not None)[:-1].log_softmax(-1)
            ours.append(log_p.gather(1, torch.tensor(text[1:, None]))[:, 0])
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
