"""The work's pieces compiled: the prefix, the loss head, and a mini-batch's forward, inner gradient and update in one.

The mini-batch is compiled, never the loop: caches have all their slots from the start and a mask says which are filled,
so every mini-batch of a sequence runs the same code. Inside, the operators' plain twins are used, which the compiler
fuses.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from ttt_e2e.inner_loop.step import EAGER, LoopFunctions


def compiled_functions(device: torch.device | str = "cpu", backend: str = "inductor") -> LoopFunctions:
    """The functions of `EAGER`, each compiled at its first call for the shapes it is given.

    On a CUDA device they run as CUDA graphs, without launch overhead; what reading returns is then copied out of the
    graph's memory, since a session keeps it. Where compilation fails (no C++ compiler, an operation
    that is not supported) the plain function takes over, with one warning.
    """
    graphs = torch.device(device).type == "cuda" and backend == "inductor"
    options: dict[str, Any] | None = {"triton.cudagraphs": True} if graphs else None
    warned: list[bool] = []

    def compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
        fast = torch.compile(plain, fullgraph=True, dynamic=False, backend=backend, options=options)
        failed = False

        def call(*args: Any) -> Any:
            nonlocal failed
            if not failed:
                try:
                    return fast(*args)
                except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                    failed = True
                    if not warned:
                        warned.append(True)
                        cause = getattr(error, "inner_exception", error)
                        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0].strip("\"'")
                        warnings.warn(f"Going on without compilation, which failed: {reason}", stacklevel=2)
            return plain(*args)

        return call

    steps = LoopFunctions(
        forward_prefix=compiled(EAGER.forward_prefix),
        losses=compiled(EAGER.losses),
        score=compiled(EAGER.score),
        inner_step=compiled(EAGER.inner_step),
        read_and_learn=compiled(EAGER.read_and_learn),
        fixed=True,
    )
    if not graphs:
        return steps

    def read_and_learn(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return torch.utils._pytree.tree_map(torch.clone, steps.read_and_learn(*args))

    return steps._replace(read_and_learn=read_and_learn)
