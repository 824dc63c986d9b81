"""Does the server lose or mix up answers, or grow, under many clients that come and go?

    python -m benchmarks.serve_soak                                # 64 clients, 5 minutes
    python -m benchmarks.serve_soak clients=16 seconds=20 engine=single
    python -m benchmarks.serve_soak arrivals=data/arrivals/mooncake_conversation.csv.gz rate=4

Starts ``python serve.py`` as a process of its own with the embedded model, half of its experts
resident, and replays the arrivals of a recorded trace (`benchmarks.soak_load`) with streaming
clients, some of whom hang up. Every answer is compared with what the same request gets when it is
alone, from the resident model in this process. In the end the server gets SIGTERM while answers are
under way; those must end, too.

Exit code 1 if an answer was wrong or lost, or if the server's memory grew by more than
``growth_mib`` after its first third. Ends with one line of JSON.
"""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from benchmarks.options import as_json, parse_options
from benchmarks.record import ROOT, record
from benchmarks.soak_load import Ask, Outcome, plan, recorded_arrivals, replay
from data.importers.catalog import data_dir
from data.models import load_model
from data.tables import format_table
from runtime.server.generation import GenerationEngine
from runtime.server.sampling import SamplingParams
from runtime.server.sequence import Failure, GenerationRequest, Piece

_START_S = 180.0
_MODEL = "tiny_moe"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is sent to which server.

    Attributes:
        clients: Requests that are open at once, at most.
        seconds: How long requests arrive.
        rate: Requests a second, on average.
        hang_ups: Share of requests whose client leaves before the end.
        skip_s: How much of the recorded trace is passed over: it begins hesitantly.
        arrivals: A recorded trace; "" for azure_llm_2023_conv in the folder of ``MOECAST_DATA``.
        engine: As ``serve.engine``.
        max_batch: As ``serve.max_batch``.
        budget: As ``budget``: what may be resident.
        settings: More of the server's, as ``serve.scheduler=slo,serve.slo.ttft_s=0.2``.
        growth_mib: By how much the server's memory may grow after the first third.
        seed: Of prompts and hang-ups.
        out: Where to keep the result, or "".
    """

    clients: int = 64
    seconds: float = 300.0
    rate: float = 10.0
    hang_ups: float = 0.2
    skip_s: float = 120.0
    arrivals: str = ""
    engine: str = "batched"
    max_batch: int = 32
    budget: str = "50%"
    settings: tuple[str, ...] = ()
    growth_mib: float = 64.0
    seed: int = 0
    out: str = ""


class Answers:
    """What each request gets when it is alone: asked once, and remembered."""

    def __init__(self, asks: set[Ask]) -> None:
        model, tokenizer = load_model(_MODEL, dtype="float32", revision=None)
        engine = GenerationEngine(model=model, tokenizer=tokenizer)
        engine.start()
        self._texts = {ask: _answer(engine, ask) for ask in asks}
        engine.shutdown()

    def __call__(self, ask: Ask) -> str:
        """The text."""
        return self._texts[ask]


def _answer(engine: GenerationEngine, ask: Ask) -> str:
    texts: list[str] = []
    done: Future[str] = Future()

    def sink(said: Piece | Failure) -> None:
        if isinstance(said, Failure):
            done.set_exception(said.error)  # to be raised here: it must not be on that thread
            return
        texts.append(said.text)
        if said.finish_reason is not None:
            done.set_result("".join(texts))

    sampling = SamplingParams(temperature=0.8 if ask.seed else 0.0, seed=ask.seed)
    request = GenerationRequest(
        request_id="alone",
        prompt_ids=ask.prompt_ids,
        max_tokens=ask.max_tokens,
        sampling=sampling,
        ignore_eos=True,
    )
    engine.submit([request], sink)
    return done.result()


class Memory:
    """Watches a process's resident memory, twice a second, until `stop`."""

    def __init__(self, pid: int) -> None:
        import psutil

        self._process = psutil.Process(pid)
        self.rss_bytes: list[int] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> list[int]:
        """The readings."""
        self._over.set()
        self._thread.join()
        return self.rss_bytes

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            self.rss_bytes.append(self._process.memory_info().rss)


