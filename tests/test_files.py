import os
import pickle
import random
import re
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import safetensors.torch
import torch
from helpers import ROOT

from hyperfunc.files import beside, lock_for, read_tensors, remove_leftovers, temporary_name, write_bytes, write_tensors

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "scalar": torch.tensor(5),
    "flags": torch.tensor([True, False]),
    "b": torch.arange(12).view(3, 4).t(),
}
METADATA = {"list": [1, 2.5, None], "text": 'héllo "sha256"', "deep": {"a": [{}]}}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    write_tensors(path, TENSORS, METADATA)
    tensors, metadata = read_tensors(path)
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, TENSORS[name])
        assert tensor.dtype == TENSORS[name].dtype
    assert [p.name for p in tmp_path.iterdir()] == ["file.pth"]


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its name is before the write is over, so that after a power cut there is the old file or the new one."""
    steps: list[str] = []

    def note(name: str) -> Callable[..., None]:
        original = getattr(os, name)

        def call(first: int | str | Path, *others: Any) -> None:
            what = stat.S_ISDIR(os.fstat(first).st_mode) and "folder" if isinstance(first, int) else ""
            steps.append(f"{name} {what or 'file'}")
            original(first, *others)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, note(name))
    write_bytes(tmp_path / "file", b"content")
    assert steps == ["fsync file", "replace file", "fsync folder"]


def test_every_length_of_the_header_can_be_read(tmp_path: Path) -> None:
    """The first byte of a file is the low byte of its header's length, and may look like that of a pickle."""
    first_bytes = set()
    for length in range(0, 300, 8):
        write_tensors(tmp_path / "f", TENSORS, {"text": "x" * length})
        first_bytes.add((tmp_path / "f").read_bytes()[0])
        assert read_tensors(tmp_path / "f")[1] == {"text": "x" * length}
    assert 0x80 in first_bytes


def test_metadata_is_json_as_any_reader_knows_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_tensors(tmp_path / "file", TENSORS, {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_is_kept_under_another_name(tmp_path: Path) -> None:
    path, aside = tmp_path / "file", tmp_path / "aside"
    write_tensors(path, {}, {"run": 1})
    write_tensors(path, {}, {"run": 2}, keep_old_as=aside)
    assert [read_tensors(p)[1] for p in (path, aside)] == [{"run": 2}, {"run": 1}]


def test_the_old_file_is_kept_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    test_the_old_file_is_kept_under_another_name(tmp_path)


def test_a_disk_that_is_full_in_the_middle_of_a_copy_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tensors(tmp_path / "file", {}, {"run": 1})

    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    def half(old: BinaryIO, new: BinaryIO) -> None:
        new.write(old.read(10))
        raise OSError("no space left")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copyfileobj", half)
    with pytest.raises(OSError, match="no space left"):
        write_tensors(tmp_path / "file", {}, {"run": 2}, keep_old_as=tmp_path / "aside")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert read_tensors(tmp_path / "file")[1] == {"run": 1}


def test_a_failed_write_leaves_no_second_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_tensors(path, {}, {"run": 1})

    def refuse(*_: object) -> None:
        raise OSError("not now")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="not now"):
        write_tensors(path, {}, {"run": 2}, keep_old_as=tmp_path / "aside")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_interrupt_right_after_the_new_file_is_there_leaves_the_old_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, replace = tmp_path / "file", os.replace
    write_bytes(path, b"old")

    def interrupted(*names: Path) -> None:
        replace(*names)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"new", keep_old_as=tmp_path / "aside")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"new", "aside": b"old"}


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    others = [".file.metrics.jsonl.0123abcd.tmp", ".file.pth.1.0123abcd.tmp", ".file.pth.mine.tmp", "file.pth"]
    for name in (".file.pth.0123abcd.tmp", temporary_name(tmp_path / "file.pth").name, *others):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path / "file.pth")
    assert sorted(p.name for p in tmp_path.iterdir()) == others


def test_a_name_under_which_the_old_is_to_be_kept_is_not_overwritten(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {}, {"a": 1})
    write_tensors(tmp_path / "other", {}, {"a": 2})
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "file", {}, {"a": 3}, keep_old_as=tmp_path / "other")
    assert [read_tensors(tmp_path / name)[1] for name in ("file", "other")] == [{"a": 1}, {"a": 2}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "other"]


