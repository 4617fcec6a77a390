"""How many of six actors that are put beside their caller are there, on a cluster whose nodes have only just joined.

Run by test_machines.
"""

import ray
from ray.cluster_utils import Cluster

from fedray.runtime.cluster import on_callers_node


@ray.remote(num_cpus=0)
class Placed:
    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000})
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        actors = [Placed.options(**on_callers_node()).remote() for _ in range(6)]
        print(ray.get([actor.node.remote() for actor in actors]).count(ray.get_runtime_context().get_node_id()))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
