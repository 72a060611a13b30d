"""Which model is meant, what its files tell, and what they must be: before anything is started.

Two looks. `check_files` opens nothing that is large and imports nothing that is slow, so that a
mistyped folder costs one line and no data folder, no seconds. `examine` reads everything but the
weights as it will be served (`model/loader.py`, `chat/text/template.py`), so that a model that is
refused costs one line and no server of Redis.
"""

import json
from importlib.resources import files
from pathlib import Path

from chatserve.errors import ModelRefused, SettingsError

DEMONSTRATION_NAME = "chatserve-demonstration"


def model_folder(model: str | None) -> Path:
    """Where the model is. A hub id is resolved in the local hub cache by the loader's rules."""
    if model is None:
        folder = files("chatserve.demonstration") / "model"
        return Path(str(folder))
    return Path(model).expanduser()


def served_name(model: str | None, folder: Path) -> str:
    """What clients call the model where nothing else is said: its folder's name, or its hub id."""
    if model is None:
        return DEMONSTRATION_NAME
    return folder.resolve().name if folder.exists() else model


def check_files(folder: Path, chat_template: Path | None) -> None:
    """Raises ModelRefused for a model folder that is none, and SettingsError for a template that
    cannot be read. A name that may be a hub id is left to the hub."""
    if folder.exists() or folder.is_absolute():
        if not folder.exists():
            raise ModelRefused(f"There is no model folder '{folder}'")
        if not folder.is_dir():
            raise ModelRefused(f"The model '{folder}' is not a folder")
        if not (folder / "config.json").is_file():
            raise ModelRefused(f"The model folder '{folder}' has no config.json")
    if chat_template is not None:
        try:
            chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"--chat-template {chat_template}: {error}") from error


def examine(model: Path, chat_template: Path | None) -> None:
    """Judge a model by its config, tokenizer and template; its weights are not read but for their
    headers.

    model: a folder or a hub id, which is fetched here. Blocks, and imports transformers. Raises
    ModelRefused, and SettingsError for the template, with one sentence.
    """
    # Imported here: these bring in torch and transformers.
    from chatserve.chat.text.template import read_template
    from chatserve.chat.text.tokenizer import load_pretrained
    from chatserve.model.loader import examine_model

    folder = examine_model(model)
    _check_tokenizer(folder)
    read_template(load_pretrained(folder), template_file=chat_template)


def _check_tokenizer(folder: Path) -> None:
    """The libraries that read a tokenizer.json answer a broken one with the name of what they
    missed first."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return  # refused by whoever reads it, or not needed
    try:
        found: object = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelRefused(f"{path} cannot be read: {_one_line(error)}") from error
    lacking = [
        name
        for name, kind in (("model", dict), ("added_tokens", list))
        if not isinstance(found, dict) or not isinstance(found.get(name), kind)
    ]
    if lacking:
        raise ModelRefused(f"{path} is no tokenizer's: it has no '{lacking[0]}'")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def stated_context(folder: Path) -> int:
    """The context length that a config.json states, for limits that are needed before loading."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return 8_192
    if not isinstance(config, dict):
        return 8_192
    inner = config.get("text_config") or config
    if not isinstance(inner, dict):
        return 8_192
    stated = [inner.get(key) for key in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return next((value for value in stated if isinstance(value, int) and value > 0), 8_192)
