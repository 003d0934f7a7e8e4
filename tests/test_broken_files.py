"""Tests that about 300 broken files each raise an error that names the file, within a second and 200 MB of
memory."""

import ctypes
import gzip
import io
import json
import os
import pickle
import time
import zipfile
from pathlib import Path

import generate_batch
import pytest
import torch
from broken_pictures import BOMBS, SPARSE_BOMBS, huge_png
from conftest import make_components, make_picture, make_ssr_components, make_ssr_encoder
from diffusers_ssr import SSREncoder, StableDiffusionSSRPipeline, SubjectEmbeds
from diffusers_ssr.images_ssr import open_image
from safetensors.torch import load_file, save_file
from test_modeling_ssr import BAD_CONFIGS, OTHER_FILES, TWO_LAYERS, small_released


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
    "different dtypes": {"0.negative_embeds": ONES.half()},
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
    "a region of one frame": {"0.region": torch.ones(1, 8, 8)},
    "a region without pixels": {"0.region": torch.ones(0, 8)},
    "an empty region": {"0.region": torch.zeros(8, 8)},
    "an empty region of frames": {"0.region": torch.zeros(3, 8, 8)},
    "a region below 0": {"0.region": torch.eye(8) * 1.5 - 0.5},
    "a region above 1": {"0.region": torch.eye(8) * 255},
    "a region of nan": {"0.region": torch.eye(8) * torch.nan},
    "a region that is too long": {"0.region": torch.ones(32_769, 1)},
    "a region that is too wide": {"0.region": torch.ones(1, 32_769)},
    "a region with too many frames": {"0.region": torch.ones(32_769, 1, 1)},
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
# A torch pickle of 85 bytes that reserves 1.5 GB
RESERVING = (
    pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    + b"\x80\x02cbuiltins\nbytearray\nJ" + (1_500_000_000).to_bytes(4, "little") + b"\x85R." + pickle.dumps([], 2)
)  # fmt: skip


def released_files(folder: Path) -> dict[str, Path]:
    _, aligner, _ = small_released()
    name = "aligner.to_q.weight"
    wrong = {
        **OTHER_FILES, "nan": {**aligner, name: aligner[name] * torch.nan}, "integers": {**aligner, name: aligner[name].long()},
        "nan in float8": {**aligner, name: (aligner[name] * torch.nan).to(torch.float8_e4m3fn)},
        "infinite after the conversion": {**aligner, name: aligner[name].double() * 1e300}, "a number": {**aligner, name: 3}, "huge": {**aligner, name: torch.zeros(()).expand(10**6, 10**6)},
        "missing": {each: aligner[each] for each in aligner if each != name}, "list": [aligner], "integer keys": {1: aligner[name]},
    }  # fmt: skip
    files = {}
    for number, (kind, content) in enumerate(wrong.items()):
        files[f"released: {kind}"] = folder / f"released{number}.bin"
        torch.save(content, files[f"released: {kind}"])
    for kind, content in {"text": b"no weights", "empty": b"", "code": b"\x80\x04cos\nsystem\n(S'true'\ntR."}.items():
        files[f"released: {kind}"] = folder / f"{kind}.bin"
        files[f"released: {kind}"].write_bytes(content)
    files["released: 1 GB"] = folder / "large.bin"
    sparse(files["released: 1 GB"], 10**9, b"\x80\x02\x8a\x0a")
    files["released: 1 GB of zeros"] = folder / "large.safetensors"
    sparse(files["released: 1 GB of zeros"], 10**9)
    files["released: 2 GB of another weight"] = folder / "more.safetensors"
    save_file(aligner, files["released: 2 GB of another weight"])
    change_header(files["released: 2 GB of another weight"], "z", "U8", [2 * 10**9], 2 * 10**9)
    files["released: a bytearray"] = folder / "bytearray.bin"
    files["released: a bytearray"].write_bytes(RESERVING)
    files["released: long numbers"] = folder / "numbers.safetensors"
    raw_file(files["released: long numbers"], LONG_NUMBERS, size=4)
    files["released: a description of 500 MB"] = folder / "description.bin"
    with (
        zipfile.ZipFile(files["released: a description of 500 MB"], "w") as archive,
        archive.open("a/data.pkl", "w") as data,
    ):
        for _ in range(50):
            data.write(b"\0" * 10**7)
    files["released: pipe"] = folder / "pipe.bin"
    os.mkfifo(files["released: pipe"])
    return files


