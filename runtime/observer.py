"""Shows a running model's routing to a predictor, and passes its forecasts on.

Hooks on the model and its routers collect each forward pass's expert maps. A pass's `on_tokens` is
called at the start of its request's *next* forward pass: only then is its map whole and the id that
follows it known, and still nothing of the next token has been routed. So forecasts are strictly
causal: those that `predictors.base.walk` makes from the recorded trace.

What a predictor says of a layer that has routed (`on_routed`) is asked for right after its router
ran, of requests with one token in the pass, and passed on before the layer's experts are computed.

Whose tokens a pass computes is told in one of two ways. Who batches (`runtime.server`) announces
the rows of each pass by name (`announce`, `end_request`): a request may sit out passes, come in
pieces, and begin behind a prefix that another one has computed. Without that, a pass's rows are
those of ``input_ids``, and a request begins where a forward pass starts without a past (an empty
KV cache), or where the caller says so (`begin_request`), and ends where the next batch begins.

Each request has its own `State`; the forecast passed on is the mean over the requests of the pass.
A predictor that remembers requests (`Predictor.with_history`) is shown what finished ones used.

Knows nothing of caches, slots or how experts are computed.

Shape letters: B requests · T tokens of a forward pass · L MoE layers · E experts per layer.
"""

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from data.adapters import MoELayer, router_probs_TE
from predictors.base import Forecast, Predictor, Request
from predictors.lessons import Beside
from predictors.request_history import RequestHistory
from runtime.expert_view import slot_recall
from runtime.observed_request import ObservedRequest, PassRow

