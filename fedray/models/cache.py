"""Files below `data.cache_dir`, which other processes see complete or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedray.errors import cannot_cache


@contextmanager
def replacing(path: Path) -> Iterator[str]:
    """Yield the name of a temporary file that becomes `path` if the block succeeds, and is deleted if it fails.

    Raises:
        ConfigError: the folder cannot be written.
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
        raise cannot_cache(path.parent, error) from None
