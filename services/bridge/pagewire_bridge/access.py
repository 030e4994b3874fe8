"""In front of every route: the key, its limits, and whose request it is."""

from __future__ import annotations

import asyncio

from pagewire_core.errors import Overloaded
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagewire_bridge.error_shapes import error_shape
from pagewire_bridge.keys import ApiKey, KeyRing, secret_in
from pagewire_bridge.rate_limit import RateLimiter

# Liveness, and the chat page and the document, which have no data of their own and are where a user enters the key.
_OPEN = frozenset({"/health", "/ping", "/v2/health/live", "/openapi.json", "/docs"})
_OPEN_FOLDERS = ("/page/", "/docs/")
_ADMIN = frozenset({"/reset_prefix_cache", "/server_info"})


def is_open(path: str, method: str) -> bool:
    """Whether nobody is asked for a key there."""
    return path in _OPEN or path.startswith(_OPEN_FOLDERS) or (path == "/" and method in ("GET", "HEAD"))


def is_for_administrators(path: str) -> bool:
    return path in _ADMIN


class Access:
    """ASGI middleware. Fills scope["state"]: tenant, and charge, to be called with the tokens that were used."""

    def __init__(self, app: ASGIApp, keys: KeyRing, limiter: RateLimiter) -> None:
        self._app, self._keys, self._limiter = app, keys, limiter
        self._charges: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        state, path = scope.setdefault("state", {}), scope["path"]
        state.update(tenant="", charge=lambda num_tokens: None)
        key = self._keys.find(secret_in(Headers(scope=scope))) if self._keys else None
        if refusal := self._refusal(scope, key):
            return await refusal(scope, receive, send)
        if key is None:
            return await self._app(scope, receive, send)
        try:
            standing = await self._limiter.admit(key)
        except Overloaded as error:
            return await error_shape(path).error_response(error)(scope, receive, send)
        state.update(tenant=key.tenant_name, charge=lambda num_tokens: self._charge(key, num_tokens))
        limits = standing.headers()

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(limits)
            await send(message)

        await self._app(scope, receive, send_with_limits)

    def _refusal(self, scope: Scope, key: ApiKey | None) -> Response | None:
        path, shape = scope["path"], error_shape(scope["path"])
        if is_for_administrators(path) and not (key and key.admin):
            return shape.http_error_response(403, "This needs an API key with `admin: true` in --api-keys-file.", None)
        if self._keys and key is None and not is_open(path, scope["method"]):
            headers = {"www-authenticate": "Bearer"}
            return shape.http_error_response(401, "The API key is missing or is not known here.", headers)
        return None

    def _charge(self, key: ApiKey, num_tokens: int) -> None:
        """Also where the client has gone: what was computed was used."""
        task = asyncio.create_task(self._limiter.charge(key, num_tokens))
        self._charges.add(task)
        task.add_done_callback(self._charges.discard)
