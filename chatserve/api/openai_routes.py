"""The OpenAI-compatible routes under `/v1`."""

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from chatserve.api.answer import CompletionEndpoint, Desk
from chatserve.api.collaborators import ModelInfo
from chatserve.api.schema import chat_job, check_model, completion_job
from chatserve.api.wire import ChatShape, CompletionShape, JsonObject


def openai_routes(desk: Desk) -> list[BaseRoute]:
    """Completions of both kinds, and the list of the one model."""

    async def models(request: Request) -> Response:
        return _json({"object": "list", "data": [_card(desk.model)]})

    async def model(request: Request) -> Response:
        check_model(request.path_params["name"], desk.model)
        return _json(_card(desk.model))

    return [
        Route(
            "/v1/chat/completions",
            CompletionEndpoint(desk, decode=chat_job, shape=ChatShape, id_prefix="chatcmpl-"),
            methods=["POST"],
        ),
        Route(
            "/v1/completions",
            CompletionEndpoint(
                desk, decode=completion_job, shape=CompletionShape, id_prefix="cmpl-"
            ),
            methods=["POST"],
        ),
        Route("/v1/models", models, methods=["GET"]),
        # A name may be a hub id, with a slash in it.
        Route("/v1/models/{name:path}", model, methods=["GET"]),
    ]


def _card(model: ModelInfo) -> JsonObject:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": model.owned_by,
        "max_model_len": model.context_length,
    }


def _json(value: JsonObject) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
