"""The dashboard in a real browser: it shows what happens, asks nobody else, and can be read.

Needs Debian's Chromium; these tests skip where there is none.
"""

import json
import re
import urllib.parse
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import httpx
import pytest
import torch
from playwright.sync_api import Browser, Page, expect

from runtime.server.generation import GenerationEngine
from runtime.server.options import ServerOptions
from tests.runtime.server.clients import NAME
from tests.runtime.server.dashboard_pages import chromium, chromium_path, served
from tests.runtime.server.fakes import WAIT_S, wait_until

KEY = "sk-very-secret"
WAIT_MS = 1000 * WAIT_S

# Each text on the page with the contrast to what is painted behind it (WCAG 2.2, 1.4.3).
CONTRASTS = """() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const [r, g, b] = numbers(color).map((x) => x / 255)
      .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      const alpha = numbers(color)[3];
      if (alpha === undefined) return color;
      if (alpha !== 0) throw new Error(`${color} can be seen through`);
    }
    throw new Error("nothing is painted behind");
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !node.checkVisibility()) continue;
    if (["SCRIPT", "NOSCRIPT"].includes(node.tagName)) continue;
    const [a, b] = [getComputedStyle(node).color, behind(node)].map(luminance);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([walker.currentNode.textContent.trim(), ratio]);
  }
  return found;
}"""

# What people without one kind of cones see of linear RGB (Machado, Oliveira, Fernandes 2009,
# "A Physiologically-based Model for Simulation of Color Vision Deficiency", severity 1.0).
VISIONS = {
    "full": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ = torch.tensor(  # of linear sRGB, over the white point of D65
    [[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0178, 0.1095, 0.8727]]
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium_path()
    if path is None:
        pytest.skip("no Chromium: install Debian's chromium, or set MOECAST_CHROMIUM to a binary")
    with chromium(path) as launched:
        yield launched


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[str, GenerationEngine]]:
    with served() as (url, engine):
        yield url, engine


@pytest.fixture
def watch(browser: Browser, site: Any) -> Iterator[Any]:
    """Open the dashboard; every complaint of the browser fails the test at its end."""
    contexts, complaints = [], []

    def open_page(url: str = site[0], *, knows_of: str = "", **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda said: (
                None if knows_of and knows_of in said.text else complaints.append(said.text)
            ),
        )
        page.goto(f"{url}/dashboard")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def complete(url: str, max_tokens: int = 24) -> None:
    body = {"model": NAME, "prompt": "The weather in", "max_tokens": max_tokens}
    body["ignore_eos"] = True
    httpx.post(f"{url}/v1/completions", json=body, timeout=WAIT_S).raise_for_status()


NOTHING_OF_LATE = re.compile(r"\b0 hits and 0 misses")  # "420 hits" contains "0 hits"


def shows(page: Page, selector: str, text: str | re.Pattern[str]) -> None:
    expect(page.locator(selector)).to_contain_text(text, timeout=WAIT_MS)


def pixels(page: Page) -> str:
    return str(page.evaluate("document.getElementById('map').toDataURL()"))


def test_the_page_shows_a_completion_as_it_happens(watch: Any, site: Any) -> None:
    url, engine = site
    complete(url)  # so that what is resident is known to the page from the start
    page = watch()
    shows(page, "#state", "ready")
    shows(page, "#model", NAME)
    shows(page, "#summary", "64 of 256 experts are in memory. 32 are forecast")
    shows(page, "#summary", NOTHING_OF_LATE)
    before = pixels(page)
    complete(url)
    expect(page.locator("#summary")).not_to_contain_text(NOTHING_OF_LATE, timeout=WAIT_MS)
    assert pixels(page) != before
    for card, text in {"hit-ratio": "%", "link": "B/s", "recall": "%", "stalls": "%"}.items():
        shows(page, f"#{card} .value", text)
    expect(page.locator("#link .value")).not_to_have_text("0 B/s")
    expect(page.locator("#tokens .value")).not_to_have_text("0 · 0")
    assert page.locator("#hit-ratio path").get_attribute("d")
    shows(page, "#summary", NOTHING_OF_LATE)  # and it is over


def test_the_page_asks_no_other_host_and_nothing_but_its_stream(
    browser: Browser, site: Any
) -> None:
    url, _ = site
    context = browser.new_context()
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.goto(f"{url}/dashboard")
    shows(page, "#state", "ready")
    page.wait_for_timeout(700)
    context.close()
    assert [address.removeprefix(url) for address in asked] == ["/dashboard", "/dashboard/events"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(watch: Any, site: Any, scheme: str) -> None:
    page = watch(color_scheme=scheme)
    shows(page, "#state", "ready")
    page.locator("summary").click()
    expect(page.locator("#rows tr")).to_have_count(8, timeout=WAIT_MS)
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 60
    assert [text for text, ratio in contrasts if ratio < 4.5] == []
    is_dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 18, 22)"
    assert is_dark == (scheme == "dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_warnings_and_the_key_box_can_be_read(watch: Any, scheme: str) -> None:
    with served(slots=None, options=ServerOptions(api_keys=(KEY,))) as (url, _):
        page = watch(url, color_scheme=scheme, knows_of="401")
        expect(page.locator("#ask")).to_be_visible(timeout=WAIT_MS)
        contrasts = page.evaluate(CONTRASTS)
    assert any("Needs an API key" in text for text, _ in contrasts)
    assert [text for text, ratio in contrasts if ratio < 4.5] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("vision", VISIONS)
def test_the_maps_colours_differ_for_every_kind_of_sight(
    watch: Any, scheme: str, vision: str
) -> None:
    page = watch(color_scheme=scheme)
    shows(page, "#state", "ready")
    colors = {
        name: seen_lab(text.strip().lstrip("#"), VISIONS[vision])
        for name, text in page.evaluate("palette()").items()
        if name in ("absent", "resident", "hit", "miss")
    }
    for one, other in combinations(colors, 2):
        distance = float((colors[one] - colors[other]).norm())
        assert distance > 20, f"{one} and {other}: {distance:.0f}"  # 2 can just be told apart


def seen_lab(color: str, vision: list[list[float]]) -> torch.Tensor:
    """A colour of sRGB as it is seen, in CIELAB, where distances are those that people see."""
    srgb = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    linear = torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ (torch.tensor(vision) @ linear).clamp(0, 1)
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-9) ** (1 / 3), xyz * 841 / 108 + 4 / 29)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_the_map_follows_the_scheme_while_it_is_open(watch: Any) -> None:
    page = watch(color_scheme="light")
    shows(page, "#summary", "64 of 256")
    light = pixels(page)
    page.emulate_media(color_scheme="dark")
    wait_until(lambda: pixels(page) != light)


