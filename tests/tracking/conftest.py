"""What the tests of trackers share: the tracker of docs/extending.md, and one that fails."""

from pathlib import Path

import pytest
from examples import EXAMPLES
from tracked import Seen

FLAKY = '''
from my_tracker import JsonLines, Lines


class Flaky(JsonLines):
    """Fails where `fails` says, while the file `down` exists."""

    fails: str
    down: str = "down"

    def open(self, run):
        self.perhaps_fail("open")
        return Failing(self, run)

    def perhaps_fail(self, where):
        from pathlib import Path

        if where == self.fails and Path(self.down).exists():
            raise OSError("no route\\nto host")


class Failing(Lines):
    def __init__(self, tracker, run):
        super().__init__(tracker.path, run)
        self._tracker = tracker

    def log(self, metrics, step):
        self._tracker.perhaps_fail(f"log {step}")
        super().log(metrics, step)

    def finish(self, status):
        self._tracker.perhaps_fail("finish")
        super().finish(status)
'''


@pytest.fixture
def seen(own_folder: Path) -> Seen:
    """The lines of `my_tracker.py`, and of `my_flaky.py`, in the current folder."""
    (own_folder / "my_tracker.py").write_text(EXAMPLES["my_tracker.py"])
    (own_folder / "my_flaky.py").write_text(FLAKY)
    return Seen(own_folder / "seen.jsonl")
