"""A real browser without a window, for pages that must work in one. No package: the command line of Chromium says what
its console showed, and prints the page as it stands after its scripts."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=60000"),
)
OWN_SERVICES = r"https?://[^/]*\.(google|googleapis|gstatic|gvt1)\.com/"
"""Where the browser itself asks for updates and accounts."""


@dataclass(frozen=True)
class Opened:
    """A page in the browser.

    Attributes:
        dom: the page after its scripts, as HTML.
        console: what it wrote to the console, an entry each.
        requested: addresses in the network that were asked for, apart from those of the browser's own services.
    """

    dom: str
    console: tuple[str, ...]
    requested: tuple[str, ...]

    @property
    def state(self) -> str:
        """The attribute `data-state` of the page: `ready` once every figure is drawn."""
        found = re.search(r'<html[^>]*data-state="(\w+)"', self.dom)
        return found[1] if found else ""


def browser() -> str:
    """Return the path of a browser; skip the test if there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is installed")
    return found


def opened(page: Path, folder: Path, width: int = 1280, dark: bool = False, query: str = "") -> Opened:
    """Open a page, without a network, and wait until its scripts have ended.

    Args:
        folder: a folder for the browser's own files.
        width: of the window, in pixels.
        dark: whether the user prefers dark pages.
        query: what follows `?` in the page's address.
    """
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    log = folder / "requests.json"
    own = (f"--user-data-dir={folder / 'profile'}", f"--window-size={width},2000", f"--log-net-log={log}")
    # Every name is resolved to nothing: what the page needs must be in it.
    address = f"{page.as_uri()}?{query}" if query else page.as_uri()
    command = [browser(), *OPTIONS, "--host-resolver-rules=MAP * ~NOTFOUND", *scheme, *own, "--dump-dom", address]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    console = tuple(line for line in ended.stderr.splitlines() if ":CONSOLE" in line)
    text = log.read_text(errors="replace") if log.is_file() else ""
    found = dict.fromkeys(re.findall(r'"url":"(https?://[^"]+)"', text))
    requested = tuple(url for url in found if not re.match(OWN_SERVICES, url))
    return Opened(ended.stdout, console, requested)
