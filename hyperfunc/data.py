"""Data sets as tensors, and batches as pure functions of (seed, epoch).

A data set is read once and kept whole, as uint8 in NHWC order: CIFAR-10 takes 184 MB. A batch is then an index gather
on the device, which also crops and flips, and which can stand inside a compiled or captured step. What an epoch draws
depends on the seed and the epoch alone, so that a run can be continued at any step without saving a random state.
"""

import contextlib
import hashlib
import io
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F

from hyperfunc import tree
from hyperfunc.files import lock_for, read_tensors, remove_leftovers, write_tensors

Name = Literal["cifar10", "cifar100", "digits", "folder", "synthetic"]

SIZE = 32
"""Height and width of every picture, in pixels."""

PAD = 4
"""Pixels of black around a training picture, out of which a crop of the original size is cut."""

_DOWNLOAD = ".download-"
"""How the names of folders begin into which something is being downloaded."""

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Passes an iterable through, given what is being done and how many items there are, and may show how far it is."""


class Images(NamedTuple):
    """Pictures and their classes."""

    pixels: UInt8[Tensor, "n h w 3"]
    labels: Int[Tensor, "n"]


class Dataset(NamedTuple):
    """A data set in memory.

    Attributes:
        train: What is trained on.
        val: What was held out of the training set, or None.
        test: The test set.
        classes: The names of the classes, in the order of the labels.
        flip: Whether a mirrored picture still shows its class.
    """

    train: Images
    val: Images | None
    test: Images
    classes: tuple[str, ...]
    flip: bool


class Draw(NamedTuple):
    """For each picture of an epoch, or of a batch: which one, where its crop begins, and whether it is mirrored."""

    picture: Int[Tensor, "n"]
    top: Int[Tensor, "n"]
    left: Int[Tensor, "n"]
    flip: Bool[Tensor, "n"]


class Normalization(NamedTuple):
    """Mean and standard deviation per channel, on the scale of the pixels, 0 to 255."""

    mean: Float[Tensor, "*n 3"]
    std: Float[Tensor, "*n 3"]


def load_dataset(
    name: Name,
    data_dir: str | os.PathLike[str] = "data",
    *,
    val_size: int = 0,
    train_size: int = 0,
    seed: int = 0,
    progress: Progress = lambda items, _description, _total: items,
    notify: Callable[[str], None] = lambda _message: None,
) -> Dataset:
    """Reads a data set into memory.

    Args:
        name: "cifar10" and "cifar100" are downloaded into `data_dir` once; "digits" are the handwritten digits of
            scikit-learn; "folder" reads `data_dir/train/<class>/*` and `data_dir/test/<class>/*`; "synthetic" is made
            up, of CIFAR-10's size.
        data_dir: The folder of the data.
        val_size: Pictures that are held out of the training set, drawn at random.
        train_size: Keeps so many of the remaining training pictures, drawn at random; 0 keeps all.
        seed: Of those two draws.
        progress: Is shown the reading of a folder.
        notify: Is told in a line what a user may want to know.

    Raises:
        ValueError: The name is unknown, the data is not as it should be, or a size does not fit it.
        OSError: The data cannot be read or downloaded.
    """
    if name not in get_args(Name):
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(get_args(Name))}")
    path = Path(data_dir)
    if name in ("cifar10", "cifar100"):
        dataset = _cifar(name, path, notify)
    elif name == "digits":
        dataset = _digits()
    elif name == "folder":
        dataset = _folder(path, progress, notify)
    else:
        dataset = _synthetic()
    return _split(dataset, val_size, train_size, seed)


def measure(images: Images) -> Normalization:
    """The mean and standard deviation of each channel over all pixels, from exact counts."""
    levels = torch.arange(256, dtype=torch.float64, device=images.pixels.device)
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.pixels.unbind(-1)]).double()
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ levels
    variance = share @ levels.square() - mean.square()
    # A channel that never varies is left as it is: one level is the least that a picture can differ by.
    return Normalization(mean.float(), variance.clamp(min=0).sqrt().clamp(min=1).float())


def digest(dataset: Dataset) -> str:
    """A fingerprint of all pictures, labels and class names: what a run must find again when it is resumed."""
    total = hashlib.sha256(repr(dataset.classes).encode())
    for images in (dataset.train, dataset.val, dataset.test):
        for column in images or ():
            total.update(column.cpu().contiguous().numpy().data)
    return total.hexdigest()


def draw_epoch(seed: int, epoch: int, count: int, *, flip: bool = True) -> Draw:
    """The order and the augmentation of one epoch over `count` pictures: a function of the arguments alone."""
    return draw(seeded_generator("epoch", seed, epoch), count, flip=flip)


def draw(generator: Generator, count: int, *, flip: bool = True) -> Draw:
    """A permutation of `count` pictures, a crop for each out of its padded self, and a mirror flip for half of them."""

    def uniform(high: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator, device=generator.device)

    picture = torch.randperm(count, generator=generator, device=generator.device)
    return Draw(picture, uniform(2 * PAD + 1), uniform(2 * PAD + 1), uniform(2).bool() & flip)


def seeded_generator(*key: str | int) -> Generator:
    """A generator on the CPU, so that all devices draw alike, whose stream belongs to `key` alone."""
    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)


def pad(pixels: UInt8[Tensor, "n h w c"]) -> UInt8[Tensor, "n h2 w2 c"]:
    """A black frame of `PAD` pixels around every picture."""
    return F.pad(pixels, (0, 0, PAD, PAD, PAD, PAD))


def crop_and_flip(padded: UInt8[Tensor, "n h2 w2 c"], draw: Draw) -> UInt8[Tensor, "b h w c"]:
    """The drawn pictures, cropped and flipped, as one gather: nothing waits for the device, nothing is random."""
    height, width = (extent - 2 * PAD for extent in padded.shape[1:3])
    device = padded.device
    rows = draw.top[:, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    columns = draw.left[:, None] + torch.where(draw.flip[:, None], width - 1 - columns, columns)
    return padded[draw.picture[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalize(pixels: UInt8[Tensor, "n h w c"], normalization: Normalization) -> Float[Tensor, "n c h w"]:
    """Pixels as the network takes them: zero mean, unit variance, channels_last in memory without a copy."""
    return ((pixels - normalization.mean) / normalization.std).permute(0, 3, 1, 2)


def make_train_load(
    images: Images, normalization: Normalization
) -> Callable[[Draw], tuple[Float[Tensor, "b c h w"], Int[Tensor, "b"]]]:
    """Builds `load(draw) -> (images, labels)`, augmented; for `training.make_train_step`."""
    padded = pad(images.pixels)
    labels = images.labels

    def load(draw: Draw) -> tuple[Tensor, Tensor]:
        return normalize(crop_and_flip(padded, draw), normalization), labels[draw.picture]

    return load


def make_eval_load(
    normalization: Normalization,
) -> Callable[[Images], tuple[Float[Tensor, "b c h w"], Int[Tensor, "b"]]]:
    """Builds `load(images) -> (images, labels)`, as they are; for `training.make_eval_step`."""

    def load(images: Images) -> tuple[Tensor, Tensor]:
        return normalize(images.pixels, normalization), images.labels

    return load


def batches(rows: Any, batch_size: int) -> Iterator[Any]:
    """Cuts a pytree of equally long tensors into batches, the last as short as need be."""
    columns, rebuild = tree.flatten(rows)
    for begin in range(0, len(columns[0]), batch_size):
        yield rebuild([column[begin : begin + batch_size] for column in columns])


def _split(dataset: Dataset, val_size: int, train_size: int, seed: int) -> Dataset:
    available = len(dataset.train.labels)
    if not 0 <= val_size < available:
        raise ValueError(
            f"val_size: got {val_size}, expected at least 0 and less than the {available} training pictures"
        )
    if not 0 <= train_size <= available - val_size:
        raise ValueError(f"train_size: got {train_size}, expected at most the {available - val_size} training pictures")
    val = None
    train = dataset.train
    if val_size or train_size:
        order = torch.randperm(available, generator=seeded_generator("split", seed))
        if val_size:
            val = Images(*(column[order[:val_size]] for column in train))
        kept = order[val_size:][: train_size or available].sort().values
        train = Images(*(column[kept] for column in train))
    missing = set(range(len(dataset.classes))) - set(train.labels.tolist())
    if missing:
        names = ", ".join(dataset.classes[label] for label in sorted(missing)[:3])
        raise ValueError(
            f"train_size, val_size: of the {len(dataset.classes)} classes {len(missing)} have no picture left among "
            f"the {len(train.labels)} training pictures ({names}); keep more of them"
        )
    return dataset._replace(train=train, val=val)


def _cifar(name: str, data_dir: Path, notify: Callable[[str], None]) -> Dataset:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        # So ends a torchvision that was built for another torch.
        raise ValueError(
            f"dataset: torchvision cannot be imported ({error}); install torch and torchvision together, from one index"
        ) from None

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        train = source(str(data_dir), train=True)
    except RuntimeError:
        train = _fetch_cifar(source, data_dir, notify)
    test = source(str(data_dir), train=False)
    return Dataset(_from_arrays(train), None, _from_arrays(test), tuple(train.classes), flip=True)


def _fetch_cifar(source: Any, data_dir: Path, notify: Callable[[str], None]) -> Any:
    """Downloads and unpacks, one process at a time; one that comes later finds the work done."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data_dir: {data_dir} cannot be a folder for the data: {error}") from None
    with lock_for(data_dir / source.base_folder):
        try:
            return source(str(data_dir), train=True)
        except RuntimeError:
            for leftover in data_dir.glob(f"{_DOWNLOAD}*"):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            _download(source, data_dir, notify)
            return source(str(data_dir), train=True, download=True)


