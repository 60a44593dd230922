"""What a cluster consists of: programs and images, built once into a cache outside the repository.

Owns the versions, the cache's layout and the builds. Does not depend on how a cluster runs. Slow
the first time: about 15 minutes on two cores.

    CACHE/bin/VERSION/NAME     the programs of Kubernetes, from the Go module k8s.io/kubernetes
    CACHE/images/NAME.tar      images as archives for ``ctr images import``
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from udptun.lab import LabError
from udptun.lab.tools import SEARCH_PATH

KUBERNETES = "1.34.4"
PROGRAMS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet",
            "kubectl")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "udptun-e2e"

# k8s.io/kubernetes uses these modules from its own repository. Each has a release of its own.
_STAGING = (
    "api", "apiextensions-apiserver", "apimachinery", "apiserver", "cli-runtime", "client-go",
    "cloud-provider", "cluster-bootstrap", "code-generator", "component-base", "component-helpers",
    "controller-manager", "cri-api", "cri-client", "csi-translation-lib",
    "dynamic-resource-allocation", "endpointslice", "externaljwt", "kms", "kube-aggregator",
    "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubectl", "kubelet", "metrics",
    "mount-utils", "pod-security-admission", "sample-apiserver", "sample-cli-plugin",
    "sample-controller",
)

# The tools of the cluster, and the Debian package of each.
_TOOLS = {
    "go": "golang-go", "etcd": "etcd-server", "containerd": "containerd", "runc": "runc",
    "ctr": "containerd", "buildah": "buildah", "openssl": "openssl", "nft": "nftables",
    "busybox": "busybox-static", "ip": "iproute2", "nsenter": "util-linux",
}
CNI_PLUGINS = Path("/usr/lib/cni")  # of containernetworking-plugins

Tell = Callable[[str], object]


def missing() -> list[str]:
    """Return what this machine lacks for a cluster, each with the package that has it."""
    lacks = [f"{tool} (apt-get install -y {package})" for tool, package in _TOOLS.items()
             if not shutil.which(tool) and not shutil.which(tool, path=SEARCH_PATH)]
    if not (CNI_PLUGINS / "portmap").exists():
        lacks.append("the CNI plugins (apt-get install -y containernetworking-plugins)")
    return lacks


def programs(cache: Path, tell: Tell) -> Path:
    """Build the programs of Kubernetes that the cache lacks; return their directory."""
    folder = cache / "bin" / KUBERNETES
    folder.mkdir(parents=True, exist_ok=True)
    lacking = [name for name in PROGRAMS if not (folder / name).exists()]
    if lacking:
        source = _module(cache / "go")
        for name in lacking:
            with Waiting(f"building {name} {KUBERNETES}", tell):
                _build(source, name, folder / name)
    return folder


def _module(folder: Path) -> Path:
    """Write a Go module that requires Kubernetes at its version."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = KUBERNETES.replace("1.", "v0.", 1)
    lines = ["module e2e", "go 1.24", f"require k8s.io/kubernetes v{KUBERNETES}"]
    lines += [f"replace k8s.io/{name} => k8s.io/{name} {staging}" for name in _STAGING]
    (folder / "go.mod").write_text("\n".join(lines) + "\n")
    imports = "".join(f'import _ "k8s.io/kubernetes/cmd/{name}"\n' for name in PROGRAMS)
    (folder / "tools.go").write_text(f"//go:build tools\n\npackage e2e\n\n{imports}")
    _command(["go", "mod", "tidy"], folder)
    return folder


def _build(source: Path, name: str, target: Path) -> None:
    version = f"-X k8s.io/component-base/version.gitVersion=v{KUBERNETES}"
    # Only kubelet needs cgo. The program appears in the cache when it is complete.
    part = target.with_suffix(".part")
    _command(["go", "build", "-trimpath", "-ldflags", f"-s -w {version}", "-o", str(part),
              f"k8s.io/kubernetes/cmd/{name}"], source,
             {"CGO_ENABLED": "1" if name == "kubelet" else "0"})
    part.rename(target)


def busybox_image(cache: Path, name: str, command: Sequence[str]) -> Path:
    """Make an image that has only busybox; return its archive. ``command`` is its entry point."""
    archive = cache / "images" / f"{name}.tar"
    if archive.exists():
        return archive
    archive.parent.mkdir(parents=True, exist_ok=True)
    root = cache / "images" / name
    (root / "bin").mkdir(parents=True, exist_ok=True)
    busybox = shutil.which("busybox", path=f"/bin:{SEARCH_PATH}")
    assert busybox is not None  # see missing()
    shutil.copy(busybox, root / "bin/busybox")
    applets = _command([busybox, "--list"], root).split()
    for applet in applets:
        link = root / "bin" / applet
        if not link.is_symlink() and applet != "busybox":
            link.symlink_to("busybox")
    entry = ", ".join(f'"{word}"' for word in command)
    (root / "Dockerfile").write_text(f"FROM scratch\nCOPY bin /bin\nENTRYPOINT [{entry}]\n")
    buildah = ["buildah", "--storage-driver", "vfs", "--root", str(cache / "storage")]
    tag = f"localhost/{name}:1"
    _command([*buildah, "bud", "--isolation", "chroot", "-t", tag, "."], root)
    part = archive.with_suffix(".part")
    part.unlink(missing_ok=True)
    _command([*buildah, "push", tag, f"docker-archive:{part}:{tag}"], root)
    part.rename(archive)
    return archive


def _command(argv: Sequence[str], folder: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(argv, cwd=folder, env=os.environ | (env or {}), text=True, check=False,
                          stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        raise LabError(f"{' '.join(argv)} failed ({done.returncode}): {done.stderr[-4000:]}")
    return done.stdout


class Waiting:
    """Tell what is being done, and at the end how long it took."""

    def __init__(self, what: str, tell: Tell) -> None:
        self._what, self._tell = what, tell

    def __enter__(self) -> None:
        self._began = time.monotonic()
        self._tell(f"{self._what} ...")

    def __exit__(self, *_: object) -> None:
        self._tell(f"{self._what}: {time.monotonic() - self._began:.0f} s")
