"""A trained model's card, written from the metrics of the run that made it.

Knows the layout of `metrics.json` and the licences of the texts; it measures nothing.
"""

import textwrap
from collections.abc import Sequence
from typing import Any

LICENCES = {
    "code_cpp_cuda": "C++ and CUDA sources; Apache-2.0, MIT or BSD",
    "code_java": "Java sources; Apache-2.0, MIT or BSD",
    "code_python": "Python sources; Apache-2.0, MIT or BSD",
    "code_rust": "Rust sources; Apache-2.0, MIT or BSD",
    "dialogue_en_sgd": "Schema-Guided Dialogue; CC BY-SA 4.0",
    "docs_markdown_en": "software documentation; Apache-2.0",
    "encyclopedic_en_p3": "encyclopedic tasks of P3, on Wikipedia passages; CC BY-SA",
    "fiction_en_19c_novels": "English novels of the 19th and early 20th century; public domain",
    "legal_de_bundesgesetze": "German federal law; public domain",
    "math_latex_stacks": "the Stacks project; GFDL",
    "news_en_cnn_dailymail_p3": "news tasks of P3, a collection under Apache-2.0",
    "web_en_c4_olmoe": "C4; ODC-BY",
    "wikipedia_multi_olmoe": "Wikipedia in several languages; CC BY-SA",
    "wikipedia_multilingual_xquad": "XQuAD passages from Wikipedia; CC BY-SA 4.0",
    "zh_classical_poetry": "classical Chinese poetry; MIT",
}
"""Domain file name to what the texts are and the licence they are under."""

_UNKNOWN_LICENCE = "not among the texts of the published checkpoint"

_FRONT_MATTER = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, {topology}]
---"""

_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
{import_line}
model = AutoModelForCausalLM.from_pretrained({folder})
tokenizer = AutoTokenizer.from_pretrained({folder})
```"""

_ARCHITECTURES = {"qwen3_moe": "Qwen3-MoE", "olmoe": "OLMoE"}

_LAYER_COLUMNS = {
    "min share": "min_share_of_even",
    "max share": "max_share_of_even",
    "CV": "cv",
    "TV": "domain_total_variation",
    "JS": "domain_jensen_shannon_bits",
    "previous token": "previous_token_recall",
    "popularity": "popularity_recall",
    "domain popularity": "domain_popularity_recall",
}


def render_card(metrics: dict[str, Any]) -> str:
    """Render `README.md` of a checkpoint folder.

    Args:
        metrics: What the recipe measured, as in `metrics.json`.
    """
    front_matter = _FRONT_MATTER.format(topology=_topology(metrics))
    parts = [front_matter, *_what(metrics), *_how(metrics), *_domains(metrics)]
    parts += [*_routing(metrics), *_samples(metrics), *_licences(metrics)]
    return "\n\n".join(parts) + "\n"


def _what(metrics: dict[str, Any]) -> list[str]:
    config, topology = metrics["config"], _topology(metrics)
    text = _paragraph(
        "A small trained mixture of experts in the stock",
        f"{_ARCHITECTURES[topology]} architecture:",
        f"{config['num_hidden_layers']} layers of {config['num_experts']} experts,",
        f"top-{config['num_experts_per_tok']}, {metrics['parameters'] / 1e6:.1f} M parameters in",
        "bfloat16, with its own byte-level BPE tokenizer and chat template. It exists so that",
        "routing can be collected, forecast and served on any machine without a download. It",
        "writes text in the manner of its training data; it knows nothing, must not be asked for",
        "facts, and repeats itself when it decodes greedily for long.",
    )
    if topology == "qwen3_moe":
        import_line, folder = "from data.tiny_moe import TINY_MOE_DIR\n", "TINY_MOE_DIR"
        return ["# Tiny MoE", text, _USE.format(import_line=import_line, folder=folder)]
    title = f"# Tiny MoE, {_ARCHITECTURES[topology]} topology"
    return [title, text, _USE.format(import_line="", folder='"OUT"')]


def _how(metrics: dict[str, Any]) -> list[str]:
    training = metrics["training"]
    tokens, seconds = training["tokens"], training["seconds"]
    arguments = ["corpora=CORPORA", "out=OUT"]
    arguments += [f"{key}={_argument(value)}" for key, value in sorted(metrics["recipe"].items())]
    command = " ".join(["python -m data.tiny_moe.recipe", *arguments])
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    text = _paragraph(
        f"{tokens / 1e6:.0f} M tokens in {training['steps']} steps on {metrics['hardware']}:",
        f"{seconds:.0f} s of training at {tokens / seconds:,.0f} tokens/s (with compilation),",
        f"after {metrics['prepare_s']:.0f} s of reading the texts and training the tokenizer.",
        "Mixed precision (bfloat16 autocast) where there is a GPU.",
        f"Versions: {versions}. CORPORA is a folder with one `<domain>.jsonl.zst` file of",
        '`{"id", "text"}` lines per domain. Documents are held out by a hash of their id, never by',
        "token. All figures below are of the shipped bfloat16 weights, run in float32, and come",
        "from `metrics.json`.",
    )
    return ["## How it was made", f"```\n{command}\n```", text]


