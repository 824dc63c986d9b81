"""What one input token says about the experts it will use, whatever the request is about.

FineMoE keys the record of a decode iteration by the model's own embedding of the iteration's input.
That embedding has no context: two iterations with the same token id have cosine 1. So its search is
a look-up by id, and this table is that store with equal keys merged. Knows nothing of prompts.

Shape letters: V kept tokens · L MoE layers · E experts per layer · T tokens.
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from data.schema import TraceSet
from predictors.routing import expert_use_TLE, traces_of

_EPSILON = 1e-4  # probabilities are kept this far from 0 and 1 before their odds are taken


def log_odds(probability: Tensor) -> Tensor:
    """log(p / (1 - p)), finite for p = 0 and p = 1."""
    return torch.logit(probability.float(), eps=_EPSILON)


class TokenUse:
    """How much more likely each expert is once the next input token is known.

    Args:
        token_ids_V: int64, the tokens that have a record.
        log_odds_VLE: float16, log odds of use given the token, minus log odds of popularity.
    """

    def __init__(self, token_ids_V: Tensor, log_odds_VLE: Tensor) -> None:
        self._token_ids_V, self._log_odds_VLE = token_ids_V, log_odds_VLE
        self._row = {int(token): row for row, token in enumerate(token_ids_V)}

    @classmethod
    def fit(
        cls, traces: TraceSet, popularity_LE: Tensor, *, capacity: int, prior_tokens: float
    ) -> "TokenUse":
        """Average all rows of the "fit" requests, prefill too, by their input token.

        Args:
            traces: Those without token ids are skipped.
            popularity_LE: Mean use, float32.
            capacity: Keep the most frequent tokens only.
            prior_tokens: A token's record starts as this many tokens of average use, so that one
                sighting does not make a certainty.
        """
        counts: Counter[int] = Counter()
        for trace in traces_of(traces, "fit"):
            if trace.token_ids_P is not None:
                first = trace.first_routed_position
                counts.update(trace.token_ids_P[first : first + trace.num_tokens].tolist())
        kept = sorted(token for token, _ in counts.most_common(capacity))
        token_ids_V = np.array(kept, np.int64)
        use_VLE = torch.zeros(len(kept), *popularity_LE.shape)
        for trace in traces_of(traces, "fit"):
            if trace.token_ids_P is None:
                continue
            first = trace.first_routed_position
            ids_T = trace.token_ids_P[first : first + trace.num_tokens]
            known_T = np.isin(ids_T, token_ids_V)
            rows_T = torch.from_numpy(np.searchsorted(token_ids_V, ids_T[known_T]))
            use_TLE = expert_use_TLE(trace, popularity_LE.shape[1])[known_T]
            use_VLE.index_add_(0, rows_T, torch.from_numpy(use_TLE).float())
        seen_V = torch.tensor([float(counts[token]) for token in kept])[:, None, None]
        use_VLE = (use_VLE + prior_tokens * popularity_LE) / (seen_V + prior_tokens)
        gain_VLE = log_odds(use_VLE) - log_odds(popularity_LE)
        return cls(torch.from_numpy(token_ids_V), gain_VLE.half())

    def __len__(self) -> int:
        """V, the number of kept tokens."""
        return len(self._row)

    def applied(self, use_LE: Tensor, token_id: int | None) -> Tensor | None:
        """``use_LE`` once the token is known: the two are taken as independent evidence.

        Returns:
            float32 [L, E] probabilities, or None for a token without a record.
        """
        row = None if token_id is None else self._row.get(token_id)
        if row is None:
            return None
        return torch.sigmoid(log_odds(use_LE) + self._log_odds_VLE[row])

    def tensors(self) -> dict[str, Tensor]:
        """Everything, named for an artifact."""
        return {"token_ids_V": self._token_ids_V, "token_log_odds_VLE": self._log_odds_VLE}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "TokenUse":
        """Inverse of `tensors`."""
        return cls(tensors["token_ids_V"], tensors["token_log_odds_VLE"])
