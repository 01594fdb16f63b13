import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import of_jvp, unchecked
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

import hyperfunc as hf
from hyperfunc import ensembles, optim, training, tree
from hyperfunc.randomness import Seed, Seeded, _state, drawing_layers, fold_in


def model_with_dropout() -> hf.Model:
    """Dropout on features, on attention weights and, in place, at the end."""
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.3, batch_first=True)
    return hf.hyperize(
        nn.Sequential(nn.Linear(8, 16), encoder, nn.Linear(16, 3), nn.Dropout(0.2, inplace=True)), z_dim=8
    )


@pytest.fixture(scope="module")
def problem() -> tuple[hf.Model, hf.Params, hf.BatchStats, Tensor]:
    model = model_with_dropout()
    generator = torch.Generator().manual_seed(0)
    return model, *model.init(generator), torch.randn(4, 5, 8, generator=generator)


Problem = tuple[hf.Model, hf.Params, hf.BatchStats, Tensor]


def output(problem: Problem, seed: int | Tensor, train: bool = True) -> Tensor:
    model, params, batch_stats, x = problem
    return model.apply(params, batch_stats, x, train=train, seed=seed)[0]


def test_dropout_is_a_function_of_the_seed_alone(problem: Problem) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = output(problem, 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(output(problem, 7), first)
    assert torch.equal(output(problem, torch.tensor(7)), first)
    assert not torch.equal(output(problem, 8), first)
    assert not torch.equal(output(problem, 7 + 2**40), first)


def test_evaluation_drops_nothing(problem: Problem) -> None:
    model, params, batch_stats, x = problem
    plain = model.apply(params, batch_stats, x, train=False)[0]
    torch.testing.assert_close(output(problem, 3, train=False), plain, rtol=1e-5, atol=1e-5)
    network = hf.materialize(model, params, batch_stats).eval()
    torch.testing.assert_close(network(x), plain, rtol=1e-5, atol=1e-5)


def test_training_without_a_seed_names_the_layers(problem: Problem) -> None:
    model, params, batch_stats, x = problem
    with pytest.raises(
        ValueError, match=r"random in training, in 1.self_attn \(MultiheadAttention\), 1.dropout \(Dropout"
    ):
        model.apply(params, batch_stats, x, train=True)
    assert drawing_layers(nn.Sequential(nn.Dropout(0), nn.LSTM(2, 2, 2, dropout=0.1), StochasticDepth(0.1, "row"))) == [
        "1 (LSTM)",
        "2 (StochasticDepth)",
    ]
    places = torch.rand(1, 3, 2)
    pooling = nn.FractionalMaxPool2d(2, output_size=2), nn.FractionalMaxPool2d(2, output_size=2, _random_samples=places)
    assert drawing_layers(nn.Sequential(*pooling)) == ["0 (FractionalMaxPool2d)"]


@of_jvp
def test_gradients_are_those_under_the_same_mask(problem: Problem) -> None:
    model, params, x = problem[0], tree.to(problem[1], torch.float64), problem[3].double()

    def loss(embeddings: dict[str, Tensor], seed: int) -> Tensor:
        return model.apply(params._replace(embeddings=embeddings), {}, x, train=True, seed=seed)[0].square().sum()

    z = params.embeddings
    direction = tree.map(torch.ones_like, z)
    gradient = torch.func.grad(loss)(z, 5)["matrix"].sum()
    slope = torch.func.jvp(lambda z: loss(z, 5), (z,), (direction,))[1]
    step = 1e-6
    difference = loss(tree.map(lambda a: a + step, z), 5) - loss(tree.map(lambda a: a - step, z), 5)
    torch.testing.assert_close(gradient, slope)
    torch.testing.assert_close(gradient, difference / (2 * step), rtol=1e-6, atol=1e-6)


def test_under_vmap_seeds_that_are_mapped_differ_and_others_are_shared() -> None:
    model = hf.hyperize(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Dropout(), nn.Linear(16, 4)), z_dim=8)
    params, batch_stats = model.init(torch.Generator().manual_seed(0))
    x = torch.ones(2, 16)

    def run(params: hf.Params, seed: int | Tensor) -> Tensor:
        return model.apply(params, batch_stats, x, train=True, seed=seed)[0]

    mapped = torch.vmap(run, in_dims=(None, 0))(params, torch.arange(3))
    torch.testing.assert_close(mapped, torch.stack([run(params, seed) for seed in range(3)]))
    assert not torch.equal(mapped[0], mapped[1])
    twice = tree.map(lambda leaf: torch.stack([leaf, leaf]), params)
    shared = torch.vmap(lambda params: run(params, 1))(twice)
    torch.testing.assert_close(shared, torch.stack([run(params, 1)] * 2))


