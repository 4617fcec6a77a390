"""Examples and commands of docs/python.md and docs/clusters.md run as they stand; tests/docs has tests of all pages."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedray.sweeps.result import SweepResult

ROOT = Path(__file__).parents[2]
CLUSTERS = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """Return the lines of a page's shell examples, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.slow
def test_the_examples_of_the_python_page(own_cluster: None, tmp_path: Path) -> None:
    """In a process and a folder of their own: they start Ray, write below `runs`, and write a method's file."""
    # transformers imports DeepSpeed when it saves a model, which otherwise prints that it found no GPU.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "doctest", str(ROOT / "docs" / "python.md")]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert SweepResult.load(tmp_path / "runs" / "sweep").complete, "they ran, and not only passed"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_way_to_a_cluster(own_cluster: None) -> None:
    """From the start of the local cluster over a federation and a sweep to its end, as in docs/clusters.md."""
    section = CLUSTERS.split("## Try it on one machine")[1].split("\n## ")[0]
    lines = [line.replace(".venv/bin/", f"{Path(sys.executable).parent}/") for line in commands(section)]
    assert "local.py up" in lines[0]
    assert "local.py down" in lines[-1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {"FEDRAY_LOCAL_CLUSTER": f"/tmp/fedray-readme-{os.getpid()}"}
    try:
        for line in lines[:-1]:
            ended = subprocess.run(
                shlex.split(line), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
            )
            assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"
    finally:
        subprocess.run(shlex.split(lines[-1]), cwd=ROOT, env=environment, check=True, timeout=100)
