"""One small rule for all layers and experts: what it learns on one kind of text holds on another.

The forecaster's networks know the experts of the text that they were fitted on. This one knows
none: it reads a handful of numbers of one expert's past, weighs them alike for every layer and
expert, and says when that expert is used again. Being so small, it can go on learning from finished
requests while it serves (`predictors.follower`). It reads no token ids.

Source: ours; docs/log.md has the figures.

Shape letters: T tokens · L MoE layers · E experts per layer · R rows of a history
(`predictors.token_history`) · J features · G discounts · N (token, layer) pairs · B those of a
step.
"""

import logging
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from predictors.token_history import DECAYS, NUM_PAST

logger = logging.getLogger(__name__)

NUM_FEATURES = 9
_NAME = "shared."  # before the names of its tensors in an artifact
_BATCH = 256  # (token, layer) pairs of a step, all experts of each
UNKNOWN_TOKENS = 40  # tokens at the end whose next use has hardly had the time to come


class SharedNet(nn.Module):
    """Log odds of use by the next token, and of ``g^(d-1)`` for each discount: [..., 1 + G].

    ``d`` is the distance to the expert's next use, 1 for the very next token.

    Args:
        num_discounts: G.
        hidden_dim: Of its one hidden layer.
    """

    norm_J2: Tensor

    def __init__(self, *, num_discounts: int, hidden_dim: int = 32) -> None:
        super().__init__()
        self.register_buffer("norm_J2", torch.tensor([[0.0, 1.0]]).repeat(NUM_FEATURES, 1))
        self.read = nn.Linear(NUM_FEATURES, hidden_dim)
        self.say = nn.Linear(hidden_dim, 1 + num_discounts)

    def forward(self, features_J: Tensor) -> Tensor:
        """Any leading dimensions; `norm_J2` holds the features' means and deviations."""
        mean_J, sd_J = self.norm_J2.unbind(-1)
        said: Tensor = self.say(F.gelu(self.read((features_J - mean_J) / sd_J)))
        return said


def features_of(rows: Tensor, *, shift: Tensor, start: Tensor, num_tokens: Tensor) -> Tensor:
    """What `SharedNet` reads, from a past that started at popularity and should not have.

    Averages forget where they started at a known rate, so their start is exchanged afterwards.

    Args:
        rows: float32 [..., R, L, E] (`token_history.as_rows`); one layer's [..., R, E] will do.
        shift: float32 [L, E] or [E], ``start`` less what the past started at.
        start: float32, likewise: what is expected before anything has been routed.
        num_tokens: int64, of any shape that broadcasts against the leading dimensions followed by
            one place for each dimension of ``start``: tokens in the past.

    Returns:
        float32 [..., L, E, J] or [..., E, J]: use by the last token, the averages, the age, the log
        odds of the two slowest averages and of the start.
    """
    row_dim = -1 - start.ndim
    use, *averages, age = rows.narrow(row_dim, 1, NUM_PAST - 1).unbind(row_dim)
    averages = [
        (average + decay**num_tokens * shift).clamp(0.0, 1.0)
        for average, decay in zip(averages, DECAYS, strict=True)
    ]
    odds = [average.logit(1e-3) for average in (*averages[-2:], start.expand_as(use))]
    return torch.stack([use, *averages, age, *odds], dim=-1)


def distances_TLE(use_TLE: Tensor) -> Tensor:
    """float32, tokens from before each row to the next use, 1 for the row itself; inf for none."""
    distance_LE = torch.full(use_TLE.shape[1:], torch.inf)
    rows = []
    for use_LE in use_TLE.flip(0):
        distance_LE = torch.where(use_LE > 0, 1.0, distance_LE + 1)
        rows.append(distance_LE)
    return torch.stack(rows[::-1])


def learn(
    net: SharedNet,
    optimizer: torch.optim.Optimizer,
    features_TLEJ: Tensor,
    use_TLE: Tensor,
    *,
    discounts: Sequence[float],
    num_steps: int,
    generator: torch.Generator,
) -> None:
    """Some steps on requests laid end to end, on all tokens but the last ones.

    Args:
        net: Learns.
        optimizer: Of its parameters.
        features_TLEJ: Floats, what was known before each token.
        use_TLE: bool, what the token used.
        discounts: G of them.
        num_steps: Of `_BATCH` (token, layer) pairs.
        generator: Draws them.
    """
    stop = max(1, len(use_TLE) - UNKNOWN_TOKENS)
    discounts_G = torch.tensor(discounts)
    distance_NE = distances_TLE(use_TLE)[:stop].flatten(0, 1)
    features_NEJ = features_TLEJ[:stop].flatten(0, 1)
    with torch.enable_grad():
        for _ in range(num_steps):
            rows_B = torch.randint(len(features_NEJ), (_BATCH,), generator=generator)
            distance_BE1 = distance_NE[rows_B, :, None]
            target = torch.cat([(distance_BE1 == 1).float(), discounts_G ** (distance_BE1 - 1)], -1)
            said = net(features_NEJ[rows_B].float())
            loss = F.binary_cross_entropy_with_logits(said, target)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def rule_tensors(net: SharedNet | None) -> dict[str, Tensor]:
    """What an artifact holds of it, float32."""
    return {} if net is None else {f"{_NAME}{key}": t for key, t in net.state_dict().items()}


def rule_of(tensors: Mapping[str, Tensor], *, num_discounts: int) -> SharedNet | None:
    """Inverse of `rule_tensors`; none, and a warning, where there was none yet when it was saved.

    Raises:
        KeyError: A part of it is missing.
        RuntimeError: Its sizes are others.
    """
    if not any(key.startswith(_NAME) for key in tensors):
        logger.warning(
            "this forecaster was fitted before forecasters followed finished requests: it does not "
            "adapt to text unlike that of its fit; fit it anew"
        )
        return None
    net = SharedNet(num_discounts=num_discounts)
    net.load_state_dict({key: tensors[f"{_NAME}{key}"] for key in net.state_dict()})
    return net.requires_grad_(False)
