"""guidellm puts the server under load: it counts no error, and every answer is the model's own."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.tiny_moe import TINY_MOE_DIR
from tests.runtime.server.processes import RunClient, ServerProcess

PROMPTS = ["The weather in", "def add(a, b):", "Dear customer", "1 + 1 =", "Once upon", "In law"]
NUM_REQUESTS, NUM_TOKENS = 24, 8


def greedy(model: Any, tokenizer: Any, prompt_ids: Any) -> str:
    """What the model says next, whether or not it would end there."""
    answer = model.generate(
        prompt_ids, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
    )
    text: str = tokenizer.decode(answer[0, prompt_ids.shape[1] :], skip_special_tokens=True)
    return text


def completed(body: dict[str, Any], model: Any, tokenizer: Any) -> str:
    return greedy(model, tokenizer, tokenizer(body["prompt"], return_tensors="pt").input_ids)


def chatted(body: dict[str, Any], model: Any, tokenizer: Any) -> str:
    (message,) = body["messages"]
    (part,) = message["content"]
    prompt_ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": part["text"]}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).input_ids
    return greedy(model, tokenizer, prompt_ids)


@pytest.mark.parametrize(
    ("route", "profile", "expected"),
    [
        ("/v1/completions", "kind=concurrent,streams=8", completed),
        ("/v1/chat/completions", "kind=poisson,rate=40", chatted),
    ],
    ids=["completions", "chat"],
)
def test_a_load_is_served_without_an_error_or_a_wrong_answer(
    server: ServerProcess,
    run_client: RunClient,
    model: Any,
    tokenizer: Any,
    tmp_path: Path,
    route: str,
    profile: str,
    expected: Any,
) -> None:
    asked = [
        {"prompt": f"{prompt} {number}", "output_tokens_count": NUM_TOKENS}
        for number in range(NUM_REQUESTS // len(PROMPTS))
        for prompt in PROMPTS
    ]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in asked))
    backend = {
        "kind": "openai_http",
        "target": server.address,
        "request_format": route,
        "extras": {"body": {"temperature": 0}},
    }
    generated = server.metric("vllm:generation_tokens_total")
    run_client(
        "guidellm",
        "run",
        f"--backend={json.dumps(backend)}",
        f"--profile={profile}",
        f"--constraint=kind=max_requests,count={NUM_REQUESTS}",
        f"--data=kind=json_file,path={data}",
        f"--tokenizer=kind=hf_auto,model={TINY_MOE_DIR}",
        f"--output=kind=json,path={tmp_path / 'report.json'}",
        "--disable-console",
    )
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    assert benchmark["metrics"]["request_totals"] == {
        "successful": NUM_REQUESTS,
        "errored": 0,
        "incomplete": 0,
        "total": NUM_REQUESTS,
    }
    answers = benchmark["requests"]["successful"]
    bodies = [json.loads(answer["request_args"])["body"] for answer in answers]
    assert len({json.dumps(body) for body in bodies}) == NUM_REQUESTS
    for body, answer in zip(bodies, answers, strict=True):
        assert answer["output"] == expected(body, model, tokenizer), body
        assert answer["output_tokens"] == NUM_TOKENS
    num_tokens = server.metric("vllm:generation_tokens_total") - generated
    assert num_tokens == NUM_REQUESTS * NUM_TOKENS
    assert server.metric("vllm:num_requests_running") == 0
