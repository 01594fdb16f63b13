"""A step with convolutions of ours that another process has compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import torch
from torch import nn
from torch._dynamo.utils import counters
import hyperfunc as hf
from hyperfunc import capture, optim, training, winograd

winograd.is_worthwhile = lambda: True
called = []
run = winograd._run
winograd._run = lambda name, *rest: (called.append(name), run(name, *rest))
layers = nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
model = hf.hyperize(nn.Sequential(*layers), targets="2.weight")
generator = torch.Generator().manual_seed(0)
optimizer = optim.sgd(0.01)
state = training.init_state(model, optimizer, generator)
batch = torch.randn(4, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last), torch.arange(4)
step = training.make_train_step(model, optimizer)
losses = [float(each(state, batch)[1].loss) for each in (capture.compile_step(step, batch), step)]
hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
print(abs(losses[0] - losses[1]) < 1e-5, sorted(called), hits > 0)
"""

NAMES = ["convolve", "input_gradient", "kernel_gradient"]


def test_it_is_found_in_the_cache(tmp_path: Path) -> None:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    for is_found in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300, check=True
        )
        assert done.stdout.strip() == f"True {NAMES} {is_found}", done.stderr