@contextmanager
def served(options: Options, folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
    """The server as a process of its own: its address, the process and its log."""
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    command = [
        sys.executable,
        "serve.py",
        f"serve.port={port}",
        f"serve.engine={options.engine}",
        f"serve.max_batch={options.max_batch}",
        f"serve.max_queue={options.clients}",
        f"budget={options.budget}",
        "policy=lfru",
        f"paths.root={folder}",
        "model.dtype=float32",
        *options.settings,
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline_s = time.monotonic() + _START_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-2000:]}")
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        yield address, process, log
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def run(options: Options) -> dict[str, Any]:
    """The whole test; what was found, as plain values."""
    path = options.arrivals or data_dir() / "arrivals" / "azure_llm_2023_conv.csv.gz"
    arrivals = plan(
        recorded_arrivals(Path(path), skip_s=options.skip_s),
        duration_s=options.seconds,
        rate=options.rate,
        hang_ups=options.hang_ups,
        vocab_size=4096,
        seed=options.seed,
    )
    answers = Answers({arrival.ask for arrival in arrivals})
    with (
        tempfile.TemporaryDirectory(prefix="moecast-soak-") as folder,
        served(options, Path(folder)) as (address, process, log),
    ):
        memory = Memory(process.pid)
        started_s = time.perf_counter()
        outcome = asyncio.run(
            replay(
                address,
                arrivals,
                model=_MODEL,
                clients=options.clients,
                answer_of=answers,
                patience_s=120.0,
            )
        )
        took_s = time.perf_counter() - started_s
        rss_bytes = memory.stop()
        idle = _until_idle(address)
        last = _end_under_load(address, process, arrivals[0].ask, answers)
        errors = [line for line in log.read_text().splitlines() if " ERROR " in line]
    values = summary(outcome, took_s=took_s)
    third = len(rss_bytes) // 3
    settled = rss_bytes[third : third + 4] or [0]
    values |= {
        "idle": idle,
        "drained": last,
        "server_errors": errors[:5],
        "rss_mib": {
            "after_a_third": max(settled) / 2**20,
            "most": max(rss_bytes, default=0) / 2**20,
            "last": (rss_bytes or [0])[-1] / 2**20,
        },
    }
    grown_mib = values["rss_mib"]["last"] - values["rss_mib"]["after_a_third"]
    values["passed"] = bool(
        not outcome.wrong
        and not outcome.lost
        and not errors
        and idle
        and last
        and grown_mib <= options.growth_mib
    )
    return values


def summary(outcome: Outcome, *, took_s: float) -> dict[str, Any]:
    """Counts and quantiles."""
    return {
        "requests": outcome.answered + outcome.hung_up + len(outcome.wrong) + len(outcome.lost),
        "answered": outcome.answered,
        "hung_up": outcome.hung_up,
        "wrong": len(outcome.wrong),
        "lost": len(outcome.lost),
        "examples": [*outcome.wrong[:3], *outcome.lost[:3]],
        "took_s": took_s,
        "tokens_per_s": outcome.num_tokens / took_s,
        "ttft_s": _quantiles(outcome.ttft_s),
        "tpot_s": _quantiles(outcome.tpot_s),
        "late_s": _quantiles(outcome.late_s),
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cuts = quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98], "max": max(values)}


def _until_idle(address: str) -> bool:
    """Whether the server soon holds nothing for those that are gone."""
    import httpx

    for _ in range(50):
        lines = httpx.get(f"{address}/metrics").text.splitlines()
        values = {line.split("{")[0]: float(line.split()[-1]) for line in lines if line[0] != "#"}
        held = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        if not any(values[f"vllm:{name}"] for name in held):
            return True
        time.sleep(0.1)
    return False


def _end_under_load(
    address: str, process: "subprocess.Popen[bytes]", ask: Ask, answers: Answers
) -> bool:
    """SIGTERM while an answer is under way: whether it was whole, and the server ended cleanly."""
    import httpx

    heard = ""
    body = {"model": _MODEL, **ask.body, "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60.0) as reply:
        for line in reply.iter_lines():
            if not heard:
                process.send_signal(signal.SIGTERM)
            if line.startswith("data: {"):
                heard += _text_of(line)
    # uvicorn ends with the signal that it got, once everything is answered.
    return heard == answers(ask) and process.wait(timeout=60.0) in (0, -signal.SIGTERM)


def _text_of(line: str) -> str:
    text: str = json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return text


def main(arguments: list[str]) -> int:
    """Run, print a table and the JSON line."""
    torch.set_num_threads(1)
    options = parse_options(Options, arguments)
    values = run(options)
    rows = [
        [name, *(f"{1e3 * values[key][q]:.1f}" for q in ("p50", "p99", "max"))]
        for name, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("sent late", "late_s"))
        if values[key]
    ]
    print(format_table(["ms", "p50", "p99", "max"], rows))
    record(
        "serve_soak",
        {"options": as_json(options), **values},
        out=Path(options.out) if options.out else None,
    )
    return 0 if values["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
