"""The files for `ray up` in clusters/ against what reads them, without a cloud and without starting anything: Ray's own
schema and scheduler, and what clusters/README.md promises of every file.

Ray checks neither the fields of `provider` nor those of `node_config`, so a misspelt one would only be noticed by what
it costs. Here they are compared with

- provider: the names that stand, quoted, in the source of Ray's provider;
- node_config: the parameters of Ray's ARM template (Azure), the first level of EC2's RunInstances and of Compute
  Engine's instances.insert.
"""

import copy
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import ray.autoscaler
import yaml
from cluster_files import REPOSITORY, STORAGE, Config, brought_up, change, launched, load, open_to_all, pins, versions
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

AUTOSCALER = Path(ray.autoscaler.__file__).parent

CLOUDS = ("aws", "gcp", "azure")
RAY_UP = (*CLOUDS, "on-premise")

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


@pytest.mark.parametrize("name", CLOUDS)
def test_every_tier_of_the_experiment_brings_up_one_node_of_its_kind(name: str) -> None:
    """Four actors with a quarter of a GPU fit on one; what asks for `laptop` starts on no other; the head has none."""
    apart, together = brought_up(prepare_config(load(name)))
    assert apart == {tier: {tier: 1} for tier in apart}
    assert together == dict.fromkeys(apart, 1)
