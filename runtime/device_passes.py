"""Tells a running model's forward passes apart and keeps their routing, without waiting for a GPU.

`runtime.observer.Observer` reads token ids and router maps on the host, which on a GPU would end
every step with a wait. Here both stay on the device: a *step* (one token a row, of the requests of
the pass before) tells its routing to fixed addresses, so that it can be captured and replayed
(`runtime.decode_graph`); any other pass is a *prompt*, and is never captured.

Nothing of a step is read to say which it is. So where a static KV cache is emptied by hand and fed
one token at a time, `begin_request` must say that requests begin; ``model.generate`` needs no such
help, since each of its calls has a cache object of its own.

`DevicePasses` is the base of those who forecast from it: on the device (`runtime.graph_forecasts`)
or on a thread of the host (`runtime.host_forecasts`).

Shape letters: B requests · T tokens of a forward pass · L MoE layers · E experts per layer ·
K experts per token.
"""

import inspect
import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from data.adapters import MoELayer, router_probs_TE
from runtime.compiled_layers import not_compiled

logger = logging.getLogger(__name__)


class Pass(NamedTuple):
    """What is known of a forward pass before it begins.

    Attributes:
        num_rows: B.
        num_tokens: T of each row, padding included.
        ids_BT: int64 on the model's device; None where it was given embeddings.
        mask_BT: Which of the tokens are none of padding, if the model was told; else None.
        prompts: The requests' texts, where the caller named them.
        starts: New requests begin.
        is_step: One token a row, of the requests of the pass before.
    """

    num_rows: int
    num_tokens: int
    ids_BT: Tensor | None
    mask_BT: Tensor | None
    prompts: tuple[str, ...]
    starts: bool
    is_step: bool


