"""OpenAI's `functions`: what clients sent before there were tools, and still send, in the words of tools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pagewire_core.errors import InvalidRequest

from pagewire_bridge.openai.schema import ChatBody, Message
from pagewire_bridge.openai.tools import CalledTool, FunctionName, FunctionShape, NamedTool, ToolShape


def with_tools(body: ChatBody) -> ChatBody:
    """The same chat, whose functions are tools, too; that it has `functions` tells how it is to be answered.

    Raises InvalidRequest.
    """
    body.messages = list(_messages(body.messages))
    functions, choice = body.functions or [], body.function_call
    if isinstance(choice, FunctionName) and choice.name not in {function.name for function in functions}:
        raise InvalidRequest("`function_call` names a function that is not in `functions`.", "function_call")
    if not functions:
        return body
    _check(body, functions)
    body.tools = [ToolShape(type="function", function=function) for function in functions]
    body.tool_choice = NamedTool(type="function", function=choice) if isinstance(choice, FunctionName) else choice
    body.parallel_tool_calls = False  # there is room for one call in such an answer
    return body


def _check(body: ChatBody, functions: Sequence[FunctionShape]) -> None:
    if body.tools is not None or body.tool_choice is not None:
        raise InvalidRequest("`functions` and `tools` exclude each other.", "functions")
    if len({function.name for function in functions}) < len(functions):
        raise InvalidRequest("Every function needs a name of its own.", "functions")


def _messages(messages: Sequence[Message]) -> Iterator[Message]:
    """Calls had no ids: what a function has answered belongs to the call before it."""
    call_id = ""
    for i, message in enumerate(messages):
        if message.function_call is not None:
            if message.tool_calls:
                where = f"messages[{i}].function_call"
                raise InvalidRequest(f"`{where}` and `tool_calls` exclude each other.", where)
            call_id = f"call_{i}"
            call = CalledTool(id=call_id, type="function", function=message.function_call)
            yield message.model_copy(update={"tool_calls": [call]})
        elif message.role == "function":
            if not message.name:
                where = f"messages[{i}].name"
                raise InvalidRequest(f"`{where}` must say which function has answered.", where)
            yield message.model_copy(update={"role": "tool", "tool_call_id": call_id or f"call_{i}"})
        else:
            yield message
