"""Tests of SSR-Encoder with every pipeline class for Stable Diffusion 1.5, with ControlNet and with AnimateDiff."""

import importlib.util
import inspect
import sys
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from conftest import (
    call_args,
    make_components,
    make_image_processor,
    make_picture,
    make_ssr_components,
    make_unet,
    snapshot,
)
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    LCMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    T2IAdapter,
    UNetMotionModel,
)
from diffusers.models import SparseControlNetModel
from diffusers.pipelines.stable_diffusion import CLIPImageProjection
from diffusers_ssr import (
    AnimateDiffSSRPipeline,
    StableDiffusionSSRControlNetPipeline,
    StableDiffusionSSRPipeline,
    arguments_ssr,
    ssr_pipeline_class,
)
from diffusers_ssr.pipeline_classes_ssr import _UNSUITABLE
from packaging import version
from PIL import Image
from transformers import CLIPProcessor, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection


SIZE = 16
LEFT_HALF = np.tile(np.arange(SIZE) < SIZE // 2, (SIZE, 1)).astype(np.float32)
VIDEO = [make_picture(seed, (SIZE, SIZE)) for seed in range(3)]


def randomised(model):
    """Replaces parameters that are zero with random values, because new ControlNets and motion adapters have no
    effect."""
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

# name of the diffusers class -> (additional components, additional arguments of the call)
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
}

# prefixes of pipelines that have a UNet and a text encoder but are not for Stable Diffusion 1.5
OTHER_MODELS = (
    "AltDiffusion", "AudioLDM", "BlipDiffusion", "DreamLite", "I2VGenXL", "IF", "Kandinsky", "Marigold", "MusicLDM",
    "StableDiffusionDepth2Img", "StableDiffusionLatentUpscale", "StableDiffusionUpscale", "StableUnCLIP",
    "TextToVideoSD", "UniDiffuser", "VideoToVideoSD",
)  # fmt: skip


ONE_PROMPT = (
    "AnimateDiffControlNetPipeline",
    "AnimateDiffVideoToVideoControlNetPipeline",
    "AnimateDiffVideoToVideoPipeline",
    "PIAPipeline",
)
TWO_PICTURES = ("StableDiffusionAdapterPipeline", "StableDiffusionInstructPix2PixPipeline")


def make_pipeline(name: str):
    """Creates the stock pipeline and its SSR version from the same components."""
    # a class that a newer diffusers has renamed is an error, not a skipped test
    if not hasattr(diffusers, name) and version.parse(diffusers.__version__) < version.parse("0.42"):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name} yet")
    stock_class = getattr(diffusers, name)
    extra, _ = CHAINS[name]
    taken = inspect.signature(stock_class.__init__).parameters
    parts = {key: part for key, part in {**make_components(), **extra()}.items() if key in taken}
    if "requires_safety_checker" in taken:
        parts["requires_safety_checker"] = False
    stock = stock_class(**parts)
    if "unet" in stock.components:
        parts["unet"] = stock.unet  # AnimateDiff converts it to a UNetMotionModel
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
    """A subject changes the image. Without a subject the image is exactly equal to that of the stock pipeline. The
    UNet is not changed."""
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


def test_subject_end_requires_a_pipeline_with_callbacks():
    _, pipe = make_pipeline("StableDiffusionGLIGENPipeline")
    subject = pipe.encode_subject(make_picture(), "cat")
    with pytest.raises(ValueError, match="need a pipeline with `callback_on_step_end`"):
        draw(pipe, "StableDiffusionGLIGENPipeline", subject=subject, subject_end=0.5)


