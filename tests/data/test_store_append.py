"""A store that grows is complete after every step, whatever happens in between."""

import errno
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import data.files
from data.errors import OutputExistsError
from data.splits import split_of
from data.store import MANIFEST, TraceStore
from data.store_append import TraceStoreAppender
from tests.data.test_store import assert_same, inputs, trace

INPUTS = inputs(settings=None)


def ids_in(path: Path) -> list[str]:
    return [entry.request_id for entry in TraceStore.open(path).manifest.requests]


def test_what_is_appended_is_read_back_after_each_step_and_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with TraceStoreAppender(path, INPUTS) as appender:
        appender.append([trace(0), trace(1)])
        assert ids_in(path) == ["r0", "r1"]
        before = TraceStore.open(path)
        appender.append([trace(2)])
        assert len(appender) == 3
    with TraceStoreAppender(path, INPUTS) as appender:
        assert len(appender) == 3
        appender.append([trace(3)])
    store = TraceStore.open(path)
    assert len(before) == 2
    assert ids_in(path) == ["r0", "r1", "r2", "r3"]
    for number, mine in enumerate(store):
        assert_same(mine, trace(number))
    assert store.manifest.num_tokens == 4 * 5
    assert store.split == {f"r{i}": split_of(f"r{i}") for i in range(4)}


def test_the_digest_does_not_tell_how_it_grew(tmp_path: Path) -> None:
    for name, steps in (("a", [[0, 1], [2]]), ("b", [[0], [1, 2]])):
        with TraceStoreAppender(tmp_path / name, INPUTS) as appender:
            for numbers in steps:
                appender.append([trace(number) for number in numbers])
    assert TraceStore.open(tmp_path / "a").digest == TraceStore.open(tmp_path / "b").digest


@pytest.mark.parametrize("breaks", ["the shard", "the manifest"])
def test_a_full_disk_leaves_the_store_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    path = tmp_path / "store"
    with TraceStoreAppender(path, INPUTS) as appender:
        appender.append([trace(0)])
        before = {file.name: file.read_bytes() for file in path.iterdir()}

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            if breaks == "the shard":
                patch.setattr(pq.ParquetWriter, "write_table", full)
            else:
                patch.setattr(data.files.Path, "write_text", full)
            with pytest.raises(OSError, match="No space left"):
                appender.append([trace(1)])
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
        appender.append([trace(1)])  # there is room again
    assert ids_in(path) == ["r0", "r1"]


def test_a_shard_that_the_manifest_names_stays_whatever_failed_after_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store"
    fsync_dir, synced = data.files._fsync_dir, []

    def broken(folder: Path) -> None:
        synced.append(folder)
        if len(synced) == 2:  # the shard's was the first
            raise OSError(errno.EIO, "Input/output error")
        fsync_dir(folder)

    with TraceStoreAppender(path, INPUTS) as appender:
        appender.append([trace(0)])
        with monkeypatch.context() as patch:
            patch.setattr(data.files, "_fsync_dir", broken)
            with pytest.raises(OSError, match="Input/output"):
                appender.append([trace(1)])
        assert len(appender) == 2
        appender.append([trace(2)])
    store = TraceStore.open(path)
    assert ids_in(path) == ["r0", "r1", "r2"]
    for number, mine in enumerate(store):
        assert_same(mine, trace(number))


def test_a_shard_that_no_manifest_names_is_removed(tmp_path: Path) -> None:
    """What a power cut between shard and manifest leaves behind."""
    path = tmp_path / "store"
    with TraceStoreAppender(path, INPUTS) as appender:
        appender.append([trace(0)])
        manifest = (path / MANIFEST).read_bytes()
        appender.append([trace(1)])
    (path / MANIFEST).write_bytes(manifest)
    (path / ".shard-00002.parquet.1.tmp").write_bytes(b"half")
    with TraceStoreAppender(path, INPUTS) as appender:
        assert sorted(file.name for file in path.iterdir()) == [MANIFEST, "shard-00000.parquet"]
        appender.append([trace(2)])
    assert ids_in(path) == ["r0", "r2"]


def test_other_folders_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with TraceStoreAppender(path, INPUTS) as appender:
        appender.append([trace(0)])
        with pytest.raises(OutputExistsError, match="another process"):
            TraceStoreAppender(path, INPUTS)
    with pytest.raises(OutputExistsError, match="another model"):
        TraceStoreAppender(path, inputs(settings=None, dtype="bfloat16"))
    (path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"notes\.txt"):
        TraceStoreAppender(path, INPUTS)


def test_a_trace_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    with TraceStoreAppender(tmp_path, INPUTS) as appender:
        appender.append([trace(0)])
        with pytest.raises(ValueError, match="topk_expert_ids_TLK"):
            appender.append([trace(1), trace(2, num_experts=300)])
    assert ids_in(tmp_path) == ["r0"]


def test_splits_by_name_meet_the_shares_and_never_change() -> None:
    counts = Counter(split_of(f"request {i}") for i in range(4000))
    assert counts["fit"] == pytest.approx(2800, abs=120)
    assert counts["val"] == pytest.approx(400, abs=80)
    assert counts["test"] == pytest.approx(800, abs=100)
    assert split_of("request 7") == split_of("request 7")
    assert {split_of("x", seed=seed) for seed in range(30)} == {"fit", "val", "test"}
