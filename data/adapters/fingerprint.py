"""Naming a checkpoint's architecture by the digest of its config.

Knows nothing of weights: two checkpoints trained from one config share a fingerprint, and the
same checkpoint keeps it whatever dtype or kernels it is loaded with.
"""

from typing import Any

from data.files import digest_json

_VOLATILE = frozenset(
    {
        "_name_or_path",
        "architectures",  # absent until a model built in memory is saved
        "attn_implementation",
        "dtype",
        "experts_implementation",
        "name_or_path",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def config_digest(config: Any) -> str:
    """Hex SHA-256 of a transformers config, without what only says how a model is loaded.

    Only values that differ from transformers' own defaults count, so that a field added by a later
    release does not rename every checkpoint. Left out: dtype, attention and experts
    implementation, names and paths, ``use_cache`` and every ``output_*`` switch.
    """
    return digest_json(_lasting(config.to_diff_dict()))


def _lasting(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        str(key): _lasting(item)
        for key, item in value.items()
        if key not in _VOLATILE and not str(key).startswith("output_")
    }
