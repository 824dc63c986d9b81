"""The plan's arithmetic, its words, and that it loads nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from runtime import plan
from runtime.expected_speed import (
    expected_speed,
    needed_experts,
    resident_step_s,
    rough_hit_ratio,
)
from runtime.footprint import Footprint, footprint, skeleton
from runtime.link import LinkRates
from runtime.plan import Args, report
from tests.families import tiny_model

LINK = LinkRates(bytes_per_s=1e6, latency_s=0.01)


@pytest.fixture(scope="module")
def model() -> Footprint:
    config = tiny_model("qwen3_moe").config
    return footprint(skeleton(config, torch.float32), context=64, chunk_tokens=32)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A configuration and nothing else."""
    config = tiny_model("qwen3_moe").config
    config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    return str(tmp_path)


def test_speed_is_arithmetic_on_misses(model: Footprint) -> None:
    speed = expected_speed(model, 0.75, link=LINK, compute_s=0.1)
    misses = 3 * 4 * 0.25
    assert needed_experts(model) == pytest.approx(4)
    assert speed.miss_bytes_per_token == pytest.approx(misses * model.layout.record_bytes)
    link_s = misses * (0.01 + model.layout.record_bytes / 1e6)
    assert speed.link_s == pytest.approx(link_s)
    assert speed.bound_tokens_per_s == pytest.approx(1 / max(link_s, 0.1))
    assert speed.serial_tokens_per_s == pytest.approx(1 / (link_s + 0.1))


def test_what_is_not_known_is_not_told(model: Footprint) -> None:
    assert expected_speed(model, 0.5, link=None, compute_s=0.1).bound_tokens_per_s is None
    assert expected_speed(model, 1.0, link=LINK, compute_s=None).bound_tokens_per_s is None
    only_link = expected_speed(model, 0.5, link=LINK, compute_s=None)
    assert only_link.bound_tokens_per_s == only_link.serial_tokens_per_s


def test_a_resident_step_reads_weights_cache_and_its_experts(model: Footprint) -> None:
    read = model.token_weight_bytes + model.kv_bytes + 3 * 4 * model.layout.record_bytes
    assert resident_step_s(model, 1e6) == pytest.approx(read / 1e6)


def test_the_rough_curve_rises_from_nothing_to_everything() -> None:
    assert rough_hit_ratio(0.0) == (0.0, 0.0)
    assert rough_hit_ratio(1.0) == (1.0, 1.0)
    curve = [rough_hit_ratio(i / 20) for i in range(21)]
    assert curve == sorted(curve)
    assert all(low <= high for low, high in curve)


def test_a_config_alone_gives_a_plan(folder: str) -> None:
    arguments: dict[str, Any] = {"model": folder, "context": 64, "dtype": "float32"}
    arguments |= {"device": "cpu", "chunk_tokens": 32, "link_gbps": 1.0, "compute_ms": 0.5}
    budget_bytes = report(Args(residency=0.5, **arguments))["budget_bytes"]
    values = report(Args(budget=str(budget_bytes + 1), **arguments))
    rows = {row["what"]: row for row in values["rows"]}
    assert list(rows) == ["smallest", "this budget", "+1 GiB", "all resident"]
    assert rows["smallest"]["slots"] == 4
    assert rows["smallest"]["total_bytes"] == values["least_bytes"]
    assert rows["this budget"]["total_bytes"] == values["plan"]["total_bytes"] == budget_bytes
    assert rows["this budget"]["slots"] == 8
    assert rows["+1 GiB"]["slots"] == rows["all resident"]["slots"] == 16
    assert rows["all resident"]["bound_tokens_per_s"] == pytest.approx(2000)
    assert "rough curve" in values["hit_ratio_from"]
    assert (values["link_from"], values["compute_from"]) == ("given", "given")
    assert any("smallest possible" in line for line in values["advice"])


def test_without_a_gpu_and_rates_speeds_are_left_out(folder: str) -> None:
    values = report(Args(model=folder, residency=0.5, context=64, device="cpu"))
    assert values["plan"]["slots"] == 8
    assert "not measured" in values["link_from"]
    assert "not measured" in values["compute_from"]
    assert all(row["bound_tokens_per_s"] is None for row in values["rows"])


def test_a_trace_gives_the_hit_ratios_of_every_policy(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from data.schema import MoESpec, Trace, TraceList

    rng = np.random.default_rng(0)
    rows = [np.stack([rng.permutation(6)[:4] for _ in range(3)]) for _ in range(40)]
    trace = Trace(
        request_id="0",
        source="drawn",
        topic="",
        topk_expert_ids_TLK=np.stack(rows).astype(np.uint8),
        num_prompt_tokens=0,
        first_routed_position=0,
    )
    spec = MoESpec(model_id="drawn", num_experts=16, top_k=4, decoder_layers=(0, 1, 2))
    traces = TraceList(spec=spec, traces=[trace], split={"0": "test"}, digest="")
    monkeypatch.setattr(plan, "load_traces", lambda name, num_experts: traces)
    arguments: dict[str, Any] = {"model": folder, "context": 64, "device": "cpu"}
    values = report(Args(residency=0.5, trace="drawn", policy=["lru", "lfru"], **arguments))
    here = {r["policy"]: r for r in values["rows"] if r["what"] == "this budget"}
    assert set(here) == {"lru", "lfru"}
    # 6 experts are ever used and 8 fit: only the first use of each misses.
    assert here["lru"]["hit_ratio"] == pytest.approx(1 - 3 * 6 / (40 * 3 * 4))
    assert "replay of drawn" in values["hit_ratio_from"]
    other = TraceList(
        spec=MoESpec(model_id="other", num_experts=16, top_k=2, decoder_layers=(0,)),
        traces=[trace],
        split={"0": "test"},
        digest="",
    )
    monkeypatch.setattr(plan, "load_traces", lambda name, num_experts: other)
    with pytest.raises(ValueError, match="of another model"):
        report(Args(residency=0.5, trace="drawn", **arguments))


def test_the_command_ends_with_one_line_of_json(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan.main([f"model={folder}", "residency=0.5", "context=64", "device=cpu", "link_gbps=50"])
    lines = capsys.readouterr().out.splitlines()
    assert "this budget" in "\n".join(lines[:-1])
    assert json.loads(lines[-1])["plan"]["slots"] == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["budget=1KiB"], "at least"),
        ([], "either budget"),
        (["budget=1GiB", "residency=0.5"], "either budget"),
        (["budget=1GiB", "link_gbps=0"], "link_gbps"),
        (["budget=1GiB", "dtype=int4"], "dtype=int4"),
        (["budget=1GiB", "device=tpu"], "device=tpu"),
        (["budget=1GiB", "artifact=x"], "needs a trace"),
    ],
)
def test_bad_input_ends_in_one_line(
    folder: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        plan.main([f"model={folder}", "context=64", *words])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said


def test_a_dense_model_and_a_missing_one_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoConfig.for_model(
        "llama", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    ).save_pretrained(tmp_path)
    for where, message in ((str(tmp_path), "dense"), (str(tmp_path / "none"), "config.json")):
        with pytest.raises(SystemExit):
            plan.main([f"model={where}", "budget=1GiB", "device=cpu"])
        assert message in capsys.readouterr().err
