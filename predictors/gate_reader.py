"""What `gate_mlp`'s network reads: of whole requests at once, or of a request as it goes on.

Both ways read the same of the same tokens; a test compares. Knows nothing of what is made of it.

Shape letters: U units (`gate_net`) · T tokens · N tokens of several requests · L MoE layers ·
E experts per layer · D hidden · H targets of a unit · X what is left flat.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from data.router_inputs import RoutedTokens
from data.routers import Routers, input_embedding
from data.schema import MoESpec
from predictors.base import State
from predictors.gate_context import unit_length
from predictors.gate_net import EMBEDDING, Units, gathered, previous, sparse_map

INPUTS: Final = ("source", "earlier", "probs", "previous_map", "previous_error")
"""Besides token embeddings, which are always read: the source's router input, that of the layer
before it, its probabilities, what the previous token used in the target layers, and how far router
reuse was off there."""


Values = dict[str, Tensor]

_LEAST = 1e-30  # of a probability, before its logarithm
_MOST_ERROR = 5.0  # logits; beyond, an expert is merely far off


class TokenRow(NamedTuple):
    """What `gate_context.TokenContext` reads, and in that order.

    Attributes:
        embedded_ND: float32, at root mean square 1; zeros for a token whose id is not known.
        starts_N: bool, tokens that see none of those before them.
    """

    embedded_ND: Tensor
    starts_N: Tensor


@dataclass(slots=True)
class GateState(State):
    """One request's past.

    Attributes:
        recent_ids: Ids of the latest tokens that passed all layers; None where unknown.
        coming_ids: Ids that are known to be fed next.
        last_map_LE: The latest token's map, as `gate_net.sparse_map`; None before there is one.
        passing: Of each layer that the current forward pass has routed: probabilities [E] and base
            [U, H, E] of its last token.
        passed: The same of the pass before.
        earlier_TD: The router input (unit length) of the layer before, all tokens of the pass.
        context_TD: What the network's context makes of the tokens that come next; None before it
            is asked.
    """

    recent_ids: list[int | None] = field(default_factory=list)
    coming_ids: deque[int] = field(default_factory=deque)
    last_map_LE: Tensor | None = None
    passing: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    passed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    earlier_TD: Tensor | None = None
    context_TD: Tensor | None = None


class GateReader:
    """Reads for the units of one network, from one model's routers and embeddings.

    Args:
        model: The model that routes.
        routers: Its routers.
        spec: Its MoE.
        units: What is forecast from where.
        inputs: Names of `INPUTS`.
        context_tokens: Embeddings read: the token's own and those before it.

    Raises:
        ValueError: The model's embedding cannot be read, or is not as wide as its router inputs.
    """

    def __init__(
        self,
        *,
        model: Any,
        routers: Routers,
        spec: MoESpec,
        units: Units,
        inputs: Sequence[str],
        context_tokens: int,
    ) -> None:
        embedding = input_embedding(model)
        if embedding.embedding_dim != spec.hidden_size:
            raise ValueError(
                f"{spec.describe()} embeds tokens in {embedding.embedding_dim} numbers and routes "
                f"by {spec.hidden_size}: gate_mlp needs them to be one space"
            )
        self._model, self._embedding, self._routers = model, embedding, routers
        self._spec, self._units = spec, units
        self._inputs, self._context_tokens = inputs, context_tokens
        hidden_size, most = embedding.embedding_dim, units.most_targets * spec.num_experts
        sizes = dict(
            zip(INPUTS, (hidden_size, hidden_size, spec.num_experts, most, most), strict=True)
        )
        self.input_sizes: dict[str, int] = {name: sizes[name] for name in inputs}

    @property
    def device(self) -> torch.device:
        """The model's."""
        device: torch.device = self._model.device
        return device

    @torch.no_grad()
    def read(
        self, tokens: RoutedTokens, forgotten_N: Tensor | None = None
    ) -> tuple[TokenRow, Values, Tensor]:
        """Of decoded tokens, for all units: embeddings, inputs by name, router reuse [U, N, H, E].

        Before layer 0 there is no router input to reuse: its base is 0. The routers' scores of the
        embedding itself rank so badly that they cost a point where they are corrected.

        Args:
            tokens: Whole requests.
            forgotten_N: bool, tokens for which it is as in a prompt: nothing is known yet of how
                the tokens before them were routed.

        Raises:
            ValueError: There are no router inputs.
        """
        tokens = tokens.to(self.device)
        raw_LND = tokens.router_input_LND
        if raw_LND is None:
            raise ValueError("gate_mlp needs router inputs, and there are none")
        units, starts_N, probs_LNE = self._units, tokens.starts_N, tokens.router_probs_LNE
        target_UH = units.target_UH().to(starts_N.device)
        inputs_LND = unit_length(raw_LND)
        layers = set(units.sources) - {EMBEDDING}
        base_UNHE = self._base({layer: raw_LND[layer] for layer in layers}, len(starts_N))
        values = {
            "source": gathered(inputs_LND, units.sources),
            "earlier": gathered(inputs_LND, [max(s - 1, EMBEDDING) for s in units.sources]),
            "probs": gathered(probs_LNE.sqrt(), units.sources),
        }
        if "previous_map" in self._inputs:
            map_LNE = previous(sparse_map(probs_LNE, self._spec.top_k), starts_N, dim=1)
            values["previous_map"] = map_LNE[target_UH].transpose(1, 2).flatten(2)
        if "previous_error" in self._inputs:
            logs_UNHE = probs_LNE.clamp_min(_LEAST).log()[target_UH].transpose(1, 2)
            error_UNHE = (logs_UNHE - base_UNHE).clamp(-_MOST_ERROR, _MOST_ERROR)
            error_UNHE *= units.valid_UH().to(starts_N.device)[:, None, :, None]
            error_UNHE[units.slice_of(EMBEDDING)] = 0.0
            values["previous_error"] = previous(error_UNHE, starts_N, dim=1).flatten(2)
        if forgotten_N is not None:
            for name in ("previous_map", "previous_error"):
                if name in values:
                    values[name] = values[name].masked_fill(
                        forgotten_N.to(starts_N.device)[:, None], 0.0
                    )
        row = TokenRow(self._embedded(tokens.token_ids_N), starts_N)
        return row, {name: values[name] for name in self.input_sizes}, base_UNHE

    def begin(self, state: GateState, token_ids: list[int]) -> None:
        """A request's prompt is known."""
        state.coming_ids, state.context_TD = deque(token_ids), None

    def pass_token(
        self, state: GateState, map_LE: Tensor, token_id: int | None, next_token_id: int | None
    ) -> None:
        """A token has passed all layers."""
        state.num_tokens += 1
        state.context_TD = None
        state.recent_ids = [*state.recent_ids, token_id][-self._context_tokens :]
        if state.coming_ids:
            state.coming_ids.popleft()
        is_known = bool(state.coming_ids) and state.coming_ids[0] == next_token_id
        if next_token_id is not None and not is_known:
            state.coming_ids = deque([next_token_id])
        state.last_map_LE = sparse_map(map_LE.to(self.device), self._spec.top_k)

    def read_token(self, state: GateState) -> tuple[Values, Tensor]:
        """Before layer 0 of the token that comes next, for the units of the embedding."""
        part = self._units.slice_of(EMBEDDING)
        nothing_11X = torch.zeros(1, 1, 1, device=self.device)
        values = {name: nothing_11X.expand(1, 1, size) for name, size in self.input_sizes.items()}
        values["previous_map"] = self._previous_map(state, part)[:, None]
        return values, self._base({}, 1, part)

    @torch.no_grad()
    def read_layer(
        self, state: GateState, layer: int, router_input_TD: Tensor, router_probs_TE: Tensor
    ) -> tuple[Values, Tensor] | None:
        """When a layer has routed, for its units; None where nothing lies ahead."""
        if layer == 0:
            state.passed, state.passing = state.passing, {}
            state.earlier_TD = None
        if layer == self._spec.num_layers - 1:
            state.passing[layer] = (router_probs_TE[-1], router_probs_TE[:0])
            return None
        part, num_tokens = self._units.slice_of(layer), len(router_input_TD)
        input_TD = unit_length(router_input_TD)
        earlier_TD = torch.zeros_like(input_TD) if state.earlier_TD is None else state.earlier_TD
        base_UTHE = self._base({layer: router_input_TD}, num_tokens, part)
        values = {
            "source": input_TD[None],
            "earlier": earlier_TD[None],
            "probs": router_probs_TE.sqrt()[None],
            "previous_map": _first_row(self._previous_map(state, part), num_tokens),
            "previous_error": _first_row(self._previous_error(state, layer, part), num_tokens),
        }
        state.earlier_TD = input_TD
        state.passing[layer] = (router_probs_TE[-1], base_UTHE[:, -1])
        return values, base_UTHE

    def _embedded(self, token_ids_N: Tensor) -> Tensor:
        return unit_length(self._embedding.weight.detach()[token_ids_N])

    def _base(
        self, inputs_TD: Mapping[int, Tensor], num_tokens: int, part: slice = slice(None)
    ) -> Tensor:
        """float32 [U, T, H, E]: router reuse for the targets of some units, 0 where there is none.

        Args:
            inputs_TD: The router input of each layer that is a source.
            num_tokens: T.
            part: Which units.
        """
        sources, targets = self._units.sources[part], self._units.targets[part]
        shape = (len(sources), num_tokens, self._units.most_targets, self._spec.num_experts)
        base_UTHE = torch.zeros(shape, device=self.device)
        for layer in sorted({layer for layers in targets for layer in layers}):
            # One call for all sources: launching its operations is what a router costs on a GPU.
            at = [
                u for u, layers in enumerate(targets) if layer in layers and sources[u] in inputs_TD
            ]
            if not at:
                continue
            rows = torch.cat([inputs_TD[sources[u]] for u in at])
            scores = self._routers.scores_TE(layer, rows)
            for u, scores_TE in zip(at, torch.split(scores, num_tokens), strict=True):
                base_UTHE[u, :, targets[u].index(layer)] = scores_TE
        return base_UTHE

    def around(self, state: GateState, num_tokens: int) -> TokenRow:
        """The tokens of the coming forward pass, T of them, after those that they may see.

        No token sees beyond one whose id is not known.
        """
        known = [*state.recent_ids, *islice(state.coming_ids, num_tokens)]
        known += [None] * (len(state.recent_ids) + num_tokens - len(known))
        ids = torch.tensor([-1 if i is None else i for i in known], device=self.device)
        is_unknown = ids < 0
        embedded_ND = self._embedded(ids.clamp_min(0)).masked_fill(is_unknown[:, None], 0.0)
        return TokenRow(embedded_ND, is_unknown | is_unknown.roll(1))

    def _previous_map(self, state: GateState, part: slice) -> Tensor:
        """float32 [U, H*E]; 0 before there is one."""
        target_UH = self._units.target_UH()[part].to(self.device)
        if state.last_map_LE is None:
            shape = (*target_UH.shape, self._spec.num_experts)
            return torch.zeros(shape, device=self.device).flatten(1)
        return state.last_map_LE[target_UH].flatten(1)

    def _previous_error(self, state: GateState, layer: int, part: slice) -> Tensor:
        """float32 [U, H*E]; 0 unless the pass before reached the last layer."""
        target_UH, valid_UH = self._units.target_UH()[part], self._units.valid_UH()[part]
        if len(state.passed) < self._spec.num_layers:
            shape = (*target_UH.shape, self._spec.num_experts)
            return torch.zeros(shape, device=self.device).flatten(1)
        probs_LE = torch.stack([state.passed[i][0] for i in range(self._spec.num_layers)])
        logs_UHE = probs_LE.clamp_min(_LEAST).log()[target_UH.to(probs_LE.device)]
        error_UHE = (logs_UHE - state.passed[layer][1]).clamp(-_MOST_ERROR, _MOST_ERROR)
        return (error_UHE * valid_UH.to(error_UHE.device)[..., None]).flatten(1)


def _first_row(values_UX: Tensor, num_tokens: int) -> Tensor:
    """[U, T, X]: known for the first token of a pass; the others' predecessors are on their way."""
    rows_UTX = values_UX.new_zeros(len(values_UX), num_tokens, values_UX.shape[1])
    rows_UTX[:, 0] = values_UX
    return rows_UTX
