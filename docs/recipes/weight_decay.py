"""One hypernetwork over a range of weight decay, swept afterwards (Lorraine and Duvenaud 2018)."""

import argparse

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import hyperfunc as hf

LOW, HIGH = -4.0, -1.0  # of log10 of the weight decay
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 10, bias=False))
base = hf.hyperize(net, targets=["*.weight"], z_dim=32)
torch.manual_seed(0)  # of the encoder's weights
encoder = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 8))
model = hf.conditional(base, hf.conditions.from_module(encoder, code_dim=8))


def cross_entropy(weights: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(base.forward(weights, {}, images, train=False)[0], labels)


def penalised(weights: dict[str, Tensor], log: Tensor) -> Tensor:
    return cross_entropy(weights, *train) + 0.5 * 10**log * sum(weight.square().sum() for weight in weights.values())


def generated(params: hf.ConditionalParams, logs: Tensor) -> dict[str, Tensor]:
    return torch.vmap(model.weights, in_dims=(None, 0))(params, hf.encode_bounded(logs.view(-1, 1), LOW, HIGH))


def descend(loss, params):
    opt_state = optimizer.init(params)
    for step in range(steps):
        logs = LOW + (HIGH - LOW) * torch.rand(8, generator=generator)
        params, opt_state = optimizer.update(torch.func.grad(loss)(params, logs), opt_state, params, torch.tensor(step))
    return params


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=1500, help="of the hypernetwork, and of each fixed network")
steps = parser.parse_args().steps
dataset = hf.data.load_dataset("digits", train_size=100)
parts = (dataset.train, dataset.test)
train, validation = ((F.avg_pool2d(part.pixels[..., 0].unsqueeze(1) / 255, 4), part.labels) for part in parts)
optimizer, generator = hf.optim.adam(hf.optim.cosine(0.005, steps)), torch.Generator().manual_seed(0)
at, sweep = torch.arange(LOW, HIGH + 1), torch.linspace(LOW, HIGH, 31)
start = hf.tree.map(lambda weight: weight.expand(len(at), *weight.shape), base.weights(base.init(generator)[0]))
fixed = descend(lambda weights, _: torch.vmap(penalised)(weights, at).sum(), start)  # they do not see each other
params = descend(lambda p, logs: torch.vmap(penalised)(generated(p, logs), logs).mean(), model.init(generator)[0])
losses = [torch.vmap(lambda w: cross_entropy(w, *validation))(w) for w in (fixed, generated(params, sweep))]
for log, loss, swept in zip(at, losses[0], losses[1][::10], strict=True):
    print(f"weight decay 1e{log:+.0f}: validation loss {swept:.3f}, of the network trained for it {loss:.3f}")
print(f"the best of the sweep: 10^{sweep[losses[1].argmin()]:.1f}, validation loss {losses[1].min():.3f}")
ax = Figure(figsize=(5.5, 3.4), layout="constrained").subplots()
ax.semilogx(10**sweep, losses[1].detach(), label="one hypernetwork, swept")
ax.semilogx(10**at, losses[0], "o", label="networks of one weight decay each")
ax.set(xlabel="weight decay", ylabel="validation loss")
ax.legend()
ax.figure.savefig("weight_decay.png", dpi=80)
