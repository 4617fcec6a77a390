"""`fedray submit` and `fedray jobs`: experiments as jobs on a Ray cluster, through Ray's Jobs API."""

import asyncio
import logging
import os
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from zipfile import ZipFile

import requests
from aiohttp import ClientError
from ray._private.runtime_env import packaging
from ray.dashboard.modules import dashboard_sdk
from ray.dashboard.modules.job import sdk
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import fedray
from fedray.config import parse_yaml
from fedray.errors import ConfigError, FedrayError
from fedray.results.report import readable_bytes
from fedray.runtime.address import TOKEN_HELP, check_address, use_token
from fedray.storage.paths import timestamped

LARGEST_PACKAGE = 256_000_000
"""Most bytes of a zipped working directory. Ray keeps it in the head node's memory, and accepts at most twice this."""

REACH_S = 5.0
"""Seconds that a cluster may take to answer."""

READY_S = 60.0
"""Seconds that a cluster that answers may take to accept jobs."""

STOP_S = 30.0
"""Seconds that a job may take to stop."""

PORTS = {"http": 80, "https": 443, "ray": 10001}
"""The port of an address that names none, by scheme."""

OLDEST_RAY, TOO_NEW_RAY = (2, 60), (3,)
"""Supported versions of a cluster's Ray: from the first, below the second."""


