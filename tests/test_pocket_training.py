"""The training loop of the pocket checkpoint: it resumes exactly, and an interruption leaves a checkpoint that
loads."""

import os
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from tools.pocket import training
from tools.pocket.training import Ahead, Batches, train


def options(folder, steps):
    return Namespace(
        work_dir=folder, max_train_steps=steps, learning_rate=1e-2, lr_warmup_steps=2, checkpointing_steps=2,
        sample_steps=1000, ema_decay=0.9, seed=0, minutes=None,
    )  # fmt: skip


def run(folder, stop_at=None, steps=6):
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 3)
    seen = 0

    def loss_fn(generator):
        nonlocal seen
        if seen == stop_at:
            raise KeyboardInterrupt
        seen += 1
        return (model(torch.randn(4, 3, generator=generator)) ** 2).mean(), {}

    train("test", options(folder, steps), {"model": model}, loss_fn)
    return model.weight.detach().clone()


def test_a_resumed_run_has_the_same_result_as_an_uninterrupted_run(tmp_path):
    (tmp_path / "uncut").mkdir()
    (tmp_path / "cut").mkdir()
    uncut = run(tmp_path / "uncut")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=5)
    assert torch.equal(run(tmp_path / "cut"), uncut)
    assert not list(tmp_path.rglob("*.part"))


def test_the_time_limit_includes_the_time_before_a_resume(tmp_path, monkeypatch):
    """Each step takes 15 seconds of the fake clock, so there are four steps in a minute, however often the run is
    resumed."""
    now = [0.0]
    monkeypatch.setattr(training.time, "time", lambda: now[0])
    model = torch.nn.Linear(3, 3)
    steps = []

    def loss_fn(generator):
        if len(steps) == 2 and now[0] < 100:
            now[0] = 1000.0
            raise KeyboardInterrupt
        steps.append(generator.initial_seed())
        now[0] += 15.0
        return model(torch.ones(1, 3)).square().mean(), {}

    args = options(tmp_path, 1000)
    args.minutes = 1.0
    with pytest.raises(KeyboardInterrupt):
        train("test", args, {"model": model}, loss_fn)
    train("test", args, {"model": model}, loss_fn)
    assert steps == [0, 1, 2, 3]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_that_are_prepared_ahead_are_the_same(num_workers):
    ahead = Ahead(lambda number: np.random.default_rng(number).random(3), num_workers)
    for number in (4, 5, 5, 6, 9, 10):
        assert np.array_equal(ahead(number), np.random.default_rng(number).random(3))


def drawn_batches(uses: int, numbers) -> dict[int, list[int]]:
    """Returns the samples of each step. The samples of a part are consecutive numbers."""
    args = Namespace(train_batch_size=4, uses=uses, num_workers=0)
    batches = Batches(lambda number: torch.arange(4 * number, 4 * number + 4), args, lambda samples: (samples,))
    return {number: batches(torch.Generator().manual_seed(number))[0].tolist() for number in numbers}


def test_every_step_has_a_new_batch_by_default():
    assert drawn_batches(1, range(3)) == {0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [8, 9, 10, 11]}


def test_samples_are_used_several_times():
    drawn = drawn_batches(5, range(400))
    counts = np.bincount([sample for batch in drawn.values() for sample in batch])
    assert counts[40:240].mean() == pytest.approx(5, abs=0.3)
    # a batch has different samples, of the last five parts
    assert all(len(set(batch)) == 4 and max(batch) < 4 * (n // 5 + 1) for n, batch in drawn.items())
    assert all(min(batch) >= 4 * (n // 5 - 4) for n, batch in drawn.items())


def test_the_batches_after_an_interruption_are_the_same():
    drawn = drawn_batches(5, range(60))
    assert drawn_batches(5, range(37, 60)) == {n: batch for n, batch in drawn.items() if n >= 37}


WORKER = """
import sys
from argparse import Namespace
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from tools.pocket.training import train
torch.manual_seed(1)
model = torch.nn.Linear(3, 3)
folder = Path(sys.argv[2])
args = Namespace(**OPTIONS, work_dir=folder)
try:
    train("test", args, {"m": model}, lambda g: ((model(torch.randn(4, 3, generator=g)) ** 2).mean(), {}))
except SystemExit:
    torch.save(model.state_dict(), folder / "other.pt")
"""


def test_two_processes_average_their_weights(tmp_path):
    """Each process has its own batches, both end with the same weights, and only one process writes files."""
    settings = vars(options(tmp_path, 25))
    settings.pop("work_dir")
    (tmp_path / "worker.py").write_text(WORKER.replace("OPTIONS", repr(settings)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "worker.py"), str(ROOT), str(tmp_path)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first = torch.load(tmp_path / "test.pt", weights_only=True)
    other = torch.load(tmp_path / "other.pt", weights_only=True)
    assert first["step"] == 25
    for name, tensor in first["modules"]["m"].items():
        assert torch.equal(tensor, other[name])
    alone = tmp_path / "alone"
    alone.mkdir()
    assert not torch.allclose(run(alone, steps=25), other["weight"])


@pytest.mark.parametrize("continued", [False, True])
def test_train_ssr_accepts_the_options_of_the_training_of_adapters(monkeypatch, tmp_path, continued):
    from training_options import parse_args

    from tools.pocket.train import adapters

    given = []
    monkeypatch.setattr(adapters.train_ssr, "main", lambda options, build, samples: given.append(options))
    methods = ["ssr"] if continued else list(adapters.METHODS)
    more = ["--continued"] if continued else []
    monkeypatch.setattr("sys.argv", ["adapters", "--work_dir", str(tmp_path), "--methods", *methods, *more])
    monkeypatch.setattr(adapters.torch, "set_num_threads", lambda count: None)
    adapters.main()
    parsed = [parse_args("", options) for options in given]
    assert len(parsed) == len(methods) and {args.use_ema for args in parsed} == {True}
    assert (parsed[0].ssr_encoder_name_or_path is not None) == continued
