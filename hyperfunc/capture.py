"""A step made fast: compiled by torch.compile, and captured as a CUDA graph.

Nothing here knows what the step does. It is a pure function `step(state, batch) -> (state, metrics)` of pytrees of
tensors, and so is what comes back, with one exception that is written out at `capture`: there a tensor that the caller
holds is overwritten in place.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor

from hyperfunc import graph_passes, tree, winograd
from hyperfunc.arguments import some
from hyperfunc.compiled_norms import CompiledNorms

Step = Callable[[Any, Any], tuple[Any, Any]]

Evaluation = Callable[[Any, Any], Any]

AnyStep = TypeVar("AnyStep", bound=Evaluation)
"""A step or an evaluation."""

Rebuild = Callable[[Sequence[Tensor]], Any]

WARM_UP_STEPS = 3
"""Steps on a side stream before the capture: compilation and the choice of algorithms must not be captured."""

ROOM = 4096
"""Places of 8 bytes on Python's stack that a compiled step takes.

Since 3.11 Python has that stack in pieces of 16 KiB, and gives one back as soon as nothing is left in it: a call that
needs the next piece asks the system for memory, each time. The compiler's function, whose thousand variables fill half
a piece, may end where all its calls do that. A step that needs more than a piece gets one of 64 KiB, with room for
them."""


def compile_step(step: AnyStep, batch: Any, *, channels_last: bool = True) -> AnyStep:
    """Compiles a step, or an evaluation, for batches shaped like `batch`; others, such as the last of an epoch, run
    uncompiled.

    One graph without a break: whatever cannot be traced is an error at the first call, not a slow step. Compilation
    happens at that first call and takes from ten seconds to minutes; what it makes is kept on disk, where a later
    process finds it. Batch norms take another form, and on some CPUs convolutions do; see `compiled_norms`, `winograd`
    and `graph_passes`.

    Later calls check again only the arguments and torch's own settings. Whatever else the step reads, such as a
    variable around it, is taken to be what it was at the first call.

    Args:
        step: Pure.
        batch: Any batch of the shapes that will follow.
        channels_last: Whether convolutions read and write in that order of memory. Turn it off for a step under
            `torch.vmap` over parameters: its convolutions are grouped, and for those it is Inductor that should choose.

    Raises:
        ValueError: A leaf of the batch is no tensor.
    """
    tree.check_tensors("batch", batch)
    # Inductor itself gives up channels_last wherever all convolutions have 64 channels or fewer.
    options: dict[str, Any] = {"force_layout_optimization": channels_last}
    convolutions = False
    if _on_cuda(batch):
        options |= torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
        # It compiles and times variants of each kernel, one after the other. A step has hundreds, which takes minutes.
        options["coordinate_descent_tuning"] = False
        # What is stacked of so many is one kernel: the gradients of the kernels of all layers of a shape. It would else
        # be one for each.
        options["max_pointwise_cat_inputs"] = 32
        # Convolutions are cuDNN's: some of Inductor's own are wrong before torch 2.14 (pytorch#173068).
        options["max_autotune_conv_backends"] = "ATEN"
        # What it tries for each product would fill the screen.
        options["autotune_num_choices_displayed"] = 0
        # Not all versions have these. One kernel for the sums of rows and of columns never writes those that go into a
        # larger tensor, as gradients go into the optimizer's vector (pytorch#193061).
        off = "max_autotune_report_choices_stats", "triton.mix_order_reduction"
        known = torch._inductor.list_options()
        options |= {name: False for name in off if name in known}
    else:
        # A sum that several passes need, such as the gradient behind a ReLU, is stored and not made again in each.
        options["realize_reads_threshold"] = 2
        convolutions = winograd.is_worthwhile()
    options["post_grad_custom_post_pass"] = graph_passes.graph_pass(convolutions=convolutions)
    if hasattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe"):  # and with it this option, since torch 2.8
        options["guard_filter_fn"] = _on_arguments

    def traced(state: Any, batch: Any) -> Any:
        with CompiledNorms():
            return step(state, batch)

    # Torch keeps what it compiled with the code object, and refuses a ninth for the same. Since nothing that the step
    # consists of is compared (see `_on_arguments`), two steps must not share one.
    compiled = torch.compile(_with_own_code(traced), fullgraph=True, dynamic=False, options=options)
    expected = _signature(tree.leaves(batch))

    def run(state: Any, batch: Any) -> Any:
        return (compiled if _signature(tree.leaves(batch)) == expected else step)(state, batch)

    return _with_own_code(run, co_stacksize=ROOM)


def capture(step: Step, state: Any, batch: Any) -> Step:
    """Captures a step as a CUDA graph; where there is no CUDA tensor, it is the step itself that comes back.

    The graph reads a state and a batch of its own, into which a call copies its arguments, and it writes the new state
    over its own. So the arguments are never written, with one exception: *the state that a call returns is the graph's
    own, and the next call overwrites it*. Pass it on, as a training loop does, and nothing is copied; keep it with
    `tree.clone`. Metrics are copies and may be kept.

    A batch of another length than `batch` is captured as a graph of its own at its first call; both share their memory
    and the state.

    Args:
        step: A pure function of a state and a batch, without a synchronisation in it.
        state: Any state of the shapes that will follow. It is not changed: the warm-up discards what it computes.
        batch: Any batch of the shapes that will follow.

    Raises:
        ValueError: A leaf is no tensor; or a call's state, or its batch but for the length, has other shapes, dtypes or
            devices than those given here. The message names leaves.
    """
    tree.check_tensors("state, batch", (state, batch))
    if not _on_cuda((state, batch)):
        return step
    # Leaf by leaf: Inductor copies every input that does not begin at a multiple of 16 bytes, and views of one vector
    # would not.
    own_state = tree.map(torch.clone, state)
    own_leaves = tree.leaves(own_state)

    def make(own_batch: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
        def advance() -> Any:
            new_state, metrics = step(own_state, own_batch)
            if differences := _differences(new_state, own_state):
                raise ValueError(
                    f"step: must return a state like the one that it takes, but {some(differences, between='; ')}"
                )
            return _move_into(own_leaves, _in_order(new_state, own_state), metrics)

        def warm_up() -> None:
            step(own_state, own_batch)
            # As it is, because the state must not change: the kernel that copies has to have run before as well.
            _overwrite(own_leaves, own_leaves)

        return warm_up, advance

    graphs = _Graphs(make, batch, _device((state, batch)))

    def captured(new_state: Any, batch: Any) -> tuple[Any, Any]:
        run = graphs.find(batch)
        if new_state is not own_state:
            _move_into(own_leaves, _leaves_like("state", new_state, own_state))
        return own_state, run()

    return captured


def capture_evaluation(function: Evaluation, network: Any, batch: Any) -> Evaluation:
    """Captures `function(network, batch) -> result` as a CUDA graph; without a CUDA tensor it is the function itself.

    What comes back writes no argument, and its results are copies. A network is copied into the graph's own at a call
    with another object than the one before, so that an evaluation over many batches copies it once: *do not write into
    it between two calls*. Batches of other lengths are captured as by `capture`.

    Args:
        function: Pure, without a synchronisation in it.
        network: Any network of the shapes that will follow.
        batch: Any batch of the shapes that will follow.

    Raises:
        ValueError: As of `capture`.
    """
    tree.check_tensors("network, batch", (network, batch))
    if not _on_cuda((network, batch)):
        return function
    own_network = tree.map(torch.clone, network)

    def make(own_batch: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
        call = partial(function, own_network, own_batch)
        return call, call

    graphs = _Graphs(make, batch, _device((network, batch)))
    last = None

    def captured(network: Any, batch: Any) -> Any:
        nonlocal last
        run = graphs.find(batch)
        if network is not last:
            leaves = _leaves_like("network", network, own_network)
            last = None  # until the copy is whole
            _overwrite(tree.leaves(own_network), leaves)
            last = network
        return run()

    return captured


class _Graphs:
    """The CUDA graphs of one function, one for each length of batch; they share their memory.

    Args:
        make: Of a batch that the graph will read, what to run before the capture, and what to capture.
        batch: The first to capture.
        device: Of the graphs.
    """

    def __init__(
        self, make: Callable[[Any], tuple[Callable[[], Any], Callable[[], Any]]], batch: Any, device: torch.device
    ) -> None:
        self._make = make
        # Of this device and no other: by default all captures of a process take one stream, of whatever device came
        # first. And one for all, because they share a pool.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor], Rebuild]] = {}
        self._example = tree.map(torch.clone, batch)
        _, self._structure = tree.leaves_and_structure(batch)
        self._add(self._example)

    def find(self, batch: Any) -> Callable[[], Any]:
        """The replay for this batch, which returns copies of the results. Captures it where its length is a new one.

        Raises:
            ValueError: It differs from the first batch by more than the length.
        """
        given, structure = tree.leaves_and_structure(batch)
        signature = _signature(given)
        if structure != self._structure or signature not in self._graphs:
            given = _leaves_like("batch", batch, self._example, but_length=True)
            signature = _signature(given)
            if signature not in self._graphs:
                self._add(tree.replace_leaves(self._example, [leaf.clone() for leaf in given]))
        graph, own, results, rebuild = self._graphs[signature]

        def run() -> Any:
            # The host does this for every replay: everything that can be known before is.
            _overwrite(own, given)
            graph.replay()
            return rebuild([result.clone() for result in results])

        return run

    def _add(self, own_batch: Any) -> None:
        own = tree.leaves(own_batch)
        try:
            graph, results = _record(*self._make(own_batch), self._pool, self._stream)
        except BaseException:
            # The pool of a capture that broke off may still count as being recorded into.
            self._pool = torch.cuda.graph_pool_handle()
            raise
        self._graphs[_signature(own)] = graph, own, *tree.flatten(results)


def _with_own_code(function: Any, **changes: Any) -> Any:
    """The function with a code object that no other has, changed in what is given."""
    return FunctionType(function.__code__.replace(**changes), function.__globals__, closure=function.__closure__)


def _on_arguments(guards: Any) -> list[bool]:
    """Which of the things that torch would compare at every call it is to compare: the state, the batch, whether one of
    their tensors is another one's object, and torch's own settings; not what the step consists of, which is thousands
    of attributes of a module and its layers. A pure function stays what it is.
    """
    return [
        guard.guard_type == "DUPLICATE_INPUT"
        or not ("__closure__" in guard.name or guard.name.startswith(("G[", "__import__")))
        for guard in guards
    ]


def _on_cuda(value: Any) -> bool:
    return any(leaf.is_cuda for leaf in tree.leaves(value))


def _device(value: Any) -> torch.device:
    return next(leaf.device for leaf in tree.leaves(value) if leaf.is_cuda)


def _record(
    warm_up: Callable[[], Any], call: Callable[[], Any], pool: Any, stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Captures `call` after some runs of `warm_up`; the random state is as it was. Returns what `call` returned.

    Raises:
        BaseException: Of `warm_up` or `call`; the current stream is as it was, too.
    """
    with torch.cuda.device(stream.device):
        random_state = torch.cuda.get_rng_state()
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_STEPS):
                    warm_up()
        finally:
            # After a failure too: what it leaves behind on the stream still uses memory that is given back now.
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.set_rng_state(random_state)
        graph = torch.cuda.CUDAGraph()
        failure: BaseException | None = None
        result = None
        # After a failure torch leaves the capture's stream in place of the current one.
        with torch.cuda.stream(torch.cuda.current_stream()), _no_collection():
            try:
                # Other threads may go on: that of NCCL asks for its events again and again.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    try:
                        result = call()
                    except BaseException as error:
                        failure = error
                        raise
            except BaseException as error:
                if error is not failure:
                    _abandon(graph, pool, stream)
                # What the end of a broken capture raises says no more than that it was broken.
                failure = failure or error
        try:
            if failure is not None:
                raise failure
        finally:
            del failure  # which holds this frame, and with it all that `call` knows
    return graph, result


