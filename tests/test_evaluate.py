"""Tests of the metrics, tables and charts of examples/evaluate.py with small random models of the real classes."""

import csv
import json

import evaluate
import pytest
import torch
from conftest import POCKET, make_components, make_image_processor, make_picture, make_ssr_components
from diffusers import StableDiffusionPipeline
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
        "generated_dir": tmp_path / "drawn", "output_dir": tmp_path / "results", "dino": models / "dino",
        "clip": models / "clip", **changes,
    }  # fmt: skip
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def save(file, seed: int) -> Image.Image:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = make_picture(seed)
    picture.save(file)
    return picture


def table(tmp_path, name) -> dict[str, dict]:
    with (tmp_path / "results" / f"{name}.csv").open() as file:
        return {row.pop("subject"): row for row in csv.DictReader(file)}


def test_table_has_a_row_for_each_subject_and_a_mean(models, tmp_path, capsys):
    real = [save(tmp_path / "real" / "dog6" / f"{i}.png", i) for i in range(2)]
    save(tmp_path / "real" / "vase" / "0.png", 5)
    save(tmp_path / "real" / "clock" / "0.png", 5)
    drawn = [save(tmp_path / "drawn" / "dog6" / f"{i}.png", 10 + i) for i in range(3)]
    save(tmp_path / "drawn" / "vase" / "0.png", 5)
    (tmp_path / "drawn" / "vase" / "broken.png").write_bytes(b"nothing")
    prompts = {"dog6/0.png": "a cat", "dog6/2.png": "a dog on the beach"}
    lines = [json.dumps({"file": file, "prompt": prompt}) for file, prompt in prompts.items()]
    lines.append(json.dumps({"status": "failed", "prompt": "a cat"}))
    (tmp_path / "drawn" / "manifest.jsonl").write_text("\n".join(lines))
    evaluate.main(arguments(models, tmp_path, subjects_dir=tmp_path / "real"))

    output = capsys.readouterr().out
    assert "broken.png" in output and "left out clock" in output
    rows = table(tmp_path, "subjects")
    assert list(rows) == ["dog6", "vase", "mean"]
    # the generated picture is equal to the real one
    assert float(rows["vase"]["DINO"]) == float(rows["vase"]["CLIP-I"]) == 1.0
    assert rows["vase"]["CLIP-T"] == "" and rows["mean"]["CLIP-T"] == rows["dog6"]["CLIP-T"]
    dino, clip = DinoFeatures.from_pretrained(models / "dino"), ClipFeatures.from_pretrained(models / "clip")
    pairs = [torch.cosine_similarity(dino([a]), dino([b])).item() for a in drawn for b in real]
    assert float(rows["dog6"]["DINO"]) == pytest.approx(sum(pairs) / 6, abs=1e-4)
    expected = (clip([drawn[0], drawn[2]]) * clip.texts(list(prompts.values()))).sum(1).mean()
    assert float(rows["dog6"]["CLIP-T"]) == pytest.approx(expected.item(), abs=1e-4)
    mean = (float(rows["dog6"]["CLIP-I"]) + 1) / 2
    assert float(rows["mean"]["CLIP-I"]) == pytest.approx(mean, abs=1e-4)
    markdown = (tmp_path / "results" / "subjects.md").read_text()
    assert markdown.startswith("| subject | pictures | DINO | CLIP-I | CLIP-T |\n| --- |") and markdown in output
    assert Image.open(tmp_path / "results" / "subjects.png").width > 500


