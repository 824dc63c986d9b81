"""The expert map store: past iterations, searched by what they were about or how they began.

Source: FineMoE §4.1 (maps), §4.2 (both searches), §4.4 (replacement). An iteration is one token's
way through all layers; its record is that token's whole expert map and its key. Knows nothing of
requests, moments or prefetching, and is not thread-safe: one thread at a time searches and adds.

Shape letters: L MoE layers · E experts per layer · T tokens · N stored records · S embedding ·
M neighbours.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

UNKNOWN_TOKEN = -1
_TEMPERATURE = 0.1  # of the softmax over the cosines of several neighbours
_BLOCK = 256  # new records scored at once: bounds the score matrix, not the result
_TENSORS = ("maps_NLE", "prompts_NS", "token_ids_N")


class TokenSimilarity(Protocol):
    """How alike two tokens are as an iteration's input, as a cosine in [-1, 1]."""

    def __call__(self, ids_T: Tensor, ids_N: Tensor) -> Tensor:
        """float32 [T, N] of int64 ids, 0 wherever one of the two is `UNKNOWN_TOKEN`."""
        ...


def same_token(ids_T: Tensor, ids_N: Tensor) -> Tensor:
    """1 for equal ids, else 0: the cosine of embeddings that are orthogonal to each other."""
    equal_TN = (ids_T[:, None] == ids_N) & (ids_T[:, None] != UNKNOWN_TOKEN)
    return equal_TN.float()


class Keys(NamedTuple):
    """What T iterations were about, as far as it was known before they were routed.

    Attributes:
        prompts_TS: float32, the embedding of each one's prompt, of any length; zeros if unknown.
            One row, if they are of one request.
        token_ids_T: int64, each one's input token, or `UNKNOWN_TOKEN`.
    """

    prompts_TS: Tensor
    token_ids_T: Tensor

    @classmethod
    def unknown(cls, num_rows: int, dim: int) -> "Keys":
        """Keys that say nothing."""
        return cls(torch.zeros(num_rows, dim), torch.full((num_rows,), UNKNOWN_TOKEN))


class Match(NamedTuple):
    """What a search found for each of T tokens, best first.

    Attributes:
        scores_T: float32, cosine: the weighted mean over the M records that were found.
        records_TM: int64, their numbers.
        weights_TM: float32, what each counts for; rows sum to 1.
    """

    scores_T: Tensor
    records_TM: Tensor
    weights_TM: Tensor


