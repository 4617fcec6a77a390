"""An experiment on a cluster of three nodes, one of which disappears in the middle of a round. Run by test_machines.

python lost_node.py CONFIG OUTPUT
"""

import json
import sys

import ray
from calling import Calling
from ray.cluster_utils import Cluster

import fedray
from fedray.federation.events import Event, TasksFinished


def main(config: str, output: str) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100_000_000) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    # All nodes have one address: this process, and with it the driver, may be on any of them.
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in nodes if node.node_id != here]

    def on_event(event: Event) -> None:
        if isinstance(event, TasksFinished) and event.server_round == 1 and len(cluster.worker_nodes) == len(nodes):
            cluster.remove_node(others[0], allow_graceful=False)

    try:
        with open(config, encoding="utf-8") as file:
            fedray.run(json.load(file), output=output, callbacks=[Calling(on_event)])
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
