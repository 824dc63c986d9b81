"""How MoEpic divides memory: how much each layer gets, and how thinly its experts are cut.

Every cached expert keeps its **top**, the first share of its neurons, in memory; the **bottom**
travels when it is needed, while the top is computed. With V experts' worth of memory a layer can
hold the tops of C experts, each of share V / C: many thin ones hit more often, few thick ones leave
less to travel. `expert_split` picks C for each layer, `allocate` moves memory between layers (the
paper's Algorithm 1, a local search), and `allocate_optimally` solves the same problem by dynamic
programming and says how far from the optimum it can be at most.

Source: MoEpic sections 3.4.1 and 3.4.2, Eqs 5 to 11 and Algorithm 1. Deviations:

- C is a whole number from ceil(V) to E, and the mass that is present is clamped to [0, K].
- P(y, C) of Eq 10 is read as P(y), the only one that is defined.
- A donor must keep at least one zeta, a layer gets no more than E, and rounds are bounded.
- Before the first layer, the window is the head's and that layer's attention, as in Eq 7; what the
  last layer leaves over is lost, since the next token is not known yet.

Knows neither caches nor devices: statistics and measured times in, numbers out.

Shape letters: L MoE layers · E experts per layer · K experts per token · C cached experts ·
Y places in the predicted order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_LEAST_GAIN = 1e-9  # relative: less than that is rounding, and an endless search


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitTimes:
    """What a step is made of, as measured; seconds.

    Args:
        attention_s: One layer's attention and everything else outside its experts.
        moe_s: One layer's K experts, all in memory.
        head_s: What follows the last layer and precedes the first.
        load_s: Bringing in one whole expert.

    Raises:
        ValueError: A time is negative, or loading takes none.
    """

    attention_s: float
    moe_s: float
    head_s: float
    load_s: float

    def __post_init__(self) -> None:
        """Check the values."""
        times = (self.attention_s, self.moe_s, self.head_s, self.load_s)
        if min(times) < 0 or self.load_s == 0:
            raise ValueError(f"{self}: times must not be negative, and load_s must be positive")


class SplitStatistics:
    """What the layers of a model have used, in the terms of the latency model.

    One pass over the tokens counts for all cache sizes at once: where experts are ranked by their
    priority before a token, rank r (from 0) would be cached in every cache of more than r experts.
    A cache that evicts on a miss holds nearly, but not always, its highest priorities.

    Args:
        num_layers: L.
        num_experts: E.
        top_k: K.
    """

    def __init__(self, *, num_layers: int, num_experts: int, top_k: int) -> None:
        self.top_k = top_k
        self._used_LR = np.zeros((num_layers, num_experts))
        self._right_LY = np.zeros((num_layers, num_experts))
        self._rank_LYR = np.zeros((num_layers, num_experts, num_experts))
        self._tokens_L = np.zeros(num_layers)

    @property
    def num_tokens(self) -> int:
        """Tokens that every layer has seen."""
        return int(self._tokens_L.min())

    def add(
        self, layer: int, *, priority_E: Floats, used_E: NDArray[np.bool_], said_E: Floats
    ) -> None:
        """Count one token.

        Args:
            layer: The layer.
            priority_E: Of the cache policy, before the token; the higher, the rather kept.
            used_E: What the token uses.
            said_E: What was predicted of it; the higher, the sooner it is prefetched. What has 0 or
                less does not come (`runtime.kernels.speculate`).
        """
        order_R = np.argsort(-priority_E, kind="stable")
        rank_E = np.empty_like(order_R)
        rank_E[order_R] = np.arange(len(order_R))
        order_Y = np.argsort(-said_E, kind="stable")
        self._used_LR[layer] += used_E[order_R]
        self._right_LY[layer] += (used_E & (said_E > 0))[order_Y]
        self._rank_LYR[layer, np.arange(len(order_Y)), rank_E[order_Y]] += 1
        self._tokens_L[layer] += 1

    def layers(self) -> list["LayerStatistics"]:
        """As `shares_of_counts`."""
        return shares_of_counts(
            self._used_LR,
            self._right_LY,
            self._rank_LYR,
            tokens_L=self._tokens_L,
            top_k=self.top_k,
        )


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """One layer, the paper's H, P and PH; C runs from 0 to E, Y over all E places.

    Attributes:
        hit_C: Share of uses that a cache of C experts would have held.
        right_Y: How often the y-th predicted expert was used.
        cached_YC: How often it would have been in a cache of C.
        top_k: K.
    """

    hit_C: Floats
    right_Y: Floats
    cached_YC: Floats
    top_k: int

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.right_Y)

    def present_C(self, memory: float, window_s: float, load_s: float) -> tuple[Ints, Floats]:
        """Expected experts' worth of weights that are there when a layer has routed (Eqs 9, 10).

        Args:
            memory: V, in experts, in (0, E].
            window_s: How long prefetching may take.
            load_s: Of a whole expert.

        Returns:
            The candidates C, and of each what is present, in [0, K].
        """
        size_C = np.arange(max(1, int(np.ceil(memory - 1e-9))), self.num_experts + 1)
        share_C = np.minimum(1.0, memory / size_C)
        travels_YC = 1.0 - self.cached_YC[:, size_C] * share_C
        in_time_YC = travels_YC.cumsum(0) * load_s <= window_s
        present_C = self.top_k * self.hit_C[size_C] * share_C
        present_C = present_C + (travels_YC * in_time_YC * self.right_Y[:, None]).sum(0)
        return size_C, present_C.clip(0.0, self.top_k)


def shares_of_counts(
    used_LR: Floats, right_LY: Floats, rank_LYR: Floats, *, tokens_L: Floats, top_k: int
) -> list[LayerStatistics]:
    """Shares instead of counts.

    Args:
        used_LR: Uses of whom had each rank by priority.
        right_LY: Uses of whom stood at each place of the predicted order.
        rank_LYR: How often each place's had each rank.
        tokens_L: That each layer has seen.
        top_k: K.

    Raises:
        ValueError: A layer has seen no token.
    """
    if not tokens_L.all():
        raise ValueError(f"tokens seen per layer: {tokens_L.tolist()}; needs one in each")
    return [
        LayerStatistics(
            hit_C=np.concatenate([[0.0], used_R.cumsum()]) / (tokens * top_k),
            right_Y=right_Y / tokens,
            cached_YC=np.pad(rank_YR.cumsum(-1), ((0, 0), (1, 0))) / tokens,
            top_k=top_k,
        )
        for used_R, right_Y, rank_YR, tokens in zip(
            used_LR, right_LY, rank_LYR, tokens_L, strict=True
        )
    ]


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """How memory is divided; `stall_s` is the objective.

    Attributes:
        memory_L: V of each layer, in experts.
        cached_L: C of each layer.
        stall_L: Expected seconds that each layer waits for weights.
    """

    memory_L: Floats
    cached_L: Ints
    stall_L: Floats

    @property
    def share_L(self) -> Floats:
        """Theta: the share of each cached expert that stays in memory."""
        return np.minimum(1.0, self.memory_L / self.cached_L)

    @property
    def stall_s(self) -> float:
        """Of one token, all layers."""
        return float(self.stall_L.sum())

    def split_F(self, num_neurons: int, *, multiple: int = 64) -> list[int]:
        """Neurons of each layer's tops: multiples, rounded down so that memory suffices.

        A layer whose share is less than one multiple keeps one, so that a top exists.
        """
        whole = (self.share_L * num_neurons + 1e-6) // multiple * multiple
        whole = np.where(self.share_L >= 1.0, num_neurons, np.maximum(whole, multiple))
        return [int(min(n, num_neurons)) for n in whole]


def expert_split(
    memory_L: Floats, layers: Sequence[LayerStatistics], times: SplitTimes
) -> SplitPlan:
    """The paper's ExpertSplit: layer by layer, the C with the most weights present (Eq 11)."""
    window_s = times.head_s + times.attention_s
    cached, stalls = [], []
    for memory, layer in zip(memory_L, layers, strict=True):
        size_C, present_C = layer.present_C(memory, window_s, times.load_s)
        best = int(present_C.argmax())
        stall_s, window_s = _exposed(present_C[best], layer.top_k, times)
        cached.append(size_C[best])
        stalls.append(stall_s)
    return SplitPlan(np.array(memory_L, float), np.array(cached), np.array(stalls))


