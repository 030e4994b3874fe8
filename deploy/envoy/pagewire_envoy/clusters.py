"""Upstreams: how their health is known, how load is spread, and when a request may be sent a second time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pagewire_envoy.edge import Address, Edge
from pagewire_envoy.tls import upstream_tls

Tree = dict[str, Any]

BRIDGE, ROUTER, ADMIN = "bridge", "router", "admin"
_PROTOCOL = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

# Only what cannot have begun: a generation costs a GPU's time, and a second one is another answer.
RETRY: Tree = {
    "retry_on": "connect-failure,refused-stream,reset-before-request",
    "num_retries": 3,
    "retry_back_off": {"base_interval": "0.02s", "max_interval": "0.2s"},
    "retry_host_predicate": [
        {
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
            },
        }
    ],
    # Of two hosts the one that is down has the fewest requests, and is chosen again three times out of four.
    "host_selection_retry_max_attempts": 20,
}

_DNS = "envoy.extensions.clusters.dns.v3.DnsCluster"
# Of each name, looked up again and again: a host for each of its addresses.
_EVERY_ADDRESS: Tree = {
    "name": "envoy.clusters.dns",
    "typed_config": {
        "@type": f"type.googleapis.com/{_DNS}",
        "dns_refresh_rate": "2s",
        "dns_lookup_family": "V4_PREFERRED",
        "all_addresses_in_single_endpoint": False,
    },
}


def clusters(edge: Edge) -> list[Tree]:
    found = [_bridges(edge)]
    if edge.routers:
        found.append(_routers(edge))
    return [*found, _admin(edge)]


def _bridges(edge: Edge) -> Tree:
    check = {"http_health_check": {"path": "/health", "codec_client_type": "HTTP1"}}
    # Bridges keep an idle connection for 75 s: we are to close it, so that no request meets their close.
    options = {"common_http_protocol_options": {"idle_timeout": "60s"}}
    http1: Tree = {"explicit_http_config": {"http_protocol_options": {}}}
    return _cluster(edge, BRIDGE, edge.bridges, check, options | http1, alpn="http/1.1")


def _routers(edge: Edge) -> Tree:
    check: Tree = {"grpc_health_check": {}}
    http2 = {
        "http2_protocol_options": {
            "connection_keepalive": {"interval": "2s", "timeout": "2s"},
            "max_concurrent_streams": 8192,
        }
    }
    return _cluster(edge, ROUTER, edge.routers, check, {"explicit_http_config": http2}, alpn="h2")


def _cluster(edge: Edge, name: str, addresses: Sequence[Address], check: Tree, options: Tree, alpn: str) -> Tree:
    tree: Tree = {
        "name": name,
        "cluster_type": _EVERY_ADDRESS,
        "connect_timeout": "2s",
        "per_connection_buffer_limit_bytes": 128 << 10,  # a client that reads nothing holds up the bridge, not us
        "lb_policy": "LEAST_REQUEST",
        # Who is known to be down gets nothing, unless all are.
        "common_lb_config": {"healthy_panic_threshold": {"value": 1}},
        "typed_extension_protocol_options": {_PROTOCOL: {"@type": f"type.googleapis.com/{_PROTOCOL}", **options}},
        "health_checks": [_health_check(check)],
        "outlier_detection": _outliers(),
        "circuit_breakers": {"thresholds": [_limits(edge)]},
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [_endpoint(address) for address in addresses]}],
        },
    }
    if edge.internal:
        tree["transport_socket"] = upstream_tls(edge, name, alpn)
    return tree


def _health_check(check: Tree) -> Tree:
    """In 2 to 6 s; a loaded bridge may take its time, and one that refuses connections is an outlier long before."""
    return {
        "timeout": "2s",
        "interval": "2s",
        "no_traffic_interval": "2s",
        "initial_jitter": "0.2s",
        "unhealthy_threshold": 2,
        "healthy_threshold": 1,
        "always_log_health_check_failures": False,
        **check,
    }


def _outliers() -> Tree:
    """A host that refuses or drops connections is left out at once, be it the last: then all are asked again.

    With a bound, one that was slow to accept and is left out would leave its requests to another that is down.

    Statuses do not count: 503 says that there is no worker, which is true of every bridge, and what is wrong with one
    alone shows in its /health.
    """
    return {
        "split_external_local_origin_errors": True,
        "consecutive_local_origin_failure": 2,
        "enforcing_consecutive_local_origin_failure": 100,
        "enforcing_consecutive_5xx": 0,
        "enforcing_consecutive_gateway_failure": 0,
        "enforcing_success_rate": 0,
        "enforcing_local_origin_success_rate": 0,
        "interval": "1s",
        "base_ejection_time": "3s",
        "max_ejection_time": "30s",
        "max_ejection_percent": 100,
    }


def _limits(edge: Edge) -> Tree:
    """Admission is the router's, which tells clients when to come again; Envoy's own default is 1024."""
    most = edge.max_connections
    return {"max_connections": most, "max_pending_requests": most, "max_requests": most, "max_retries": 256}


def _endpoint(address: Address) -> Tree:
    return {"endpoint": {"address": {"socket_address": {"address": address.host, "port_value": address.port}}}}


def _admin(edge: Edge) -> Tree:
    return {
        "name": ADMIN,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": ADMIN,
            "endpoints": [{"lb_endpoints": [_endpoint(Address("127.0.0.1", edge.admin_port))]}],
        },
    }
