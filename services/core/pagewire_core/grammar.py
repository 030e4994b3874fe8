"""Grammars over a model's vocabulary (llguidance): what the router checks with is what the workers follow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import llguidance

from pagewire_core.errors import InvalidRequest, StartupError
from pagewire_core.tokenizer import Tokenizer

# Bounds of one grammar. llguidance's own, but for the fuel of a step: a fourth keeps the worst mask under 10 ms.
LIMITS = llguidance.LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=50_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)


class Vocabulary:
    """The tokens of the tokenizer in `path`, for a model that has `vocab_size` of them; takes up to a second to make.

    Raises StartupError for a tokenizer that cannot be used.
    """

    def __init__(self, path: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        text = Tokenizer(path)  # says it better if the file is missing or corrupt
        self.eos_token_ids = frozenset(eos_token_ids)
        self.num_words = -(-max(vocab_size, text.vocab_size) // 32)  # of 32 bits, in a mask
        try:
            self.tokens = llguidance.LLTokenizer(
                text.json, n_vocab=max(vocab_size, text.vocab_size), eos_token=list(eos_token_ids)
            )
        except Exception as error:  # llguidance raises bare ones
            raise StartupError(f"{path / 'tokenizer.json'} cannot be used for structured output: {error}") from error

    def compile(self, grammar: str) -> llguidance.LLMatcher:
        """A matcher at the beginning of the text. Raises InvalidRequest. Without the interpreter's lock."""
        matcher = llguidance.LLMatcher(self.tokens, grammar, log_level=0, limits=LIMITS)
        check(matcher)
        return matcher


def check(matcher: llguidance.LLMatcher) -> None:
    """Raises InvalidRequest if the matcher has failed: its grammar is wrong, or beyond LIMITS."""
    if matcher.is_error():
        raise InvalidRequest(
            f"the grammar cannot be followed: {_first_words(matcher.get_error())}", "structured_outputs"
        )


def _first_words(message: str) -> str:
    """The sentence, without the dump of the parser's state that follows it."""
    return " ".join(message.partition("<state>")[0].split())[:500]
