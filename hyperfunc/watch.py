"""Ranks that look after each other through a key-value store: who is alive, what to do together, who is to blame.

A thread in every rank does this a few times a second, beside the training and outside of its collectives. So it costs
a step nothing, and it works just the same while the main thread waits in a collective for a rank that is gone.
"""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.distributed import DistError, PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from hyperfunc.exits import EXIT_FAILED

EARLY = 0.8
"""The part of the timeout after which a rank is given up: all is to be over by its end."""

NAMED = 4
"""How many ranks a line names; the rest it counts."""

SILENT_LOOKS = 5
"""After how many looks without a beat a rank that does not go on counts as silent: it was stopped a moment later."""

SILENCE_AFTER_SIGNAL = 3.0
"""Seconds without a beat that count as silent once a signal asks to end: launchers send one to all when they find one
rank dead, and kill all soon after."""

PATIENCE_LOOKS = 15
"""How many looks an error in a collective waits to see who else has one, and so who has not."""


class RankLost(ConnectionError):
    """Another rank is gone, or does not go on; the message names it."""


class Told(Exception):
    """The reason for which all ranks end has been said, by another rank, and so has the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def meet(store: Store, rank: int, world: int, timeout: float) -> Store:
    """Waits for all ranks to come, and returns the part of the store that is for this start of theirs alone.

    A launcher that starts ranks again goes on with the same store, where the first ones have left their keys, and not
    all launchers count alike how often they did. So rank 0 numbers the starts, and answers those who ask it now.

    Raises:
        RankLost: One did not come in time.
    """
    deadline = time.monotonic() + timeout
    missing = [0]
    if rank == 0:
        number = store.add("starts", 1)
        own = _enter(store, number, 0)
        while time.monotonic() < deadline:
            missing = [other for other in range(world) if not own.check([f"who/{other}"])]
            if not missing:
                own.set("met", "")
                return own
            for other in missing:
                if store.check([f"hello/{other}"]):
                    answer = f"welcome/{store.get(f'hello/{other}').decode()}"
                    if not store.check([answer]):
                        store.set(answer, str(number))
            time.sleep(0.02)
    else:
        token = uuid.uuid4().hex
        store.set(f"hello/{rank}", token)
        own = None
        while time.monotonic() < deadline:
            if own is None and store.check([f"welcome/{token}"]):
                own = _enter(store, int(store.get(f"welcome/{token}")), rank)
            if own is not None and own.check(["met"]):
                return own
            time.sleep(0.02)
    names = ", ".join(map(str, missing[:NAMED])) + (" and others" if len(missing) > NAMED else "")
    raise RankLost(f"rank {names} did not come within {timeout:g} s")


def _enter(store: Store, number: int, rank: int) -> Store:
    own = PrefixStore(f"start/{number}", store)
    own.set(f"beat/{rank}", "0/0/0")
    own.set(f"who/{rank}", f"{socket.gethostname()}, process {os.getpid()}")
    return own


class Watch:
    """What one rank knows of the others.

    A rank shows that it lives by a number that it raises at every look, how far it is by a second one, and whether it
    waits for the others by a third. Rank 0 watches all others, and they watch rank 0. Looks count and not the clock:
    ranks that were all stopped together, as by a suspended machine, find each other alive afterwards.

    Args:
        store: From `meet`.
        rank: This one's number.
        world: How many there are.
        timeout: Seconds after which a rank that is silent, or behind and does not move, is given up; and all of them
            where all wait and none moves.
        received: Gives the number of a signal that asks to end, or None.
        say: Takes the line that says why all ranks end.
        apart: Whether the ranks have work of their own and need each other in `gather` alone. After a signal a rank
            that is gone then keeps none of the others from saving what they have in hand.
        end: Ends the process with an exit code.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        *,
        timeout: float,
        received: Callable[[], int | None],
        say: Callable[[str], None],
        apart: bool = False,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._store = store
        self._rank = rank
        self._world = world
        self._received = received
        self._say = say
        self._apart = apart
        self._end = end
        # More ranks look less often: all of them ask the one store.
        self.interval = 0.1 * (1 + world / 32)
        self._limit = max(2, round(EARLY * timeout / self.interval))
        self._silence = min(self._limit, max(SILENT_LOOKS, round(SILENCE_AFTER_SIGNAL / self.interval)))
        self._grace = min(5.0, 0.1 * timeout)
        watched = range(1, world) if rank == 0 else [0]
        self._heard: dict[int, tuple[str, int]] = dict.fromkeys(watched, ("", 0))
        self._moved: dict[int, tuple[int, int]] = dict.fromkeys(watched, (0, 0))
        self._quiet: dict[int, int] = {}
        self._standstill: tuple[list[str], int] = [], 0
        self._gathered = 0
        self._stopping = threading.Event()
        self._judged: int | None = None
        self._lingers = False
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
        self._changed = threading.Condition()
        # All that follows is guarded by it.
        self._arrivals = 0
        self._waits = 0
        self._point = 0
        self._round = 0
        self._wish: int | None = None
        self._order: int | None = None
        self._frozen = False
        self._at: int | None = None

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def arrive(self) -> None:
        """Notes that the main thread has come to a place where it waits for the other ranks."""
        with self._changed:
            self._arrivals += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A place where the main thread waits for the other ranks and does nothing of its own that takes long."""
        with self._changed:
            self._arrivals += 1
            self._waits += 1
        try:
            yield
        finally:
            with self._changed:
                self._arrivals += 1
                self._waits -= 1

    def agree(self, wish: int | None) -> int | None:
        """What all ranks do here, if anything: a wish of one of them, or a signal that one of them received.

        Called by all ranks at the same places of the program, which are counted. Where a rank wishes something, all
        stop at the next such place, tell where they are, and do it at the first place that none has passed. It takes
        a few looks, during which each waits for the others; without a wish nothing is ever waited for.
        """
        with self._changed:
            self._arrivals += 1
            self._point += 1
            self._wish = wish
            while self._frozen and self._at is None:
                self._changed.wait()
            if self._at != self._point:
                return None
            order, self._order, self._wish = self._order, None, None
            self._frozen, self._at = False, None
            self._round += 1
            return order

    def asked(self) -> int | None:
        """A signal that one of the ranks has received: for ranks that go on by themselves and never `agree`."""
        with self._changed:
            return self._order

    def gather(self, value: str) -> list[str]:
        """What every rank gives; waits until all have come here, for however long they have work of their own.

        Called by all ranks equally often.

        After a signal only for those that live: what they give is all there is, if it was the signal that ended the
        others before they had begun.

        Raises:
            RankLost: Another rank was lost after a signal.
        """
        self._gathered += 1
        key = f"gathered/{self._gathered}"
        self._store.set(f"{key}/{self._rank}", value)
        while not self._store.check([f"{key}/by"]):
            if (code := self._verdict()) is not None:
                raise Told(code)
            if self._rank == 0:
                self._close_gathering(key)
            elif lost := self._lost():
                raise RankLost(self._silent_line(lost))
            time.sleep(self.interval)
        present = self._store.get(f"{key}/by").decode().split()
        return [self._store.get(f"{key}/{rank}").decode() for rank in present]

    def _close_gathering(self, key: str) -> None:
        """Says whose values are all that there will be, as soon as nobody else is to be waited for."""
        present = [rank for rank in range(self._world) if self._have(key, [rank])]
        lost = self._lost()
        if set(present) | set(lost) != set(range(self._world)):
            return
        if unexplained := {rank: looks for rank, looks in lost.items() if not self._have("withdrawn", [rank])}:
            raise RankLost(self._silent_line(unexplained))
        self._store.set(f"{key}/by", " ".join(map(str, present)))

    def withdraw(self) -> None:
        """Leaves word that a signal ends this process before it has begun; takes a moment, and no longer."""

        def leave_word() -> None:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"withdrawn/{self._rank}", "")

        thread = threading.Thread(target=leave_word, daemon=True)
        thread.start()
        thread.join(1)

    def judge(self, error: Exception, code: int) -> Exception:
        """What is to be raised in the place of an error that ends this rank: it may be another's doing.

        Exactly one rank says why the ranks end: the first to claim that. All others get a `Told`.

        Args:
            error: What came up in the main thread.
            code: The exit code that it leads to.
        """
        lost = isinstance(error, RankLost)
        try:
            if not lost and is_of_communication(error):
                lost, error = True, self._whose_fault(error)
            elif self._rank != 0:
                # What is wrong with all of them is for rank 0 to say.
                time.sleep(3 * self.interval)
            is_mine = self._claim(code, str(error))
            told = Told(self._verdict() or code)
            self._linger()
            if not is_mine:
                return told
        except RuntimeError:
            if self._judged is not None:
                return Told(self._judged)
            return RankLost(self._without_store()) if lost or is_of_communication(error) else error
        return error if lost or self._rank == 0 else _said_by(self._rank, error)

    def _linger(self) -> None:
        """Keeps the store, which may be rank 0's own, until the others have read there why all end, or are dead."""
        others = [other for other in range(self._world) if other != self._rank and other not in self._quiet]
        self._lingers = True
        try:
            for _ in range(PATIENCE_LOOKS):
                if self._rank != 0 or self._have("heard", others):
                    break
                time.sleep(self.interval)
        finally:
            self._lingers = False

    def leave(self) -> None:
        """At a good end: waits until all are there, so that none is taken for dead, or ended, while it finishes."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self._rank}", "")
            while not self._store.check(["over"]):
                lost = self._lost() if self._apart else {}
                if self._rank == 0 and self._have("left", set(range(self._world)) - set(lost)):
                    self._store.set("over", "")
                elif 0 in lost:
                    break
                time.sleep(self.interval)
        self._stopping.set()
        self._thread.join()
        if self._rank == 0:
            # The store may be this process's own.
            time.sleep(2 * self.interval)

    def _work(self) -> None:
        look = 0
        judged_at = 0
        while not self._stopping.wait(self.interval):
            look += 1
            try:
                with self._changed:
                    beat = f"{look}/{self._arrivals}/{min(1, self._waits)}"
                self._store.set(f"beat/{self._rank}", beat)
                if self._judged is None and (code := self._verdict()) is not None:
                    self._judged, judged_at = code, look
                    self._store.set(f"heard/{self._rank}", "")
                if self._judged is not None:
                    # The main thread may be about to end by itself, with more to put in order.
                    if self._lingers:
                        judged_at = look
                    if (look - judged_at) * self.interval >= self._grace:
                        self._end(self._judged)
                    continue
                if (lost := self._look_at_others(look)) is not None and self._claim(EXIT_FAILED, lost):
                    self._say(lost)
                self._follow_agreement()
            except RuntimeError:
                if self._stopping.is_set():
                    return
                if self._stopping.wait(self._grace):
                    return  # the store has gone with its process, after a good end
                if self._judged is not None:
                    self._end(self._judged)
                    return
                self._say(self._without_store())
                self._end(EXIT_FAILED)

    def _look_at_others(self, look: int) -> str | None:
        """The line about a rank that is to be given up, if there is one."""
        others = list(self._heard)
        if not others:
            return None
        beats = [beat.decode() for beat in self._store.multi_get([f"beat/{other}" for other in others])]
        arrivals = [int(beat.split("/")[1]) for beat in beats]
        with self._changed:
            own = f"{self._arrivals}/{min(1, self._waits)}"
            furthest = max(self._arrivals, *arrivals)
        quiet: dict[int, int] = {}
        silent: dict[int, int] = {}
        stuck: list[int] = []
        for other, beat, arrived in zip(others, beats, arrivals, strict=True):
            if beat != self._heard[other][0]:
                self._heard[other] = (beat, look)
            if arrived != self._moved[other][0] or arrived == furthest:
                self._moved[other] = (arrived, look)
            unheard, unmoved = look - self._heard[other][1], look - self._moved[other][1]
            if unheard >= self._silence:
                quiet[other] = unheard
            if max(unheard, unmoved) < self._limit:
                continue
            if unheard >= min(SILENT_LOOKS, self._limit):
                silent[other] = unheard
            else:
                stuck.append(other)
        self._quiet = quiet
        if not self._apart:
            silent |= self._lost()
        if silent:
            return self._silent_line(silent)
        if stuck:
            seconds = self._limit * self.interval
            return f"{self._name(stuck)} is alive but has made no progress for {seconds:.1f} s while the others wait"
        return self._look_at_all([own, *(beat.partition("/")[2] for beat in beats)], look)

    def _look_at_all(self, places: list[str], look: int) -> str | None:
        """The line that all wait for what does not come, and none for another of them; for rank 0, who sees all.

        What the host has left to a device counts as waiting, so that the ranks may stand like this for as long as a
        device computes.
        """
        if self._rank != 0 or places != self._standstill[0] or not all(place.endswith("/1") for place in places):
            self._standstill = places, look
        looks = look - self._standstill[1]
        if looks < self._limit:
            return None
        seconds = looks * self.interval
        return f"no rank has made progress for {seconds:.1f} s, and all wait: a device or the network hangs"

    def _lost(self) -> dict[int, int]:
        """The ranks that none waits for any more once a signal asks to end, with how many looks they have been silent.

        Of those that this rank watches.
        """
        with self._changed:
            signaled = self._order is not None and self._order > 0
        return self._quiet if signaled or self._received() is not None else {}

    def _silent_line(self, silent: dict[int, int]) -> str:
        seconds = min(silent.values()) * self.interval
        if all(self._have("withdrawn", [rank]) for rank in silent):
            return f"{self._name(list(silent))} was stopped by a signal before it had begun"
        return f"{self._name(list(silent))} gave no sign of life for {seconds:.1f} s: killed, stopped, or cut off"

    def _follow_agreement(self) -> None:
        """Proposes what is wished for here, and brings forward what any rank has proposed."""
        with self._changed:
            key, frozen, at, wish = f"agreement/{self._round}", self._frozen, self._at, self._wish
        if at is not None:
            return
        if not frozen:
            number = self._received()
            wish = number if number is not None else wish
            if wish is not None:
                self._store.compare_set(key, "", str(wish))
            elif not self._store.check([key]):
                return
            order = int(self._store.get(key))
            with self._changed:
                self._frozen, self._order = True, order
                first_open = self._point + 1
            self._store.set(f"{key}/{self._rank}", str(first_open))
        if self._rank == 0 and self._have(key, range(self._world)):
            opens = self._store.multi_get([f"{key}/{other}" for other in range(self._world)])
            self._store.set(f"{key}/at", str(max(map(int, opens))))
        if self._store.check([f"{key}/at"]):
            with self._changed:
                self._at = int(self._store.get(f"{key}/at"))
                self._changed.notify_all()

    def _whose_fault(self, error: Exception) -> Exception:
        """Whose fault an error in a collective is: of those who have none themselves."""
        self._store.set(f"failed/{self._rank}", "")
        beats = self._beats()
        missing = [other for other in range(self._world) if other != self._rank]
        for _ in range(PATIENCE_LOOKS):
            time.sleep(self.interval)
            missing = [other for other in missing if not self._have("failed", [other])]
            if not missing or self._verdict() is not None:
                return RankLost(f"the ranks have lost each other: {error}")
        after = self._beats()
        if dead := [other for other in missing if beats[other] == after[other]]:
            return RankLost(f"{self._name(dead)} was killed, stopped, or cut off")
        return RankLost(f"{self._name(missing)} is alive but did not take part: {error}")

    def _beats(self) -> list[bytes]:
        return self._store.multi_get([f"beat/{other}" for other in range(self._world)])

    def _claim(self, code: int, reason: str) -> bool:
        """Whether it is for this thread of this rank to say why all of them end."""
        mine = f"{code} {self._rank} {threading.get_ident()}"
        is_mine = self._store.compare_set("verdict", "", mine).decode() == mine
        if is_mine:
            tell_launcher(reason)
        return is_mine

    def _verdict(self) -> int | None:
        """The exit code of all ranks, once one has said why they end."""
        if not self._store.check(["verdict"]):
            return None
        return int(self._store.get("verdict").decode().split()[0])

    def _without_store(self) -> str:
        return f"rank {self._rank} has lost the store that the ranks share; what launched them has probably ended"

    def _have(self, key: str, ranks: Iterable[int]) -> bool:
        return self._store.check([f"{key}/{rank}" for rank in ranks])

    def _name(self, ranks: list[int]) -> str:
        """The ranks, the first of them with where they run."""
        shown = [f"rank {rank}" for rank in ranks[:NAMED]]
        for place, rank in enumerate(ranks[:NAMED]):
            if self._have("who", [rank]):
                shown[place] += f" ({self._store.get(f'who/{rank}').decode()})"
        return ", ".join(shown) + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")


def is_of_communication(error: Exception) -> bool:
    """Whether an error comes from a collective and not from this rank's own work."""
    # Gloo's are plain RuntimeErrors that hold a path of its source.
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def tell_launcher(reason: str) -> None:
    """Leaves the file from which torch's elastic launcher knows the reason why a process ends."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        with contextlib.suppress(OSError):
            get_error_handler().record_exception(RankLost(reason))


def _said_by(rank: int, error: Exception) -> Exception:
    """The same error with the rank before its message."""
    # What is more special comes first: there is advice against a lack of memory.
    for kind in (torch.OutOfMemoryError, ValueError, FloatingPointError, OSError, RuntimeError, MemoryError):
        if isinstance(error, kind):
            return kind(f"rank {rank}: {error}")
    return error
