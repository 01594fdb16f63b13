import math
from collections.abc import Callable
from functools import partial
from typing import Any

import oracle
import pytest
import torch
from helpers import unchecked
from torch import Generator, Tensor, nn
from torch.func import grad
from torch.nn import functional as F

import hyperfunc as hf
from hyperfunc import conditions, tree
from hyperfunc.conditions import Conditional, ConditionalParams, Encoder


def in_float64(model: Conditional, generator: Generator) -> tuple[ConditionalParams, hf.BatchStats]:
    """Parameters and statistics in float64, all of them drawn, so that no zero hides a mistake."""

    def perturb(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return leaf
        return leaf.double() + 0.1 * torch.randn(leaf.shape, generator=generator, dtype=torch.float64).abs()

    return tree.map(perturb, model.init(generator))


def batch(generator: Generator, count: int = 5) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)


def an_encoder() -> hf.Encoder:
    return conditions.from_module(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double(), code_dim=3)


def image_encoder() -> hf.Encoder:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return conditions.from_module(layers.double(), code_dim=2)


def a_vector(generator: Generator) -> Tensor:
    return torch.rand(5, 2, generator=generator, dtype=torch.float64)


CASES: dict[str, tuple[hf.Encoder, Any]] = {
    "task": (conditions.table(3), lambda _generator: torch.tensor([0, 2, 1, 1, 0])),
    "vector": (conditions.bounded([0, -1], [1, 2]), a_vector),
    "module": (an_encoder(), a_vector),
    "input": (image_encoder(), batch),
    "function": (hf.Encoder(lambda _g: {"w": torch.ones(2)}, lambda p, c: (c * p["w"]).tanh(), 2), a_vector),
}


def weights_by_hand(model: Conditional, params: ConditionalParams, conditions: Tensor, index: int) -> dict[str, Tensor]:
    """The weights of one condition, from the definition: the code at length 1 mixes tables of embeddings."""
    code = model.encoder.apply(params.encoder, conditions)[index]
    code = code / code.norm()
    mixed = sum(number * table for number, table in zip(code, params.model.embeddings["3x3"], strict=True))
    return params.model.primary | oracle.resnet_kernels(params.model._replace(embeddings={"3x3": mixed}), 10, 1)


@pytest.mark.parametrize("case", CASES)
def test_one_call_serves_a_batch_of_conditions_as_a_loop_over_samples_does(case: str, generator: Generator) -> None:
    encoder, draw = CASES[case]
    model = hf.conditional(hf.hyper_resnet(10, z_dim=4), encoder)
    params, batch_stats = in_float64(model, generator)
    given, images = draw(generator), batch(generator)
    together, stats = model.apply_each(params, batch_stats, given, images, train=False)
    kernels = torch.vmap(model.kernels, in_dims=(None, 0))(params, given)
    for index, image in enumerate(images):
        weights = weights_by_hand(model, params, given, index)
        for name in model.model.tiling.names:
            torch.testing.assert_close(kernels[name][index], weights[name], rtol=oracle.EXACT, atol=oracle.EXACT)
        logits = oracle.resnet_logits(weights, image[None], 10, batch_stats)[0]
        torch.testing.assert_close(together[index], logits, rtol=oracle.EXACT, atol=oracle.EXACT)
        alone, _ = model.apply(params, batch_stats, given[index], image[None], train=False)
        torch.testing.assert_close(alone[0], logits, rtol=oracle.EXACT, atol=oracle.EXACT)
    for name, value in stats.items():
        assert torch.equal(value, batch_stats[name]), name


def test_the_gradient_of_one_call_is_that_of_the_loop(generator: Generator) -> None:
    model = hf.conditional(hf.hyper_resnet(10, z_dim=4), an_encoder())
    params, batch_stats = in_float64(model, generator)
    given, images = a_vector(generator), batch(generator)

    def together(params: ConditionalParams) -> Tensor:
        return model.apply_each(params, batch_stats, given, images, train=False)[0].square().sum()

    def looped(params: ConditionalParams) -> Tensor:
        each = [
            model.apply(params, batch_stats, c, x[None], train=False)[0] for c, x in zip(given, images, strict=True)
        ]
        return torch.cat(each).square().sum()

    ours, theirs = tree.named_leaves(grad(together)(params)), tree.named_leaves(grad(looped)(params))
    assert any(path.startswith("encoder/") for path in ours)
    for path, leaf in ours.items():
        torch.testing.assert_close(leaf, theirs[path], rtol=1e-9, atol=1e-9, msg=path)


