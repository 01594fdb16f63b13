"""Back to plain weights: materialize, fine-tune, and export by torch.export and to ONNX."""

import argparse
from importlib.util import find_spec

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import hyperfunc as hf
from hyperfunc import data, optim, training


class Net(nn.Sequential):  # one's own class, which knows nothing of hypernetworks
    def __init__(self) -> None:
        middle = [layer for _ in range(2) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())]
        last = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)
        super().__init__(nn.Conv2d(1, 32, 3, stride=2, padding=1), *middle, *last)


def report(what: str, logits: Tensor) -> float:
    loss, accuracy = F.cross_entropy(logits, test_labels), (logits.argmax(1) == test_labels).float().mean()
    print(f"{what:12} test loss {loss:.6f}, accuracy {accuracy:.1%}")
    return loss.item()


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60, help="of the hypernetwork, and of the fine-tuning")
steps = parser.parse_args().steps
dataset = data.load_dataset("digits")
parts = ((F.avg_pool2d(p.pixels[..., 0].unsqueeze(1) / 255, 4), p.labels) for p in (dataset.train, dataset.test))
batch, (test_images, test_labels) = parts
torch.manual_seed(0)  # of what the module brings with it
net = Net()
model = hf.hyperize(net, z_dim=8)
optimizer = optim.adam(optim.cosine(0.01, steps))
state = training.init_state(model, optimizer, Generator().manual_seed(0))
step = training.make_train_step(model, optimizer)
for _ in range(steps):
    state, _ = step(state, batch)
print(f"{hf.num_params(state.params):,} parameters, as plain weights {sum(p.numel() for p in net.parameters()):,}")
generated = report("hypernetwork", model.apply(*state[1:3], test_images, train=False)[0])

net.load_state_dict(hf.materialize(model, state.params, state.batch_stats).state_dict())
materialized = report("materialized", net.eval()(test_images))
adam = torch.optim.Adam(net.train().parameters(), 0.001)
for _ in range(steps):
    adam.zero_grad()
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    adam.step()
tuned = report("fine-tuned", net.eval()(test_images))
exported = torch.export.export(net, (test_images,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
torch.export.save(exported, "back_to_plain.pt2")
loaded = report("exported", torch.export.load("back_to_plain.pt2").module()(test_images))
if find_spec("onnxruntime") and find_spec("onnxscript"):
    from onnxruntime import InferenceSession

    torch.onnx.export(exported, (), "back_to_plain.onnx", input_names=["images"], dynamo=True, verbose=False)
    session = InferenceSession("back_to_plain.onnx", providers=["CPUExecutionProvider"])
    run = report("onnxruntime", torch.from_numpy(session.run(None, {"images": test_images.numpy()})[0]))
