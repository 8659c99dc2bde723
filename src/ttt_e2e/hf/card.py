"""The README.md of a model that was written for transformers: its card on the Hugging Face Hub."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttt_e2e.config.schema import ModelConfig

_HUB_NAME = r"[\w.-]+/[\w.-]+"


def model_card(config: ModelConfig, parameters: int, notes: Mapping[str, Any], *, plain: bool) -> str:
    """The card in Markdown, with its metadata in front; licence, data and measurements are for the author to add.

    Args:
        config: of the model.
        parameters: how many it has.
        notes: those in the model folder's config.json.
        plain: whether it was written as a model of transformers' own (`hf.plain`).
    """
    metadata = ["library_name: transformers", "pipeline_tag: text-generation"]
    source = str(notes.get("source"))
    if re.fullmatch(_HUB_NAME, source) and not Path(source).exists():
        metadata.append(f"base_model: {source}")
    metadata.append(f"tags: [{'text-generation' if plain else 'ttt-e2e, test-time-training'}]")
    facts = [f"| parameters | {parameters:,} |", f"| blocks | {config.num_hidden_layers} |"]
    if notes.get("source"):
        facts.append(f"| made of | {source} |")
    if "tokens" in notes:
        facts.append(f"| trained on | {notes['tokens']:,} tokens |")
    imports, about = "", "It learns nothing while it reads."
    if not plain and config.can_learn:
        facts += [
            f"| blocks that learn | the last {config.suffix_layers} |",
            f"| window | {config.sliding_window:,} tokens |",
            f"| an update every | {config.mini_batch_size:,} tokens |",
        ]
        about = (
            "It goes on training on what it reads (end-to-end test-time training, "
            "[arXiv 2512.23675](https://arxiv.org/abs/2512.23675)), and needs the Python package `ttt-e2e`."
        )
    if not plain:
        imports = "import ttt_e2e.hf  # the model's class\n"
    return "\n".join(
        [
            *("---", *metadata, "---", "", "# Model card", "", about, ""),
            *("| | |", "|---|---|", *facts, ""),
            *("```python", f"{imports}from transformers import pipeline", ""),
            *(
                'write = pipeline("text-generation", "OWNER/NAME")',
                'print(write("Once more", max_new_tokens=50))',
                "```",
            ),
            *("", "To be added: licence, training data, measurements, what it should not be used for.", ""),
        ]
    )
