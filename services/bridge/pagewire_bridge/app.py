"""The HTTP application: every API's routes, and errors in the shape of the API that was asked."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TypedDict

import orjson
from pagewire_core.errors import Internal, PagewireError
from pagewire_core.telemetry import instance_name
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp

from pagewire_bridge.access import Access
from pagewire_bridge.answer_parser import NO_FORMAT, AnswerFormat
from pagewire_bridge.anthropic.routes import ROUTES as ANTHROPIC_ROUTES
from pagewire_bridge.chat_page import ROUTES as CHAT_PAGE_ROUTES
from pagewire_bridge.client import RouterClient
from pagewire_bridge.disconnect import STATUS_CLIENT_GONE, ClientGone
from pagewire_bridge.error_shapes import error_shape
from pagewire_bridge.keys import KeyRing
from pagewire_bridge.observe import BridgeMetrics, Observe
from pagewire_bridge.ollama.embed import ROUTES as OLLAMA_EMBED_ROUTES
from pagewire_bridge.ollama.routes import ROUTES as OLLAMA_ROUTES
from pagewire_bridge.openai.conversations.routes import ROUTES as CONVERSATIONS_ROUTES
from pagewire_bridge.openai.conversations.store import ConversationStore
from pagewire_bridge.openai.embeddings import ROUTES as EMBEDDING_ROUTES
from pagewire_bridge.openai.generative_scoring import ROUTES as GENERATIVE_SCORING_ROUTES
from pagewire_bridge.openai.responses.background import BackgroundRuns
from pagewire_bridge.openai.responses.routes import ROUTES as RESPONSES_ROUTES
from pagewire_bridge.openai.responses.shelf import open_shelf
from pagewire_bridge.openai.responses.store import ResponseStore
from pagewire_bridge.openai.routes import ROUTES as OPENAI_ROUTES
from pagewire_bridge.openapi.routes import ROUTES as OPENAPI_ROUTES
from pagewire_bridge.rate_limit import RateLimiter
from pagewire_bridge.root_path import RootPath
from pagewire_bridge.server import ROUTES as SERVER_ROUTES
from pagewire_bridge.tgi.routes import ROUTES as TGI_ROUTES
from pagewire_bridge.token_generation import ROUTES as TOKEN_GENERATION_ROUTES
from pagewire_bridge.tokenize import ROUTES as TOKENIZE_ROUTES
from pagewire_bridge.tokenize import TOKENIZER_INFO


class State(TypedDict):
    """What the lifespan gives to every request's `state`."""

    client: RouterClient
    metrics: BridgeMetrics
    answers: AnswerFormat
    responses: ResponseStore
    conversations: ConversationStore
    background: BackgroundRuns
    document: Callable[[], bytes]
    root_path: str
    always_usage: bool
    flags: Mapping[str, str]


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PagewireError)
    return error_shape(request.url.path).error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if message == HTTPStatus(error.status_code).phrase:  # the framework's own words say too little
        message = f"{message}: {request.method} {request.url.path}"
    headers = error.headers
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers = {"allow": ", ".join(sorted(_methods_of(request)))}
    return error_shape(request.url.path).http_error_response(error.status_code, message, headers)


def _methods_of(request: Request) -> set[str]:
    """The framework names those of the first route alone, where a path has several."""
    fitting = (route for route in ROUTES if route.matches(request.scope)[0] is not Match.NONE)
    return {method for route in fitting for method in route.methods or ()}


async def _on_fault(request: Request, error: Exception) -> Response:
    failure = Internal("The server failed; its log has the reason.")
    return error_shape(request.url.path).error_response(failure)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=STATUS_CLIENT_GONE)


ROUTES = (
    *OPENAI_ROUTES,
    *RESPONSES_ROUTES,
    *CONVERSATIONS_ROUTES,
    *EMBEDDING_ROUTES,
    *GENERATIVE_SCORING_ROUTES,
    *TGI_ROUTES,
    *OLLAMA_ROUTES,
    *OLLAMA_EMBED_ROUTES,
    *ANTHROPIC_ROUTES,
    *TOKEN_GENERATION_ROUTES,
    *TOKENIZE_ROUTES,
    *CHAT_PAGE_ROUTES,
    *SERVER_ROUTES,
    *OPENAPI_ROUTES,
)


def _document(routes: Sequence[Route], with_keys: bool, root_path: str) -> bytes:
    from pagewire_bridge.openapi.document import document  # a tenth of a second that no start need take

    return orjson.dumps(document(routes, with_keys, root_path))


def create_app(
    open_client: Callable[[], RouterClient],
    on_ready: Callable[[], None] = lambda: None,
    *,
    answers: AnswerFormat = NO_FORMAT,
    keys: KeyRing | None = None,
    redis_url: str | None = None,
    response_ttl_s: float = 86400.0,
    allowed_origins: Sequence[str] = (),
    root_path: str = "",
    always_usage: bool = False,
    with_docs: bool = True,
    with_tokenizer_info: bool = False,
    rank: int | None = None,
    flags: Mapping[str, str] | None = None,
) -> ASGIApp:
    """The ASGI application.

    open_client is called in the serving event loop, on_ready just before requests are taken. answers: how the model
    writes calls and thoughts. redis_url: where the limits of keys are counted and responses are stored.
    response_ttl_s: for how long. allowed_origins: whose web pages may call it. root_path: where the proxy in front has
    the routes; it may or may not take that prefix away. rank: which of several bridges it is. flags: what
    administrators are told of its start. always_usage: streams end with it, asked for or not. with_docs: whether there
    are the document and its page. with_tokenizer_info: whether clients may see the tokenizer's settings.
    """
    bridge_metrics, limiter = BridgeMetrics(instance_name("bridge", rank)), RateLimiter(redis_url)
    left_out = (*(() if with_docs else OPENAPI_ROUTES), *(() if with_tokenizer_info else (TOKENIZER_INFO,)))
    routes = [route for route in ROUTES if route not in left_out]
    made = functools.cache(lambda: _document(routes, bool(keys), root_path))

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[State]:
        client, shelf, background = open_client(), open_shelf(redis_url), BackgroundRuns()
        on_ready()
        yield {
            "client": client,
            "metrics": bridge_metrics,
            "answers": answers,
            "responses": ResponseStore(shelf, response_ttl_s),
            "conversations": ConversationStore(shelf, response_ttl_s),
            "background": background,
            "document": made,
            "root_path": root_path,
            "always_usage": always_usage,
            "flags": flags or {},
        }
        await background.close()
        await client.close()
        await limiter.close()
        await shelf.close()

    app = Starlette(
        routes=routes,
        exception_handlers={
            PagewireError: _on_error,
            HTTPException: _on_http_error,
            ClientGone: _on_client_gone,
            ClientDisconnect: _on_client_gone,
            Exception: _on_fault,  # starlette answers with it and raises the fault again, for Observe to log
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    guarded: ASGIApp = Access(app, keys or KeyRing(), limiter)
    if allowed_origins:
        guarded = CORSMiddleware(
            guarded, allowed_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["*"]
        )
    observed = Observe(guarded, bridge_metrics, routes)
    return RootPath(observed, root_path, routes) if root_path else observed