def test_a_file_keeps_its_permissions(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {}, {"a": 1})
    (tmp_path / "file").chmod(0o600)
    write_tensors(tmp_path / "file", {}, {"a": 2})
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_what_is_no_file_is_not_read() -> None:
    with pytest.raises(ValueError, match="/dev/zero is not a regular file"):
        read_tensors("/dev/zero")


def test_the_names_of_a_runs_other_files() -> None:
    names = ["run.pth", "run.seed1", "run.seed2", "m.v1.pth", "run", "run.pt", ".run.pth", "a.1", "a.1.pth"]
    expected = ["run", "run.seed1", "run.seed2", "m.v1", "run", "run", ".run", "a.1", "a.1"]
    assert [beside(Path(name), ".png").name for name in names] == [f"{name}.png" for name in expected]


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder/real")
    write_tensors(tmp_path / "link", {}, {"a": 1})
    assert (tmp_path / "link").is_symlink()
    assert read_tensors(tmp_path / "folder/real")[1] == {"a": 1}


def test_one_process_at_a_time_holds_the_lock_of_a_path(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom filelock import Timeout\nfrom hyperfunc.files import lock_for\n"
        "try:\n    lock_for(sys.argv[1]).acquire(timeout=0)\nexcept Timeout:\n    print('held')\n"
    )

    def try_lock() -> str:
        command = [sys.executable, "-c", program, str(tmp_path / "x")]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    with lock_for(tmp_path / "folder/../x"):
        assert try_lock() == "held\n"
    assert try_lock() == ""


def test_views_of_one_vector_are_written_whole(tmp_path: Path) -> None:
    vector = torch.arange(6.0)
    first, second = vector.split([2, 4])
    write_tensors(tmp_path / "f", {"first": first, "second": second, "all": vector}, {})
    tensors, _ = read_tensors(tmp_path / "f")
    assert torch.equal(tensors["second"], second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_other_programs_read_the_file_as_well(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {**TENSORS, "other": torch.arange(3).to(dtype), "one": torch.tensor(2.5).to(dtype)}
    write_tensors(tmp_path / "f", tensors, {})
    found = safetensors.torch.load_file(tmp_path / "f")
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in tensors.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "ours", {}, {})
    (tmp_path / "theirs").write_text("")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "theirs").stat().st_mode)


def flip_bit(content: bytes, rng: random.Random) -> bytes:
    position = rng.randrange(len(content))
    return content[:position] + bytes([content[position] ^ 1 << rng.randrange(8)]) + content[position + 1 :]


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def insert(content: bytes, rng: random.Random) -> bytes:
    position = rng.randrange(len(content) + 1)
    return content[:position] + rng.randbytes(rng.randint(1, 9)) + content[position:]


def delete(content: bytes, rng: random.Random) -> bytes:
    position = rng.randrange(len(content))
    return content[:position] + content[position + rng.randint(1, 9) :]


def swap(content: bytes, rng: random.Random) -> bytes:
    first, second = sorted(rng.sample(range(len(content) - 8), 2))
    parts = content[first : first + 4], content[second : second + 4]
    if second - first < 4 or parts[0] == parts[1]:
        return flip_bit(content, rng)
    return content[:first] + parts[1] + content[first + 4 : second] + parts[0] + content[second + 4 :]


@pytest.mark.parametrize("damage", [flip_bit, truncate, insert, delete, swap])
def test_any_damage_is_noticed(tmp_path: Path, damage: Callable[[bytes, random.Random], bytes]) -> None:
    path = tmp_path / "file"
    write_tensors(path, TENSORS, METADATA)
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        damaged = damage(whole, rng)
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"file is (damaged|a pickle)"):
            read_tensors(path)


def test_a_pickle_is_named_and_not_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    path = tmp_path / "old.pth"
    for write in (lambda: torch.save({"x": Trap()}, path), lambda: path.write_bytes(pickle.dumps(Trap()))):
        write()
        with pytest.raises(ValueError, match="is a pickle, as torch.save writes it"):
            read_tensors(path)
    assert not (tmp_path / "sprung").exists()


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, TENSORS, METADATA)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_tensors(path, {"large": torch.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_missing_folder_is_named_and_no_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"'{tmp_path / 'no' / 'run.pth'}'")):
        write_bytes(tmp_path / "no" / "run.pth", b"")


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        write_tensors(tmp_path / "no/folder", TENSORS, METADATA)
