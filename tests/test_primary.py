"""What a primary network must be, and the way back to an ordinary module."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_trees_equal
from torch import Generator, Tensor, nn
from torch.ao.nn.quantized.dynamic import Linear as QuantizedLinear
from torch.nn import functional as F

import hyperfunc as hf
from hyperfunc import tree
from hyperfunc.primary import check_state_dict


class Net(nn.Module):
    """Convolutions, a norm, tied linear layers, and a buffer that no file holds."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, 32, 3, stride=2)
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.head = nn.Linear(32, 4)
        self.head.bias.requires_grad_(False)
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        h = torch.relu(self.conv(torch.relu(self.bn(self.stem(images))))).mean((2, 3)) * self.scale
        return self.head(torch.relu(self.second(torch.relu(self.first(h)))))


Trained = tuple[hf.Model, hf.Params, hf.BatchStats, Tensor, Tensor]


@pytest.fixture(scope="module")
def trained() -> Trained:
    """A model with statistics of its own."""
    generator = Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.hyperize(Net(), z_dim=16)
    params, batch_stats = model.init(generator)
    images, labels = 1 + torch.randn(8, 3, 12, 12, generator=generator), torch.arange(8) % 4
    for _ in range(3):
        _, batch_stats = model.apply(params, batch_stats, images, train=True)
    return model, params, batch_stats, images, labels


