"""k8s/examples: Argo Workflows, Kubeflow Pipelines, and scoring by day."""

import importlib.util
import re
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest
import yaml
from manifests import K8S, Manifest, load, refusals, render_folder, restricted
from serve_model import build_model, encode, solid
from test_k8s_arguments import parsers
from torch.distributed.run import get_args_parser

from train.cli import parse_config

EXAMPLES = K8S / "examples"
CLAIMS = {
    d["metadata"]["name"] for d in render_folder(K8S / "platform") if d["kind"] == "PersistentVolumeClaim"
}
TODAY = date(2026, 3, 2)


def parse(arguments: list[str], settings: Path | None = None) -> Any:
    action, *flags = arguments
    if action != "train":
        return parsers[action]().parse_args(flags)
    launched = get_args_parser().parse_args(flags)
    assert launched.training_script == "train/main.py"
    mounted = "--config=/etc/purebred/train.yaml"
    return parse_config(
        [f"--config={settings}" if each == mounted else each for each in launched.training_script_args]
    )


def check_order(parsed: dict[str, Any]) -> None:
    """Each step reads what the one before it writes."""
    run = f"{parsed['train'].output}/{parsed['train'].name}"
    assert run == "/runs/aa"
    assert parsed["train"].resume == "auto"
    assert parsed["export"].run == parsed["verify"].run == run
    assert not parsed["export"].verify_provider
    assert parsed["score"].model == f"{run}/export/model.onnx"
    assert parsed["score"].resume
    assert parsed["verify"].verify_provider == f"{parsed['score'].provider}:{parsed['score'].precision}"
    assert parsed["merge"].folder == parsed["score"].output


def test_a_pod_to_copy_files_with_runs_under_the_restricted_profile() -> None:
    (pod,) = load((EXAMPLES / "files.yaml").read_text())
    for version in ("1.36", "1.37"):
        assert kubernetes_validate.validate(pod, version, strict=True) == version
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": pod["metadata"]}
    job |= {"spec": {"template": {"metadata": pod["metadata"], "spec": pod["spec"]}}}
    assert (refusals(job), restricted(pod["spec"])) == ([], [])
    assert {volume["persistentVolumeClaim"]["claimName"] for volume in pod["spec"]["volumes"]} == CLAIMS


# Argo Workflows


@pytest.fixture
def argo() -> Manifest:
    (template,) = load((EXAMPLES / "argo-workflows.yaml").read_text())
    spec: Manifest = template["spec"]
    return spec


GIVEN = {"run": "aa", "data": "/data/train", "images": "/data/test"}


def argo_values(argo: Manifest) -> dict[str, str]:
    parameters = {p["name"]: p.get("value") for p in argo["arguments"]["parameters"]}
    return {f"workflow.parameters.{name}": value for name, value in (parameters | GIVEN).items()}


def fill(text: str, values: dict[str, str]) -> str:
    """KeyError: a name that there is not."""
    return re.sub(r"\{\{(.*?)\}\}", lambda match: values[match[1]], text)


def test_argo_runs_the_steps_in_order_with_arguments_that_they_understand(
    argo: Manifest, tmp_path: Path
) -> None:
    values = argo_values(argo) | {"item": "1"}
    templates = {template["name"]: template for template in argo["templates"]}
    parsed, shards = {}, 0
    for (step,) in templates[argo["entrypoint"]]["steps"]:
        template = templates[step["template"]]
        given = {
            f"inputs.parameters.{p['name']}": fill(p["value"], values)
            for p in step.get("arguments", {}).get("parameters", [])
        }
        wanted = {
            f"inputs.parameters.{p['name']}" for p in template.get("inputs", {}).get("parameters", [])
        }
        assert wanted == set(given)
        settings = tmp_path / "train.yaml"
        for artifact in template.get("inputs", {}).get("artifacts", []):
            assert artifact["path"] == "/etc/purebred/train.yaml"
            settings.write_text(fill(artifact["raw"]["data"], values))
        arguments = [fill(argument, values | given) for argument in template["container"]["args"]]
        parsed[step["name"]] = parse(arguments, settings)
        if "withSequence" in step:
            shards = int(fill(step["withSequence"]["count"], values))
            assert parsed[step["name"]].shard == f"1/{shards}"
    assert list(parsed) == ["train", "export", "verify", "score", "merge"]
    assert shards > 1
    check_order(parsed)


