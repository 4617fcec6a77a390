"""The site of docs/ (`make docs`): built without warnings, it loads nothing from the network, and every link is found.

The strict build checks links and anchors between pages, too, but not those in HTML that was written as such, nor those
that the hook made.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from browser import opened

ROOT = Path(__file__).parents[2]

pytest.importorskip("material", reason='needs the extra "docs"')


def build(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", *words]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    ended = build("--site-dir", str(folder))
    assert ended.returncode == 0, ended.stderr
    assert "WARNING" not in ended.stderr
    return folder


class Page(HTMLParser):
    """What a page links to, what it loads, and where one can link to.

    Attributes:
        links: targets of its links.
        loaded: what a browser loads for it.
        anchors: names of places in it.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = {"", "__skip"}
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors.update(filter(None, (found.get("id"), found.get("name"))))
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        elif tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(str(found["href"]))
        self.loaded += [str(value) for name, value in attrs if name in ("src", "srcset", "poster")]


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    """The pages by name; that for addresses which do not exist has absolute links."""
    return {file.name: Page(file) for file in site.glob("*.html") if file.name != "404.html"}


def test_every_page_is_on_the_site(pages: dict[str, Page]) -> None:
    names = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert pages.keys() == {f"{name}.html" for name in names | {"cluster-files"}}


def test_nothing_is_loaded_from_the_network(site: Path, pages: dict[str, Page]) -> None:
    """Neither by a page nor by a style sheet; each file that is loaded exists."""
    for name, page in pages.items():
        assert len(page.loaded) >= 4, name
        for address in page.loaded:
            assert (site / address).is_file(), f"{name} loads {address}"
    sheets = [*site.rglob("*.css")]
    assert len(sheets) >= 3
    for sheet in sheets:
        text = sheet.read_text("utf-8")
        assert not re.search(r"@import|url\([\"']?(https?:)?//", text), sheet


def broken(site: Path, pages: dict[str, Page]) -> Iterator[str]:
    """Yield the links that lead nowhere."""
    for name, page in pages.items():
        for link in page.links:
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            target = pages.get(path or name) if path != "." else pages["index.html"]
            if target is None and not (site / path).is_file():
                yield f"{name} links to {link}"
            elif target is not None and unquote(anchor) not in target.anchors:
                yield f"{name} links to {link}, which has no such place"


def test_every_link_is_found(site: Path, pages: dict[str, Page]) -> None:
    assert sum(len(page.links) for page in pages.values()) > 1_000
    assert list(broken(site, pages)) == []


def test_files_that_the_site_does_not_have(site: Path) -> None:
    """A link to one becomes its path; the page on the files in clusters/ is made from their README."""
    assert "<code>jobs/three_tiers.yaml</code>" in (site / "tiers.html").read_text("utf-8")
    assert '<a href="cluster-files.html"><code>clusters/</code></a>' in (site / "clusters.html").read_text("utf-8")
    cluster_files = (site / "cluster-files.html").read_text("utf-8")
    assert "<code>clusters/aws.yaml</code>" in cluster_files
    assert '<a href="tiers.html">' in cluster_files


def test_drawings_are_part_of_the_page(site: Path) -> None:
    drawings = re.findall(r"\]\((images/[\w-]+\.svg)\)", (ROOT / "docs" / "concepts.md").read_text("utf-8"))
    text = (site / "concepts.html").read_text("utf-8")
    assert text.count('<svg role="img" aria-label=') == len(drawings) == 4


def test_a_link_to_a_file_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    """Beside a link that is found, of which nothing is said."""
    (tmp_path / "docs").mkdir()
    page = "[a](../jobs/sweep.yaml), [b](../jobs/none.yaml)\n\n```\n[c](../jobs/neither.yaml)\n```\n"
    (tmp_path / "docs" / "index.md").write_text(page)
    hook = ROOT / "docs" / "site" / "links.py"
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\nhooks: ['{hook}']\nextra: {{pages: {{}}}}\nplugins: []\n")
    ended = build("--config-file", str(tmp_path / "mkdocs.yml"))
    assert ended.returncode == 1
    assert "docs/index.md links to ../jobs/none.yaml, which does not exist" in ended.stderr
    assert ended.stderr.count("links to") == 1


def test_a_browser_searches_without_a_server(site: Path, tmp_path: Path) -> None:
    """From a file: nothing is asked for in the network, no error in the console, and the search finds pages."""
    found = opened(site / "index.html", tmp_path, query="q=ASHA")
    assert (found.console, found.requested) == ((), ())
    results = re.findall(r'<a href="[^"]*?(\w+\.html)[^"]*" class="md-search-result__link"', found.dom)
    assert "sweeps.html" in results
