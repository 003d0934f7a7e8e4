"""Tests with other checkpoints, single files, LoRA, textual inversion, schedulers and patches of the UNet."""

import re

import numpy as np
import pytest
import torch
from conftest import call_args, make_components, make_picture, make_ssr_components, make_unet, snapshot
from diffusers import LCMScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from diffusers_ssr import StableDiffusionSSRPipeline, ssr_pipeline_class
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from test_chains import INPAINT
from test_pipeline_ssr import stock_of, subject_args


# Conversion to the original layout of Stable Diffusion's single files, for UNets with one layer per block


def original_unet(unet) -> dict[str, torch.Tensor]:
    blocks, layers = len(unet.down_blocks), unet.config.layers_per_block
    has_attention = ["attentions" in dict(block.named_children()) for block in unet.up_blocks]

    def place(name: str) -> str:
        if match := re.match(r"down_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
            block, kind, index, rest = int(match[1]), match[2], int(match[3]), match[4]
            if kind == "downsamplers":
                return f"input_blocks.{(layers + 1) * (block + 1)}.0.{rest.replace('conv', 'op')}"
            return f"input_blocks.{(layers + 1) * block + index + 1}.{int(kind == 'attentions')}.{rest}"
        if match := re.match(r"up_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
            block, kind, index, rest = int(match[1]), match[2], int(match[3]), match[4]
            if kind == "upsamplers":
                return f"output_blocks.{(layers + 1) * block + layers}.{1 + has_attention[block]}.{rest}"
            return f"output_blocks.{(layers + 1) * block + index}.{int(kind == 'attentions')}.{rest}"
        for old, new in (
            ("mid_block.attentions.0", "middle_block.1"), ("mid_block.resnets.0", "middle_block.0"),
            ("mid_block.resnets.1", "middle_block.2"), ("time_embedding.linear_1", "time_embed.0"),
            ("time_embedding.linear_2", "time_embed.2"), ("conv_in", "input_blocks.0.0"),
            ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
        ):  # fmt: skip
            if name.startswith(old):
                return name.replace(old, new, 1)
        raise AssertionError(name)

    inside = (
        ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
        ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"),
    )  # fmt: skip
    assert blocks == 2
    out = {}
    for name, tensor in unet.state_dict().items():
        new = place(name)
        if ".resnets." in name:
            for old, original in inside:
                new = new.replace(old, original)
        out[f"model.diffusion_model.{new}"] = tensor
    return out


def original_vae(vae) -> dict[str, torch.Tensor]:
    last = len(vae.decoder.up_blocks) - 1
    out = {}
    for name, tensor in vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("to_out.0", "proj_out")
            name = name.replace("group_norm", "norm")
            name = re.sub(r"to_([qkv])\.", r"\1.", name)
            tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        out[f"first_stage_model.{name}"] = tensor
    return out


def test_a_single_file_in_the_original_layout(pipe, tmp_path):
    expected = pipe(**subject_args()).images
    stock = StableDiffusionPipeline(
        **{name: part for name, part in pipe.components.items() if not name.startswith("ssr_")},
        requires_safety_checker=False,
    )
    stock.save_pretrained(tmp_path / "config")
    state = {**original_unet(pipe.unet), **original_vae(pipe.vae)}
    for name, tensor in pipe.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    again = StableDiffusionSSRPipeline.from_single_file(
        tmp_path / "model.safetensors", config=str(tmp_path / "config"), local_files_only=True,
        text_encoder=pipe.text_encoder,
    )  # fmt: skip
    again.set_progress_bar_config(disable=True)
    parts = make_ssr_components()
    again.load_ssr(parts["ssr_encoder"], image_encoder=parts["ssr_image_encoder"])
    assert again.unet is not pipe.unet and again.vae is not pipe.vae
    np.testing.assert_allclose(again(**subject_args()).images, expected, atol=1e-5)


def test_replaced_unet(pipe):
    """The encoder works with a UNet that is set with `pipe.unet = other`, and then with the first UNet again."""
    first, other = pipe.unet, make_unet(seed=21)
    expected = pipe(**subject_args()).images
    state = snapshot(other)
    pipe.unet = other
    made = StableDiffusionSSRPipeline(
        **{**make_components(), "unet": make_unet(seed=21)}, **make_ssr_components(), requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    images = pipe(**subject_args()).images
    assert np.array_equal(images, made(**subject_args()).images)
    assert np.abs(images - expected).max() > 1e-3 and snapshot(other) == state
    pipe.unet = first
    assert np.array_equal(pipe(**subject_args()).images, expected)


def test_one_encoder_for_many_unets(pipe):
    """Several checkpoints share one encoder and use the same encoded subject."""
    subject = pipe.encode_subject(make_picture(), "cat")
    shared = {name: getattr(pipe, name) for name in ("ssr_encoder", "ssr_image_encoder", "ssr_image_processor")}
    drawn = []
    for seed in (31, 32, 33):
        other = StableDiffusionSSRPipeline(
            **{**make_components(), "unet": make_unet(seed=seed)}, **shared, requires_safety_checker=False
        )
        other.set_progress_bar_config(disable=True)
        assert other.ssr_encoder is pipe.ssr_encoder
        with_subject = other(**call_args(subject=subject)).images
        assert np.abs(with_subject - other(**call_args()).images).max() > 1e-3
        drawn.append(with_subject)
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(drawn, drawn[1:], strict=False))


# LoRA and textual inversion


def write_lora(folder, seed: int, **config) -> None:
    unet = make_unet(**config)
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))