def test_argo_does_not_try_again_what_fails_again(argo: Manifest) -> None:
    for template in argo["templates"]:
        if "container" in template:
            retry = template["retryStrategy"]
            assert retry["retryPolicy"] == "Always"  # an evicted pod is an error
            assert "2" in re.findall(r"\d", retry["expression"])


def test_argos_pods_run_under_the_restricted_profile_with_claims_that_exist(argo: Manifest) -> None:
    for template in argo["templates"]:
        if "container" in template:
            container = {"name": "main", **template["container"]}
            pod = {"restartPolicy": "Never", "containers": [container]}
            pod |= {key: argo[key] for key in ("securityContext", "volumes")}
            labels = argo["podMetadata"]["labels"]
            job = {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": template["name"]},
                "spec": {"template": {"metadata": {"labels": labels}, "spec": pod}},
            }
            kubernetes_validate.validate(job, "1.37", strict=True)
            assert (refusals(job), restricted(pod)) == ([], [])
            assert container["command"][-1] == "/app/k8s/entrypoint.sh"
            assert container["image"].partition(":")[0] in ("purebred-train", "purebred-serve")
    claims = {
        v["persistentVolumeClaim"]["claimName"] for v in argo["volumes"] if "persistentVolumeClaim" in v
    }
    assert claims == CLAIMS


@pytest.mark.slow
def test_the_workflow_fits_argos_own_models_and_no_field_is_dropped() -> None:
    models = pytest.importorskip("hera.workflows.models", reason="hera, Argo's models, is not installed")
    (document,) = load((EXAMPLES / "argo-workflows.yaml").read_text())
    read = models.WorkflowTemplate.model_validate(document)
    assert read.model_dump(mode="json", by_alias=True, exclude_none=True) == document


# Kubeflow Pipelines


def module_of(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_kubeflow_pipelines_compile_to_steps_in_order_that_are_understood(tmp_path: Path) -> None:
    kfp = pytest.importorskip("kfp.compiler", reason="kfp is not installed")
    pytest.importorskip("kfp.kubernetes", reason="kfp-kubernetes is not installed")
    example = module_of(EXAMPLES / "kubeflow_pipelines.py")
    file = tmp_path / "pipeline.yaml"
    kfp.Compiler().compile(example.purebred, str(file))
    pipeline, platform = yaml.safe_load_all(file.read_text())
    values = {
        name: str(p.get("defaultValue"))
        for name, p in pipeline["root"]["inputDefinitions"]["parameters"].items()
    }
    values |= {"run": "aa", "epochs": "30", "shard": "1/2"}
    parsed = {}
    for name, executor in pipeline["deploymentSpec"]["executors"].items():
        arguments = [
            re.sub(r"\{\{\$\.inputs\.parameters\['(\w+)'\]\}\}", lambda match: values[match[1]], argument)
            for argument in executor["container"]["args"]
        ]
        parsed[name.removeprefix("exec-")] = parse(arguments)
        settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][name]
        assert {mount["constant"] for mount in settings["pvcMount"]} == CLAIMS
        assert {mount["mountPath"] for mount in settings["emptyDirMounts"]} == {"/dev/shm", "/tmp"}
        assert settings["securityContext"]["runAsNonRoot"]
    check_order(parsed)
    tasks = pipeline["root"]["dag"]["tasks"]
    (loop,) = (name for name, task in tasks.items() if "parameterIterator" in task)
    after = {name: task.get("dependentTasks", []) for name, task in tasks.items()}
    assert after == {
        "train": [],
        "export": ["train"],
        "verify": ["export"],
        loop: ["verify"],
        "merge": [loop],
    }
    (inner,) = (c["dag"]["tasks"] for c in pipeline["components"].values() if "dag" in c)
    for task in [*tasks.values(), *inner.values()]:
        assert not task.get("cachingOptions", {}).get("enableCache")
    assert loop not in inner


# Scoring by day


def cron_job() -> tuple[list[Manifest], Manifest]:
    documents = render_folder(EXAMPLES / "daily")
    (found,) = (document for document in documents if document["kind"] == "CronJob")
    return documents, found


