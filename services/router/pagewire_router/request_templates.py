"""Chats that bring a template: refused unless that is allowed, and rendered where they can hurt nobody."""

from __future__ import annotations

from pagewire.v1 import common_pb2, inference_pb2
from pagewire_core.errors import InvalidRequest, from_proto

from pagewire_router.bounded import BoundedProcesses


class RequestTemplates:
    """special_texts: beginning and end of a sequence, as templates name them."""

    def __init__(self, special_texts: tuple[str, str], trusted: bool) -> None:
        self._trusted = trusted
        self._processes = BoundedProcesses("pagewire_router.template_check", special_texts, "rendering a chat template")

    async def prompt_of(self, chat: inference_pb2.Chat) -> str | None:
        """The text of its prompt; None if it is to have the model's template. Raises InvalidRequest, Overloaded."""
        if not chat.chat_template:
            return None
        if not self._trusted:
            raise InvalidRequest(
                "The request has a chat template, and this server was started without --trust-request-chat-template.",
                "chat_template",
            )
        answer = await self._processes.ask(chat.SerializeToString())
        if answer is None:
            raise InvalidRequest("the chat template takes too much time or memory; make it simpler", "chat_template")
        if answer[:1] == b"E":
            raise from_proto(common_pb2.Error.FromString(answer[1:]))
        return answer[1:].decode()

    async def close(self) -> None:
        await self._processes.close()
