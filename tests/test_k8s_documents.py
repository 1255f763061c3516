"""docs/kubernetes*.md: the overlay renders, figures are those of the manifests."""

import os
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY
from manifest_schemas import check
from manifests import K8S, OVERLAYS, Pod, config, pods, quantity, render_folder, render_jobs

PAGES = sorted((REPOSITORY / "docs").glob("kubernetes*.md"))
DOCUMENTED = "".join(page.read_text(encoding="utf-8") for page in PAGES)
KINDS = ("Job", "JobSet", "TrainJob")
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def test_the_overlay_in_the_documentation_renders(tmp_path: Path) -> None:
    (halves,) = re.findall(
        r"```yaml\n# platform/kustomization.yaml\n(.*?)# jobs/kustomization.yaml\n(.*?)```",
        DOCUMENTED,
        re.DOTALL,
    )
    (placement,) = re.findall(r"```yaml\n# placement.yaml\n(.*?)```", DOCUMENTED, re.DOTALL)
    (tmp_path / "placement.yaml").write_text(placement)
    k8s = os.path.relpath(K8S, tmp_path)
    (tmp_path / "train.yaml").write_text("epochs: 1\n")
    documents = []
    for half in halves:
        text = half.replace("../../purebred/k8s", k8s).replace("sha256:...", f"sha256:{'0' * 64}")
        (tmp_path / "kustomization.yaml").write_text(text)
        documents += render_folder(tmp_path)
    check(documents)
    claims = [d for d in documents if d["kind"] == "PersistentVolumeClaim"]
    assert {d["spec"]["storageClassName"] for d in claims} == {"shared"}
    for pod in pods([d for d in documents if d["kind"] in KINDS]):
        assert pod.spec["priorityClassName"] == "research"
        assert pod.spec["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H200"}
        assert pod.job["activeDeadlineSeconds"] > 0
        assert all("@sha256:" in each["image"] for each in pod.containers)
    assert config(documents, "train-settings")["train.yaml"] == "epochs: 1\n"


@each_overlay
def test_the_sizes_of_nodes_in_the_documentation_are_what_the_pods_ask_for(overlay: str) -> None:
    """Processors and GiB: of the platform's pods together, and of the largest pod of a Job."""

    def asks(pod: Pod) -> tuple[float, float]:
        requests = [each["resources"]["requests"] for each in pod.spec["containers"]]
        return tuple(float(sum(quantity(r[key]) for r in requests)) for key in ("cpu", "memory"))  # type: ignore[return-value]

    platform = [asks(pod) for pod in pods(render_folder(K8S / "overlays" / overlay / "platform"))]
    work = [asks(pod) for pod in pods(render_jobs(overlay))]
    figures = [sum(cpu for cpu, _ in platform), sum(memory for _, memory in platform) / 2**30]
    figures += [max(cpu for cpu, _ in work), max(memory for _, memory in work) / 2**30]
    (row,) = re.findall(rf"^\| `{overlay}` \|((?: [\d.]+ \|){{4}})", DOCUMENTED, re.MULTILINE)
    assert [float(cell) for cell in row.strip(" |").split("|")] == pytest.approx(figures)


def test_every_value_of_the_pipeline_is_documented_with_its_default() -> None:
    documented: dict[str, str] = {}
    for names, defaults in re.findall(
        r"^\| ((?:`[A-Z_]+`(?:, )?)+) \| ([^|]*) \|", DOCUMENTED, re.MULTILINE
    ):
        values = defaults.replace("`", "").split(", ")
        documented |= dict(zip(re.findall(r"[A-Z_]+", names), values, strict=True))
    values = dict(config(render_folder(K8S / "jobs"), "pipeline"))
    del values["RUN_NAME"]  # the pipeline's --run
    assert documented == values
