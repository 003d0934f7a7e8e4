"""Tests of broken files. Subject files can come from strangers: each raises an error that names it, within a second and
200 MB of memory. Weights and configs of encoders are trusted as in diffusers, but broken ones are refused by name."""

import ctypes
import json
import os
import time
from pathlib import Path

import pytest
import torch
from conftest import make_pipe_without_ssr, make_ssr_components
from diffusers_ssr import SubjectEmbeds
from safetensors.torch import load_file, save_file


MEGABYTE = 2**20
TWENTY_GIGABYTES = 20 * 10**9


# Subject files. The broken files are variants of this valid one:
SUBJECT = {"0.embeds": torch.ones(1, 6, 8), "0.negative_embeds": torch.ones(1, 6, 8), "fingerprint": torch.ones(4, 8)}
DESCRIBED = [{"query": "cat", "scale": 0.8}]
ONES = torch.ones(1, 6, 8)
WRONG_TENSORS = {
    "no embeddings": {"0.embeds": None},
    "no negative embeddings": {"0.negative_embeds": None},
    "no tensors": dict.fromkeys(SUBJECT),
    "batch size of 2": {"0.embeds": ONES.repeat(2, 1, 1), "0.negative_embeds": ONES.repeat(2, 1, 1)},
    "no tokens": {"0.embeds": ONES[:, :0], "0.negative_embeds": ONES[:, :0]},
    "no width": {"0.embeds": ONES[..., :0], "0.negative_embeds": ONES[..., :0]},
    "two dimensions": {"0.embeds": ONES[0], "0.negative_embeds": ONES[0]},
    "a scalar": {"0.embeds": torch.tensor(1.0)},
    "different lengths": {"0.negative_embeds": ONES[:, :5].clone()},
    "integers": {"0.embeds": ONES.long(), "0.negative_embeds": ONES.long()},
    "bytes": {"0.embeds": ONES.byte(), "0.negative_embeds": ONES.byte()},
    "booleans": {"0.embeds": ONES.bool(), "0.negative_embeds": ONES.bool()},
    "complex": {"0.embeds": ONES.to(torch.complex64), "0.negative_embeds": ONES.to(torch.complex64)},
    "float8": {"0.embeds": ONES.to(torch.float8_e4m3fn), "0.negative_embeds": ONES.to(torch.float8_e4m3fn)},
    "nan": {"0.embeds": ONES * torch.nan},
    "infinity": {"0.negative_embeds": ONES / 0},
    "too large for half precision": {"0.embeds": ONES * 1e6},
    "the largest number in half precision": {"0.embeds": ONES * 65504, "0.negative_embeds": ONES * 65504},
    "larger than any token": {"0.embeds": ONES * 1001},
    "smaller than any token": {"0.negative_embeds": ONES * -1001},
    "an unknown tensor": {"0.weights": ONES.clone()},
    "another subject": {"1.embeds": ONES.clone()},
    "counts of one branch": {"0.counts": torch.ones(1, 6)},
    "counts of a different length": {"0.counts": torch.ones(1, 5), "0.negative_counts": torch.ones(1, 5)},
    "counts of 0": {"0.counts": torch.zeros(1, 6), "0.negative_counts": torch.ones(1, 6)},
    "counts below 0": {"0.counts": -torch.ones(1, 6), "0.negative_counts": torch.ones(1, 6)},
    "counts of nan": {"0.counts": torch.ones(1, 6) * torch.nan, "0.negative_counts": torch.ones(1, 6)},
    "too large counts": {"0.counts": torch.ones(1, 6) * 1e9, "0.negative_counts": torch.ones(1, 6)},
    "integer counts": {"0.counts": torch.ones(1, 6).int(), "0.negative_counts": torch.ones(1, 6).int()},
    "a region of one dimension": {"0.region": torch.ones(8)},
    "a region of four dimensions": {"0.region": torch.ones(1, 2, 8, 8)},
    "a region without pixels": {"0.region": torch.ones(0, 8)},
    "an empty region": {"0.region": torch.zeros(8, 8)},
    "an empty region of frames": {"0.region": torch.zeros(3, 8, 8)},
    "a region below 0": {"0.region": torch.eye(8) * 1.5 - 0.5},
    "a region above 1": {"0.region": torch.eye(8) * 255},
    "a region of nan": {"0.region": torch.eye(8) * torch.nan},
    "a region of bytes": {"0.region": torch.eye(8).byte()},
    "a fingerprint of nan": {"fingerprint": torch.ones(4, 8) * torch.nan},
    "a fingerprint of one dimension": {"fingerprint": torch.ones(8)},
    "a fingerprint of integers": {"fingerprint": torch.ones(4, 8).long()},
}
WRONG_DESCRIPTIONS = {
    "no subjects": [],
    "too many subjects": DESCRIBED * 65,
    "one subject too many": DESCRIBED * 2,
    "a dict": DESCRIBED[0],
    "null": None,
    "numbers": [1],
    "no query": [{"scale": 1.0}],
    "no scale": [{"query": "cat"}],
    "more keys": [{**DESCRIBED[0], "embeds": 3}],
    **{f"query {value!r}": [{"query": value, "scale": 1.0}] for value in (None, 3, ["cat"])},
    **{f"scale {value!r}": [{"query": "cat", "scale": value}]
       for value in ("0.8", True, [1], {}, float("nan"), float("inf"), 1e30, 10**400)},
}  # fmt: skip
# Name, dtype and shape of huge tensors. The files are sparse, so they need no space on the disk.
HUGE_TENSORS = {
    "a region of 20,000 x 20,000": {"0.region": ("F32", [20_000, 20_000])},
    "a region of many frames": {"0.region": ("F32", [10_000, 512, 512])},
    "a million tokens": {"0.embeds": ("F32", [1, 10**6, 768]), "0.negative_embeds": ("F32", [1, 10**6, 768])},
    "a width of a million": {"0.embeds": ("F16", [1, 462, 10**6]), "0.negative_embeds": ("F16", [1, 462, 10**6])},
    "16,000 tokens of width 16,000": {"0.embeds": ("F32", [1, 16_000, 16_000]), "0.negative_embeds": ("F32", [1, 16_000, 16_000])},
    "248 MB with an empty region": {"0.embeds": ("F32", [1, 16_000, 1_000]), "0.negative_embeds": ("F32", [1, 16_000, 1_000]), "0.region": ("F32", [5_000, 6_000])},
    "a fingerprint of gigabytes": {"fingerprint": ("F32", [10**8, 8])},
    "an unknown tensor of gigabytes": {"other": ("U8", [4 * 10**9])},
}  # fmt: skip