def pictures(folder: Path) -> dict[str, Path]:
    contents = {"empty": b"", "text": b"no picture", "svg": b"<svg/>", "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
                "gzip": gzip.compress(b"\0" * 10**7), "no data": huge_png(64, 64)[:40], **BOMBS}  # fmt: skip
    buffer = io.BytesIO()
    for kind in ("png", "jpeg", "gif", "webp", "tiff", "bmp", "jpeg2000", "ppm", "tga"):
        buffer = io.BytesIO()
        make_picture(size=(64, 64)).save(buffer, kind)
        for part in (0.02, 0.6):
            contents[f"{kind}, truncated at {part}"] = buffer.getvalue()[: int(len(buffer.getvalue()) * part)]
    files = {}
    for number, (kind, content) in enumerate(contents.items()):
        files[f"picture: {kind}"] = folder / f"picture{number}"
        files[f"picture: {kind}"].write_bytes(content)
    for number, (kind, start) in enumerate(SPARSE_BOMBS.items()):
        files[f"picture: {kind}"] = folder / f"sparse{number}"
        sparse(files[f"picture: {kind}"], 600 * 10**6, start)
    files["picture: pipe"] = folder / "pipe.png"
    os.mkfifo(files["picture: pipe"])
    return files


def tables(folder: Path) -> dict[str, Path]:
    contents = {"json": b"{half", "a list": b"[1]\n", "not UTF-8": b"\xff\xff", "an endless line": b"x" * 10**7, "empty": b"",
                "deeply nested": b"[" * 10**5, "missing columns": b'{"a": 1}\n', "unknown columns": b'{"image": "", "prompt": "", "query": "", "x": 1}',
                "two million lists": b"[]\n" * 2_000_000, "two columns of one name": b"image,query,prompt,prompt\n1,2,3,4\n", "two million empty rows": b"{}\n" * 2_000_000}  # fmt: skip
    files = {}
    for number, (kind, content) in enumerate(contents.items()):
        files[f"table: {kind}"] = folder / f"table{number}.{'csv' if number % 2 else 'jsonl'}"
        files[f"table: {kind}"].write_bytes(content)
    files["table: pipe"] = folder / "pipe.csv"
    os.mkfifo(files["table: pipe"])
    return files


def configs(folder: Path) -> dict[str, Path]:
    encoder = make_ssr_encoder()
    files = {}
    for number, config in enumerate(BAD_CONFIGS):
        if config != {"attention_layers": None}:
            file = folder / f"encoder{number}"
            encoder.save_pretrained(file)
            described = json.loads((file / "config.json").read_text())
            (file / "config.json").write_text(json.dumps({**described, **config}))
            files[f"config: {str(config)[:80]}"] = file
    return files


ENCODER_WEIGHTS = "diffusion_pytorch_model.safetensors"


def sparse(file: Path, size: int, start: bytes = b"") -> None:
    """Writes zeros that need no space on the disk."""
    with file.open("wb") as content:
        content.write(start)
        content.truncate(size)


