"""SSR beside everything else that draws with Stable Diffusion 1.5: every pipeline class, ControlNet, AnimateDiff."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from conftest import call_args, make_components, make_image_processor, make_picture, make_ssr_components, make_unet
from diffusers import ControlNetModel, DiffusionPipeline, LCMScheduler, MotionAdapter, T2IAdapter
from diffusers.models import SparseControlNetModel
from diffusers.pipelines.stable_diffusion import CLIPImageProjection
from diffusers_ssr import ssr_pipeline_class
from diffusers_ssr.mixin_ssr import _UNSUITABLE
from PIL import Image
from test_attention_processors import snapshot
from transformers import CLIPProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection


SIZE = 16
LEFT_HALF = np.tile(np.arange(SIZE) < SIZE // 2, (SIZE, 1)).astype(np.float32)
VIDEO = [make_picture(seed, (SIZE, SIZE)) for seed in range(3)]


def randomised(model):
    """A ControlNet or motion adapter is made with zeros where it joins the UNet, which would hide it."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.2, generator=generator)
    return model.eval()


def make_controlnet(seed: int = 3, **config) -> ControlNetModel:
    torch.manual_seed(seed)
    sizes = {
        "in_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "conditioning_embedding_out_channels": (8, 16),
        "norm_num_groups": 4,
    }
    return randomised(ControlNetModel(**{**sizes, **config}))


def make_sparse_controlnet() -> SparseControlNetModel:
    torch.manual_seed(4)
    return randomised(
        SparseControlNetModel(
            in_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            cross_attention_dim=32,
            attention_head_dim=2,
            conditioning_channels=3,
            conditioning_embedding_out_channels=(8, 16),
            norm_num_groups=4,
            motion_num_attention_heads=2,
            use_simplified_condition_embedding=False,
        )
    )


def make_motion_adapter(**config) -> MotionAdapter:
    torch.manual_seed(6)
    sizes = {
        "block_out_channels": (8, 16),
        "motion_layers_per_block": 1,
        "motion_norm_num_groups": 4,
        "motion_num_attention_heads": 2,
        "motion_max_seq_length": 32,
    }
    return randomised(MotionAdapter(**{**sizes, **config}))


def make_t2i_adapter() -> T2IAdapter:
    torch.manual_seed(7)
    return T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2).eval()


def make_ldm3d_vae():
    torch.manual_seed(8)
    config = {**make_components()["vae"].config, "in_channels": 6, "out_channels": 6}
    return diffusers.AutoencoderKL(**{k: v for k, v in config.items() if not k.startswith("_")}).eval()


def make_gligen_text_image() -> dict:
    torch.manual_seed(10)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, projection_dim=32, image_size=32, patch_size=8)
    return {
        "unet": make_unet(attention_type="gated-text-image"),
        "image_encoder": CLIPVisionModelWithProjection(vision).eval(),
        "image_project": CLIPImageProjection(hidden_size=32).eval(),
        "processor": CLIPProcessor(make_image_processor(), make_components()["tokenizer"]),
    }


def make_lcm() -> dict:
    scheduler = LCMScheduler.from_config(make_components()["scheduler"].config, original_inference_steps=50)
    return {"unet": make_unet(time_cond_proj_dim=16), "scheduler": scheduler}


def picture() -> Image.Image:
    return make_picture(11, (SIZE, SIZE))


def tensor(*shape) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(9))


IMG2IMG = {"image": picture(), "strength": 0.9}
INPAINT = {**IMG2IMG, "mask_image": Image.fromarray((LEFT_HALF * 255).astype(np.uint8)), "height": SIZE, "width": SIZE}
CONTROL = {"image": picture()}
PAG = {"pag_scale": 2.0}
VIDEO_ARGS = {"num_frames": 3, "height": SIZE, "width": SIZE}

