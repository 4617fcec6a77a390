"""The files in clusters/ against what reads them, without a cloud and without starting anything: Ray's own schema and
scheduler, the field names of KubeRay and Kubernetes, and what clusters/README.md promises of every file.

Ray checks neither the fields of `provider` nor those of `node_config`, and Kubernetes drops fields that it does not
know with a warning, so a misspelt one would only be noticed by what it costs. Here they are compared with

- provider: the names that stand, quoted, in the source of Ray's provider;
- node_config: the parameters of Ray's ARM template (Azure), the first level of EC2's RunInstances and of Compute
  Engine's instances.insert;
- KubeRay: the reference of its fields at release 1.7.0, docs/reference/api.md; Kubernetes: core/v1.
"""

import copy
import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import ray.autoscaler
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from fedray.config import load_config

REPOSITORY = Path(__file__).resolve().parents[1]
CLUSTERS = REPOSITORY / "clusters"
AUTOSCALER = Path(ray.autoscaler.__file__).parent

CLOUDS = ("aws", "gcp", "azure")
RAY_UP = (*CLOUDS, "on-premise")
KUBERAY = ("kuberay-cluster", "kuberay-job")
STORAGE = "/mnt/fedray"

Config = dict[str, Any]


def load(name: str) -> Config:
    loaded: Config = yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())
    return loaded


def pins(text: str) -> set[tuple[str, str]]:
    """Return the names and versions that a text pins: `name==1` and `name[extra]==1`."""
    found = re.findall(r"([A-Za-z][\w.-]*)(?:\[[\w,]*\])?==(\w[\w.]*)", text)
    return {(name.lower().replace("_", "-"), version) for name, version in found}


CONSTRAINTS = dict(pins((REPOSITORY / "constraints.txt").read_text()))


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
    else:
        yield str(value)


def open_to_all(config: Config) -> list[str]:
    return [f"open to all: {text}" for text in strings(config) if "0.0.0.0" in text or "::/0" in text]


def versions(text: str, required: set[str]) -> list[str]:
    """Say what a text installs in another version than constraints.txt, or does not pin."""
    found = pins(text)
    missing = [f"not pinned: {name}" for name in required - {name for name, _ in found}]
    wrong = [(name, version) for name, version in found if CONSTRAINTS.get(name, version) != version]
    return missing + [f"not constraints.txt's: {name}=={version}" for name, version in wrong]


# ray up ---------------------------------------------------------------------------------------------------------------

PROVIDER_SOURCE = {"aws": "aws", "gcp": "gcp", "azure": "_azure", "local": "local"}

NODE_CONFIG = {
    # https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_RunInstances.html, without the counts, which Ray gives
    "aws": (
        "BlockDeviceMappings CapacityReservationSpecification CpuOptions CreditSpecification EbsOptimized "
        "EnclaveOptions HibernationOptions IamInstanceProfile ImageId InstanceInitiatedShutdownBehavior "
        "InstanceMarketOptions InstanceType KeyName LaunchTemplate LicenseSpecifications MaintenanceOptions "
        "MetadataOptions Monitoring NetworkInterfaces Placement PrivateDnsNameOptions SecurityGroupIds SubnetIds "
        "TagSpecifications UserData"
    ),
    # https://cloud.google.com/compute/docs/reference/rest/v1/instances/insert
    "gcp": (
        "advancedMachineFeatures canIpForward confidentialInstanceConfig deletionProtection description disks "
        "displayDevice guestAccelerators hostname labels machineType metadata minCpuPlatform networkInterfaces "
        "networkPerformanceConfig params reservationAffinity resourcePolicies scheduling serviceAccounts "
        "shieldedInstanceConfig sourceInstanceTemplate tags"
    ),
    "azure": "azure_arm_parameters tags",
}


def arm_parameters() -> set[str]:
    template = json.loads((AUTOSCALER / "_private/_azure/azure-vm-template.json").read_text())
    return {*template["parameters"], "availability_zone"}


def schema_errors(config: Config) -> list[str]:
    """Return what Ray says when it reads the file, as `ray up` does before it asks the cloud."""
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except (ValidationError, ValueError) as error:
        return [f"schema: {error}"]
    return []


