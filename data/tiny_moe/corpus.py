"""Texts of the training recipe: domains, held-out split by document, token streams, sampling.

A domain is one `<name>.jsonl.zst` (or `.jsonl`) file of `{"id", "text"}` lines. Knows nothing of
the model; the tokenizer is only called.
"""

import hashlib
import io
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from data.errors import MalformedInputError

Message = dict[str, str]

SYSTEM_PROMPT = "You are a helpful assistant."
_SPEAKERS = {"USER": "user", "SYSTEM": "assistant"}
_TURN = re.compile(r"^(USER|SYSTEM): ", re.MULTILINE)
_MIN_DOCUMENTS = 10
_REPEAT_MIN_CHARS = 100
_PASSAGE_EVERY_CHARS = 20_000
_PASSAGE_CHARS = 2_000
_OPENING_CHARS = 80


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text and the name its split is decided by."""

    id: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Domain:
    """The documents of one file, split into training and held-out ones."""

    name: str
    train: list[Document]
    held_out: list[Document]


def read_domains(corpora: Path, *, held_out_fraction: float, max_chars: int = 0) -> list[Domain]:
    """Read every corpus file of a folder, sorted by name.

    A line of 100 or more characters is kept at its first occurrence in its domain only, so that
    passages which a corpus repeats cannot sit on both sides of the split.

    Args:
        corpora: Folder of `.jsonl.zst` or `.jsonl` files.
        held_out_fraction: Share of the documents to hold out, in (0, 1).
        max_chars: Stop reading a domain after this many characters and cut its documents to a
            tenth of that; 0 reads all.

    Raises:
        FileNotFoundError: If the folder holds no corpus file.
        MalformedInputError: If a line is not a JSON object with string `id` and `text`.
        ValueError: If a domain has fewer than two documents.
    """
    paths = sorted([*corpora.glob("*.jsonl.zst"), *corpora.glob("*.jsonl")])
    if not paths:
        raise FileNotFoundError(f"no .jsonl.zst or .jsonl file in {corpora}")
    domains = []
    for path in paths:
        documents = list(_without_repeats(_read_jsonl(path, max_chars=max_chars)))
        train, held_out = split_documents(documents, held_out_fraction=held_out_fraction)
        if not train:
            raise ValueError(f"{path} has too few documents to split: at least 2 are needed")
        domains.append(Domain(name=path.name.split(".")[0], train=train, held_out=held_out))
    return domains


def split_documents(
    documents: list[Document], *, held_out_fraction: float
) -> tuple[list[Document], list[Document]]:
    """Split by a hash of the document id: `(train, held_out)`, each in order of that hash.

    The documents with the smallest hashes are held out, at least one, so a document's side does
    not depend on the order of the file.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction={held_out_fraction} is not in (0, 1)")
    ranked = sorted(documents, key=lambda document: _hash(document.id))
    num_held_out = max(1, round(held_out_fraction * len(ranked)))
    return ranked[num_held_out:], ranked[:num_held_out]


def tokenizer_sample(domains: list[Domain], *, chars_per_domain: int) -> Iterator[str]:
    """Yield training texts of each domain until its share of characters is reached."""
    for domain in domains:
        left = chars_per_domain
        for document in domain.train:
            text = document.text[: min(left, _PASSAGE_EVERY_CHARS)]
            yield text
            left -= len(text)
            if left <= 0:
                break


def encode_documents(
    documents: list[Document], tokenizer: PreTrainedTokenizerFast, *, chats: bool
) -> np.ndarray:
    """Encode documents into one stream `[T]` of uint16 ids: BOS, text, EOS, and so on.

    Dialogues (every line begins `USER: ` or `SYSTEM: `) are rendered by the chat template. With
    `chats`, passages of the other documents are added as chats too (see `passage_chats`), so that
    the template is met in every domain. Special tokens written out in a text stay text.
    """
    plain: list[str] = []
    rendered: list[str] = []
    for document in documents:
        dialogue = parse_dialogue(document)
        if dialogue is None:
            plain.append(document.text)
            conversations = passage_chats(document) if chats else []
        else:
            conversations = [dialogue]
        rendered += [
            str(tokenizer.apply_chat_template(conversation, tokenize=False))
            for conversation in conversations
        ]
    core = tokenizer.backend_tokenizer
    core.encode_special_tokens = True
    encoded = _encode(core, plain)
    core.encode_special_tokens = False
    encoded += _encode(core, rendered)
    random.Random(0).shuffle(encoded)
    bos = np.array([tokenizer.bos_token_id], np.uint16)
    eos = np.array([tokenizer.eos_token_id], np.uint16)
    parts = []
    for ids in encoded:
        starts_with_bos = len(ids) > 0 and ids[0] == bos[0]
        parts += [ids, eos] if starts_with_bos else [bos, ids, eos]
    return np.concatenate(parts)


