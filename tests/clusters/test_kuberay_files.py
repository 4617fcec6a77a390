"""The files for KubeRay in clusters/ against what reads them, without a cluster: the field names of KubeRay and
Kubernetes, Ray's own schema and scheduler, and what clusters/README.md promises of every file.

Kubernetes drops fields that it does not know with a warning, so a misspelt one would only be noticed by what it costs.
Here they are compared with the reference of KubeRay's fields at release 1.7.0, docs/reference/api.md, and core/v1.
"""

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cluster_files import (
    CLUSTERS,
    CONSTRAINTS,
    REPOSITORY,
    STORAGE,
    Config,
    brought_up,
    change,
    load,
    open_to_all,
    versions,
)
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

KUBERAY = ("kuberay-cluster", "kuberay-job")

FIELDS = {
    # KubeRay 1.7.0, ray.io/v1
    "RayCluster": "apiVersion:str kind:str metadata:ObjectMeta spec:RayClusterSpec",
    "RayJob": "apiVersion:str kind:str metadata:ObjectMeta spec:RayJobSpec",
    "RayJobSpec": "activeDeadlineSeconds:int backoffLimit:int rayClusterSpec:RayClusterSpec "
    "submitterPodTemplate:PodTemplateSpec metadata:strings clusterSelector:strings submitterConfig managedBy:str "
    "deletionStrategy entrypoint:str runtimeEnvYAML:str jobId:str submissionMode:str entrypointResources:str "
    "entrypointNumCpus entrypointNumGpus ttlSecondsAfterFinished:int preRunningDeadlineSeconds:int "
    "shutdownAfterJobFinishes:bool suspend:bool",
    "RayClusterSpec": "upgradeStrategy authOptions:AuthOptions suspend:bool managedBy:str "
    "autoscalerOptions:AutoscalerOptions headServiceAnnotations:strings enableInTreeAutoscaling:bool "
    "gcsFaultToleranceOptions historyServerOptions networkPolicy tlsOptions headGroupSpec:HeadGroupSpec "
    "rayVersion:str workerGroupSpecs:[WorkerGroupSpec]",
    "AuthOptions": "enableK8sTokenAuth:bool secretName:str mode:str",
    "AutoscalerOptions": "resources:ResourceRequirements image:str imagePullPolicy:str securityContext "
    "idleTimeoutSeconds:int upscalingMode:str version:str env:[EnvVar] envFrom volumeMounts:[VolumeMount] command args",
    "HeadGroupSpec": "template:PodTemplateSpec headService enableIngress:bool ingressOptions resources:strings "
    "labels:strings rayStartParams:strings serviceType:str",
    "WorkerGroupSpec": "suspend:bool groupName:str replicas:int minReplicas:int maxReplicas:int "
    "idleTimeoutSeconds:int priority:int resources:strings labels:strings rayStartParams:strings "
    "template:PodTemplateSpec scaleStrategy numOfHosts:int",
    # Kubernetes, core/v1
    "ObjectMeta": "name:str generateName:str namespace:str labels:strings annotations:strings finalizers",
    "PodTemplateSpec": "metadata:ObjectMeta spec:PodSpec",
    "PodSpec": "volumes:[Volume] initContainers:[Container] containers:[Container] ephemeralContainers "
    "restartPolicy:str terminationGracePeriodSeconds:int activeDeadlineSeconds:int dnsPolicy:str nodeSelector:strings "
    "serviceAccountName:str serviceAccount:str automountServiceAccountToken:bool nodeName:str hostNetwork:bool "
    "hostPID:bool hostIPC:bool shareProcessNamespace:bool securityContext:PodSecurityContext imagePullSecrets "
    "hostname:str subdomain:str affinity:Affinity schedulerName:str tolerations:[Toleration] hostAliases "
    "priorityClassName:str priority:int dnsConfig readinessGates runtimeClassName:str enableServiceLinks:bool "
    "preemptionPolicy:str overhead:quantities topologySpreadConstraints setHostnameAsFQDN:bool os hostUsers:bool "
    "schedulingGates resourceClaims",
    "Container": "name:str image:str command args workingDir:str ports:[ContainerPort] envFrom env:[EnvVar] "
    "resources:ResourceRequirements resizePolicy restartPolicy:str volumeMounts:[VolumeMount] volumeDevices "
    "livenessProbe readinessProbe startupProbe lifecycle terminationMessagePath:str terminationMessagePolicy:str "
    "imagePullPolicy:str securityContext stdin:bool stdinOnce:bool tty:bool",
    "ContainerPort": "name:str hostPort:int containerPort:int protocol:str hostIP:str",
    "EnvVar": "name:str value:str valueFrom",
    "VolumeMount": "name:str readOnly:bool recursiveReadOnly:str mountPath:str subPath:str mountPropagation:str "
    "subPathExpr:str",
    "Volume": "name:str persistentVolumeClaim:ClaimSource emptyDir configMap secret nfs csi hostPath projected "
    "ephemeral downwardAPI",
    "ClaimSource": "claimName:str readOnly:bool",
    "ResourceRequirements": "limits:quantities requests:quantities claims",
    "Toleration": "key:str operator:str value:str effect:str tolerationSeconds:int",
    "PodSecurityContext": "runAsUser:int runAsGroup:int runAsNonRoot:bool fsGroup:int fsGroupChangePolicy:str "
    "supplementalGroups seccompProfile seLinuxOptions sysctls windowsOptions",
    "Affinity": "nodeAffinity:NodeAffinity podAffinity podAntiAffinity",
    "NodeAffinity": "requiredDuringSchedulingIgnoredDuringExecution:NodeSelector "
    "preferredDuringSchedulingIgnoredDuringExecution",
    "NodeSelector": "nodeSelectorTerms:[NodeSelectorTerm]",
    "NodeSelectorTerm": "matchExpressions:[NodeSelectorRequirement] matchFields",
    "NodeSelectorRequirement": "key:str operator:str values",
    "PersistentVolumeClaim": "apiVersion:str kind:str metadata:ObjectMeta spec:ClaimSpec",
    "ClaimSpec": "accessModes selector resources:ResourceRequirements volumeName:str storageClassName:str "
    "volumeMode:str dataSource dataSourceRef volumeAttributesClassName:str",
}
"""Of every type its fields; after a colon their type: one of this table, a list of one, or of SIMPLE. Without: not
looked into."""

