"""How well the coming layers' experts are foreseen from router inputs: router_reuse and gate_mlp.

    python -m benchmarks.layer_recall                          # embedded model, stdlib texts
    python -m benchmarks.layer_recall corpora=DIR              # texts as the model was trained on
    python -m benchmarks.layer_recall model=DIR corpora=DIR steps=3000 max_seconds=30 \
        batch_tokens=8192 width=512                            # three fits of 30 s on a GPU
    python -m benchmarks.layer_recall compare_losses=true      # one more fit for each other loss

Slot recall@K at 1..4 layers ahead on documents that neither fitting nor (for the models that
`data.tiny_moe.recipe` trains) the model itself has seen, teacher-forced, every token judged as if
decoded. gate_mlp is trained while the model runs: no hidden state is stored. Each seed draws its
own weights and order; router_reuse learns nothing and has one number.

Runs where torch, transformers, lightning and pyarrow are installed, on a GPU where there is one.
Ends with one JSON line; ``out=FILE`` keeps it.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.options import parse_options
from benchmarks.record import record
from data.errors import MoecastError
from data.models import load_model
from data.router_inputs import LiveInputs, RoutedTokens
from data.schema import Split
from data.splits import split_by_topic
from data.tiny_moe.corpus import Document, encode_documents, read_domains
from data.tiny_moe.evaluate import windows
from predictors.base import Predictor, Request
from predictors.gate_losses import LOSSES
from predictors.gate_mlp import GateMLP
from predictors.gate_reader import INPUTS
from predictors.layer_metrics import evaluate_layer_recall
from predictors.router_reuse import RouterReuse

TokenIds = dict[Split, list[npt.NDArray[np.integer[Any]]]]
GOALS = {"1": 5.0, "2": 8.0, "3": 11.0, "4": 13.0}  # points over router_reuse
TIMED_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured.

    Attributes:
        model: tiny_moe, a folder or a hub id.
        dtype: auto, float32, bfloat16 or float16.
        experts: An experts implementation of transformers to run the model with; "" keeps its own.
        corpora: Folder of `<domain>.jsonl.zst` files; "" takes the standard library's docstrings.
        max_chars: Characters of each domain that are used for fitting.
        held_out_fraction: Share of each domain's documents to judge on; the recipe's own keeps them
            to what it held out.
        seq_len: Tokens of a window.
        val_windows: Of each domain, at most.
        test_windows: Of each domain, at most.
        prompts: How many, without corpora.
        seeds: How many.
        variant: Of `GateMLP`, like the following.
        inputs: Separated by commas.
        context_tokens: See `GateMLP`.
        loss: See `GateMLP`.
        width: See `GateMLP`.
        steps: See `GateMLP`.
        max_seconds: See `GateMLP`; 0 sets no limit.
        batch_tokens: See `GateMLP`.
        learning_rate: See `GateMLP`.
        averaging: See `GateMLP`.
        compare_losses: One more fit with each other loss, and with the other variant.
        device: auto, cpu or cuda.
        threads: Of the CPU; 0 leaves torch's choice.
        out: Keep the JSON here; "" does not.
    """

    model: str = "tiny_moe"
    dtype: str = "float32"
    experts: str = ""
    corpora: str = ""
    max_chars: int = 2_000_000
    held_out_fraction: float = 0.03
    seq_len: int = 256
    val_windows: int = 4
    test_windows: int = 12
    prompts: int = 2000
    seeds: int = 3
    variant: str = "residual"
    inputs: str = ",".join(INPUTS)
    context_tokens: int = 64
    loss: str = "rank"
    width: int = 256
    steps: int = 1000
    max_seconds: float = 0.0
    batch_tokens: int = 2048
    learning_rate: float = 5e-3
    averaging: float = 0.05
    compare_losses: bool = False
    device: str = "auto"
    threads: int = 0
    out: str = ""


def corpus_windows(options: Options, tokenizer: Any) -> TokenIds:
    """Windows of every domain; held-out documents are split between val and test."""
    windows_of: TokenIds = {"fit": [], "val": [], "test": []}
    # All is read, whatever is used: what is held out depends on all documents of a domain.
    for domain in read_domains(Path(options.corpora), held_out_fraction=options.held_out_fraction):
        parts: dict[Split, list[Document]] = {
            "fit": list(_at_most(domain.train, options.max_chars)),
            "val": domain.held_out[1::2],
            "test": domain.held_out[::2],
        }
        most = {"fit": sys.maxsize, "val": options.val_windows, "test": options.test_windows}
        for split, documents in parts.items():
            if documents:
                stream = encode_documents(documents, tokenizer, chats=True)
                windows_NT = windows(stream, seq_len=options.seq_len, most=most[split])
                windows_of[split] += list(windows_NT)
    return windows_of


