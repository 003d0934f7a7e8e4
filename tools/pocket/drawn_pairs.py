"""Training pairs as arrays on the disk, and samples of them for examples/train_ssr.py.

A Parquet file of PNG images, which `train_ssr.py` reads by default, can be used with any set of images. On a GPU, the
pocket model trains on more rows in a second than a process can decode. The arrays are mapped into memory, so several
trainings can share them.
"""

import json
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from .training import picture_tensor
from .world import SIZE


MOST_SUBJECTS = 2
PART = 500  # number of rows that a process draws at a time
CHUNK = 2048  # number of rows that are converted to tensors at a time
SHAPES = {
    "image": (SIZE, SIZE, 3),
    "reference": (MOST_SUBJECTS, SIZE, SIZE, 3),
    "mask": (MOST_SUBJECTS, SIZE, SIZE),
}


def write_arrays(folder: Path, drawing: Callable[[], object], num_rows: int, seed: int, num_proc: int) -> None:
    """Draws rows in `num_proc` processes. `drawing()` creates an object like [`train.pairs.Rows`] in each process. Each row
    depends only on the object, the seed and its number."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "texts.json").unlink(missing_ok=True)  # it is written last, so it marks complete arrays
    for name, shape in SHAPES.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.uint8, (num_rows, *shape)).flush()
    starts = range(0, num_rows, PART)
    jobs = [(folder, range(start, min(start + PART, num_rows)), seed) for start in starts]
    with get_context("fork").Pool(num_proc, _start, (drawing,)) as pool:
        texts = [row for part in pool.imap(_write_part, jobs) for row in part]
    partial = folder / "texts.part"
    partial.write_text(json.dumps(texts))
    partial.rename(folder / "texts.json")


def _start(drawing: Callable[[], object]) -> None:
    global _rows
    _rows = drawing()
    torch.set_num_threads(1)


def _write_part(job: tuple[Path, range, int]) -> list[dict]:
    folder, numbers, seed = job
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in SHAPES}
    texts = []
    for number in numbers:
        row = _rows.draw(np.random.default_rng([seed, number]))
        arrays["image"][number] = row["image"]
        for slot, (reference, mask) in enumerate(zip(row["reference"], row["mask"], strict=True)):
            arrays["reference"][number, slot] = reference
            if mask is not None:
                arrays["mask"][number, slot] = mask
        masked = [mask is not None for mask in row["mask"]]
        texts.append({"caption": row["text"], "queries": row["query"], "masked": masked})
    return texts


class DrawnSamples:
    """
    Yields samples of the arrays endlessly, in a new random order in each epoch. It replaces
    [`training_data.Samples`] in `train_ssr.main`.

    Args:
        folder (`Path`): the folder that `write_arrays` wrote.
        processor (`CLIPImageProcessor`): the normalization for the vision encoder. The images have its size already.
        seed (`int`): determines the order of the rows.
        position (`tuple[int, int]`): the epoch and the number of the first sample.
    """

    def __init__(self, folder: Path, processor, seed: int = 0, position: tuple[int, int] = (0, 0)):
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in SHAPES}
        self.texts = json.loads((folder / "texts.json").read_text())
        self.mean, self.std = (
            torch.tensor(each).view(3, 1, 1) for each in (processor.image_mean, processor.image_std)
        )
        self.seed = seed
        self.position = tuple(position)
        self.bad: dict[str, str] = {}

    def __iter__(self) -> Iterator[dict]:
        while True:
            epoch, begun = self.position
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.texts))
            for start in range(begun, len(order), CHUNK):
                numbers = order[start : start + CHUNK]
                for index, sample in enumerate(self._samples(numbers), start + 1):
                    self.position = (epoch, index)
                    yield sample
            self.position = (epoch + 1, 0)

    def _samples(self, numbers: np.ndarray) -> Iterator[dict]:
        pixels = picture_tensor(self.arrays["image"][numbers])
        for row, number in enumerate(numbers):
            text = self.texts[number]
            count = len(text["queries"])
            references = picture_tensor(np.array(self.arrays["reference"][number, :count]))
            masks = torch.from_numpy(np.array(self.arrays["mask"][number, :count])).float()[:, None] / 255
            yield {
                "caption": text["caption"],
                # a subject with a mask and without a query has the empty query (`--mask_query empty`)
                "queries": [query or "" for query in text["queries"]],
                "pixel_values": pixels[row],
                "reference_values": ((references + 1) / 2 - self.mean) / self.std,
                "masks": [mask if masked else None for mask, masked in zip(masks, text["masked"], strict=True)],
            }