def parse_dialogue(document: Document) -> list[Message] | None:
    """Turn a `USER: ... / SYSTEM: ...` text into chat messages; None for any other text.

    Every other dialogue (by hash of its id) opens with a system prompt.
    """
    pieces = _TURN.split(document.text)
    if pieces[0].strip() or len(pieces) < 3:
        return None
    turns = [
        {"role": _SPEAKERS[speaker], "content": content.strip()}
        for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    return _system_prompt(document.id) + turns


def passage_chats(document: Document) -> list[list[Message]]:
    """Make short chats of a document: the user opens a passage, the assistant goes on.

    One passage of 2,000 characters from each 20,000, at a place drawn from the document's id; a
    shorter document gives one with proportional probability.
    """
    rng = random.Random(_hash(document.id))
    chats = []
    for block_start in range(0, len(document.text), _PASSAGE_EVERY_CHARS):
        start = block_start + rng.randrange(_PASSAGE_EVERY_CHARS)
        start = document.text.find("\n", start) + 1
        passage = document.text[start : start + _PASSAGE_CHARS].strip()
        opening_end = passage.find("\n", _OPENING_CHARS)
        if start == 0 or opening_end < 0:
            continue
        turns = [
            {"role": "user", "content": passage[:opening_end]},
            {"role": "assistant", "content": passage[opening_end:].rpartition("\n")[0]},
        ]
        if turns[1]["content"].strip():
            chats.append(_system_prompt(f"{document.id}/{start}") + turns)
    return chats


def sampling_weights(
    num_tokens: list[int], *, exponent: float, max_oversampling: float
) -> np.ndarray:
    """Share of each domain among the training tokens: size to a power below one, then capped.

    Args:
        num_tokens: Size of each domain's training stream.
        exponent: 1 samples by size, 0 all domains alike.
        max_oversampling: Before the shares are scaled to sum 1, none exceeds this multiple of its
            share by size; so small domains do not repeat too often.

    Returns:
        float64 `[num domains]`, sum 1.
    """
    size = np.array(num_tokens, np.float64)
    size /= size.sum()
    weights = size**exponent
    weights = np.minimum(weights / weights.sum(), max_oversampling * size)
    return np.asarray(weights / weights.sum())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _system_prompt(key: str) -> list[Message]:
    return [{"role": "system", "content": SYSTEM_PROMPT}] if _hash(key) % 2 else []


def _read_jsonl(path: Path, *, max_chars: int) -> Iterator[Document]:
    compression = "zstd" if path.suffix == ".zst" else None
    num_chars = 0
    with pa.input_stream(str(path), compression=compression) as raw:
        for number, line in enumerate(io.TextIOWrapper(raw, encoding="utf-8"), start=1):
            try:
                row = json.loads(line)
                identifier, text = row["id"], row["text"]
            except (ValueError, KeyError, TypeError) as error:
                why = "not a JSON object with id and text"
                raise MalformedInputError(path, number, why) from error
            if not isinstance(identifier, str) or not isinstance(text, str):
                raise MalformedInputError(path, number, "id and text must be strings")
            if max_chars:
                text = text[: max_chars // _MIN_DOCUMENTS]
            yield Document(id=identifier, text=text)
            num_chars += len(text)
            if 0 < max_chars <= num_chars:
                return


def _without_repeats(documents: Iterator[Document]) -> Iterator[Document]:
    seen: set[str] = set()
    for document in documents:
        kept = []
        for line in document.text.split("\n"):
            if len(line) >= _REPEAT_MIN_CHARS:
                if line in seen:
                    continue
                seen.add(line)
            kept.append(line)
        yield Document(id=document.id, text="\n".join(kept))


def _encode(core: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    encodings: list[np.ndarray] = []
    for start in range(0, len(texts), 512):
        batch = core.encode_batch_fast(texts[start : start + 512], add_special_tokens=False)
        encodings += [np.array(encoding.ids, np.uint16) for encoding in batch]
    return encodings
