"""Text leaves in whole characters, and never past a stop string."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from runtime.server.text import Detokenizer, StopStrings, TextStream

MIXED = "Grüße, 世界! 🎉👩‍👩‍👧 naïve Ελληνικά \N{REPLACEMENT CHARACTER} end"


def pieces_of(tokenizer: Any, ids: Sequence[int], **kwargs: Any) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **kwargs)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """Decodes as Llama's and Mixtral's tokenizers do: marked spaces, bytes for rare characters."""
    words = ["<unk>", "▁Hello", "▁world", "!", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def as_sentencepiece_bytes(text: str) -> list[int]:
    return [5 + byte for byte in text.encode()]


@pytest.mark.parametrize("text", [MIXED, "plain", "🎉" * 5, "", "a\n\n  b\t"])
def test_pieces_join_to_the_text_and_no_character_is_ever_cut(tokenizer: Any, text: str) -> None:
    pieces = pieces_of(tokenizer, tokenizer(text, add_special_tokens=False).input_ids)
    assert "".join(pieces) == text
    broken = [piece for piece in pieces if "\N{REPLACEMENT CHARACTER}" in piece]
    assert len(broken) == text.count("\N{REPLACEMENT CHARACTER}")


@given(data=st.binary(max_size=40))
def test_any_bytes_at_all_join_to_what_the_tokenizer_decodes(tokenizer: Any, data: bytes) -> None:
    byte_ids = tokenizer.convert_tokens_to_ids([byte_token(byte) for byte in data])
    assert None not in byte_ids
    assert "".join(pieces_of(tokenizer, byte_ids)) == tokenizer.decode(byte_ids)


def byte_token(byte: int) -> str:
    """GPT-2's letter for a byte: printable ones stand for themselves, others are shifted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [other for other in range(256) if other not in printable]
    return chr(byte) if byte in printable else chr(256 + others.index(byte))


def test_text_is_not_held_back_longer_than_a_character_needs(tokenizer: Any) -> None:
    ids = tokenizer("one two three", add_special_tokens=False).input_ids
    detokenizer = Detokenizer(tokenizer)
    for count, token_id in enumerate(ids, start=1):
        piece = detokenizer.push(token_id)
        assert piece == tokenizer.decode(ids[:count])[-len(piece) :] != ""


def test_special_tokens_leave_no_text(tokenizer: Any) -> None:
    (word,) = tokenizer(" the", add_special_tokens=False).input_ids
    special = tokenizer.eos_token_id
    assert pieces_of(tokenizer, [special, word, special]) == ["", " the", "", ""]


def test_spaces_survive_a_sentencepiece_decoder(sentencepiece: Any) -> None:
    assert pieces_of(sentencepiece, [1, 2, 4, 3, 2]) == ["Hello", " world", "s", "!", " world", ""]


def test_a_continuation_keeps_the_space_after_the_prompt(sentencepiece: Any) -> None:
    """Decoded alone, "▁world" would lose its space, and "Hello" + answer would be "Helloworld"."""
    assert pieces_of(sentencepiece, [2, 3], context_ids=[1]) == [" world", "!", ""]
    assert pieces_of(sentencepiece, [2, 3]) == ["world", "!", ""]


def test_byte_tokens_of_a_sentencepiece_decoder_become_one_character(sentencepiece: Any) -> None:
    ids = [1, *as_sentencepiece_bytes("世🎉"), 3]
    pieces = pieces_of(sentencepiece, ids)
    assert pieces == ["Hello", "", "", "世", "", "", "", "🎉", "!", ""]


def test_a_prompt_that_ends_within_a_character_is_completed(tokenizer: Any) -> None:
    ids = tokenizer.convert_tokens_to_ids([byte_token(byte) for byte in "é".encode()])
    assert "".join(pieces_of(tokenizer, ids[1:], context_ids=ids[:1])) == "é"


def cut(stops: Sequence[str], pieces: Sequence[str]) -> tuple[str, bool]:
    stopper, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += stopper.push(piece)
        if stopper.found:
            return shown, True
    return shown + stopper.finish(), False


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "found"),
    [
        (["END"], ["a E", "N", "D b"], "a ", True),
        (["END"], ["a E", "N", "x"], "a ENx", False),
        (["END"], ["EN"], "EN", False),
        (["aab"], ["a", "a", "a", "b"], "a", True),  # the first try fails inside the second
        (["\n\n", "."], ["one\n", "two. three"], "one\ntwo", True),
        (["b", "ab"], ["xab"], "x", True),  # the one that begins first
        ([], ["anything"], "anything", False),
        (["🎉"], ["party ", "🎉", "!"], "party ", True),
    ],
)
def test_stop_strings_are_found_across_pieces(
    stops: list[str], pieces: list[str], shown: str, found: bool
) -> None:
    assert cut(stops, pieces) == (shown, found)


@given(pieces=st.lists(st.text("ab", max_size=4)), stop=st.text("ab", min_size=1, max_size=4))
def test_where_the_pieces_end_makes_no_difference(pieces: list[str], stop: str) -> None:
    text = "".join(pieces)
    assert cut([stop], pieces) == (text.partition(stop)[0], stop in text)


def test_nothing_is_held_that_cannot_become_a_stop_string() -> None:
    stopper = StopStrings(["stop"])
    assert stopper.push("no s") == "no "
    assert stopper.push("top") == ""
    assert stopper.found
    assert StopStrings(["stop"]).push("no t") == "no t"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


def test_a_stop_string_may_hide_in_the_rest_that_finish_gives(tokenizer: Any) -> None:
    """An unfinished character is only shown at the end, and may be asked for as a stop."""
    (first, *_) = tokenizer.convert_tokens_to_ids([byte_token(byte) for byte in "é".encode()])
    stream = TextStream(tokenizer, stops=["\N{REPLACEMENT CHARACTER}"])
    assert (stream.push(first), stream.stopped) == ("", False)
    assert (stream.finish(), stream.stopped) == ("", True)
