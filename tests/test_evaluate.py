"""Tests of the metrics and tables of examples/evaluate.py with small random models of the real classes."""

import csv
import json

import evaluate
import pytest
import similarity
import torch
from conftest import POCKET, make_components, make_image_processor, make_picture, make_ssr_components
from diffusers_ssr import StableDiffusionSSRPipeline
from diffusers_ssr.images_ssr import preprocess
from PIL import Image
from similarity import ClipFeatures, DinoFeatures, mean_pairwise, selection
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 8, "initializer_range": 0.5}
    ViTModel(ViTConfig(**vision)).save_pretrained(folder / "dino")
    tokenizer = CLIPTokenizer.from_pretrained(POCKET, subfolder="tokenizer")
    text = {**sizes, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.5}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    make_image_processor().save_pretrained(folder / "clip")
    return folder


def arguments(models, tmp_path, **changes) -> list[str]:
    options = {
        "generated_dir": tmp_path / "generated", "output_dir": tmp_path / "results", "dino": models / "dino",
        "clip": models / "clip", **changes,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in options.items()]


def save(file, seed: int) -> Image.Image:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = make_picture(seed)
    image.save(file)
    return image


def table(tmp_path, name) -> dict[str, dict]:
    with (tmp_path / "results" / f"{name}.csv").open() as file:
        return {row.pop("subject"): row for row in csv.DictReader(file)}


def test_table_has_a_row_for_each_subject_and_a_mean(models, tmp_path, capsys):
    real = [save(tmp_path / "real" / "dog6" / f"{i}.png", i) for i in range(2)]
    save(tmp_path / "real" / "vase" / "0.png", 5)
    save(tmp_path / "real" / "clock" / "0.png", 5)
    generated = [save(tmp_path / "generated" / "dog6" / f"{i}.png", 10 + i) for i in range(3)]
    save(tmp_path / "generated" / "vase" / "0.png", 5)
    (tmp_path / "generated" / "vase" / "broken.png").write_bytes(b"nothing")
    prompts = {"dog6/0.png": "a cat", "dog6/2.png": "a dog on the beach"}
    lines = [json.dumps({"file": file, "prompt": prompt}) for file, prompt in prompts.items()]
    # rows without a file or a prompt
    lines += ["{}", '{"file": 3, "prompt": "a"}', '{"file": "dog6/1.png"}']
    (tmp_path / "generated" / "manifest.jsonl").write_text("\n".join(lines))
    evaluate.main(arguments(models, tmp_path, subjects_dir=tmp_path / "real"))

    output = capsys.readouterr().out
    assert "broken.png" in output and "left out clock" in output
    rows = table(tmp_path, "subjects")
    assert list(rows) == ["dog6", "vase", "mean"]
    # the generated image is equal to the real one
    assert float(rows["vase"]["DINO"]) == float(rows["vase"]["CLIP-I"]) == 1.0
    assert rows["vase"]["CLIP-T"] == "" and rows["mean"]["CLIP-T"] == rows["dog6"]["CLIP-T"]
    dino, clip = DinoFeatures.from_pretrained(models / "dino"), ClipFeatures.from_pretrained(models / "clip")
    pairs = [torch.cosine_similarity(dino([a]), dino([b])).item() for a in generated for b in real]
    assert float(rows["dog6"]["DINO"]) == pytest.approx(sum(pairs) / 6, abs=1e-4)
    expected = (clip([generated[0], generated[2]]) * clip.texts(list(prompts.values()))).sum(1).mean()
    assert float(rows["dog6"]["CLIP-T"]) == pytest.approx(expected.item(), abs=1e-4)
    mean = (float(rows["dog6"]["CLIP-I"]) + 1) / 2
    assert float(rows["mean"]["CLIP-I"]) == pytest.approx(mean, abs=1e-4)
    markdown = (tmp_path / "results" / "subjects.md").read_text()
    assert markdown.startswith("| subject | images | DINO | CLIP-I | CLIP-T |\n| --- |") and markdown in output
    assert "process 0 of 1" in output and "3 of 3 subjects" in output


