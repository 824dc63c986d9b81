"""Turning tokens into text piece by piece: whole characters only, and nothing past a stop string.

A byte-level token may end in the middle of a character, and a sentencepiece token needs its
left neighbour to know whether it begins with a space. So text is decoded in a short window, and
only what later tokens cannot change is handed out. A client that joins the pieces has exactly what
a client that waits receives: there is one path for both.

Knows nothing of models, requests or HTTP.
"""

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Prompt tokens that give the first generated token its left neighbour.
_CONTEXT_TOKENS = 6


class Detokenizer:
    """Decodes a growing sequence of token ids.

        context | generated ...................... |
                   ^ window_start      ^ window_read
                   |<-- decoded again at each push -->|

    The window moves on whenever it ends in a whole character, and keeps the piece before that as
    the left neighbour of what comes.

    Args:
        tokenizer: A transformers tokenizer; special tokens are left out of the text.
        context_ids: The prompt's ids if the text continues the prompt; empty if it stands alone.
    """

    def __init__(self, tokenizer: Any, *, context_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context_ids[-_CONTEXT_TOKENS:])
        self._window_start = 0
        self._window_read = len(self._ids)
        self._num_emitted = len(_stable_part(self._decode(0)))

    def push(self, token_id: int) -> str:
        """Take one token; return the text that has become certain, often the token's own."""
        self._ids.append(token_id)
        window = self._decode(self._window_start)
        stable = _stable_part(window)
        piece = stable[self._num_emitted :]
        self._num_emitted += len(piece)
        if piece and len(stable) == len(window):
            self._window_start, self._window_read = self._window_read, len(self._ids)
            self._num_emitted = len(self._decode(self._window_start))
        return piece

    def finish(self) -> str:
        """Return what was held back, as it decodes now: no more tokens will come."""
        return self._decode(self._window_start)[self._num_emitted :]

    def _decode(self, start: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class StopStrings:
    """Cuts a text that arrives in pieces at the first stop string, wherever the pieces end.

    Args:
        stops: The strings, none of them empty; there may be none at all.

    Attributes:
        found: Whether a stop string was met; what follows it is never returned.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop string is empty: every one needs at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Take the next piece; return what cannot be the beginning of a stop string."""
        text = self._held + piece
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self._held, self.found = "", True
            return text[: min(ends)]
        num_held = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """Return what was held back: the stop string that it might have begun never came."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """A `Detokenizer` followed by `StopStrings`.

    Args:
        tokenizer: See `Detokenizer`.
        stops: See `StopStrings`.
        context_ids: See `Detokenizer`.
        min_tokens: What so many tokens say is no part of a stop string (as in vLLM).
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stops: Sequence[str] = (),
        context_ids: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, context_ids=context_ids)
        self._stops = StopStrings(stops)
        self._num_exempt = min_tokens

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stops.found

    def push(self, token_id: int) -> str:
        """Take one token; return the text that may be shown now."""
        piece = self._detokenizer.push(token_id)
        if self._num_exempt:
            self._num_exempt -= 1
            return piece
        return self._stops.push(piece)

    def finish(self) -> str:
        """Return the rest; `stopped` may become true by it. Call once, if not stopped."""
        piece = self._stops.push(self._detokenizer.finish())
        return piece if self.stopped else piece + self._stops.finish()


def _stable_part(text: str) -> str:
    """``text`` without the undecoded bytes at its end.

    All of them, not only the three that the next token could complete: a sentencepiece decoder
    gives up a whole run of byte tokens while its last character is incomplete.
    """
    return text.rstrip(_REPLACEMENT)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop`` (and not all of it)."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
