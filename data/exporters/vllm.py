"""Writes traces as vLLM's ``routed_experts`` arrays; `data.importers.vllm` describes the file.

    python -m data.exporters.vllm trace=PATH_OR_NAME out=FILE.npz

Probabilities, embeddings and fingerprints of prompts have no place in vLLM's arrays and are left
out; ids, tokens, topics, prompts and the split survive the way there and back.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data.cli import parse_cli
from data.errors import MoecastError
from data.files import atomic_path
from data.importers import load_traces
from data.importers.vllm import GENERATED, METADATA, PROMPT, SCHEMA_VERSION
from data.schema import MoESpec, Trace, TraceSet


@dataclass
class Options:
    """Write traces as vLLM's routed_experts arrays.

    Args:
        trace: A trace store, a trace file or a name, such as gptoss20b.
        out: The npz to write.
    """

    trace: str
    out: Path


def export_vllm(traces: TraceSet, path: Path) -> None:
    """Write all requests to one npz, atomically.

    The layer axis counts decoder layers as vLLM's does, with zeros for dense ones, up to the last
    MoE layer.

    Args:
        traces: Any traces.
        path: The file; an old one is replaced.
    """
    requests = {}
    arrays: dict[str, Any] = {}
    for index in tqdm(range(len(traces)), desc="export", unit="request", disable=None):
        trace = traces[index]
        ids = _decoder_layer_ids(trace, traces.spec)
        num_prompt_rows = trace.num_prefill_tokens
        arrays[f"{trace.request_id}/{PROMPT}"] = ids[:num_prompt_rows]
        arrays[f"{trace.request_id}/{GENERATED}"] = ids[num_prompt_rows:]
        requests[trace.request_id] = {
            "source": trace.source,
            "topic": trace.topic,
            "split": traces.split[trace.request_id],
            "num_prompt_tokens": trace.num_prompt_tokens,
            "first_routed_position": trace.first_routed_position,
            "token_ids": None if trace.token_ids_P is None else trace.token_ids_P.tolist(),
            "prompt": trace.prompt,
        }
    metadata = {
        "schema_version": SCHEMA_VERSION,
        "spec": traces.spec.to_json(),
        "requests": requests,
    }
    arrays[METADATA] = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _decoder_layer_ids(trace: Trace, spec: MoESpec) -> npt.NDArray[np.int16]:
    """int16 [T, decoder layers, K], zero in dense layers."""
    num_tokens, _, top_k = trace.topk_expert_ids_TLK.shape
    ids = np.zeros((num_tokens, spec.decoder_layers[-1] + 1, top_k), np.int16)
    ids[:, list(spec.decoder_layers)] = trace.topk_expert_ids_TLK
    return ids


def main() -> None:
    """Run the command line."""
    options = parse_cli(Options, sys.argv[1:])
    try:
        traces = load_traces(options.trace)
        export_vllm(traces, options.out)
    except (MoecastError, ValueError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{len(traces)} requests of {traces.spec.describe()} in {options.out}\n")


if __name__ == "__main__":
    main()
