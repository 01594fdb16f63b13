"""Weights for each sample from a conditioning vector: one network draws every curve of a family."""

import argparse

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn

import hyperfunc as hf
from hyperfunc import optim, training

LOW, HIGH = torch.tensor([0.5, 1.0, 0.0]), torch.tensor([1.5, 3.0, 3.0])  # amplitude, frequency, phase

torch.manual_seed(0)  # of what the modules bring with them
net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
base = hf.hyperize(net, targets=["*.weight"], unit=(16, 16), z_dim=16)
mlp = hf.conditions.from_module(nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 16)), code_dim=16)
# At constant length in front of the network, so that no condition scales what comes out of it.
encoder = mlp._replace(apply=lambda params, c: mlp.apply(params, hf.encode_bounded((c - LOW) / (HIGH - LOW))))
model = hf.conditional(base, encoder)


def draw(generator: Generator, count: int) -> Tensor:
    return LOW + (HIGH - LOW) * torch.rand(count, 3, generator=generator)


def curve(c: Tensor, x: Tensor) -> Tensor:
    return c[..., :1] * torch.sin(c[..., 1:2] * x + c[..., 2:])


def objective(params, batch_stats, batch):
    c, x = batch
    y, batch_stats = model.apply_each(params, batch_stats, c, x, train=True)  # sample i through the weights of c[i]
    loss = (y - curve(c, x)).square().mean()
    return loss, (batch_stats, {"loss": loss})


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=1500)
steps = parser.parse_args().steps
generator = Generator().manual_seed(0)
optimizer = optim.adam(optim.cosine(0.005, steps))
state = training.init_state(model, optimizer, generator)
step = training.make_step(objective, optimizer)
for _ in range(steps):
    state, _ = step(state, (draw(generator, 128), 4 * torch.rand(128, 1, generator=generator) - 2))

c, grid = draw(generator, 200), torch.linspace(-2, 2, 100).unsqueeze(1)
curves = torch.vmap(lambda one: model.apply(state.params, state.batch_stats, one, grid, train=False)[0])(c)
truth = curve(c[:, None], grid)
explained = 1 - (curves - truth).square().mean().item() / truth.var().item()
print(f"variance explained over 200 curves that were not trained on: {explained:.4f}")
ax = Figure(figsize=(5.5, 3.2), layout="constrained").subplots()
for i, colour in enumerate(("#0072b2", "#d55e00", "#009e73", "#cc79a7")):
    ax.plot(grid, curves[i], color=colour, label="{:.1f} sin({:.1f} x + {:.1f})".format(*c[i].tolist()))
    ax.plot(grid, truth[i], color=colour, linestyle=":", linewidth=3, alpha=0.5)
ax.set(xlabel="x", ylabel="y", title="one hypernetwork; dotted: the truth")
ax.legend(fontsize=8)
ax.figure.savefig("weights_per_sample.png", dpi=80)
