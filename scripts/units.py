"""Write the templates of the units, deploy/NAME@.service: ``python scripts/units.py``.

A template runs an instance of udptun. The name of the instance is the text after the @. A template
is a copy of the default instance's unit, with the names of the instance %i instead of the default
instance's names of files, directories and units (udptun/instance.py).
"""

import re

from release import ROOT

NOTE = "# A template: scripts/units.py writes it from {name}.\n"
CHANGES = [
    (r"^Description=(.*)$", r"Description=\1, instance %i"),
    (r"\b(udptun-[a-z-]+)\.service", r"\1@%i.service"),
    (r"/etc/udptun/([a-z]+)\.env", r"/etc/udptun/\1-%i.env"),
    (r"^(ExecStart=\S+/udptun [a-z]+)", r"\1 --instance %i"),
    (r"/run/udptun/", "/run/%i/"),
    (r"%S/udptun/", "%S/%i/"),
    # /run/flannel is the default instance's
    (r"^RuntimeDirectory=udptun( flannel)?$", "RuntimeDirectory=%i"),
    (r"^StateDirectory=udptun$", "StateDirectory=%i"),
]


def templates() -> dict[str, str]:
    """Return the file name and the text of each template."""
    found = {}
    for unit in sorted((ROOT / "deploy").glob("*[!@].service")):
        text = unit.read_text()
        for pattern, replacement in CHANGES:
            text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
        note = NOTE.format(name=unit.name)
        found[unit.name.replace(".service", "@.service")] = note + text
    return found


if __name__ == "__main__":
    for name, text in templates().items():
        (ROOT / "deploy" / name).write_text(text)
