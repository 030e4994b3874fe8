"""TLS on both sides of Envoy. Certificates come from files that Envoy watches, so that they can be replaced.

Envoy watches only what is named in a file of its own (SDS), one secret in each.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from pagewire_envoy.edge import Certificate, Edge

Tree = dict[str, Any]

DOMAIN = "pagewire.internal"
_TYPE = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"
_SERVER, _CLIENTS, _OWN, _AUTHORITY = "server", "clients", "own", "authority"
_VERSIONS = {"tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_3"}


def downstream_tls(edge: Edge, client_certificates: str) -> Tree:
    """What clients meet."""
    common: Tree = {
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_params": _VERSIONS,
        "tls_certificate_sds_secret_configs": [_reference(edge, _SERVER)],
    }
    if client_certificates != "ignored":
        common["validation_context_sds_secret_config"] = _reference(edge, _CLIENTS)
    context = {
        "@type": f"{_TYPE}.DownstreamTlsContext",
        "common_tls_context": common,
        "require_client_certificate": client_certificates == "required",
    }
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def upstream_tls(edge: Edge, role: str, alpn: str) -> Tree:
    """Mutual TLS with a service of ours, known by its role and not by its address."""
    name = f"{role}.{DOMAIN}"
    expected = {"san_type": "DNS", "matcher": {"exact": name}}
    common = {
        "alpn_protocols": [alpn],
        "tls_params": _VERSIONS,
        "tls_certificate_sds_secret_configs": [_reference(edge, _OWN)],
        "combined_validation_context": {
            "default_validation_context": {"match_typed_subject_alt_names": [expected]},
            "validation_context_sds_secret_config": _reference(edge, _AUTHORITY),
        },
    }
    context = {"@type": f"{_TYPE}.UpstreamTlsContext", "sni": name, "common_tls_context": common}
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def secret_files(edge: Edge) -> dict[str, Tree]:
    """Content by file name."""
    found: dict[str, Tree] = {}
    if edge.certificate:
        found[_SERVER] = _certificate(edge.certificate)
    if edge.client_ca:
        found[_CLIENTS] = _authority(edge.client_ca)
    if edge.internal:
        found[_OWN] = _certificate(edge.internal.certificate)
        found[_AUTHORITY] = _authority(edge.internal.ca)
    return {
        _file(name): {"resources": [{"@type": f"{_TYPE}.Secret", "name": name, **secret}]}
        for name, secret in found.items()
    }


def _file(name: str) -> str:
    return f"sds-{name}.yaml"


def _reference(edge: Edge, name: str) -> Tree:
    return {
        "name": name,
        "sds_config": {
            "resource_api_version": "V3",
            "path_config_source": {"path": str(PurePosixPath(edge.config_dir) / _file(name))},
        },
    }


def _certificate(certificate: Certificate) -> Tree:
    return {
        "tls_certificate": {
            "certificate_chain": {"filename": certificate.cert},
            "private_key": {"filename": certificate.key},
            "watched_directory": _directory(certificate.cert),
        }
    }


def _authority(ca: str) -> Tree:
    return {"validation_context": {"trusted_ca": {"filename": ca}, "watched_directory": _directory(ca)}}


def _directory(path: str) -> Tree:
    return {"path": str(PurePosixPath(path).parent)}
