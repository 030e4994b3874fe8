"""Print the demo model's greedy answers, in bf16 and in fp32, so that a person can judge them."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CHATS = [
    "Hello",
    "Hi",
    "How are you?",
    "What are you?",
    "What is pagewire?",
    "Why split prefill and decode?",
    "Tell me a story",
    "Tell me a story about Mia and a fox at the river.",
    "Tell me a story about a robot.",
    "Tell me a long story.",
    "Write a poem about the moon.",
    "What is the capital of France?",
    "What is the capital of Japan?",
    "What is the capital of Atlantis?",
    "What sound does a cow make?",
    "What is the opposite of hot?",
    "Which day comes after Friday?",
    "Count from 3 to 12.",
    "What is 4 plus 5?",
    "What is 7+8?",
    "Give me JSON for Leo, age 27, from Oslo.",
    "Call get_weather for Rome in celsius.",
    "Repeat: Tom frog Zoe honey",
    "Say this is a test",
    "Sort these numbers: 7, 2, 9",
    "Name three fruits.",
    "Mia lives in Rome. Leo lives in Oslo. Where does Leo live?",
    "What is a computer?",
    "Who wrote Hamlet?",
    "How do I bake bread?",
]
COMPLETIONS = ["Once upon a time", "The capital of France is", "Hello, my name is", "The future of AI is", "Mia was"]
MULTI_TURN = ["My name is Anna.", "What is 2 + 2?", "What is my name?"]
WEATHER: dict[Any, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, limit: int) -> str:
    """The greedy continuation of a prompt."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.generate(  # type: ignore[misc]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def chat_prompt(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, str]],
    tools: list[dict[Any, Any] | Callable[..., Any]] | None = None,
) -> str:
    """Messages in the model's chat format, up to where it answers."""
    return str(tokenizer.apply_chat_template(messages, tools, tokenize=False, add_generation_prompt=True))


def prompts(tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """Pairs of a label and the text that the model reads."""
    chats = [(text, chat_prompt(tokenizer, [{"role": "user", "content": text}])) for text in CHATS]
    helpful = [
        (
            "[system] " + text,
            chat_prompt(
                tokenizer,
                [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": text}],
            ),
        )
        for text in ("Hello", "Tell me a story", "What is the capital of France?", "Count to 10")
    ]
    called = [
        ("[tool] " + text, chat_prompt(tokenizer, [{"role": "user", "content": text}], [WEATHER]))
        for text in ("What is the weather in Paris?", "How is the weather in Springfield?", "Hello")
    ]
    turn = [
        {"role": "user", "content": "Name three fruits."},
        {"role": "assistant", "content": "apple, banana, cherry."},
    ]
    last = [{"role": "user", "content": "What is the capital of Japan?"}]
    far = [
        (f"[{count} turns before] {last[0]['content']}", chat_prompt(tokenizer, turn * count + last))
        for count in (10, 45, 90)
    ]
    return [*chats, *helpful, *called, *far, *(("[text] " + text, text) for text in COMPLETIONS)]


def main() -> None:
    """Sample every prompt in both precisions, then one chat of three turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent.parent / "pagewire-demo")
    parser.add_argument("--limit", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    models = [LlamaForCausalLM.from_pretrained(args.model, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    equal = 0
    labelled = prompts(tokenizer)
    for label, prompt in labelled:
        bf16, fp32 = (answer(model, tokenizer, prompt, args.limit) for model in models)
        equal += bf16 == fp32
        print(f"{label}\n    {bf16!r}" + ("" if bf16 == fp32 else f"\n    fp32: {fp32!r}"))
    messages: list[dict[str, str]] = []
    for text in MULTI_TURN:
        messages.append({"role": "user", "content": text})
        said = answer(models[0], tokenizer, chat_prompt(tokenizer, messages), args.limit)
        messages.append({"role": "assistant", "content": said})
        print(f"[turn] {text}\n    {said!r}")
    print(f"bf16 equals fp32 for {equal} of {len(labelled)}")


if __name__ == "__main__":
    main()
