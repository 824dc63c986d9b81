"""Running a batch of requests through a model while reading what its routers decide.

`RouterRecorder` reads; `continue_batch` prefills and decodes, and works the same with or without a
recorder. Knows nothing of prompts' texts, stores or progress.

Shape letters: B requests · T tokens · L MoE layers · E experts per layer · K experts per token ·
P positions · V vocabulary · N routed rows.
"""

import hashlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from data.adapters import MoELayer, moe_layers, router_probs_TE


class Routing(NamedTuple):
    """What the routers said of N rows, in the order in which the model saw them.

    Attributes:
        ids_NLK: uint8 or int16, the experts that ran, in the router's order.
        probs_NLK: float16, their share of all E experts' probability.
        router_probs_NLE: float16, all E probabilities, or None if not kept.
    """

    ids_NLK: Tensor
    probs_NLK: Tensor
    router_probs_NLE: Tensor | None


class RouterRecorder:
    """Reads every router of a model by forward hooks, from entering to leaving the context.

    Leaving removes the hooks, also after an exception; the model is as it was.

    Args:
        model: A transformers model that routes through ``ExpertsInterface``.
        keep_router_probs: Keep the probabilities of all experts, not only of those that ran.

    Raises:
        NotAMoEError: The model has no routers.
    """

    def __init__(self, model: Any, *, keep_router_probs: bool) -> None:
        self._layers = moe_layers(model)
        self._keep_router_probs = keep_router_probs
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}
        self._recorded: list[Routing] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        """Install the hooks."""
        for moe in self._layers:
            self._handles.append(moe.router.register_forward_hook(self._hook(moe)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> Routing:
        """Everything recorded since the last `take`, on the CPU; every row of every forward.

        Raises:
            RuntimeError: Nothing was recorded, or some routers ran and others did not.
        """
        if self._pending or not self._recorded:
            raise RuntimeError(
                f"{len(self._pending)} of {len(self._layers)} routers ran since the last complete "
                f"forward, and {len(self._recorded)} forwards are complete"
            )
        ids, probs, router_probs = zip(*self._recorded, strict=True)
        self._recorded.clear()
        return Routing(
            torch.cat(ids).cpu(),
            torch.cat(probs).cpu(),
            torch.cat(router_probs).cpu() if self._keep_router_probs else None,
        )

    def _hook(self, moe: MoELayer) -> Any:
        def read(router: Any, arguments: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            logits, _, ids = output
            if moe.layer in self._pending:
                raise RuntimeError(f"the router of MoE layer {moe.layer} ran twice in one forward")
            self._pending[moe.layer] = (
                logits.reshape(-1, logits.shape[-1]),
                ids.reshape(-1, ids.shape[-1]),
            )
            if len(self._pending) == len(self._layers):
                self._condense()

        return read

    def _condense(self) -> None:
        """Bring one forward's logits to their final, small form: all layers in one operation."""
        outputs = [self._pending[moe.layer] for moe in self._layers]
        self._pending.clear()
        logits_NLE = torch.stack([logits for logits, _ in outputs], dim=1)
        ids_NLK = torch.stack([ids for _, ids in outputs], dim=1)
        num_experts = logits_NLE.shape[-1]
        # All layers of a model have one router class, so the first one's scoring is everyone's.
        probs_NLE = router_probs_TE(self._layers[0], logits_NLE.flatten(0, 1)).view_as(logits_NLE)
        self._recorded.append(
            Routing(
                ids_NLK.to(torch.uint8 if num_experts <= 256 else torch.int16),
                probs_NLE.gather(-1, ids_NLK.long()).half(),
                probs_NLE.half() if self._keep_router_probs else None,
            )
        )


@torch.inference_mode()
def continue_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[str] | None = None,
) -> list[list[int]]:
    """Prefill and decode some requests together, left-padded.

    A request's result does not depend on the others in its batch, but for float noise: positions
    count from its own first token, padding is masked, and it draws from its own random stream.

    Runs ``max(1, longest result)`` forwards: one of B x P rows (P the longest prompt, rows of one
    request together, padding first), then one of B rows for each decode step. The last token of a
    request is generated, not routed.

    Args:
        model: A causal language model of transformers, in eval mode.
        prompts: The token ids of each request; none may be empty.
        max_new_tokens: At most so many tokens a request; 0 runs the prompts alone.
        eos_token_ids: Tokens that end a request; they are part of its result.
        temperature: 0 takes the likeliest token.
        top_p: Sample among the likeliest tokens that together have this probability.
        seeds: Names each request's random stream; needed when ``temperature`` is not 0.

    Returns:
        The generated ids of each request.
    """
    device = model.device
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    ids_BP = torch.zeros((len(prompts), width), dtype=torch.long)
    mask_BP = torch.zeros_like(ids_BP)
    for row, prompt in enumerate(prompts):
        ids_BP[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BP[row, width - len(prompt) :] = 1
    uniforms_BT = None
    if temperature > 0:
        if seeds is None:
            raise ValueError(f"temperature={temperature}: sampling needs seeds")
        uniforms_BT = torch.from_numpy(
            np.stack([_random_stream(seed).random(max_new_tokens) for seed in seeds])
        ).to(device)

    generated: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    ids, mask, cache = ids_BP.to(device), mask_BP.to(device), None
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for step in range(max(1, max_new_tokens)):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if max_new_tokens == 0:
            break
        logits_BV, cache = output.logits[:, -1], output.past_key_values
        next_B = (
            logits_BV.argmax(-1)
            if uniforms_BT is None
            else sample(logits_BV, uniforms_BT[:, step], temperature=temperature, top_p=top_p)
        )
        for row, token_id in enumerate(next_B.tolist()):
            if row in running:
                generated[row].append(token_id)
                if token_id in eos_token_ids:
                    running.discard(row)
        if not running:
            break
        ids = next_B[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return generated


def sample(logits_BV: Tensor, uniforms_B: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Draw a token for each request by inverting the distribution at its own uniform number.

    Args:
        logits_BV: Any float dtype.
        uniforms_B: float64 in [0, 1).
        temperature: Above 0.
        top_p: In (0, 1]; the likeliest token always remains.

    Returns:
        int64 [B].
    """
    probs_BV = (logits_BV.double() / temperature).softmax(-1)
    probs_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = probs_BV.cumsum(-1) - probs_BV
    kept_BV = probs_BV.masked_fill(before_BV >= top_p, 0.0)
    cumulative_BV = kept_BV.cumsum(-1)
    targets_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
    choice_B1 = (cumulative_BV <= targets_B1).sum(-1, keepdim=True)
    last_kept_B1 = (kept_BV > 0).sum(-1, keepdim=True) - 1
    token_ids_B1: Tensor = order_BV.gather(-1, torch.minimum(choice_B1, last_kept_B1))
    return token_ids_B1.squeeze(-1)


def _random_stream(seed: str) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(seed.encode()).digest()))
