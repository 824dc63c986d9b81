"""Loading the model whose routing is observed or served: embedded, from a folder or from the hub.

Every way that this can fail ends in one clear error, and a model without routed experts is refused
before its weights are read. Knows nothing of what is done with the model.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data.adapters import moe_layers
from data.errors import DamagedFileError, ModelNotFoundError, NotAMoEError
from data.tiny_moe import TINY_MOE_DIR

EMBEDDED = "tiny_moe"
DTYPES = ("auto", "float32", "bfloat16", "float16")

logger = logging.getLogger(__name__)


def load_model(where: str, *, dtype: str, revision: str | None = None) -> tuple[Any, Any]:
    """Load a causal language model with routed experts, on the CPU and in eval mode.

    Args:
        where: ``tiny_moe`` for the embedded model, a folder, or an id of the Hugging Face hub.
        dtype: One of `DTYPES`; "auto" as the checkpoint was saved.
        revision: Commit, tag or branch of a hub id; a commit keeps results reproducible.

    Returns:
        The transformers model and its tokenizer.

    Raises:
        ValueError: ``dtype`` is unknown, or ``revision`` is given for what is not on the hub.
        ModelNotFoundError: There is no such model here, nor within reach.
        NotAMoEError: It is no causal language model that routes through ``ExpertsInterface``.
        DamagedFileError: A file of a local model cannot be read.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    folder = TINY_MOE_DIR if where == EMBEDDED else Path(where).expanduser()
    is_local = folder.is_dir()
    if is_local and revision is not None:
        raise ValueError(f"revision={revision!r}: only a hub id has one, {where!r} is a folder")
    if is_local and not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"model {where!r}: the folder {folder} holds no config.json")
    if not is_local and revision is None:
        logger.warning("model %s: no revision is pinned, so what it names may change", where)
    name = str(folder) if is_local else where
    try:
        _refuse_without_experts(where, name, revision)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, SafetensorError) as error:
        why = _first_line(error)
        if not is_local:
            raise ModelNotFoundError(_advice(where, revision, why)) from None
        if damaged := _damaged_file(folder):
            raise damaged from None
        raise ModelNotFoundError(f"model {where!r} cannot be loaded: {why}") from None
    return model.eval(), tokenizer


def router_digest(model: Any) -> str:
    """Hex SHA-256 of all router weights: tells apart checkpoints that share a config.

    The routers are a thousandth of a model and decide what a trace holds; hashing them takes no
    time where hashing all weights would take minutes.
    """
    digest = hashlib.sha256()
    for moe in moe_layers(model):
        for name, tensor in sorted(moe.router.state_dict().items()):
            digest.update(f"{moe.layer}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            plain = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(plain.numpy().data)
    return digest.hexdigest()


def _refuse_without_experts(where: str, name: str, revision: str | None) -> None:
    """Build the model without weights and look; NotAMoEError names model and type."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except ValueError as error:  # a type that transformers does not know
        raise NotAMoEError(f"model {where!r}: {_first_line(error)}") from None
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except ValueError:
        raise NotAMoEError(
            f"model {where!r} is of type {config.model_type!r}, which is no causal language model"
        ) from None
    try:
        moe_layers(skeleton)
    except NotAMoEError as error:
        raise NotAMoEError(f"model {where!r}: {error}") from None


def _first_line(error: Exception) -> str:
    """What transformers says before its pages of advice."""
    return str(error).partition("\n")[0]


def _damaged_file(folder: Path) -> DamagedFileError | None:
    """The first file of a local model that cannot be read at all."""
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            return DamagedFileError(file, str(error))
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            return DamagedFileError(file, str(error))
    return None


def _advice(where: str, revision: str | None, why: str) -> str:
    pinned = "" if revision is None else f" --revision {revision}"
    return (
        f"model {where!r} is neither a folder nor to be had from the hub ({why}). Give the folder "
        f"of a downloaded model, or {EMBEDDED} for the embedded one; without a network, a hub "
        f"model must have been fetched before: hf download {where}{pinned}"
    )