@pytest.mark.traced
@pytest.mark.filterwarnings("ignore")
def test_compiled_dropout_equals_eager_and_takes_another_seed_without_compiling_again(problem: Problem) -> None:
    compiled = torch.compile(lambda seed: output(problem, seed), fullgraph=True, backend="aot_eager")
    compiled(torch.tensor(0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2):
            torch.testing.assert_close(compiled(torch.tensor(seed)), output(problem, seed))


@pytest.mark.traced
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("each", "backend"), [(False, "inductor"), (True, "aot_eager")])
def test_compiled_dropout_takes_other_numbers_as_seed(each: bool, backend: str) -> None:
    """By the compiler itself, which would work for minutes on the hash of a number that it knows as a symbol."""
    base = hf.hyperize(
        nn.Sequential(nn.Linear(16, 16), nn.Dropout(), nn.Linear(16, 16), nn.Dropout()), targets=nn.Linear
    )
    model = hf.conditional(base, hf.conditions.table(2))
    params, batch_stats = model.init(torch.Generator().manual_seed(0))
    x = torch.ones(2, 16)
    apply = model.apply_each if each else model.apply
    task = torch.tensor([0, 1]) if each else torch.tensor(1)

    def run(seed: int) -> Tensor:
        return apply(params, batch_stats, task, x, train=True, seed=seed)[0]

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for seed in (3, 4):
        torch.testing.assert_close(compiled(seed), run(seed))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (5, 2**40 + 3, -3):
            torch.testing.assert_close(compiled(seed), run(seed))


@pytest.mark.traced
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_seed_may_have_more_than_64_bits() -> None:
    """Of which 64 count."""
    model = hf.hyperize(nn.Sequential(nn.Linear(16, 16), nn.Dropout()), targets=nn.Linear)
    params, batch_stats = model.init(torch.Generator().manual_seed(0))

    def run(seed: int) -> Tensor:
        return model.apply(params, batch_stats, torch.ones(2, 16), train=True, seed=seed)[0]

    for seed in (2**63 + 5, 2**70 + 1, -(2**65) - 7):
        torch._dynamo.reset()
        assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(seed), run(seed))


def test_masks_are_independent_and_of_the_right_rate() -> None:
    count, draws, p = 4000, 100, 0.3
    with Seeded(0):
        masks = torch.stack([F.dropout(torch.ones(count), p) for _ in range(draws)])
    with Seeded(1):
        other = F.dropout(torch.ones(count), p)
    kept = (masks > 0).double()
    torch.testing.assert_close(masks[kept > 0], torch.full((int(kept.sum()),), 1 / (1 - p)))
    deviation = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 4 * deviation / (count * draws) ** 0.5
    # The rates of the masks spread as those of independent draws do.
    assert kept.mean(1).std().item() == pytest.approx(deviation / count**0.5, rel=0.3)
    # Correlations of draws, of neighbours, and of seeds: at most a few standard deviations of 1/sqrt(count).
    assert torch.corrcoef(kept).triu(1).abs().max() < 5 / count**0.5
    assert abs(torch.corrcoef(torch.stack([kept.flatten()[1:], kept.flatten()[:-1]]))[0, 1]) < 5 / kept.numel() ** 0.5
    assert abs(torch.corrcoef(torch.stack([kept[0], (other > 0).double()]))[0, 1]) < 5 / count**0.5


