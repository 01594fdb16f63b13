import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_trees_equal, unchecked
from torch import Generator

import hyperfunc as hf
from hyperfunc import checkpoint, files, optim, training, tree
from hyperfunc.checkpoint import __main__ as checkpoint_main


def test_a_state_comes_back_bit_for_bit(tmp_path: Path, generator: Generator) -> None:
    model, optimizer = hf.hyper_resnet(10), optim.adam(0.002)
    state = training.init_state(model, optimizer, generator)
    images, labels = torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4)
    step = training.make_train_step(model, optimizer)
    state, _ = step(state, (images, labels))
    checkpoint.save(tmp_path / "c", {"state": state}, {"epoch": 3})
    loaded = checkpoint.load(tmp_path / "c")
    fresh = training.init_state(model, optimizer, Generator().manual_seed(9))
    restored = checkpoint.restore(loaded, "state", fresh)
    assert loaded.notes == {"epoch": 3}
    assert isinstance(restored, training.TrainState)
    assert_trees_equal(tree.named_leaves(restored), tree.named_leaves(state))
    ours, theirs = step(restored, (images, labels)), step(state, (images, labels))
    assert_trees_equal(tree.named_leaves(ours), tree.named_leaves(theirs))


def test_differences_are_named_leaf_by_leaf(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"x": {"a": torch.ones(2), "b": torch.ones(3), "old": torch.ones(1)}}, {})
    like = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(4), "new": torch.ones(1)}
    expected = (
        r"checkpoint differs: x/a is float32\[2\], expected float64\[2\]; x/b is float32\[3\], expected float32\[4\]; "
        "x/new is missing; x/old is unknown"
    )
    with pytest.raises(ValueError, match=expected):
        checkpoint.restore(checkpoint.load(tmp_path / "c"), "x", like)
    with pytest.raises(ValueError, match="name: the checkpoint holds no 'params', expected one of x"):
        checkpoint.restore(checkpoint.load(tmp_path / "c"), "params", like)
    assert checkpoint.restore(checkpoint.load(tmp_path / "c"), "buffers", {}) == {}  # nothing is what was saved of it


def test_what_is_no_file_of_named_trees_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trees: got a tuple, expected pytrees by name, such as \{'state': state\}"):
        unchecked(checkpoint.save)(tmp_path / "c", (torch.ones(1),), {})
    with pytest.raises(ValueError, match="tree: two leaves have the path 'a/0/z'; give their keys other names"):
        checkpoint.save(tmp_path / "c", {"a/0": {"z": torch.ones(1)}, "a": ({"z": torch.zeros(1)},)}, {})
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="checkpoint: got a str, expected what checkpoint.load returns"):
        unchecked(checkpoint.restore)("c", "a", {})


def test_another_version_is_named(tmp_path: Path) -> None:
    files.write_tensors(tmp_path / "c", {}, {"format": 99, "notes": {}})
    with pytest.raises(ValueError, match="has format 99, this version of hyperfunc reads 2"):
        checkpoint.load(tmp_path / "c")


def describe(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    code = checkpoint_main.main([str(path), *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_program_prints_what_a_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = {
        "epoch": 3,
        "classes": ["cat", "dog"],
        "config": {"depth": 10, "lr": 0.002},
        "history": [{"epoch": number, "test/accuracy": 50 + number / 3} for number in range(30)],
    }
    path = tmp_path / "run.pth"
    checkpoint.save(path, {"state": {"w": torch.ones(2, 3), "n": torch.ones(4)}, "step": torch.tensor(7)}, notes)
    code, out, err = describe(path, capsys)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{path}: {path.stat().st_size:,} bytes, format 2, whole: its content matches its SHA-256"
    assert "classes  cat, dog" in lines
    assert "  depth  10" in lines
    assert "  epoch  test/accuracy" in lines
    assert "     29        59.6667" in lines
    assert lines.count("  ...") == 1
    assert "state: 2 tensors, 10 numbers, 40 bytes" in lines
    assert "  state/w  float32[2, 3]" in lines
    assert "state/w" not in describe(path, capsys, "--brief")[1]
    assert json.loads(describe(path, capsys, "--json")[1]) == notes


def test_the_program_refuses_what_is_damaged_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path / "c", {"x": torch.ones(9)}, {})
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:-1])
    assert describe(tmp_path / "c", capsys)[::2] == (2, f"{PROGRAM}: {tmp_path / 'c'} is damaged: {WRONG_SUM}\n")
    code, out, err = describe(tmp_path / "nothing", capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)


PROGRAM = "python -m hyperfunc.checkpoint"
WRONG_SUM = "its content does not match the checksum in it"


def test_the_program_runs_by_its_name_and_into_a_pipe_that_closes(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"x": {str(n): torch.ones(1) for n in range(20_000)}}, {})
    command = f"{sys.executable} -m hyperfunc.checkpoint {tmp_path / 'c'} | head -2"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "whole: its content matches its SHA-256" in done.stdout
