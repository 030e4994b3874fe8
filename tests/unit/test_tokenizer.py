from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from fakes import write_byte_tokenizer
from pagewire_core.errors import StartupError
from pagewire_core.tokenizer import Tokenizer
from tokenizers import decoders, models, pre_tokenizers, processors


def test_text_survives_a_round_trip(byte_tokenizer: Tokenizer) -> None:
    for text in ("hello", "déjà vu", "日本語 🙂", "a\nb\t "):
        ids = byte_tokenizer.encode(text, add_special_tokens=False)
        assert byte_tokenizer.decode(ids, skip_special_tokens=True) == text
        assert b"".join(byte_tokenizer.token_bytes(i) for i in ids) == text.encode()


def test_special_tokens_are_known_and_can_be_left_out(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.vocab_size == 258
    assert (byte_tokenizer.bos_token_id, byte_tokenizer.eos_token_id) == (256, 257)
    assert byte_tokenizer.special_ids == {256, 257}
    ids = [*byte_tokenizer.encode("x", add_special_tokens=False), 257]
    assert byte_tokenizer.decode(ids, skip_special_tokens=True) == "x"
    assert byte_tokenizer.decode(ids, skip_special_tokens=False) == "x</s>"
    assert byte_tokenizer.token_bytes(257) == b"</s>"
    assert byte_tokenizer.token_bytes(99_999) == b""


def test_tokens_that_only_the_settings_have_are_known_and_are_as_special_as_they_say(tmp_path: Path) -> None:
    """As in transformers. The file has <tool> as a token like others; what has no number anywhere is no token."""
    write_byte_tokenizer(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {
        "260": {"content": "<end>", "special": True, "lstrip": False, "unknown": 1},
        "259": {"content": "<call>", "special": False},
    }
    settings["additional_special_tokens"] = ["<tool>", {"content": "<nowhere>"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = Tokenizer(tmp_path)
    assert ours.encode("<end><call><tool>", add_special_tokens=False) == [260, 259, 258]
    assert ours.decode([*ours.encode("x", False), 260, 259, 258], skip_special_tokens=True) == "x<call>"
    assert ours.special_ids == {256, 257, 258, 260} and ours.vocab_size == 261
    assert tokenizers.Tokenizer.from_str(ours.json).get_vocab_size() == 261


def test_a_bos_that_only_the_settings_ask_for_is_added_once(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, add_bos_token=True)
    assert Tokenizer(tmp_path).encode("x", add_special_tokens=True)[0] == 256
    assert 256 not in Tokenizer(tmp_path).encode("x", add_special_tokens=False)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).encode("x", add_special_tokens=True).count(256) == 1


def test_sentencepiece_tokens_have_their_bytes(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "<0xE2>": 1, "\u2581hi": 2, "a": 3}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = Tokenizer(tmp_path)
    assert [codec.token_bytes(i) for i in (1, 2, 3)] == [b"\xe2", b" hi", b"a"]


@pytest.mark.parametrize("content", [None, "{", json.dumps({"model": 3})])
def test_a_missing_or_corrupt_tokenizer_ends_the_start_with_a_sentence(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(StartupError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