def unknown_fields(config: Config) -> list[str]:
    provider = config["provider"]["type"]
    sources = [*(AUTOSCALER / "_private" / PROVIDER_SOURCE[provider]).glob("*.py"), AUTOSCALER / "_private/updater.py"]
    source = "".join(file.read_text() for file in sources)
    wrong = [f"provider.{name}" for name in config["provider"] if name != "type" and f'"{name}"' not in source]
    for name, kind in config.get("available_node_types", {}).items():
        node = kind["node_config"]
        wrong += [f"{name}.node_config.{field}" for field in node if field not in NODE_CONFIG[provider].split()]
        arm = node.get("azure_arm_parameters", {})
        wrong += [f"{name}.azure_arm_parameters.{field}" for field in arm if field not in arm_parameters()]
    return [f"unknown: {field}" for field in wrong]


def workers_of(config: Config) -> dict[str, Config]:
    kinds = config.get("available_node_types", {})
    return {name: kind for name, kind in kinds.items() if name != config["head_node_type"]}


def is_spot(provider: str, node: Config) -> bool:
    if provider == "aws":
        return bool(node.get("InstanceMarketOptions", {}).get("MarketType") == "spot")
    if provider == "gcp":
        return bool(node.get("scheduling", {}).get("provisioningModel") == "SPOT")
    return bool(node["azure_arm_parameters"].get("priority") == "Spot")


def has_public_address(config: Config, kind: Config) -> bool:
    """Whether the cloud would give such a node an address on the Internet."""
    if not config["provider"].get("use_internal_ips"):
        return True
    if config["provider"]["type"] == "aws":
        interfaces = kind["node_config"].get("NetworkInterfaces", [{}])
        return any(interface.get("AssociatePublicIpAddress", True) for interface in interfaces)
    if config["provider"]["type"] == "gcp":
        interfaces = kind["node_config"].get("networkInterfaces", [{"accessConfigs": True}])
        return any("accessConfigs" in interface for interface in interfaces)
    return False  # Azure: Ray's template gives a worker none with use_internal_ips


def guarded(config: Config, kind: Config) -> bool:
    """Whether the file decides who may reach a node; Ray's or the cloud's default is SSH for everybody."""
    node = kind["node_config"]
    if config["provider"]["type"] == "aws":
        interfaces = node.get("NetworkInterfaces", [])
        return bool(node.get("SecurityGroupIds") or (interfaces and all(each.get("Groups") for each in interfaces)))
    if config["provider"]["type"] == "gcp":
        interfaces = node.get("networkInterfaces", [])
        named = [each.get("subnetwork", "default").rpartition("/")[2] for each in interfaces]
        return bool(named) and "default" not in named
    return {"unique_id", "subnet_mask"} <= set(config["provider"])  # which name the network that Ray then keeps


def network_problems(config: Config) -> list[str]:
    kinds, workers = config.get("available_node_types", {}), workers_of(config)
    return [
        *open_to_all(config),
        *(f"{name}: public address" for name in workers if has_public_address(config, workers[name])),
        *(f"{name}: open to all by default" for name in kinds if not guarded(config, kinds[name])),
    ]


def worker_problems(config: Config) -> list[str]:
    provider = config["provider"]["type"]
    wrong = []
    for name, kind in workers_of(config).items():
        if kind.get("min_workers") != 0 or not kind.get("max_workers"):
            wrong.append(f"{name}: min_workers {kind.get('min_workers')}, max_workers {kind.get('max_workers')}")
        if not is_spot(provider, kind["node_config"]):
            wrong.append(f"{name}: not on spot")
        if kind["resources"].get("GPU") != 1 or kind["resources"].get(name) != 1:
            wrong.append(f"{name}: resources {kind['resources']}")
    return wrong


def start_problems(config: Config) -> list[str]:
    wrong = []
    for name in ("head", "worker"):
        environment, _, options = " ".join(config[f"{name}_start_ray_commands"]).partition("ray start ")
        needed = {"token": "RAY_AUTH_MODE=token", "FEDRAY_STORAGE": f"FEDRAY_STORAGE={STORAGE}"}
        wrong += [f"{name}: no {what}" for what, word in needed.items() if word not in environment.split()]
        if name == "head" and not {"--num-cpus=0", "--num-gpus=0"} <= set(options.split()):
            wrong.append("head: takes training")
    if config.get("available_node_types") and config["available_node_types"]["head"]["resources"] != {"CPU": 0}:
        wrong.append("head: has resources")  # which win over --num-cpus
    if config["file_mounts"].get("~/.ray/auth_token") != "~/.ray/auth_token":
        wrong.append("token: not copied")
    if not any("mount" in command and STORAGE in command for command in config["setup_commands"]):
        wrong.append(f"{STORAGE}: not mounted")
    return wrong


