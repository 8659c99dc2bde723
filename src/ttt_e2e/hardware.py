"""The device to compute on, and a description of the machine that figures were measured on."""

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

import torch

from ttt_e2e.errors import UserError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`; "auto" is a GPU if there is one. Raises UserError if it does not exist.

    local_rank: the GPU to take where `name` does not say which.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"There is no device {name!r}; choose auto, cpu or cuda.") from error
    if device.type == "cuda":
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if not torch.cuda.is_available() or device.index >= torch.cuda.device_count():
            raise UserError(f"There is no device {name!r} here: {torch.cuda.device_count()} GPUs; choose cpu.")
    elif device.type != "cpu":
        raise UserError(f"Devices such as {name!r} are not supported; choose auto, cpu or cuda.")
    return device


def memory_bytes(device: str | torch.device) -> int:
    """The memory of the device, or of the whole machine for a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees, where its malloc is glibc's; for one that ends when its work does.

    A training step allocates and frees the same gigabytes again and again, and reading a mini-batch the same logits. By
    default they go back to the system each time, and come again page by page.
    """
    if platform.libc_ver()[0] == "glibc":
        malloc_trim_threshold, malloc_mmap_threshold = -1, -3  # as in malloc.h: never shrink the heap, and take from
        ctypes.CDLL(None).mallopt(malloc_trim_threshold, 2**31 - 1)  # it whatever is below 32 MiB, the most it takes
        ctypes.CDLL(None).mallopt(malloc_mmap_threshold, 32 << 20)


def machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """The machine and the versions that work on `device` depends on, as plain values to keep beside a figure."""
    chosen = torch.device(device)
    facts: dict[str, Any] = {
        "device": chosen.type,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if chosen.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(chosen), "cuda": torch.version.cuda}
    return facts


def _processor() -> str:
    """The processor's name, and the vector and tile extensions that its matrix products depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    first_core = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    flags = {*first_core.get("flags", "").split()}
    has = [name for flag, name in (("avx512f", "AVX-512"), ("amx_bf16", "AMX")) if flag in flags]
    return ", ".join([first_core.get("model name", platform.machine()), *has])
