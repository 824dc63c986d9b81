"""How one routed expert lies in memory, and how it gets there from a model's own tensors.

One expert is one flat record, so that it travels in one copy and a table needs one address for it:

    | block_FRD: F x (gate row, up row, down column), each of length D |
    | up_bias_FU: F x (gate bias, up bias) | down_bias_D |               only where has_bias
    | zeros up to a multiple of 64 bytes |

The block is neuron-major: everything that belongs to inner neuron f is contiguous, so any range
of neurons is too, and one pass over memory computes gate, up, activation and down. Experts without
a gate have R = 2 rows per neuron instead of 3. Records start at multiples of 64 bytes wherever
they lie, because matrix kernels may round differently for differently aligned operands.

Knows nothing of files, caches or devices; `torch.Tensor.copy_` between equal dtypes moves bits.

Shape letters: E experts per layer · D hidden · F expert FFN inner size · R rows per inner neuron ·
U of those in the up projection (R - 1) · P elements of a record.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.adapters import expert_parameters

ALIGNMENT_BYTES = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayout:
    """The shape of an expert's record, and of the tensors that a family keeps its experts in.

    Args:
        hidden_size: D.
        expert_intermediate_size: F.
        dtype: One of `DTYPES`; quantized experts are not served.
        has_gate: gate and up projection, or only up.
        has_bias: Both projections add a bias.
        is_transposed: The family's matrices are [in, out] instead of [out, in].
        is_concatenated: Its gate and up rows follow each other, instead of alternating.

    Raises:
        ValueError: The dtype is not served.
    """

    hidden_size: int
    expert_intermediate_size: int
    dtype: torch.dtype
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool

    def __post_init__(self) -> None:
        """Check the dtype."""
        if self.dtype not in DTYPES:
            raise ValueError(
                f"experts of dtype {self.dtype} cannot be offloaded: load the model in one of "
                f"{', '.join(str(dtype) for dtype in DTYPES)}"
            )

    @classmethod
    def of(cls, experts: nn.Module) -> "ExpertLayout":
        """Read the layout off an experts module of transformers' ``ExpertsInterface``."""
        down_proj = experts.down_proj
        assert isinstance(down_proj, Tensor)
        inner, outer = down_proj.shape[1:] if experts.is_transposed else down_proj.shape[:0:-1]
        return cls(
            hidden_size=outer,
            expert_intermediate_size=inner,
            dtype=down_proj.dtype,
            has_gate=bool(experts.has_gate),
            has_bias=bool(experts.has_bias),
            is_transposed=bool(experts.is_transposed),
            is_concatenated=bool(experts.is_concatenated),
        )

    @property
    def num_rows(self) -> int:
        """R, the rows per inner neuron."""
        return 3 if self.has_gate else 2

    @property
    def block_elements(self) -> int:
        """Elements of the neuron-major block."""
        return self.expert_intermediate_size * self.num_rows * self.hidden_size

    @property
    def record_elements(self) -> int:
        """P, the elements of a record, padding included."""
        elements = self.block_elements
        if self.has_bias:
            elements += self.expert_intermediate_size * (self.num_rows - 1) + self.hidden_size
        multiple = ALIGNMENT_BYTES // self.dtype.itemsize
        return math.ceil(elements / multiple) * multiple

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, padding included."""
        return self.record_elements * self.dtype.itemsize

    def block_FRD(self, record_P: Tensor) -> Tensor:
        """The weights in a record, as a view."""
        shape = (self.expert_intermediate_size, self.num_rows, self.hidden_size)
        return record_P[: self.block_elements].view(shape)

    def up_bias_FU(self, record_P: Tensor) -> Tensor:
        """The biases of gate and up in a record, as a view."""
        shape = (self.expert_intermediate_size, self.num_rows - 1)
        return record_P[self.block_elements :][: math.prod(shape)].view(shape)

    def down_bias_D(self, record_P: Tensor) -> Tensor:
        """The bias of the down projection in a record, as a view."""
        start = self.block_elements + self.expert_intermediate_size * (self.num_rows - 1)
        return record_P[start : start + self.hidden_size]

    def pack(self, tensors: Mapping[str, Tensor], expert: int, record_P: Tensor) -> None:
        """Copy one expert out of a family's tensors into ``record_P``, bit for bit."""
        for theirs, ours in self._pairs(tensors, expert, record_P):
            ours.copy_(theirs)

    def unpack(self, record_P: Tensor, tensors: Mapping[str, Tensor], expert: int) -> None:
        """Inverse of `pack`: write one expert into a family's tensors."""
        for theirs, ours in self._pairs(tensors, expert, record_P):
            theirs.copy_(ours)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return {
            **{name: getattr(self, name) for name in self.__slots__},
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _pairs(
        self, tensors: Mapping[str, Tensor], expert: int, record_P: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of equal shape: a part of the family's tensors, and where it lies in a record."""
        name = "gate_up_proj" if self.has_gate else "up_proj"
        up, down = tensors[name][expert], tensors["down_proj"][expert]
        if self.is_transposed:
            up = up.T
        else:
            down = down.T
        block_FRD = self.block_FRD(record_P)
        for row, matrix_FD in enumerate([*self._split_rows(up), down]):
            yield matrix_FD, block_FRD[:, row]
        if self.has_bias:
            up_bias_FU = self.up_bias_FU(record_P)
            for row, bias_F in enumerate(self._split_rows(tensors[f"{name}_bias"][expert])):
                yield bias_F, up_bias_FU[:, row]
            yield tensors["down_proj_bias"][expert], self.down_bias_D(record_P)

    def _split_rows(self, up: Tensor) -> list[Tensor]:
        """Gate and up of a tensor whose first dimension holds both in the family's order."""
        if not self.has_gate:
            return [up]
        if self.is_concatenated:
            return list(torch.split(up, self.expert_intermediate_size))
        return [up[::2], up[1::2]]


def expert_tensors(experts: nn.Module) -> dict[str, Tensor]:
    """The tensors behind an experts module's parameters, as `ExpertLayout.pack` takes them."""
    return {name: parameter.data for name, parameter in expert_parameters(experts)}
