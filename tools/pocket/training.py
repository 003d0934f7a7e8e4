"""Functions shared by the training scripts of the pocket model: options, a resumable training loop with a progress bar
and sample sheets, and batches that are prepared in advance."""

import argparse
import math
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm


SYNC_STEPS = 20


def options(description: str, **defaults) -> argparse.ArgumentParser:
    """Creates the options that all scripts have. Each entry of `defaults` sets the default of one option."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--work_dir", type=Path, default=Path("outputs/pocket-training"), help="for scenes and checkpoints"
    )
    parser.add_argument("--max_train_steps", type=int, default=4000)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_warmup_steps", type=int, default=100)
    parser.add_argument("--checkpointing_steps", type=int, default=250)
    parser.add_argument("--sample_steps", type=int, default=500, help="number of steps between two sample sheets")
    parser.add_argument("--ema_decay", type=float, default=0.998)
    parser.add_argument("--minutes", type=float, help="maximum training time of all runs together, in minutes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that prepare batches in advance")
    parser.add_argument(
        "--uses",
        type=int,
        default=1,
        help="how often each sample is used, because drawing scenes takes longer than a step on a GPU",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(**defaults)
    return parser


class Ahead:
    """Returns `prepare(number)` for consecutive numbers. With workers, other processes prepare the next results in
    advance."""

    def __init__(self, prepare: Callable[[int], object], num_workers: int = 0):
        self.prepare = prepare
        self.num_workers = num_workers
        self.stream = None
        self.last: tuple[int | None, object] = (None, None)

    def __call__(self, number: int):
        if number != self.last[0]:
            self.last = (number, self._next(number))
        return self.last[1]

    def _next(self, number: int):
        if not self.num_workers:
            return self.prepare(number)
        if self.stream is None or number != self.last[0] + 1:
            loader = DataLoader(
                _Prepared(self.prepare), batch_size=None, sampler=range(number, 2**40), num_workers=self.num_workers,
                collate_fn=lambda prepared: prepared, prefetch_factor=4,
            )  # fmt: skip
            self.stream = iter(loader)
        return next(self.stream)


class Batches:
    """
    Prepares the batches of a training. With `uses` above 1, a new batch of samples is prepared every `uses` steps, and
    the batch of a step is drawn from the last `uses` ones, so that every sample is used `uses` times on average.

    Args:
        prepare (`Callable[[int], object]`): draws `train_batch_size` samples, given their number. It runs in the worker
            processes.
        args (`argparse.Namespace`): the options `train_batch_size`, `uses` and `num_workers`.
        move (`Callable[[object], tuple]`, *optional*): turns samples into tensors of the same length. It runs in the main
            process, once for each result of `prepare`.
    """

    def __init__(
        self,
        prepare: Callable[[int], object],
        args: argparse.Namespace,
        move: Callable[[object], tuple[torch.Tensor, ...]] | None = None,
    ):
        self.batch_size = args.train_batch_size
        self.uses = args.uses
        self.ahead = Ahead(prepare, args.num_workers)
        self.move = move or (lambda samples: samples)
        self.parts: deque[tuple[torch.Tensor, ...]] = deque(maxlen=args.uses)
        self.last = -1
        self.samples: tuple[torch.Tensor, ...] = ()

    def __call__(self, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Returns the batch of a step. `generator` is the one of the step (`train`). With `torchrun` and several uses, the
        processes draw different batches from the same samples."""
        number = generator.initial_seed() // self.uses
        if number != self.last:
            # after an interruption, the samples of the steps before are drawn again
            first = number if self.last == number - 1 else max(number - self.uses + 1, 0)
            self.parts.extend(self.move(self.ahead(each)) for each in range(first, number + 1))
            self.last = number
            self.samples = tuple(torch.cat(part) for part in zip(*self.parts, strict=True))
        if self.uses == 1:
            return self.samples
        rows = torch.randperm(len(self.samples[0]), generator=generator)[: self.batch_size]
        return tuple(part[rows.to(part.device)] for part in self.samples)


class _Prepared(Dataset):
    def __init__(self, prepare: Callable[[int], object]):
        self.prepare = prepare

    def __getitem__(self, number: int):
        torch.set_num_threads(1)
        return self.prepare(number)