def test_batch_norm_in_training_takes_its_statistics_over_all_samples(generator: Generator) -> None:
    """By hand, for a network of two layers: each sample through its own kernel, then one normalisation of them all."""
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=0.3), nn.Flatten(), nn.Linear(144, 2)]
    module = nn.Sequential(*layers).double()
    model = hf.conditional(hf.hyperize(module, targets=["0.weight"], unit=(4, 4), z_dim=4), conditions.table(3))
    params, batch_stats = in_float64(model, generator)
    tasks, images = torch.tensor([0, 2, 1, 1, 0]), batch(generator)
    norm = nn.BatchNorm2d(4, momentum=0.3, affine=False).double()
    norm.load_state_dict({name.removeprefix("1."): value for name, value in batch_stats.items()})

    def by_hand(params: ConditionalParams) -> Tensor:
        kernels = [model.kernels(params, task)["0.weight"] for task in tasks]
        hidden = torch.cat([F.conv2d(x[None], k) for x, k in zip(images, kernels, strict=True)])
        primary = params.model.primary
        mean, variance = hidden.mean((0, 2, 3), keepdim=True), hidden.var((0, 2, 3), keepdim=True, correction=0)
        hidden = (hidden - mean) / (variance + norm.eps).sqrt()
        hidden = hidden * primary["1.weight"].view(-1, 1, 1) + primary["1.bias"].view(-1, 1, 1)
        return F.linear(hidden.flatten(1), primary["3.weight"], primary["3.bias"])

    outputs, moved = model.apply_each(params, batch_stats, tasks, images, train=True)
    torch.testing.assert_close(outputs, by_hand(params), rtol=oracle.EXACT, atol=oracle.EXACT)
    kernels = [model.kernels(params, task)["0.weight"] for task in tasks]
    norm(torch.cat([F.conv2d(x[None], k) for x, k in zip(images, kernels, strict=True)]))
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(moved[f"1.{name}"], value, rtol=oracle.EXACT, atol=oracle.EXACT, check_dtype=False)

    ours = grad(lambda p: model.apply_each(p, batch_stats, tasks, images, train=True)[0].pow(3).sum())(params)
    theirs = grad(lambda p: by_hand(p).pow(3).sum())(params)
    for path, leaf in tree.named_leaves(ours).items():
        torch.testing.assert_close(leaf, tree.named_leaves(theirs)[path], rtol=1e-8, atol=1e-8, msg=path)