def _at_most(documents: Sequence[Document], max_chars: int) -> Iterator[Document]:
    """Documents, each cut to a tenth of so many characters, until there are so many."""
    left = max_chars
    for document in documents:
        if left <= 0:
            return
        text = document.text[: min(left, max_chars // 10)]
        left -= len(text)
        yield dataclasses.replace(document, text=text)


def stdlib_requests(options: Options, tokenizer: Any) -> TokenIds:
    """The standard library's passages, split by module."""
    # Prompt sources read trace stores, too, whose packages are not needed for the rest.
    from data.sources.stdlib import Stdlib

    prompts = list(Stdlib(num_prompts=options.prompts, max_chars=1000).prompts())
    split = split_by_topic({prompt.request_id: prompt.topic for prompt in prompts}, seed=0)
    requests: TokenIds = {"fit": [], "val": [], "test": []}
    for prompt in prompts:
        ids = tokenizer(prompt.text).input_ids[: options.seq_len]
        requests[split[prompt.request_id]].append(np.array(ids, np.int64))
    return requests


def gate(options: Options, **changed: Any) -> GateMLP:
    """An unfitted gate_mlp as the options say, but for what is changed."""
    values = {
        "inputs": tuple(name for name in options.inputs.split(",") if name),
        "max_seconds": options.max_seconds or None,
        "trainer": {
            "accelerator": "gpu" if _device(options) == "cuda" else "cpu",
            "precision": "bf16-mixed" if _device(options) == "cuda" else "32-true",
            "enable_progress_bar": False,
        },
    }
    names = "variant context_tokens loss width steps batch_tokens learning_rate averaging"
    values |= {name: getattr(options, name) for name in names.split()}
    return GateMLP(**(values | changed))


def us_per_token(predictor: Predictor, tokens: RoutedTokens) -> float:
    """Microseconds a decoded token costs, all layers, one token at a time; median."""
    assert tokens.router_input_LND is not None
    state = predictor.new_state()
    predictor.on_request(state, Request(token_ids_P=tokens.token_ids_N[:1].cpu().numpy()))
    num_layers, ids = len(tokens.router_input_LND), tokens.token_ids_N.tolist()
    spent_us = []
    for n in range(min(TIMED_TOKENS, len(ids) - 1)):
        map_LE = tokens.router_probs_LNE[:, n].cpu()
        started_s = time.perf_counter()
        for layer in range(num_layers):
            inputs_TD = tokens.router_input_LND[layer, n : n + 1]
            probs_TE = tokens.router_probs_LNE[layer, n : n + 1]
            predictor.on_layer(state, layer, inputs_TD, probs_TE)
        predictor.on_token(state, map_LE, token_id=ids[n], next_token_id=ids[n + 1])
        if tokens.token_ids_N.is_cuda:
            torch.cuda.synchronize()
        spent_us.append(1e6 * (time.perf_counter() - started_s))
    return statistics.median(spent_us)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (0 of a single value) and each value."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": sd, "each": list(values)}


def us_per_token_at_once(predictor: Predictor, tokens: RoutedTokens) -> float:
    """The same where a whole batch is asked about in one go: what the arithmetic costs."""
    spent_us = []
    for _ in range(5):
        started_s = time.perf_counter()
        predictor.walk_layers(tokens)
        if tokens.token_ids_N.is_cuda:
            torch.cuda.synchronize()
        spent_us.append(1e6 * (time.perf_counter() - started_s) / len(tokens.starts_N))
    return statistics.median(spent_us)


def compared(
    reuse: Mapping[str, Any], fits: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """What gate_mlp gains over router_reuse in points: the numbers, and a table to read."""
    numbers: dict[str, Any] = {"gain_points": {}, "recall": {}, "worst_layer_gain_points": {}}
    lines = ["ahead  router_reuse  gate_mlp (sd)    gain (sd)      goal  worst layer   at 1.5k"]
    top_k = min(int(k) for k in reuse["overfetch"]["1"])
    more = str(round(1.5 * top_k))
    for h, base in reuse["by_lookahead"].items():
        recall = spread([fit["by_lookahead"][h] for fit in fits])
        gain = spread([100 * (fit["by_lookahead"][h] - base) for fit in fits])
        layers = [
            [
                100 * (a - b)
                for a, b in zip(fit["by_layer"][h], reuse["by_layer"][h], strict=True)
                if a is not None
            ]
            for fit in fits
        ]
        worst = spread([min(of_fit) for of_fit in layers])
        fetched = spread([fit["overfetch"][h][more] for fit in fits])
        numbers["gain_points"][h], numbers["recall"][h] = gain, recall
        numbers["worst_layer_gain_points"][h] = worst
        numbers.setdefault(f"recall_at_{more}", {})[h] = fetched
        lines.append(
            f"{h:>5}  {100 * base:12.1f}  {100 * recall['mean']:8.1f} ({100 * recall['sd']:.1f})"
            f"  {gain['mean']:+7.1f} ({gain['sd']:.1f})  {GOALS.get(h, 0.0):+6.0f}"
            f"  {worst['mean']:+11.1f}  {100 * fetched['mean']:8.1f}"
        )
    first = spread([fit["before_token"]["by_layer"][0] for fit in fits])
    numbers["layer_0"] = first
    numbers["layer_0_router_reuse"] = reuse["before_token"]["by_layer"][0]
    numbers["next_token"] = spread(
        [statistics.fmean(fit["before_token"]["by_layer"]) for fit in fits]
    )
    lines.append(
        f"layer 0 before the token: {100 * first['mean']:.1f} ({100 * first['sd']:.1f}), goal 85; "
        f"router_reuse {100 * numbers['layer_0_router_reuse']:.1f}; all layers before the token: "
        f"{100 * numbers['next_token']['mean']:.1f}"
    )
    lines.append("target layer, router_reuse -> gate_mlp (mean over seeds), by lookahead:")
    for layer in range(len(reuse["by_layer"]["1"])):
        cells = [f"{layer:>5}"]
        for h in reuse["by_layer"]:
            base = reuse["by_layer"][h][layer]
            if base is not None:
                mean = statistics.fmean(fit["by_layer"][h][layer] for fit in fits)
                cells.append(f"{100 * base:5.1f} -> {100 * mean:5.1f}")
        lines.append("   ".join(cells))
    return numbers, lines


def _device(options: Options) -> str:
    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def measure(options: Options) -> dict[str, Any]:
    """Fit every seed, judge all, print the table."""
    if options.threads:
        torch.set_num_threads(options.threads)
    started_s = time.perf_counter()
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    if options.experts:
        model.set_experts_implementation(options.experts)
    model = model.to(_device(options))
    make = corpus_windows if options.corpora else stdlib_requests
    token_ids = make(options, tokenizer)
    inputs = LiveInputs(model, token_ids, max_batch_tokens=options.batch_tokens)
    test = list(inputs.batches("test"))  # small, and judged again and again
    counts = {split: sum(map(len, requests)) for split, requests in token_ids.items()}
    print(f"{inputs.spec.describe()}: {counts} tokens, {time.perf_counter() - started_s:.0f} s")

    reuse = RouterReuse()
    reuse.bind(model)
    reuse.fit_model()
    reuse_recall = evaluate_layer_recall(reuse, test)

    def fit(**changed: Any) -> dict[str, Any]:
        predictor = gate(options, **changed)
        predictor.bind(model)
        report = predictor.fit_inputs(inputs)
        recall = evaluate_layer_recall(predictor, test)
        ahead = " ".join(f"{100 * value:.1f}" for value in recall["by_lookahead"].values())
        print(f"{changed}: {ahead}, {report.num_tokens} tokens, {report.fit_s:.0f} s", flush=True)
        return {
            **recall,
            "fit": dataclasses.asdict(report),
            "parameters": predictor.num_parameters,
            "us_per_token": us_per_token(predictor, test[0]),
            "us_per_token_at_once": us_per_token_at_once(predictor, test[0]),
        }

    others = {}
    if options.compare_losses:
        others = {loss: fit(loss=loss) for loss in LOSSES if loss != options.loss}
        variant = "independent" if options.variant == "residual" else "residual"
        others[variant] = fit(variant=variant)
    fits = [fit(seed=seed) for seed in range(options.seeds)]
    numbers, lines = compared(reuse_recall, fits)
    print("\n".join(lines))
    return {
        "options": {k: v for k, v in dataclasses.asdict(options).items() if k != "out"},
        "model": dataclasses.replace(inputs.spec, model_id=Path(options.model).name).describe(),
        "device": torch.cuda.get_device_name() if _device(options) == "cuda" else "cpu",
        "num_tokens": counts,
        **numbers,
        "parameters": fits[0]["parameters"],
        "fit_s": spread([f["fit"]["fit_s"] for f in fits]),
        "us_per_token": {
            "gate_mlp": spread([f["us_per_token"] for f in fits]),
            "gate_mlp_at_once": spread([f["us_per_token_at_once"] for f in fits]),
            "router_reuse": us_per_token(reuse, test[0]),
            "router_reuse_at_once": us_per_token_at_once(reuse, test[0]),
        },
        "router_reuse": reuse_recall,
        "gate_mlp": fits,
        "compared": {
            name: {"recall": f["by_lookahead"], "layer_0": f["before_token"]["by_layer"][0]}
            for name, f in others.items()
        },
    }


def main(argv: Sequence[str]) -> None:
    """Command line."""
    try:
        options = parse_options(Options, argv)
        result = measure(options)
    except (MoecastError, ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    record("layer_recall", result, out=Path(options.out) if options.out else None)


if __name__ == "__main__":
    main(sys.argv[1:])
