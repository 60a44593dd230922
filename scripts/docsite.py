"""Build the documentation site: ``python scripts/docsite.py [--linkcheck]``.

Copies the pages of the repository to build/docs-source, adds the pages that are generated from
code, and runs Sphinx on them. The site is build/docs/index.html. A warning of Sphinx is an error.
``--linkcheck`` instead asks all foreign hosts that the pages link to.

docs/index.md has the order of the pages: each heading of second level there is a part of the
site, and each list item a page. docs/conf.py is Sphinx's configuration.
"""

import argparse
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import generated_pages
import release
from release import BUILD, ROOT

SOURCE, SITE, CACHE = BUILD / "docs-source", BUILD / "docs", BUILD / "docs-cache"
# page of the repository outside docs/ -> its name on the site
ELSEWHERE = {
    "README.md": "readme",
    "deploy/README.md": "install",
    "deploy/kubernetes/README.md": "manifests",
    "src_ext/README.md": "core",
    "bench/README.md": "benchmark",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "SECURITY.md": "report-a-weakness",
}
FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
ITEM = re.compile(r"^- \[([^\]]*)\]\(([^)#\s]+)\)", re.MULTILINE)


@cache
def pages() -> dict[str, str]:
    """Return path in the repository -> name on the site, without ``.md``."""
    in_docs = {
        name: name.removeprefix("docs/").removesuffix(".md")
        for name in release.sources() if re.fullmatch(r"docs/.*\.md", name)
    }
    return in_docs | {path: name for path, name in ELSEWHERE.items() if (ROOT / path).exists()}


class Copier:
    """Copies pages, and changes their links so that they fit the site."""

    def __init__(self) -> None:
        self.pages = pages()
        self.written: set[str] = set()

    def copy(self, path: str) -> None:
        source = (ROOT / path).read_text()
        text = self.with_links(source, path)
        if path == "docs/index.md":
            text = with_navigation(text, source)
        if not re.search(r"^# ", text, re.MULTILINE):
            text = f"# {Path(path).stem.capitalize()}\n\n{text}"
        self.write(f"{self.pages[path]}.md", text.encode())

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the site's source. Sphinx reads a page again only if it was written."""
        self.written.add(name)
        target = SOURCE / name
        if not target.exists() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

    def remove_others(self) -> None:
        for file in SOURCE.rglob("*"):
            if file.is_file() and str(file.relative_to(SOURCE)) not in self.written:
                file.unlink()

    def with_links(self, text: str, path: str) -> str:
        """Return the text with its links changed, except those in code blocks."""
        parts, at = [], 0
        for fence in FENCE.finditer(text):
            parts += [self._changed(text[at : fence.start()], path), fence[0]]
            at = fence.end()
        return "".join([*parts, self._changed(text[at:], path)])

    def _changed(self, text: str, path: str) -> str:
        return LINK.sub(lambda m: self._link(m, path), text)

    def _link(self, match: re.Match[str], path: str) -> str:
        image, label, link = match.groups()
        file, hash_mark, anchor = link.partition("#")
        if not file or re.match(r"[a-z]+:", file):
            return match[0]
        target = os.path.normpath(f"{Path(path).parent}/{file}")
        here = Path(self.pages[path]).parent
        if target in self.pages:
            to = f"{os.path.relpath(self.pages[target], here)}.md"
        elif (ROOT / target).is_file():
            to = os.path.relpath(f"files/{target}", here)
            self.write(f"files/{target}", (ROOT / target).read_bytes())
        elif (ROOT / target).is_dir():  # the site has no page for it
            return f"`{target}`"
        else:
            raise SystemExit(f"{path}: {link} does not exist")
        return f"{image}[{label}]({to}{hash_mark}{anchor})"


def with_navigation(index: str, source: str) -> str:
    """Return the first page with the site's navigation, which follows from the lists in ``source``.

    The lists also get the generated pages.
    """
    intro, *parts = re.split(r"^## (.*)\n", index, flags=re.MULTILINE)
    in_source = re.split(r"^## .*\n", source, flags=re.MULTILINE)[1:]
    text = intro
    for title, part, links in zip(parts[::2], parts[1::2], in_source, strict=True):
        generated = [page for page in generated_pages.PAGES if page.part == title]
        items = [f"- [{page.title}]({page.name}.md): {page.text}\n" for page in generated]
        listed = [(label, site_name(link)) for label, link in ITEM.findall(links)]
        listed += [(page.title, page.name) for page in generated]
        tree = "\n".join(f"{label} <{name}>" for label, name in listed)
        text += f"## {title}\n\n{part.strip()}\n{''.join(items)}\n"
        text += f"```{{toctree}}\n:hidden:\n:caption: {title}\n\n{tree}\n```\n\n"
    return text


def site_name(link: str) -> str:
    return pages()[os.path.normpath(f"docs/{link}")]


def collect() -> None:
    """Write the source of the site."""
    copier = Copier()
    for path in copier.pages:
        copier.copy(path)
    for page in generated_pages.PAGES:
        copier.write(f"{page.name}.md", page.render().encode())
    copier.remove_others()


def build(builder: str, target: Path) -> int:
    return subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", builder,
         "-c", str(ROOT / "docs"), "-d", str(CACHE), str(SOURCE), str(target)], check=False,
    ).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--linkcheck", action="store_true", help="check links to other hosts")
    options = parser.parse_args()
    collect()
    if options.linkcheck:
        return build("linkcheck", BUILD / "docs-links")
    code = build("html", SITE)
    if code == 0:
        print(f"documentation: {SITE.relative_to(ROOT)}/index.html")
    return code


if __name__ == "__main__":
    sys.exit(main())