def subject_file(file: Path, changes: dict, described=DESCRIBED, **metadata) -> None:
    tensors = {name: tensor for name, tensor in {**SUBJECT, **changes}.items() if tensor is not None}
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, file, {"format": "ssr-subject-1", "subjects": json.dumps(described), **metadata})


def raw_file(file: Path, header: bytes, length: int | None = None, size: int = 0) -> None:
    """Writes a header, the length that is declared for it, and `size` zeros, which need no space on the disk."""
    with file.open("wb") as content:
        content.write((len(header) if length is None else length).to_bytes(8, "little") + header)
        content.truncate(8 + len(header) + size)


def huge_file(file: Path, layout: dict) -> None:
    small = {"0.embeds": ("F32", [1, 6, 8]), "0.negative_embeds": ("F32", [1, 6, 8])}
    header = {"__metadata__": {"format": "ssr-subject-1", "subjects": json.dumps(DESCRIBED)}}
    position = 0
    for name, (dtype, shape) in {**small, **layout}.items():
        size = torch.Size(shape).numel() * {"F32": 4, "F16": 2, "U8": 1}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    raw_file(file, json.dumps(header).encode(), size=position)


def subject_files(folder: Path) -> dict[str, Path]:
    files = {}

    def new(name: str) -> Path:
        files[f"subject: {name}"] = folder / f"{len(files)}.safetensors"
        return files[f"subject: {name}"]

    for name, changes in WRONG_TENSORS.items():
        subject_file(new(name), changes)
    for name, described in WRONG_DESCRIPTIONS.items():
        subject_file(new(name), {}, described)
    for name, layout in HUGE_TENSORS.items():
        huge_file(new(name), layout)
    subject_file(new("mixed widths"), {"1.embeds": ONES[..., :4], "1.negative_embeds": ONES[..., :4]}, DESCRIBED * 2)
    subject_file(new("another format"), {}, format="pt")
    subject_file(new("subjects that are not JSON"), {}, subjects="[{")
    subject_file(new("deeply nested subjects"), {}, subjects="[" * 10**5)
    save_file({"weight": ONES}, new("without metadata"))
    subject_file(new("truncated"), {})
    files["subject: truncated"].write_bytes(files["subject: truncated"].read_bytes()[:-7])
    subject_file(new("longer than declared"), {})
    with files["subject: longer than declared"].open("ab") as file:
        file.truncate(TWENTY_GIGABYTES)
    new("empty").write_bytes(b"")
    new("text").write_bytes(b"this is not a subject")
    new("pickle").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    raw_file(new("a header of gigabytes"), b"{", 2**33, 2**33)
    raw_file(new("a header of 90 MB"), b"{}", 90 * MEGABYTE, 90 * MEGABYTE)
    for name, header in {"a list": b"[]", "incomplete": b"{", "deeply nested": b"[" * 10**5, "numbers": b'{"0.embeds": 3}',
                         "no shape": b'{"0.embeds": {"dtype": "F32"}}', "null": b"null", "not UTF-8": b"\xff" * 9}.items():  # fmt: skip
        raw_file(new(f"header, {name}"), header, size=100)
    raw_file(new("long numbers"), LONG_NUMBERS[: 2**19] + b"1]}}", size=4)
    os.mkfifo(new("pipe"))
    new("folder").mkdir()
    return files


