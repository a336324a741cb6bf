"""Manifests for Kubernetes, in JSON, which kubectl takes as well as YAML (stdlib only).

Pods run launch/pod.sh, which ends with AGAIN where another start may get on. The image has megagpt
at the folder `mount`, or `claim`, a volume that all pods share, has; the run file and its folders
must lie there too.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from megagpt.errors import UsageError
from megagpt.submit.systems import Facts

AGAIN = 138
"""What launch/pod.sh ends with where another start may get on."""
KILLED = (137, 143)
"""Codes of a pod that was ended from outside."""
RESTARTS = 10_000
"""Starts of a TrainJob; launch/pod.sh counts those that save nothing new, and ends them earlier."""
KINDS = ("PyTorchJob", "TrainJob")
"""Of Kubeflow's Training Operator, and of its successor, the Trainer."""


@dataclass(frozen=True, slots=True)
class Pods:
    """Where the pods of a job find everything."""

    image: str
    claim: str
    mount: str


def manifest(kind: str, facts: Facts, pods: Pods) -> str:
    """The manifest of a job of one of KINDS. Raises UsageError."""
    if not re.fullmatch("/[^:]*", pods.mount):
        raise UsageError(
            f"--mount {pods.mount}: must be an absolute path without a colon, as it is in the pods"
        )
    make = {"PyTorchJob": pytorch_job, "TrainJob": train_job}[kind]
    return json.dumps(make(facts, pods), indent=2) + "\n"


def pytorch_job(facts: Facts, pods: Pods) -> dict[str, Any]:
    """Its operator starts a pod again that ends with a code of 128 or more, and no other."""
    replicas = {"Master": 1, "Worker": facts.nodes - 1}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": _name(facts)},
        "spec": {
            "runPolicy": {"cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": {
                part: {
                    "replicas": count,
                    "restartPolicy": "ExitCode",
                    "template": {"spec": _pod(facts, pods, "pytorch")},
                }
                for part, count in replicas.items()
                if count
            },
        },
    }


def train_job(facts: Facts, pods: Pods) -> dict[str, Any]:
    """A runtime of its own and the job that runs by it. A pod that fails ends all others, which
    save; the set of them starts again unless it ended with a code that would come again."""
    name, group = _name(facts), "trainer.kubeflow.org"
    kind = "TrainingRuntime"
    runtime = {
        "apiVersion": f"{group}/v1alpha1",
        "kind": kind,
        "metadata": {"name": name, "labels": {f"{group}/framework": "torch"}},
        "spec": {
            "mlPolicy": {"numNodes": facts.nodes, "torch": {}},
            "template": {"spec": _job_set(facts, pods, f"{group}/trainjob-ancestor-step")},
        },
    }
    job = {
        "apiVersion": f"{group}/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name},
        "spec": {
            "runtimeRef": {"apiGroup": group, "kind": kind, "name": name},
            "trainer": {"numNodes": facts.nodes},
        },
    }
    return {"apiVersion": "v1", "kind": "List", "items": [runtime, job]}


def _job_set(facts: Facts, pods: Pods, label: str) -> dict[str, Any]:
    """All pods as one job, without retries of its own, in a set that starts it again; by `label`
    the operator finds the job that trains."""
    for_good = {"operator": "NotIn", "values": sorted({AGAIN, *KILLED})}
    job = {
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": for_good}]},
        "template": {"spec": {**_pod(facts, pods, "node"), "restartPolicy": "Never"}},
    }
    end = {
        "name": "for-good",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    template = {"metadata": {"labels": {label: "trainer"}}, "spec": job}
    return {
        "failurePolicy": {"maxRestarts": RESTARTS, "rules": [end]},
        "replicatedJobs": [{"name": "node", "template": template}],
    }


def _name(facts: Facts) -> str:
    """A name as Kubernetes takes it for a job and its service (RFC 1035): it begins with a letter
    and ends with none but a letter or digit."""
    name = re.sub(r"[^a-z0-9-]+", "-", facts.name.lower()).strip("-") or "run"
    return (name if name[0].isalpha() else f"run-{name}")[:50].rstrip("-")


def _literal(word: str) -> str:
    """A word of a command, of which Kubernetes replaces $(NAME) by a variable, and $$ by $."""
    return word.replace("$", "$$")


def _pod(facts: Facts, pods: Pods, container: str) -> dict[str, Any]:
    """A pod of all GPUs of a node; `container` is the name that its operator looks for."""
    resources = {"nvidia.com/gpu": str(facts.gpus), "cpu": str(facts.gpus * facts.cores)}
    values = {"NODES": str(facts.nodes), "GPUS": str(facts.gpus), "PYTHON": "python3"}
    return {
        "terminationGracePeriodSeconds": facts.lead,
        "containers": [
            {
                "name": container,
                "image": pods.image,
                "workingDir": pods.mount,
                "command": ["bash", "launch/pod.sh", *map(_literal, facts.arguments)],
                "env": [{"name": key, "value": value} for key, value in values.items()],
                "resources": {"limits": resources, "requests": resources},
                "volumeMounts": [
                    {"name": "shared", "mountPath": pods.mount},
                    {"name": "memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": pods.claim}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