def allocate(
    memory: float,
    layers: Sequence[LayerStatistics],
    times: SplitTimes,
    *,
    zeta: float = 0.01,
    max_rounds: int = 1000,
) -> SplitPlan:
    """The paper's Algorithm 1: while it pays, move memory from where it is least missed.

    Args:
        memory: V_e, experts' worth for all layers together.
        layers: Their statistics.
        times: Measured.
        zeta: Share of ``memory`` that changes hands in a round.
        max_rounds: Bound on a search that stops by itself as a rule.

    Raises:
        ValueError: The memory is none, or more than all experts take.
    """
    _check_memory(memory, layers)
    step = zeta * memory
    plan = expert_split(np.full(len(layers), memory / len(layers)), layers, times)
    most_L = np.array([layer.num_experts for layer in layers], float)
    for _ in range(max_rounds):
        gets_L = plan.memory_L + step <= most_L + 1e-9
        gives_L = plan.memory_L - step >= step - 1e-9
        more = expert_split(np.minimum(plan.memory_L + step, most_L), layers, times)
        less = expert_split(np.maximum(plan.memory_L - step, 1e-3), layers, times)
        gain_L = np.where(gets_L, plan.stall_L - more.stall_L, -np.inf)
        to = int(gain_L.argmax())
        gives_L[to] = False
        if not gets_L[to] or not gives_L.any():
            return plan
        loss_L = np.where(gives_L, less.stall_L - plan.stall_L, np.inf)
        moved_L = plan.memory_L.copy()
        moved_L[to] += step
        moved_L[int(loss_L.argmin())] -= step
        moved = expert_split(moved_L, layers, times)
        if moved.stall_s >= plan.stall_s * (1 - _LEAST_GAIN):
            return plan
        plan = moved
    return plan


