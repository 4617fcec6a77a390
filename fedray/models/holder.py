"""One copy of a node's file for all processes on a device: one process holds it, and the others map its tensors.

On a CPU, processes map the node's file itself. A GPU's memory cannot be mapped from a file, but from another process
(CUDA IPC, by torch's own reductions). The holder is started by the first process that asks for the file, and ends when
the last one that holds its connection has ended, however it ends. Its tensors are for reading only.

On a CPU, torch's reductions share memory by files in /dev/shm; that is how tests run the same code.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

import torch
import torch.multiprocessing  # registers how tensors travel between processes
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

PATIENCE_S = 900.0
"""How long a holder may take to read its file."""
IDLE_S = 20.0
"""How long a holder waits for the next process after the last one has ended: methods follow each other."""
LOOK_S = 0.05


class CannotShare(Exception):
    """Tensors cannot be mapped from another process here; the message says why."""


@dataclass(frozen=True)
class Shared:
    """Tensors of a holder.

    Attributes:
        tensors: by name, for reading only.
        connection: the holder keeps them as long as this is open.
    """

    tensors: Mapping[str, Tensor]
    connection: Connection


def shared_tensors(file: Path, device: torch.device) -> Shared:
    """Return the file's tensors on a device, as this node's holder has them.

    Args:
        file: in safetensors' format; its name says all that its content follows from.

    Raises:
        CannotShare: no holder could be started or reached, or its tensors could not be mapped.
    """
    folder = Path(tempfile.gettempdir()) / f"fedray-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise CannotShare(f"{folder} belongs to another user")
        named = f"{file.stem} {_name(device)}".encode()
        address = folder / hashlib.sha256(named).hexdigest()[:16]  # a socket's path may have 107 characters
        with FileLock(f"{address}.lock"):
            connection = _connect(address) or _start(file, device, address)
            connection.send("tensors")
            answer = connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return Shared(answer, connection)
    except CannotShare:
        raise
    except Exception as error:  # drivers and containers have many ways of not sharing memory
        raise CannotShare(f"{type(error).__name__}: {error}") from error


def _name(device: torch.device) -> str:
    """Name a device so that processes which see other devices, or number them otherwise, name it alike."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type


def _connect(address: Path) -> Connection | None:
    with suppress(OSError):
        return Client(str(address), family="AF_UNIX")
    return None


def _start(file: Path, device: torch.device, address: Path) -> Connection:
    address.unlink(missing_ok=True)  # left behind by a holder that was killed
    with tempfile.TemporaryFile("w+") as output:
        holder = subprocess.Popen(
            [sys.executable, "-m", "fedray.models.holder", str(file), str(device), str(address), str(IDLE_S)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it outlives the process that starts it
        )
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            if (connection := _connect(address)) is not None:
                return connection
            if holder.poll() is not None:
                output.seek(0)
                last = (output.read().strip() or "no output").splitlines()[-1]
                raise CannotShare(f"the holder of {file.name} ended with {holder.returncode}: {last}")
            time.sleep(LOOK_S)
        holder.kill()
    raise CannotShare(f"the holder of {file.name} was not ready within {PATIENCE_S:.0f} s")


class _Holder:
    """Serves tensors to other processes, and ends once no process has used them for `idle_s` seconds."""

    def __init__(self, tensors: dict[str, Tensor], address: Path, idle_s: float) -> None:
        self._tensors = tensors
        self._idle_s = idle_s
        self._listener = Listener(str(address), family="AF_UNIX")
        self._address = address
        self._open = 0
        self._changed = threading.Condition()

    def serve(self) -> None:
        threading.Thread(target=self._accept, daemon=True).start()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._open == 0)
                if self._changed.wait_for(lambda: self._open > 0, self._idle_s):
                    continue
            with FileLock(f"{self._address}.lock"):  # no process can connect meanwhile
                if self._open == 0:
                    self._listener.close()
                    return

    def _accept(self) -> None:
        while True:
            connection = self._listener.accept()
            self._count(1)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        with suppress(EOFError, OSError), connection:  # the other side has ended
            while True:
                connection.recv()
                try:
                    connection.send(self._tensors)
                except RuntimeError as error:  # what torch raises where a device's memory cannot be shared
                    connection.send(error)
        self._count(-1)

    def _count(self, change: int) -> None:
        with self._changed:
            self._open += change
            self._changed.notify_all()


def main(file: str, device: str, address: str, idle_s: str) -> None:
    """Hold a file's tensors; the process ends with its last user."""
    if device == "cpu":
        torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    else:
        tensors = load_file(file, device=device)
    _Holder(tensors, Path(address), float(idle_s)).serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
