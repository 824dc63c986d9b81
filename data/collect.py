"""Collecting routing: prompts and a model in, a trace store out.

    python -m data.collect model=tiny_moe source=stdlib collect.max_new_tokens=64
    python -m data.collect model=some/folder source=jsonl source.path=mine.jsonl out=traces/mine

Prompts are cut into fixed batches of similar length, and batches into shards, before anything
runs; a killed collection therefore goes on with the missing shards, and ends with the same bytes.
How routers are read is `data.observe`'s business, files are `data.store`'s.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.adapters import probs_kind, spec_of
from data.errors import MoecastError
from data.files import digest_json
from data.models import load_model, router_digest
from data.observe import RouterRecorder, continue_batch
from data.schema import Prompt, Trace
from data.sources import PromptSource
from data.splits import split_by_topic
from data.store import CollectSettings, StoreInputs, TraceStore, TraceStoreWriter

logger = logging.getLogger(__name__)

_BATCHES_PER_SHARD = 4  # what a kill can cost, against the number of files


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
    """A prompt as the model will see it."""

    prompt: Prompt
    text: str
    token_ids: tuple[int, ...]


def run(
    *,
    model: str,
    dtype: str,
    revision: str | None,
    source: PromptSource,
    out: Path,
    settings: CollectSettings,
    device: str = "auto",
) -> TraceStore:
    """Load a model and collect its routing into ``out``; nothing is done twice.

    Args:
        model: As `load_model` takes it, like ``dtype`` and ``revision``.
        dtype: See ``model``.
        revision: See ``model``.
        source: Where the prompts come from.
        out: The store's folder.
        settings: How to collect.
        device: Where the model runs: "auto" takes a CUDA device if there is one.

    Raises:
        MoecastError, ValueError: As `load_model` and `collect`.
    """
    loaded, tokenizer = load_model(model, dtype=dtype, revision=revision)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return collect(
        loaded.to(device),
        tokenizer,
        source,
        out,
        model_id=model,
        revision=getattr(loaded.config, "_commit_hash", None) or revision,
        settings=settings,
    )


def collect(
    model: Any,
    tokenizer: Any,
    source: PromptSource,
    path: Path,
    *,
    model_id: str,
    settings: CollectSettings,
    revision: str | None = None,
) -> TraceStore:
    """Run every prompt of ``source`` through ``model`` and store what its routers decided.

    Of each request, all prompt tokens and all generated tokens but the last are routed and stored;
    ``token_ids_P`` holds the last one, too, so P = T + 1 (P = T where nothing is generated). A
    request ends with the model's end-of-text token. Prompts longer than allowed are cut at their
    end, and what is stored as prompt is what the model saw.

    Args:
        model: A transformers model in eval mode whose routers `data.adapters` can read.
        tokenizer: Its tokenizer.
        source: The prompts, with a name and a digest.
        path: The store's folder: new, complete, or left behind by a killed run of the same inputs.
        model_id: The model's name in the store.
        settings: How to collect.
        revision: The model's commit, if it has one.

    Returns:
        The complete store.

    Raises:
        NotAMoEError: The model has no routed experts.
        OutputExistsError: ``path`` holds something else.
        ValueError: A prompt has no tokens, the model's context is too short, or the model is in
            training mode.
    """
    if model.training:
        raise ValueError("the model is in training mode, in which routers may be noisy: eval()")
    prompts = list(source.prompts())
    requests = _encode(prompts, tokenizer, settings.max_prompt_tokens)
    _check_context(model, requests, settings)
    inputs = StoreInputs(
        spec=spec_of(model, model_id=model_id),
        revision=revision,
        router_digest=router_digest(model),
        dtype=str(model.dtype).removeprefix("torch."),
        source=source.name,
        source_digest=source.digest,
        settings=settings,
        probs_kind=probs_kind(model),
        requests_per_shard=settings.batch_size * _BATCHES_PER_SHARD,
    )
    split = split_by_topic(
        {prompt.request_id: prompt.topic for prompt in prompts}, seed=settings.seed
    )
    with TraceStoreWriter(path, inputs, split) as writer:
        _fill(writer, model, tokenizer, requests, inputs, path)
        writer.finish()
    store = TraceStore.open(path)
    logger.info(
        "traces %s: %d requests, %d tokens, digest %s",
        path,
        len(store),
        store.manifest.num_tokens,
        store.digest[:12],
    )
    return store


def store_name(
    *,
    model: str,
    dtype: str,
    revision: str | None,
    source: PromptSource,
    settings: CollectSettings,
) -> str:
    """A folder name for a collection: readable, and another one for other inputs."""
    inputs = [model, dtype, revision, source.digest, dataclasses.asdict(settings)]
    return f"{Path(model).name}-{source.name}-{digest_json(inputs)[:12]}"


def _fill(
    writer: TraceStoreWriter,
    model: Any,
    tokenizer: Any,
    requests: Sequence[_Request],
    inputs: StoreInputs,
    path: Path,
) -> None:
    """Collect the shards that are not there yet."""
    done, settings = writer.done_request_ids, inputs.settings
    assert settings is not None
    if len(done) == len(requests):
        logger.info("traces %s are complete: nothing to collect", path)
        return
    logger.info(
        "collecting %d requests of %s from source %s into %s (%d are there)",
        len(requests) - len(done),
        inputs.spec.describe(),
        inputs.source,
        path,
        len(done),
    )
    eos_token_ids = _eos_token_ids(model, tokenizer)
    started_s, num_tokens = time.monotonic(), 0
    with (
        RouterRecorder(model, keep_router_probs=settings.keep_router_probs) as recorder,
        tqdm(
            total=len(requests), initial=len(done), desc="collect", unit="request", disable=None
        ) as bar,
    ):
        for index, shard in enumerate(_chunks(_by_length(requests), inputs.requests_per_shard)):
            if shard[0].prompt.request_id in done:
                continue
            traces: list[Trace] = []
            for batch in _chunks(shard, settings.batch_size):
                traces += _trace_batch(model, batch, recorder, eos_token_ids, inputs)
                num_tokens += sum(trace.num_tokens for trace in traces[-len(batch) :])
                rate = num_tokens / (time.monotonic() - started_s)
                bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
                bar.update(len(batch))
            writer.write_shard(index, traces)
    elapsed_s = time.monotonic() - started_s
    logger.info(
        "collected %d tokens in %.1f s (%.0f tokens/s)",
        num_tokens,
        elapsed_s,
        num_tokens / elapsed_s,
    )


def _trace_batch(
    model: Any,
    batch: Sequence[_Request],
    recorder: RouterRecorder,
    eos_token_ids: Sequence[int],
    inputs: StoreInputs,
) -> list[Trace]:
    settings = inputs.settings
    assert settings is not None
    generated = continue_batch(
        model,
        [request.token_ids for request in batch],
        max_new_tokens=settings.max_new_tokens,
        eos_token_ids=eos_token_ids,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seeds=[f"{settings.seed}:{request.prompt.request_id}" for request in batch],
    )
    routing = recorder.take()
    width = max(len(request.token_ids) for request in batch)
    traces = []
    for row, (request, new_ids) in enumerate(zip(batch, generated, strict=True)):
        rows = _rows_of(
            row,
            num_requests=len(batch),
            width=width,
            num_prompt_tokens=len(request.token_ids),
            num_decoded=max(0, len(new_ids) - 1),
        )
        traces.append(
            Trace(
                request_id=request.prompt.request_id,
                source=inputs.source,
                topic=request.prompt.topic,
                topk_expert_ids_TLK=routing.ids_NLK[rows].numpy(),
                num_prompt_tokens=len(request.token_ids),
                first_routed_position=0,
                topk_probs_TLK=routing.probs_NLK[rows].numpy(),
                router_probs_TLE=(
                    None
                    if routing.router_probs_NLE is None
                    else routing.router_probs_NLE[rows].numpy()
                ),
                token_ids_P=np.array([*request.token_ids, *new_ids], np.int32),
                prompt=request.text,
            )
        )
    return traces


def _rows_of(
    row: int, *, num_requests: int, width: int, num_prompt_tokens: int, num_decoded: int
) -> torch.Tensor:
    """Where one request's rows stand among all that the routers saw.

        prefill, B x P rows                     decode steps, B rows each
        [pad pad p p p | pad p p p p | ...]     [r0 r1 ... | r0 r1 ... | ...]

    The padding, and the steps after the request's end, are left out.
    """
    prefill = torch.arange((row + 1) * width - num_prompt_tokens, (row + 1) * width)
    decode = num_requests * width + row + num_requests * torch.arange(num_decoded)
    return torch.cat([prefill, decode])


def _encode(prompts: Sequence[Prompt], tokenizer: Any, max_prompt_tokens: int) -> list[_Request]:
    """Tokenize and cut; a cut prompt's text is what its remaining tokens say."""
    requests = []
    num_cut = 0
    for prompt in prompts:
        token_ids, text = tokenizer(prompt.text).input_ids, prompt.text
        if not token_ids:
            raise ValueError(f"prompt {prompt.request_id!r}: its text {text!r} has no tokens")
        if len(token_ids) > max_prompt_tokens:
            num_cut += 1
            token_ids = token_ids[:max_prompt_tokens]
            text = tokenizer.decode(token_ids, skip_special_tokens=True)
        requests.append(_Request(prompt=prompt, text=text, token_ids=tuple(token_ids)))
    if num_cut:
        logger.info(
            "%d of %d prompts are cut to max_prompt_tokens=%d",
            num_cut,
            len(prompts),
            max_prompt_tokens,
        )
    return requests


