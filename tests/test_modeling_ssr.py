import json
from pathlib import Path

import pytest
import torch
from conftest import make_ssr_encoder
from diffusers_ssr import SSREncoder
from diffusers_ssr.modeling_ssr import SD15_ATTENTION_LAYERS, consistency_loss
from safetensors.torch import load_file, save_file


PARITY = Path(__file__).parent / "parity"
LAYOUT = json.loads((PARITY / "released_checkpoint_layout.json").read_text())
ALIGNER, LAYERS = (LAYOUT[key] for key in list(LAYOUT)[:2])
SMALL = {"cross_attention_dim": 32, "vision_hidden_size": 48, "inner_dim": 16, "num_attention_heads": 2}


def parity_encoder() -> SSREncoder:
    """The parity files' aligner; they hold no layers, so it gets none."""
    tensors = load_file(PARITY / "aligner_text.safetensors")
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    return SSREncoder.from_released(weights, {}, attention_layers={}, **SMALL)


def random_released(layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state_dict = {name: 0.04 * torch.randn(shape, generator=generator) for name, shape in layout.items()}
    return {name: tensor + 1 if name == "norm.weight" else tensor for name, tensor in state_dict.items()}


def small_released(**changes):
    """A released pair of files at small sizes, with two layers."""
    encoder = SSREncoder(attention_layers={"b": 8, "a": 16}, **SMALL)
    state_dict = encoder.state_dict()
    aligner = {}
    for name, tensor in state_dict.items():
        if name.startswith("norm."):
            aligner[name] = tensor
        elif name.startswith(("to_q.", "to_k.")):
            aligner["aligner." + name] = tensor
        elif name.startswith(("to_v.", "to_out.")):
            aligner["aligner.processor." + name] = tensor
    layers = {
        f"{2 * index + 1}.to_{part}_SSR.weight": state_dict[f"layers.{name}.to_{part}.weight"]
        for index, name in enumerate(("b", "a"))
        for part in "kv"
    }
    return encoder, aligner, layers


def test_text_query_agrees_with_the_released_code():
    tensors = load_file(PARITY / "aligner_text.safetensors")
    with torch.no_grad():
        out = parity_encoder()(tensors["text_embeds"], tensors["image_hidden_states"])
    assert out.shape == (2, 462, 32)
    torch.testing.assert_close(out, tensors["subject_embeds"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("weight", [1, 2, 5])
def test_mask_query_agrees_with_the_released_code(weight):
    tensors = load_file(PARITY / "aligner_mask.safetensors")
    with torch.no_grad():
        out = parity_encoder()(
            tensors["text_embeds"], tensors["image_hidden_states"], mask=tensors["mask"], mask_weight=weight
        )
    torch.testing.assert_close(out, tensors[f"subject_embeds.weight_{weight}"], atol=1e-5, rtol=0)


def test_default_config_is_sd15_with_vit_l():
    with torch.device("meta"):
        encoder = SSREncoder()
    shapes = {name: list(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert list(encoder.config.attention_layers) == list(LAYOUT[list(LAYOUT)[2]].values())
    assert shapes["to_q.weight"] == ALIGNER["aligner.to_q.weight"]
    for index, (name, width) in enumerate(SD15_ATTENTION_LAYERS.items()):
        shape = shapes[f"layers.{name.replace('.', '_')}.to_k.weight"]
        assert shape == LAYERS[f"{2 * index + 1}.to_k_SSR.weight"] == [width, 768]


@pytest.mark.parametrize("form", ["state_dict", "pickle", "safetensors"])
def test_from_released_reads_paths_and_state_dicts(tmp_path, form):
    encoder, aligner, layers = small_released()
    sources = [aligner, layers]
    if form != "state_dict":
        for index, state_dict in enumerate(sources):
            sources[index] = tmp_path / f"{index}.{'bin' if form == 'pickle' else 'safetensors'}"
            (torch.save if form == "pickle" else save_file)(state_dict, sources[index])
    loaded = SSREncoder.from_released(*sources, attention_layers={"b": 8, "a": 16}, **SMALL)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_from_released_refuses_a_pickle_that_holds_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    _, aligner, layers = small_released()
    torch.save({**aligner, "evil": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(Exception, match="[Ww]eights.only|Unsupported"):
        SSREncoder.from_released(tmp_path / "evil.bin", layers, attention_layers={"b": 8, "a": 16}, **SMALL)


@pytest.mark.parametrize("argument", ["aligner", "layers"])
@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_from_released_names_the_wrong_tensor(argument, fault):
    _, aligner, layers = small_released()
    state_dict = {"aligner": aligner, "layers": layers}[argument]
    name = sorted(state_dict)[0]
    if fault == "missing":
        del state_dict[name]
    elif fault == "extra":
        state_dict[name := "surplus"] = torch.zeros(1)
    else:
        state_dict[name] = state_dict[name][:-1]
    with pytest.raises(ValueError, match=rf"`{argument}`.*{name}"):
        SSREncoder.from_released(aligner, layers, attention_layers={"b": 8, "a": 16}, **SMALL)


def test_save_and_load(tmp_path):
    encoder = make_ssr_encoder()
    encoder.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = SSREncoder.from_pretrained(tmp_path)
    assert dict(loaded.config)["attention_layers"] == encoder.config.attention_layers
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("num_tokens", [1, 77])
@pytest.mark.parametrize("as_list", [True, False])
def test_shapes(num_tokens, as_list):
    encoder = make_ssr_encoder()
    levels = torch.randn(3, 2, 17, 24)
    with torch.no_grad():
        subject = encoder(torch.randn(2, num_tokens, 32), list(levels) if as_list else levels)
        pairs = encoder.project(subject)
    assert subject.shape == (2, 3 * num_tokens, 32)
    assert [key.shape[-1] for key, _ in pairs] == list(encoder.config.attention_layers.values())
    assert all(key.shape == value.shape and key.shape[:2] == subject.shape[:2] for key, value in pairs)


def test_rejects_another_number_of_levels():
    with pytest.raises(ValueError, match="`image_hidden_states` has to hold 3 levels"):
        make_ssr_encoder()(torch.randn(1, 77, 32), torch.randn(2, 1, 17, 24))


def test_rejects_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="`inner_dim`"):
        make_ssr_encoder(inner_dim=16, num_attention_heads=3)


def test_attention_probs_are_a_distribution_and_follow_the_mask():
    encoder = make_ssr_encoder()
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    states = torch.randn(1, 5, 32), torch.randn(1, 17, 24)
    with torch.no_grad():
        plain = encoder.attention_probs(*states)
        masked = encoder.attention_probs(*states, mask=mask, mask_weight=5.0)
    torch.testing.assert_close(plain.sum(-1), torch.ones(1, 2, 5))
    inside = masked[..., 1:].unflatten(-1, (4, 4))[..., :2].sum((-1, -2))
    assert (inside > 0.99).all()


@pytest.mark.parametrize("form,key", [("released", "released_code"), ("paper", "paper")])
def test_consistency_loss_agrees(form, key):
    tensors = load_file(PARITY / "consistency_loss.safetensors")
    query = tensors["query_embeds"].requires_grad_()
    subject = tensors["subject_embeds"].requires_grad_()
    loss = consistency_loss(subject, query, form)
    torch.testing.assert_close(loss, tensors[key].squeeze(), atol=1e-5, rtol=0)
    loss.backward()
    assert subject.grad.abs().sum() > 0 and query.grad is None


def test_consistency_loss_rejects_another_form():
    with pytest.raises(ValueError, match="`form`"):
        consistency_loss(torch.randn(1, 6, 4), torch.randn(1, 3, 4), "mean")
