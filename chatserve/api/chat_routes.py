"""The routes of conversations and their replies, under `/api`.

They may not know how conversations are kept (`chat_collaborators.py` says what they need) nor
what an event looks like on the wire (`chat_events.py`). Theory of operation: a reply is looked at
for as long as the response lasts, inside `unless_gone`, so a client that leaves leaves the viewing
wherever the response is at that moment; the reply itself goes on. A viewing that ends without its
final event (the server is going away) ends the response as it is: the client comes back with the
last id it saw. Everything here is an owner's own, so nothing of it is to be stored on the way.
"""

import asyncio
import time
from collections.abc import AsyncIterator

import orjson
from starlette.datastructures import Headers, QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from chatserve.api.answer import Desk
from chatserve.api.body import decode_object, read_body
from chatserve.api.chat_collaborators import ChatReply, Conversations
from chatserve.api.chat_events import pieces, sse_frame
from chatserve.api.chat_schema import (
    changes,
    cursor,
    known_name,
    new_conversation,
    page_query,
    turn_ask,
)
from chatserve.api.chat_transfer import exported, import_name, imported, shown, shown_whole
from chatserve.api.event_stream import EventStream
from chatserve.api.keys import Holder
from chatserve.api.limits import Limits
from chatserve.api.presence import never, unless_gone
from chatserve.api.wire import JsonObject
from chatserve.chat.conversations.reply_events import ChatEvent, ReplyFinal
from chatserve.chat.store.conversation import Conversation, ReplyCursor

_PATH = "/api/conversations"


def chat_routes(desk: Desk, conversations: Conversations) -> list[BaseRoute]:
    """Conversations, their turns, and the events of replies."""
    shelf = Shelf(desk, conversations)
    one = f"{_PATH}/{{id}}"
    return [
        Route(_PATH, shelf.create, methods=["POST"]),
        Route(_PATH, shelf.list, methods=["GET"]),
        Route(f"{_PATH}/import", shelf.take_in, methods=["POST"]),
        Route(one, shelf.get, methods=["GET"]),
        Route(one, shelf.change, methods=["PATCH"]),
        Route(one, shelf.delete, methods=["DELETE"]),
        Route(f"{one}/export", shelf.export, methods=["GET"]),
        Route(f"{one}/turns", TurnEndpoint(desk, conversations), methods=["POST"]),
        Route("/api/replies/{id}/events", EventsEndpoint(desk, conversations), methods=["GET"]),
        Route("/api/replies/{id}", shelf.stop, methods=["DELETE"]),
    ]


class Shelf:
    """What is asked and answered in one piece."""

    def __init__(self, desk: Desk, conversations: Conversations) -> None:
        self._desk = desk
        self._conversations = conversations

    async def create(self, request: Request) -> Response:
        body = new_conversation(await self._body(request), self._desk.limits)
        owner, now = _owner(request), time.time()
        if body.id is None:
            made = await self._conversations.create(
                owner, title=body.title, system=body.system, settings=body.settings
            )
        else:  # an import without turns, which may be asked for again
            empty = Conversation(
                id="",
                owner=owner,
                title=body.title or "",
                created=now,
                updated=now,
                system=body.system,
                settings=body.settings,
            )
            made = await self._conversations.add(owner, empty, (), ask=body.id)
        return _json(shown(made), 201)

    async def list(self, request: Request) -> Response:
        after, limit, search = page_query(request.query_params, self._desk.limits)
        page = await self._conversations.list(
            _owner(request), after=after, limit=limit, search=search
        )
        found = [shown(conversation) for conversation in page.conversations]
        return _json({"conversations": found, "next": page.next})

    async def get(self, request: Request) -> Response:
        return _json(shown_whole(*await self._conversations.get(_owner(request), _id(request))))

    async def change(self, request: Request) -> Response:
        wanted = changes(await self._body(request), self._desk.limits)
        changed = await self._conversations.update(_owner(request), _id(request), wanted)
        return _json(shown(changed))

    async def delete(self, request: Request) -> Response:
        await self._conversations.delete(_owner(request), _id(request))
        return Response(status_code=204)

    async def export(self, request: Request) -> Response:
        conversation, turns, _ = await self._conversations.get(_owner(request), _id(request))
        response = _json(exported(conversation, turns))
        response.headers["Content-Disposition"] = 'attachment; filename="conversation.json"'
        return response

    async def take_in(self, request: Request) -> Response:
        fields = await self._body(request, self._desk.limits.import_bytes_max)
        ask = import_name(fields)
        # Thousands of turns take a tenth of a second.
        conversation, turns = await asyncio.to_thread(
            imported, fields, _owner(request), self._desk.limits
        )
        del fields
        added = await self._conversations.add(_owner(request), conversation, turns, ask=ask)
        return _json(shown(added), 201)

    async def stop(self, request: Request) -> Response:
        await self._conversations.stop(_owner(request), _id(request))
        return Response(status_code=204)

    async def _body(self, request: Request, limit: int | None = None) -> dict[str, object]:
        with self._desk.budget.lease() as lease:
            body = await read_body(
                request.headers,
                request.receive,
                lease=lease,
                limit=limit or self._desk.limits.body_bytes_max,
            )
            return decode_object(body)