def train(
    name: str,
    args: argparse.Namespace,
    modules: dict[str, torch.nn.Module],
    loss_fn: Callable[[torch.Generator], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    sample_fn: Callable[[Path], None] | None = None,
) -> None:
    """Minimizes `loss_fn` over the trainable parameters of `modules`, starting from the last checkpoint if one exists.

    The optimizer is AdamW with a cosine learning rate schedule with warm-up, and gradients are clipped to a norm of 1.
    The training ends after `args.max_train_steps` or after `args.minutes`, whichever comes first. At the end, and
    while `sample_fn` runs, the modules hold the moving average of their weights. A checkpoint is written to a
    temporary file and then renamed, so that an interruption does not leave an incomplete checkpoint. Batches are drawn
    from a generator that depends only on the seed, the step and the process.

    With `torchrun --nproc_per_node 2`, each process uses its own batches, and the weights are averaged every
    `SYNC_STEPS` steps. On a CPU, this is nearly twice as fast as one process with two threads, because the layers are
    too small to benefit from threads.
    """
    rank, workers = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if workers > 1:
        torch.distributed.init_process_group("gloo")
    started = time.time()
    checkpoint = args.work_dir / f"{name}.pt"
    parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    if parameters[0].is_cuda:
        torch.set_float32_matmul_precision("high")  # TF32
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=1e-3, fused=True)
    step, before = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=parameters[0].device)
        step, before = state["step"], state.get("seconds", 0.0)
        for name_of, module in modules.items():
            module.load_state_dict(state["modules"][name_of])
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]

    def spent() -> float:
        return before + time.time() - started

    def progress() -> float:
        return max(step / args.max_train_steps, spent() / (60 * args.minutes) if args.minutes else 0.0)

    def swap():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.data, mean.data = mean.data, parameter.data

    def save():
        if rank:
            return
        state = {
            "step": step,
            "seconds": spent(),
            "modules": {n: m.state_dict() for n, m in modules.items()},
            "optimizer": optimizer.state_dict(),
            "average": average,
        }
        torch.save(state, checkpoint.with_suffix(".part"))
        checkpoint.with_suffix(".part").rename(checkpoint)

    def sync():
        if workers > 1:
            flat = torch.cat([p.detach().flatten() for p in parameters])
            torch.distributed.all_reduce(flat)
            mean = (flat / workers).split([p.numel() for p in parameters])
            torch._foreach_copy_(
                [p.detach() for p in parameters], [m.view_as(p) for m, p in zip(mean, parameters, strict=True)]
            )

    def sample():
        if sample_fn is None or rank:
            return
        swap()
        for module in modules.values():
            module.eval()
        with torch.no_grad():
            sample_fn(args.work_dir / f"{name}.png")
        for module in modules.values():
            module.train()
        swap()

    bar = tqdm(total=args.max_train_steps, initial=step, desc=name, mininterval=10, disable=rank > 0)
    log = (args.work_dir / f"{name}.log" if not rank else Path(os.devnull)).open("a")
    sums: dict[str, float | torch.Tensor] = {}
    while progress() < 1:
        warmup = min(1.0, (step + 1) / args.lr_warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress(), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * warmup * (0.02 + 0.98 * cosine)
        draw = args.seed * 1_000_003 + step * workers + rank
        generator = torch.Generator().manual_seed(draw)
        torch.manual_seed(draw + 1)
        loss, parts = loss_fn(generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % SYNC_STEPS == 0:
            sync()
        decay = min(args.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        # sums of tensors, because reading each value would wait for the GPU at each step
        for key, value in {"loss": loss.detach(), **parts}.items():
            sums[key] = sums.get(key, 0.0) + value
        bar.update()
        if step % 100 == 0:
            means = {k: f"{float(v) / 100:.4f}" for k, v in sums.items()}
            bar.set_postfix(means)
            print(step, f"{spent():.0f}s", means, file=log, flush=True)
            sums = {}
        if step % args.checkpointing_steps == 0:
            save()
        if step % args.sample_steps == 0 or step == 100:
            sample()
    sync()
    if rank:
        raise SystemExit
    save()
    sample()
    swap()
    for module in modules.values():
        module.eval()


def picture_tensor(pictures) -> torch.Tensor:
    """Converts uint8 images of shape (n, height, width, 3) to values from -1 to 1 of shape (n, 3, height, width)."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def picture_array(tensor: torch.Tensor):
    """The inverse of `picture_tensor`."""
    return ((tensor.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
