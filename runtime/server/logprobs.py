"""From the engine's log probabilities to OpenAI's two forms of them.

Completions have four parallel lists with offsets into the text; chats have a list of objects with
bytes. Offsets count characters of the text that is really shown, so that they stay true where
a character is made of several tokens.
"""

from collections.abc import Sequence
from typing import Any

from runtime.server.objects import (
    ChatLogprobs,
    ChatTokenLogprobs,
    CompletionLogprobs,
    TokenLogprob,
)
from runtime.server.sampling import TokenLogprobs
from runtime.server.sequence import Piece
from runtime.server.text import Detokenizer

# JSON has no minus infinity; vLLM's stand-in for a token that cannot come.
_LOWEST = -9999.0


class LogprobTexts:
    """Writes tokens as the texts by which clients know them.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def text(self, token_ids: Sequence[int]) -> str:
        """A prompt of ids as text, special tokens left out as in answers."""
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def completion(
        self,
        told: Sequence[TokenLogprobs | None],
        token_ids: Sequence[int],
        shown: Sequence[str],
        *,
        offset: int,
    ) -> CompletionLogprobs:
        """For some tokens of a completion.

        Args:
            told: What the engine said of each; None of a prompt's first token.
            token_ids: Their ids.
            shown: The text that each of them brought out.
            offset: Characters of the choice's text before them.
        """
        answer = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        for logprobs, token_id, text in zip(told, token_ids, shown, strict=True):
            answer.text_offset.append(offset)
            answer.tokens.append(self._text(token_id))
            answer.token_logprobs.append(None if logprobs is None else _finite(logprobs.logprob))
            answer.top_logprobs.append(None if logprobs is None else self._top(logprobs))
            offset += len(text)
        return answer

    def prompt(
        self, token_ids: Sequence[int], told: Sequence[TokenLogprobs], *, text: str
    ) -> CompletionLogprobs:
        """For the prompt that a completion repeats; the model says nothing of the first token.

        Args:
            token_ids: The prompt's.
            told: What the engine said of all but the first.
            text: The prompt as it is repeated.
        """
        detokenizer = Detokenizer(self._tokenizer)
        shown = [detokenizer.push(token_id) for token_id in token_ids]
        answer = self.completion([None, *told], token_ids, shown, offset=0)
        # A tokenizer may normalise what it reads, and then offsets into its own text are too long.
        answer.text_offset = [min(offset, len(text)) for offset in answer.text_offset]
        return answer

    def chat(self, pieces: Sequence[Piece]) -> ChatLogprobs | None:
        """For some pieces of an answer; None if the engine told nothing."""
        told = [piece.logprobs for piece in pieces if piece.logprobs is not None]
        if not told:
            return None
        return ChatLogprobs(
            content=[
                ChatTokenLogprobs(
                    **dict(self._token(logprobs.token_id, logprobs.logprob)),
                    top_logprobs=[self._token(*token) for token in logprobs.top],
                )
                for logprobs in told
            ]
        )

    def _token(self, token_id: int, logprob: float) -> TokenLogprob:
        text = self._text(token_id)
        return TokenLogprob(token=text, logprob=_finite(logprob), bytes=list(text.encode()))

    def _top(self, logprobs: TokenLogprobs) -> dict[str, float]:
        """The most probable tokens, and the token itself if it is none of them.

        Two tokens may have the same text (halves of characters do); the more probable one stays.
        """
        top: dict[str, float] = {}
        for token_id, logprob in (*logprobs.top, (logprobs.token_id, logprobs.logprob)):
            top.setdefault(self._text(token_id), _finite(logprob))
        return top

    def _text(self, token_id: int) -> str:
        text: str = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return text


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
