"""Shows a running model's routing to a predictor, and passes its forecasts on.

Hooks on the model and its routers collect each forward pass's expert maps. A pass's `on_tokens` is
called at the start of the *next* forward pass: only then is its map whole and the id that follows
it known, and still nothing of the next token has been routed. So forecasts are strictly causal:
those that `predictors.base.walk` makes from the recorded trace.

What a predictor says of a layer that has routed (`on_routed`) is asked for right after its router
ran, in passes of one token a row, and passed on before the layer's experts are computed.

A request begins where a forward pass starts without a past (an empty KV cache), or where the
caller says so. Each row of a batch has its own `State`; the forecast passed on is their mean. Where
the next batch begins, the requests of the last one are finished: a predictor that remembers
requests (`Predictor.with_history`) is shown then what they used.

Knows nothing of caches, slots or how experts are computed.

Shape letters: B requests · T tokens of a forward pass · L MoE layers · E experts per layer.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from data.adapters import MoELayer, router_probs_TE
from predictors.base import Forecast, Predictor, Request, State
from predictors.request_history import RequestHistory


class Observer:
    """Feeds a predictor while a model runs; `remove` takes every hook away again.

    Args:
        model: The model whose forward passes are observed.
        layers: Its MoE layers.
        predictor: A fitted predictor for this model.
        on_forecast: Called before a forward pass with the forecast for it, unless the predictor
            has nothing to say.
        on_later: Called with a layer and the use of its experts after the token that it has just
            routed, float32 [E], where the predictor says it (`Predictor.on_routed`).
        on_ahead: Called with a layer that has just routed and what the pass's tokens will use in
            the next ones, float32 [T, H, E], rows of the batch one after the other, where the
            predictor says it (`Predictor.on_layer`). Without it the predictor is not asked.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        layers: Sequence[MoELayer],
        predictor: Predictor,
        on_forecast: Callable[[Forecast], None],
        on_later: Callable[[int, Tensor], None] | None = None,
        on_ahead: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self._signature = inspect.signature(model.forward)
        self._history = RequestHistory()
        self._predictor = predictor.with_history(self._history)
        remembers = self._predictor is not predictor
        self._uses = _Uses(predictor.fitted_spec().top_k) if remembers else None
        self._on_forecast = on_forecast
        self._on_later = on_later if "routed" in predictor.moments else None
        self._on_ahead = on_ahead if "layer" in predictor.moments else None
        self._prompts: tuple[str, ...] | None = None
        self._states: list[State] = []
        self._forecasts: list[Forecast | None] = []
        self._last = _Tokens([], [])
        self._maps: list[Tensor | None] = [None] * len(layers)  # of the last pass, each [B * T, E]
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            *(moe.router.register_forward_hook(self._router_hook(moe)) for moe in layers),
        ]

    def begin_request(self, *prompts: str) -> None:
        """Say that the next forward pass begins new requests, and what their prompts are.

        Args:
            prompts: One text per row of the batch; none at all if the texts are not known.
        """
        self._prompts = prompts

    def remove(self) -> None:
        """Take the hooks away; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _router_hook(self, moe: MoELayer) -> Callable[[nn.Module, Any, Any], None]:
        def keep_map(router: nn.Module, args: Any, output: Any) -> None:
            probs_TE = router_probs_TE(moe, output[0])
            probs_TE = probs_TE.reshape(-1, probs_TE.shape[-1])
            self._maps[moe.layer] = probs_TE
            if self._on_later is not None and len(probs_TE) == len(self._states):
                self._on_later(moe.layer, self._later_E(moe.layer, probs_TE.cpu()))
            if self._on_ahead is not None:
                input_TD = args[0].detach().flatten(0, -2)
                if said := self._ahead(moe.layer, input_TD, probs_TE):
                    self._on_ahead(moe.layer, torch.cat(said))

        return keep_map

    def _later_E(self, layer: int, probs_BE: Tensor) -> Tensor:
        """What the rows of a batch of single tokens say together of a layer that has routed."""
        said = [
            self._predictor.on_routed(state, layer, probs_E)
            for state, probs_E in zip(self._states, probs_BE, strict=True)
        ]
        return torch.stack([later_E for later_E in said if later_E is not None]).mean(0)

    def _ahead(self, layer: int, input_TD: Tensor, probs_TE: Tensor) -> list[Tensor]:
        """What each row's tokens will use in the layers after one that has routed."""
        said = [
            self._predictor.on_layer(state, layer, input_TD[where], probs_TE[where])
            for state, where in zip(self._states, self._last.where, strict=True)
        ]
        return [said_THE for said_THE in said if said_THE is not None]

    @torch.no_grad()
    def _before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        tokens = _Tokens.of(arguments)
        past = arguments.get("past_key_values")
        starts = past is None or past.get_seq_length() == 0
        if starts or self._prompts is not None or len(tokens.ids) != len(self._states):
            self._begin(tokens)
        else:
            self._finish(next_tokens=tokens)
        self._last = tokens
        self._maps = [None] * len(self._maps)
        if known := [forecast for forecast in self._forecasts if forecast is not None]:
            self._on_forecast(_mean(known))

    def _begin(self, tokens: "_Tokens") -> None:
        prompts: Sequence[str | None] = self._prompts or [None] * len(tokens.ids)
        self._prompts = None
        if self._uses is not None:
            self._uses.count(self._last, self._maps)
            for use_LE in self._uses.finish():
                self._history.add(use_LE)
        if len(prompts) != len(tokens.ids):
            raise ValueError(
                f"begin_request named {len(prompts)} prompts, but the batch has "
                f"{len(tokens.ids)} rows: give one text per row, or none"
            )
        self._states = [self._predictor.new_state() for _ in prompts]
        self._forecasts = []
        for state, prompt, ids in zip(self._states, prompts, tokens.ids, strict=True):
            known = None not in ids
            request = Request(prompt=prompt, token_ids_P=np.array(ids, np.int32) if known else None)
            self._forecasts.append(self._predictor.on_request(state, request))

    def _finish(self, *, next_tokens: "_Tokens") -> None:
        """Show every token of the last forward pass to its row's state, in order."""
        maps = [map_TE for map_TE in self._maps if map_TE is not None]
        if len(maps) < len(self._maps):
            return  # that pass was broken off: its tokens were not routed in every layer
        if self._uses is not None:
            self._uses.count(self._last, self._maps)
        maps_TLE = torch.stack(maps, dim=1).cpu()
        for row, (ids, where) in enumerate(zip(self._last.ids, self._last.where, strict=True)):
            if ids:
                self._forecasts[row] = self._predictor.on_tokens(
                    self._states[row],
                    maps_TLE[where],
                    token_ids_T=ids,
                    next_token_ids_T=[*ids[1:], *(next_tokens.ids[row][:1] or [None])],
                )


