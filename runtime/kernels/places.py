"""Where a neuron of an expert is read: in its slot, where a prefetch has landed, or at home.

All three are records of the same form, so that a neuron lies at the same offset in each; what a
slot or a landing does not hold is never read there.
"""

import triton
import triton.language as tl


@triton.jit
def address_of(first, slot, present, landed, until, home):
    """The record to read neurons from ``first`` on in, up to the next multiple of 64.

    Args:
        first: A neuron.
        slot: Address of the expert's slot; 0 = none.
        present: How many leading neurons the slot holds.
        landed: Address of a record that holds those from there up to ``until``.
        until: 0 = nothing has landed.
        home: Address of the whole record.
    """
    beside = tl.where(first < until, landed, home)
    return tl.where((slot != 0) & (first < present), slot, beside)
