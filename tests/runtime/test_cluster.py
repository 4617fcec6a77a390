"""What is read of a cluster's state, as Ray writes it."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from fedray.runtime import cluster


@pytest.mark.parametrize(
    ("status", "found"),
    [
        (None, False),
        ({"load_metrics_report": {}, "time": 1.0}, False),  # the monitor has begun, and not looked around yet
        ({"autoscaler_report": {"active_nodes": {"node_1f": 1}}}, False),
        ({"autoscaler_report": {"active_nodes": {"node_1f": 1, "gpu_worker": 2}}}, True),
    ],
)
def test_rays_first_autoscaler(status: Any, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    report = None if status is None else json.dumps(status).encode()
    monkeypatch.setattr(cluster, "_autoscaling_state", lambda: SimpleNamespace(autoscaler_state_version=0))
    monkeypatch.setattr(cluster, "_internal_kv_get", lambda key: report)
    assert cluster.has_autoscaler() is found
