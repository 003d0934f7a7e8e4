import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from conftest import (
    UNET_LAYERS,
    call_args,
    make_components,
    make_image_encoder,
    make_picture,
    make_ssr_components,
    make_ssr_encoder,
    make_unet,
    snapshot,
)
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers_ssr import StableDiffusionSSRPipeline, SubjectEmbeds, hooks_ssr, request_ssr
from diffusers_ssr.subject_embeds_ssr import Subject


def stock_of(pipe) -> StableDiffusionPipeline:
    """Returns a stock pipeline with the same components."""
    components = {name: part for name, part in pipe.components.items() if not name.startswith("ssr_")}
    stock = StableDiffusionPipeline(**components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    return stock


def subject_args(**overrides):
    return call_args(**{"subject_image": make_picture(), "subject_query": "cat", "subject_scale": 1.0, **overrides})


def test_without_a_subject_the_image_is_the_stock_image(pipe):
    assert np.array_equal(pipe(**call_args()).images, stock_of(pipe)(**call_args()).images)


def test_the_subject_changes_the_image_but_not_the_unet(pipe):
    stock = stock_of(pipe)
    before, state = stock(**call_args()).images, snapshot(pipe.unet)
    images = pipe(**subject_args()).images
    assert snapshot(pipe.unet) == state
    assert np.array_equal(stock(**call_args()).images, before)
    assert np.abs(images - before).max() > 1e-2


@pytest.mark.parametrize(
    "change", [{"subject_query": "dog"}, {"subject_image": make_picture(5)}, {"subject_scale": 0.3}]
)
def test_query_image_and_scale_change_the_result(pipe, change):
    difference = pipe(**subject_args()).images - pipe(**subject_args(**change)).images
    assert np.abs(difference).max() > 1e-4


def test_scale_zero_gives_the_stock_image(pipe):
    np.testing.assert_allclose(
        pipe(**subject_args(subject_scale=0.0)).images, stock_of(pipe)(**call_args()).images, atol=1e-6
    )


@pytest.mark.parametrize("scale", [0, 0.0, {"up": 0.0}])
def test_scale_zero_computes_no_keys_and_values(pipe, monkeypatch, scale):
    cat = pipe.encode_subject(make_picture(), "cat")
    expected = stock_of(pipe)(**call_args()).images
    monkeypatch.setattr(request_ssr.SubjectRequest, "conditions", None)
    assert np.array_equal(pipe(**call_args(subject=cat, subject_scale=scale)).images, expected)
    assert np.array_equal(pipe(**call_args(subject=cat.scaled(0), subject_scale=1.0)).images, expected)
    with pytest.raises(TypeError):
        pipe(**call_args(subject=cat, subject_scale=0.5))


def test_an_encoded_subject_gives_the_same_image(pipe):
    subject = pipe.encode_subject(make_picture(), query="cat")
    arguments = call_args(subject=subject, subject_scale=1.0)
    assert np.array_equal(pipe(**arguments).images, pipe(**subject_args()).images)


def test_encode_subject_agrees_with_separate_calls_of_the_encoders(pipe):
    """The unconditional branch uses an image of zeros and the empty query."""
    from diffusers_ssr.images_ssr import preprocess

    subject = pipe.encode_subject(make_picture(), query="cat")
    pixels = preprocess(make_picture(), pipe.ssr_image_processor)
    (subject,) = subject.subjects
    for embeds, text, seen in (
        (subject.embeds, "cat", pixels),
        (subject.negative_embeds, "", torch.zeros_like(pixels)),
    ):
        ids = pipe.tokenizer(text, padding="max_length", max_length=pipe.tokenizer.model_max_length).input_ids
        with torch.no_grad():
            query = pipe.text_encoder(torch.tensor([ids]))[0]
            hidden_states = pipe.ssr_image_encoder(seen, output_hidden_states=True).hidden_states
            expected = pipe.ssr_encoder(query, [hidden_states[level] for level in (1, 2, 3)])
        torch.testing.assert_close(embeds, expected)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_conditions_contain_both_branches_in_order(pipe, guidance_scale):
    subject = pipe.encode_subject(make_picture(), query="cat")
    seen = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(hooks_ssr._blocks()[-1].subject.conditions(args[0])),
        with_kwargs=True,
    )
    pipe(**call_args(subject=subject, subject_scale=0.5, guidance_scale=guidance_scale, num_images_per_prompt=2))
    (part,) = subject.subjects
    branches = [part.negative_embeds, part.embeds] if guidance_scale > 1 else [part.embeds]
    expected = pipe.ssr_encoder.project(torch.cat(branches))
    for name, (key, value) in zip(UNET_LAYERS, expected, strict=True):
        torch.testing.assert_close(seen[0].pairs[name][0], key)
        torch.testing.assert_close(seen[0].pairs[name][1], value * 0.5)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("num_images_per_prompt", [1, 2])
