"""Whether a model with offloaded experts computes what it computes with all of them in memory.

`record` runs a model over a prompt and some tokens of an answer, in the steps of serving: the
prompt at once, then token by token. `compare` sets two recordings side by side, layer by layer, so
that a fault shows in the layer where it begins. Knows nothing of how experts are offloaded.

Shape letters: T tokens · D hidden; N counts the embedding and every decoder layer, V is the
vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from data.tables import format_table

CHECK_PROMPT = (
    "The library opens at nine. Please write a short function that adds two numbers, and then "
    "explain in one sentence what the weather has to do with it: 3 + 4 = 7.\n"
)
NUM_ANSWER_TOKENS = 16
# Rounding of one layer against the layer's largest value; kernels add up in another order.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True)
class Recording:
    """What a model computed.

    Attributes:
        token_ids: The prompt and the greedy answer.
        num_prompt_tokens: How many of them are the prompt.
        hidden_NTD: float32, after the embedding and after each decoder layer (the last one
            normalised), of every token but the last, which was not read.
        logits_TV: float32, after each of those tokens.
        dtype: What it was computed in.
    """

    token_ids: list[int]
    num_prompt_tokens: int
    hidden_NTD: Tensor
    logits_TV: Tensor
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """How two recordings differ in one layer.

    Attributes:
        name: The layer.
        largest: Largest absolute difference of any value.
        relative: That, as a share of the layer's largest absolute value.
        within: Whether it is rounding.
    """

    name: str
    largest: float
    relative: float
    within: bool


@dataclass(frozen=True, slots=True)
class CheckResult:
    """A comparison.

    Attributes:
        layers: Embedding, decoder layers and logits, in order.
        num_same_tokens: Of how many tokens both say the same is the most probable.
        num_tokens: Of how many there are.
        tolerance: The relative difference that is rounding in this dtype.
    """

    layers: list[LayerDifference]
    num_same_tokens: int
    num_tokens: int
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether all layers are within, and all tokens the same."""
        return all(layer.within for layer in self.layers) and (
            self.num_same_tokens == self.num_tokens
        )


@torch.inference_mode()
def record(
    model: Any, prompt_ids: Sequence[int], *, answer_ids: Sequence[int] | None = None
) -> Recording:
    """Run ``model`` over a prompt and an answer, step by step.

    Args:
        model: A causal language model of transformers, in eval mode.
        prompt_ids: The prompt.
        answer_ids: What is read after it, whatever the model would say; None for its own greedy
            answer of `NUM_ANSWER_TOKENS`.
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    ids, fed = list(prompt_ids), 0
    num_answer = NUM_ANSWER_TOKENS if answer_ids is None else len(answer_ids)
    hidden, logits = [], []
    for step in range(num_answer):
        output = model(
            input_ids=torch.tensor([ids[fed:]], device=model.device),
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
        )
        hidden.append(torch.stack([layer[0].float().cpu() for layer in output.hidden_states]))
        logits.append(output.logits[0].float().cpu())
        fed = len(ids)
        ids.append(int(logits[-1][-1].argmax()) if answer_ids is None else answer_ids[step])
    return Recording(
        token_ids=ids,
        num_prompt_tokens=len(prompt_ids),
        hidden_NTD=torch.cat(hidden, dim=1),
        logits_TV=torch.cat(logits),
        dtype=model.dtype,
    )


def compare(resident: Recording, offloaded: Recording) -> CheckResult:
    """Set two recordings of the same tokens side by side.

    Raises:
        ValueError: They are of different tokens.
    """
    if resident.token_ids != offloaded.token_ids:
        raise ValueError(
            "the two recordings are of different tokens: record the second with the "
            "first one's answer"
        )
    tolerance = _TOLERANCE.get(resident.dtype, max(_TOLERANCE.values()))
    num_hidden = len(resident.hidden_NTD)
    names = ["embedding", *(f"layer {i}" for i in range(num_hidden - 1)), "logits"]
    pairs = [
        *zip(resident.hidden_NTD, offloaded.hidden_NTD, strict=True),
        (resident.logits_TV, offloaded.logits_TV),
    ]
    layers = []
    for name, (expected, got) in zip(names, pairs, strict=True):
        largest = float((expected - got).abs().max())
        relative = largest / max(float(expected.abs().max()), 1e-30)
        # Not "relative > tolerance is wrong": nan compares false, and is wrong.
        layers.append(LayerDifference(name, largest, relative, relative <= tolerance))
    same_T = resident.logits_TV.argmax(-1) == offloaded.logits_TV.argmax(-1)
    start = resident.num_prompt_tokens - 1  # what is generated; ties within a prompt are no fault
    return CheckResult(layers, int(same_T[start:].sum()), len(same_T[start:]), tolerance)


def format_check(result: CheckResult) -> str:
    """The comparison as a table, with its verdict in the last line."""
    rows = [
        [
            layer.name,
            f"{layer.largest:.3g}",
            f"{layer.relative:.2e}",
            "same" if layer.largest == 0 else "rounding" if layer.within else "WRONG",
        ]
        for layer in result.layers
    ]
    table = format_table(["", "largest difference", "relative", ""], rows)
    return (
        f"{table}\n\n{result.num_same_tokens} of {result.num_tokens} greedy tokens are the same; "
        f"a relative difference of {result.tolerance:g} is rounding\n"
        f"check {'passed' if result.passed else 'FAILED'}"
    )