def install_problems(config: Config) -> list[str]:
    commands = config["setup_commands"]
    wrong = versions("\n".join([*commands, *config.get("head_setup_commands", [])]), {"ray", "torch"})
    if not any("-c ~/fedray/constraints.txt" in command and "torch==" in command for command in commands):
        wrong.append("installed without constraints.txt")
    if not any("--python 3.11" in command for command in commands):
        wrong.append("another Python")
    return wrong + [f"{local}: not mounted" for local in ("fedray", "constraints.txt") if local not in mounted(config)]


def mounted(config: Config) -> set[str]:
    return set(config["file_mounts"].values()) - {"~/.ray/auth_token"}


def ray_up_problems(config: Config) -> list[str]:
    checks = (schema_errors, unknown_fields, network_problems, worker_problems, start_problems, install_problems)
    wrong = [problem for check in checks for problem in check(config)]
    return wrong if config.get("idle_timeout_minutes", 0) > 0 else [*wrong, "no idle timeout"]


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_files_are_what_ray_reads_and_what_the_readme_promises(name: str) -> None:
    assert ray_up_problems(load(name)) == []


@pytest.mark.parametrize("name", RAY_UP)
def test_what_is_copied_to_the_nodes_is_in_the_repository(name: str) -> None:
    """Small: Ray reads every byte of it, so neither the whole repository nor .venv."""
    for local in mounted(load(name)):
        assert (REPOSITORY / local).exists()
        assert local not in (".", "./", ".venv")


@pytest.mark.parametrize("name", RAY_UP)
def test_the_commands_are_bash(name: str) -> None:
    config = load(name)
    for part in (part for part in config if part.endswith("_commands")):
        for command in config[part]:
            checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
            assert (checked.returncode, checked.stderr) == (0, ""), command


@pytest.mark.parametrize("name", ["gcp", "azure"])
def test_the_heads_packages_for_the_cloud_are_those_of_rays_own_template(name: str) -> None:
    template = yaml.safe_load((AUTOSCALER / name / "defaults.yaml").read_text())
    assert pins(" ".join(load(name)["head_setup_commands"])) == pins(" ".join(template["head_setup_commands"]))


def test_nobody_but_the_cloud_says_whether_an_on_premise_worker_has_a_gpu() -> None:
    """Why on-premise.yaml starts all workers: Ray's type for them has no resources, so no demand would start one."""
    config = load("on-premise")
    prepared = prepare_config(copy.deepcopy(config))
    (kind,) = prepared["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"])
    assert kind["resources"] == {}
    kind["min_workers"] = 0
    assert launched(prepared, [{"CPU": 1, "GPU": 0.25}]) == {}
    kind["resources"] = {"CPU": 4, "GPU": 1}
    assert sum(launched(prepared, [{"CPU": 1, "GPU": 0.25}]).values()) == 1


def change(path: str, value: Any) -> Callable[[Config], None]:
    """Return what sets a value deep in a configuration; None deletes it. Numbers in the path are places in lists."""

    def apply(config: Any) -> None:
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("/"))
        for part in parents:
            config = config[part]
        if value is None:
            del config[last]
        else:
            config[last] = value

    return apply


