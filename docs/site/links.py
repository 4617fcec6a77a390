"""A hook of mkdocs: what the site shows of the repository's files, which are not on it.

Pages link to files as they are in the repository, so that they can be read there. On the site

- a link to a file outside `docs/` becomes its path as code, unless that file is a page of the site (`extra.pages` in
  mkdocs.yml: the page's name -> the file from which it is made);
- a drawing (`images/*.svg`) becomes part of the page, so that it follows the page's colours.

A link to a file that does not exist is a warning, which `mkdocs build --strict` makes an error.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LOG = logging.getLogger("mkdocs.hooks.links")
ROOT = Path(__file__).parents[2]
CODE = re.compile(r"(^```.*?^```[ \t]*$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
ELSEWHERE = re.compile(r"[a-z]+:|#|/")
DRAWING = re.compile(r'<img alt="([^"]*)" src="(images/[\w-]+\.svg)"\s*/?>')


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the pages that are made from files outside `docs/`."""
    for name, path in config.extra["pages"].items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Turn a page's links from the repository's into the site's."""
    pages: dict[str, str] = config.extra["pages"]
    place = pages.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def site_link(found: re.Match[str]) -> str:
        text, target = found.groups()
        if ELSEWHERE.match(target):
            return found[0]
        path, anchor = re.fullmatch(r"([^#]*)(#.*)?", target).groups(default="")  # type: ignore[union-attr]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
        if not (ROOT / path).exists():
            LOG.warning("%s links to %s, which does not exist", place, target)
        on_site = _name_on_site(path, pages)
        if on_site is not None:
            return f"[{text}]({posixpath.relpath(on_site, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"
        return f"`{path}`" if text.startswith("`") else f"{text} (`{path}`)"

    parts = CODE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(site_link, part) for part in parts)


def _name_on_site(path: str, pages: dict[str, str]) -> str | None:
    """Return the name on the site of a file or folder of the repository, or None if the site does not have it."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return next((name for name, source in pages.items() if path in (source, posixpath.dirname(source))), None)


def on_page_content(html: str, config: MkDocsConfig, **_: Any) -> str:
    """Put the drawings into the page."""

    def drawn(found: re.Match[str]) -> str:
        svg = (Path(config.docs_dir) / found[2]).read_text(encoding="utf-8")
        return svg.replace("<svg ", f'<svg role="img" aria-label="{found[1]}" ', 1)

    return DRAWING.sub(drawn, html)
