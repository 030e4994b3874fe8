"""Train the demo model from scratch on the CPU: tokenizer, weights, and the directory that is served.

`python train.py --output ../pagewire-demo` is the whole recipe; README.md has the figures.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from corpus import documents
from export import load_tokenizer, train_tokenizer, write_config, write_tokenizer_config, write_weights
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

PROMPT_WEIGHT = 0.1  # the prompt is read, not written: a little loss on it still trains its embeddings
VALIDATION_SEED = 10**9
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Rows and tokens per row of one step."""

    rows: int
    length: int


def shape_of(step: int) -> Shape:
    """Short rows, and in every eighth step long ones, so that long prompts stay in distribution."""
    if step % 32 == 31:
        return Shape(1, 2048)
    return Shape(2, 1024) if step % 8 == 7 else Shape(8, 256)


def rows(tokenizer: Tokenizer, seed: int, length: int) -> Iterator[tuple[list[int], list[float]]]:
    """Token ids and loss weights of packed rows; every row begins with a document."""
    stream = documents(seed, long=length > 256)
    while True:
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) <= length:
            document = next(stream)
            for segment, encoding in zip(document, tokenizer.encode_batch([s.text for s in document]), strict=True):
                ids += encoding.ids
                weights += [1.0 if segment.answer else PROMPT_WEIGHT] * len(encoding.ids)
        yield ids[: length + 1], weights[: length + 1]


def batch(tokenizer: Tokenizer, seed: int, shape: Shape) -> Batch:
    """The ids and weights of one step, the same for the same seed."""
    chosen = list(islice(rows(tokenizer, seed, shape.length), shape.rows))
    return torch.tensor([ids for ids, _ in chosen]), torch.tensor([weights for _, weights in chosen])


def token_losses(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each next token."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def validation_loss(model: torch.nn.Module, batches: list[Batch]) -> tuple[float, float]:
    """Mean loss over all tokens, and over those that the model has to write."""
    losses = torch.cat([token_losses(model, ids) for ids, _ in batches])
    answers = torch.cat([weights[:, 1:].flatten() for _, weights in batches]) == 1.0
    return losses.mean().item(), losses[answers].mean().item()


def learning_rate(step: int, fraction: float, peak: float) -> float:
    """Warm-up over 100 steps, flat to 60 % of the run, then linear to 2 % of the peak."""
    decay = 1.0 if fraction < 0.6 else 1.0 - 0.98 * min((fraction - 0.6) / 0.4, 1.0)
    return peak * min((step + 1) / 100, 1.0) * decay


def new_model(output: Path) -> LlamaForCausalLM:
    """A Llama of the directory's configuration, with random weights in fp32."""
    return LlamaForCausalLM(LlamaConfig.from_pretrained(output, dtype=torch.float32))


def prepare(args: argparse.Namespace) -> tuple[Tokenizer, LlamaForCausalLM]:
    """Write all files but the weights to the output directory; return its tokenizer and a new model."""
    args.output.mkdir(parents=True, exist_ok=True)
    if not (args.output / "tokenizer.json").exists():
        train_tokenizer(args.output, args.seed)
    write_tokenizer_config(args.output)
    tokenizer = load_tokenizer(args.output)
    write_config(args.output, tokenizer.get_vocab_size())
    return tokenizer, new_model(args.output)


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, weights: torch.Tensor) -> float:
    """One step of the optimizer; the loss before it."""
    wanted = weights[:, 1:].flatten()
    loss = (token_losses(model, ids) * wanted).sum() / wanted.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(args: argparse.Namespace) -> None:
    """Run the recipe; a checkpoint is written to the output directory every `--save-every` steps."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer, model = prepare(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05)
    first = resume(args.state, model, optimizer)
    validation = [batch(tokenizer, VALIDATION_SEED + i, Shape(8, 256)) for i in range(8)]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, vocabulary {tokenizer.get_vocab_size()}, from step {first}", flush=True)
    start, tokens = time.monotonic(), 0
    for step in range(first, args.steps):
        ids, weights = batch(tokenizer, args.seed + 1 + step, shape_of(step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, step / args.steps, args.lr)
        loss = update(model, optimizer, ids, weights)
        tokens += weights[:, 1:].numel()
        if step % 50 == 0:
            seconds = time.monotonic() - start
            print(f"step {step} loss {loss:.3f} {tokens / seconds:.0f} tokens/s {seconds:.0f} s", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            overall, answers = validation_loss(model, validation)
            print(f"step {step + 1} validation {overall:.4f} answers {answers:.4f}", flush=True)
            write_weights(args.output, model)
            save_state(args.state, model, optimizer, step + 1)


def save_state(path: Path | None, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Keep what a run needs to go on after a crash."""
    if path:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, path)


def resume(path: Path | None, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the saved state, if there is one, and return the step to go on with."""
    if not path or not path.exists():
        return 0
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "pagewire-demo")
    parser.add_argument("--state", type=Path, help="file to resume from and to save the optimizer in")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--save-every", type=int, default=300)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=20260)
    parser.add_argument("--threads", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
