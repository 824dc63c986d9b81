"""A predictor that runs inside the decode graph: its forecasts cost no wait, and are never late.

A step tells the predictor what each layer has chosen (`GraphPredictor.on_routed`), and begins with
`GraphPredictor.on_token` for the token that was fed before, now that the id which followed is
known; so forecasts are those of `predictors.base.Predictor.walk`. A prompt is handed over when what
follows it is known: all but its last token at once, and the last one as a step would have told it,
both outside of the graph. So every step is the same program, whatever came before.

Each number of rows has a module of its own, since graphs of different sizes have different
addresses; what is the same for all of them is held once, and only the latest few modules are
kept. A pass of several tokens that goes on with a request (a chat's
next turn over the same KV cache) is taken as a new prompt: modules can only begin with one.

Deviation: of a prompt's tokens, the last one included, what is told are the K experts of the
greatest probability; of steps, those that ran. They differ where a router chooses by more than its
probabilities (a bias that balances load, groups of experts: DeepSeek-V3), and there the first
forecasts of an answer go by other experts than later ones. `Predictor.walk` takes one or the other
throughout: the greatest where a trace holds whole distributions, and else those that ran.

Shape letters: B requests · T tokens of a prompt · L MoE layers · E experts per layer · K experts
per token.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.adapters import MoELayer
from predictors.base import Forecast, Predictor
from predictors.graph import GraphPredictor
from predictors.request_history import RequestHistory
from runtime.device_passes import DevicePasses, Pass

logger = logging.getLogger(__name__)

_MAX_BATCHES = 4  # numbers of rows whose modules are kept
_PROMPT_COPIES = 8  # of a prompt's maps, at most at once while it is handed over


class _Row:
    """What a request's prompt has shown so far; tensors of its last tokens, oldest first."""

    def __init__(self, maps_TLE: Tensor, ids_T: Tensor) -> None:
        self.maps_TLE, self.ids_T = maps_TLE, ids_T

    def add(self, maps_TLE: Tensor, ids_T: Tensor, *, most: int) -> None:
        self.maps_TLE = torch.cat([self.maps_TLE, maps_TLE])[-most:]
        self.ids_T = torch.cat([self.ids_T, ids_T])[-most:]


@dataclass(slots=True)
class _Batch:
    """What steps of B rows run on: fixed addresses."""

    module: GraphPredictor
    ids_B: Tensor  # of the token that `on_routed` was told of
    next_ids_B: Tensor  # of the token that is fed


