"""What stands between the projections of an expert, inside kernels: `activation.Activation`."""

import triton
import triton.language as tl


@triton.jit
def activate(gate, up, KIND: tl.constexpr, HAS_GATE: tl.constexpr, ALPHA, LIMIT):
    """`Activation` of float32 blocks; ``KIND`` is its place in `activation.KINDS`."""
    x = gate if HAS_GATE else up
    if KIND == 0:
        y = x * tl.sigmoid(x)
    elif KIND == 1:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 2:
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = 0.5 * x * (1.0 + (2.0 * tl.sigmoid(2.0 * z) - 1.0))
    elif KIND == 3:
        y = tl.maximum(x, 0.0)
    else:
        clamped = tl.minimum(gate, LIMIT)
        y = clamped * tl.sigmoid(ALPHA * clamped)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
    return y * up if HAS_GATE else y
