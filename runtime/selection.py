"""The cache's two small tensor programs: choosing the lowest scores, and handing on slots.

Pure fixed-shape operations (`runtime.policies.base` lists the rules), over any leading dimensions.

Shape letters: L MoE layers · E experts per layer · V chosen experts.
"""

import torch
from torch import Tensor

_ID_BITS = 20
MAX_EXPERTS = (1 << _ID_BITS) - 1  # in one layer or pool: what a sort key has room for
_BEHIND_ALL = torch.iinfo(torch.int64).max


def count(mask: Tensor) -> Tensor:
    """How many of the last dimension are marked; int64 [..., 1]."""
    return mask.sum(-1, keepdim=True)


def lowest(score_LE: Tensor, allowed_LE: Tensor, most: int) -> Tensor:
    """The allowed experts of lowest score, lowest first, ties by expert id.

    Args:
        score_LE: float32, broadcastable to the mask; no NaN.
        allowed_LE: bool.
        most: V, at most E of which are returned.

    Returns:
        int64 ids [..., V]; where fewer than V are allowed, the rest are arbitrary other experts.
    """
    num_experts = allowed_LE.shape[-1]
    # Distinct integers in the order of (score, id), since topk leaves open how it orders ties.
    # Adding +0.0 turns -0.0 into it; negative floats sort backwards when read as integers.
    bits_LE = (score_LE + 0.0).view(torch.int32)
    ordered_LE = bits_LE ^ ((bits_LE >> 31) & 0x7FFFFFFF)
    ids_E = torch.arange(num_experts, device=score_LE.device)
    key_LE = torch.add(ids_E, ordered_LE, alpha=1 << _ID_BITS)  # in int64, as ids are
    behind_all = torch.full((), _BEHIND_ALL, device=score_LE.device)  # twice as fast as masked_fill
    masked_LE = torch.where(allowed_LE, key_LE, behind_all)
    return masked_LE.topk(min(most, num_experts), dim=-1, largest=False).indices


def hand_on_slots(slot_of_LE: Tensor, insert_LE: Tensor, evict_LE: Tensor, used_L1: Tensor) -> None:
    """Give newcomers, by ascending id, the free slots and then the victims', by ascending id.

    Args:
        slot_of_LE: int64, -1 = none; changed in place.
        insert_LE: bool, the newcomers.
        evict_LE: bool, the victims: no more than newcomers.
        used_L1: int64, residents before this step, which hold slots 0..used-1.
    """
    num_experts = slot_of_LE.shape[-1]
    num_free_taken_L1 = count(insert_LE) - count(evict_LE)
    # The j-th newcomer gets offered[j]: used, used + 1, ... and then what the victims held. What is
    # written for experts that are no victims goes to the extra column E.
    offered_LE = used_L1 + torch.arange(num_experts + 1, device=slot_of_LE.device)
    place_LE = evict_LE.cumsum(-1) - 1 + num_free_taken_L1
    offered_LE.scatter_(-1, place_LE.masked_fill(~evict_LE, num_experts), slot_of_LE)
    new_slot_LE = offered_LE.gather(-1, (insert_LE.cumsum(-1) - 1).clamp(min=0))
    slot_of_LE.masked_fill_(evict_LE, -1)
    torch.where(insert_LE, new_slot_LE, slot_of_LE, out=slot_of_LE)