@pytest.mark.parametrize(
    ("name", "break_it", "message"),
    [
        ("aws", change("idle_timeout_minuets", 5), "schema: .*idle_timeout_minuets"),
        ("aws", change("available_node_types/phone/min_worker", 0), "schema: .*min_worker"),
        ("gcp", change("provider/cache_stoped_nodes", False), "unknown: provider.cache_stoped_nodes"),
        ("aws", change("available_node_types/phone/node_config/InstanceTyp", "m5.large"), "unknown: .*InstanceTyp"),
        ("azure", change("available_node_types/phone/node_config/azure_arm_parameters/vmSise", ""), "unknown: .*Sise"),
        ("gcp", change("available_node_types/laptop/node_config/schedulling", {}), "unknown: .*schedulling"),
        *((name, change("available_node_types/phone/min_workers", 1), "phone: min_workers 1") for name in CLOUDS),
        ("aws", change("available_node_types/phone/max_workers", None), "phone: min_workers 0, max_workers None"),
        ("aws", change("available_node_types/laptop/node_config/InstanceMarketOptions", None), "laptop: not on spot"),
        ("gcp", change("available_node_types/laptop/node_config/scheduling", {}), "laptop: not on spot"),
        (
            "azure",
            change("available_node_types/laptop/node_config/azure_arm_parameters/priority", "Regular"),
            "laptop: not on spot",
        ),
        (
            "aws",
            change(
                "provider/security_group",
                {"IpPermissions": [{"FromPort": 8265, "ToPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]},
            ),
            "open to all: 0.0.0.0/0",
        ),
        ("aws", change("head_start_ray_commands/1", "ray start --head --dashboard-host=0.0.0.0"), "open to all"),
        (
            "aws",
            change("available_node_types/head/node_config/NetworkInterfaces", None),
            "head: open to all by default",
        ),
        (
            "gcp",
            change("available_node_types/head/node_config/networkInterfaces", None),
            "head: open to all by default",
        ),
        ("azure", change("provider/unique_id", None), "head: open to all by default"),
        ("azure", change("provider/use_internal_ips", False), "phone: public address"),
        (
            "aws",
            change("available_node_types/phone/node_config/NetworkInterfaces/0/AssociatePublicIpAddress", True),
            "phone: public address",
        ),
        (
            "gcp",
            change("available_node_types/phone/node_config/networkInterfaces/0/accessConfigs", [{}]),
            "phone: public address",
        ),
        *((name, change("head_start_ray_commands/1", "ray start --head"), "head: no token") for name in RAY_UP),
        *((name, change("worker_start_ray_commands/1", "ray start"), "worker: no FEDRAY_STORAGE") for name in RAY_UP),
        *((name, change("head_start_ray_commands/1", "ray start --head"), "head: takes training") for name in RAY_UP),
        ("gcp", change("available_node_types/head/resources", {"CPU": 4}), "head: has resources"),
        *(
            (name, lambda config: config["file_mounts"].pop("~/.ray/auth_token"), "token: not copied")
            for name in RAY_UP
        ),
        ("on-premise", change("setup_commands", []), "not pinned: torch"),
        ("on-premise", change("setup_commands", []), "not mounted"),
        ("on-premise", change("setup_commands/0", 'pip install "torch==2.0.0"'), "not constraints.txt's: torch==2.0.0"),
        ("aws", change("idle_timeout_minutes", 0), "no idle timeout"),
    ],
)
def test_a_broken_ray_up_file_is_found(name: str, break_it: Callable[[Config], None], message: str) -> None:
    config = load(name)
    break_it(config)
    problems = ray_up_problems(config)
    assert any(re.search(message, problem, re.DOTALL) for problem in problems), problems


# KubeRay --------------------------------------------------------------------------------------------------------------

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


# The experiment -------------------------------------------------------------------------------------------------------


def launched(config: Config, asked: list[dict[str, float]]) -> dict[str, int]:
    """Return how many nodes of each type Ray's autoscaler would start for actors that ask for so much."""
    config = copy.deepcopy(config) | {"auth": {}, "file_mounts": {}}  # it would read the key and the mounted files
    known = AutoscalingConfig(config)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=known.get_node_type_configs(),
        max_num_nodes=known.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(each) for each in asked]),
    )
    reply = ResourceDemandScheduler(Mock()).schedule(request)
    return {each.instance_type: each.count for each in reply.to_launch}


@pytest.mark.parametrize("name", [*CLOUDS, *KUBERAY])
def test_every_tier_of_the_experiment_brings_up_one_node_of_its_kind(name: str) -> None:
    """Four actors with a quarter of a GPU fit on one; what asks for `laptop` starts on no other; the head has none."""
    manifest = load(name)
    config = autoscaling_of(manifest) if name in KUBERAY else prepare_config(manifest)
    tiers = load_config(CLUSTERS / "experiment.yaml").clients.tiers
    asked = {
        tier: [{"CPU": known.num_cpus, "GPU": known.num_gpus, **known.resources}] * known.actors
        for tier, known in tiers.items()
    }
    for tier, actors in asked.items():
        assert Counter(launched(config, actors)) == {tier: 1}
    together = launched(config, [actor for actors in asked.values() for actor in actors])
    assert together == dict.fromkeys(tiers, 1)
