"""The embedded model as shipped, and the recipe that makes it."""

import json
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from data.adapters import moe_layers, probs_kind, spec_of
from data.collect import run as collect
from data.errors import MalformedInputError, OutputExistsError
from data.sources.jsonl import Jsonl
from data.store import CollectSettings
from data.tiny_moe import TINY_MOE_DIR
from data.tiny_moe.card import render_card
from data.tiny_moe.corpus import (
    Document,
    encode_documents,
    parse_dialogue,
    passage_chats,
    read_domains,
    sampling_weights,
    split_documents,
)
from data.tiny_moe.evaluate import (
    domain_distances_L,
    expert_shares_LE,
    popularity_recall_L,
    previous_token_recall_L,
    run_windows,
    windows,
)
from data.tiny_moe.recipe import Recipe, parse_arguments, run
from data.tiny_moe.router_loss import (
    Controller,
    RouterLoss,
    RouterTargets,
    balance_loss_L,
    locality_loss_L,
)
from data.tiny_moe.routing import DENSE_EXPERTS, RouterTap, expert_share_LE
from data.tiny_moe.tokenizer import SPECIAL_TOKENS, token_num_bytes
from data.tiny_moe.training import TrainSettings, train

STDLIB = Path(sysconfig.get_path("stdlib"))
CHINESE = """靜夜思
李白
床前明月光，疑是地上霜。
舉頭望明月，低頭思故鄉。

春曉
孟浩然
春眠不覺曉，處處聞啼鳥。
夜來風雨聲，花落知多少。
"""
GERMAN = """§ 1 Geltungsbereich

(1) Dieses Gesetz gilt für die Zulassung von Fahrzeugen zum Verkehr auf öffentlichen Straßen.

(2) Die zuständige Behörde kann Ausnahmen zulassen.
"""
LATEX = r"""\begin{lemma}
\label{lemma-flat}
Let $f : X \to Y$ be a flat morphism of schemes. Then $f^*$ is exact.
\end{lemma}
"""


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLM:
    """The shipped weights, with the experts forward that is fastest on long texts."""
    shipped = AutoModelForCausalLM.from_pretrained(TINY_MOE_DIR, dtype=torch.float32)
    shipped.set_experts_implementation(DENSE_EXPERTS)
    return shipped


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MOE_DIR)


def toy_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            norm_topk_prob=True,
            tie_word_embeddings=True,
        )
    )


