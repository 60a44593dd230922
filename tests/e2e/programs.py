"""What a cluster consists of: programs and images, built once into a cache outside the repository.

Owns the versions, the cache's layout and the builds. Does not depend on how a cluster runs. Slow
the first time: about 20 minutes on two cores.

    CACHE/bin/VERSION/NAME     the programs of Kubernetes, from the Go module k8s.io/kubernetes
    CACHE/bin/helm-VERSION     Helm, from its Go module
    CACHE/flannel-VERSION      flanneld, its CNI plugin and its manifests, from their Go modules
    CACHE/images/NAME.tar      images as archives for ``ctr images import``
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from udptun.lab import LabError
from udptun.lab.tools import SEARCH_PATH

KUBERNETES = "1.34.4"
HELM = "3.16.4"
FLANNEL = "0.28.10"
# The public proxy of Go modules does not have flannel's present CNI plugin. This is the former one,
# in its last version. It attaches pods by IPv4 only, and knows CNI up to 0.4.0.
FLANNEL_CNI = "github.com/containernetworking/plugins/plugins/meta/flannel@v0.9.1"
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
    "iptables": "iptables",
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
    part = _part(target)
    _command(["go", "build", "-trimpath", "-ldflags", f"-s -w {version}", "-o", str(part),
              f"k8s.io/kubernetes/cmd/{name}"], source,
             {"CGO_ENABLED": "1" if name == "kubelet" else "0"})
    part.rename(target)


def helm(cache: Path, tell: Tell) -> Path:
    """Build Helm if the cache lacks it; return the program."""
    return _install(cache / f"bin/helm-{HELM}", f"helm.sh/helm/v3/cmd/helm@v{HELM}", tell)


def _install(folder: Path, package: str, tell: Tell) -> Path:
    """Build the one program of a Go package, at its version; return the program."""
    name = Path(package.partition("@")[0]).name
    if not (folder / name).exists():
        with Waiting(f"building {package}", tell):
            part = _part(folder)
            _command(["go", "install", "-trimpath", "-ldflags", "-s -w", package], folder.parent,
                     {"CGO_ENABLED": "0", "GOBIN": str(part)})
            folder.mkdir(parents=True, exist_ok=True)
            (part / name).rename(folder / name)
            part.rmdir()
    return folder / name


def flannel(cache: Path, tell: Tell) -> Path:
    """Build flannel if the cache lacks it. Return the directory with flanneld, install-conf, the
    CNI plugin flannel, and kube-flannel.yml."""
    folder = cache / f"flannel-{FLANNEL}"
    if folder.exists():
        return folder
    part = _part(folder)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    module = f"github.com/flannel-io/flannel@v{FLANNEL}"
    found = json.loads(_command(["go", "mod", "download", "-json", module], part))["Dir"]
    shutil.copytree(found, part / "source", copy_function=shutil.copyfile)
    for path in (part / "source").rglob("*/"):
        path.chmod(0o755)  # the directories of Go's cache are read-only
    # One backend needs a module that the public proxy of Go modules does not have.
    main = part / "source/main.go"
    main.write_text(re.sub(r".*/tencentvpc.*\n", "", main.read_text()))
    flags = f"-s -w -X github.com/flannel-io/flannel/pkg/version.Version=v{FLANNEL}"
    for name, package, cgo in (("flanneld", ".", "1"), ("install-conf", "./cmd/install_conf", "0")):
        with Waiting(f"building {name} {FLANNEL}", tell):
            _command(["go", "build", "-trimpath", "-ldflags", flags, "-o", str(part / name),
                      package], part / "source", {"CGO_ENABLED": cgo})
    shutil.copy(part / "source/Documentation/kube-flannel.yml", part)
    shutil.rmtree(part / "source")
    shutil.copy(_install(cache / "bin/flannel-cni", FLANNEL_CNI, tell), part / "flannel")
    part.rename(folder)
    return folder


def _part(path: Path) -> Path:
    """Return the path of what is not complete yet."""
    return path.with_name(f"{path.name}.part")


def flannel_image(cache: Path, programs: Path) -> Path:
    """Make an image with flannel's programs at the paths of flannel's own images.

    It takes nft, iptables and libc from this machine. Return the archive.
    """
    archive = cache / "images" / f"flannel-{FLANNEL}.tar"
    if not archive.exists():
        root = _busybox_root(cache / "images/flannel")
        _copy(programs / "flannel", root)
        _copy(programs / "install-conf", root / "opt/bin")
        _copy_with_libraries(programs / "flanneld", root, "opt/bin")
        for name in ("nft", "iptables", "ip6tables"):
            program = shutil.which(name, path=SEARCH_PATH)
            assert program is not None  # see missing()
            _copy_with_libraries(Path(program), root, "usr/sbin")
        _write_image(archive, root, "flannel", ["/opt/bin/flanneld"])
    return archive


def _copy_with_libraries(program: Path, root: Path, folder: str) -> None:
    """Copy a program to a folder of an image, and the libraries that it needs to their paths."""
    _copy(program, root / folder)
    for library in re.findall(r"(/\S+) \(0x", _command(["ldd", str(program)], root)):
        _copy(Path(library), root / Path(library).parent.relative_to("/"))


def _copy(file: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, folder)


def busybox_image(cache: Path, name: str, command: Sequence[str]) -> Path:
    """Make an image that has only busybox; return its archive. ``command`` is its entry point."""
    archive = cache / "images" / f"{name}.tar"
    if not archive.exists():
        _write_image(archive, _busybox_root(cache / "images" / name), name, command)
    return archive


def _busybox_root(root: Path) -> Path:
    """Make the root of an image, with busybox and a link for each of its programs."""
    (root / "bin").mkdir(parents=True, exist_ok=True)
    busybox = shutil.which("busybox", path=f"/bin:{SEARCH_PATH}")
    assert busybox is not None  # see missing()
    shutil.copy(busybox, root / "bin/busybox")
    for applet in _command([busybox, "--list"], root).split():
        link = root / "bin" / applet
        if not link.is_symlink() and applet != "busybox":
            link.symlink_to("busybox")
    return root


def _write_image(archive: Path, root: Path, name: str, command: Sequence[str]) -> None:
    """Make the image localhost/NAME:1 of a directory, and write it to an archive."""
    entry = ", ".join(f'"{word}"' for word in command)
    dockerfile = root.with_suffix(".Dockerfile")
    dockerfile.write_text(f"FROM scratch\nCOPY . /\nENTRYPOINT [{entry}]\n")
    buildah = ["buildah", "--storage-driver", "vfs", "--root", str(archive.parents[1] / "storage")]
    tag = f"localhost/{name}:1"
    _command([*buildah, "bud", "--isolation", "chroot", "-t", tag, "-f", str(dockerfile), "."],
             root)
    part = _part(archive)
    part.unlink(missing_ok=True)
    _command([*buildah, "push", tag, f"docker-archive:{part}:{tag}"], root)
    part.rename(archive)


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
