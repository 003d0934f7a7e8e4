"""What the pocket's training loop promises: it resumes exactly, and an interruption leaves a checkpoint that loads."""

from argparse import Namespace

import pytest
import torch
from training import train


def options(folder, steps):
    return Namespace(
        work_dir=folder, max_train_steps=steps, learning_rate=1e-2, lr_warmup_steps=2, checkpointing_steps=2,
        sample_steps=1000, ema_decay=0.9, seed=0,
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


def test_a_resumed_run_ends_where_an_uncut_one_does(tmp_path):
    (tmp_path / "uncut").mkdir()
    (tmp_path / "cut").mkdir()
    uncut = run(tmp_path / "uncut")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=5)
    assert torch.equal(run(tmp_path / "cut"), uncut)
    assert not list(tmp_path.rglob("*.part"))