def allocate_optimally(
    memory: float,
    layers: Sequence[LayerStatistics],
    times: SplitTimes,
    *,
    unit: float = 1.0,
    num_windows: int = 48,
) -> SplitPlan:
    """The same objective by dynamic programming over layers, memory and the prefetch window.

    A layer's memory is a whole number of units, its C is free, and the window that it leaves to the
    next layer is rounded down to one of ``num_windows`` values while searching. The plan's stall is
    exact; what rounding costs falls with a smaller unit and more windows.

    Args:
        memory: V_e, experts' worth for all layers together; what is less than a unit is not used.
        layers: Their statistics.
        times: Measured.
        unit: Experts' worth in which memory is dealt out.
        num_windows: Steps of the window.

    Raises:
        ValueError: The memory is less than a unit a layer, or more than all experts take.
    """
    _check_memory(memory, layers)
    num_units = int(memory / unit + 1e-9)
    if num_units < len(layers):
        raise ValueError(f"memory={memory}: {len(layers)} layers need one unit={unit} each")
    widest_s = times.attention_s + max(times.moe_s, times.head_s)
    window_W = np.linspace(0.0, widest_s, num_windows)

    def place(window_s: float) -> int:
        return int(np.searchsorted(window_W, window_s * (1 + 1e-12), side="right")) - 1

    # Rows of these tables are windows, columns units spent.
    cost_WB = np.full((num_windows, num_units + 1), np.inf)
    cost_WB[place(times.head_s + times.attention_s), 0] = 0.0
    choices: list[Ints] = []
    for layer in layers:
        next_WB = np.full_like(cost_WB, np.inf)
        choice_WBX = np.zeros((num_windows, num_units + 1, 3), np.int64)  # units, C, row before
        for row in np.flatnonzero(np.isfinite(cost_WB).any(1)):
            for units in range(1, min(num_units, int(layer.num_experts / unit + 1e-9)) + 1):
                size_C, present_C = layer.present_C(units * unit, window_W[row], times.load_s)
                before_B = cost_WB[row, : num_units + 1 - units]
                for size, stall_s, window_s in _worthwhile(size_C, present_C, layer.top_k, times):
                    to = place(window_s)
                    better_B = before_B + stall_s < next_WB[to, units:]
                    next_WB[to, units:][better_B] = before_B[better_B] + stall_s
                    choice_WBX[to, units:][better_B] = units, size, row
        cost_WB = next_WB
        choices.append(choice_WBX)
    row, column = np.unravel_index(int(cost_WB.argmin()), cost_WB.shape)
    memory_L, cached_L = np.zeros(len(layers)), np.zeros(len(layers), np.int64)
    for layer_index in reversed(range(len(layers))):
        units, size, before = choices[layer_index][row, column]
        memory_L[layer_index], cached_L[layer_index] = units * unit, size
        row, column = before, column - units
    return SplitPlan(memory_L, cached_L, stall_of(memory_L, cached_L, layers, times))


def stall_of(
    memory_L: Floats,
    cached_L: Ints,
    layers: Sequence[LayerStatistics],
    times: SplitTimes,
) -> Floats:
    """Expected seconds that each layer waits, for a given division (Eqs 5 to 7): float64 [L]."""
    window_s, stalls = times.head_s + times.attention_s, []
    for memory, cached, layer in zip(memory_L, cached_L, layers, strict=True):
        size_C, present_C = layer.present_C(memory, window_s, times.load_s)
        present = float(present_C[np.flatnonzero(size_C == cached)[0]])
        stall_s, window_s = _exposed(present, layer.top_k, times)
        stalls.append(stall_s)
    return np.array(stalls)


def _exposed(present: float, top_k: int, times: SplitTimes) -> tuple[float, float]:
    """What is waited for, and the window that is left to the next layer (Eqs 5 to 7)."""
    hide_s = present * times.moe_s / top_k
    miss_s = (top_k - present) * times.load_s
    return max(0.0, miss_s - hide_s), times.moe_s - min(hide_s, miss_s) + times.attention_s


def _worthwhile(
    size_C: Ints, present_C: Floats, top_k: int, times: SplitTimes
) -> list[tuple[int, float, float]]:
    """(C, stall, next window) of the choices that no other beats in both."""
    kept: list[tuple[int, float, float]] = []
    for at in np.argsort(-present_C, kind="stable"):
        stall_s, window_s = _exposed(float(present_C[at]), top_k, times)
        if not kept or window_s > kept[-1][2] * (1 + 1e-12):
            kept.append((int(size_C[at]), stall_s, window_s))
    return kept


def _check_memory(memory: float, layers: Sequence[LayerStatistics]) -> None:
    most = sum(layer.num_experts for layer in layers)
    if not 0 < memory <= most:
        raise ValueError(f"memory={memory}: must be above 0 and at most all {most} experts")
