"""Identity of KV blocks: what makes two pieces of KV the same, and nothing else does.

    fingerprint = sha256(canonical facts of model, weights, dtype and scheme)
    root        = sha256("pd1" || fingerprint || lora digest || tenant salt || cache salt)
    h(-1)       = root
    h(i)        = sha256(h(i-1) || u32le(tokens of block i))[:16]

Hash blocks are HASH_BLOCK tokens whatever the page size of a worker. A worker's page that ends inside
a hash block has the key h(parent, tokens of the hash block up to the page's end): one formula, and the
page that completes a hash block has that block's hash as its key. Hashes are of canonical bytes, so
they are equal in every process; `tests/unit/test_block_hash.py` holds golden vectors.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence

HASH_BLOCK = 64  # tokens
SCHEME = "pd1"


def fingerprint(facts: Mapping[str, object]) -> bytes:
    """32 bytes that identify the KV a worker makes. `facts` must be JSON-serialisable."""
    canonical = json.dumps({"scheme": SCHEME, "hash_block": HASH_BLOCK, **facts}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).digest()


def chain_root(model: bytes, *, lora: bytes = b"", tenant_salt: bytes = b"", cache_salt: bytes = b"") -> bytes:
    """32 bytes: the start of the chain for one fingerprint, adapter and tenant."""
    digest = hashlib.sha256(SCHEME.encode() + model)
    for part in (lora, tenant_salt, cache_salt):
        digest.update(hashlib.sha256(part).digest())  # fixed width: no two splits collide
    return digest.digest()


def _hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.sha256(parent + struct.pack(f"<{len(tokens)}I", *tokens)).digest()[:16]


def block_hashes(root: bytes, tokens: Sequence[int]) -> list[bytes]:
    """Hashes of the full hash blocks of `tokens`, 16 bytes each."""
    hashes: list[bytes] = []
    parent = root
    for start in range(0, len(tokens) - HASH_BLOCK + 1, HASH_BLOCK):
        parent = _hash(parent, tokens[start : start + HASH_BLOCK])
        hashes.append(parent)
    return hashes


class PageKeys:
    """Keys of a growing sequence's full pages; each key is computed once.

    page_size must divide HASH_BLOCK.
    """

    def __init__(self, root: bytes, page_size: int) -> None:
        if HASH_BLOCK % page_size:
            raise ValueError(f"page size {page_size} does not divide the hash block of {HASH_BLOCK} tokens")
        self._page_size = page_size
        self._parent = root  # hash of the last complete hash block, or the root
        self._keys: list[bytes] = []

    def copy(self) -> PageKeys:
        """The keys so far, for a sequence that goes its own way from here."""
        twin = object.__new__(PageKeys)
        twin._page_size, twin._parent, twin._keys = self._page_size, self._parent, list(self._keys)
        return twin

    def extend(self, tokens: Sequence[int], num_tokens: int) -> list[bytes]:
        """All keys of the full pages among the first `num_tokens` of `tokens`."""
        per_hash = HASH_BLOCK // self._page_size
        while (len(self._keys) + 1) * self._page_size <= num_tokens:
            index = len(self._keys)
            start = index // per_hash * HASH_BLOCK
            key = _hash(self._parent, tokens[start : (index + 1) * self._page_size])
            self._keys.append(key)
            if (index + 1) % per_hash == 0:
                self._parent = key
        return self._keys[: num_tokens // self._page_size]