def test_distributions() -> None:
    count = 100_000
    with Seeded(3):
        uniform, normal, coin = torch.rand(count), torch.randn(count), torch.bernoulli(torch.full((count,), 0.2))
        like = torch.randn_like(torch.ones(2, 3, dtype=torch.float64))
        wide, scaled, flips = torch.empty(count).uniform_(2, 4), torch.empty(count).normal_(1, 3), torch.ones(count)
        flips.bernoulli_(0.7)
        selu = F.alpha_dropout(torch.randn(count), 0.3, training=True)
        feature = F.dropout2d(torch.ones(50, 40, 3, 3), 0.5)
        alone = F.dropout1d(torch.ones(200, 3), 0.5)
    assert (uniform.min() >= 0, uniform.max() < 1) == (True, True)
    assert like.dtype == torch.float64
    moments = [(uniform, 1 / 2, 12**-0.5), (normal, 0, 1), (coin, 0.2, 0.4), (wide, 3, 3**-0.5), (scaled, 1, 3)]
    for sample, mean, std in [*moments, (flips, 0.7, 0.21**0.5), (selu, 0, 1)]:
        assert sample.mean().item() == pytest.approx(mean, abs=5 * std / count**0.5)
        assert sample.std().item() == pytest.approx(std, rel=0.02)
    assert normal.abs().max() < 6
    for channels in (feature.flatten(2).flatten(0, 1), alone):
        assert (channels == channels[:, :1]).all()
        assert 0.35 < (channels > 0).double().mean() < 0.65


def test_attention_with_dropout_is_attention_on_dropped_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 6, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    causal = torch.ones(6, 6).tril().bool()
    for mask, added in (
        (None, torch.zeros(6, 6)),
        (bias, bias),
        (causal, torch.zeros(6, 6).masked_fill(~causal, -torch.inf)),
    ):
        with Seeded(1):
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=0.4)
        with Seeded(1):
            weights = F.dropout((query @ key.mT / 8**0.5 + added).softmax(-1), 0.4)
        torch.testing.assert_close(found, weights @ value)
    with Seeded(1):
        by_flag = F.scaled_dot_product_attention(query, key, value, dropout_p=0.4, is_causal=True)
        fused = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(by_flag, found)
    torch.testing.assert_close(fused, F.scaled_dot_product_attention(query, key, value, is_causal=True))
    with Seeded(1):
        grouped = F.scaled_dot_product_attention(query, key[:, :2], value[:, :2], dropout_p=1e-9, enable_gqa=True)
    torch.testing.assert_close(
        grouped, F.scaled_dot_product_attention(query, key[:, :2], value[:, :2], enable_gqa=True)
    )


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: torch.randint(3, (2,)), "calls torch's randint, which draws from the global generator"),
        (lambda: torch.ones(3).exponential_(), "calls torch's exponential_"),
        (lambda: nn.init.normal_(torch.ones(3)), "calls torch's normal_"),
    ],
)
def test_what_cannot_be_seeded_is_refused(draw: object, message: str) -> None:
    assert callable(draw)
    with Seeded(0), pytest.raises(ValueError, match=message):
        draw()


@pytest.mark.parametrize("seed", [torch.tensor(0.5), torch.tensor([1, 2])])
def test_a_seed_is_one_whole_number(seed: Tensor) -> None:
    with pytest.raises(ValueError, match="expected one whole number"):
        Seeded(seed)


def test_a_generator_is_no_seed() -> None:
    with pytest.raises(ValueError, match="seed: got a Generator, expected an int, or a tensor of one whole number"):
        unchecked(_state)(torch.Generator())


def test_no_generator_may_be_named() -> None:
    draws: list[Callable[..., Tensor]] = [
        lambda **named: torch.rand(3, **named),
        lambda **named: torch.empty(3).uniform_(0, 1, **named),
        lambda **named: torch.empty(3).normal_(**named),
    ]
    for draw in draws:
        with Seeded(5):
            found = draw(generator=None)
        with Seeded(5):
            assert torch.equal(found, draw())


