"""The embedded model's tokenizer and chat template."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data.tiny_moe.tokenizer import SPECIAL_TOKENS, token_num_bytes
from tests.data.tiny_moe_fakes import CHINESE, GERMAN, LATEX


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
