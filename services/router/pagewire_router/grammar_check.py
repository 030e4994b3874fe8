"""Compiles clients' grammars in a process of its own: what takes too long or too much memory ends this process alone.

    stdin   length (4 bytes, little endian), GenerateRequest with structured_output and reasoning; ...
    stdout  ready: one byte; then for each: length, b"C" and a Constraint, or b"E" and an Error; ...

Ends when stdin does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import signal
import struct
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import llguidance
import numpy as np
from pagewire.v1 import inference_pb2
from pagewire_core.errors import InvalidRequest, PagewireError
from pagewire_core.grammar import Vocabulary, check
from pagewire_core.tokenizer import Tokenizer

from pagewire_router.structured_output import to_constraint

LENGTH = struct.Struct("<I")
CPU_S = 2  # of one grammar, at most
MEMORY_BYTES = 1 << 30  # more than before the first grammar
_STACK_BYTES = 4 << 20  # half of what a worker's threads have
_PROBED_TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("vocab_size", type=int)
    parser.add_argument("eos_token_ids", type=int, nargs="*")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the router ends us
    vocabulary = Vocabulary(args.tokenizer, args.vocab_size, args.eos_token_ids)
    specials = Tokenizer(args.tokenizer).special_tokens
    _bound_memory()
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_serve, args=(sys.stdin.buffer, sys.stdout.buffer, vocabulary, specials))
    thread.start()
    thread.join()


def _serve(jobs: BinaryIO, answers: BinaryIO, vocabulary: Vocabulary, specials: Mapping[str, int]) -> None:
    answers.write(b"R")
    answers.flush()
    while header := jobs.read(LENGTH.size):
        job = inference_pb2.GenerateRequest.FromString(jobs.read(*LENGTH.unpack(header)))
        _bound_cpu()
        answer = _answer(job, vocabulary, specials)
        answers.write(LENGTH.pack(len(answer)) + answer)
        answers.flush()


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


def _bound_cpu() -> None:
    """The kernel ends this process when the next grammar takes longer."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + CPU_S, hard))


def _bound_memory() -> None:
    with contextlib.suppress(OSError, ValueError):  # macOS tells neither
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with contextlib.suppress(OSError):
        os.nice(5)


if __name__ == "__main__":
    main()
