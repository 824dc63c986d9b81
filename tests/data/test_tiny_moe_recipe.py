"""Training, and the recipe as a whole."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM

from data.adapters import moe_layers, probs_kind, spec_of
from data.collect import run as collect
from data.errors import OutputExistsError
from data.sources.jsonl import Jsonl
from data.store import CollectSettings
from data.tiny_moe.recipe import Recipe, parse_arguments, run
from data.tiny_moe.router_loss import RouterTargets
from data.tiny_moe.routing import DENSE_EXPERTS, RouterTap
from data.tiny_moe.training import TrainSettings, train
from tests.data.tiny_moe_fakes import toy_model, toy_olmoe, write_stdlib_corpora


def test_training_lowers_the_loss_and_keeps_to_its_time_limit(caplog) -> None:
    streams = [np.tile(np.arange(k, k + 8, dtype=np.uint16), 100) for k in (0, 20)]
    weights = np.array([0.5, 0.5])
    targets = RouterTargets(chunk=16)
    toy = toy_model()
    toy.set_experts_implementation(DENSE_EXPERTS)
    report = train(
        toy, streams, weights, TrainSettings(steps=30, batch_size=4, seq_len=32), targets
    )
    assert (report.steps, report.tokens) == (30, 30 * 4 * 32)
    assert report.curve[-1]["loss"] < report.curve[0]["loss"] - 1
    endless = TrainSettings(steps=10**6, batch_size=1, seq_len=16, max_seconds=0.3)
    report = train(toy, streams, weights, endless, targets)
    assert 0 < report.steps < 10**6
    assert "time limit" in caplog.text


def test_a_first_step_that_compiles_does_not_use_up_the_warm_up() -> None:
    toy = toy_model()
    toy.set_experts_implementation(DENSE_EXPERTS)
    first = toy.model.register_forward_pre_hook(lambda *_: (time.sleep(0.5), first.remove())[1])
    limited = TrainSettings(
        steps=150, batch_size=1, seq_len=16, warmup=0.5, max_seconds=1.5, peak_lr=1e-3
    )
    report = train(
        toy, [np.arange(60, dtype=np.uint16)], np.ones(1), limited, RouterTargets(chunk=16)
    )
    assert 0.5 < report.first_step_s < report.seconds
    assert report.curve[1]["lr"] < 0.2 * limited.peak_lr


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at it
def test_one_compiled_graph_serves_all_layers_under_the_tap() -> None:
    toy = toy_olmoe(num_layers=12)  # torch gives up compiling a function after 8 versions of it
    toy.set_experts_implementation(DENSE_EXPERTS)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    for layer in toy.model.layers:
        layer.compile(backend=keep)
    with RouterTap(toy) as tap:
        for _ in range(2):
            hidden_BTD = toy.model(torch.arange(10)[None], use_cache=False)[0]
            torch.autograd.backward(hidden_BTD.sum() + tap.logits_LTE().sum())
        assert tap.expert_ids_LTK().shape == (12, 10, 2)
    assert len(graphs) == 1
    assert all(layer.mlp.gate.weight.grad.any() for layer in toy.model.layers)


def test_training_refuses_streams_and_sequences_that_do_not_fit() -> None:
    streams = [np.zeros(20, np.uint16)]
    with pytest.raises(ValueError, match="has 20 tokens, below 33"):
        train(
            toy_model(),
            streams,
            np.ones(1),
            TrainSettings(steps=1, batch_size=1, seq_len=32),
            RouterTargets(chunk=16),
        )
    with pytest.raises(ValueError, match="seq_len=40 is not a multiple of 16"):
        train(
            toy_model(),
            streams,
            np.ones(1),
            TrainSettings(steps=1, batch_size=1, seq_len=40),
            RouterTargets(chunk=16),
        )


def test_the_recipe_makes_a_checkpoint_that_loads_and_has_learned(tmp_path: Path) -> None:
    corpora = write_stdlib_corpora(tmp_path / "corpora", chars=40_000)
    out = tmp_path / "model"
    arguments = [f"corpora={corpora}", f"out={out}", "steps=8", "batch_size=2", "seq_len=64"]
    arguments += ["vocab_size=512", "eval_windows=2", "sample_tokens=1", "held_out_fraction=0.1"]
    metrics = run(parse_arguments(arguments))
    curve = metrics["training"]["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.3
    assert set(metrics["domains"]) == {"code", "prose"}
    assert all(row["loss_nats_per_token"] < np.log(512) for row in metrics["domains"].values())
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert loaded.config.vocab_size == len(AutoTokenizer.from_pretrained(out)) == 512
    card = (out / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in card
    assert "batch_size=2" in card
    with pytest.raises(OutputExistsError, match="choose another out"):
        run(parse_arguments(arguments))


def test_the_recipe_makes_an_olmoe_whose_routing_can_be_collected(tmp_path: Path) -> None:
    corpora = write_stdlib_corpora(tmp_path / "corpora", chars=20_000)
    out = tmp_path / "model"
    arguments = [f"corpora={corpora}", f"out={out}", "topology=olmoe", "locality=false", "steps=1"]
    arguments += ["batch_size=1", "seq_len=64", "vocab_size=300", "eval_windows=1"]
    arguments += ["sample_tokens=1", "held_out_fraction=0.1", "max_shard_mb=13"]
    metrics = run(parse_arguments(arguments))
    assert metrics["config"] == {
        "num_hidden_layers": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    }
    assert len(metrics["layers"]) == 16
    assert "locality_coef" not in metrics["training"]["curve"][0]
    shards = list(out.glob("*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < 14_000_000 for shard in shards)
    card = " ".join((out / "README.md").read_text(encoding="utf-8").split())
    assert "stock OLMoE architecture: 16 layers of 64 experts, top-8" in card
    assert "Its coefficient is at least 0.01 and rises" in card
    assert "Nothing pulls a token to the experts of its neighbours." in card
    assert "TINY_MOE_DIR" not in card

    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert type(loaded) is OlmoeForCausalLM
    assert (len(moe_layers(loaded)), probs_kind(loaded)) == (16, "softmax")
    spec = spec_of(loaded)
    assert (spec.num_layers, spec.num_experts, spec.top_k) == (16, 64, 8)
    assert (spec.hidden_size, spec.expert_intermediate_size) == (256, 32)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"text": "def f{number}(x):"}}\n' for number in range(3)))
    store = collect(
        model=str(out),
        dtype="auto",
        revision=None,
        source=Jsonl(path=str(prompts)),
        out=tmp_path / "store",
        settings=CollectSettings(max_prompt_tokens=8, max_new_tokens=2, keep_router_probs=True),
        device="cpu",
    )
    assert len(store) == 3
    assert store[0].router_probs_TLE.shape == (store[0].num_tokens, 16, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["corpora=a", "out=b", "topology=mixtral"], "topology='mixtral' is not one of"),
        (["corpora=a"], "missing out=DIR"),
        (["corpora=a", "out=b", "stepz=3"], "stepz=3.*steps"),
        (["corpora=a", "out=b", "steps"], "expected key=value"),
        (["corpora=a", "out=b", "steps=many"], "steps=many: expected int"),
        (["corpora=a", "out=b", "smoke=yes"], "smoke=yes: expected true or false"),
        (["corpora=a", "out=b", "steps=0"], "steps=0 must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(arguments)


def test_smoke_replaces_sizes_but_not_what_is_already_smaller() -> None:
    recipe = Recipe(corpora=Path("a"), out=Path("b"), smoke=True, steps=3).sized()
    assert (recipe.steps, recipe.seq_len, recipe.max_chars) == (3, 128, 300_000)
