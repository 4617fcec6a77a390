"""Where a run's files are: a local folder, or anything that pyarrow.fs reaches by a URI (s3://, gs://, ...).

Writes are atomic: a file is written to a temporary name, flushed to disk and renamed. Object stores show an object only
once it is complete, so there one upload suffices.
"""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from itertools import count
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs

from fedray.errors import ConfigError, StorageError, reason

OBJECT_STORES = ("s3", "gcs", "abfs")
"""pyarrow's names of stores that show an object only once its upload is complete."""

JOB_FOLDERS = "working_dir_files"
"""Name of the folder into which Ray unpacks the working directories of jobs."""

LONGEST_NAME = 150
"""Longest file name derived from a client's id, in characters; most file systems allow 255 bytes."""


@dataclass(frozen=True)
class StoragePath:
    """A file or folder.

    Attributes:
        filesystem: None for this machine's.
        path: the path in that file system; absolute on this machine.
    """

    filesystem: fs.FileSystem | None
    path: str

    @classmethod
    def of(cls, where: "str | Path | StoragePath") -> "StoragePath":
        """Return the file or folder that a path or URI names.

        Raises:
            ConfigError: pyarrow does not support the URI.
        """
        if isinstance(where, StoragePath):
            return where
        if isinstance(where, Path) or not is_uri(where):
            return cls(None, str(Path(where).expanduser().absolute()))
        try:
            filesystem, path = fs.FileSystem.from_uri(where)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ConfigError(f"storage_path, output: {where!r} cannot be used: {error}") from None
        return cls(None if isinstance(filesystem, fs.LocalFileSystem) else filesystem, path)

    def __truediv__(self, name: str) -> "StoragePath":
        return StoragePath(self.filesystem, f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.path if self.filesystem is None else f"{self.filesystem.type_name}://{self.path}"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def local(self) -> Path:
        """The path on this machine.

        Raises:
            ValueError: the file or folder is not on this machine.
        """
        if self.filesystem is not None:
            raise ValueError(f"{self} is not on this machine")
        return Path(self.path)

    def is_folder(self) -> bool:
        """Return whether the folder exists; in object stores, which have no folders, every folder does."""
        if self.filesystem is None:
            return self.local.is_dir()
        if self.filesystem.type_name in OBJECT_STORES:
            return True
        return bool(self.filesystem.get_file_info(self.path).type == fs.FileType.Directory)

    def is_file(self) -> bool:
        """Return whether the path is that of an existing file."""
        if self.filesystem is None:
            return self.local.is_file()
        return bool(self.filesystem.get_file_info(self.path).type == fs.FileType.File)

    def size(self) -> int:
        """Return a file's size in bytes.

        Raises:
            OSError: the file cannot be accessed.
        """
        if self.filesystem is None:
            return self.local.stat().st_size
        return int(self.filesystem.get_file_info(self.path).size or 0)

    def names(self) -> list[str]:
        """Return the sorted names of what is in the folder; an empty list if the folder does not exist."""
        if self.filesystem is None:
            return sorted(os.listdir(self.path)) if self.local.is_dir() else []
        found = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in found)

    def make_folder(self) -> None:
        """Create the folder, and those above it, if they do not exist.

        Raises:
            StorageError: it cannot be created.
        """
        with self._writing():
            if self.filesystem is None:
                self.local.mkdir(parents=True, exist_ok=True)
            else:
                self.filesystem.create_dir(self.path, recursive=True)

    def new_folder(self, name: str) -> "StoragePath":
        """Create a folder NAME in this one, or NAME-2, NAME-3, ... if it exists. No other process gets the same one.

        Other file systems do not tell who has created a folder: there the name gets random letters.

        Raises:
            StorageError: it cannot be created.
        """
        if self.filesystem is not None:
            return self / f"{name}-{secrets.token_hex(3)}"
        self.make_folder()
        for number in count(1):
            place = self / (name if number == 1 else f"{name}-{number}")
            with place._writing():
                try:
                    place.local.mkdir()
                    return place
                except FileExistsError:
                    continue
        raise AssertionError("count() does not end")

    def remove_if_empty(self) -> None:
        """Delete the folder if nothing is in it."""
        if self.filesystem is None:
            with suppress(OSError):
                self.local.rmdir()

    def read(self) -> bytes:
        """Return a file's contents.

        Raises:
            OSError: the file cannot be read.
        """
        if self.filesystem is None:
            return self.local.read_bytes()
        with self.filesystem.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def write(self, data: bytes, durable: bool = True) -> None:
        """Write a file atomically, and create its folder if it does not exist.

        Args:
            durable: whether the file, once this returns, survives a crash of the machine.

        Raises:
            StorageError: the file could not be written; an earlier version of it is untouched.
        """
        with self._writing():
            if self.filesystem is None:
                self._write_here(data, durable)
            elif self.filesystem.type_name in OBJECT_STORES:
                self._upload(self.path, data)
            else:
                temporary = self._temporary()
                self.filesystem.create_dir(self.path.rsplit("/", 1)[0], recursive=True)
                self._upload(temporary, data)
                self.filesystem.move(temporary, self.path)

    def remove(self) -> None:
        """Delete a file, or a folder with all its contents, if it exists.

        Raises:
            StorageError: it cannot be deleted.
        """
        filesystem = self.filesystem or fs.LocalFileSystem()
        with self._writing("deleted"):
            kind = filesystem.get_file_info(self.path).type
            if kind == fs.FileType.Directory:
                filesystem.delete_dir(self.path)
            elif kind == fs.FileType.File:
                filesystem.delete_file(self.path)

    @contextmanager
    def _writing(self, done: str = "written") -> Iterator[None]:
        """Turn what goes wrong while the file or folder is written into one message.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise StorageError(
                f"{self}: cannot be {done}: {reason(error)}; make room, or choose another storage_path (--output); a "
                "run that has begun can be continued with --resume"
            ) from None

    def _write_here(self, data: bytes, durable: bool) -> None:
        path, temporary = Path(self.path), Path(self._temporary())
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            sync_folder(path.parent)

    def _upload(self, path: str, data: bytes) -> None:
        assert self.filesystem is not None
        with self.filesystem.open_output_stream(path) as stream:
            stream.write(data)

    def _temporary(self) -> str:
        folder, _, name = self.path.rpartition("/")
        return f"{folder}/.{name}.{secrets.token_hex(4)}.tmp"


def is_uri(where: str) -> bool:
    """Return whether a string is a URI and not a path."""
    return re.match(r"^[A-Za-z][A-Za-z0-9+.-]+://", where) is not None


def in_job_folder() -> bool:
    """Return whether the current folder is a Ray job's copy of the submitted working directory, which has another path
    on each node and is deleted some time after the job."""
    return JOB_FOLDERS in Path.cwd().parts


def resolve_storage(where: str | Path) -> str:
    """Return the absolute path or URI of results; a relative path is below the current directory.

    In a Ray job, whose folder is deleted, a relative path is below FEDRAY_STORAGE, which the files in clusters/ set, or
    else below the home directory.

    Raises:
        ConfigError: FEDRAY_STORAGE is neither an absolute path nor a URI.
    """
    if isinstance(where, str) and is_uri(where):
        return where
    path = Path(where).expanduser()
    if path.is_absolute() or not in_job_folder():
        return str(path.absolute())
    begin = os.environ.get("FEDRAY_STORAGE") or str(Path.home())
    if not is_uri(begin) and not Path(begin).is_absolute():
        raise ConfigError(f"FEDRAY_STORAGE: {begin!r} is relative; it must be an absolute path or a URI")
    return f"{begin.rstrip('/')}/{path}"


def timestamped(name: str) -> str:
    """Return NAME-TIME, with the current time."""
    return f"{name}-{datetime.now().strftime('%Y%m%d-%H%M%S')}"


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that names created in it survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def safe_name(id: str) -> str:
    """Return a file name that is unique to the id and cannot lead out of its folder: `a/../b` becomes `a%2F..%2Fb`."""
    name = quote(id, safe=" ", errors="surrogatepass").replace("~", "%7E")
    if name.startswith("."):
        name = f"%2E{name[1:]}"
    if len(name) > LONGEST_NAME or not name:
        name = f"{name[:LONGEST_NAME]}~{sha256(id.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
    return name
