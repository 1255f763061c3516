"""Every argument in the manifests goes through the parser of the program that gets it; numbers agree."""

import argparse
from pathlib import Path
from typing import Any

import mlflow.cli
import pytest
from manifests import (
    OVERLAYS,
    Manifest,
    config,
    container,
    deployment,
    expand,
    first_words,
    for_run,
    jobs,
    named,
    pods,
    quantity,
    render,
)
from mlflow.server.security_utils import is_allowed_host_header
from torch.distributed.run import get_args_parser

import export.main
import serve.arguments
import serve.doctor
import serve.merge
from train.cli import parse_config
from train.config import TrainConfig

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def parse_torchrun(arguments: list[str], settings: Path) -> tuple[Any, TrainConfig]:
    launched = get_args_parser().parse_args(arguments)
    assert launched.training_script == "train/main.py"
    mounted = "--config=/etc/purebred/train.yaml"
    assert mounted in launched.training_script_args
    flags = [f"--config={settings}" if flag == mounted else flag for flag in launched.training_script_args]
    return launched, parse_config(flags)


@each_overlay
def test_every_containers_arguments_are_understood_by_the_program_it_starts(
    overlay: str, tmp_path: Path
) -> None:
    documents = render(overlay)
    settings = tmp_path / "train.yaml"
    settings.write_text(config(documents, "train-settings")["train.yaml"])
    started = set()
    for pod in jobs(overlay):
        for each in pod.containers:
            if each.get("command"):
                assert each["command"] == ["python", "train/data/sample.py"]
                continue
            action, *arguments = expand(each, documents)
            started.add(action)
            if action == "train":
                _, trained = parse_torchrun(arguments, settings)
                assert (trained.output, trained.name) == (runs(documents), "first")
                assert trained.resume == "auto"  # a pod that replaces another continues its run
                assert trained.data.startswith(("/data/", "s3://"))
            else:
                parsers[action]().parse_args(arguments)
    of_a_volume = {"sync"} if overlay == "s3" else set()
    assert started == {"train", *parsers} - of_a_volume


