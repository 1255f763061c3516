"""Containers of the project's images as a cluster's `restricted` profile runs them, without an engine.

Linux's own namespaces: a root that is read-only, /tmp in memory, user 10001 without a name or capabilities,
a process table and a host name of its own. The network is the machine's. It needs root and buildah.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import REPOSITORY

USER = 10001
BUILD = {"BUILDAH_ISOLATION": "chroot"}  # needs no runc
# pip meets a proxy's certificate as on this machine
BUILD["BUILDAH_ARGS"] = "--network host --volume /etc/ssl/certs:/etc/ssl/certs:ro"
ENTER = """set -e
root=$1 name=$2
shift 2
hostname "$name"
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
for volume in $VOLUMES; do mount --bind "${volume%%:*}" "$root${volume#*:}"; done
exec chroot "$root" setpriv --reuid=10001 --regid=10001 --clear-groups --no-new-privs --bounding-set=-all \
  env -i "$@"
"""


def require() -> None:
    missing = [program for program in ("buildah", "mmdebstrap", "unshare") if not shutil.which(program)]
    if missing or os.geteuid():
        pytest.skip(f"not root, or not installed: {', '.join(missing)}")


def buildah(*arguments: str) -> str:
    done = subprocess.run(
        ["buildah", *arguments], env=os.environ | BUILD, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip()


def build(*images: str) -> None:
    """Build `purebred-IMAGE:test`."""
    done = subprocess.run(
        [REPOSITORY / "k8s" / "images.sh", *images],
        env=os.environ | BUILD | {"TAG": "test"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@dataclass(frozen=True)
class Image:
    root: Path
    environment: tuple[str, ...]
    entrypoint: tuple[str, ...]
    folder: str

    def command(
        self,
        *arguments: object,
        volumes: Mapping[Path, str] | None = None,
        name: str = "pod",
        known: bool = True,
        environment: Sequence[str] = (),
        entrypoint: Sequence[str] | None = None,
    ) -> tuple[list[str], dict[str, str]]:
        """Return the command of a container and its environment; `known`: /etc/hosts has its name."""
        mounts = dict(volumes or {})
        hosts = self.root.parent / f"hosts-{name}-{known}"
        hosts.write_text("127.0.0.1 localhost\n" + f"127.0.0.1 {name}\n" * known)
        mounts[hosts] = "/etc/hosts"
        for inside in mounts.values():  # as an engine does: in the container's own layer
            place = self.root / inside[1:]
            if inside == "/etc/hosts":
                place.touch()
            else:
                place.mkdir(parents=True, exist_ok=True)
        inner = [f"--chdir={self.folder}", *self.environment, *environment]
        inner += [*(self.entrypoint if entrypoint is None else entrypoint), *map(str, arguments)]
        outer = [
            "unshare",
            "--mount",
            "--uts",
            "--ipc",
            "--pid",
            "--fork",
            "sh",
            "-c",
            ENTER,
            "enter",
        ]
        volume_words = " ".join(f"{outside}:{inside}" for outside, inside in mounts.items())
        return [*outer, str(self.root), name, *inner], os.environ | {"VOLUMES": volume_words}

    def run(self, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        command, environment = self.command(*arguments, **options)  # type: ignore[arg-type]
        return subprocess.run(command, env=environment, capture_output=True, text=True)


@contextmanager
def image(name: str) -> Iterator[Image]:
    """Yield an image that is mounted until the block ends."""
    config = json.loads(buildah("inspect", "--type", "image", name))["OCIv1"]["config"]
    assert config["User"] == f"{USER}:{USER}"
    container = buildah("from", name)
    try:
        root = Path(buildah("mount", container))
        yield Image(
            root, tuple(config["Env"]), tuple(config["Entrypoint"]), config.get("WorkingDir") or "/"
        )
    finally:
        buildah("rm", container)
