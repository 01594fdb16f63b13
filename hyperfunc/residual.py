"""The primary network: a residual network for small pictures (He et al. 2015, widened as by Zagoruyko and Komodakis
2016). A plain module that knows nothing of hypernetworks.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from hyperfunc.arguments import positive

Shortcut = Literal["pad", "conv"]
Block = Literal["post", "pre"]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them.

    "post" is the block of the first residual networks, normalisation after convolution and a last ReLU after the sum;
    "pre" is that of the wide ones, normalisation and ReLU before each convolution and nothing after the sum.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, *, shortcut: Shortcut, block: Block) -> None:
        super().__init__()
        self.pre = block == "pre"
        self.bn1 = _batch_norm(in_channels if self.pre else channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1)
        self.bn2 = _batch_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut: Callable[[Tensor], Tensor]
        if in_channels == channels and stride == 1:
            self.shortcut = nn.Identity()
        elif shortcut == "conv":
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride)
        else:
            self.shortcut = PadShortcut(channels - in_channels, stride)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n out h2 w2"]:
        if self.pre:
            h = self.conv1(F.relu(self.bn1(x)))
            h = self.conv2(F.relu(self.bn2(h)))
            return h + self.shortcut(x)
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return F.relu(h + self.shortcut(x))


class PadShortcut(nn.Module):
    """A shortcut without parameters: every `stride`-th pixel, and zeros for the channels that x lacks."""

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n out h2 w2"]:
        # A pool of one pixel and not a slice, whose gradient would come back in NCHW order and slow all that follows.
        return F.pad(F.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, 0, self.extra_channels))


class ResNet(nn.Module):
    """A residual network with depth = 6n + 4 layers and `width` times 16, 32 and 64 channels in its three stages.

    The 3x3 stem has 16 channels. Each stage has n blocks; the second and third start by halving the resolution. A
    global average pool and a linear head end it. All convolutions have biases. Pictures of any size
    will do; it is made for 32x32 pixels.

    Args:
        depth: 6n + 4 for n of 1 or more: 10, 16, 22, 28, 34, 40 and so on.
        width: The widening factor k.
        num_classes: Length of the output.
        shortcut: "pad", without parameters, or "conv", a 1x1 convolution, where a block changes the shape.
        block: "post" or "pre" (activation).

    Raises:
        ValueError: The depth is not 6n + 4, another number is not positive, or a name is unknown.
    """

    def __init__(
        self,
        depth: int = 40,
        width: int = 1,
        num_classes: int = 10,
        *,
        shortcut: Shortcut = "pad",
        block: Block = "post",
    ) -> None:
        super().__init__()
        blocks_per_stage = check_depth(depth)
        width, num_classes = positive("width", width), positive("num_classes", num_classes)
        for name, value, known in (("shortcut", shortcut, get_args(Shortcut)), ("block", block, get_args(Block))):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        blocks: list[nn.Module] = []
        channels = 16
        for stage, stage_channels in enumerate((16 * width, 32 * width, 64 * width)):
            for index in range(blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(ResidualBlock(channels, stage_channels, stride, shortcut=shortcut, block=block))
                channels = stage_channels
        self.blocks = nn.Sequential(*blocks)
        self.pre = block == "pre"
        # Where normalisation comes first, the stem's is the first block's, and the last sum still lacks one.
        self.bn = _batch_norm(channels if self.pre else 16)
        self.head = nn.Linear(channels, num_classes)

    @property
    def biases_before_norms(self) -> tuple[str, ...]:
        """The biases of those convolutions whose output goes into a batch norm and nowhere else.

        In training the norm takes away the mean, and with it what such a bias has added: its gradient is zero. Where a
        layer was exchanged for one of another kind nothing is said of its bias, nor of any in a subclass.
        """
        if type(self) is not ResNet:
            return ()
        pairs = [] if self.pre else [("stem", self.stem, self.bn)]
        for index, block in enumerate(self.blocks):
            if type(block) is ResidualBlock:
                pairs.append((f"blocks.{index}.conv1", block.conv1, block.bn2 if block.pre else block.bn1))
                if not block.pre:
                    pairs.append((f"blocks.{index}.conv2", block.conv2, block.bn2))
        own = {name for name, _ in self.named_parameters()}
        known = [name for name, conv, norm in pairs if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d]
        return tuple(f"{name}.bias" for name in known if f"{name}.bias" in own)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        h = self.stem(images)
        if not self.pre:
            h = F.relu(self.bn(h))
        h = self.blocks(h)
        if self.pre:
            h = F.relu(self.bn(h))
        # As `mean` over the pixels, but its gradient keeps the memory order of h.
        return self.head(F.avg_pool2d(h, h.shape[2:]).flatten(1))


def check_depth(depth: int) -> int:
    """The number n of blocks per stage in a network of `depth` = 6n + 4 layers.

    Raises:
        ValueError: There is no such n of 1 or more; the message names the depths nearby.
    """
    depth = positive("depth", depth)
    if depth < 10 or (depth - 4) % 6:
        lower = max(10, depth - (depth - 4) % 6)
        raise ValueError(f"depth: got {depth}, expected 6n + 4, for example {lower} or {lower + 6}")
    return (depth - 4) // 6


def init_weights(module: nn.Module, generator: Generator) -> dict[str, Tensor]:
    """Fresh parameters for the convolutions, linear layers and norms of `module`, by name; `module` is left alone.

    Convolutions get He's normal for their fan-in (He et al. 2015, equation 10), linear layers the uniform of bound
    1/sqrt(fan_in), norms ones, and every bias zeros.

    Args:
        module: Only its layers' types and shapes are read, so it may live on the meta device.
        generator: The source of randomness; the tensors are made on its device.

    Raises:
        ValueError: `module` has a parameter in a layer of another kind.
    """
    device = generator.device
    weights: dict[str, Tensor] = {}
    for path, layer in module.named_modules():
        for short_name, parameter in layer.named_parameters(recurse=False):
            name = f"{path}.{short_name}" if path else short_name
            shape = parameter.shape
            fan_in = shape[1:].numel()
            if short_name == "bias":
                weights[name] = torch.zeros(shape, device=device)
            elif isinstance(layer, nn.Conv2d):
                weights[name] = torch.randn(shape, generator=generator, device=device) * (2 / fan_in) ** 0.5
            elif isinstance(layer, nn.Linear):
                weights[name] = (torch.rand(shape, generator=generator, device=device) * 2 - 1) / fan_in**0.5
            elif isinstance(layer, nn.BatchNorm2d):
                weights[name] = torch.ones(shape, device=device)
            else:
                raise ValueError(f"module: no rule for {name} of a {type(layer).__name__}")
    return weights


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    # The count of batches serves a norm without momentum alone; leaving it out saves an operation a layer.
    norm.num_batches_tracked = None
    return norm
