"""The states of one method's clients, in files that all nodes see: the next worker that trains a client reads its state
from there.

A file holds the states of clients that finished together and is never changed. Files are content-addressed, so a
damaged one is detected. Processes cache recently read files.
"""

import os
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from fedray.errors import ConfigError, StateError
from fedray.storage.codec import StatePack, pack, pack_small, read_pack, unpack_small
from fedray.storage.paths import StoragePath
from fedray.storage.state_tree import num_bytes

CACHE_BYTES = 32_000_000
"""Bytes of files that a process caches in memory."""

FILE_BYTES = 100_000
"""A file with this many bytes takes no more states: a client's large state has a file to itself."""

FILE_NAME = re.compile(r"(\d{5,9})-[0-9a-f]{16}-\d{6,12}-([0-9a-f]{32})\.safetensors")
"""Round, writer, number, and the first half of the contents' SHA-256."""


class StateRef(NamedTuple):
    """Where a state is.

    Attributes:
        file: name of the file; empty if there is none.
        entry: index of the state in the file.
        of: number of states in the file.
        text: the state itself, without a file, if none of the states that were written together has arrays.
    """

    file: str
    entry: int
    of: int
    text: str = ""


class StateFiles:
    """Writes and reads the files of client states in one folder.

    Args:
        folder: the existing folder of the files.
        durable: whether written files survive a crash of the machine.

    Raises:
        ConfigError: the folder does not exist on this node.
    """

    def __init__(self, folder: StoragePath, durable: bool = True):
        self._folder, self._durable = folder, durable
        self._cache: OrderedDict[str, tuple[StatePack, int]] = OrderedDict()
        self._cached = 0
        self._forgotten: Counter[str] = Counter()
        self._writer, self._written = os.urandom(8).hex(), 0
        if not folder.is_folder():
            raise ConfigError(
                f"storage_path, output: {folder} does not exist on node {os.uname().nodename}; it must be in a folder "
                "that all nodes of the cluster share"
            )

    def write(self, server_round: int, states: Sequence[Any]) -> list[StateRef]:
        """Write states into new files; return where each is.

        Raises:
            StateError: a state holds something that could not be read back (`codec.pack`).
            StorageError: a file cannot be written.
        """
        texts = [text for state in states if (text := pack_small(state)) is not None]
        if len(texts) == len(states):
            return [StateRef("", 0, 1, text) for text in texts]
        refs: list[StateRef] = []
        together: list[Any] = []
        size = 0
        for left, state in enumerate(states, start=1 - len(states)):
            together.append(state)
            size += num_bytes(state)
            if not left or size >= FILE_BYTES:
                refs += self._write_file(server_round, together)
                together, size = [], 0
        return refs

    def read(self, refs: Sequence[StateRef | None]) -> list[Any]:
        """Return the states, and None for each None.

        Raises:
            StateError: a file is missing or damaged.
        """
        return [None if ref is None else self._state(ref) for ref in refs]

    def forget(self, refs: Iterable[StateRef]) -> None:
        """Delete every file whose states have all been forgotten. A state that shares its file with others stays until
        these are forgotten too."""
        for ref in refs:
            if ref.text:
                continue
            self._forgotten[ref.file] += 1
            if self._forgotten[ref.file] == ref.of:
                del self._forgotten[ref.file]
                self._drop(ref.file)
                (self._folder / ref.file).remove()

    def _write_file(self, server_round: int, states: Sequence[Any]) -> list[StateRef]:
        blob = pack(states)
        name = f"{server_round:05d}-{self._writer}-{self._written:06d}-{digest(blob)}.safetensors"
        self._written += 1
        (self._folder / name).write(blob, self._durable)
        return [StateRef(name, entry, len(states)) for entry in range(len(states))]

    def _state(self, ref: StateRef) -> Any:
        if ref.text:
            return unpack_small(ref.text)
        path = self._folder / ref.file
        try:
            if ref.file not in self._cache:
                blob = path.read()
                check(ref.file, blob)
                self._keep(ref.file, read_pack(blob), len(blob))
            self._cache.move_to_end(ref.file)
            state = self._cache[ref.file][0].state(ref.entry)
        except OSError as error:
            raise StateError(f"a client's state cannot be read: {error}") from error
        except StateError as error:
            raise StateError(f"{path}: {error}") from error
        while self._cached > CACHE_BYTES:
            self._drop(next(iter(self._cache)))
        return state

    def _keep(self, name: str, packed: StatePack, size: int) -> None:
        self._cache[name] = packed, size
        self._cached += size

    def _drop(self, name: str) -> None:
        if (kept := self._cache.pop(name, None)) is not None:
            self._cached -= kept[1]


def digest(blob: bytes) -> str:
    """Return the part of a file's name that depends on its contents."""
    return sha256(blob).hexdigest()[:32]


def born(file: str) -> int:
    """Return the round in which a file of states was written.

    Raises:
        StateError: the name is not one that `StateFiles` gives.
    """
    if (found := FILE_NAME.fullmatch(file)) is None:
        raise StateError(f"{file[:200]!r} is not the name of a file of states")
    return int(found[1])


def check(file: str, blob: bytes) -> None:
    """Check the contents of a file against its name.

    Raises:
        StateError: these are not the bytes that the file was written with.
    """
    born(file)
    if f"-{digest(blob)}." not in file:
        raise StateError(f"its {len(blob)} bytes differ from those that were written")
