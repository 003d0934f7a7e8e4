"""train_ssr.py: the loss, the saved files, and resuming after an interruption."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import pytest
import torch
import train_ssr
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from conftest import (
    ROOT,
    make_components,
    make_image_encoder,
    make_image_processor,
    make_picture,
    make_ssr_encoder,
    make_unet,
)
from diffusers import StableDiffusionPipeline
from diffusers_ssr import SSREncoder, StableDiffusionSSRPipeline
from PIL import Image
from safetensors.torch import load_file
from training_options import check_args, parse_args


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a base model and a vision encoder."""
    folder = tmp_path_factory.mktemp("models")
    StableDiffusionPipeline(**make_components(), requires_safety_checker=False).save_pretrained(folder / "base")
    make_image_encoder().save_pretrained(folder / "clip")
    make_image_processor().save_pretrained(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for index in range(6):
        make_picture(index, (40, 32)).save(folder / f"{index}.png")
        lines.append(
            {"file_name": f"{index}.png", "text": f"a cat and a dog {index}", "query": ("cat", "dog")[index % 2]}
        )
    mask = Image.new("L", (40, 32))
    mask.paste(255, (8, 0, 24, 20))
    mask.save(folder / "mask.png")
    lines[2]["mask_file_name"] = "mask.png"
    for line in lines[::3]:
        line["reference_file_name"] = line["file_name"]
    # two subjects in one target, one of them with a mask
    lines[5] |= {
        "reference_file_name": ["1.png", "0.png"], "query": ["dog", "cat"], "mask_file_name": [None, "mask.png"],
    }  # fmt: skip
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


MISSING_TRACKERS = sorted({tracker.value for tracker in LoggerType} - {"all", *map(str, get_available_trackers())})
# without the sizes of a new encoder
NO_SIZES = {"inner_dim": None, "num_attention_heads": None}


def arguments(models, pictures, output_dir, **changes) -> list[str]:
    options = {
        "pretrained_model_name_or_path": models / "base",
        "image_encoder_name_or_path": models / "clip",
        "train_data_dir": pictures,
        "output_dir": output_dir,
        "resolution": 16,
        "min_image_size": 8,
        "inner_dim": 16,
        "num_attention_heads": 2,
        "train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "mixed_precision": "no",
        "report_to": "none",
        "prompt_dropout": 0.5,
        "subject_dropout": 0.2,
        "dataloader_num_workers": 2,
        **changes,
    }
    line = []
    for name, value in options.items():
        if value is True:
            line.append(f"--{name}")
        elif value is not None:
            line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def weights(folder, name="ssr_encoder") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "diffusion_pytorch_model.safetensors")


def differing(first: dict, second: dict) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]


@pytest.fixture(scope="module")
def trained(models, pictures, tmp_path_factory):
    """The result of an uninterrupted run of four steps, with all options that have a state."""
    folder = tmp_path_factory.mktemp("trained")
    train_ssr.main(arguments(models, pictures, folder, **STATEFUL))
    return folder


STATEFUL = {
    "use_ema": True,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 1,
    "gradient_accumulation_steps": 2,
    "mask_column": "mask",
    "mask_weight": 2.0,
}


def test_training_changes_only_the_encoder(models, pictures, trained):
    args = parse_args("", arguments(models, pictures, trained, **STATEFUL))
    torch.manual_seed(0)
    train_ssr.set_seed(0)
    pipe, fresh = train_ssr.load_models(args)
    last = weights(trained / "checkpoint-4")
    assert set(differing(last, fresh.state_dict())) == set(last)
    assert differing(weights(trained), last), "the result is the average, not the last step"
    assert not differing(weights(trained), weights(trained / "checkpoint-4", "ssr_encoder_ema"))
    assert not differing(dict(pipe.unet.state_dict()), dict(make_unet().state_dict()))


