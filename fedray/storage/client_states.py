"""The states of one method's clients, in files that all nodes see: whoever trains a client next reads its state there.

A file holds the states of clients that finished together, is never changed, and is named after what is in it, so that a
damaged one is known. Processes that read keep some of what they read last.
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
"""Bytes of files that a process keeps in memory."""

FILE_BYTES = 100_000
"""A file that has so many bytes takes no more states: a client's large state is alone in its file."""


FILE_NAME = re.compile(r"(\d{5,9})-[0-9a-f]{16}-\d{6,12}-([0-9a-f]{32})\.safetensors")
"""Round, writer, number, and the beginning of the contents' SHA-256."""


class StateRef(NamedTuple):
    """Where a state is: `entry` in a file of `of` states. text: the state itself, where none of those that finished
    together has arrays: then there is no file."""

    file: str
    entry: int
    of: int
    text: str = ""


class StateFiles:
    """folder: where the files are; it is there already.
    durable: whether what was written survives a crash of the machine.

    Raises:
        ConfigError: the folder is not there: this node does not see it.
    """

    def __init__(self, folder: StoragePath, durable: bool = True):
        self._folder, self._durable = folder, durable
        self._cache: OrderedDict[str, tuple[StatePack, int]] = OrderedDict()
        self._cached = 0
        self._forgotten: Counter[str] = Counter()
        self._writer, self._written = os.urandom(8).hex(), 0
        if not folder.is_folder():
            raise ConfigError(
                f"storage_path, output: {folder} is not there on node {os.uname().nodename}; it must be in a folder "
                "that all nodes of the cluster share"
            )

    def write(self, server_round: int, states: Sequence[Any]) -> list[StateRef]:
        """Write states into new files; return where each is.

        Raises:
            StateError: a state has something in it that could not be read back (`codec.pack`), or there is no room.
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
        """Return the states; None for None.

        Raises:
            StateError: a file is gone or broken.
        """
        return [None if ref is None else self._state(ref) for ref in refs]

    def forget(self, refs: Iterable[StateRef]) -> None:
        """Delete the files of which every state has been forgotten. A state that shares its file with others' stays
        until these are forgotten too."""
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
        try:
            (self._folder / name).write(blob, self._durable)
        except OSError as error:
            raise StateError(f"clients' states cannot be written: {error}") from error
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
    """Return what a file of states is named after."""
    return sha256(blob).hexdigest()[:32]


def born(file: str) -> int:
    """Return the round in which a file of states was written.

    Raises:
        StateError: no such file was ever written.
    """
    if (found := FILE_NAME.fullmatch(file)) is None:
        raise StateError(f"{file[:200]!r} is no name of a file of states")
    return int(found[1])


def check(file: str, blob: bytes) -> None:
    """Raises:
    StateError: these are not the bytes that the file was written with.
    """
    born(file)
    if f"-{digest(blob)}." not in file:
        raise StateError(f"its {len(blob)} bytes are not those that were written")
