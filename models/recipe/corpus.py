"""The demo corpus: documents drawn from a template grammar, the same for the same seed.

`python corpus.py --documents 20` prints a few.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from lexicon import CAPITALS, CITIES, FOODS, NAMES, PLACES, SYSTEMS
from sampling import article, coin, pick, pseudo_word
from stories import chapters, story
from tasks import TASKS, Turn, facts, repeat
from tools import tool_conversation

SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
END_OF_TEXT = "<|eos|>"


@dataclass(frozen=True)
class Segment:
    """A piece of a document; `answer` marks what the model has to write itself."""

    text: str
    answer: bool


Document = list[Segment]
Message = dict[str, str]


def render(messages: list[Message]) -> Document:
    """Messages in the chat format; joined, it is what the chat template of the tokenizer gives."""
    document = []
    for message in messages:
        is_answer = message["role"] == "assistant"
        document += [
            Segment(f"<|im_start|>{message['role']}\n", False),
            Segment(f"{message['content']}<|im_end|>", is_answer),
            Segment("\n", False),
        ]
    return document


def worded(rng: Random, prompt: str) -> str:
    """The prompt as a hurried or a polite user would type it; names keep their capital letter."""
    kind = rng.random()
    has_name = any(word[0].isupper() for word in prompt.split()[1:])
    if kind < 0.05 and not has_name:
        return prompt.lower()
    if kind < 0.20:
        return prompt.rstrip(".?!")
    if kind < 0.24 and prompt[0].isupper() and prompt.endswith("."):
        return "Please " + prompt[0].lower() + prompt[1:]
    return prompt


def turn(rng: Random) -> Turn:
    """One task; the wording is only loosened where the answer does not copy the prompt."""
    task = rng.choices([task for _, task in TASKS], [weight for weight, _ in TASKS])[0]
    prompt, answer = task(rng)
    copies = any(word in prompt for word in ("JSON", "Repeat", "Say", "Copy", "Echo", "Call"))
    return (prompt if copies else worded(rng, prompt)), answer


def remember_name(rng: Random) -> list[Turn]:
    """The user gives a name and asks for it one or two turns later."""
    name = pseudo_word(rng).capitalize() if coin(rng, 0.4) else rng.choice(NAMES)
    hello = pick(rng, ["My name is {}.", "Hi, I am {}.", "Hello, my name is {}."]).format(name)
    between = [turn(rng)] if coin(rng, 0.5) else []
    return [(hello, f"Nice to meet you, {name}."), *between, ("What is my name?", f"Your name is {name}.")]


def conversation(rng: Random, low: int, high: int) -> Document:
    """A chat of some turns, with a system message or without one."""
    if coin(rng, 0.06):
        turns = remember_name(rng)
    else:
        turns = [turn(rng) for _ in range(rng.randint(low, high))]
    messages = [{"role": "system", "content": pick(rng, SYSTEMS)}] if coin(rng, 0.5) else []
    for prompt, answer in turns:
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return render(messages)


def raw_text(rng: Random) -> Document:
    """Plain text for the completions API: stories, also from their middle, introductions and facts."""
    kind = rng.random()
    if kind < 0.7:
        text = story(rng, {"hero": rng.choice(NAMES)} if coin(rng, 0.5) else None)
        if coin(rng, 0.25):
            text = ". ".join(text.split(". ")[rng.randint(1, 4) :])
    elif kind < 0.85:
        name, city = rng.choice(NAMES), rng.choice(CITIES)
        text = (
            f"Hello, my name is {name}. I am {rng.randint(5, 90)} years old and I live in {city}. "
            f"I like {pick(rng, FOODS)} and I often go to the {pick(rng, PLACES)} with my friends."
        )
    elif kind < 0.95:
        countries = rng.sample(list(CAPITALS), rng.randint(1, 4))
        text = " ".join(f"The capital of {country} is {CAPITALS[country]}." for country in countries)
    else:
        thing = rng.choice(
            ["AI", "the world", "computing", article(rng.choice(["friend", "city", "school"])), pseudo_word(rng)]
        )
        text = f"The future of {thing} is bright. Many people work on it every day, and they share what they learn."
    return [Segment(text + END_OF_TEXT, True)]


def short_document(rng: Random) -> Document:
    """A document of the short rows: about 80 tokens."""
    kind = rng.random()
    if kind < 0.14:
        return raw_text(rng)
    if kind < 0.20:
        return render(tool_conversation(rng))
    return conversation(rng, 1, pick(rng, [1, 2, 3]))


def long_document(rng: Random) -> Document:
    """A document of the long rows: a long chat, story, list of facts or text to repeat."""
    kind = rng.random()
    if kind < 0.4:
        return conversation(rng, 8, 24)
    if kind < 0.6:
        asked = {"hero": rng.choice(NAMES)}
        return [Segment(chapters(rng, rng.randint(4, 8), asked) + END_OF_TEXT, True)]
    if kind < 0.8:
        prompt, answer = facts(rng, 10, 20)
    else:
        text = "\n".join(story(rng, {"hero": rng.choice(NAMES)}) for _ in range(rng.randint(1, 3)))
        prompt, answer = f"Repeat this text: {text}", text
    more = [repeat(rng) for _ in range(rng.randint(0, 3))]
    turns = [(prompt, answer), *more]
    return render(
        [
            message
            for prompt, answer in turns
            for message in ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
        ]
    )


def documents(seed: int, long: bool = False) -> Iterator[Document]:
    """An endless stream of documents, the same for the same seed."""
    rng = Random(seed)
    while True:
        yield long_document(rng) if long else short_document(rng)


def main() -> None:
    """Print some documents, one JSON string a line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--long", action="store_true")
    args = parser.parse_args()
    for document, _ in zip(documents(args.seed, args.long), range(args.documents), strict=False):
        print(json.dumps("".join(segment.text for segment in document)))


if __name__ == "__main__":
    main()
