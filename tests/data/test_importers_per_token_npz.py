import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import DamagedFileError, MalformedInputError
from data.importers.per_token_npz import read_per_token_npz, token_id_of

VOCAB = ["Hello", " world", "!", "<s>"]


def arrays(**changes: Any) -> dict[str, Any]:
    """Two decode-only requests of 2 and 3 tokens, 2 layers of 8 experts, top-2."""
    rng = np.random.default_rng(0)
    values = {
        "experts": np.stack([[rng.permutation(8)[:2] for _ in range(2)] for _ in range(5)]).astype(
            np.uint8
        ),
        "probs": np.full((5, 2, 2), 0.5, np.float16),
        "seq_offsets": np.array([0, 2, 5]),
        "tokens": np.array([2, 2, 1, 0, 2], np.int32),
        "prompt_tokens": np.array([3, 0, 1, 3], np.int32),
        "prompt_offsets": np.array([0, 3, 4]),
    }
    return {name: value for name, value in (values | changes).items() if value is not None}


def write(
    folder: Path,
    *,
    info: Any = None,
    rows: str | None = None,
    vocab: Any = VOCAB,
    **changes: Any,
) -> Path:
    path = folder / "fake.npz"
    np.savez(path, **arrays(**changes))
    info = {"model": "fake/model", "num_experts": 8} if info is None else info
    (folder / "fake.info.json").write_text(json.dumps(info))
    if vocab is not None:
        (folder / "fake.vocab.json").write_text(json.dumps(vocab))
    if rows is not None:
        (folder / "fake.seqs.jsonl").write_text(rows)
    return path


def test_requests_are_cut_at_the_offsets(tmp_path: Path) -> None:
    rows = '{"id": "a", "category": "x", "first_position": 3}\n{"id": "b", "category": "y"}\n'
    traces = read_per_token_npz(write(tmp_path, rows=rows))
    first, second = traces[0], traces[1]
    assert (first.request_id, first.topic, first.num_tokens) == ("a", "x", 2)
    assert (second.request_id, second.topic, second.num_tokens) == ("b", "y", 3)
    np.testing.assert_array_equal(second.topk_expert_ids_TLK, arrays()["experts"][2:])
    assert second.topk_expert_ids_TLK.dtype == np.uint8
    assert traces.spec.describe() == "fake/model (2 MoE layers x 8 experts, top-2)"


def test_a_prompt_comes_before_the_routed_tokens(tmp_path: Path) -> None:
    trace = read_per_token_npz(write(tmp_path))[0]
    assert trace.prompt == "<s>Hello world"
    assert trace.first_routed_position == trace.num_prompt_tokens == 3
    words = ["<s>", "Hello", " world", "!", "!"]
    np.testing.assert_array_equal(trace.token_ids_P, [token_id_of(word) for word in words])


def test_a_token_has_the_same_id_in_every_file(tmp_path: Path) -> None:
    """Files number their tokens by themselves: by those numbers, what a predictor learned of " the"
    in one file was applied to whatever stood in its place in the next."""
    for name in "ab":
        (tmp_path / name).mkdir()
    one = read_per_token_npz(write(tmp_path / "a"))[0]
    shuffled = {"prompt_tokens": np.array([2, 3, 0, 2]), "tokens": np.array([1, 1, 0, 3, 1])}
    vocab = ["world", "!", "<s>", "Hello"]
    other = read_per_token_npz(write(tmp_path / "b", vocab=vocab, **shuffled))[0]
    assert one.token_ids_P is not None
    assert other.token_ids_P is not None
    same = [True, True, False, True, True]  # " world" and "world" are two tokens
    assert (one.token_ids_P == other.token_ids_P).tolist() == same
    assert one.token_ids_P.min() >= 2**24


def test_without_a_prompt_all_tokens_are_prompt_tokens(tmp_path: Path) -> None:
    trace = read_per_token_npz(write(tmp_path, prompt_tokens=None, tokens=None, vocab=None))[1]
    assert (trace.num_prompt_tokens, trace.first_routed_position) == (3, 0)
    assert trace.num_prefill_tokens == 3
    assert trace.token_ids_P is None
    assert trace.prompt is None


@pytest.mark.parametrize(
    ("probs", "kind"),
    [
        (np.full((5, 2, 2), 0.5, np.float16), "topk_softmax"),
        (np.full((5, 2, 2), 0.2, np.float16), "softmax"),
        (None, "none"),
    ],
)
def test_the_kind_of_probabilities_is_told_by_their_sum(
    tmp_path: Path, probs: Any, kind: str
) -> None:
    traces = read_per_token_npz(write(tmp_path, probs=probs))
    assert traces.probs_kind == kind
    assert (traces[0].topk_probs_TLK is None) == (probs is None)


