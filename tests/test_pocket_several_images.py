"""The measurements of several images of one subject, and of a subject that is not wanted, with a few references and
steps."""

import argparse

import numpy as np
import pytest
import torch
from conftest import POCKET
from diffusers_ssr import SubjectEmbeds

from tools.pocket.judge import Verdict
from tools.pocket.measure import several_images
from tools.pocket.measure.references import References
from tools.pocket.world import CATEGORY_NAMES, DESIGNS, NUM_VARIANTS, SPRITE_SIZE, Instance, World


pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {
    "checkpoint": str(POCKET),
    "num_references": 2,
    "seed": 0,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "eta": 0.9,
    "scale": 1.0,
    "batch_size": 2,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def refs(tmp_path_factory) -> References:
    """References of red discs."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "designs").mkdir()
    (folder / "designs" / "others.json").write_text("{}")
    y, x = np.mgrid[:SPRITE_SIZE, :SPRITE_SIZE] - SPRITE_SIZE / 2
    disc = np.zeros((SPRITE_SIZE, SPRITE_SIZE, 4), np.uint8)
    disc[np.hypot(x, y) < 28] = (220, 30, 30, 255)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "_load_square", lambda world, design, code: disc)
        return References(argparse.Namespace(**SETTINGS, work_dir=folder, choosing=False))


def test_images(refs, capsys):
    """The same image twice is the same subject, both as a mean and with all tokens in one softmax."""
    subjects = refs.encode(0)
    several_images._images(refs, "1 image", [subjects])
    pair = [subjects, subjects]
    several_images._images(refs, "2 images", pair, lambda verdict: {"a cat": verdict.categories[:, 0].numpy() > 0})
    one, mean, tokens = (pictures.astype(int) for pictures in refs.columns[-3:])
    assert np.abs(mean - one).max() <= 1 and np.abs(tokens - one).max() <= 1 and one.std() > 10
    printed = capsys.readouterr().out
    assert 'from 2 images, all tokens (384), "a thing" (2 images)' in printed
    assert printed.count("  a cat:") == 2 and "all tokens against the mean: +0.0 points" in printed


def test_joined_has_the_tokens_of_all_images(refs):
    first, second = refs.encode(0), refs.encode(1)
    subject = several_images.joined([first[0], second[0]]).subjects[0]
    for name in ("embeds", "negative_embeds"):
        parts = [getattr(each[0].subjects[0], name) for each in (first, second)]
        assert torch.equal(getattr(subject, name), torch.cat(parts, 1))
    mean = SubjectEmbeds.mean([first[0], second[0]]).subjects[0]
    assert subject.embeds.shape[1] == 2 * mean.embeds.shape[1]


def test_an_unwanted_instance(refs, capsys, monkeypatch):
    """The instance that is generated without a negative subject has the hue and the design of the image without it."""
    monkeypatch.setattr(several_images, "SCALES", (1.0,))
    several_images._unwanted_instance(refs.of(tuple(i for i in refs.held_out if i.hue is not None), 2))
    blocks = capsys.readouterr().out.split("no `subject`")[1:]
    assert len(blocks) == 4 and "the instance generated without is unwanted; no negative subject" in blocks[2]
    for figure in ("hue within 30 degrees of the unwanted", "hue within 30 degrees of that without"):
        assert f"{figure}:" in blocks[2] and "100.0 %" in blocks[2].split(f"{figure}:")[1].splitlines()[0]


def test_log_probability():
    shape = (2, len(CATEGORY_NAMES))
    verdict = Verdict(
        torch.zeros(shape), torch.zeros(2, 6), torch.zeros(*shape, len(DESIGNS)), torch.zeros(*shape, NUM_VARIANTS)
    )
    verdict.variants[0, 3, 5] = verdict.designs[1, 4, 2] = 3
    queried, wrong = [Instance(3, 0, 5), Instance(4, 1, 7)], [Instance(3, 0, 6), Instance(4, 2, 7)]
    own, other = (several_images._log_probability(verdict, each) for each in (queried, wrong))
    assert np.allclose(own - other, [3, -3])
