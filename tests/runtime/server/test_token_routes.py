"""``/tokenize`` and ``/detokenize`` in vLLM's shapes."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.runtime.server.clients import NAME, error_of

CHAT = [{"role": "user", "content": "Hello"}]


def test_a_prompt_becomes_the_ids_that_a_completion_reads(tiny: TestClient, tokenizer: Any) -> None:
    reply = tiny.post("/tokenize", json={"model": NAME, "prompt": "The weather"}).json()
    ids = tokenizer("The weather").input_ids
    assert reply == {"count": len(ids), "max_model_len": 2048, "tokens": ids, "token_strs": None}
    bare = tiny.post("/tokenize", json={"prompt": "The weather", "add_special_tokens": False})
    assert bare.json()["tokens"] == tokenizer("The weather", add_special_tokens=False).input_ids


def test_messages_become_the_ids_that_a_chat_reads(tiny: TestClient, tokenizer: Any) -> None:
    for generates in (True, False):
        body = {"messages": CHAT, "add_generation_prompt": generates, "return_token_strs": True}
        reply = tiny.post("/tokenize", json=body).json()
        expected = tokenizer.apply_chat_template(
            CHAT, add_generation_prompt=generates, return_dict=False
        )
        assert reply["tokens"] == expected
        assert reply["token_strs"] == tokenizer.convert_ids_to_tokens(expected)


def test_ids_become_the_text_again(tiny: TestClient) -> None:
    ids = tiny.post("/tokenize", json={"prompt": "Grüße, 世界!"}).json()["tokens"]
    assert tiny.post("/detokenize", json={"tokens": ids}).json() == {
        "prompt": "<|bos|>Grüße, 世界!"
    }
    assert tiny.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": CHAT}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "a", "mm_processor_kwargs": {}}, 400, "mm_processor_kwargs"),
        ("/tokenize", {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages"),
        ("/detokenize", {"tokens": [4096]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "model"),
    ],
    ids=str,
)
def test_a_bad_request_is_refused_by_name(
    tiny: TestClient, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    reply = tiny.post(path, json=body)
    assert (reply.status_code, error_of(reply)["param"]) == (status, param)