def test_what_torch_refuses_is_refused_under_a_seed() -> None:
    x = torch.ones(1, 2, 3)
    for p in (-0.5, 1.5):
        with Seeded(0), pytest.raises(ValueError, match=f"dropout: got the probability {p}, expected 0 to 1"):
            F.dropout(x, p)
        with Seeded(0), pytest.raises(ValueError, match=f"dropout: got the probability {p}, expected 0 to 1"):
            F.alpha_dropout(x, p, True)
    mask = torch.ones(2, 2, dtype=torch.bool)
    with Seeded(0), pytest.raises(ValueError, match="got attn_mask and is_causal=True, expected one of them"):
        F.scaled_dot_product_attention(x, x, x, mask, dropout_p=0.5, is_causal=True)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("packed", [False, True])
def test_a_recurrent_layer_draws_only_where_it_drops_between_layers(
    kind: Callable[..., nn.RNNBase], packed: bool
) -> None:
    x: Any = torch.ones(2, 3, 4)
    x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True) if packed else x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a dropout that does nothing
        quiet = [kind(4, 4, 1, dropout=0.3, batch_first=True), kind(4, 4, 2, dropout=0.3, batch_first=True).eval()]
    set_to_int = kind(4, 4, 2, dropout=0.3, batch_first=True)
    set_to_int.dropout = 0
    for layer in (*quiet, set_to_int):
        with Seeded(0):
            layer(x)
    assert drawing_layers(quiet[0]) == drawing_layers(set_to_int) == []
    assert drawing_layers(kind(4, 4, 2, dropout=0.3, batch_first=True))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"bidirectional": True, "batch_first": True}),
        (nn.LSTM, {"proj_size": 3, "bias": False}),
        (nn.GRU, {"batch_first": True}),
        (nn.RNN, {"bidirectional": True}),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_layers_are_as_single_ones_with_dropout_between(
    kind: Callable[..., nn.RNNBase], options: dict[str, Any], packed: bool, generator: torch.Generator
) -> None:
    stack = kind(4, 5, 3, dropout=0.5, **options).double()
    directions = 2 if stack.bidirectional else 1
    inner = directions * (options.get("proj_size") or 5)
    singles = [kind(4 if layer == 0 else inner, 5, 1, **options).double() for layer in range(3)]
    for layer, single in enumerate(singles):
        values = {name: getattr(stack, name.replace("l0", f"l{layer}")) for name, _ in single.named_parameters()}
        single.load_state_dict(values)
    x: Any = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    first = options.get("batch_first", False)
    lengths = torch.tensor([6, 4] if first else [2, 2, 2, 1, 1, 1])
    x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=True) if packed else x
    with Seeded(3):
        found, states = stack(x)
    with Seeded(3):
        y, ends = x, []
        for layer, single in enumerate(singles):
            if layer and packed:
                y = y._replace(data=F.dropout(y.data, 0.5))
            elif layer:
                y = F.dropout(y, 0.5)
            y, end = single(y)
            ends.append(end)
    ours, theirs = ((value.data if packed else value) for value in (found, y))
    torch.testing.assert_close(ours, theirs)
    states, ends = (states, zip(*ends, strict=True)) if isinstance(states, tuple) else ([states], [ends])
    for state, end in zip(states, ends, strict=True):
        torch.testing.assert_close(state, torch.cat(list(end)))
    with Seeded(4):
        other, _ = stack(x)
    assert not torch.allclose(other.data if packed else other, ours)


def test_a_recurrent_network_with_dropout_can_be_trained_and_mapped(generator: torch.Generator) -> None:
    model = hf.hyperize(
        nn.GRU(4, 4, 2, dropout=0.5, batch_first=True).double(), targets="weight_*", unit=(4, 4), z_dim=2
    )
    params, batch_stats = model.init(generator)
    x = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)

    def outputs(params: hf.Params, seed: Seed) -> Tensor:
        return model.apply(params, batch_stats, x, train=True, seed=seed)[0][0]

    several = tree.stack([params, model.init(generator)[0]])
    mapped = torch.vmap(outputs)(several, torch.tensor([1, 2]))
    grads = torch.func.grad(lambda p: outputs(p, 1).square().sum())(params)
    assert all(bool(leaf.any()) for leaf in tree.leaves(grads.embeddings))
    by_seed = torch.vmap(outputs, in_dims=(None, 0))(params, torch.tensor([1, 2]))
    for index, seed in enumerate((1, 2)):
        one = tree.map(lambda leaf, index=index: leaf[index], several)
        torch.testing.assert_close(mapped[index], outputs(one, seed))
        torch.testing.assert_close(by_seed[index], outputs(params, seed))