class _Tokens:
    """The tokens of one forward pass, row by row, without padding.

    Attributes:
        ids: Their ids; None where the model was given embeddings instead.
        where: Their places among the flattened B * T tokens that the routers see.
    """

    def __init__(self, ids: list[list[int | None]], where: list[list[int]]) -> None:
        self.ids = ids
        self.where = where

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "_Tokens":
        """Read a forward pass's arguments; a two-dimensional attention mask tells padding."""
        ids_BT: Tensor | None = arguments.get("input_ids")
        num_rows, num_tokens = (arguments["inputs_embeds"] if ids_BT is None else ids_BT).shape[:2]
        mask = arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real_BT = mask[:, -num_tokens:].bool().tolist()
        else:
            real_BT = [[True] * num_tokens] * num_rows
        where = [
            [row * num_tokens + t for t in range(num_tokens) if real_BT[row][t]]
            for row in range(num_rows)
        ]
        flat: list[int | None] = (
            [None] * (num_rows * num_tokens) if ids_BT is None else ids_BT.flatten().tolist()
        )
        return cls([[flat[i] for i in row] for row in where], where)


class _Uses:
    """What the requests of a batch have used so far, as `routing.request_use_LE` counts it.

    Args:
        top_k: K.
    """

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._use_BLE: list[Tensor] = []
        self._num_tokens: list[int] = []
        self._num_passes = 0

    def count(self, tokens: "_Tokens", maps: Sequence[Tensor | None]) -> None:
        """Add a forward pass; one that was broken off, or had no rows, counts for nothing."""
        known = [map_TE for map_TE in maps if map_TE is not None]
        if len(known) < len(maps) or not tokens.where:
            return
        maps_TLE = torch.stack(known, dim=1).cpu()
        used_TLK = maps_TLE.topk(self._top_k, dim=-1).indices
        use_TLE = torch.zeros_like(maps_TLE, dtype=torch.float32).scatter_(-1, used_TLK, 1.0)
        rows = [use_TLE[where] for where in tokens.where]
        if self._num_passes < 2:  # the prompt counts only as long as nothing has been decoded
            self._use_BLE = [torch.zeros_like(use_TLE[0]) for _ in rows]
            self._num_tokens = [0] * len(rows)
        for row, row_TLE in enumerate(rows):
            self._use_BLE[row] += row_TLE.sum(dim=0)
            self._num_tokens[row] += len(row_TLE)
        self._num_passes += 1

    def finish(self) -> list[Tensor]:
        """Share of each request's tokens that used each expert, [L, E]; then start anew."""
        uses = [
            use_LE / num_tokens
            for use_LE, num_tokens in zip(self._use_BLE, self._num_tokens, strict=True)
            if num_tokens
        ]
        self._use_BLE, self._num_tokens, self._num_passes = [], [], 0
        return uses


def _mean(forecasts: Sequence[Forecast]) -> Forecast:
    return Forecast(
        torch.stack([forecast.next_LE for forecast in forecasts]).mean(0),
        torch.stack([forecast.forecast_LE for forecast in forecasts]).mean(0),
    )
