"""How many client actors of an experiment fit on a cluster: the memory of each tier's actors against that of nodes and
GPUs."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from fedray.config import ClientsConfig, Config
from fedray.errors import ConfigError
from fedray.planning.accounting import Cost
from fedray.planning.memory import Footprint
from fedray.planning.placement import UNIT, Amounts, allot, fit_together, requests
from fedray.training.metering import CUDA_CONTEXT

PROCESS = 600_000_000
"""Bytes of host memory that an actor needs without its model (Python, Ray, torch, transformers, peft); an allowance."""
OBJECT_STORE = 0.3
"""Ray's default share of a node's memory for its object store; actors have the rest."""
UNBOUNDED = 1_000_000
"""More actors than any cluster holds."""
ENOUGH = 1e15
"""Bytes that a node is assumed to have if its memory is not given."""


@dataclass(frozen=True)
class Cluster:
    """The resources of a cluster.

    Attributes:
        nodes: resources of each node.
        gpu_memory: bytes of one GPU; 0 if there is none, or if they are unknown.
    """

    nodes: tuple[Amounts, ...]
    gpu_memory: int


@dataclass(frozen=True)
class Plan:
    """What one method needs on one tier.

    Attributes:
        on_gpu: whether the method trains on a GPU.
        gpu: share of a GPU's memory that an actor needs, including CUDA's own memory (`CUDA_CONTEXT`); 0 on a CPU. Of
            what remains where another process holds weights for all actors.
        host: bytes of host memory that an actor needs, including its process (`PROCESS`), beyond what the actors of a
            node share.
        held_once: bytes of the weights that another process holds for all actors of a GPU.
    """

    method: str
    tier: str
    cost: Cost
    footprint: Footprint
    on_gpu: bool
    gpu: float
    host: int
    held_once: int = 0


@dataclass(frozen=True)
class Room:
    """How many actors of one tier fit, for the method that needs the most.

    Attributes:
        request: what each actor (each worker of a silo) requests from Ray; memory in bytes.
        alone: how many actors the cluster holds if there is no other tier.
        together: how many actors it holds if all tiers share it in proportion to their clients.
    """

    tier: str
    request: Amounts
    alone: int
    together: int


def plans(config: Config, found: Mapping[str, Mapping[str, tuple[Cost, Footprint]]], cluster: Cluster) -> list[Plan]:
    """Return what each method needs on each tier.

    Args:
        found: costs and footprints by method and tier.

    Raises:
        ConfigError: a tier trains on GPUs, and the memory of a GPU is unknown.
    """
    made = []
    for method, by_tier in found.items():
        held = {
            tier: footprint.held_once
            for tier, (_, footprint) in by_tier.items()
            if footprint.held_once and _on_gpu(config, tier, cluster) and _on_a_part(config, tier)
        }
        room = cluster.gpu_memory - _holders(config, held)
        for tier, (cost, footprint) in by_tier.items():
            on_gpu = _on_gpu(config, tier, cluster)
            if on_gpu and not cluster.gpu_memory:
                raise ConfigError(
                    f"tier {tier!r} trains on a GPU, whose memory is not known; specify it: --gpu-memory 24GB"
                )
            once = held.get(tier, 0)
            needed = (footprint.device.total - once + CUDA_CONTEXT) / max(room, 1) if on_gpu else 0.0
            gpu = math.ceil(UNIT * needed) / UNIT
            host = PROCESS + footprint.private(on_gpu)
            made.append(Plan(method, tier, cost, footprint, on_gpu, gpu, host, once))
    return made


def _on_a_part(config: Config, tier: str) -> bool:
    """Return whether an actor of the tier may have a part of a GPU, beside others; it has a whole one only if it asks
    for that."""
    asked = config.clients.tier(tier).num_gpus
    return asked is None or asked < 1


def _holders(config: Config, held: Mapping[str, int]) -> int:
    """Return the bytes of a GPU for the processes that hold weights: one for each precision, as if all tiers were on
    it."""
    by_precision = {config.clients.tier(tier).precision or config.model.dtype: size for tier, size in held.items()}
    return sum(size + CUDA_CONTEXT for size in by_precision.values())


def rooms(clients: ClientsConfig, made: Sequence[Plan], nodes: Sequence[Amounts]) -> list[Room]:
    """Return how many actors of each tier fit by CPUs, GPUs and memory, for every method.

    A tier that needs more than the memory of one GPU does not fit: an actor is one process on one GPU. Nodes without
    given memory have enough.
    """
    tiers = list(dict.fromkeys(plan.tier for plan in made))
    requested = requests(clients, tiers, nodes)
    for plan in made:
        amounts = requested[plan.tier]
        amounts["GPU"] = max(amounts["GPU"], plan.gpu)
        amounts["memory"] = max(amounts["memory"], float(plan.host))
    shared = max(0 if plan.on_gpu else plan.footprint.shared for plan in made)
    left = [{**node, "memory": max(node.get("memory", ENOUGH) - shared, 0.0)} for node in nodes]
    too_large = {plan.tier for plan in made if plan.gpu > 1}
    workers = {name: clients.tier(name).workers for name in tiers}
    together = dict.fromkeys(tiers, 0)
    if not too_large and fit_together(requested, left, workers):
        together = allot(requested, _clients(clients, tiers), dict.fromkeys(tiers), left, workers=workers)
    alone = {name: 0 if name in too_large else _alone(name, requested, left, workers) for name in tiers}
    return [Room(name, requested[name], alone[name], together[name]) for name in tiers]


def this_machine() -> Cluster:
    """Return this machine as a cluster of one node, with its memory as Ray counts it: without the object store."""
    gpus = torch.cuda.device_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * (1 - OBJECT_STORE)
    node = {"CPU": float(os.cpu_count() or 1), "GPU": float(gpus), "memory": memory}
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(gpus)]
    return Cluster((node,), min(sizes, default=0))


def check_device(config: Config, nodes: Sequence[Amounts], elastic: bool) -> None:
    """Check that the nodes have the GPUs that `device: cuda` asks for.

    Args:
        nodes: resources of each node.
        elastic: whether an autoscaler can add nodes.

    Raises:
        ConfigError: no node has a GPU, and none can be added.
    """
    if config.device == "cuda" and not elastic and not any(node.get("GPU", 0) > 0 for node in nodes):
        raise ConfigError(
            "device: cuda, but no node of the cluster has a GPU; use device: auto or cpu, or a cluster with GPUs "
            "(RAY_ADDRESS)"
        )


def parse_node(text: str) -> Amounts:
    """Parse `CPU=16,GPU=4,memory=64GB`; other names are further Ray resources.

    Raises:
        ConfigError: the text has another form, or no CPU.
    """
    amounts: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        try:
            amounts[name] = float(parse_bytes(value)) if name == "memory" else float(value)
        except (ValueError, ConfigError):
            equals = ""
        if not name or not equals or not 0 <= amounts[name] < float("inf"):
            raise ConfigError(f"--node {text!r}: expected for example CPU=16,GPU=4,memory=64GB; cannot read {part!r}")
    if not amounts.get("CPU"):
        raise ConfigError(f"--node {text!r}: client actors need CPUs; say how many, for example CPU=16,GPU=4")
    return amounts


def parse_bytes(text: str) -> int:
    """Parse `24GB`, `24GiB` or a plain number of bytes.

    Raises:
        ConfigError: the text has another form, or the size is not positive.
    """
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size <= 0:
        raise ConfigError(f"{text!r} is not an amount of memory; expected for example 24GB")
    return size


def _on_gpu(config: Config, tier: str, cluster: Cluster) -> bool:
    """Return whether an actor of the tier will train on a GPU, as `resolve_device` will decide in the worker."""
    if config.device != "auto":
        return config.device == "cuda"
    there = cluster.gpu_memory > 0 or any(node.get("GPU", 0) > 0 for node in cluster.nodes)
    return there and config.clients.tier(tier).num_gpus != 0


def _clients(clients: ClientsConfig, tiers: Sequence[str]) -> dict[str, int]:
    """Return how many clients each tier would have out of a million, so that the cohort does not limit the actors."""
    listed = clients.count or sum(len(clients.tier(name).clients) for name in tiers)
    shares = {name: clients.tier(name).share or len(clients.tier(name).clients) / listed for name in tiers}
    return {name: max(1, int(UNBOUNDED * share)) for name, share in shares.items()}


def _alone(tier: str, requested: Mapping[str, Amounts], nodes: Sequence[Amounts], workers: Mapping[str, int]) -> int:
    only = {tier: requested[tier]}
    if not fit_together(only, nodes, workers):
        return 0
    return allot(only, {tier: UNBOUNDED}, {tier: None}, nodes, workers=workers)[tier]
