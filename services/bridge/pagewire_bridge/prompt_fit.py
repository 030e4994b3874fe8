"""A prompt that is too long is cut where the client lets it be: Ollama's way, and OpenAI's `truncation: "auto"`."""

from __future__ import annotations

from pagewire.v1 import inference_pb2 as pb

from pagewire_bridge.client import RouterClient

_ROOM = 1  # tokens at least for the answer


async def cut_to_fit(client: RouterClient, request: pb.GenerateRequest, num_ctx: int | None) -> int:
    """Makes the prompt of `request` fit; how many tokens went. Raises PagewireError.

    num_ctx: tokens of prompt and answer; None: the model's. However long the answer may be, a prompt that fits stays
    whole; one that must be cut leaves room for the answer, but no more than half of all. Of a chat the oldest messages
    go first; only if its system messages and its last one are too long by themselves does it lose its beginning, as a
    plain prompt does.
    """
    about = await client.tokenize(pb.TokenizeRequest(model=request.model, text=""))
    context = min(num_ctx or about.max_model_len, about.max_model_len)
    before = await num_tokens(client, request)
    if before <= max(context - _ROOM, 1):
        return 0
    limit = max(context - max(min(request.sampling.max_tokens, context // 2), _ROOM), 1)
    if request.HasField("chat"):
        await _drop_oldest(client, request, limit)
    request.truncate_prompt_tokens = min(request.truncate_prompt_tokens or limit, limit)
    return before - min(await num_tokens(client, request), limit)


async def _drop_oldest(client: RouterClient, request: pb.GenerateRequest, limit: int) -> None:
    """Finds by bisection how many of the oldest messages must go."""
    messages = list(request.chat.messages)
    removable = [i for i, message in enumerate(messages[:-1]) if message.role != "system"]
    fewest, most = min(1, len(removable)), len(removable)
    while fewest < most:
        middle = (fewest + most) // 2
        _keep(request, messages, removable[:middle])
        if await num_tokens(client, request) <= limit:
            most = middle
        else:
            fewest = middle + 1
    _keep(request, messages, removable[:most])


def _keep(request: pb.GenerateRequest, messages: list[pb.ChatMessage], removed: list[int]) -> None:
    del request.chat.messages[:]
    request.chat.messages.extend(message for i, message in enumerate(messages) if i not in set(removed))


async def num_tokens(client: RouterClient, request: pb.GenerateRequest) -> int:
    """Of its prompt, whole. Raises PagewireError."""
    if request.HasField("token_ids"):
        return len(request.token_ids.ids)
    chat = request.chat if request.HasField("chat") else None
    text = request.text if request.HasField("text") else None
    return len((await client.tokenize(pb.TokenizeRequest(model=request.model, chat=chat, text=text))).tokens)
