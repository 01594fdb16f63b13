"""Folders of pictures as they come: each is read, or refused in one line with nothing written."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import RunHere, make_folder
from PIL import Image

from hyperfunc import data

Spoil = Callable[[Path], None]

FORMATS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "bmp": "BMP", "webp": "WEBP", "tiff": "TIFF", "ppm": "PPM"}


def encoded(ending: str, size: tuple[int, int] = (40, 24)) -> bytes:
    picture = Image.effect_noise(size, 90).convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, FORMATS[ending])
    return buffer.getvalue()


def put(name: str, content: bytes) -> Spoil:
    """One more file among the cats, of that name."""

    def spoil(folder: Path) -> None:
        (folder / "train/cat" / name).write_bytes(content)

    return spoil


def link_to_nothing(folder: Path) -> None:
    (folder / "train/cat/a.png").symlink_to(folder / "nowhere.png")


def link_to_itself(folder: Path) -> None:
    (folder / "train/cat/a.png").symlink_to("a.png")


def link_to_a_picture(folder: Path) -> None:
    (folder / "train/cat/a.png").symlink_to(folder / "train/cat/0000.png")


def folder_named_like_a_picture(folder: Path) -> None:
    (folder / "train/cat/a.png").mkdir()


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "train/cat/a.png")


def hidden(folder: Path) -> None:
    (folder / "train/.cache").mkdir()
    (folder / "train/cat/.DS_Store").write_bytes(b"x")
    (folder / "train/cat/._0001.png").write_bytes(b"x")
    (folder / "train/Thumbs.db").write_bytes(b"x")


def odd_names(folder: Path) -> None:
    strange = folder / "train" / "dög\n 'x' \udcff"
    (folder / "train/dog").rename(strange)
    (folder / "test/dog").rename(folder / "test" / strange.name)
    (strange / "0000.png").rename(strange / "ü \udcfe.png")


def no_train(folder: Path) -> None:
    (folder / "train").rename(folder / "training")


def train_is_a_file(folder: Path) -> None:
    no_train(folder)
    (folder / "train").write_text("")


def empty_class(folder: Path) -> None:
    (folder / "train/wolf").mkdir()


def class_of_other_files(folder: Path) -> None:
    (folder / "train/wolf").mkdir()
    (folder / "train/wolf/notes.txt").write_text("none")


def class_for_the_test_only(folder: Path) -> None:
    (folder / "test/wolf").mkdir()
    (folder / "test/wolf/a.png").write_bytes(encoded("png"))


def empty_cache(folder: Path) -> None:
    (folder / ".hyperfunc-32.safetensors").write_bytes(b"")


def cache_that_is_a_pickle(folder: Path) -> None:
    (folder / ".hyperfunc-32.safetensors").write_bytes(b"\x80\x04]q\x00.")


def whole_numbers_of_32_bits(folder: Path) -> None:
    """Nothing says whether 255 is their white."""
    Image.fromarray(np.full((8, 8), 200, np.int32)).save(folder / "train/cat/a.tiff")


REFUSED: dict[str, Spoil] = {
    "whole numbers of 32 bits": whole_numbers_of_32_bits,
    **{f"empty {ending}": put(f"a.{ending}", b"") for ending in FORMATS},
    **{f"noise as {ending}": put(f"a.{ending}", bytes(range(256))) for ending in FORMATS},
    **{f"half a {ending}": put(f"a.{ending}", encoded(ending)[: len(encoded(ending)) // 2]) for ending in FORMATS},
    **{f"{ending} cut after its head": put(f"a.{ending}", encoded(ending)[:24]) for ending in FORMATS},
    "text as png": put("a.png", b"<html>404 Not Found</html>"),
    "an archive as jpg": put("a.jpg", b"PK\x03\x04" + bytes(100)),
    "a header that promises too much": put("a.ppm", b"P6 100000 100000 255\n" + bytes(100)),
    "no width": put("a.ppm", b"P6 0 10 255\n"),
    "no train": no_train,
    "train is a file": train_is_a_file,
    "an empty class": empty_class,
    "a class without a picture": class_of_other_files,
    "a class for the test only": class_for_the_test_only,
}

READ: dict[str, Spoil] = {
    **{f"a whole {ending}": put(f"a.{ending}", encoded(ending)) for ending in FORMATS},
    **{f"{ending} called png": put("a.png", encoded(ending)) for ending in FORMATS if ending != "png"},
    "one pixel": put("a.png", encoded("png", (1, 1))),
    "long and thin": put("a.png", encoded("png", (2000, 1))),
    "capital ending": put("a.PNG", encoded("png")),
    "a link to a picture": link_to_a_picture,
}

LEFT_OUT: dict[str, tuple[Spoil, str]] = {
    "text": (put("labels.txt", b"cat"), "left out 1 entries"),
    "a link to nothing": (link_to_nothing, "left out 1 entries"),
    "a link to itself": (link_to_itself, "left out 1 entries"),
    "a folder named like a picture": (folder_named_like_a_picture, "left out 1 entries"),
    "a pipe": (pipe, "left out 1 entries"),
    "hidden files": (hidden, ""),
    "odd names": (odd_names, ""),
    "an empty cache": (empty_cache, "the cache of the pictures is not used"),
    "a cache that is a pickle": (cache_that_is_a_pickle, "the cache of the pictures is not used"),
}
"""And the line that says so, where there is one."""


def run(folder: Path, run_here: RunHere) -> tuple[int, list[str]]:
    """The exit code of one epoch, and the lines on standard error but for those that say what is being read."""
    flags = ["--dataset", "folder", "--data-dir", str(folder), "--epochs", "1", "--batch-size", "4"]
    done = run_here(*flags, "--checkpoint-path", str(folder.parent / "run.pth"))
    return done.returncode, [line for line in done.stderr.splitlines() if not line.startswith("reading ")]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_damaged_is_refused(tmp_path: Path, run_here: RunHere, name: str) -> None:
    folder = make_folder(tmp_path / "pictures", train=2, test=1)
    REFUSED[name](folder)
    before = sorted(tmp_path.rglob("*"))
    code, lines = run(folder, run_here)
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("train.py: data_dir: ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [*READ, *LEFT_OUT])
def test_what_is_merely_odd_is_read(tmp_path: Path, name: str) -> None:
    folder, told = make_folder(tmp_path / "pictures", train=2, test=1), []
    spoil, line = LEFT_OUT.get(name) or (READ[name], "")
    spoil(folder)
    found = data.load_dataset("folder", folder, notify=told.append)
    assert len(found.train.labels) == 4 + (name in READ)
    assert len(found.test.labels) == 2
    assert [message.startswith(line) for message in told] == ([True] if line else [])


def test_a_run_takes_what_is_merely_odd(tmp_path: Path, run_here: RunHere) -> None:
    folder = make_folder(tmp_path / "pictures", train=2, test=1)
    for name in ("odd names", "hidden files", "a pipe", "an empty cache"):
        LEFT_OUT[name][0](folder)
    code, lines = run(folder, run_here)
    assert (code, len(lines)) == (0, 2), lines
    assert (tmp_path / "run.pth").exists()


def test_there_are_enough_of_them() -> None:
    assert len(REFUSED) + len(READ) + len(LEFT_OUT) >= 50
