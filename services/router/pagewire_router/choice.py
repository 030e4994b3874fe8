"""One choice of a request as the client sees it: tokens in, deltas out, each token once.

An attempt that replaces a lost one goes on after what the client has, or starts again at position 0.
What the client already has is then compared and not repeated: sampling depends on (seed, choice,
position) alone, so it must be equal.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagewire.v1 import common_pb2, inference_pb2
from pagewire_core.detokenizer import IncrementalDetokenizer
from pagewire_core.errors import Internal
from pagewire_core.tokenizer import Tokenizer

from pagewire_router.request import ValidRequest


class Choice:
    """State of choice number `index`. `ids` are the tokens given to the client, or to a search."""

    def __init__(self, index: int, request: ValidRequest, tokenizer: Tokenizer) -> None:
        sampling = request.sampling
        self.index = index
        self.ids: list[int] = list(request.prior[index]) if request.prior else []
        self.finished = False
        self._request = request
        self._tokenizer = tokenizer
        self._cursor = 0  # position in the current attempt
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            sampling.stop,
            skip_special_tokens=request.skip_special_tokens,
            include_stop=sampling.include_stop_str_in_output,
            min_tokens=sampling.min_tokens,
            prompt_tail_ids=request.prompt_ids,
        )

    def rewind(self) -> None:
        """A new attempt starts at position 0."""
        self._cursor = 0

    def resume(self) -> None:
        """The attempt goes on after what the client has."""
        self._cursor = len(self.ids)

    @property
    def stopped_by_string(self) -> bool:
        return self._detokenizer.stopped_by is not None

    def take_first(self, token: common_pb2.SampledToken) -> inference_pb2.Delta | None:
        """The token at position 0, which both workers tell. Raises Internal if it differs from what was told."""
        if self._cursor == 0:
            return self.take([token])
        self._compare(0, token.token_id)
        return None

    def take(
        self,
        tokens: Sequence[common_pb2.SampledToken],
        finish_reason: int = common_pb2.FINISH_REASON_UNSPECIFIED,
        stop_token_id: int | None = None,
    ) -> inference_pb2.Delta | None:
        """The delta that the next tokens of the attempt give; None if they are not new or the choice is over."""
        delta = inference_pb2.Delta(choice=self.index)
        text: list[str] = []
        for token in tokens:
            if self.finished:
                break
            if self._cursor < len(self.ids):
                self._compare(self._cursor, token.token_id)
            else:
                text.append(self._new(token, delta))
            self._cursor += 1
        if finish_reason and not self.finished:
            text.append(self._detokenizer.flush())
            self._finish(delta, finish_reason)
            if stop_token_id is not None:
                delta.stop_token_id = stop_token_id
        if self._request.prompt_only:
            length = common_pb2.FINISH_REASON_LENGTH
            return inference_pb2.Delta(choice=self.index, finish_reason=length) if delta.finish_reason else None
        delta.text = "".join(text)
        return delta if delta.tokens or delta.text or delta.finish_reason else None

    def _new(self, token: common_pb2.SampledToken, delta: inference_pb2.Delta) -> str:
        self.ids.append(token.token_id)
        self._tell(token, delta)
        if self._request.ends_choice(token.token_id) and self._request.hides_stop:
            return ""
        text, stop = self._detokenizer.push([token.token_id])
        if stop is not None:
            delta.stop_string = stop
            self._finish(delta, common_pb2.FINISH_REASON_STOP)
        return text

    def _finish(self, delta: inference_pb2.Delta, reason: int) -> None:
        self.finished = True
        delta.finish_reason = reason  # type: ignore[assignment]

    def _compare(self, position: int, token_id: int) -> None:
        if self.ids[position] != token_id:
            raise Internal(f"two workers sampled different tokens for choice {self.index} at position {position}")

    def _tell(self, token: common_pb2.SampledToken, delta: inference_pb2.Delta) -> None:
        text = delta.tokens.add(token_id=token.token_id, bytes=self._tokenizer.token_bytes(token.token_id))
        if token.token_id in self._tokenizer.special_ids:
            text.special = True
        if self._request.wants_logprobs:
            text.logprob = token.logprob
            text.top.extend(
                inference_pb2.TokenText(
                    token_id=t.token_id, bytes=self._tokenizer.token_bytes(t.token_id), logprob=t.logprob
                )
                for t in token.top
            )
