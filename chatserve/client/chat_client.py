"""ChatClient: the door of the client. Replies over one WebSocket, everything else by HTTP.

It may not know frames (`exchange.py`) nor how an answer is read (`http_door.py`). Theory of
operation: the socket's one task lives in a task group that the client's block owns; when the block
ends, the socket is closed, replies that still run end with ClientClosed (at the server they go
on), and what the block raised comes out of it as it is.
"""

import asyncio
import ipaddress
import json
import re
import secrets
from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Self
from urllib.parse import quote, urlsplit

from chatserve.client.errors import ClientClosed
from chatserve.client.exchange import Exchange
from chatserve.client.http_door import HttpDoor
from chatserve.client.limits import ClientLimits
from chatserve.client.reply import LEAF, Leaf, Reply
from chatserve.client.values import Conversation, Tree
from chatserve.client.wire import conversation_of, page_of, tree_of

_ASK_BYTES = 18  # of a drawn id: 144 bits, 24 characters
_KEY = re.compile(r"[\x21-\x7e]+")
_PATH = "/api/conversations"


class ChatClient:
    """Use it as an async context manager, once. Every call may raise ChatError.

    url: of the server, `http://` or `https://`. key: an API key, where the server has keys.
    A proxy of the environment is used for servers elsewhere, never for loopback addresses.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        key: str | None = None,
        limits: ClientLimits | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("The URL of a chatserve begins with http:// or https://")
        if key is not None and not _KEY.fullmatch(key):
            raise ValueError("A key is visible ASCII characters.")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self.limits = limits or ClientLimits()
        proxy = not _is_loopback(parts.hostname)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._http = HttpDoor(self.url, headers, proxy=proxy, limits=self.limits)
        self._exchange = Exchange(
            f"ws{self.url.removeprefix('http')}/api/socket",
            headers,
            proxy=proxy,
            limits=self.limits,
        )
        self._group = asyncio.TaskGroup()
        self._socket_task: asyncio.Task[None] | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        assert self._socket_task is None, "a client is entered once"
        await self._http.__aenter__()
        await self._group.__aenter__()
        self._socket_task = self._group.create_task(self._exchange.run(), name="chat socket")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closed = True
        self._exchange.close()
        assert self._socket_task is not None, "entered"
        self._socket_task.cancel()
        try:
            # Not told of the block's error, which comes out as it is and not in a group.
            await self._group.__aexit__(None, None, None)
        finally:
            await self._http.__aexit__(kind, error, traceback)

    # Conversations ---------------------------------------------------------------------------

    async def create(
        self, *, title: str | None = None, system: str | None = None, **settings: object
    ) -> Conversation:
        """A new conversation. settings: sampling fields that its turns take by default."""
        body = {"title": title, "system": system, "settings": settings}
        return conversation_of(await self._ask("POST", _PATH, body))

    async def conversations(self, *, search: str | None = None) -> AsyncGenerator[Conversation]:
        """All of them, latest first, page by page. search: a part of a title or text."""
        query = {"limit": str(self.limits.page_conversations)}
        if search:
            query["search"] = search
        while True:
            found, after = page_of(await self._ask("GET", _PATH, query=query))
            for conversation in found:
                yield conversation
            if after is None:
                return
            query["after"] = after

    async def open(self, conversation: Conversation | str) -> Tree:
        """With all turns, and the replies that run; the server may fetch its pages meanwhile."""
        tree = tree_of(await self._ask("GET", _path(conversation)))
        self.focus(tree.conversation)
        return tree

    async def update(
        self,
        conversation: Conversation | str,
        *,
        title: str | None = None,
        leaf: str | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> Conversation:
        """Change what is given: the title, the current leaf, all of the settings."""
        given = {"title": title, "leaf": leaf, "settings": settings}
        body = {name: value for name, value in given.items() if value is not None}
        return conversation_of(await self._ask("PATCH", _path(conversation), body))

    async def set_system(
        self, conversation: Conversation | str, system: str | None
    ) -> Conversation:
        """Change the system prompt; None: there is none."""
        return conversation_of(await self._ask("PATCH", _path(conversation), {"system": system}))

    async def delete(self, conversation: Conversation | str) -> None:
        """Delete it with all its turns."""
        await self._ask("DELETE", _path(conversation))

    async def export_file(self, conversation: Conversation | str) -> Mapping[str, object]:
        """The content of a file that `import_file` takes, here or at another server."""
        return await self._ask("GET", f"{_path(conversation)}/export")

    async def import_file(self, content: Mapping[str, object]) -> Conversation:
        """A new conversation from an exported one."""
        return conversation_of(await self._ask("POST", f"{_PATH}/import", content))

    # Replies ---------------------------------------------------------------------------------

    def send(
        self,
        conversation: Conversation | str,
        text: str,
        *,
        parent: str | Leaf | None = LEAF,
        ask: str | None = None,
        **sampling: object,
    ) -> Reply:
        """Say something; the reply comes by the socket, whatever becomes of this connection.

        parent: the turn it follows; LEAF = the current one, None = a new first message. ask: an
        id of your own for this request, if you may have to repeat it in another process.
        """
        return self._begin(conversation, ask, {"content": text}, parent, sampling)

    def regenerate(
        self, conversation: Conversation | str, turn: str, *, ask: str | None = None,
        **sampling: object,
    ) -> Reply:  # fmt: skip
        """Another answer to this turn of a user."""
        return self._begin(conversation, ask, {}, turn, sampling)

    def attach(self, conversation: Conversation | str, reply: str) -> Reply:
        """A reply that runs, or has ended, from its beginning."""
        known = self._exchange.reply_of(reply)
        if known is not None:
            return known
        made = self._reply(_id(conversation), None, reply)
        self._exchange.begin(made, {})
        return made

    def focus(self, conversation: Conversation | str) -> None:
        """A hint: this conversation is looked at, so its next turn may be soon."""
        self._check_open()
        self._exchange.focus(_id(conversation))

    def draft(self, conversation: Conversation | str, parent: str | None, text: str) -> None:
        """A hint: this is being typed, to follow that turn; the last one counts."""
        self._check_open()
        self._exchange.draft(_id(conversation), parent, text)

    # Inside ----------------------------------------------------------------------------------

    def _begin(
        self,
        conversation: Conversation | str,
        ask: str | None,
        content: Mapping[str, str],
        parent: str | Leaf | None,
        sampling: Mapping[str, object],
    ) -> Reply:
        self._check_open()
        if ask is None:
            ask = secrets.token_urlsafe(_ASK_BYTES)
        elif self._exchange.has_ask(ask):
            raise ValueError("This ask is under way.")
        place = {} if isinstance(parent, Leaf) else {"parent": parent}
        target = _id(conversation)
        opening = {**sampling, "conversation": target, "id": ask, **content, **place}
        # What no server can read is the caller's mistake, and is told here.
        json.dumps(opening, ensure_ascii=False, allow_nan=False).encode()
        reply = self._reply(target, ask, None)
        self._exchange.begin(reply, opening)
        return reply

    def _reply(self, conversation: str, ask: str | None, id: str | None) -> Reply:
        return Reply(
            conversation,
            ask=ask,
            id=id,
            characters_max=self.limits.reply_characters_max,
            wake=self._exchange.wake,
        )

    async def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        query: Mapping[str, str] | None = None,
    ) -> Mapping[str, object]:
        self._check_open()
        return await self._http.ask(method, path, body=body, query=query)

    def _check_open(self) -> None:
        assert self._socket_task is not None, "a client is used inside its `async with`"
        if self._closed:
            raise ClientClosed


def _id(conversation: Conversation | str) -> str:
    return conversation if isinstance(conversation, str) else conversation.id


def _path(conversation: Conversation | str) -> str:
    return f"{_PATH}/{quote(_id(conversation), safe='')}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