def test_a_new_encoder_is_initialised_with_the_text_projections(models, pictures, tmp_path):
    args = parse_args("", arguments(models, pictures, tmp_path))
    pipe, encoder = train_ssr.load_models(args)
    layers = {name: layer for name, layer in pipe.unet.named_modules() if name.endswith("attn2")}
    args.init_from_text = False
    _, other = train_ssr.load_models(args)
    for name, layer in layers.items():
        pair, other_pair = (each.layers[name.replace(".", "_")] for each in (encoder, other))
        assert torch.equal(pair["to_k"].weight, layer.to_k.weight)
        assert torch.equal(pair["to_v"].weight, layer.to_v.weight)
        assert not torch.equal(other_pair["to_k"].weight, layer.to_k.weight)


def test_the_result_loads_into_a_pipeline(models, trained):
    pipe = StableDiffusionSSRPipeline.from_pretrained(models / "base", safety_checker=None)
    pipe.load_ssr(trained)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "a cat", subject_image=make_picture(), subject_query="cat", num_inference_steps=1, height=16, width=16
    )
    assert image.images[0].size == (16, 16)
    assert pipe.ssr_image_processor.crop_size["height"] == 32


def test_a_resumed_run_has_the_same_result_as_an_uninterrupted_run(models, pictures, trained, tmp_path, monkeypatch):
    denoising_loss = train_ssr.denoising_loss
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return denoising_loss(*args)

    monkeypatch.setattr(train_ssr, "denoising_loss", interrupted)
    options = arguments(models, pictures, tmp_path, **STATEFUL)
    with pytest.raises(KeyboardInterrupt):
        train_ssr.main(options)
    assert [path.name for path in train_ssr.checkpoints(tmp_path)] == ["checkpoint-2"]
    pipe = StableDiffusionSSRPipeline.from_pretrained(models / "base", safety_checker=None)
    pipe.load_ssr(tmp_path / "checkpoint-2")  # during the training
    monkeypatch.setattr(train_ssr, "denoising_loss", denoising_loss)
    # the global random state has no influence
    torch.rand(7)
    train_ssr.main([*options, "--resume_from_checkpoint", "latest"])
    assert not differing(weights(tmp_path / "checkpoint-4"), weights(trained / "checkpoint-4"))
    assert not differing(weights(tmp_path), weights(trained))


class Rotating:
    """Samples of a list, in its order. `position` is the epoch and the number of samples used."""

    bad: dict[str, str] = {}

    def __init__(self, samples, position):
        self.samples, self.position = samples, tuple(position)

    def __iter__(self):
        while True:
            self.position = (self.position[0], self.position[1] + 1)
            yield self.samples[(self.position[1] - 1) % len(self.samples)]


def test_samples_can_come_from_another_source(models, pictures, tmp_path, monkeypatch):
    """No row is read, and a resumed run goes on with the next sample."""
    monkeypatch.setattr(train_ssr, "load_rows", lambda *_: pytest.fail("rows were read"))
    positions = []

    def open_samples(prepare, position):
        positions.append(tuple(position))
        row = {"text": "a cat", "query": "cat"}
        return Rotating([prepare({**row, "image": make_picture(index)}) for index in range(3)], position)

    for folder, lengths in (("uncut", (4,)), ("cut", (2, 4))):
        for length in lengths:
            line = arguments(models, "unused", tmp_path / folder, max_train_steps=length)
            train_ssr.main([*line, "--resume_from_checkpoint", "latest"], open_samples=open_samples)
    assert positions == [(0, 0), (0, 0), (0, 4)]
    assert not differing(weights(tmp_path / "uncut"), weights(tmp_path / "cut"))


def test_a_run_killed_while_saving_a_checkpoint_can_be_resumed(models, pictures, trained, tmp_path):
    script = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv.pop(1))
import accelerate.accelerator, train_ssr
save = accelerate.accelerator.save_accelerator_state
calls = []
def killed(folder, *args, **kwargs):
    calls.append(folder)
    if len(calls) == 2:
        open(f"{folder}/optimizer.bin", "wb").write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return save(folder, *args, **kwargs)