def test_a_batch_norm_behind_a_dropout_has_statistics_for_each_seed(generator: torch.Generator) -> None:
    layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
    model = hf.hyperize(layers, targets="0.weight", unit=(4, 4), z_dim=2)
    params, batch_stats = model.init(generator)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)

    def results(seed: Seed) -> tuple[Tensor, hf.BatchStats]:
        return model.apply(params, batch_stats, x, train=True, seed=seed)

    outputs, stats = torch.vmap(results)(torch.tensor([1, 2]))
    for index, seed in enumerate((1, 2)):
        output, own = results(seed)
        torch.testing.assert_close(outputs[index], output)
        torch.testing.assert_close({name: leaf[index] for name, leaf in stats.items()}, own)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uniform_numbers_stay_below_one_in_any_type(dtype: torch.dtype) -> None:
    with Seeded(0):
        draws = (
            torch.rand(50_000, dtype=dtype),
            torch.empty(50_000, dtype=dtype).uniform_(),
            torch.rand_like(torch.empty(50_000, dtype=dtype)),
        )
    for draw in draws:
        assert draw.dtype == dtype
        assert 0 <= draw.min() <= 0.01
        assert 0.99 <= draw.max() < 1
        assert draw.double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_a_query_that_may_look_at_nothing_gets_zeros_as_from_torch() -> None:
    query, key, value = (torch.randn(2, 4, 6, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool).tril(-1)  # the first query sees nothing

    def attend(query: Tensor) -> Tensor:
        with Seeded(1):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=1e-12)

    torch.testing.assert_close(attend(query), F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
    gradient = torch.func.grad(lambda query: attend(query).square().sum())(query)
    assert gradient.isfinite().all()
    assert gradient[..., 1:, :].any()


class Drawing(nn.Module):
    """Draws in each of the ways that fill a tensor made before."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.distributions.Normal(0.0, 1.0).rsample(x.shape)
        signs = torch.empty(x.shape, dtype=torch.bool).bernoulli_(0.5)
        filled = torch.rand(x.shape, out=torch.empty(x.shape)) + torch.bernoulli(x.sigmoid(), out=torch.zeros_like(x))
        bounded = x.new_empty(x.shape).uniform_(0, to=2) + torch.dropout(x, 0.5, train=self.training)
        return torch.where(signs, x, -x) + noise + filled + bounded + StochasticDepth(0.5, "row")(x)


def test_what_is_filled_with_numbers_of_a_mapped_seed_is_each_members_own() -> None:
    model = hf.hyperize(nn.Sequential(nn.Linear(16, 16), Drawing(), nn.Linear(16, 16)), targets="0.weight", z_dim=4)
    params, batch_stats = model.init(torch.Generator().manual_seed(0))
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))

    def run(seed: Tensor | int) -> Tensor:
        return model.apply(params, batch_stats, x, train=True, seed=seed)[0]

    mapped = torch.vmap(run)(torch.arange(3))
    for seed in range(3):
        torch.testing.assert_close(mapped[seed], run(seed))
    assert not torch.allclose(mapped[0], mapped[1])
    members = hf.ensemble(model, 2)
    step = ensembles.map_step(training.make_train_step(model, optim.adam(0.1), seed=0))
    state = ensembles.init_state(members, optim.adam(0.1), torch.Generator().manual_seed(0))
    assert step(state, (x, torch.arange(5)))[1].loss.isfinite().all()


def test_a_class_that_has_only_the_name_of_a_layer_that_draws_is_taken() -> None:
    class StochasticDepth(nn.Module):
        pass

    assert drawing_layers(nn.Sequential(StochasticDepth())) == []


def test_what_torch_can_be_asked_of_a_draw_is_done() -> None:
    out = torch.zeros(5)
    with Seeded(0):
        assert torch.rand(5, out=out) is out
        assert torch.randn(2, requires_grad=True).requires_grad
    with Seeded(0):
        assert torch.equal(torch.rand(5), out)
    with Seeded(0), pytest.raises(ValueError, match="calls torch's randn for complex64, and only real numbers can be"):
        torch.randn(3, dtype=torch.complex64)


def test_a_generator_of_the_modules_own_is_used() -> None:
    expected = torch.rand(3, generator=torch.Generator().manual_seed(4))
    with Seeded(0):
        assert torch.equal(torch.rand(3, generator=torch.Generator().manual_seed(4)), expected)


def test_fold_in_gives_other_seeds() -> None:
    seeds = {int(fold_in(seed, number)) for seed in range(50) for number in range(50)}
    assert len(seeds) == 2500
    assert int(fold_in(3, torch.tensor(4))) == fold_in(3, 4)


def test_training_steps_drop_anew_each_time_and_the_same_for_the_same_step() -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Dropout(), nn.Linear(16, 4))
    model = hf.hyperize(module, z_dim=8)
    optimizer = optim.sgd(optim.constant(0.0))
    state = training.init_state(model, optimizer, torch.Generator().manual_seed(0))
    step, other = (training.make_train_step(model, optimizer, seed=seed) for seed in (0, 1))
    batch = torch.ones(8, 16), torch.arange(8) % 4
    after, first = step(state, batch)
    assert step(state, batch)[1].loss == first.loss
    assert step(after, batch)[1].loss != first.loss
    assert other(state, batch)[1].loss != first.loss


class Unseen(nn.Module):
    """It draws where only its forward says so."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop_prob = rate

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.drop_prob, self.training)


