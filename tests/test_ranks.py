"""train.py on several ranks of the CPU, as a user starts it: whole, killed, hung, stopped and resumed."""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, assert_trees_equal, calibrated_again, make_folder
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing.api import SignalException

import hyperfunc as hf
import train
from hyperfunc import checkpoint, journal, launch

MARK = "HYPERFUNC_TEST"
"""Names, in the environment, the test that a process belongs to."""

Start = Callable[..., "subprocess.Popen[str]"]


def processes(mark: str) -> dict[int, dict[str, str]]:
    """The environment of every process with that mark which is not over, by its id."""
    found: dict[int, dict[str, str]] = {}
    for folder in Path("/proc").iterdir():
        try:
            content = (folder / "environ").read_bytes().decode(errors="replace") if folder.name.isdigit() else ""
        except OSError:
            continue
        variables = dict(item.split("=", 1) for item in content.split("\0") if "=" in item)
        if variables.get(MARK) == mark:
            found[int(folder.name)] = variables
    return found


def rank(mark: str, number: int) -> int:
    """The id of a rank's process."""
    ids = [pid for pid, variables in processes(mark).items() if variables.get("RANK") == str(number)]
    # The one that draws the curves has its rank's environment, and a rank is older.
    return min(ids)


def all_over(mark: str, seconds: float = 5) -> bool:
    """Whether no process of that mark is left, or will be soon: what draws the curves ends by itself."""
    deadline = time.monotonic() + seconds
    while (left := processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark whose processes do not outlive the test."""
    name = secrets.token_hex(8)
    yield name
    for pid in processes(name):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start(tmp_path: Path, mark: str) -> Start:
    """Starts a command, with all that it writes in one stream."""

    def run(*command: str, cwd: Path = tmp_path, **variables: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            env={**os.environ, MARK: mark, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = make_folder(tmp_path_factory.mktemp("pictures"), train=25, test=7, size=32)
    (path / "train" / "dog" / "0024.png").unlink()  # 49 pictures: 8 batches of 6, and one picture
    return [
        *("--no-wandb", "--depth", "10", "--dataset", "folder", "--data-dir", str(path), "--batch-size", "6"),
        *("--report-every", "4", "--timeout", "5", "--checkpoint-every", "3b", "--checkpoint-path", "run.pth"),
        *("--calibrate", "2", "--ema-decay", "0.5"),
    ]


EPOCHS = 3


def program(*flags: str) -> list[str]:
    return [str(ROOT / "train.py"), *flags]


def shown(path: Path) -> list[dict[str, Any]]:
    """What the journal holds but for times."""
    left_out = ("time", "epoch_time", "images_per_second")
    rows = [row for row in journal.read_rows(path) if row["kind"] in ("report", "epoch")]
    return [{key: value for key, value in row.items() if key not in left_out} for row in rows]


def await_line(process: "subprocess.Popen[str]", *beginnings: str) -> str:
    """What a process writes until there was a line that begins so, for each of the beginnings."""
    assert process.stdout is not None
    output, missing = "", set(beginnings)
    for line in process.stdout:
        output += line
        missing = {beginning for beginning in missing if not line.startswith(beginning)}
        if not missing:
            break
    return output


@pytest.fixture(scope="module")
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a run on two ranks that nothing disturbs."""
    path = tmp_path_factory.mktemp("whole")
    # Pictures of its own: others may have been read already, and are then in a cache.
    pictures = path / "pictures"
    shutil.copytree(flags[flags.index("--data-dir") + 1], pictures, ignore=shutil.ignore_patterns(".hyperfunc*"))
    flags = [*flags, "--data-dir", str(pictures)]
    done = subprocess.run(
        [sys.executable, *program(*flags, "--devices", "cpu:2", "--sync-bn", "--epochs", str(EPOCHS))],
        cwd=path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    shutil.rmtree(pictures)
    assert done.returncode == 0, done.stderr
    # Once or, where another rank was the first to read, not at all.
    said = [line.rpartition("/")[2] for line in done.stderr.splitlines()]
    assert said in ([], ["train: 49 files", "train: done", "test: 14 files", "test: done"])
    return path, done.stdout


def test_two_ranks_show_and_leave_what_one_does(
    whole: tuple[Path, str],
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main([*flags, "--device", "cpu", "--sync-bn", "--epochs", str(EPOCHS)]) == 0
    assert not torch.distributed.is_initialized()
    path, output = whole
    assert output.splitlines()[0].endswith(", 2 ranks")
    # Up to the first figure that rounding may change.
    ours, theirs = (re.sub(r"  (loss|train) .*", "", text) for text in (output, capsys.readouterr().out))
    assert ours.replace(", 2 ranks", "") == theirs
    assert sorted(file.name for file in path.iterdir()) == sorted(file.name for file in tmp_path.iterdir())
    ours, theirs = shown(path / "run.metrics.jsonl"), shown(tmp_path / "run.metrics.jsonl")
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    assert ours[0]["batch/loss"] == pytest.approx(theirs[0]["batch/loss"], rel=1e-3)
    assert checkpoint.load(path / "run.pth").notes["environment"]["ranks"] == 2


@pytest.mark.slow
def test_calibrated_statistics_are_means_over_ranks(flags: list[str], tmp_path: Path) -> None:
    command = [sys.executable, *program(*flags, "--devices", "cpu:2", "--epochs", "1")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    folder = Path(flags[flags.index("--data-dir") + 1])
    first, second = (calibrated_again(tmp_path / "run.pth", folder, 2, size=6, rank=rank, world=2) for rank in (0, 1))
    for name, leaf in hf.load(tmp_path / "run.pth")[2].items():
        torch.testing.assert_close(leaf, (first[name] + second[name]) / 2)
        assert "running" in name
        assert not torch.equal(first[name], second[name])


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_run_goes_on_to_the_same_end(
    whole: tuple[Path, str], flags: list[str], start: Start, mark: str, tmp_path: Path
) -> None:
    command = program(*flags, "--devices", "cpu:2", "--sync-bn", "--epochs", str(EPOCHS), "--max-restarts", "1")
    process = start(*command)
    output = await_line(process, "epoch 1/3  batch 4/9")
    os.kill(killed := rank(mark, 1), signal.SIGKILL)
    output += process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    lines = [line for line in output.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1
    assert lines[0].startswith("train.py: rank 1 (")
    assert f"process {killed})" in lines[0]
    assert "resumed      from run.pth at epoch 1, batch 3" in output
    assert all_over(mark)
    assert_trees_equal(checkpoint.load(tmp_path / "run.pth").tensors, checkpoint.load(whole[0] / "run.pth").tensors)
    assert shown(tmp_path / "run.metrics.jsonl") == shown(whole[0] / "run.metrics.jsonl")


@pytest.mark.slow
def test_a_hung_rank_is_named_within_the_timeout(flags: list[str], start: Start, mark: str, tmp_path: Path) -> None:
    # Without a launcher, as other programs start ranks; it would end the hung one, too.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = program(*flags, "--device", "cpu", "--epochs", "100")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    first, second = (start(*command, **address, RANK=str(n), LOCAL_RANK=str(n)) for n in range(2))
    await_line(first, "epoch 1/100  batch 8/9")
    second.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    output = first.communicate(timeout=20)[0]
    assert time.monotonic() - begin < 10
    assert first.returncode == 1
    lines = [line for line in output.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1
    assert lines[0].startswith("train.py: rank 1 (")
    assert f"process {second.pid}) gave no sign of life" in lines[0]
    assert checkpoint.load(tmp_path / "run.pth").notes["progress"]["batch"] % 3 == 0
    # It finds that it is alone when it is let go on.
    second.send_signal(signal.SIGCONT)
    second.communicate(timeout=20)
    assert second.returncode == 1


@pytest.mark.slow
def test_stopped_on_two_ranks_and_resumed_on_one(
    flags: list[str],
    start: Start,
    mark: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Saved by the clock, too, for which the ranks have to agree on a step. A longer run would be compiled.
    process = start(*program(*flags, "--devices", "cpu:2", "--epochs", "400", "--checkpoint-every", "1s"))
    output = await_line(process, "epoch 1/400  batch 4/9")
    deadline = time.monotonic() + 20
    while not (tmp_path / "run.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    by_clock = checkpoint.load(tmp_path / "run.pth").notes["progress"]
    assert by_clock["batch"] > 0
    process.terminate()
    output += process.communicate(timeout=30)[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert output.count("stopped by SIGTERM at ") == 1
    assert output.splitlines()[-1].endswith("; saved run.pth, go on with --resume")
    assert all_over(mark)
    progress = checkpoint.load(tmp_path / "run.pth").notes["progress"]
    assert (progress["epoch"], progress["batch"]) > (by_clock["epoch"], by_clock["batch"])
    where = f"resumed      from run.pth at epoch {progress['epoch'] + 1}, batch {progress['batch']}"

    epochs = progress["epoch"] + 1
    monkeypatch.chdir(tmp_path)
    code = train.main([*flags, "--devices", "1", "--device", "cpu", "--epochs", str(epochs), "--resume"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert where in captured.out
    assert "resumed on 1 ranks, was 2: without --sync-bn each rank has batch statistics of its own" in captured.err
    rows = [row for row in shown(tmp_path / "run.metrics.jsonl") if row["kind"] == "epoch"]
    assert [row["epoch"] for row in rows] == list(range(1, epochs + 1))


def test_what_is_wrong_is_said_once(flags: list[str], start: Start, mark: str, tmp_path: Path) -> None:
    process = start(*program(*flags, "--devices", "cpu:2", "--data-dir", "nowhere"))
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert len([line for line in output.splitlines() if "nowhere" in line]) == 1
    assert output.count("train.py: ") == 1
    assert all_over(mark)
    assert list(tmp_path.iterdir()) == []


# Devices


@pytest.mark.parametrize(
    ("devices", "kind", "visible", "expected"),
    [
        ("auto", "auto", 0, ["cpu"]),
        ("auto", "auto", 1, ["cuda:0"]),
        ("auto", "auto", 4, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        ("auto", "cpu", 4, ["cpu"]),
        ("1", "auto", 4, ["cuda:0"]),
        ("1", "auto", 0, ["cpu"]),
        ("2", "cuda", 4, ["cuda:0", "cuda:1"]),
        ("3,1", "auto", 4, ["cuda:3", "cuda:1"]),
        ("3,", "auto", 4, ["cuda:3"]),
        ("cpu:2", "auto", 4, ["cpu", "cpu"]),
        ("cpu:1", "cpu", 0, ["cpu"]),
    ],
)
def test_devices(devices: str, kind: str, visible: int, expected: list[str]) -> None:
    assert launch.choose_devices(devices, kind, visible) == list(map(torch.device, expected))


@pytest.mark.parametrize(
    ("devices", "kind", "visible", "message"),
    [
        ("2", "auto", 0, "--devices: got 2, but torch sees no CUDA device; cpu:2 is two ranks on the CPU"),
        ("0,1", "cpu", 2, "--devices: got 0,1, with --device cpu; cpu:2 is two ranks"),
        ("3", "auto", 2, "--devices: got 3, but torch sees 2 CUDA devices, 0 to 1"),
        ("0,2", "auto", 2, "--devices: got 0,2, but torch sees 2 CUDA devices, 0 to 1"),
        ("cpu:2", "cuda", 2, "--devices: got cpu:2 with --device cuda; omit one of them"),
        ("auto", "cuda", 0, "--device: got cuda, but torch sees no CUDA device"),
    ],
)
def test_devices_that_are_not_there(devices: str, kind: str, visible: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch.choose_devices(devices, kind, visible)


@pytest.mark.parametrize("text", ["0", "-1", "cpu", "cpu:0", "cpu:x", "1,1", "0,", ",", "1;2", "all", "", "cuda:0"])
def test_devices_are_numbers_or_ids(text: str) -> None:
    if text == "0,":
        assert launch.parse_devices(text) == ("cuda", [0])
        return
    with pytest.raises(ValueError, match="expected auto, a number of GPUs"):
        launch.parse_devices(text)


@pytest.mark.parametrize(
    ("batch_size", "ranks", "message"),
    [
        (128, 3, "got 128 for 3 ranks, expected a multiple of 3, for example 126 or 129; or 2 or 4 ranks"),
        (1, 2, "got 1 for 2 ranks, expected a multiple of 2, for example 2; or 1 ranks"),
        (999_999_999_999_999, 2, "got 999999999999999 for 2 ranks, .* or 1 or 3 ranks"),
        (100, 8, "got 100 for 8 ranks, expected a multiple of 8, for example 96 or 104; or 5 or 10 ranks"),
    ],
)
def test_a_batch_is_divided_evenly(batch_size: int, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch.check_batch_size(batch_size, ranks)


def test_an_uneven_division_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(["--devices", "cpu:3", "--dataset", "digits"]) == 2
    assert capsys.readouterr().err.startswith("train.py: --batch-size: got 128 for 3 ranks")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_stopped", [True, False])
def test_a_signal_that_meets_the_launcher_at_its_clock_is_a_signal(
    monkeypatch: pytest.MonkeyPatch, is_stopped: bool
) -> None:
    def start(_config: object, _program: str) -> Callable[..., None]:
        try:
            raise SignalException("got signal", signal.SIGTERM) if is_stopped else KeyError
        except (SignalException, KeyError):
            raise UnboundLocalError("start") from None

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", start)
    if is_stopped:
        assert launch.launch("train.py", [], 2, max_restarts=0, say=print) == 128 + signal.SIGTERM
    else:
        with pytest.raises(UnboundLocalError):
            launch.launch("train.py", [], 2, max_restarts=0, say=print)


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_the_runs_of_all(start: Start, mark: str, flags: list[str]) -> None:
    process = start(*program(*flags, "--devices", "cpu:2", "--seeds", "0,1", "--epochs", "100"))
    await_line(process, "seed0  epoch 1/100", "seed1  epoch 2/100")
    os.kill(rank(mark, 1), signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143, output
    for seed in (0, 1):
        assert f"seed{seed}  stopped by SIGTERM" in output
    assert all_over(mark)


@pytest.mark.slow
def test_runs_go_on_by_themselves_after_a_rank_was_killed(
    start: Start, mark: str, flags: list[str], tmp_path: Path
) -> None:
    """An earlier run's checkpoint at that place is not taken for theirs."""
    earlier = start(*program(*flags, "--seeds", "1", "--epochs", "1"))
    earlier.communicate(timeout=60)
    assert earlier.returncode == 0
    population = [*flags, "--seeds", "0,1", "--epochs", "4"]
    process = start(*program(*population, "--devices", "cpu:2", "--max-restarts", "1"))
    await_line(process, "seed0  epoch 1/4", "seed1  epoch 2/4")
    os.kill(rank(mark, 1), signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert re.search("rank 1 .* gave no sign of life", output)
    start(*program(*population, "--checkpoint-path", "whole.pth")).communicate(timeout=60)
    for seed in (0, 1):
        ours, theirs = (checkpoint.load(tmp_path / f"{name}.seed{seed}.pth").tensors for name in ("run", "whole"))
        assert_trees_equal(ours, theirs)
    assert (tmp_path / "run.1.seed1.pth").exists()


# The launcher


@pytest.fixture
def said() -> list[str]:
    """What the launcher has said."""
    return []


@pytest.fixture
def launched(tmp_path: Path, said: list[str]) -> Callable[..., int]:
    """Runs the body of a program on two ranks, whose number is in `rank`, and returns the launcher's exit code."""

    def run(body: str, max_restarts: int = 0) -> int:
        path = tmp_path / "program.py"
        path.write_text(f"import os, signal, time\nrank = int(os.environ['RANK'])\n{body}\n")
        return launch.launch(str(path), [], 2, max_restarts=max_restarts, say=said.append)

    return run


@pytest.mark.parametrize(("handler", "code"), [(signal.SIG_IGN, 0), (signal.SIG_DFL, 128 + signal.SIGHUP)])
def test_a_closed_terminal_is_ignored_under_nohup(
    handler: signal.Handlers, code: int, launched: Callable[..., int]
) -> None:
    before = signal.signal(signal.SIGHUP, handler)
    try:
        assert launched("if rank:\n    os.kill(os.getppid(), signal.SIGHUP)\ntime.sleep(1)") == code
        assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


KILLED = "if rank:\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(20)"
NAMES = """open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w').write('{"message": "said"}')"""


def test_a_killed_rank_that_no_other_has_named_is_named(launched: Callable[..., int], said: list[str]) -> None:
    assert launched(KILLED) == 1
    (line,) = said
    assert re.fullmatch(r"rank 1 \(process [0-9]+\) was killed by SIGKILL", line)


def test_a_killed_rank_is_named_once(launched: Callable[..., int], said: list[str]) -> None:
    # As `watch` does where it names a rank.
    names = f"if not rank:\n    {NAMES}\nelse:\n    time.sleep(0.5)"
    assert launched(f"{names}\n{KILLED}") == 1
    assert said == []
    # What was said of an earlier start explains nothing.
    first = "os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'"
    assert launched(f"if not rank and {first}:\n    {NAMES}\n{KILLED}", max_restarts=1) == 1
    assert len(said) == 1


STOPPED_ON_THE_WAY = """
import os, signal, sys, time
import torch
from hyperfunc import distributed

meet = distributed.meet

def stopped(*given):
    global met
    own = meet(*given)
    met = time.monotonic()  # the other may be long in coming
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    return own

distributed.meet = stopped
try:
    with distributed.joined(torch.device("cpu"), 5, lambda: None, print):
        pass
except distributed.Told as told:
    print(f"{time.monotonic() - met:.1f}")
"""


@pytest.mark.slow
def test_a_rank_stopped_before_the_group_is_made_is_named_within_the_timeout(start: Start) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    first, second = (start("-c", STOPPED_ON_THE_WAY, **address, RANK=str(n), LOCAL_RANK=str(n)) for n in range(2))
    lines = [line for line in first.communicate(timeout=60)[0].splitlines() if not line.startswith("[")]
    second.kill()
    second.communicate()
    assert len(lines) == 2, lines
    assert lines[0].startswith("rank 1 (")
    if hasattr(Store, "clone"):
        assert float(lines[1]) < 5