accelerate.accelerator.save_accelerator_state = killed
train_ssr.main(sys.argv[1:])
"""
    options = arguments(models, pictures, tmp_path, **STATEFUL)
    command = [sys.executable, "-c", script, str(ROOT / "examples"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert (tmp_path / "checkpoint-4.part").exists()
    assert [path.name for path in train_ssr.checkpoints(tmp_path)] == ["checkpoint-2"]
    train_ssr.main([*options, "--resume_from_checkpoint", "latest"])
    assert not differing(weights(tmp_path), weights(trained))
    assert not (tmp_path / "checkpoint-4.part").exists()


def test_two_processes_have_the_same_result_as_one(models, pictures, tmp_path):
    """Two processes with batches of 2, compared with one process with batches of 4."""
    options = {"max_train_steps": 3, "learning_rate": 1e-4, "gradient_accumulation_steps": 2}
    train_ssr.main(arguments(models, pictures, tmp_path / "one", train_batch_size=4, **options))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [
        *launch,
        str(ROOT / "examples" / "train_ssr.py"),
        *arguments(models, pictures, tmp_path / "two", **options),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    states = [json.loads((tmp_path / "two" / "checkpoint-2" / f"run_{i}.json").read_text()) for i in range(2)]
    assert [state["num_processes"] for state in states] == [2, 2]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    args = parse_args("", arguments(models, pictures, tmp_path))
    train_ssr.set_seed(0)
    fresh = train_ssr.load_models(args)[1].state_dict()
    for name, tensor in one.items():
        moved = (tensor - fresh[name]).norm()
        assert moved > 0, name
        assert (two[name] - tensor).norm() < 0.02 * moved, name


def test_processes_that_are_not_connected_are_rejected(models, pictures, tmp_path, monkeypatch):
    """This happens with `torchrun` on CPUs. Each process would overwrite the files of the other one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="ACCELERATE_USE_CPU=1"):
        train_ssr.main(arguments(models, pictures, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def frozen_and_batch(models, pictures, tmp_path, **changes):
    args = parse_args("", arguments(models, pictures, tmp_path, **changes))
    train_ssr.set_seed(0)
    pipe, encoder = train_ssr.load_models(args)
    frozen = train_ssr.FrozenFeatures(pipe, encoder.config.image_levels, torch.float32, None)
    features = {
        "latent_mean": torch.randn(4, 4, 8, 8),
        "latent_std": torch.rand(4, 4, 8, 8),
        "levels": torch.randn(4, 3, 17, 24),
        "caption_states": torch.randn(4, frozen.empty_text.shape[0], 32),
        "query_states": torch.randn(4, frozen.empty_text.shape[0], 32),
        "row": torch.arange(4),
    }
    scheduler = train_ssr.DDPMScheduler.from_config(pipe.scheduler.config)
    return args, pipe, encoder, frozen, features, scheduler


def loss_and_gradients(args, pipe, encoder, frozen, features, scheduler):
    encoder.zero_grad()
    drawn = train_ssr.draw(0, range(len(features["latent_mean"])), (4, 8, 8))
    model = train_ssr.SubjectEncoding(encoder)
    conditions, consistency = train_ssr.encode_subjects(model, frozen, features, drawn, args)
    with train_ssr.subject_in_unet(pipe.unet, encoder, conditions):
        mse = train_ssr.denoising_loss(frozen, features, drawn, scheduler, args)
        (mse + args.consistency_weight * consistency).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in encoder.named_parameters()}
    return {"mse": mse.detach(), "consistency": consistency.detach()}, gradients


def test_gradient_checkpointing_gives_the_same_gradients(models, pictures, tmp_path):
    args, pipe, *rest = frozen_and_batch(models, pictures, tmp_path)
    _, plain = loss_and_gradients(args, pipe, *rest)
    pipe.unet.enable_gradient_checkpointing()
    runs = []
    block = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0")
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    _, checkpointed = loss_and_gradients(args, pipe, *rest)
    assert len(runs) == 2, "the block was not run again in the backward pass"
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-8)


