"""Jobs on a real cluster with its dashboard and token, in processes of its own: the local autoscaling simulation."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from tiny import tiny_bert

from fedray.results.run_result import RunResult
from fedray.sweeps.result import SweepResult

ROOT = Path(__file__).parents[2]
PORT, DASHBOARD = 6411, 8291
ADDRESS = f"http://127.0.0.1:{DASHBOARD}"
TIERS = {
    "phone": {"share": 0.4, "num_cpus": 0.5, "num_gpus": 0.5, "resources": {"phone": 0.5}, "lora_rank": 2},
    "laptop": {"share": 0.3, "num_cpus": 0.5, "num_gpus": 0.5, "resources": {"phone": 0.5}},
    "workstation": {"share": 0.3, "num_cpus": 1, "num_gpus": 0.5, "resources": {"workstation": 0.5}},
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """As of a terminal that knows no cluster: only what this module's own one needs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "FEDRAY_LOCAL_CLUSTER": f"/tmp/fedray-as-{os.getpid()}", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def head(environment: dict[str, str], own_cluster: None) -> Iterator[None]:
    """`python clusters/local.py up` and `down`."""
    script = [sys.executable, str(ROOT / "clusters" / "local.py")]
    options = ["--port", str(PORT), "--dashboard-port", str(DASHBOARD)]
    subprocess.run([*script, "up", *options], env=environment, check=True, timeout=150)
    yield
    subprocess.run([*script, "down"], env=environment, check=True, timeout=60)
    folder = environment["FEDRAY_LOCAL_CLUSTER"]
    assert not [one for one in psutil.process_iter(["cmdline"]) if folder in " ".join(one.info["cmdline"] or ())]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A working directory with a federation of three tiers."""
    folder = tmp_path / "project"
    folder.mkdir()
    config = {
        "name": "three-tiers",
        "rounds": 3,
        "method": "fedavg",
        "model": tiny_bert(),
        "data": {"source": "synthetic", "examples_per_client": 40, "max_length": 24, "cache_dir": str(tmp_path / "c")},
        "partition": {"kind": "by_file"},
        "clients": {"count": 10, "tiers": TIERS},
        "lora": {"rank": 4},
        "storage_path": str(tmp_path / "runs"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def fedray(environment: dict[str, str], project: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def call(*words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fedray", *words]
        return subprocess.run(
            command, cwd=project, env=environment | changes, capture_output=True, text=True, timeout=400
        )

    return call


def living() -> list[dict[str, float]]:
    """Return the pretend nodes' resources."""
    command = "import json, ray; ray.init(log_to_driver=False)\n"
    command += "print(json.dumps([node['Resources'] for node in ray.nodes() if node['Alive']]))"
    found = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, "RAY_ADDRESS": f"127.0.0.1:{PORT}", "RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    nodes: list[dict[str, float]] = json.loads(found.stdout.strip().splitlines()[-1])
    return nodes


def raylets(folder: str, resource: str) -> list[psutil.Process]:
    """Return the pretend nodes of a type: processes that Ray's books give that resource."""
    return [
        one
        for one in psutil.process_iter(["cmdline"])
        if "raylet/raylet" in " ".join(one.info["cmdline"] or ())
        and folder in " ".join(one.info["cmdline"])
        and resource in " ".join(one.info["cmdline"])
    ]


