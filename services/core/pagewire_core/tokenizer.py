"""Text to token ids and back, from a model's tokenizer.json and what its tokenizer_config.json adds to it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from pagewire_core.errors import StartupError
from pagewire_core.model_dir import read_json, special_token

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPIECE_SPACE = "\u2581"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("content", "special", "lstrip", "rstrip", "normalized", "single_word")
_SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")


def _special_names(settings: dict[str, Any]) -> list[str]:
    values = [settings.get(key) for key in _SPECIAL]
    for key in _SPECIAL_LISTS:
        more = settings.get(key) or ()
        values += more.values() if isinstance(more, dict) else more
    return [name for name in map(special_token, values) if name]


class Tokenizer:
    """The tokenizer in `path`. Raises StartupError if tokenizer.json is missing or corrupt."""

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer.json"
        if not file.is_file():
            raise StartupError(
                f"{path} has no tokenizer.json; save the model's fast tokenizer there or use --tokenizer"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the tokenizers library raises bare Exception for every kind of bad file
            raise StartupError(f"{file} is not a tokenizer ({error}); download the model again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.settings: dict[str, Any] = read_json(path / "tokenizer_config.json", {})
        self._add_tokens()
        self.bos_token = special_token(self.settings.get("bos_token"))
        self.eos_token = special_token(self.settings.get("eos_token"))
        self.bos_token_id = self._id_of(self.bos_token)
        self.eos_token_id = self._id_of(self.eos_token)
        self.special_ids = frozenset(i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special)
        self.path = path
        self._prepend = self._missing_bos()
        self._bytes: dict[int, bytes] = {}  # of the tokens that were asked for
        self._texts: dict[bool, dict[int, str]] = {False: {}, True: {}}  # too

    def _add_tokens(self) -> None:
        """The settings may have tokens that the file lacks, or lacks the word for that they are special.

        As in transformers, but for those that neither has a number for.
        """
        known = self._tokenizer.get_added_tokens_decoder()
        entries = sorted(self.settings.get("added_tokens_decoder", {}).items(), key=lambda entry: int(entry[0]))
        tokens = [tokenizers.AddedToken(**{k: v for k, v in e.items() if k in _FLAGS}) for _, e in entries]
        told = {token.content for token in tokens}
        for name in _special_names(self.settings):
            token_id = self._tokenizer.token_to_id(name)
            if name not in told and token_id is not None and not (token_id in known and known[token_id].special):
                tokens.append(tokenizers.AddedToken(name, special=True, normalized=False))
        same = {(token.content, token.special) for token in known.values()}
        self._tokenizer.add_tokens([token for token in tokens if (token.content, token.special) not in same])

    @property
    def json(self) -> str:
        """All of it, as tokenizer.json has it."""
        return self._tokenizer.to_str()

    @property
    def special_tokens(self) -> dict[str, int]:
        """The added tokens that stand for no text, by what they are written as."""
        return {self._added[i]: i for i in self.special_ids}

    @property
    def vocab_size(self) -> int:
        """Ids are below this; added tokens are counted."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @cached_property
    def longest_token(self) -> int:
        """Characters of a text that one token can stand for, at most."""
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of `text`; `add_special_tokens` adds what the post-processor adds, and a bos if the settings ask."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return [*self._prepend, *ids] if add_special_tokens else ids

    def encode_with_offsets(self, text: str, add_special_tokens: bool) -> list[tuple[int, tuple[int, int]]]:
        """As `encode`, each id with its place in `text`, in characters; tokens that are not of it are at (0, 0)."""
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        prepended = [(i, (0, 0)) for i in self._prepend] if add_special_tokens else []
        return [*prepended, *zip(encoding.ids, encoding.offsets, strict=True)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. Ids outside the vocabulary give no text."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int, skip_special_tokens: bool) -> str:
        """What `decode` gives for this token alone."""
        known = self._texts[skip_special_tokens].get(token_id)
        if known is None:
            known = self._texts[skip_special_tokens][token_id] = self.decode([token_id], skip_special_tokens)
        return known

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, which may be a part of a character."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._bytes_of(token_id)
        return known

    def _bytes_of(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return added.encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._style == "bytelevel":
            return b"".join(_BYTES_OF_CHARACTER.get(c, c.encode()) for c in token)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes((int(match[1], 16),))
        return token.replace(_SPIECE_SPACE, " ").encode() if self._style == "sentencepiece" else token.encode()

    @cached_property
    def _added(self) -> dict[int, str]:
        return {i: t.content for i, t in self._tokenizer.get_added_tokens_decoder().items()}

    @cached_property
    def _style(self) -> str:
        decoder = self._tokenizer.decoder
        state = decoder.__getstate__().decode() if decoder is not None else "null"
        kinds = _decoder_kinds(json.loads(state))
        if "ByteLevel" in kinds:
            return "bytelevel"
        return "sentencepiece" if kinds & {"ByteFallback", "Metaspace", "Replace"} else "plain"

    def _id_of(self, token: str | None) -> int | None:
        return self._tokenizer.token_to_id(token) if token is not None else None

    def _missing_bos(self) -> list[int]:
        if not self.settings.get("add_bos_token") or self.bos_token_id is None:
            return []
        already = self._tokenizer.encode("", add_special_tokens=True).ids[:1] == [self.bos_token_id]
        return [] if already else [self.bos_token_id]


def _decoder_kinds(state: dict[str, Any] | None) -> set[str]:
    if state is None:
        return set()
    kinds = {state["type"]}
    for part in state.get("decoders", []):
        kinds |= _decoder_kinds(part)
    return kinds


def _byte_alphabet() -> dict[str, bytes]:
    """The alphabet of byte-level BPE (GPT-2, Radford et al. 2019): each byte is one printable character.

    Printable Latin-1 bytes stand for themselves; the others take the code points from 256 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): bytes((b,)) for b in printable}
    return alphabet | {chr(256 + i): bytes((b,)) for i, b in enumerate(others)}


_BYTES_OF_CHARACTER = _byte_alphabet()
