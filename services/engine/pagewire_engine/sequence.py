"""One sequence: its tokens, its KV blocks and how far they are filled. No policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pagewire_core.block_hash import PageKeys

if TYPE_CHECKING:
    from pagewire_engine.request import Request


@dataclass(eq=False)
class Sequence:
    """The tokens of one choice of a request.

        tokens        |---------- prompt ----------|---- output ----|
        KV in blocks  |-- num_computed --|
        next step      computes tokens[num_computed : num_computed + chunk]

    When num_computed reaches len(tokens), the step's logits give the next token.
    """

    request: Request
    choice: int
    tokens: list[int]
    num_prompt: int
    keys: PageKeys
    num_computed: int = 0
    num_cached: int = 0  # of the first admission: prompt tokens found in the prefix cache
    num_registered: int = 0  # blocks already offered to the prefix cache
    block_table: list[int] = field(default_factory=list)
    finished: bool = False
    num_preemptions: int = 0

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    def fork(self, choice: int) -> Sequence:
        """A sibling with the same prompt; the caller takes the block references."""
        return Sequence(
            request=self.request,
            choice=choice,
            tokens=list(self.tokens),
            num_prompt=self.num_prompt,
            keys=self.keys.copy(),
            num_computed=self.num_computed,
            num_cached=self.num_cached,
            num_registered=self.num_registered,
            block_table=list(self.block_table),
        )
