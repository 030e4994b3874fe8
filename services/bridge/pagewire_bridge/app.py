"""The HTTP application: every API's routes, and errors in the shape of the API that was asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version
from typing import TypedDict

from pagewire_core.errors import Internal, PagewireError
from pagewire_core.telemetry import exposition, merge_expositions
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
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
from pagewire_bridge.openai.embeddings import ROUTES as EMBEDDING_ROUTES
from pagewire_bridge.openai.routes import ROUTES as OPENAI_ROUTES
from pagewire_bridge.rate_limit import RateLimiter
from pagewire_bridge.responses import json_response
from pagewire_bridge.tgi.routes import ROUTES as TGI_ROUTES
from pagewire_bridge.tokenize import ROUTES as TOKENIZE_ROUTES


class State(TypedDict):
    """What the lifespan gives to every request's `state`."""

    client: RouterClient
    metrics: BridgeMetrics
    answers: AnswerFormat


async def health(request: Request) -> Response:
    """200 with no body when the router can take requests; else TGI's error, the one that clients read here."""
    if await request.state.client.is_serving():
        return Response()
    return json_response({"error": "unhealthy", "error_type": "healthcheck"}, 503)


async def load(request: Request) -> Response:
    """Requests that are not yet answered to the end, this one not counted."""
    return json_response({"server_load": request.state.metrics.num_in_flight - 1})


async def reset_prefix_cache(request: Request) -> Response:
    """For administrators; see Access."""
    await request.state.client.reset_prefix_cache()
    return Response()


async def show_version(request: Request) -> Response:
    return json_response({"version": version("pagewire")})


async def metrics(request: Request) -> Response:
    """The bridge's metrics, and the router's and workers' while the router can be reached."""
    texts = {"bridge": exposition(request.state.metrics.registry)}
    try:
        texts["router"] = await request.state.client.metrics()
    except PagewireError:
        pass  # a scrape must still show the bridge; that the router is away shows in the missing samples
    return Response(merge_expositions(texts), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PagewireError)
    return error_shape(request.url.path).error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if message == HTTPStatus(error.status_code).phrase:  # the framework's own words say too little
        message = f"{message}: {request.method} {request.url.path}"
    return error_shape(request.url.path).http_error_response(error.status_code, message, error.headers)


async def _on_fault(request: Request, error: Exception) -> Response:
    failure = Internal("The server failed; its log has the reason.")
    return error_shape(request.url.path).error_response(failure)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=STATUS_CLIENT_GONE)


_ROUTES = (
    *OPENAI_ROUTES,
    *EMBEDDING_ROUTES,
    *TGI_ROUTES,
    *OLLAMA_ROUTES,
    *OLLAMA_EMBED_ROUTES,
    *ANTHROPIC_ROUTES,
    *TOKENIZE_ROUTES,
    *CHAT_PAGE_ROUTES,
    Route("/health", health, methods=["GET"]),
    Route("/ping", health, methods=["GET", "POST"]),
    Route("/load", load, methods=["GET"]),
    Route("/reset_prefix_cache", reset_prefix_cache, methods=["POST"]),
    Route("/version", show_version, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
)


def create_app(
    open_client: Callable[[], RouterClient],
    on_ready: Callable[[], None] = lambda: None,
    *,
    answers: AnswerFormat = NO_FORMAT,
    keys: KeyRing | None = None,
    redis_url: str | None = None,
    allowed_origins: Sequence[str] = (),
) -> ASGIApp:
    """The ASGI application.

    open_client is called in the serving event loop, on_ready just before requests are taken. answers: how the model
    writes calls and thoughts. redis_url: where the limits of keys are counted. allowed_origins: whose web pages may
    call it.
    """
    bridge_metrics, limiter = BridgeMetrics(), RateLimiter(redis_url)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[State]:
        client = open_client()
        on_ready()
        yield {"client": client, "metrics": bridge_metrics, "answers": answers}
        await client.close()
        await limiter.close()

    app = Starlette(
        routes=_ROUTES,
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
    return Observe(guarded, bridge_metrics, _ROUTES)
