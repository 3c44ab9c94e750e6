"""Every overlay is what Kubernetes and our rules accept; and the judges see what they must."""

import copy
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from granite_ray.config import load_config
from tests.deployments import (
    DEPLOY,
    OVERLAYS,
    pick,
    pod_specs,
    render,
    render_folder,
    rule_problems,
    schema_problems,
)


@pytest.fixture(scope="module")
def ray_schemas() -> Path:
    """The schemas of KubeRay, which are not part of this repository."""
    folder = os.environ.get("KUBERAY_SCHEMAS")
    if not folder:
        pytest.skip("KUBERAY_SCHEMAS names no folder with the schemas of KubeRay's kinds")
    return Path(folder)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_accepts_every_document(overlay: str, ray_schemas: Path) -> None:
    documents = render(overlay)
    assert {"Namespace", "NetworkPolicy", "ServiceAccount"} <= {d["kind"] for d in documents}
    assert [p for document in documents for p in schema_problems(document, ray_schemas)] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_keeps_the_rules(overlay: str) -> None:
    documents = render(overlay)
    assert sum(1 for document in documents for _ in pod_specs(document)) >= 2
    assert rule_problems(documents) == []


MISSPELT: dict[str, Callable[[Any], object]] = {
    "shutdownAfterJobFinish": lambda spec: spec.update(shutdownAfterJobFinish=True),
    "rayClusterSpec.rayversion": lambda spec: spec["rayClusterSpec"].update(rayversion="2"),
    "maxReplica": lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].update(maxReplica=1),
    "authOptions.mode": lambda spec: spec["rayClusterSpec"]["authOptions"].update(mode="tokens"),
    "volumeMount": lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"][
        "containers"
    ][0].update(volumeMount=[]),
    "ttlSecondsAfterFinished": lambda spec: spec.update(ttlSecondsAfterFinished="600"),
    "requests": lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"][
        "containers"
    ][0]["resources"].update(requests={"cpu": {}}),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_key_or_value_of_a_ray_job_is_seen(name: str, ray_schemas: Path) -> None:
    job = copy.deepcopy(pick(render("gpu"), "RayJob", "granite"))
    MISSPELT[name](job["spec"])
    assert len(schema_problems(job, ray_schemas)) == 1


def test_a_misspelt_key_of_a_core_kind_is_seen(ray_schemas: Path) -> None:
    cron = copy.deepcopy(pick(render("nightly"), "CronJob", "granite-night"))
    cron["spec"]["concurencyPolicy"] = "Forbid"
    assert "concurencyPolicy" in schema_problems(cron, ray_schemas)[0]


def cluster(spec: Any) -> Any:
    return spec["rayClusterSpec"]


def head(spec: Any) -> Any:
    return cluster(spec)["headGroupSpec"]["template"]["spec"]


def worker(spec: Any) -> Any:
    return cluster(spec)["workerGroupSpecs"][0]["template"]["spec"]


