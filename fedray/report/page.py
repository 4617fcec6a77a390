"""The report as one page that needs no network: tables as HTML, figures for plotly, and plotly itself.

plotly.js alone has 4.8 MB, so it and the figures are compressed in the page and unpacked by the browser.
"""

import gzip
import json
from base64 import b64encode
from functools import cache
from importlib.resources import files

from fedray.errors import ConfigError, reason
from fedray.report.document import Report
from fedray.report.plotly_drawing import drawing
from fedray.results.versions import installed_versions
from fedray.storage.paths import StoragePath

GENERATOR = "fedray report"
"""Marks a page as a report, which a later report may overwrite."""
MARK = f'<meta name="generator" content="{GENERATOR}">'.encode()


def page(report: Report) -> str:
    """Return the report as HTML."""
    from jinja2 import Environment
    from markupsafe import Markup

    folder = files("fedray.report")
    here = {name: folder.joinpath(name).read_text("utf-8") for name in ("page.html.j2", "page.css", "page.js")}
    figures = {figure.key: drawing(figure) for figure in report.figures()}
    text = json.dumps(figures, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    template = Environment(autoescape=True, trim_blocks=True).from_string(here["page.html.j2"])
    return template.render(
        report=report,
        generator=GENERATOR,
        version=installed_versions().get("fedray", ""),
        css=Markup(here["page.css"]),
        script=Markup(here["page.js"]),
        library=_library(),
        figures=_packed(text),
    )


def write_page(report: Report, place: StoragePath) -> None:
    """Write the page to a file, which may be an earlier report.

    Raises:
        ConfigError: another file is there.
        StorageError: it cannot be written.
    """
    check_place(place)
    place.write(page(report).encode())


def check_place(place: StoragePath) -> None:
    """Check that a report can be written to a file without overwriting anything else.

    Raises:
        ConfigError: a folder, or a file that is no report, is there.
    """
    try:
        if place.filesystem is None and place.is_folder():
            raise ConfigError(f"--output {place}: is a folder; name a file, such as {place}/report.html")
        if place.is_file() and MARK not in place.read()[:2000]:
            raise ConfigError(f"--output {place}: exists and is not a report; name another file with --output")
    except OSError as error:
        raise ConfigError(f"--output {place}: cannot be read: {reason(error)}") from None


@cache
def _library() -> str:
    """Return plotly.js, packed."""
    from plotly.offline import get_plotlyjs

    return _packed(get_plotlyjs())


def _packed(text: str) -> str:
    """Return text as the page unpacks it; equal for equal texts."""
    return b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()
