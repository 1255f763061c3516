"""Locks pin every package of an image by version and hash: the image of today is the image of tomorrow.

    pip freeze | python k8s/locks.py

The versions are those that the tests pass with. A package that is not among them gets its newest.
"""

import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "k8s" / "locks"
PYTHON = (3, 13)  # of the Dockerfile's base
GLIBC = (2, 41)  # of the same
MACHINES = ("x86_64", "aarch64")
GPU = "onnxruntime-gpu"
SCORING = ("", "parquet", "heic", "cloud")
# image: the extras of pyproject.toml that it holds ("" is the base install), and requirements beside them
IMAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "serve": (SCORING, ()),
    "serve-gpu": (SCORING, (f"{GPU}[cuda,cudnn]",)),
    "train": ((*SCORING, "train", "weights"), (GPU,)),
    "mlflow": (("server",), ()),
}


def requirements(image: str) -> list[Requirement]:
    """Return what pyproject.toml wants in an image, with one onnxruntime for all machines or none.

    GPU and CPU build have one import name: pyproject's markers choose by machine, an image by its name.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, more = IMAGES[image]
    groups = [
        project["optional-dependencies"][extra] if extra else project["dependencies"] for extra in extras
    ]
    wanted = [Requirement(text) for text in chain(*groups, more)]
    if more:
        return [one for one in wanted if one.name != "onnxruntime"]
    for one in wanted:
        if one.name == "onnxruntime":
            one.marker = None
    return [one for one in wanted if one.name != GPU]


def resolve(wanted: Iterable[Requirement], constraints: str) -> list[dict[str, Any]]:
    """Return the packages of a pylock.toml for all machines, as uv resolves it."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(constraints)
        file.flush()
        command = [
            str(Path(sys.executable).with_name("uv")),
            "pip",
            "compile",
            "-",
            "--universal",
            "--python-version",
            ".".join(map(str, PYTHON)),
        ]
        command += ["--format", "pylock.toml", "--constraints", file.name, "--quiet", "--no-config"]
        done = subprocess.run(
            command, input="\n".join(map(str, wanted)), text=True, stdout=subprocess.PIPE, check=True
        )
    packages: list[dict[str, Any]] = tomllib.loads(done.stdout)["packages"]
    return packages


def tags(machine: str) -> list[Tag]:
    """Return what pip installs in the image on a machine, best first."""
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC[1], 16, -1)]
    platforms += [f"manylinux2014_{machine}"]
    if machine == "x86_64":
        platforms += [f"manylinux_2_{minor}_{machine}" for minor in range(16, 4, -1)]
        platforms += [f"manylinux2010_{machine}", f"manylinux1_{machine}"]
    platforms += [f"linux_{machine}"]
    cpython = cpython_tags(PYTHON, platforms=platforms)
    return [*cpython, *compatible_tags(PYTHON, f"cp{PYTHON[0]}{PYTHON[1]}", platforms)]


def environment(machine: str) -> dict[str, str]:
    """Return the markers' values in the image on a machine."""
    version = ".".join(map(str, PYTHON))
    return {
        "python_version": version,
        "python_full_version": f"{version}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_machine": machine,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }


def lines(packages: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield requirements with the hash of one wheel for each machine; exit if a package has none."""
    for package in packages:
        marker = package.get("marker")
        machines = [m for m in MACHINES if not marker or Marker(marker).evaluate(environment(m))]
        if not machines:
            continue
        hashes = sorted({best_wheel(package, machine) for machine in machines})
        only = f"; platform_machine == '{machines[0]}'" if len(machines) < len(MACHINES) else ""
        yield f"{package['name']}=={package['version']}{only} " + " ".join(
            f"--hash=sha256:{h}" for h in hashes
        )


def best_wheel(package: dict[str, Any], machine: str) -> str:
    """Return the hash of the wheel that pip takes on a machine, or exit."""
    ranks = {tag: rank for rank, tag in enumerate(tags(machine))}
    found = []
    for wheel in package.get("wheels", ()):
        name = wheel.get("name") or wheel["url"].rpartition("/")[2]
        fits = [ranks[tag] for tag in parse_wheel_filename(name)[3] if tag in ranks]
        if fits:
            found.append((min(fits), str(wheel["hashes"]["sha256"])))
    if not found:
        sys.exit(f"error: {package['name']} {package['version']} has no wheel for Linux on {machine}")
    return min(found)[1]


def main() -> None:
    pins = [line for line in sys.stdin.read().splitlines() if "==" in line]
    # the CPU build of the version that was tested as GPU build
    pins += [pin.replace(GPU, "onnxruntime") for pin in pins if pin.startswith(f"{GPU}==")]
    LOCKS.mkdir(exist_ok=True)
    for image in IMAGES:
        text = "\n".join(lines(resolve(requirements(image), "\n".join(pins))))
        (LOCKS / f"{image}.txt").write_text(f"# made by `make locks`\n{text}\n")
        print(f"{image}: {text.count('==')} packages")


if __name__ == "__main__":
    main()
