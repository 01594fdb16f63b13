import contextlib
import http.server
import os
import pickle
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from helpers import make_folder, unchecked
from PIL import Image
from torch import Generator, Tensor

from hyperfunc import data, tree
from hyperfunc.data import Images, load_dataset


def some_pixels(generator: Generator, count: int = 5) -> Tensor:
    return torch.randint(256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)


def test_measure_equals_a_plain_computation(generator: Generator) -> None:
    pixels = some_pixels(generator, 50)
    pixels[..., 1] //= 2
    mean, std = data.measure(Images(pixels, torch.zeros(50, dtype=torch.int64)))
    flat = pixels.reshape(-1, 3).double()
    torch.testing.assert_close(mean.double(), flat.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(std.double(), flat.std(0, unbiased=False), rtol=1e-6, atol=0)


def test_crop_and_flip_equals_a_loop_over_pictures(generator: Generator) -> None:
    pixels = some_pixels(generator, 7)
    draw = data.draw(generator, 7)
    out = data.crop_and_flip(data.pad(pixels), draw)
    for row, (picture, top, left, flip) in enumerate(zip(*(column.tolist() for column in draw), strict=True)):
        canvas = torch.zeros(40, 40, 3, dtype=torch.uint8)
        canvas[4:36, 4:36] = pixels[picture]
        crop = canvas[top : top + 32, left : left + 32]
        assert torch.equal(out[row], crop.flip(1) if flip else crop)


def test_draws_reach_every_crop_and_half_are_flipped() -> None:
    draw = data.draw_epoch(0, 0, 20_000)
    assert sorted(draw.picture.tolist()) == list(range(20_000))
    for column in (draw.top, draw.left):
        counts = column.bincount()
        assert len(counts) == 9
        assert counts.min() > 2000
    assert 0.48 < draw.flip.float().mean() < 0.52


def test_no_flips_where_they_would_change_the_class() -> None:
    assert not data.draw_epoch(0, 0, 100, flip=False).flip.any()


def test_an_epoch_is_a_function_of_seed_and_epoch_alone() -> None:
    first = data.draw_epoch(3, 5, 100)
    torch.manual_seed(99)
    again = data.draw_epoch(3, 5, 100)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for seed, epoch in ((3, 6), (4, 5), (35, 0)):
        assert not torch.equal(first.picture, data.draw_epoch(seed, epoch, 100).picture)


def test_batches_cover_everything_once() -> None:
    draw = data.draw_epoch(0, 0, 10)
    parts = list(data.batches(draw, 4))
    assert [len(part.picture) for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([part.picture for part in parts]), draw.picture)


def test_loaded_batches_are_normal_and_channels_last(generator: Generator) -> None:
    images = Images(some_pixels(generator, 200), torch.arange(200))
    normalization = data.measure(images)
    x, labels = data.make_eval_load(normalization)(images)
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std(dim=(0, 2, 3), unbiased=False), torch.ones(3), rtol=1e-5, atol=0)
    assert torch.equal(labels, images.labels)

    draw = data.draw_epoch(0, 0, 200)
    augmented, labels = data.make_train_load(images, normalization)(draw)
    assert augmented.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(labels, draw.picture)


def test_the_digest_tells_data_sets_apart(generator: Generator) -> None:
    images = Images(some_pixels(generator), torch.arange(5))
    dataset = data.Dataset(images, None, images, ("a", "b", "c", "d", "e"), flip=True)
    other_label = images._replace(labels=images.labels.flip(0))
    other_pixel = images._replace(pixels=images.pixels.clone())
    other_pixel.pixels[0, 0, 0, 0] ^= 1
    variants = [
        dataset,
        dataset._replace(train=other_label),
        dataset._replace(test=other_pixel),
        dataset._replace(val=images),
        dataset._replace(classes=("b", "a", "c", "d", "e")),
    ]
    assert len({data.digest(variant) for variant in variants}) == len(variants)
    assert data.digest(dataset) == data.digest(dataset._replace(train=tree.clone(images)))


def test_digits_are_read_whole() -> None:
    dataset = load_dataset("digits")
    assert len(dataset.train.labels) + len(dataset.test.labels) == 1797
    assert dataset.train.pixels.shape[1:] == (32, 32, 3)
    assert dataset.train.pixels.max() == 255
    assert not dataset.flip


