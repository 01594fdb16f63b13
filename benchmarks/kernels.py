"""python -m benchmarks.kernels: how many kernels a compiled training step launches on an H100, by their kind.

They are counted in the code that torch's compiler writes for that GPU. None is needed, and nothing is run: the step is
traced on the CPU, its graph is moved to fake tensors on a GPU, and the compiler is told whatever it would ask a driver.
That reaches into parts of torch which are private and move: it works with torch 2.14. What cuDNN makes of a
convolution is not seen: forward at least one kernel, backward at least two.
"""

import argparse
import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, get_args
from unittest import mock

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx, config, graph
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import hyperfunc as hf
from benchmarks.cases import make_training, pictures
from hyperfunc import capture, training
from hyperfunc.precision import Precision

GPU = torch.device("cuda", 0)

H100 = DeviceProperties(
    type="cuda",
    index=0,
    multi_processor_count=132,
    cc=90,
    major=9,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
)

KINDS = {
    r"triton_poi_\w+\.run\(": "element by element",
    r"triton_(?:per|red)_\w+\.run\(": "with sums or other reductions",
    r"triton_unk_\w+\.run\(": "with sums that blocks of threads wait for",
    r"triton_for_\w+\.run\(": "over many tensors at once",
    r"extern_kernels\.\w*mm\(": "matrix products",
    r"extern_kernels\.convolution\(": "convolutions",
    r"aten\.convolution_backward\.default\(": "convolutions, backward",
}
"""Calls in the compiler's code, and what they launch."""


class _Written(Exception):
    """The compiler has written its code, which is all that is wanted of it."""


def kernels(step: training.Step, state: Any, batch: Any) -> Counter[str]:
    """The kernels that a step, compiled as by `capture.compile_step`, launches on an H100, by their kind.

    Args:
        step: Of tensors on the CPU.
        state: Its state.
        batch: Its batch.
    """
    code = written(step, state, batch)
    calls = code[code.index("def call(") :]
    return Counter({kind: len(re.findall(pattern, calls)) for pattern, kind in KINDS.items()})


def written(step: training.Step, state: Any, batch: Any) -> str:
    """The Python code by which the compiled step would launch its kernels."""
    found: list[str] = []

    def lower(traced: GraphModule, inputs: list[Tensor], **_options: Any) -> None:
        for node in traced.graph.nodes:
            if node.kwargs.get("device") is not None:
                node.kwargs = {**node.kwargs, "device": GPU}
        traced.recompile()
        with contextlib.ExitStack() as patches:
            for patch in _no_driver():
                patches.enter_context(patch)
            with FakeTensorMode(allow_non_fake_inputs=True) as fake:
                moved = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU) for x in inputs]
            FakeTensorProp(traced, fake).propagate_dont_convert_inputs(*moved)
            with tracing(TracingContext(fake)):
                compile_fx.compile_fx_inner(traced, moved)

    def stop(lowering: graph.GraphLowering) -> None:
        wrapper, _ = lowering.codegen()
        found.append(wrapper.value)
        raise _Written

    def compile_whole(*args: Any, **options: Any) -> Any:
        return whole(*args, **options | {"inner_compile": lower})

    def without_trials(mode: str) -> dict[str, Any]:
        """The mode's options, but for the choice between algorithms by trial, which would need a GPU."""
        return dict.fromkeys(mode_options(mode), False)

    whole, mode_options = compile_fx.compile_fx, torch._inductor.list_mode_options
    with (
        mock.patch.object(compile_fx, "compile_fx", compile_whole),
        mock.patch.object(torch._inductor, "list_mode_options", without_trials),
        mock.patch.object(graph.GraphLowering, "_compile_to_module", stop),
        # As on a GPU: the options of the compilation, the form of batch norms, the memory order of kernels.
        mock.patch.object(capture, "_on_cuda", return_value=True),
        mock.patch("hyperfunc.compiled_norms._is_ours", _no),
        mock.patch("hyperfunc.model._safe_order", _first),
        config.patch(fx_graph_cache=False),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        try:
            capture.compile_step(step, batch)(state, batch)
        except Exception:  # in which the compiler wraps what has stopped it
            if not found:
                raise
    return found[0]


def _no(*_args: Any, **_options: Any) -> bool:
    return False


def _first(value: Tensor, *_others: Any) -> Tensor:
    return value


def _no_driver() -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Answers to what the compiler asks of the GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    fake = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    yield mock.patch.object(driver, "_active", fake, create=True)
    properties = SimpleNamespace(**H100._asdict(), minor=0, name="H100", total_memory=80 * 2**30)
    answers: dict[str, Callable[..., Any]] = {
        "torch._inductor.runtime.hints.DeviceProperties.create": lambda _device: H100,
        "torch._inductor.scheduler.has_triton": lambda *_args: True,
        "torch.cuda.get_device_properties": lambda *_args: properties,
        "torch.cuda.get_device_capability": lambda *_args: (9, 0),
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.is_bf16_supported": lambda *_args, **_kw: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_rng_state": torch.get_rng_state,
        "torch.cuda.set_rng_state": lambda *_args: None,
        "torch.cuda.synchronize": lambda *_args: None,
        "torch.cuda._exchange_device": lambda _index: 0,
        "torch.cuda._maybe_exchange_device": lambda _index: 0,
        "torch.cuda._lazy_init": lambda: None,
        # cuDNN's convolutions keep channels_last.
        "torch._C._select_conv_backend": lambda *_args, **_kw: None,
        "torch._C._conv_determine_backend_memory_format": _memory_format,
    }
    for name, answer in answers.items():
        yield mock.patch(name, answer)


def _memory_format(images: Tensor, kernel: Tensor, _backend: Any) -> torch.memory_format:
    last = torch.channels_last
    has_last = (x.is_contiguous(memory_format=last) and not x.is_contiguous() for x in (images, kernel))
    return last if any(has_last) else torch.contiguous_format


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=40)
    parser.add_argument("--width", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", choices=get_args(Precision), default="bf16")
    parser.add_argument("--turn-on", metavar="OPTION", action="append", default=[], help="of torch._inductor.config")
    flags = parser.parse_args()
    given = pictures(torch.device("cpu"), flags.batch_size)
    step, state = make_training(hf.hyper_resnet(flags.depth, flags.width), given, flags.precision)
    with config.patch(dict.fromkeys(flags.turn_on, True)):
        found = kernels(step, state, given.draws[0])
    for kind, count in (*(+found).most_common(), ("together", found.total())):
        print(f"{count:5} {kind}")


if __name__ == "__main__":
    main()
