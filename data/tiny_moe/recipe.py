"""The recipe of the embedded model, one command: texts in, checkpoint with tokenizer and card out.

    python -m data.tiny_moe.recipe corpora=DIR out=DIR [steps=7500] [smoke=true] ...

The same command trains a larger model, as a testbed for predictors that look layers ahead:

    python -m data.tiny_moe.recipe corpora=DIR out=DIR topology=olmoe locality=false ...

Every field of `Recipe` is an argument. `smoke=true` runs the whole way on a small part of the
texts, in about a minute on a CPU. One GPU is used where there is one.
"""

import dataclasses
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from data.errors import OutputExistsError
from data.files import atomic_dir, write_json
from data.tiny_moe.card import render_card
from data.tiny_moe.corpus import (
    encode_documents,
    read_domains,
    sampling_weights,
    tokenizer_sample,
)
from data.tiny_moe.evaluate import evaluate
from data.tiny_moe.router_loss import USUAL_BALANCE_COEF, RouterTargets
from data.tiny_moe.routing import DENSE_EXPERTS
from data.tiny_moe.tokenizer import END, token_num_bytes, train_tokenizer
from data.tiny_moe.topology import TOPOLOGIES, MoECausalLM
from data.tiny_moe.training import TrainSettings, train

logger = logging.getLogger(__name__)

SAMPLE_PROMPTS = (
    "It was a dark and stormy night, and",
    "def read_json(path):\n",
    "§ 1 Anwendungsbereich\n\n",
)
SAMPLE_CHAT = "I need to find a restaurant in San Francisco."
SAMPLING = {"temperature": 0.7, "top_p": 0.9}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Arguments of the command.

    Attributes:
        corpora: Folder of `<domain>.jsonl.zst` files with `{"id", "text"}` lines.
        out: Folder to create.
        topology: Architecture and sizes: `qwen3_moe`, the embedded model, or `olmoe`.
        locality: Pull at the routers until tokens share experts with their neighbours, as large
            models do by themselves; false leaves only load balancing, as in ordinary training,
            never weaker than is usual there.
        steps: Optimizer steps.
        batch_size: Sequences per step.
        seq_len: Tokens per sequence.
        peak_lr: Highest learning rate.
        vocab_size: Of the tokenizer that is trained first.
        sample_chars: Characters per domain that the tokenizer learns from.
        max_chars: Characters read per domain; 0 reads all.
        held_out_fraction: Share of each domain's documents that training never sees.
        exponent: Domains are sampled by size to this power.
        max_oversampling: Cap on a domain's share, as a multiple of its share by size.
        max_seconds: Training ends by then, on a shortened schedule; 0 sets no limit.
        compile_layers: Use torch.compile for the decoder layers.
        eval_windows: Windows per domain in the evaluation, at most.
        sample_tokens: Length of the continuations shown in the card.
        max_shard_mb: Largest file of weights, in 10⁶ bytes; more are split.
        seed: Of initialisation and sampling.
        smoke: Replace the sizes by small ones.
    """

    corpora: Path
    out: Path
    topology: str = "qwen3_moe"
    locality: bool = True
    steps: int = 7500
    batch_size: int = 32
    seq_len: int = 2048
    peak_lr: float = 4e-3
    vocab_size: int = 4096
    sample_chars: int = 2_000_000
    max_chars: int = 0
    held_out_fraction: float = 0.03
    exponent: float = 0.6
    max_oversampling: float = 2.0
    max_seconds: float = 0.0
    compile_layers: bool = False
    eval_windows: int = 32
    sample_tokens: int = 80
    max_shard_mb: int = 5000
    seed: int = 0
    smoke: bool = False

    def __post_init__(self) -> None:
        """Check the topology and the sizes."""
        if self.topology not in TOPOLOGIES:
            raise ValueError(f"topology={self.topology!r} is not one of {sorted(TOPOLOGIES)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and field.name not in ("max_chars", "seed") and value < 1:
                raise ValueError(f"{field.name}={value} must be at least 1")

    def sized(self) -> "Recipe":
        """The recipe that is run: itself, or its small version for `smoke`."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            self,
            steps=min(self.steps, 40),
            batch_size=min(self.batch_size, 8),
            seq_len=min(self.seq_len, 128),
            sample_chars=min(self.sample_chars, 100_000),
            max_chars=min(self.max_chars or 300_000, 300_000),
            eval_windows=min(self.eval_windows, 4),
            sample_tokens=min(self.sample_tokens, 16),
        )


def parse_arguments(arguments: Sequence[str]) -> Recipe:
    """Read `key=value` words.

    Raises:
        ValueError: For a word without `=`, an unknown key, a value of the wrong type or a missing
            `corpora` or `out`.
    """
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or key not in fields:
            raise ValueError(f"{argument!r}: expected key=value with a key of {sorted(fields)}")
        values[key] = _convert(key, fields[key].type, text)
    missing = {"corpora", "out"} - values.keys()
    if missing:
        raise ValueError(f"missing {', '.join(f'{key}=DIR' for key in sorted(missing))}")
    return Recipe(**values)