def _from_arrays(dataset: Any) -> Images:
    return Images(torch.from_numpy(dataset.data), torch.tensor(dataset.targets))


def _download(
    source: Any, data_dir: Path, notify: Callable[[str], None], *, tries: int = 3, timeout: float = 20
) -> None:
    """Brings the archive into `data_dir`, unless it lies there already; torchvision unpacks and checks it."""
    from torchvision.datasets.utils import check_integrity, download_url

    archive = data_dir / source.filename
    if check_integrity(str(archive), source.tgz_md5):
        return
    notify(f"downloading {source.url} to {archive}")
    error: Exception | None = None
    # torchvision sets no time limit, so a silent server would be waited for without end.
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)
    # Its progress bar writes carriage returns by the thousand into a log that is no terminal.
    stderr = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        for _ in range(tries):
            try:
                with stderr, tempfile.TemporaryDirectory(dir=data_dir, prefix=_DOWNLOAD) as folder:
                    download_url(source.url, folder, source.filename, source.tgz_md5)
                    os.replace(Path(folder) / source.filename, archive)
                return
            except (OSError, RuntimeError, HTTPException) as caught:
                error = caught
    finally:
        socket.setdefaulttimeout(previous)
    raise ConnectionError(
        f"could not download {source.url} in {tries} tries ({error}); put that file at {archive.resolve()} yourself, "
        "or say with --data-dir where it is"
    )


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            f"dataset: 'digits' come with scikit-learn, which cannot be imported ({error}); pip install scikit-learn"
        ) from None
    values, targets = load_digits(return_X_y=True)
    grey = torch.from_numpy(values).float().view(-1, 1, 8, 8) * (255 / 16)
    grey = F.interpolate(grey, size=(SIZE, SIZE), mode="bilinear", antialias=False)
    pixels = grey.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()
    labels = torch.from_numpy(targets).long()
    order = torch.randperm(len(labels), generator=seeded_generator("digits"))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    classes = tuple(str(digit) for digit in range(10))
    return Dataset(Images(pixels[train], labels[train]), None, Images(pixels[test], labels[test]), classes, flip=False)


