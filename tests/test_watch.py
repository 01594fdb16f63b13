"""Ranks that look after each other, here as threads of one process with a store in its memory."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from hyperfunc import watch
from hyperfunc.watch import RankLost, Told, Watch, _said_by

SIGNAL = 15


class Rank:
    """One of several, with what it has been told, and what it said."""

    def __init__(self, store: HashStore, rank: int, world: int, *, timeout: float, apart: bool) -> None:
        self.received: int | None = None
        self.said: list[str] = []
        self.ended: list[int] = []
        self.over = threading.Event()
        self.watch = Watch(
            store,
            rank,
            world,
            timeout=timeout,
            received=lambda: self.received,
            say=self.said.append,
            apart=apart,
            end=self._end,
        )

    def _end(self, code: int) -> None:
        self.ended.append(code)
        self.die()

    def die(self) -> None:
        """No beat of it is seen from now on."""
        self.watch._stopping.set()
        self.over.set()


Start = Callable[..., list[Rank]]


@pytest.fixture
def at_once() -> Iterator[Callable[..., "Future[Any]"]]:
    """Calls a function in a thread."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, at_once: object) -> Iterator[Start]:
    """Starts the watches of so many ranks, which count half a second of silence after a signal."""
    monkeypatch.setattr(watch, "SILENCE_AFTER_SIGNAL", 0.5)
    started: list[Rank] = []
    stores: list[HashStore] = []

    def run(world: int, *, timeout: float = 100, apart: bool = False) -> list[Rank]:
        stores.append(store := HashStore())
        for rank in range(world):
            store.set(f"beat/{rank}", "0/0/0")
            store.set(f"who/{rank}", f"host, process {rank}")
        ranks = [Rank(store, rank, world, timeout=timeout, apart=apart) for rank in range(world)]
        for one in ranks:
            one.watch.start()
        started.extend(ranks)
        return ranks

    yield run
    for one in started:
        one.die()
    for store in stores:
        # What still waits is let go.
        store.set("verdict", "1 0")
        store.set("over", "")


def until_said(rank: Rank, seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    while not rank.said and time.monotonic() < deadline:
        time.sleep(0.02)
    return rank.said


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, ValueError, FloatingPointError, OSError])
def test_an_error_keeps_its_kind_and_gets_its_rank(kind: type[Exception]) -> None:
    said = _said_by(3, kind("too much"))
    assert type(said) is kind
    assert str(said) == "rank 3: too much"


