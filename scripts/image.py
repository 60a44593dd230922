"""Build the container image without an engine: ``python scripts/image.py``; root.

Writes dist/udptun-VERSION-CPU.oci.tar, for ``ctr images import``. buildah builds deploy/Dockerfile
from the bundle. The base image is ``--base``, which should name a digest. Without it, debootstrap
makes a base image of Debian 12 once, and needs no image registry. buildah's storage is
build/image, so nothing else on the host changes.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import bundle
import release
from release import BUILD, DIST, ROOT, VERSION

SUITE = "bookworm"
OWN_BASE = f"localhost/udptun-base:{SUITE}"
NAME = f"docker.io/library/udptun:{VERSION}"  # what "image: udptun:VERSION" in a pod means
STORE = BUILD / "image"
# /tmp of a machine may be small or noexec, and the layers are large
ENVIRONMENT = {**os.environ, "TMPDIR": str(STORE)}


def buildah(*arguments: str) -> str:
    command = [
        "buildah", "--root", str(STORE / "storage"), "--runroot", str(STORE / "run"),
        "--storage-driver", "vfs", *arguments,
    ]
    return release.output(command, env=ENVIRONMENT)


def make_base() -> None:
    """Make the image OWN_BASE from Debian's packages, if it does not exist."""
    if buildah("images", "-q", "--filter", f"reference={OWN_BASE}"):
        return
    print(f"making a base image: Debian {SUITE}", flush=True)
    with tempfile.TemporaryDirectory(prefix="base-", dir=STORE) as folder:
        root = Path(folder) / "root"
        subprocess.run(
            ["debootstrap", "--variant=minbase", SUITE, str(root)],
            check=True, stdout=subprocess.DEVNULL,
        )
        for name in ("var/cache/apt", "var/lib/apt/lists", "var/log"):
            shutil.rmtree(root / name)
            (root / name).mkdir()
        container = buildah("from", "scratch")
        buildah("copy", "-q", container, str(root), "/")
        buildah("commit", "-q", "--rm", container, OWN_BASE)


def build(base: str, run_file: Path, cpu: str) -> Path:
    revision = release.output(["git", "rev-parse", "HEAD"], cwd=ROOT) if (
        ROOT / ".git").exists() else ""
    with tempfile.TemporaryDirectory(prefix="context-", dir=STORE) as context:
        shutil.copy(run_file, context)
        image = buildah(
            "bud", "-q", "--isolation", "chroot", "--network", "host", "--layers=false",
            *(["--pull-never"] if base == OWN_BASE else []),
            "--timestamp", str(release.epoch()), "-f", str(ROOT / "deploy" / "Dockerfile"),
            "--build-arg", f"BASE={base}", "--build-arg", f"BUNDLE={run_file.name}",
            "--build-arg", f"VERSION={VERSION}", "--build-arg", f"REVISION={revision}", context,
        ).splitlines()[-1]
    target = DIST / f"udptun-{VERSION}-{cpu}.oci.tar"
    target.unlink(missing_ok=True)
    buildah("push", "-q", image, f"oci-archive:{target}:{NAME}")
    buildah("rmi", image)
    name_for_containerd(target)
    return target


def name_for_containerd(archive: Path) -> None:
    """Add the annotation from which containerd takes the name of an image."""
    with tempfile.TemporaryDirectory(dir=STORE) as folder:
        with tarfile.open(archive) as file:
            file.extractall(folder)
        index = Path(folder) / "index.json"
        content = json.loads(index.read_text())
        for manifest in content["manifests"]:
            manifest.setdefault("annotations", {})["io.containerd.image.name"] = NAME
        index.write_text(json.dumps(content))
        release.write_tar(archive, {
            str(path.relative_to(folder)): path for path in Path(folder).rglob("*")
            if path.is_file()
        })


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", default=os.environ.get("BASE") or OWN_BASE, metavar="IMAGE",
                        help="base image, IMAGE@sha256:DIGEST; also the variable BASE")
    options = parser.parse_args()
    cpu = platform.machine()
    STORE.mkdir(parents=True, exist_ok=True)
    run_file = bundle.build(cpu)
    if options.base == OWN_BASE:
        make_base()
    print("building the image", flush=True)
    target = build(options.base, run_file, cpu)
    print(f"image: dist/{target.name}, {NAME}, {target.stat().st_size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
