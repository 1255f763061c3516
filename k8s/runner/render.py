"""The objects of an overlay's Jobs for one run, rendered by kubectl's kustomize."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from k8s.runner.cluster import KubectlError, Object, PipelineError, kubectl

OVERLAYS = Path(__file__).resolve().parents[1] / "overlays"
COUNTS = OVERLAYS.parent / "components" / "counts"  # carries numbers of pods from these values to the Jobs
COUNTED = ("NODES", "PROCESSES", "SHARDS", "SHARDS_AT_ONCE")
NUMBERS = ("SHM", "RESTARTS")
PRECISIONS = {  # as in serve/providers/registry.py: this runs with the standard library alone
    "cpu": ("fp32",),
    "cuda": ("fp32", "tf32"),
    "tensorrt": ("fp32", "fp16", "bf16"),
    "openvino": ("fp32", "bf16"),
}
COMPONENT = "app.kubernetes.io/component"
RUN = "purebred/run"
SETTINGS = "purebred/settings"  # annotation: the ConfigMaps that a Job was made with
KINDS = {  # what a step can be, and its name for kubectl
    "Job": "job",
    "TrainJob": "trainjob",
    "JobSet": "jobset",
}
RUN_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?")


@dataclass(frozen=True)
class Rendered:
    """What the steps of one run consist of."""

    overlay: Path
    run: str
    documents: list[Object]

    @property
    def steps(self) -> dict[str, Object]:
        """Return the Job, TrainJob or JobSet of each step."""
        found: dict[str, Object] = {}
        for document in self.documents:
            if document["kind"] in KINDS:
                step = label(document, COMPONENT)
                if step in found:
                    kinds = f"{found[step]['kind']} and {document['kind']}"
                    raise PipelineError(2, f"{self.overlay} has the step {step} twice: {kinds}")
                if step:
                    found[step] = document
        return found

    def beside(self, step: str) -> list[Object]:
        """Return what a step's Job needs and is no Job: its settings, Services and runtime."""
        used = set(strings(self.steps[step]))
        chosen = [
            document
            for document in self.documents
            if document["kind"] not in KINDS
            and document["metadata"].get("labels", {}).get(COMPONENT) == step
        ]
        used |= set(strings(chosen))
        settings = [d for d in self.documents if d["kind"] == "ConfigMap" and d["metadata"]["name"] in used]
        return [*settings, *(document for document in chosen if document not in settings)]

    @property
    def values(self) -> Mapping[str, str]:
        """Return the data of the ConfigMap `pipeline`."""
        for document in self.documents:
            if document["kind"] == "ConfigMap" and document["metadata"]["name"].startswith("pipeline"):
                data: dict[str, str] = document.get("data", {})
                return data
        raise PipelineError(2, f"{self.overlay} has no ConfigMap named pipeline")

    @property
    def namespace(self) -> str | None:
        """Return the namespace that the overlay gives its objects, if it does."""
        names = {document["metadata"].get("namespace") for document in self.documents} - {None}
        if len(names) > 1:
            raise PipelineError(2, f"{self.overlay} has more than one namespace: {sorted(map(str, names))}")
        return str(names.pop()) if names else None


def label(document: Object, key: str) -> str | None:
    labels: dict[str, str] = document["metadata"].get("labels", {})
    return labels.get(key)