class Closing(nn.Module):
    """Keeps a function over the module itself, in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(16, 16), nn.Linear(16, 16), nn.ReLU()
        if kind == "attribute":
            self.middle = lambda x: self.b(x)
        elif kind == "hook":
            self.a.register_forward_hook(lambda _module, _input, output: self.b(output))
        elif kind == "parameter":
            weight = self.b.weight
            self.middle = lambda x: x @ weight
        elif kind == "harmless":
            act, seen = self.act, []
            self.middle = lambda x: act(x) * len(seen)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.a(x))


@pytest.mark.parametrize("kind", ["attribute", "hook", "parameter"])
def test_a_function_over_a_part_of_the_module_is_refused(kind: str) -> None:
    """It would go on with the parameters of the original, and train nothing without a word."""
    with pytest.raises(
        ValueError, match=r"module: .* holds a function that closes over a part of the module, .* method"
    ):
        hf.hyperize(Closing(kind), targets="b.weight")


def test_a_function_over_what_has_no_parameters_is_taken() -> None:
    hf.hyperize(Closing("harmless"), targets="b.weight")


def test_a_materialized_network_may_be_given_by_any_name_and_needs_all_buffers(generator: Generator) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.bias = self.a.bias
            self.register_buffer("mask", torch.ones(16), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) * self.mask

    model = hf.hyperize(Tied(), targets="a.weight", z_dim=4)
    params, batch_stats = model.init(generator)
    bias = params.primary.pop("a.bias")
    params.primary["b.bias"] = bias + 1
    x = torch.randn(3, 16, generator=generator)
    network = hf.materialize(model, params, batch_stats)
    torch.testing.assert_close(network(x), model.apply(params, batch_stats, x, train=False)[0])
    with pytest.raises(ValueError, match="batch_stats: mask is missing; give what the model's own init and apply give"):
        hf.materialize(model, params, {})


@pytest.mark.parametrize("train", [True, False])
def test_a_materialized_network_starts_at_the_loss_of_the_hypernetwork_and_can_be_tuned(
    trained: Trained, train: bool
) -> None:
    model, params, batch_stats, images, labels = trained
    before = tree.named_leaves(tree.clone((params, batch_stats)))
    network = hf.materialize(model, params, batch_stats)
    assert type(network) is Net
    assert network.training
    network.train(train)
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert len(trainable) == len(list(network.parameters())) - 1
    optimizer = torch.optim.SGD(trainable, lr=0.01)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    expected = F.cross_entropy(model.apply(params, batch_stats, images, train=train)[0], labels).item()
    assert losses[0] == pytest.approx(expected, rel=1e-6)
    assert losses[-1] < losses[0]
    assert_trees_equal(tree.named_leaves((params, batch_stats)), before)
    assert network.get_parameter("first.weight") is network.get_parameter("second.weight")


def test_its_state_dict_loads_into_the_class(trained: Trained) -> None:
    model, params, batch_stats, images, _ = trained
    own = Net()
    own.load_state_dict(hf.materialize(model, params, batch_stats).state_dict())
    expected = model.apply(params, batch_stats, images, train=False)[0]
    torch.testing.assert_close(own.eval()(images), expected)


def test_it_can_be_exported(trained: Trained) -> None:
    model, params, batch_stats, images, _ = trained
    network = hf.materialize(model, params, batch_stats).eval()
    exported = torch.export.export(network, (images,), dynamic_shapes={"images": {0: torch.export.Dim("n", min=2)}})
    torch.testing.assert_close(
        exported.module()(images[:5]), model.apply(params, batch_stats, images[:5], train=False)[0]
    )


@pytest.mark.filterwarnings("ignore")  # the exporter's own, of its own parts
def test_it_runs_under_onnx(trained: Trained, tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"needs {name}: pip install -e '.[dev]'")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -e '.[dev]'")
    model, params, batch_stats, images, _ = trained
    network = hf.materialize(model, params, batch_stats).eval()
    path = tmp_path / "net.onnx"
    torch.onnx.export(network, (images,), str(path), dynamo=True, input_names=["images"], verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    expected = model.apply(params, batch_stats, images, train=False)[0]
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


def test_parameters_of_another_model_cannot_be_materialized(trained: Trained) -> None:
    model, params, batch_stats, *_ = trained
    other = hf.hyperize(Net(32), z_dim=16)
    with pytest.raises(ValueError, match=r"params: primary/stem.weight has the shape \(16, 3, 3, 3\), expected \(32, "):
        hf.materialize(other, params._replace(embeddings=other.init(Generator())[0].embeddings), batch_stats)
    with pytest.raises(ValueError, match="bn.running_mean is missing"):
        hf.materialize(model, params, {name: batch_stats[name] for name in batch_stats if name != "bn.running_mean"})


def test_a_state_dict_that_does_not_fit_is_described() -> None:
    module = Net()
    check_state_dict(module, module.state_dict())
    state_dict = dict(module.state_dict())
    del state_dict["second.weight"]  # tied, and there by its other name
    check_state_dict(module, state_dict)
    del state_dict["first.weight"], state_dict["bn.running_var"]
    state_dict |= {"first.wieght": torch.zeros(1), "conv.bias": torch.zeros(31)}
    message = (
        r"state_dict: it does not fit the module \(Net\): bn.running_var is missing; first.weight is missing; "
        r"conv.bias is float32\[31\], expected float32\[32\]; first.wieght is unknown; it must come from a module of "
    )
    with pytest.raises(ValueError, match=message):
        check_state_dict(module, state_dict)


class WithExtraState(nn.Module):
    """Keeps what is neither a parameter nor a buffer, some of it made of them."""

    def __init__(self, note: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.note = note
        self.asked = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))

    def get_extra_state(self) -> Any:
        self.asked += 1
        return self.note(self) if callable(self.note) else self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


@pytest.mark.parametrize("note", [{"steps": [1, 2.5], "scale": torch.ones(2)}, torch.arange(3), "text", None])
def test_extra_state_goes_with_the_module(note: Any, generator: Generator, tmp_path: Path) -> None:
    module = nn.Sequential(WithExtraState(note), nn.Linear(16, 4))
    model = hf.hyperize(module, targets="0.last.weight", z_dim=4)
    params, batch_stats = model.init(generator)
    state_dict = hf.materialize(model, params, batch_stats).state_dict()
    assert tree.equal(state_dict["0._extra_state"], note)
    own = nn.Sequential(WithExtraState("other"), nn.Linear(16, 4))
    own.load_state_dict(state_dict)
    x = torch.randn(2, 16, generator=generator)
    torch.testing.assert_close(own(x), model.apply(params, batch_stats, x, train=False)[0])
    for given in (state_dict, {name: value for name, value in state_dict.items() if "extra" not in name}):
        assert hf.fit_embeddings(model, given).explained["0.last.weight"] > 1 - 1e-6
    with pytest.raises(
        ValueError,
        match=r"state_dict: 0._extra_state is not the extra state of the module's WithExtraState, .* load it into the "
        "module before that is hyperized, or leave it out",
    ):
        hf.fit_embeddings(model, {**state_dict, "0._extra_state": "other"})
    hf.save(tmp_path / "model", model, params, batch_stats)
    again = hf.materialize(*hf.load(tmp_path / "model", module))
    assert tree.equal(again.state_dict()["0._extra_state"], note)


def test_extra_state_made_of_parameters(generator: Generator) -> None:
    """It has no value where the module is on the meta device, and is not asked for there."""
    module = WithExtraState(lambda self: self.first.weight.sum().item())
    model = hf.hyperize(module, targets="last.weight", z_dim=4)
    state_dict = hf.materialize(model, *model.init(generator)).state_dict()
    del state_dict["_extra_state"]
    hf.fit_embeddings(model, state_dict)
    assert module.asked == 0
    with pytest.raises(
        ValueError, match="state_dict: _extra_state is not the extra state of the module's WithExtraSta"
    ):
        hf.fit_embeddings(model, {**state_dict, "_extra_state": 1.0})


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.ReLU(), nn.LazyLinear(16)))


def lazy_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.LazyBatchNorm1d())


def quantized() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), QuantizedLinear(16, 16))


def with_integers() -> nn.Module:
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    module[1].weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    return module


def on_two_devices() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16, device="meta"))


def with_attribute(name: str, make: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    """A module with a plain attribute made of one of its layers."""

    def module() -> nn.Module:
        layers = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)))
        setattr(layers[1], name, make(layers))
        return layers

    return module


def with_max_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.Embedding(8, 16, max_norm=0.5))


def with_complex_numbers() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16, dtype=torch.complex64))


def old_weight_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.utils.weight_norm(nn.Linear(16, 16)))


def scripted() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), torch.jit.script(nn.Linear(16, 16)))


def compiled() -> nn.Module:
    module = torch.compile(nn.Linear(16, 16), backend="eager")
    assert isinstance(module, nn.Module)
    return module


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*weight_norm:DeprecationWarning", "ignore:.*jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # that torch will drop such modules
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lazy, r"module: 1.1 \(LazyLinear\) is lazily initialised.* run one batch through the module before"),
        (lazy_norm, r"module: 1 \(LazyBatchNorm1d\) is lazily initialised"),
        (quantized, r"module: 1 \(Linear\) is quantized.* hyperize the float module, and quantize what"),
        (with_integers, "module: its parameter 1.weight is int8 and cannot be trained; register it as a buffer"),
        (
            with_attribute("plain", lambda layers: [{"w": (layers[0].weight,)}]),
            r"module: 1.plain holds the parameter 0.weight outside of the module.*; read it as an attribute",
        ),
        (
            with_attribute("mean", lambda layers: (layers[1][1].running_mean,)),
            "module: 1.mean holds .*1.1.running_mean",
        ),
        (with_attribute("doubled", lambda layers: layers[0].weight * 2), "module: 1.doubled is .*; compute it in the"),
        (old_weight_norm, "module: 1.weight is a tensor computed .* use torch.nn.utils.parametrizations in the place"),
        (with_max_norm, r"module: 1 \(Embedding\) has max_norm=0.5, by which .* make it without"),
        (with_complex_numbers, "module: its parameter 1.weight is complex64, .* torch.view_as_complex"),
        (scripted, r"module: 1 \(RecursiveScriptModule\) is compiled by torch.jit; hyperize the module that"),
        (compiled, r"module: it \(OptimizedModule\) is compiled; .* `_orig_mod`"),
        (
            lambda: nn.DataParallel(nn.Linear(16, 16)),
            r"module: it \(DataParallel\) spreads a module over devices; .* attribute `module`",
        ),
        (on_two_devices, "one device, but 0.weight is on cpu, 1.weight is on meta; move it with module.to"),
    ],
)
def test_modules_that_cannot_be_hyperized_are_named(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.hyperize(make(), targets="0.weight")


@pytest.mark.parametrize("make", [lazy, with_integers, on_two_devices, with_complex_numbers])
def test_a_file_is_not_read_into_such_a_module_either(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = hf.hyperize(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), targets="0.weight", z_dim=4)
    hf.save(tmp_path / "model", model, *model.init(Generator()))
    with pytest.raises(ValueError, match="^module: .*1.*; (run|register|move|hold) "):
        hf.load(tmp_path / "model", make())


def test_plain_attributes_that_hold_no_parameters_and_recurrent_layers_are_taken(generator: Generator) -> None:
    module = nn.Sequential(nn.GRU(16, 16))
    module.constants = [torch.ones(2), "text"]  # pyright: ignore[reportArgumentType]
    assert hf.hyperize(module, targets="0.weight_hh_l0").tiling.names == ("0.weight_hh_l0",)


def test_a_module_without_values_is_refused_where_they_are_needed(generator: Generator) -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with pytest.raises(ValueError, match="module: it is on the meta device, without values for 0.weight, 0.bias"):
        hf.hyperize(module, targets="1.weight")
    everything = hf.hyperize(copy.deepcopy(module), targets="*")
    assert everything.init(generator)[0].primary == {}