def diffusers_pipelines() -> dict[str, type]:
    """Returns every pipeline class of diffusers with a UNet, a text encoder and a tokenizer."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Pipeline")}
    pipelines = {
        n: each for n, each in found.items() if isinstance(each, type) and issubclass(each, DiffusionPipeline)
    }
    parts = {name: set(inspect.signature(each.__init__).parameters) for name, each in pipelines.items()}
    return {name: each for name, each in pipelines.items() if {"unet", "text_encoder", "tokenizer"} <= parts[name]}


def test_every_diffusers_pipeline_is_listed():
    for name, found in diffusers_pipelines().items():
        if "text_encoder_2" not in inspect.signature(found.__init__).parameters:
            assert name in CHAINS or name in _UNSUITABLE or name.startswith(OTHER_MODELS), name


@pytest.mark.parametrize("name", [name for name in diffusers_pipelines() if name not in CHAINS])
def test_pipelines_of_other_models_raise_an_error(name):
    with pytest.raises(ValueError, match=f"`pipeline_class`.*{name}"):
        ssr_pipeline_class(getattr(diffusers, name))


class ByKeywords(StableDiffusionPipeline):
    def __call__(self, prompt, **kwargs):
        return super().__call__(prompt, **kwargs)


class WithoutAnnotations(StableDiffusionPipeline):
    def __init__(self, vae, text_encoder, tokenizer, unet, scheduler):
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)


class WithTexts(StableDiffusionPipeline):
    def __init__(self, vae, text_encoder: "CLIPTextModel", tokenizer, unet: "UNet2DConditionModel", scheduler):  # noqa: F821
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)


class OptionalModels(StableDiffusionPipeline):
    def __init__(self, vae, text_encoder: CLIPTextModel | None, tokenizer, unet: int | UNetMotionModel, scheduler):
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)


@pytest.mark.parametrize("own", [ByKeywords, WithoutAnnotations, WithTexts, OptionalModels])
def test_pipelines_of_users_are_accepted(own):
    assert issubclass(ssr_pipeline_class(own), own)


@pytest.mark.parametrize("call", ["options", "keywords", "named"])
def test_calls_of_users_with_variadic_arguments_get_all_of_them(pipe, call):
    def options_call(self, prompt, **options):
        return diffusers.StableDiffusionPipeline.__call__(self, prompt, **options)

    def keywords_call(self, prompt=None, *, num_inference_steps=1, **kwargs):
        return diffusers.StableDiffusionPipeline.__call__(
            self, prompt, num_inference_steps=num_inference_steps, **kwargs
        )

    def named_call(self, *args, **rest):
        return diffusers.StableDiffusionPipeline.__call__(self, *args, **rest)

    calls = {"options": options_call, "keywords": keywords_call, "named": named_call}
    mine = type("Mine", (diffusers.StableDiffusionPipeline,), {"__call__": calls[call]})
    own = ssr_pipeline_class(mine)(**pipe.components)
    own.set_progress_bar_config(disable=True)
    for subject in (None, pipe.encode_subject(make_picture(), "cat")):
        expected = pipe(**call_args(subject=subject)).images
        assert np.array_equal(own(**call_args(subject=subject)).images, expected)
    if call == "named":
        with pytest.raises(ValueError, match=r"takes `\*args`.*by name"):
            own("a cat", subject=subject)


@pytest.mark.parametrize("name", CHAINS)
def test_each_prompt_uses_its_own_subject(name):
    """In a batch of two, each image depends only on its own subject."""
    if name in ONE_PROMPT:
        pytest.skip("the diffusers class only accepts a single prompt; test_every_pipeline covers it")
    _, pipe = make_pipeline(name)
    cat, dog = (s.scaled(1.0) for s in pipe.encode_subject(make_picture(), query=["cat", "dog"]))
    several = {"image": [picture(), picture()]} if name in TWO_PICTURES else {}

    def pair(first, second):
        seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        return draw(pipe, name, prompt=["a cat", "a dog"], subject=[first, second], generator=seeds, **several)

    both, cats, dogs = pair(cat, dog), pair(cat, cat), pair(dog, dog)
    np.testing.assert_allclose(both[0], cats[0], atol=1e-5)
    np.testing.assert_allclose(both[1], dogs[1], atol=1e-5)
    assert np.abs(cats - dogs).reshape(2, -1).max(1).min() > 1e-4


def test_ssr_pipeline_class_returns_the_same_class_again():
    first = ssr_pipeline_class(diffusers.StableDiffusionImg2ImgPipeline)
    assert first is ssr_pipeline_class(diffusers.StableDiffusionImg2ImgPipeline)
    assert ssr_pipeline_class(StableDiffusionSSRPipeline) is StableDiffusionSSRPipeline
    assert first.__name__ == "SSRStableDiffusionImg2ImgPipeline"
    assert "subject_image" in inspect.signature(first.__call__).parameters


@pytest.mark.parametrize(
    "wrong,message",
    [
        (diffusers.UNet2DConditionModel, "has to be a pipeline class"),
        ("StableDiffusionPipeline", "has to be a pipeline class"),
        (diffusers.StableDiffusionXLPipeline, "Stable Diffusion 1.5, but StableDiffusionXLPipeline"),
        (diffusers.StableDiffusionDiffEditPipeline, "cannot be used with a subject"),
    ],
)
def test_unsupported_pipeline_classes_raise_an_error(wrong, message):
    with pytest.raises(ValueError, match=f"`pipeline_class`.*{message}"):
        ssr_pipeline_class(wrong)


def test_pipeline_of_a_created_class_can_be_saved_and_loaded(tmp_path):
    name = "StableDiffusionImg2ImgPipeline"
    _, pipe = make_pipeline(name)
    subject = pipe.encode_subject(make_picture(), "cat")
    expected = draw(pipe, name, subject=subject)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    again.set_progress_bar_config(disable=True)
    assert type(again).__name__ == type(pipe).__name__
    assert np.array_equal(draw(again, name, subject_image=make_picture(), subject_query="cat"), expected)


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_from_pipe_in_both_directions(pipe, name):
    subject = pipe.encode_subject(make_picture(), "cat")
    expected = pipe(**call_args(subject=subject)).images
    other = ssr_pipeline_class(getattr(diffusers, name)).from_pipe(pipe)
    assert other.unet is pipe.unet and other.ssr_encoder is pipe.ssr_encoder
    other.set_progress_bar_config(disable=True)
    assert np.isfinite(draw(other, name, subject=subject)).all()
    back = StableDiffusionSSRPipeline.from_pipe(other)
    back.set_progress_bar_config(disable=True)
    assert np.array_equal(back(**call_args(subject=subject)).images, expected)


# ControlNet


@pytest.fixture
def control_pipe(pipe):
    pipe = StableDiffusionSSRControlNetPipeline.from_pipe(pipe, controlnet=make_controlnet())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def watch_text(controlnet) -> list[torch.Tensor]:
    """Records the `encoder_hidden_states` that the ControlNet receives after all hooks."""
    seen, forward = [], controlnet.forward

    def watched(*args, **kwargs):
        seen.append(args[2] if len(args) > 2 else kwargs["encoder_hidden_states"])
        return forward(*args, **kwargs)

    controlnet.forward = watched
    return seen


def control_args(**overrides) -> dict:
    return call_args(**{"image": picture(), **overrides})


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("guess_mode", [False, True])
def test_controlnet_only_receives_the_text_by_default(control_pipe, guidance_scale, guess_mode):
    pipe = control_pipe
    seen = watch_text(pipe.controlnet)
    subject = pipe.encode_subject(make_picture(), "cat")
    arguments = {"guidance_scale": guidance_scale, "guess_mode": guess_mode}
    texts, pictures = [], []
    for extra in ({}, {"subject": subject}, {"subject": subject, "subject_in_controlnet": True}):
        seen.clear()
        pictures.append(pipe(**control_args(**arguments, **extra)).images)
        texts.append(seen[0])
    assert torch.equal(texts[0], texts[1])
    length = texts[0].shape[1]
    assert torch.equal(texts[2][:, :length], texts[0])
    own = subject.subjects[0]
    branches = [own.negative_embeds, own.embeds] if guidance_scale > 1 and not guess_mode else [own.embeds]
    torch.testing.assert_close(texts[2][:, length:], torch.cat(branches))
    assert min(np.abs(a - b).max() for a, b in zip(pictures, pictures[1:], strict=False)) > 1e-4
    seen.clear()
    assert np.array_equal(pipe(**control_args(**arguments, subject=subject)).images, pictures[1])
    assert torch.equal(seen[0], texts[0])


@pytest.mark.parametrize("start, end, with_subject", [(0.5, 1.0, [0, 0, 1, 1]), (0.0, 0.5, [1, 1, 0, 0])])
def test_outside_the_window_a_controlnet_gets_only_the_text(control_pipe, start, end, with_subject):
    seen = watch_text(control_pipe.controlnet)
    subject = control_pipe.encode_subject(make_picture(), "cat")
    arguments = {"subject_start": start, "subject_end": end, "num_inference_steps": 4}
    control_pipe(**control_args(subject=subject, subject_in_controlnet=True, **arguments))
    length, added = control_pipe.tokenizer.model_max_length, subject.subjects[0].embeds.shape[1]
    assert [text.shape[1] for text in seen] == [length + added * each for each in with_subject]


@pytest.mark.parametrize("name", ["StableDiffusionInpaintPipeline", "StableDiffusionControlNetInpaintPipeline"])
def test_regions_are_not_used_with_a_crop_of_the_image(name):
    """`padding_mask_crop` generates the part of the image around the mask, where a region would be in another place."""
    _, pipe = make_pipeline(name)
    subject = pipe.encode_subject(make_picture(), "cat")
    whole, crop = picture(), {"padding_mask_crop": 2, "output_type": "pil"}
    arguments = {**crop, "mask_image": Image.fromarray((LEFT_HALF * 255).astype(np.uint8)), "image": whole}
    draw(pipe, name, subject=subject, **arguments)
    with pytest.raises(ValueError, match="`subject` has a region of the whole image, but `padding_mask_crop`"):
        draw(pipe, name, subject=subject.inside(LEFT_HALF), **arguments)


def test_a_callback_can_replace_the_controlnet(control_pipe):
    subject, others = control_pipe.encode_subject(make_picture(), "cat"), [make_controlnet(7), make_controlnet(8)]
    seen = [watch_text(net) for net in (control_pipe.controlnet, *others)]
    nets = iter(others)

    def callback(pipeline, step, timestep, kwargs):
        pipeline.controlnet = next(nets, pipeline.controlnet)
        return kwargs

    arguments = {"callback_on_step_end": callback, "num_inference_steps": 3}
    control_pipe(**control_args(subject=subject, subject_in_controlnet=True, **arguments))
    longer = control_pipe.tokenizer.model_max_length + subject.subjects[0].embeds.shape[1]
    assert [[text.shape[1] for text in each] for each in seen] == [[longer]] * 3
    assert not any(net._forward_pre_hooks for net in (*others, control_pipe.controlnet))


def test_from_pipe_keeps_the_dtype(pipe):
    pipe.to(torch.bfloat16)
    other = StableDiffusionSSRControlNetPipeline.from_pipe(pipe, controlnet=make_controlnet())
    for name in ("unet", "vae", "text_encoder", "ssr_encoder", "controlnet"):
        assert getattr(other, name).dtype == torch.bfloat16, name
    assert StableDiffusionSSRPipeline.from_pipe(other, dtype=torch.float32).unet.dtype == torch.float32
    if "torch.float32" not in inspect.getsource(DiffusionPipeline.from_pipe):
        return  # older versions of diffusers do not convert different dtypes
    pipe.unet.to(torch.float16)  # diffusers converts mixed dtypes to a dtype that can represent all of them
    assert StableDiffusionSSRPipeline.from_pipe(pipe).unet.dtype == torch.float32


def test_several_controlnets(pipe):
    """With `subject_in_controlnet`, each ControlNet receives the subject once."""
    nets = [make_controlnet(3), make_controlnet(12)]
    pipe = StableDiffusionSSRControlNetPipeline.from_pipe(pipe, controlnet=nets)
    pipe.set_progress_bar_config(disable=True)
    subject = pipe.encode_subject(make_picture(), "cat")
    seen = [watch_text(net) for net in nets]
    arguments = {"image": [picture(), picture()], "subject": subject}
    alone = pipe(**control_args(**arguments)).images
    both = pipe(**control_args(**arguments, subject_in_controlnet=True)).images
    assert np.abs(alone - both).max() > 1e-4
    length = 4 * pipe.tokenizer.model_max_length
    assert all(texts[-1].shape[1] == length for texts in seen)


@pytest.mark.parametrize("fails", [False, True])
def test_controlnet_is_not_changed_by_a_call(control_pipe, fails):
    subject = control_pipe.encode_subject(make_picture(), "cat")
    weights = {name: each.clone() for name, each in control_pipe.controlnet.state_dict().items()}

    def callback(pipeline, step, timestep, kwargs):
        if fails:
            raise KeyboardInterrupt
        return kwargs

    arguments = control_args(subject=subject, subject_in_controlnet=True, callback_on_step_end=callback)
    try:
        control_pipe(**arguments)
    except KeyboardInterrupt:
        assert fails
    assert not control_pipe.controlnet._forward_pre_hooks
    assert all(torch.equal(each, weights[name]) for name, each in control_pipe.controlnet.state_dict().items())


def test_control_image_is_resized_as_in_the_stock_pipeline(control_pipe):
    stock = diffusers.StableDiffusionControlNetPipeline.from_pipe(control_pipe)
    stock.set_progress_bar_config(disable=True)
    arguments = {"image": make_picture(11, (40, 24)), "height": SIZE, "width": SIZE}
    expected = stock(**control_args(**arguments)).images
    assert expected.shape == (1, SIZE, SIZE, 3)
    assert np.array_equal(control_pipe(**control_args(**arguments)).images, expected)
    subject = control_pipe.encode_subject(make_picture(), "cat")
    assert control_pipe(**control_args(**arguments, subject=subject)).images.shape == expected.shape


@pytest.mark.parametrize(
    "arguments,message",
    [
        (
            {"subject_in_controlnet": True, "subject": "both"},
            "`subject_in_controlnet` needs the same number of subjects",
        ),
        ({"subject_in_controlnet": True, "subject": "compact"}, "`subject_in_controlnet` needs a subject with all"),
    ],
)
def test_invalid_input_with_a_controlnet(control_pipe, arguments, message):
    cat, dog = control_pipe.encode_subject(make_picture(), query=["cat", "dog"])
    subject = {"both": [cat, cat + dog], "compact": cat.compact(9), None: cat}[arguments.pop("subject", None)]
    prompt = ["a cat", "a cat and a dog"] if isinstance(subject, list) else "a cat"
    with pytest.raises(ValueError, match=message):
        control_pipe(**control_args(prompt=prompt, subject=subject, **arguments))


def test_subject_in_controlnet_requires_a_controlnet(pipe):
    with pytest.raises(ValueError, match="`subject_in_controlnet` is True, but StableDiffusionSSRPipeline has no"):
        pipe(**call_args(subject=pipe.encode_subject(make_picture(), "cat"), subject_in_controlnet=True))


def test_missing_encoder_raises_an_error(control_pipe):
    subject = control_pipe.encode_subject(make_picture(), "cat")
    control_pipe.unload_ssr()
    with pytest.raises(ValueError, match="call `load_ssr`"):
        control_pipe(**control_args(subject=subject))


# AnimateDiff


@pytest.fixture
def video_pipe(pipe):
    pipe = AnimateDiffSSRPipeline.from_pipe(pipe, motion_adapter=make_motion_adapter())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video_args(**overrides) -> dict:
    return call_args(**{**VIDEO_ARGS, **overrides})


@pytest.mark.parametrize("region", [None, LEFT_HALF])
def test_frames_without_motion_equal_images(pipe, region):
    """If the motion modules have no effect, the frames are equal to images from the same noise."""
    adapter = make_motion_adapter()
    for name, parameter in adapter.named_parameters():
        if "proj_out" in name:
            parameter.data.zero_()
    subject = pipe.encode_subject(make_picture(), "cat").scaled(0.9)
    subject = subject if region is None else subject.inside(region)
    latents = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    frames = latents[0].transpose(0, 1)
    expected = pipe(**call_args(prompt=["a cat"] * 3, subject=subject, latents=frames)).images
    video = AnimateDiffSSRPipeline.from_pipe(pipe, motion_adapter=adapter)
    video.set_progress_bar_config(disable=True)
    drawn = video(**video_args(prompt="a cat", subject=subject, latents=latents)).frames[0]
    np.testing.assert_allclose(drawn, expected, atol=2e-5)


def test_motion_modules_are_not_changed(video_pipe):
    """They have no hooks, and a call does not change their weights."""
    hooked = set()
    block = video_pipe.unet.get_submodule("mid_block.attentions.0")
    block.register_forward_pre_hook(
        lambda *_: hooked.update(n for n, m in video_pipe.unet.named_modules() if m._forward_hooks)
    )
    weights = {name: each.clone() for name, each in video_pipe.unet.state_dict().items()}
    video_pipe(**video_args(subject=video_pipe.encode_subject(make_picture(), "cat")))
    assert sum(name.endswith("attn2") for name in hooked) == 4
    assert not any("motion_modules" in name for name in hooked)
    assert all(torch.equal(each, weights[name]) for name, each in video_pipe.unet.state_dict().items())


def test_subject_memory_does_not_depend_on_the_number_of_frames(video_pipe, monkeypatch):
    lengths = {}
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, *args, **kwargs):
        if key.shape[2] == 3 * video_pipe.tokenizer.model_max_length:
            lengths.setdefault(frames, set()).add(tuple(key.shape))
        return original(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    subject = video_pipe.encode_subject(make_picture(), "cat")
    for frames in (1, 2, 8):
        video_pipe(**video_args(subject=subject, num_frames=frames))
    assert lengths[1] == lengths[2] == lengths[8]


@pytest.mark.parametrize("setting", ["FreeInit", "FreeNoise", "window", "subjects", "control"])
def test_video_settings(video_pipe, setting):
    """Each setting changes the video, and the subject still has an effect."""
    cat, dog = (s.scaled(1.0) for s in video_pipe.encode_subject(make_picture(), query=["cat", "dog"]))
    pipe, arguments, subject = video_pipe, {"num_frames": 8}, cat
    before = pipe(**video_args(**arguments, subject=subject)).frames
    if setting == "FreeInit":
        pipe.enable_free_init(num_iters=2)
    elif setting == "FreeNoise":
        pipe.enable_free_noise(context_length=4, context_stride=2)
    elif setting == "window":
        arguments["subject_end"] = 0.5
    elif setting == "subjects":
        subject = cat.inside(LEFT_HALF) + dog.inside(1 - LEFT_HALF)
    elif setting == "control":
        pipe = ssr_pipeline_class(diffusers.AnimateDiffControlNetPipeline).from_pipe(
            pipe, controlnet=make_controlnet(), motion_adapter=pipe.motion_adapter
        )
        pipe.set_progress_bar_config(disable=True)
        arguments["conditioning_frames"] = [picture()] * 8
    state = snapshot(pipe.unet)
    after = pipe(**video_args(**arguments, subject=subject)).frames
    without = pipe(**video_args(**{key: each for key, each in arguments.items() if key != "subject_end"})).frames
    assert np.abs(after - before).max() > 1e-5 and np.abs(after - without).max() > 1e-4
    assert snapshot(pipe.unet) == state


def test_a_window_that_the_short_passes_of_freeinit_do_not_contain(video_pipe):
    subject = video_pipe.encode_subject(make_picture(), "cat")
    window = {"num_inference_steps": 6, "subject_start": 0.6, "subject_end": 0.8}
    video_pipe.enable_free_init(num_iters=3, use_fast_sampling=True)
    without = video_pipe(**video_args(num_inference_steps=6)).frames
    assert np.abs(video_pipe(**video_args(subject=subject, **window)).frames - without).max() > 1e-5
    with pytest.raises(ValueError, match="are between two steps.*: 3 steps"):
        video_pipe(**video_args(subject=subject, **{**window, "num_inference_steps": 3, "subject_start": 0.7}))


# Moving subjects


def without_motion(adapter):
    """Sets the motion modules of an adapter to have no effect, so that the frames are independent of each other."""
    for name, parameter in adapter.named_parameters():
        if "proj_out" in name:
            parameter.data.zero_()
    return adapter


@pytest.fixture
def frame_by_frame(pipe):
    """Returns a function that generates a video without motion from `subject` and its frames as images from
    `subjects`."""
    video = AnimateDiffSSRPipeline.from_pipe(pipe, motion_adapter=without_motion(make_motion_adapter()))
    video.set_progress_bar_config(disable=True)

    def draw(subject, subjects, **kwargs):
        latents = torch.randn(1, 4, len(subjects), 8, 8, generator=torch.Generator().manual_seed(1))
        frames = latents[0].transpose(0, 1)
        pictures = pipe(**call_args(prompt=["a cat"] * len(subjects), subject=subjects, latents=frames, **kwargs))
        arguments = {"num_frames": len(subjects), "latents": latents, **kwargs}
        return video(**video_args(prompt="a cat", subject=subject, **arguments)).frames[0], pictures.images

    return draw


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_moving_region(pipe, frame_by_frame, guidance_scale):
    """One subject has a region mask for each frame, and the other one has no region."""
    cat, dog = (s.scaled(0.9) for s in pipe.encode_subject(make_picture(), query=["cat", "dog"]))
    masks = np.zeros((4, 8, 8), np.float32)
    for frame in range(4):
        masks[frame, :, 2 * frame : 2 * frame + 2] = 1
    each = [cat.inside(mask) + dog for mask in masks]
    video, pictures = frame_by_frame(cat.inside(masks) + dog, each, guidance_scale=guidance_scale)
    np.testing.assert_allclose(video, pictures, atol=2e-5)


def test_subjects_at_keyframes(pipe, frame_by_frame):
    """A frame at a keyframe uses its subject, frames between keyframes interpolate, and later frames use the last
    one."""
    cat, dog = (s.scaled(0.9) for s in pipe.encode_subject(make_picture(), query=["cat", "dog"]))
    video, pictures = frame_by_frame({0: cat, 2: dog}, [cat, cat, dog, dog])
    np.testing.assert_allclose(video[[0, 2, 3]], pictures[[0, 2, 3]], atol=2e-5)
    between = video[1]
    blended = replace(
        cat.subjects[0],
        **{
            name: (getattr(cat.subjects[0], name) + getattr(dog.subjects[0], name)) / 2
            for name in ("embeds", "negative_embeds")
        },
    )
    half = replace(cat, subjects=(blended,))
    _, pictures = frame_by_frame(half, [half] * 4)
    np.testing.assert_allclose(between, pictures[1], atol=2e-5)


def test_a_subject_fades_out(pipe, frame_by_frame):
    cat = pipe.encode_subject(make_picture(), "cat").scaled(0.8)
    video, pictures = frame_by_frame({0: cat, 2: None}, [cat, cat.scaled(0.4), None, None])
    np.testing.assert_allclose(video[[0, 2, 3]], pictures[[0, 2, 3]], atol=2e-5)
    assert np.abs(video[1] - video[0]).max() > 1e-5


def test_several_subjects_with_regions_at_keyframes(pipe, frame_by_frame):
    """Each frame uses the region of the nearest keyframe."""
    cat, dog = (s.scaled(0.9) for s in pipe.encode_subject(make_picture(), query=["cat", "dog"]))
    left, right = LEFT_HALF, 1 - LEFT_HALF
    first, last = cat.inside(left) + dog.inside(right), cat.inside(right) + dog.inside(left)
    video, pictures = frame_by_frame({0: first, 3: last}, [first, first, last, last])
    np.testing.assert_allclose(video, pictures, atol=2e-5)
    assert np.abs(video[1] - video[2]).max() > 1e-4


@pytest.mark.parametrize("order", [1, -1])
def test_region_at_only_one_keyframe(pipe, frame_by_frame, order):
    """A subject without a region at one keyframe and with a region at another."""
    cat = pipe.encode_subject(make_picture(), "cat").scaled(0.9)
    first, last = (cat, cat.inside(LEFT_HALF))[::order]
    video, pictures = frame_by_frame({0: first, 3: last}, [first, first, last, last])
    np.testing.assert_allclose(video, pictures, atol=2e-5)
    assert np.abs(video[1] - video[2]).max() > 1e-4


def test_keyframes_for_each_prompt(pipe):
    """Two prompts with one video each, with different keyframes for each prompt or with the same keyframes for
    both."""
    cat, dog = (s.scaled(0.9) for s in pipe.encode_subject(make_picture(), query=["cat", "dog"]))
    video = AnimateDiffSSRPipeline.from_pipe(pipe, motion_adapter=make_motion_adapter())
    video.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    moves = [{0: cat, 2: dog}, {0: dog, 2: None}]
    both = video(**video_args(prompt=["a", "b"], subject=moves, latents=latents)).frames
    shared = video(**video_args(prompt=["a", "b"], subject=moves[0], latents=latents)).frames
    for index, prompt in enumerate("ab"):
        one = {"prompt": prompt, "latents": latents[index : index + 1]}
        alone = video(**video_args(**one, subject=moves[index])).frames[0]
        np.testing.assert_allclose(both[index], alone, atol=5e-5)
        np.testing.assert_allclose(shared[index], video(**video_args(**one, subject=moves[0])).frames[0], atol=5e-5)


@pytest.mark.parametrize(
    "subject,message",
    [
        (lambda cat: {0: cat, 3: cat}, r"keyframes at \[0, 3\], but the video has 3 frames, 0 to 2"),
        (lambda cat: {5: cat}, r"keyframes at \[5\], but the video has 3 frames"),
        (lambda cat: {True: cat}, "subjects by frame"),
        (lambda cat: {-1: cat}, "subjects by frame, 0 the first"),
        (lambda cat: {"0": cat}, "subjects by frame"),
        (lambda cat: {}, "subjects by frame"),
        (lambda cat: {0: cat, 2: "dog"}, "a SubjectEmbeds, a dict of them by frame.* but holds str"),
        (lambda cat: {0: cat, 2: cat + cat}, "the same numbers of subjects and tokens"),
        (lambda cat: {0: cat.compact(5), 2: cat.compact(5)}, "compact"),
        (lambda cat: {0: None, 2: None}, "only None"),
        (lambda cat: cat.inside(np.ones((2, 8, 8))), "a region of 2 masks, one for each frame, but the video has 3"),
    ],
)
def test_invalid_moving_subjects_raise_an_error_before_the_first_step(video_pipe, subject, message):
    cat, steps = video_pipe.encode_subject(make_picture(), "cat"), []
    video_pipe.unet.register_forward_pre_hook(lambda *_: steps.append(1))
    with pytest.raises(ValueError, match=message):
        video_pipe(**video_args(subject=subject(cat)))
    assert not steps


LATENT_VIDEOS = {
    "latents": {},
    "latents and video=None": {"video": None},
    "latents, with edges": {"video": None, "conditioning_frames": VIDEO},
    "latents, and the subject in the ControlNet": {
        "video": None, "conditioning_frames": VIDEO, "subject_in_controlnet": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("given", LATENT_VIDEOS.values(), ids=LATENT_VIDEOS)
def test_a_video_can_be_given_as_latents(pipe, given):
    """The number of frames is that of the latents, with any subject that moves."""
    controlnet = {"controlnet": make_controlnet()} if "conditioning_frames" in given else {}
    name = f"AnimateDiffVideoToVideo{'ControlNet' if controlnet else ''}Pipeline"
    video_class = ssr_pipeline_class(getattr(diffusers, name))
    video = video_class.from_pipe(pipe, motion_adapter=make_motion_adapter(), **controlnet)
    video.set_progress_bar_config(disable=True)
    cat, dog = pipe.encode_subject(make_picture(), query=["cat", "dog"])
    latents = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    size = {"height": SIZE, "width": SIZE}

    def draw(**changes):
        return video(**{**call_args(), **size, "latents": latents, "strength": 1.0, **given, **changes}).frames

    without = draw(subject_in_controlnet=False)
    subjects = [cat] if given.get("subject_in_controlnet") else [cat, {0: cat, 2: dog}, cat.inside(np.ones((3, 8, 8)))]
    for subject in subjects:
        frames = draw(subject=subject)
        assert frames.shape[1] == 3 and np.abs(frames - without).max() > 1e-4
    if not given.get("subject_in_controlnet"):
        with pytest.raises(ValueError, match="the video has 3 frames"):
            draw(subject={0: cat, 5: dog})


def test_image_pipeline_does_not_accept_moving_subjects(pipe):
    cat = pipe.encode_subject(make_picture(), "cat")
    for subject in ({0: cat, 2: cat}, cat.inside(np.ones((2, 8, 8)))):
        with pytest.raises(ValueError, match="an image has only frame 0"):
            pipe(**call_args(subject=subject))


def test_keyframes_for_one_prompt_and_none_for_another(pipe):
    """`None` and a subject without keyframes stay the same in all frames. Keyframes can be numpy integers."""
    cat, dog = (s.scaled(0.9) for s in pipe.encode_subject(make_picture(), query=["cat", "dog"]))
    video = AnimateDiffSSRPipeline.from_pipe(pipe, motion_adapter=make_motion_adapter())
    video.set_progress_bar_config(disable=True)
    latents = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    subjects = [dict(zip(np.array([0, 2]), (cat, dog), strict=True)), None, dog]
    together = video(**video_args(prompt=["a", "b", "c"], subject=subjects, latents=latents)).frames
    for index, prompt in enumerate("abc"):
        one = {"prompt": prompt, "latents": latents[index : index + 1], "subject": subjects[index]}
        np.testing.assert_allclose(together[index], video(**video_args(**one)).frames[0], atol=5e-5)
    with pytest.raises(ValueError, match="compact"):
        video(**video_args(prompt=["a", "b"], subject=[{0: cat, 2: dog}, dog.compact(4)]))


@pytest.mark.parametrize("kind", ["list", "array", "tensor", "batch of arrays", "batch of tensors", "list of lists"])
def test_moving_subjects_with_each_kind_of_input_video(kind):
    frames = [make_picture(seed, (64, 64)) for seed in range(3)]
    array = np.stack([np.asarray(frame) for frame in frames]).astype(np.float32) / 255
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    given = {
        "list": frames, "array": array, "tensor": tensor, "batch of arrays": array[None],
        "batch of tensors": tensor[None], "list of lists": [frames],
    }  # fmt: skip
    assert arguments_ssr.num_frames(lambda video=None: 0, {"video": given[kind]}) == 3
    assert arguments_ssr.num_frames(lambda video=None, num_frames=16: 0, {"video": given[kind]}) == 16


def test_all_prompts_need_the_same_keyframes(video_pipe):
    cat = video_pipe.encode_subject(make_picture(), "cat")
    with pytest.raises(ValueError, match="the same keyframes for all prompts"):
        video_pipe(**video_args(prompt=["a", "b"], subject=[{0: cat, 2: cat}, {0: cat, 1: cat}]))


def test_free_noise_split_inference_raises_an_error(video_pipe):
    """Split inference does not split the subject with the frames. IP-Adapters of diffusers also fail with it."""
    video_pipe.enable_free_noise(context_length=4, context_stride=2)
    video_pipe.enable_free_noise_split_inference(temporal_split_size=4, spatial_split_size=4)
    with pytest.raises(ValueError, match="split inference"):
        video_pipe(**video_args(subject=video_pipe.encode_subject(make_picture(), "cat"), num_frames=8))


def test_incompatible_motion_adapter_raises_an_error(pipe):
    with pytest.raises(ValueError, match="Motion Adapter"):
        AnimateDiffSSRPipeline.from_pipe(pipe, motion_adapter=make_motion_adapter(block_out_channels=(8, 16, 16)))


ANNOTATIONS_AS_TEXTS = """
from __future__ import annotations