def test_a_batch_of_prompts_gives_the_same_images_as_single_calls(pipe, guidance_scale, num_images_per_prompt):
    prompts = ["a cat on the beach", "a dog in the snow"]
    latents = torch.randn(2 * num_images_per_prompt, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    arguments = subject_args(guidance_scale=guidance_scale, generator=None)
    images = pipe(
        **{**arguments, "prompt": prompts, "num_images_per_prompt": num_images_per_prompt, "latents": latents}
    ).images
    for index, image in enumerate(images):
        alone = pipe(
            **{**arguments, "prompt": prompts[index // num_images_per_prompt], "latents": latents[index : index + 1]}
        ).images[0]
        np.testing.assert_allclose(image, alone, atol=2e-5)


def test_prompt_embeds(pipe):
    embeds, negative = pipe.encode_prompt("a cat on the beach", "cpu", 1, True)
    images = pipe(**subject_args(prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative)).images
    np.testing.assert_allclose(images, pipe(**subject_args()).images, atol=1e-6)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_output_types(pipe, output_type, return_dict):
    output = pipe(**subject_args(output_type=output_type, return_dict=return_dict))
    images = output.images if return_dict else output[0]
    assert len(images) == 1
    if output_type == "latent":
        assert images.shape == (1, 4, 8, 8)


def test_a_callback_can_change_the_latents(pipe):
    steps = []

    def callback(pipeline, step, timestep, kwargs):
        steps.append(step)
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 1 else {}

    latents = pipe(**subject_args(callback_on_step_end=callback, output_type="latent")).images
    assert steps == [0, 1] and not latents.any()


def test_an_error_in_a_callback_leaves_the_unet_unchanged(pipe):
    state = snapshot(pipe.unet)

    def callback(*_):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        pipe(**subject_args(callback_on_step_end=callback))
    assert snapshot(pipe.unet) == state


@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_half_precision(pipe, dtype, tolerance):
    # torch before 2.5 samples different noise in half precision
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = pipe.to(dtype)(**subject_args(latents=latents.to(dtype))).images
    assert np.isfinite(images).all()
    expected = StableDiffusionSSRPipeline(**make_components(), **make_ssr_components(), requires_safety_checker=False)
    expected.set_progress_bar_config(disable=True)
    assert np.abs(images - expected(**subject_args(latents=latents)).images).mean() < tolerance


def test_set_ssr_scale_sets_the_default_of_later_calls(pipe):
    pipe.set_ssr_scale(0.3)
    images = pipe(**subject_args(subject_scale=None)).images
    assert np.array_equal(images, pipe(**subject_args(subject_scale=0.3)).images)
    subject = pipe.encode_subject(make_picture(), "cat").scaled(1.0)
    assert np.array_equal(pipe(**call_args(subject=subject)).images, pipe(**subject_args(subject_scale=1.0)).images)


def test_load_and_unload(components, tmp_path):
    parts = make_ssr_components()
    parts["ssr_encoder"].save_pretrained(tmp_path / "ssr_encoder")
    parts["ssr_image_encoder"].save_pretrained(tmp_path / "ssr_image_encoder")
    pipe = StableDiffusionSSRPipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="`load_ssr`"):
        pipe(**subject_args())
    pipe.load_ssr(tmp_path)
    # the folder has no image processor, so it is created from the config of the vision encoder
    assert pipe.ssr_image_processor.crop_size["height"] == 32
    from_folder = pipe(**subject_args()).images

    pipe.unload_ssr()
    assert pipe.ssr_encoder is pipe.ssr_image_encoder is pipe.ssr_image_processor is None
    with pytest.raises(ValueError, match="`load_ssr`"):
        pipe(**subject_args())
    assert np.array_equal(pipe(**call_args()).images, stock_of(pipe)(**call_args()).images)

    pipe.load_ssr(parts["ssr_encoder"], image_encoder=parts["ssr_image_encoder"])
    assert np.array_equal(pipe(**subject_args()).images, from_folder)


def test_from_pipe_both_ways(pipe):
    stock = StableDiffusionPipeline.from_pipe(pipe)
    stock.set_progress_bar_config(disable=True)
    assert np.array_equal(stock(**call_args()).images, pipe(**call_args()).images)
    again = StableDiffusionSSRPipeline.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    assert again.ssr_encoder is pipe.ssr_encoder
    assert np.array_equal(again(**subject_args()).images, pipe(**subject_args()).images)
    assert StableDiffusionSSRPipeline.from_pipe(stock).ssr_encoder is None


@pytest.mark.parametrize("scale", [0.0, 0.9, {"mid": 0.5}])
def test_from_pipe_keeps_the_scale(pipe, scale):
    pipe.set_ssr_scale(scale)
    again = StableDiffusionSSRPipeline.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    own = {"subject_scale": None}
    assert np.array_equal(again(**subject_args(**own)).images, pipe(**subject_args(**own)).images)


def test_a_subject_with_scale_0_has_no_effect_on_the_others(pipe):
    """Alone, together with other subjects, and with a region."""
    cat, dog = pipe.encode_subject(make_picture(), query=["cat", "dog"])
    left = np.zeros((8, 8))
    left[:, :4] = 1
    for with_off, without in (
        (dog.scaled(0.6) + cat.scaled(0.0), dog.scaled(0.6)),
        (cat.scaled(0.0) + dog.scaled(0.6) + cat.scaled(0.3), dog.scaled(0.6) + cat.scaled(0.3)),
        (cat.scaled(0.0).inside(left) + dog.inside(1 - left), dog.inside(1 - left)),
    ):
        drawn = pipe(**call_args(subject=with_off)).images
        assert np.array_equal(drawn, pipe(**call_args(subject=without)).images)
    rows = pipe(**call_args(prompt=["a", "b"], subject=[cat.scaled(0.0), dog.scaled(0.6)], latents=None)).images
    expected = pipe(**call_args(prompt=["a", "b"], subject=[None, dog.scaled(0.6)], latents=None)).images
    assert np.array_equal(rows, expected)


@pytest.mark.parametrize("window", [(0.3, 0.45), (0.95, 1.0), (0.01, 0.2)])
def test_a_window_that_contains_no_step_raises_an_error(pipe, window):
    subject, state = pipe.encode_subject(make_picture(), "cat"), snapshot(pipe.unet)
    arguments = call_args(subject=subject, num_inference_steps=4, subject_start=window[0], subject_end=window[1])
    with pytest.raises(ValueError, match="`subject_start` = .* are between two steps.*: 4 steps"):
        pipe(**arguments)
    assert snapshot(pipe.unet) == state


@pytest.mark.parametrize("attention_kwargs", [None, {"scale": 0.5}])
def test_a_finished_call_keeps_no_models_and_no_tensors_in_memory(pipe, attention_kwargs):
    """The pipeline's attributes after the call are those of a stock call, so that `drop_ssr_encoders` frees the
    encoder."""
    subject = pipe.encode_subject(make_picture(), "cat")
    pipe(**call_args(subject=subject, cross_attention_kwargs=attention_kwargs))
    assert pipe.cross_attention_kwargs == attention_kwargs
    with pytest.raises(ZeroDivisionError):
        pipe(**call_args(subject=subject, callback_on_step_end=lambda *_: 1 / 0))
    assert pipe.cross_attention_kwargs is None
    encoder = weakref.ref(pipe.ssr_encoder)
    pipe.drop_ssr_encoders()
    gc.collect()
    assert encoder() is None


def test_threads_that_share_a_unet(pipe):
    subjects = [pipe.encode_subject(make_picture(seed), "cat").scaled(1.0) for seed in range(3)]
    expected = [pipe(**call_args(subject=subject)).images for subject in subjects]
    # a scheduler stores the state of a call, so each thread has its own scheduler
    pipes = [
        StableDiffusionSSRPipeline.from_pipe(pipe, scheduler=DDIMScheduler.from_config(pipe.scheduler.config))
        for _ in subjects
    ]
    results = {}

    def draw(index):
        pipes[index].set_progress_bar_config(disable=True)
        results[index] = pipes[index](**call_args(subject=subjects[index])).images

    threads = [threading.Thread(target=draw, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, images in enumerate(expected):
        assert np.array_equal(results[index], images)


def test_gradients_are_disabled(pipe):
    subject = pipe.encode_subject(make_picture(), "cat")
    assert not subject.subjects[0].embeds.requires_grad
    assert not pipe(**subject_args(output_type="latent")).images.requires_grad


SUBJECT = SubjectEmbeds((Subject(torch.zeros(1, 6, 32), torch.zeros(1, 6, 32)),))


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"subject_query": "cat"}, "`subject_image` is missing"),
        ({"subject_image": [make_picture(), None], "subject_query": ["cat", None]}, r"missing.*subject=\[cat, None\]"),
        ({"subject_image": make_picture()}, "`subject_query` is missing"),
        ({"subject_image": make_picture(), "subject_query": ""}, "`subject_query` has to be a text.*''"),
        ({"subject_image": make_picture(), "subject_query": "  "}, "`subject_query` has to be a text"),
        ({"subject_image": make_picture(), "subject_query": 3}, "`subject_query` has to be a text.*3"),
        ({"subject_image": "cat.png", "subject_query": "cat"}, "`subject_image` has to be a PIL image.*str"),
        ({"subject_image": np.zeros((4, 4)), "subject_query": "cat"}, r"`subject_image`.*\(4, 4\)"),
        ({"subject_image": np.full((4, 4, 3), 7.0), "subject_query": "cat"}, "`subject_image`.*7"),
        ({"subject_image": torch.zeros(2, 4, 4), "subject_query": "cat"}, r"`subject_image`.*\(2, 4, 4\)"),
        ({"subject_scale": 1.0}, "`subject_scale` is 1.0, but there is no subject"),
        ({"subject_scale": np.array([0.5, 0.5])}, "`subject_scale` is array.*, but there is no subject"),
        ({"subject_start": torch.zeros(2)}, "`subject_start` is tensor.*, but there is no subject"),
        ({"subject_start": 0.5}, "`subject_start` is 0.5, but there is no subject"),
        ({"subject_end": 0.5}, "`subject_end` is 0.5, but there is no subject"),
        ({"subject_in_controlnet": True}, "`subject_in_controlnet` is True, but there is no subject"),
        ({"mask_weight": 3.0}, "`mask_weight` is 3.0, but there is no subject"),
        (
            {"subject_image": make_picture(), "subject_query": "cat", "mask_weight": 3.0},
            "`mask_weight` is 3.0, but there is no mask",
        ),
        (
            {"subject_image": make_picture(), "subject_mask": np.eye(32, 40), "mask_weight": -1},
            "`mask_weight` has to be 0 or more, but is -1",
        ),
        ({"subject": SUBJECT, "num_inference_steps": 0}, "`num_inference_steps` has to be a positive whole number"),
        ({"subject": SUBJECT, "num_inference_steps": -1}, "`num_inference_steps` has to be a positive whole number"),
        ({"subject_resize_mode": "crop"}, "`subject_resize_mode` is 'crop', but there is no subject"),
        ({"subject": SUBJECT, "subject_start": "half"}, "`subject_start` has to be a number"),
        ({"subject": SUBJECT, "subject_end": True}, "`subject_end` has to be a number"),
        ({"subject": SUBJECT, "subject_end": float("nan")}, "`subject_end` has to be a number"),
        ({"subject": SUBJECT, "mask_weight": 3.0}, "`mask_weight` is 3.0, but `subject` is encoded already"),
        ({"subject": SUBJECT, "subject_resize_mode": "a"}, "`subject_resize_mode` is 'a', but `subject` is encoded"),
        ({"subject": SUBJECT, "subject_scale": "strong"}, "`subject_scale` has to be a number.*'strong'"),
        ({"subject": SUBJECT, "subject_scale": float("nan")}, "`subject_scale` has to be a number"),
        ({"subject": SUBJECT, "subject_scale": True}, "`subject_scale` has to be a number"),
        ({"subject": SUBJECT, "subject_query": "cat"}, "either `subject` or `subject_query`"),
        ({"subject": torch.zeros(1, 6, 32)}, "`subject` has to be a SubjectEmbeds.*Tensor"),
        ({"subject": [SUBJECT, SUBJECT]}, r"`subject` as a list.*2 for 1.*cat \+ car"),
        ({"subject": [None, None]}, r"`subject` as a list.*2 for 1"),
        (
            {"subject": SUBJECT, "subject_scale": [0.5, 0.8]},
            r"`subject_scale` has to be a number or a dict.*scaled\(0.5\)",
        ),
        ({"subject": ["cat"]}, "`subject` has to be a SubjectEmbeds.*str"),
        (
            {
                "subject": SUBJECT,
                "ip_adapter_image": make_picture(),
                "ip_adapter_image_embeds": [torch.zeros(1, 1, 4)],
            },
            "either `ip_adapter_image`",
        ),
    ],
)
def test_invalid_arguments_are_rejected_before_any_step(pipe, arguments, message):
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    state = snapshot(pipe.unet)
    with pytest.raises(ValueError, match=message):
        pipe(**call_args(**arguments))
    assert not calls and snapshot(pipe.unet) == state


