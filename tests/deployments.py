"""Judges of what is applied to Kubernetes: the schemas of its kinds, and our own rules.

Every judge takes documents as data and returns what is wrong with them, so that tests can show that
it sees what it is there for.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"
OVERLAYS = tuple(sorted(path.name for path in (DEPLOY / "overlays").iterdir()))
MAX_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36}
SUBMISSION_MODES = {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}
RAY_VERSION = "2.60.0"
MONITORING = {"PodMonitor", "PrometheusRule"}
"""Kinds of the Prometheus operator: promtool and tests of their own look at them."""

Document = dict[str, Any]


def render(overlay: str) -> list[Document]:
    """The documents of an overlay, as kustomize makes them."""
    return render_folder(DEPLOY / "overlays" / overlay)


def render_folder(folder: Path) -> list[Document]:
    """The documents of a folder with a kustomization."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which renders the overlays, is not installed")
    return [document for document in yaml.safe_load_all(_rendered(folder)) if document]


@lru_cache
def _rendered(folder: Path) -> str:
    command = ["kubectl", "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pick(documents: list[Document], kind: str, name: str) -> Any:
    """The one document of a kind and name."""
    [found] = [d for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


# schemas ─────────────────────────────────────────────────────────────────────────────────────────


def schema_problems(document: Document, ray_schemas: Path) -> list[str]:
    """What Kubernetes itself would refuse."""
    if document["kind"] in MONITORING:
        return []
    if document["apiVersion"].startswith("ray.io/"):
        return _ray_problems(document, ray_schemas)
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{name_of(document)}: {error}"]
    return []


def _ray_problems(document: Document, ray_schemas: Path) -> list[str]:
    schema = _strict_schema(ray_schemas / f"{document['kind'].lower()}-ray-v1.openapi.json")
    validator = jsonschema.Draft202012Validator(schema)
    return [
        f"{name_of(document)}: {'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in validator.iter_errors(document)
    ]


@lru_cache
def _strict_schema(path: Path) -> Any:
    return _strict(json.loads(path.read_text()), at_top=True)


def _strict(schema: Any, *, at_top: bool = False) -> Any:
    """Refuse keys that are not listed, as the API server does in strict mode."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {
        key: {name: _strict(value) for name, value in below.items()}
        if key == "properties"
        else _strict(below)
        for key, below in schema.items()
    }
    if "properties" in found:
        if at_top:
            for name in ("apiVersion", "kind", "metadata"):
                found["properties"].setdefault(name, {})
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            found["additionalProperties"] = False
        defaults = {name for name, value in schema["properties"].items() if "default" in value}
        if "required" in found:
            found["required"] = [name for name in found["required"] if name not in defaults]
    return found


# rules ───────────────────────────────────────────────────────────────────────────────────────────


def rule_problems(documents: Sequence[Document]) -> list[str]:
    """What our own rules refuse in the documents of one overlay."""
    problems: list[str] = []
    for document in documents:
        where = name_of(document)
        problems += [f"{where}: {problem}" for problem in _kind_problems(document)]
        for spec in pod_specs(document):
            problems += [f"{where}: {problem}" for problem in pod_problems(spec)]
    return problems + list(_network_problems(documents))


def _kind_problems(document: Document) -> Iterator[str]:
    kind, spec = document["kind"], document.get("spec", {})
    if len(document["metadata"]["name"]) > MAX_NAME.get(kind, 253):
        yield f"its name is longer than {MAX_NAME[kind]} characters"
    if kind == "RayJob":
        yield from _job_problems(spec)
    if kind == "CronJob":
        yield from _cron_problems(spec)
    if kind == "Service" and spec.get("type", "ClusterIP") != "ClusterIP":
        yield f"type is {spec['type']}, not ClusterIP"
    if kind == "Role":
        for rule in spec.get("rules", document.get("rules", [])):
            if "*" in (*rule["verbs"], *rule["resources"], *rule["apiGroups"]):
                yield "a rule allows everything"
    if kind == "Secret":
        yield "secrets do not belong into deploy files"
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig")
    if cluster:
        yield from _cluster_problems(cluster)


def _job_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    if spec.get("submissionMode") not in SUBMISSION_MODES:
        yield f"submissionMode {spec.get('submissionMode')} is unknown"
    elif spec["submissionMode"] != "HTTPMode":
        yield f"submissionMode is {spec['submissionMode']}, not HTTPMode"
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("backoffLimit", 0) != 0:
        yield "backoffLimit is not 0: Ray cannot tell which exit codes may be tried again"
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if name not in spec:
            yield f"{name} is not set"
    if "runtimeEnvYAML" in spec:
        yield "runtimeEnvYAML installs or reveals at run time: the image has everything"


def _cron_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    if "TZ=" in spec["schedule"] or "timeZone" not in spec:
        yield "the time zone belongs into timeZone"
    if spec.get("concurrencyPolicy") != "Forbid":
        yield "concurrencyPolicy is not Forbid"
    if spec["jobTemplate"]["spec"].get("backoffLimit") != 0:
        yield "backoffLimit is not 0"


def _cluster_problems(cluster: Mapping[str, Any]) -> Iterator[str]:
    if cluster.get("rayVersion") != RAY_VERSION:
        yield f"rayVersion is {cluster.get('rayVersion')}, not {RAY_VERSION}"
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode is not token"
    if cluster.get("headGroupSpec", {}).get("serviceType", "ClusterIP") != "ClusterIP":
        yield "the head's serviceType is not ClusterIP"
    groups = cluster.get("workerGroupSpecs", [])
    if groups and cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "the head takes work beside its workers"
    is_v2 = cluster.get("autoscalerOptions", {}).get("version") == "v2"
    if cluster.get("enableInTreeAutoscaling") and not is_v2:
        yield "the autoscaler is not v2"
    for group in (cluster["headGroupSpec"], *groups):
        yield from _group_problems(group, is_v2=bool(is_v2))
    for group in groups:
        if "maxReplicas" not in group or group.get("minReplicas", 0) > group["maxReplicas"]:
            yield f"group {group['groupName']} has no maxReplicas, or more minReplicas"


def _group_problems(group: Mapping[str, Any], *, is_v2: bool) -> Iterator[str]:
    if is_v2 and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
        yield "autoscaler v2 needs restartPolicy Never"
    resources = {"num-gpus", "memory", "resources"} & set(group["rayStartParams"])
    if resources and group.get("resources"):
        yield f"{resources} stand in rayStartParams and in resources"


def _network_problems(documents: Sequence[Document]) -> Iterator[str]:
    policies = [document["spec"] for document in documents if document["kind"] == "NetworkPolicy"]
    denies_all = any(
        policy["podSelector"] == {}
        and set(policy["policyTypes"]) == {"Ingress", "Egress"}
        and not policy.get("ingress")
        and not policy.get("egress")
        for policy in policies
    )
    if not denies_all:
        yield "there is no NetworkPolicy that denies everything"
    for policy in policies:
        for rule in policy.get("egress", []):
            for peer in rule.get("to", []):
                block = peer.get("ipBlock")
                if block and "169.254.0.0/16" not in block.get("except", []):
                    yield "a NetworkPolicy lets pods reach the metadata service"
            if "to" not in rule:
                yield "a NetworkPolicy lets pods reach everything"


# pods ────────────────────────────────────────────────────────────────────────────────────────────


def pod_specs(document: Any) -> Iterator[dict[str, Any]]:
    """Every pod that a document makes, wherever its template stands."""
    if isinstance(document, dict):
        if isinstance(document.get("containers"), list):
            yield document
        for key, below in document.items():
            if key != "containers":
                yield from pod_specs(below)
    elif isinstance(document, list):
        for below in document:
            yield from pod_specs(below)


def pod_problems(spec: Mapping[str, Any]) -> Iterator[str]:
    """What a pod may do that none of ours needs."""
    security = spec.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        yield "the pod may run as root: runAsNonRoot and a numeric runAsUser are missing"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "seccompProfile is not RuntimeDefault"
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield f"{name} is on"
    if "serviceAccountName" not in spec:
        yield "the pod has the default service account"
    for volume in spec.get("volumes", []):
        if "hostPath" in volume:
            yield f"volume {volume['name']} is a folder of the node"
        if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
            yield f"volume {volume['name']} has no sizeLimit"
    for container in (*spec["containers"], *spec.get("initContainers", [])):
        yield from container_problems(container)


def container_problems(container: Mapping[str, Any]) -> Iterator[str]:
    """What a container may do, and does not say."""
    name, security = container["name"], container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False:
        yield f"{name}: allowPrivilegeEscalation is not false"
    if security.get("readOnlyRootFilesystem") is not True:
        yield f"{name}: its root filesystem can be written"
    if security.get("capabilities", {}).get("drop") != ["ALL"] or security.get("privileged"):
        yield f"{name}: it keeps capabilities"
    limits = container.get("resources", {}).get("limits", {})
    for resource in ("cpu", "memory", "ephemeral-storage"):
        if resource not in limits:
            yield f"{name}: no limit of {resource}"
    for variable in container.get("env", []):
        is_secret = re.search(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY", variable["name"])
        if is_secret and "value" in variable:
            yield f"{name}: {variable['name']} is written out"
    if container["image"].endswith(":latest") or ":" not in container["image"]:
        yield f"{name}: image {container['image']} has no fixed tag"


def name_of(document: Document) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"
