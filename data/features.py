"""The feature store: router inputs on disk, memory-mapped, under a byte cap.

    features/
      shard-00000.safetensors   some whole requests of one split: a `RoutedTokens` in small dtypes
      ...
      manifest.json             what was read from what, the split of each shard, checksums; last

For models that are too slow to run again for every fit; where the model runs at thousands of
tokens a second, `data.router_inputs.LiveInputs` needs no disk. Both are a `RouterInputs`. Which
requests are stored, and in which shard, is fixed by the inputs and the cap alone: an interrupted
writing goes on with the missing shards.

Shape letters: N tokens of a shard · L MoE layers · E experts per layer · K experts per token ·
D hidden.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.errors import DamagedFileError, OutputExistsError
from data.files import atomic_path, digest_json, sha256_file, write_json
from data.router_inputs import LiveInputs, RoutedTokens
from data.schema import SPLITS, MoESpec, Split

logger = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 1
MANIFEST: Final = "manifest.json"
_SHARE: Mapping[Split, float] = {"fit": 0.8, "val": 0.1, "test": 0.1}  # of the cap, where it binds
_INPUTS_KEY = "moecast_inputs"
_FLOATS = ("router_input_LND", "router_probs_LNE")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    """One file, as the manifest has it."""

    file: str
    split: Split
    num_requests: int
    num_tokens: int
    num_bytes: int
    sha256: str


class FeatureStore:
    """A complete feature store, as a `RouterInputs`; shards are memory-mapped when they are read.

    Attributes:
        path: The folder.
        spec: The MoE that was observed.
        parents: Digest of each input by name.
        digest: Names the content.
    """

    def __init__(self, *, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.spec = MoESpec.from_json(manifest["spec"])
        self.parents: dict[str, str] = dict(manifest["parents"])
        self._shards = [_Shard(**entry) for entry in manifest["shards"]]
        self.digest = digest_json([shard.sha256 for shard in self._shards])
        self._verified: set[str] = set()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the store in the folder ``path``.

        Raises:
            FileNotFoundError: There is no complete store.
            DamagedFileError: The manifest cannot be read, or a shard is missing or cut off.
        """
        file = path / MANIFEST
        if not file.is_file():
            raise FileNotFoundError(f"{path} is no complete feature store: it has no {MANIFEST}")
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            if manifest["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema_version is {manifest['schema_version']!r}, not 1")
            store = cls(path=path, manifest=manifest)
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedFileError(file, f"not a feature store's manifest ({error})") from error
        for shard in store._shards:
            shard_file = path / shard.file
            if not shard_file.is_file():
                raise DamagedFileError(shard_file, "the manifest lists it, but it is not there")
            if (num_bytes := shard_file.stat().st_size) != shard.num_bytes:
                raise DamagedFileError(shard_file, f"has {num_bytes} bytes, not {shard.num_bytes}")
        return store

    def num_tokens(self, split: Split) -> int:
        """Tokens stored of a split."""
        return sum(shard.num_tokens for shard in self._shards if shard.split == split)

    def batches(self, split: Split, *, seed: int | None = None) -> Iterator[RoutedTokens]:
        """One shard after the other; a seed shuffles the shards.

        Raises:
            DamagedFileError: A shard is not what the manifest promised.
        """
        shards = [shard for shard in self._shards if shard.split == split]
        if seed is not None:
            np.random.default_rng(seed).shuffle(shards)  # type: ignore[arg-type]
        for shard in shards:
            yield self._read(shard)

    def _read(self, shard: _Shard) -> RoutedTokens:
        file = self.path / shard.file
        if shard.file not in self._verified:
            if sha256_file(file) != shard.sha256:
                raise DamagedFileError(file, "its SHA-256 is not the manifest's")
            self._verified.add(shard.file)
        try:
            tensors = load_file(file)
            return RoutedTokens(
                starts_N=tensors["starts_N"],
                token_ids_N=tensors["token_ids_N"].long(),
                topk_expert_ids_LNK=tensors["topk_expert_ids_LNK"].long(),
                router_probs_LNE=tensors["router_probs_LNE"].float(),
                router_input_LND=tensors["router_input_LND"],
            )
        except (SafetensorError, KeyError) as error:
            raise DamagedFileError(file, f"cannot be read ({error})") from error


