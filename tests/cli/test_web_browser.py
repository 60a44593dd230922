"""``udptun web`` in headless Chromium: no errors, no other hosts, keys, themes, small screens.

Slow: `make test-all` runs it. Needs chromium.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.cli.browser import CHROMIUM, Page, browser
from tests.cli.scene import HOSTILE, Scene, scene
from udptun.cli.web.server import WebServer
from udptun.cli.web.watch import Watch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="the page is not tested in a browser: chromium is "
                                                "missing"),
]
ROWS = "[...document.querySelectorAll('#rows .peer')].map(e => e.textContent)"


@asynccontextmanager
async def opened(
    folder: Path, names: list[str] | int
) -> AsyncIterator[tuple[Page, Scene, str]]:
    with scene(folder, names) as running:
        server = WebServer(Watch(running.path))
        await server.start_at("127.0.0.1", 0)
        try:
            async with browser(folder) as page:
                address = f"http://127.0.0.1:{server.port}/"
                await page.open(address)
                yield page, running, address
                assert page.complaints == []
                assert all(url.startswith(address) for url in page.requests)
        finally:
            await server.close()


async def test_it_is_live_sorted_and_paused(tmp_path: Path) -> None:
    async with opened(tmp_path, 20) as (page, running, _):
        answers = running.forwarder.answers
        await page.until("document.getElementById('moment').textContent")
        moment = await page.value("document.getElementById('moment').textContent")
        await page.until(f"document.getElementById('moment').textContent !== {moment!r}")
        assert running.forwarder.answers > answers
        assert (await page.value(ROWS))[:2] == ["n2", "n3"]

        # By keyboard: the focus stays on the button, also when its column is sorted.
        await page.value("document.getElementById('sort-name').focus()")
        await page.press("Enter", 13, "\r")
        await page.until(f"{ROWS}[0] === 'n21'")
        assert await page.value("document.activeElement.id") == "sort-name"
        assert await page.value(
            "document.querySelector('th[aria-sort]').getAttribute('aria-sort')") == "descending"
        assert await page.value("getComputedStyle(document.activeElement).outlineWidth") == "3px"

        await page.value("document.getElementById('filter').focus()")
        await page.call("Input.insertText", text="n1")
        await page.until(f"{ROWS}.length === 10")
        await page.until("location.search === '?sort=-name&q=n1'")
        assert await page.value("document.activeElement.id") == "filter"

        await page.value("document.getElementById('pause').click()")
        assert await page.value("document.getElementById('pause').textContent") == "Continue"
        moment = await page.value("document.getElementById('moment').textContent")
        answers = running.forwarder.answers
        await page.value("new Promise(done => setTimeout(done, 3000))")
        assert await page.value("document.getElementById('moment').textContent") == moment
        assert running.forwarder.answers <= answers + 1

        # A link of the picture leads to the row.
        await page.open((await page.value("location.origin")) + "/")
        await page.press("Tab", 9)
        assert await page.value("document.activeElement.className") == "skip"
        assert await page.value(
            "[...document.querySelectorAll('.mesh a')].every(a => "
            "document.querySelector(a.getAttribute('href')))")


async def test_hostile_names_run_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path, [*HOSTILE]) as (page, _, _address):
        moment = await page.value("document.getElementById('moment').textContent")
        await page.until(f"document.getElementById('moment').textContent !== {moment!r}")
        assert "<script>alert(1)</script>" in await page.value(ROWS)
        assert await page.value("document.scripts.length") == 1
        assert await page.value("document.images.length") == 0


async def test_screens_and_themes(tmp_path: Path) -> None:
    async with opened(tmp_path, 500) as (page, _, address):
        pictures = set()
        for width in (360, 1280):
            for scheme in ("light", "dark"):
                await page.resize(width, 900, scheme)
                await page.open(address)
                # The page itself never scrolls sideways; only the tables do.
                assert await page.value("document.documentElement.scrollWidth") <= width
                shown = await page.value(
                    "[...document.querySelectorAll('.mesh')].filter(e => e.clientWidth)"
                    ".map(e => e.classList[1])")
                assert shown == (["tree"] if width == 360 else ["star"])
                pictures.add(await page.picture())
        assert len(pictures) == 4
        assert await page.value(f"{ROWS}.length") == 500


async def test_without_javascript_it_is_a_snapshot(tmp_path: Path) -> None:
    async with opened(tmp_path, 20) as (page, _, address):
        await page.call("Emulation.setScriptExecutionDisabled", value=True)
        await page.open(f"{address}?sort=out&q=n1")
        assert "JavaScript is off" in await page.value("document.body.innerText")
        assert (await page.value(ROWS))[0] == "n10"
        assert await page.value("document.getElementById('pause').hidden")
        await page.value("document.getElementById('sort-name').click()")
        await page.until(f"location.search.endsWith('sort=name') && {ROWS}.length")
        assert (await page.value(ROWS))[:2] == ["n10", "n11"]


async def test_a_server_that_ends(tmp_path: Path) -> None:
    with scene(tmp_path, 3) as running:
        server = WebServer(Watch(running.path))
        await server.start_at("127.0.0.1", 0)
        async with browser(tmp_path) as page:
            await page.open(f"http://127.0.0.1:{server.port}/")
            await server.close()
            await page.until("document.getElementById('note').textContent.startsWith('No answer')")
            assert (await page.value(ROWS)) == ["n2", "n3", "n4"]
