"""From a call's subjects to what the layers attend to, without a pipeline around it."""

import torch
from conftest import make_ssr_encoder
from diffusers_ssr import SubjectEmbeds
from diffusers_ssr.subject_embeds import Subject
from diffusers_ssr.subject_request import SubjectRequest, SubjectRow


LEFT = torch.tensor([[1.0, 0.0], [1.0, 0.0]])


def embeds_of(seed: int = 0, num_tokens: int = 3, **more) -> SubjectEmbeds:
    generator = torch.Generator().manual_seed(seed)
    embeds, negative_embeds = torch.randn(2, 1, num_tokens, 32, generator=generator)
    return SubjectEmbeds((Subject(embeds, negative_embeds, **more),))


def request_of(*rows: SubjectRow, num_pictures: int = 1, scale=1.0, num_frames: int = 1) -> SubjectRequest:
    known = {1: (True,), 2: (False, True)}
    return SubjectRequest(
        list(rows), num_pictures, make_ssr_encoder(), torch.float32, scale, known.__getitem__, num_frames
    )


def test_both_branches_of_guidance_are_kept_to_the_region():
    row = SubjectRow((embeds_of(region=LEFT),))
    (negative,), (positive,) = request_of(row).conditions(torch.zeros(2, 4, 8, 8)).regions
    assert torch.equal(negative, LEFT[None]) and torch.equal(positive, LEFT[None])
