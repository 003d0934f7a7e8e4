"""The comparison of SSR-Encoder with other methods on the pocket checkpoint."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train_ssr
from conftest import POCKET, UNET_LAYERS, call_args, make_picture, make_ssr_encoder, make_unet
from diffusers import UNet2DConditionModel
from training_options import check_args, parse_args

from tools.pocket.measure import comparison
from tools.pocket.measure.references import nearest_is_own
from tools.pocket.methods import COMMON, METHODS
from tools.pocket.rivals import MeanPatchEncoder, WholePictureEncoder
from tools.pocket.world import DESIGNS, NUM_VARIANTS, SPLITS, Instance


pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"cross_attention_dim": 32, "vision_hidden_size": 24, "attention_layers": UNET_LAYERS}


def whole_picture(**config) -> WholePictureEncoder:
    torch.manual_seed(5)
    sizes = {"inner_dim": 16, "num_attention_heads": 2, "image_levels": (2,), "num_queries": 3, "depth": 2}
    return WholePictureEncoder(**SIZES, **{**sizes, **config}).eval()


def mean_patch() -> MeanPatchEncoder:
    torch.manual_seed(5)
    return MeanPatchEncoder(**SIZES, inner_dim=16, num_attention_heads=2, image_levels=(1, 2, 3)).eval()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_similar_number_of_parameters(name):
    """The number differs by less than a tenth from that of SSR-Encoder."""
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(POCKET, subfolder="unet"))
    vision = SimpleNamespace(hidden_size=128, num_hidden_layers=6)
    counts = []
    for method in (METHODS["ssr"], METHODS[name]):
        required = "--pretrained_model_name_or_path x --image_encoder_name_or_path x --train_data_dir x".split()
        args = parse_args("", [*required, *COMMON.split(), *method.options.split()])
        check_args(args)
        encoder = method.build(unet, 96, vision, args)
        counts.append(sum(p.numel() for p in encoder.parameters() if p.requires_grad))
    assert abs(counts[1] / counts[0] - 1) < 0.1, counts


@pytest.mark.parametrize("make, depends", [(make_ssr_encoder, True), (whole_picture, False), (mean_patch, False)])
def test_only_ssr_encoder_depends_on_the_query(make, depends):
    encoder = make()
    levels = torch.randn(len(encoder.config.image_levels), 1, 17, 24)
    cat, dog = (encoder(torch.randn(1, 4, 32), levels) for _ in range(2))
    assert torch.allclose(cat, dog, atol=1e-6) != depends
    assert not torch.allclose(cat, encoder(torch.randn(1, 4, 32), levels + torch.randn_like(levels)))


def test_the_mean_patch_does_not_depend_on_the_order_of_patches():
    encoder, levels = mean_patch(), torch.randn(3, 1, 17, 24)
    shuffled = torch.cat([levels[:, :, :1], levels[:, :, 1:].flip(2)], 2)
    query = torch.randn(1, 4, 32)
    assert torch.allclose(encoder(query, levels), encoder(query, shuffled), atol=1e-5)


@pytest.mark.parametrize("make", [whole_picture, mean_patch])
def test_other_methods_can_be_saved_and_used_in_the_same_pipeline(make, pipe, tmp_path):
    make().save_pretrained(tmp_path)
    encoder = type(make()).from_pretrained(tmp_path)
    stock = pipe(**call_args()).images
    pipe.load_ssr(encoder, image_encoder=pipe.ssr_image_encoder, image_processor=pipe.ssr_image_processor)
    subjects = [pipe.encode_subject(make_picture(seed), query="cat") for seed in (0, 1)]
    drawn = [pipe(**call_args(), subject=subject).images for subject in subjects]
    assert not np.allclose(drawn[0], stock) and not np.allclose(drawn[0], drawn[1])


def test_other_methods_can_be_trained_with_train_ssr():
    unet, method = make_unet(), METHODS["ip_adapter_plus"]
    args = SimpleNamespace(inner_dim=16, num_attention_heads=2, image_levels=[2], init_from_text=True)
    encoder = method.build(unet, 32, SimpleNamespace(hidden_size=24, num_hidden_layers=3), args)
    assert isinstance(encoder, WholePictureEncoder)
    embeds, pairs = train_ssr.SubjectEncoding(encoder)(torch.randn(2, 4, 32), torch.randn(1, 2, 17, 24))
    assert embeds.shape == (2, 16, 32) and len(pairs) == len(UNET_LAYERS)
    # the consistency loss compares means, because the embeddings do not have one token for each token of the query
    assert train_ssr.consistency_loss(embeds, torch.randn(2, 4, 32), "paper").isfinite()


def test_nearest_is_own():
    """An image with the design and colour of its subject is a hit. An image with another design is a miss if an
    instance with this design is among the sixteen candidates. A random image is a hit in 1 of 16 cases."""
    own = SPLITS["first"][1][0]
    scenes = [SimpleNamespace(instances=[own])] * 400
    designs, variants = np.full((400, len(DESIGNS)), -5.0), np.full((400, NUM_VARIANTS), -5.0)
    variants[:, own.variant] = 6
    designs[:, own.design] = 5
    rng = np.random.default_rng(0)
    assert nearest_is_own(designs, variants, scenes, rng).all()
    wrong = np.roll(designs, 1, axis=1)
    # one of 35 other instances has this design and colour, and 15 of them are sampled
    assert 0.45 < nearest_is_own(wrong, variants, scenes, rng).mean() < 0.7
    noise = np.random.default_rng(1)
    blind = noise.normal(size=designs.shape), noise.normal(size=variants.shape)
    assert nearest_is_own(*blind, scenes, rng).mean() < 0.12


def test_nearest_is_own_counts_equally_near_instances_as_fractions():
    """A control that ignores the design cannot reach 100 %: a perfect colour fits all candidates of this colour."""
    own = SPLITS["first"][1][0]
    scenes = [SimpleNamespace(instances=[own])] * 2000
    designs, variants = np.full((2000, len(DESIGNS)), -5.0), np.full((2000, NUM_VARIANTS), -5.0)
    designs[:, own.design], variants[:, own.variant] = 5, 5
    rng = np.random.default_rng(0)
    # 2 of the 35 other instances have the same colour, 11 the same design, and 15 of the 35 are candidates
    assert abs(nearest_is_own(0 * designs, variants, scenes, rng).mean() - 0.63) < 0.03
    assert abs(nearest_is_own(designs, 0 * variants, scenes, rng).mean() - 0.18) < 0.03
    assert abs(nearest_is_own(0 * designs, 0 * variants, scenes, rng).mean() - 1 / 16) < 1e-9


@pytest.mark.parametrize("split", SPLITS)
def test_held_out_instances_are_not_trained_on(split):
    seen, held_out = SPLITS[split]
    assert not set(held_out) & set(seen)
    if split == "sets":
        return  # test_pocket_world.py
    assert len(held_out) + len(seen) == 12 * len(DESIGNS) * NUM_VARIANTS
    for category in range(12):
        for design in range(len(DESIGNS)):
            assert sum(Instance(category, design, v) in held_out for v in range(NUM_VARIANTS)) in (3, NUM_VARIANTS)


def test_the_wide_split_has_no_link_between_colour_and_design():
    """If a colour of a category is held out in one design, it is held out in all designs of the category, except in a
    design that is held out completely."""
    seen, held_out = SPLITS["wide"]
    whole = {(c, d) for c in range(12) for d in range(3) if not any(i.category == c and i.design == d for i in seen)}
    assert len(whole) == 4 and len({category for category, _ in whole}) == 4
    for instance in held_out:
        if (instance.category, instance.design) not in whole:
            assert not any(i.category == instance.category and i.variant == instance.variant for i in seen)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_shipped(name):
    encoder = comparison.load_adapter(name)
    assert type(encoder) is METHODS[name].encoder_class
    assert encoder.dtype == torch.float32
    assert all(parameter.isfinite().all() and parameter.std() > 0 for parameter in encoder.parameters())
