"""The served model's own token embeddings, averaged over the prompt.

Needs no second model and no forward pass: one tensor of the checkpoint and its tokenizer.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import normalize

from data.errors import ModelNotFoundError
from data.files import sha256_file
from data.tiny_moe import TINY_MOE_DIR
from predictors.embedders.base import Embedder, normalized_NS

EMBEDDED = "tiny_moe"
_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight")
_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"


class TokenMeanEmbedder(Embedder):
    """Mean of the rows of a causal LM's input embedding matrix, over all tokens of the text.

    Source: FineMoE §4.2.1, which takes "the embedding layer's output" of an iteration and does not
    say how a prompt of many tokens becomes one vector. The first token alone would fail: it is BOS
    in every prompt. So all tokens are averaged, and special tokens that a tokenizer adds by itself
    are left out. There is no truncation.

    Args:
        model: Folder or hub id of a causal LM with safetensors and tokenizer.json, or "tiny_moe"
            for the model that ships with the project. The served model is the natural choice.

    Raises:
        ModelNotFoundError: Neither a folder nor a hub id, or it lacks one of those files.
    """

    kind: ClassVar[str] = "token_mean"

    def __init__(self, *, model: str = EMBEDDED) -> None:
        self.model = model
        source = str(TINY_MOE_DIR) if model == EMBEDDED else model
        tokenizer_path = _file(source, "tokenizer.json")
        self._tokenizer = Tokenizer.from_file(str(tokenizer_path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._rows_VS = _embedding_matrix(source)
        self.dim = int(self._rows_VS.shape[1])
        digest = hashlib.sha256(sha256_file(tokenizer_path).encode())
        digest.update(self._rows_VS.view(torch.uint8).numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """float32 [N, S], rows of length 1; a text without any token becomes a row of zeros."""
        means_NS = np.zeros((len(texts), self.dim), np.float32)
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for n, encoding in enumerate(encodings):
            if encoding.ids:
                rows_TS = self._rows_VS[torch.tensor(encoding.ids)]
                means_NS[n] = rows_TS.float().mean(dim=0).numpy()
        return normalized_NS(means_NS)

    def embed_ids(self, token_ids_T: Tensor) -> Tensor:
        """float32 [T, S], the matrix's own rows of int64 ids, each of length 1.

        Raises:
            ValueError: An id is not one of this model's.
        """
        if len(token_ids_T) and not 0 <= int(token_ids_T.min()) <= int(token_ids_T.max()) < len(
            self._rows_VS
        ):
            raise ValueError(
                f"token ids {int(token_ids_T.min())}..{int(token_ids_T.max())}: {self.model!r} has "
                f"0..{len(self._rows_VS) - 1}, so they were recorded with another tokenizer"
            )
        return normalize(self._rows_VS[token_ids_T].float(), dim=1)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"model": self.model}


def _embedding_matrix(source: str) -> Tensor:
    """[V, S] as stored: read from its shard alone, never the whole model."""
    try:
        shard_of = json.loads(_file(source, _INDEX).read_text())["weight_map"]
    except ModelNotFoundError:
        shard_of = {}
    if shard_of:
        shards = {name: shard for name, shard in shard_of.items() if name.endswith(_NAMES)}
        path = _file(source, next(iter(shards.values()), _WEIGHTS))
    else:
        path = _file(source, _WEIGHTS)
    with safe_open(path, framework="pt") as tensors:
        names = [name for name in tensors.keys() if name.endswith(_NAMES)]  # noqa: SIM118
        if len(names) != 1:
            raise ValueError(
                f"{path} holds {len(names)} tensors named like an input embedding "
                f"({', '.join(_NAMES)}): {names}; exactly one is needed"
            )
        matrix_VS: Tensor = tensors.get_tensor(names[0])
    return matrix_VS


def _file(source: str, name: str) -> Path:
    """The path of a model's file, downloaded if ``source`` is a hub id."""
    folder = Path(source)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise ModelNotFoundError(f"folder {source} holds no {name}")
        return folder / name
    try:
        return Path(hf_hub_download(source, name))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelNotFoundError(
            f"{name} of {source!r}: not a folder, and the hub or its cache cannot give it"
        ) from error