def test_features_match_the_models(models, monkeypatch, capsys):
    images = [make_picture(seed) for seed in range(3)]
    clip = ClipFeatures.from_pretrained(models / "clip")
    monkeypatch.setattr(similarity, "BATCH_SIZE", 2)
    pixels = torch.cat([preprocess(image, make_image_processor(), "crop") for image in images])
    with torch.no_grad():
        out = clip.model(
            pixel_values=pixels, **clip.tokenizer(["a cat", "a dog on the beach"], padding=True, return_tensors="pt")
        )
    torch.testing.assert_close(clip(images), out.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(clip.texts(["a cat", "a dog on the beach"]), out.text_embeds, atol=1e-5, rtol=1e-4)
    assert clip.texts(["cat " * 300 + "umbrella"] * 2).shape == (2, 16)
    # what was cut is printed once
    said = capsys.readouterr().err
    assert said.count("this part was cut") == said.count("umbrella") == 1
    dino = DinoFeatures.from_pretrained(models / "dino")
    assert dino.processor.size["shortest_edge"] == 37
    assert mean_pairwise(dino(images), dino(images)) < 1


def test_selection_counts_images_nearer_to_the_queried_subject():
    cat, dog, car = torch.eye(3)
    generated = torch.stack([cat, dog, (0.8 * cat + 0.6 * car)])
    found = selection(generated, cat[None], torch.stack([dog, car]))
    assert found["selected"] == pytest.approx(2 / 3)
    assert found["queried"] == pytest.approx(1.8 / 3) and found["other"] == pytest.approx(1.6 / 3)
    assert found["difference"] == pytest.approx(0.2 / 3)


def test_selection_is_measured_against_the_other_subjects_of_the_reference(models, tmp_path):
    crops = {
        name: save(tmp_path / "references" / "1" / "crops" / f"{name}.png", i) for i, name in enumerate(["cat", "dog"])
    }
    for query in crops:
        folder = tmp_path / "generated" / "1" / query
        folder.mkdir(parents=True)
        crops["cat"].save(folder / "0.png")
    evaluate.main(arguments(models, tmp_path, selective_dir=tmp_path / "references"))
    rows = table(tmp_path, "selection")
    assert float(rows["1: cat"]["CLIP queried"]) == 1.0 and float(rows["1: cat"]["CLIP selected"]) == 1.0
    assert float(rows["1: dog"]["CLIP other"]) == 1.0 and float(rows["1: dog"]["CLIP selected"]) == 0.0
    assert float(rows["1: dog"]["CLIP difference"]) < 0
    assert float(rows["mean"]["DINO selected"]) == float(rows["mean"]["chance"]) == 0.5


def test_images_are_generated_if_a_model_is_given(models, tmp_path):
    pipe = StableDiffusionSSRPipeline(**make_components(), **make_ssr_components(), requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "pipe")
    save(tmp_path / "real" / "backpack_dog" / "0.png", 0)
    save(tmp_path / "real" / "can" / "0.png", 0)
    (tmp_path / "classes.txt").write_text("subject_name,class\ncan,tin\n")
    (tmp_path / "prompts.txt").write_text("a {} on the beach\n\na red {}\n")
    options = {
        "subjects_dir": tmp_path / "real", "checkpoint": tmp_path / "pipe",
        "prompts": tmp_path / "prompts.txt", "images_per_prompt": 2, "num_inference_steps": 1,
        "classes": tmp_path / "classes.txt",
    }  # fmt: skip
    evaluate.main(arguments(models, tmp_path, **options))
    entries = [json.loads(line) for line in (tmp_path / "generated" / "manifest.jsonl").read_text().splitlines()]
    assert len(entries) == 8 and len({(entry["prompt"], entry["seed"]) for entry in entries}) == 8
    assert {entry["query"] for entry in entries} == {"backpack dog", "tin"}
    rows = table(tmp_path, "subjects")
    assert rows["can"]["images"] == "4" and rows["can"]["CLIP-T"] != ""
    # images of an earlier run are not counted
    evaluate.main(arguments(models, tmp_path, **{**options, "images_per_prompt": 1}))
    assert table(tmp_path, "subjects")["can"]["images"] == "2"


@pytest.mark.parametrize("line", ["3", "[]", "{half", "[" * 10**5, "caf\u00e9"])
def test_a_manifest_that_cannot_be_read_is_named(line, tmp_path):
    content = '{"file": "a.png", "prompt": "a"}\n' + line
    (tmp_path / "manifest.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="manifest.jsonl, line [12]: "):
        evaluate.read_prompts(tmp_path)


@pytest.mark.parametrize("line", ["can, tin, box", "can;tin", "can"])
def test_a_line_of_classes_that_cannot_be_read_raises_an_error(tmp_path, line):
    (tmp_path / "classes.txt").write_text(f"dog,dog\n\n{line}\n")
    with pytest.raises(ValueError, match=f"`classes`: .* lines of the form subject,class, but holds '{line}'"):
        evaluate.read_classes(tmp_path / "classes.txt")


def test_empty_generated_dir_raises_an_error(models, tmp_path):
    save(tmp_path / "real" / "dog" / "0.png", 0)
    with pytest.raises(ValueError, match="generated_dir"):
        evaluate.main(arguments(models, tmp_path, subjects_dir=tmp_path / "real"))
