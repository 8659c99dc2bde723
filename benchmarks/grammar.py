"""What the mask of a grammar costs for each token: texts with and without one in turn, in CPU time.

python benchmarks/grammar.py [--model MODEL] [--tokens 32] [--rounds 3]
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from ttt_e2e.convert.named import find_model
from ttt_e2e.inference.grammar import Grammar, GrammarCompiler, Matcher, json_rule
from ttt_e2e.inference.load import load_model
from ttt_e2e.inference.pool_requests import Token
from ttt_e2e.inference.sampling import SamplingOptions
from ttt_e2e.inference.session import Session
from ttt_e2e.inference.session_pool import SessionPool
from ttt_e2e.server.tool_calls import HERMES, Function, Tools, answer_grammar

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "likes": {"type": "array", "items": {"type": "string"}, "minItems": 99}},
    "required": ["name", "likes"],
    "additionalProperties": False,
}
PROMPT = "Anna lives in Petersburg. She likes many things. As JSON:\n"


class TimedMatcher(Matcher):
    """Notes the CPU time of each mask, and of going on after a token."""

    def __init__(self, grammar: Grammar, seconds: list[float]) -> None:
        self.__dict__.update(grammar.matcher().__dict__)
        self.seconds = seconds

    def mask(self, logits_V: torch.Tensor) -> torch.Tensor:
        start = time.thread_time()
        masked = super().mask(logits_V)
        self.seconds.append(time.thread_time() - start)
        return masked

    def add(self, token: int) -> None:
        start = time.thread_time()
        super().add(token)
        self.seconds[-1] += time.thread_time() - start


def seconds_per_token(session: Session, tokens: int, matcher: Matcher | None) -> float:
    pool = SessionPool(session)
    ids = session.tokenizer.encode(PROMPT)  # type: ignore[union-attr]
    pool.submit_generate(pool.add(), ids, max_tokens=tokens, options=SamplingOptions(temperature=0), matcher=matcher)
    pool.step()  # reads the prompt
    start, count = time.thread_time(), 0
    while pool.busy:
        count += sum(isinstance(event, Token) for event in pool.step())
    return (time.thread_time() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="as for ttt-e2e (default: the shipped one)")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(find_model(arguments.model))
    session, compiler = Session(model, tokenizer), GrammarCompiler(tokenizer, model.config.vocab_size)
    function = Function("weather", None, {"type": "object", "properties": {"city": {"type": "string"}}}, "")
    for name, text in (
        ("a JSON Schema", f"start: {json_rule(SCHEMA)}"),
        ("free text, or a call", answer_grammar(Tools((function,)), HERMES, None)),
    ):
        grammar, masks, plain, masked = compiler.compile(text), list[float](), list[float](), list[float]()
        for _ in range(arguments.rounds):
            plain.append(seconds_per_token(session, arguments.tokens, None))
            masked.append(seconds_per_token(session, arguments.tokens, TimedMatcher(grammar, masks)))
        print(
            f"{name}: a token takes {1e3 * statistics.median(plain):.1f} ms without a mask, "
            f"{1e3 * statistics.median(masked):.1f} ms with one; a mask {1e6 * statistics.median(masks):.0f} µs, "
            f"at most {1e6 * max(masks):.0f} µs ({len(masks)} masks, {model.config.vocab_size} tokens)"
        )


if __name__ == "__main__":
    main()
