"""One run on several ranks: the process group, each rank's part of the work, and what is summed over all of them.

The ranks hold the same state and go through the same steps. What differs is which pictures of a batch a rank looks at;
one all-reduce a step of one flat buffer brings together what they find.
"""

# torch.compile cannot trace the evaluation of an annotation, and functions are defined inside of what it traces.
from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from hyperfunc import tree
from hyperfunc.exits import EXIT_BAD_INPUT, EXIT_FAILED
from hyperfunc.watch import EARLY, Watch, meet
from hyperfunc.watch import RankLost as RankLost
from hyperfunc.watch import Told as Told

Tree = TypeVar("Tree")

SAVE = -1
"""What ranks may agree to do besides ending by a signal, whose numbers are positive."""


def _saved_key(path: str) -> str:
    """In hexadecimal digits, because a store takes no text that UTF-8 does not hold, as a path may be."""
    return f"saved/{os.fsencode(path).hex()}"


def rank_of_environment() -> int | None:
    """This process's rank, as torchrun sets it; None where it was started by itself."""
    return int(os.environ["RANK"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def local_rank() -> int:
    """The number of this rank on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device_index(visible: int) -> int:
    """Which device is this rank's, of so many that it sees.

    A scheduler that starts a task a rank, as `srun --gpus-per-task=1`, may show each of them its own device alone.
    Torch's launcher shows all ranks the same ones.
    """
    return 0 if visible == 1 and "TORCHELASTIC_RUN_ID" not in os.environ else local_rank()


@contextlib.contextmanager
def errors_once() -> Iterator[None]:
    """Of what every rank of a machine writes to standard error, lets through the first rank's alone."""
    if rank_of_environment() is None or local_rank() == 0:
        yield
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            yield


class Alone:
    """The one rank of a run in one process: all is its part, and sums over ranks are what they are over."""

    rank = 0
    world = 1
    reduce = None

    def part(self, rows: Any) -> Any:
        return rows

    def sum(self, values: Tree) -> Tree:
        return values

    def mean(self, values: Tree) -> Tree:
        return values

    def agree(self, wish: int | None) -> int | None:
        return wish

    def tell(self, flag: bool) -> bool:
        return flag

    def compare(self, state: Any, notes: Mapping[str, Any] | None = None) -> None:
        pass

    def note_saved(self, run: str, path: str) -> None:
        pass

    def saved_run(self, path: str) -> str | None:
        return None

    def asked(self) -> int | None:
        return None

    def gather(self, value: str) -> list[str]:
        return [value]

    def withdraw(self) -> None:
        pass

    def at_device(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Group:
    """One of several ranks; made by `joined`.

    Attributes:
        rank: From 0 on; rank 0 is the one that prints, tracks and saves.
        world: How many there are.
    """

    def __init__(self, rank: int, world: int, device: torch.device, job: Store, watch: Watch) -> None:
        self.rank = rank
        self.world = world
        self._device = device
        self._job = job
        self._watch = watch

    @property
    def reduce(self) -> Callable[..., Any] | None:
        """`mean_over_ranks`, for `training.make_train_step`; None where there is one rank only."""
        if self.world == 1:
            return None

        def reduce(count: int, gradients: Any, averages: Any, sums: Any) -> tuple[Any, Any, Any]:
            if not torch.compiler.is_compiling():
                self._watch.arrive()
            return mean_over_ranks(count, gradients, averages, sums)

        return reduce

    def part(self, rows: Any) -> Any:
        """This rank's rows of a pytree of equally long tensors: as many as another's or one less, also none."""
        return part(rows, self.rank, self.world)

    def sum(self, values: Tree) -> Tree:
        """The sums over ranks of a pytree of scalars, which float64 holds exactly up to 2**53."""
        total = torch.stack([value.detach().double() for value in tree.leaves(values)])
        with self._watch.waiting():
            dist.all_reduce(total)
            total.tolist()  # waits for the device here, and not at some later place
        return tree.replace_leaves(
            values, [new.to(old.dtype) for new, old in zip(total.unbind(), tree.leaves(values), strict=True)]
        )

    def mean(self, values: Tree) -> Tree:
        """The means over ranks of a pytree of tensors; integers among them stay."""
        with self._watch.waiting():
            _, means, _ = mean_over_ranks(1, torch.zeros(1, dtype=torch.float64, device=self._device), values, ())
            tree.leaves(means)[0].tolist()  # waits for the device here, and not at some later place
        return means

    def agree(self, wish: int | None) -> int | None:
        """See `watch.Watch.agree`."""
        return self._watch.agree(wish)

    def tell(self, flag: bool) -> bool:
        """Rank 0's flag, on every rank."""
        told = torch.tensor(int(flag), device=self._device)
        with self._watch.waiting():
            dist.broadcast(told, 0)
            return bool(told)

    def note_saved(self, run: str, path: str) -> None:
        """Leaves with the launcher whose checkpoint is at a path, for ranks that it may start in place of these."""
        self._job.set(_saved_key(path), run)

    def saved_run(self, path: str) -> str | None:
        """The id of the run that these ranks saved there before their launcher started them anew, or None."""
        key = _saved_key(path)
        return self._job.get(key).decode() if self._job.check([key]) else None

    def asked(self) -> int | None:
        """See `watch.Watch.asked`."""
        return self._watch.asked()

    def gather(self, value: str) -> list[str]:
        """See `watch.Watch.gather`."""
        return self._watch.gather(value)

    def withdraw(self) -> None:
        """See `watch.Watch.withdraw`."""
        self._watch.withdraw()

    def at_device(self) -> contextlib.AbstractContextManager[None]:
        """For a place where the host may have to wait for the device, and so for all ranks' collectives on it.

        On the CPU it is the host that computes there, and gloo ends what hangs.
        """
        return self._watch.waiting() if self._device.type == "cuda" else contextlib.nullcontext()

    def compare(self, state: Any, notes: Mapping[str, Any] | None = None) -> None:
        """Compares a pytree, and notes that JSON could hold, between all ranks by their digests.

        Raises:
            RankLost: They differ; the message names a rank that differs and its first leaf or note that does.
        """
        digests = {path: digest(leaf) for path, leaf in tree.named_leaves(tree.fetch(state)).items()}
        digests |= {name: _short(repr(value).encode()) for name, value in (notes or {}).items()}
        if not dist.is_initialized():  # ranks that are apart
            gathered = [json.loads(text) for text in self._watch.gather(json.dumps(digests))]
            if all(found == gathered[0] for found in gathered):
                return
        else:
            # Two numbers in place of all: ranks are rarely different, and then their leaves may not even be the same.
            whole = _short(repr(digests).encode())
            extremes = torch.tensor([whole, -whole], device=self._device)
            with self._watch.waiting():
                dist.all_reduce(extremes, dist.ReduceOp.MAX)
                if extremes.sum().item() == 0:
                    return
                gathered: list[Any] = [None] * self.world
                dist.all_gather_object(gathered, digests)
        raise RankLost(f"the ranks are not equal: {describe_difference(gathered)}")


class Apart(Alone):
    """One of several ranks that have runs of their own: what they share is a signal to end, and restarts.

    Args:
        ranks: All of them.
    """

    def __init__(self, ranks: Alone | Group) -> None:
        self._ranks = ranks

    def agree(self, wish: int | None) -> int | None:
        asked = self._ranks.asked()
        return wish if asked is None else asked

    def note_saved(self, run: str, path: str) -> None:
        self._ranks.note_saved(run, path)

    def saved_run(self, path: str) -> str | None:
        return self._ranks.saved_run(path)


Ranks = Alone | Group


@contextlib.contextmanager
def joined(
    device: torch.device,
    timeout: float,
    received: Callable[[], int | None],
    say: Callable[[str], None],
    *,
    apart: bool = False,
) -> Iterator[Ranks]:
    """The ranks that this process belongs to by torchrun's environment; `Alone` where there is none.

    An error that ends one of them ends all, and exactly one says why: who raises `watch.Told` here has nothing to say.

    Args:
        device: Of this rank; its kind decides between NCCL and gloo.
        timeout: Seconds that a rank waits for another.
        received: See `watch.Watch`.
        say: See `watch.Watch`.
        apart: See `watch.Watch`. Such ranks have no collectives.

    Raises:
        RankLost: Another rank did not come, or is gone; the message names it.
        Told: Another rank has said why all of them end.
    """
    if rank_of_environment() is None:
        yield Alone()
        return
    if device.type == "cuda":
        # Else NCCL's own watchdog ends the process at an error, before it is known whose error it was. What hangs is
        # ended here, by `watch`.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    limit = timedelta(seconds=timeout)
    store, rank, world = next(rendezvous("env://", timeout=limit))
    shared = PrefixStore("hyperfunc", store)
    own = meet(shared, rank, world, timeout)
    # While it waits for the others, the group holds the store that it is given; the watch needs one, too.
    for_group = own.clone() if hasattr(own, "clone") else own
    watch = Watch(own, rank, world, timeout=timeout, received=received, say=say, apart=apart)
    watch.start()
    try:
        if not apart:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("group", for_group),
                rank=rank,
                world_size=world,
                timeout=EARLY * limit,
                device_id=device if device.type == "cuda" else None,
            )
        yield Group(rank, world, device, shared, watch)
    except Exception as error:
        raise watch.judge(error, EXIT_BAD_INPUT if isinstance(error, ValueError) else EXIT_FAILED) from error
    watch.leave()
    if dist.is_initialized() and device.type != "cuda":
        # NCCL would wait here for the end of every CUDA graph with an all-reduce in it, and the caller may hold some.
        dist.destroy_process_group()


def holds_up_exit() -> bool:
    """Whether Python's end may wait for other ranks; `os._exit` does not."""
    return rank_of_environment() is not None


def part(rows: Any, rank: int, world: int) -> Any:
    """The rows of a pytree of equally long tensors that belong to a rank."""
    count = len(tree.leaves(rows)[0])
    begin, end = rank * count // world, (rank + 1) * count // world
    return tree.map(lambda column: column[begin:end], rows)


def mean_over_ranks(count: int, gradients: Any, averages: Any, sums: Any) -> tuple[Any, Any, Any]:
    """Brings together what ranks found for their parts of a batch, in one all-reduce of one flat buffer.

    Every rank has to call it, also one whose part is empty.

    Args:
        count: Pictures in this rank's part.
        gradients: Of the *sum* of the loss over this part. Sums and not means: the gradient with respect to a sum over
            ranks inside the network (`sync_norm`) is then the gradient of the whole batch's loss, whatever the parts.
        averages: What is averaged by pictures, as the running statistics of batch norms; integers among them stay.
        sums: Numbers that add up; whole ones are exact up to 2**24 in float32.

    Returns:
        The gradients of the mean loss of the whole batch, the averages, and the sums.
    """
    moving = [leaf for leaf in tree.leaves(averages) if leaf.is_floating_point()]
    dtype = tree.leaves(gradients)[0].dtype
    own, unravel = tree.ravel(tree.map(lambda leaf: leaf.to(dtype), (gradients, moving, sums)))
    sizes = [tree.num_params(kind) for kind in (gradients, moving, sums)]
    first, second, third = own.split(sizes)
    buffer = torch.cat([first, second * count, third, own.new_full((1,), count)])
    if count == 0:
        # Means over nothing are not numbers.
        buffer = torch.zeros_like(buffer)
    dist.all_reduce(buffer)
    means, totals = buffer[: sizes[0] + sizes[1]] / buffer[-1], buffer[sizes[0] + sizes[1] : -1]
    new_gradients, new_moving, new_sums = unravel(torch.cat([means, totals]))
    fresh = iter(new_moving)
    return (
        tree.map(_like, new_gradients, gradients),
        tree.map(lambda old: _like(next(fresh), old) if old.is_floating_point() else old, averages),
        tree.map(_like, new_sums, sums),
    )


def _like(new: Tensor, old: Tensor) -> Tensor:
    return new.to(old.dtype) if old.is_floating_point() else new.round().to(old.dtype)


def digest(leaf: Tensor) -> int:
    """The first 62 bits of the SHA-256 of a tensor's dtype, shape and bytes."""
    return _short(tree.to_bytes(leaf))


def _short(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 2


def describe_difference(digests: list[dict[str, int]]) -> str:
    """Names a rank that differs from most others, or in a tie from the first, and where it begins to differ."""
    for path in dict.fromkeys(path for one in digests for path in one):
        column = [one.get(path) for one in digests]
        if len(set(column)) > 1:
            usual = max(column, key=lambda value: (column.count(value), -column.index(value)))
            rank = next(rank for rank, value in enumerate(column) if value != usual)
            return f"rank {rank} differs from rank {column.index(usual)} in {path}"
    return "nothing differs"
