"""Ctrl-C while Ray starts: it ends the run once Ray has started, and nothing is left."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from interruptible import start_run

from fedray.runtime.session import _uninterrupted


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    reached = []

    def block() -> None:
        with _uninterrupted():
            signal.raise_signal(signal.SIGINT)
            reached.append("end")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for `&`
    try:
        with pytest.raises(KeyboardInterrupt):
            block()
        assert reached == ["end"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_of_the_users_own_is_called_and_an_ignored_signal_stays_ignored() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: calls.append(number))
    try:
        with _uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert calls == []
        assert calls == [signal.SIGINT]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with _uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_of_sigterm_waits_too_and_outlives_rays() -> None:
    calls: list[int] = []

    def mine(number: int, _: object) -> None:
        calls.append(number)

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with _uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            assert calls == []
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as `ray.init` sets one of its own
        assert calls == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_while_ray_starts(tiny: dict[str, Any], own_cluster: None, tmp_path: Path) -> None:
    file, run = tmp_path / "config.json", tmp_path / "run"
    file.write_text(json.dumps(tiny))
    process = start_run(file, run)
    family: set[psutil.Process] = set()
    while not any("gcs_server" in " ".join(one.cmdline()[:1]) for one in family if one.is_running()):
        assert process.poll() is None
        family |= set(psutil.Process(process.pid).children(recursive=True))
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    while process.poll() is None:
        try:
            family |= set(psutil.Process(process.pid).children(recursive=True))
        except psutil.Error:
            break
        time.sleep(0.02)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert b"interrupted" in told
    assert not run.exists(), "nothing was trained"
    deadline = time.monotonic() + 20
    while (left := [one for one in family if one.is_running()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
