"""What clients meet: the HTTP port, the gRPC port, and the port of metrics."""

from __future__ import annotations

from typing import Any

from pagewire_envoy.clusters import ADMIN, BRIDGE, RETRY, ROUTER
from pagewire_envoy.edge import Edge
from pagewire_envoy.tls import downstream_tls

Tree = dict[str, Any]

_FILTERS = "type.googleapis.com/envoy.extensions.filters"
_HEAD_BYTES, _NUM_HEADERS = 64 << 10, 256  # as the bridge
_BUFFER_BYTES = 128 << 10  # what is held for a client that reads slowly
_HEAD_S, _BODY_S = 30, 300  # as the bridge
_GRACE_S = 30  # by which the request timeout, which has a better error, comes first

# An empty list would mean all private addresses.
_NOBODY: Tree = {"cidr_ranges": [{"address_prefix": "255.255.255.255", "prefix_len": 32}]}

# What clients may call. Status, Metrics and the like are for operators, who reach the router itself.
_METHODS = ("Generate", "ListModels", "Embed", "Tokenize", "Detokenize")

# The request id of HTTP is the bridge's, who takes the client's; of gRPC Envoy's, who takes the client's.
_LOG = {
    "time": "%START_TIME%",
    "method": "%REQ(:METHOD)%",
    "path": "%PATH(NQ:PATH)%",
    "protocol": "%PROTOCOL%",
    "status": "%RESPONSE_CODE%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "flags": "%RESPONSE_FLAGS%",
    "grpc_status": "%GRPC_STATUS%",
    "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
    "bytes_received": "%BYTES_RECEIVED%",
    "bytes_sent": "%BYTES_SENT%",
    "duration_ms": "%DURATION%",
    "first_byte_ms": "%RESPONSE_DURATION%",
    "upstream": "%UPSTREAM_HOST%",
    "client": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
    "client_certificate": "%DOWNSTREAM_PEER_URI_SAN%",
    "user_agent": "%REQ(USER-AGENT)%",
}

# Envoy's own refusals, as an OpenAI client reads them: status -> type, code, message.
_REFUSALS = {
    404: ("invalid_request_error", "not_found", "%LOCAL_REPLY_BODY%"),
    408: ("invalid_request_error", "request_timeout", "The request did not come in time."),
    413: ("invalid_request_error", "request_too_large", "The request is too large."),
    431: ("invalid_request_error", "headers_too_large", "The headers are too large."),
    503: ("service_unavailable_error", "service_unavailable", "%LOCAL_REPLY_BODY%"),
    504: ("timeout_error", "deadline_exceeded", "%LOCAL_REPLY_BODY%"),
}


def listeners(edge: Edge) -> list[Tree]:
    found = [_http(edge)]
    if edge.routers:
        found.append(_grpc(edge))
    return [*found, _metrics(edge)]


def _http(edge: Edge) -> Tree:
    route = {"match": {"prefix": "/"}, "route": _streaming(edge, BRIDGE)}
    buffer = {
        "name": "envoy.filters.http.buffer",
        "typed_config": {
            "@type": f"{_FILTERS}.http.buffer.v3.Buffer",
            "max_request_bytes": edge.max_request_bytes,
        },
    }
    manager = _manager(edge, "http", [route], [buffer], "%RESP(X-REQUEST-ID)%") | {
        "generate_request_id": False,
        "local_reply_config": _local_replies(),
    }
    return _listener(edge, "http", edge.http_port, manager, edge.http_client_certificates)


def _grpc(edge: Edge) -> Tree:
    service = "/pagewire.v1.InferenceService"
    paths = [*(f"{service}/{method}" for method in _METHODS), "/grpc.health.v1.Health/Check"]
    routes = [{"match": {"path": path}, "route": _streaming(edge, ROUTER)} for path in paths]
    web = {
        "name": "envoy.filters.http.grpc_web",
        "typed_config": {"@type": f"{_FILTERS}.http.grpc_web.v3.GrpcWeb"},
    }
    cors = {"name": "envoy.filters.http.cors", "typed_config": {"@type": f"{_FILTERS}.http.cors.v3.Cors"}}
    manager = _manager(edge, "grpc", routes, [cors, web], "%REQ(X-REQUEST-ID)%")
    if edge.allowed_origins:
        [host] = manager["route_config"]["virtual_hosts"]
        host["typed_per_filter_config"] = {"envoy.filters.http.cors": _cors(edge.allowed_origins)}
    return _listener(edge, "grpc", edge.grpc_port, manager, "required")


