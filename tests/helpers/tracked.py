"""What trackers wrote: the lines of the tracker of docs/extending.md, and readers of the files of TensorBoard and of
Weights & Biases, which come without any."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
"""Bytes of a block of wandb's log, which has LevelDB's format after a header of 7 bytes."""


class Seen:
    """What `JsonLines` of docs/extending.md wrote to a file."""

    def __init__(self, path: Path):
        self._path = path

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._path.read_text().splitlines()]

    def steps(self) -> list[tuple[str, int]]:
        """The logged rounds: method and step; final passes as METHOD/final."""
        found = []
        for line in self.lines():
            if "step" in line:
                names = sorted(line["metrics"])
                method = names[0].partition("/")[0]
                final = all(name.startswith(f"{method}/final_") for name in names)
                found.append((f"{method}/final" if final else method, line["step"]))
        return found


def tensorboard_scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Return (tag, step, value) of all event files in a folder, file by file."""
    return [
        (value.tag, event.step, value.simple_value)
        for event in _tensorboard_events(folder)
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    ]


def tensorboard_texts(folder: Path) -> dict[str, str]:
    """Return the texts in a folder's event files by tag."""
    return {
        value.tag.removesuffix("/text_summary"): value.tensor.string_val[0].decode()
        for event in _tensorboard_events(folder)
        for value in event.summary.value
        if value.WhichOneof("value") == "tensor"
    }


def _tensorboard_events(folder: Path) -> Iterator[Any]:
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length


def wandb_records(folder: Path) -> list[tuple[str, Any]]:
    """Return the records of all runs in a folder that wandb wrote offline, each with its kind; a record of the history
    is a mapping."""
    found: list[tuple[str, Any]] = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for record in _wandb_log(path.read_bytes()):
            kind = record.WhichOneof("record_type")
            value = getattr(record, kind)
            if kind == "history":
                value = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in value.item}
            found.append((kind, value))
    return found


def _wandb_log(data: bytes) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""
