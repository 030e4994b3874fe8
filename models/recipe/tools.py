"""Conversations with tools: the definitions in the system message, a call, its result and the answer."""

import json
from dataclasses import dataclass
from random import Random

from lexicon import CITIES, NAMES
from sampling import coin, pick, pseudo_word
from tasks import TASKS

Json = dict[str, object]
TEXT: Json = {"type": "string"}
NUMBER: Json = {"type": "number"}
TOOL_INTRO = "Tools:\n"
TOOL_RULE = 'To call a tool, answer <tool_call>{"name": ..., "arguments": ...}</tool_call>.'


def function(name: str, description: str, properties: Json, required: list[str]) -> Json:
    """A tool in the form of the OpenAI API."""
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def call_text(name: str, arguments: Json) -> str:
    """What the model writes to call a tool."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def tool_system(system: str, tools: list[Json]) -> str:
    """The system message with the tool definitions, as the chat template writes it."""
    definitions = "\n".join(json.dumps(tool) for tool in tools)
    return (f"{system}\n\n" if system else "") + f"{TOOL_INTRO}{definitions}\n{TOOL_RULE}"


@dataclass(frozen=True)
class Scene:
    """A tool, a request for it, the call, and what comes of it."""

    name: str
    schema: Json
    request: str
    arguments: Json
    result: Json
    answer: str


def weather(rng: Random, city: str, degrees: int) -> Scene:
    """The tool of every tutorial, in the variants seen there."""
    with_unit, place = coin(rng, 0.4), "location" if coin(rng, 0.3) else "city"
    fields: Json = {place: TEXT}
    if with_unit:
        fields["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    about = pick(rng, ["Get the weather of a city.", "Get the current weather.", "Get weather"])
    request = pick(
        rng,
        [
            "What is the weather in {}?",
            "What's the weather like in {}?",
            "How is the weather in {}?",
            "Is it cold in {}?",
            "What is the weather like in {} today?",
        ],
    ).format(city)
    return Scene(
        "get_weather",
        function("get_weather", about, fields, [place]),
        request,
        {place: city},
        {"temperature": degrees},
        f"It is {degrees} degrees in {city}.",
    )


def scenes(rng: Random) -> list[Scene]:
    """One scene of each tool."""
    city = pseudo_word(rng).capitalize() if coin(rng, 0.4) else rng.choice(CITIES)
    name = rng.choice(NAMES)
    degrees, hour = rng.randint(0, 35), f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    left, right = rng.randint(0, 99), rng.randint(0, 99)
    return [
        weather(rng, city, degrees),
        Scene(
            "get_time",
            function("get_time", "Get the time in a city.", {"city": TEXT}, ["city"]),
            pick(rng, ["What time is it in {}?", "Tell me the time in {}."]).format(city),
            {"city": city},
            {"time": hour},
            f"It is {hour} in {city}.",
        ),
        Scene(
            "add",
            function("add", "Add two numbers.", {"a": NUMBER, "b": NUMBER}, ["a", "b"]),
            f"What is {left} + {right}?",
            {"a": left, "b": right},
            {"result": left + right},
            f"The result is {left + right}.",
        ),
        Scene(
            "send_message",
            function("send_message", "Send a message to a person.", {"to": TEXT, "text": TEXT}, ["to", "text"]),
            f"Send {name} the message: see you in {city}",
            {"to": name, "text": f"see you in {city}"},
            {"status": "sent"},
            f"The message to {name} was sent.",
        ),
    ]


def tool_conversation(rng: Random) -> list[dict[str, str]]:
    """A chat in which a tool fits the question, or, sometimes, does not."""
    offered = scenes(rng)
    scene = rng.choices(offered, [0.6, 0.15, 0.15, 0.1])[0]
    others = [other.schema for other in offered if other is not scene]
    tools = [scene.schema, *rng.sample(others, pick(rng, [0, 1, 2]))]
    rng.shuffle(tools)
    if coin(rng, 0.3):  # as template engines print it that sort the keys
        tools = [json.loads(json.dumps(tool, sort_keys=True)) for tool in tools]
    system = tool_system(pick(rng, ["", "You are a helpful assistant."]), tools)
    turns = [("system", system)]
    if coin(rng, 0.2):
        task = rng.choices([task for _, task in TASKS], [weight for weight, _ in TASKS])[0]
        turns += zip(("user", "assistant"), task(rng), strict=True)
    else:
        turns += [("user", scene.request), ("assistant", call_text(scene.name, scene.arguments))]
        if coin(rng, 0.5):
            turns += [("tool", json.dumps(scene.result)), ("assistant", scene.answer)]
    return [{"role": role, "content": content} for role, content in turns]