def test_training_with_gradient_checkpointing_has_the_same_result(models, pictures, tmp_path):
    results = {}
    for option in (None, True):
        options = {"gradient_checkpointing": option, "max_train_steps": 2, "learning_rate": 1e-3}
        train_ssr.main(arguments(models, pictures, tmp_path / str(option), **options))
        results[option] = weights(tmp_path / str(option))
    for name, tensor in results[None].items():
        torch.testing.assert_close(results[True][name], tensor, atol=1e-5, rtol=0)


def test_the_loss_and_its_dropouts(models, pictures, tmp_path):
    args, pipe, encoder, frozen, features, scheduler = frozen_and_batch(
        models, pictures, tmp_path, prompt_dropout=1.0, subject_dropout=1.0
    )
    parts, _ = loss_and_gradients(args, pipe, encoder, frozen, features, scheduler)
    # if all prompts and subjects are dropped, they have no influence
    other = {
        **features,
        **{name: torch.randn_like(features[name]) for name in ("levels", "caption_states", "query_states")},
    }
    torch.testing.assert_close(loss_and_gradients(args, pipe, encoder, frozen, other, scheduler)[0], parts)
    args.subject_dropout = 0.0
    with_subject, _ = loss_and_gradients(args, pipe, encoder, frozen, features, scheduler)
    assert abs(with_subject["mse"] - parts["mse"]) > 1e-5
    args.prompt_dropout = 0.0
    with_prompt, _ = loss_and_gradients(args, pipe, encoder, frozen, features, scheduler)
    assert abs(with_prompt["mse"] - with_subject["mse"]) > 1e-5


def test_the_target_of_each_prediction_type(models, pictures, tmp_path):
    args, pipe, encoder, frozen, features, scheduler = frozen_and_batch(models, pictures, tmp_path)
    drawn = train_ssr.draw(0, range(4), (4, 8, 8))
    latents = (
        features["latent_mean"] + features["latent_std"] * drawn["latent_noise"]
    ) * pipe.vae.config.scaling_factor
    timesteps = (drawn["shares"][:, 0] ** args.timestep_bias * 1000).long()
    targets = {
        "epsilon": drawn["noise"],
        "sample": latents,
        "v_prediction": scheduler.get_velocity(latents, drawn["noise"], timesteps),
    }
    pipe.unet.register_forward_hook(lambda *_: SimpleNamespace(sample=features["latent_mean"] + 0 * _[2].sample))
    for args.prediction_type, target in targets.items():
        parts, _ = loss_and_gradients(args, pipe, encoder, frozen, features, scheduler)
        torch.testing.assert_close(parts["mse"], (features["latent_mean"] - target).square().mean())
    args.prediction_type, args.latents = "sample", "mode"
    parts, _ = loss_and_gradients(args, pipe, encoder, frozen, features, scheduler)
    scale = pipe.vae.config.scaling_factor
    torch.testing.assert_close(parts["mse"], (features["latent_mean"] * (1 - scale)).square().mean())


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_a_sample_without_a_mask_does_not_depend_on_masks_in_its_batch(models, pictures, tmp_path, weight):
    """If only some samples of a batch have a mask, the others get a mask that has no effect."""
    _, pipe, encoder, frozen, _, _ = frozen_and_batch(models, pictures, tmp_path)
    picture = torch.rand(3, 32, 32)
    sample = {
        "pixel_values": torch.rand(3, 16, 16), "reference_values": picture[None], "caption": "a cat", "queries": ["cat"],
    }  # fmt: skip
    features = frozen([{**sample, "masks": [None]}, {**sample, "masks": [torch.eye(32)[None]]}], weight)
    levels = features["levels"].transpose(0, 1)
    masked = encoder(features["query_states"], levels, features["mask"], weight)
    plain = encoder(features["query_states"], levels)
    torch.testing.assert_close(masked[0], plain[0], atol=1e-5, rtol=1e-5)
    assert (masked[1] - plain[1]).abs().max() > 1e-3
    assert "mask" not in frozen([{**sample, "masks": [None]}], weight)


