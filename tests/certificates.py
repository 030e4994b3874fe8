"""Certificates that tests share: an authority's files, and a stranger's."""

from __future__ import annotations

from pathlib import Path

from pagewire_cli.authority import Authority, write_certificates
from pagewire_core.tls import TlsFiles


def made(directory: Path) -> Path:
    """A directory as `pagewire certs` leaves it."""
    write_certificates(Authority.kept_in(directory), directory)
    return directory


def of(directory: Path, role: str, ca: Path | None = None) -> TlsFiles:
    """The files of one role; `ca`: trusts another authority instead."""
    return TlsFiles(str(directory / f"{role}.crt"), str(directory / f"{role}.key"), str((ca or directory) / "ca.crt"))


def flags(directory: Path, role: str) -> list[str]:
    files = of(directory, role)
    return [f"--tls-cert={files.cert}", f"--tls-key={files.key}", f"--tls-ca={files.ca}"]