class DropPath(Unseen):
    """As timm calls it."""


@pytest.mark.parametrize(("layer", "seed"), [(Unseen(0.5), 0), (Unseen(0.5), 7), (DropPath(0.5), None)])
def test_a_seed_that_is_given_holds_whatever_draws(layer: nn.Module, seed: int | None) -> None:
    model = hf.hyperize(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), layer, nn.Linear(16, 4)), z_dim=8)
    optimizer = optim.sgd(optim.constant(0.0))
    state = training.init_state(model, optimizer, torch.Generator().manual_seed(0))
    step = training.make_train_step(model, optimizer, seed=seed)
    batch = torch.ones(8, 16), torch.arange(8) % 4
    before = torch.get_rng_state()
    after, first = step(state, batch)
    assert step(state, batch)[1].loss == first.loss
    assert step(after, batch)[1].loss != first.loss
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_that_draw_by_a_known_name_are_found() -> None:
    assert drawing_layers(nn.Sequential(DropPath(0.1), DropPath(0.0), Unseen(0.5))) == ["0 (DropPath)"]
    several = DropPath(0.1)
    several.drop_prob = [0.1, 0.2]  # pyright: ignore[reportAttributeAccessIssue]
    assert drawing_layers(several) == []


@pytest.mark.parametrize("indices", [False, True])
@pytest.mark.parametrize("axes", [2, 3])
def test_fractional_pooling_is_a_function_of_the_seed(axes: int, indices: bool) -> None:
    layer = (nn.FractionalMaxPool2d if axes == 2 else nn.FractionalMaxPool3d)(2, output_ratio=0.6)
    layer.return_indices = indices
    x = torch.randn(2, 3, *[12] * axes)

    def pooled(x: Tensor, seed: int) -> Tensor:
        with Seeded(seed):
            output = layer(x)
        return output[0] if indices else output

    before = torch.get_rng_state()
    first = pooled(x, 1)
    assert first.shape == (2, 3, *[7] * axes)
    assert torch.equal(pooled(x, 1), first)
    assert not torch.equal(pooled(x, 2), first)
    assert pooled(x[0], 1).shape == first.shape[1:]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "draw", [lambda x: torch.binomial(x, x), lambda x: torch.alpha_dropout(x, 0.5, True), torch.randperm, F.rrelu_]
)
def test_other_random_functions_of_torch_are_refused(draw: Callable[[Any], Any]) -> None:
    with Seeded(0), pytest.raises(ValueError, match=r"seed: the module calls torch's .*, which draws from the global"):
        draw(3 if draw is torch.randperm else torch.ones(2))
