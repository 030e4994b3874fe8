"""Makes the bases of kustomize out of the chart, so that there is one source of every manifest: `make manifests`.

Needs helm-python-sdk (the extra `deploy`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CHART = HERE.parent / "helm" / "pagewire"
NAMESPACE = "pagewire"
_HEAD = "# Made of deploy/helm/pagewire by `make manifests`; change the chart.\n"
_AUTOSCALED = {"prefill": {"autoscaling": {"enabled": True}}, "decode": {"autoscaling": {"enabled": True}}}


def chart(values: dict[str, Any], name: str = "pagewire", namespace: str = NAMESPACE) -> dict[str, str]:
    """Text by the name of its template, without those that are empty and the notes."""
    import helm_python

    found: dict[str, str] = helm_python.Chart.load(str(CHART)).render(values, name=name, namespace=namespace)
    named = {Path(path).name: text.strip() + "\n" for path, text in found.items()}
    return {name: text for name, text in sorted(named.items()) if text.strip("-\n ") and name != "NOTES.txt"}


def rendered() -> dict[Path, str]:
    """What belongs into which file."""
    base = chart({"tls": {"mode": "secrets"}})
    with_issuer = chart({"tls": {"mode": "certManager"}})
    autoscaled = chart({"tls": {"mode": "secrets"}, **_AUTOSCALED})
    return {
        HERE / "base" / "manifests.yaml": _HEAD + "---\n".join(base.values()),
        HERE / "components" / "cert-manager" / "certificates.yaml": _HEAD + with_issuer["tls.yaml"],
        HERE / "components" / "autoscaling" / "autoscalers.yaml": _HEAD + autoscaled["autoscaling.yaml"],
    }


def main() -> None:
    for path, text in rendered().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
