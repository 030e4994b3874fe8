"""Names that clients give a model when they were told only a server."""

from __future__ import annotations

# huggingface_hub says "dummy" where it knows only a URL; TGI's documentation and its users' code say "tgi".
_PLACEHOLDERS = frozenset({"dummy", "tgi"})


def to_served_name(name: str | None) -> str:
    """The name to ask the router for; empty: the only model.

    Hugging Face's JavaScript client names a model by its URL.
    """
    if name is None or name in _PLACEHOLDERS or name.startswith(("http://", "https://")):
        return ""
    return name