def toy_olmoe(*, num_layers: int = 2) -> OlmoeForCausalLM:
    torch.manual_seed(0)
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=8,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def write_stdlib_corpora(folder: Path, *, chars: int) -> Path:
    """Two domains out of the running Python's own library: sources, and prose from docstrings."""
    sources = [
        (STDLIB / f"{name}.py").read_text() for name in ("argparse", "ast", "typing", "enum")
    ]
    prose = (STDLIB / "pydoc_data" / "topics.py").read_text().replace("\\n", "\n")
    folder.mkdir()
    for name, text in (("code", "".join(sources)), ("prose", prose)):
        rows = [
            json.dumps({"id": f"{name}-{start}", "text": text[start : start + 1000]})
            for start in range(0, chars, 1000)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


# The checkpoint as shipped


def test_the_shipped_model_is_small_and_every_layer_is_a_mixture(model) -> None:
    assert sum(path.stat().st_size for path in TINY_MOE_DIR.iterdir()) <= 20_000_000
    assert type(model) is Qwen3MoeForCausalLM
    assert model.config.tie_word_embeddings
    routers = [layer.mlp.gate for layer in model.model.layers]
    assert [(router.num_experts, router.top_k) for router in routers] == [(32, 4)] * 8


def test_the_shipped_model_has_learned_python(model, tokenizer) -> None:
    text = (STDLIB / "argparse.py").read_text()[:3000]
    loss_NT, _ = run_windows(model, np.array([tokenizer(text)["input_ids"]]), batch_size=1)
    assert loss_NT.mean() < 3.0 < np.log(model.config.vocab_size)


def test_it_writes_on_greedily_and_ends_a_chat_turn(model, tokenizer) -> None:
    prompt = tokenizer("import os\n\n\ndef main():\n", return_tensors="pt")
    ids_BT = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    continuation = tokenizer.decode(ids_BT[0, prompt["input_ids"].shape[1] :])
    assert continuation.startswith("    ")
    assert continuation.strip()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "I need to find a restaurant in San Francisco."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids_BT = model.generate(**chat, max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(ids_BT[0, chat["input_ids"].shape[1] :])
    assert answer.endswith("?<|end|>")


def test_every_expert_is_used_on_a_small_sample_of_text(model, tokenizer) -> None:
    texts = [(STDLIB / "argparse.py").read_text()[:7000], CHINESE, GERMAN, LATEX]
    counts_LE = np.zeros((8, 32))
    for text in texts:
        ids_NT = np.array([tokenizer(text)["input_ids"]])
        _, routes_NTLK = run_windows(model, ids_NT, batch_size=1)
        counts_LE += expert_shares_LE(routes_NTLK, num_experts=32) * routes_NTLK[:, :, 0].size
    assert (counts_LE > 0).all()


def test_domains_route_differently(model, tokenizer) -> None:
    shares_MLE = []
    for text in ((STDLIB / "argparse.py").read_text()[:4000], GERMAN * 4):
        ids_NT = np.array([tokenizer(text)["input_ids"]])
        _, routes_NTLK = run_windows(model, ids_NT, batch_size=1)
        shares_MLE.append(expert_shares_LE(routes_NTLK, num_experts=32))
    variation_L, divergence_L = domain_distances_L(np.stack(shares_MLE))
    assert variation_L.min() > 0.3
    assert divergence_L.min() > 0.1


@pytest.mark.parametrize("implementation", ["grouped_mm", DENSE_EXPERTS])
def test_experts_implementations_agree_with_the_stock_loop(
    model, tokenizer, implementation: str
) -> None:
    ids_BT = torch.tensor([tokenizer(GERMAN)["input_ids"]])
    before = model.config._experts_implementation
    try:
        with torch.no_grad():
            model.set_experts_implementation("eager")
            expected = model(ids_BT).logits
            model.set_experts_implementation(implementation)
            actual = model(ids_BT).logits
    finally:
        model.set_experts_implementation(before)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_the_card_is_the_one_its_metrics_give() -> None:
    metrics = json.loads((TINY_MOE_DIR / "metrics.json").read_text(encoding="utf-8"))
    assert (TINY_MOE_DIR / "README.md").read_text(encoding="utf-8") == render_card(metrics)
    assert sum(row["dead_experts"] for row in metrics["layers"]) == 0
    previous = np.mean([row["previous_token_recall"] for row in metrics["layers"]])
    assert (
        previous > 2 * metrics["config"]["num_experts_per_tok"] / metrics["config"]["num_experts"]
    )


# Tokenizer and chat template


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_without_special_tokens_survives_the_tokenizer(tokenizer, text: str) -> None:
    assume(not any(token in text for token in SPECIAL_TOKENS))
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_id_stands_for_a_known_number_of_bytes(tokenizer) -> None:
    num_bytes = token_num_bytes(tokenizer)
    assert len(num_bytes) == len(tokenizer) == 4096
    assert num_bytes.count(0) == len(SPECIAL_TOKENS)
    for text in (CHINESE, GERMAN, LATEX):
        ids = tokenizer(text)["input_ids"]
        assert sum(num_bytes[i] for i in ids) == len(text.encode())


def test_a_prompt_that_ends_in_a_line_break_is_cut_like_the_same_text_further_on(tokenizer) -> None:
    prompt, rest = "def f(x):\n", "    return x\n"
    ids = tokenizer(prompt)["input_ids"]
    assert tokenizer(prompt + rest)["input_ids"][: len(ids)] == ids


def test_the_chat_template_renders_roles_and_the_opening_of_the_answer(tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi \n"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("<|bos|><|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    with pytest.raises(Exception, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


# Corpus


def test_the_split_is_by_document_whatever_the_order() -> None:
    documents = [Document(id=f"d{number}", text=str(number)) for number in range(100)]
    train_documents, held_out = split_documents(documents, held_out_fraction=0.1)
    again = split_documents(documents[::-1], held_out_fraction=0.1)
    assert (train_documents, held_out) == again
    assert len(held_out) == 10
    assert {d.id for d in train_documents}.isdisjoint(d.id for d in held_out)
    assert {d.id for d in [*train_documents, *held_out]} == {d.id for d in documents}
    with pytest.raises(ValueError, match="held_out_fraction=1"):
        split_documents(documents, held_out_fraction=1)


def test_a_long_line_that_repeats_is_kept_once(tmp_path: Path) -> None:
    line = "a passage that a careless corpus holds twice " * 3
    rows = [{"id": f"d{number}", "text": f"{number}\n{line}\nend"} for number in range(4)]
    (tmp_path / "web.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (domain,) = read_domains(tmp_path, held_out_fraction=0.25)
    texts = [document.text for document in [*domain.train, *domain.held_out]]
    assert sum(text.count(line) for text in texts) == 1
    assert all(text.endswith("end") for text in texts)


@pytest.mark.parametrize("line", ['{"id": "b"}', "not json", '{"id": 1, "text": "x"}', "[]"])
def test_a_malformed_corpus_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "web.jsonl"
    path.write_text('{"id": "a", "text": "x"}\n' + line + "\n")
    with pytest.raises(MalformedInputError, match="line 2") as caught:
        read_domains(tmp_path, held_out_fraction=0.5)
    assert (caught.value.path, caught.value.line) == (path, 2)


def test_a_folder_without_corpora_and_a_domain_of_one_document_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no .jsonl"):
        read_domains(tmp_path, held_out_fraction=0.5)
    (tmp_path / "web.jsonl").write_text('{"id": "a", "text": "x"}\n')
    with pytest.raises(ValueError, match="too few documents"):
        read_domains(tmp_path, held_out_fraction=0.5)


def test_real_corpora_are_read_from_zstd(shared_data: Path) -> None:
    domains = read_domains(shared_data / "corpora", held_out_fraction=0.03, max_chars=5000)
    assert len(domains) == 15
    assert all(domain.train and domain.held_out for domain in domains)


def test_dialogues_become_chats_and_passages_of_other_texts_too(tokenizer) -> None:
    dialogue = Document(id="a", text="USER: I want\nto eat.\nSYSTEM: Where?\nUSER: Here.")
    messages = parse_dialogue(dialogue)
    assert messages is not None
    turns = [message for message in messages if message["role"] != "system"]
    assert turns == [
        {"role": "user", "content": "I want\nto eat."},
        {"role": "assistant", "content": "Where?"},
        {"role": "user", "content": "Here."},
    ]
    prose = Document(id="b", text="".join(f"This is line {number}.\n" for number in range(5000)))
    assert parse_dialogue(prose) is None
    chats = passage_chats(prose)
    assert len(chats) == len(prose.text) // 20_000 + 1
    for chat in chats:
        user, assistant = chat[-2:]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"] + assistant["content"] in prose.text
    stream = encode_documents([dialogue, prose], tokenizer, chats=True)
    special = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    assert (
        (stream == special["<|bos|>"]).sum()
        == (stream == special["<|eos|>"]).sum()
        == (2 + len(chats))
    )


def test_special_tokens_written_out_in_a_text_stay_text(tokenizer) -> None:
    document = Document(id="a", text="the token <|end|> ends a turn")
    stream = encode_documents([document], tokenizer, chats=False)
    assert tokenizer.convert_tokens_to_ids("<|end|>") not in stream
    assert tokenizer.decode(stream[1:-1]) == document.text


def test_small_domains_are_sampled_more_than_their_size_but_within_the_cap() -> None:
    weights = sampling_weights([1, 99, 900], exponent=0.5, max_oversampling=2.0)
    assert weights.sum() == pytest.approx(1)
    assert weights[0] > 0.001
    assert weights[1] > 0.099
    assert weights[0] / weights[2] == pytest.approx(0.002 / (30 / (1 + 99**0.5 + 30)))


# Routing: losses, control and figures


@pytest.mark.parametrize("make", [toy_model, toy_olmoe])
def test_the_tap_sees_what_the_routers_choose_and_leaves_nothing_behind(make) -> None:
    toy = make()
    before = [set(vars(layer.mlp.gate)) for layer in toy.model.layers]
    with RouterTap(toy) as tap, torch.no_grad():
        toy(torch.arange(10)[None])
        logits_LTE, ids_LTK = tap.logits_LTE(), tap.expert_ids_LTK()
    assert logits_LTE.shape == (2, 10, 8)
    assert torch.equal(logits_LTE.topk(2).indices, ids_LTK)
    assert [set(vars(layer.mlp.gate)) for layer in toy.model.layers] == before
    assert all(not layer.mlp.gate._forward_hooks for layer in toy.model.layers)


def test_balance_is_one_when_even_and_grows_with_crowding() -> None:
    even_LTE = torch.full((1, 4, 4), 0.25)
    assert balance_loss_L(even_LTE, torch.full((1, 4), 0.25)).tolist() == [1.0]
    crowded_LTE = torch.tensor([[[1.0, 0, 0, 0]]])
    assert balance_loss_L(crowded_LTE, crowded_LTE[:, 0]).tolist() == [4.0]


def test_locality_is_the_entropy_of_usage_within_a_passage() -> None:
    alternating_LTE = torch.eye(2).repeat(2, 1)[None]
    settled_LTE = torch.eye(2).repeat_interleave(2, 0)[None]
    assert locality_loss_L(alternating_LTE, chunk=2).item() == pytest.approx(np.log(2))
    assert locality_loss_L(settled_LTE, chunk=2).item() == 0.0


def test_a_controller_raises_what_is_below_target_and_lowers_what_is_above() -> None:
    controller = Controller(torch.ones(3), target=0.5, least=0.9, most=1.2, rate=0.1)
    coef_L = controller.update(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(coef_L, torch.tensor([1.1052, 1.0, 0.9048]), atol=1e-4, rtol=0)
    for _ in range(5):
        coef_L = controller.update(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(coef_L, torch.tensor([1.2, 1.0, 0.9]))


def test_load_balancing_does_not_fall_below_its_least_coefficient() -> None:
    even_LTE = torch.eye(8).roll(1, 1)[None] + torch.eye(8)[None]
    for least in (1e-4, 0.01):
        router_loss = RouterLoss(
            num_layers=1,
            num_experts=8,
            device=torch.device("cpu"),
            targets=RouterTargets(previous_token_recall=None, least_balance_coef=least),
        )
        for _ in range(800):
            router_loss(even_LTE, even_LTE.topk(2).indices[:, None])
        assert router_loss.summary()["balance_coef"] == pytest.approx(least)


def test_without_a_recall_target_neighbours_do_not_matter_to_the_router_loss() -> None:
    def loss(recall: float | None, order_T: torch.Tensor) -> float:
        targets = RouterTargets(previous_token_recall=recall, chunk=16)
        router_loss = RouterLoss(
            num_layers=1, num_experts=8, device=torch.device("cpu"), targets=targets
        )
        logits_LTE = logits_TE[order_T][None]
        ids_LBTK = logits_LTE.topk(2).indices[:, None]
        value = router_loss(logits_LTE, ids_LBTK).item()
        assert ("locality_coef" in router_loss.summary()) == (recall is not None)
        return value

    torch.manual_seed(0)
    logits_TE = 4 * torch.eye(8).repeat_interleave(16, 0) + torch.rand(128, 8)
    sorted_T, mixed_T = torch.arange(128), torch.randperm(128)
    assert loss(None, sorted_T) == pytest.approx(loss(None, mixed_T), abs=1e-6)
    assert loss(0.38, sorted_T) < loss(0.38, mixed_T) - 1e-4


def test_figures_of_a_route_that_can_be_counted_by_hand() -> None:
    routes_NTLK = np.array([[[[0, 1]], [[1, 2]], [[1, 2]], [[3, 0]]]], np.uint8)
    share_LE = expert_shares_LE(routes_NTLK, num_experts=5)
    np.testing.assert_allclose(share_LE, [[2 / 8, 3 / 8, 2 / 8, 1 / 8, 0]])
    ids_LTK = torch.from_numpy(routes_NTLK[0].astype(np.int64)).transpose(0, 1)
    np.testing.assert_allclose(expert_share_LE(ids_LTK, num_experts=5), share_LE)
    np.testing.assert_allclose(previous_token_recall_L(routes_NTLK), [(1 + 2 + 0) / 6])
    popular_LE = np.array([[0.1, 0.5, 0.4, 0.0, 0.0]])
    np.testing.assert_allclose(popularity_recall_L(routes_NTLK, popular_LE), [5 / 8])
    apart_MLE = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    variation_L, divergence_L = domain_distances_L(apart_MLE)
    assert (variation_L.tolist(), divergence_L.tolist()) == ([1.0], [1.0])


def test_windows_do_not_overlap_and_span_the_stream() -> None:
    ids_NT = windows(np.arange(100), seq_len=10, most=4)
    assert ids_NT[:, 0].tolist() == [0, 30, 60, 90]
    assert windows(np.arange(7), seq_len=10, most=4).tolist() == [list(range(7))]


# Training and the whole recipe


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