BREACHES: dict[str, Callable[[Any], object]] = {
    "not HTTPMode": lambda s: s.update(submissionMode="K8sJobMode"),
    "is unknown": lambda s: s.update(submissionMode="HttpMode"),
    "needs shutdownAfterJobFinishes": lambda s: s.update(shutdownAfterJobFinishes=False),
    "backoffLimit is not 0": lambda s: s.update(backoffLimit=2),
    "activeDeadlineSeconds is not set": lambda s: s.pop("activeDeadlineSeconds"),
    "runtimeEnvYAML": lambda s: s.update(runtimeEnvYAML="pip: [x]"),
    "rayVersion is 2.59.0": lambda s: cluster(s).update(rayVersion="2.59.0"),
    "authOptions.mode is not token": lambda s: cluster(s).pop("authOptions"),
    "the autoscaler is not v2": lambda s: cluster(s)["autoscalerOptions"].update(version="v1"),
    "restartPolicy Never": lambda s: head(s).update(restartPolicy="Always"),
    "no maxReplicas": lambda s: cluster(s)["workerGroupSpecs"][0].pop("maxReplicas"),
    "takes work": lambda s: cluster(s)["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
    "not ClusterIP": lambda s: cluster(s)["headGroupSpec"].update(serviceType="LoadBalancer"),
    "run as root": lambda s: worker(s)["securityContext"].pop("runAsNonRoot"),
    "RuntimeDefault": lambda s: worker(s)["securityContext"].pop("seccompProfile"),
    "hostNetwork": lambda s: worker(s).update(hostNetwork=True),
    "default service account": lambda s: worker(s).pop("serviceAccountName"),
    "folder of the node": lambda s: worker(s)["volumes"].append(
        {"name": "x", "hostPath": {"path": "/"}}
    ),
    "no sizeLimit": lambda s: worker(s)["volumes"].append({"name": "x", "emptyDir": {}}),
    "allowPrivilegeEscalation": lambda s: worker(s)["containers"][0]["securityContext"].pop(
        "allowPrivilegeEscalation"
    ),
    "can be written": lambda s: worker(s)["containers"][0]["securityContext"].pop(
        "readOnlyRootFilesystem"
    ),
    "keeps capabilities": lambda s: worker(s)["containers"][0]["securityContext"].pop(
        "capabilities"
    ),
    "no limit of memory": lambda s: worker(s)["containers"][0]["resources"]["limits"].pop("memory"),
    "is written out": lambda s: worker(s)["containers"][0]["env"].append(
        {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}
    ),
    "no fixed tag": lambda s: worker(s)["containers"][0].update(image="granite-ray"),
}


@pytest.mark.parametrize("words", BREACHES)
def test_a_breach_of_a_rule_is_seen(words: str) -> None:
    documents = copy.deepcopy(render("gpu"))
    BREACHES[words](pick(documents, "RayJob", "granite")["spec"])
    [problem] = rule_problems(documents)
    assert problem.startswith("RayJob/granite: ")
    assert words in problem


@pytest.mark.parametrize(
    ("policy", "change", "words"),
    [
        ("deny-all", {"policyTypes": ["Ingress"]}, "denies everything"),
        ("ray-to-storage", {"egress": [{"ports": [{"port": 443}]}]}, "reach everything"),
        (
            "ray-to-storage",
            {"egress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}]},
            "metadata service",
        ),
    ],
)
def test_a_hole_in_the_network_is_seen(policy: str, change: Any, words: str) -> None:
    documents = copy.deepcopy(render("local"))
    pick(documents, "NetworkPolicy", policy)["spec"].update(change)
    [problem] = rule_problems(documents)
    assert words in problem


def test_the_script_of_the_night_may_make_ray_jobs_and_nothing_else() -> None:
    role = pick(render("nightly"), "Role", "granite-night")
    assert role["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "watch"]}
    ]


def test_every_volume_account_and_config_that_is_named_is_there() -> None:
    for overlay in OVERLAYS:
        documents = render(overlay)
        there = {(document["kind"], document["metadata"]["name"]) for document in documents}
        for document in documents:
            for spec in pod_specs(document):
                assert ("ServiceAccount", spec["serviceAccountName"]) in there
                volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
                for volume in volumes.values():
                    if "configMap" in volume:
                        assert ("ConfigMap", volume["configMap"]["name"]) in there, overlay
                    if "persistentVolumeClaim" in volume:
                        claim = volume["persistentVolumeClaim"]["claimName"]
                        assert ("PersistentVolumeClaim", claim) in there, overlay
                for container in spec["containers"]:
                    for source in container.get("envFrom", []):
                        assert ("ConfigMap", source["configMapRef"]["name"]) in there
                    mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
                    assert mounted <= set(volumes), overlay


@pytest.mark.parametrize("overlay", ["local", "gpu", "nightly"])
def test_every_config_that_a_job_names_is_mounted_and_loads(
    overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import date

    monkeypatch.setenv("RESULTS", "s3://bucket/results")
    monkeypatch.setenv("DOCUMENTS", "s3://bucket/documents")
    documents = render(overlay)
    configs = pick(documents, "ConfigMap", "granite-jobs")["data"]
    entrypoint = pick(documents, "RayJob", "granite")["spec"]["entrypoint"]
    named = re.findall(r"/etc/granite/jobs/(\S+)", entrypoint)
    assert named
    for name in named:
        path = tmp_path / name
        path.write_text(configs[name])
        assert load_config(path, logical_date=date(2026, 1, 31)).job.log_format == "json"


def test_an_overlay_of_ones_own_needs_a_few_lines(tmp_path: Path) -> None:
    """The one in deploy/README.md, with the two files that it names."""
    readme = (DEPLOY / "README.md").read_text()
    [written] = re.findall(r"```yaml\n# mine/kustomization.yaml\n(.*?)```", readme, re.S)
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(written)
    for name in ("summaries", "classes"):
        (mine / f"{name}.yaml").write_text("mine: true\n")
    documents = render_folder(mine)
    assert rule_problems(documents) == []
    environment = pick(documents, "ConfigMap", "granite-env")["data"]
    assert environment["DOCUMENTS"] == "s3://acme/in"
    assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    jobs = pick(documents, "ConfigMap", "granite-jobs")["data"]
    assert jobs["summaries.yaml"] == "mine: true\n"
    images = {
        container["image"]
        for document in documents
        for spec in pod_specs(document)
        for container in spec["containers"]
    }
    assert images == {"REGISTRY/granite-ray:0.1.0-cuda"}


def test_the_version_of_ray_is_the_same_everywhere() -> None:
    locked = re.search(r"^ray==(\S+)", (DEPLOY / "requirements.lock").read_text(), re.M)
    assert locked
    versions = set(re.findall(r"rayVersion: (\S+)", "".join(map(_text, DEPLOY.rglob("*.yaml")))))
    assert versions == {locked[1]}


def _text(path: Path) -> str:
    return path.read_text()
