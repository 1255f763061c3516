"""Every argument in the manifests goes through the parser of the program that gets it; numbers agree."""

from pathlib import Path
from typing import Any

import mlflow.cli
import pytest
from manifests import (
    OVERLAYS,
    container,
    deployment,
    expand,
    first_words,
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
    settings.write_text(named(documents, "ConfigMap", "train-settings")["data"]["train.yaml"])
    started = set()
    for pod in jobs(overlay):
        for each in pod.containers:
            if each.get("command"):
                assert each["command"] == ["python", "train/data/sample.py"]
                continue
            action, *arguments = expand(each, documents)
            started.add(action)
            if action == "train":
                _, config = parse_torchrun(arguments, settings)
                assert (config.output, config.name) == ("/runs", "first")
                assert config.resume == "auto"  # a pod that replaces another goes on with its run
                assert config.data.startswith("/data/")
            else:
                parsers[action]().parse_args(arguments)
    assert started == {"train", *parsers}


parsers = {
    "export": export.main.build_parser,
    "score": serve.arguments.build_parser,
    "merge": serve.merge.build_parser,
    "doctor": serve.doctor.build_parser,
}


@each_overlay
def test_a_step_reads_what_the_step_before_it_writes(overlay: str) -> None:
    documents = render(overlay)

    def parsed(name: str) -> Any:
        action, *arguments = expand(container(named(documents, "Job", name)), documents)
        return parsers[action]().parse_args(arguments)

    export_args, verify_args, score_args, merge_args = map(parsed, ("export", "verify", "score", "merge"))
    assert export_args.run == "/runs/first"
    assert verify_args.verify_provider == f"{score_args.provider}:{score_args.precision}"
    assert score_args.model == f"{export_args.run}/export/model.onnx"
    assert score_args.output == merge_args.folder
    assert score_args.resume


@each_overlay
def test_numbers_that_belong_together_agree(overlay: str, tmp_path: Path) -> None:
    """Shards and completions; nodes, pods and Services; processes, GPUs, processors and batch size."""
    documents = render(overlay)
    settings = tmp_path / "train.yaml"
    settings.write_text(named(documents, "ConfigMap", "train-settings")["data"]["train.yaml"])
    score = named(documents, "Job", "score")["spec"]
    assert f"--shard=auto/{score['completions']}" in container({"spec": score})["args"]
    for pod in jobs(overlay):
        if "train" not in first_words(pod) or pod.owner.startswith("TrainingRuntime"):
            continue
        (work,), (doctor,) = pod.spec["containers"], pod.spec["initContainers"]
        torchrun, config = parse_torchrun(expand(work, documents)[1:], settings)
        processes = int(torchrun.nproc_per_node)
        nodes = int(torchrun.nnodes.partition(":")[0])
        checked = serve.doctor.build_parser().parse_args(expand(doctor, documents)[1:])
        assert checked.processes == processes
        assert config.batch_size % (processes * nodes) == 0
        limits = work["resources"]["limits"]
        assert processes <= quantity(limits["cpu"])
        assert limits.get("nvidia.com/gpu", processes) == processes
        assert checked.shm * 2**20 <= quantity(pod.spec["volumes"][2]["emptyDir"]["sizeLimit"])
        assert pod.job.get("completions", 1) == pod.job.get("parallelism", 1) == nodes
        if nodes > 1:
            assert torchrun.max_restarts == 0
            assert pod.job["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
            host, _, port = torchrun.rdzv_endpoint.partition(":")
            service = pod.spec["subdomain"]
            assert host == f"{pod.owner.removeprefix('Job/')}-0.{service}"
            assert checked.resolve == [host]
            assert int(port) in [p["port"] for p in named(documents, "Service", service)["spec"]["ports"]]


def test_the_train_job_sets_its_processes_and_leaves_pet_variables_to_the_controller(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    documents = render("kubeflow")
    spec = named(documents, "TrainJob", "train")["spec"]
    assert isinstance(spec["trainer"]["numProcPerNode"], int)
    (pod,) = (pod for pod in pods(documents) if pod.owner.startswith("TrainingRuntime"))
    variables = {v["name"] for each in pod.containers for v in each.get("env", [])}
    assert not any(name.startswith("PET_") for name in variables)
    settings = tmp_path / "train.yaml"
    settings.write_text(named(documents, "ConfigMap", "train-settings")["data"]["train.yaml"])
    for name, value in {"NNODES": 2, "NPROC_PER_NODE": 2, "NODE_RANK": 1, "MASTER_PORT": 29400}.items():
        monkeypatch.setenv(f"PET_{name}", str(value))  # as the controller does
    torchrun, config = parse_torchrun(expand(pod.spec["containers"][0], documents)[1:], settings)
    assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.node_rank) == ("2", "2", 1)
    assert config.batch_size % 4 == 0


@each_overlay
def test_the_tracking_server_understands_its_arguments_and_answers_to_its_service_name(
    overlay: str,
) -> None:
    documents = render(overlay)
    server = deployment(documents)
    action, *arguments = expand(server, documents)
    context = mlflow.cli.cli.commands[action].make_context(action, arguments)
    hosts = context.params["allowed_hosts"].split(",")
    uri = named(documents, "ConfigMap", "pipeline")["data"]["MLFLOW_TRACKING_URI"]
    for host in (uri.removeprefix("http://"), "mlflow.purebred.svc.cluster.local:5000", "localhost:5000"):
        assert is_allowed_host_header(hosts, host)
    assert not is_allowed_host_header(hosts, "evil.example:5000")
    assert context.params["port"] == server["ports"][0]["containerPort"]