__all__ = ["Observer", "PassRow"]


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
            predictor says it (`Predictor.on_layer`). Without it the predictor is not asked. No
            backend asks for it so far: it is for who watches a running model's forecasts, and by it
            a test holds `Predictor.walk_layers` to what is said live.
        lessons: When a predictor that learns from finished requests does; None for at once, before
            the next request. Closed by `remove`.
        on_judged: Called for each decoded token that had a forecast with the two parts of its slot
            recall (`runtime.expert_view.slot_recall`), before the next pass.
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
        on_judged: Callable[[int, int], None] | None = None,
        lessons: Beside | None = None,
    ) -> None:
        self._signature = inspect.signature(model.forward)
        self._lessons = lessons
        self._history = RequestHistory(lessons=lessons)
        self._predictor = predictor.with_history(self._history)
        remembers = self._predictor is not predictor
        self._top_k = predictor.fitted_spec().top_k if remembers else None
        self._on_forecast = on_forecast
        self._on_later = on_later if "routed" in predictor.moments else None
        self._on_ahead = on_ahead if "layer" in predictor.moments else None
        self._on_judged = on_judged
        self._prompts: tuple[str, ...] | None = None
        self._announced: Sequence[PassRow] | None = None
        self._named: dict[str, ObservedRequest] = {}
        # The last pass: its requests, their tokens, which of them are prompts, each layer's map.
        self._rows: list[ObservedRequest] = []
        self._are_named = False
        self._last = _Tokens([], [])
        self._prompt_rows: list[bool] = []
        self._maps: list[Tensor | None] = [None] * len(layers)  # each [B * T, E]
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            *(moe.router.register_forward_hook(self._router_hook(moe)) for moe in layers),
        ]

    @property
    def num_lessons_put_off(self) -> int:
        """How often the predictor could not learn, since it was still learning."""
        return 0 if self._lessons is None else self._lessons.num_put_off

    def begin_request(self, *prompts: str) -> None:
        """Say that the next forward pass begins new requests, and what their prompts are.

        Args:
            prompts: One text per row of the batch; none at all if the texts are not known.
        """
        self._prompts = prompts

    def announce(self, rows: Sequence[PassRow]) -> None:
        """Say whose tokens the next forward pass computes, one request after the other."""
        self._announced = rows

    def foresee(self, row: PassRow) -> Forecast | None:
        """What is forecast of a sequence now, whether it has begun or not.

        Args:
            row: It, with any of its tokens; of one that has not begun, the request alone is asked.
        """
        request = self._named.get(row.key)
        if request is None:
            ids_P = np.array(row.prompt_ids, np.int32)
            request = self._new(Request(prompt=row.prompt, token_ids_P=ids_P))
            self._named[row.key] = request
        return request.forecast

    def end_request(self, key: str, *, remember: bool = True) -> None:
        """Forget an announced request; unknown ones are no matter.

        Args:
            key: Its name.
            remember: Whether it goes into the history, as one that has finished does.
        """
        self._settle()
        request = self._named.pop(key, None)
        if request is not None and remember:
            self._add_to_history(request)

    def remove(self) -> None:
        """Take the hooks away; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._lessons is not None:
            self._lessons.close()

    def join(self, timeout_s: float) -> bool:
        """After `remove`, wait for a lesson that is under way; whether none is any more."""
        return self._lessons is None or self._lessons.join(timeout_s)

    def _router_hook(self, moe: MoELayer) -> Callable[[nn.Module, Any, Any], None]:
        def keep_map(router: nn.Module, args: Any, output: Any) -> None:
            probs_TE = router_probs_TE(moe, output[0])
            probs_TE = probs_TE.reshape(-1, probs_TE.shape[-1])
            self._maps[moe.layer] = probs_TE
            if self._on_later is not None:
                later_E = self._later_E(moe.layer, probs_TE)
                if later_E is not None:
                    self._on_later(moe.layer, later_E)
            if self._on_ahead is not None:
                input_TD = args[0].detach().flatten(0, -2)
                if said := self._ahead(moe.layer, input_TD, probs_TE):
                    self._on_ahead(moe.layer, torch.cat(said))

        return keep_map

    def _later_E(self, layer: int, probs_TE: Tensor) -> Tensor | None:
        """What those requests that compute one token say together of a layer that has routed."""
        if not self._are_named and len(probs_TE) != len(self._rows):
            return None
        singles = [
            (request, where[0])
            for request, where in zip(self._rows, self._last.where, strict=True)
            if len(where) == 1
        ]
        if not singles:
            return None
        probs_BE = probs_TE[[at for _, at in singles]].cpu()
        said = [
            self._predictor.on_routed(request.state, layer, probs_E)
            for (request, _), probs_E in zip(singles, probs_BE, strict=True)
        ]
        known = [later_E for later_E in said if later_E is not None]
        return torch.stack(known).mean(0) if known else None

    def _ahead(self, layer: int, input_TD: Tensor, probs_TE: Tensor) -> list[Tensor]:
        """What each row's tokens will use in the layers after one that has routed."""
        said = [
            self._predictor.on_layer(request.state, layer, input_TD[where], probs_TE[where])
            for request, where in zip(self._rows, self._last.where, strict=True)
        ]
        return [said_THE for said_THE in said if said_THE is not None]

    @torch.no_grad()
    def _before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._settle()
        if self._announced is not None:
            self._take_announced(self._announced)
            self._announced = None
        else:
            self._take_rows(self._signature.bind_partial(*args, **kwargs).arguments)
        for request, ids in zip(self._rows, self._last.ids, strict=True):
            request.show(ids[0] if ids else None)
        if known := [row.forecast for row in self._rows if row.forecast is not None]:
            self._on_forecast(_mean(known))

    def _take_announced(self, rows: Sequence[PassRow]) -> None:
        """The pass's requests by name: those that are known go on, others begin."""
        if not self._are_named:
            self._finish_rows()
        self._are_named = True
        self._last = _Tokens.flat([row.ids for row in rows])
        self._prompt_rows = [row.position < len(row.prompt_ids) for row in rows]
        self._rows = []
        for row in rows:
            request = self._named.get(row.key)
            # Computed anew from an earlier token: whoever remembers it would see tokens twice.
            if request is None or request.next_position != row.position:
                ids_P = np.array(row.prompt_ids, np.int32)
                request = self._new(Request(prompt=row.prompt, token_ids_P=ids_P), row.position)
                self._named[row.key] = request
            self._rows.append(request)

    def _take_rows(self, arguments: Mapping[str, Any]) -> None:
        """The pass's requests by their places in the batch."""
        tokens = _Tokens.of(arguments)
        past = arguments.get("past_key_values")
        starts = past is None or past.get_seq_length() == 0
        starts = starts or self._prompts is not None or self._are_named
        if starts or len(tokens.ids) != len(self._rows):
            self._begin(tokens)
        else:
            self._prompt_rows = [False] * len(self._rows)
        self._last = tokens

    def _begin(self, tokens: "_Tokens") -> None:
        prompts: Sequence[str | None] = self._prompts or [None] * len(tokens.ids)
        self._prompts = None
        if not self._are_named:
            self._finish_rows()
        self._are_named = False
        if len(prompts) != len(tokens.ids):
            raise ValueError(
                f"begin_request named {len(prompts)} prompts, but the batch has "
                f"{len(tokens.ids)} rows: give one text per row, or none"
            )
        self._rows = []
        for prompt, ids in zip(prompts, tokens.ids, strict=True):
            ids_P = None if None in ids else np.array(ids, np.int32)
            self._rows.append(self._new(Request(prompt=prompt, token_ids_P=ids_P)))
        self._prompt_rows = [True] * len(self._rows)

    def _new(self, request: Request, position: int = 0) -> ObservedRequest:
        return ObservedRequest(self._predictor, request, top_k=self._top_k, position=position)

    def _settle(self) -> None:
        """The last pass is over: each of its requests gets what its tokens were routed to."""
        maps = [map_TE for map_TE in self._maps if map_TE is not None]
        is_whole = len(maps) == len(self._maps)  # or it was broken off, and counts for nothing
        self._maps = [None] * len(self._maps)
        if not is_whole:
            return
        maps_TLE = torch.stack(maps, dim=1).cpu()
        for request, ids, where, is_prompt in zip(
            self._rows, self._last.ids, self._last.where, self._prompt_rows, strict=True
        ):
            if ids:
                if not is_prompt:
                    self._judge(request, maps_TLE[where[0]])
                request.routed(maps_TLE[where], ids, is_prompt=is_prompt)

    def _judge(self, request: ObservedRequest, probs_LE: Tensor) -> None:
        """Compare a decoded token's routing with what was forecast of it."""
        if self._on_judged is not None and request.forecast is not None:
            top_k = self._predictor.fitted_spec().top_k
            self._on_judged(*slot_recall(probs_LE, request.forecast.next_LE, top_k))

    def _finish_rows(self) -> None:
        for request in self._rows:
            self._add_to_history(request)
        self._rows = []

    def _add_to_history(self, request: ObservedRequest) -> None:
        if (use_LE := request.use_LE()) is not None:
            self._history.add(use_LE)


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
    def flat(cls, rows: Sequence[Sequence[int]]) -> "_Tokens":
        """Rows that lie one after the other, without padding between them."""
        starts = list(itertools.accumulate((len(row) for row in rows), initial=0))
        where = [list(range(a, b)) for a, b in itertools.pairwise(starts)]
        return cls([list(row) for row in rows], where)

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


def _mean(forecasts: Sequence[Forecast]) -> Forecast:
    return Forecast(
        torch.stack([forecast.next_LE for forecast in forecasts]).mean(0),
        torch.stack([forecast.forecast_LE for forecast in forecasts]).mean(0),
    )