class GraphForecasts(DevicePasses):
    """Feeds a backend with a predictor's forecasts from within captured steps.

    Args:
        model: The model whose forward passes are observed.
        layers: Its MoE layers.
        predictor: A fitted predictor with a `Predictor.graph_module`.
        module: That of one row, made outside of inference mode; moved to ``device``.
        device: Where the model runs.
        on_forecast: Called where a pass begins with the forecast for it.
        on_later: Called with a layer and the use of its experts after the tokens that it has just
            routed, float32 [E].
        later_use: Gives a layer's row to write in, float32 and static, which `on_later` is then
            called with.
        on_pass: Called before each forward pass with its forecast's age, which is 0.
        on_failure: Called with what the predictor raised.
        on_change: Called where captured steps are out of date, since a module that they write to is
            gone.

    Attributes:
        forgets: On a host the predictor would go by finished requests, too. Here nobody shows it
            any: whole requests never leave the device.

    """

    maps_of_steps = False

    def __init__(
        self,
        *,
        model: nn.Module,
        layers: Sequence[MoELayer],
        predictor: Predictor,
        module: GraphPredictor,
        device: torch.device,
        on_forecast: Callable[[Forecast], None],
        on_later: Callable[[int, Tensor], None],
        later_use: Callable[[int], Tensor],
        on_pass: Callable[[int], None],
        on_failure: Callable[[Exception], None],
        on_change: Callable[[], None],
    ) -> None:
        self._predictor, self._on_change = predictor, on_change
        self.forgets = predictor.with_history(RequestHistory()) is not predictor
        if self.forgets:
            logger.warning(
                "Inside captured steps predictor %s does not follow finished requests, as it does "
                "on a host: it says what was fitted, whatever the text",
                predictor.kind,
            )
        self._on_forecast, self._on_later, self._on_pass = on_forecast, on_later, on_pass
        self._later_use, self._top_k = later_use, predictor.fitted_spec().top_k
        self._batches: dict[int, _Batch] = {}
        self._batch: _Batch | None = None
        self._rows: list[_Row] = []
        self._device = device
        self._batches[1] = self._new_batch(module, 1)
        super().__init__(model=model, layers=layers, device=device, on_failure=on_failure)
        self._most_tokens = module.prompt_tokens

    def remove(self) -> None:
        """As `DevicePasses.remove`; frees the modules."""
        super().remove()
        self._batches.clear()
        self._batch = None
        self._rows.clear()

    def _batch_of(self, num_rows: int) -> _Batch:
        """What steps of so many rows run on; never called within a capture."""
        batch = self._batches.pop(num_rows, None)
        if batch is None:
            if len(self._batches) == _MAX_BATCHES:
                unused = next(iter(self._batches))  # for the longest time
                logger.info("Capture steps anew: %d rows were not seen for long", unused)
                self._batches.pop(unused)
                self._on_change()
            with torch.inference_mode(False):
                module = graph_module(self._predictor, num_rows)
            batch = self._new_batch(module, num_rows)
        self._batches[num_rows] = batch
        return batch

    def _new_batch(self, module: GraphPredictor, num_rows: int) -> _Batch:
        with torch.inference_mode(False):
            module.to(self._device)
            for other in self._batches.values():
                share_constants(module, other.module)
                break  # which shares them with the others
            ids_B = torch.full((num_rows,), -1, device=self._device)
            return _Batch(module, ids_B, ids_B.clone())

    def _enter(self, now: Pass, last: Pass | None) -> None:
        self._on_pass(0)
        if now.starts or last is None or (last.is_step and not now.is_step):
            self._batch = self._batch_of(now.num_rows)
            self._batch.module.begin()
            self._rows = []
            self._say()
            return
        assert self._batch is not None
        if not last.is_step:
            self._absorb(last)
        if not now.is_step:
            self._batch.module.begin()
            self._tell_prompt(self._rows, self._first_ids(now))
            self._say()
            return
        if not last.is_step:
            before = [_Row(row.maps_TLE[:-1], row.ids_T[:-1]) for row in self._rows]
            last_ids_B = torch.cat([row.ids_T[-1:] for row in self._rows])
            self._batch.module.begin()
            self._tell_prompt(before, last_ids_B)
            self._batch.ids_B.copy_(last_ids_B)
            maps_BLE = torch.stack([row.maps_TLE[-1] for row in self._rows])
            probs_BLK, ids_BLK = maps_BLE.topk(self._top_k)
            for layer in range(self._num_layers):
                self._batch.module.on_routed(layer, ids_BLK[:, layer], probs_BLK[:, layer])
            self._rows = []
        if now.ids_BT is None:
            self._batch.next_ids_B.fill_(-1)
        else:
            self._batch.next_ids_B.copy_(now.ids_BT[:, 0])

    def _absorb(self, last: Pass) -> None:
        """Keep what a prompt, or a chunk of one, was routed to."""
        assert self._batch is not None
        most = self._batch.module.prompt_tokens
        maps_BTLE = self._last_maps(last)
        ids_BT = last.ids_BT
        if ids_BT is None:
            ids_BT = torch.full((last.num_rows, last.num_tokens), -1, device=self._device)
        ids_BT = ids_BT[:, -most:]
        places = _real_tokens(last, most)
        for row, where in enumerate(places):
            maps_TLE, ids_T = maps_BTLE[row][where], ids_BT[row][where]
            if row == len(self._rows):
                self._rows.append(_Row(maps_TLE.clone(), ids_T))
            else:
                self._rows[row].add(maps_TLE, ids_T, most=most)

    def _tell_prompt(self, rows: Sequence[_Row], next_ids_B: Tensor) -> None:
        """Show the module, which has just begun, what each row's prompt was routed to."""
        assert self._batch is not None
        module = self._batch.module
        lengths = {len(row.ids_T) for row in rows}
        if len(lengths) == 1:
            if lengths != {0}:
                maps_BTLE = torch.stack([row.maps_TLE for row in rows])
                ids_BT = torch.stack([row.ids_T for row in rows])
                module.on_prompt(maps_BTLE, ids_BT, next_ids_B)
            return
        views = [module.of_row(number) for number in range(len(rows))]
        for number, (view, row) in enumerate(zip(views, rows, strict=True)):
            if len(row.ids_T):
                ids_1T, next_id_1 = row.ids_T[None], next_ids_B[number, None]
                view.on_prompt(row.maps_TLE[None], ids_1T, next_id_1)
        module.next_LE.copy_(torch.stack([view.next_LE for view in views]).mean(0))
        module.forecast_LE.copy_(torch.stack([view.forecast_LE for view in views]).mean(0))

    def _first_ids(self, now: Pass) -> Tensor:
        """int64 [B]: each row's first token that is none of padding; -1 where there is none."""
        if now.ids_BT is None:
            return torch.full((now.num_rows,), -1, device=self._device)
        if now.mask_BT is None:
            return now.ids_BT[:, 0]
        first_B1 = now.mask_BT.int().argmax(1, keepdim=True)
        ids_B1 = now.ids_BT.gather(1, first_B1)
        return ids_B1.masked_fill(~now.mask_BT.gather(1, first_B1), -1)[:, 0]

    def _step_routed(self, layer: int, topk_expert_ids_BK: Tensor, topk_weights_BK: Tensor) -> None:
        assert self._batch is not None
        batch = self._batch
        if layer == 0:
            batch.module.on_token(None, batch.ids_B, batch.next_ids_B)
            batch.ids_B.copy_(batch.next_ids_B)
            self._say()
        ids_BK, place_E = topk_expert_ids_BK.long(), self._later_use(layer)
        self._on_later(layer, batch.module.on_routed(layer, ids_BK, topk_weights_BK, place_E))

    def _say(self) -> None:
        assert self._batch is not None
        module = self._batch.module
        self._on_forecast(Forecast(module.next_LE, module.forecast_LE))