def test_loras_from_files(pipe, tmp_path):
    """One LoRA, two weighted LoRAs, fused LoRAs and unloaded LoRAs, always with a subject."""
    for index in (0, 1):
        write_lora(tmp_path / str(index), seed=40 + index)
    plain = pipe(**subject_args()).images
    pipe.load_lora_weights(tmp_path / "0", adapter_name="a")
    one = pipe(**subject_args()).images
    pipe.load_lora_weights(tmp_path / "1", adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.7, 0.4])
    two = pipe(**subject_args()).images
    differences = [
        np.abs(x - y).max() for x, y in ((plain, one), (one, two), (two, stock_of(pipe)(**call_args()).images))
    ]
    assert min(differences) > 1e-4
    pipe.fuse_lora(adapter_names=["a", "b"])
    np.testing.assert_allclose(pipe(**subject_args()).images, two, atol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    np.testing.assert_allclose(pipe(**subject_args()).images, plain, atol=1e-4)


def test_incompatible_lora_raises_an_error(pipe, tmp_path):
    """A LoRA for another text width, as in Stable Diffusion 2, raises diffusers' error and does not affect the next
    call."""
    before = pipe(**subject_args()).images
    write_lora(tmp_path, seed=40, cross_attention_dim=48)
    with pytest.raises((ValueError, RuntimeError), match="size mismatch"):
        pipe.load_lora_weights(tmp_path)
    pipe.unload_lora_weights()
    assert np.array_equal(pipe(**subject_args()).images, before)


def test_lcm_lora_in_four_steps(pipe, tmp_path):
    write_lora(tmp_path, seed=50)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(tmp_path)
    arguments = {"num_inference_steps": 4, "guidance_scale": 1.0}
    images = pipe(**subject_args(**arguments)).images
    assert np.isfinite(images).all()
    assert np.abs(images - stock_of(pipe)(**call_args(**arguments)).images).max() > 1e-4


def test_textual_inversion_in_prompt_and_query(pipe):
    before = pipe.encode_subject(make_picture(), "<mine>").subjects[0].embeds
    embedding = torch.randn(32, generator=torch.Generator().manual_seed(1))
    pipe.load_textual_inversion({"<mine>": embedding}, token="<mine>")
    after = pipe.encode_subject(make_picture(), "<mine>").subjects[0].embeds
    assert (before - after).abs().max() > 1e-3
    images = pipe(**subject_args(prompt="a <mine> on the beach", subject_query="<mine>")).images
    assert np.abs(images - pipe(**subject_args(subject_query="<mine>")).images).max() > 1e-4


# Prompts


@pytest.mark.parametrize("windows", [2, 3])
def test_long_prompts(pipe, windows):
    """Prompt embeddings of several text windows, as tools for long prompts create them."""
    embeds, negative = (
        torch.cat([each] * windows, dim=1) for each in pipe.encode_prompt("a cat on the beach", "cpu", 1, True)
    )
    arguments = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    images = pipe(**subject_args(**arguments)).images
    # repeated keys do not change the softmax attention to the text
    np.testing.assert_allclose(images, pipe(**subject_args()).images, atol=1e-5)
    assert np.abs(images - stock_of(pipe)(**call_args(**arguments)).images).max() > 1e-3


def test_weighted_prompts(pipe):
    compel = pytest.importorskip("compel", reason="compel is optional; test_long_prompts covers prompt embeddings")
    weigh = compel.Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
    embeds = [weigh("a cat++ on the beach"), weigh("a cat on the beach")]
    negative = weigh("")
    images = [
        pipe(**subject_args(prompt=None, prompt_embeds=each, negative_prompt_embeds=negative)).images
        for each in embeds
    ]
    assert np.abs(images[0] - images[1]).max() > 1e-5
    np.testing.assert_allclose(images[1], pipe(**subject_args()).images, atol=1e-4)


def test_clip_skip(pipe):
    try:
        expected = stock_of(pipe)(**call_args(clip_skip=1)).images
    except AttributeError as error:
        pytest.skip(
            f"`clip_skip` of diffusers fails with this transformers ({error}); test_long_prompts covers embeddings"
        )
    assert np.abs(pipe(**subject_args(clip_skip=1)).images - expected).max() > 1e-3


# UNets, schedulers, patches


@pytest.mark.parametrize("in_channels", [4, 9])
def test_inpainting_unets(in_channels):
    parts = {**make_components(), "unet": make_unet(in_channels=in_channels)}
    pipe = ssr_pipeline_class(StableDiffusionInpaintPipeline)(
        **parts, **make_ssr_components(), requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    subject = pipe.encode_subject(make_picture(), "cat")
    images = [pipe(**call_args(**INPAINT, **extra)).images for extra in ({}, {"subject": subject})]
    assert np.abs(images[0] - images[1]).max() > 1e-3


SCHEDULERS = {scheduler.__name__: scheduler for scheduler in make_components()["scheduler"].compatibles}
NEEDS = {"LMSDiscreteScheduler": "scipy", "DPMSolverSDEScheduler": "torchsde"}
# the noise of this scheduler does not use the generator of the call
SEEDS = {"DPMSolverSDEScheduler": {"noise_sampler_seed": 0}}


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_scheduler(pipe, name):
    """The subject has an effect, also with `subject_end=0.5`. Without a subject the result equals that of the stock
    pipeline."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{name} needs {NEEDS[name]}; the other schedulers cover the subject")
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config, **SEEDS.get(name, {}))
    arguments = {"num_inference_steps": 4}
    expected = stock_of(pipe)(**call_args(**arguments)).images
    assert np.array_equal(pipe(**call_args(**arguments)).images, expected)
    for extra in ({}, {"subject_end": 0.5}):
        images = pipe(**subject_args(**arguments, **extra)).images
        assert np.isfinite(images).all() and np.abs(images - expected).max() > 1e-4


class Patch:
    """Patches of the UNet. Each function applies a patch and returns a function that removes it."""

    @staticmethod
    def freeu(pipe):
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        return pipe.disable_freeu

    @staticmethod
    def tome(pipe):
        tomesd = pytest.importorskip("tomesd", reason="tomesd is optional; FreeU covers a patched UNet")
        tomesd.apply_patch(pipe, ratio=0.5)
        return lambda: tomesd.remove_patch(pipe)

    @staticmethod
    def deepcache(pipe):
        package = pytest.importorskip("DeepCache", reason="DeepCache is optional; FreeU covers a patched UNet")
        helper = package.DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=2, cache_branch_id=0)
        helper.enable()
        return helper.disable


@pytest.mark.parametrize("patch", ["freeu", "tome", "deepcache"])
def test_patches(pipe, patch):
    """The subject has an effect with the patch, and the image is the same as before after the patch is removed."""
    arguments = {"num_inference_steps": 4}
    expected = pipe(**subject_args(**arguments)).images
    remove = getattr(Patch, patch)(pipe)
    patched = pipe(**subject_args(**arguments)).images
    assert np.isfinite(patched).all()
    assert np.abs(patched - pipe(**call_args(**arguments)).images).max() > 1e-4
    remove()
    np.testing.assert_allclose(pipe(**subject_args(**arguments)).images, expected, atol=1e-6)


def test_tome_with_merged_cross_attention(pipe):
    """A subject has an effect with merged positions. A region needs the grid, so it raises an error, after which the
    UNet is unchanged."""
    tomesd = pytest.importorskip(
        "tomesd", reason="tomesd is optional; test_attention_processors.py covers merged positions"
    )
    subject = pipe.encode_subject(make_picture(), "cat").scaled(1.0)
    state = snapshot(pipe.unet)
    tomesd.apply_patch(pipe, ratio=0.5, merge_crossattn=True, max_downsample=8)
    half = np.zeros((16, 16))
    half[:, :8] = 1
    drawn, plain = pipe(**call_args(subject=subject)).images, pipe(**call_args()).images
    assert np.abs(drawn - plain).max() > 1e-4
    with pytest.raises(ValueError, match="grid.*`merge_crossattn`"):
        pipe(**call_args(subject=subject.inside(half)))
    tomesd.remove_patch(pipe)
    assert snapshot(pipe.unet) == state
    assert np.isfinite(pipe(**call_args(subject=subject.inside(half))).images).all()
