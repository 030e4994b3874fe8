"""Measure, task by task, how often the demo model's greedy answer is exactly the grammar's."""

import argparse
from pathlib import Path
from random import Random

import tasks
import torch
from corpus import render
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

# Tasks whose answer follows from the prompt; stories and jokes have several right ones.
CLOSED = [
    tasks.about_itself,
    tasks.capital,
    tasks.sound,
    tasks.opposite,
    tasks.colour,
    tasks.calendar,
    tasks.count,
    tasks.add,
    tasks.person_json,
    tasks.call_json,
    tasks.repeat,
    tasks.sort,
    tasks.enumerate_things,
    tasks.facts,
    tasks.poem,
    tasks.unknown,
]


@torch.no_grad()
def is_exact(model: LlamaForCausalLM, tokenizer: Tokenizer, turn: tasks.Turn) -> bool:
    """Whether each answer token, its end included, is the likeliest: then greedy decoding writes just this answer."""
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True)]
    document = render(messages)
    answer = next(index for index, segment in enumerate(document) if segment.answer)
    prompt = [token for segment in document[:answer] for token in tokenizer.encode(segment.text).ids]
    expected = torch.tensor(tokenizer.encode(document[answer].text).ids)
    logits = model(input_ids=torch.tensor([prompt + expected.tolist()])).logits[0, len(prompt) - 1 : -1]
    return bool((logits.argmax(-1) == expected).all())


def main() -> None:
    """Print one line a task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent.parent / "pagewire-demo")
    parser.add_argument("--examples", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    for task in CLOSED:
        rng = Random(99)
        exact = sum(is_exact(model, tokenizer, task(rng)) for _ in range(args.examples))
        print(f"{task.__name__:18} {exact / args.examples:.0%}", flush=True)


if __name__ == "__main__":
    main()