@pytest.mark.parametrize(
    "scale",
    [
        {"up": {"1": 1.0}},  # without the prefix "block_"
        {"down": {0: 1.0}},
        {"down": {"block_0": {"attentions_0": 1.0}}},
        {"mid": {"attentions_0": 1.0}},
        {"mid": {}},
        {"down": {}},
        {1: 0.5},
        {"down": None},
    ],
)
def test_scales_of_blocks_that_cannot_be_used_are_rejected(pipe, scale):
    before = pipe(**subject_args(subject_scale=None)).images
    with pytest.raises(ValueError, match="`scale`"):
        pipe.set_ssr_scale(scale)
    with pytest.raises(ValueError, match="`subject_scale`"):
        pipe(**subject_args(subject_scale=scale))
    assert np.array_equal(pipe(**subject_args(subject_scale=None)).images, before)


def test_a_scale_that_is_changed_after_it_was_set_is_not_used(pipe):
    scale = {"down": 0.4, "up": {"block_1": [0.8, 0.8]}}
    pipe.set_ssr_scale(scale)
    before = pipe(**subject_args(subject_scale=None)).images
    scale["up"]["block_1"][0] = 0.1
    scale["down"] = 0.9
    assert np.array_equal(pipe(**subject_args(subject_scale=None)).images, before)


