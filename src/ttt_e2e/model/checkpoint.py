"""A model as a folder: config.json, model.safetensors and, if it has one, tokenizer.json.

Weights are safetensors, never a pickle, which could run code. Their header holds a digest of names, shapes and float32
values, so that an altered file is refused, and so that a saved session recognises the model that it belongs to.
config.json has the digests of the other files and of itself; a file that is put there later has none.
"""

import hashlib
import json
import shutil
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ttt_e2e.config.parse import from_dict, to_dict
from ttt_e2e.config.schema import ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.files import atomic_path, check_file, file_digest, read_verified_json, with_digest
from ttt_e2e.model.precision import Rounded, hold_in, is_smaller, product_matrices
from ttt_e2e.model.trainable import plain_weights
from ttt_e2e.model.transformer import Transformer

FORMAT = "ttt-e2e model"
VERSION = 4
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
GENERATION, TOKENIZER_CONFIG, CHAT_TEMPLATE = "generation_config.json", "tokenizer_config.json", "chat_template.jinja"
SPECIAL_TOKENS = "special_tokens_map.json"
PRETRAINED_METADATA = (GENERATION, TOKENIZER_CONFIG, CHAT_TEMPLATE, SPECIAL_TOKENS)
"""Files that a pretrained model may have beside its tokenizer; they are copied wherever the tokenizer is copied."""


def save_model(
    model: Transformer,
    folder: Path,
    tokenizer_json: Path | str | None,
    dtype: torch.dtype | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write `model` to `folder`, complete or not at all.

    Args:
        model, folder: the folder is replaced if it exists.
        tokenizer_json: a tokenizer file to copy into it, together with the `PRETRAINED_METADATA` beside that file.
        dtype: the weights are rounded to this in the file; None: not rounded.
        notes: plain values for people, such as where the model comes from.

    Raises UserError if the disk is full, the folder cannot be written, or the model was loaded with rounded weights.
    """
    with atomic_path(Path(folder)) as part:
        part.mkdir()
        write_model_files(model, part, tokenizer_json, dtype, notes)


def write_model_files(
    model: Transformer,
    folder: Path,
    tokenizer_json: Path | str | None,
    dtype: torch.dtype | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write the files of `save_model` straight into an existing `folder`, which the caller makes atomic."""
    model.check_products(torch.float32)
    weights = plain_weights(model)
    tensors = {name: w.detach().to("cpu", dtype or w.dtype).contiguous() for name, w in weights.items()}
    # One metadata entry only: the library writes several in any order, and equal models should be equal files.
    save_safetensors(tensors, folder / WEIGHTS, {"digest": weights_digest(tensors)})
    if tokenizer_json is not None:
        shutil.copyfile(tokenizer_json, folder / TOKENIZER)
        copy_pretrained_metadata(Path(tokenizer_json).parent, folder)
    write_config(model.config, folder, notes)


def copy_pretrained_metadata(source: Path, target: Path) -> None:
    """Copy those of the `PRETRAINED_METADATA` files that the folder `source` has to the folder `target`."""
    for name in PRETRAINED_METADATA:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_config(config: ModelConfig, folder: Path, notes: Mapping[str, Any] | None = None) -> None:
    """Write config.json: format, version, settings, notes and the other files of the model in `folder`.

    It is written last, since it has the digests of the tokenizer and of what is beside it.
    """
    present = [folder / name for name in (TOKENIZER, *PRETRAINED_METADATA) if (folder / name).is_file()]
    files = {file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)} for file in present}
    content = {"format": FORMAT, "version": VERSION, "model": to_dict(config), "notes": dict(notes or {})}
    text = json.dumps(with_digest(content | {"files": files}), indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def load_transformer(
    folder: Path, device: str | torch.device = "cpu", products: torch.dtype = torch.float32
) -> Transformer:
    """The model in `folder`, on `device`, its weights in float32 whatever the file holds.

    products: the dtype of the matrix products that the model is for. With a smaller one it holds the matrices in it
    that they would round; then it serves no other, and is neither trained nor saved.

    Raises UserError if `folder` is not a model, or if its files are incomplete, altered or of another version.
    """
    with torch.device("meta"):  # no initial weights are drawn, only to be overwritten
        model = Transformer(load_config(folder))
    weights = dict(model.named_parameters())
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    hold_in(products, (weights[name] for name in product_matrices(model.config, shapes)))
    model.to_empty(device=device)
    digest = read_weights(model, folder)
    if is_smaller(products):
        model.rounded = Rounded(products, digest)
    return model


def load_config(folder: Path) -> ModelConfig:
    """The configuration of the model in `folder`. Raises UserError as `load_transformer` does."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no model folder {folder}; give the path of a folder with {CONFIG} and {WEIGHTS}.")
    missing = next((name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()), None)
    if missing is not None:
        inside = [folder / "model", *sorted((folder / "checkpoints").glob("step-*"), reverse=True)]
        hint = next((f" Its newest model is {inner}." for inner in inside if (inner / WEIGHTS).is_file()), "")
        raise UserError(f"{folder} is not a model folder: it has no {missing}.{hint}")
    content = read_verified_json(folder / CONFIG, FORMAT, VERSION, "convert or train the model again")
    for name, file in content["files"].items():
        check_file(folder / name, file["bytes"], file["sha256"], "use an unaltered copy of the folder")
    return from_dict(ModelConfig, content["model"], str(folder / CONFIG))


def read_weights(model: Transformer, folder: Path, absent: Container[str] = ()) -> str:
    """Fill the parameters of `model`, on any device, from `folder`; those named in `absent` stay what they are.

    Returns the digest of the weights in the file. Raises UserError as `load_transformer` does.
    """
    path = Path(folder) / WEIGHTS
    weights = {name: weight for name, weight in model.named_parameters() if name not in absent}
    tensors, metadata = load_safetensors(path, {name: tuple(weight.shape) for name, weight in weights.items()})
    if "digest" not in metadata:
        raise UserError(f"{path} was not written by ttt-e2e: it has no digest; convert the model first.")
    if weights_digest(tensors) != metadata["digest"]:
        raise UserError(f"{path} was altered after it was written: its digest does not match; use an unaltered copy.")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])
    return metadata["digest"]


def model_digest(model: Transformer) -> str:
    """A fingerprint of the weights: equal for equal names, shapes and float32 values, on any device.

    That of a model whose weights were rounded when they were loaded is that of its file.
    """
    return model.rounded.digest if model.rounded is not None else weights_digest(dict(model.named_parameters()))


def stored_digest(folder: Path) -> str | None:
    """The digest of the weights that is stored with the model in `folder`; None if there is none."""
    try:
        with safe_open(Path(folder) / WEIGHTS, "pt") as file:
            return (file.metadata() or {}).get("digest")
    except (OSError, SafetensorError):
        return None


def finite(weights: Tensor, dtype: torch.dtype, name: str, where: str) -> Tensor:
    """`weights` in `dtype`; raises UserError if one of them is not a finite number there.

    name, where: of the tensor and of the checkpoint that holds it.
    """
    converted = weights.to(dtype)
    if not converted.isfinite().all():
        raise UserError(
            f"{where} has weights in {name} that are not finite numbers in {dtype}, so its model would compute nothing "
            "but NaN; use another checkpoint."
        )
    return converted


def check_finite(model: nn.Module, where: str) -> None:
    """Raise UserError, as `finite` does, if a weight of `model` is not a finite number."""
    for name, weight in model.named_parameters():
        finite(weight, weight.dtype, name, where)


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """The digest of weights by name; see `model_digest`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1).numpy().data)
    return digest.hexdigest()


