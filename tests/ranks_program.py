"""What the tests run on every rank: python ranks_program.py FILE; rank 0 leaves in FILE what the ranks found."""

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hyperfunc as hf
from hyperfunc import data, distributed, optim, sync_norm, training, tree
from hyperfunc.distributed import Alone, RankLost, Ranks

STEPS = {2: 50, 3: 12}
"""By the number of ranks: three share two cores, where every collective waits for all of them to get a turn."""

EVALUATED = (1, 2, 5, 8)
"""Sizes of test sets: fewer pictures than ranks, and numbers that they do not divide."""

WEIGHT_DECAY = 1e-3

PICTURES = data.Images(
    torch.randint(256, (29, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)),
    torch.arange(29) % 10,
)


class Found(NamedTuple):
    """What comes of the training."""

    state: training.TrainState
    losses: list[float]
    correct: list[int]


def a_model(ranks: Ranks, *, sync: bool) -> hf.Model:
    model = hf.hyper_resnet(10)
    return sync_norm.synchronize(model) if sync and ranks.world > 1 else model


def a_load(ranks: Ranks) -> Callable[[data.Draw], tuple[Tensor, Tensor]]:
    load = data.make_train_load(PICTURES, tree.to(data.measure(PICTURES), torch.float64))
    return lambda draw: load(ranks.part(draw))


def a_state(model: hf.Model, optimizer: optim.Optimizer) -> training.TrainState:
    state = training.init_state(model, optimizer, data.seeded_generator("ranks"))
    return tree.to(state, torch.float64)._replace(step=state.step)


def train_steps(ranks: Ranks, steps: int) -> Found:
    """Steps in float64 with batches of 12, each third of 5 pictures, and so slow that nothing is chaotic."""
    model = a_model(ranks, sync=True)
    optimizer = optim.sgd(optim.constant(0.003), weight_decay=1e-4)
    state = a_state(model, optimizer)
    step = training.make_train_step(
        model, optimizer, load=a_load(ranks), reduce=ranks.reduce, decay="generated", weight_decay=WEIGHT_DECAY
    )
    draws = [batch for epoch in range(steps) for batch in data.batches(data.draw_epoch(0, epoch, 29), 12)]
    losses: list[float] = []
    correct: list[int] = []
    for draw in draws[:steps]:
        state, metrics = step(state, draw)
        assert int(metrics.total) == len(draw.picture)
        losses.append(float(metrics.loss))
        correct.append(int(metrics.correct))
    return Found(state, losses, correct)


def gradients_of(ranks: Ranks, draw: data.Draw) -> hf.Params:
    """Under batch norms of each rank's own."""
    model = a_model(ranks, sync=False)
    gradients = training.make_gradients(
        model, load=a_load(ranks), reduce=ranks.reduce, decay="generated", weight_decay=WEIGHT_DECAY
    )
    return gradients(a_state(model, optim.sgd(optim.constant(0.1))), draw)


def statistics_of(ranks: Ranks, draw: data.Draw) -> hf.BatchStats:
    """Running statistics after a step under batch norms of each rank's own."""
    model, optimizer = a_model(ranks, sync=False), optim.sgd(optim.constant(0.1))
    step = training.make_train_step(model, optimizer, load=a_load(ranks), reduce=ranks.reduce)
    return step(a_state(model, optimizer), draw)[0].batch_stats


def evaluations(ranks: Ranks) -> list[list[float]]:
    model = a_model(ranks, sync=False)
    params, batch_stats = tree.to(model.init(data.seeded_generator("ranks")), torch.float64)
    load = data.make_eval_load(tree.to(data.measure(PICTURES), torch.float64))
    eval_step = training.make_eval_step(model, load=load)
    found: list[list[float]] = []
    for count in EVALUATED:
        images = data.Images(*(column[:count] for column in PICTURES))
        batches = map(ranks.part, data.batches(images, 4))
        metrics = ranks.sum(training.evaluate(model, params, batch_stats, batches, eval_step=eval_step))
        found.append([float(value) for value in metrics])
    return found


def reduction(ranks: Ranks) -> Any:
    """Of made-up values: rank 1 has no picture, and nothing that is a number."""
    count = [3, 0, 2][ranks.rank]
    value = [1.0, float("nan"), 5.0][ranks.rank]
    gradients = {"a": torch.full((2, 2), value), "b": torch.full((1,), 2 * value)}
    averages = {"mean": torch.full((2,), 10 * value), "batches": torch.tensor(7)}
    correct = 0 if count == 0 else ranks.rank
    metrics = training.Metrics(torch.tensor(value), torch.tensor(correct), torch.tensor(count))
    assert ranks.reduce is not None
    return ranks.reduce(count, gradients, averages, metrics)


def differences(ranks: Ranks) -> list[str]:
    """What is said of ranks that are alike, that differ in a leaf, and that differ in a note."""
    said: list[str] = []
    for case in range(3):
        state = {"w": torch.zeros(3), "v": torch.ones(2)}
        if case == 1 and ranks.rank == 1:
            state["v"] = state["v"].nextafter(torch.tensor(2.0))
        try:
            ranks.compare(state, {"--lr": 0.1 if case == 2 and ranks.rank == 0 else 0.2})
            said.append("")
        except RankLost as error:
            said.append(str(error))
    return said


def agreement(ranks: Ranks) -> list[tuple[int, int]]:
    """The places at which something was done, and what: rank 1 wishes one thing, and later rank 0 another."""
    done: list[tuple[int, int]] = []
    place = 0
    while len(done) < 2:
        place += 1
        wish = {0: 20, 1: 10}.get(ranks.rank) if len(done) == 1 - ranks.rank else None
        if (order := ranks.agree(wish)) is not None:
            done.append((place, order))
        # As different in pace as ranks without a common collective may be.
        time.sleep(0.002 * (1 + ranks.rank))
    return done


def main() -> None:
    torch.set_num_threads(1)
    with distributed.joined(torch.device("cpu"), 30, lambda: None, print) as ranks:
        found: dict[str, Any] = {"training": tuple(train_steps(ranks, STEPS[ranks.world]))}
        draw = next(data.batches(data.draw_epoch(0, 0, 29), 7))
        found["gradients"] = gradients_of(ranks, draw)
        found["statistics"] = statistics_of(ranks, draw)
        found["evaluations"] = evaluations(ranks)
        found["differences"] = differences(ranks)
        found["flags"] = [ranks.tell(ranks.rank == 0), ranks.tell(ranks.rank == 1)]
        time.sleep(0.3 * ranks.rank)
        found["gathered"] = ranks.gather(f"of {ranks.rank}")
        own = agreement(ranks)
        ranks.compare({}, {"what was agreed": own})
        found["agreement"] = own
        found["reduction"] = reduction(ranks)
        found["mean"] = ranks.mean({"mean": torch.full((2,), 10.0 * ranks.rank), "batches": torch.tensor(7)})
        if ranks.rank == 0:
            torch.save(found, sys.argv[1])


ALONE = Alone()

if __name__ == "__main__":
    main()