import diffusers
from diffusers import StableDiffusionPipeline
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers_ssr import SSRPipelineMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection


class Mine(StableDiffusionPipeline):
    def __init__(self, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer,
                 unet: UNet2DConditionModel, scheduler: KarrasDiffusionSchedulers,
                 safety_checker: StableDiffusionSafetyChecker, feature_extractor: CLIPImageProcessor,
                 image_encoder: CLIPVisionModelWithProjection = None, requires_safety_checker: bool = False):
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor,
                         image_encoder, requires_safety_checker)


class Own(SSRPipelineMixin, Mine):
    pass
"""


@pytest.mark.parametrize("made", [True, False], ids=["ssr_pipeline_class", "own class"])
def test_annotations_that_are_texts(pipe, tmp_path, monkeypatch, made):
    """As in files that begin with `from __future__ import annotations`, for example of community pipelines."""
    (tmp_path / "mine.py").write_text(ANNOTATIONS_AS_TEXTS)
    spec = importlib.util.spec_from_file_location("mine_with_texts", tmp_path / "mine.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    own = (ssr_pipeline_class(module.Mine) if made else module.Own).from_pipe(pipe)
    own.set_progress_bar_config(disable=True)
    subject = pipe.encode_subject(make_picture(), "cat")
    assert own.ssr_encoder is pipe.ssr_encoder
    assert np.array_equal(own(**call_args(subject=subject)).images, pipe(**call_args(subject=subject)).images)


def test_a_class_without_call_is_rejected():
    own = type("WithoutCall", (DiffusionPipeline,), {"__init__": StableDiffusionPipeline.__init__})
    with pytest.raises(ValueError, match="`pipeline_class` has to be a pipeline with a `__call__`.*WithoutCall"):
        ssr_pipeline_class(own)