# -- safetensors files -------------------------------------------------------------------------------------------------


def save_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write `tensors` to `path` with the library, but raise OSError with its number if the disk is full."""
    try:
        path.touch()  # so that the file has the user's usual permissions; the library makes its own private
        mode = path.stat().st_mode
        save_file(dict(tensors), path, dict(metadata))
        path.chmod(mode)
    except SafetensorError as error:
        # The library wraps the operating system's error in a text: "I/O error: No space left ... (os error 28)".
        number = str(error).partition("(os error ")[2].partition(")")[0]
        if number.isdigit():
            raise OSError(int(number), str(error)) from error
        raise


def load_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in the file `path`, and its metadata.

    Raises UserError unless the tensors are floating point and have exactly the names and shapes of `shapes`.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; use a complete copy of the folder.")
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            for what, names in (("lacks", shapes.keys() - found), ("has unknown", found.keys() - shapes)):
                if names:
                    some = ", ".join(sorted(names)[:3]) + (" and more" if len(names) > 3 else "")
                    raise UserError(f"{path} {what} tensors: {some}; it does not belong to this model.")
            for name, part in found.items():
                if tuple(part.get_shape()) != shapes[name]:
                    raise UserError(
                        f"{name} in {path} has shape {part.get_shape()} where {list(shapes[name])} is expected; "
                        "the weights and their configuration do not belong together."
                    )
            tensors, metadata = {name: file.get_tensor(name) for name in found}, file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}); use a complete copy.") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{name} in {path} is {tensor.dtype}, not floating point; use an unaltered copy.")
    return tensors, metadata