def test_the_table_says_what_the_map_shows(watch: Any) -> None:
    page = watch()
    shows(page, "#summary", "64 of 256")
    page.locator("summary").click()
    expect(page.locator("#rows tr")).to_have_count(8, timeout=WAIT_MS)
    rows = [line.split("\t") for line in page.locator("#rows").inner_text().splitlines()]
    assert [row[:3] for row in rows] == [[str(layer), "8", "4"] for layer in range(8)]
    page.locator("#map").hover(position={"x": 40, "y": 10})
    shows(page, "#cell", "Layer 0, expert 0: ")


def test_it_fits_a_small_telephone(watch: Any) -> None:
    page = watch(viewport={"width": 380, "height": 800})
    shows(page, "#summary", "64 of 256")
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 380
    for card in page.locator(".card:visible").all():
        box = card.bounding_box()
        assert box is not None
        assert 0 <= box["x"]
        assert box["x"] + box["width"] <= 380


def test_the_key_is_asked_for_and_stands_in_no_address(watch: Any) -> None:
    with served(options=ServerOptions(api_keys=(KEY,))) as (url, _):
        page = watch(url, knows_of="401")  # which the browser's console tells of each refusal
        asked: list[Any] = []
        page.on("request", lambda request: asked.append(request))
        expect(page.locator("#main")).to_be_hidden(timeout=WAIT_MS)
        page.locator("#key").fill("wrong")
        page.locator("button").click()
        shows(page, "#state", "That key is wrong")
        page.locator("#key").fill(KEY)
        page.locator("#key").press("Enter")
        shows(page, "#state", "ready")
        expect(page.locator("#ask")).to_be_hidden()
        shows(page, "#summary", "of 256 experts")
        assert len(asked) == 2
        assert all(KEY not in urllib.parse.unquote(request.url) for request in asked)
        assert asked[-1].headers["authorization"] == f"Bearer {KEY}"
        assert page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie])") == (
            '[{},{},""]'
        )
        page.goto("about:blank")  # before the server goes, which the page would complain about


def test_panels_that_are_not_provided_say_so(watch: Any) -> None:
    with served(slots=None) as (url, _):
        page = watch(url)
        for card in ("hit-ratio", "link", "stalls", "recall"):
            shows(page, f"#{card}", "Not provided: all experts of this model are in memory")
        shows(page, "#requests .value", "0 · 0")
        page.goto("about:blank")


def test_what_a_gpu_does_not_provide_is_said(watch: Any, site: Any) -> None:
    """The page gets an update as a backend would tell it whose kernels count by layer."""
    page = watch()
    shows(page, "#state", "ready")
    update = first_update(site[0])
    update["experts"] |= {
        "stall_s": None,
        "judged": None,
        "foreseen": None,
        "counts_uses": False,
    }
    body = f"data: {json.dumps(update)}\n\n"
    page.route("**/dashboard/events", lambda route: route.fulfill(status=200, body=body))
    page.reload()
    shows(page, "#stalls", "Not provided: on a GPU")
    shows(page, "#recall", "Not provided: routing on a GPU is not compared")
    shows(page, "#map-note", "Not provided by this backend: hits and misses of each expert")
    page.goto("about:blank")


def test_text_from_the_server_is_shown_as_text(watch: Any) -> None:
    name = "<img src=x onerror=alert(1)>"
    with served(name=name) as (url, _):
        page = watch(url)
        shows(page, "#model", name)
        assert page.locator("img").count() == 0
        page.goto("about:blank")


def test_a_stream_that_breaks_off_is_taken_up_again(watch: Any, site: Any) -> None:
    page = watch()
    shows(page, "#state", "ready")
    is_broken = [True]

    def answer(route: Any) -> None:
        if is_broken.pop() if is_broken else False:
            route.fulfill(status=200, body="")
        else:
            route.continue_()

    page.route("**/dashboard/events", answer)
    page.reload()
    shows(page, "#state", "not connected (the stream has ended); trying again")
    shows(page, "#state", "ready")


def first_update(url: str) -> dict[str, Any]:
    with httpx.stream("GET", f"{url}/dashboard/events", timeout=WAIT_S) as reply:
        line = next(reply.iter_lines())
    update: dict[str, Any] = json.loads(line.removeprefix("data: "))
    return update
