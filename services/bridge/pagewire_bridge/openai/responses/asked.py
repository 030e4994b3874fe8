"""A request for a response, understood: what the router is asked, and what the answer is made with."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

from pagewire.v1.inference_pb2 import GenerateRequest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from pagewire_bridge.generation import Generation
from pagewire_bridge.openai.conversations.store import Conversation, ConversationStore, complete
from pagewire_bridge.openai.responses.answer import Answer
from pagewire_bridge.openai.responses.items import Fields, with_ids
from pagewire_bridge.openai.responses.schema import ResponsesBody
from pagewire_bridge.openai.responses.store import Before, Record, ResponseStore
from pagewire_bridge.openai.responses.tools import called
from pagewire_bridge.openai.responses.translate import ignored_fields, to_chat_body, to_head
from pagewire_bridge.openai.schema import ChatBody
from pagewire_bridge.openai.tool_use import parser_of
from pagewire_bridge.openai.translate import to_chat_request
from pagewire_bridge.openai.unsupported import ignored_fields_header


def store_of(request: Request) -> ResponseStore:
    """The application's one store."""
    store: ResponseStore = request.state.responses
    return store


def conversations_of(request: Request) -> ConversationStore:
    """The application's one store of them."""
    store: ConversationStore = request.state.conversations
    return store


async def conversation_of(request: Request, conversation_id: str) -> Conversation:
    """Raises HTTPException 404 for one that is not the tenant's, and Unavailable."""
    found = await conversations_of(request).find(request.state.tenant, conversation_id)
    if found is None:
        raise no_conversation(conversation_id)
    return found


def no_conversation(conversation_id: str) -> HTTPException:
    return HTTPException(404, f"Conversation with id '{conversation_id}' not found.")


@dataclass
class Asked:
    """input: its items, named. first: of its conversation. headers: of the answer."""

    request: Request
    body: ResponsesBody
    chat: ChatBody
    generate: GenerateRequest
    response_id: str
    input: list[Fields]
    first: str
    headers: dict[str, str]
    created_at: int = field(default_factory=lambda: int(time.time()))

    @property
    def tenant(self) -> str:
        tenant: str = self.request.state.tenant
        return tenant

    def answer(self) -> Answer:
        """Not begun."""
        head = to_head(self.body, self.response_id, self.body.model or "", self.created_at)
        return Answer(head, with_logprobs=self.body.with_logprobs, called=called(self.body.tools or ()))

    def accept(self, answer: Answer, generation: Generation) -> None:
        """Of a generation that was accepted: which model it is, and how it is read, which depends on its prompt."""
        accepted = generation.accepted[0]
        answer.head["model"] = accepted.model or answer.head["model"]
        answer.parser = parser_of(self.chat, self.request.state.answers, accepted.prompt_tail)

    def record(self, answer: Answer) -> Record:
        has_events = bool(self.body.background and self.body.stream)
        return Record(answer.response, self.input, self.first, has_events)

    async def extend(self, answer: Answer) -> None:
        """The conversation, by what was asked and answered, unless it was deleted meanwhile. Raises Unavailable."""
        name, response = self.body.conversation_id, answer.response
        if name is not None and response["status"] in ("completed", "incomplete"):
            items = complete([*self.input, *response["output"]])
            await conversations_of(self.request).add(self.tenant, name, items)

    async def keep(self, answer: Answer) -> None:
        """Stores it if it is to be; the response says whether it is."""
        if self.body.is_stored:
            answer.head["store"] = await store_of(self.request).save(self.tenant, self.record(answer))


async def understand(request: Request, body: ResponsesBody) -> Asked:
    """Finds the conversation. Raises InvalidRequest or HTTPException, and Unavailable if it cannot be looked for."""
    store, state = store_of(request), request.state
    if body.conversation_id is not None:
        named = await conversation_of(request, body.conversation_id)
        conversation = Before(named.items, body.conversation_id)
    else:
        conversation = await store.conversation(state.tenant, body.previous_response_id)
    suffix = uuid.uuid4().hex if state.named_by_client else state.request_id
    given = with_ids(await store.resolved(state.tenant, body.input), suffix)
    chat = to_chat_body(body, [*conversation.items, *given])
    generate = to_chat_request(chat, state.request_id, state.answers)
    response_id = f"resp_{suffix}"
    first = conversation.first or response_id
    if body.is_stored and not generate.session_id:
        generate.session_id = first
    headers = ignored_fields_header(ignored_fields(body))
    return Asked(request, body, chat, generate, response_id, given, first, headers)
