"""RAY_ADDRESS is checked before Ray connects: small servers answer as a head would, or as something else."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from typer.testing import CliRunner

import fedray
from fedray.cli.app import app
from fedray.errors import ConfigError
from fedray.runtime import address
from fedray.runtime.address import check_address


class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):  # type: ignore[misc]
    """Answers for a cluster without nodes, to those who have its token."""

    def __init__(self, token: str | None):
        self._token = token

    def GetAllNodeInfo(self, request: Any, context: grpc.ServicerContext) -> Any:
        given = dict(context.invocation_metadata()).get("authorization")
        if self._token is not None and given != f"Bearer {self._token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Authentication token is missing or incorrect")
        return gcs_service_pb2.GetAllNodeInfoReply()


@contextmanager
def head(token: str | None = None) -> Iterator[str]:
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Head(token), server)
        port = server.add_insecure_port("0.0.0.0:0")  # Ray replaces 127.0.0.1 by the machine's own address
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def closed_port() -> str:
    with socket.create_server(("0.0.0.0", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def message_for(given: str, monkeypatch: pytest.MonkeyPatch, setting: str = "RAY_ADDRESS") -> str:
    monkeypatch.setenv(setting, given)
    with pytest.raises(ConfigError) as raised:
        check_address(setting)
    return str(raised.value)


def test_a_cluster_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with head() as where:
        monkeypatch.setenv("RAY_ADDRESS", where)
        check_address()


@pytest.mark.parametrize("setting", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_nothing_listens(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    where = closed_port()
    message = message_for(where, monkeypatch, setting)
    assert message.startswith(f"{setting}: the Ray cluster at {where} does not answer (Connection refused); correct")
    assert "unset" in message


def test_something_else_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("0.0.0.0", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert "not the head; the dashboard, for example" in message_for(f"127.0.0.1:{server.server_port}", monkeypatch)
    finally:
        server.shutdown()
        server.server_close()


def test_what_listens_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "ANSWER_S", 0.5)
    with socket.create_server(("0.0.0.0", 0)) as server:
        assert "does not answer (" in message_for(f"127.0.0.1:{server.getsockname()[1]}", monkeypatch)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ray://head:10001", "is Ray Client, over which results cannot be streamed; run on a machine of the cluster"),
        ("http://head:8265", "is the address of a dashboard; run on a machine"),
        ("head", "RAY_ADDRESS: 'head' is not an address, as in HEAD:6379"),
    ],
)
def test_forms_that_do_not_work(monkeypatch: pytest.MonkeyPatch, given: str, message: str) -> None:
    assert message in message_for(given, monkeypatch)


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """A process without a token, and Ray's copies of its settings as they were afterwards."""
    from ray._raylet import AuthenticationTokenLoader, Config

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        patch.setenv("RAY_AUTH_MODE", "")  # restored afterwards, whatever the test sets
        patch.delenv("RAY_AUTH_MODE")
        patch.delenv("RAY_AUTH_TOKEN", raising=False)
        patch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
        AuthenticationTokenLoader.instance().reset_cache()
        Config.initialize("")
        yield patch
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")


def test_tokens(no_token: pytest.MonkeyPatch) -> None:
    from ray._raylet import AuthenticationTokenLoader

    right = "0123456789abcdef0123456789abcdef"
    with head(right) as where:
        assert "asks for a token: give the cluster's token in RAY_AUTH_TOKEN" in message_for(where, no_token)
        no_token.setenv("RAY_AUTH_TOKEN", right[::-1])
        AuthenticationTokenLoader.instance().reset_cache()
        assert "asks for another token: give the cluster's" in message_for(where, no_token)
        no_token.setenv("RAY_AUTH_TOKEN", right)
        AuthenticationTokenLoader.instance().reset_cache()
        check_address()


@pytest.mark.parametrize("command", ["run", "validate", "plan", "sweep", "submit", "jobs"])
def test_every_command_says_so(
    monkeypatch: pytest.MonkeyPatch, smallest: dict[str, Any], tmp_path: Path, command: str
) -> None:
    """Before it reads any data, where these are read at all, and without a folder of results."""
    import yaml

    file, where = tmp_path / "config.yaml", closed_port()
    config = {**smallest, "runtime": "ray", "storage_path": str(tmp_path / "runs")}
    file.write_text(yaml.safe_dump({"base": config, "space": {"seed": [0, 1]}} if command == "sweep" else config))
    monkeypatch.setenv("RAY_ADDRESS", where)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # another test's cluster
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    arguments = ["list"] if command == "jobs" else [str(file)]
    arguments += ["--working-dir", str(tmp_path)] if command == "submit" else []
    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code == 2, result.output
    assert f"error: RAY_ADDRESS: the Ray cluster at {where} does not answer" in result.stderr
    assert not list(tmp_path.glob("runs/*")), "a folder of results is left"


def test_an_experiment_of_this_process_does_not_ask(
    monkeypatch: pytest.MonkeyPatch, smallest: dict[str, Any], tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", closed_port())
    fedray.run(smallest, rounds=1, output=tmp_path / "run")
