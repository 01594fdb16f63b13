"""Damaged and foreign checkpoints: each is refused by one clear line, whatever is wrong with it.

HYPERFUNC_DAMAGED says how often each kind of either; for a long run 60.
"""

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import RunHere, make_folder, names_in, small
from test_files import delete, flip_bit, insert, swap, truncate

import hyperfunc as hf
from hyperfunc import checkpoint, files

pytestmark = pytest.mark.slow

DAMAGED = int(os.environ.get("HYPERFUNC_DAMAGED", "2"))


class Trap:
    """A pickle that runs a command when it is opened."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sprung),)


def splice(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """The beginning of one and the end of another, of the same length."""
    at = rng.randrange(1, min(len(content), len(other)))
    return content[:at] + other[at:]


def forgeries(
    tensors: dict[str, torch.Tensor], metadata: dict[str, Any], rng: random.Random
) -> list[tuple[Callable[[], object], str]]:
    """What makes of the content one of another version, architecture, run or data set, and what must be said of it."""
    name = rng.choice([path for path in tensors if path.startswith("state/params")])
    leaf = tensors[name]
    notes = metadata["notes"]
    return [
        (lambda: metadata.update(format=rng.choice([0, 1, 3, 99, "2", None, [2]])), "has format "),
        (lambda: metadata.pop("format"), "has format None"),
        (lambda: metadata.pop("notes"), "has format "),
        (lambda: tensors.pop(name), f"{name} is missing"),
        (lambda: tensors.update({f"{name}/more": leaf}), f"{name}/more is unknown"),
        (lambda: tensors.update({name: leaf.reshape(-1)[:-1].clone()}), f"{name} is float32["),
        (lambda: tensors.update({name: leaf.double()}), f"{name} is float64["),
        (lambda: tensors.update({name: leaf.unsqueeze(0)}), f"{name} is float32[1, "),
        (lambda: notes["config"].update(depth=16), "--depth is 10, was 16"),
        (lambda: notes["config"].update(lr=0.1), "--lr is 0.002, was 0.1"),
        (lambda: notes["config"].update(width=None), "--width is 1, was None"),
        (lambda: notes.pop("progress"), "was not written by this version of train.py"),
        (lambda: notes["progress"].pop("history"), "was not written by this version of train.py"),
        (lambda: notes["progress"].update(more=1), "was not written by this version of train.py"),
        (lambda: notes["progress"].update(epoch=5), "was not written by this version of train.py"),
        (lambda: notes.update(classes=["cat", "horse"]), "was trained on the classes cat, horse"),
        (lambda: notes.update(data="0" * 64), "the pictures or their labels are not those"),
    ]


def test_every_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path, run_here: RunHere) -> None:
    flags = small(make_folder(tmp_path / "pictures", train=4, test=2), "--checkpoint-path", "run.pth")
    path = tmp_path / "run.pth"
    assert run_here(*flags, "--epochs", "1", "--seed", "1").returncode == 0
    other = path.read_bytes()
    path.unlink()
    assert run_here(*flags, "--epochs", "1").returncode == 0
    whole = path.read_bytes()
    before = names_in(tmp_path)

    rng = random.Random(0)
    sprung = tmp_path / "sprung"
    mutations: list[Callable[[], bytes]] = [
        lambda: flip_bit(whole, rng),
        # Where most of the structure is.
        lambda: flip_bit(whole[:20_000], rng) + whole[20_000:],
        lambda: truncate(whole, rng),
        lambda: whole[: rng.randrange(64)],
        lambda: insert(whole, rng),
        lambda: delete(whole, rng),
        lambda: swap(whole, rng),
        lambda: splice(whole, other, rng),
        lambda: whole + rng.randbytes(rng.randint(1, 64)),
        lambda: rng.randbytes(rng.randint(0, 2000)),
        lambda: json.dumps({"format": 2, "notes": {}}).encode(),
        lambda: pickle.dumps(Trap(sprung), protocol=rng.randrange(6)),
    ]
    kinds = len(mutations), len(forgeries(*files.read_tensors(path), rng))
    for kind in DAMAGED * [*range(sum(kinds))]:
        if kind < len(mutations):
            damaged, message = mutations[kind](), "run.pth is "
            if damaged == whole:
                continue
            path.write_bytes(damaged)
        else:
            path.write_bytes(whole)
            tensors, metadata = files.read_tensors(path)
            act, message = forgeries(tensors, metadata, rng)[kind - len(mutations)]
            act()
            files.write_tensors(path, tensors, metadata)
        content = path.read_bytes()
        done = run_here(*flags, "--epochs", "2", "--resume", drawn=True)
        assert done.returncode == 2, message
        assert done.stderr.count("\n") == 1, done.stderr
        assert message in done.stderr, (message, done.stderr)
        assert "Traceback" not in done.stderr
        assert path.read_bytes() == content
        if message == "run.pth is ":
            assert "run.pth is damaged" in done.stderr or "run.pth is a pickle" in done.stderr
            for read in (hf.load, checkpoint.load):
                with pytest.raises(ValueError, match="is damaged|is a pickle"):
                    read(path)
    # Nothing was executed, and nothing written.
    assert names_in(tmp_path) == before
    path.write_bytes(whole)
    assert run_here(*flags, "--epochs", "2", "--resume").returncode == 0
    print(f"{kinds[0]} kinds of damaged and {kinds[1]} of foreign checkpoints, {DAMAGED} times each, all refused")
