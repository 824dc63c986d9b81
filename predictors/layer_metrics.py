"""How good forecasts of the coming layers are, told from routed tokens with or without inputs.

- **Slot recall@K at lookahead h, target layer l**: of the K experts that a token used in layer l,
  how many are among the K that stood highest when layer l - h of that very token had routed.
  Denominator: tokens x K. Layers l < h have no such moment and are not counted at lookahead h.
- **Over-fetch curve**: the same for k = K..3K experts fetched, averaged over target layers.
- **Before the token**: the same of `Forecast.next_LE` as it stood before layer 0; what serves
  layer 0 itself.

A layer that was not spoken of (NaN) counts as one whose K experts were all missed, and is counted
apart. Every token is judged as if decoded, one after the other. Ties rank by expert id.

Shape letters: N tokens · L MoE layers · E experts per layer · K experts per token · H layers ahead.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.router_inputs import RoutedTokens
from data.schema import Split, TraceSet
from predictors.base import Predictor
from predictors.routing import decode_rows, traces_of

_UNKNOWN_ID = -1  # no tokenizer's


def recorded_batches(traces: TraceSet, split: Split) -> Iterator[RoutedTokens]:
    """Each request's decode rows as they were recorded, without router inputs."""
    num_experts = traces.spec.num_experts
    for trace in traces_of(traces, split):
        rows = decode_rows(trace)
        if rows.stop == rows.start:
            continue
        ids_N = torch.full((rows.stop - rows.start,), _UNKNOWN_ID)
        if trace.token_ids_P is not None:
            first = trace.first_routed_position
            ids_N = torch.from_numpy(trace.token_ids_P[first + rows.start : first + rows.stop])
        maps_NLE = np.stack(
            [trace.expert_map_LE(t, num_experts) for t in range(rows.start, rows.stop)]
        )
        experts_NLK = torch.from_numpy(trace.topk_expert_ids_TLK[rows]).long()
        yield RoutedTokens(
            starts_N=torch.arange(len(ids_N)) == 0,
            token_ids_N=ids_N.long(),
            topk_expert_ids_LNK=experts_NLK.transpose(0, 1),
            router_probs_LNE=torch.from_numpy(maps_NLE).transpose(0, 1),
            router_input_LND=None,
        )


def evaluate_layer_recall(
    predictor: Predictor, batches: Iterable[RoutedTokens], *, max_tokens: int | None = None
) -> dict[str, Any]:
    """Replay routed tokens and judge what was said of their coming layers, strictly causally.

    Args:
        predictor: A fitted one that speaks at the layer moment, bound if it needs a model.
        batches: Tokens of the model that it was fitted for, none of them seen in fitting; router
            inputs may be missing for predictors that read none.
        max_tokens: Stop after the batch that reaches so many tokens; None judges all.

    Returns:
        Plain values: ``by_lookahead`` {h: recall}; ``by_layer`` {h: recall of each target layer,
        None where there is none}; ``overfetch`` {h: {k: recall}}; ``before_token`` {"by_layer",
        "overfetch"}, recalls of what was said before layer 0, by target layer; ``silent`` {h: share
        of (token, layer) that nothing was said of}, key "0" for before the token; ``num_tokens``.
        Keys of mappings are strings, as in JSON.

    Raises:
        ValueError: There is nothing to judge, or the predictor does not speak layer by layer.
    """
    spec = predictor.fitted_spec()
    num_layers, num_experts, top_k = spec.num_layers, spec.num_experts, spec.top_k
    hits: dict[int, Tensor] = {}  # lookahead -> [target layer, rank]: used experts found there
    silent: dict[int, int] = {}
    num_tokens = 0
    for tokens in batches:
        walked = predictor.walk_layers(tokens)
        device = tokens.topk_expert_ids_LNK.device
        used_LNE = torch.zeros(
            num_layers, len(tokens.starts_N), num_experts, dtype=torch.bool, device=device
        ).scatter_(-1, tokens.topk_expert_ids_LNK, True)
        said = {0: walked.before_NLE.transpose(0, 1).to(device)}
        for h in range(1, min(walked.ahead_LNHE.shape[2], num_layers - 1) + 1):
            said[h] = walked.ahead_LNHE[: num_layers - h, :, h - 1].to(device)
        for h, said_LNE in said.items():
            is_silent_LN = said_LNE.isnan().any(-1)
            order_LNE = said_LNE.argsort(dim=-1, descending=True, stable=True)
            hits_LNE = used_LNE[h:].gather(-1, order_LNE) & ~is_silent_LN[..., None]
            if h not in hits:
                hits[h] = torch.zeros(num_layers, num_experts, dtype=torch.int64)
                silent[h] = 0
            hits[h][h:] += hits_LNE.sum(1).cpu()
            silent[h] += int(is_silent_LN.sum())
        num_tokens += len(tokens.starts_N)
        if max_tokens is not None and num_tokens >= max_tokens:
            break
    if not num_tokens:
        raise ValueError("no token to judge: the batches are empty")
    recall = {h: hits_LE.cumsum(-1) / (num_tokens * top_k) for h, hits_LE in hits.items()}
    fetched = range(top_k, min(3 * top_k, num_experts) + 1)
    ahead = sorted(h for h in recall if h > 0)
    overfetch = {
        h: {str(k): float(recall_LE[h:, k - 1].mean()) for k in fetched}
        for h, recall_LE in recall.items()
    }
    return {
        "by_lookahead": {str(h): overfetch[h][str(top_k)] for h in ahead},
        "by_layer": {
            str(h): [None] * h + [float(x) for x in recall[h][h:, top_k - 1]] for h in ahead
        },
        "overfetch": {str(h): overfetch[h] for h in ahead},
        "before_token": {
            "by_layer": [float(x) for x in recall[0][:, top_k - 1]],
            "overfetch": overfetch[0],
        },
        "silent": {
            str(h): count / (num_tokens * (num_layers - h)) for h, count in sorted(silent.items())
        },
        "num_tokens": num_tokens,
    }
