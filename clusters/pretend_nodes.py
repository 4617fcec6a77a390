"""Ray's simulated nodes, each with its own folder for the working directories of jobs.

Ray unpacks a job's working directory once per node and deletes the previous one. If the nodes of one machine shared a
folder, each would delete the directory that the processes of the others use.
"""

from typing import Any

from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

SHARED = ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME


class PretendNodes(FakeMultiNodeProvider):
    """Simulated nodes, which are processes of this machine."""

    _made = 0

    def _create_node_with_resources_and_labels(self, *args: Any, **options: Any) -> Any:
        with self.lock:
            PretendNodes._made += 1
            ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = f"{SHARED}-{PretendNodes._made}"
            try:
                return super()._create_node_with_resources_and_labels(*args, **options)
            finally:
                ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = SHARED