def run_folders() -> argparse.ArgumentParser:
    """What train/sync.py takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+")
    return parser


parsers = {
    "export": export.main.build_parser,
    "score": serve.arguments.build_parser,
    "merge": serve.merge.build_parser,
    "doctor": serve.doctor.build_parser,
    "sync": run_folders,
}


def runs(documents: list[Manifest]) -> str:
    """Where an overlay has its runs: a volume or an object store."""
    folder = config(documents, "pipeline")["RUNS"]
    assert folder == "/runs" or folder.startswith("s3://")
    return folder


@each_overlay
def test_a_step_reads_what_the_step_before_it_writes(overlay: str) -> None:
    documents = render(overlay)

    def parsed(name: str) -> Any:
        action, *arguments = expand(container(named(documents, "Job", name)), documents)
        return parsers[action]().parse_args(arguments)

    export_args, verify_args, score_args, merge_args = map(parsed, ("export", "verify", "score", "merge"))
    assert export_args.run == f"{runs(documents)}/first"
    assert verify_args.verify_provider == f"{score_args.provider}:{score_args.precision}"
    assert score_args.model == f"{export_args.run}/export/model.onnx"
    assert score_args.output == merge_args.folder
    assert score_args.resume
    data = config(documents, "pipeline")["DATA"]  # of an object store, which training has a copy of
    assert export_args.images == verify_args.images == ("" if data.startswith("/") else data)


@each_overlay
def test_numbers_that_belong_together_agree(overlay: str, tmp_path: Path) -> None:
    """Shards and completions; nodes, pods and Services; processes, GPUs, processors and batch size."""
    documents = render(overlay)
    settings = tmp_path / "train.yaml"
    settings.write_text(config(documents, "train-settings")["train.yaml"])
    score = named(documents, "Job", "score")["spec"]
    assert f"--shard=auto/{score['completions']}" in expand(container({"spec": score}), documents)
    trainings = [pod for pod in jobs(overlay) if "train" in first_words(pod)]
    assert len(trainings) == 1
    for pod in trainings:
        (work,), (doctor,) = pod.spec["containers"], pod.spec["initContainers"]
        torchrun, trained = parse_torchrun(expand(work, documents)[1:], settings)
        if pod.owner.startswith("TrainingRuntime"):
            trainer = named(documents, "TrainJob", "train")["spec"]["trainer"]
            nodes, processes = trainer["numNodes"], trainer["numProcPerNode"]
        else:
            nodes, processes = int(torchrun.nnodes), int(torchrun.nproc_per_node)
            assert pod.job["completions"] == pod.job["parallelism"] == nodes
            assert torchrun.max_restarts == 0
            assert pod.job["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
        checked = serve.doctor.build_parser().parse_args(expand(doctor, documents)[1:])
        assert checked.processes == processes
        assert trained.batch_size % (processes * nodes) == 0
        limits = work["resources"]["limits"]
        assert processes <= quantity(limits["cpu"])
        assert limits.get("nvidia.com/gpu", processes) == processes
        (shm,) = (volume["emptyDir"] for volume in pod.spec["volumes"] if volume["name"] == "shm")
        assert checked.shm * 2**20 <= quantity(shm["sizeLimit"])


JOB, JOBSET = "batch.kubernetes.io/job-name", "jobset.sigs.k8s.io/jobset-name"


@pytest.mark.parametrize(
    ("overlay", "labels"),
    [
        ("cpu", {JOB: "train-aa"}),  # as the controllers label the pods of a run
        ("jobset", {JOB: "train-aa-node-0", JOBSET: "train-aa"}),
    ],
)
def test_agents_meet_at_the_first_pod_under_a_name_that_holds_the_runs(
    overlay: str, labels: dict[str, str]
) -> None:
    documents = for_run(overlay, "aa", "NODES=2")
    (pod,) = (pod for pod in pods(documents) if "train" in first_words(pod))
    (work,), (doctor,) = pod.spec["containers"], pod.spec["initContainers"]
    torchrun = get_args_parser().parse_args(expand(work, documents, labels)[1:])
    host, _, port = torchrun.rdzv_endpoint.partition(":")
    service = labels.get(JOBSET, labels[JOB])  # a JobSet's controller makes the Service, of its own name
    assert host == f"{labels[JOB]}-0.{service}"
    checked = serve.doctor.build_parser().parse_args(expand(doctor, documents, labels)[1:])
    assert checked.resolve == [host]
    if overlay == "jobset":
        assert named(documents, "JobSet", service)["spec"]["network"]["enableDNSHostnames"] is True
        assert "subdomain" not in pod.spec
    else:
        assert pod.spec["subdomain"] == service
        offered = named(documents, "Service", service)["spec"]
        assert int(port) in [each["port"] for each in offered["ports"]]
        assert offered["selector"].items() <= dict(pod.labels).items()


def test_the_train_job_sets_its_processes_and_leaves_pet_variables_to_the_controller(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    documents = render("kubeflow")
    trainer = named(documents, "TrainJob", "train")["spec"]["trainer"]
    assert isinstance(trainer["numProcPerNode"], int)
    (pod,) = (pod for pod in pods(documents) if pod.owner.startswith("TrainingRuntime"))
    assert pod.spec["containers"][0]["name"] == "node"  # where the controller puts its variables
    variables = {v["name"] for each in pod.containers for v in each.get("env", [])}
    variables |= config(documents, "pipeline").keys()
    assert not any(name.startswith("PET_") for name in variables)
    settings = tmp_path / "train.yaml"
    settings.write_text(config(documents, "train-settings")["train.yaml"])
    for name, value in {"NNODES": 2, "NPROC_PER_NODE": 8, "NODE_RANK": 1, "MASTER_PORT": 29400}.items():
        monkeypatch.setenv(f"PET_{name}", str(value))  # as the controller does
    torchrun, _ = parse_torchrun(expand(pod.spec["containers"][0], documents)[1:], settings)
    assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.node_rank) == ("2", "8", 1)


@pytest.mark.parametrize(
    "overlay", [overlay for overlay in OVERLAYS if overlay != "s3"]
)  # a team's own server
def test_the_tracking_server_understands_its_arguments_and_answers_to_its_service_name(
    overlay: str,
) -> None:
    documents = render(overlay)
    server = deployment(documents)
    action, *arguments = expand(server, documents)
    context = mlflow.cli.cli.commands[action].make_context(action, arguments)
    hosts = context.params["allowed_hosts"].split(",")
    uri = config(documents, "pipeline")["MLFLOW_TRACKING_URI"]
    for host in (uri.removeprefix("http://"), "mlflow.purebred.svc.cluster.local:5000", "localhost:5000"):
        assert is_allowed_host_header(hosts, host)
    assert not is_allowed_host_header(hosts, "evil.example:5000")
    assert context.params["port"] == server["ports"][0]["containerPort"]