NEEDED = {
    "RayCluster": "apiVersion kind metadata spec",
    "RayJob": "apiVersion kind metadata spec",
    "RayClusterSpec": "headGroupSpec",
    "HeadGroupSpec": "rayStartParams template",
    "WorkerGroupSpec": "groupName minReplicas maxReplicas rayStartParams template",
    "PodTemplateSpec": "spec",
    "PodSpec": "containers",
    "Container": "name image",
    "EnvVar": "name",
    "Volume": "name",
    "VolumeMount": "name mountPath",
    "ClaimSource": "claimName",
}

QUANTITY = re.compile(r"\d+(\.\d+)?(m|[KMGTP]i?)?")

SIMPLE: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: type(value) is int,
    "bool": lambda value: type(value) is bool,
    "strings": lambda value: isinstance(value, dict) and all(type(entry) is str for entry in value.values()),
    "quantities": lambda value: (
        isinstance(value, dict) and all(QUANTITY.fullmatch(str(entry)) for entry in value.values())
    ),
}


def field_errors(value: Any, kind: str, where: str) -> Iterator[str]:
    """Yield what of a manifest Kubernetes would not take, or would drop."""
    if kind in SIMPLE:
        if not SIMPLE[kind](value):
            yield f"{where}: {value!r} is no {kind}"
        return
    if kind.startswith("["):
        if not isinstance(value, list):
            yield f"{where}: {value!r} is no list"
            return
        for place, entry in enumerate(value):
            yield from field_errors(entry, kind[1:-1], f"{where}[{place}]")
        return
    if not isinstance(value, dict):
        yield f"{where}: {value!r} is no {kind}"
        return
    known = dict((*field.split(":"), "")[:2] for field in FIELDS[kind].split())
    yield from (f"{where}.{name}: missing" for name in NEEDED.get(kind, "").split() if name not in value)
    for name, inner in value.items():
        if name not in known:
            yield f"{where}.{name}: unknown to {kind}"
        elif known[name]:
            yield from field_errors(inner, known[name], f"{where}.{name}")


