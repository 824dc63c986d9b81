"""The slow tier: all routed experts of a model in one memory-mapped safetensors file.

A store is a folder named by the digest of its content:

    <digest>/experts.safetensors   one tensor per MoE layer, "layer.<l>" of shape [E, P]
    <digest>/manifest.json         written last: schema version, layout, sizes, digest

Equal weights in an equal layout have an equal digest, whatever model object they come from, so a
store is found again, never guessed to be the right one; a store whose bytes no longer give its
digest is written anew. The data starts on a page boundary: every record is aligned.

Knows nothing of slots, policies or forward passes.

Shape letters: L MoE layers · E experts per layer · P elements of a record (`expert_layout`).
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from data.adapters import MoELayer, expert_parameters
from data.errors import DamagedFileError
from data.files import atomic_dir, digest_json, write_json
from runtime.expert_layout import ExpertLayout, expert_tensors

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
EXPERTS_FILE = "experts.safetensors"
MANIFEST_FILE = "manifest.json"
_PAGE_BYTES = 4096
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class HostStore:
    """Read access to every expert of a model; the operating system pages them in.

    Args:
        path: The store's folder.
        layout: Of the records in it.
        num_layers: L.
        num_experts: E.

    Raises:
        DamagedFileError: The file does not hold what its manifest promises.
    """

    def __init__(
        self, *, path: Path, layout: ExpertLayout, num_layers: int, num_experts: int
    ) -> None:
        self.path = path
        self.layout = layout
        self.num_layers = num_layers
        self.num_experts = num_experts
        self._records_EP = _map_file(path / EXPERTS_FILE, layout, num_layers, num_experts)

    def record_P(self, layer: int, expert: int) -> Tensor:
        """One expert where it lies in the file, not copied; never write to it."""
        return self._records_EP[layer][expert]

    def content_digest(self) -> str:
        """Digest of what the file holds now; equals the folder's name unless it is damaged."""
        records = (
            self.record_P(layer, expert)
            for layer in range(self.num_layers)
            for expert in range(self.num_experts)
        )
        return _digest(records, self.layout, self.num_layers, self.num_experts)


def open_store(folder: Path, layers: Sequence[MoELayer]) -> HostStore:
    """Find the store of these layers' experts below ``folder``, or write it.

    The model is only read: until the store is complete, nothing about it has changed. Beside the
    model's own tensors, memory holds one record at a time (the file's pages are the kernel's to
    drop).

    Args:
        folder: Where stores live; made if it does not exist.
        layers: All MoE layers of the model, of one shape.

    Raises:
        ValueError: The experts' dtype is not served.
    """
    layout = ExpertLayout.of(layers[0].experts)
    num_layers, num_experts = len(layers), layers[0].num_experts
    digest = _digest(_records(layers, layout, "Digest"), layout, num_layers, num_experts)
    path = folder / digest[:32]
    opened = partial(
        HostStore, path=path, layout=layout, num_layers=num_layers, num_experts=num_experts
    )
    if path.exists():
        try:
            store = opened()
            if store.content_digest() != digest:
                raise DamagedFileError(path / EXPERTS_FILE, "its bytes do not give its digest")
        except DamagedFileError as error:
            logger.warning("%s; writing it anew", error)
        else:
            logger.info("Expert store %s is there already", path)
            return store
    with atomic_dir(path) as temporary:
        with (temporary / EXPERTS_FILE).open("wb") as file:
            _write_header(file, layout, num_layers, num_experts)
            for record_P in _records(layers, layout, "Write"):
                file.write(_bytes_of(record_P))
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "digest": digest,
            "num_layers": num_layers,
            "num_experts": num_experts,
            "layout": layout.to_json(),
        }
        write_json(temporary / MANIFEST_FILE, manifest)
    logger.info(
        "Wrote expert store %s: %d layers x %d experts, %d bytes",
        path,
        num_layers,
        num_experts,
        (path / EXPERTS_FILE).stat().st_size,
    )
    return opened()


def release_experts(layer: MoELayer, device: torch.device | str = "cpu") -> None:
    """Free the memory of a layer's expert parameters; whoever holds the records can restore it.

    The parameters stay the same objects, of the same shape and dtype, but show one NaN (on
    ``device``) everywhere: whoever computes with them by mistake gets NaN, not a plausible number.
    """
    for _, parameter in expert_parameters(layer.experts):
        nothing = torch.full((1,), torch.nan, dtype=parameter.dtype, device=device)
        parameter.data = nothing.expand(parameter.shape)


def restore_experts(layer: MoELayer, store: HostStore) -> None:
    """Fill a layer's expert parameters from ``store``, bit for bit as they were."""
    for _, parameter in expert_parameters(layer.experts):
        parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype)
    tensors = expert_tensors(layer.experts)
    for expert in range(store.num_experts):
        store.layout.unpack(store.record_P(layer.layer, expert), tensors, expert)


def _records(layers: Sequence[MoELayer], layout: ExpertLayout, task: str) -> Iterator[Tensor]:
    """Every expert's record in file order; one buffer, valid until the next is asked for."""
    record_P = torch.zeros(layout.record_elements, dtype=layout.dtype)
    total = len(layers) * layers[0].num_experts
    with tqdm(total=total, desc=f"{task} experts", unit="expert", disable=None) as progress:
        for layer in layers:
            tensors = expert_tensors(layer.experts)
            for expert in range(layer.num_experts):
                layout.pack(tensors, expert, record_P)
                yield record_P
                progress.update()


def _digest(
    records: Iterator[Tensor], layout: ExpertLayout, num_layers: int, num_experts: int
) -> str:
    digest = hashlib.sha256(
        digest_json([SCHEMA_VERSION, layout.to_json(), num_layers, num_experts]).encode()
    )
    for record_P in records:
        digest.update(_bytes_of(record_P))
    return digest.hexdigest()


def _bytes_of(record_P: Tensor) -> memoryview:
    return record_P.view(torch.uint8).numpy().data


def _write_header(file: BinaryIO, layout: ExpertLayout, num_layers: int, num_experts: int) -> None:
    """Write a safetensors header padded with spaces, so that the data starts on a page."""
    layer_bytes = num_experts * layout.record_bytes
    entries = {
        f"layer.{layer}": {
            "dtype": _SAFETENSORS_DTYPES[layout.dtype],
            "shape": [num_experts, layout.record_elements],
            "data_offsets": [layer * layer_bytes, (layer + 1) * layer_bytes],
        }
        for layer in range(num_layers)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-(8 + len(header)) % _PAGE_BYTES)
    file.write(len(header).to_bytes(8, "little"))
    file.write(header)


def _map_file(path: Path, layout: ExpertLayout, num_layers: int, num_experts: int) -> list[Tensor]:
    shape = (num_experts, layout.record_elements)
    try:
        with safe_open(path, framework="pt") as file:
            records_EP = [file.get_tensor(f"layer.{layer}") for layer in range(num_layers)]
    except (OSError, SafetensorError) as error:
        raise DamagedFileError(path, str(error)) from error
    if any(layer.shape != shape or layer.dtype != layout.dtype for layer in records_EP):
        raise DamagedFileError(path, f"its tensors are not all {list(shape)} of {layout.dtype}")
    return records_EP