# A shape of numbers with 4,000 digits, whose product would take minutes
LONG_NUMBERS = b'{"x": {"dtype": "F32", "data_offsets": [0, 4], "shape": [' + b",".join([b"9" * 4000] * 1000) + b"]}}"


def status(field: str) -> int:
    """Returns a field of the memory status of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class Cost:
    """Measures the CPU time and the peak memory of a block."""

    def __enter__(self) -> "Cost":
        self.known = os.access("/proc/self/clear_refs", os.W_OK)
        if self.known:
            # returns memory that earlier tests have freed, because its reuse would not be counted
            malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if malloc_trim:
                malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self.before = status("VmRSS")
        self.start = time.process_time()  # CPU time, because other processes may run
        return self

    def __exit__(self, *error) -> None:
        self.seconds = time.process_time() - self.start
        self.memory = status("VmHWM") - self.before if self.known else 0


def test_broken_subject_files_raise_an_error_with_little_time_and_memory(tmp_path, capsys):
    """The valid file loads without an error, so each broken file raises the error because of its own fault."""
    counts = {"0.counts": torch.ones(1, 6), "0.negative_counts": torch.ones(1, 6)}
    subject_file(tmp_path / "good", {"0.region": torch.eye(8), **counts})
    assert len(SubjectEmbeds.load(tmp_path / "good").subjects) == 1
    with Cost() as cost:
        assert len(b"\1" * (100 * MEGABYTE))
    assert not cost.known or cost.memory > 90 * MEGABYTE
    files = subject_files(tmp_path)
    assert len(files) >= 80
    wrong, most = [], (0.0, 0)
    for name, file in files.items():
        error = None
        with Cost() as cost:
            try:
                SubjectEmbeds.load(file)
            except ValueError as caught:
                error = caught
        most = max(most[0], cost.seconds), max(most[1], cost.memory)
        if error is None or file.name not in str(error) or cost.seconds > 1 or cost.memory > 200 * MEGABYTE:
            wrong.append((name, str(error)[:200], round(cost.seconds, 2), cost.memory // MEGABYTE))
    with capsys.disabled():
        print(f"\n{len(files)} broken subject files: at most {most[0]:.2f} s and {most[1] // MEGABYTE} MB each")
    assert not wrong


VISION, WEIGHT = "ssr_image_encoder/model.safetensors", "layers.1.mlp.fc1.weight"
# The changes to a weight of a vision encoder, and the parts of the error. test_modeling_ssr.py has those of SSREncoder.
WRONG_WEIGHTS = {
    "nan": (lambda tensor: tensor * torch.nan, "values that are not finite numbers in"),
    "missing": (lambda tensor: None, "missing keys"),
    "another shape": (lambda tensor: tensor[:-1].clone(), "mismatched keys"),
}


@pytest.mark.parametrize("fault", WRONG_WEIGHTS)
def test_broken_weights_of_a_vision_encoder_are_named(tmp_path, fault):
    for name, part in make_ssr_components().items():
        part.save_pretrained(tmp_path / name)
    change, message = WRONG_WEIGHTS[fault]
    tensors = load_file(tmp_path / VISION)
    name = next(name for name in tensors if name.endswith(WEIGHT))
    tensors[name] = change(tensors[name])
    save_file({n: t for n, t in tensors.items() if t is not None}, tmp_path / VISION, {"format": "pt"})
    pipe = make_pipe_without_ssr()
    with pytest.raises(ValueError, match=f"'ssr_image_encoder' of {tmp_path} .*{message}(.|\n)*{WEIGHT}"):
        pipe.load_ssr(tmp_path)
    assert pipe.ssr_encoder is pipe.ssr_image_encoder is pipe.ssr_image_processor is None


@pytest.mark.parametrize(
    "file", ["ssr_image_encoder/config.json", "ssr_image_processor/preprocessor_config.json", VISION]
)
def test_files_that_cannot_be_read_are_named(tmp_path, file):
    for name, part in make_ssr_components().items():
        part.save_pretrained(tmp_path / name)
    (tmp_path / file).write_text("{")
    pipe = make_pipe_without_ssr()
    with pytest.raises((OSError, ValueError), match=str(tmp_path)):
        pipe.load_ssr(tmp_path)
    assert pipe.ssr_encoder is None