@pytest.mark.parametrize("dead", [0, 1])
def test_after_a_signal_a_silent_rank_is_named_soon(
    start: Start, dead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    ranks = start(2)
    alive = ranks[1 - dead]
    ranks[dead].die()
    assert not alive.over.wait(1)
    assert alive.said == []
    alive.received = SIGNAL
    assert alive.watch._limit * alive.watch.interval == pytest.approx(80, rel=0.01)
    (line,) = until_said(alive, 5)
    assert line.startswith(f"rank {dead} (host, process {dead}) gave no sign of life for ")
    # The launcher need not name it.
    assert line in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


def test_what_the_watch_has_said_its_main_thread_does_not_say_again(start: Start) -> None:
    ranks = start(2, timeout=1)
    ranks[1].die()
    assert len(until_said(ranks[0], 5)) == 1
    error = ranks[0].watch.judge(RuntimeError("gloo: timeout"), 1)
    assert isinstance(error, Told)
    assert error.code == 1


def test_after_a_signal_a_rank_that_is_gone_is_not_gathered_from(start: Start, at_once: Any) -> None:
    ranks = start(3, apart=True)
    gathered = [at_once(ranks[rank].watch.gather, str(rank)) for rank in (0, 2)]
    ranks[1].die()
    # They have work of their own for any length of time.
    assert not any(one.done() for one in gathered)
    ranks[2].received = SIGNAL
    with pytest.raises(RankLost, match=r"rank 1 \(host, process 1\) gave no sign of life for 0"):
        gathered[0].result(timeout=5)
    ranks[0].watch._claim(1, "")  # as `judge` does
    with pytest.raises(Told):
        gathered[1].result(timeout=5)
    assert [one.said for one in ranks] == [[], [], []]


def test_a_rank_that_a_signal_ended_before_it_began_is_nobodys_fault(start: Start, at_once: Any) -> None:
    ranks = start(3, apart=True)
    ranks[1].watch.withdraw()
    ranks[1].die()
    ranks[0].received = SIGNAL
    gathered = [at_once(ranks[rank].watch.gather, str(rank)) for rank in (0, 2)]
    assert [one.result(timeout=5) for one in gathered] == [["0", "2"], ["0", "2"]]
    for one in [at_once(ranks[rank].watch.leave) for rank in (0, 2)]:
        one.result(timeout=5)
    assert [one.said for one in ranks] == [[], [], []]


def test_ranks_that_gather_wait_for_work_of_any_length(start: Start, at_once: Any) -> None:
    ranks = start(2, timeout=1, apart=True)
    first = at_once(ranks[0].watch.gather, "a")
    time.sleep(1.5)
    assert not first.done()
    assert ranks[1].watch.gather("b") == ["a", "b"] == first.result(timeout=5)
    assert [one.said for one in ranks] == [[], []]


def test_ranks_that_all_wait_at_the_same_place_are_ended(start: Start) -> None:
    ranks = start(2, timeout=1)
    with ranks[0].watch.waiting(), ranks[1].watch.waiting():
        (line,) = until_said(ranks[0], 5)
        assert all(one.over.wait(5) for one in ranks)
    assert re.fullmatch(r"no rank has made progress for 0\.[789] s, and all wait: a device or the network hangs", line)
    assert [one.ended for one in ranks] == [[1], [1]]
    assert ranks[1].said == []


def test_a_rank_that_others_wait_for_is_named_and_not_all(start: Start) -> None:
    ranks = start(2, timeout=1)
    with ranks[0].watch.waiting():
        (line,) = until_said(ranks[0], 5)
    assert line.startswith("rank 1 (host, process 1) is alive but has made no progress for 0.")


def test_ranks_that_go_on_or_work_by_themselves_are_left_alone(start: Start) -> None:
    ranks = start(2, timeout=1)
    # Places that all reach together: a wait each shorter than the timeout, and between them work that is longer.
    for _ in range(3):
        with ranks[0].watch.waiting(), ranks[1].watch.waiting():
            time.sleep(0.4)
    time.sleep(1.2)
    assert [one.said for one in ranks] == [[], []]


def test_what_rank_0_has_to_say_is_not_lost_while_it_stays(start: Start) -> None:
    ranks = start(2, timeout=1)
    ranks[1].die()
    assert str(ranks[0].watch.judge(ValueError("no data"), 2)) == "no data"
    assert ranks[0].ended == []
    assert ranks[0].over.wait(5)


class GoneStore(HashStore):
    """A store that has gone with its process."""

    def set(self, key: str, value: str) -> None:
        raise RuntimeError("connection closed by peer")


def test_rank_0_stays_until_the_others_know_why_all_end(start: Start) -> None:
    """It may hold the store itself."""
    ranks = start(3, timeout=20)
    error = ranks[0].watch.judge(ValueError("no data"), 2)
    assert str(error) == "no data"
    # What they have read they need no store for.
    for one in ranks[1:]:
        one.watch._store = GoneStore()
    told = [one.watch.judge(RuntimeError("gloo: closed by peer"), 1) for one in ranks[1:]]
    assert [(type(one), getattr(one, "code", None)) for one in told] == [(Told, 2), (Told, 2)]
    assert all(one.over.wait(10) for one in ranks)
    assert [one.ended for one in ranks] == [[2], [2], [2]]
    assert [one.said for one in ranks] == [[], [], []]