def test_synthetic_is_always_the_same_and_of_cifars_size() -> None:
    first, second = load_dataset("synthetic"), load_dataset("synthetic")
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert (len(first.train.labels), len(first.test.labels)) == (50_000, 10_000)


def test_a_validation_part_is_held_out_at_random() -> None:
    whole = load_dataset("digits")
    dataset = load_dataset("digits", val_size=300, train_size=1000, seed=1)
    assert dataset.val is not None
    assert (len(dataset.val.labels), len(dataset.train.labels)) == (300, 1000)
    assert torch.equal(dataset.test.pixels, whole.test.pixels)
    rows = torch.cat([dataset.train.pixels, dataset.val.pixels]).flatten(1)
    assert len(rows.unique(dim=0)) == len(whole.train.pixels.flatten(1).unique(dim=0)) - 138
    other = load_dataset("digits", val_size=300, seed=2)
    assert other.val is not None
    assert not torch.equal(other.val.pixels, dataset.val.pixels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mnist"}, "name: got 'mnist', expected one of cifar10, cifar100, digits, folder, synthetic"),
        ({"val_size": -1}, "val_size: got -1, expected at least 0 and less than the 1438"),
        ({"val_size": 1438}, "val_size: got 1438"),
        ({"train_size": 1500}, "train_size: got 1500, expected at most the 1438"),
        ({"train_size": 5}, "of the 10 classes . have no picture left among the 5 training pictures"),
    ],
)
def test_bad_sizes_and_names(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unchecked(load_dataset)(**{"name": "digits", **arguments})


# Folders of pictures


def read(path: Path) -> tuple[data.Dataset, list[str]]:
    told: list[str] = []
    return load_dataset("folder", path, notify=told.append), told


def test_folder_of_any_size_mode_and_format(tmp_path: Path) -> None:
    make_folder(tmp_path, size=32)
    Image.new("L", (100, 50), 200).save(tmp_path / "train/cat/grey.gif")
    Image.new("RGBA", (7, 9), (10, 20, 30, 128)).save(tmp_path / "train/cat/clear.webp", lossless=True)
    Image.new("CMYK", (64, 64)).save(tmp_path / "train/cat/print.JPG", format="JPEG")
    Image.new("I;16", (40, 40), 200 * 256 + 7).save(tmp_path / "train/cat/deep.tiff")
    Image.new("I;16", (32, 32), 0xFFFF).save(tmp_path / "train/cat/deep.png")
    (tmp_path / "train/cat/.hidden.png").write_bytes(b"not looked at")
    dataset, told = read(tmp_path)
    assert told == []
    assert dataset.classes == ("cat", "dog")
    assert dataset.train.pixels.shape == (29, 32, 32, 3)
    assert dataset.train.labels.bincount().tolist() == [17, 12]
    names = sorted(p.name for p in (tmp_path / "train/cat").iterdir() if not p.name.startswith("."))
    for name, level in (("grey.gif", 200), ("deep.tiff", 200), ("deep.png", 255)):
        assert (dataset.train.pixels[names.index(name)] == level).all(), name
    with Image.open(tmp_path / "test/dog/0003.png") as picture:
        assert dataset.test.pixels[6 + 3].flatten().tolist() == list(picture.convert("RGB").tobytes())


def test_folder_cache_is_used_and_rejected_when_the_folder_changes(tmp_path: Path) -> None:
    make_folder(tmp_path)
    first, _ = read(tmp_path)
    cache = tmp_path / ".hyperfunc-32.safetensors"
    written = cache.stat().st_mtime_ns
    again, told = read(tmp_path)
    assert told == []
    assert cache.stat().st_mtime_ns == written
    assert torch.equal(first.train.pixels, again.train.pixels)

    changes: list[Callable[[], object]] = [
        lambda: (tmp_path / "train/cat/0000.png").unlink(),
        lambda: Image.new("RGB", (32, 32), (9, 9, 9)).save(tmp_path / "train/dog/0001.png"),
        lambda: (tmp_path / "test/dog/0001.png").rename(tmp_path / "test/cat/moved.png"),
    ]
    for change in changes:
        change()
        changed, told = read(tmp_path)
        assert len(told) == 1
        assert "the pictures changed since" in told[0]
        cache.unlink()
        fresh, _ = read(tmp_path)
        assert torch.equal(changed.train.pixels, fresh.train.pixels)
        assert torch.equal(changed.test.labels, fresh.test.labels)


def test_a_damaged_cache_is_not_used(tmp_path: Path) -> None:
    make_folder(tmp_path)
    first, _ = read(tmp_path)
    cache = tmp_path / ".hyperfunc-32.safetensors"
    content = bytearray(cache.read_bytes())
    content[-100] ^= 1
    cache.write_bytes(content)
    again, told = read(tmp_path)
    assert "is damaged" in told[0]
    assert torch.equal(first.train.pixels, again.train.pixels)


def test_files_that_are_no_pictures_are_left_out_and_named(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "train/cat/notes.txt").write_text("a cat")
    (tmp_path / "train/dog/more").mkdir()
    dataset, told = read(tmp_path)
    assert len(dataset.train.labels) == 24
    assert told == [
        f"left out 2 entries of {tmp_path / 'train'} that are no pictures by their names, "
        f"first {tmp_path / 'train/cat/notes.txt'}"
    ]


def broken(path: Path) -> None:
    content = (path / "train/dog/0002.png").read_bytes()
    (path / "train/dog/0002.png").write_bytes(content[: len(content) // 2])


def floating(path: Path) -> None:
    Image.new("F", (8, 8), 0.5).save(path / "train/dog/0002.tiff")


def emptied(path: Path) -> None:
    for picture in (path / "train/dog").iterdir():
        picture.unlink()


def no_test(path: Path) -> None:
    (path / "test").rename(path / "testing")


def strange_class(path: Path) -> None:
    (path / "test/dog").rename(path / "test/wolf")


def one_class(path: Path) -> None:
    for part in ("train", "test"):
        (path / part / "dog").rename(path / part / ".dog")


def no_class(path: Path) -> None:
    one_class(path)
    (path / "train/cat").rename(path / "train/.cat")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken, r"0002.png cannot be read as a picture \(.*\); mend or remove it"),
        (floating, r"0002.tiff cannot be read as a picture \(its pixels are floating-point numbers"),
        (emptied, r"train/dog has no picture in it; add some or remove the folder"),
        (no_test, r"there is no folder '.*test'"),
        (strange_class, r"test/wolf is a class that .*train lacks"),
        (one_class, r"has one class, cat; expected at least two"),
        (no_class, r"has no class in it"),
    ],
)
def test_spoiled_folders(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    make_folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
    assert not (tmp_path / ".hyperfunc-32.safetensors").exists()


def test_unknown_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder '.*nowhere'"):
        read(tmp_path / "nowhere")


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / ".hyperfunc-32.safetensors").mkdir()
    dataset, told = read(tmp_path)
    assert len(dataset.train.labels) == 24
    assert any("not cached" in line for line in told)