class TurnEndpoint:
    """An ASGI app: `POST /api/conversations/{id}/turns`."""

    def __init__(self, desk: Desk, conversations: Conversations) -> None:
        self._desk = desk
        self._conversations = conversations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        desk = self._desk
        holder: Holder = scope["state"]["holder"]
        conversation = known_name(scope["path_params"]["id"])
        places = holder.requests_max or desk.limits.connections_max
        with desk.gate.enter(holder.name, places), desk.budget.lease() as lease:
            body = await read_body(
                Headers(scope=scope), receive, lease=lease, limit=desk.limits.body_bytes_max
            )
            turn = turn_ask(
                decode_object(body),
                owner=holder.name,
                conversation=conversation,
                limits=desk.limits,
            )
            del body  # only its meaning is kept while the answer goes out

            async def work() -> None:
                reply = await self._conversations.send(turn)
                await _stream(reply, None, desk.limits, scope=scope, send=send)

            await unless_gone(receive, work())


class EventsEndpoint:
    """An ASGI app: `GET /api/replies/{id}/events`, from a cursor on."""

    def __init__(self, desk: Desk, conversations: Conversations) -> None:
        self._desk = desk
        self._conversations = conversations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        desk = self._desk
        holder: Holder = scope["state"]["holder"]
        name = known_name(scope["path_params"]["id"])
        # A browser that comes back by itself repeats the URL, so its header is the newer word.
        said = Headers(scope=scope).get("last-event-id")
        if said is None:
            said = QueryParams(scope["query_string"]).get("after")
        after = None if said is None else cursor(said)
        places = holder.requests_max or desk.limits.connections_max

        async def work() -> None:
            reply = await self._conversations.reply(holder.name, name)
            if after is not None and after == reply.end:
                # Whoever has seen the final event must not come back for ever.
                await Response(status_code=204)(scope, never, send)
            else:
                await _stream(reply, after, desk.limits, scope=scope, send=send)

        with desk.gate.enter(holder.name, places):
            await unless_gone(receive, work())


async def _stream(
    reply: ChatReply, after: ReplyCursor | None, limits: Limits, *, scope: Scope, send: Send
) -> None:
    """Look at a reply for as long as its response lasts."""
    with reply.view(after) as events:
        response = EventStream(_frames(events, limits.event_text_max), limits)
        await response(scope, never, send)


async def _frames(events: AsyncIterator[ChatEvent], text_max: int) -> AsyncIterator[bytes]:
    """Owns nothing, so that it does not matter whether it runs to its end."""
    async for event in events:
        for piece in pieces(event, text_max):
            yield sse_frame(piece)
        if isinstance(event, ReplyFinal):
            return


def _owner(request: Request) -> str:
    holder: Holder = request.state.holder
    return holder.name


def _id(request: Request) -> str:
    return known_name(request.path_params["id"])


def _json(value: JsonObject, status: int = 200) -> Response:
    return Response(
        orjson.dumps(value),
        status_code=status,
        media_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
