"""What all tests share: shape checking of every call into the package, determinism, and the `gpu` mark."""

import pytest
import torch
from jaxtyping import install_import_hook

# Checks the shapes in every signature while the tests run. It must come before the package is imported.
install_import_hook("hyperfunc", "beartype.beartype")

# As the processes that the tests start: results may differ in the last bit between numbers of threads.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU, with the reason, where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of randomness."""
    return torch.Generator().manual_seed(0)
