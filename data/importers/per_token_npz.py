"""Per-token npz: one array of expert ids over all tokens, cut into requests by offsets.

    X.npz          experts [tokens, L, K], seq_offsets [B+1], optionally probs [tokens, L, K],
                   tokens [tokens], prompt_tokens, prompt_offsets [B+1]
    X.info.json    model, num_experts, what probs are          (optional)
    X.seqs.jsonl   one line a request: id, category, ...       (optional)
    X.vocab.json   the token strings that tokens index         (with tokens)

Where a prompt is given, its tokens carry no routing: the rows are decode steps. Without one, the
rows are taken for a prompt's, as of a teacher-forced forward pass, and ``tokens`` are not read.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from data.errors import DamagedFileError, MalformedInputError
from data.files import digest_json, sha256_file
from data.importers.common import Peek, compact_ids, load_arrays, spec_of
from data.schema import Trace, TraceList
from data.splits import split_by_topic

logger = logging.getLogger(__name__)

_FIRST_TEXT_ID = 2**24
_READ_AS = "token ids by text"  # part of the digest: the same file was once read otherwise


def recognises(content: Peek) -> bool:
    """Whether a file is of this format."""
    return content.arrays >= {"experts", "seq_offsets"}


def token_id_of(text: str) -> int:
    """The id of a token that is known by its string alone: the same in every file.

    From the string's digest, above every tokenizer's ids and below 2**31, so that what was learned
    from such a file neither mistakes another file's tokens nor a model's for its own. Among 20,000
    strings, two share an id with a chance of 1 in 10.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return _FIRST_TEXT_ID + int.from_bytes(digest) % (2**31 - _FIRST_TEXT_ID)


def read_per_token_npz(path: Path, *, num_experts: int | None = None) -> TraceList:
    """Read one npz and the files beside it; experts stand in the order of the file.

    ``token_ids_P`` are `token_id_of` the token strings, not the model's ids: equal tokens have
    equal ids in every such file, and that is all. ``prompt`` is the rendered prompt, chat template
    included, joined from the token strings; a character that the tokenizer cut in two shows as
    U+FFFD.

    Args:
        path: The npz.
        num_experts: E, where ``X.info.json`` does not say.

    Raises:
        DamagedFileError: An array is unreadable, or they contradict each other.
        MalformedInputError: A line of ``X.seqs.jsonl`` is not JSON.
    """
    arrays = load_arrays(path)
    if missing := {"experts", "seq_offsets"} - set(arrays):
        raise DamagedFileError(path, f"it lacks the arrays {sorted(missing)}")
    stem = path.name.removesuffix(".npz")
    info_path, seqs_path, vocab_path = (
        path.with_name(stem + suffix) for suffix in (".info.json", ".seqs.jsonl", ".vocab.json")
    )
    info = _read_json(info_path, dict) if info_path.exists() else {}
    if "num_experts" in info:
        num_experts = int(info["num_experts"])
    elif num_experts is None:
        logger.warning("%s does not say num_experts: taking the highest id + 1", path)
        num_experts = int(arrays["experts"].max(initial=0)) + 1
    ids_NLK = compact_ids(arrays["experts"], num_experts, path)
    probs_NLK = arrays.get("probs")
    if probs_NLK is not None and probs_NLK.shape != ids_NLK.shape:
        raise DamagedFileError(path, "probs and experts disagree in shape")
    offsets = _check_offsets(arrays, "seq_offsets", ids_NLK.shape[0], path)
    num_requests = len(offsets) - 1
    rows = _read_rows(seqs_path) if seqs_path.exists() else [{}] * num_requests
    if len(rows) != num_requests:
        raise DamagedFileError(seqs_path, f"{len(rows)} lines for {num_requests} sequences")
    prompts = _read_prompts(arrays, offsets, path, vocab_path)

    traces = []
    for b, row in enumerate(rows):
        tokens = slice(offsets[b], offsets[b + 1])
        prompt = prompts[b] if prompts else None
        num_prompt_tokens = prompt.num_tokens if prompt else int(offsets[b + 1] - offsets[b])
        if prompt and row.get("first_position", num_prompt_tokens) != num_prompt_tokens:
            why = f"first_position {row['first_position']}, prompt of {num_prompt_tokens} tokens"
            raise DamagedFileError(seqs_path, f"line {b + 1}: {why}")
        traces.append(
            Trace(
                request_id=str(row.get("id", b)),
                source=stem,
                topic=str(row.get("category", "")),
                topk_expert_ids_TLK=ids_NLK[tokens],
                num_prompt_tokens=num_prompt_tokens,
                first_routed_position=num_prompt_tokens if prompt else 0,
                topk_probs_TLK=None if probs_NLK is None else probs_NLK[tokens],
                token_ids_P=prompt.token_ids_P if prompt else None,
                prompt=prompt.text if prompt else None,
            )
        )
    topics_of = {trace.request_id: trace.topic for trace in traces}
    if len(topics_of) != len(traces):
        raise DamagedFileError(seqs_path, "two sequences share an id")
    files = [file for file in (path, info_path, seqs_path, vocab_path) if file.exists()]
    return TraceList(
        spec=spec_of(
            str(info.get("model", stem)).split(" ")[0],
            num_layers=ids_NLK.shape[1],
            num_experts=num_experts,
            top_k=ids_NLK.shape[2],
        ),
        traces=traces,
        split=split_by_topic(topics_of),
        digest=digest_json([_READ_AS, *(sha256_file(file) for file in files)]),
        probs_kind=_probs_kind(probs_NLK),
        path=path,
    )


