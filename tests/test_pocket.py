"""Images of the pocket checkpoint, alone and with other pipelines. The tests generate a few images and use low
thresholds. pocket/README.md has the measured results."""

import json

import numpy as np
import pytest
import torch
from conftest import POCKET
from diffusers import ControlNetModel, MotionAdapter, UNet2DConditionModel
from diffusers_ssr import AnimateDiffSSRPipeline, StableDiffusionSSRControlNetPipeline, StableDiffusionSSRPipeline
from PIL import Image

from tools.pocket.judge import load_judge
from tools.pocket.measure.chains import edge_agreement, rise
from tools.pocket.pictures import is_framed, without_look
from tools.pocket.world import CATEGORY_NAMES


@pytest.fixture(scope="module")
def pocket():
    pipe = StableDiffusionSSRPipeline.from_pretrained(POCKET, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def judge():
    return load_judge(POCKET)


def references() -> list[tuple[Image.Image, str]]:
    """Each reference image with each of its queries."""
    queries = json.loads((POCKET / "references" / "queries.json").read_text())
    return [(Image.open(POCKET / "references" / name), query) for name, each in queries.items() for query in each]


def draw(pipe, prompts: list[str], **kwargs) -> np.ndarray:
    arguments = {"num_inference_steps": 12, "guidance_scale": 3.0, "eta": 0.9, "output_type": "np"}
    drawn = pipe(prompts, generator=torch.Generator().manual_seed(0), **{**arguments, **kwargs})[0]
    return (drawn * 255).round().astype(np.uint8)


def test_the_image_shows_the_queried_subject(pocket, judge):
    """A random category would be right in 1 of 12 images."""
    subjects = [pocket.encode_subject(image, query).scaled(1.0) for image, query in references()]
    queried = np.array([CATEGORY_NAMES.index(query) for _, query in references()])
    shown = judge.look_at(draw(pocket, ["a thing in the snow"] * len(subjects), subject=subjects)).categories.argmax(1)
    assert (shown.numpy() == queried).mean() >= 0.85, (shown, queried)


def test_a_mask_selects_like_a_name(pocket, judge):
    """The masks mark the last thing of two references. There is no query."""
    masks = sorted((POCKET / "masks").iterdir())
    queries = json.loads((POCKET / "references" / "queries.json").read_text())
    subjects = [
        pocket.encode_subject(
            Image.open(POCKET / "references" / mask.name), mask=Image.open(mask), mask_weight=3.0
        ).scaled(1.0)
        for mask in masks
    ]
    shown = judge.look_at(draw(pocket, ["a thing in the snow"] * len(masks), subject=subjects)).categories.argmax(1)
    assert [CATEGORY_NAMES[each] for each in shown] == [queries[mask.name][-1] for mask in masks]


def test_two_subjects_of_two_references_are_in_one_image(pocket, judge):
    """Each of them is in its half. Without regions, this is less reliable."""
    left = np.zeros((64, 64))
    left[:, :32] = 1
    some = [each for each in references() if each[1] != "woman"]
    pairs = [pair for pair in zip(some[::3], some[1::3], strict=False) if pair[0][1] != pair[1][1]]
    subjects = [
        pocket.encode_subject(a, query).scaled(1.0).inside(left)
        + pocket.encode_subject(b, other).scaled(1.0).inside(1 - left)
        for (a, query), (b, other) in pairs
    ]
    prompts = [f"a {query} and a {other} on the beach" for (_, query), (_, other) in pairs]
    present = judge.look_at(draw(pocket, prompts, subject=subjects)).categories > 0
    both = [
        bool(row[CATEGORY_NAMES.index(query)] and row[CATEGORY_NAMES.index(other)])
        for row, ((_, query), (_, other)) in zip(present, pairs, strict=True)
    ]
    assert len(both) >= 3 and np.mean(both) >= 0.75, both


@pytest.mark.parametrize("size", [(72, 40), (40, 88), (104, 56)])
def test_regions_with_odd_latent_sizes(pocket, size):
    """The size is rounded up at the lower level, for example from 9 x 5 to 5 x 3. The mask has a different aspect ratio
    from the image. test_attention_processors.py tests the effect of a region on a layer."""
    cat = pocket.encode_subject(Image.open(POCKET / "references" / "1_cat_car.png"), "cat").scaled(1.0)
    left = np.zeros((90, 120))
    left[:, :60] = 1
    arguments = {"height": size[0], "width": size[1], "num_inference_steps": 3}
    pictures = [
        draw(pocket, ["a thing in the snow"], subject=each, **arguments)[0].astype(float)
        for each in (cat.inside(left), cat.inside(1 - left), cat, cat.inside(np.ones((90, 120))))
    ]
    assert all(picture.shape[:2] == size for picture in pictures)
    np.testing.assert_allclose(pictures[2], pictures[3], atol=1)
    assert all(np.abs(pictures[i] - pictures[j]).mean() > 1 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_another_checkpoint_generates_the_subject_in_its_own_style(pocket, judge):
    unet = UNet2DConditionModel.from_pretrained(POCKET, subfolder="unet", dtype=torch.float32)
    pipe = type(pocket).from_pipe(pocket, unet=unet)
    pipe.load_lora_weights(str(POCKET / "look"))
    pipe.fuse_lora()
    pipe.set_progress_bar_config(disable=True)
    some = references()[:8]
    subjects = [pipe.encode_subject(image, query).scaled(1.0) for image, query in some]
    pictures = draw(pipe, [f"a {query} on the beach" for _, query in some], subject=subjects)
    shown = judge.look_at(without_look(pictures)).categories.argmax(1).numpy()
    assert is_framed(pictures).mean() >= 0.85
    assert np.mean([CATEGORY_NAMES[each] == query for each, (_, query) in zip(shown, some, strict=True)]) >= 0.75


def test_a_controlnet_sets_the_place_of_the_subject(pocket, judge):
    controlnet = ControlNetModel.from_pretrained(POCKET, subfolder="controlnet", dtype=torch.float32)
    pipe = StableDiffusionSSRControlNetPipeline.from_pipe(pocket, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    control = Image.open(POCKET / "controls" / "cat.png")
    cat = pipe.encode_subject(Image.open(POCKET / "references" / "1_cat_car.png"), "cat").scaled(1.0)
    pictures = draw(pipe, ["a cat on the beach"] * 4, subject=[cat] * 4, image=[control] * 4)
    assert (judge.look_at(pictures).categories.argmax(1) == CATEGORY_NAMES.index("cat")).float().mean() >= 0.75
    recall = np.array([[edge_agreement(p, c)[1] for c in (np.asarray(control), np.asarray(control)[:, ::-1])]
                       for p in pictures]).mean(0)  # fmt: skip
    assert recall[0] > recall[1] + 0.1, recall


def test_a_video_moves_the_subject_and_keeps_its_category(pocket, judge):
    adapter = MotionAdapter.from_pretrained(POCKET, subfolder="motion_adapter", dtype=torch.float32)
    pipe = AnimateDiffSSRPipeline.from_pipe(pocket, motion_adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    some = references()[:3]
    subjects = [pipe.encode_subject(image, query).scaled(1.0) for image, query in some]
    videos = draw(pipe, [f"a {query} on the beach" for _, query in some], subject=subjects, num_frames=8)
    assert np.median([rise(video[0], video[4]) for video in videos]) >= 8
    queried = np.array([CATEGORY_NAMES.index(query) for _, query in some])
    shown = np.stack([judge.look_at(videos[:, frame]).categories.argmax(1).numpy() for frame in (0, 7)])
    assert (shown == queried).mean() >= 0.75, (shown, queried)


def test_tokenizer_files_for_old_and_new_transformers_agree(tmp_path):
    """transformers before 5 reads `vocab.json` and `merges.txt`, newer ones `tokenizer.json`."""
    import shutil

    from transformers import CLIPTokenizer

    from tools.pocket.train.assemble import split_tokenizer

    shutil.copy(POCKET / "tokenizer" / "tokenizer.json", tmp_path)
    split_tokenizer(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (POCKET / "tokenizer" / name).read_bytes() == (tmp_path / name).read_bytes()
    shipped = CLIPTokenizer.from_pretrained(POCKET, subfolder="tokenizer")
    older = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=32)
    for text in ("a brown dog with a hat on the beach", "", "Ünknown 12, words!"):
        assert older(text).input_ids == shipped(text).input_ids
