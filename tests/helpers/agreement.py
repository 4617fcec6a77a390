"""Compares what clients bring when they are trained one by one and in one step."""

import numpy as np
import pytest


def together(worker, tasks):
    return list(worker.train_together(tasks))


def numbers(value):
    """Every number in a payload, state or report, in order."""
    if hasattr(value, "__dataclass_fields__"):
        return [n for name in value.__dataclass_fields__ for n in numbers(getattr(value, name))]
    if isinstance(value, dict):
        return [n for key in sorted(value) for n in numbers(value[key])]
    if isinstance(value, list | tuple):
        return [n for item in value for n in numbers(item)]
    if isinstance(value, np.ndarray):
        return [value.reshape(-1)]
    return []


def distance(a, b):
    """‖a − b‖ / ‖b‖ over all arrays of two payloads."""
    left, right = (np.concatenate([*numbers(one), np.zeros(1)]).astype(np.float64) for one in (a, b))
    assert left.shape == right.shape
    return np.linalg.norm(left - right) / max(np.linalg.norm(right), 1e-30)


def of_workers(caplog):
    return [record for record in caplog.records if record.name == "fedray.federation.worker"]


def agree(fused, alone):
    for result, expected in zip(fused, alone, strict=True):
        assert result.client == expected.client
        assert result.num_examples == expected.num_examples
        assert distance(result.adapter, expected.adapter) < 1e-5
        assert distance(result.payload, expected.payload) < 1e-5
        assert distance(result.state, expected.state) < 1e-5
        assert (result.uplink_bytes, result.downlink_bytes) == (expected.uplink_bytes, expected.downlink_bytes)
        report, wanted = result.report, expected.report
        assert report.steps == wanted.steps
        assert report.train_loss == pytest.approx(wanted.train_loss, rel=1e-5)
        assert report.seconds > 0
        measurements, others = (
            {(moment, name): one for moment, by in each.evaluations.items() for name, one in by.items()}
            for each in (report, wanted)
        )
        assert measurements.keys() == others.keys()
        for key, measured in measurements.items():
            same = others[key]
            assert measured.loss == pytest.approx(same.loss, rel=1e-5)
            assert measured.metric == pytest.approx(same.metric, rel=1e-5)
            assert measured.num_examples == same.num_examples
        assert report.recorded.keys() == wanted.recorded.keys()
        for name, value in wanted.recorded.items():
            assert report.recorded[name] == pytest.approx(value, rel=1e-5)
