"""Three tasks in sequence, one hypernetwork: with and without the regulariser of von Oswald et al. (2019)."""

import argparse

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import hyperfunc as hf

TASKS = ((0, 1, 2), (3, 4, 5), (6, 7, 8))  # digits; a network says which of its task's three it sees

net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, 3, bias=False))
base = hf.hyperize(net, targets=["*.weight"], z_dim=16)  # every weight is generated, so no task can change another's
model = hf.conditional(base, hf.conditions.table(len(TASKS)))  # embeddings a task; the generator serves them all
optimizer = hf.optim.adam(0.003)


def task_data(images: hf.data.Images, digits: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    mine = (images.labels >= digits[0]) & (images.labels <= digits[-1])
    pixels = images.pixels[mine][..., 0].unsqueeze(1) / 255
    return F.avg_pool2d(pixels, 4), images.labels[mine] - digits[0]


def learn_in_sequence(strength: float, steps: int) -> list[list[float]]:
    def objective(params, batch_stats, batch):
        task, (images, labels), kept = batch
        logits, batch_stats = model.apply(params, batch_stats, task, images, train=True)
        now = [model.weights(params, torch.tensor(old)) for old in range(len(kept))]
        changes = [(a[name] - b[name]).square().sum() for a, b in zip(now, kept, strict=True) for name in a]
        loss = F.cross_entropy(logits, labels) + strength / max(len(kept), 1) * sum(changes)
        return loss, (batch_stats, {"loss": loss})

    step, accuracies = hf.training.make_step(objective, optimizer), []
    params, batch_stats = model.init(torch.Generator().manual_seed(0))
    for task in range(len(TASKS)):
        kept = [model.weights(params, torch.tensor(old)) for old in range(task)]
        state = hf.training.TrainState(torch.tensor(0), params, batch_stats, optimizer.init(params))
        for _ in range(steps):
            state, _ = step(state, (torch.tensor(task), train[task], kept))
        params, batch_stats = state.params, state.batch_stats
        logits = [model.apply(params, batch_stats, torch.tensor(t), test[t][0], train=False)[0] for t in range(3)]
        accuracies.append([(logits[t].argmax(1) == test[t][1]).float().mean().item() for t in range(3)])
    return accuracies


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=300, help="for each task")
dataset = hf.data.load_dataset("digits")
train, test = ([task_data(part, digits) for digits in TASKS] for part in (dataset.train, dataset.test))
results = {name: learn_in_sequence(s, parser.parse_args().steps) for name, s in (("with", 1.0), ("without", 0.0))}
axes = Figure(figsize=(8, 3), layout="constrained").subplots(1, 2, sharey=True)
for ax, (name, rows) in zip(axes, results.items(), strict=True):
    print(f"{name} the regulariser: accuracy on task 1", *(f"{row[0]:.1%}" for row in rows), "after 1, 2, 3 tasks")
    for t, marker in enumerate("os^"):
        ax.plot(range(t + 1, 4), [row[t] for row in rows][t:], marker=marker, label=f"task {t + 1}: {TASKS[t]}")
    ax.set(title=f"{name} the regulariser", xlabel="tasks learned", ylabel="test accuracy", xticks=(1, 2, 3))
axes[0].legend()
axes[0].figure.savefig("three_tasks.png", dpi=80)
