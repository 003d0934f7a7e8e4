"""Measures whether the queried subject is generated with ControlNet, in videos, and with another checkpoint."""

import functools

import cv2
import numpy as np
import torch
from diffusers import ControlNetModel, MotionAdapter, UNet2DConditionModel
from diffusers_ssr import AnimateDiffSSRPipeline, StableDiffusionSSRControlNetPipeline

from ..pictures import edges, is_framed, without_look
from ..world import draw_scene
from .references import References, share


def edge_agreement(drawn: np.ndarray, control: np.ndarray) -> tuple[float, float]:
    """Returns precision and recall of the edges of an image compared with the control image, with a tolerance of
    one pixel."""
    found, wanted = edges(drawn)[..., 0] > 0, control[..., 0] > 0
    near = [cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0 for mask in (wanted, found)]
    return float(near[0][found].mean()) if found.any() else 0.0, float(near[1][wanted].mean())


def rise(low: np.ndarray, high: np.ndarray) -> int:
    """Returns by how many pixels the middle of the image `low` is higher in the image `high`."""
    reach = 20
    box = low[24:56, 12:52].astype(np.float32)
    errors = [np.abs(high[24 - up : 56 - up, 12:52] - box).mean() for up in range(reach + 1)]
    return int(np.argmin(errors))


def controlnet(refs: References) -> None:
    """Measures which methods follow the edges of another instance of the queried category at another position."""
    controlnet = ControlNetModel.from_pretrained(refs.args.checkpoint, subfolder="controlnet", dtype=torch.float32)
    controlnet.to(refs.args.device)
    pipe = StableDiffusionSSRControlNetPipeline.from_pipe(refs.pipe, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(2)
    controls = []
    for category, place in zip(refs.wanted("category"), refs.places, strict=True):
        pool = [instance for instance in refs.held_out if instance.category == category]
        shift = (int(rng.integers(-12, 13)), int(rng.integers(-18, 7)))
        scene = draw_scene(refs.world, rng, [pool[rng.integers(len(pool))]], int(place), shift=shift)
        controls.append(edges(scene.picture))
    refs.columns.append(np.stack(controls))
    images = list(torch.from_numpy(np.stack(controls)).permute(0, 3, 1, 2).float() / 255)
    subjects = refs.encode(0)
    for naming, categories in (("a thing", None), ("its category", refs.wanted("category"))):
        for method, given, drawing, extra in (
            ("with SSR and ControlNet", subjects, pipe, {"image": images}),
            ("with ControlNet alone", None, pipe, {"image": images}),
            ("with SSR alone", subjects, refs.pipe, {}),
        ):
            pictures = refs.draw(refs.prompts(categories), given, method, drawing, **extra)
            agreement = np.array([edge_agreement(p, c) for p, c in zip(pictures, controls, strict=True)])
            precision, recall = agreement.mean(0)
            print(f"edges of another instance, the prompt names {naming}, {method} ({len(pictures)} images):")
            refs.report_queried(refs.judge.look_at(pictures))
            print(f"  edges of the control found in it:      {100 * recall:.1f} %")
            print(f"  its edges that are in the control:     {100 * precision:.1f} %")


def video(refs: References) -> None:
    """Measures whether videos show the queried subject in the first and in the last frame, and whether it moves."""
    adapter = MotionAdapter.from_pretrained(refs.args.checkpoint, subfolder="motion_adapter", dtype=torch.float32)
    adapter.to(refs.args.device)
    pipe = AnimateDiffSSRPipeline.from_pipe(refs.pipe, motion_adapter=adapter).to(refs.args.device)
    pipe.set_progress_bar_config(disable=True)
    pipe = functools.partial(pipe, num_frames=8)
    subjects = refs.encode(0)
    for method, given in (("with SSR", subjects), ("without", None)):
        videos = refs.draw(refs.prompts(None), given, f"videos {method}", pipe)
        for frame in (0, 7):
            print(f'videos, "a thing", {method}, frame {frame + 1} of 8 ({len(videos)} videos):')
            refs.report_queried(refs.judge.look_at(videos[:, frame]))
        rises = np.array([rise(video[0], video[4]) for video in videos])
        change = np.abs(videos[:, 4].astype(np.float32) - videos[:, 0]).mean() / 255
        print(f"  frame 5 against frame 1: mean change of a pixel {100 * change:.1f} % of its range,")
        print(f"  the subject is {np.median(rises):.0f} pixels higher (median); at least 8 in {share(rises >= 8)}")


def look(refs: References) -> None:
    """Measures whether another UNet with the same SSR-Encoder keeps its own look and shows the queried subject."""
    unet = UNet2DConditionModel.from_pretrained(refs.args.checkpoint, subfolder="unet", dtype=torch.float32)
    unet.to(refs.args.device)
    pipe = type(refs.pipe).from_pipe(refs.pipe, unet=unet)
    pipe.load_lora_weights(f"{refs.args.checkpoint}/look")
    pipe.fuse_lora()
    pipe.set_progress_bar_config(disable=True)
    subjects = refs.encode(0)
    for method, given, drawing, as_scenes in (
        ("the second UNet with SSR", subjects, pipe, without_look),
        ("the second UNet without", None, pipe, without_look),
        ("the base with SSR", subjects, refs.pipe, lambda pictures: pictures),
    ):
        pictures = refs.draw(refs.prompts(None), given, method, drawing)
        print(f'"a thing", generated by {method} ({len(pictures)} images):')
        refs.report_queried(refs.judge.look_at(as_scenes(pictures)))
        print(f"  a white frame around it:               {share(is_framed(pictures))}")
