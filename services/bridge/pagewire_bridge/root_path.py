"""Behind a proxy that serves us under a prefix, whether or not it takes the prefix away."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send


class RootPath:
    """ASGI middleware, outermost: below it paths are without the prefix.

    A path that is a route as it stands is that one: with the prefix `/api`, `/api/chat` is still Ollama's.
    """

    def __init__(self, app: ASGIApp, prefix: str, routes: Sequence[Route]) -> None:
        self._app, self._prefix = app, prefix
        self._alike = [route.path_regex for route in routes if route.path.startswith(f"{prefix}/")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._is_below(scope["path"]):
            scope = {**scope, "path": scope["path"].removeprefix(self._prefix) or "/"}
        await self._app(scope, receive, send)

    def _is_below(self, path: str) -> bool:
        return f"{path}/".startswith(f"{self._prefix}/") and not any(regex.match(path) for regex in self._alike)
