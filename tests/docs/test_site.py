"""The documentation site: it is built without warnings, lists every page, and is self-contained."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unprivileged

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "build" / "docs"
INDEX = ROOT / "docs" / "index.md"


def test_the_index_lists_every_page() -> None:
    """``make docs`` fails for a page that it does not list."""
    listed = {
        (INDEX.parent / link).resolve()
        for link in re.findall(r"^- \[[^\]]*\]\(([^)#]+)\)", INDEX.read_text(), re.MULTILINE)
    }
    have = set((ROOT / "docs").rglob("*.md")) - {INDEX}
    assert {str(page.relative_to(ROOT)) for page in have - listed} == set()


@pytest.fixture(scope="module")
def site() -> Path:
    if importlib.util.find_spec("sphinx") is None:
        pytest.skip("sphinx is not installed: make docs")
    done = subprocess.run(
        [sys.executable, "scripts/docsite.py"], cwd=ROOT, capture_output=True, text=True,
        check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return SITE


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    loaded = re.compile(
        r"<(?:script|img|iframe|source)[^>]* src=\"(?:https?:)?//[^\"]*\""
        r"|<link[^>]* href=\"(?:https?:)?//[^\"]*\"|url\(['\"]?(?:https?:)?//[^)]*\)"
        r"|@import[^;]*//[^;]*")
    found = {
        match for file in site.rglob("*") if file.suffix in (".html", ".css")
        for match in loaded.findall(file.read_text())
    }
    assert found == set()


def test_links_to_headings_exist(site: Path) -> None:
    """Sphinx checks links to pages and to headings. This checks the pages that it wrote."""
    wrong = []
    ids: dict[Path, set[str]] = {}
    for page in site.rglob("*.html"):
        ids[page] = set(re.findall(r' id="([^"]+)"', page.read_text()))
    for page in ids:
        main = page.read_text().partition("<article")[2].partition("</article>")[0]
        for link in re.findall(r' href="([^"]+)"', main):
            file, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", file):
                continue
            target = (page.parent / file).resolve() if file else page
            if not target.exists() or (anchor and anchor not in ids.get(target, {anchor})):
                wrong.append(f"{page.name}: {link}")
    assert wrong == []
