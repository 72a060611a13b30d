"""What a model's files tell at a look, and what they must be: before anything is started.

It opens nothing that is large and imports nothing that is slow, so that a mistyped folder costs one
line and no server of Redis, no data folder, no seconds. What it lets pass is looked at in earnest
by whoever reads it (`model/checkpoint.py`, `chat/text/template.py`), in the same words.
"""

import json
from pathlib import Path

from chatserve.errors import ModelRefused, SettingsError


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