def _metrics(edge: Edge) -> Tree:
    """Two pages of the admin port, for Prometheus and probes."""
    routes = [{"match": {"path": path}, "route": {"cluster": ADMIN}} for path in ("/ready", "/stats/prometheus")]
    manager = {
        "@type": f"{_FILTERS}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "metrics",
        "route_config": {"virtual_hosts": [{"name": "metrics", "domains": ["*"], "routes": routes}]},
        "http_filters": [_router_filter()],
    }
    return _with_address("metrics", edge.host, edge.metrics_port, [_chain(manager)])


def _streaming(edge: Edge, cluster: str) -> Tree:
    """No limit on a whole answer: the router has one. Between two bytes there may be as much as that allows."""
    return {
        "cluster": cluster,
        "timeout": "0s",
        "idle_timeout": f"{edge.request_timeout_s + _GRACE_S:g}s",
        "retry_policy": RETRY,
    }


def _manager(edge: Edge, name: str, routes: list[Tree], filters: list[Tree], request_id: str) -> Tree:
    log = {"request_id": request_id, **_LOG}
    return {
        "@type": f"{_FILTERS}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "codec_type": "AUTO",
        "use_remote_address": True,
        "internal_address_config": _NOBODY,  # whose x-envoy-* headers would count
        "preserve_external_request_id": True,
        "normalize_path": True,
        "server_header_transformation": "PASS_THROUGH",
        "request_headers_timeout": f"{_HEAD_S}s",
        "request_timeout": f"{_BODY_S}s",
        "stream_idle_timeout": f"{edge.request_timeout_s + _GRACE_S:g}s",
        "max_request_headers_kb": _HEAD_BYTES >> 10,
        "common_http_protocol_options": {"idle_timeout": "300s", "max_headers_count": _NUM_HEADERS},
        "http2_protocol_options": {
            "max_concurrent_streams": 1024,
            "initial_stream_window_size": 64 << 10,
            "initial_connection_window_size": 1 << 20,
            "connection_keepalive": {"interval": "30s", "timeout": "10s"},
        },
        "route_config": {
            "virtual_hosts": [{"name": name, "domains": ["*"], "routes": routes}],
        },
        "http_filters": [*filters, _router_filter()],
        "access_log": [
            {
                "name": "envoy.access_loggers.stdout",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
                    "log_format": {"json_format": log},
                },
            }
        ],
    }


def _router_filter() -> Tree:
    return {
        "name": "envoy.filters.http.router",
        "typed_config": {"@type": f"{_FILTERS}.http.router.v3.Router", "suppress_envoy_headers": True},
    }


def _cors(origins: tuple[str, ...]) -> Tree:
    matches = [{"safe_regex": {"regex": ".*"}} if origin == "*" else {"exact": origin} for origin in origins]
    return {
        "@type": f"{_FILTERS}.http.cors.v3.CorsPolicy",
        "allow_origin_string_match": matches,
        "allow_methods": "POST, OPTIONS",
        "allow_headers": "content-type,x-grpc-web,x-user-agent,grpc-timeout,x-request-id",
        "expose_headers": "grpc-status,grpc-message,pagewire-error-bin",
        "max_age": "600",
    }


def _local_replies() -> Tree:
    """Errors that no bridge has made look like those that one makes."""
    mappers = [
        {
            "filter": {"status_code_filter": {"comparison": {"op": "EQ", "value": _constant(status)}}},
            "body_format_override": {"json_format": _error(*words)},
        }
        for status, words in _REFUSALS.items()
    ]
    other = _error("invalid_request_error", "%RESPONSE_CODE_DETAILS%", "%LOCAL_REPLY_BODY%")
    return {"mappers": mappers, "body_format": {"json_format": other}}


def _constant(status: int) -> Tree:
    return {"default_value": status, "runtime_key": "pagewire.constant"}


def _error(kind: str, code: str, message: str) -> Tree:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _listener(edge: Edge, name: str, port: int, manager: Tree, client_certificates: str) -> Tree:
    chain = _chain(manager)
    if edge.certificate:
        chain["transport_socket"] = downstream_tls(edge, client_certificates)
        chain["transport_socket_connect_timeout"] = "10s"  # who connects and says nothing is sent away
    return _with_address(name, edge.host, port, [chain])


def _chain(manager: Tree) -> Tree:
    return {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}


def _with_address(name: str, host: str, port: int, chains: list[Tree]) -> Tree:
    return {
        "name": name,
        "address": {"socket_address": {"address": host, "port_value": port}},
        "per_connection_buffer_limit_bytes": _BUFFER_BYTES,
        "filter_chains": chains,
    }
