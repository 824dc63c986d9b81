import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DamagedFileError, OutputExistsError
from data.importers import load_traces
from data.schema import MoESpec, Split, Trace
from data.store import MANIFEST, CollectSettings, StoreInputs, TraceStore, TraceStoreWriter

LAYERS, EXPERTS, TOP_K = 3, 8, 2
SETTINGS = CollectSettings(max_prompt_tokens=8, max_new_tokens=4, batch_size=2)


def inputs(*, num_experts: int = EXPERTS, **changes: Any) -> StoreInputs:
    spec = MoESpec(
        model_id="fake",
        num_experts=num_experts,
        top_k=TOP_K,
        decoder_layers=tuple(range(LAYERS)),
        expert_bytes_per_layer=(96,) * LAYERS,
    )
    values = {
        "spec": spec,
        "revision": None,
        "router_digest": "0" * 64,
        "dtype": "float32",
        "source": "fake",
        "source_digest": "1" * 64,
        "settings": SETTINGS,
        "probs_kind": "softmax",
        "requests_per_shard": 2,
    }
    return StoreInputs(**{**values, **changes})


def trace(number: int, *, num_tokens: int = 5, num_experts: int = EXPERTS) -> Trace:
    rng = np.random.default_rng(number)
    scores = rng.random((num_tokens, LAYERS, num_experts))
    dtype = np.uint8 if num_experts <= 256 else np.int16
    return Trace(
        request_id=f"r{number}",
        source="fake",
        topic="even" if number % 2 == 0 else "odd",
        topk_expert_ids_TLK=np.argsort(-scores)[..., :TOP_K].astype(dtype),
        num_prompt_tokens=3,
        first_routed_position=0,
        topk_probs_TLK=np.sort(scores)[..., :TOP_K].astype(np.float16),
        router_probs_TLE=scores.astype(np.float16),
        token_ids_P=np.arange(num_tokens + 1, dtype=np.int32),
        prompt="prompt é\n" * number,
    )


def split_of(traces: list[Trace]) -> dict[str, Split]:
    splits: itertools.cycle[Split] = itertools.cycle(("fit", "test", "val"))
    return {item.request_id: next(splits) for item in traces}


