"""Token ids to text as they come: whole UTF-8, and never a part of a stop string.

    ids:   [ ..... | context | ........ ]
                               not yet text
    text:  emitted to the caller | pending: a beginning of a stop string, perhaps

A token's text can depend on its neighbours (spaces, split characters), so new ids are decoded together
with the few before them, and the difference is the new text (prefix and read offsets, as in vLLM and
TGI). The window moves on as soon as the text ends with a whole character; each id is decoded a small
constant number of times.

Decoders with byte fallback (those of SentencePiece) make one run of neighbouring byte tokens, the context's too, and
write U+FFFD for each of its bytes until all of it is UTF-8.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagewire_core.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_UNFINISHED = 3  # tokens at most that are a part of a character
_HELD = 16  # tokens: of so many without a whole character at their end, or without any text, some are given up
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
        tail = list(prompt_tail_ids)[-CONTEXT_TOKENS:]
        later = (tail[begin:] for begin in range(_UNFINISHED + 1))  # it may begin in the middle of a character
        self._ids = next((ids for ids in later if _REPLACEMENT not in self._decode(ids)), tail)
        self._read = len(self._ids)  # the context's
        self._context_text = self._decode(self._ids)
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
        text = self._pending + self._new(self._decode(self._ids))
        self._pending = ""
        self._move(len(self._ids))
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special_tokens) if ids else ""

    def _new_text(self) -> str:
        """Text that later ids cannot change; moves the window when it can."""
        window, held = self._decode(self._ids), len(self._ids) - self._read
        if not window.endswith(_REPLACEMENT):
            text = self._new(window)
            if text:
                self._move(len(self._ids))
            elif held > _HELD:
                del self._ids[self._read]
            return text
        return self._part_of(self._new(window)) if held > _HELD else ""

    def _new(self, window: str) -> str:
        """What of the window's text is not the context's, which is dropped where new bytes have made it another."""
        if window.startswith(self._context_text):
            return window[len(self._context_text) :]
        del self._ids[: self._read]
        self._read, self._context_text = 0, ""
        return self._decode(self._ids)

    def _part_of(self, text: str) -> str:
        """Of new text that ends in bytes which are not UTF-8, what comes before those that may yet be a character."""
        for unfinished in range(_UNFINISHED, -1, -1):
            read = len(self._ids) - unfinished
            rest = self._decode(self._ids[read:])
            if self._context_text + text == self._decode(self._ids[:read]) + rest:
                self._move(read)
                return text.removesuffix(rest)
        return ""

    def _move(self, read: int) -> None:
        """The ids before `read` are text now, and those of them that were not before are the context."""
        del self._ids[: self._read]
        self._read = read - self._read
        self._context_text = self._context(self._ids[: self._read])

    def _context(self, ids: Sequence[int]) -> str:
        """Mostly it is one token, whose text is known."""
        return self._tokenizer.token_text(ids[0], self._skip_special_tokens) if len(ids) == 1 else self._decode(ids)

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
