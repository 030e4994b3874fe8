"""The document, and Swagger UI that shows it: all files from here, nothing from elsewhere."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from swagger_ui_bundle import swagger_ui_path

_PAGE = Path(__file__).parent / "page"
# Name -> where it is, and what it is.
FILES = {
    "docs.js": (_PAGE / "docs.js", "text/javascript"),
    "swagger-ui-bundle.js": (Path(swagger_ui_path) / "swagger-ui-bundle.js", "text/javascript"),
    "swagger-ui.css": (Path(swagger_ui_path) / "swagger-ui.css", "text/css"),
}
_HEADERS = {
    # Swagger UI writes style attributes and has its pictures in its style sheet.
    "content-security-policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


async def openapi(request: Request) -> Response:
    """Made when it is first asked for, beside the event loop."""
    return Response(await asyncio.to_thread(request.state.document), media_type="application/json")


async def docs(request: Request) -> Response:
    return Response(_read(_PAGE / "index.html"), headers=_HEADERS, media_type="text/html")


async def docs_file(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in FILES:
        raise HTTPException(404, f"There is no file {name}.")
    path, media_type = FILES[name]
    return Response(_read(path), headers=_HEADERS, media_type=media_type)


@functools.cache
def _read(path: Path) -> bytes:
    return path.read_bytes()


ROUTES = [
    Route("/openapi.json", openapi, methods=["GET"]),
    Route("/docs", docs, methods=["GET"]),
    Route("/docs/{name}", docs_file, methods=["GET"]),
]
