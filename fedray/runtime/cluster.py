"""The resources that a Ray cluster has and can get, and whether the client actors of an experiment could ever start."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray._private.worker
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.core.generated import autoscaler_pb2
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedray.errors import ConfigError
from fedray.planning.placement import Amounts, fit_together, fits


def living() -> list[dict[str, Any]]:
    """Return what Ray reports of each living node."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def living_nodes() -> list[dict[str, float]]:
    """Return the total resources of each living node."""
    return [node["Resources"] for node in living()]


def on_callers_node() -> dict[str, Any]:
    """Return the options of an actor that runs on its caller's node, and so ends with its caller and not with another
    node.

    Ray lets any node decide where an actor without resource requests runs, and a node that has just joined does not
    know the others yet. An actor with a request, even for one byte, is placed by its caller's node.
    """
    here = ray.get_runtime_context().get_node_id()
    return {"memory": 1, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=True)}


def has_autoscaler() -> bool:
    """Return whether an autoscaler adds nodes on request.

    Ray's first autoscaler reports even if it can add nothing, and then calls the type of each node `node_ID`.
    """
    if _autoscaling_state().autoscaler_state_version > 0:
        return True
    report = _internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode())
    status = json.loads(report) if report else {}
    types = status.get("autoscaler_report", {}).get("active_nodes", {})  # missing until the autoscaler's first update
    return any(not kind.startswith("node_") for kind in types)


def infeasible(resources: Amounts) -> bool:
    """Return whether the autoscaler has reported that it has no type of node for a pending actor of these resources."""
    wanted = {name: amount for name, amount in resources.items() if amount}
    return any(dict(one.resources_bundle) == wanted for one in _autoscaling_state().infeasible_resource_requests)


def _autoscaling_state() -> Any:
    worker: Any = ray._private.worker.global_worker
    messages: Any = autoscaler_pb2
    reply = messages.GetClusterStatusReply()
    reply.ParseFromString(worker.gcs_client.get_cluster_status())
    return reply.autoscaling_state


def check_room(requested: Mapping[str, Amounts], nodes: Sequence[Amounts], workers: Mapping[str, int]) -> None:
    """Check that every actor could start, on a cluster without an autoscaler.

    Raises:
        ConfigError: an actor fits on no node, or the cluster has no room for one actor of every tier at a time.
    """
    for tier, amounts in requested.items():
        if not any(fits(amounts, node) for node in nodes):
            raise ConfigError(
                f"clients: an actor of tier {tier!r} fits on no node: it asks for {readable(amounts)}; the cluster's "
                f"nodes have {'; '.join(sorted({readable(node) for node in nodes}))}"
            )
    if not fit_together(requested, nodes, workers):
        times = {tier: f"{number} workers of " if number > 1 else "" for tier, number in workers.items()}
        wanted = "; ".join(f"{tier}: {times[tier]}{readable(amounts)}" for tier, amounts in requested.items())
        raise ConfigError(
            f"clients.tiers: the cluster has no room for one actor of every tier at a time ({wanted}): it has "
            f"{readable(total_of(nodes))}; lower num_cpus or num_gpus (they may be fractions)"
        )


def total_of(nodes: Sequence[Amounts]) -> Amounts:
    """Return the sum of the nodes' resources."""
    total: Counter[str] = Counter()
    for node in nodes:
        total.update(node)
    return total


def readable(amounts: Amounts) -> str:
    """Return resources as text, for example `2 CPU, 0.5 GPU`; Ray's own bookkeeping resources are left out."""
    names = [name for name in ("CPU", "GPU", *sorted(amounts)) if amounts.get(name)]
    shown = {name: f"{amounts[name]:g} {name}" for name in names if ":" not in name and "store" not in name}
    if "memory" in shown:
        shown["memory"] = f"{amounts['memory'] / 1e9:.3g} GB memory"
    return ", ".join(shown.values()) or "nothing"
