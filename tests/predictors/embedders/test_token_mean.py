import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from data.errors import ModelNotFoundError
from predictors.embedders.token_mean import TokenMeanEmbedder

VOCAB = {"<bos>": 0, "cats": 1, "ships": 2, "law": 3}
ROWS_VS = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])


def write_model(folder: Path, *, sharded: bool = False, rows_VS: torch.Tensor = ROWS_VS) -> str:
    """A checkpoint with a tokenizer that puts BOS before every text."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    embedding = {"model.embed_tokens.weight": rows_VS.bfloat16()}
    other = {"model.layers.0.mlp.weight": torch.zeros(3, 3)}
    if sharded:
        save_file(embedding, folder / "model-1.safetensors")
        save_file(other, folder / "model-2.safetensors")
        shards = dict.fromkeys(embedding, "model-1.safetensors")
        shards |= dict.fromkeys(other, "model-2.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    else:
        save_file(embedding | other, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_text_is_the_unit_mean_of_its_tokens_rows(tmp_path: Path, sharded: bool) -> None:
    embedder = TokenMeanEmbedder(model=write_model(tmp_path / "m", sharded=sharded))
    vectors_NS = embedder.embed(["cats", "cats ships", "ships cats"])
    half = np.sqrt(0.5)
    assert vectors_NS == pytest.approx(np.array([[1, 0], [half, half], [half, half]]), abs=1e-3)
    assert vectors_NS.dtype == np.float32


def test_bos_is_left_out(tmp_path: Path) -> None:
    """BOS starts every prompt: with it, or with the first token alone, all prompts look alike."""
    embedder = TokenMeanEmbedder(model=write_model(tmp_path / "m"))
    cats, law = embedder.embed(["cats", "law"])
    assert cats @ law == pytest.approx(-1.0)


def test_an_empty_text_is_zeros(tmp_path: Path) -> None:
    embedder = TokenMeanEmbedder(model=write_model(tmp_path / "m"))
    assert embedder.embed([""]).tolist() == [[0.0, 0.0]]
    assert embedder.embed([]).shape == (0, 2)


def test_long_texts_are_not_cut(tmp_path: Path) -> None:
    embedder = TokenMeanEmbedder(model=write_model(tmp_path / "m"))
    vector_S = embedder.embed(["cats " * 2000 + "ships " * 2000])[0]
    assert vector_S == pytest.approx([np.sqrt(0.5)] * 2, abs=1e-3)


def test_the_fingerprint_follows_the_weights_and_not_the_path(tmp_path: Path) -> None:
    one, copy, other = (
        TokenMeanEmbedder(model=write_model(tmp_path / name, rows_VS=rows_VS)).fingerprint
        for name, rows_VS in (("a", ROWS_VS), ("b", ROWS_VS), ("c", ROWS_VS + 1))
    )
    assert one == copy != other


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no tokenizer\.json"):
        TokenMeanEmbedder(model=str(tmp_path))


def test_a_checkpoint_without_an_embedding_is_named(tmp_path: Path) -> None:
    folder = Path(write_model(tmp_path / "m"))
    save_file({"model.layers.0.mlp.weight": torch.zeros(3, 3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="holds 0 tensors named like an input embedding"):
        TokenMeanEmbedder(model=str(folder))


def test_an_unreachable_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="no-such/model"):
        TokenMeanEmbedder(model="no-such/model")


def test_single_tokens_are_rows_of_the_matrix_and_foreign_ids_are_refused(tmp_path: Path) -> None:
    embedder = TokenMeanEmbedder(model=write_model(tmp_path / "m"))
    rows_TS = embedder.embed_ids(torch.tensor([3, 0]))
    assert torch.allclose(rows_TS, torch.tensor([[-1.0, 0.0], [0.5**0.5, 0.5**0.5]]), atol=1e-3)
    with pytest.raises(ValueError, match=r"4\.\.4: .* has 0\.\.3"):
        embedder.embed_ids(torch.tensor([4]))