def graph_module(predictor: Predictor, num_rows: int) -> GraphPredictor:
    """The predictor's module for so many rows; ValueError where it has none."""
    module = predictor.graph_module(batch_size=num_rows)
    if module is None:
        raise ValueError(f"predictor {predictor.kind!r} cannot run inside a graph")
    return module


def share_constants(module: GraphPredictor, owner: GraphPredictor) -> None:
    """Let ``module`` hold nothing that ``owner``, of another number of rows, holds as well.

    That is all weights, and the buffers that have no B in their name and the same content. One of
    the two forecasts at a time and has been told to `GraphPredictor.begin` before, so that a place
    which both write to is right as well.
    """
    for mine, theirs in zip(module.parameters(), owner.parameters(), strict=True):
        mine.data = theirs.data
    theirs_by_name = dict(owner.named_buffers())
    for name, buffer in module.named_buffers():
        other = theirs_by_name[name]
        # Not by the name alone: shares of a mean over rows have no B in theirs, but depend on it.
        if "B" not in name.rpartition("_")[2] and torch.equal(buffer, other):
            buffer.data = other.data


def device_bytes(predictor: Predictor) -> int:
    """What `GraphForecasts` of one request takes on a device; 0 for who runs on the host.

    Makes a module to count, on the host, and drops it: the plan of memory comes before anything is
    taken from the device, and is made once for a model.
    """
    module = predictor.graph_module(batch_size=1)
    if module is None:
        return 0
    held = [*module.parameters(), *module.buffers()]
    held_bytes: int = sum(tensor.numel() * tensor.element_size() for tensor in held)
    map_bytes = module.next_LE.numel() * 4
    return held_bytes + _PROMPT_COPIES * module.prompt_tokens * map_bytes


def _real_tokens(last: Pass, most: int) -> list[Any]:
    """Which of each row's last ``most`` tokens are none of padding: something to index with."""
    if last.mask_BT is None:
        return [slice(None)] * last.num_rows
    return list(last.mask_BT[:, -most:].unbind(0))