def test_the_cron_job_is_valid_and_its_pod_is_that_of_scoring() -> None:
    documents, cron = cron_job()
    assert {d["kind"] for d in documents} == {"ConfigMap", "CronJob"}
    for version in ("1.36", "1.37"):
        assert kubernetes_validate.validate(cron, version, strict=True) == version
    assert (cron["spec"]["concurrencyPolicy"], cron["spec"]["timeZone"]) == ("Forbid", "Etc/UTC")
    spec = cron["spec"]["jobTemplate"]["spec"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "score-days"}, "spec": spec}
    pod = spec["template"]["spec"]
    assert (refusals(job), restricted(pod)) == ([], [])
    named = {d["metadata"]["name"] for d in documents if d["kind"] == "ConfigMap"}
    assert {v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v} <= named
    assert {
        each["envFrom"][0]["configMapRef"]["name"] for each in [*pod["containers"], *pod["initContainers"]]
    } <= named
    (score,) = (d for d in render_folder(K8S / "overlays/cpu/jobs") if d["metadata"]["name"] == "score")
    theirs = score["spec"]["template"]["spec"]
    assert pod["initContainers"] == [
        {**each, "envFrom": pod["initContainers"][0]["envFrom"]} for each in theirs["initContainers"]
    ]
    assert pod["containers"][0]["image"] == theirs["containers"][0]["image"]
    assert pod["containers"][0]["command"][-1] == "/etc/purebred/score_days.py"


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    """Environment of the CronJob's container, with folders of this test."""
    documents, cron = cron_job()
    container = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    names = {variable["name"] for variable in container["env"]}
    for source in container["envFrom"]:
        (found,) = (d for d in documents if d["metadata"]["name"] == source["configMapRef"]["name"])
        names |= set(found["data"])
    model = build_model(tmp_path / "model.onnx")
    mine = {"MODEL": str(model), "IMAGES": str(tmp_path / "incoming"), "OUTPUT": str(tmp_path / "daily")}
    mine |= {"PROVIDER": "cpu", "PRECISION": "fp32", "DAYS": "3"}
    assert set(mine) <= names
    return mine


def receive(settings: dict[str, str], day: str, *names: str) -> None:
    folder = Path(settings["IMAGES"]) / day
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(encode(solid((number * 40, 99, 9)), "PNG"))


def rows(settings: dict[str, str]) -> dict[str, int]:
    return {
        file.stem: len(file.read_text().splitlines()) - 1 for file in Path(settings["OUTPUT"]).glob("*.csv")
    }


def test_each_of_the_last_days_is_scored_once_and_a_day_without_images_left_out(
    settings: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    score_days = module_of(EXAMPLES / "daily" / "score_days.py").score_days
    receive(settings, "2026-02-26", "a.png")  # too long ago
    receive(settings, "2026-02-27", "a.png", "b.png")
    receive(settings, "2026-02-28")  # empty; and none at all on the first of March
    receive(settings, "2026-03-02", "a.png")  # today is not over
    assert score_days(settings, TODAY) == 0
    assert rows(settings) == {"2026-02-27": 2}
    file = Path(settings["OUTPUT"]) / "2026-02-27.csv"
    before = file.stat().st_mtime_ns
    receive(settings, "2026-03-01", "a.png", "b.png", "c.png")  # late
    assert score_days(settings, TODAY) == 0
    assert rows(settings) == {"2026-02-27": 2, "2026-03-01": 3}
    assert file.stat().st_mtime_ns == before
    capsys.readouterr()


def test_a_day_that_fails_is_the_exit_code_and_the_days_after_it_are_scored(
    settings: dict[str, str],
) -> None:
    score_days = module_of(EXAMPLES / "daily" / "score_days.py").score_days
    receive(settings, "2026-02-27", "a.png")
    (Path(settings["IMAGES"]) / "2026-02-27" / "a.png").write_bytes(b"no image")
    receive(settings, "2026-03-01", "a.png")
    assert score_days(settings, TODAY) == 1
    assert rows(settings)["2026-03-01"] == 1


def test_an_unreachable_store_is_an_error_that_may_pass_and_no_day_without_images(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(EXAMPLES / "daily" / "score_days.py")

    def unreachable(images: str) -> Any:
        raise OSError("the store does not answer")

    monkeypatch.setattr(module, "find_inputs", unreachable)
    assert module.score_days(settings | {"IMAGES": "s3://bucket/incoming"}, TODAY) == 3


def test_a_slash_at_the_end_of_a_url_is_no_part_of_a_days_name(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, asked = module_of(EXAMPLES / "daily" / "score_days.py"), list[str]()

    def has_images(images: str) -> bool:
        asked.append(images)
        return False

    monkeypatch.setattr(module, "has_images", has_images)
    assert module.score_days(settings | {"IMAGES": "s3://bucket/incoming/", "DAYS": "1"}, TODAY) == 0
    assert asked == ["s3://bucket/incoming/2026-03-01"]
    assert module.score_days(settings | {"DAYS": "7d"}, TODAY) == 2
