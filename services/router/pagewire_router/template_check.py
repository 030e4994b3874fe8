"""Renders clients' chat templates in a process of its own (bounded_process.py).

From a Chat to b"T" and the text of its prompt, or b"E" and an Error.
"""

from __future__ import annotations

import sys

from pagewire.v1 import inference_pb2
from pagewire_core.chat_template import ChatTemplate
from pagewire_core.errors import InvalidRequest, PagewireError, StartupError

from pagewire_router.bounded_process import serve
from pagewire_router.chat import render

MAX_CHARACTERS = 8 << 20
_MEMORY_BYTES = 256 << 20
_STACK_BYTES = 4 << 20


def main() -> None:
    bos_token, eos_token = sys.argv[1:]
    serve(lambda job: _answer(inference_pb2.Chat.FromString(job), bos_token, eos_token), _MEMORY_BYTES, _STACK_BYTES)


def _answer(chat: inference_pb2.Chat, bos_token: str, eos_token: str) -> bytes:
    try:
        return b"T" + _rendered(chat, bos_token, eos_token).encode()
    except PagewireError as error:
        return b"E" + error.to_proto().SerializeToString()
    except Exception as error:  # a template is a program, and may fail as any may
        refused = InvalidRequest(f"the chat template cannot be used: {type(error).__name__}", "chat_template")
        return b"E" + refused.to_proto().SerializeToString()


def _rendered(chat: inference_pb2.Chat, bos_token: str, eos_token: str) -> str:
    try:
        template = ChatTemplate(chat.chat_template, bos_token, eos_token)
    except StartupError as error:
        raise InvalidRequest(str(error), "chat_template") from None
    text = render(chat, template)
    if len(text) > MAX_CHARACTERS:
        raise InvalidRequest(f"the chat template makes more than {MAX_CHARACTERS} characters", "chat_template")
    return text


if __name__ == "__main__":
    main()
