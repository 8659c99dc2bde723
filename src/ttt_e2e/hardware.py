"""What figures were measured on."""

import os
import platform
from pathlib import Path
from typing import Any

import torch


def machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """The machine and the versions, as plain values to stand beside a figure. device: where the work is done."""
    chosen = torch.device(device)
    known: dict[str, Any] = {
        "device": chosen.type,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if chosen.type == "cuda":
        known |= {"gpu": torch.cuda.get_device_name(chosen), "cuda": torch.version.cuda}
    return known


def _processor() -> str:
    """Its name, with what its matrix products depend on: the widest vectors, and tiles, that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    facts = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    flags = {*facts.get("flags", "").split()}
    has = [name for flag, name in (("avx512f", "AVX-512"), ("amx_bf16", "AMX")) if flag in flags]
    return ", ".join([facts.get("model name", platform.machine()), *has])
