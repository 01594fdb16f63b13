"""Every script under docs/recipes runs, and shows what its page says.

Each is run once, to its end, where a recipe named below is shortened. A new one joins by lying in the folder, with a
page of its name beside it.
"""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT

RECIPES = ROOT / "docs" / "recipes"
SCRIPTS = sorted(RECIPES.glob("*.py"))

MOST_LINES = 60
MOST_BYTES_OF_A_PICTURE = 60_000

SHORTER = {
    "torchvision_resnet": ("--steps", "5"),
    "back_to_plain": ("--steps", "12"),
    "three_tasks": ("--steps", "120"),
    "weights_per_sample": ("--steps", "300"),
    "ensemble": ("--steps", "120"),
    "weight_decay": ("--steps", "300"),
}
"""Arguments that make a recipe short enough for a test, if that takes away nothing of what it shows."""


def torchvision_resnet(found: dict[str, Any]) -> None:
    """Both learn, and the one has less than a twentieth of the other's parameters."""
    for losses in found["losses"].values():
        assert losses[-1] < 0.6 * losses[0], losses
    generated, ordinary = found["counts"]
    assert generated < ordinary / 20


def back_to_plain(found: dict[str, Any]) -> None:
    """The plain network starts where the hypernetwork ended, and goes on from there; what is exported is the same."""
    assert found["materialized"] == pytest.approx(found["generated"], rel=1e-5)
    assert found["tuned"] < 0.9 * found["materialized"]
    assert found["loaded"] == pytest.approx(found["tuned"], rel=1e-5)
    if "session" in found:  # where onnxruntime is installed
        assert found["run"] == pytest.approx(found["tuned"], rel=1e-4)


def three_tasks(found: dict[str, Any]) -> None:
    """Task 1 after three tasks: kept by the regulariser, forgotten without; all tasks are learned either way."""
    kept, forgotten = found["results"]["with"], found["results"]["without"]
    for rows in (kept, forgotten):
        assert all(rows[task][task] > 0.9 for task in range(3)), rows
    assert kept[2][0] > 0.95
    assert forgotten[2][0] < 0.85


def weights_per_sample(found: dict[str, Any]) -> None:
    """Curves that were not trained on are drawn."""
    assert found["explained"] > 0.95


def ensemble(found: dict[str, Any]) -> None:
    """The ensemble is better calibrated than its members, and no worse at its work."""
    labels, together = found["labels"], found["together"]
    errors = [found["calibration"](p, labels)[3] for p in found["each"]]
    assert found["calibration"](together, labels)[3] < 0.6 * min(errors)
    accuracies = [(p.argmax(1) == labels).float().mean() for p in found["each"]]
    assert (together.argmax(1) == labels).float().mean() > sum(accuracies) / len(accuracies)


def weight_decay(found: dict[str, Any]) -> None:
    """The sweep is near the networks trained for one weight decay each, and its best lies inside of the range."""
    fixed, swept = found["losses"]
    torch.testing.assert_close(swept[::10], fixed, rtol=0.35, atol=0.0)
    assert 0 < swept.argmin() < len(swept) - 1
    assert swept.min() < 1.1 * fixed.min()


CLAIMS: dict[str, Callable[[dict[str, Any]], None]] = {
    "torchvision_resnet": torchvision_resnet,
    "back_to_plain": back_to_plain,
    "three_tasks": three_tasks,
    "weights_per_sample": weights_per_sample,
    "ensemble": ensemble,
    "weight_decay": weight_decay,
}


# Torch's own, where it loads an exported program, and where it makes ONNX of it.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable", "ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_recipe(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(script.read_text().splitlines()) <= MOST_LINES
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *SHORTER.get(script.stem, ())])
    with torch.random.fork_rng():
        found = runpy.run_path(str(script), run_name="__main__")
    page = script.with_suffix(".md").read_text()
    assert f"python {script.name}" in page
    for picture in tmp_path.glob("*.png"):
        assert f"]({picture.name})" in page, f"the page does not show {picture.name}"
        assert os.path.getsize(RECIPES / picture.name) < MOST_BYTES_OF_A_PICTURE
    if script.stem in CLAIMS:
        CLAIMS[script.stem](found)


def test_every_claim_belongs_to_a_recipe() -> None:
    assert SHORTER.keys() | CLAIMS.keys() <= {script.stem for script in SCRIPTS}
