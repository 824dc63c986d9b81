"""Which experts shall be resident where nothing else is used: eMoE's expected-token loading.

Source: eMoE §3.3 (period), §3.4 (Eq. 2, budget per layer, skip rule). A decision alone: what is
queued is told, who shall be resident is answered; nothing is moved here. `runtime.served_residents`
asks as requests begin, `benchmarks.resident_tasks` as it replays them.

Eq. 2: an expert e of a layer l is worth the tokens that will be routed to it, over all tasks g:

    N[l, e] = sum over g of (prompt tokens queued + requests * W_o[g]) * s[g, l] * f[g, l, e]

and the best C of a layer are resident. Where the paper leaves something open, and where we differ:

- Every ``period`` requests the predictor is asked *and* residents are decided anew; between that
  they are reused (§3.3). §3.4 has Eq. 2 evaluated whenever requests are scheduled: period 1.
- The paper loads all experts for the first request. Here the budget holds from the start, and
  the profile's frequencies, which were measured offline, stand in for past requests.
- f comes from the profile; or from a predictor that reads a history of finished requests for each
  task of its own. Until a task's first request has finished, it is the profile's.
- Skip rule: if no queued task is sensitive in a layer (all N are 0), it keeps what it has: the
  paper's. Ours besides: so it does if what is resident serves nearly as many of the expected tokens
  as the best choice would (``skip_loss``), since bytes are then moved for nothing.
- Which requests are "about to be scheduled" the paper does not say. Here it is the next ``period``
  of the queue: those that run with this decision's residents. For later ones there is a later one.

Shape letters: G tasks · L MoE layers · E experts per layer · C slots.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from predictors.base import Predictor, Request
from predictors.request_history import RequestHistory
from predictors.task_profile import TaskProfile
from runtime.attach_checks import check_spec
from runtime.resident_routing import most_wanted

logger = logging.getLogger(__name__)


class Queued(NamedTuple):
    """A request that begins or waits.

    Attributes:
        task: Place among the profile's tasks.
        prompt_tokens: Its length.
    """

    task: int
    prompt_tokens: int


def expected_tokens_LE(
    queue: Sequence[Queued], *, use_GLE: Tensor, sensitive_GL: Tensor, answer_tokens_G: Tensor
) -> Tensor:
    """Eq. 2: the tokens that each expert is expected to get, of tasks that are sensitive there.

    Args:
        queue: Running and waiting requests.
        use_GLE: float, f.
        sensitive_GL: bool, s.
        answer_tokens_G: float, W_o.

    Returns:
        float32 [L, E].
    """
    tokens_G = torch.zeros(len(answer_tokens_G))
    for request in queue:
        tokens_G[request.task] += request.prompt_tokens + answer_tokens_G[request.task]
    return torch.einsum("g,gl,gle->le", tokens_G, sensitive_GL.float(), use_GLE.float())


class ResidentPlanner:
    """Says every ``period`` requests who shall be resident.

    Args:
        profile: Of the tasks.
        slots: C of each layer, at least K.
        period: p, requests between two decisions; the paper's is 40. Low where loading is cheap.
        min_agreement: Below it a task is sensitive (`TaskProfile.sensitive_GL`); above 1 all are.
        skip_loss: A layer is left alone if its residents serve so little less of the expected
            tokens than the best would, as a share, in [0, 1]; 0 moves for the least gain.
        predictor: Fitted, remembers requests (`predictors.task`); None takes f from the profile.

    Attributes:
        profile: As given.
        slots: As given.
        period: As given.
        resident_LE: bool, who was decided to be resident; at first by the profile, all tasks alike.
        num_plans: Decisions since.
        layers_changed: Layers in which one changed something.
        layers_kept: Layers in which one did not.

    Raises:
        SpecMismatchError: The predictor was fitted for another model.
        ValueError: A value is out of range, or the predictor remembers no requests.
    """

    def __init__(
        self,
        *,
        profile: TaskProfile,
        slots: Sequence[int],
        period: int = 40,
        min_agreement: float = 0.85,
        skip_loss: float = 0.02,
        predictor: Predictor | None = None,
    ) -> None:
        spec = profile.spec
        if len(slots) != spec.num_layers or not all(
            spec.top_k <= count <= spec.num_experts for count in slots
        ):
            raise ValueError(
                f"slots={tuple(slots)}: {spec.describe()} needs {spec.num_layers} numbers in "
                f"{spec.top_k}..{spec.num_experts}"
            )
        if period < 1:
            raise ValueError(f"period={period}: must be at least 1")
        if not min_agreement >= 0:
            raise ValueError(f"min_agreement={min_agreement}: must be at least 0")
        if not 0 <= skip_loss <= 1:
            raise ValueError(f"skip_loss={skip_loss}: must be in [0, 1]")
        self.profile, self.period = profile, period
        self.slots = tuple(slots)
        self._skip_loss = skip_loss
        self._sensitive_GL = profile.sensitive_GL(min_agreement=min_agreement)
        self._histories = [RequestHistory() for _ in profile.tasks]
        self._views: list[Predictor] = []
        if predictor is not None:
            check_spec(predictor, spec)
            self._views = [predictor.with_history(history) for history in self._histories]
            if self._views[0] is predictor:
                raise ValueError(
                    f"predictor {predictor.kind!r} does not read finished requests: only one that "
                    "does, such as 'task', can say what a task's next requests use"
                )
        self._since_plan = period  # so that the first request is decided for
        self.resident_LE = most_wanted(profile.use_GLE.mean(dim=0), self.slots)
        self.num_plans = self.layers_changed = self.layers_kept = 0

    @property
    def is_due(self) -> bool:
        """Whether the next request to begin is decided for anew."""
        return self._since_plan >= self.period

    def begin(self) -> None:
        """Count a request that begins; ask `is_due` before."""
        self._since_plan += 1

    def plan(self, queue: Sequence[Queued]) -> Tensor:
        """Decide; `is_due` is then false until enough requests have begun.

        Args:
            queue: The requests that begin and wait, in the order in which they will begin; those
                beyond the period are left to the next decision.

        Returns:
            bool [L, E], `resident_LE`.
        """
        self._since_plan = 0
        tokens_LE = expected_tokens_LE(
            queue[: self.period],
            use_GLE=self._use_GLE(),
            sensitive_GL=self._sensitive_GL,
            answer_tokens_G=self.profile.answer_tokens_G,
        )
        best_LE = most_wanted(tokens_LE, self.slots)
        most_L = (tokens_LE * best_LE).sum(dim=1)
        served_L = (tokens_LE * self.resident_LE).sum(dim=1)
        keeps_L = served_L >= (1 - self._skip_loss) * most_L  # all are 0 where nobody is sensitive
        keeps_L |= (best_LE == self.resident_LE).all(dim=1)
        self.resident_LE = torch.where(keeps_L[:, None], self.resident_LE, best_LE)
        self.num_plans += 1
        self.layers_kept += int(keeps_L.sum())
        self.layers_changed += int((~keeps_L).sum())
        return self.resident_LE

    def finished(self, task: int, use_LE: Tensor) -> None:
        """A request is over; the predictor, if there is one, will have seen it.

        Args:
            task: Its task.
            use_LE: float32, share of its tokens that used each expert, or would have, had all been
                resident.
        """
        self._histories[task].add(use_LE)

    def _use_GLE(self) -> Tensor:
        """f: what the predictor says of each task, or else the profile."""
        if not self._views:
            return self.profile.use_GLE
        rows = self.profile.use_GLE.clone()
        for task, (view, history) in enumerate(zip(self._views, self._histories, strict=True)):
            if history.num_finished:
                try:
                    forecast = view.on_request(view.new_state(), Request())
                except Exception:  # whatever it is: requests are answered without it, too
                    logger.warning("The predictor failed; the profile decides", exc_info=True)
                    self._views = []
                    return self.profile.use_GLE
                assert forecast is not None, "who reads finished requests speaks of the next one"
                rows[task] = forecast.next_LE
        return rows
