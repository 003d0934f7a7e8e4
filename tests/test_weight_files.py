import json
import math

import pytest
import torch
from diffusers_ssr import weight_files
from safetensors.torch import save_file


def header(entries: dict, **metadata) -> bytes:
    return json.dumps({**entries, **metadata}).encode()


def entry(dtype="F32", shape=(2, 3), start=0, end=24) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write(file, content: bytes, size: int = 24, length: int | None = None) -> None:
    length = len(content) if length is None else length
    file.write_bytes(length.to_bytes(8, "little") + content + bytes(size))


def read(file, most: int = 2**20):
    with file.open("rb") as opened:
        return weight_files.read_header(opened, most)


def test_a_header_describes_the_tensors(tmp_path):
    """Of every dtype, also without values and without dimensions."""
    dtypes = [
        "bool",
        "uint8",
        "int16",
        "int64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "complex64",
        "float8_e4m3fn",
    ]
    tensors = {name: torch.ones(2, 3).to(getattr(torch, name)) for name in dtypes}
    tensors |= {"empty": torch.ones(0, 3), "number": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "file", {"format": "pt"})
    metadata, entries = read(tmp_path / "file")
    assert metadata == {"format": "pt"} and entries.keys() == tensors.keys()
    content = (tmp_path / "file").read_bytes()
    for name, found in entries.items():
        tensor = tensors[name]
        assert found.shape == tensor.shape and found.num_bytes == math.prod(found.shape) * tensor.element_size()
        stored = content[found.start : found.start + found.num_bytes]
        assert stored == bytes(tensor.flatten().view(torch.uint8).tolist())


BROKEN = {
    "not JSON": (b"{half", "header is broken"),
    "a list": (b"[]", "header is broken"),
    "deeply nested": (b"[" * 10**5, "header is broken"),
    "not UTF-8": (b"\xff" * 9, "header is broken"),
    "a number": (header({"a": 3}), "header is broken"),
    "without a shape": (header({"a": {"dtype": "F32", "data_offsets": [0, 24]}}), "header is broken"),
    "an unknown dtype": (header({"a": entry("F31")}), "header is broken"),
    "a dtype that is a list": (header({"a": entry(["F32"])}), "header is broken"),
    "a shape below 0": (header({"a": entry(shape=[-2, -3])}), "header is broken"),
    "a shape of booleans": (header({"a": entry("U8", shape=[True], end=1)}), "header is broken"),
    "a shape of floats": (header({"a": entry(shape=[2.0, 3.0])}), "header is broken"),
    "a position below 0": (header({"a": entry(start=-24, end=0)}), "header is broken"),
    "another size": (header({"a": entry(end=20)}), "header is broken"),
    "three positions": (header({"a": {**entry(), "data_offsets": [0, 24, 48]}}), "header is broken"),
    "overlapping": (header({"a": entry(), "b": entry()}), "header is broken"),
    "a gap": (header({"a": entry(), "b": entry(start=30, end=54)}), "header is broken"),
    "metadata of numbers": (header({"a": entry()}, __metadata__={"a": 1}), "header is broken"),
    "metadata of null": (header({"a": entry()}, __metadata__=None), "header is broken"),
    "truncated": (header({"a": entry(shape=[2, 4], end=32)}), "bytes, but its header describes"),
    "longer": (header({"a": entry("F16", end=12)}), "bytes, but its header describes"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_header_is_rejected(tmp_path, fault):
    content, message = BROKEN[fault]
    write(tmp_path / "file", content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "file")


@pytest.mark.parametrize("length", [0, 1, 2**20 + 1, 2**63])
def test_a_header_of_a_wrong_length_is_not_read(tmp_path, length):
    write(tmp_path / "file", header({"a": entry()}), length=length)
    with pytest.raises(ValueError, match="not a safetensors file, or its header is longer than 1,048,576 bytes"):
        read(tmp_path / "file")


def test_the_longest_header_is_read(tmp_path):
    content = header({"a": entry()})
    write(tmp_path / "file", content)
    assert list(read(tmp_path / "file", len(content))[1]) == ["a"]
    with pytest.raises(ValueError, match="is longer than"):
        read(tmp_path / "file", len(content) - 1)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_a_file_without_a_header_is_rejected(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file"):
        read(tmp_path / "file")


@pytest.mark.parametrize("count,named", [(0, "none"), (1, "0"), (3, "0, 1, 2"), (5, "0, 1, 2 and 2 more")])
def test_some_names_lists_at_most_the_first_names(count, named):
    assert weight_files.some_names([str(index) for index in range(count)]) == named