def _synthetic() -> Dataset:
    """A faint coarse pattern for each class under strong noise: cheap, always the same, and learnable."""
    classes = 10
    generator = seeded_generator("synthetic")
    coarse = torch.randint(96, 160, (classes, SIZE // 8, SIZE // 8, 3), generator=generator)
    patterns = coarse.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2).to(torch.uint8)

    def make(count: int) -> Images:
        labels = torch.arange(count) % classes
        noise = torch.randint(96, (count, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
        return Images(patterns[labels] + noise, labels)

    return Dataset(make(50_000), None, make(10_000), tuple(f"class {i}" for i in range(classes)), flip=True)


def _folder(data_dir: Path, progress: Progress, notify: Callable[[str], None]) -> Dataset:
    if not data_dir.is_dir():
        raise ValueError(f"data_dir: there is no folder {str(data_dir)!r}; expected one with train/<class>/* in it")
    listing = {part: _list_classes(data_dir / part, notify) for part in ("train", "test")}
    classes: tuple[str, ...] = tuple(listing["train"])
    unknown = sorted(set(listing["test"]) - set(classes))
    if unknown:
        raise ValueError(
            f"data_dir: {data_dir / 'test' / unknown[0]} is a class that {data_dir / 'train'} lacks; "
            "every class needs training pictures"
        )
    if len(classes) < 2:
        raise ValueError(f"data_dir: {data_dir / 'train'} has one class, {', '.join(classes)}; expected at least two")

    cache = data_dir / f".hyperfunc-{SIZE}.safetensors"
    fingerprint = _fingerprint(chain.from_iterable(chain.from_iterable(p.values()) for p in listing.values()))
    with contextlib.ExitStack() as stack:
        # Of several ranks one reads the pictures, and the others find them in the cache.
        with contextlib.suppress(OSError):
            stack.enter_context(lock_for(cache))
            remove_leftovers(cache)
        tensors = _read_cache(cache, fingerprint, notify)
        if tensors is None:
            tensors = {}
            for part, by_class in listing.items():
                paths = [path for paths in by_class.values() for path in paths]
                tensors[f"{part}_pixels"] = _read_pictures(paths, progress, f"reading {data_dir / part}")
                labels = [classes.index(name) for name, paths in by_class.items() for _ in paths]
                tensors[f"{part}_labels"] = torch.tensor(labels)
            try:
                write_tensors(cache, tensors, {"fingerprint": fingerprint})
            except OSError as error:
                notify(f"the pictures are not cached and will be read again next time: {error}")
    images = {part: Images(tensors[f"{part}_pixels"], tensors[f"{part}_labels"]) for part in listing}
    return Dataset(images["train"], None, images["test"], classes, flip=True)


def _list_classes(folder: Path, notify: Callable[[str], None]) -> dict[str, list[Path]]:
    """The pictures of each class; files that are no pictures by their names are left out, and said to be."""
    if not folder.is_dir():
        raise ValueError(
            f"data_dir: there is no folder {str(folder)!r}; expected one with a folder for each class in it"
        )
    known = Image.registered_extensions()
    by_class: dict[str, list[Path]] = {}
    ignored: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        paths = [path for path in sorted(entry.iterdir()) if not path.name.startswith(".")]
        by_class[entry.name] = [path for path in paths if path.is_file() and path.suffix.lower() in known]
        ignored += sorted(set(paths) - set(by_class[entry.name]))
        if not by_class[entry.name]:
            raise ValueError(f"data_dir: {entry} has no picture in it; add some or remove the folder")
    if not by_class:
        raise ValueError(f"data_dir: {folder} has no class in it; expected a folder for each class, with pictures")
    if ignored:
        notify(f"left out {len(ignored)} entries of {folder} that are no pictures by their names, first {ignored[0]}")
    return by_class


def _read_pictures(paths: list[Path], progress: Progress, description: str) -> UInt8[Tensor, "n size size 3"]:
    pool = ThreadPoolExecutor()
    try:
        arrays = list(progress(pool.map(_read_picture, paths), description, len(paths)))
    finally:
        # After a broken picture, or Ctrl-C, the thousands that are still queued are not waited for.
        pool.shutdown(wait=False, cancel_futures=True)
    return torch.from_numpy(np.stack(arrays))


def _read_picture(path: Path) -> UInt8[np.ndarray, "size size 3"]:
    try:
        with Image.open(path) as picture:
            rgb = _to_rgb(picture)
            if rgb.size != (SIZE, SIZE):
                rgb = rgb.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            return np.asarray(rgb)
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file.
        raise ValueError(f"data_dir: {path} cannot be read as a picture ({error}); mend or remove it") from None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # 16 bits a pixel, which Pillow would clip to 255 and not scale.
        levels = np.asarray(picture, dtype=np.int64)
        if picture.mode == "I" and picture.format == "TIFF":  # in a PNG it is what Pillow makes of 16 bits
            raise ValueError("its pixels are 32-bit integers, whose range is unknown")
        if levels.min() < 0 or levels.max() > 0xFFFF:
            raise ValueError("its pixels have more than 16 bits")
        return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is unknown")
    return picture.convert("RGB")


def _fingerprint(paths: Iterable[Path]) -> str:
    """Changes when a file is added, removed, renamed, or written again."""
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(f"{path.parent.parent.name}/{path.parent.name}/{path.name}".encode(errors="surrogateescape"))
        digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read_cache(cache: Path, fingerprint: str, notify: Callable[[str], None]) -> dict[str, Tensor] | None:
    if not cache.exists():
        return None
    try:
        tensors, metadata = read_tensors(cache)
    except (OSError, ValueError) as error:
        notify(f"the cache of the pictures is not used: {error}")
        return None
    if metadata.get("fingerprint") != fingerprint:
        notify(f"the pictures changed since {cache} was written; reading them again")
        return None
    return tensors