def run(recipe: Recipe) -> dict[str, Any]:
    """Run the whole recipe and return what `metrics.json` of the new folder holds.

    Raises:
        OutputExistsError: If `out` is there already.
    """
    recipe = recipe.sized()
    if recipe.out.exists():
        raise OutputExistsError(recipe.out, "choose another out= or remove it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    domains = read_domains(
        recipe.corpora, held_out_fraction=recipe.held_out_fraction, max_chars=recipe.max_chars
    )
    names = [domain.name for domain in domains]
    logger.info("read %d domains in %.0f s", len(domains), time.perf_counter() - started)
    tokenizer = train_tokenizer(
        tokenizer_sample(domains, chars_per_domain=recipe.sample_chars),
        vocab_size=recipe.vocab_size,
        max_length=2048,
    )
    logger.info("trained the tokenizer, %.0f s", time.perf_counter() - started)
    streams = [encode_documents(domain.train, tokenizer, chats=True) for domain in domains]
    held_out = [encode_documents(domain.held_out, tokenizer, chats=False) for domain in domains]
    weights = sampling_weights(
        [len(stream) for stream in streams],
        exponent=recipe.exponent,
        max_oversampling=recipe.max_oversampling,
    )
    prepare_s = time.perf_counter() - started
    logger.info("%d tokens to train on, %.0f s", sum(map(len, streams)), prepare_s)

    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    model = TOPOLOGIES[recipe.topology](tokenizer).to(device)
    model.set_experts_implementation(DENSE_EXPERTS)
    shared = {field.name for field in dataclasses.fields(TrainSettings)}
    settings = TrainSettings(
        **{key: value for key, value in dataclasses.asdict(recipe).items() if key in shared}
    )
    targets = RouterTargets()
    if not recipe.locality:
        targets = RouterTargets(previous_token_recall=None, least_balance_coef=USUAL_BALANCE_COEF)
    report = train(model, streams, weights, settings, targets)
    logger.info("trained %d tokens in %.0f s", report.tokens, report.seconds)

    torch.set_float32_matmul_precision("highest")
    with atomic_dir(recipe.out) as folder:
        model.generation_config = GenerationConfig(
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)],
        )
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=f"{recipe.max_shard_mb}MB")
        tokenizer.save_pretrained(folder)
        shipped = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        shipped.set_experts_implementation(DENSE_EXPERTS)
        metrics: dict[str, Any] = {
            "recipe": _arguments(recipe),
            "parameters": shipped.num_parameters(),
            "config": {
                key: getattr(shipped.config, key)
                for key in ("num_hidden_layers", "num_experts", "num_experts_per_tok")
            },
            "hardware": _hardware(device),
            "versions": _versions(),
            "prepare_s": prepare_s,
            "training": dataclasses.asdict(report),
            "router_targets": dataclasses.asdict(targets),
            "mixture": _mixture(names, streams, weights, report.tokens),
            "sampling": SAMPLING,
            "samples": sample_texts(shipped, tokenizer, num_tokens=recipe.sample_tokens),
            **evaluate(
                shipped,
                names=names,
                held_out=held_out,
                train=streams,
                weights=weights,
                token_num_bytes=np.array(token_num_bytes(tokenizer)),
                seq_len=min(recipe.seq_len, 1024),
                most_windows=recipe.eval_windows,
                batch_size=recipe.batch_size,
            ),
        }
        write_json(folder / "metrics.json", metrics)
        (folder / "README.md").write_text(render_card(metrics), encoding="utf-8")
    logger.info("wrote %s, %.0f s in all", recipe.out, time.perf_counter() - started)
    return metrics


def sample_texts(
    model: MoECausalLM, tokenizer: PreTrainedTokenizerFast, *, num_tokens: int
) -> list[dict[str, str]]:
    """Continue each sample prompt greedily and sampled; one row per prompt and way."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": SAMPLE_CHAT}], tokenize=False, add_generation_prompt=True
    )
    torch.manual_seed(0)
    samples = []
    for prompt in (*(f"{tokenizer.bos_token}{text}" for text in SAMPLE_PROMPTS), str(chat)):
        encoded = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        for how in ({"do_sample": False}, {"do_sample": True, **SAMPLING}):
            ids_BT = model.generate(**encoded.to(model.device), max_new_tokens=num_tokens, **how)
            continuation = tokenizer.decode(ids_BT[0, encoded["input_ids"].shape[1] :])
            samples.append({"prompt": prompt, "continuation": continuation})
    return samples


def main(arguments: Sequence[str]) -> None:
    """Entry point: run the recipe; the last line printed is one JSON object."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    metrics = run(parse_arguments(arguments))
    losses = {name: row["loss_nats_per_token"] for name, row in metrics["domains"].items()}
    summary = {
        "tokens": metrics["training"]["tokens"],
        "seconds": metrics["training"]["seconds"],
        "held_out_loss": losses,
        "min_share_of_even": min(row["min_share_of_even"] for row in metrics["layers"]),
    }
    sys.stdout.write(json.dumps(summary) + "\n")


def _convert(key: str, kind: object, text: str) -> object:
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{key}={text}: expected true or false")
        return text == "true"
    assert isinstance(kind, type)
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{key}={text}: expected {kind.__name__}") from error


def _arguments(recipe: Recipe) -> dict[str, Any]:
    """The arguments that differ from the defaults, without the paths of one machine."""
    return {
        field.name: value
        for field in dataclasses.fields(recipe)
        if (value := getattr(recipe, field.name)) != field.default
        and field.name not in ("corpora", "out")
    }


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def _mixture(
    names: list[str], streams: list[np.ndarray], weights: np.ndarray, tokens: int
) -> dict[str, dict[str, float]]:
    return {
        name: {
            "train_tokens": len(stream),
            "share": float(weight),
            "epochs": float(weight * tokens / len(stream)),
        }
        for name, stream, weight in zip(names, streams, weights, strict=True)
    }


if __name__ == "__main__":
    main(sys.argv[1:])
