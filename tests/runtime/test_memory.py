"""What actors on real local Ray say of their memory, and what a running cluster has."""

from types import SimpleNamespace

import pytest
import ray
import torch

from fedray.runtime.client_actor import ClientActor
from fedray.runtime.driver import running_cluster


def test_a_running_cluster(cluster: None) -> None:
    """Its two GPUs are only in Ray's books: nobody knows their memory."""
    found = running_cluster()
    (node,) = found.nodes
    assert (node["CPU"], node["GPU"], found.gpu_memory) == (2, 2, 0)
    assert node["memory"] > 1e8
    assert ray.is_initialized()  # not ours to end


def test_an_actor_is_held_to_its_part_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The actor's class itself, with a pretended GPU of 12 GB, of which CUDA takes 0.6."""
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=12 * 10**9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    actor = ClientActor.__ray_metadata__.modified_class  # type: ignore[attr-defined]
    actor(0.25)
    actor(1)
    assert fractions == [pytest.approx(0.2)]
