"""The rival: the same network as an ordinary module, written as such networks usually are.

An embedding for each basic kernel, a Python loop that calls the generator once for each and concatenates what comes
back, float32 in NCHW order, `.backward()`, `torch.optim.Adam`, the loss read with `.item()` at every step, pictures
from a DataLoader with worker processes. A test holds it equal to hyperfunc's network, so that the race is fair.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2

import hyperfunc as hf

UNIT = 16


class KernelGenerator(nn.Module):
    """The two-layer linear generator, one basic kernel a call."""

    def __init__(self, z_dim: int = 64) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(UNIT, z_dim, z_dim))
        self.b_in = nn.Parameter(torch.empty(UNIT, z_dim))
        self.w_out = nn.Parameter(torch.empty(UNIT, 3, 3, z_dim))
        self.b_out = nn.Parameter(torch.empty(UNIT, 3, 3))

    def forward(self, z: Tensor) -> Tensor:
        a = torch.matmul(self.w_in, z) + self.b_in
        kernel = torch.matmul(a, self.w_out.reshape(-1, a.shape[1]).t()) + self.b_out.reshape(-1)
        return kernel.view(UNIT, UNIT, 3, 3).transpose(0, 1)


class Embeddings(nn.Module):
    """One layer's embeddings, and its kernel put together from them."""

    def __init__(self, out_channels: int, in_channels: int, z_dim: int = 64) -> None:
        super().__init__()
        self.grid = (out_channels // UNIT, in_channels // UNIT)
        self.z = nn.ParameterList([torch.empty(z_dim) for _ in range(self.grid[0] * self.grid[1])])

    def forward(self, generator: KernelGenerator) -> Tensor:
        rows = []
        for row in range(self.grid[0]):
            tiles = [generator(self.z[row * self.grid[1] + column]) for column in range(self.grid[1])]
            rows.append(torch.cat(tiles, dim=1))
        return torch.cat(rows, dim=0)


class Block(nn.Module):
    """A residual block whose two kernels are handed in."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra = channels - in_channels
        self.bias1 = nn.Parameter(torch.empty(channels))
        self.bias2 = nn.Parameter(torch.empty(channels))
        self.bn1 = nn.BatchNorm2d(channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, kernel1: Tensor, kernel2: Tensor) -> Tensor:
        h = F.relu(self.bn1(F.conv2d(x, kernel1, self.bias1, self.stride, padding=1)))
        h = self.bn2(F.conv2d(h, kernel2, self.bias2, padding=1))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        return F.relu(h + shortcut)


class LoopedHyperResNet(nn.Module):
    """The hypernetwork with its primary network: depth 6n + 4, post-activation, padded shortcuts."""

    def __init__(self, depth: int = 40, width: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        blocks_per_stage = (depth - 4) // 6
        self.generator = KernelGenerator()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = nn.ModuleList()
        self.embeddings = nn.ModuleList()
        channels = 16
        for stage, out in enumerate((16 * width, 32 * width, 64 * width)):
            for index in range(blocks_per_stage):
                self.blocks.append(Block(channels, out, 2 if stage and not index else 1))
                self.embeddings.append(Embeddings(out, channels))
                self.embeddings.append(Embeddings(out, out))
                channels = out
        self.head = nn.Linear(channels, num_classes)

    def kernels(self) -> list[Tensor]:
        """All generated kernels, in the order of the layers."""
        return [embeddings(self.generator) for embeddings in self.embeddings]

    def forward(self, images: Tensor) -> Tensor:
        h = F.relu(self.bn(self.stem(images)))
        for index, block in enumerate(self.blocks):
            kernel1 = self.embeddings[2 * index](self.generator)
            kernel2 = self.embeddings[2 * index + 1](self.generator)
            h = block(h, kernel1, kernel2)
        return self.head(h.mean(dim=(2, 3)))


def with_params_of(network: LoopedHyperResNet, params: hf.Params) -> LoopedHyperResNet:
    """Copies hyperfunc's parameters into the rival and returns it.

    Raises:
        ValueError: The two are not of one depth and width.
    """
    theirs = dict(network.named_parameters())
    ours, mine = hf.num_params(params), hf.num_params(theirs)
    if ours != mine:
        raise ValueError(f"params: {ours:,} parameters for a network of {mine:,}; make both of one depth and width")
    rows = iter(params.embeddings["3x3"])
    with torch.no_grad():
        for name, value in params.generator["3x3"]._asdict().items():
            theirs.pop(f"generator.{name}").copy_(value)
        for name in [name for name in theirs if name.startswith("embeddings.")]:
            theirs.pop(name).copy_(next(rows))
        for name, value in params.primary.items():
            theirs.pop(name.replace("conv1.bias", "bias1").replace("conv2.bias", "bias2")).copy_(value)
    return network


def train_step(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """One step as it is usually written; reads the loss at once."""
    loss = F.cross_entropy(network(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


class PictureDataset(Dataset[tuple[Tensor, int]]):
    """Pictures one by one, augmented by torchvision's transforms if they are to train on."""

    def __init__(self, pixels: Tensor, labels: Tensor, *, train: bool) -> None:
        self.pixels = pixels.permute(0, 3, 1, 2).contiguous()
        self.labels = labels.tolist()
        steps: list[nn.Module] = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if train else []
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.262))]
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pixels[index]), self.labels[index]


def train_epoch(
    network: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> None:
    """A pass over a DataLoader."""
    network.train()
    for images, labels in batches:
        train_step(network, optimizer, images.to(device, non_blocking=True), labels.to(device, non_blocking=True))


@torch.no_grad()
def accuracy(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """The share of pictures that are classified right."""
    network.eval()
    correct = total = 0
    for images, labels in batches:
        correct += (network(images.to(device)).argmax(1) == labels.to(device)).sum().item()
        total += len(labels)
    return correct / total


def loader(
    pixels: Tensor, labels: Tensor, batch_size: int, *, train: bool, workers: int = 2, endless: bool = False
) -> DataLoader[tuple[Tensor, int]]:
    """A DataLoader with worker processes that stay for the next epoch, or (`endless`) one whose epoch never ends."""
    dataset = PictureDataset(pixels, labels, train=train)
    return DataLoader(
        dataset,
        batch_size,
        shuffle=train and not endless,
        sampler=RandomSampler(dataset, replacement=True, num_samples=2**40) if endless else None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )
