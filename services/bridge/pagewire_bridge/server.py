"""What is no API's: health, load, metrics, and what administrators may do."""

from __future__ import annotations

from importlib.metadata import version

from pagewire_core.errors import PagewireError
from pagewire_core.telemetry import exposition, exposition_of, merge_families
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pagewire_bridge.familiar_metrics import familiar
from pagewire_bridge.responses import json_response


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


async def server_info(request: Request) -> Response:
    """For administrators; see Access."""
    info = await request.state.client.server_info()
    return json_response(
        {
            "version": version("pagewire"),
            "bridge": request.state.flags,
            "router": dict(info.flags),
            "workers": {worker.worker_id: dict(worker.flags) for worker in info.workers},
        }
    )


async def show_version(request: Request) -> Response:
    return json_response({"version": version("pagewire")})


async def metrics(request: Request) -> Response:
    """The bridge's metrics, and the router's and workers' while the router can be reached."""
    ours, client = request.state.metrics, request.state.client
    texts = {ours.instance: exposition(ours.registry)}
    model = ""
    try:
        texts["router"] = await client.metrics()
        model = (await client.list_models())[0].name
    except PagewireError:
        pass  # a scrape must still show the bridge; that the router is away shows in the missing samples
    families = merge_families(texts)
    text = exposition_of([*families.values(), *familiar(families, model)])
    return Response(text, headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})


ROUTES = [
    Route("/health", health, methods=["GET"]),
    Route("/ping", health, methods=["GET", "POST"]),
    Route("/load", load, methods=["GET"]),
    Route("/reset_prefix_cache", reset_prefix_cache, methods=["POST"]),
    Route("/server_info", server_info, methods=["GET"]),
    Route("/version", show_version, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
]
