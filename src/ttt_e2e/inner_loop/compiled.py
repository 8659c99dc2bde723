"""The loop's functions compiled: the prefix, the loss head, and a mini-batch's forward, inner gradient and update.

The mini-batch is compiled, never the loop: caches have all their slots from the start and a mask says which are filled,
so that every mini-batch of a sequence runs the same code. Inside, the operators' plain twins are used, which the
compiler fuses.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from ttt_e2e.inner_loop.functions import EAGER, LoopFunctions
from ttt_e2e.inner_loop.step import InnerLoopState
from ttt_e2e.model.kv_cache import KVCache
from ttt_e2e.model.transformer import Transformer


def compiled_functions(
    device: torch.device | str = "cpu", backend: str = "inductor", sharded: Transformer | None = None
) -> LoopFunctions:
    """The functions of `EAGER`, each compiled at its first call for the shapes that it is given.

    On a CUDA device they run as CUDA graphs, without launch overhead; what reading returns is then copied out of the
    graph's memory, since a session keeps it. Where compilation fails (no C++ compiler, an operation that is not
    supported) the plain function takes over, with one warning.

    sharded: the model, if its weights are gathered from several processes before each prefix block runs. Then its
    prefix blocks are compiled in place, one by one, and without CUDA graphs, for which weights must not move.
    """
    graphs = torch.device(device).type == "cuda" and backend == "inductor" and sharded is None
    options: dict[str, Any] | None = {"triton.cudagraphs": True} if graphs else None
    warned: list[bool] = []

    def compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
        fast = torch.compile(plain, fullgraph=True, dynamic=False, backend=backend, options=options)
        failed = False

        def call(*args: Any, **options: Any) -> Any:
            nonlocal failed
            if not failed:
                try:
                    return fast(*args, **options)
                except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
                    failed = True
                    if not warned:
                        warned.append(True)
                        cause = getattr(error, "inner_exception", error)
                        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0].strip("\"'")
                        warnings.warn(f"Continuing without compilation, which failed: {reason}", stacklevel=2)
            return plain(*args, **options)

        return call

    if sharded is not None:
        for block in sharded.prefix:
            block.forward = compiled(block.forward)  # type: ignore[method-assign]
    functions = LoopFunctions(
        forward_prefix=compiled(EAGER.forward_prefix) if sharded is None else EAGER.forward_prefix,
        losses=compiled(EAGER.losses),
        mini_batch_loss=compiled(EAGER.mini_batch_loss),
        inner_step=compiled(_inner_step),
        read_and_learn=compiled(_read_and_learn),
        static_cache=True,
    )
    if not graphs:
        return functions

    def read_and_learn(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return torch.utils._pytree.tree_map(torch.clone, functions.read_and_learn(*args))

    return functions._replace(read_and_learn=read_and_learn)


def _inner_step(*args: Any) -> Any:
    state, *rest = EAGER.inner_step(*args)
    return InnerLoopState(state.fast, _contiguous(state.caches)), *rest


def _read_and_learn(*args: Any) -> Any:
    static, state, *rest = EAGER.read_and_learn(*args)
    return _contiguous(static), InnerLoopState(state.fast, _contiguous(state.caches)), *rest


def _contiguous(caches: tuple[KVCache, ...]) -> tuple[KVCache, ...]:
    """The caches in memory of their own: how they were cut from a larger one must not tell mini-batches apart."""
    return tuple(cache.contiguous() for cache in caches)
