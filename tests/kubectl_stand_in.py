"""A stand-in for kubectl and its cluster, with the answers that a real control plane gave.

A folder holds the state. Time passes by the test alone: `Cluster.sleep` of the pipeline is replaced by
`StandIn.pass_time`. What happens to a Job is its plan, a list of {"after": seconds since it was made, ...}:
"condition" of the Job, "pods", "events", "remove" and "remake" by somebody else, "admit" by the queue.
"""

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Object = dict[str, Any]
NAMESPACE = "purebred"
RUNNABLE = ("job", "trainjob", "jobset")
CLUSTER_SCOPED = ("namespace", "node", "storageclass", "priorityclass")
QUEUE = "kueue.x-k8s.io/queue-name"
CUT_OFF = "Unable to connect to the server: dial tcp 10.0.0.1:6443: i/o timeout"


class RefusedError(Exception):
    """What kubectl prints on stderr before it ends with exit code 1."""


def singular(resource: str) -> str:
    name = resource.partition(".")[0].lower()
    for ending, instead in (("classes", "class"), ("class", "class"), ("s", "")):
        if name.endswith(ending):
            return name.removesuffix(ending) + instead
    return name


def key_of(document: Object) -> str:
    return f"{document['kind'].lower()}/{document['metadata']['name']}"


class StandIn:
    """The state in a folder, changed by calls of the program and by the test."""

    def __init__(self, folder: Path, real_kubectl: str = "") -> None:
        self.file = folder / "state.json"
        if real_kubectl:
            state = {
                "now": 0.0,
                "serial": 0,
                "objects": {},
                "plans": {},
                "cut": [],
                "calls": [],
                "stay": 2.0,
            }
            state |= {"kubectl": real_kubectl, "forbidden": [], "lose_answers": []}
            self.file.write_text(json.dumps(state))
            program = folder / "bin" / "kubectl"
            program.parent.mkdir()
            program.write_text(
                f"#!{sys.executable} -S\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                f"from kubectl_stand_in import main\nmain({str(folder)!r})\n"
            )
            program.chmod(0o755)

    @contextmanager
    def state(self) -> Iterator[Object]:
        with self.file.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            state: Object = json.load(file)
            try:
                yield state
            finally:
                file.seek(0)
                file.truncate()
                json.dump(state, file)

    def plan(self, job: str, *happenings: Object) -> None:
        with self.state() as state:
            state["plans"][job] = list(happenings)

    def set(self, **values: Any) -> None:
        with self.state() as state:
            state.update(values)

    def add(self, kind: str, name: str, **content: Any) -> None:
        with self.state() as state:
            make(state, {"kind": kind, "metadata": {"name": name}, **content})

    def now(self) -> float:
        with self.state() as state:
            return float(state["now"])

    def pass_time(self, seconds: float) -> None:
        with self.state() as state:
            state["now"] += seconds
            advance(state)

    def objects(self, kind: str) -> dict[str, Object]:
        with self.state() as state:
            found = {k: v for k, v in state["objects"].items() if k.startswith(f"{kind}/")}
        return {key.partition("/")[2]: value for key, value in found.items()}

    def answer(self, arguments: list[str], given: str) -> tuple[int, str, str]:
        """Return exit code, stdout and stderr of kubectl for these arguments and this stdin."""
        flags = [argument for argument in arguments if argument.startswith("-")]
        words = [argument for argument in arguments if not argument.startswith("-")]
        options = dict(flag.lstrip("-").partition("=")[::2] for flag in flags)
        if words[0] == "config":
            return 0, "somewhere" if words[1] == "current-context" else NAMESPACE, ""
        output = ""
        try:
            with self.state() as state:
                state["calls"].append([*arguments, *([json.loads(given)] if given else [])])
                if any(start <= state["now"] < end for start, end in state["cut"]):
                    raise RefusedError(CUT_OFF)
                where = options["namespace"]
                if where != NAMESPACE:
                    raise RefusedError(f'User "dev" cannot {words[0]} in the namespace "{where}"')
                assert options["context"] == "somewhere"
                advance(state)
                if words[0] == state.get("rival"):  # somebody else is a moment faster
                    state["rival"] = ""
                    again = json.loads(json.dumps(state["objects"][words[1]]))
                    make(state, {**again, "status": {}})
                output = VERBS[words[0]](state, words[1:], options, given)
                if words[0] in state["lose_answers"]:
                    state["lose_answers"].remove(words[0])
                    raise RefusedError(CUT_OFF)
        except RefusedError as error:
            return 1, str(error) if str(error) == "no\n" else "", str(error)
        return 0, output, ""

    def calls(self, verb: str) -> list[list[Any]]:
        with self.state() as state:
            return [call for call in state["calls"] if call[0] == verb]


