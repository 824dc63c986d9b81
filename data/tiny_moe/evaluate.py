"""What a trained model learned: held-out loss per domain and the statistics of its routing.

Everything here is computed from the weights as saved. Letters as in `routing`, plus M domains,
N windows.
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F

from data.tiny_moe.routing import RouterTap
from data.tiny_moe.topology import MoECausalLM

Metrics = dict[str, object]

DEAD_BELOW = 0.1
"""An expert is called dead when its share of the slots is below this part of an even share."""


@torch.no_grad()
def run_windows(
    model: MoECausalLM, ids_NT: np.ndarray, *, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Run windows of tokens through the model.

    Returns:
        Loss of each next token, float64 nats `[N, T-1]`, and chosen experts, uint8 `[N, T, L, K]`.
    """
    losses, routes = [], []
    model.eval()
    with RouterTap(model) as tap:
        for start in range(0, len(ids_NT), batch_size):
            rows = ids_NT[start : start + batch_size].astype(np.int64)
            ids_BT = torch.from_numpy(rows).to(model.device)
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
            loss_BT = F.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")
            losses.append(loss_BT.double().cpu().numpy())
            ids_TLK = tap.expert_ids_LTK().transpose(0, 1).to(torch.uint8).cpu().numpy()
            routes.append(ids_TLK.reshape(*rows.shape, *ids_TLK.shape[1:]))
    return np.concatenate(losses), np.concatenate(routes)


def windows(stream: np.ndarray, *, seq_len: int, most: int) -> np.ndarray:
    """Cut up to `most` windows `[N, T]` out of a stream, spread evenly, without overlap."""
    seq_len = min(seq_len, len(stream))
    available = len(stream) // seq_len
    chosen = np.unique(np.linspace(0, available - 1, min(most, available)).astype(int))
    return np.stack([stream[i * seq_len : (i + 1) * seq_len] for i in chosen])


def evaluate(
    model: MoECausalLM,
    *,
    names: list[str],
    held_out: list[np.ndarray],
    train: list[np.ndarray],
    weights: np.ndarray,
    token_num_bytes: np.ndarray,
    seq_len: int,
    most_windows: int,
    batch_size: int,
) -> Metrics:
    """Measure loss, load balance, routing differences between domains and predictability.

    Args:
        model: The model as it will be shipped.
        names: Domain names.
        held_out: Per domain, the token stream of the held-out documents.
        train: Per domain, the training stream; expert popularity is counted here.
        weights: Per domain, its share of the training mixture.
        token_num_bytes: Bytes of text per token id.
        seq_len: Window length in tokens.
        most_windows: Windows per domain, at most.
        batch_size: Windows per forward pass.
    """
    num_experts = model.config.num_experts
    domains: dict[str, Metrics] = {}
    routes_M, share_MLE, popular_MLE = [], [], []
    for name, held_stream, train_stream in zip(names, held_out, train, strict=True):
        ids_NT = windows(held_stream, seq_len=seq_len, most=most_windows)
        loss_NT, routes_NTLK = run_windows(model, ids_NT, batch_size=batch_size)
        train_NT = windows(train_stream, seq_len=seq_len, most=most_windows)
        _, train_routes_NTLK = run_windows(model, train_NT, batch_size=batch_size)
        num_bytes = int(token_num_bytes[ids_NT[:, 1:]].sum())
        domains[name] = {
            "held_out_tokens": int(loss_NT.size),
            "loss_nats_per_token": float(loss_NT.mean()),
            "bits_per_byte": float(loss_NT.sum() / np.log(2) / num_bytes),
            "previous_token_recall": float(previous_token_recall_L(routes_NTLK).mean()),
        }
        routes_M.append(routes_NTLK)
        share_MLE.append(expert_shares_LE(routes_NTLK, num_experts=num_experts))
        popular_MLE.append(expert_shares_LE(train_routes_NTLK, num_experts=num_experts))
    mixture_LE = np.einsum("m,mle->le", weights, np.stack(share_MLE))
    popular_LE = np.einsum("m,mle->le", weights, np.stack(popular_MLE))
    previous_L = np.mean([previous_token_recall_L(r) for r in routes_M], axis=0)
    popularity_L = np.mean([popularity_recall_L(r, popular_LE) for r in routes_M], axis=0)
    by_domain_L = np.mean(
        [popularity_recall_L(r, p) for r, p in zip(routes_M, popular_MLE, strict=True)], axis=0
    )
    tv_L, js_L = domain_distances_L(np.stack(share_MLE))
    layers = [
        {
            "min_share_of_even": float(mixture_LE[layer].min() * num_experts),
            "max_share_of_even": float(mixture_LE[layer].max() * num_experts),
            "dead_experts": int((mixture_LE[layer] * num_experts < DEAD_BELOW).sum()),
            "cv": float(mixture_LE[layer].std() / mixture_LE[layer].mean()),
            "domain_total_variation": float(tv_L[layer]),
            "domain_jensen_shannon_bits": float(js_L[layer]),
            "previous_token_recall": float(previous_L[layer]),
            "popularity_recall": float(popularity_L[layer]),
            "domain_popularity_recall": float(by_domain_L[layer]),
        }
        for layer in range(len(mixture_LE))
    ]
    return {"domains": domains, "layers": layers}


def expert_shares_LE(routes_NTLK: np.ndarray, *, num_experts: int) -> np.ndarray:
    """Share of each layer's slots per expert, float64 `[L, E]`, rows sum to 1."""
    num_layers = routes_NTLK.shape[2]
    return np.stack(
        [
            np.bincount(routes_NTLK[:, :, layer].ravel(), minlength=num_experts)
            / routes_NTLK[:, :, layer].size
            for layer in range(num_layers)
        ]
    )


def previous_token_recall_L(routes_NTLK: np.ndarray) -> np.ndarray:
    """Slot recall of "the same experts as the previous token of the window", `[L]`."""
    now, before = routes_NTLK[:, 1:, :, :, None], routes_NTLK[:, :-1, :, None, :]
    return np.asarray((now == before).any(-1).mean((0, 1, 3)))


def popularity_recall_L(routes_NTLK: np.ndarray, popular_LE: np.ndarray) -> np.ndarray:
    """Slot recall at K of "the K experts that are used most in `popular_LE`", `[L]`."""
    top_k = routes_NTLK.shape[-1]
    best_LK = np.argsort(-popular_LE, axis=1, kind="stable")[:, :top_k]
    return np.asarray((routes_NTLK[..., None] == best_LK[:, None, :]).any(-1).mean((0, 1, 3)))


def domain_distances_L(share_MLE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean distance between the expert usage of two domains, over all pairs.

    Returns:
        Total variation `[L]` in [0, 1] and Jensen-Shannon divergence `[L]` in bits, in [0, 1].
    """
    variation, divergence = [], []
    for p_LE, q_LE in itertools.combinations(share_MLE, 2):
        variation.append(np.abs(p_LE - q_LE).sum(1) / 2)
        middle_LE = (p_LE + q_LE) / 2
        entropy = [_entropy_bits_L(x_LE) for x_LE in (middle_LE, p_LE, q_LE)]
        divergence.append(entropy[0] - (entropy[1] + entropy[2]) / 2)
    return np.mean(variation, axis=0), np.mean(divergence, axis=0)


def _entropy_bits_L(p_LE: np.ndarray) -> np.ndarray:
    return np.asarray(-(p_LE * np.log2(np.where(p_LE > 0, p_LE, 1.0))).sum(1))
