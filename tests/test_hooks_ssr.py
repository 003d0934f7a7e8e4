"""The hooks in the UNet during a call with a subject: with wrapped UNets, different output sizes, batches that change,
and other calls that use the same UNet."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import UNET_LAYERS, call_args, make_picture, make_ssr_encoder, make_unet, snapshot
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LEditsPPPipelineStableDiffusion,
    StableDiffusionPipeline,
)
from diffusers.callbacks import IPAdapterScaleCutoffCallback, MultiPipelineCallbacks, SDCFGCutoffCallback
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers_ssr import StableDiffusionSSRPipeline, hooks_ssr, internals_ssr, ssr_pipeline_class, subject_in_unet
from diffusers_ssr.attention_processors import SubjectConditions
from diffusers_ssr.hooks_ssr import find_unet
from peft import LoraConfig, get_peft_model
from test_ip_adapter import fresh_pipe, ip_args, load
from torch import nn


def other_pipe(pipe, cls=StableDiffusionSSRPipeline):
    """Returns a pipeline with the same components and a new scheduler."""
    other = cls.from_pipe(pipe, scheduler=DDIMScheduler.from_config(pipe.scheduler.config))
    other.set_progress_bar_config(disable=True)
    return other


@pytest.fixture
def subject(pipe):
    return pipe.encode_subject(make_picture(), "cat").scaled(1.0)


# When hooks are in the UNet


def conditions_of(encoder, seed: int = 0) -> SubjectConditions:
    embeds = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return SubjectConditions(dict(zip(encoder.config.attention_layers, encoder.project(embeds), strict=True)))


def forward(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 5, 32)))
    with torch.no_grad():
        return unet(latents, 1, text).sample


@pytest.mark.parametrize("fails", [False, True])
def test_the_subject_acts_inside_the_block_alone(fails):
    unet, encoder = make_unet(), make_ssr_encoder()
    before, stock = snapshot(unet), forward(unet)
    try:
        with subject_in_unet(unet, encoder, conditions_of(encoder)):
            assert (forward(unet) - stock).abs().max() > 1e-4
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert snapshot(unet) == before and torch.equal(forward(unet), stock)


def test_blocks_are_nested_by_thread():
    """The innermost block counts. Another thread has the stock UNet, and the blocks of one thread do not end those of
    another."""
    unet, encoder = make_unet(), make_ssr_encoder()
    stock, results = forward(unet), []
    with subject_in_unet(unet, encoder, conditions_of(encoder, 0)):
        outer = forward(unet)
        with subject_in_unet(unet, encoder, conditions_of(encoder, 1)):
            inner = forward(unet)
        assert torch.equal(forward(unet), outer) and not torch.equal(inner, outer)

        def work():
            results.append(forward(unet))
            with subject_in_unet(unet, encoder, conditions_of(encoder, 1)):
                results.append(forward(unet))
            results.append(forward(unet))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert torch.equal(forward(unet), outer)
    assert [torch.equal(a, b) for a, b in zip(results, (stock, inner, stock), strict=True)] == [True] * 3


@pytest.mark.parametrize("depth", [2, (1, 3)])
def test_transformers_with_several_blocks(depth):
    """Each layer of a transformer with several blocks gets its own keys and values."""
    unet = make_unet(transformer_layers_per_block=depth)
    names = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    encoder = make_ssr_encoder(attention_layers={name: unet.get_submodule(name).inner_dim for name in names})
    stock, conditions = forward(unet), conditions_of(encoder)
    for name in names:
        with subject_in_unet(unet, encoder, replace(conditions, pairs={name: conditions.pairs[name]})):
            assert (forward(unet) - stock).abs().max() > 1e-5, name


@pytest.mark.parametrize("name", ["mid_block.attentions.0.transformer_blocks.0.attn2", list(UNET_LAYERS)[0]])
@pytest.mark.parametrize("blocks", [1, 2])
def test_layers_without_a_subject_are_stock(name, blocks, caplog):
    """An encoder may be for some of the UNet's transformers, and for some layers of a transformer."""
    unet = make_unet(transformer_layers_per_block=blocks)
    encoder, stock = (
        make_ssr_encoder(attention_layers={name: unet.get_submodule(name).to_q.in_features}),
        forward(unet),
    )
    with subject_in_unet(unet, encoder, conditions_of(encoder)):
        assert (forward(unet) - stock).abs().max() > 1e-5
    assert "not expected" not in caplog.text