class LowNorm(nn.Module):
    """A batch norm of activations in 16 bits, which are far from zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm((self.layers(x) + 50).bfloat16())


def test_statistics_over_samples_are_not_summed_in_16_bits(generator: Generator) -> None:
    model = hf.conditional(hf.hyperize(LowNorm(), z_dim=4), hf.conditions.table(2))
    params, batch_stats = model.init(generator)
    images = torch.randn(6, 3, 8, 8, generator=generator)
    ours, new = model.apply_each(params, batch_stats, torch.zeros(6, dtype=torch.int64), images, train=True)
    theirs, expected = model.apply(params, batch_stats, torch.tensor(0), images, train=True)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    torch.testing.assert_close(new, expected, rtol=1e-3, atol=1e-3)


def test_equal_conditions_train_as_one_condition(generator: Generator) -> None:
    model = hf.conditional(hf.hyper_resnet(10, z_dim=4), conditions.bounded([0], [1]))
    params, batch_stats = in_float64(model, generator)
    images = batch(generator)
    same = torch.full((5, 1), 0.3, dtype=torch.float64)
    ours = model.apply_each(params, batch_stats, same, images, train=True)
    theirs = model.apply(params, batch_stats, same[0], images, train=True)
    for leaf, other in zip(tree.leaves(ours), tree.leaves(theirs), strict=True):
        torch.testing.assert_close(leaf, other, rtol=oracle.EXACT, atol=oracle.EXACT)
    with pytest.raises(ValueError, match="conditions: got 1, with one value per channel in a batch norm"):
        model.apply_each(params, batch_stats, same[:1], images[:1, :, :1, :1].contiguous(), train=True)


@pytest.mark.traced
@pytest.mark.parametrize("train", [True, False])
def test_one_call_compiles_as_one_graph(train: bool, generator: Generator) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    model = hf.conditional(hf.hyperize(module, targets=["0.weight"], unit=(4, 4), z_dim=4), conditions.table(3))
    params, batch_stats = in_float64(model, generator)
    tasks, images = torch.tensor([0, 2, 1, 1, 0]), batch(generator)

    def gradient(params: ConditionalParams, images: Tensor) -> ConditionalParams:
        return grad(lambda p: model.apply_each(p, batch_stats, tasks, images, train=train)[0].square().sum())(params)

    ours = torch.compile(gradient, fullgraph=True, backend="aot_eager")(params, images)
    for leaf, other in zip(tree.leaves(ours), tree.leaves(gradient(params, images)), strict=True):
        torch.testing.assert_close(leaf, other, rtol=oracle.EXACT, atol=oracle.EXACT)


def test_dropout_draws_for_each_sample(generator: Generator) -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5))
    model = hf.conditional(hf.hyperize(module, targets=["0.weight"], z_dim=4), conditions.table(2))
    params, batch_stats = model.init(generator)
    x = torch.randn(1, 16, generator=generator).expand(8, -1)
    tasks = torch.zeros(8, dtype=torch.int64)
    first, again, other = (
        model.apply_each(params, batch_stats, tasks, x, train=True, seed=seed)[0] for seed in (1, 1, 2)
    )
    assert len({tuple((row == 0).tolist()) for row in first}) == 8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("case", CASES)
def test_every_kernel_starts_at_its_layers_scale_whatever_the_condition(case: str, generator: Generator) -> None:
    encoder, draw = CASES[case]
    model = hf.conditional(hf.hyper_resnet(22, 2), encoder)
    params, _ = model.init(generator)
    params = tree.to(params, torch.float64)
    for condition in draw(generator)[:3]:
        for name, kernel in model.kernels(params, condition).items():
            # Two draws of embeddings are orthogonal on the average only; of 4 units it is within an eighth or so.
            assert kernel.std().item() == pytest.approx(math.sqrt(2 / math.prod(kernel.shape[1:])), rel=0.13), name


def kernel_norm(kernels: dict[str, Tensor]) -> float:
    return torch.cat([kernel.flatten() for kernel in kernels.values()]).norm().item()


def test_the_magnitude_of_a_condition_does_not_scale_the_weights(generator: Generator) -> None:
    base = hf.hyper_resnet(16)
    encoded = hf.conditional(base, conditions.bounded([0], [1]))
    by_module = hf.conditional(base, conditions.from_module(nn.Linear(1, 4, bias=False), 4))
    params, _ = base.init(generator)
    encoded_params, _ = encoded.init(generator)
    module_params, _ = by_module.init(generator)
    naive, ours, module = [], [], []
    for value in torch.tensor([[0.01], [0.1], [1.0]]):
        # What is usual: the number itself goes into what is linear in it.
        scaled = {key: value * z for key, z in params.embeddings.items()}
        naive.append(kernel_norm(base.kernels(params._replace(embeddings=scaled))))
        ours.append(kernel_norm(encoded.kernels(encoded_params, value)))
        module.append(kernel_norm(by_module.kernels(module_params, 100 * value)))
    assert max(naive) / min(naive) == pytest.approx(100, rel=1e-3)
    assert max(ours) / min(ours) < 1.03
    assert max(module) / min(module) == pytest.approx(1, rel=1e-4)


def test_bounded_numbers_are_encoded_at_length_one(generator: Generator) -> None:
    values = 7 * torch.rand(50, 3, generator=generator, dtype=torch.float64) - 2
    code = hf.encode_bounded(values, -2, 5)
    torch.testing.assert_close(code.norm(dim=1), torch.ones(50, dtype=torch.float64))
    ends = hf.encode_bounded(torch.tensor([[-2.0], [5.0]]), -2, 5)
    torch.testing.assert_close(ends, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    again = torch.atan2(code[:, 3:], code[:, :3]) * 2 / math.pi * 7 - 2
    torch.testing.assert_close(again, values)


def test_a_task_has_embeddings_of_its_own(generator: Generator) -> None:
    model = hf.conditional(hf.hyper_resnet(10, z_dim=4), conditions.table(3))
    params, _ = model.init(generator)
    gradient = grad(lambda p: model.kernels(p, torch.tensor(1))["blocks.0.conv1.weight"].square().sum())(params)
    norms = gradient.model.embeddings["3x3"].flatten(1).norm(dim=1)
    assert norms[1] > 0
    assert norms[[0, 2]].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_the_number_of_a_task_may_be_of_any_integer_type(dtype: torch.dtype) -> None:
    codes = conditions.table(3).apply({}, torch.tensor([1, 2, 1], dtype=dtype))
    assert torch.equal(codes, torch.eye(3)[[1, 2, 1]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose graphs are asked for")
def test_encoders_copy_nothing_to_the_device_at_a_call() -> None:
    norm = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
    norm.register_buffer("unused", torch.ones(3))
    for encoder in (conditions.bounded([0, -1], [1, 2]), conditions.from_module(norm, 4)):
        params = encoder.init(Generator("cuda").manual_seed(0))
        given = torch.rand(5, 2, device="cuda")
        expected = encoder.apply(params, given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            codes = encoder.apply(params, given)
        graph.replay()
        torch.testing.assert_close(codes, expected)


def test_one_condition_is_a_model_by_itself(generator: Generator) -> None:
    model = hf.conditional(hf.hyper_resnet(10, z_dim=4), conditions.table(3))
    params, batch_stats = in_float64(model, generator)
    images, task = batch(generator), torch.tensor(2)
    network = hf.materialize(model.model, model.at(params, task), batch_stats).eval()
    logits, _ = model.apply(params, batch_stats, task, images, train=False)
    torch.testing.assert_close(network(images), logits, rtol=oracle.EXACT, atol=oracle.EXACT)


def test_init_is_a_function_of_the_generator_alone() -> None:
    model = hf.conditional(hf.hyper_resnet(10, z_dim=4), an_encoder())
    first, second = (tree.named_leaves(model.init(Generator().manual_seed(5))) for _ in range(2))
    assert all(torch.equal(leaf, second[path]) for path, leaf in first.items())
    tables = first["0/model/embeddings/3x3"]
    assert not torch.equal(tables[0], tables[1])


def test_wrong_conditions(generator: Generator) -> None:
    base = hf.hyper_resnet(10, z_dim=4)
    images = torch.randn(4, 3, 8, 8, generator=generator)

    def calling(encoder: hf.Encoder, given: Tensor) -> None:
        model = hf.conditional(base, encoder)
        model.apply_each(*model.init(generator), given, images, train=False)

    with pytest.raises(ValueError, match=r"got task \[0, 1, 2, 3\], expected 0 to 2"):
        calling(conditions.table(3), torch.arange(4))
    tasks = conditions.table(3)
    with pytest.raises(ValueError, match=r"got float32\[2\], expected the number of a task"):
        calling(tasks._replace(apply=unchecked(tasks.apply)), torch.rand(4, 2))
    with pytest.raises(ValueError, match=r"got bool\[\], expected the number of a task"):
        calling(tasks._replace(apply=unchecked(tasks.apply)), torch.rand(4) < 0.5)
    with pytest.raises(ValueError, match=r"\(Linear\) cannot take 4 conditions, each float32\[3\]: .*4x3 and 2x5"):
        calling(conditions.from_module(nn.Linear(2, 5), 5), torch.rand(4, 3))
    with pytest.raises(ValueError, match=r"\(Linear\) cannot take 4 conditions, each int64\[2\]: .*dtype"):
        calling(conditions.from_module(nn.Linear(2, 5), 5), torch.ones(4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"condition: got the shape \(3,\), expected \(2,\)"):
        calling(conditions.bounded([0, 0], [1, 1]), torch.rand(4, 3))
    with pytest.raises(ValueError, match=r"got codes of shape \(4, 3\), expected \(4, 5\); set code_dim"):
        calling(conditions.from_module(nn.Linear(2, 3), code_dim=5), torch.rand(4, 2))
    with pytest.raises(
        ValueError, match=r"conditions: got 3 for an input of shape \(4, 3, 8, 8\), expected one for each"
    ):
        calling(conditions.table(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="conditions: got a single number"):
        calling(conditions.table(3), torch.tensor(0))
    model = hf.conditional(base, tasks)
    each = partial(unchecked(model.apply_each), *model.init(generator), torch.tensor([0, 1, 2, 0]), train=False)
    with pytest.raises(
        ValueError, match=r"images: got float32\[4, 3, 8, 8\] by keyword for 4 conditions; .* by position"
    ):
        each(images=images)
    assert each(images=images[:3])[0].shape == (4, 3, 10)  # all three by the network of each condition
    for given, place in (((images, None), "1"), (((images, None),), "0/1")):
        with pytest.raises(ValueError, match=f"args: got a NoneType at {place}, expected tensors .*; give by keyword"):
            each(*given)


@pytest.mark.parametrize(
    ("encoder", "given", "message"),
    [
        (conditions.table(3), 1, "got 1, expected a tensor; make it one with torch.tensor"),
        (conditions.table(3), torch.tensor(3), r"got task \[3\], expected 0 to 2"),
        (conditions.table(3), torch.zeros(1, dtype=torch.int64), r"got int64\[1\], expected the number of a task"),
        (conditions.bounded([0], [1]), torch.rand(2), r"got the shape \(2,\), expected \(1,\)"),
        (
            Encoder(lambda _: {}, lambda _, given: given, 1),
            torch.ones(1) * 1j,
            "got complex64 codes, expected real ones",
        ),
        (
            Encoder(lambda _: {}, lambda _, given: nn.functional.one_hot(given, 3), 3),
            torch.tensor(1),
            "got int64 codes, expected real ones; convert them by .float()",
        ),
        (conditions.from_module(nn.Linear(2, 5), 5), torch.rand(3), r"cannot take 1 conditions, each float32\[3\]"),
        (conditions.from_module(nn.Linear(2, 3), 5), torch.rand(2), r"got codes of shape \(1, 3\), expected \(1, 5\)"),
    ],
)
def test_one_wrong_condition(encoder: hf.Encoder, given: Any, message: str, generator: Generator) -> None:
    model = hf.conditional(hf.hyper_resnet(10, z_dim=4), encoder._replace(apply=unchecked(encoder.apply)))
    params, batch_stats = model.init(generator)
    message = f"^(condition|encoder): .*{message}"
    with pytest.raises(ValueError, match=message):
        unchecked(model.at)(params, given)
    if isinstance(given, Tensor):
        with pytest.raises(ValueError, match=message):
            model.apply(params, batch_stats, given, torch.zeros(1, 3, 8, 8), train=False)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Linear(2, 4), nn.LazyLinear(3)), r"module: 1 \(LazyLinear\) is lazily initialised"),
        (nn.Linear(2, 3, dtype=torch.complex64), "module: its parameter weight is complex64"),
        (
            nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3, device="meta")),
            "one device, but 0.weight is on cpu, 1.weight",
        ),
        (nn.Linear(2, 3, device="meta"), "module: it is on the meta device, without values for weight, bias"),
        (torch.tanh, "module: got an object of type builtin_function_or_method, expected an instance of torch.nn.Modu"),
    ],
)
def test_modules_that_cannot_encode_are_named(module: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unchecked(conditions.from_module)(module, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_code_of_zeros_leaves_the_generators_biases(dtype: torch.dtype, generator: Generator) -> None:
    base = hf.hyperize(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), targets="*.weight", unit=(4, 4), z_dim=2)
    model = hf.conditional(base, hf.Encoder(lambda _generator: {}, lambda _params, codes: codes, 3))
    params, _ = tree.to(model.init(generator), dtype)
    kernels = model.kernels(params, torch.zeros(3, dtype=dtype))
    assert all(bool((kernel == 0).all()) for kernel in kernels.values())  # as fresh biases are


def test_each_sample_may_have_one_number_as_output(generator: Generator) -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.linear(x)
            return y, y.mean()

    base = hf.hyperize(Mean(), targets="linear.weight", unit=(4, 4), z_dim=2)
    model = hf.conditional(base, conditions.table(3))
    params, batch_stats = model.init(generator)
    tasks, x = torch.tensor([0, 2, 1, 2]), torch.randn(4, 4, generator=generator)
    (outputs, means), _ = model.apply_each(params, batch_stats, tasks, x, train=False)
    assert (outputs.shape, means.shape) == ((4, 4), (4,))
    for index, task in enumerate(tasks):
        (_, mean), _ = model.apply(params, batch_stats, task, x[index : index + 1], train=False)
        torch.testing.assert_close(means[index], mean)


def test_an_input_for_all_goes_whole_through_the_network_of_each(generator: Generator) -> None:
    base = hf.hyperize(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)), targets="0.weight", unit=(4, 2))
    model = hf.conditional(base, conditions.table(3))
    params, batch_stats = model.init(generator)
    tasks, x = torch.tensor([0, 2, 1, 2]), torch.randn(9, 2, generator=generator)
    outputs, _ = model.apply_each(params, batch_stats, tasks, input=x, train=False)
    expected = [model.apply(params, batch_stats, task, x, train=False)[0] for task in tasks]
    torch.testing.assert_close(outputs, torch.stack(expected))


def test_a_module_whose_samples_are_elsewhere_is_refused(generator: Generator) -> None:
    layer = nn.TransformerEncoderLayer(4, 1, 4, dropout=0)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    x = torch.zeros(2, 5, 4)
    for module, target in (
        (nn.GRU(4, 4), "*_ih_l0"),
        (nn.GRU(4, 4, batch_first=True), "*_ih_l0"),  # but not its last state
        (layer, "linear1.weight"),
        (encoder, "*.linear1.weight"),
    ):
        model = hf.conditional(hf.hyperize(module, targets=target, unit=(4, 2)), conditions.table(3))
        params, batch_stats = model.init(generator)
        with pytest.raises(ValueError, match=r"apply_each: \w+ takes or gives its samples in the second dimension"):
            model.apply_each(params, batch_stats, torch.tensor([0, 1]), x, train=False)
    outputs, _ = model.apply_each(params, batch_stats, torch.tensor([0, 1, 2]), src=x, train=False)
    assert outputs.shape == (3, 2, 5, 4)  # one input for all, as the module has it


def test_an_encoder_that_returns_no_tensor_is_named(generator: Generator) -> None:
    model = hf.conditional(hf.hyper_resnet(10, z_dim=4), conditions.from_module(nn.GRU(2, 3, batch_first=True), 3))
    params, _ = model.init(generator)
    with pytest.raises(ValueError, match="encoder: got a tuple, expected a tensor of codes; around a recurrent layer"):
        model.at(params, torch.zeros(5, 2))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="encoder: got Linear, expected an Encoder; conditions.from_module makes one"):
        unchecked(hf.conditional)(hf.hyper_resnet(10), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model: got Conditional, expected a Model"):
        unchecked(hf.conditional)(hf.conditional(hf.hyper_resnet(10), conditions.table(2)), conditions.table(2))
    with pytest.raises(ValueError, match="model: it generates none of its weights"):
        hf.conditional(hf.resnet(10), conditions.table(2))
    with pytest.raises(ValueError, match="code_dim: got 0, expected at least 1"):
        hf.conditional(hf.hyper_resnet(10), conditions.from_module(nn.Linear(2, 2), 0))
    with pytest.raises(ValueError, match="count: got 0"):
        conditions.table(0)
    with pytest.raises(ValueError, match="count: got 2.5, expected at least 1, as a whole number"):
        unchecked(conditions.table)(2.5)
    with pytest.raises(
        ValueError, match=r"low: got 0.0, expected a bound for each entry of the vector, such as \[0.0\]"
    ):
        unchecked(conditions.bounded)(0.0, 1.0)
    with pytest.raises(ValueError, match="got 1 and 2 bounds"):
        conditions.bounded([0], [1, 2])
    with pytest.raises(ValueError, match="low, high: got 1 and 1"):
        conditions.bounded([1], [1])
    with pytest.raises(ValueError, match="low, high: got 2 and 1"):
        hf.encode_bounded(torch.rand(2), 2, 1)
    with pytest.raises(ValueError, match=r"values: got the shape \(\)"):
        unchecked(hf.encode_bounded)(torch.tensor(1.0))
    with pytest.raises(ValueError, match="module: 1 is a BatchNorm1d"):
        conditions.from_module(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 2)


@pytest.mark.traced
def test_parameters_of_a_model_without_conditions_are_refused(generator: Generator) -> None:
    """Without the checks of types, which would refuse them before the model can."""
    base = hf.hyper_resnet(10, z_dim=4)
    model: Any = hf.conditional(base, conditions.table(2))
    with pytest.raises(
        ValueError, match="params: got a Params, expected the ConditionalParams of the conditional model"
    ):
        model.apply(*base.init(generator), torch.tensor(0), torch.ones(2, 3, 8, 8), train=False)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM])
def test_a_recurrent_encoder_is_mapped(layer: Callable[..., nn.Module], generator: Generator) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer(3, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0][:, -1]

    model = hf.conditional(hf.hyper_resnet(10, z_dim=4), conditions.from_module(Last(), 8))
    params, _ = model.init(generator)
    sequences = torch.randn(4, 6, 3, generator=generator)
    mapped = torch.vmap(model.kernels, in_dims=(None, 0))(params, sequences)
    for name, kernel in model.kernels(params, sequences[2]).items():
        torch.testing.assert_close(mapped[name][2], kernel)


def test_a_number_out_of_range_that_nobody_can_look_at_has_a_code_of_zeros(generator: Generator) -> None:
    """And not that of another task."""
    tasks = hf.conditional(hf.hyperize(nn.Linear(16, 16), targets="weight", z_dim=4), hf.conditions.table(2))
    params, _ = tasks.init(generator)
    codes = torch.vmap(lambda task: tasks.encoder.apply({}, task.unsqueeze(0))[0])(torch.tensor([-1, 1, 2]))
    assert codes.tolist() == [[0, 0], [0, 1], [0, 0]]
    biases = tasks.at(params, torch.tensor(0))
    nothing = biases._replace(embeddings=tree.map(torch.zeros_like, biases.embeddings))
    found = torch.vmap(tasks.kernels, in_dims=(None, 0))(params, torch.tensor([-1]))["weight"][0]
    torch.testing.assert_close(found, tasks.model.kernels(nothing)["weight"])


def test_under_autocast_a_generated_scale_is_as_fine_as_float32(generator: Generator) -> None:
    model = hf.hyperize(nn.LayerNorm(64), targets="weight", z_dim=4)
    params, _ = model.init(generator)
    params = params._replace(
        embeddings=tree.map(lambda z: z + 3e-4 * torch.randn(z.shape, generator=generator), params.embeddings)
    )
    exact = model.kernels(params)["weight"] - 1
    with torch.autocast("cpu", torch.bfloat16):
        found = model.kernels(params)["weight"] - 1
    assert 0 < exact.abs().max() < 2**-9  # half of what bfloat16 can tell from 1
    assert (found - exact).norm() < 0.02 * exact.norm()


def test_under_autocast_generated_norms_keep_their_type(generator: Generator) -> None:
    layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 3)
    base = hf.hyperize(nn.Sequential(*layers), targets=["1.weight", "1.bias", "2.weight"], z_dim=4)
    model = hf.conditional(base, conditions.table(2))
    params, batch_stats = model.init(generator)
    images = torch.randn(2, 3, 9, 9, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        kernels = model.kernels(params, torch.tensor(1))
        output, _ = model.apply(params, batch_stats, torch.tensor(1), images, train=True)
    assert [kernels[name].dtype for name in ("1.weight", "2.weight")] == [torch.float32, torch.bfloat16]
    assert output.dtype == torch.bfloat16


def test_no_conditions_are_refused(generator: Generator) -> None:
    model = hf.conditional(hf.hyper_resnet(10, z_dim=4), conditions.table(2))
    params, batch_stats = model.init(generator)
    none, images = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, 32, 32)
    with pytest.raises(ValueError, match="conditions: got none, expected one or more"):
        model.apply_each(params, batch_stats, none, images, train=False)
