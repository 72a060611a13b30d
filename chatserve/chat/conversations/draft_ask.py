"""What a client says of a text that it has not sent yet. A frozen value between floors 5 and 4."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftAsk:
    """What is typed, and where. text: as far as it is; empty where a chat is only opened.

    conversation None: a new chat, with this system prompt. at_leaf: no parent was named.
    request: what a failure is told with.
    """

    request: str
    conversation: str | None
    text: str = ""
    at_leaf: bool = True
    parent: str | None = None
    system: str | None = None
