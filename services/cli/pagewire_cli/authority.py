"""A certificate authority for development, and the certificates that it signs.

DIR/ca.crt, ca.key              made once; whoever has ca.key can be anybody
DIR/{role}.crt, {role}.key      router, worker, bridge, operator, client: for --tls-cert and --tls-key
DIR/redis.crt, edge.crt, ...    for a Redis server, and for the bridge's --ssl-certfile and --ssl-keyfile
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pagewire_core.tls import ROLES, san

SERVERS = ("redis", "edge")  # known by their addresses, to clients that are not ours
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_AUTHORITY_DAYS = 3650
_USES = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])


class Authority:
    """Signs certificates. In memory alone unless it is kept in a directory."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key, self.certificate = key, certificate

    @classmethod
    def new(cls) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("pagewire development authority")
        certificate = (
            _begun(name, name, key, _AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate)

    @classmethod
    def kept_in(cls, directory: Path) -> Authority:
        """The one that is there, or a new one. Raises OSError, and ValueError for files that are not ours."""
        cert_file, key_file = directory / "ca.crt", directory / "ca.key"
        if cert_file.exists() or key_file.exists():
            key = load_pem_private_key(key_file.read_bytes(), None)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise ValueError("ca.key was made by another program")
            return cls(key, x509.load_pem_x509_certificate(cert_file.read_bytes()))
        made = cls.new()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(key_file, _key_pem(made._key))
        _write(cert_file, made.certificate.public_bytes(Encoding.PEM))
        return made

    def sign(self, name: str, names: Sequence[str], days: int) -> tuple[bytes, bytes]:
        """A new certificate for these names or addresses, and its key, as PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = (
            _begun(_name(name), self.certificate.subject, key, days)
            .add_extension(x509.SubjectAlternativeName([_general_name(n) for n in names]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(_USES, critical=False)
            .add_extension(signer, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(Encoding.PEM), _key_pem(key)


def write_certificates(authority: Authority, directory: Path, hosts: Sequence[str] = (), days: int = 365) -> None:
    """Writes ca.crt and a certificate for each role and server; those that are there are replaced. Raises OSError.

    hosts: names and addresses of the servers beside loopback.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(directory / "ca.crt", authority.certificate.public_bytes(Encoding.PEM))
    names = {role: [san(role)] for role in ROLES} | {
        server: [*dict.fromkeys((*_LOOPBACK, *hosts))] for server in SERVERS
    }
    for name, sans in names.items():
        cert, key = authority.sign(name, sans, days)
        _write(directory / f"{name}.key", key)
        _write(directory / f"{name}.crt", cert)


def _write(path: Path, content: bytes) -> None:
    """The whole file at once, for its owner's eyes."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    partial.replace(path)


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks of two machines differ
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