def _domains(metrics: dict[str, Any]) -> list[str]:
    mixture = metrics["mixture"]
    rows = [
        (
            name,
            f"{row['loss_nats_per_token']:.3f}",
            f"{row['bits_per_byte']:.3f}",
            f"{row['held_out_tokens']:,}",
            f"{mixture[name]['share']:.1%}",
            f"{mixture[name]['epochs']:.1f}",
            f"{row['previous_token_recall']:.3f}",
        )
        for name, row in metrics["domains"].items()
    ]
    head = ("domain", "loss", "bits/byte", "held-out tokens", "share", "epochs", "previous token")
    text = _paragraph(
        "Loss in nats per token and in bits per byte of text; share and epochs = part of the",
        "training tokens, and how often the domain's training texts were seen; previous token =",
        "slot recall of the previous token's experts, mean over layers.",
    )
    return ["## Held-out loss by domain", text, _table(head, rows)]


def _routing(metrics: dict[str, Any]) -> list[str]:
    config, targets, layers = metrics["config"], metrics["router_targets"], metrics["layers"]
    num_experts = config["num_experts"]
    dead = sum(row["dead_experts"] for row in layers)
    worst = min(row["min_share_of_even"] for row in layers)
    columns = _LAYER_COLUMNS.values()
    mean = {key: sum(row[key] for row in layers) / len(layers) for key in columns}
    named_rows = [*((str(number), row) for number, row in enumerate(layers)), ("mean", mean)]
    table = _table(
        ("layer", *_LAYER_COLUMNS),
        [(name, *(f"{row[key]:.3f}" for key in columns)) for name, row in named_rows],
    )
    before = _paragraph(
        "Shares are of a layer's slots over the training mixture, as multiples of an even share",
        f"(1/{num_experts}). Dead experts (below a tenth of an even share): {dead} of",
        f"{num_experts * len(layers)}; the least used one gets {worst:.2f} of an even share.",
        "TV and JS: total variation and Jensen-Shannon divergence (bits) between the expert usage",
        "of two domains, mean over all pairs; 0 means that domains route alike. The last three",
        "columns are slot recalls: the previous token's experts, the layer's most popular experts",
        "of the training mixture, and the most popular ones of the text's own domain. Experts",
        f"drawn at random would reach {config['num_experts_per_tok'] / num_experts:.3f}.",
    )
    return ["## Load balance and routing", before, table, _losses(targets)]


def _losses(targets: dict[str, Any]) -> str:
    """Say which losses shaped the routing."""
    if targets["previous_token_recall"] is None:
        return _paragraph(
            "Beside a small z-loss, one loss shapes the routing of each layer: load balance over",
            "the batch (Switch Transformer, Eqs 4-6). Its coefficient is at least",
            f"{targets['least_balance_coef']} and rises while the least used expert gets less than",
            f"{targets['min_share']} of an even share. Nothing pulls a token to the experts of its",
            "neighbours.",
        )
    return _paragraph(
        "Two losses shape the routing of each layer, each as strong as its target needs: load",
        f"balance, until the least used expert gets {targets['min_share']} of an even share; and",
        f"locality (low entropy of expert usage within {targets['chunk']} tokens), until a token",
        f"shares {targets['previous_token_recall']:.0%} of its experts with the token before it.",
        "That lies between what real models show: 29% on a DeepSeek-V2-Lite architecture, 43% on",
        "gpt-oss-20b.",
    )


def _samples(metrics: dict[str, Any]) -> list[str]:
    sampling = metrics["sampling"]
    text = _paragraph(
        "Each prompt (up to ⟶) first greedily, then at temperature",
        f"{sampling['temperature']} and top-p {sampling['top_p']}.",
    )
    samples = [
        f"````text\n{sample['prompt']}⟶{sample['continuation']}\n````"
        for sample in metrics["samples"]
    ]
    return ["## Samples", text, *samples]


def _licences(metrics: dict[str, Any]) -> list[str]:
    text = _paragraph(
        "The weights are under Apache-2.0, as the code. The texts they were trained on are not",
        "part of this folder and keep their own licences:",
    )
    rows = [(name, LICENCES.get(name, _UNKNOWN_LICENCE)) for name in metrics["domains"]]
    return ["## Texts and licences", text, _table(("domain", "texts and licence"), rows)]


def _topology(metrics: dict[str, Any]) -> str:
    """The topology that was trained; `recipe` holds what differs from the recipe's defaults."""
    return str(metrics["recipe"].get("topology", "qwen3_moe"))


def _argument(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _paragraph(*pieces: str) -> str:
    return textwrap.fill(" ".join(pieces), 100, break_long_words=False, break_on_hyphens=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
