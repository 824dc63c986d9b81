"""The corpus that the recipe reads: documents, splits, chats and weights."""

import json
from pathlib import Path

import pytest

from data.errors import MalformedInputError
from data.tiny_moe.corpus import (
    Document,
    encode_documents,
    parse_dialogue,
    passage_chats,
    read_domains,
    sampling_weights,
    split_documents,
)
from data.tiny_moe.tokenizer import SPECIAL_TOKENS


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