def connect(address: str | None) -> JobSubmissionClient:
    """Return a client of a cluster's Jobs API.

    Args:
        address: `http://HEAD:8265` or `HEAD:8265`; default RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or the cluster that
            runs on this machine.

    Raises:
        ConfigError: there is no cluster, it requires another token, or its version of Ray is not supported.
    """
    # Ray's Jobs client sends a token only if RAY_AUTH_MODE says so; its other ways to connect search for one.
    for chatty in (dashboard_sdk, sdk, packaging):
        logging.getLogger(chatty.__name__).setLevel(logging.ERROR)
    use_token()
    if address and "://" not in address:
        address = f"http://{address}"
    setting = "RAY_API_SERVER_ADDRESS" if os.environ.get("RAY_API_SERVER_ADDRESS") else "RAY_ADDRESS"
    named = address or os.environ.get(setting, "")
    with _explained(named):
        if "://" in named:
            _check_port(named)
        else:
            check_address(setting)
        with _without("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if address else _without():
            client = JobSubmissionClient(address)
    theirs = str(client._server_ray_version)
    if not OLDEST_RAY <= tuple(int(number) for number in theirs.split(".")[:2]) < TOO_NEW_RAY:
        raise ConfigError(
            f"the cluster at {client.get_address()} runs Ray {theirs}; this fedray needs 2.60 or newer, below 3: start "
            "the cluster with the version that its file in clusters/ names"
        )
    return client


def submit(
    client: JobSubmissionClient,
    file: Path,
    overrides: Sequence[str] = (),
    *,
    working_dir: Path,
    place: str,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Submit an experiment or a sweep as a job, and return the job's id.

    The job gets this version of fedray and the working directory without what .gitignore and .rayignore exclude.

    Args:
        file: YAML file of the experiment or the sweep, inside the working directory.
        place: folder of the results; a relative path is below the cluster's FEDRAY_STORAGE
            (`storage.paths.resolve_storage`). If the folder has a run, the job continues it.
        environment: further environment variables of the job.

    Raises:
        ConfigError: the working directory does not exist or is too large, or the file is outside it.
        FedrayError: the cluster rejects the job.
    """
    if not working_dir.is_dir():
        raise ConfigError(f"working directory {working_dir}: is not a folder")
    try:
        inside = file.resolve().relative_to(working_dir.resolve())
    except ValueError:
        raise ConfigError(
            f"{file}: is outside the working directory {working_dir}, and the job gets nothing else; choose another "
            "one with --working-dir"
        ) from None
    command = "sweep" if is_sweep(file) else "run"
    words = ["python", "-m", "fedray", command, str(inside), *overrides, "--output", place, "--or-resume"]
    with _temporary_folder() as folder:
        package = packed(working_dir, Path(folder), str(inside))
        job: dict[str, Any] = {
            "entrypoint": shlex.join(words),
            "submission_id": timestamped(place.rstrip("/").rsplit("/", 1)[-1]),
            "runtime_env": {
                "working_dir": str(package),
                "py_modules": [str(Path(fedray.__file__).parent)],
                "env_vars": {"PYTHONUNBUFFERED": "1", **(environment or {})},
            },
            "metadata": {"fedray": fedray.__version__, "place": place},
        }
        with _explained(client.get_address()):
            return _sent(client, job)


@contextmanager
def _temporary_folder() -> Iterator[str]:
    """Yield a folder that is deleted afterwards.

    Raises:
        ConfigError: it cannot be created.
    """
    try:
        made = TemporaryDirectory()
    except OSError as error:
        raise ConfigError(f"no temporary folder can be created: {error}; name another one in TMPDIR") from None
    with made as folder:
        yield folder


def _sent(client: JobSubmissionClient, job: dict[str, Any]) -> str:
    """Submit a job and return its id. A cluster that has just started answers a little before it accepts jobs, so try
    again for a while."""
    until = time.monotonic() + READY_S
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(1.0)


def is_sweep(file: Path) -> bool:
    """Return whether a file describes a sweep and not an experiment.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        raw = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    return isinstance(raw, Mapping) and "space" in raw


def packed(working_dir: Path, folder: Path, needed: str) -> Path:
    """Zip the working directory into a file in `folder`, and return that file.

    Args:
        needed: path of a file that must be included, relative to the working directory.

    Raises:
        ConfigError: the working directory is too large (the message names the largest files) or cannot be read, or the
            needed file is excluded.
    """
    package = folder / "working_dir.zip"
    root = str(working_dir.resolve())
    try:
        packaging.create_package(root, package, include_gitignore=True, include_parent_dir=False, excludes=[".git"])
    except OSError as error:
        raise ConfigError(f"working directory {working_dir}: cannot be packed: {error}") from None
    with ZipFile(package) as opened:
        files = sorted(opened.infolist(), key=lambda info: -info.compress_size)
    if needed not in {info.filename for info in files}:
        raise ConfigError(f"{needed}: is not sent with the job: .gitignore or .rayignore excludes it; move the file")
    if (size := package.stat().st_size) > LARGEST_PACKAGE:
        names = "".join(f"\n  {readable_bytes(info.compress_size)}  {info.filename}" for info in files[:5])
        raise ConfigError(
            f"working directory {working_dir}: {readable_bytes(size)} when packed, at most "
            f"{readable_bytes(LARGEST_PACKAGE)}; exclude large files in .gitignore or .rayignore, put data on storage "
            f"that the cluster sees, or choose a smaller --working-dir. The largest files:{names}"
        )
    return package


def follow(client: JobSubmissionClient, id: str, show: Callable[[str], None]) -> int:
    """Show a job's log until the job ends; return its exit code, or 1 if it ended without one.

    Args:
        show: receives the log piece by piece.

    Raises:
        FedrayError: the cluster cannot be reached any more; the job may continue.
    """

    async def tail() -> None:
        async for piece in client.tail_job_logs(id):
            show(piece)

    try:
        asyncio.run(tail())
        while not (info := client.get_job_info(id)).status.is_terminal():
            time.sleep(0.2)
    except (OSError, RuntimeError, ClientError) as error:
        raise FedrayError(
            f"lost contact with the job, which may continue: {error}; to watch it: fedray jobs logs {id} -f"
        ) from None
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.message and info.driver_exit_code is None:  # otherwise the log has it
        show(f"{info.status.value.lower()}: {info.message.strip()}\n")
    return info.driver_exit_code or 1


def stop(client: JobSubmissionClient, id: str) -> JobStatus:
    """Stop a job, and wait until it has ended.

    Raises:
        ConfigError: there is no such job.
        FedrayError: the job does not end in time.
    """
    with _explained(client.get_address(), id):
        client.stop_job(id)
        until = time.monotonic() + STOP_S
        while not (status := client.get_job_status(id)).is_terminal():
            if time.monotonic() > until:
                raise FedrayError(f"{id}: was asked to stop, but still runs after {STOP_S:.0f} s")
            time.sleep(0.2)
        return status


def log(client: JobSubmissionClient, id: str) -> str:
    """Return a job's log so far.

    Raises:
        ConfigError: there is no such job.
    """
    with _explained(client.get_address(), id):
        return client.get_job_logs(id)


def jobs(client: JobSubmissionClient) -> list[JobDetails]:
    """Return the cluster's submitted jobs, the latest first."""
    with _explained(client.get_address()):
        found = [job for job in client.list_jobs() if job.submission_id]
    return sorted(found, key=lambda job: -(job.start_time or 0))


def _check_port(address: str) -> None:
    """Check within seconds that something listens at the address; `requests` would try for minutes.

    Raises:
        OSError: nothing listens.
    """
    parts = urlsplit(address)
    if parts.scheme in PORTS and not os.environ.get(f"{parts.scheme}_proxy"):
        port = parts.port or PORTS[parts.scheme]
        socket.create_connection((parts.hostname or "", port), timeout=REACH_S).close()


@contextmanager
def _explained(address: str | None, id: str | None = None) -> Iterator[None]:
    """Turn the exceptions of Ray's client into errors of fedray.

    Raises:
        ConfigError: the cluster cannot be reached, requires a token, or has no job `id`.
        FedrayError: the cluster reports something else.
    """
    where = address or "this machine"
    try:
        yield
    except FedrayError:
        raise
    except AuthenticationError as error:
        what = "a token" if "required" in str(error) or "no authentication token" in str(error) else "another token"
        raise ConfigError(f"the cluster at {where} asks for {what}: {TOKEN_HELP}") from None
    except (OSError, ValueError, requests.exceptions.RequestException) as error:
        raise ConfigError(
            f"no Ray cluster at {where}: {error}; is it running, is the port forwarded (`ray dashboard CLUSTER.yaml`, "
            "`kubectl port-forward`), and does --address name its dashboard, as in http://127.0.0.1:8265?"
        ) from None
    except RuntimeError as error:
        if id is not None and ("does not exist" in str(error) or "status code 404" in str(error)):
            raise ConfigError(f"no job {id!r} on the cluster at {where}; `fedray jobs list` shows its jobs") from None
        raise FedrayError(f"the cluster at {where}: {error}") from None


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Hide environment variables within the block: they would take precedence over the requested address."""
    hidden: dict[str, Any] = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