def test_features_match_the_models(models):
    pictures = [make_picture(seed) for seed in range(3)]
    clip = ClipFeatures.from_pretrained(models / "clip")
    clip.batch_size = 2
    pixels = torch.cat([evaluate_pixels(picture) for picture in pictures])
    with torch.no_grad():
        out = clip.model(
            pixel_values=pixels, **clip.tokenizer(["a cat", "a dog on the beach"], padding=True, return_tensors="pt")
        )
    torch.testing.assert_close(clip(pictures), out.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(clip.texts(["a cat", "a dog on the beach"]), out.text_embeds, atol=1e-5, rtol=1e-4)
    assert clip.texts(["cat " * 300]).shape == (1, 16)
    dino = DinoFeatures.from_pretrained(models / "dino")
    assert dino.processor.size["shortest_edge"] == 37
    assert mean_pairwise(dino(pictures), dino(pictures)) < 1


def evaluate_pixels(picture):
    from diffusers_ssr.images_ssr import preprocess

    return preprocess(picture, make_image_processor(), "crop")


def test_selection_counts_pictures_nearer_to_the_queried_subject():
    cat, dog, car = torch.eye(3)
    drawn = torch.stack([cat, dog, (0.8 * cat + 0.6 * car)])
    found = selection(drawn, cat[None], torch.stack([dog, car]))
    assert found["selected"] == pytest.approx(2 / 3)
    assert found["queried"] == pytest.approx(1.8 / 3) and found["other"] == pytest.approx(1.6 / 3)
    assert found["difference"] == pytest.approx(0.2 / 3)


@pytest.fixture
def two_subjects(tmp_path):
    """A reference with a cat in the left half and a dog in the right half."""
    picture = make_picture(0, (64, 32))
    folder = tmp_path / "references" / "1"
    (folder / "masks").mkdir(parents=True)
    picture.save(folder / "reference.png")
    halves = {}
    for left, name in ((0, "cat"), (32, "dog")):
        mask = Image.new("L", (64, 32))
        mask.paste(255, (left, 0, left + 32, 32))
        mask.save(folder / "masks" / f"{name}.png")
        halves[name] = picture.crop((left, 0, left + 32, 32))
    return halves


@pytest.mark.parametrize("route", ["clip", "clip_vision"])
def test_selection_is_measured_against_the_other_subjects_of_the_reference(models, tmp_path, two_subjects, route):
    options = {"selective_dir": tmp_path / "references"}
    if route == "clip_vision":
        options |= {"clip_vision": POCKET, "dino": "none"}
    for query, shown in (("cat", "cat"), ("dog", "cat")):
        folder = tmp_path / "drawn" / "1" / query
        folder.mkdir(parents=True)
        two_subjects[shown].save(folder / "0.png")
    evaluate.main(arguments(models, tmp_path, **options))
    rows = table(tmp_path, "selection")
    assert float(rows["1: cat"]["CLIP queried"]) == 1.0 and float(rows["1: cat"]["CLIP selected"]) == 1.0
    assert float(rows["1: dog"]["CLIP other"]) == 1.0 and float(rows["1: dog"]["CLIP selected"]) == 0.0
    assert float(rows["1: dog"]["CLIP difference"]) < 0
    assert float(rows["mean"]["CLIP selected"]) == float(rows["mean"]["chance"]) == 0.5
    assert ("DINO selected" in rows["mean"]) == (route == "clip")
    assert (tmp_path / "results" / "selection.png").exists() and (tmp_path / "results" / "selection.md").exists()


def test_cut_out_has_a_white_background():
    picture = Image.new("RGB", (20, 20), "red")
    mask = Image.new("L", (20, 20))
    mask.paste(255, (4, 6, 8, 12))
    mask.putpixel((5, 7), 0)
    cut = evaluate.cut_out(picture, mask)
    assert cut.size == (4, 6) and cut.getpixel((0, 0)) == (255, 0, 0) and cut.getpixel((1, 1)) == (255, 255, 255)


def test_pictures_are_generated_if_a_model_is_given(models, tmp_path):
    StableDiffusionPipeline(**make_components(), requires_safety_checker=False).save_pretrained(tmp_path / "base")
    for name, part in make_ssr_components().items():
        part.save_pretrained(tmp_path / "ssr" / name)
    save(tmp_path / "real" / "backpack_dog" / "0.png", 0)
    save(tmp_path / "real" / "can" / "0.png", 0)
    (tmp_path / "classes.txt").write_text("subject_name,class\ncan,tin\n")
    (tmp_path / "prompts.txt").write_text("a {} on the beach\n\na red {}\n")
    drawing = {
        "subjects_dir": tmp_path / "real", "pretrained_model_name_or_path": tmp_path / "base", "ssr": tmp_path / "ssr",
        "prompts": tmp_path / "prompts.txt", "images_per_prompt": 2, "num_inference_steps": 1,
        "classes": tmp_path / "classes.txt",
    }  # fmt: skip
    evaluate.main(arguments(models, tmp_path, **drawing))
    entries = [json.loads(line) for line in (tmp_path / "drawn" / "manifest.jsonl").read_text().splitlines()]
    assert len(entries) == 8 and len({(entry["prompt"], entry["seed"]) for entry in entries}) == 8
    assert {entry["query"] for entry in entries} == {"backpack dog", "tin"}
    rows = table(tmp_path, "subjects")
    assert rows["can"]["pictures"] == "4" and rows["can"]["CLIP-T"] != ""
    # pictures of an earlier run are not counted
    evaluate.main(arguments(models, tmp_path, **{**drawing, "images_per_prompt": 1}))
    assert table(tmp_path, "subjects")["can"]["pictures"] == "2"


@pytest.mark.parametrize("line", ["can, tin, box", "can;tin", "can"])
def test_a_line_of_classes_that_cannot_be_read_raises_an_error(tmp_path, line):
    (tmp_path / "classes.txt").write_text(f"dog,dog\n\n{line}\n")
    with pytest.raises(ValueError, match="`classes`: line 3 of .* is not of the form subject,class"):
        evaluate.read_classes(tmp_path / "classes.txt")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "subjects_dir"),
        ({"subjects_dir": ".", "selective_dir": "."}, "selective_dir"),
        ({"subjects_dir": "nowhere"}, "subjects_dir"),
        ({"subjects_dir": ".", "ssr": "a"}, "pretrained_model_name_or_path"),
        ({"subjects_dir": ".", "generated_dir": "nowhere"}, "generated_dir"),
        ({"subjects_dir": ".", "generated_dir": ".", "classes": "nowhere"}, "classes"),
        ({"subjects_dir": ".", "dino": "none", "clip": "none"}, "dino"),
    ],
)
def test_invalid_options_raise_an_error_with_the_option_name(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate.check_args(evaluate.parse_args(arguments(tmp_path, tmp_path, **changes)))


def test_empty_generated_dir_raises_an_error(models, tmp_path):
    save(tmp_path / "real" / "dog" / "0.png", 0)
    (tmp_path / "drawn").mkdir()
    with pytest.raises(ValueError, match="generated_dir"):
        evaluate.main(arguments(models, tmp_path, subjects_dir=tmp_path / "real"))
