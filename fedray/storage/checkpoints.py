"""Checkpoints: what a run can be continued from.

DIR/checkpoints/METHOD/ROUND/server.safetensors   the server's state after ROUND rounds
DIR/checkpoints/METHOD/ROUND/manifest.json        where each client's state is (`StateRef`), totals, and checksums of
                                                  everything; written last: without it there is no checkpoint

The clients' states are already in files of their own (`client_states`). Such a file is deleted once no kept checkpoint
references it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedray.config import CheckpointConfig
from fedray.errors import StateError
from fedray.storage.client_states import StateRef, born, check
from fedray.storage.codec import pack, read_pack
from fedray.storage.paths import StoragePath

LONGEST_MANIFEST = 1_000_000_000
"""Largest manifest that is read, in bytes; a million clients need a tenth of it."""

VERSION = 2
"""Of manifests; in version 1 the score was measured on test examples, by which nothing is selected."""

ROUND = re.compile(r"\d{5,9}")
Natural = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Progress:
    """The state of a method after some rounds.

    Attributes:
        server_round: number of finished rounds.
        server: the server's state.
        client_states: where the state of each client that has trained is, by client id.
        totals: sums over rounds for the summary.
        seconds: working time so far.
        score: compares checkpoints to find the best one; None if nothing was measured.
        data_sha256: fingerprint of the examples.
    """

    server_round: int
    server: Any
    client_states: Mapping[str, StateRef]
    totals: Mapping[str, float]
    seconds: float
    score: float | None
    data_sha256: str


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Server(_Strict):
    bytes: Natural
    sha256: str


class _Manifest(_Strict):
    version: Annotated[int, Field(ge=1, le=VERSION)]
    method: str
    server_round: Natural
    server: _Server
    client_states: dict[str, tuple[str, Natural, Natural, str]]
    totals: dict[str, int | float]
    seconds: Annotated[float, Field(ge=0)]
    score: float | None
    data_sha256: str

    @property
    def selecting(self) -> float | None:
        """The score, if checkpoints are compared by it."""
        return self.score if self.version == VERSION else None


class Checkpoints:
    """The checkpoints of one method in a run's folder.

    Args:
        run: the run's folder.
        section: how often to save, and what to keep.
        higher: whether a higher score is better.
    """

    def __init__(self, run: StoragePath, method: str, section: CheckpointConfig, higher: bool = True):
        self._folder, self._states, self._method = run / "checkpoints" / method, run / "states" / method, method
        self._section, self._higher = section, higher
        self._scores: dict[int, float | None] = {}  # of existing checkpoints, by round
        self._current: set[StateRef] = set()  # states of the newest checkpoint
        self._replaced: list[tuple[StateRef, int]] = []  # states that still have a file; the first round without each

    def due(self, server_round: int, last: int) -> bool:
        """Return whether a checkpoint is due after `server_round` of `last` rounds."""
        every = self._section.every
        return every > 0 and (server_round % every == 0 or server_round == last)

    def save(self, progress: Progress, replaced: Sequence[StateRef] = ()) -> list[StateRef]:
        """Write a checkpoint, and delete the checkpoints that need not be kept.

        Args:
            replaced: states that were current at the previous checkpoint, or were written since, and no longer are.

        Returns:
            The states that no checkpoint references any more.

        Raises:
            StateError: the server's state holds something that could not be read back.
            StorageError: the checkpoint could not be written; the previous ones are intact.
        """
        blob = pack([progress.server])
        manifest = {
            "version": VERSION,
            "method": self._method,
            "server_round": progress.server_round,
            "server": {"bytes": len(blob), "sha256": sha256(blob).hexdigest()},
            "client_states": progress.client_states,
            "totals": dict(progress.totals),
            "seconds": progress.seconds,
            "score": progress.score,
            "data_sha256": progress.data_sha256,
        }
        folder = self._folder / f"{progress.server_round:05d}"
        (folder / "server.safetensors").write(blob)
        (folder / "manifest.json").write(_sealed(manifest))
        self._scores[progress.server_round] = progress.score
        self._current = set(progress.client_states.values())
        self._replaced += [(ref, progress.server_round) for ref in replaced if ref.file]
        return self._pruned(self._kept())

    def finish(self) -> list[StateRef]:
        """Delete all checkpoints but the last, from which the run can be continued with more rounds.

        Returns:
            The states that no checkpoint references any more.
        """
        free = self._pruned({max(self._scores)} if self._scores else set())
        self._sweep()
        return free

    def read_newest(self) -> Progress:
        """Return the newest intact checkpoint; nothing in the folder changes.

        Raises:
            StateError: there is none.
        """
        broken: list[str] = []
        for name in sorted(filter(ROUND.fullmatch, self._folder.names()), key=int, reverse=True):
            try:
                return self._read(self._folder / name)
            except StateError as error:
                broken.append(f"{self._folder / name}: {error}")
        raise StateError(
            "no checkpoint is intact:\n" + "\n".join(broken)
            if broken
            else f"{self._folder}: has no checkpoint (checkpoint.every: 0 saves none)"
        )

    def newest(self) -> tuple[Progress | None, list[str]]:
        """Find the newest intact checkpoint, and delete newer ones and all states that no checkpoint references.

        Returns:
            The checkpoint, or None if there never was one; and what is wrong with the newer ones.

        Raises:
            StateError: there are checkpoints, and all are broken.
        """
        broken: list[str] = []
        names = sorted(filter(ROUND.fullmatch, self._folder.names()), key=int)
        for name in reversed(names):
            if not (self._folder / name / "manifest.json").is_file():
                continue  # it was never completed
            try:
                progress = self._read(self._folder / name)
            except StateError as error:
                broken.append(f"{self._folder / name}: {error}")
                continue
            place = names.index(name) + 1
            for newer in names[place:]:
                (self._folder / newer).remove()
            self._take_stock(names[:place], progress)
            return progress, broken
        if broken:
            raise StateError("no checkpoint is intact, and nothing was changed:\n" + "\n".join(broken))
        return None, []

    def _read(self, folder: StoragePath) -> Progress:
        """Read a checkpoint, and verify every file that it references.

        Raises:
            StateError: this is not a checkpoint, or one of its files is missing or has changed.
        """
        manifest = self._manifest(folder)
        try:
            place = folder / "server.safetensors"
            if place.size() != manifest.server.bytes:
                raise StateError(f"server.safetensors has {place.size()} bytes instead of {manifest.server.bytes}")
            blob = place.read()
            if sha256(blob).hexdigest() != manifest.server.sha256:
                raise StateError("server.safetensors has changed since it was written")
            refs = {id: StateRef(*ref) for id, ref in manifest.client_states.items()}
            for file in sorted({ref.file for ref in refs.values() if not ref.text}):
                born(file)  # rejects names that lead out of the folder
                check(file, (self._states / file).read())
        except OSError as error:
            raise StateError(f"cannot be read: {error}") from None
        server = read_pack(blob).state(0)
        return Progress(
            manifest.server_round,
            server,
            refs,
            manifest.totals,
            manifest.seconds,
            manifest.selecting,
            manifest.data_sha256,
        )

    def _manifest(self, folder: StoragePath) -> _Manifest:
        place = folder / "manifest.json"
        try:
            if place.size() > LONGEST_MANIFEST:
                raise StateError(f"manifest.json has {place.size()} bytes; at most {LONGEST_MANIFEST} are read")
            manifest = _Manifest.model_validate_json(_unsealed(place.read()))
        except OSError as error:
            raise StateError(f"cannot be read: {error}") from None
        except (ValidationError, RecursionError) as error:
            raise StateError(f"manifest.json is not a manifest: {str(error).splitlines()[0]}") from None
        if manifest.method != self._method or f"{manifest.server_round:05d}" != folder.name:
            raise StateError(f"belongs to {manifest.method!r} after {manifest.server_round} rounds: it was moved here")
        return manifest

    def _kept(self) -> set[int]:
        """Return the rounds whose checkpoints are kept: the last ones, and the best."""
        kept = set(sorted(self._scores)[-self._section.keep :])
        scored = {server_round: score for server_round, score in self._scores.items() if score is not None}
        if self._section.best and scored:
            sign = 1 if self._higher else -1
            kept.add(max(scored, key=lambda server_round: (sign * scored[server_round], server_round)))
        return kept

    def _pruned(self, kept: set[int]) -> list[StateRef]:
        for server_round in sorted(self._scores.keys() - kept):
            folder = self._folder / f"{server_round:05d}"
            (folder / "manifest.json").remove()  # first: without it, what is left is not a checkpoint
            folder.remove()
            del self._scores[server_round]
        needed = [any(born(ref.file) < server_round < gone for server_round in kept) for ref, gone in self._replaced]
        free = [ref for (ref, _), used in zip(self._replaced, needed, strict=True) if not used]
        self._replaced = [entry for entry, used in zip(self._replaced, needed, strict=True) if used]
        return free

    def _take_stock(self, names: Iterable[str], newest: Progress) -> None:
        """Record which checkpoints exist and which states they need; delete all others."""
        current = self._current = set(newest.client_states.values())
        for name in names:
            try:
                manifest = self._manifest(self._folder / name)
            except StateError:
                (self._folder / name).remove()
                continue
            self._scores[manifest.server_round] = manifest.selecting
            older = {StateRef(*ref) for ref in manifest.client_states.values()} - current
            known = {ref for ref, _ in self._replaced}
            self._replaced += [(ref, newest.server_round) for ref in sorted(older - known) if ref.file]
        self._sweep()

    def _sweep(self) -> None:
        """Delete states that no checkpoint needs: those of unfinished rounds, and of actors that died before they
        reported them."""
        if not self._scores:
            return
        needed = {ref.file for ref in self._current} | {ref.file for ref, _ in self._replaced}
        for name in self._states.names():
            if name not in needed:
                (self._states / name).remove()


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """Return the manifest as one line of JSON, and the SHA-256 of that line as a second one."""
    return sealed_line(json.dumps(manifest, allow_nan=False).encode())


def sealed_line(line: bytes) -> bytes:
    """Return the line, and its SHA-256 as a second one."""
    return line + b"\n" + sha256(line).hexdigest().encode() + b"\n"


def _unsealed(blob: bytes) -> bytes:
    line, _, rest = blob.partition(b"\n")
    if rest.strip() != sha256(line).hexdigest().encode():
        raise StateError("manifest.json has changed since it was written, or is incomplete")
    return line