def test_another_model_as_ssr_encoder_is_rejected(pipe):
    pipe.ssr_encoder = pipe.unet
    with pytest.raises(ValueError, match="`ssr_encoder` has to be an SSREncoder, but is a UNet2DConditionModel"):
        pipe.encode_subject(make_picture(), "cat")


@pytest.mark.parametrize("scale", ["strong", None, [0.5, 0.5]])
def test_scales_that_are_not_numbers_are_rejected(pipe, scale):
    with pytest.raises(ValueError, match="`scale` has to be a number"):
        pipe.set_ssr_scale(scale)
    with pytest.raises(ValueError, match="`scale` has to be a number"):
        SUBJECT.scaled(scale)


@pytest.mark.parametrize(
    "unet,encoder,message",
    [
        ({"cross_attention_dim": 64}, {}, "over text of width 32.*over 64"),
        ({"block_out_channels": (16, 16)}, {}, "8 wide.*is 16 wide"),
        ({"down_block_types": ("DownBlock2D",) * 2}, {}, "no such layer"),
        ({}, {"cross_attention_dim": 48}, "text encoder of width 48.*32"),
        ({}, {"vision_hidden_size": 20}, "width 20.*24 wide"),
        ({}, {"image_levels": (1, 2, 9)}, "only 3 layers"),
    ],
    ids=["text width, as SD 2 and SDXL", "layer width", "layer missing", "text encoder", "vision width", "levels"],
)
def test_an_encoder_that_does_not_fit_is_rejected(components, unet, encoder, message):
    components["unet"] = make_unet(**unet)
    pipe = StableDiffusionSSRPipeline(**components, requires_safety_checker=False)
    with pytest.raises(ValueError, match=message):
        pipe.load_ssr(make_ssr_encoder(**encoder), image_encoder=make_image_encoder())
    assert pipe.ssr_encoder is None
    pipe.register_modules(**make_ssr_components(**encoder))
    with pytest.raises(ValueError, match=message):
        pipe(**subject_args())


def test_a_unet_that_does_not_fit_an_encoded_subject_is_rejected(pipe):
    subject = pipe.encode_subject(make_picture(), "cat")
    pipe.register_modules(unet=make_unet(cross_attention_dim=64))
    with pytest.raises(ValueError, match="over text of width 32, but it is 8 wide over 64"):
        pipe(**call_args(subject=subject))


def test_an_encoder_in_memory_needs_an_image_encoder(pipe):
    with pytest.raises(ValueError, match="`image_encoder` has to be given"):
        pipe.load_ssr(make_ssr_encoder())