# CIFAR, from an archive that is laid out as the real one


class Layout(NamedTuple):
    """How one of the two data sets lies in its archive."""

    name: str
    source: Any
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    label_names: str
    classes: int


CIFAR10 = Layout(
    "cifar10",
    torchvision.datasets.CIFAR10,
    tuple(f"data_batch_{i}" for i in range(1, 6)),
    "test_batch",
    "batches.meta",
    "labels",
    "label_names",
    10,
)
CIFAR100 = Layout(
    "cifar100", torchvision.datasets.CIFAR100, ("train",), "test", "meta", "fine_labels", "fine_label_names", 100
)


def make_archive(path: Path, layout: Layout, generator: Generator) -> tuple[Path, Tensor]:
    """A small archive laid out as the real one, with a picture a class in each file, and the training pixels in it."""
    folder = path / layout.source.base_folder
    folder.mkdir(parents=True)
    train = []
    for name in (*layout.train, layout.test):
        pixels = some_pixels(generator, layout.classes)
        if name != layout.test:
            train.append(pixels)
        rows = pixels.permute(0, 3, 1, 2).reshape(layout.classes, -1).numpy()
        (folder / name).write_bytes(pickle.dumps({"data": rows, layout.labels: list(range(layout.classes))}))
    names = [f"class {i}" for i in range(layout.classes)]
    (folder / layout.meta).write_bytes(pickle.dumps({layout.label_names: names}))
    archive = path / layout.source.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    return archive, torch.cat(train)


