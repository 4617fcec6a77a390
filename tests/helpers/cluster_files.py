"""What tests of the files in clusters/ share: reading them, breaking them, and what Ray would start for them."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import yaml
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from fedray.config import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTERS = REPOSITORY / "clusters"
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


def brought_up(config: Config) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Return how many nodes of each type Ray's autoscaler would start for each tier of clusters/experiment.yaml by
    itself, and for all of them together."""
    tiers = load_config(CLUSTERS / "experiment.yaml").clients.tiers
    asked = {
        tier: [{"CPU": known.num_cpus, "GPU": known.num_gpus, **known.resources}] * known.actors
        for tier, known in tiers.items()
    }
    together = launched(config, [actor for actors in asked.values() for actor in actors])
    return {tier: launched(config, actors) for tier, actors in asked.items()}, together