class MapStore:
    """At most ``capacity`` records; when full, a new one takes the place of its most similar.

    - `add` takes finished iterations, one by one in the given order.
    - `semantic_search` finds records by key (Eq. 4), `begin` starts a search by map (Eq. 5).
    - `rows_LTE` reads what was found.

    The semantic score is a cosine in every case. With both parts of a key known it is
    ``token_weight * token similarity + (1 - token_weight) * prompt cosine``, which is the cosine of
    the two embeddings laid end to end; a part that the query does not know drops out of it.

    Maps are held as float16 (half the memory, and traces record no more), layer by layer: a search
    reads one contiguous [N, E] a layer, which is up to five times faster than record by record.

    Args:
        capacity: C, at least 1.
        num_layers: L.
        num_experts: E.
        dim: S; 0 if no prompt is ever embedded.
        prefetch_distance: d, at most L: the semantic score weighs d/L in the redundancy.
        token_weight: In [0, 1].
        token_similarity: Of two input tokens.
    """

    def __init__(
        self,
        *,
        capacity: int,
        num_layers: int,
        num_experts: int,
        dim: int = 0,
        prefetch_distance: int = 3,
        token_weight: float = 0.5,
        token_similarity: TokenSimilarity = same_token,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: must be at least 1")
        if not 1 <= prefetch_distance <= num_layers:
            raise ValueError(
                f"prefetch_distance={prefetch_distance}: must be in 1..{num_layers}, the MoE layers"
            )
        if not 0.0 <= token_weight <= 1.0:
            raise ValueError(f"token_weight={token_weight}: must be in [0, 1]")
        self.capacity = capacity
        self.num_layers, self.num_experts, self.dim = num_layers, num_experts, dim
        self._semantic_share = prefetch_distance / num_layers
        self._token_weight = token_weight
        self._token_similarity = token_similarity
        self._size = 0
        self._maps_LNE = torch.zeros(num_layers, 0, num_experts, dtype=torch.float16)
        self._sqnorms_LN = torch.zeros(num_layers, 0)  # of the rows up to and with each layer
        self._prompts_NS = torch.zeros(0, dim)
        self._token_ids_N = torch.zeros(0, dtype=torch.int64)
        self._sum_LE = torch.zeros(num_layers, num_experts, dtype=torch.float64)
        # A search that spans several layers asks which records were written since it last looked.
        self.num_writes = 0
        self._write_N = torch.zeros(0, dtype=torch.int64)

    def __len__(self) -> int:
        """N, the number of records."""
        return self._size

    @property
    def maps_LNE(self) -> Tensor:
        """float16, a view: the stored maps, layer by layer."""
        return self._maps_LNE[:, : self._size]

    @property
    def keys(self) -> Keys:
        """The stored keys, views."""
        return Keys(self._prompts_NS[: self._size], self._token_ids_N[: self._size])

    @property
    def mean_LE(self) -> Tensor:
        """float32, the mean of the stored maps; zeros while there is none."""
        return (self._sum_LE / max(1, self._size)).float()

    def add(self, maps_TLE: Tensor, keys: Keys) -> Tensor:
        """Store finished iterations, one after the other.

        A full store gives up argmax_y RDY[x, y] for each new record x, where
        ``RDY = d/L * semantic score + (L-d)/L * cosine of the whole maps``. The released code takes
        all argmaxes at once, so that two new records may fall on one place and one of them is lost;
        here each sees the store as the one before it left it.

        Args:
            maps_TLE: float, their router probabilities.
            keys: Of the same T iterations.

        Returns:
            int64 [T], the number that each was stored under (again: records are overwritten).
        """
        if not maps_TLE.isfinite().all():
            raise ValueError("maps_TLE hold NaN or infinity: such a record would match everything")
        prompts_TS = normalize(keys.prompts_TS, dim=1).expand(len(maps_TLE), -1)
        records = [torch.zeros(0, dtype=torch.int64)]
        for start in range(0, len(maps_TLE), _BLOCK):
            block = slice(start, start + _BLOCK)
            block_keys = Keys(prompts_TS[block], keys.token_ids_T[block])
            records.append(self._add_block(maps_TLE[block], block_keys))
        return torch.cat(records)

    def semantic_scores_TN(self, keys: Keys) -> Tensor:
        """float32 [T, N], how alike the keys are (class docstring)."""
        unit_TS = normalize(keys.prompts_TS, dim=1)
        return self._semantic_scores(Keys(unit_TS, keys.token_ids_T), self.keys)

    def semantic_search(self, keys: Keys, num_neighbours: int = 1) -> Match:
        """The records with the most similar keys; the store must not be empty."""
        return _best(self.semantic_scores_TN(keys), num_neighbours)

    def begin(self, num_tokens: int) -> "PrefixSearch":
        """Search by map for tokens that are about to be routed together."""
        return PrefixSearch(self, num_tokens)

    def rows_LTE(self, match: Match, layers: slice) -> Tensor:
        """float32 [L, T, E]: some layers of the found maps, averaged over the M of each token."""
        rows_LTME = self._maps_LNE[layers][:, match.records_TM].float()
        return torch.einsum("tm,ltme->lte", match.weights_TM, rows_LTME)

    def written_since(self, num_writes: int) -> Tensor:
        """int64, the records that were written after the store counted ``num_writes``."""
        return (self._write_N[: self._size] > num_writes).nonzero().flatten()

    def prefix_sqnorms_N(self, layer: int) -> Tensor:
        """float32 [N], the squared norm of each map's rows 0..layer."""
        return self._sqnorms_LN[layer, : self._size]

    def tensors(self) -> dict[str, Tensor]:
        """The records, named for an artifact."""
        maps_NLE = self.maps_LNE.transpose(0, 1).contiguous()
        return dict(zip(_TENSORS, (maps_NLE, *self.keys), strict=True))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`, into an empty store; ValueError if its sizes differ."""
        maps_NLE, prompts_NS, token_ids_N = (tensors[name] for name in _TENSORS)
        expected = (self.num_layers, self.num_experts, self.dim)
        found = (*maps_NLE.shape[1:], prompts_NS.shape[1])
        if found != expected or not len(maps_NLE) == len(prompts_NS) == len(token_ids_N):
            raise ValueError(f"records have L, E, S = {found}, but the store has {expected}")
        if len(maps_NLE) > self.capacity:
            raise ValueError(f"{len(maps_NLE)} records: capacity={self.capacity}")
        self._reserve(len(maps_NLE))
        for n in range(len(maps_NLE)):
            self._size = n + 1
            self._write(n, maps_NLE[n], prompts_NS[n], token_ids_N[n])

    def _add_block(self, maps_TLE: Tensor, keys: Keys) -> Tensor:
        # Rounded first, so that a record is compared as it will be stored.
        maps_TLE = maps_TLE.to(torch.float16)
        num_new = len(maps_TLE)
        self._reserve(min(self.capacity, self._size + num_new))
        records_T = torch.zeros(num_new, dtype=torch.int64)
        num_appended = min(num_new, self.capacity - self._size)
        for t in range(num_appended):
            records_T[t] = self._size
            self._size += 1
            self._write(int(records_T[t]), maps_TLE[t], keys.prompts_TS[t], keys.token_ids_T[t])
        if num_appended == num_new:
            return records_T
        # What is left meets a full store. Scores against it are taken once; a record that is
        # overwritten meanwhile gets its column anew, from the scores of the new among themselves.
        left_TLE = maps_TLE[num_appended:]
        left = Keys(*(part[num_appended:] for part in keys))
        sqnorms_T = left_TLE.float().square().sum(dim=(1, 2))
        among_TT = self._redundancy(left_TLE, left, left_TLE.transpose(0, 1), sqnorms_T, left)
        stored_N = self.prefix_sqnorms_N(self.num_layers - 1)
        redundancy_TN = self._redundancy(left_TLE, left, self.maps_LNE, stored_N, self.keys)
        for t in range(len(left_TLE)):
            record = int(redundancy_TN[t].argmax())
            self._write(record, left_TLE[t], left.prompts_TS[t], left.token_ids_T[t])
            redundancy_TN[:, record] = among_TT[:, t]
            records_T[num_appended + t] = record
        return records_T

    def _redundancy(
        self,
        maps_TLE: Tensor,
        keys: Keys,
        others_LNE: Tensor,
        other_sqnorms_N: Tensor,
        other_keys: Keys,
    ) -> Tensor:
        dots_TN = torch.zeros(maps_TLE.shape[0], others_LNE.shape[1])
        for layer, others_NE in enumerate(others_LNE):
            dots_TN.addmm_(maps_TLE[:, layer].float(), others_NE.float().T)
        sqnorms_T1 = maps_TLE.float().square().sum(dim=(1, 2))[:, None]
        cosines_TN = dots_TN / (sqnorms_T1 * other_sqnorms_N).sqrt().clamp_min(1e-12)
        semantic_TN = self._semantic_scores(keys, other_keys)
        return self._semantic_share * semantic_TN + (1.0 - self._semantic_share) * cosines_TN

    def _semantic_scores(self, keys: Keys, others: Keys) -> Tensor:
        token_TN = self._token_similarity(keys.token_ids_T, others.token_ids_T)
        prompt_TN = keys.prompts_TS @ others.prompts_TS.T  # both of length 1
        has_token_T = keys.token_ids_T != UNKNOWN_TOKEN
        has_prompt_T = keys.prompts_TS.any(dim=1)
        weight_T = torch.where(has_prompt_T, self._token_weight, 1.0) * has_token_T
        return weight_T[:, None] * token_TN + (1.0 - weight_T)[:, None] * prompt_TN

    def _write(self, record: int, map_LE: Tensor, prompt_S: Tensor, token_id: Tensor) -> None:
        self._sum_LE -= self._maps_LNE[:, record]
        self._sum_LE += map_LE
        self._maps_LNE[:, record] = map_LE
        self._sqnorms_LN[:, record] = map_LE.float().square().sum(dim=1).cumsum(dim=0)
        self._prompts_NS[record] = prompt_S
        self._token_ids_N[record] = token_id
        self.num_writes += 1
        self._write_N[record] = self.num_writes

    def _reserve(self, size: int) -> None:
        """Make room for ``size`` records, doubling so that appending stays cheap."""
        have = len(self._token_ids_N)
        if size <= have:
            return
        more = min(self.capacity, max(size, 2 * have)) - have

        def longer(tensor: Tensor, dim: int) -> Tensor:
            shape = list(tensor.shape)
            shape[dim] = more
            return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)

        self._maps_LNE = longer(self._maps_LNE, 1)
        self._sqnorms_LN = longer(self._sqnorms_LN, 1)
        self._prompts_NS = longer(self._prompts_NS, 0)
        self._token_ids_N = longer(self._token_ids_N, 0)
        self._write_N = longer(self._write_N, 0)


class PrefixSearch:
    """One iteration's search by map, layer by layer, for T tokens routed together.

    Each layer adds its products to those of the layers before, so that a step costs N * E per
    token, whatever the length of the prefix; the result is that of a search with the whole prefix.
    Records that were overwritten or added since the last step are caught up with.

    Attributes:
        num_layers: How many layers it has seen.
    """

    def __init__(self, store: MapStore, num_tokens: int) -> None:
        self._store = store
        self._rows: list[Tensor] = []  # of the layers so far, each float32 [T, E]
        self._dots_TN = torch.zeros(num_tokens, len(store))
        self._sqnorms_T = torch.zeros(num_tokens)
        self._num_writes = store.num_writes

    @property
    def num_layers(self) -> int:
        """How many layers it has seen."""
        return len(self._rows)

    def extend(self, router_probs_TE: Tensor) -> None:
        """The tokens have been routed in the next layer, float [T, E]."""
        self._catch_up()
        row_TE = router_probs_TE.float()
        expected = (len(self._sqnorms_T), self._store.num_experts)
        if row_TE.shape != expected:
            raise ValueError(
                f"router_probs_TE of shape {tuple(row_TE.shape)} in layer {self.num_layers}: must "
                f"be {expected}, the tokens of layer 0 and the store's experts"
            )
        if not row_TE.isfinite().all():
            raise ValueError(f"router_probs_TE of layer {self.num_layers} hold NaN or infinity")
        self._dots_TN.addmm_(row_TE, self._store.maps_LNE[self.num_layers].float().T)
        self._sqnorms_T += row_TE.square().sum(dim=1)
        self._rows.append(row_TE)

    def scores_TN(self) -> Tensor:
        """float32 [T, N]: cosine of the flattened rows of the layers so far, at least one."""
        self._catch_up()
        sqnorms_N = self._store.prefix_sqnorms_N(self.num_layers - 1)
        return self._dots_TN / (self._sqnorms_T[:, None] * sqnorms_N).sqrt().clamp_min(1e-12)

    def search(self, num_neighbours: int = 1) -> Match:
        """The records whose maps began most alike; the store must not be empty."""
        return _best(self.scores_TN(), num_neighbours)

    def _catch_up(self) -> None:
        if self._num_writes == self._store.num_writes:
            return
        written_M = self._store.written_since(self._num_writes)
        num_new = len(self._store) - self._dots_TN.shape[1]
        self._dots_TN = torch.nn.functional.pad(self._dots_TN, (0, num_new))
        dots_TM = torch.zeros(len(self._dots_TN), len(written_M))
        for layer, row_TE in enumerate(self._rows):
            dots_TM.addmm_(row_TE, self._store.maps_LNE[layer, written_M].float().T)
        self._dots_TN[:, written_M] = dots_TM
        self._num_writes = self._store.num_writes


def _best(scores_TN: Tensor, num_neighbours: int) -> Match:
    if num_neighbours == 1:  # argmax is a tenth of topk's time
        scores_T, records_T = scores_TN.max(dim=1)
        return Match(scores_T, records_T[:, None], torch.ones(len(scores_T), 1))
    scores_TM, records_TM = scores_TN.topk(min(num_neighbours, scores_TN.shape[1]), dim=1)
    weights_TM = (scores_TM / _TEMPERATURE).softmax(dim=1)
    return Match((weights_TM * scores_TM).sum(dim=1), records_TM, weights_TM)
