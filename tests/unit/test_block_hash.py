"""Identity of KV blocks: the same in every process and version, and different whenever the KV may be."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagewire_core.block_hash import HASH_BLOCK, PageKeys, block_hashes, chain_root, fingerprint

FACTS = {"model": "00" * 32, "kv_dtype": "float32", "rope": {"rope_type": "default", "rope_theta": 10000.0},
         "num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "windows": [0, 0]}  # fmt: skip


def test_golden_vectors() -> None:
    """Workers of different versions share an index: if this changes, SCHEME must change with it."""
    model = fingerprint(FACTS)
    assert model.hex() == "60a69bf6996ef606526121b63d408f50ea58d3b006604b3313d3d75a7122f770"
    root = chain_root(model, tenant_salt=b"tenant", cache_salt=b"salt")
    assert root.hex() == "19f4724311234c8b33699b1751a7237bdf60943cff0c357422fc194f5caf6c51"
    assert [h.hex() for h in block_hashes(root, range(130))] == [
        "c481bca6377780de640e38b3ed60702a",
        "87cd620e536b71a0b93c2fa19f36d669",
    ]
    assert PageKeys(root, 16).extend(range(130), 130)[0].hex() == "8165e5db90d596553de7427589642200"


def test_the_formula_is_the_documented_one() -> None:
    root = chain_root(b"m" * 32)
    empty = hashlib.sha256(b"").digest()
    assert root == hashlib.sha256(b"pd1" + b"m" * 32 + 3 * empty).digest()
    first = hashlib.sha256(root + struct.pack("<64I", *range(64))).digest()[:16]
    second = hashlib.sha256(first + struct.pack("<64I", *range(64, 128))).digest()[:16]
    assert block_hashes(root, range(150)) == [first, second]


def test_every_part_of_the_root_matters_and_none_can_pose_as_another() -> None:
    roots = {
        chain_root(b"m" * 32),
        chain_root(b"n" * 32),
        chain_root(b"m" * 32, lora=b"ab"),
        chain_root(b"m" * 32, tenant_salt=b"ab"),
        chain_root(b"m" * 32, cache_salt=b"ab"),
        chain_root(b"m" * 32, tenant_salt=b"a", cache_salt=b"b"),
    }
    assert len(roots) == 6


@pytest.mark.parametrize("changed", FACTS)
def test_every_fact_of_the_model_is_part_of_the_fingerprint(changed: str) -> None:
    assert fingerprint(FACTS | {changed: "other"}) != fingerprint(FACTS)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=300), st.sampled_from([8, 16, 32, 64]))
def test_a_page_that_completes_a_hash_block_has_its_hash(tokens: list[int], page: int) -> None:
    """Workers with different page sizes must agree on what they publish."""
    root = chain_root(b"m" * 32)
    keys = PageKeys(root, page).extend(tokens, len(tokens))
    per_hash = HASH_BLOCK // page
    assert keys[per_hash - 1 :: per_hash] == block_hashes(root, tokens)


@given(st.lists(st.integers(0, 500), max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_keys_do_not_depend_on_how_the_sequence_grew(tokens: list[int], stops: list[int]) -> None:
    grown = PageKeys(b"r" * 32, 16)
    for stop in stops:
        grown.extend(tokens, min(stop, len(tokens)))
    assert grown.extend(tokens, len(tokens)) == PageKeys(b"r" * 32, 16).extend(tokens, len(tokens))


def test_copies_go_their_own_way() -> None:
    """Siblings of one prompt shared a cache of keys once, and took each other's output for their own."""
    one = PageKeys(b"r" * 32, 16)
    one.extend(range(16), 16)
    two = one.copy()
    assert one.extend([*range(16), *[1] * 16], 32) != two.extend([*range(16), *[2] * 16], 32)


def test_a_page_size_that_does_not_divide_the_hash_block_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        PageKeys(b"r" * 32, 48)
