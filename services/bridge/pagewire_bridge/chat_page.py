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
        return _file("index.html", request)
    return PlainTextResponse("Ollama is running")


async def file(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in FILES:
        raise HTTPException(404, f"There is no file {name}.")
    return _file(name, request)


def _file(name: str, request: Request) -> Response:
    content = _CONTENT[name]
    if name == "index.html":  # its address may or may not end in a slash: links relative to it would lead astray
        content = content.replace(b'"/page/', b'"%s/page/' % request.state.root_path.encode())
    return Response(content, headers=_HEADERS, media_type=FILES[name])


ROUTES = [Route("/", root, methods=["GET"]), Route("/page/{name}", file, methods=["GET"])]
