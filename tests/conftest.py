"""What all tests share: shape checking of every call into the package, determinism, and the `gpu` mark."""

import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import prepared
import pytest
import torch
from jaxtyping import install_import_hook

SHAPE_CHECKS = os.environ.get("HYPERFUNC_SHAPE_CHECKS") != "off"
"""Whether the shapes in every signature are checked; torch.compile cannot trace that, and its tests go without."""

if SHAPE_CHECKS:  # before the package is imported
    install_import_hook("hyperfunc", "typechecker.typechecked")

# And so in the processes that the tests start: on small networks more threads only wait for each other, above all on a
# busy machine, and results may differ in the last bit between numbers of threads.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips, with the reason, what cannot run here: without a GPU, or with the shape checks on."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))
        elif item.get_closest_marker("traced") and SHAPE_CHECKS:
            item.add_marker(pytest.mark.skip(reason="is run by slow/test_tracing.py, without the checks of shapes"))


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here outlives a power cut, and waiting for the disk takes longer than most of what is tested."""
    monkeypatch.setattr(os, "fsync", prepared.skip_fsync)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch.compile that traces, differentiates and guards, and runs the graphs as they are: what most of its tests
    are about, without the kernels, which take far longer to make."""
    original = torch.compile

    def compile_step(function: Callable[..., object], *, options: Mapping[str, object], **others: bool) -> object:
        kept = {name: value for name, value in options.items() if name == "guard_filter_fn"}
        return original(function, backend="aot_eager", options=kept or None, **others)  # pyright: ignore

    monkeypatch.setattr(torch, "compile", compile_step)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of randomness."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """`helpers.run_train` without a process of its own, which takes seconds to import torch."""
    # Not above: what these import must be imported after the hook.
    from helpers import train_command

    import train

    monkeypatch.chdir(tmp_path)

    def run(*flags: str, drawn: bool = False) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        with prepared.drawing(drawn):
            code = train.main(train_command(*flags)[2:])
        return subprocess.CompletedProcess(flags, code, *capsys.readouterr())

    return run
