"""A hook of MkDocs: the site has the layout of the repository, so a link between two files is the same on both."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
SHOWN = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*", "jobs/*", "benchmarks/*.md")
LEFT_OUT = {".py"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of `docs/` by those of the repository that the site shows, each under its path there."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    paths = sorted({path for pattern in SHOWN for path in ROOT.glob(pattern) if path.is_file()})
    names = [path.relative_to(ROOT).as_posix() for path in paths if path.suffix not in LEFT_OUT]
    return Files([*theme, *(File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in names)])


def on_page_markdown(markdown: str, page: Page, **_: object) -> None:
    """Give the front page the whole width: it has no neighbours in its section."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation", "toc"]
