"""Chats in fewer roles, for templates that refuse what clients send: agents speak as the system at any place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


def forms(messages: Sequence[Message], *, knows_developer: bool) -> Iterator[Sequence[Message]]:
    """The chat in forms that ever more templates take; none loses a word.

    1. As it is; where the template does not know developers, which many templates then leave out, they are the system.
    2. Developers are the system.
    3. The system speaks first, and later as the user; what either says in a row is one message.
    4. What the system says first begins the first message of the user.
    """
    if knows_developer:
        yield messages
    one_role = [_as(message, "system") if message["role"] == "developer" else message for message in messages]
    yield one_role
    begin = next((i for i, message in enumerate(one_role) if message["role"] != "system"), len(one_role))
    later = [_as(message, "user") if message["role"] == "system" else message for message in one_role[begin:]]
    alternating = _joined([*one_role[:begin], *later])
    if alternating != one_role:
        yield alternating
    if alternating[0]["role"] == "system":
        yield _joined([_as(alternating[0], "user"), *alternating[1:]])


def _as(message: Message, role: str) -> Message:
    return {**message, "role": role}


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Neighbours of one role, the system's or the user's, as one message."""
    joined: list[Message] = []
    for message in messages:
        if joined and message["role"] == joined[-1]["role"] and message["role"] in ("system", "user"):
            joined[-1] = {**joined[-1], "content": f"{joined[-1]['content']}\n\n{message['content']}"}
        else:
            joined.append(message)
    return joined
