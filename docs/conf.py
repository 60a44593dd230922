"""Sphinx's configuration of the documentation site. ``make docs`` builds it: scripts/docsite.py.

The site loads nothing from other hosts: no fonts, scripts or images.
"""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

project = "udptun"
author = copyright = "The udptun authors"
release = version = runpy.run_path(str(ROOT / "udptun" / "_version.py"))["__version__"]
extensions = ["myst_parser"]
root_doc = "index"
nitpicky = True
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4  # GitHub's anchors
suppress_warnings = ["misc.highlighting_failure"]  # blocks that have "..." in their JSON

html_theme = "furo"
html_theme_options = {"footer_icons": []}
html_title = f"udptun {version}"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
pygments_style = "default"
pygments_dark_style = "native"
highlight_language = "none"  # a block without a language is output or a picture

linkcheck_ignore = [r"http://(localhost|127\.0\.0\.1|192\.0\.2\.).*"]