def make(state: Object, document: Object) -> Object:
    state["serial"] += 1
    serial = str(state["serial"])
    document["metadata"] |= {"uid": f"uid-{serial}", "resourceVersion": serial}
    document["metadata"]["creationTimestamp"] = f"t{state['now']:06.0f}"
    document["_made"], document["_happened"] = state["now"], 0
    if document["kind"].lower() in RUNNABLE and QUEUE in document["metadata"].get("labels", {}):
        document["spec"]["suspend"] = True  # by the queue's webhook
        owner = {"uid": document["metadata"]["uid"]}
        name = document["metadata"]["name"]
        message = "couldn't assign flavors to pod set main: insufficient unused quota for cpu"
        condition = {"type": "QuotaReserved", "status": "False", "message": message}
        workload = {"kind": "Workload", "metadata": {"name": f"job-{name}", "ownerReferences": [owner]}}
        make(state, {**workload, "spec": {"active": True}, "status": {"conditions": [condition]}})
    state["objects"][key_of(document)] = document
    return document


def advance(state: Object) -> None:
    """Let happen what is due."""
    for key, live in list(state["objects"].items()):
        if "_goes" in live and state["now"] >= live["_goes"]:
            remove(state, key)
        elif key.partition("/")[0] in RUNNABLE:
            follow_plan(state, key, live)


def follow_plan(state: Object, key: str, live: Object) -> None:
    name = live["metadata"]["name"]
    plan = state["plans"].get(name, [{"after": 10, "condition": "Complete"}])
    for happening in plan[live["_happened"] :]:
        stopped = live["spec"].get("suspend") and not ({"admit", "remove", "events"} & set(happening))
        if stopped or state["now"] - live["_made"] < happening["after"]:
            return
        live["_happened"] += 1
        if "condition" in happening:
            condition = {
                "type": happening["condition"],
                "status": "True",
                "reason": happening.get("reason"),
            }
            live["status"] = {"conditions": [condition | {"message": happening.get("message", "")}]}
        live["metadata"].setdefault("labels", {}).update(happening.get("label", {}))
        if happening.get("admit"):
            live["spec"]["suspend"] = False
        for number, pod in enumerate(happening.get("pods", [])):
            make(state, pod_of(live, number, pod))
        for message in happening.get("events", []):
            event = {"metadata": {"name": f"event-{state['serial']}"}, "type": "Warning", **message}
            event["involvedObject"] = {"uid": live["metadata"]["uid"], "kind": live["kind"], "name": name}
            make(state, {"kind": "Event", **event})
        if happening.get("remove"):
            remove(state, key)
        if happening.get("remake"):
            again = {k: v for k, v in live.items() if not k.startswith("_") and k != "status"}
            state["plans"][name] = [{"after": 5, "condition": "Complete"}]
            make(state, json.loads(json.dumps(again)))


def pod_of(job: Object, number: int, pod: Object) -> Object:
    name = job["metadata"]["name"]
    label = "batch.kubernetes.io/job-name" if job["kind"] == "Job" else "jobset.sigs.k8s.io/jobset-name"
    metadata = {"name": f"{name}-{number}", "labels": {label: name}} | pod.get("metadata", {})
    return {"kind": "Pod", "spec": {"nodeName": "node-1"}, **pod, "metadata": metadata}


def remove(state: Object, key: str) -> None:
    gone = state["objects"].pop(key)
    for other, live in list(state["objects"].items()):
        labels = live["metadata"].get("labels", {})
        owned = gone["metadata"]["uid"] in [o["uid"] for o in live["metadata"].get("ownerReferences", [])]
        if owned or (live["kind"] == "Pod" and gone["metadata"]["name"] in labels.values()):
            state["objects"].pop(other, None)


# The program


def main(folder: str) -> None:
    arguments, stand_in = sys.argv[1:], StandIn(Path(folder))
    if arguments[0] == "kustomize" or "--local" in arguments:
        with stand_in.state() as state:
            kubectl = state["kubectl"]
        os.execv(kubectl, ["kubectl", *arguments])
    code, output, message = stand_in.answer(
        arguments, sys.stdin.read() if "--filename=-" in arguments else ""
    )
    print(output, end="", flush=True)
    print(message, end="", file=sys.stderr)
    sys.exit(code)


def may(state: Object, verb: str, resource: str) -> None:
    kind = singular(resource)
    if [verb, kind] in state["forbidden"] or kind in CLUSTER_SCOPED:
        message = f'{kind}s is forbidden: User "dev" cannot {verb} resource "{kind}s"'
        raise RefusedError(f"Error from server (Forbidden): {message}")


def auth(state: Object, words: list[str], options: Object, given: str) -> str:
    try:
        may(state, words[1], words[2])
    except RefusedError:
        raise RefusedError("no\n") from None
    return "yes\n"


