"""Who a service is to the others: mutual TLS for every gRPC connection, and what each role may call.

Both sides show a certificate of one authority that is pagewire's own. Its subject alternative names tell
the roles, such as `worker.pagewire.internal`: a client names the role it expects to reach, a server looks
up what the caller's roles may call. Addresses prove nothing and are in no certificate.

Files may be replaced while a process runs: the next handshake uses the new ones.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import grpc
import structlog

from pagewire_core.errors import StartupError

log = structlog.get_logger(__name__)

DOMAIN = "pagewire.internal"
ROUTER, WORKER, BRIDGE = "router", "worker", "bridge"
OPERATOR = "operator"  # the `pagewire` command
CLIENT = "client"  # whoever else speaks the native API
ROLES = (ROUTER, WORKER, BRIDGE, OPERATOR, CLIENT)

# Who may call what: the entry of a method comes before that of its service. What is not here, nobody may.
CALLERS: dict[str, frozenset[str]] = {
    "/pagewire.v1.InferenceService": frozenset({BRIDGE, CLIENT, OPERATOR}),
    "/pagewire.v1.InferenceService/ResetPrefixCache": frozenset({BRIDGE, OPERATOR}),
    "/pagewire.v1.InferenceService/ServerInfo": frozenset({BRIDGE, OPERATOR}),
    "/pagewire.v1.PrefillService": frozenset({ROUTER}),
    "/pagewire.v1.DecodeService": frozenset({ROUTER}),
    "/pagewire.v1.KvChannelService": frozenset({WORKER}),
    "/pagewire.v1.WorkerService": frozenset({ROUTER, OPERATOR}),
    "/pagewire.v1.WorkerService/Drain": frozenset({OPERATOR}),
    "/pagewire.v1.WorkerService/SetRole": frozenset({OPERATOR}),
}


def san(role: str) -> str:
    """The name in a certificate that makes its owner one of this role."""
    return f"{role}.{DOMAIN}"


def may_call(method: str, names: Collection[bytes]) -> bool:
    """Whether a peer whose certificate has these names may call `/package.Service/Method`."""
    callers = CALLERS.get(method, CALLERS.get(method.rpartition("/")[0], frozenset()))
    return any(san(role).encode() in names for role in callers)


@dataclass
class TlsFiles:
    """Paths of a PEM certificate (chain), its key, and the authority's certificate."""

    cert: str
    key: str
    ca: str
    _read: tuple[tuple[int, ...], tuple[bytes, bytes, bytes]] | None = field(default=None, init=False, repr=False)

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Certificate, key and authority as they are now; if they do not fit together, as they last did.

        A rotation replaces one file after the other. Raises StartupError if they never fitted.
        """
        try:
            stamp = tuple(n for path in self._paths for n in _stamp(path))
            if self._read is None or self._read[0] != stamp:
                self._read = stamp, self._load()
        except (OSError, ValueError) as error:
            if self._read is None:
                raise StartupError(f"--tls-cert, --tls-key, --tls-ca: {error}") from None
            log.warning("tls files do not fit together; going on with the last ones", error=str(error))
        return self._read[1]

    @property
    def _paths(self) -> tuple[str, str, str]:
        return self.cert, self.key, self.ca

    def _load(self) -> tuple[bytes, bytes, bytes]:
        from cryptography import x509  # not wanted where there is no TLS
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        cert, key, ca = (_content(path) for path in self._paths)
        if x509.load_pem_x509_certificate(cert).public_key() != load_pem_private_key(key, None).public_key():
            raise ValueError(f"{self.key} is not the key of {self.cert}")
        x509.load_pem_x509_certificates(ca)
        return cert, key, ca

    def channel_credentials(self) -> grpc.ChannelCredentials:
        cert, key, ca = self.read()
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)

    def server_credentials(self) -> grpc.ServerCredentials:
        """Looks at the files before every handshake and turns away clients without a certificate."""
        configured = self.read()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal configured
            found = self.read()
            if found == configured:
                return None
            configured = found
            log.info("tls certificate replaced", file=self.cert)
            return _configuration(found)

        return grpc.dynamic_ssl_server_credentials(_configuration(configured), changed, True)


def tls_files(cert: str | None, key: str | None, ca: str | None) -> TlsFiles | None:
    """From --tls-cert, --tls-key and --tls-ca: all three, read and checked, or none. Raises StartupError."""
    if not (cert or key or ca):
        return None
    if not (cert and key and ca):
        raise StartupError("--tls-cert, --tls-key and --tls-ca go together; give all three or none")
    files = TlsFiles(cert, key, ca)
    files.read()
    return files


def with_certificates(redis_url: str | None, tls: TlsFiles | None) -> str | None:
    """A rediss:// URL with our certificate and authority, as redis-py reads them, unless it names its own."""
    if redis_url is None or tls is None or not redis_url.startswith("rediss://"):
        return redis_url
    parts = urlsplit(redis_url)
    query = {"ssl_certfile": tls.cert, "ssl_keyfile": tls.key, "ssl_ca_certs": tls.ca} | dict(parse_qsl(parts.query))
    return urlunsplit(parts._replace(query=urlencode(query, quote_via=quote)))


def _configuration(read: tuple[bytes, bytes, bytes]) -> grpc.ServerCertificateConfiguration:
    cert, key, ca = read
    return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca)


def _stamp(path: str) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns, status.st_size


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
