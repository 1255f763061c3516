"""k8s/entrypoint.sh and k8s/pipeline.sh, with stand-ins for python and the cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from manifests import K8S, kubectl

PYTHON = '#!/bin/sh\nfor argument in "$@"; do printf \'%s\\n\' "$argument"; done\n'


def program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def entrypoint(tmp_path: Path, *arguments: str, code: int = 0) -> list[str]:
    """What it starts python with."""
    program(tmp_path / "bin" / "python", PYTHON)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        [K8S / "entrypoint.sh", *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done.stdout.splitlines()


def test_each_action_is_one_command_with_its_arguments_untouched(tmp_path: Path) -> None:
    train = ["--standalone", "train/main.py", "--name=first"]
    assert entrypoint(tmp_path, "train", *train) == ["-m", "torch.distributed.run", *train]
    assert entrypoint(tmp_path, "export", "--run", "a b") == ["export/main.py", "--run", "a b"]
    assert entrypoint(tmp_path, "sync", "runs/a b") == ["train/sync.py", "runs/a b"]
    assert entrypoint(tmp_path, "score", "*") == ["serve/main.py", "*"]
    assert entrypoint(tmp_path, "merge", "x") == ["serve/merge.py", "x"]
    assert entrypoint(tmp_path, "doctor") == ["-m", "serve.doctor"]


def test_another_action_is_refused_with_the_code_that_is_not_tried_again(tmp_path: Path) -> None:
    assert entrypoint(tmp_path, "serve", code=2) == []


# A cluster of one file: it knows what was applied, and how each Job ends.
KUBECTL = """#!{python}
import json, os, pathlib, sys, time
import yaml
here = pathlib.Path(__file__).parent
calls = here / "calls.jsonl"
arguments = sys.argv[1:]
if arguments[0] == "--namespace":
    assert arguments[1] == "purebred"
    arguments = arguments[2:]
if arguments[0] == "kustomize":
    os.execv("{kubectl}", ["kubectl", *arguments])
ends = json.loads((here / "ends.json").read_text())
value = lambda flag: arguments[arguments.index(flag) + 1]
with calls.open("a") as file:
    file.write(json.dumps(arguments) + "\\n")
if arguments[0] == "apply" and "--dry-run=client" in arguments:
    key, _, wanted = value("--selector").partition("=")
    for document in yaml.safe_load_all(open(value("--filename"))):
        if document["metadata"].get("labels", {{}}).get(key) == wanted:
            print(document["kind"].lower() + "/" + document["metadata"]["name"], flush=True)
            time.sleep(0.2)  # as kubectl, which asks the server for each
elif arguments[0] == "get":
    name = arguments[1].partition("/")[2]
    if "queue-name" in value("--output"):
        print(ends.get("queue", ""), end="")
    elif (here / f"ended-{{name}}").exists() and "cut off" in ends:
        (here / "ends.json").write_text(json.dumps({{name: ends[name]}}))
        sys.exit(1)
    elif (here / f"ended-{{name}}").exists():
        print("Suspended\\n" + ends[name])
elif arguments[0] == "wait":
    name = arguments[2 + arguments.index("--for")].partition("/")[2]
    condition = value("--for").partition("=")[2]
    if ends[name] == condition:
        time.sleep(0.2)
        (here / f"ended-{{name}}").touch()
    else:
        (here / "waiting").write_text(str(os.getpid()))
        time.sleep(int(value("--timeout").rstrip("s")))
        sys.exit(1)
"""


def pipeline(
    tmp_path: Path, *arguments: str, code: int = 0, timeout: int = 30, **ends: str
) -> tuple[list[list[str]], str]:
    """(the calls of kubectl, what was printed)."""
    program(tmp_path / "bin" / "kubectl", KUBECTL.format(python=sys.executable, kubectl=kubectl()))
    (tmp_path / "bin" / "ends.json").write_text(json.dumps(ends))
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TIMEOUT": str(timeout)}
    done = subprocess.run(
        [K8S / "pipeline.sh", *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    log = tmp_path / "bin" / "calls.jsonl"
    calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return calls, done.stdout + done.stderr


def started(calls: list[list[str]]) -> list[str]:
    return [call[1] for call in calls if call[0] == "patch"]


def test_steps_start_in_order_after_the_platform_and_each_after_the_last_has_ended(tmp_path: Path) -> None:
    calls, printed = pipeline(tmp_path, "cpu", "train", "export", train="Complete", export="Complete")
    assert started(calls) == ["job/train", "job/export"]
    assert calls[0][:1] == ["apply"]
    assert calls[0][-1] == "app.kubernetes.io/component=platform"
    assert calls[1][:3] == ["rollout", "status", "deployment/mlflow"]
    order = [call[0] for call in calls if call[0] in ("delete", "patch", "wait")]
    assert [kind for kind in order if kind != "wait"] == ["delete", "patch", "delete", "patch"]
    assert "train: complete\n" in printed
    assert printed.endswith("export: complete\n")
    still_waiting = int((tmp_path / "bin" / "waiting").read_text())  # for the condition that did not come
    assert not Path(f"/proc/{still_waiting}").exists()


def test_a_failed_step_stops_the_pipeline_at_once_and_shows_its_log(tmp_path: Path) -> None:
    calls, printed = pipeline(tmp_path, "cpu", "train", "export", code=1, train="Failed", export="Complete")
    assert started(calls) == ["job/train"]
    assert "error: train failed" in printed
    assert calls[-1][0] == "logs"


def test_a_step_that_does_not_end_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    _, printed = pipeline(tmp_path, "cpu", "train", code=3, timeout=1, train="Never")
    assert "has not ended within 1 s" in printed


def test_a_question_that_the_network_cut_off_is_asked_again(tmp_path: Path) -> None:
    _, printed = pipeline(tmp_path, "cpu", "train", train="Complete", **{"cut off": "once"})
    assert printed.endswith("train: complete\n")


def test_a_train_job_is_started_in_place_of_a_job(tmp_path: Path) -> None:
    calls, _ = pipeline(tmp_path, "kubeflow", "train", train="Complete")
    assert started(calls) == ["trainjob/train"]


def test_a_queue_starts_its_jobs_itself(tmp_path: Path) -> None:
    calls, _ = pipeline(tmp_path, "kueue", "train", train="Complete", queue="training")
    assert started(calls) == []
    assert any(call[0] == "wait" for call in calls)


@pytest.mark.parametrize(
    ("overlay", "steps"),
    [("cpu", ["train", "export", "score"]), ("gpu", ["train", "export", "verify", "score"])],
)
def test_without_steps_a_model_is_verified_where_it_scores(
    tmp_path: Path, overlay: str, steps: list[str]
) -> None:
    ends = dict.fromkeys(("train", "export", "verify"), "Complete") | {"score": "Failed"}
    calls, _ = pipeline(tmp_path, overlay, code=1, **ends)
    assert started(calls) == [f"job/{step}" for step in steps]


@pytest.mark.parametrize("arguments", [[], ["mars", "train"], ["cpu", "gone"], ["cpu", "train", "exprot"]])
def test_an_unknown_overlay_or_step_is_exit_code_2(tmp_path: Path, arguments: list[str]) -> None:
    """Before anything is started."""
    calls, printed = pipeline(tmp_path, *arguments, code=2)
    assert "error: " in printed
    assert started(calls) == []
