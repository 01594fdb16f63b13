"""Makes the pages of the reference, from the navigation in mkdocs.yml: reference/NAME.md documents hyperfunc.NAME."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page in map(PurePosixPath, pages(config.nav)):
        if page.parent.name == "reference":
            files.append(File.generated(config, str(page), content=f"::: hyperfunc.{page.stem}\n"))
    return files


def pages(nav: Any) -> Iterator[str]:
    """Every page in a navigation."""
    if isinstance(nav, str):
        yield nav
        return
    for entry in nav.values() if isinstance(nav, dict) else nav:
        yield from pages(entry)