def strings(value: Any) -> list[str]:
    """Return all texts in a document."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for each in value for text in strings(each)] if isinstance(value, list) else []


def find_overlay(name: str) -> Path:
    """Return the folder whose kustomization holds the Jobs of an overlay, given its name or path."""
    for folder in (Path(name), OVERLAYS / name):
        for candidate in (folder / "jobs", folder):
            if (candidate / "kustomization.yaml").is_file():
                return candidate.resolve()
    known = ", ".join(sorted(path.name for path in OVERLAYS.iterdir() if path.is_dir()))
    raise PipelineError(2, f"{name} is no overlay: {known}, or a folder with jobs/kustomization.yaml")


def render(
    overlay: Path, run: str, values: Sequence[str], settings: Path | None, namespace: str | None
) -> Rendered:
    """Return the overlay's objects with the run in their names, labels and settings.

    `values` are KEY=VALUE of the ConfigMap `pipeline`; `settings` is a YAML file of train/main.py.
    """
    if not RUN_NAME.fullmatch(run):
        raise PipelineError(
            2,
            f"--run {run}: it becomes part of names in the cluster: at most 40 lower-case letters, digits "
            "and hyphens, a letter or digit first and last",
        )
    try:
        train = settings.read_text(encoding="utf-8") if settings else None
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(2, f"--settings {settings}: {error}") from None
    plain = kustomize(overlay)
    check_values(values, Rendered(overlay, "", parse(plain)).values, overlay)
    with TemporaryDirectory() as name:
        folder = Path(name).resolve()
        generators: list[Object] = [
            {"name": "pipeline", "behavior": "merge", "literals": [f"RUN_NAME={run}", *last(values)]},
            {"name": "train-settings", "behavior": "merge"},
        ]
        if train is not None:
            generators[1]["files"] = ["train.yaml"]
        with_values = {
            "resources": [os.path.relpath(overlay, folder / "values")],
            "configMapGenerator": generators,
            "generatorOptions": {"immutable": True},
        }
        with_run: Object = {
            "resources": ["values"],
            "nameSuffix": f"-{run}",
            "labels": [{"pairs": {RUN: run}, "includeSelectors": True}],
            "sortOptions": {"order": "fifo"},
        }
        if namespace:
            with_run["namespace"] = namespace
        if all(f"\n  {name}: " in plain for name in COUNTED):
            with_run["components"] = [os.path.relpath(COUNTS, folder)]
        write_kustomization(folder / "values", with_values)
        write_kustomization(folder, with_run)
        if train is not None:
            (folder / "values" / "train.yaml").write_text(train, encoding="utf-8")
        text = kustomize(folder)
    rendered = Rendered(overlay, run, parse(text))
    check_hashes(rendered)
    check_data(rendered)
    for step, document in rendered.steps.items():
        maps = [d["metadata"]["name"] for d in rendered.beside(step) if d["kind"] == "ConfigMap"]
        document["metadata"].setdefault("annotations", {})[SETTINGS] = " ".join(sorted(maps))
    return rendered


def last(values: Sequence[str]) -> list[str]:
    """Return the last of the values of each key, as for flags; kustomize refuses the others."""
    return list({value.partition("=")[0]: value for value in values}.values())


def check_values(values: Sequence[str], known: Mapping[str, str], overlay: Path) -> None:
    """Refuse values that no Job takes, numbers with which it would wait for ever or end without work,
    providers that scoring has not, and a folder of runs that its steps would write in two ways."""
    merged = dict(known)
    for value in values:
        key, equals, merged[key] = value.partition("=")
        if not equals:
            raise PipelineError(2, f"--set {value}: KEY=VALUE is needed")
        if key == "RUN_NAME":
            raise PipelineError(2, f"--set {value}: --run sets it, as the Jobs' names hold it")
        if key not in known:
            raise PipelineError(
                2, f"--set {value}: {overlay} has no such value, but {', '.join(sorted(known))}"
            )
    for key in (*COUNTED, *NUMBERS):
        least = 1 if key in COUNTED else 0
        if not re.fullmatch("[1-9][0-9]*" if least else "[0-9]+", merged.get(key, "1")):
            raise PipelineError(2, f"{key}={merged[key]}: a whole number from {least} is needed")
    pair = f"{merged.get('PROVIDER', 'cpu')}:{merged.get('PRECISION', 'fp32')}"
    pairs = [f"{provider}:{precision}" for provider, some in PRECISIONS.items() for precision in some]
    if pair not in pairs:
        raise PipelineError(2, f"PROVIDER:PRECISION is {pair}: one of {', '.join(pairs)} is needed")
    if (runs := merged.get("RUNS", "")).endswith("/"):
        raise PipelineError(2, f"RUNS={runs}: take the slash off its end, in an object store it is a name")


def check_hashes(rendered: Rendered) -> None:
    """Refuse settings that two Jobs would share: each content needs a name of its own."""
    for document in rendered.documents:
        if document["kind"] == "ConfigMap":
            generated = document["metadata"]["name"]
            if generated in (f"pipeline-{rendered.run}", f"train-settings-{rendered.run}"):
                raise PipelineError(
                    2,
                    f"{rendered.overlay}: take disableNameSuffixHash out of it, so that a Job keeps its "
                    f"settings when another one is started: {generated} has no hash",
                )


def check_data(rendered: Rendered) -> None:
    """Refuse settings of training with other data than the Job's flag, which takes precedence."""
    data = rendered.values.get("DATA", "")
    maps = [d.get("data", {}) for d in rendered.documents if d["kind"] == "ConfigMap"]
    settings = "\n".join(values.get("train.yaml", "") for values in maps)
    found = re.search(r"(?m)^data:[ \t]*([^#\s].*?)[ \t\r]*(?:#.*)?$", settings)
    wanted = found[1].strip("'\"") if found else ""
    if wanted not in ("", "null", "~", data):
        raise PipelineError(
            2,
            f"the settings of training name data: {wanted}, and the Job trains on DATA={data}: give "
            f"--set DATA={wanted}, or take the line out of the settings",
        )


def kustomize(folder: Path) -> str:
    try:
        return kubectl("kustomize", str(folder))
    except KubectlError as error:
        raise PipelineError(2, f"{folder} cannot be rendered: {error}") from None


def parse(text: str) -> list[Object]:
    """Return the documents of a YAML text.

    The standard library reads no YAML; `kubectl label --local` does, for any kind and without a server.
    """
    text = kubectl("label", "--local", "--overwrite", "--output=json", "--filename=-", "a=b", given=text)
    found, decoder, position = [], json.JSONDecoder(), 0
    while text[position:].strip():
        document, position = decoder.raw_decode(text, position)
        del document["metadata"]["labels"]["a"]
        found.append(document)
        position += len(text[position:]) - len(text[position:].lstrip())
    return found


def as_yaml(documents: Sequence[Object]) -> str:
    """Return the documents as kustomize prints them."""
    with TemporaryDirectory() as name:
        folder = Path(name).resolve()
        files = [f"{number:03}.yaml" for number in range(len(documents))]
        for file, document in zip(files, documents, strict=True):
            (folder / file).write_text(json.dumps(document))
        write_kustomization(folder, {"resources": files, "sortOptions": {"order": "fifo"}})
        return kustomize(folder)


def write_kustomization(folder: Path, content: Object) -> None:
    """Write JSON, which is YAML, too."""
    folder.mkdir(exist_ok=True)
    kinds = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    (folder / "kustomization.yaml").write_text(json.dumps({**kinds, **content}))