def write_features(
    inputs: LiveInputs, path: Path, *, parents: Mapping[str, str], max_bytes: int
) -> FeatureStore:
    """Run the model over all requests and store what its routers receive, at most ``max_bytes``.

    Where that does not hold all, whole requests are left out, and "fit" gets 80 % of the bytes.

    Args:
        inputs: The running model; each of its batches becomes a shard.
        path: The store's folder: new, complete, or left behind by a killed run of the same inputs.
        parents: Digest of each input by name: of the traces, of the model.
        max_bytes: Of the tensors; headers add a percent.

    Raises:
        OutputExistsError: The folder holds something else.
        DamagedFileError: A shard that is there cannot be read.
        ValueError: ``max_bytes`` holds no batch of any split, or a router input is not finite in
            float16.
    """
    spec = inputs.spec
    plan, num_left_out = _plan(inputs, max_bytes)
    made_from = {"parents": dict(parents), "spec": spec.to_json(), "max_bytes": max_bytes}
    inputs_digest = digest_json([made_from, plan])
    path.mkdir(parents=True, exist_ok=True)
    done = _take_over(path, inputs_digest)
    if (path / MANIFEST).is_file():
        return FeatureStore.open(path)
    if num_left_out:
        logger.warning(
            "features %s: max_bytes=%d leaves out %d requests", path, max_bytes, num_left_out
        )
    shards = []
    for index, (split, group) in enumerate(plan):
        file = path / f"shard-{index:05d}.safetensors"
        if file.name not in done:
            tensors = _small(inputs.run(split, group))
            with atomic_path(file) as temporary:
                save_file(tensors, temporary, metadata={_INPUTS_KEY: inputs_digest})
        shards.append(
            {
                "file": file.name,
                "split": split,
                "num_requests": len(group),
                "num_tokens": inputs.num_tokens(split, group),
                "num_bytes": file.stat().st_size,
                "sha256": sha256_file(file),
            }
        )
    manifest = {**made_from, "schema_version": SCHEMA_VERSION, "shards": shards}
    write_json(path / MANIFEST, {**manifest, "inputs_digest": inputs_digest})
    store = FeatureStore.open(path)
    logger.info("features %s: %d shards, digest %s", path, len(shards), store.digest[:12])
    return store


def token_bytes(spec: MoESpec) -> int:
    """Bytes that one token takes in a store."""
    assert spec.hidden_size is not None, "read from a model, so known"
    id_bytes = 1 if spec.num_experts <= 256 else 2
    a_layer = 2 * spec.hidden_size + 2 * spec.num_experts + id_bytes * spec.top_k
    return spec.num_layers * a_layer + 4 + 1


def _plan(inputs: LiveInputs, max_bytes: int) -> tuple[list[tuple[Split, list[int]]], int]:
    """The batches that are stored, and how many requests are not."""
    most_tokens = max_bytes // token_bytes(inputs.spec)
    groups = {split: inputs.groups(split) for split in SPLITS}
    counts = {s: [inputs.num_tokens(s, group) for group in groups[s]] for s in SPLITS}
    fits = sum(map(sum, counts.values())) <= most_tokens
    plan: list[tuple[Split, list[int]]] = []
    num_left_out = 0
    for split in SPLITS:
        left = most_tokens if fits else int(_SHARE[split] * most_tokens)
        for group, num_tokens in zip(groups[split], counts[split], strict=True):
            left -= num_tokens
            if left >= 0:
                plan.append((split, group))
            else:
                num_left_out += len(group)
    if not plan:
        raise ValueError(
            f"max_bytes={max_bytes}: holds no batch; a token of {inputs.spec.describe()} takes "
            f"{token_bytes(inputs.spec)} bytes"
        )
    return plan, num_left_out


def _small(tokens: RoutedTokens) -> dict[str, Tensor]:
    """The fields in the dtypes that are stored."""
    tensors: dict[str, Tensor] = {f.name: getattr(tokens, f.name).cpu() for f in fields(tokens)}
    for name in _FLOATS:
        tensors[name] = tensors[name].half()
        is_bad_L = ~tensors[name].isfinite().flatten(1).all(1)
        if bool(is_bad_L.any()):
            bad = is_bad_L.nonzero().flatten().tolist()
            raise ValueError(f"{name} is not finite in float16 in MoE layers {bad}")
    tensors["token_ids_N"] = tensors["token_ids_N"].int()
    small = torch.uint8 if tokens.router_probs_LNE.shape[-1] <= 256 else torch.int16
    tensors["topk_expert_ids_LNK"] = tensors["topk_expert_ids_LNK"].to(small)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _take_over(path: Path, inputs_digest: str) -> set[str]:
    """The names of the shards that are there; refuses what is not ours."""
    done = set()
    for entry in sorted(path.iterdir()):
        if entry.name.startswith(".") and entry.name.endswith(".tmp"):
            entry.unlink()  # cut off while it was written
            continue
        if entry.name == MANIFEST:
            try:
                found = json.loads(entry.read_text(encoding="utf-8")).get("inputs_digest")
            except (ValueError, AttributeError) as error:
                raise DamagedFileError(entry, f"not JSON ({error})") from error
        elif entry.name.startswith("shard-") and entry.suffix == ".safetensors":
            try:
                with safe_open(entry, framework="pt") as shard:
                    found = (shard.metadata() or {}).get(_INPUTS_KEY)
            except SafetensorError as error:
                raise DamagedFileError(entry, f"cannot be read ({error})") from error
            done.add(entry.name)
        else:
            raise OutputExistsError(path, f"it holds {entry.name!r}, no part of a feature store")
        if found != inputs_digest:
            raise OutputExistsError(
                path, f"{entry.name} was made from other inputs: name another folder, or delete it"
            )
    return done