def cluster_of(manifest: Config) -> Config:
    """Return a RayCluster's spec, also out of a RayJob."""
    spec: Config = manifest["spec"]
    return spec if manifest["kind"] == "RayCluster" else spec["rayClusterSpec"]


def autoscaling_of(manifest: Config) -> Config:
    """Return what Ray's autoscaler makes of a RayCluster; it is validated by Ray's schema on the way."""
    custom = {"metadata": {"name": "fedray", "namespace": "default"}, "spec": cluster_of(manifest)}
    derived: Config = _derive_autoscaling_config_from_ray_cr(copy.deepcopy(custom))
    return derived


def pods_of(cluster: Config) -> dict[str, Config]:
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in {"head": cluster["headGroupSpec"], **groups}.items()}


def pod_problems(name: str, pod: Config) -> list[str]:
    wrong = []
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", container["name"]):
            wrong.append(f"{name}: container name {container['name']}")
        mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", [])}
        if set(mounts) - volumes:
            wrong.append(f"{name}: mounts what is no volume: {sorted(set(mounts) - volumes)}")
        variables = {variable["name"]: variable.get("value") for variable in container.get("env", [])}
        if variables.get("FEDRAY_STORAGE") != STORAGE or STORAGE not in mounts.values():
            wrong.append(f"{name}: no FEDRAY_STORAGE")
        resources = container.get("resources", {})
        if resources.get("limits", {}) != resources.get("requests", {}):
            wrong.append(f"{name}: limits are not requests")
        if (resources.get("limits", {}).get("nvidia.com/gpu") == "1") == (name == "head"):
            wrong.append(f"{name}: GPUs")
        wrong += [f"{name}: hostPort" for port in container.get("ports", []) if "hostPort" in port]
    return wrong + [f"{name}: {field}" for field in ("hostNetwork",) if pod.get(field)]


def spot_problems(name: str, pod: Config) -> list[str]:
    spot = "cloud.google.com/gke-spot"
    if name == "head":
        terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        never = all({"key": spot, "operator": "DoesNotExist"} in term["matchExpressions"] for term in terms)
        return [] if never else ["head: may be on spot"]
    tolerated = {toleration["key"] for toleration in pod.get("tolerations", [])}
    wrong = [] if pod.get("nodeSelector", {}).get(spot) == "true" else [f"{name}: not on spot"]
    return wrong + [f"{name}: does not tolerate {key}" for key in {spot, "nvidia.com/gpu"} - tolerated]


def kuberay_problems(manifest: Config) -> list[str]:
    if wrong := list(field_errors(manifest, manifest["kind"], manifest["kind"])):
        return wrong
    cluster = cluster_of(manifest)
    derived = autoscaling_of(manifest)
    for name, pod in pods_of(cluster).items():
        wrong += pod_problems(name, pod) + spot_problems(name, pod)
    for group in cluster["workerGroupSpecs"]:
        if (group.get("replicas"), group["minReplicas"]) != (0, 0) or group["maxReplicas"] > 10:
            wrong.append(f"{group['groupName']}: minReplicas {group['minReplicas']}")
    head = derived["available_node_types"][derived["head_node_type"]]["resources"]
    promises = {
        "head takes training": not head["CPU"] and not head["GPU"],
        "no autoscaling": cluster.get("enableInTreeAutoscaling"),
        "no idle timeout": cluster.get("autoscalerOptions", {}).get("idleTimeoutSeconds", 0) > 0,
        "no token": cluster.get("authOptions", {}).get("mode") == "token",
        "open to all": cluster["headGroupSpec"].get("serviceType") == "ClusterIP",
        "ingress": not cluster["headGroupSpec"].get("enableIngress"),
        "another Ray": cluster.get("rayVersion") == CONSTRAINTS["ray"],
    }
    return wrong + open_to_all(manifest) + [name for name, kept in promises.items() if not kept]


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_files_have_kuberays_fields_and_what_the_readme_promises(name: str) -> None:
    assert kuberay_problems(load(name)) == []


def test_the_job_has_the_same_cluster() -> None:
    assert cluster_of(load("kuberay-job")) == cluster_of(load("kuberay-cluster"))


