"""Token ids to text as they come: whole UTF-8, and never a part of a stop string.

    ids:   [ ..... | prefix ... read | ........ ]
                     context          not yet text
    text:  emitted to the caller | pending: a beginning of a stop string, perhaps

A token's text can depend on its neighbours (spaces, split characters), so new ids are decoded together
with the few before them, and the difference is the new text (prefix and read offsets, as in vLLM and
TGI). The window moves on as soon as the text ends with a whole character; each id is decoded a small
constant number of times.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagewire_core.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_INCOMPLETE = 3  # characters that an unfinished UTF-8 sequence may look like
CONTEXT_TOKENS = 5  # of the prompt: enough that a first word keeps its space


class IncrementalDetokenizer:
    """Text of one choice.

    The deltas joined, and `flush` at the end, are the decoding of all ids up to the stop string. Stop
    strings are not looked for in the text of the first `min_tokens` tokens. Of several stop strings the
    one that is complete first wins. `prompt_tail_ids` are the prompt's last tokens, for context.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
        min_tokens: int = 0,
        prompt_tail_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = [s for s in stop if s]
        self._skip_special_tokens = skip_special_tokens
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._ids = list(prompt_tail_ids)[-CONTEXT_TOKENS:]
        self._read = len(self._ids)
        self._context_text = self._decode()
        self._taken = len(self._context_text)  # characters of the window's text already passed on
        self._pending = ""
        self.num_tokens = 0  # taken so far; those after a stop string are not
        self.stopped_by: str | None = None

    def push(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """New text, and the stop string that ended it, if one did; ids after it are dropped."""
        out: list[str] = []
        for token_id in token_ids:
            if self.stopped_by is not None:
                break
            self.num_tokens += 1
            self._ids.append(token_id)
            out.append(self._judge(self._new_text()))
        return "".join(out), self.stopped_by

    def flush(self) -> str:
        """What was held back, to be called once when no more tokens come."""
        if self.stopped_by is not None:
            return ""
        text = self._pending + self._decode()[self._taken :]
        self._pending = ""
        self._taken += len(text)
        return text

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, self._skip_special_tokens) if self._ids else ""

    def _window_length(self) -> int:
        """Characters of the window's text. Mostly it is one token, whose length is known."""
        if len(self._ids) == 1:
            return self._tokenizer.decoded_length(self._ids[0], self._skip_special_tokens)
        return len(self._decode())

    def _new_text(self) -> str:
        """Text that later ids cannot change; moves the window when it can."""
        window = self._decode()
        whole = len(window)
        while whole > 0 and len(window) - whole < _MAX_INCOMPLETE and window[whole - 1] == _REPLACEMENT:
            whole -= 1
        text = window[self._taken : whole]
        self._taken = max(self._taken, whole)
        if text and whole == len(window):
            del self._ids[: self._read]
            self._read = len(self._ids)
            self._taken = self._window_length()
        return text

    def _judge(self, text: str) -> str:
        """What of the pending text and `text` may go out now."""
        if not self._stop:
            return text
        self._pending += text
        if self.num_tokens > self._min_tokens:
            found = self._first_stop()
            if found is not None:
                begin, stop = found
                self.stopped_by = stop
                out = self._pending[: begin + len(stop)] if self._include_stop else self._pending[:begin]
                self._pending = ""
                return out
            held = self._held_back()
        else:
            held = 0
        keep = len(self._pending) - held
        out, self._pending = self._pending[:keep], self._pending[keep:]
        return out

    def _first_stop(self) -> tuple[int, str] | None:
        hits = [(begin + len(s), begin, s) for s in self._stop if (begin := self._pending.find(s)) >= 0]
        if not hits:
            return None
        _, begin, stop = min(hits)
        return begin, stop

    def _held_back(self) -> int:
        """Length of the longest end of the pending text that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._pending)), longest, -1):
                if self._pending.endswith(stop[:length]):
                    longest = length
                    break
        return longest
