"""Compiles clients' grammars in a process of its own (bounded_process.py).

From a GenerateRequest with structured_output and reasoning to b"C" and a Constraint, or b"E" and an Error.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from pathlib import Path

import llguidance
import numpy as np
from pagewire.v1 import inference_pb2
from pagewire_core.errors import InvalidRequest, PagewireError
from pagewire_core.grammar import Vocabulary, check
from pagewire_core.tokenizer import Tokenizer

from pagewire_router.bounded_process import serve
from pagewire_router.structured_output import to_constraint

_MEMORY_BYTES = 1 << 30
_STACK_BYTES = 4 << 20  # half of what a worker's threads have
_PROBED_TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("vocab_size", type=int)
    parser.add_argument("eos_token_ids", type=int, nargs="*")
    args = parser.parse_args()
    vocabulary = Vocabulary(args.tokenizer, args.vocab_size, args.eos_token_ids)
    specials = Tokenizer(args.tokenizer).special_tokens
    serve(
        lambda job: _answer(inference_pb2.GenerateRequest.FromString(job), vocabulary, specials),
        _MEMORY_BYTES,
        _STACK_BYTES,
    )


def _answer(job: inference_pb2.GenerateRequest, vocabulary: Vocabulary, specials: Mapping[str, int]) -> bytes:
    try:
        constraint = to_constraint(
            job.structured_output if job.HasField("structured_output") else None,
            job.reasoning if job.HasField("reasoning") else None,
            specials,
        )
        for grammar in (constraint.answer, constraint.reasoning, constraint.reasoning_end):
            if grammar:
                probe(vocabulary.compile(grammar), vocabulary)
    except PagewireError as error:
        return b"E" + error.to_proto().SerializeToString()
    except (RecursionError, MemoryError, ValueError) as error:
        return b"E" + InvalidRequest(f"the grammar cannot be read: {error}").to_proto().SerializeToString()
    return b"C" + constraint.SerializeToString()


def probe(matcher: llguidance.LLMatcher, vocabulary: Vocabulary) -> None:
    """Some steps at random: grammars are compiled as they are used, so some fail only then. Raises InvalidRequest."""
    rng, mask = random.Random(0), np.empty(vocabulary.num_words, np.uint32)
    for step in range(_PROBED_TOKENS):
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        check(matcher)
        ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        going_on = [i for i in ids if i not in vocabulary.eos_token_ids]
        if not ids and not step:
            raise InvalidRequest("no text follows the grammar", "structured_outputs")
        if not going_on:
            return
        matcher.consume_token(rng.choice(going_on))


if __name__ == "__main__":
    main()
