"""python -m hyperfunc.check_gpu: what torch can use of this machine, and a training step on each device as proof.

Exits with 0 if all devices work (the CPU, where there is no GPU) and with 1 and a remedy if a GPU is there but cannot
be used.
"""

import platform
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import hyperfunc as hf
from hyperfunc import capture, data, optim, training, tree
from hyperfunc.exits import one_line


def main() -> int:
    """Prints the report and returns the exit code."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    present, drivers = find_gpus()
    for label, value in (
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("CUDA", torch.version.cuda or "none in this build of torch"),
        ("cuDNN", str(torch.backends.cudnn.version() or "none")),
        ("driver", drivers or "none found"),
        ("GPUs", str(visible)),
    ):
        print(f"{label:9}{value}")

    failed = False
    if present and not visible:
        print(f"FAILED   an NVIDIA GPU is present ({present}), but torch can use none: {remedy()}")
        failed = True
    devices = [torch.device("cuda", index) for index in range(visible)] or [torch.device("cpu")]
    for device in devices:
        try:
            print(f"{device!s:9}{describe(device)}")
            loss = train_one_step(device)
        except torch.OutOfMemoryError:
            print(f"FAILED   no training step on {device}: its memory is full; end what else runs on it (nvidia-smi)")
            failed = True
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            print(f"FAILED   no training step on {device}: {reason}: {remedy()}")
            failed = True
        else:
            print(f"         one training step: loss {loss:.4f}")
            if device.type == "cuda" and (reason := why_no_fast_step(device)):
                print(f"FAILED   {reason}")
                failed = True
    return int(failed)


def why_no_fast_step(device: torch.device) -> str:
    """What goes wrong with a step that is compiled, and on a GPU captured, and what does without; '' where it gives
    what it should."""
    state, batch = torch.ones(8, device=device), torch.arange(8.0, device=device)

    def step(state: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        return state + batch.square(), batch.mean()

    expected, fast = step(state, batch), step
    for done, make, cure in (
        (
            "compiled",
            lambda fast: capture.compile_step(fast, batch),
            "Triton needs a C compiler and Python's headers, as of gcc and python3-dev; --engine graph",
        ),
        ("captured", lambda fast: capture.capture(fast, state, batch), "--engine compiled"),
    ):
        try:
            fast = make(fast)
            found = fast(state, batch)
            reason = "" if all(map(torch.allclose, found, expected)) else f"it gave {found}, expected {expected}"
        except Exception as error:  # the compiler and what it calls raise errors of many kinds
            reason = one_line(error)[:200]
        if reason:
            return f"no {done} step on {device}: {reason}; {cure} of train.py does without"
    return ""


def train_one_step(device: torch.device) -> float:
    """Trains a small hypernetwork for a step on made-up pictures and returns the loss.

    Raises:
        RuntimeError: The device cannot do it, or the loss is not finite.
    """
    model = hf.hyper_resnet(depth=10)
    optimizer = optim.adam(0.002)
    generator = data.seeded_generator("check_gpu")
    state = tree.to(training.init_state(model, optimizer, generator), device)
    images = torch.randn(8, 3, data.SIZE, data.SIZE, generator=generator).to(device)
    labels = torch.arange(8, device=device)
    _, metrics = training.make_train_step(model, optimizer)(state, (images, labels))
    loss = metrics.mean_loss.item()
    if not loss < float("inf"):
        raise RuntimeError(f"the loss is {loss}")
    return loss


def describe(device: torch.device) -> str:
    """Name, memory and compute capability of a GPU; cores of a CPU."""
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {memory:.0f} GiB, compute capability {properties.major}.{properties.minor}"


def remedy() -> str:
    """What to do about a GPU that torch cannot use."""
    if torch.version.cuda is None:
        return "this build of torch is for the CPU alone; pip install --force-reinstall torch torchvision from PyPI"
    if not torch.cuda.is_available():
        return (
            f"the driver does not work with CUDA {torch.version.cuda}; update it, or install a torch built for an "
            "older CUDA, and see that CUDA_VISIBLE_DEVICES does not hide the GPU"
        )
    return f"this torch was built for {', '.join(torch.cuda.get_arch_list())}; install one built for this GPU"


def find_gpus() -> tuple[str, str]:
    """What says that there is a GPU, or '', and the driver's version, or '': asks nvidia-smi and the PCI bus."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return on_pci_bus(), ""
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == 0 and lines and all("," in line for line in lines):
        names, versions = zip(*(line.rsplit(",", 1) for line in lines), strict=True)
        return ", ".join(names), ", ".join(sorted({version.strip() for version in versions}))
    if any("No devices were found" in line for line in lines):
        return on_pci_bus(), ""
    return f"nvidia-smi says: {' '.join(lines or done.stderr.split())[:200]}", ""


def on_pci_bus(bus: Path = Path("/sys/bus/pci/devices")) -> str:
    """The addresses of NVIDIA's display and compute devices on the PCI bus, or ''."""
    found = []
    for device in sorted(bus.glob("*")):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            found.append(device.name)
    return f"PCI {', '.join(found)}" if found else ""


if __name__ == "__main__":
    sys.exit(main())
