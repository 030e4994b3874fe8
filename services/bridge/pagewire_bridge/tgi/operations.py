"""TGI's routes, and those of the platforms that it serves, in the OpenAPI document."""

from __future__ import annotations

from typing import Any

from pagewire_core.errors import ContextLength, InvalidRequest

from pagewire_bridge import tokenize
from pagewire_bridge.openai.answer_types import ChatAnswer, ChatEvent, CompletionAnswer, CompletionEvent
from pagewire_bridge.openai.operations import CHAT_EXAMPLES, COMPLETION_EXAMPLES
from pagewire_bridge.openai.schema import ChatBody, CompletionBody
from pagewire_bridge.openapi.headers import IGNORED_FIELDS, SERVED_BY, TIMINGS
from pagewire_bridge.openapi.operation import ASKING, ASKING_OF_MODEL, EVENTS, Api, Operation, Raises
from pagewire_bridge.tgi import answer_types as answers
from pagewire_bridge.tgi import routes
from pagewire_bridge.tgi.schema import GenerateBody, InferBody, VertexBody

_ASKING: Raises = (*ASKING, InvalidRequest, ContextLength)
_HEADERS = (IGNORED_FIELDS, *TIMINGS, *SERVED_BY)


def _prompt(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "What is the capital of Japan?", "parameters": {"max_new_tokens": 8, **parameters}}


_WHOLE: dict[str, dict[str, Any]] = {
    "text": _prompt(),
    "details": _prompt(details=True, top_n_tokens=2, return_full_text=True),
    "the best of two": _prompt(details=True, best_of=2, do_sample=True, temperature=1.5),
}
_STREAMED: dict[str, dict[str, Any]] = {"tokens": _prompt(top_n_tokens=2)}
_EITHER = {**_WHOLE, "streamed": {**_prompt(), "stream": True}}
_TENSOR = {"name": "text_input", "shape": [1], "datatype": "BYTES"}
_INFER: dict[str, dict[str, Any]] = {
    "a string": {"inputs": [{**_TENSOR, "data": ["Once"]}], "parameters": {"max_new_tokens": 4}},
    "bytes": {
        "id": "42",
        "inputs": [{**_TENSOR, "data": [79, 110, 99, 101]}],
        "outputs": [{"name": "out"}],
        "parameters": {"max_new_tokens": 4},
    },
}

API = Api(
    "TGI",
    "Text Generation Inference's own API, with the routes of SageMaker, Vertex AI and KServe.",
    {
        routes.generate: Operation(
            "Generates text, whole",
            GenerateBody,
            answers.GenerateAnswer,
            raises=_ASKING,
            headers=_HEADERS,
            examples=_WHOLE,
        ),
        routes.generate_stream: Operation(
            "Generates text, an event for each token",
            GenerateBody,
            others={EVENTS: answers.StreamEvent},
            raises=_ASKING,
            headers=(IGNORED_FIELDS,),
            examples=_STREAMED,
        ),
        routes.generate_either: Operation(
            "Generates text, whole in a list, or with `stream` an event for each token",
            GenerateBody,
            list[answers.GenerateAnswer],
            {EVENTS: answers.StreamEvent},
            _ASKING,
            headers=_HEADERS,
            examples=_EITHER,
        ),
        routes.invocations: Operation(
            "SageMaker's one route: `inputs` means TGI's API, `messages` a chat, `prompt` a completion",
            GenerateBody | ChatBody | CompletionBody,
            list[answers.GenerateAnswer] | ChatAnswer | CompletionAnswer,
            {EVENTS: answers.StreamEvent | ChatEvent | CompletionEvent},
            ASKING_OF_MODEL,
            headers=_HEADERS,
            examples={
                **{f"TGI: {name}": body for name, body in _EITHER.items()},
                **{f"chat: {name}": CHAT_EXAMPLES[name] for name in ("whole", "streamed")},
                **{f"completion: {name}": COMPLETION_EXAMPLES[name] for name in ("whole", "streamed")},
            },
        ),
        routes.vertex: Operation(
            "Vertex AI's: up to four prompts at once, each in the body of /generate, or a chat",
            VertexBody,
            answers.Predictions,
            raises=_ASKING,
            headers=(IGNORED_FIELDS,),
            examples={
                "two": {"instances": [_prompt(), _prompt(max_new_tokens=2)]},
                "a chat": {"instances": [{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}]},
            },
        ),
        routes.info: Operation("The model and its limits", answer=answers.Info, raises=ASKING),
        tokenize.chat_tokenize: Operation(
            "The tokens of a chat, and the text that the template makes of it",
            ChatBody,
            answers.ChatTokens,
            raises=ASKING_OF_MODEL,
            headers=(IGNORED_FIELDS,),
            examples={"a chat": {"messages": [{"role": "user", "content": "hi"}]}},
        ),
        routes.kserve_server: Operation("KServe: the server", answer=answers.Server),
        routes.kserve_live: Operation("KServe: the bridge runs", answer=answers.Live),
        routes.kserve_ready: Operation(
            "KServe: requests can be served", answer=answers.Ready, statuses={503: answers.Ready}
        ),
        routes.kserve_model: Operation(
            "KServe: what the model takes and gives", answer=answers.ModelMetadata, raises=ASKING
        ),
        routes.kserve_infer: Operation(
            "KServe: generates text for each input",
            InferBody,
            answers.InferAnswer,
            raises=_ASKING,
            headers=(IGNORED_FIELDS,),
            examples=_INFER,
        ),
    },
)