class DevicePasses(ABC):
    """Hooks on a model and its routers, until `remove`.

    What goes wrong in a subclass ends its forecasts, never the model's forward pass.

    Attributes:
        maps_of_steps: Whether steps keep their maps, too; else their routers have no hooks, which a
            compiler would have to break off at.

    Args:
        model: The model whose forward passes are observed.
        layers: Its MoE layers.
        device: Where it runs.
        on_failure: Called with what was raised; the object does nothing any more by then.
    """

    maps_of_steps: ClassVar[bool]

    def __init__(
        self,
        *,
        model: nn.Module,
        layers: Sequence[MoELayer],
        device: torch.device,
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._router_hooks = [(moe.router, not_compiled(self._router_hook(moe))) for moe in layers]
        self._signature = inspect.signature(model.forward)
        self._num_layers, self._num_experts = len(layers), layers[0].num_experts
        self._most_tokens: int | None = None  # of a prompt's end whose maps are kept; None for all
        self._device = device
        self._on_failure = on_failure
        self._is_off = False
        self._prompts: tuple[str, ...] | None = None
        self._now: Pass | None = None
        self._was_whole = True
        self._cache: weakref.ref[Any] | None = None
        self._step_maps: dict[int, Tensor] = {}
        self._prompt_maps: list[Tensor | None] = [None] * len(layers)  # each [B, T, E]
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward),
        ]
        self._router_handles: list[RemovableHandle] = []

    def begin_request(self, *prompts: str) -> None:
        """As `Observer.begin_request`."""
        self._prompts = prompts

    def remove(self) -> None:
        """Take the hooks away and free what they wrote to; a second call does nothing.

        No captured step that ran through them may be replayed after that.
        """
        self._switch_off()
        self._step_maps.clear()

    def join(self, timeout_s: float) -> bool:
        """After `remove`, wait for what is still at work; whether nothing is any more."""
        return True

    def why_not_captured(self) -> str | None:
        """Why the pass at hand must not be captured or replayed; None if it may."""
        if self._is_off or self._now is None or self._now.is_step:
            return None
        return "a request's first token"

    def routed(self, layer: int, topk_expert_ids_TK: Tensor, topk_weights_TK: Tensor) -> None:
        """A layer has chosen its experts, and will compute them next."""
        if not self._is_off and self._now is not None and self._now.is_step:
            self._guard(self._step_routed, layer, topk_expert_ids_TK, topk_weights_TK)

    def _switch_off(self) -> None:
        self._is_off = True
        for handle in (*self._handles, *self._router_handles):
            handle.remove()
        self._handles.clear()
        self._router_handles.clear()

    @abstractmethod
    def _enter(self, now: Pass, last: Pass | None) -> None:
        """A pass begins; never part of a graph.

        Args:
            now: The pass.
            last: The one before, whose maps are whole; None if it was broken off or there is none.
        """

    def _step_routed(  # noqa: B027
        self, layer: int, topk_expert_ids_BK: Tensor, topk_weights_BK: Tensor
    ) -> None:
        """A step's layer has chosen its experts; part of the graph."""

    def _maps_of(self, num_rows: int) -> Tensor:
        """float32 [B, L, E]: where steps of so many rows leave their maps."""
        if num_rows not in self._step_maps:
            with torch.inference_mode(False):  # whose tensors could be changed nowhere else
                self._step_maps[num_rows] = torch.zeros(
                    num_rows, self._num_layers, self._num_experts, device=self._device
                )
        return self._step_maps[num_rows]

    def _last_maps(self, last: Pass) -> Tensor:
        """float32 [B, T, L, E] of the pass before; a step's is overwritten by the next one."""
        if last.is_step:
            return self._maps_of(last.num_rows)[:, None]
        return torch.stack([map_BTE for map_BTE in self._prompt_maps if map_BTE is not None], 2)

    def _watch_routers(self, are_watched: bool) -> None:
        if are_watched and not self._router_handles:
            self._router_handles = [
                router.register_forward_hook(hook) for router, hook in self._router_hooks
            ]
        elif not are_watched:
            for handle in self._router_handles:
                handle.remove()
            self._router_handles.clear()

    def _router_hook(self, moe: MoELayer) -> Callable[[nn.Module, Any, Any], None]:
        def keep_map(router: nn.Module, args: Any, output: Any) -> None:
            if not self._is_off and self._now is not None:
                self._guard(self._keep_map, moe, output[0])

        return keep_map

    def _keep_map(self, moe: MoELayer, logits: Tensor) -> None:
        assert self._now is not None
        probs_TE = router_probs_TE(moe, logits)
        probs_TE = probs_TE.reshape(-1, probs_TE.shape[-1])
        if not self._now.is_step:
            map_BTE = probs_TE.view(self._now.num_rows, self._now.num_tokens, -1)
            most = self._most_tokens or self._now.num_tokens
            if most < self._now.num_tokens:
                map_BTE = map_BTE[:, -most:].clone()
            self._prompt_maps[moe.layer] = map_BTE
            return
        self._maps_of(self._now.num_rows)[:, moe.layer].copy_(probs_TE)

    @torch.no_grad()
    def _before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._is_off:
            return
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        last = self._now if self._was_whole else None
        self._now = self._pass(arguments)
        self._was_whole = False
        self._guard(self._enter, self._now, last)
        if not self._is_off:
            self._watch_routers(self.maps_of_steps or not self._now.is_step)
        self._prompt_maps = [None] * self._num_layers

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        self._was_whole = True

    def _pass(self, arguments: Mapping[str, Any]) -> Pass:
        ids_BT: Tensor | None = arguments.get("input_ids")
        given = arguments["inputs_embeds"] if ids_BT is None else ids_BT
        num_rows, num_tokens = given.shape[:2]
        prompts, self._prompts = self._prompts, None
        if prompts and len(prompts) != num_rows:
            raise ValueError(
                f"begin_request named {len(prompts)} prompts, but the batch has {num_rows} rows: "
                "give one text per row, or none"
            )
        past = arguments.get("past_key_values")
        last = self._now
        starts = (
            prompts is not None
            or last is None
            or last.num_rows != num_rows
            or not self._was_whole
            or self._is_new(past, may_wait=num_tokens > 1)
        )
        self._cache = None if past is None else weakref.ref(past)
        mask_BT = None
        if num_tokens > 1:
            mask_BT = _real_tokens_BT(arguments.get("attention_mask"), past, num_tokens)
        return Pass(
            num_rows=num_rows,
            num_tokens=num_tokens,
            ids_BT=ids_BT,
            mask_BT=None if mask_BT is None else mask_BT.expand(num_rows, -1),
            prompts=prompts or (),
            starts=starts,
            is_step=num_tokens == 1 and not starts,
        )

    def _is_new(self, past: Any, *, may_wait: bool) -> bool:
        """Whether a KV cache is empty, or another one than the pass before had."""
        if past is None or (self._cache is not None and self._cache() is not past):
            return True
        layers = getattr(past, "layers", ())
        if not layers or not getattr(layers[0], "is_initialized", True):
            return True
        length = past.get_seq_length()
        # A static cache counts on the device.
        return bool(length == 0) if may_wait or not isinstance(length, Tensor) else False

    def _guard(self, call: Callable[..., None], *args: Any) -> None:
        try:
            with torch.no_grad():
                call(*args)
        except Exception as error:
            # What was captured up to here is replayed once: it keeps the memory that it writes to.
            self._switch_off()
            self._on_failure(error)


def _real_tokens_BT(mask: Any, past: Any, num_tokens: int) -> Tensor | None:
    """bool: which tokens of a prompt are none of padding; None where a mask does not tell.

    A mask that transformers has spread out over a static cache ([B, 1, T, positions], bool, or
    float with 0 for what is seen) tells by whether a token sees itself.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask[:, -num_tokens:].bool()
    start = 0 if past is None else int(past.get_seq_length())
    if mask.dim() != 4 or mask.shape[-1] < start + num_tokens:
        return None
    own_BT = mask[:, 0, -num_tokens:, start : start + num_tokens].diagonal(dim1=-2, dim2=-1)
    return own_BT if own_BT.dtype == torch.bool else own_BT == 0
