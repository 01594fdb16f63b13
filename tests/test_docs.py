"""The documentation's navigation, in which every module and every page has its place; and the examples of README and
guide.

CI builds the pages themselves."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from helpers import ROOT

DOCS = ROOT / "docs"


def pages(nav: Any) -> Iterator[PurePosixPath]:
    if isinstance(nav, str):
        yield PurePosixPath(nav)
        return
    for entry in nav.values() if isinstance(nav, dict) else nav:
        yield from pages(entry)


NAV = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
REFERENCE = PurePosixPath("reference")


def test_every_public_module_is_in_the_reference_once() -> None:
    package = ROOT / "hyperfunc"
    folders = [path.parent.stem for path in package.glob("*/__init__.py")]
    modules = [path.stem for path in package.glob("*.py")] + folders
    documented = [page.stem for page in NAV if page.parent == REFERENCE]
    assert sorted(documented) == sorted(name for name in modules if not name.startswith("_"))


def test_every_page_is_in_the_navigation_once() -> None:
    written = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(written) == sorted(str(page) for page in NAV if page.parent != REFERENCE)


def test_every_recipe_is_listed_and_has_a_page() -> None:
    recipes = DOCS / "recipes"
    listed = (recipes / "README.md").read_text()
    for script in recipes.glob("*.py"):
        assert script.with_suffix(".md").exists(), f"{script.name} has no page"
        assert f"]({script.stem}.md)" in listed, f"{script.name} is not listed in {Path('recipes/README.md')}"


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md", "docs/library.md"])
def test_examples_run_one_after_the_other(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Compilation takes a minute, and is tried by other tests.
    text, compilations = re.subn(r"capture\.compile_step\(step, batch\)", "step", (ROOT / name).read_text())
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert compilations
    assert len(blocks) >= 3
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{name}, block {number}", "exec"), names)