def write(path: Path, traces: list[Trace], *, per_shard: int = 2, **changes: Any) -> TraceStore:
    made_from = inputs(requests_per_shard=per_shard, **changes)
    with TraceStoreWriter(path, made_from, split_of(traces)) as writer:
        for first in range(0, len(traces), per_shard):
            writer.write_shard(first // per_shard, traces[first : first + per_shard])
        writer.finish()
    return TraceStore.open(path)


def assert_same(left: Trace, right: Trace) -> None:
    for name in Trace.__slots__:
        mine, theirs = getattr(left, name), getattr(right, name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype, name
            np.testing.assert_array_equal(mine, theirs, err_msg=name)
        else:
            assert mine == theirs, name


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@st.composite
def any_traces(draw: st.DrawFn) -> tuple[int, list[Trace]]:
    """A few traces of one model, each with its own choice of optional fields."""
    num_experts = draw(st.sampled_from([EXPERTS, 256, 300]))
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    traces = []
    for number in range(draw(st.integers(1, 4))):
        full = trace(number, num_tokens=draw(st.integers(0, 6)), num_experts=num_experts)
        values = {name: getattr(full, name) for name in Trace.__slots__}
        values["prompt_embedding_S"] = np.arange(draw(st.integers(1, 5)), dtype=np.float32)
        values |= {"topic": draw(text), "prompt": draw(text)}
        for name in ("topk_probs_TLK", "router_probs_TLE", "token_ids_P", "prompt"):
            if draw(st.booleans()):
                values[name] = None
        if draw(st.booleans()):
            values["prompt_embedding_S"] = None
        traces.append(Trace(**values))
    return num_experts, traces


@settings(max_examples=30, deadline=None)
@given(any_traces(), st.integers(1, 3))
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, made: tuple[int, list[Trace]], per_shard: int
) -> None:
    num_experts, traces = made
    made_from = inputs(num_experts=num_experts)
    path = tmp_path_factory.mktemp("store")
    store = write(path, traces, per_shard=per_shard, spec=made_from.spec)
    assert len(store) == len(traces)
    assert store.spec == made_from.spec
    assert store.split == split_of(traces)
    for index, expected in enumerate(traces):
        assert_same(store[index], expected)


def test_the_digest_names_the_content_and_not_the_cut(tmp_path: Path) -> None:
    traces = [trace(number) for number in range(5)]
    one = write(tmp_path / "one", traces, per_shard=1)
    two = write(tmp_path / "two", traces, per_shard=3)
    other = write(tmp_path / "other", [*traces[:4], trace(4, num_tokens=6)])
    renamed = dataclasses.replace(inputs().spec, model_id="elsewhere/fake")
    moved = write(tmp_path / "moved", traces, spec=renamed)
    assert one.digest == two.digest == moved.digest != other.digest
    assert contents(tmp_path / "one").keys() != contents(tmp_path / "two").keys()


def test_requests_keep_their_order_however_shards_hold_them(tmp_path: Path) -> None:
    traces = [trace(number) for number in range(4)]
    with TraceStoreWriter(tmp_path, inputs(), split_of(traces)) as writer:
        writer.write_shard(1, [traces[2], traces[0]])
        writer.write_shard(0, [traces[3], traces[1]])
        writer.finish()
    store = TraceStore.open(tmp_path)
    assert [store[index].request_id for index in range(4)] == ["r0", "r1", "r2", "r3"]
    assert [item.request_id for item in store] == list(store.split)


def test_arrays_are_small_writable_and_our_own(tmp_path: Path) -> None:
    store = write(tmp_path, [trace(0)])
    first, again = store[0], store[0]
    assert first.topk_expert_ids_TLK.dtype == np.uint8
    assert first.topk_probs_TLK is not None
    assert first.topk_probs_TLK.dtype == np.float16
    first.topk_expert_ids_TLK[:] = 0
    assert again.topk_expert_ids_TLK.any()


def test_datasets_reads_the_shards_with_their_types(tmp_path: Path) -> None:
    write(tmp_path / "store", [trace(number) for number in range(3)])
    loaded = datasets.load_dataset(
        "parquet",
        data_files=str(tmp_path / "store" / "shard-*.parquet"),
        cache_dir=str(tmp_path / "cache"),
        split="train",
    )
    assert loaded.features["topk_expert_ids_TLK"] == datasets.Array3D(
        (None, LAYERS, TOP_K), "uint8"
    )
    row = loaded.with_format("numpy", columns=["topk_expert_ids_TLK"], dtype=np.uint8)[2]
    np.testing.assert_array_equal(row["topk_expert_ids_TLK"], trace(2).topk_expert_ids_TLK)


def test_load_traces_opens_a_store(tmp_path: Path) -> None:
    store = write(tmp_path, [trace(0)])
    assert load_traces(tmp_path).digest == store.digest


def test_an_interrupted_writer_is_completed_to_the_same_bytes(tmp_path: Path) -> None:
    traces = [trace(number) for number in range(5)]
    write(tmp_path / "whole", traces)
    with TraceStoreWriter(tmp_path / "cut", inputs(), split_of(traces)) as writer:
        writer.write_shard(1, traces[2:4])
    (tmp_path / "cut" / ".shard-00000.parquet.1.tmp").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="interrupted"):
        TraceStore.open(tmp_path / "cut")
    with TraceStoreWriter(tmp_path / "cut", inputs(), split_of(traces)) as writer:
        assert writer.done_request_ids == {"r2", "r3"}
        with pytest.raises(ValueError, match="3 requests are missing: .*r0"):
            writer.finish()
        writer.write_shard(0, traces[:2])
        writer.write_shard(2, traces[4:])
        writer.finish()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_complete_store_is_left_alone(tmp_path: Path) -> None:
    traces = [trace(0)]
    write(tmp_path, traces)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    with TraceStoreWriter(tmp_path, inputs(), split_of(traces)) as writer:
        writer.finish()
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("complete", [True, False])
def test_a_store_of_other_inputs_is_refused_with_the_difference(
    tmp_path: Path, complete: bool
) -> None:
    traces = [trace(0), trace(1)]
    write(tmp_path, traces)
    if not complete:
        (tmp_path / MANIFEST).unlink()
    before = contents(tmp_path)
    longer = dataclasses.replace(SETTINGS, max_new_tokens=9)
    with pytest.raises(OutputExistsError) as error:
        TraceStoreWriter(tmp_path, inputs(settings=longer, dtype="bfloat16"), split_of(traces))
    assert "dtype is 'float32' there and 'bfloat16' here" in str(error.value)
    assert "settings.max_new_tokens is 4 there and 9 here" in str(error.value)
    with pytest.raises(OutputExistsError, match="requests and their split is .* there and .* here"):
        TraceStoreWriter(tmp_path, inputs(), split_of(traces[:1]))
    assert contents(tmp_path) == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExistsError, match=r"thesis\.tex"):
        TraceStoreWriter(tmp_path, inputs(), {})
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_two_writers_never_share_a_folder(tmp_path: Path) -> None:
    with TraceStoreWriter(tmp_path, inputs(), split_of([trace(0)])):
        with pytest.raises(OutputExistsError, match="another process"):
            TraceStoreWriter(tmp_path, inputs(), split_of([trace(0)]))
    with TraceStoreWriter(tmp_path, inputs(), split_of([trace(0)])):
        pass  # unlocked again


