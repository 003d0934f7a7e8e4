"""Tests of pipelines in several precisions, and with other defaults of torch."""

import numpy as np
import pytest
import torch
from conftest import call_args, make_picture, quiet, subject_args
from diffusers_ssr import StableDiffusionSSRPipeline, arguments_ssr, images_ssr
from diffusers_ssr.encoding_ssr import parse_references
from diffusers_ssr.request_ssr import SubjectRequest


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)])
def test_mixed_dtypes_raise_an_error_that_names_the_components(pipe, dtypes):
    subject = pipe.encode_subject(make_picture(), "cat")
    pipe.text_encoder.to(dtypes[0]), pipe.unet.to(dtypes[1])
    with pytest.raises(ValueError, match="`text_encoder` is in torch.float.*, but `unet` in torch.*`dtype=`"):
        pipe(**call_args(subject=subject))


@pytest.mark.parametrize("with_dtype", [True, False])
def test_a_pipeline_that_was_saved_in_half_precision_says_how_to_load_it(pipe, tmp_path, with_dtype):
    """Without `dtype=`, transformers 5 keeps the precision of the files, and diffusers loads in float32."""
    pipe.to(torch.float16).save_pretrained(tmp_path)
    loaded = StableDiffusionSSRPipeline.from_pretrained(tmp_path, **({"dtype": torch.float32} if with_dtype else {}))
    quiet(loaded)
    if loaded.text_encoder.dtype != loaded.unet.dtype:
        assert not with_dtype
        with pytest.raises(
            ValueError, match="`text_encoder` is in torch.float16, but `unet` in torch.float32.*`dtype="
        ):
            loaded(**subject_args())
        loaded.to(torch.float32)
    assert np.isfinite(loaded(**subject_args()).images).all()


def test_autocast_allows_mixed_dtypes(pipe):
    subject = pipe.encode_subject(make_picture(), "cat")
    pipe.text_encoder.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert np.isfinite(pipe(**call_args(subject=subject)).images).all()


@pytest.mark.parametrize("default", ["device", "dtype"])
def test_default_device_and_dtype_of_torch_do_not_affect_subjects(pipe, default):
    """Checks images, masks, the fingerprint, regions, and keys and values. The text is encoded by the stock
    pipeline."""
    subject = pipe.encode_subject(make_picture(), "cat")
    left = np.zeros((32, 40))
    left[:, :20] = 1

    def everything():
        (reference,) = parse_references(make_picture(), "cat", left)
        rows = arguments_ssr.parse_subjects(subject.inside(left) + subject.compact(9), 1)
        request = SubjectRequest(rows, 1, pipe.ssr_encoder, torch.float32, 0.5, lambda: [(False, True)])
        conditions = request.conditions(torch.zeros(2, 4, 8, 8, device="cpu", dtype=torch.float32))
        name = next(iter(conditions.pairs))
        text = torch.zeros(2, 77, 32, device="cpu", dtype=torch.float32)
        layer = conditions.for_transformer([name], text, 2, (8, 8))
        return (
            images_ssr.preprocess(reference.image, pipe.ssr_image_processor),
            images_ssr.preprocess_mask(reference.mask, pipe.ssr_image_processor),
            pipe.ssr_encoder.fingerprint(torch.device("cpu")),
            *(layer.keys[0], layer.values[0], layer.mask, layer.reached),
        )

    expected = everything()
    if default == "device":
        with torch.device("meta"):
            results = everything()
    else:
        torch.set_default_dtype(torch.float64)
        try:
            results = everything()
        finally:
            torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.device == theirs.device and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
