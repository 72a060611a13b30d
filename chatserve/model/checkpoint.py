"""A model folder on disk: where it is, which files hold the weights, in which type.

May not know: model classes, pages, devices. Only safetensors files are ever read: other weight
formats can run code when they are opened.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from chatserve.errors import ModelRefused

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# What a hub model needs here: configs, safetensors, tokenizer files, chat template.
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete folder. weights: the safetensors files, in a fixed order. name: for people, the
    folder's or the hub id.
    """

    name: str
    folder: Path
    weights: tuple[Path, ...]


def open_checkpoint(model: Path | str) -> Checkpoint:
    """Find a model: a local folder, or a hub id (`owner/name`) in the hub's cache or on the hub.

    Raises ModelRefused with one sentence when there is none, or when it is not complete.
    """
    folder = Path(model)
    if not str(model) or not folder.exists():
        folder = _from_hub(model)
    if not folder.is_dir():
        raise ModelRefused(f"The model '{model}' is not a folder")
    if not (folder / "config.json").is_file():
        raise ModelRefused(f"The model folder '{model}' has no config.json")
    name = folder.resolve().name if folder == Path(model) else str(model)
    return Checkpoint(name=name, folder=folder, weights=_weight_files(folder, model))


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The safetensors name of the type that most weight elements are in, such as 'BF16'."""
    elements: dict[str, int] = {}
    for path in checkpoint.weights:
        for entry in _read_header(path).values():
            if isinstance(entry, dict) and "dtype" in entry:
                tensor = cast("dict[str, Any]", entry)
                begin, end = tensor["data_offsets"]
                elements[tensor["dtype"]] = elements.get(tensor["dtype"], 0) + end - begin
    if not elements:
        raise ModelRefused(f"The weight files in '{checkpoint.folder}' hold no tensors")
    return max(elements, key=elements.__getitem__)


def _read_header(path: Path) -> dict[str, Any]:
    """A safetensors file starts with its header's length (8 bytes, little-endian) and JSON."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("the header is not an object")
    except (OSError, ValueError) as error:
        raise ModelRefused(f"The weight file '{path}' is broken: {error}") from error
    return cast("dict[str, Any]", header)


def _weight_files(folder: Path, model: Path | str) -> tuple[Path, ...]:
    if (folder / _SINGLE).is_file():
        return (folder / _SINGLE,)
    if (folder / _INDEX).is_file():
        try:
            index = json.loads((folder / _INDEX).read_text())
            names = sorted({str(name) for name in index["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelRefused(f"The weight index of '{model}' is broken: {error}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelRefused(f"The model folder '{model}' lacks the weight file '{missing[0]}'")
        return tuple(folder / name for name in names)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise ModelRefused(
            f"The model folder '{model}' has only pickled weights (.bin or .pt), which can run "
            "code when they are opened; convert them to safetensors"
        )
    raise ModelRefused(f"The model folder '{model}' has no {_SINGLE}")


def _from_hub(model: Path | str) -> Path:
    name = str(model)
    if name.count("/") > 1 or name.startswith((".", "~", "/")) or not name:
        raise ModelRefused(f"There is no model folder '{name}'")
    # The hub's client comes with transformers; it is needed for hub ids only.
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_PATTERNS)))
    except Exception as error:  # whatever the network, the hub or its client raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelRefused(
            f"'{name}' is neither a model folder nor a model that the hub gives: {reason[:200]}"
        ) from error
