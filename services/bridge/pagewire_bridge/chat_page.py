"""The chat page: three files, nothing from elsewhere. A browser gets it at /, other clients Ollama's banner."""

from __future__ import annotations

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

FILES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_CONTENT = {name: (Path(__file__).parent / "page" / name).read_bytes() for name in FILES}
_HEADERS = {
    # Whatever a model writes, the page runs no code but its own.
    "content-security-policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


async def root(request: Request) -> Response:
    if "text/html" in request.headers.get("accept", ""):
        return _file("index.html")
    return PlainTextResponse("Ollama is running")


async def file(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in FILES:
        raise HTTPException(404, f"There is no file {name}.")
    return _file(name)


def _file(name: str) -> Response:
    return Response(_CONTENT[name], headers=_HEADERS, media_type=FILES[name])


ROUTES = [Route("/", root, methods=["GET"]), Route("/page/{name}", file, methods=["GET"])]
