"""Tests with an IP-Adapter: both have an effect in one call, and the order of loading and unloading does not
matter."""

import numpy as np
import torch
from conftest import (
    call_args,
    make_components,
    make_image_encoder,
    make_picture,
    make_ssr_components,
    make_ssr_encoder,
)
from diffusers_ssr import StableDiffusionSSRPipeline
from test_pipeline_ssr import stock_of


WIDTH, IP_TOKENS = 16, 4


def ip_adapter_state(unet) -> dict:
    """Returns random weights of an IP-Adapter for the small UNet, in the released format."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape):
        return 0.5 * torch.randn(shape, generator=generator)

    layers, index = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).inner_dim
            layers[f"{index}.to_k_ip.weight"] = random(width, 32)
            layers[f"{index}.to_v_ip.weight"] = random(width, 32)
            index += 2
    projection = {
        "proj.weight": random(IP_TOKENS * 32, WIDTH),
        "proj.bias": random(IP_TOKENS * 32),
        "norm.weight": torch.ones(32),
        "norm.bias": torch.zeros(32),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def ip_args(**overrides):
    embeds = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(8))
    return call_args(ip_adapter_image_embeds=[embeds], **overrides)


def fresh_pipe() -> StableDiffusionSSRPipeline:
    pipe = StableDiffusionSSRPipeline(**make_components(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(pipe, what):
    if what == "ip":
        pipe.load_ip_adapter(ip_adapter_state(pipe.unet), subfolder=None, weight_name=None, image_encoder_folder=None)
        pipe.set_ip_adapter_scale(0.7)
    else:
        pipe.load_ssr(make_ssr_encoder(), image_encoder=make_image_encoder())


def drawings(pipe, subject) -> list[np.ndarray]:
    """Returns the results with only the IP-Adapter and with both."""
    return [pipe(**ip_args()).images, pipe(**ip_args(subject=subject, subject_scale=1.0)).images]


def test_the_order_of_loading_and_unloading_does_not_matter():
    reference = StableDiffusionSSRPipeline(**make_components(), **make_ssr_components(), requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    subject = reference.encode_subject(make_picture(), "cat")
    ssr_alone = reference(**call_args(subject=subject, subject_scale=1.0)).images
    neither = reference(**call_args()).images

    results = []
    for order in (("ip", "ssr"), ("ssr", "ip")):
        pipe = fresh_pipe()
        for what in order:
            load(pipe, what)
        results.append(drawings(pipe, subject))
        ip_alone, both = results[-1]
        assert all(np.abs(both - other).max() > 1e-3 for other in (ip_alone, ssr_alone, neither))
        assert np.array_equal(stock_of(pipe)(**ip_args()).images, ip_alone)
        if order[0] == "ip":
            pipe.unload_ip_adapter()
            assert np.array_equal(pipe(**call_args(subject=subject, subject_scale=1.0)).images, ssr_alone)
            pipe.unload_ssr()
        else:
            pipe.unload_ssr()
            assert np.array_equal(pipe(**ip_args()).images, ip_alone)
            pipe.unload_ip_adapter()
        assert np.array_equal(pipe(**call_args()).images, neither)
    for first, second in zip(*results, strict=True):
        assert np.array_equal(first, second)
