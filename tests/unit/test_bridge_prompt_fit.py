"""A prompt that is too long is cut; one that fits stays whole, however long an answer is asked for."""

from __future__ import annotations

from typing import Any, cast

import pytest
from pagewire.v1 import inference_pb2 as pb
from pagewire_bridge.answer_parser import NO_FORMAT
from pagewire_bridge.body import validated
from pagewire_bridge.client import RouterClient
from pagewire_bridge.ollama.schema import ChatBody, GenerateBody
from pagewire_bridge.ollama.translate import to_chat_of, to_generate_request
from pagewire_bridge.prompt_fit import cut_to_fit


class WordTokenizer:
    """A router whose tokens are words, before a model whose context has 100."""

    async def tokenize(self, asked: pb.TokenizeRequest) -> pb.TokenizeResponse:
        text = " ".join(message.content for message in asked.chat.messages) if asked.HasField("chat") else asked.text
        return pb.TokenizeResponse(max_model_len=100, tokens=[pb.Token(id=1)] * len(text.split()))


ROUTER = cast(RouterClient, WordTokenizer())


def raw(num_words: int, **options: int) -> pb.GenerateRequest:
    fields: dict[str, Any] = {"model": "m", "prompt": "word " * num_words, "raw": True, "options": options}
    return to_generate_request(validated(GenerateBody, fields), "id", NO_FORMAT)


@pytest.mark.parametrize("num_predict", [0, 8, 50, 100, 4096])
async def test_an_answer_of_any_length_leaves_a_prompt_that_fits_whole(num_predict: int) -> None:
    """num_ctx and num_predict of the same size, which clients set, once left one token of the prompt."""
    for num_words, num_ctx in ((99, None), (63, 64), (10, 64)):
        asked = raw(num_words, num_predict=num_predict)
        assert await cut_to_fit(ROUTER, asked, num_ctx) == 0
        assert not asked.truncate_prompt_tokens and asked.clip_max_tokens


@pytest.mark.parametrize(("num_predict", "kept"), [(0, 99), (8, 92), (50, 50), (4096, 50)])
async def test_a_prompt_that_is_cut_leaves_room_for_the_answer_up_to_half(num_predict: int, kept: int) -> None:
    asked = raw(300, num_predict=num_predict)
    assert await cut_to_fit(ROUTER, asked, None) == 300 - kept
    assert asked.truncate_prompt_tokens == kept


async def test_of_a_chat_the_oldest_messages_go() -> None:
    said = [{"role": "system", "content": "be short"}, *({"role": "user", "content": f"{i} " * 20} for i in range(8))]
    body = validated(ChatBody, {"model": "m", "messages": said, "options": {"num_predict": 4096}})
    asked = to_chat_of(body, "id", NO_FORMAT)
    assert await cut_to_fit(ROUTER, asked, None) == 120
    assert [message.content[0] for message in asked.chat.messages] == ["b", "6", "7"]
