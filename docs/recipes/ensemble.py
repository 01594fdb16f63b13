"""An ensemble trained at once by vmap, and how well its probabilities are calibrated."""

import argparse

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import hyperfunc as hf
from hyperfunc import data, ensembles, optim, training

SIZE, BINS = 8, 10

torch.manual_seed(0)  # of what is not generated
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
model = hf.hyperize(net, targets=["1.weight", "3.weight"], z_dim=16)
members = hf.ensemble(model, SIZE)


def prepare(images: data.Images, noise: float) -> tuple[Tensor, Tensor]:
    pixels = F.avg_pool2d(images.pixels[..., 0].unsqueeze(1) / 255, 4)
    return pixels + noise * torch.randn(pixels.shape, generator=data.seeded_generator("noise")), images.labels


def calibration(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each bin of confidence its share of the samples, mean confidence and accuracy; the expected error."""
    confidence, predicted = probabilities.max(dim=1)
    bins = F.one_hot((confidence * BINS).long().clamp(max=BINS - 1), BINS).float()
    share, correct = bins.mean(0), (predicted == labels).float()
    mean, accuracy = (confidence @ bins) / bins.sum(0), (correct @ bins) / bins.sum(0)
    return share, mean, accuracy, (share * (mean - accuracy).abs()).nansum()


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=300)
dataset = data.load_dataset("digits", train_size=300)
batch, (images, labels) = prepare(dataset.train, 0.0), prepare(dataset.test, 0.25)  # noisier than what is trained on
optimizer = optim.adam(0.003)
state = ensembles.init_state(members, optimizer, torch.Generator().manual_seed(0))
step = ensembles.map_step(training.make_train_step(model, optimizer))  # all members in one step
for _ in range(parser.parse_args().steps):
    state, metrics = step(state, batch)

each = members.apply(state.params, state.batch_stats, images, train=False)[0].softmax(dim=2)
together = members.predict(state.params, state.batch_stats, images)
for name, several in (("a member, on the average", each), (f"the ensemble of {SIZE}", together[None])):
    accuracy = (several.argmax(2) == labels).float().mean().item()
    error = sum(calibration(p, labels)[3] for p in several) / len(several)
    print(f"{name}: accuracy {accuracy:.1%}, expected calibration error {error:.3f}")
ax = Figure(figsize=(4.6, 4), layout="constrained").subplots()
ax.plot((0, 1), (0, 1), color="grey", linestyle=":", label="perfectly calibrated")
for name, p in (("first member", each[0]), ("ensemble", together)):
    share, confidence, accuracy, error = calibration(p, labels)
    enough = share > 0.02  # a bin of a few samples says nothing
    ax.plot(confidence[enough], accuracy[enough], "o-", label=f"{name}: ECE {error:.3f}")
ax.set(xlabel="confidence", ylabel="accuracy")
ax.legend()
ax.figure.savefig("ensemble.png", dpi=80)