def test_nodes_come_and_go(
    head: None,
    fedray: Callable[..., subprocess.CompletedProcess[str]],
    environment: dict[str, str],
    project: Path,
    tmp_path: Path,
) -> None:
    """A job whose tiers ask for GPUs that the head has not: their nodes come, one that dies on the way costs nothing
    but time, and in the end the head is alone."""
    assert len(living()) == 1
    out = str(tmp_path / "out")
    watched = subprocess.Popen(
        [sys.executable, "-m", "fedray", "submit", "config.yaml", "rounds=8", "--address", ADDRESS, "--output", out],
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    rounds = Path(out) / "rounds.parquet"
    until = time.monotonic() + 300
    while not rounds.exists() and time.monotonic() < until and watched.poll() is None:
        time.sleep(0.5)
    assert rounds.exists(), watched.communicate(timeout=5)[0]
    kinds = {name for node in living() for name in ("phone", "workstation") if node.get(name)}
    assert kinds == {"phone", "workstation"}
    for process in raylets(environment["FEDRAY_LOCAL_CLUSTER"], "workstation"):
        process.kill()
    text = watched.communicate(timeout=400)[0]
    assert watched.returncode == 0, text
    assert "results:" in text
    found = RunResult.load(out)
    assert found.rounds().query("phase == 'train'").clients.tolist() == [10] * 8
    until = time.monotonic() + 120
    while len(living()) > 1 and time.monotonic() < until:
        time.sleep(2)
    assert len(living()) == 1


def orphans(folder: str) -> list[psutil.Process]:
    """Return the client actors of this module's cluster: their working directory is below its folder."""
    found = []
    for one in psutil.process_iter(["cmdline", "cwd"]):
        if "ray::ClientActor" in " ".join(one.info["cmdline"] or ()) and folder in (one.info["cwd"] or ""):
            found.append(one)
    return found


def test_a_job_that_is_stopped_is_continued(
    head: None,
    fedray: Callable[..., subprocess.CompletedProcess[str]],
    environment: dict[str, str],
    project: Path,
    tmp_path: Path,
) -> None:
    small = ["clients.tiers={}", "clients.num_cpus=0.5", "clients.num_gpus=0.5", "clients.actors=1", "rounds=200"]
    begun = fedray("submit", "config.yaml", *small, "--address", ADDRESS, "--output", str(tmp_path / "o"), "--no-wait")
    assert begun.returncode == 0, begun.stderr
    (id,) = re.findall(r"job (\S+);", begun.stdout)
    until = time.monotonic() + 200
    while not (tmp_path / "o" / "rounds.parquet").exists() and time.monotonic() < until:
        time.sleep(0.5)
    assert orphans(environment["FEDRAY_LOCAL_CLUSTER"]), "they can be seen"
    listed = fedray("jobs", "list", "--address", ADDRESS)
    assert id in listed.stdout
    assert "running" in listed.stdout
    stopped = fedray("jobs", "stop", id, "--address", ADDRESS)
    assert "stopped" in stopped.stdout, stopped.stderr
    assert "round 1" in fedray("jobs", "logs", id, "--address", ADDRESS).stdout
    assert not orphans(environment["FEDRAY_LOCAL_CLUSTER"])
    done = len(RunResult.load(tmp_path / "o").rounds())
    small[-1] = f"rounds={done + 2}"
    again = fedray("submit", "config.yaml", *small, "--address", ADDRESS, "--output", str(tmp_path / "o"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "continued after" in again.stdout
    assert len(RunResult.load(tmp_path / "o").rounds().query("phase == 'train'")) == done + 2


def test_a_sweep_as_a_job(
    head: None, fedray: Callable[..., subprocess.CompletedProcess[str]], project: Path, tmp_path: Path
) -> None:
    space = {"seed": [0, 1], "rounds": [1], "method": ["fedavg", "local"]}
    (project / "sweep.yaml").write_text(yaml.safe_dump({"base": "config.yaml", "space": space}))
    ended = fedray("submit", "sweep.yaml", "--address", ADDRESS, "--output", str(tmp_path / "s"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = SweepResult.load(tmp_path / "s")
    assert found.to_pandas().status.tolist() == ["finished"] * 4
    assert "4/4" in ended.stdout


def test_a_job_that_fails_gives_its_exit_code(
    head: None, fedray: Callable[..., subprocess.CompletedProcess[str]], project: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    ended = fedray("submit", "config.yaml", "--address", ADDRESS, "--output", str(tmp_path / "taken"))
    assert ended.returncode == 2
    assert "exists and is not empty" in ended.stdout
    tiers = "clients.tiers={huge: {share: 1, num_gpus: 8}}"
    ended = fedray("submit", "config.yaml", tiers, "--address", ADDRESS, "--output", str(tmp_path / "huge"))
    assert ended.returncode == 2
    assert "autoscaler has no type of node for it" in ended.stdout


def test_rays_own_command(head: None, environment: dict[str, str], tmp_path: Path) -> None:
    """`ray job submit --working-dir . -- python jobs/train.py CONFIG`, in this repository."""
    job = ["python", "jobs/train.py", "jobs/autoscaling.yaml", "rounds=1", "method=fedavg", f"storage_path={tmp_path}"]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", ADDRESS, "--working-dir", "."]
    ended = subprocess.run(
        [*ray, "--", *job], cwd=ROOT, env=environment | {"RAY_AUTH_MODE": "token"}, capture_output=True, timeout=400
    )
    assert ended.returncode == 0, ended.stdout
    (run,) = tmp_path.iterdir()
    assert RunResult.load(run)["fedavg"].rounds == 1


def test_what_is_refused_before_a_job_starts(
    head: None, fedray: Callable[..., subprocess.CompletedProcess[str]], project: Path, tmp_path: Path
) -> None:
    def refused(*words: str, **changes: str) -> str:
        ended = fedray(*words, **changes)
        assert ended.returncode == 2, ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr
        return ended.stderr

    assert "unknown key" in refused("submit", "config.yaml", "traim.lr=1", "--address", ADDRESS)
    assert "no Ray cluster at http://127.0.0.1:9" in refused("submit", "config.yaml", "--address", "127.0.0.1:9")
    wrong = refused("submit", "config.yaml", "--address", ADDRESS, RAY_AUTH_TOKEN="f" * 32, RAY_AUTH_MODE="token")
    assert "asks for another token" in wrong
    assert "RAY_AUTH_TOKEN_PATH" in wrong
    missing = refused("jobs", "list", "--address", ADDRESS, RAY_AUTH_MODE="disabled")
    assert "asks for a token" in missing
    assert "no job 'nobody'" in refused("jobs", "stop", "nobody", "--address", ADDRESS)
    assert "no job 'nobody'" in refused("jobs", "logs", "nobody", "--address", ADDRESS)
    assert (
        "outside of the working directory"
        in refused("submit", "config.yaml", "--working-dir", str(tmp_path / "c"), "--address", ADDRESS)
        or not (tmp_path / "c").exists()
    )
    (project / "weights.bin").write_bytes(os.urandom(257_000_000))
    large = refused("submit", "config.yaml", "--address", ADDRESS)
    assert re.search(r"257\.\d MB when packed, at most 256\.0 MB", large)
    assert "weights.bin" in large
    (project / ".gitignore").write_text("*.bin\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("x")
    ended = fedray("submit", "config.yaml", "--address", ADDRESS, "--output", str(tmp_path / "taken"))
    assert "exists and is not empty" in ended.stdout, "the job started, without the large file"
    (project / ".gitignore").write_text("*.bin\nconfig.yaml\n")
    assert "is not sent with the job" in refused("submit", "config.yaml", "--address", ADDRESS)
    assert "no Ray cluster at http://head:abc" in refused("jobs", "list", "--address", "head:abc")
