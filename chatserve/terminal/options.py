"""The options of `chatserve chat`. Light: it is read for `chatserve --help` too."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

URL_DEFAULT = "http://127.0.0.1:8000"
URL_VARIABLE = "CHATSERVE_URL"
KEY_VARIABLE = "CHATSERVE_API_KEY"
_KEY_BYTES_MAX = 4_096

EPILOG = f"""\
The key is read from --key-file, else from {KEY_VARIABLE}; never from the command line, which
others on the machine can see. {URL_VARIABLE} stands for --url.

examples:
  chatserve chat
  chatserve chat --url https://chat.example.org --key-file ~/.chatserve-key
  echo "What is a page?" | chatserve chat
"""


class OptionError(Exception):
    """An option cannot be used; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """Checked. history: where lines are kept between runs; None: nowhere."""

    url: str
    key: str | None
    conversation: str | None
    draft: bool
    history: Path | None


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """The options, with their help."""
    parser.add_argument("--url", help=f"the server (default: {URL_DEFAULT})")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="a file with an API key")
    parser.add_argument("--conversation", metavar="ID", help="go on with this conversation")
    parser.add_argument(
        "--no-draft",
        action="store_true",
        help="do not send what is being typed; with it the server can begin to read early",
    )
    parser.add_argument(
        "--no-history", action="store_true", help="do not keep typed lines between runs"
    )


def chat_options(given: argparse.Namespace, environment: Mapping[str, str]) -> ChatOptions:
    """What was asked for. Raises OptionError."""
    key = environment.get(KEY_VARIABLE) or None
    if given.key_file is not None:
        key = _key_in(given.key_file)
    return ChatOptions(
        url=given.url or environment.get(URL_VARIABLE) or URL_DEFAULT,
        key=key,
        conversation=given.conversation,
        draft=not given.no_draft,
        history=None if given.no_history else _history_file(environment),
    )


def _key_in(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_KEY_BYTES_MAX + 1)
        key = content.decode("ascii").strip()
    except OSError as error:
        raise OptionError(f"--key-file: {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"--key-file: {path} holds no key.") from error
    if not key or len(content) > _KEY_BYTES_MAX or len(key.split()) != 1:
        raise OptionError(f"--key-file: {path} holds no key.")
    return key


def _history_file(environment: Mapping[str, str]) -> Path:
    state = environment.get("XDG_STATE_HOME")
    folder = Path(state) if state else Path(os.path.expanduser("~")) / ".local" / "state"
    return folder / "chatserve" / "chat_history"
