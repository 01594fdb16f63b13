"""A torchvision network as primary network: a resnet18 on the digits, with generated and with ordinary weights."""

import argparse

import torch
import torchvision
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import hyperfunc as hf
from hyperfunc import data, optim, training

BATCH = 64

torch.manual_seed(0)  # of what the module brings with it
net = torchvision.models.resnet18(num_classes=10)
net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)  # the stem of small pictures
net.maxpool = nn.Identity()
hyper = hf.hyperize(net)  # its 3x3 and 1x1 convolutions, but the stem
plain = hf.hyperize(net, targets=["fc.bias"])


def load(batch: data.Images) -> tuple[Tensor, Tensor]:
    return F.avg_pool2d(batch.pixels.permute(0, 3, 1, 2) / 255, 4), batch.labels


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60)
steps = parser.parse_args().steps
dataset = data.load_dataset("digits")
print(hf.summary(hyper))
import time
optimizer = optim.adam(optim.cosine(0.002, steps))
for name, model in (("generated", hyper), ("ordinary", plain)):
    state = training.init_state(model, optimizer, Generator().manual_seed(0))
    step = training.make_train_step(model, optimizer, load=load)
    t=time.time()
    losses=[]
    for i in range(steps):
        begin = (i * BATCH) % (len(dataset.train.labels)-BATCH)
        batch=data.Images(*(c[begin:begin+BATCH] for c in dataset.train))
        state, m = step(state, batch)
        losses.append(float(m.loss/m.total))
    print(name, time.time()-t, losses[::5])
    met = training.evaluate(model, state.params, state.batch_stats, data.batches(dataset.test, 500), eval_step=training.make_eval_step(model, load=load))
    print(name, hf.num_params(state.params), met.correct/met.total, met.loss/met.total)