def change_header(file: Path, name: str, dtype: str, shape: list[int], num_bytes: int) -> None:
    """Adds a tensor of zeros to a safetensors file, or replaces one."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8:end]), content[end:]
    if name in header:  # its old values are left in the file as another tensor
        header[f"{name}.old"] = header[name]
    offsets = [len(tensors), len(tensors) + num_bytes]
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    start = json.dumps(header).encode()
    sparse(file, 8 + len(start) + offsets[1], len(start).to_bytes(8, "little") + start + tensors)


def changed(file: Path, **tensors: torch.Tensor) -> None:
    save_file(
        {**load_file(file), **{name.replace("__", "."): t for name, t in tensors.items()}}, file, {"format": "pt"}
    )


def index(folder: Path, shards: list) -> None:
    weight_map = dict(zip(load_file(folder / ENCODER_WEIGHTS), shards * 100, strict=False))
    (folder / f"{ENCODER_WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_pickle(folder: Path, size: int, start: bytes) -> None:
    (folder / ENCODER_WEIGHTS).unlink()
    sparse(folder / "diffusion_pytorch_model.bin", size, start)


def as_compressed_pickle(folder: Path) -> None:
    as_pickle(folder, 0, b"")
    torch.save(make_ssr_encoder().state_dict(), folder / "stored")
    with zipfile.ZipFile(folder / "stored") as stored:
        with zipfile.ZipFile(folder / "diffusion_pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as compressed:
            for entry in stored.namelist():
                compressed.writestr(entry, stored.read(entry))


def encoder_folders(folder: Path) -> dict[str, Path]:
    ones = torch.ones(16, 32)
    faults = {
        "1 GB of zeros": lambda each: sparse(each / ENCODER_WEIGHTS, 10**9),
        "empty": lambda each: sparse(each / ENCODER_WEIGHTS, 0),
        "truncated": lambda each: sparse(each / ENCODER_WEIGHTS, 5000, (each / ENCODER_WEIGHTS).read_bytes()[:5000]),
        "2 GB of another weight": lambda each: change_header(
            each / ENCODER_WEIGHTS, "z", "U8", [2 * 10**9], 2 * 10**9
        ),
        "2 GB of a weight": lambda each: change_header(
            each / ENCODER_WEIGHTS, "to_q.weight", "F32", [16, 32 * 10**6], 2048 * 10**6
        ),
        "a weight too much": lambda each: changed(each / ENCODER_WEIGHTS, to_x__weight=ones),
        "a config that is not JSON": lambda each: (each / "config.json").write_text("{"),
        "a config of 600 MB": lambda each: sparse(each / "config.json", 600 * 10**6),
        "a pickle of 1 GB of zeros": lambda each: as_pickle(each, 10**9, b""),
        "a bytearray": lambda each: as_pickle(each, len(RESERVING), RESERVING),
        "a pickle of 1 GB": lambda each: as_pickle(each, 10**9, b"\x80\x02\x8a\x0a"),
        "a compressed pickle": as_compressed_pickle,
        "an index of 600 MB": lambda each: sparse(each / f"{ENCODER_WEIGHTS}.index.json", 600 * 10**6),
        "an index that is not JSON": lambda each: (each / f"{ENCODER_WEIGHTS}.index.json").write_text("{"),
        "an index without weights": lambda each: (each / f"{ENCODER_WEIGHTS}.index.json").write_text('{"a": 1}'),
        "an index of numbers": lambda each: index(each, [1]),
        "an index of missing shards": lambda each: index(each, [ENCODER_WEIGHTS, "missing.safetensors"]),
        "an index of another folder": lambda each: index(each, [f"../{each.name}/{ENCODER_WEIGHTS}"]),
        "nan in float8": lambda each: changed(
            each / ENCODER_WEIGHTS, to_q__weight=(ones * torch.nan).to(torch.float8_e4m3fn)
        ),
        "infinite after the conversion": lambda each: changed(
            each / ENCODER_WEIGHTS, to_q__weight=ones.double() * 1e300
        ),
        **{
            f"weights of {dtype}": lambda each, dtype=dtype: changed(
                each / ENCODER_WEIGHTS, to_q__weight=ones.to(dtype)
            )
            for dtype in (torch.int64, torch.bool, torch.complex64)
        },
    }
    files = {}
    for number, (fault, breaks) in enumerate(faults.items()):
        files[f"config: {fault}"] = folder / f"broken{number}"
        make_ssr_encoder().save_pretrained(folder / f"broken{number}")
        breaks(folder / f"broken{number}")
    return files


def repositories(folder: Path) -> dict[str, Path]:
    """Folders with an SSR-Encoder, a vision encoder and an image processor, one of which is broken."""
    vision, processor = "ssr_image_encoder", "ssr_image_processor/preprocessor_config.json"

    def configured(file: str, **values):
        return lambda each: (each / file).write_text(json.dumps({**json.loads((each / file).read_text()), **values}))

    def weights(change):
        def write(each: Path) -> None:
            tensors = load_file(each / vision / "model.safetensors")
            name = next(name for name in tensors if name.endswith("layers.1.mlp.fc1.weight"))
            tensors[name] = change(tensors[name])
            save_file(
                {n: t for n, t in tensors.items() if t is not None},
                each / vision / "model.safetensors",
                {"format": "pt"},
            )

        return write

    faults = {
        **{f"the processor's {name} {value}": configured(processor, **{name: value}) for name, value in (
            ("crop_size", {"height": 10_000, "width": 10_000}), ("crop_size", {"height": 32, "width": 31}),
            ("crop_size", {"height": -3, "width": 32}), ("crop_size", "a"), ("size", {"shortest_edge": 10_000}),
            ("size", {"shortest_edge": 0}), ("size", {"shortest_edge": 31}), ("image_std", [0, 0, 0]),
            ("image_std", [1, 1]), ("image_std", [1, 1, -1]), ("image_std", [1e-9, 1, 1]), ("image_std", [1, 1, float("inf")]),
            ("image_mean", [float("nan")] * 3), ("image_mean", [1e9, 0, 0]), ("image_mean", "abc"), ("resample", 99))},
        "a processor of 600 MB": lambda each: sparse(each / processor, 600 * 10**6),
        "a processor that is not JSON": lambda each: (each / processor).write_text("{"),
        "a vision config that is not JSON": lambda each: (each / vision / "config.json").write_text("{"),
        "a vision config that is a list": lambda each: (each / vision / "config.json").write_text("[1]"),
        "a vision config of 600 MB": lambda each: sparse(each / vision / "config.json", 600 * 10**6),
        **{f"the vision config's {name} {value}": configured(f"{vision}/config.json", **{name: value}) for name, value in (
            ("intermediate_size", 10**6), ("intermediate_size", 64), ("num_hidden_layers", 10**6), ("num_hidden_layers", 4),
            ("image_size", 10**5), ("image_size", 4096), ("patch_size", 0), ("patch_size", 64), ("num_attention_heads", 0),
            ("num_attention_heads", 5), ("hidden_size", -24), ("hidden_size", 10**9))},
        "1 GB of zeros as vision weights": lambda each: sparse(each / vision / "model.safetensors", 10**9),
        "a vision config of 500 million weights without any": lambda each: (
            configured(f"{vision}/config.json", hidden_size=4096, intermediate_size=16384, num_attention_heads=8)(each),
            (each / vision / "model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"{}"),
        ),
        "nan in a vision weight": weights(lambda tensor: tensor * torch.nan),
        "a vision weight of float8 nan": weights(lambda tensor: (tensor * torch.nan).to(torch.float8_e4m3fn)),
        "a missing vision weight": weights(lambda tensor: None),
        "a vision weight of integers": weights(lambda tensor: tensor.long()),
        "a vision weight of complex numbers": weights(lambda tensor: tensor.to(torch.complex64)),
        "a vision weight of another shape": weights(lambda tensor: tensor[:-1].clone()),
    }  # fmt: skip
    files = {}
    for number, (fault, breaks) in enumerate(faults.items()):
        each = files[f"repository: {fault}"] = folder / f"repository{number}"
        for name, part in make_ssr_components().items():
            part.save_pretrained(each / name)
        breaks(each)
    return files


def load_repository(folder: Path) -> None:
    pipe = StableDiffusionSSRPipeline(**COMPONENTS, requires_safety_checker=False)
    try:
        pipe.load_ssr(folder)
    finally:
        assert (pipe.ssr_encoder is None) == (pipe.ssr_image_encoder is None) == (pipe.ssr_image_processor is None)


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


LOADERS = {
    "subject": SubjectEmbeds.load,
    "released": lambda file: SSREncoder.from_released(file, small_released()[2], **TWO_LAYERS),
    "picture": lambda file: open_image(file, file.name),
    "table": generate_batch.read_table,
    "config": SSREncoder.from_pretrained,
    "repository": load_repository,
}
COMPONENTS = make_components()
FILE_CREATORS = (subject_files, released_files, pictures, tables, configs, encoder_folders, repositories)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:Detected pickle protocol")
def test_broken_files_raise_an_error_with_little_time_and_memory(tmp_path, capsys):
    """The valid files load without an error, so each broken file raises the error because of its own fault."""
    subject_file(
        tmp_path / "good",
        {"0.region": torch.eye(8), "0.counts": torch.ones(1, 6), "0.negative_counts": torch.ones(1, 6)},
    )
    assert len(SubjectEmbeds.load(tmp_path / "good").subjects) == 1
    with Cost() as cost:
        assert len(b"\1" * (100 * MEGABYTE))
    assert not cost.known or cost.memory > 90 * MEGABYTE
    files: dict[str, Path] = {}
    for make in FILE_CREATORS:
        files |= make(tmp_path)
    assert len(files) >= 150
    wrong, most = [], (0.0, 0)
    for name, file in files.items():
        kind = name.partition(":")[0]
        error = None
        with Cost() as cost:
            try:
                LOADERS[kind](file)
            except ValueError as caught:
                error = caught
        most = max(most[0], cost.seconds), max(most[1], cost.memory)
        named = error is not None and (
            file.name in str(error) or f"`{'aligner' if kind == 'released' else file.name}`" in str(error)
        )
        if not named or cost.seconds > 1 or cost.memory > 200 * MEGABYTE:
            wrong.append((name, str(error)[:200], round(cost.seconds, 2), cost.memory // MEGABYTE))
    with capsys.disabled():
        print(f"\n{len(files)} broken files: at most {most[0]:.2f} s and {most[1] // MEGABYTE} MB each")
    assert not wrong
