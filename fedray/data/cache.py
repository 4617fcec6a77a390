"""Files that other processes see complete or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedray.errors import DataError


@contextmanager
def replacing(path: Path) -> Iterator[str]:
    """Yield the name of a temporary file that becomes `path` if the block succeeds, and is deleted if it fails.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        os.close(handle)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"data.cache_dir: {path.parent} cannot be written: {reason}; set it to another folder"
        ) from None
