"""Which part of a model one rank of a worker holds: the layers of a pipeline stage, and of their matrices some outputs.

Every matrix is divided by its outputs, those of the attention by heads, and what a rank computes is gathered before
the next matrix reads it. So an output is one sum over all inputs, in the same order as on one rank
(docs/decisions/0012).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pagewire_core.errors import StartupError

from pagewire_engine.models.config import ModelConfig

UNIT = 16  # outputs that stay together: the lanes of half a strip of the compiled CPU step
VOCABULARY_UNIT = 32  # and a word of a token mask

Range = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """Rank `rank` of the `ranks` that share the layers of stage `stage` of `stages`."""

    rank: int = 0
    ranks: int = 1
    stage: int = 0
    stages: int = 1

    @classmethod
    def of(cls, index: int, ranks: int, stages: int) -> Part:
        """The part of a worker's rank: the ranks of a stage are neighbours."""
        return cls(index % ranks, ranks, index // ranks, stages)

    @property
    def index(self) -> int:
        return self.stage * self.ranks + self.rank

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    def layers(self, c: ModelConfig) -> Range:
        return c.num_layers * self.stage // self.stages, c.num_layers * (self.stage + 1) // self.stages

    def heads(self, c: ModelConfig) -> Range:
        return c.num_heads * self.rank // self.ranks, c.num_heads * (self.rank + 1) // self.ranks

    def kv_heads(self, c: ModelConfig) -> Range:
        """Where there are more ranks than heads, some hold the same one."""
        begin = c.num_kv_heads * self.rank // self.ranks
        return begin, max(begin + 1, c.num_kv_heads * (self.rank + 1) // self.ranks)

    def outputs(self, total: int, unit: int = UNIT) -> Range:
        """This rank's outputs of a matrix that has `total`."""
        return _share(total, unit, self.rank, self.ranks)

    def widths(self, total: int, unit: int = UNIT) -> list[int]:
        """How many outputs each rank of the stage has."""
        return [end - begin for begin, end in (_share(total, unit, r, self.ranks) for r in range(self.ranks))]

    def local(self, c: ModelConfig) -> ModelConfig:
        """The model as far as this rank's layers, heads and pages go; sizes of matrices are the whole model's."""
        first, last = self.layers(c)
        heads, kv_heads = self.heads(c), self.kv_heads(c)
        return replace(
            c,
            num_layers=last - first,
            num_heads=heads[1] - heads[0],
            num_kv_heads=kv_heads[1] - kv_heads[0],
            windows=c.windows[first:last],
        )

    def check(self, c: ModelConfig) -> None:
        """Raises StartupError if the model cannot be divided among so many ranks."""
        if self.stages > c.num_layers:
            raise StartupError(f"--pipeline-parallel-size {self.stages} is more than the model's {c.num_layers} layers")
        size = f"--tensor-parallel-size {self.ranks}"
        if c.num_heads % self.ranks:
            raise StartupError(f"{size} does not divide the model's {c.num_heads} attention heads")
        if c.num_kv_heads % self.ranks and self.ranks % c.num_kv_heads:
            raise StartupError(f"{size} and the model's {c.num_kv_heads} key-value heads: neither divides the other")
        narrowest = min(c.hidden_size, c.intermediate_size, c.vocab_size * UNIT // VOCABULARY_UNIT)
        if narrowest < self.ranks * UNIT:
            raise StartupError(f"{size} is too much for a model with so few as {narrowest} outputs in a matrix")


def _share(total: int, unit: int, rank: int, ranks: int) -> Range:
    units = -(-total // unit)
    return min(units * rank // ranks * unit, total), min(units * (rank + 1) // ranks * unit, total)


WHOLE = Part()
