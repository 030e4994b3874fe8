"""An edge as the files that Envoy reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pagewire_envoy.clusters import clusters
from pagewire_envoy.edge import Edge
from pagewire_envoy.listeners import listeners
from pagewire_envoy.tls import secret_files

BOOTSTRAP = "envoy.yaml"
_MONITORS = "type.googleapis.com/envoy.extensions.resource_monitors"


def bootstrap(edge: Edge) -> dict[str, Any]:
    limit = {
        "name": "envoy.resource_monitors.global_downstream_max_connections",
        "typed_config": {
            "@type": f"{_MONITORS}.downstream_connections.v3.DownstreamConnectionsConfig",
            "max_active_downstream_connections": edge.max_connections,
        },
    }
    return {
        "node": {"id": "pagewire-edge", "cluster": "pagewire-edge"},
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": edge.admin_port}}},
        "overload_manager": {"resource_monitors": [limit]},
        "static_resources": {"listeners": listeners(edge), "clusters": clusters(edge)},
    }


def render(edge: Edge) -> dict[str, str]:
    """YAML by file name; all of them belong into `edge.config_dir`, as Envoy sees it."""
    trees = {BOOTSTRAP: bootstrap(edge), **secret_files(edge)}
    return {name: yaml.dump(tree, Dumper=_Plain, sort_keys=False, width=120) for name, tree in trees.items()}


def write(edge: Edge, directory: Path) -> list[Path]:
    """Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in render(edge).items():
        path = directory / name
        path.write_text(text)
        written.append(path)
    return written


class _Plain(yaml.SafeDumper):
    """Spells out what occurs twice: anchors are for machines."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