def get(state: Object, words: list[str], options: Object, given: str) -> str:
    resource, _, name = words[0].partition("/")
    names = [name] if name else words[1:]
    kind = singular(resource)
    may(state, "get", kind)
    found = [v for k, v in state["objects"].items() if k.partition("/")[0] == kind]
    if names:
        found = [v for v in found if v["metadata"]["name"] in names]
    if selector := options.get("selector"):
        wanted = dict(pair.split("=") for pair in selector.split(","))
        found = [v for v in found if wanted.items() <= v["metadata"].get("labels", {}).items()]
    for pair in options.get("field-selector", "").split(","):
        path, _, value = pair.partition("=")
        if path.startswith("involvedObject."):
            found = [v for v in found if v["involvedObject"].get(path.partition(".")[2]) == value]
    if options["output"] == "name":
        return "".join(f"{kind}/{v['metadata']['name']}\n" for v in found)
    if len(names) == 1:
        return json.dumps(found[0]) if found else ""
    return json.dumps({"kind": "List", "items": found})


def documents(given: str) -> list[Object]:
    document = json.loads(given)
    return list(document["items"]) if document["kind"] == "List" else [document]


def create(state: Object, words: list[str], options: Object, given: str) -> str:
    (document,) = documents(given)
    kind, name = document["kind"], document["metadata"]["name"]
    may(state, "create", kind)
    if key_of(document) in state["objects"]:
        message = f'{kind.lower()}s "{name}" already exists'
        raise RefusedError(f'Error from server (AlreadyExists): error when creating "STDIN": {message}')
    if kind == "TrainJob":
        runtime = f"trainingruntime/{document['spec']['runtimeRef']['name']}"
        state["lag"] = state.get("lag", 0) - 1  # how often the webhook does not see a new runtime yet
        if runtime not in state["objects"] or state["lag"] >= 0:
            message = "specified trainingRuntime must be created before the TrainJob is created"
            if state["lag"] % 2:  # Kueue's own webhook
                message = '"vtrainjob.kb.io" denied the request: runtime not found'
            raise RefusedError(f"Error from server (Forbidden): admission webhook denied it: {message}")
    return json.dumps(make(state, document))


def apply(state: Object, words: list[str], options: Object, given: str) -> str:
    for document in documents(given):
        kind = document["kind"]
        may(state, "patch", kind)
        live = state["objects"].get(key_of(document))
        if live is None:
            make(state, document)
            continue
        if kind == "ConfigMap" and live.get("immutable") and live["data"] != document["data"]:
            raise RefusedError("data: Forbidden: field is immutable when `immutable` is set")
        if kind == "Job" and live["spec"].get("template") != document["spec"].get("template"):
            raise RefusedError("spec.template: Invalid value: field is immutable")
        live.update({k: v for k, v in document.items() if k != "metadata"})
    return ""


def patch(state: Object, words: list[str], options: Object, given: str) -> str:
    resource, _, name = words[0].partition("/")
    may(state, "patch", resource)
    live, change = state["objects"][f"{singular(resource)}/{name}"], json.loads(options["patch"])
    metadata = change.get("metadata", {})
    if (
        metadata.get("resourceVersion", live["metadata"]["resourceVersion"])
        != live["metadata"]["resourceVersion"]
    ):
        raise RefusedError("Error from server (Conflict): the object has been modified")
    if metadata.get("uid", live["metadata"]["uid"]) != live["metadata"]["uid"]:
        raise RefusedError("metadata.uid: Invalid value: field is immutable")
    live["metadata"].setdefault("annotations", {}).update(metadata.get("annotations", {}))
    state["serial"] += 1
    live["metadata"]["resourceVersion"] = str(state["serial"])
    live["spec"].update(change.get("spec", {}))
    if live["spec"].get("suspend"):
        for key in [k for k in state["objects"] if k.startswith(f"pod/{live['metadata']['name']}-")]:
            del state["objects"][key]
    return ""


def delete(state: Object, words: list[str], options: Object, given: str) -> str:
    assert options == options | {"cascade": "foreground", "wait": "false"}
    may(state, "delete", words[0].partition("/")[0])
    if live := state["objects"].get(words[0]):
        live["metadata"]["deletionTimestamp"] = "now"
        live["_goes"] = state["now"] + state["stay"]
    return ""


def logs(state: Object, words: list[str], options: Object, given: str) -> str:
    pod = state["objects"][f"pod/{words[0]}"]
    states = [*pod["status"].get("initContainerStatuses", []), *pod["status"].get("containerStatuses", [])]
    for container in states:
        if "waiting" in container["state"] and "ignore-errors" not in options:
            name = container["name"]
            raise RefusedError(
                f'container "{name}" in pod "{words[0]}" is waiting to start: PodInitializing'
            )
    return "".join(f"[pod/{words[0]}/{name}] {line}\n" for name, line in pod.get("_logs", []))


VERBS: dict[str, Callable[[Object, list[str], Object, str], str]] = {
    "auth": auth,
    "get": get,
    "create": create,
    "apply": apply,
    "patch": patch,
    "delete": delete,
    "logs": logs,
}