def several(features: dict, row: list[int]) -> dict:
    """Returns the features with a different number of subjects per row. `row` is the index of the row of each
    subject."""
    index = torch.arange(len(row))
    subjects = {name: features[name][index] for name in ("levels", "query_states")}
    rows = {name: features[name][: row[-1] + 1] for name in ("latent_mean", "latent_std", "caption_states")}
    return {**rows, **subjects, "row": torch.tensor(row)}


def test_join_subjects_agrees_with_a_pipeline(models, pictures, tmp_path):
    """The UNet has the same output as in a pipeline call with `subject=[cat + dog, dog]`."""
    _, pipe, encoder, frozen, features, _ = frozen_and_batch(models, pictures, tmp_path)
    pipe.load_ssr(encoder, image_encoder=pipe.ssr_image_encoder, image_processor=pipe.ssr_image_processor)
    cat, dog = (pipe.encode_subject(make_picture(seed), name) for seed, name in ((1, "cat"), (2, "dog")))
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    pipe.unet.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    text = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "latent"}
    pipe(["a", "b"], subject=[cat + dog, dog], subject_scale=1.0, **text)
    (args, kwargs), expected = seen
    embeds = torch.cat([each.subjects[0].embeds for each in (cat, dog, dog)])
    pairs = dict(zip(encoder.config.attention_layers, encoder.project(embeds), strict=True))
    conditions = train_ssr.join_subjects(pairs, torch.tensor([0, 0, 1]))
    seen.clear()
    kwargs = {name: value for name, value in kwargs.items() if name != "cross_attention_kwargs"}
    with torch.no_grad(), train_ssr.subject_in_unet(pipe.unet, encoder, conditions):
        pipe.unet(*args, **kwargs)
    torch.testing.assert_close(seen[1], expected, atol=1e-6, rtol=1e-5)


def test_gradients_reach_each_subject_of_a_row(models, pictures, tmp_path):
    args, pipe, encoder, frozen, features, scheduler = frozen_and_batch(
        models, pictures, tmp_path, subject_dropout=0.0, consistency_weight=0.0
    )
    features = several(features, [0, 0, 1, 1])
    features["levels"].requires_grad_(True)
    loss_and_gradients(args, pipe, encoder, frozen, features, scheduler)
    assert all(gradient.abs().max() > 0 for gradient in features["levels"].grad)


def test_a_row_with_one_subject_does_not_depend_on_other_rows(models, pictures, tmp_path):
    """The prediction for the row is the same in a batch with a row of two subjects as in a batch with rows of one
    subject. If subjects are dropped, all subjects of a row are dropped."""
    args, pipe, encoder, frozen, features, scheduler = frozen_and_batch(
        models, pictures, tmp_path, subject_dropout=0.0, consistency_weight=0.0
    )

    def predicted(features):
        seen = []
        handle = pipe.unet.register_forward_hook(lambda module, args, out: seen.append(out[0]))
        loss_and_gradients(args, pipe, encoder, frozen, features, scheduler)
        handle.remove()
        return seen[0].detach()

    mixed, single = predicted(several(features, [0, 1, 1])), predicted(several(features, [0, 1]))
    torch.testing.assert_close(mixed[0], single[0], atol=1e-6, rtol=1e-5)
    assert (mixed[1] - single[1]).abs().max() > 1e-4
    args.subject_dropout = 1.0
    dropped = predicted(several(features, [0, 0, 1]))
    other = {**features, "levels": torch.randn_like(features["levels"])}
    torch.testing.assert_close(predicted(several(other, [0, 0, 1])), dropped)


def test_join_subjects_does_not_change_rows_with_one_subject():
    pairs = [(torch.randn(3, 5, 8), torch.randn(3, 5, 8))]
    conditions = train_ssr.join_subjects(pairs, torch.arange(3))
    assert conditions.pairs is pairs and conditions.token_subject is None