def test_the_unet_is_stock_in_every_callback(pipe, subject):
    before, stock, seen = snapshot(pipe.unet), forward(pipe.unet), []

    def callback(pipe, step, timestep, callback_kwargs):
        seen.append(torch.equal(forward(pipe.unet), stock))
        return callback_kwargs

    pipe(**call_args(subject=subject, callback_on_step_end=callback, subject_end=0.5, num_inference_steps=4))
    assert seen == [True] * 4 and snapshot(pipe.unet) == before


def test_a_step_registers_no_hooks(pipe, subject, monkeypatch):
    """The hooks are registered once for a call."""
    counts = []
    original = internals_ssr.set_forward_hooks
    monkeypatch.setattr(internals_ssr, "set_forward_hooks", lambda *args: counts.append(1) or original(*args))
    for steps in (1, 4):
        counts.clear()
        pipe(**call_args(subject=subject, num_inference_steps=steps))
        # the layer, its two projections, and its transformer; and the UNet
        assert len(counts) == 4 * len(UNET_LAYERS) + 1


def test_attention_processors_set_in_a_callback_are_used_and_kept(pipe, subject):
    class Louder(AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return 50 * super().__call__(*args, **kwargs)

    name = "mid_block.attentions.0.transformer_blocks.0.attn2.processor"
    processors = {**pipe.unet.attn_processors, name: Louder()}
    plain = pipe(**call_args(subject=subject)).images

    def callback(pipe, step, timestep, callback_kwargs):
        pipe.unet.set_attn_processor(dict(processors))
        return callback_kwargs

    changed = pipe(**call_args(subject=subject, callback_on_step_end=callback)).images
    assert np.abs(changed - plain).max() > 1e-4
    assert pipe.unet.attn_processors == processors
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    assert np.array_equal(pipe(**call_args(subject=subject)).images, plain)


@pytest.mark.parametrize("with_subject", [False, True])
def test_ip_adapter_scale_cutoff_callback(with_subject):
    pipe = fresh_pipe()
    for what in ("ip", "ssr"):
        load(pipe, what)
    extra = {"subject": pipe.encode_subject(make_picture(), "cat").scaled(1.0)} if with_subject else {}
    without = pipe(**ip_args(**extra)).images
    callback = IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    cut = pipe(**ip_args(**extra, callback_on_step_end=callback)).images
    assert np.abs(cut - without).max() > 1e-4


def test_a_callback_can_replace_the_unet(pipe, subject):
    """The next steps use the other UNet, also with the subject."""
    other, first = make_unet(seed=5), pipe.unet
    before = [snapshot(unet) for unet in (first, other)]
    passes = []
    other.register_forward_hook(lambda *_: passes.append(1))

    def callback(pipe, step, timestep, callback_kwargs):
        pipe.unet = other
        return callback_kwargs

    with_subject = pipe(**call_args(subject=subject, num_inference_steps=3, callback_on_step_end=callback)).images
    pipe.unet = first
    weak = pipe(
        **call_args(subject=subject.scaled(0.001), num_inference_steps=3, callback_on_step_end=callback)
    ).images
    assert len(passes) == 4 and np.abs(with_subject - weak).max() > 1e-4
    assert snapshot(first) == before[0]
    assert [h for each in snapshot(other)[2][1:] for h in each] == [h for each in before[1][2][1:] for h in each]


def test_a_callback_can_change_cross_attention_kwargs(pipe, subject):
    """The subject still has an effect."""
    expected = pipe(**call_args(subject=subject)).images

    def callback(pipe, step, timestep, callback_kwargs):
        pipe._cross_attention_kwargs = {"scale": 1.0}
        return callback_kwargs

    assert np.array_equal(pipe(**call_args(subject=subject, callback_on_step_end=callback)).images, expected)


@pytest.mark.parametrize("with_subject", [False, True])
def test_user_defined_cross_attention_kwargs_reach_the_unet(pipe, subject, with_subject):
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    extra = {"subject": subject} if with_subject else {}
    pipe(**call_args(cross_attention_kwargs={"scale": 0.5}, **extra))
    assert [each["cross_attention_kwargs"]["scale"] for each in seen] == [0.5, 0.5]


def test_a_call_that_does_not_run_its_unet_raises_an_error(pipe, subject):
    class Cached(Passing):
        """A wrapper that does not run the UNet."""

        def forward(self, sample, timestep, encoder_hidden_states=None, **kwargs):
            return (torch.zeros_like(sample),)

    pipe.unet = Cached(pipe.unet)
    with pytest.raises(ValueError, match="generated without its subject.*Cached"):
        pipe(**call_args(subject=subject))


def test_a_wrapper_that_drops_cross_attention_kwargs(pipe, subject):
    class Dropping(Passing):
        def forward(self, sample, timestep, encoder_hidden_states=None, **kwargs):
            return self.inner(sample, timestep, encoder_hidden_states, return_dict=False)

    expected = pipe(**call_args(subject=subject)).images
    pipe.unet = Dropping(pipe.unet)
    assert np.array_equal(pipe(**call_args(subject=subject)).images, expected)


@pytest.mark.parametrize("subjects", ["one", "one for each prompt"])
def test_a_wrapper_that_splits_the_batch_raises_an_error(pipe, subject, subjects):
    """The half without text guidance would otherwise get the subject of the conditional branch."""

    class Split(Passing):
        def forward(self, sample, timestep, encoder_hidden_states=None, return_dict=True, **kwargs):
            halves = zip(sample.chunk(2), encoder_hidden_states.chunk(2), strict=True)
            parts = [self.inner(each, timestep, text, return_dict=False, **kwargs)[0] for each, text in halves]
            return (torch.cat(parts),)

    extra = {"prompt": ["a", "b"], "latents": None, "generator": torch.Generator().manual_seed(0)}
    given = {"subject": subject} if subjects == "one" else {"subject": [None, subject], **extra}
    stock_arguments = {name: value for name, value in given.items() if name != "subject"}
    state, unet = snapshot(pipe.unet), pipe.unet
    pipe.unet = Split(unet)
    pipe(**call_args(**stock_arguments))
    with pytest.raises(ValueError, match="the batch of a call must not be split"):
        pipe(**call_args(**given))
    assert snapshot(unet) == state


# Wrappers around the UNet


class Passing(nn.Module):
    """A user-defined wrapper that forwards calls and attributes."""

    def __init__(self, unet):
        super().__init__()
        self.inner = unet

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class ByName(Passing):
    """Passes all arguments by keyword."""

    def forward(self, sample, timestep, encoder_hidden_states=None, **kwargs):
        return self.inner(sample=sample, timestep=timestep, encoder_hidden_states=encoder_hidden_states, **kwargs)


class PassingObject:
    """The same wrapper as `Passing`, but not an `nn.Module`."""

    def __init__(self, unet):
        self.inner = unet

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Parallel(nn.parallel.DataParallel):
    """A wrapper like DDP, with the attributes of the model that a pipeline reads."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def with_lora(unet):
    wrapped = get_peft_model(unet, LoraConfig(target_modules=["to_q", "to_out.0"], init_lora_weights=True))
    return wrapped.eval()


def prepared_by_accelerate(unet):
    from accelerate import Accelerator

    return Accelerator(cpu=True, mixed_precision="no").prepare_model(unet, evaluation_mode=True)


def with_compiled_block(unet):
    unet.mid_block = torch.compile(unet.mid_block, backend="eager")
    return unet


def compiled(unet):
    return torch.compile(unet, backend="eager")


def compiled_in_place(unet):
    unet.compile(backend="eager")
    return unet


WRAPPERS = [
    Passing, ByName, PassingObject, Parallel, with_lora, prepared_by_accelerate, with_compiled_block,
    lambda unet: with_lora(compiled_in_place(unet)),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda wrapper: getattr(wrapper, "__name__", "both"))
def test_wrappers_around_the_unet(pipe, subject, wrapper):
    """test_compile.py tests compiled UNets."""
    torch._dynamo.reset()
    unet = pipe.unet
    expected = [pipe(**call_args(**extra)).images for extra in ({"subject": subject}, {})]
    pipe.unet = wrapper(unet)
    assert find_unet(pipe.unet) is unet
    before = snapshot(unet)
    for _ in range(2):
        np.testing.assert_allclose(pipe(**call_args(subject=subject)).images, expected[0], atol=1e-5)
        np.testing.assert_allclose(pipe(**call_args()).images, expected[1], atol=1e-5)
    assert snapshot(unet) == before


def test_the_outermost_compiled_module_gets_the_hooks():
    """Hooks inside of it would become part of the compiled graph."""
    unet = make_unet()
    wrapped, in_place, optimized = Passing(unet), Passing(unet), compiled(unet)
    in_place.compile(backend="eager")
    for given, watched in (
        (unet, unet), (wrapped, unet), (PassingObject(unet), unet), (in_place, in_place), (optimized, optimized),
        (Passing(optimized), optimized), (Passing(in_place), in_place),
    ):  # fmt: skip
        assert hooks_ssr._outermost_compiled(given, unet) is watched
    assert hooks_ssr._outermost_compiled(Passing(with_compiled_block(unet)), unet) is unet


def test_a_module_that_is_not_a_unet_is_rejected(pipe, subject):
    pipe.unet = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="`unet` has to be, or to wrap, a UNet.*Linear"):
        pipe(**call_args(subject=subject))


# Output sizes


@pytest.mark.parametrize("size", [(40, 72), (72, 40), (24, 56), (16, 128), (48, 112)])
@pytest.mark.parametrize("mask_size", [(64, 64), (30, 50)])
def test_regions_with_different_output_sizes(pipe, subject, size, mask_size):
    """Some sizes have odd heights and widths at some levels, and the mask can have a different aspect ratio. A region
    that covers the whole image gives the same image as no region, and a region on the left half a different
    one."""
    everywhere = np.ones(mask_size, np.float32)
    left = everywhere.copy()
    left[:, mask_size[1] // 2 :] = 0
    arguments = {"height": size[0], "width": size[1]}
    whole = pipe(**call_args(subject=subject, **arguments)).images
    filled = pipe(**call_args(subject=subject.inside(everywhere), **arguments)).images
    np.testing.assert_allclose(filled, whole, atol=1e-5)
    half = pipe(**call_args(subject=subject.inside(left), **arguments)).images
    assert half.shape[1:3] == size and np.abs(half - whole).max() > 1e-4


def test_latents_of_another_size(pipe, subject):
    left = np.zeros((8, 8))
    left[:, :4] = 1
    latents = torch.randn(1, 4, 10, 6, generator=torch.Generator().manual_seed(0))
    image = pipe(**call_args(subject=subject.inside(left), latents=latents)).images
    assert np.isfinite(image).all()


# Batches that change during a call


def by_hand(pipe, step, timestep, callback_kwargs):
    if step == 1:
        pipe._guidance_scale = 0.0
        callback_kwargs["prompt_embeds"] = callback_kwargs["prompt_embeds"].chunk(2)[1]
    return callback_kwargs


CUTOFFS = {
    "diffusers": {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)},
    "several": {
        "callback_on_step_end": MultiPipelineCallbacks(
            [SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)]
        )
    },
    "by hand": {"callback_on_step_end": by_hand, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
}


@pytest.mark.parametrize("way", CUTOFFS)
def test_a_callback_can_disable_guidance(pipe, subject, way):
    """Only the conditional half of the batch remains. The steps after that agree with those of a call without
    guidance."""
    seen = {}

    def keep(name):
        def hook(module, args, kwargs, output):
            seen.setdefault(name, []).append((args[0].clone(), output[0].clone()))

        return hook

    handle = pipe.unet.register_forward_hook(keep("cut"), with_kwargs=True)
    pipe(**call_args(subject=subject, num_inference_steps=4, **CUTOFFS[way]))
    handle.remove()
    assert [len(latents) for latents, _ in seen["cut"]] == [2, 2, 1, 1]
    latents = seen["cut"][2][0]
    request_of = {}
    handle = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: request_of.update(kwargs) or ((latents, *args[1:]), kwargs), with_kwargs=True
    )
    handle_out = pipe.unet.register_forward_hook(keep("alone"), with_kwargs=True)
    pipe(**call_args(subject=subject, guidance_scale=1.0, num_inference_steps=4))
    handle.remove(), handle_out.remove()
    # the third step of a call without guidance, on the same latents
    torch.testing.assert_close(seen["alone"][2][1], seen["cut"][2][1], atol=1e-5, rtol=1e-5)


def test_a_callback_can_enable_guidance(pipe, subject):
    negative, prompt = (pipe.encode_prompt(text, "cpu", 1, False)[0] for text in ("", "a cat on the beach"))
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))

    def switch(pipe, step, timestep, callback_kwargs):
        if step == 0:
            pipe._guidance_scale = 3.0
            callback_kwargs["prompt_embeds"] = torch.cat([negative, prompt])
        return callback_kwargs

    extra = {"callback_on_step_end": switch, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    images = pipe(**call_args(subject=subject, guidance_scale=1.0, num_inference_steps=3, **extra)).images
    assert sizes == [1, 2, 2] and np.isfinite(images).all()


def test_an_unknown_batch_layout_is_rejected(pipe, subject):
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0].repeat(3, 1, 1, 1), *args[1:]), kwargs), with_kwargs=True
    )
    with pytest.raises(ValueError, match="a batch of 6 latents for 1 images"):
        pipe(**call_args(subject=subject))


# Several calls with one UNet


def calls_in_callbacks(pipe, subject):
    """Returns the calls that a callback makes with the UNet of its own call."""
    dog = pipe.encode_subject(make_picture(3), "dog").scaled(1.0)
    return {
        "stock": lambda: other_pipe(pipe, StableDiffusionPipeline)(**call_args(num_inference_steps=1)).images,
        "another subject": lambda: other_pipe(pipe)(**call_args(subject=dog, num_inference_steps=1)).images,
        "no subject": lambda: other_pipe(pipe)(**call_args(num_inference_steps=1)).images,
        "itself": lambda: pipe(**call_args(subject=dog, num_inference_steps=1)).images,
    }


@pytest.mark.parametrize("inner", ["stock", "another subject", "no subject", "itself"])
def test_calls_inside_callbacks(pipe, subject, inner):
    draw = calls_in_callbacks(pipe, subject)[inner]
    expected, alone = pipe(**call_args(subject=subject)).images, draw()
    drawn = []

    def callback(pipe, step, timestep, callback_kwargs):
        drawn.append(draw())
        return callback_kwargs

    assert np.array_equal(pipe(**call_args(subject=subject, callback_on_step_end=callback)).images, expected)
    assert len(drawn) == 2 and all(np.array_equal(each, alone) for each in drawn)


def test_callbacks_of_two_calls_generate_with_the_unet_of_the_other_call(pipe, subject, components, one_thread):
    """In each callback, the call waits until the other call is also in a callback. Then both generate with the pipeline of
    the other."""
    second = StableDiffusionSSRPipeline(**{**components, "unet": make_unet(seed=4)}, **{
        name: pipe.components[name] for name in ("ssr_encoder", "ssr_image_encoder", "ssr_image_processor")
    }, requires_safety_checker=False)  # fmt: skip
    second.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    second.set_progress_bar_config(disable=True)
    pipes, barrier, results = (pipe, second), threading.Barrier(2, timeout=60), {}
    expected = [each(**call_args(subject=subject)).images for each in pipes]

    def draw(index):
        def callback(_, step, timestep, callback_kwargs):
            barrier.wait()
            results["inner", index, step] = pipes[1 - index](**call_args(subject=subject)).images
            return callback_kwargs

        results[index] = pipes[index](**call_args(subject=subject, callback_on_step_end=callback)).images

    threads = [threading.Thread(target=draw, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for index in range(2):
        assert np.array_equal(results[index], expected[index])
        assert all(np.array_equal(results["inner", index, step], expected[1 - index]) for step in range(2))


def test_threads_that_share_one_pipeline(pipe, one_thread):
    """The threads also share the scheduler of the pipeline, and each call returns its own image."""
    subjects = [pipe.encode_subject(make_picture(seed), "cat").scaled(1.0) for seed in range(3)] + [None]
    expected = [pipe(**call_args(subject=each)).images for each in subjects]
    results = {}

    def draw(index):
        for turn in range(5):
            results[index, turn] = pipe(**call_args(subject=subjects[index])).images

    threads = [threading.Thread(target=draw, args=(index,)) for index in range(len(subjects))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for (index, _), images in results.items():
        assert np.array_equal(images, expected[index])
    assert len(results) == 20


def test_ctrl_c_leaves_the_unet_unchanged(pipe, subject):
    """The call is interrupted inside a layer, so torch does not call the remaining hooks."""
    before, interrupt = snapshot(pipe.unet), [True]
    processors = dict(pipe.unet.attn_processors)

    class Interrupted(AttnProcessor):
        def __call__(self, *args, **kwargs):
            if interrupt:
                raise KeyboardInterrupt
            return super().__call__(*args, **kwargs)

    expected = pipe(**call_args(subject=subject)).images
    pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2").set_processor(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        pipe(**call_args(subject=subject))
    pipe.unet.set_attn_processor(dict(processors))
    assert snapshot(pipe.unet) == before
    interrupt.clear()
    assert np.array_equal(pipe(**call_args(subject=subject)).images, expected)


# Denoising loops of one's own


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_stock_pipeline_inside_the_context(pipe, subject, guidance_scale):
    """It generates the image of the SSR pipeline, bit for bit."""
    expected = pipe(**call_args(subject=subject, guidance_scale=guidance_scale)).images
    stock = other_pipe(pipe, StableDiffusionPipeline)
    plain = stock(**call_args(guidance_scale=guidance_scale)).images
    with subject_in_unet(pipe.unet, pipe.ssr_encoder, subject, do_classifier_free_guidance=guidance_scale > 1):
        assert np.array_equal(stock(**call_args(guidance_scale=guidance_scale)).images, expected)
    assert np.array_equal(stock(**call_args(guidance_scale=guidance_scale)).images, plain)


def test_the_context_with_a_subject_for_each_image(pipe, subject):
    dog = pipe.encode_subject(make_picture(3), "dog").inside((0, 0, 0.5, 1))
    arguments = {"prompt": ["a", "b", "c"], "latents": torch.randn(3, 4, 8, 8)}
    expected = pipe(**call_args(**arguments, subject=[subject, dog, None], subject_scale=0.8)).images
    with subject_in_unet(pipe.unet, pipe.ssr_encoder, [subject, dog, None], scale=0.8):
        assert np.array_equal(other_pipe(pipe, StableDiffusionPipeline)(**call_args(**arguments)).images, expected)


class WithoutAttentionArguments(StableDiffusionPipeline):
    """A pipeline with a loop of its own, which passes no `cross_attention_kwargs` to its UNet."""

    def __call__(self, prompt, num_inference_steps=2, generator=None):
        self.scheduler.set_timesteps(num_inference_steps)
        latents, (text, negative) = (
            torch.randn(1, 4, 8, 8, generator=generator),
            self.encode_prompt(prompt, "cpu", 1, True),
        )
        with torch.no_grad():
            for timestep in self.scheduler.timesteps:
                noise = self.unet(torch.cat([latents] * 2), timestep, torch.cat([negative, text])).sample
                negative_noise, positive_noise = noise.chunk(2)
                noise = negative_noise + 3.0 * (positive_noise - negative_noise)
                latents = self.scheduler.step(noise, timestep, latents).prev_sample
        return latents


def edit(pipe):
    pipe.invert(
        image=make_picture(1, (64, 64)), num_inversion_steps=4, skip=0.1, generator=torch.Generator().manual_seed(0)
    )
    options = {"use_cross_attn_mask": False, "use_intersect_mask": False, "output_type": "np"}
    return lambda **extra: torch.from_numpy(pipe(editing_prompt=["a dog"], **options, **extra).images)


def denoise(pipe):
    return lambda **extra: pipe("a cat", generator=torch.Generator().manual_seed(0), **extra)


@pytest.mark.parametrize("kind", ["a loop of its own", "LEdits++"])
def test_pipelines_without_cross_attention_kwargs(pipe, subject, kind):
    """Inside the context, and as classes of `ssr_pipeline_class`."""
    if kind == "LEdits++":
        scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, algorithm_type="sde-dpmsolver++", solver_order=2
        )
        stock_class, run = LEditsPPPipelineStableDiffusion, edit
    else:
        scheduler, stock_class, run = pipe.scheduler, WithoutAttentionArguments, denoise
    names = ("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor")
    parts = {name: getattr(pipe, name) for name in names}
    stock = stock_class(**parts, scheduler=scheduler, requires_safety_checker=False)
    ours = ssr_pipeline_class(stock_class)(
        **parts, scheduler=scheduler, ssr_encoder=pipe.ssr_encoder, requires_safety_checker=False
    )
    for pipeline in (stock, ours):
        pipeline.set_progress_bar_config(disable=True)
    plain = run(stock)()
    call = run(stock)
    with subject_in_unet(pipe.unet, pipe.ssr_encoder, subject):
        inside = call()
    assert (inside - plain).abs().max() > 1e-4
    torch.testing.assert_close(run(ours)(subject=subject), inside, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "arguments, message",
    [({"subject": "cat"}, "`subject` has to be a SubjectEmbeds"), ({"scale": "strong"}, "`scale` has to be a number")],
)
def test_invalid_arguments_of_the_context_are_rejected(pipe, subject, arguments, message):
    before = snapshot(pipe.unet)
    with pytest.raises(ValueError, match=message):
        with subject_in_unet(**{"unet": pipe.unet, "encoder": pipe.ssr_encoder, "subject": subject, **arguments}):
            pass
    assert snapshot(pipe.unet) == before
