"""HTTPS: the certificate that clients see, taken from its files anew when those have changed."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field

import structlog
from pagewire_core.errors import StartupError

log = structlog.get_logger(__name__)


@dataclass
class HttpsFiles:
    """keyfile and certfile: PEM. ca_certs: authorities of the clients. cert_reqs: an ssl.VerifyMode."""

    keyfile: str
    certfile: str
    ca_certs: str | None = None
    cert_reqs: int = ssl.CERT_NONE
    _current: ssl.SSLContext | None = field(default=None, repr=False)
    _stamp: tuple[float, ...] = field(default=(), repr=False)

    def server_context(self) -> ssl.SSLContext:
        """For the listening socket. Raises StartupError if the files cannot be used."""
        try:
            self._stamp = self._stamped()
            self._current = self._load()
        except (OSError, ValueError) as error:
            raise StartupError(f"--ssl-keyfile, --ssl-certfile, --ssl-ca-certs: {error}") from None
        return self._current

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self.certfile, self.keyfile)
        if self.ca_certs:
            context.load_verify_locations(self.ca_certs)
        context.verify_mode = ssl.VerifyMode(self.cert_reqs)
        # Called in every handshake, whether or not the client names a host.
        context.sni_callback = self._refresh
        return context

    def _refresh(self, connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
        try:
            stamp = self._stamped()
            if stamp != self._stamp:
                self._current, self._stamp = self._load(), stamp
                log.info("https certificate replaced", file=self.certfile)
        except (OSError, ValueError) as error:  # they are being replaced, one after the other
            log.warning("https files do not fit together; going on with the last ones", error=str(error))
        if self._current is not None and self._current is not context:
            connection.context = self._current

    def _stamped(self) -> tuple[float, ...]:
        paths = (self.keyfile, self.certfile, *([self.ca_certs] if self.ca_certs else []))
        return tuple(number for s in map(os.stat, paths) for number in (s.st_ino, s.st_mtime_ns, s.st_size))


def https_files(keyfile: str | None, certfile: str | None, ca_certs: str | None, cert_reqs: int) -> HttpsFiles | None:
    """From the flags of the same names; None: plain HTTP. Raises StartupError where they contradict each other."""
    if not (keyfile or certfile):
        if ca_certs or cert_reqs:
            raise StartupError("--ssl-ca-certs and --ssl-cert-reqs need --ssl-certfile and --ssl-keyfile")
        return None
    if not (keyfile and certfile):
        raise StartupError("--ssl-certfile and --ssl-keyfile go together; give both or none")
    if cert_reqs and not ca_certs:
        raise StartupError("--ssl-cert-reqs needs --ssl-ca-certs: whose certificates are clients to have?")
    return HttpsFiles(keyfile, certfile, ca_certs, cert_reqs)