def test_the_shared_folder_is_one_claim_that_many_may_write_to() -> None:
    claim = load("kuberay-storage")
    assert list(field_errors(claim, "PersistentVolumeClaim", "claim")) == []
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods_of(cluster_of(load("kuberay-cluster"))).values():
        assert [each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"]] == [claim["metadata"]["name"]]


def test_the_image_has_the_pinned_versions_and_what_the_job_runs() -> None:
    text = (CLUSTERS / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{CONSTRAINTS['ray']}-py311-gpu\n" in text
    assert versions(text, {"ray", "torch"}) == []
    copies = [line.split()[1:] for line in text.splitlines() if line.startswith("COPY")]
    sources = [word for words in copies for word in words[:-1] if not word.startswith("--")]
    assert all((REPOSITORY / source).exists() for source in sources)
    assert "clusters/experiment.yaml" in sources
    assert "run /home/ray/clusters/experiment.yaml" in load("kuberay-job")["spec"]["entrypoint"]
    pods = pods_of(cluster_of(load("kuberay-job"))).values()
    images = {container["image"] for pod in pods for container in pod["containers"]}
    assert images == {f"FILL-IN-REGISTRY/fedray:{CONSTRAINTS['ray']}-py311"}
    assert all(image in text for image in images)


SPEC = "spec"
POD = f"{SPEC}/workerGroupSpecs/0/template/spec"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (change(f"{SPEC}/enableInTreeAutoscalling", True), "enableInTreeAutoscalling: unknown to RayClusterSpec"),
        (change(f"{SPEC}/workerGroupSpecs/0/minReplica", 0), "minReplica: unknown to WorkerGroupSpec"),
        (change(f"{POD}/tolerration", []), "tolerration: unknown to PodSpec"),
        (change(f"{POD}/containers/0/resource", {}), "resource: unknown to Container"),
        (change(f"{POD}/containers/0/image", None), "image: missing"),
        (change(f"{POD}/containers/0/resources/limits/memory", "ten"), "is no quantities"),
        (change(f"{SPEC}/headGroupSpec/rayStartParams/num-cpus", 0), "is no strings"),
        (change(f"{SPEC}/workerGroupSpecs/0/minReplicas", 1), "phone: minReplicas 1"),
        (change(f"{SPEC}/headGroupSpec/rayStartParams/num-cpus", "4"), "head takes training"),
        (change(f"{SPEC}/headGroupSpec/serviceType", "LoadBalancer"), "open to all"),
        (change(f"{SPEC}/headGroupSpec/enableIngress", True), "ingress"),
        (change(f"{POD}/hostNetwork", True), "phone: hostNetwork"),
        (change(f"{POD}/containers/0/ports", [{"containerPort": 8265, "hostPort": 80}]), "phone: hostPort"),
        (change(f"{POD}/nodeSelector", {}), "phone: not on spot"),
        (change(f"{POD}/tolerations", []), "phone: does not tolerate nvidia.com/gpu"),
        (change(f"{POD}/volumes", []), "phone: mounts what is no volume"),
        (change(f"{POD}/containers/0/env", []), "phone: no FEDRAY_STORAGE"),
        (change(f"{POD}/containers/0/resources/limits", {"cpu": "3"}), "phone: GPUs"),
        (change(f"{SPEC}/autoscalerOptions/idleTimeoutSeconds", None), "no idle timeout"),
        (change(f"{SPEC}/authOptions", None), "no token"),
        (change(f"{SPEC}/rayVersion", "2.59.0"), "another Ray"),
    ],
)
def test_a_broken_kuberay_file_is_found(break_it: Callable[[Config], None], message: str) -> None:
    manifest = copy.deepcopy(load("kuberay-cluster"))
    break_it(manifest)
    problems = kuberay_problems(manifest)
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize("name", KUBERAY)
def test_every_tier_of_the_experiment_brings_up_one_node_of_its_kind(name: str) -> None:
    """As of the files for `ray up`."""
    apart, together = brought_up(autoscaling_of(load(name)))
    assert apart == {tier: {tier: 1} for tier in apart}
    assert together == dict.fromkeys(apart, 1)
