import numpy as np
import pytest
import torch
from conftest import make_picture, make_ssr_encoder
from diffusers_ssr import SubjectEmbeds
from diffusers_ssr.subject_embeds import same_fingerprint
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file


@pytest.fixture
def pair(pipe):
    cat, dog = pipe.encode_subject(make_picture(), query=["cat", "dog"])
    return cat.scaled(0.8).inside(np.eye(8)) + dog


def test_save_and_load(pair, tmp_path):
    pair.save(tmp_path / "pair.safetensors")
    loaded = SubjectEmbeds.load(tmp_path / "pair.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["pair.safetensors"]
    assert torch.equal(loaded.fingerprint, pair.fingerprint)
    for ours, theirs in zip(pair.subjects, loaded.subjects, strict=True):
        assert (ours.query, ours.scale) == (theirs.query, theirs.scale)
        assert torch.equal(ours.embeds, theirs.embeds)
        assert torch.equal(ours.negative_embeds, theirs.negative_embeds)
        assert (ours.region is None) == (theirs.region is None)
    with safe_open(tmp_path / "pair.safetensors", "pt") as file:
        assert '"query": "cat"' in file.metadata()["subjects"]


def test_merged_tokens_are_saved_and_merged_further(pair, tmp_path):
    few = pair.compact(9)
    few.save(tmp_path / "few.safetensors")
    loaded = SubjectEmbeds.load(tmp_path / "few.safetensors")
    length = pair.subjects[0].embeds.shape[1]
    for subject, fewer in zip(loaded.subjects, loaded.compact(4).subjects, strict=True):
        assert subject.embeds.shape[1] == 9 and fewer.negative_embeds.shape[1] == 4
        for counts in (subject.counts, subject.negative_counts, fewer.counts, fewer.negative_counts):
            assert counts.sum() == length
    assert pair.subjects[0].embeds.shape[1] == length and pair.compact(length).subjects == pair.subjects


@pytest.mark.parametrize("missing", ["0.embeds", "1.negative_embeds", "counts"])
def test_a_file_without_all_its_tokens_is_refused(pair, tmp_path, missing):
    path = tmp_path / "pair.safetensors"
    pair.compact(9).save(path)
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    if missing == "counts":
        tensors["0.counts"] = tensors["0.counts"][:, 1:]
    else:
        del tensors[missing]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="lacks tokens"):
        SubjectEmbeds.load(path)


@pytest.mark.parametrize("num_tokens", [0, -1, 2.5, True, "few"])
def test_a_number_of_tokens_that_is_none_is_refused(pair, num_tokens):
    with pytest.raises(ValueError, match="`num_tokens`"):
        pair.compact(num_tokens)


@pytest.mark.parametrize("fault", ["cut off", "another file", "empty"])
def test_a_broken_file_is_named(pair, tmp_path, fault):
    path = tmp_path / "pair.safetensors"
    pair.save(path)
    if fault == "another file":
        save_file({"weight": torch.zeros(2)}, path)
    else:
        path.write_bytes(path.read_bytes()[: 1000 if fault == "cut off" else 0])
    with pytest.raises(ValueError, match="`path`.*pair.safetensors"):
        SubjectEmbeds.load(path)


def test_scaled_and_inside_reach_every_subject_and_leave_the_original(pair):
    assert [subject.scale for subject in pair.scaled(0.3).subjects] == [0.3, 0.3]
    assert [subject.scale for subject in pair.subjects] == [0.8, None]
    region = Image.fromarray(np.eye(8, dtype=np.uint8) * 255)
    assert all(torch.equal(s.region, torch.eye(8)) for s in pair.inside(region).subjects)


@pytest.mark.parametrize("region", [np.zeros((8, 8)), np.ones(8), "left", np.full((8, 8), np.nan)])
def test_a_region_that_is_no_mask_is_refused(pair, region):
    with pytest.raises(ValueError, match="`region`"):
        pair.inside(region)


def test_subjects_of_different_encoders_are_not_added(pipe, pair):
    pipe.register_modules(ssr_encoder=make_ssr_encoder(seed=9))
    with pytest.raises(ValueError, match="different SSR-Encoders"):
        pair + pipe.encode_subject(make_picture(), "cat")
    with pytest.raises(TypeError):
        pair + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fingerprint_tells_encoders_apart_but_not_precisions(dtype):
    encoder = make_ssr_encoder()
    fingerprint = encoder.fingerprint()
    assert same_fingerprint(fingerprint, encoder.to(dtype).fingerprint())
    assert not same_fingerprint(fingerprint, make_ssr_encoder(seed=5).fingerprint())
    changed = make_ssr_encoder()
    next(iter(changed.layers.values()))["to_v"].weight.data *= 2
    assert not same_fingerprint(fingerprint, changed.fingerprint())
