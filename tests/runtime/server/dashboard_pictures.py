"""Takes the README's pictures of the dashboard, light and dark, of a server under real traffic.

    python -m tests.runtime.server.dashboard_pictures --artifact outputs/artifacts/NAME

The embedded model is served with a quarter of its experts resident and the artifact's predictor;
clients ask for continuations of passages that it has not been fitted on, in waves. Takes two
minutes, which is what the page's curves hold.
"""

import argparse
import random
import re
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import expect

from predictors.artifact import load_artifact
from tests.runtime.server.dashboard_pages import chromium, chromium_path, served

DOCS = Path(__file__).parents[3] / "docs"
MODEL_NAME = "tiny-moe"
MAX_BYTES = 200_000
PROMPTS = [
    "Dear customer, thank you for your letter of",
    "def merge(left, right):\n    result = []\n",
    "The harbour was quiet when the last boat",
    "import asyncio\n\nasync def main() -> None:\n",
    "In the second half of the year, prices",
    "She opened the window and saw that",
]


class Traffic:
    """Clients that ask, wait for the answer, and think for a while before they ask again."""

    def __init__(self, url: str, *, num_clients: int, seed: int) -> None:
        self._url = url
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=[random.Random(seed + i), i])
            for i in range(num_clients)
        ]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, chance: random.Random, client: int) -> None:
        began_s = time.monotonic()
        while not self._stop.is_set():
            # Waves of half a minute: at first one client asks, in the end all of them do.
            if (time.monotonic() - began_s) % 30 < 8 * client:
                self._stop.wait(0.5)
                continue
            body = {
                "model": MODEL_NAME,
                "prompt": chance.choice(PROMPTS),
                "max_tokens": chance.randint(24, 96),
                "temperature": 0.8,
                "seed": chance.randrange(2**31),
            }
            httpx.post(f"{self._url}/v1/completions", json=body, timeout=120).raise_for_status()
            self._stop.wait(chance.expovariate(2.0))


def take_pictures(artifact: Path, folder: Path, *, watch_s: float) -> list[Path]:
    """Serve, watch for so long, and write ``dashboard-light.png`` and ``dashboard-dark.png``."""
    path = chromium_path()
    if path is None:
        raise SystemExit("no Chromium: install Debian's chromium, or set MOECAST_CHROMIUM")
    taken = []
    with (
        served(predictor=load_artifact(artifact), name=MODEL_NAME, mode="batched") as (url, _),
        chromium(path) as browser,
    ):
        pages = {
            scheme: browser.new_page(
                color_scheme=scheme,
                viewport={"width": 1120, "height": 600},
                device_scale_factor=1.5,
            )
            for scheme in ("light", "dark")
        }
        for page in pages.values():
            page.goto(f"{url}/dashboard")
        with Traffic(url, num_clients=4, seed=0):
            pages["light"].wait_for_timeout(1000 * watch_s)
            at_work = pages["light"].locator("#requests .value")
            expect(at_work).to_have_text(re.compile(r"^[2-9]"), timeout=60_000)
            for scheme, page in pages.items():
                picture = folder / f"dashboard-{scheme}.png"
                page.screenshot(path=picture, full_page=True)
                taken.append(picture)
        for page in pages.values():
            page.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--artifact", type=Path, required=True, help="of the embedded model")
    parser.add_argument("--folder", type=Path, default=DOCS, help="where the pictures go")
    parser.add_argument("--watch-s", type=float, default=125.0, help="traffic before the pictures")
    asked = parser.parse_args()
    for picture in take_pictures(asked.artifact, asked.folder, watch_s=asked.watch_s):
        size = picture.stat().st_size
        print(f"{picture}: {size} bytes")  # noqa: T201
        if size > MAX_BYTES:
            raise SystemExit(f"{picture}: more than {MAX_BYTES} bytes")


if __name__ == "__main__":
    main()