class QuietServer(http.server.ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        pass


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def serve(
    layout: Layout, path: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, Tensor]]:
    """Puts a small archive on a server of this machine; gives it and its pixels.

    torchvision's data set is told to expect its address and checksums; its own code is what runs.
    """
    from torchvision.datasets.utils import calculate_md5

    archive, pixels = make_archive(path, layout, generator)
    source = layout.source
    folder = archive.parent / source.base_folder
    for name in ("train_list", "test_list"):
        listed = [[file, calculate_md5(str(folder / file))] for file, _ in getattr(source, name)]
        monkeypatch.setattr(source, name, listed)
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": calculate_md5(str(folder / source.meta["filename"]))})
    monkeypatch.setattr(source, "tgz_md5", calculate_md5(str(archive)))
    server = QuietServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(archive.parent)))
    monkeypatch.setattr(source, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield archive, pixels
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def small_cifar(tmp_path: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Tensor]]:
    """A small CIFAR-10 on a server, and its pixels."""
    with serve(CIFAR10, tmp_path / "source", generator, monkeypatch) as served:
        yield served


@pytest.mark.parametrize("layout", [CIFAR10, CIFAR100], ids=lambda layout: layout.name)
def test_cifar_is_downloaded_once_and_read(
    tmp_path: Path,
    generator: Generator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    layout: Layout,
) -> None:
    told: list[str] = []
    target = tmp_path / "data"
    load = partial(unchecked(load_dataset), layout.name, target, notify=told.append)
    with serve(layout, tmp_path / "source", generator, monkeypatch) as (_, pixels):
        dataset = load()
    assert len(told) == 1
    assert told[0].startswith("downloading http:")
    assert torch.equal(dataset.train.pixels, pixels)
    assert dataset.train.labels.tolist() == list(range(layout.classes)) * len(layout.train)
    assert len(dataset.test.labels) == len(dataset.classes) == layout.classes
    again = load()
    assert len(told) == 1
    assert capsys.readouterr().err == ""
    assert torch.equal(again.test.pixels, dataset.test.pixels)


def test_cifar10_takes_an_archive_that_lies_there(tmp_path: Path, small_cifar: tuple[Path, Tensor]) -> None:
    archive, pixels = small_cifar
    target = tmp_path / "data"
    target.mkdir()
    archive.rename(target / archive.name)
    assert torch.equal(load_dataset("cifar10", target).train.pixels, pixels)


def test_a_file_cannot_be_the_folder_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(ValueError, match=r"data_dir: .*data cannot be a folder for the data"):
        load_dataset("cifar10", tmp_path / "data")


def test_a_failed_download_says_where_to_put_the_file(tmp_path: Path, small_cifar: tuple[Path, Tensor]) -> None:
    archive, _ = small_cifar
    archive.unlink()
    with pytest.raises(
        ConnectionError, match=r"could not download http:.* in 3 tries .*404.* put that file at .*data/cifar-10-python"
    ):
        load_dataset("cifar10", tmp_path / "data")
    assert os.listdir(tmp_path / "data") == []


def test_a_wrong_download_is_refused(tmp_path: Path, small_cifar: tuple[Path, Tensor]) -> None:
    archive, _ = small_cifar
    archive.write_bytes(archive.read_bytes()[:-50])
    with pytest.raises(ConnectionError, match="could not download"):
        load_dataset("cifar10", tmp_path / "data")
    assert not (tmp_path / "data" / archive.name).exists()


def test_an_answer_that_is_cut_off_is_a_failed_download(
    tmp_path: Path, small_cifar: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(handler: QuietHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nonly this")

    monkeypatch.setattr(QuietHandler, "do_GET", cut_off)
    with pytest.raises(ConnectionError, match="in 2 tries .*IncompleteRead"):
        data._download(torchvision.datasets.CIFAR10, tmp_path, lambda _: None, tries=2)
    assert not (tmp_path / torchvision.datasets.CIFAR10.filename).exists()


def test_a_silent_server_is_not_waited_for_without_end(
    tmp_path: Path, small_cifar: tuple[Path, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"http://127.0.0.1:{silent.getsockname()[1]}/x")
        with pytest.raises(ConnectionError, match="in 2 tries .*timed out"):
            data._download(torchvision.datasets.CIFAR10, tmp_path, lambda _: None, tries=2, timeout=0.2)
    assert socket.getdefaulttimeout() is None
