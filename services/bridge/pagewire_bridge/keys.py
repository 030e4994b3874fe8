"""Who may ask: named API keys, each of a tenant.

Only digests of keys are kept. A key is looked for among all of them in a time that does not depend on which one it
is, or whether it is one.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pagewire_core.errors import StartupError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers

_SHA256_HEX = r"^[0-9a-f]{64}$"
_Rate = Annotated[int, Field(ge=1)]


class ApiKey(BaseModel):
    """An entry of the keys file. tenant: whose cache and share of the queue it uses; by default a tenant of its own.

    admin: may call what changes the server. Limits that are not given do not exist.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=_SHA256_HEX)]
    tenant: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = ""
    admin: bool = False
    requests_per_minute: _Rate | None = None
    tokens_per_minute: _Rate | None = None

    @property
    def tenant_name(self) -> str:
        return self.tenant or self.name


class KeyRing:
    """All keys; empty: none is asked for."""

    def __init__(self, keys: Sequence[ApiKey] = ()) -> None:
        self._keys = [(bytes.fromhex(key.sha256), key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, secret: str) -> ApiKey | None:
        digest = hashlib.sha256(secret.encode()).digest()
        found = None
        for known, key in self._keys:
            if hmac.compare_digest(known, digest):
                found = key
        return found


def load_keys(given: str, file: str | None) -> KeyRing:
    """The keys of --api-key (comma-separated, with one tenant each) and of --api-keys-file. Raises StartupError."""
    secrets = [secret for secret in (part.strip() for part in given.split(",")) if secret]
    if not all(secret.isascii() and secret.isprintable() for secret in secrets):
        raise StartupError("--api-key: a key may have printable ASCII characters alone, as it is sent in a header")
    keys = [ApiKey(name=f"api-key-{i}", sha256=digest_of(secret)) for i, secret in enumerate(secrets, 1)]
    keys += _of_file(Path(file)) if file else []
    for what in ("name", "sha256"):
        values = [getattr(key, what) for key in keys]
        if len(set(values)) < len(values):
            raise StartupError(f"two API keys have the same {what}; give each its own")
    return KeyRing(keys)


def digest_of(secret: str) -> str:
    """What the keys file has of a key."""
    return hashlib.sha256(secret.encode()).hexdigest()


def secret_in(headers: Headers) -> str:
    """The key that a request shows: as OpenAI's, TGI's and Ollama's clients do, or as Anthropic's; else nothing."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _of_file(path: Path) -> list[ApiKey]:
    remedy = "it must be a YAML list of keys with name and sha256 (pagewire key NAME makes an entry)"
    try:
        entries: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StartupError(f"--api-keys-file {path} cannot be read ({type(error).__name__}): {remedy}") from None
    if not isinstance(entries, list):
        raise StartupError(f"--api-keys-file {path}: {remedy}")
    keys = []
    for i, entry in enumerate(entries):
        try:
            keys.append(ApiKey.model_validate(entry))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise StartupError(f"--api-keys-file {path}, entry {i}, {where}: {first['msg']}; {remedy}") from None
    return keys