def test_random_numbers_depend_on_the_number_of_the_sample():
    together = train_ssr.draw(3, range(10, 14), (2, 3))
    later = train_ssr.draw(3, [12], (2, 3))
    for name, values in later.items():
        assert torch.equal(values[0], together[name][2])
    assert not torch.equal(train_ssr.draw(4, range(10, 14), (2, 3))["noise"], together["noise"])
    shares = train_ssr.draw(0, range(2000), (1,))["shares"]
    assert (shares.mean(0) - 0.5).abs().max() < 0.03


def test_cached_features_give_the_same_weights(models, pictures, tmp_path, monkeypatch):
    options = {"max_train_steps": 6, "mask_column": "mask", "train_batch_size": 1}
    train_ssr.main(arguments(models, pictures, tmp_path / "plain", **options))
    cached = arguments(models, pictures, tmp_path / "cached", cache_features=tmp_path / "cache", **options)
    train_ssr.main(cached)
    assert not differing(weights(tmp_path / "cached"), weights(tmp_path / "plain"))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 6
    # in the second run, all features are in the cache
    monkeypatch.setattr(train_ssr.FrozenFeatures, "_compute", None)
    train_ssr.main(cached)
    assert not differing(weights(tmp_path / "cached"), weights(tmp_path / "plain"))


def test_checkpoint_limit_and_tracker(models, pictures, tmp_path):
    options = {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "report_to": "tensorboard"}
    train_ssr.main(arguments(models, pictures, tmp_path, max_train_steps=3, **options))
    assert [path.name for path in train_ssr.checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))
    assert not list(tmp_path.glob("*.part"))


