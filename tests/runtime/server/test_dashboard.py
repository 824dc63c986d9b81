"""What the dashboard's routes say, to whom, and how they end; the page itself: test_dashboard_page.

The stream has no end, so these tests speak to a server over a socket.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import pytest
import torch

from runtime.expert_view import ExpertView
from runtime.server.dashboard import cells_3LE
from runtime.server.generation import GenerationEngine
from runtime.server.options import ServerOptions
from runtime.server.pages import content_policy
from tests.runtime.server.clients import NAME
from tests.runtime.server.dashboard_pages import served
from tests.runtime.server.fakes import WAIT_S, wait_until

KEY = "sk-very-secret"


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[str, GenerationEngine]]:
    with served() as (url, engine):
        yield url, engine


def updates(
    url: str, number: int, *, then: Callable[[], None] | None = None, **headers: str
) -> list[dict[str, Any]]:
    """The first updates of a stream; ``then`` is done when the first one is there."""
    found: list[dict[str, Any]] = []
    with httpx.stream("GET", f"{url}/dashboard/events", headers=headers, timeout=WAIT_S) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        for line in reply.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line.removeprefix("data: ")))
                if then is not None and len(found) == 1:
                    then()
            if len(found) == number:
                break
    return found


def complete(url: str, **body: Any) -> None:
    asked = {"model": NAME, "prompt": "The weather in", "max_tokens": 8, **body}
    httpx.post(f"{url}/v1/completions", json=asked, timeout=WAIT_S).raise_for_status()


def test_an_update_has_the_servers_own_figures(site: Any) -> None:
    url, engine = site
    complete(url)
    (update,) = updates(url, 1)
    experts, stats = update["experts"], engine.offload.stats()
    assert (update["model"], update["state"], update["is_offloaded"]) == (NAME, "ready", True)
    assert (update["running"], update["waiting"]) == (0, 0)
    assert update["generated_tokens"] >= 8
    assert update["prompt_tokens"] >= 3
    assert (experts["hits"], experts["misses"]) == (stats.hits, stats.misses)
    assert (experts["moved_bytes"], experts["stall_s"]) == (stats.miss_bytes, stats.stall_s)
    assert (experts["judged"], experts["foreseen"]) == (
        stats.judged_experts,
        stats.foreseen_experts,
    )
    assert (experts["predictor"], experts["predictor_failed"]) == ("previous", False)


def test_cells_tell_who_is_resident_forecast_hit_and_missed(site: Any) -> None:
    url, _ = site
    seen = updates(url, 4, then=partial(complete, url))
    shape = (seen[0]["experts"]["layers"], seen[0]["experts"]["experts_per_layer"])
    assert shape == (8, 32)
    maps = [
        torch.frombuffer(
            bytearray(base64.b64decode(update["experts"]["cells"])), dtype=torch.uint8
        ).view(3, *shape)
        for update in seen
    ]
    assert all(((cells[0] & 1) > 0).sum(-1).tolist() == [8] * 8 for cells in maps)
    assert all(((cells[0] & 2) > 0).sum(-1).tolist() == [4] * 8 for cells in maps)
    before, after = seen[0]["experts"], seen[-1]["experts"]
    hits, misses = (sum(int(cells[i].sum()) for cells in maps[1:]) for i in (1, 2))
    assert (hits, misses) == (after["hits"] - before["hits"], after["misses"] - before["misses"])
    assert min(hits, misses) > 0


def test_a_cell_says_what_an_expert_is_and_how_often_it_was_used() -> None:
    view = ExpertView(
        resident_LE=torch.tensor([[True, False, True, False]]),
        expected_LE=torch.tensor([[0.0, 0.4, 0.3, 0.1]]),
        hits_LE=torch.tensor([[0, 0, 300, 0]]),
        misses_LE=torch.tensor([[0, 2, 1, 0]]),
    )
    assert cells_3LE(view, 2).tolist() == [[[1, 2, 3, 0]], [[0, 0, 255, 0]], [[0, 2, 1, 0]]]
    unknown = ExpertView(resident_LE=view.resident_LE, expected_LE=None)
    assert cells_3LE(unknown, 2).tolist() == [[[1, 0, 1, 0]], [[0] * 4], [[0] * 4]]


def test_uses_are_counted_only_while_somebody_listens(site: Any) -> None:
    url, engine = site
    backend = engine.offload._backend
    updates(url, 2)
    wait_until(lambda: backend._uses is None)
    with httpx.stream("GET", f"{url}/dashboard/events", timeout=WAIT_S) as reply:
        next(reply.iter_lines())
        assert backend._uses is not None
    wait_until(lambda: backend._uses is None)


def test_a_model_without_offloading_is_shown_without_experts() -> None:
    with served(slots=None) as (url, _):
        complete(url)
        (update,) = updates(url, 1)
    assert (update["is_offloaded"], update["experts"]) == (False, None)
    assert update["generated_tokens"] >= 8


def test_the_page_is_open_and_its_stream_behind_the_key() -> None:
    """A browser sends no header with a navigation; so the page must hold nothing of the server."""
    with served(options=ServerOptions(api_keys=(KEY,)), name="secret/model") as (url, _):
        page = httpx.get(f"{url}/dashboard")
        assert page.status_code == 200
        assert "secret" not in page.text
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert httpx.get(f"{url}/dashboard/events", headers=headers).status_code == 401
        assert httpx.get(f"{url}/dashboard/events?key={KEY}").status_code == 401
        assert httpx.get(f"{url}/dashboard/").status_code == 401
        (update,) = updates(url, 1, Authorization=f"Bearer {KEY}")
        assert update["model"] == "secret/model"


def test_the_policy_lets_the_pages_own_style_and_script_run_and_nothing_else(site: Any) -> None:
    url, _ = site
    reply = httpx.get(f"{url}/dashboard")
    rules = dict(
        rule.strip().split(" ", 1) for rule in reply.headers["content-security-policy"].split(";")
    )
    assert rules["default-src"] == rules["base-uri"] == rules["frame-ancestors"] == "'none'"
    assert rules["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", reply.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert "unsafe" not in reply.headers["content-security-policy"]
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert not re.search(r"(src|href)=.?(https?:)?//|@import|url\(", reply.text)


def test_a_changed_script_has_another_hash() -> None:
    page = "<style>a</style><script>b</script>"
    assert content_policy(page) != content_policy(page.replace("b", "c"))


def test_an_open_stream_does_not_hold_up_a_shutdown() -> None:
    """Without an end of its own it would be waited for until the deadline, which is 30 seconds."""
    with served(drain_s=30) as (url, _):
        reply = httpx.Client(timeout=WAIT_S)
        stream = reply.stream("GET", f"{url}/dashboard/events")
        lines = stream.__enter__().iter_lines()
        assert next(lines).startswith("data: ")
        left_s = time.monotonic()
    assert time.monotonic() - left_s < 10
    assert list(lines)[-1] == ""  # the end of an event, and no broken connection
    stream.__exit__(None, None, None)
    reply.close()


def test_an_update_goes_without_experts_while_a_step_takes_long(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, engine = site
    monkeypatch.setattr("runtime.server.dashboard._STEP_S", 0.05)
    held, is_held = threading.Event(), threading.Event()

    def hold() -> None:
        is_held.set()
        assert held.wait(WAIT_S)

    holder = threading.Thread(target=engine.between_steps, args=[hold])
    holder.start()
    assert is_held.wait(WAIT_S)
    try:
        (update,) = updates(url, 1)
    finally:
        held.set()
        holder.join()
    assert update["experts"] is None
    assert (update["is_offloaded"], update["state"]) == (True, "ready")
    assert updates(url, 1)[0]["experts"] is not None
