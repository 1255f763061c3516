"""k8s/locks/: an image holds what pyproject.toml wants, in one version of known bytes."""

import re
from typing import Any

import pytest
from manifests import K8S
from packaging.requirements import Requirement

from k8s import locks

each_image = pytest.mark.parametrize("image", locks.IMAGES)
each_machine = pytest.mark.parametrize("machine", locks.MACHINES)


def pins(image: str, machine: str) -> dict[str, str]:
    """The version of each package on a machine."""
    found: dict[str, str] = {}
    for line in (K8S / "locks" / f"{image}.txt").read_text().splitlines()[1:]:
        text, *hashes = line.split(" --hash=sha256:")
        assert hashes, line
        assert all(re.fullmatch("[0-9a-f]{64}", one) for one in hashes), line
        pin = Requirement(text)
        (specifier,) = pin.specifier
        assert specifier.operator == "==", line
        if not pin.marker or pin.marker.evaluate(locks.environment(machine)):
            assert pin.name not in found
            found[pin.name] = specifier.version
    return found


@each_image
@each_machine
def test_a_lock_satisfies_pyproject(image: str, machine: str) -> None:
    pinned = pins(image, machine)
    for wanted in locks.requirements(image):
        if not wanted.marker or wanted.marker.evaluate(locks.environment(machine)):
            assert wanted.specifier.contains(pinned[wanted.name]), wanted


@each_machine
def test_an_image_has_one_onnxruntime_at_most_and_scoring_no_torch(machine: str) -> None:
    builds = {image: {"onnxruntime", locks.GPU} & pins(image, machine).keys() for image in locks.IMAGES}
    assert builds == {
        "serve": {"onnxruntime"},
        "serve-gpu": {locks.GPU},
        "train": {locks.GPU},
        "mlflow": set(),
    }
    for image in ("serve", "serve-gpu"):
        assert not {"torch", "mlflow", "onnx"} & pins(image, machine).keys()


@each_machine
def test_what_meets_has_one_version_in_all_images(machine: str) -> None:
    train, serve, server = (pins(image, machine) for image in ("train", "serve", "mlflow"))
    assert train["mlflow"] == server["mlflow"]
    assert train[locks.GPU] == serve["onnxruntime"]
    assert (train["pillow"], train["numpy"]) == (serve["pillow"], serve["numpy"])


def test_locks_are_for_the_python_that_the_dockerfile_starts_from() -> None:
    version = ".".join(map(str, locks.PYTHON))
    assert f"ARG PYTHON=python:{version}-slim-trixie\n" in (K8S / "Dockerfile").read_text()


def package(name: str, *tags: str, **more: str) -> dict[str, Any]:
    wheels = [{"name": f"{name}-1.0-{tag}.whl", "hashes": {"sha256": tag}} for tag in tags]
    return {"name": name, "version": "1.0", "wheels": wheels, **more}


def test_one_wheel_for_each_machine_the_one_that_pip_would_take() -> None:
    here = "cp313-cp313-manylinux_2_28_x86_64", "cp313-cp313-manylinux2014_aarch64"
    others = (
        "cp312-cp312-manylinux_2_28_x86_64",
        "cp313-cp313-musllinux_1_2_x86_64",
        "cp313-cp313-win_amd64",
    )
    older = "cp39-abi3-manylinux_2_17_x86_64", "py3-none-any"
    found = list(
        locks.lines(
            [
                package("a", *others, *older, *here),
                package("b", "py3-none-any", marker="sys_platform == 'win32'"),
                package("c", here[0], marker="platform_machine == 'x86_64'"),
            ]
        )
    )
    assert found == [
        f"a==1.0 --hash=sha256:{here[1]} --hash=sha256:{here[0]}",
        f"c==1.0; platform_machine == 'x86_64' --hash=sha256:{here[0]}",
    ]


def test_a_package_without_a_wheel_is_an_error() -> None:
    with pytest.raises(SystemExit, match=r"d 1\.0"):
        list(locks.lines([package("d", "cp313-cp313-win_amd64")]))