def test_a_resumed_run_with_shards_has_the_same_result(models, pictures, tmp_path, monkeypatch):
    shards = tmp_path / "shards"
    shards.mkdir()
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    for shard, rows in enumerate((lines[:3], lines[3:])):
        with tarfile.open(shards / f"{shard}.tar", "w") as archive:
            for line in rows:
                key = line["file_name"].removesuffix(".png")
                picture = (pictures / line["file_name"]).read_bytes()
                for name, content in (
                    (f"{key}.png", picture if key != "4" else picture[:500]),
                    (f"{key}.json", json.dumps({"text": line["text"], "query": line["query"]}).encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    # a run uses 8 samples and an epoch has 5, so the run ends in the second epoch
    options = {"train_data_dir": shards, "shuffle_buffer_size": 3}
    train_ssr.main(arguments(models, pictures, tmp_path / "uncut", **options))
    denoising_loss = train_ssr.denoising_loss
    left = [1, 1, 1]
    monkeypatch.setattr(train_ssr, "denoising_loss", lambda *args: left.pop() and denoising_loss(*args))
    with pytest.raises(IndexError):
        train_ssr.main(arguments(models, pictures, tmp_path / "cut", **options))
    monkeypatch.setattr(train_ssr, "denoising_loss", denoising_loss)
    train_ssr.main(arguments(models, pictures, tmp_path / "cut", resume_from_checkpoint="latest", **options))
    assert not differing(weights(tmp_path / "cut"), weights(tmp_path / "uncut"))
    uncut, cut = (json.loads((tmp_path / name / "bad_samples.json").read_text()) for name in ("uncut", "cut"))
    ((name, reason),) = uncut.items()
    assert name.endswith("1.tar:4") and "decoded" in reason and cut == uncut


def test_mixed_precision_keeps_the_encoder_in_float32(models, pictures, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    train_ssr.main(arguments(models, pictures, tmp_path, mixed_precision="bf16", max_train_steps=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path).values())


def test_fine_tuning_starts_from_the_given_encoder(models, pictures, trained, tmp_path):
    options = arguments(
        models, pictures, tmp_path, image_encoder_name_or_path=None, ssr_encoder_name_or_path=trained, **NO_SIZES
    )
    assert parse_args("", options).consistency_weight == 0.001
    assert parse_args("", arguments(models, pictures, tmp_path)).consistency_weight == 0.1
    _, encoder = train_ssr.load_models(parse_args("", options))
    assert not differing(dict(encoder.state_dict()), weights(trained))
    train_ssr.main([*options, "--learning_rate", "1e-6", "--max_train_steps", "1"])
    for name, tensor in weights(trained).items():
        torch.testing.assert_close(weights(tmp_path)[name], tensor, atol=1e-5, rtol=0)


def test_an_encoder_of_another_size_is_rejected(models, pictures, tmp_path):
    make_ssr_encoder(vision_hidden_size=20).save_pretrained(tmp_path / "ssr_encoder")
    options = arguments(models, pictures, tmp_path, ssr_encoder_name_or_path=tmp_path, **NO_SIZES)
    with pytest.raises(ValueError, match="width 20"):
        train_ssr.load_models(parse_args("", options))


def test_bad_samples_are_left_out_and_reported(models, pictures, tmp_path):
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    for line in lines:
        shutil.copy(pictures / line["file_name"], tmp_path)
    lines = [{**lines[0], "file_name": "missing.png"}, *lines, {"file_name": lines[0]["file_name"], "query": "cat"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{broken")
    train_ssr.main(arguments(models, tmp_path, tmp_path / "out", max_train_steps=5))
    bad = json.loads((tmp_path / "out" / "bad_samples.json").read_text())
    assert len(bad) == 3
    assert {reason.split(":")[0] for reason in bad.values()} == {
        "`image` cannot be read", "not JSON", "text is missing or empty",
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resolution": 30}, "resolution"),
        ({"train_data_dir": None}, "train_data_dir"),
        ({"image_encoder_name_or_path": None}, "image_encoder_name_or_path"),
        ({"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"mask_column": "mask", "mask_weight": -1}, "mask_weight"),
        ({"report_to": "no_tracker"}, "report_to.*tensorboard"),
        *(({"report_to": name}, "report_to.*not installed") for name in MISSING_TRACKERS),
    ],
)
def test_errors_name_the_invalid_option(changes, message):
    options = arguments(ROOT, ROOT, "out", **changes)
    with pytest.raises(ValueError, match=message):
        check_args(parse_args("", options))


@pytest.mark.parametrize(
    "option, value",
    [("prompt_dropout", 1.5), ("train_batch_size", 0), ("max_train_steps", -1), ("seed", -1), ("resol", 16)],
)
def test_invalid_values_and_abbreviations_end_the_script(option, value, capsys):
    with pytest.raises(SystemExit):
        parse_args("", arguments(ROOT, ROOT, "out", **{option: value}))
    assert f"--{option}" in capsys.readouterr().err


@pytest.mark.parametrize("form,key", [("released", "released_code"), ("paper", "paper")])
def test_consistency_loss_agrees_with_the_released_code_and_the_paper(form, key):
    tensors = load_file(ROOT / "tests" / "parity" / "consistency_loss.safetensors")
    query = tensors["query_embeds"].requires_grad_()
    subject = tensors["subject_embeds"].requires_grad_()
    loss = train_ssr.consistency_loss(subject, query, form)
    torch.testing.assert_close(loss, tensors[key].squeeze(), atol=1e-5, rtol=0)
    equal = torch.full((len(subject),), 1 / len(subject))
    torch.testing.assert_close(train_ssr.consistency_loss(subject, query, form, equal), loss)
    loss.backward()
    assert subject.grad.abs().sum() > 0 and query.grad is None


def test_consistency_loss_rejects_an_unknown_form():
    with pytest.raises(ValueError, match="`form`"):
        train_ssr.consistency_loss(torch.randn(1, 6, 4), torch.randn(1, 3, 4), "mean")


def test_encoder_and_average_can_be_loaded_from_a_checkpoint(models, trained):
    for name in ("ssr_encoder", "ssr_encoder_ema"):
        assert SSREncoder.from_pretrained(trained / "checkpoint-4", subfolder=name).config.inner_dim == 16


def test_the_default_resolution_is_that_of_the_base_model(models, pictures):
    args = parse_args(None, arguments(models, pictures, "out", resolution=None))
    check_args(args)
    pipe, _ = train_ssr.load_models(args)
    assert args.resolution == pipe.unet.config.sample_size * pipe.vae_scale_factor == 16
