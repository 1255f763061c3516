"""Calls of kubectl in one namespace, repeated where the network cut them off."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

Object = dict[str, Any]

IN_A_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
LIBRARY_LOG = re.compile(r"[EWI]\d{4} \d\d:")  # what client-go prints for itself
PATIENCE = 300.0  # seconds that a cut-off call is repeated, outside the wait for a Job
# What client-go and the API server answer when the same call may succeed a moment later.
CUT_OFF = (
    "unable to connect to the server",
    "connection refused",
    "was refused - did you specify the right host",
    "connection reset",
    "connection lost",
    "i/o timeout",
    "tls handshake timeout",
    ": eof",
    "unexpected eof",
    "no such host",
    "no route to host",
    "network is unreachable",
    "deadline exceeded",
    "request canceled",
    "currently unable to handle the request",
    "unable to return a response in the time allotted",
    "etcdserver",
    "too many requests",
    "(toomanyrequests)",
    "apiserver not ready",
    "failed calling webhook",
)


class PipelineError(Exception):
    """The pipeline's end before all steps are complete, with its exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class KubectlError(Exception):
    """kubectl's own words for a call that failed."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output
        self.code = 2
        """The pipeline's exit code: 3 where the call was repeated until its time was over."""

    def says(self, *parts: str) -> bool:
        text = str(self).lower()
        return any(part in text for part in parts)

    @property
    def cut_off(self) -> bool:
        return self.says(*CUT_OFF)

    @property
    def forbidden(self) -> bool:
        return self.says("forbidden")


def kubectl(*arguments: str, given: str | None = None) -> str:
    """Return what one call of kubectl prints; KubectlError with its stderr where it fails.

    It runs in a process group of its own: Ctrl-C reaches the pipeline, and not a call that is half done.
    A person's own defaults for commands (kuberc) are left out.
    """
    try:
        done = subprocess.run(
            ["kubectl", *arguments],
            input=given,
            capture_output=True,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, "KUBERC": "off"},
        )
    except FileNotFoundError:
        raise PipelineError(2, "kubectl is not on PATH: https://kubernetes.io/docs/tasks/tools/") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if not LIBRARY_LOG.match(line)]
        message = "\n".join(lines).strip() or f"kubectl {arguments[0]}: exit code {done.returncode}"
        raise KubectlError(message, done.stdout)
    if arguments[0] in ("create", "apply"):  # what the server accepts, but will not run
        warnings = [line for line in done.stderr.splitlines() if line.startswith("Warning:")]
        print(*warnings, sep="\n", end="\n" * bool(warnings), file=sys.stderr, flush=True)
    return done.stdout


def say(line: str) -> None:
    """Print at once, also into a pipe."""
    print(line, flush=True)


class Cluster:
    """One namespace of the cluster that was the current context at the start."""

    def __init__(self, namespace: str | None) -> None:
        # Who switches contexts in another shell must not move a pipeline that waits for a day.
        self.context: list[str] = []
        with suppress(KubectlError):  # in a pod there is none: kubectl finds the service account
            self.context = [f"--context={kubectl('config', 'current-context').strip()}"]
        self.namespace = namespace or self._default_namespace()
        self.deadline: float | None = None
        """When a wait ends, and with it the repeating of calls; None: PATIENCE."""
        self.answered = False
        """Before the first answer no call is repeated: the address may be wrong."""

    def _default_namespace(self) -> str:
        if not self.context and IN_A_POD.is_file():
            return IN_A_POD.read_text().strip()
        path = "jsonpath={..namespace}"
        try:
            return kubectl("config", "view", "--minify", f"--output={path}", *self.context) or "default"
        except KubectlError:
            return "default"

    def now(self) -> float:
        """Seconds on a clock that never jumps."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def once(self, *arguments: str, given: str | None = None) -> str:
        """Return kubectl's answer; KubectlError where it fails, cut off or not."""
        where = [*self.context, f"--namespace={self.namespace}", "--request-timeout=60s"]
        answer = kubectl(arguments[0], *where, *arguments[1:], given=given)
        self.answered = True
        return answer

    def call(self, *arguments: str, given: str | None = None) -> str:
        """Return kubectl's answer, after other tries where the network cut it off, until the deadline."""
        end = self.now() + PATIENCE if self.deadline is None else self.deadline
        reported = -60.0
        while True:
            try:
                return self.once(*arguments, given=given)
            except KubectlError as error:
                if not (error.cut_off and self.answered):
                    raise
                if self.now() >= end:
                    error.code = 3
                    raise
                if self.now() - reported >= 60:
                    say(f"the cluster does not answer, trying again: {last_line(error)}")
                    reported = self.now()
            self.sleep(5)

    def get(self, *arguments: str) -> Object | None:
        """Return one object, None where there is none."""
        text = self.call("get", *arguments, "--ignore-not-found", "--output=json")
        found: Object | None = json.loads(text) if text.strip() else None
        return found

    def items(self, *arguments: str) -> list[Object]:
        """Return the objects of a list that tells why something waits; it is not worth a second call."""
        found: list[Object] = json.loads(self.once("get", *arguments, "--output=json"))["items"]
        return found

    def command(self, *arguments: str) -> str:
        """Return the line that a person can type."""
        return f"kubectl -n {self.namespace} {' '.join(arguments)}"


def last_line(error: KubectlError) -> str:
    return str(error).splitlines()[-1]


def as_list(documents: list[Object]) -> str:
    """Return the documents as one input of kubectl, in their order."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": documents})
