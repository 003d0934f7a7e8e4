import copy
import json
import pickle
from fractions import Fraction
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from conftest import make_ssr_encoder, make_unet
from diffusers_ssr import SSREncoder, internals_ssr
from diffusers_ssr.modeling_ssr import SD15_ATTENTION_LAYERS
from safetensors.torch import load_file, save_file


PARITY = Path(__file__).parent / "parity"
LAYOUT = json.loads((PARITY / "released_checkpoint_layout.json").read_text())
ALIGNER, LAYERS = (LAYOUT[key] for key in list(LAYOUT)[:2])
SMALL = {"cross_attention_dim": 32, "vision_hidden_size": 48, "inner_dim": 16, "num_attention_heads": 2}


def parity_encoder() -> SSREncoder:
    """The aligner of the parity files, without attention layers, because the parity files do not contain any."""
    tensors = load_file(PARITY / "aligner_text.safetensors")
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    return SSREncoder.from_released(weights, {}, attention_layers={}, **SMALL)


def random_released(layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state_dict = {name: 0.04 * torch.randn(shape, generator=generator) for name, shape in layout.items()}
    return {name: tensor + 1 if name == "norm.weight" else tensor for name, tensor in state_dict.items()}


def small_released(**changes):
    """A small encoder with two layers, and its weights in the format of the two released files."""
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


def test_default_config_fits_sd15_and_vit_l():
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


def test_from_released_rejects_a_pickle_with_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    _, aligner, layers = small_released()
    torch.save({**aligner, "evil": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(ValueError, match="evil.bin holds no weights that can be read: it is not a file of tensors"):
        SSREncoder.from_released(tmp_path / "evil.bin", layers, attention_layers={"b": 8, "a": 16}, **SMALL)


TWO_LAYERS = {"attention_layers": {"b": 8, "a": 16}, **SMALL}
OTHER_FILES = {
    "an encoder that `save_pretrained` wrote": make_ssr_encoder().state_dict(),
    "an encoder that `save_pretrained` wrote, which": {"to_q.weight": 0, "to_out.0.weight": 0, "norm.bias": 0},
    "a LoRA": {"unet.mid_block.attentions.0.to_q.lora_A.weight": 0},
    "an IP-Adapter": {"ip_adapter": {}, "image_proj": {}},
    "a whole Stable Diffusion checkpoint": {"model.diffusion_model.out.0.weight": 0, "cond_stage_model.a": 0},
}


@pytest.mark.parametrize("kind", OTHER_FILES)
@pytest.mark.parametrize("argument", ["aligner", "layers"])
def test_from_released_error_names_what_was_passed_instead(argument, kind):
    _, aligner, layers = small_released()
    given = {"aligner": aligner, "layers": layers, argument: OTHER_FILES[kind]}
    with pytest.raises(
        ValueError, match=rf"`{argument}` has to be the released {argument} .*, but is {kind}"
    ) as caught:
        SSREncoder.from_released(**given, **TWO_LAYERS)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("argument", ["aligner", "layers"])
def test_from_released_error_names_the_tensors_of_an_unknown_file(argument):
    _, aligner, layers = small_released()
    given = {"aligner": aligner, "layers": layers, argument: make_unet().state_dict()}
    with pytest.raises(
        ValueError, match=f"`{argument}` does not hold the released tensors: missing .*, unexpected conv_in"
    ):
        SSREncoder.from_released(**given, **TWO_LAYERS)


def test_from_released_rejects_swapped_or_identical_files():
    _, aligner, layers = small_released()
    with pytest.raises(ValueError, match="`aligner` and `layers` are in the wrong order"):
        SSREncoder.from_released(layers, aligner, **TWO_LAYERS)
    with pytest.raises(ValueError, match="`layers` has to be .* but is the released aligner .*as the other file is"):
        SSREncoder.from_released(aligner, aligner, **TWO_LAYERS)
    with pytest.raises(ValueError, match="`aligner` has to be .* but is the released layers .*as the other file is"):
        SSREncoder.from_released(layers, layers, **TWO_LAYERS)


@pytest.mark.parametrize(
    "value,message",
    [
        (None, "NoneType"),
        ([0.0], "list"),
        (torch.zeros(16, 32, dtype=torch.long), "int64"),
        (torch.zeros(16, 32, dtype=torch.complex64), "complex64"),
        (torch.zeros(16, 32).to_sparse(), "float32"),
        (torch.full((16, 32), torch.nan), "not finite"),
        (torch.full((16, 32), torch.inf), "not finite"),
        (torch.full((16, 32), torch.nan).to(torch.float8_e4m3fn), "not finite"),
        (torch.full((16, 32), 1e300, dtype=torch.float64), "not finite numbers in torch.float32"),
        (torch.zeros(16, 32, device="meta"), "not finite"),
        (torch.zeros(()).expand(10**6, 10**6), r"\(1000000, 1000000\)"),
    ],
)
def test_from_released_rejects_values_that_are_not_weights(value, message):
    _, aligner, layers = small_released()
    with pytest.raises(ValueError, match=f"`aligner` holds aligner.to_q.weight .*{message}"):
        SSREncoder.from_released({**aligner, "aligner.to_q.weight": value}, layers, **TWO_LAYERS)


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", [1, 2], {1: torch.zeros(1)}, Fraction(1, 2), "cut off", "folder"],
)
def test_from_released_rejects_unreadable_files(tmp_path, content):
    _, aligner, layers = small_released()
    path = tmp_path / "weights.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    else:
        torch.save(aligner if isinstance(content, str) else content, path)
    if content == "cut off":
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(
        ValueError, match="`aligner`.* (holds no weights that can be read|has to hold tensors by name)"
    ) as raised:
        SSREncoder.from_released(path, layers, **TWO_LAYERS)
    assert "weights_only" not in str(raised.value)  # the message of torch advises to switch it off


def test_from_released_reads_the_file_format_before_torch_1_6(tmp_path):
    encoder, aligner, layers = small_released()
    torch.save(aligner, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    loaded = SSREncoder.from_released(tmp_path / "old.bin", layers, **TWO_LAYERS)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in encoder.state_dict().items())
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(FileNotFoundError):
        SSREncoder.from_released(tmp_path / "nowhere.bin", layers, **TWO_LAYERS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_from_released_converts_other_precisions(dtype):
    encoder, aligner, layers = small_released()
    aligner, layers = ({name: tensor.to(dtype) for name, tensor in each.items()} for each in (aligner, layers))
    loaded = SSREncoder.from_released(aligner, layers, **TWO_LAYERS)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype).float()), name


def test_from_released_uses_the_default_dtype(monkeypatch):
    """Weights that are finite in the file can be infinite in the precision of the encoder."""
    _, aligner, layers = small_released()
    large = {**aligner, "norm.weight": aligner["norm.weight"] * 1e6}
    torch.set_default_dtype(torch.float16)
    try:
        assert SSREncoder.from_released(aligner, layers, **TWO_LAYERS).dtype == torch.float16
        with pytest.raises(ValueError, match="norm.weight with values that are not finite numbers in torch.float16"):
            SSREncoder.from_released(large, layers, **TWO_LAYERS)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("argument", ["aligner", "layers"])
@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_from_released_error_names_the_wrong_tensor(argument, fault):
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


@pytest.mark.parametrize("way", ["from_released", "from_pretrained", "layers_alone"])
def test_new_encoders_are_in_evaluation_mode(tmp_path, way):
    if way == "from_released":
        _, *files = small_released()
        made = SSREncoder.from_released(*files, **TWO_LAYERS)
    elif way == "from_pretrained":
        make_ssr_encoder().save_pretrained(tmp_path)
        made = SSREncoder.from_pretrained(tmp_path)
    else:
        made = make_ssr_encoder().layers_alone()
    assert not any(module.training for module in made.modules())


def test_an_encoder_with_sequential_offloading():
    """Every public method of an encoder with sequential offloading works, also outside a pipeline."""
    states = torch.randn(1, 5, 32), torch.randn(3, 1, 17, 24)

    def results(encoder: SSREncoder) -> list[torch.Tensor]:
        subject = encoder(*states)
        alone = encoder.layers_alone()
        layers = [*encoder.project(subject), *alone.project(subject)]
        fingerprints = [encoder.fingerprint(), encoder.fingerprint(torch.device("cpu")), alone.fingerprint()]
        return [subject, encoder.attention_probs(states[0], states[1][-1]), *sum(layers, ()), *fingerprints]

    encoder = make_ssr_encoder()
    with torch.no_grad():
        expected = results(encoder)
        cpu_offload(encoder, torch.device("cpu"))
        assert encoder.device.type == "meta"
        offloaded_results = results(encoder)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(offloaded_results, expected, strict=True))