def _check_context(model: Any, requests: Sequence[_Request], settings: CollectSettings) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = max(len(request.token_ids) for request in requests) + settings.max_new_tokens
    if context is not None and needed > context:
        raise ValueError(
            f"max_prompt_tokens={settings.max_prompt_tokens} and "
            f"max_new_tokens={settings.max_new_tokens} need {needed} positions, "
            f"the model has {context}"
        )


def _by_length(requests: Sequence[_Request]) -> list[_Request]:
    """Longest first, so that little is padded, and memory that does not suffice fails at once."""
    return sorted(requests, key=lambda request: -len(request.token_ids))


def _chunks(items: Sequence[_Request], size: int) -> Iterator[Sequence[_Request]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token_id for token_id in [*ids, tokenizer.eos_token_id] if token_id is not None})


if __name__ == "__main__":
    import sys

    import hydra
    from omegaconf import DictConfig

    from conf.build import build, expand_shorthand, plain, set_threads
    from conf.schema import register

    @hydra.main(version_base="1.3", config_path="pkg://conf", config_name="collect")
    def main(cfg: DictConfig) -> None:
        """Collect as the configuration says."""
        try:
            set_threads(cfg.model)
            source = build(cfg.source)
            if not isinstance(source, PromptSource):
                sys.exit("error: this source holds recorded traces: there is nothing to collect")
            settings = CollectSettings(**plain(cfg.collect), seed=cfg.seed)
            what = {
                "model": cfg.model.id,
                "dtype": cfg.model.dtype,
                "revision": cfg.model.revision,
                "source": source,
                "settings": settings,
            }
            run(**what, out=Path(cfg.out or Path(cfg.paths.traces) / store_name(**what)))
        except (MoecastError, ValueError) as error:
            sys.exit(f"error: {error}")

    register()
    sys.argv[1:] = expand_shorthand(sys.argv[1:])
    main()
