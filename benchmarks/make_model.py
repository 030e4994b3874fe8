"""Writes a checkpoint with random weights in a real architecture's shape, and what other servers read of the same.

python benchmarks/make_model.py random/smol135 --shape smol135 --gguf bf16 q8_0 q4_0 --compressed int8 int4
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from pagewire_bench import compressed, gguf_file
from pagewire_bench.random_model import (
    ARCHITECTURES,
    SHAPES,
    hf_config,
    random_weights,
    train_tokenizer,
    write_safetensors,
    write_settings,
)
from tokenizers import Tokenizer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Writes a checkpoint with random weights.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="smol135")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--context", type=int, metavar="N", help="tokens; default: the shape's")
    parser.add_argument("--untie", action="store_true", help="an output matrix of its own")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json; default: train one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gguf", nargs="+", choices=gguf_file.TYPES, default=[], help="llama.cpp's files")
    parser.add_argument("--compressed", nargs="+", choices=compressed.KINDS, default=[], help="vLLM's quantized forms")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    shape = dataclasses.replace(SHAPES[args.shape], tied=not args.untie)
    if args.context:
        shape = dataclasses.replace(shape, max_position_embeddings=args.context)
    if "int4" in args.compressed and shape.intermediate_size % compressed.GROUP:
        sys.exit(
            f"make_model.py: int4 has groups of {compressed.GROUP}, and this shape's matrices no whole number of them"
        )
    tokenizer = Tokenizer.from_file(str(args.tokenizer)) if args.tokenizer else train_tokenizer(shape.vocab_size)
    if tokenizer.get_vocab_size() > shape.vocab_size:
        sys.exit(f"make_model.py: {tokenizer.get_vocab_size()} tokens are more than the shape's {shape.vocab_size}")
    args.directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.directory / "tokenizer.json"))
    config = hf_config(shape, args.architecture, tokenizer)
    write_settings(args.directory, config)
    tensors = dict(random_weights(shape, args.architecture, args.seed))
    write_safetensors(args.directory / "model.safetensors", tensors)
    for kind in args.gguf:
        gguf_file.write_gguf(args.directory, kind, config, tensors)
    for kind in args.compressed:
        compressed.write_compressed(args.directory, kind, config, tensors)
    millions = sum(tensor.size for tensor in tensors.values()) / 1e6
    print(f"{args.directory}: {args.architecture}, {millions:.1f} M parameters")


if __name__ == "__main__":
    main()
