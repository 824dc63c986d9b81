import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data.importers import TRACES, load_traces
from data.importers.common import spec_of
from data.schema import TraceList

ROOT = Path(__file__).resolve().parents[2]


def write_npz(path: Path, num_tokens: int = 6, num_experts: int = 4) -> Path:
    """A per-token npz of two requests, one layer, top-2."""
    experts = np.array([[[t % 3, 3]] for t in range(num_tokens)], np.uint8)
    np.savez(path, experts=experts, seq_offsets=np.array([0, 2, num_tokens]))
    path.with_suffix("").with_suffix(".info.json").write_text(
        json.dumps({"model": "fake", "num_experts": num_experts})
    )
    return path


def previous_token_overlap(traces: TraceList) -> float:
    """Mean share of a token's experts that the previous token of the request used too."""
    shares = []
    for trace in traces.traces:
        now_TLK, before_TLK = trace.topk_expert_ids_TLK[1:], trace.topk_expert_ids_TLK[:-1]
        same = (now_TLK[..., :, None] == before_TLK[..., None, :]).any(axis=-1)
        shares.append(same.mean(axis=(1, 2)))
    return float(np.concatenate(shares).mean())


def load(where: str | Path) -> TraceList:
    traces = load_traces(where)
    assert isinstance(traces, TraceList)
    return traces


# --- finding and telling formats ---


def test_a_file_is_told_by_its_content_not_by_its_name(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "x.npz").rename(tmp_path / "renamed.bin")
    assert len(load(path)) == 2


def test_names_are_looked_up_in_the_folder_of_real_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECAST_DATA", str(tmp_path))
    folder = tmp_path / "traces" / "esft_dsv2lite"
    folder.mkdir(parents=True)
    write_npz(folder / "esft_law.npz")
    assert load("esft_law").traces[0].source == "esft_law"
    with pytest.raises(ValueError, match=r"esft_intent\.npz, which does not exist"):
        load_traces("esft")


def test_a_missing_data_folder_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECAST_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"nowhere does not exist: set MOECAST_DATA"):
        load_traces("gptoss20b")


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"gptoss99.*'gptoss20b', 'esft'"):
        load_traces("gptoss99")


@pytest.mark.parametrize("content", [b"hello\n", b"", b'{"text": "a prompt"}\n', b"\xff\xfe\x00"])
def test_a_file_of_no_known_format_lists_the_formats(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.jsonl: not of a format .*BigMoeOnEdge route csv"):
        load_traces(path)


def test_an_npz_of_other_arrays_lists_the_formats(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", weights=np.zeros(3))
    with pytest.raises(ValueError, match="not of a format"):
        load_traces(tmp_path / "x.npz")


def test_a_folder_without_a_manifest_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without manifest.json is no trace store"):
        load_traces(tmp_path)


def test_a_folder_with_a_manifest_is_opened_as_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store itself is tested elsewhere; here, that it is asked, and only when needed."""
    opened: list[Path] = []
    monkeypatch.setitem(
        sys.modules,
        "data.store",
        SimpleNamespace(TraceStore=SimpleNamespace(open=lambda path: opened.append(path))),
    )
    (tmp_path / "manifest.json").write_text("{}")
    load_traces(tmp_path)
    assert opened == [tmp_path]


def test_reading_traces_needs_no_package_of_training() -> None:
    hidden = ["datasets", "lightning", "pandas", "pyarrow", "wandb"]
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({hidden}))\n"
        "import data.importers, data.exporters.vllm, data.sources"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_several_files_of_a_name_are_one_set_with_the_splits_they_have_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECAST_DATA", str(tmp_path))
    folder = tmp_path / "traces" / "esft_dsv2lite"
    folder.mkdir(parents=True)
    for domain in ("intent", "law"):
        write_npz(folder / f"esft_{domain}.npz")
        rows = [{"id": f"{domain}-{i}", "category": domain} for i in range(2)]
        (folder / f"esft_{domain}.seqs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    both, law = load("esft"), load("esft_law")
    assert [trace.request_id for trace in both.traces] == ["intent-0", "intent-1", "law-0", "law-1"]
    assert {name: both.split[name] for name in law.split} == law.split
    assert both.digest not in (law.digest, load("esft_intent").digest)


def test_files_of_different_models_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOECAST_DATA", str(tmp_path))
    folder = tmp_path / "traces" / "esft_dsv2lite"
    folder.mkdir(parents=True)
    write_npz(folder / "esft_intent.npz", num_experts=4)
    write_npz(folder / "esft_law.npz", num_experts=8)
    with pytest.raises(ValueError, match="do not go together: .*x 4 experts.*x 8 experts"):
        load_traces("esft")


def test_an_unknown_models_expert_size_is_left_open() -> None:
    spec = spec_of("some/model", num_layers=2, num_experts=4, top_k=2)
    assert (spec.decoder_layers, spec.expert_bytes_per_layer) == ((0, 1), None)


# --- the real traces ---


def test_gptoss20b_is_what_its_readme_says(shared_data: Path) -> None:
    traces = load("gptoss20b")
    assert (len(traces), sum(trace.num_tokens for trace in traces.traces)) == (356, 98_777)
    assert previous_token_overlap(traces) == pytest.approx(0.43, abs=0.005)
    assert {trace.source for trace in traces.traces} == {"gptoss20b"}
    assert traces.probs_kind == "topk_softmax"
    assert traces.spec.expert_bytes_per_layer == (49_783_680,) * 24  # bf16 with biases
    assert len({trace.topic for trace in traces.traces}) == 56
    first = traces[0]
    assert first.num_prefill_tokens == 0
    assert first.first_routed_position == first.num_prompt_tokens == 160
    assert first.token_ids_P is not None
    assert len(first.token_ids_P) == 160 + first.num_tokens
    assert first.prompt is not None
    assert "If aH is an element of a factor group" in first.prompt
    of_topic = {(trace.topic, traces.split[trace.request_id]) for trace in traces.traces}
    assert len(of_topic) == 56  # no topic is in two splits
    assert {split for _, split in of_topic} == {"fit", "val", "test"}


def test_esft_is_what_its_readme_says(shared_data: Path) -> None:
    law, both = load("esft_law"), load("esft")
    assert previous_token_overlap(law) == pytest.approx(0.29, abs=0.005)
    assert (len(both), sum(trace.num_tokens for trace in both.traces)) == (160, 8_222 + 8_327)
    assert law.probs_kind == "softmax"
    assert law.spec.decoder_layers == tuple(range(1, 27))
    assert law.spec.expert_bytes_per_layer == (17_301_504,) * 26
    assert law[0].num_prefill_tokens == law[0].num_tokens
    for domain in ("intent", "law"):
        splits = Counter(both.split[t.request_id] for t in both.traces if t.topic == domain)
        assert set(splits) == {"fit", "val", "test"}


@pytest.mark.parametrize("name", list(TRACES))
def test_every_named_trace_is_read(shared_data: Path, name: str) -> None:
    traces = load(name)
    for trace in traces.traces:
        assert trace.topk_expert_ids_TLK.shape[1:] == (traces.spec.num_layers, traces.spec.top_k)
        assert trace.topk_probs_TLK is not None
        assert trace.topk_probs_TLK.dtype == np.float16
    assert set(traces.split) == {trace.request_id for trace in traces.traces}
