from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import tokenizers
from fakes import write_byte_tokenizer, write_fallback_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from pagewire_core.detokenizer import IncrementalDetokenizer
from pagewire_core.tokenizer import Tokenizer
from tokenizers import decoders, models

TEXT = st.text(alphabet="ab.é日🙂\ufffd \n", max_size=24)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(path)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def fallback_codec(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    write_fallback_tokenizer(path)
    return Tokenizer(path)


def batches(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """`ids` in pieces, cut at the given places."""
    edges = [0, *sorted(c % (len(ids) + 1) for c in cuts), len(ids)]
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


@given(text=TEXT, cuts=st.lists(st.integers(0, 99), max_size=6), prompt=TEXT)
def test_deltas_joined_are_the_decoding_of_the_whole(codec: Tokenizer, text: str, cuts: list[int], prompt: str) -> None:
    ids = codec.encode(text, add_special_tokens=False)
    tail = codec.encode(prompt, add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(codec, prompt_tail_ids=tail)
    deltas = [detokenizer.push(batch)[0] for batch in batches(ids, cuts)]
    assert all("\ufffd" not in d for d in deltas) or "\ufffd" in text
    assert "".join(deltas) + detokenizer.flush() == text


@given(ids=st.lists(st.integers(0, 257), max_size=40))
def test_any_bytes_at_all_decode_as_the_whole_does(codec: Tokenizer, ids: list[int]) -> None:
    """Random weights sample bytes that are not UTF-8; text must neither be lost nor told twice."""
    detokenizer = IncrementalDetokenizer(codec)
    deltas = [detokenizer.push([i])[0] for i in ids]
    assert "".join(deltas) + detokenizer.flush() == codec.decode(ids, skip_special_tokens=True)


@given(text=TEXT, cuts=st.lists(st.integers(0, 99), max_size=6), prompt=TEXT)
def test_characters_in_bytes_beside_each_other_are_told_whole(
    fallback_codec: Tokenizer, text: str, cuts: list[int], prompt: str
) -> None:
    """Byte fallback writes U+FFFD for all of a run of bytes, told ones too, until its last character is whole."""
    ids = fallback_codec.encode(text, add_special_tokens=False)
    before = fallback_codec.encode(prompt, add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(fallback_codec, prompt_tail_ids=before)
    out = "".join(detokenizer.push(batch)[0] for batch in batches(ids, cuts)) + detokenizer.flush()
    whole, told = fallback_codec.decode([*before, *ids], True), fallback_codec.decode(before, True)
    assert whole.startswith(told) and out == whole[len(told) :]


def test_a_stop_string_in_bytes_is_found(fallback_codec: Tokenizer) -> None:
    ids = fallback_codec.encode("a日本語b", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(fallback_codec, ["本"])
    assert "".join(detokenizer.push([i])[0] for i in ids) == "a日" and detokenizer.stopped_by == "本"


PIECES = [*range(3 + 0x80, 3 + 0x100), *range(259, 264)]


@given(ids=st.lists(st.sampled_from(PIECES), max_size=60))
def test_bytes_that_are_not_utf8_take_no_other_text_with_them(fallback_codec: Tokenizer, ids: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(fallback_codec)
    out = "".join(detokenizer.push([i])[0] for i in ids) + detokenizer.flush()
    whole = fallback_codec.decode(ids, skip_special_tokens=True)
    assert [c for c in out if c in "ab."] == [c for c in whole if c in "ab."]


@pytest.mark.parametrize("byte", ["\xff", "\xe6"])
@pytest.mark.parametrize("kind", ["codec", "fallback_codec"])
def test_bytes_that_are_never_a_character_are_told_in_time(
    kind: str, byte: str, request: pytest.FixtureRequest
) -> None:
    codec: Tokenizer = request.getfixturevalue(kind)
    [token] = [i for i in range(codec.vocab_size) if codec.token_bytes(i) == byte.encode("latin-1")]
    detokenizer = IncrementalDetokenizer(codec)
    told = 0
    for i in range(300):
        told += len(detokenizer.push([token])[0])
        assert told >= i - 20
    assert told + len(detokenizer.flush()) == 300


@given(
    text=TEXT,
    stop=st.lists(st.text(alphabet="ab.é", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 99), max_size=6),
    include=st.booleans(),
)
def test_no_part_of_a_stop_string_goes_out_however_tokens_are_cut(
    codec: Tokenizer, text: str, stop: list[str], cuts: list[int], include: bool
) -> None:
    ids = codec.encode(text, add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(codec, stop, include_stop=include)
    out = ""
    for batch in batches(ids, cuts):
        delta, _ = detokenizer.push(batch)
        out += delta
    out += detokenizer.flush()
    ends = [(text.index(s) + len(s), text.index(s), s) for s in stop if s in text]
    if not ends:
        assert (out, detokenizer.stopped_by) == (text, None)
        return
    end, begin, first = min(ends)
    assert (out, detokenizer.stopped_by) == (text[: end if include else begin], first)


def test_a_beginning_of_a_stop_string_is_held_and_then_told(codec: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(codec, ["STOP"])
    steps = [detokenizer.push(codec.encode(c, add_special_tokens=False)) for c in ("aST", "O", "x", "ST")]
    assert steps == [("a", None), ("", None), ("STOx", None), ("", None)]
    assert detokenizer.flush() == "ST"


def test_of_several_beginnings_of_stop_strings_the_longest_is_held(codec: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(codec, ["aab", "ab"])
    steps = [detokenizer.push(codec.encode(c, add_special_tokens=False)) for c in "aab"]
    assert steps == [("", None), ("", None), ("", "aab")]


def test_of_stop_strings_in_one_token_the_one_that_is_complete_first_wins(tmp_path: Path) -> None:
    """As if it had come letter by letter."""
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={"x": 0, "abcd": 1}, merges=[]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    detokenizer = IncrementalDetokenizer(Tokenizer(tmp_path), ["abcd", "bc"])
    assert detokenizer.push([1]) == ("a", "bc")


def test_a_character_that_is_nearly_there_is_kept_when_bytes_before_it_are_given_up(codec: Tokenizer) -> None:
    [junk] = [i for i in range(codec.vocab_size) if codec.token_bytes(i) == b"\xff"]
    *begun, last = codec.encode("🙂", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(codec)
    told = "".join(detokenizer.push([i])[0] for i in [junk] * 14 + begun)
    assert told == "\ufffd" * 14
    assert detokenizer.push([last]) == ("🙂", None)


def test_tokens_without_text_are_not_decoded_again_and_again(codec: Tokenizer) -> None:
    [silent] = codec.encode("</s>", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(codec, prompt_tail_ids=codec.encode("a", add_special_tokens=False))
    assert detokenizer.push([silent] * 1000) == ("", None)
    assert len(detokenizer._ids) < 25
    assert detokenizer.push(codec.encode("b", add_special_tokens=False)) == ("b", None)


def test_tokens_after_a_stop_string_do_not_count(codec: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(codec, ["b"])
    assert detokenizer.push(codec.encode("abcd", add_special_tokens=False)) == ("a", "b")
    assert detokenizer.num_tokens == 2


def test_stop_strings_wait_for_min_tokens(codec: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(codec, ["a"], min_tokens=2)
    assert detokenizer.push(codec.encode("aaba", add_special_tokens=False)) == ("aab", "a")


def test_the_first_word_keeps_its_space_after_a_prompt(tmp_path: Path) -> None:
    """SentencePiece decoders strip the first space of what they are given: alone, ' upon' became 'upon'."""
    vocab = {"\u2581Once": 0, "\u2581upon": 1, "\u2581": 2, "a": 3}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    detokenizer = IncrementalDetokenizer(Tokenizer(tmp_path), prompt_tail_ids=[0])
    assert [detokenizer.push([i])[0] for i in (1, 2, 3, 1)] == [" upon", " ", "a", " upon"]
