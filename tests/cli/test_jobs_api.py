"""What is said of a cluster's dashboard before any job is sent: a small HTTP server answers as Ray's would."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from zipfile import ZipFile

import pytest

from fedray.cli.jobs_api import connect, packed, stop
from fedray.errors import ConfigError, FedrayError
from fedray.storage.paths import resolve_storage


@contextmanager
def dashboard(answer: Callable[[str], tuple[int, object]]) -> Iterator[str]:
    """answer: path -> (status, what is sent: text, or JSON)."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            status, sent = answer(self.path)
            body = sent.encode() if isinstance(sent, str) else json.dumps(sent).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _answer

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("version", ["2.9.0", "2.59.1", "3.0.0"])
def test_another_generation_of_ray_is_refused(version: str) -> None:
    message = f"runs Ray {version}; this fedray needs 2.60 or newer, below 3"
    with dashboard(lambda path: (200, {"ray_version": version})) as address, pytest.raises(ConfigError, match=message):
        connect(address)


def test_a_fitting_one_is_accepted_whatever_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    with dashboard(lambda path: (200, {"ray_version": "2.61.0"})) as address:
        assert connect(address).get_address() == f"http://{address}"
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (401, "Unauthorized: Missing authentication token", "asks for a token: give the cluster's token in RAY_AUTH"),
        (403, "Forbidden: Invalid authentication token", "asks for another token: give the cluster's token"),
    ],
)
def test_tokens(status: int, text: str, message: str) -> None:
    with dashboard(lambda path: (status, text)) as address, pytest.raises(ConfigError, match=message):
        connect(address)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "http://127.0.0.1:9", "head:abc", "http://head:99999"])
def test_nobody_there(address: str) -> None:
    with pytest.raises(ConfigError, match=r"no Ray cluster at http://.*; is it running"):
        connect(address)


def test_a_job_that_does_not_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedray.cli.jobs_api.STOP_S", 0.1)
    info = {"type": "SUBMISSION", "status": "RUNNING", "entrypoint": "x", "submission_id": "j"}
    replies = {"/api/version": {"ray_version": "2.60.0"}, "/api/jobs/j": info, "/api/jobs/j/stop": {"stopped": True}}
    with dashboard(lambda path: (200, replies[path])) as address, pytest.raises(FedrayError, match="still runs after"):
        stop(connect(address), "j")


def test_what_is_packed(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (project / "config.yaml").write_text("rounds: 1\n")
    (project / "data" / "large.bin").write_bytes(b"x")
    (project / ".gitignore").write_text("*.bin\n")
    with ZipFile(packed(project, tmp_path, "config.yaml")) as opened:
        assert "config.yaml" in opened.namelist()
        assert not [name for name in opened.namelist() if name.endswith(".bin")]
    with pytest.raises(ConfigError, match=r"data/large.bin: is not sent with the job"):
        packed(project, tmp_path, "data/large.bin")


def test_where_the_results_of_a_job_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not into its own folder, which is deleted."""
    monkeypatch.delenv("FEDRAY_STORAGE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert resolve_storage("runs/a") == str(tmp_path / "runs/a")
    job = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    assert resolve_storage("runs/a") == str(Path.home() / "runs/a")
    assert resolve_storage("/mnt/runs/a") == "/mnt/runs/a"
    assert resolve_storage("s3://bucket/runs/a") == "s3://bucket/runs/a"
    monkeypatch.setenv("FEDRAY_STORAGE", "/mnt/shared/")
    assert resolve_storage("runs/a") == "/mnt/shared/runs/a"
    monkeypatch.setenv("FEDRAY_STORAGE", "s3://bucket/x")
    assert resolve_storage("runs/a") == "s3://bucket/x/runs/a"
    monkeypatch.setenv("FEDRAY_STORAGE", "shared")
    with pytest.raises(ConfigError, match="FEDRAY_STORAGE: 'shared' is relative"):
        resolve_storage("runs/a")