def test_missing_information_is_guessed_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    traces = read_per_token_npz(write(tmp_path, info={}))
    assert traces.spec.num_experts == int(arrays()["experts"].max()) + 1
    assert "does not say num_experts" in caplog.text


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"rows": '1\n{"id": "b"}\n'}, "line 1: is no JSON object"),
        ({"info": ["fake"]}, "holds a list, not a dict"),
        ({"vocab": {"Hello": 0}}, "holds a dict, not a list"),
        ({"vocab": [0, 1, 2, 3]}, "must hold strings only"),
    ],
    ids=["row", "info", "vocab", "vocab of numbers"],
)
def test_a_sidecar_of_another_shape_is_named(
    tmp_path: Path, odd: dict[str, Any], message: str
) -> None:
    with pytest.raises((DamagedFileError, MalformedInputError), match=message):
        read_per_token_npz(write(tmp_path, **odd))


def test_tokens_without_prompts_are_left_out_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, prompt_tokens=None)
    assert read_per_token_npz(path)[0].token_ids_P is None
    assert "tokens are read only with prompts" in caplog.text


def test_who_knows_the_model_may_say_how_many_experts_it_has(tmp_path: Path) -> None:
    """A short trace need not touch the last expert, and would be taken for another model's."""
    path = write(tmp_path)
    path.with_name("fake.info.json").unlink()
    assert read_per_token_npz(path, num_experts=64).spec.num_experts == 64


def test_more_than_256_experts_need_int16(tmp_path: Path) -> None:
    experts = arrays()["experts"].astype(np.int64)
    experts[0, 0, 0] = 299
    info = {"model": "fake", "num_experts": 300}
    traces = read_per_token_npz(write(tmp_path, experts=experts, info=info))
    assert traces[0].topk_expert_ids_TLK.dtype == np.int16
    assert traces[0].topk_expert_ids_TLK[0, 0, 0] == 299


def test_the_digest_covers_the_files_beside_it(tmp_path: Path) -> None:
    path = write(tmp_path)
    before = read_per_token_npz(path).digest
    assert read_per_token_npz(path).digest == before
    write(tmp_path, vocab=[*VOCAB, "new"])
    assert read_per_token_npz(path).digest != before


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"experts": arrays()["experts"] + 7}, r"expert ids .*0\.\.7"),
        ({"experts": arrays()["experts"].astype(np.int8) - 8}, r"expert ids from -8"),
        ({"experts": np.zeros((5, 2, 2), np.uint8)}, "token 0, layer 0 names an expert twice"),
        ({"experts": np.zeros((5, 2, 2), np.float32)}, "must be integers"),
        ({"experts": np.zeros((5, 2), np.uint8)}, r"\[T, L, K\]"),
        ({"seq_offsets": np.array([0, 3, 2])}, "seq_offsets must ascend from 0 to 5"),
        ({"seq_offsets": np.array([0, 4, 3, 5])}, "seq_offsets must ascend"),
        ({"seq_offsets": np.array([1, 2, 5])}, "seq_offsets must ascend"),
        ({"prompt_offsets": np.array([0, 3, 9])}, "prompt_offsets must ascend from 0 to 4"),
        ({"prompt_offsets": np.array([0, 4])}, "disagree in length"),
        ({"probs": np.ones((4, 2, 2), np.float16)}, "probs and experts disagree"),
        ({"tokens": np.zeros(4, np.int32)}, "tokens and experts disagree"),
        ({"tokens": np.array([9, 0, 0, 0, 0])}, r"tokens point outside fake\.vocab\.json"),
        ({"seq_offsets": None}, r"lacks the arrays \['seq_offsets'\]"),
    ],
)
def test_arrays_that_cannot_be_right_are_damage(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(DamagedFileError, match=why) as caught:
        read_per_token_npz(path)
    assert caught.value.path == path


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_truncated_file_is_named(tmp_path: Path, keep: float) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DamagedFileError, match=r"fake\.npz is damaged"):
        read_per_token_npz(path)


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path)
    content = bytearray(path.read_bytes())
    at = content.index(arrays()["experts"].tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match="CRC"):
        read_per_token_npz(path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = write(tmp_path, tokens=np.array([{"a": 1}] * 5, object))
    with pytest.raises(DamagedFileError, match="allow_pickle"):
        read_per_token_npz(path)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ('{"id": "a"}\n', "1 lines for 2 sequences"),
        ('{"id": "a"}\n{"id": "a"}\n', "two sequences share an id"),
        ('{"first_position": 5}\n{}\n', "line 1: first_position 5, prompt of 3"),
    ],
)
def test_metadata_that_contradicts_the_arrays_is_damage(
    tmp_path: Path, rows: str, why: str
) -> None:
    with pytest.raises(DamagedFileError, match=rf"fake\.seqs\.jsonl .*{why}"):
        read_per_token_npz(write(tmp_path, rows=rows))


def test_a_malformed_line_of_metadata_is_named(tmp_path: Path) -> None:
    with pytest.raises(MalformedInputError, match=r"fake\.seqs\.jsonl, line 2"):
        read_per_token_npz(write(tmp_path, rows='{"id": "a"}\n{"id"\n'))


def test_a_missing_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match=r"fake\.vocab\.json .* not there"):
        read_per_token_npz(write(tmp_path, vocab=None))