class _RecordedPrompt(NamedTuple):
    num_tokens: int
    text: str
    token_ids_P: npt.NDArray[np.int32]  # prompt, then the routed tokens


def _read_prompts(
    arrays: dict[str, npt.NDArray[Any]],
    offsets: npt.NDArray[np.int64],
    path: Path,
    vocab_path: Path,
) -> list[_RecordedPrompt]:
    """The prompt of each request; empty if the file records none."""
    if not {"tokens", "prompt_tokens", "prompt_offsets"} <= set(arrays):
        if "tokens" in arrays:
            logger.warning("%s: tokens are read only with prompts: ids are left out", path)
        return []
    tokens, prompt_tokens = arrays["tokens"], arrays["prompt_tokens"]
    if tokens.shape != (offsets[-1],):
        raise DamagedFileError(path, "tokens and experts disagree in length")
    vocab = _read_json(vocab_path, list)
    if not all(isinstance(text, str) for text in vocab):
        raise DamagedFileError(vocab_path, "must hold strings only")
    for name, ids in (("tokens", tokens), ("prompt_tokens", prompt_tokens)):
        if not 0 <= ids.min(initial=0) <= ids.max(initial=0) < len(vocab):
            raise DamagedFileError(path, f"{name} point outside {vocab_path.name}")
    prompt_offsets = _check_offsets(arrays, "prompt_offsets", len(prompt_tokens), path)
    if len(prompt_offsets) != len(offsets):
        raise DamagedFileError(path, "prompt_offsets and seq_offsets disagree in length")
    id_of_V = np.array([token_id_of(text) for text in vocab], np.int32)
    prompts = []
    for b in range(len(offsets) - 1):
        ids = prompt_tokens[prompt_offsets[b] : prompt_offsets[b + 1]]
        generated = tokens[offsets[b] : offsets[b + 1]]
        token_ids_P = id_of_V[np.concatenate([ids, generated]).astype(np.int64)]
        prompts.append(_RecordedPrompt(len(ids), "".join(vocab[i] for i in ids), token_ids_P))
    return prompts


def _probs_kind(
    probs_NLK: npt.NDArray[np.float16] | None,
) -> Literal["softmax", "topk_softmax", "none"]:
    """Probabilities that sum to 1 over the K were renormalised."""
    if probs_NLK is None:
        return "none"
    sums_NL = probs_NLK.sum(axis=-1, dtype=np.float32)
    return "topk_softmax" if np.allclose(sums_NL, 1, atol=0.02) else "softmax"


def _check_offsets(
    arrays: dict[str, npt.NDArray[Any]], name: str, end: int, path: Path
) -> npt.NDArray[np.int64]:
    """Offsets must start at 0, ascend, and end at ``end``."""
    offsets = arrays[name]
    if (
        offsets.ndim != 1
        or len(offsets) < 2
        or offsets[0] != 0
        or offsets[-1] != end
        or (np.diff(offsets) < 0).any()
    ):
        raise DamagedFileError(path, f"{name} must ascend from 0 to {end}")
    return offsets.astype(np.int64)


def _read_json(path: Path, kind: type[dict[str, Any]] | type[list[Any]]) -> Any:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedFileError(path, "the npz beside it needs it, and it is not there") from None
    except ValueError as error:
        raise DamagedFileError(path, str(error)) from error
    if not isinstance(values, kind):
        raise DamagedFileError(path, f"holds a {type(values).__name__}, not a {kind.__name__}")
    return values


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise MalformedInputError(path, number, str(error)) from error
        if not isinstance(row, dict):
            raise MalformedInputError(path, number, "is no JSON object")
        rows.append(row)
    return rows