_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture could not be ended, which the allocator may go on to ask what belongs to them."""


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> None:
    """Closes two things that torch up to 2.12, and maybe later, leaves open of a capture that could not be ended: the
    allocator goes on to record into its pool (pytorch#180395), and the device's random generator takes itself for
    captured (pytorch#176753), until the end of another capture. Where torch closes them itself, nothing happens.
    """
    _failed.append(graph)
    names = "_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"  # the second until torch 2.7
    for end in (getattr(torch._C, name) for name in names if hasattr(torch._C, name)):
        with contextlib.suppress(RuntimeError):
            end(stream.device.index, pool)
    another = torch.cuda.CUDAGraph()
    with (
        contextlib.suppress(RuntimeError),
        torch.cuda.graph(another, stream=stream, capture_error_mode="thread_local"),
    ):
        torch.zeros(1, device=stream.device)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps Python from looking for garbage: a graph or a kernel that it came upon would be unloaded, which breaks any
    capture that is under way."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _signature(leaves: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple([(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves])


def _apart(value: Any, other: Any) -> Any:
    """`value` with copies of those leaves that share memory with a leaf of `other`."""
    taken = {leaf.untyped_storage().data_ptr() for leaf in tree.leaves(other)}
    return tree.map(lambda leaf: leaf.clone() if leaf.untyped_storage().data_ptr() in taken else leaf, value)


def _move_into(own: Sequence[Tensor], new: Sequence[Tensor], beside: Any = ()) -> Any:
    """Writes the leaves of a new state over the graph's own; returns what is `beside` it, without memory of theirs."""
    # What comes back as it was, as the weights of a calibration, is left as it is.
    changed = [(old, leaf) for old, leaf in zip(own, new, strict=True) if leaf is not old]
    # What still is the old state, in another place, must be read before the new one is written over it.
    values, beside = _apart(([leaf for _, leaf in changed], beside), own)
    _overwrite([old for old, _ in changed], values)
    return beside


def _overwrite(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Leaf by leaf; one operation a dtype, because a list of several is copied one by one."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for ours, theirs in zip(into, values, strict=True):
        group = by_dtype.setdefault(ours.dtype, ([], []))
        group[0].append(ours)
        group[1].append(theirs)
    for ours, theirs in by_dtype.values():
        torch.ops.aten._foreach_copy_(ours, theirs)


def _leaves_like(name: str, found: Any, expected: Any, *, but_length: bool = False) -> list[Tensor]:
    """The leaves of `found`, in the order of `expected`.

    Raises:
        ValueError: There are `_differences`.
    """
    if differences := _differences(found, expected, but_length=but_length):
        raise ValueError(f"{name}: not what was captured: {some(differences, between='; ')}; capture it again")
    return _in_order(found, expected)


def _in_order(found: Any, expected: Any) -> list[Tensor]:
    """The leaves of `found` in the order of `expected`, which has the same names: dicts may have their keys in another
    order."""
    named = tree.named_leaves(found)
    return [named[path] for path in tree.named_leaves(expected)]


def _differences(found: Any, expected: Any, *, but_length: bool = False) -> list[str]:
    """How the two differ in names, dtypes, devices, or shapes, of which the first extent may not count."""
    ours, theirs = tree.named_leaves(expected), tree.named_leaves(found)
    differences = [f"{path} is missing" for path in ours if path not in theirs]
    differences += [f"{path} is new" for path in theirs if path not in ours]
    for path in (path for path in ours if path in theirs):
        was, now = (
            f"{tree.describe(side[path], any_length=but_length)} on {side[path].device}" for side in (ours, theirs)
        )
        if was != now:
            differences.append(f"{path} is {now}, was {was}")
    return differences
