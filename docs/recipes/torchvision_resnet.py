"""A torchvision network as primary network: resnet18 with generated weights, against the same with ordinary ones."""

import argparse

import torch
import torchvision
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import hyperfunc as hf
from hyperfunc import data, optim, training

BATCH, RATE = 64, 0.002
torch.manual_seed(0)  # of what the module brings with it
net = torchvision.models.resnet18(num_classes=10)
net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)  # for small pictures, as is the next line
net.maxpool = nn.Identity()
model = hf.hyperize(net)  # all its convolutions, but the stem
print(f"{hf.summary(model)}\n")


def prepare(images: data.Images) -> tuple[Tensor, Tensor]:
    return F.avg_pool2d(images.pixels.permute(0, 3, 1, 2) / 255, 4), images.labels


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60, help="of each of the two")
steps = parser.parse_args().steps
dataset = data.load_dataset("digits")
(images, labels), (test_images, test_labels) = prepare(dataset.train), prepare(dataset.test)
picked = torch.randint(len(labels), (steps, BATCH), generator=Generator().manual_seed(0))  # the same for both
losses: dict[str, list[float]] = {"generated": [], "ordinary": []}
optimizer = optim.adam(optim.cosine(RATE, steps))
state = training.init_state(model, optimizer, Generator().manual_seed(0))
step = training.make_train_step(model, optimizer)
for rows in picked:
    state, metrics = step(state, (images[rows], labels[rows]))
    losses["generated"].append(metrics.loss.item() / BATCH)
adam = torch.optim.Adam(net.parameters(), RATE)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
for rows in picked:
    adam.zero_grad()
    loss = F.cross_entropy(net(images[rows]), labels[rows])
    loss.backward()
    adam.step()
    schedule.step()
    losses["ordinary"].append(loss.item())

ax = Figure(figsize=(5.5, 3.4), layout="constrained").subplots()
networks = {"generated": hf.materialize(model, state.params, state.batch_stats), "ordinary": net}
counts = hf.num_params(state.params), hf.num_params(dict(net.named_parameters()))
for (name, network), count in zip(networks.items(), counts, strict=True):
    accuracy = (network.eval()(test_images).argmax(1) == test_labels).float().mean().item()
    print(f"{name} weights: {count:,} parameters, test accuracy {accuracy:.1%}")
    ax.semilogy(losses[name], label=f"{name} weights, {count:,} parameters")
ax.set(xlabel="step", ylabel="training loss")
ax.legend(fontsize=8)
ax.figure.savefig("torchvision_resnet.png", dpi=80)
