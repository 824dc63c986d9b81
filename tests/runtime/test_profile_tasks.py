"""The profile says what each task uses and which layers it minds; the command leaves it whole."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.adapters import moe_layers, spec_of
from data.observe import RouterRecorder
from predictors.task_profile import TaskProfile
from predictors.task_profile_file import load_profile
from predictors.task_reader import KeywordReader, TaskReader
from runtime.profile_tasks import Settings, format_profile, main, profile_tasks, run
from runtime.restricted_quality import use_of
from tests.families import tiny_model

PROMPTS = {
    "a": [torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 2, 6])],
    "b": [torch.tensor([8, 8, 7, 6, 5, 4])],
}


def reader(fallback: str) -> TaskReader:
    return KeywordReader(keywords={"a": ["x"], "b": ["y"]}, fallback=fallback)


def profile(model: Any, prompts: Any = None, **options: Any) -> TaskProfile:
    settings = {"make_reader": reader, "num_slots": 4, "answer_tokens": 5, "seeds": 1, **options}
    return profile_tasks(model, prompts or PROMPTS, spec=spec_of(model), **settings)


def test_use_is_that_of_all_tokens_that_were_read() -> None:
    model = tiny_model("qwen3_moe")
    found = profile(model)
    (prompt_ids_T,) = PROMPTS["b"]
    answer_1T = model.generate(prompt_ids_T[None], max_new_tokens=5, do_sample=False)
    with RouterRecorder(model, keep_router_probs=False) as tap, torch.no_grad():
        model(answer_1T[:, :-1], use_cache=False)
        use_LE = use_of(tap.take().ids_NLK, spec_of(model))
    torch.testing.assert_close(found.use_GLE[1], use_LE)
    top_k = float(spec_of(model).top_k)
    torch.testing.assert_close(found.use_GLE.sum(dim=2), torch.full((2, 3), top_k))


def test_a_layer_whose_experts_change_nothing_is_tolerated_and_others_are_not() -> None:
    """Layer 1's experts give nothing, whoever they are."""
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        moe_layers(model)[1].experts.down_proj.zero_()  # type: ignore[operator]
    found = profile(model)
    assert found.agreement_GL[:, 1].tolist() == [1.0, 1.0]
    assert found.kl_GL[:, 1].abs().max() < 1e-5
    assert (found.kl_GL[:, [0, 2]] > 1e-3).all()
    assert found.sensitive_GL(min_agreement=1.0)[:, 1].tolist() == [False, False]


def test_restricting_to_all_experts_costs_nothing() -> None:
    found = profile(tiny_model("qwen3_moe"), num_slots=16)
    assert (found.agreement_GL == 1).all()
    assert found.kl_GL.abs().max() < 1e-6


def test_an_answer_is_as_long_as_the_model_makes_it() -> None:
    model = tiny_model("qwen3_moe")
    assert profile(model).answer_tokens_G.tolist() == [5.0, 5.0]
    (prompt_ids_T,) = PROMPTS["b"]
    answer: Tensor = model.generate(prompt_ids_T[None], max_new_tokens=5, do_sample=False)[0, 6:]
    second = int(answer[1])
    assert int(answer[0]) != second
    assert profile(model, ends=[second]).answer_tokens_G[1] == 2.0
    model.generation_config.eos_token_id = second  # which keeps it from ending as it would
    assert profile(model, ends=[second]).answer_tokens_G[1] == 2.0


def test_who_tolerates_least_is_who_undecided_prompts_belong_to() -> None:
    found = profile(tiny_model("qwen3_moe"))
    least = found.tasks[int(found.agreement_GL.mean(dim=1).argmin())]
    assert found.reader.config()["fallback"] == least


def test_the_model_is_left_as_it_was_also_after_a_failure() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(ValueError, match=r"the reader knows the tasks \('a', 'b'\)"):
        profile(model, {**PROMPTS, "c": PROMPTS["b"]}, make_reader=lambda _: reader("a"))
    assert not any(moe.router._forward_hooks for moe in moe_layers(model))
    with pytest.raises(ValueError, match=r"tasks \['b'\] have no prompts"):
        profile(model, {"a": PROMPTS["a"], "b": []})


def prompts_file(tmp_path: Path) -> Path:
    lines = [
        {"text": f"def f{i}(x): return x + {i}" if i % 2 else f"Hello number {i}, how are you?"}
        | {"topic": "code" if i % 2 else "talk"}
        for i in range(12)
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize("kind", ["classifier", "keywords"])
def test_the_command_leaves_a_profile_of_the_users_own_prompts(tmp_path: Path, kind: str) -> None:
    settings = Settings(
        out=tmp_path / "p",
        prompts=prompts_file(tmp_path),
        reader=kind,
        answer_tokens=4,
        judged=1,
        seeds=1,
    )
    said = format_profile(run(settings))
    assert said.splitlines()[0].split()[-1] == "W_o"
    loaded = load_profile(tmp_path / "p")
    assert loaded.tasks == ("code", "talk")
    assert loaded.reader.read("def g(x): return 2") == 0
    assert loaded.measured["prompts"] == {"code": 6, "talk": 6}
    assert loaded.measured["source"] == "mine"


def test_prompts_without_tasks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "no topic here"}')
    with pytest.raises(SystemExit) as ended:
        main([f"out={tmp_path / 'p'}", f"prompts={path}"])
    assert ended.value.code == 2
    assert "topics must name two tasks or more" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reader": "oracle"}, "reader=oracle: must be one of classifier, keywords"),
        ({"judged": 0}, "judged=0"),
        ({"prompt_tokens": 1}, "prompt_tokens=1"),
        ({"residency": 0.0}, r"residency=0\.0"),
    ],
)
def test_settings_out_of_range_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(out=tmp_path, **options)
