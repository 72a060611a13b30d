"""KnownIds: the ids of chats that clients send whole, found again by their messages.

It may not know replies under way or conversations. A client without a conversation on the server
sends every message each time, as texts, and encoding the text of an old reply could give other ids
than the model once emitted. Theory of operation: messages are named by a chain of keyed hashes,

    root = H(key; tenant, cache_salt, encoding)      name(M + m) = H(key; name(M), role, content, …)

and when a reply to M ends with text T, what it and its prompt appended is kept under
name(M + assistant T). A later prompt looks for a link at each of its assistant's messages; what
it finds goes to `prompt_ids.py`, which takes ids only where they say the text. So an evicted link
costs encoding, and nothing else.

    messages    system, user │ assistant │ user │ assistant │ user
    links                    └ ids of the prompt, told ids  └ what was appended to it, told ids

Names are of structured messages, never of rendered text, and of one tenant and cache_salt: what a
tenant has said says nothing to another. The key lives as long as the process.

Links are kept in the order of their last use, with bounds for their number and their bytes.
"""

import secrets
import struct
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from threading import Lock

from chatserve.chat.text.prompt_ids import KnownMessage, PromptIds
from chatserve.chat.values import ChatPrompt, Message

# A link has the ids of one exchange, 4 bytes each. 64 MiB are 16 million tokens; links of 1 KiB
# (some 200 tokens) fill them.
LINKS_MAX = 65_536
BYTES_MAX = 64 << 20
_LINK_BYTES = 512  # of a link beside its ids: name, arrays, places in the dictionary

ChainName = bytes


@dataclass(frozen=True, slots=True)
class FoundPrompt:
    """A prompt's ids. name: of its messages; None = a reply to it is not to be remembered."""

    tokens: tuple[int, ...]
    turn_ids: tuple[int, ...] | None
    name: ChainName | None


@dataclass(frozen=True, slots=True)
class KnownStatistics:
    """found: assistant's messages whose ids were known, of `asked` that were looked for."""

    links: int
    bytes: int
    asked: int
    found: int
    evicted: int


@dataclass(frozen=True, slots=True)
class _Link:
    """turn: what the messages before the reply appended. reply: its ids; as they were told until
    somebody asks for them, since fitting them to the text takes time."""

    turn: "array[int]"
    reply: "array[int]"
    ended_by_id: bool
    fitted: bool = False

    @property
    def bytes(self) -> int:
        return _LINK_BYTES + self.turn.itemsize * (len(self.turn) + len(self.reply))


class KnownIds:
    """One model's. `prompt` is for any thread, `remember` costs next to nothing."""

    def __init__(
        self, prompt_ids: PromptIds, *, links_max: int = LINKS_MAX, bytes_max: int = BYTES_MAX
    ) -> None:
        self._prompt_ids = prompt_ids
        self._links_max = links_max
        self._bytes_max = bytes_max
        self._key = secrets.token_bytes(32)
        self._lock = Lock()  # guards all below
        self._links: OrderedDict[ChainName, _Link] = OrderedDict()
        self._bytes = self._asked = self._found = self._evicted = 0

    def prompt(self, tenant: str, cache_salt: str, messages: Sequence[Message]) -> FoundPrompt:
        """The prompt of a reply to messages; the last one is no assistant's.

        Raises RequestError where the template refuses them.
        """
        known = [KnownMessage(message) for message in messages]
        name = self._hash(b"root", tenant, cache_salt, self._prompt_ids.encoding)
        for index, message in enumerate(messages):
            name = self._named(name, message)
            if message.role != "assistant":
                continue
            link = self._find(name, message.content)
            if link is not None:
                known[index] = KnownMessage(message, tuple(link.reply))
                if index and messages[index - 1].role != "assistant":
                    known[index - 1] = KnownMessage(messages[index - 1], tuple(link.turn))
        composed = self._prompt_ids.compose(known)
        return FoundPrompt(composed.tokens, composed.turn_ids, name)

    def remember(
        self,
        prompt: FoundPrompt,
        told_ids: Sequence[int],
        text: str,
        *,
        ended_by_id: bool = False,
    ) -> None:
        """A reply to a prompt has ended. told_ids, ended_by_id: `SampleText`'s; text: all that it
        showed."""
        if prompt.name is None or prompt.turn_ids is None:
            return
        name = self._named(prompt.name, Message("assistant", text))
        self._put(name, _Link(array("i", prompt.turn_ids), array("i", told_ids), ended_by_id))

    def statistics(self) -> KnownStatistics:
        """A frozen picture."""
        with self._lock:
            return KnownStatistics(
                len(self._links), self._bytes, self._asked, self._found, self._evicted
            )

    # Links ----------------------------------------------------------------------------------

    def _find(self, name: ChainName, text: str) -> _Link | None:
        with self._lock:
            self._asked += 1
            link = self._links.get(name)
            if link is None:
                return None
            self._found += 1
            self._links.move_to_end(name)
        if link.fitted:
            return link
        ids = self._prompt_ids.reply_ids(link.reply, text, ended_by_id=link.ended_by_id)
        fitted = replace(link, reply=array("i", ids or ()), fitted=True)
        with self._lock:
            if self._links.get(name) is link:
                self._links[name] = fitted
                self._bytes += fitted.bytes - link.bytes
        return fitted

    def _put(self, name: ChainName, link: _Link) -> None:
        with self._lock:
            old = self._links.pop(name, None)
            if old is not None and old.turn == link.turn:
                link = old  # later turns may have been built on its ids
            self._bytes += link.bytes - (0 if old is None else old.bytes)
            self._links[name] = link
            while len(self._links) > self._links_max or self._bytes > self._bytes_max:
                _, evicted = self._links.popitem(last=False)
                self._bytes -= evicted.bytes
                self._evicted += 1

    # Names ----------------------------------------------------------------------------------

    def _named(self, parent: ChainName, message: Message) -> ChainName:
        named = b"" if message.name is None else b"\1" + _bytes(message.name)
        return self._hash(b"message", parent, message.role, message.content, named)

    def _hash(self, kind: bytes, *fields: str | bytes) -> bytes:
        """Over fields with their lengths, so that no two lists of fields are the same bytes."""
        state = blake2b(digest_size=32, key=self._key, person=kind)
        for each in fields:
            data = each if isinstance(each, bytes) else _bytes(each)
            state.update(struct.pack("<q", len(data)))
            state.update(data)
        return state.digest()


def is_answerable(prompt: ChatPrompt) -> bool:
    """Whether a prompt's reply is a new message, so that known ids may be used for it."""
    return (
        prompt.add_generation_prompt
        and not prompt.continue_final_message
        and bool(prompt.messages)
        and prompt.messages[-1].role != "assistant"
    )


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