# name of diffusers' class: components beside the stock pipeline's, arguments beside the prompt's
CHAINS = {
    "AnimateDiffControlNetPipeline": (
        lambda: {"motion_adapter": make_motion_adapter(), "controlnet": make_controlnet()},
        {**VIDEO_ARGS, "conditioning_frames": VIDEO},
    ),
    "AnimateDiffPAGPipeline": (lambda: {"motion_adapter": make_motion_adapter()}, {**VIDEO_ARGS, **PAG}),
    "AnimateDiffPipeline": (lambda: {"motion_adapter": make_motion_adapter()}, VIDEO_ARGS),
    "AnimateDiffSparseControlNetPipeline": (
        lambda: {"motion_adapter": make_motion_adapter(), "controlnet": make_sparse_controlnet()},
        {**VIDEO_ARGS, "conditioning_frames": VIDEO[:1], "controlnet_frame_indices": [0]},
    ),
    "AnimateDiffVideoToVideoControlNetPipeline": (
        lambda: {"motion_adapter": make_motion_adapter(), "controlnet": make_controlnet()},
        {"video": VIDEO, "conditioning_frames": VIDEO, "height": SIZE, "width": SIZE},
    ),
    "AnimateDiffVideoToVideoPipeline": (
        lambda: {"motion_adapter": make_motion_adapter()},
        {"video": VIDEO, "height": SIZE, "width": SIZE},
    ),
    "LatentConsistencyModelImg2ImgPipeline": (make_lcm, {**IMG2IMG, "num_inference_steps": 4}),
    "LatentConsistencyModelPipeline": (make_lcm, {}),
    "PIAPipeline": (
        lambda: {"motion_adapter": make_motion_adapter(conv_in_channels=9)},
        {**VIDEO_ARGS, "image": picture()},
    ),
    "StableDiffusionAdapterPipeline": (lambda: {"adapter": make_t2i_adapter()}, CONTROL),
    "StableDiffusionControlNetImg2ImgPipeline": (
        lambda: {"controlnet": make_controlnet()},
        {**IMG2IMG, "control_image": picture()},
    ),
    "StableDiffusionControlNetInpaintPipeline": (
        lambda: {"controlnet": make_controlnet()},
        {**INPAINT, "control_image": picture()},
    ),
    "StableDiffusionControlNetPAGInpaintPipeline": (
        lambda: {"controlnet": make_controlnet()},
        {**INPAINT, **PAG, "control_image": picture()},
    ),
    "StableDiffusionControlNetPAGPipeline": (lambda: {"controlnet": make_controlnet()}, {**CONTROL, **PAG}),
    "StableDiffusionControlNetPipeline": (lambda: {"controlnet": make_controlnet()}, CONTROL),
    "StableDiffusionGLIGENPipeline": (
        lambda: {"unet": make_unet(attention_type="gated")},
        {"gligen_phrases": ["a cat"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]], "height": SIZE, "width": SIZE},
    ),
    "StableDiffusionGLIGENTextImagePipeline": (
        make_gligen_text_image,
        {
            "gligen_phrases": ["a cat"],
            "gligen_images": [picture()],
            "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]],
            "height": SIZE,
            "width": SIZE,
        },
    ),
    "StableDiffusionImg2ImgPipeline": (dict, IMG2IMG),
    "StableDiffusionInpaintPipeline": (dict, INPAINT),
    "StableDiffusionInstructPix2PixPipeline": (lambda: {"unet": make_unet(in_channels=8)}, {"image": picture()}),
    "StableDiffusionLDM3DPipeline": (lambda: {"vae": make_ldm3d_vae()}, {}),
    "StableDiffusionModelEditingPipeline": (dict, {}),
    "StableDiffusionPAGImg2ImgPipeline": (dict, {**IMG2IMG, **PAG}),
    "StableDiffusionPAGInpaintPipeline": (dict, {**INPAINT, **PAG}),
    "StableDiffusionPAGPipeline": (dict, PAG),
    "StableDiffusionPipeline": (dict, {}),
    "StableDiffusionSAGPipeline": (dict, {"sag_scale": 0.5}),
}

# pipelines with a UNet and a text encoder that are not Stable Diffusion 1.5's
OTHER_MODELS = (
    "AltDiffusion", "AudioLDM", "BlipDiffusion", "DreamLite", "I2VGenXL", "IF", "Kandinsky", "Marigold", "MusicLDM",
    "StableDiffusionDepth2Img", "StableDiffusionLatentUpscale", "StableDiffusionUpscale", "StableUnCLIP",
    "TextToVideoSD", "UniDiffuser", "VideoToVideoSD",
)  # fmt: skip


def make_pipeline(name: str):
    """The stock pipeline and its SSR version, made of the same parts."""
    stock_class = getattr(diffusers, name)
    extra, _ = CHAINS[name]
    taken = inspect.signature(stock_class.__init__).parameters
    parts = {key: part for key, part in {**make_components(), **extra()}.items() if key in taken}
    if "requires_safety_checker" in taken:
        parts["requires_safety_checker"] = False
    stock = stock_class(**parts)
    if "unet" in stock.components:
        parts["unet"] = stock.unet  # with AnimateDiff a UNetMotionModel by now
    pipe = ssr_pipeline_class(stock_class)(**parts, **make_ssr_components())
    for each in (stock, pipe):
        each.set_progress_bar_config(disable=True)
    return stock, pipe


def draw(pipe, name: str, **overrides) -> np.ndarray:
    arguments = call_args(**{**CHAINS[name][1], **overrides})
    output = pipe(**arguments)
    output = output.frames if hasattr(output, "frames") else output.rgb if hasattr(output, "rgb") else output.images
    return np.asarray(output)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CHAINS)
def test_every_pipeline(name):
    """A subject changes the picture; without one it is the stock pipeline's, to the bit; the UNet stays what it was."""
    stock, pipe = make_pipeline(name)
    state = snapshot(pipe.unet)
    expected = draw(stock, name)
    assert np.array_equal(draw(pipe, name), expected)
    subject = pipe.encode_subject(make_picture(), "cat").scaled(1.0)
    with_subject = draw(pipe, name, subject=subject)
    assert with_subject.shape == expected.shape and np.isfinite(with_subject).all()
    assert np.abs(with_subject - expected).max() > 1e-3
    np.testing.assert_allclose(draw(pipe, name, subject=subject.scaled(0.0)), expected, atol=1e-5)
    assert snapshot(pipe.unet) == state
    assert np.array_equal(draw(stock, name), expected)


def test_every_pipeline_of_diffusers_is_accounted_for():
    for name in dir(diffusers):
        found = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
            continue
        parts = set(inspect.signature(found.__init__).parameters)
        if {"unet", "text_encoder", "tokenizer"} <= parts and "text_encoder_2" not in parts:
            assert name in CHAINS or name in _UNSUITABLE or name.startswith(OTHER_MODELS), name