def test_a_cut_off_or_missing_shard_is_named_when_the_store_is_opened(tmp_path: Path) -> None:
    write(tmp_path, [trace(number) for number in range(4)])
    damaged = tmp_path / "shard-00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match=r"shard-00001\.parquet is damaged: it has"):
        TraceStore.open(tmp_path)
    damaged.unlink()
    with pytest.raises(DamagedFileError, match=r"shard-00001\.parquet is damaged: .* not there"):
        TraceStore.open(tmp_path)


def test_an_altered_shard_is_named_when_it_is_first_read(tmp_path: Path) -> None:
    write(tmp_path, [trace(number) for number in range(4)])
    damaged = tmp_path / "shard-00001.parquet"
    altered = bytearray(damaged.read_bytes())
    altered[100] ^= 1
    damaged.write_bytes(altered)
    store = TraceStore.open(tmp_path)
    assert_same(store[1], trace(1))
    with pytest.raises(DamagedFileError, match="SHA-256") as error:
        store[2]
    assert error.value.path == damaged


def test_a_damaged_shard_is_repaired_by_deleting_it_and_writing_again(tmp_path: Path) -> None:
    traces = [trace(number) for number in range(4)]
    write(tmp_path, traces)
    whole = contents(tmp_path)
    damaged = tmp_path / "shard-00001.parquet"
    altered = bytearray(whole[damaged.name])
    altered[100] ^= 1
    damaged.write_bytes(altered)
    with pytest.raises(DamagedFileError, match="SHA-256"):  # never sealed under a new checksum
        TraceStoreWriter(tmp_path, inputs(), split_of(traces))
    damaged.write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(DamagedFileError, match=r"shard-00001"):
        TraceStoreWriter(tmp_path, inputs(), split_of(traces))
    damaged.unlink()
    with TraceStoreWriter(tmp_path, inputs(), split_of(traces)) as writer:
        assert writer.done_request_ids == {"r0", "r1"}
        writer.write_shard(1, traces[2:])
        writer.finish()
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda values: values.update(schema_version=7), ValueError, "schema version 7"),
        (lambda values: values.update(extra=1), DamagedFileError, "manifest.json.*extra"),
        (
            lambda values: values["inputs"]["settings"].update(topp=1),
            DamagedFileError,
            "manifest.json.*topp",
        ),
        (lambda values: values.pop("digest"), DamagedFileError, "manifest.json.*digest"),
        (lambda values: values.pop("schema_version"), DamagedFileError, "schema_version"),
        (
            lambda values: values["inputs"]["spec"].update(colour="red"),
            DamagedFileError,
            "manifest.json.*colour",
        ),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(
    tmp_path: Path, change: Any, error: type[Exception], message: str
) -> None:
    write(tmp_path, [trace(0)])
    values = json.loads((tmp_path / MANIFEST).read_text())
    change(values)
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(error, match=f"(?s){message}"):
        TraceStore.open(tmp_path)


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no trace store"):
        TraceStore.open(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(DamagedFileError, match=r"manifest\.json"):
        TraceStore.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("topk_expert_ids_TLK", np.zeros((5, LAYERS, TOP_K), np.int64)),
        ("topk_expert_ids_TLK", np.zeros((5, LAYERS, TOP_K + 1), np.uint8)),
        ("topk_probs_TLK", np.zeros((4, LAYERS, TOP_K), np.float16)),
        ("router_probs_TLE", np.zeros((5, LAYERS, EXPERTS), np.float32)),
        ("token_ids_P", np.zeros(6, np.int64)),
    ],
)
def test_a_trace_that_does_not_fit_the_columns_is_refused(
    tmp_path: Path, name: str, array: Any
) -> None:
    values = {field: getattr(trace(0), field) for field in Trace.__slots__}
    with TraceStoreWriter(tmp_path, inputs(), split_of([trace(0)])) as writer:
        with pytest.raises(ValueError, match=f"'r0': {name} is .* must be"):
            writer.write_shard(0, [Trace(**{**values, name: array})])
        with pytest.raises(ValueError, match="'r1'"):
            writer.write_shard(0, [trace(1)])
        with pytest.raises(ValueError, match="'r0': unknown to the store, or written"):
            writer.write_shard(0, [trace(0), trace(0)])
        writer.write_shard(0, [trace(0)])
        with pytest.raises(ValueError, match="'r0': unknown to the store, or written"):
            writer.write_shard(1, [trace(0)])
