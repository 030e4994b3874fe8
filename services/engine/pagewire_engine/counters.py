"""What an engine counts: totals since its start, for metrics and for proof."""

from __future__ import annotations

from dataclasses import dataclass, field

from pagewire_core.quick_histogram import QuickHistogram

_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_STEP_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_HOST_S = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.2, 1)
_ACCEPTED = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass
class StepCounters:
    """Of the steps with some of a prompt in them, or of those without."""

    # From its launch, or the end of the one before, to its tokens; then to drop what has ended and tell the requests.
    seconds: QuickHistogram = field(default_factory=lambda: QuickHistogram(_STEP_S))
    publish_s: QuickHistogram = field(default_factory=lambda: QuickHistogram(_HOST_S))
    lost: int = 0


@dataclass
class Counters:
    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    tokens_sampled: int = 0
    preemptions: int = 0
    steps: int = 0
    num_drafts: int = 0  # steps of a sequence that carried draft tokens
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    accepted_per_sequence: QuickHistogram = field(default_factory=lambda: QuickHistogram(_ACCEPTED))
    step_tokens: QuickHistogram = field(default_factory=lambda: QuickHistogram(_TOKENS))
    # Sequences that began with one step; steps in which they joined others, and the time to make such a step's batch.
    admitted: QuickHistogram = field(default_factory=lambda: QuickHistogram(_SEQUENCES))
    joins: int = 0
    join_s: QuickHistogram = field(default_factory=lambda: QuickHistogram(_HOST_S))
    prefill: StepCounters = field(default_factory=StepCounters)
    decode: StepCounters = field(default_factory=StepCounters)

    def began(self, num_admitted: int, others_run: bool, seconds: float) -> None:
        """A step was decided and its batch made."""
        if num_admitted:
            self.admitted.observe(num_admitted)
            if others_run:
                self.joins += 1
                self.join_s.observe(seconds)

    def took(self, seconds: float, num_decode: int, num_prefill: int, publish_s: float, lost: bool) -> None:
        """A step of so many tokens is over."""
        self.steps += 1
        self.step_tokens.observe(num_decode + num_prefill)
        kind = self.prefill if num_prefill else self.decode
        kind.seconds.observe(seconds)
        kind.publish_s.observe(publish_s)
        kind.lost += lost

    def reset(self) -> None:
        vars(self).update(vars(Counters()))
