"""What an engine must know of a model before it runs: how long a sequence may be, and what ends it.

Knows nothing of requests.
"""

from typing import Any


def context_tokens(config: Any, wanted: int | None) -> int:
    """The context in tokens: what the user wants within what the model's positions allow."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if wanted is None and limit is None:
        raise ValueError(
            "max_context_tokens is needed: the model's config has no max_position_embeddings"
        )
    if wanted is not None and (wanted < 2 or (limit is not None and wanted > limit)):
        upper = "" if limit is None else f" and at most max_position_embeddings={limit}"
        raise ValueError(f"max_context_tokens={wanted}: must be at least 2{upper}")
    context = wanted or limit
    assert context is not None
    return context


def eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end a sequence in ``model.generate``, or the tokenizer's where it names none."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        eos = tokenizer.eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or ())
