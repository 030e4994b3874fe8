"""The results of a step: into the books, and out to the requests."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from pagewire.v1 import common_pb2 as pb
from pagewire_core.errors import Internal, PagewireError

from pagewire_engine.batch import Batch, Scored
from pagewire_engine.books import Books
from pagewire_engine.counters import Counters
from pagewire_engine.events import Failed, Finished, FirstTokens, Progress, PromptScores, Token
from pagewire_engine.outbox import Outbox
from pagewire_engine.sampler import NOT_NUMBERS, OR_EXCLUDED, Sampled
from pagewire_engine.scoring import Scores
from pagewire_engine.sequence import Request, Sequence


class Publisher:
    """Under the engine's lock, like the books it writes to."""

    def __init__(self, books: Books, counters: Counters) -> None:
        self._books, self._counters = books, counters
        self._block_size, self._max_len = books.config.block_size, books.config.max_model_len

    def publish(
        self, batch: Batch, drafts: Seq[Seq[int]], sampled: list[Sampled], scores: Scores | None = None
    ) -> Outbox:
        """Books what the step computed. drafts: those of the sequences that follow the decoding ones."""
        outbox: Outbox = []
        if batch.scored and scores:
            self._publish_scores(batch.scored, scores, outbox)
        n = batch.num_decode
        decoding = batch.scheduled[:n]
        if decoding:
            rows, ids = [seq.row for seq, _ in decoding], [token.token for token in sampled[:n]]
            self._books.rows.resolve(rows, ids, self._books.landed)
        for (seq, _), token in zip(decoding, sampled, strict=False):
            self._advance(seq, token, outbox)
        tokens = iter(sampled[n:])
        for (seq, count), draft in zip(batch.scheduled[n:], drafts, strict=False):
            self._publish_draft(seq, draft, [next(tokens) for _ in range(count)], outbox)
        for seq, count in batch.scheduled[n + len(drafts) :]:
            complete = seq.num_computed + count == len(seq.tokens)
            choices = seq.request.choices_to_sample(seq) if complete else ()
            self._publish_chunk(seq, count, [next(tokens) for _ in choices], outbox)
        return outbox

    def _advance(self, seq: Sequence, sampled: Sampled, outbox: Outbox) -> None:
        """The KV of its last token is there, and so is one more token.

        A sequence that was cancelled may have gone on by a token that nobody knows: its block has no identity. Nor has
        any block of one that failed.
        """
        if seq.request.failed:
            self._books.settle(seq)
            return
        if sampled.is_nothing and not seq.finished:
            self._break(seq.request, outbox)
            return
        seq.num_computed += 1
        if seq.num_computed % self._block_size == 0 and seq.num_computed <= len(seq.tokens):
            self._books.register(seq)
        if seq.finished:
            self._books.settle(seq)
        else:
            self._append(seq, sampled, outbox)

    def _publish_draft(self, seq: Sequence, draft: Seq[int], sampled: Seq[Sampled], outbox: Outbox) -> None:
        """Accepts the guesses that are what was sampled in their place, and the token after them.

        The token of a position is a function of the tokens before it (and of seed, choice and position), so those
        behind a wrong guess are not the sequence's, and the KV of the guesses is overwritten.
        """
        accepted = 0
        while accepted < len(draft) and draft[accepted] == sampled[accepted].token:
            accepted += 1
        self._count_drafts(len(draft), accepted)
        seq.num_accepted += accepted
        for token in sampled[: accepted + 1]:
            self._advance(seq, token, outbox)
            if seq.finished:
                return
        rows = self._books.rows
        rows.positions[seq.row], rows.next_ids[seq.row] = seq.num_computed, seq.tokens[-1]

    def _count_drafts(self, proposed: int, accepted: int) -> None:
        counters = self._counters
        counters.num_drafts += 1
        counters.draft_tokens += proposed
        counters.accepted_tokens += accepted
        counters.accepted_per_position += [0] * (proposed - len(counters.accepted_per_position))
        for position in range(accepted):
            counters.accepted_per_position[position] += 1

    def _publish_chunk(self, seq: Sequence, count: int, chosen: list[Sampled], outbox: Outbox) -> None:
        if seq.request.failed:
            self._books.settle(seq)
            return
        if any(sampled.is_nothing for sampled in chosen) and not seq.finished:
            self._break(seq.request, outbox)
            return
        if seq.num_computed < seq.num_prompt:
            self._counters.prompt_tokens_computed += min(count, seq.num_prompt - seq.num_computed)
        seq.num_computed += count
        self._books.register(seq)
        if seq.finished:
            self._books.settle(seq)
        elif seq.request.prefill_only:
            self._publish_prefill(seq, chosen, outbox)
        elif len(chosen) == 1:
            self._books.rows.resolve([seq.row], [chosen[0].token], self._books.landed)
            if not seq.request.forked:
                seq.request.forked = True
                self._books.move_to_end(seq)
            self._append(seq, chosen[0], outbox)
        elif chosen:
            self.fork(seq, chosen, outbox)

    def _break(self, request: Request, outbox: Outbox) -> None:
        """No token follows from what its model computed: it fails, and those beside it go on."""
        may_exclude = request.params.changes_logits or request.params.masked
        outbox += self.fail({request: Internal(NOT_NUMBERS + (OR_EXCLUDED if may_exclude else ""))})

    def _publish_scores(self, scored: Scored, scores: Scores, outbox: Outbox) -> None:
        at = 0
        for seq, first, count in scored.parts:
            request, part = seq.request, scores.part(at, at + count, seq.request.prompt_logprobs or 0)
            at += count
            if seq.finished:
                continue
            if not part.are_numbers:
                self._break(request, outbox)
                continue
            request.num_scored = first + count
            outbox.append((request, PromptScores(first, part)))

    def _publish_prefill(self, seq: Sequence, chosen: list[Sampled], outbox: Outbox) -> None:
        outbox.append((seq.request, Progress(seq.num_computed)))
        if chosen:
            self._counters.tokens_sampled += len(chosen)
            outbox.append((seq.request, FirstTokens(tuple(chosen))))
            self._books.hold(seq)

    def fork(self, prompt: Sequence, first: Seq[Sampled], outbox: Outbox) -> None:
        """Goes on from a computed prompt with the first token of every choice."""
        choices = list(self._books.fork(prompt))
        shared = len(choices) > 1 and prompt.num_computed % self._block_size > 0
        for seq, sampled in zip(choices, first, strict=True):
            self._append(seq, sampled, outbox)
            if not seq.finished:
                self._books.decode(seq, sampled.token, shared=shared)

    def _append(self, seq: Sequence, sampled: Sampled, outbox: Outbox) -> None:
        """One more token; ends the sequence if that was its last."""
        tokens, request, token = seq.tokens, seq.request, sampled.token
        tokens.append(token)
        self._counters.tokens_sampled += 1
        num_tokens, params = len(tokens), request.params
        if token not in params.ends and num_tokens < self._max_len and num_tokens - seq.num_prompt < params.max_tokens:
            outbox.append((request, Token(seq.choice, sampled)))
            return
        end = params.finish(token, seq.num_output) or (pb.FINISH_REASON_LENGTH, None)
        outbox.append((request, Token(seq.choice, sampled, *end)))
        self._counters.accepted_per_sequence.observe(seq.num_accepted)
        self._books.drop(seq)
        self.finish_if_all_ended(request, outbox)

    def finish_if_all_ended(self, request: Request, outbox: Outbox) -> None:
        if request.forked and not request.done and all(seq.finished for seq in request.sequences):
            request.done = True
            outbox.append((request, Finished(sum(seq.num_preemptions for seq in request.sequences))))

    def fail(self, failed: Mapping[Request, PagewireError]) -> Outbox:
        """Ends these requests, in whatever step they are."""
        for request in failed:
            request.failed = True
            for seq in request.sequences:
                if not seq.finished or seq in self._books.ending:
                    self._books.drop(seq)
        return [(request, Failed(error)) for request, error in failed.items() if not request.cancelled]