def test_the_fingerprint_is_stable_across_versions():
    """Saved subjects contain the fingerprint of their encoder, and later versions have to recognise it."""
    encoder = make_ssr_encoder()
    for index, parameter in enumerate(encoder.parameters()):
        parameter.data = torch.sin(torch.arange(parameter.numel()) * 0.37 + index).reshape(parameter.shape)
    fingerprint = encoder.fingerprint()
    assert fingerprint.shape == (4, 8)
    expected = [[1.386, 0.844, -0.158], [1.026, 0.837, -0.817], [0.082, -0.019, -1.335], [6.418, 20.636, -19.880]]
    torch.testing.assert_close(fingerprint[:, [0, 1, 7]], torch.tensor(expected), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_alone_projects_like_the_whole_encoder(dtype):
    encoder = make_ssr_encoder().to(dtype)
    alone, subject = encoder.layers_alone(), torch.randn(1, 5, 32, dtype=dtype)
    assert {parameter.dtype for parameter in alone.parameters()} == {dtype}
    assert torch.equal(alone.fingerprint(), encoder.fingerprint())
    for ours, theirs in zip(alone.project(subject), encoder.project(subject), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


SAVED_AND_LOADED = {
    "file": lambda encoder, folder: (encoder.save_pretrained(folder), SSREncoder.from_pretrained(folder))[1],
    "pickle": lambda encoder, folder: pickle.loads(pickle.dumps(encoder)),
    "deepcopy": lambda encoder, folder: copy.deepcopy(encoder),
    "layers_alone": lambda encoder, folder: encoder.layers_alone(),
}


@pytest.mark.parametrize("way", SAVED_AND_LOADED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layers_alone_keeps_its_fingerprint(tmp_path, way, dtype):
    encoder = make_ssr_encoder().to(dtype)
    again = SAVED_AND_LOADED[way](encoder.layers_alone(), tmp_path)
    assert torch.equal(again.fingerprint(), encoder.fingerprint())
    assert torch.equal(copy.deepcopy(again).bfloat16().fingerprint(), encoder.fingerprint())
    subject = torch.randn(1, 5, 32, dtype=dtype)
    # a saved config sorts the layers by name
    ours, theirs = (
        dict(zip(e.config.attention_layers, e.project(subject), strict=True)) for e in (again.to(dtype), encoder)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name][part], theirs[name][part]) for name in ours for part in (0, 1))


def test_layers_alone_that_were_saved_without_a_fingerprint_can_be_loaded(tmp_path):
    """As earlier versions saved them."""
    make_ssr_encoder().layers_alone().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["known_fingerprint"]
    file.write_text(json.dumps(config))
    assert SSREncoder.from_pretrained(tmp_path).fingerprint() is None


@pytest.mark.parametrize("method", ["attention_probs", "forward"])
@pytest.mark.parametrize("levels", [torch.zeros(0, 1, 17, 24), []], ids=["tensor", "list"])
def test_an_encoder_without_levels_cannot_encode(method, levels):
    with pytest.raises(ValueError, match="`image_levels` of this SSREncoder is empty.*load the whole encoder"):
        getattr(make_ssr_encoder().layers_alone(), method)(torch.zeros(1, 5, 32), levels)


def test_a_missing_folder_raises_an_os_error(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        SSREncoder.from_pretrained(tmp_path / "nowhere")


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


def test_rejects_a_wrong_number_of_levels():
    with pytest.raises(ValueError, match="`image_hidden_states` has to hold 3 levels"):
        make_ssr_encoder()(torch.randn(1, 77, 32), torch.randn(2, 1, 17, 24))


# This version reports no unexpected weights, and no names of the weights of a shard.
WARNS_ONLY = internals_ssr.parse_version(diffusers.__version__) < (0, 32)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("fault", ["nan", "inf", "missing", "unexpected", "shape", "cut off", "empty", "config"])
def test_broken_encoder_files_are_rejected(tmp_path, fault, sharded):
    """The error names the folder, and the weight if there is a wrong one."""
    if sharded and fault == "unexpected":
        pytest.skip("a weight of a shard that the index does not list is not loaded")
    if fault == "unexpected" and WARNS_ONLY:
        pytest.skip("diffusers 0.31 only logs a warning")
    make_ssr_encoder().save_pretrained(tmp_path, **({"max_shard_size": "4KB"} if sharded else {}))
    weights, name = next(
        (file, "to_q.weight") for file in tmp_path.glob("*.safetensors") if "to_q.weight" in load_file(file)
    )
    tensors = load_file(weights)
    if fault in ("nan", "inf"):
        tensors[name][3, 3] = float(fault)
    elif fault == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        tensors["surplus.weight"], name = torch.zeros(1), "surplus.weight"
    save_file(tensors, weights, metadata={"format": "pt"})
    if fault in ("cut off", "empty"):
        weights.write_bytes(weights.read_bytes()[: 1000 if fault == "cut off" else 0])
    elif fault == "config":
        (tmp_path / "config.json").write_text("{")
    with pytest.raises((OSError, ValueError), match=str(tmp_path)) as raised:
        SSREncoder.from_pretrained(tmp_path)
    if fault not in ("cut off", "empty", "config") and not (sharded and WARNS_ONLY):
        assert isinstance(raised.value, ValueError) and name in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_other_precisions_are_loaded(tmp_path, dtype):
    make_ssr_encoder().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    loaded = SSREncoder.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(tensor, tensors[name].float()) for name, tensor in loaded.state_dict().items())


def test_weights_that_overflow_in_the_given_precision_are_rejected(tmp_path):
    encoder = make_ssr_encoder()
    encoder.norm.weight.data *= 1e6
    encoder.save_pretrained(tmp_path)
    assert SSREncoder.from_pretrained(tmp_path).dtype == torch.float32
    with pytest.raises(ValueError, match=f"{tmp_path} holds .* values that are not finite numbers in norm.weight"):
        SSREncoder.from_pretrained(tmp_path, dtype=torch.float16)


def test_arguments_can_replace_the_config(tmp_path):
    """The weights are checked against the model that is made with these arguments."""
    make_ssr_encoder().save_pretrained(tmp_path)
    assert SSREncoder.from_pretrained(tmp_path, num_attention_heads=4).config.num_attention_heads == 4
    with pytest.raises(ValueError, match=f"{tmp_path} .*weight expected shape"):
        SSREncoder.from_pretrained(tmp_path, inner_dim=8)


def test_output_loading_info(tmp_path):
    make_ssr_encoder().save_pretrained(tmp_path)
    model, info = SSREncoder.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training and info["missing_keys"] == []


def test_rejects_heads_that_do_not_divide_inner_dim():
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


@pytest.mark.parametrize("method", ["attention_probs", "forward"])
def test_the_default_mask_weight_is_1(method):
    encoder, mask = make_ssr_encoder(), torch.eye(32)[None, None]
    levels = torch.randn(3, 1, 17, 24)
    states = torch.randn(1, 5, 32), levels[-1] if method == "attention_probs" else levels
    with torch.no_grad():
        assert torch.equal(getattr(encoder, method)(*states, mask), getattr(encoder, method)(*states, mask, 1.0))
