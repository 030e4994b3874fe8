"""Tenants of API keys on real workers: what one of them has computed is of no use to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster import Cluster, running
from pagewire_bridge.keys import digest_of
from tiny_models import make_model

PROMPT = list(range(10, 210))


async def test_a_prefix_is_cached_for_its_own_tenant_alone(tmp_path: Path) -> None:
    """A shared cache tells by its speed what others have asked (CVE-2025-46570)."""
    file = tmp_path / "keys.yaml"
    tenants = {"one": "a", "two": "a", "three": "b"}
    entries = [f"- {{name: {n}, tenant: {t}, sha256: '{digest_of(n)}'" for n, t in tenants.items()]
    file.write_text("}\n".join(entries) + ", admin: true}\n")
    model = make_model(tmp_path / "model", "llama")
    cluster = Cluster(model, tmp_path, bridge_flags=(f"--api-keys-file={file}",))
    async with running(cluster):
        assert (await cluster.http.post("/v1/completions", json={"prompt": PROMPT})).status_code == 401

        async def ask(secret: str) -> tuple[int, dict[str, Any]]:
            body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}
            headers = {"authorization": f"Bearer {secret}"}
            response = await cluster.http.post("/v1/completions", json=body, headers=headers)
            assert response.status_code == 200, response.text
            return int(response.headers["x-pagewire-cached-tokens"]), response.json()["choices"]

        cached, choices = zip(*[await ask(secret) for secret in ("one", "two", "three", "three")], strict=True)
        assert cached[0] == 0 < cached[1] and cached[2] == 0 < cached[3]
        assert all(choice == choices[0] for choice in choices)
        reset = "/reset_prefix_cache"
        assert (await cluster.http.post(reset, headers={"authorization": "Bearer one"})).status_code == 403
        assert (await cluster.http.post(reset, headers={"authorization": "Bearer three"})).status_code == 200
        assert (await ask("one"))[0] == 0, "an administrator had the workers forget it"
        cluster.http.headers["authorization"] = "Bearer one"  # for what is checked at the end
