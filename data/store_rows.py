"""A trace as one row of a Parquet shard, and back.

The columns are named as the fields of `Trace` and have explicit `datasets.Features`; the values go
through pyarrow, which keeps uint8 and float16 as they are. The only module that needs `datasets`.

Shape letters: T tokens · L MoE layers · E experts per layer · K experts per token ·
P positions · S embedding.
"""

import dataclasses
import hashlib
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Array3D, Features, List, Value

from data.files import digest_json
from data.schema import MoESpec, Trace


def features_of(spec: MoESpec) -> Features:
    """The columns of every shard; they are named as the fields of `Trace`."""
    per_choice = (None, spec.num_layers, spec.top_k)
    per_expert = (None, spec.num_layers, spec.num_experts)
    return Features(
        {
            "request_id": Value("string"),
            "source": Value("string"),
            "topic": Value("string"),
            "topk_expert_ids_TLK": Array3D(per_choice, ids_dtype(spec.num_experts)),
            "num_prompt_tokens": Value("int32"),
            "first_routed_position": Value("int32"),
            "topk_probs_TLK": Array3D(per_choice, "float16"),
            "router_probs_TLE": Array3D(per_expert, "float16"),
            "token_ids_P": List(Value("int32")),
            "prompt": Value("string"),
            "prompt_embedding_S": List(Value("float32")),
        }
    )


def ids_dtype(num_experts: int) -> Literal["uint8", "int16"]:
    """The smaller of a trace's two dtypes that holds every expert id."""
    return "uint8" if num_experts <= 256 else "int16"


def check(trace: Trace, spec: MoESpec) -> None:
    """Refuse what the columns would silently convert or cut."""
    layers, top_k, experts = spec.num_layers, spec.top_k, spec.num_experts
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "topk_expert_ids_TLK": (ids_dtype(experts), (trace.num_tokens, layers, top_k)),
        "topk_probs_TLK": ("float16", (trace.num_tokens, layers, top_k)),
        "router_probs_TLE": ("float16", (trace.num_tokens, layers, experts)),
        "token_ids_P": ("int32", (-1,)),
        "prompt_embedding_S": ("float32", (-1,)),
    }
    for name, (dtype, shape) in expected.items():
        array = getattr(trace, name)
        if array is None:
            continue
        if shape == (-1,):
            shape = (array.size,)
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(
                f"request {trace.request_id!r}: {name} is {array.dtype} {array.shape}, "
                f"it must be {dtype} {shape}"
            )


def trace_digest(trace: Trace) -> str:
    """Digest of a trace's content, whatever file format it lies in."""
    plain: dict[str, Any] = {}
    digest = hashlib.sha256()
    for field in dataclasses.fields(trace):
        value = getattr(trace, field.name)
        if isinstance(value, np.ndarray):
            plain[field.name] = [str(value.dtype), *value.shape]
            digest.update(np.ascontiguousarray(value).data)
        else:
            plain[field.name] = value
    digest.update(digest_json(plain).encode())
    return digest.hexdigest()


def one_row(value: Any, column_type: pa.DataType) -> pa.Array:
    """An Arrow array of length one; arrays become nested lists without a Python loop."""
    if not isinstance(value, np.ndarray):
        return pa.array([value], column_type)
    nested = pa.array(value.reshape(-1))
    for size in value.shape[:0:-1]:
        offsets = np.arange(0, len(nested) + 1, size, dtype=np.int32)
        nested = pa.ListArray.from_arrays(offsets, nested)
    row = pa.ListArray.from_arrays(np.array([0, len(nested)], np.int32), nested)
    if isinstance(column_type, pa.ExtensionType):
        return pa.ExtensionArray.from_storage(column_type, row)
    return row


def value_of(column: pa.ChunkedArray) -> Any:
    """Inverse of `one_row`: a plain value, or a writable array of the column's own dtype."""
    row = column.combine_chunks()
    if row.null_count:
        return None
    shape: tuple[int, ...] = (-1,)
    if isinstance(row.type, pa.ExtensionType):
        shape = (-1, *row.type.shape[1:])
        row = row.storage
    elif not pa.types.is_list(row.type):
        return row[0].as_py()
    while pa.types.is_list(row.type):
        row = row.flatten()
    array: npt.NDArray[Any] = row.to_numpy(zero_copy_only=False, writable=True)
    return array.reshape(shape)
