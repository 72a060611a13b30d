"""The command line: parse, start, and say in one line what is wrong.

Heavy imports (torch, transformers) happen while the model loads, so that `--help` and a wrong
option answer at once.
"""

import argparse
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from chatserve import __version__
from chatserve.cache_command import DESCRIPTION as CACHE_DESCRIPTION
from chatserve.cache_command import add_cache_options, run_cache_command
from chatserve.errors import SettingsError, StartError
from chatserve.log_lines import set_up_logging
from chatserve.settings import ENVIRONMENT_PREFIX, Settings, add_options, read_settings
from chatserve.terminal.options import EPILOG as CHAT_EPILOG
from chatserve.terminal.options import OptionError, add_chat_options, chat_options

if TYPE_CHECKING:
    from chatserve.lifespan import Load

EXIT_CANNOT_START = 2

_EPILOG = f"""\
Every option can also be set in the environment ({ENVIRONMENT_PREFIX}PORT=9000; lists with
commas) or in a TOML file (--config). The command line wins over the environment, the environment
over the file.

examples:
  chatserve serve                           the small demonstration model, on this machine only
  chatserve serve ~/models/Qwen3-0.6B       a model from a local folder
  chatserve serve Qwen/Qwen3-0.6B --host 0.0.0.0 --api-key "$KEY"
"""


def run(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help()
        return 0
    try:
        if given.command == "chat":
            return _chat(given)
        if given.command == "cache":
            return run_cache_command(given)
        settings = read_settings(given, os.environ)
        return serve(settings)
    except StartError as error:
        print(f"chatserve: {error.message}", file=sys.stderr)
        return EXIT_CANNOT_START


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chatserve", description="A streaming chat server with a persistent prefix cache."
    )
    parser.add_argument("--version", action="version", version=f"chatserve {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model: chat page, OpenAI-compatible API, metrics.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(serve)
    chat = commands.add_parser(
        "chat",
        help="chat with a server in the terminal",
        description="Chat in the terminal: conversations of a running chatserve.",
        epilog=CHAT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_chat_options(chat)
    cache = commands.add_parser(
        "cache",
        help="see or empty the cache of a running server",
        description=CACHE_DESCRIPTION,
        allow_abbrev=False,
    )
    add_cache_options(cache)
    return parser


def _chat(given: argparse.Namespace) -> int:
    try:
        options = chat_options(given, os.environ)
    except OptionError as error:
        raise SettingsError(str(error)) from error
    # Imported here: these bring in the client and what draws on a terminal.
    from chatserve.terminal.terminal import run_chat

    return run_chat(options)


def serve(settings: Settings, load: "Load | None" = None) -> int:
    """Serve until a signal; the exit status. Raises StartError. load: as for Serving."""
    set_up_logging(settings.log_level)
    # Read once, when torch is imported. By default OpenMP's threads spin while they wait for each
    # other; where anything else runs on the machine (our own event loop, say) a step then takes
    # up to a hundred times as long (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Imported here: these bring in the web stack.
    from chatserve.api.keys import key_ring
    from chatserve.lifespan import Serving

    keys = key_ring(api_key=settings.api_key, key_file=settings.api_key_file)
    if not keys and not _is_loopback(settings.host):
        raise SettingsError(
            f"--host {settings.host} can be reached from other machines: "
            "set --api-key or --api-key-file."
        )
    listener = _listen(settings)
    with listener:
        port = listener.getsockname()[1]
        serving = Serving(settings, keys, port=port, announce=_announce, load=load)
        return serving.run(listener)


def _announce(url: str, model: str, seconds: float) -> None:
    print(f"chatserve {__version__}: {model} is ready after {seconds:.1f} s", file=sys.stderr)
    print(f"  chat page   {url}/", file=sys.stderr)
    print(f"  OpenAI API  {url}/v1", file=sys.stderr)
    print("  Ctrl-C stops the server", file=sys.stderr, flush=True)


def _listen(settings: Settings) -> socket.socket:
    """A bound socket; a port in use is known before any model is loaded."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SettingsError(
            f"Cannot listen on {settings.host}:{settings.port}: {reason}."
        ) from error
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
