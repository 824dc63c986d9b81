"""What the engine tells beside the tokens: how probable they were, and which experts read them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from data.observe import RouterRecorder
from runtime.engine import attach
from runtime.server.generation import GenerationEngine
from runtime.server.sampling import SamplingParams
from runtime.server.sequence import Piece
from tests.families import tiny_model
from tests.runtime.server.fakes import Listener, ScriptedModel, generate, submit_one

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def engine(model: Any, tokenizer: Any) -> Iterator[GenerationEngine]:
    engine = GenerationEngine(model=model, tokenizer=tokenizer)
    engine.start()
    yield engine
    engine.shutdown()


def pieces_of(engine: GenerationEngine, ids: list[int], **kwargs: Any) -> list[Piece]:
    listener = Listener()
    submit_one(engine, listener, prompt_ids=ids, **kwargs)
    said = listener.until_end()
    pieces = [piece for piece in said if isinstance(piece, Piece)]
    assert len(pieces) == len(said)
    return pieces


def test_sampled_tokens_equal_those_of_generate_under_every_processor(
    engine: GenerationEngine, model: Any, tokenizer: Any
) -> None:
    ids = tokenizer("The recipe needs").input_ids
    inputs = torch.tensor([ids])
    torch.manual_seed(3)
    expected = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=True,
        temperature=0.8,
        top_k=40,
        top_p=0.95,
        min_p=0.02,
        repetition_penalty=1.2,
        sequence_bias={(262,): 2.0},
        max_new_tokens=16,
        min_new_tokens=16,
    )[0, len(ids) :].tolist()
    sampling = SamplingParams(
        temperature=0.8,
        top_k=40,
        top_p=0.95,
        min_p=0.02,
        repetition_penalty=1.2,
        logit_bias={262: 2.0},
        min_tokens=16,
        seed=3,
    )
    assert generate(engine, ids, max_tokens=16, sampling=sampling)[0] == expected


def test_prompt_and_answer_are_as_probable_as_one_forward_pass_says(
    engine: GenerationEngine, model: Any, tokenizer: Any
) -> None:
    ids = tokenizer("Dear customer, your booking").input_ids
    sampling = SamplingParams(temperature=0.0, num_logprobs=3)
    pieces = pieces_of(engine, ids, max_tokens=6, sampling=sampling, prompt_logprobs=2)
    all_ids = [*ids, *(piece.token_id for piece in pieces)]
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([all_ids])).logits[0].log_softmax(-1)
    told_prompt = pieces[0].prompt_logprobs
    assert told_prompt is not None
    told = [*told_prompt, *(piece.logprobs for piece in pieces if piece.logprobs)]
    assert [token.token_id for token in told] == all_ids[1:]
    expected = [float(logprobs_TV[i, token]) for i, token in enumerate(all_ids[1:])]
    assert [token.logprob for token in told] == pytest.approx(expected, abs=1e-4)
    assert [len(token.top) for token in told] == [2] * (len(ids) - 1) + [3] * 6
    assert all(piece.prompt_logprobs is None for piece in pieces[1:])


def test_a_long_prompt_is_told_as_a_short_one_and_never_read_at_once(
    engine: GenerationEngine, model: Any
) -> None:
    torch.manual_seed(0)
    ids = torch.randint(10, 4000, (1100,)).tolist()
    widths = []
    hook = model.register_forward_hook(lambda *passed: widths.append(passed[2].logits.shape[1]))
    try:
        pieces = pieces_of(
            engine, ids, max_tokens=2, sampling=GREEDY, prompt_logprobs=0, routed_experts=True
        )
    finally:
        hook.remove()
    assert widths == [512, 512, 76, 1]
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    told = pieces[0].prompt_logprobs
    assert told is not None
    expected = [float(logprobs_TV[i, token]) for i, token in enumerate(ids[1:])]
    assert [token.logprob for token in told] == pytest.approx(expected, abs=1e-3)
    assert pieces[0].token_id == int(logprobs_TV[-1].argmax())
    assert pieces[0].routed_experts_TLK is not None
    assert len(pieces[0].routed_experts_TLK) == len(ids)


def test_nothing_is_told_that_was_not_asked_for(engine: GenerationEngine) -> None:
    for piece in pieces_of(engine, [10, 11], max_tokens=2, sampling=GREEDY):
        assert piece.logprobs is None
        assert piece.prompt_logprobs is None
        assert piece.routed_experts_TLK is None


def test_the_routing_is_that_of_the_tokens_that_were_read(
    engine: GenerationEngine, model: Any, tokenizer: Any
) -> None:
    ids = tokenizer("def add(a, b):").input_ids
    pieces = pieces_of(engine, ids, max_tokens=4, sampling=GREEDY, routed_experts=True)
    routed = [piece.routed_experts_TLK for piece in pieces]
    assert [len(rows) for rows in routed if rows is not None] == [len(ids), 1, 1, 1]
    all_ids = [*ids, *(piece.token_id for piece in pieces[:-1])]
    with RouterRecorder(model, keep_router_probs=False) as recorder, torch.no_grad():
        model(torch.tensor([all_ids]))
        expected_NLK = recorder.take().ids_NLK
    told_NLK = torch.cat([torch.from_numpy(rows) for rows in routed if rows is not None])
    assert torch.equal(told_NLK.sort(-1).values, expected_NLK.short().sort(-1).values)


def test_offloaded_models_tell_their_routing_and_dense_layers_are_zero(tokenizer: Any) -> None:
    model = tiny_model("deepseek_v3", first_k_dense_replace=1)
    with attach(model, policy="lru", slots=4) as offload:
        engine = GenerationEngine(model=model, tokenizer=tokenizer, offload=offload)
        assert engine.tells_routing
        engine.start()
        try:
            (piece,) = pieces_of(engine, [5, 6, 7], max_tokens=1, routed_experts=True)
        finally:
            engine.shutdown()
    assert piece.routed_experts_TLK is not None
    assert piece.routed_experts_TLK.shape == (
        3,
        model.config.num_hidden_layers,
        offload.spec.top_k,
    )
    used = piece.routed_experts_TLK.any(axis=(0, 2))
    assert list(used.nonzero()[0]) == list(offload.spec.decoder_layers)


def test_a_model_without_routers_says_that_it_cannot_tell(tokenizer: Any) -> None:
    assert not GenerationEngine(model=ScriptedModel([20]), tokenizer=tokenizer).tells_routing


def test_a_stop_string_is_not_seen_before_min_tokens(tokenizer: Any) -> None:
    ids = tokenizer("stop and stop again", add_special_tokens=False).input_ids
    engine = GenerationEngine(model=ScriptedModel(ids), tokenizer=tokenizer)
    engine.start()
    try:
        sampling = SamplingParams(temperature=0.0, min_tokens=len(ids) // 2)
        _, text, reason = generate(
            engine, [10], stops=["stop"], sampling=sampling, max_tokens=len(ids)
        )
    finally:
        engine.shutdown()
    assert (text, reason) == ("stop and ", "stop")
