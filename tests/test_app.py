"""Tests of the images and files that examples/app.py creates, without a browser."""

import io
import itertools
import runpy
import struct
import sys
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from conftest import POCKET, ROOT
from page.checkpoints import Checkpoints
from page.edges import find_edges, fit
from page.painting import CANVAS_SIDE, canvas_for, painted_mask
from page.request import GenerationRequest, SubjectChoice
from page.script import needed_images, write_bundle, write_script
from page.server import parse_args, start
from page.sessions import Sessions
from page.studio import Cancelled, Studio
from page.uploads import LONGEST_SIDE, from_text, open_upload, to_text
from PIL import Image, ImageDraw

from tools.pocket.judge import load_judge
from tools.pocket.world import CATEGORY_NAMES


CAT_AND_CAR = POCKET / "references" / "1_cat_car.png"
HOUSE_AND_DOG = POCKET / "references" / "3_house_dog.png"
FAST = {"num_inference_steps": 4, "seeds": (3,)}


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(Checkpoints.from_options(parse_args([])))


def subject(query: str = "cat", image=CAT_AND_CAR, **choice) -> SubjectChoice:
    return SubjectChoice(image=open_upload(image), query=query, **choice)


def half(size: tuple[int, int], right: bool) -> Image.Image:
    mask = Image.new("L", size)
    left = size[0] // 2 * right
    ImageDraw.Draw(mask).rectangle((left, 0, left + size[0] // 2 - 1, size[1]), fill=255)
    return mask


def edges() -> Image.Image:
    return find_edges(open_upload(HOUSE_AND_DOG), 64)


REQUESTS = {
    "a query": {"prompt": "a cat in the snow", "subjects": (subject(),)},
    "a mask": {
        "prompt": "a thing",
        "subjects": (SubjectChoice(open_upload(CAT_AND_CAR), mask=half((64, 64), True)),),
    },
    "two subjects with regions and step range": {
        "prompt": "a cat and a dog",
        "negative_prompt": "blurred",
        "subjects": (
            subject(scale=0.8, region=half((512, 512), False)),
            subject("dog", HOUSE_AND_DOG, mask=half((64, 64), False), region=half((512, 512), True)),
        ),
        "subject_start": 0.1,
        "subject_end": 0.8,
    },
    "no subject, special characters": {"prompt": "a \"cat\"\nin 'the' \\ snow\N{SNOWFLAKE} {x}"},
    "edges": {"prompt": "a house", "subjects": (subject("house", HOUSE_AND_DOG),), "edges": edges()},
    "video": {"prompt": "a cat", "subjects": (subject(),), "num_frames": 3},
}


SEEDS = {"a query": (3, 4, 5), "edges": (3, 4)}


def as_array(result) -> np.ndarray:
    return np.stack([np.asarray(image) for image in result])


# images


def png(size: tuple[int, int] = (32, 16), mode: str = "RGB", **save) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(file, "PNG", **save)
    return file.getvalue()


def declared(width: int, height: int) -> bytes:
    """Returns a PNG whose header declares a size that is different from the size of its data."""
    header = b"IHDR" + struct.pack(">II", width, height) + png()[24:29]
    return png()[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + png()[33:]


BROKEN = {
    "text": (b"this is no image", "cannot be decoded"),
    "empty": (b"", "cannot be decoded"),
    "truncated": (png()[:-200], "cannot be decoded: .*truncated"),
    "truncated early": (png()[:60], "cannot be decoded: .*truncated"),
    "many pixels": (declared(9000, 9000), "has 9000 x 9000 pixels"),
    "decompression bomb": (declared(60000, 60000), ""),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded"),
    "too small": (png((4, 4)), "is 4 x 4 pixels"),
    "too narrow": (png((10, 400)), "is 10 x 400 pixels"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_invalid_image_files_raise_an_error_with_the_file_name(tmp_path, kind):
    data, reason = BROKEN[kind]
    (tmp_path / "holiday.png").write_bytes(data)
    with pytest.raises(ValueError, match=f"`holiday.png` {reason}"):
        open_upload(tmp_path / "holiday.png")


def test_images_are_rotated_flattened_and_resized(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (3000, 1000), "red").save(tmp_path / "wide.jpg", exif=turned)
    image = open_upload(tmp_path / "wide.jpg")
    assert image.mode == "RGB" and image.height == LONGEST_SIDE and image.width < image.height
    Image.new("RGBA", (20, 20)).save(tmp_path / "clear.png")
    assert np.asarray(open_upload(tmp_path / "clear.png")).min() == 255
    assert np.array_equal(open_upload(CAT_AND_CAR), Image.open(CAT_AND_CAR).convert("RGB"))


def test_the_browser_keeps_small_images_exactly_and_large_ones_in_few_bytes():
    small = open_upload(CAT_AND_CAR)
    assert np.array_equal(from_text(to_text(small)), small)
    large = Image.effect_noise((1024, 1024), 60).convert("RGB")
    assert len(to_text(large)) < 2e6 and from_text(to_text(large)).size == large.size


# masks and edges


@pytest.mark.parametrize("colour", ["black", "white", (255, 40, 0, 150)])
@pytest.mark.parametrize("canvas", [(512, 512), (64, 64), (800, 300)])
def test_painted_pixels_become_the_mask(colour, canvas):
    layer = Image.new("RGBA", canvas)
    width, height = canvas
    ImageDraw.Draw(layer).rectangle((width // 4, 0, width // 2 - 1, height), fill=colour)
    mask = np.asarray(painted_mask([layer], (64, 64)))
    assert np.array_equal(np.unique(mask), [0, 255])
    assert (mask[:, 16:32] == 255).all() and not mask[:, :16].any() and not mask[:, 32:].any()


def test_layers_are_merged_and_single_pixels_count():
    clear, dot, stroke = (Image.new("RGBA", (512, 512)) for _ in range(3))
    assert painted_mask([], (64, 64)) is None and painted_mask([clear], (64, 64)) is None
    dot.putpixel((3, 3), (0, 0, 0, 9))
    assert np.argwhere(np.asarray(painted_mask([dot], (64, 64)))).tolist() == [[0, 0]]
    ImageDraw.Draw(stroke).rectangle((256, 256, 511, 511), fill="red")
    assert np.asarray(painted_mask([dot, clear, stroke], (64, 64)))[32:, 32:].all()


def test_small_images_are_enlarged_for_the_canvas():
    assert canvas_for(Image.new("RGB", (64, 32))).size == (CANVAS_SIDE, CANVAS_SIDE // 2)
    assert canvas_for(Image.new("RGB", (900, 600))).size == (900, 600)


def test_edges_are_white_on_black_and_edge_maps_are_not_changed():
    found = edges()
    assert found.size == (64, 64) and set(np.unique(found)) == {0, 255} and 0.02 < np.mean(found) / 255 < 0.5
    assert np.mean(find_edges(open_upload(HOUSE_AND_DOG), 64, 20, 40)) > np.mean(found)
    assert np.array_equal(fit(found, 64), found)


# generating


@pytest.mark.parametrize("kind", REQUESTS)
def test_script_reproduces_the_image_of_the_page(studio, one_thread, tmp_path, monkeypatch, kind):
    request = GenerationRequest(**{**REQUESTS[kind], **FAST, "seeds": SEEDS.get(kind, (3,))})
    steps = []
    drawn = studio.generate(request, on_step=lambda *step: steps.append(step))
    assert steps == [(number, 4) for number in (1, 2, 3, 4)]
    checkpoints = studio.checkpoints if kind != "a mask" else replace(studio.checkpoints, ssr=str(POCKET))
    script = write_script(request, checkpoints, studio.dtype, studio.device)
    assert ("load_ssr" in script) == (checkpoints.ssr is not None)
    write_bundle(tmp_path / "it.zip", request, script)
    with zipfile.ZipFile(tmp_path / "it.zip") as archive:
        archive.extractall(tmp_path)
        assert sorted(archive.namelist()) == sorted(["repeat.py", *needed_images(request)])
    monkeypatch.chdir(tmp_path)
    repeated = runpy.run_path("repeat.py")
    again = repeated["frames"] if request.num_frames else repeated["images"]
    assert np.array_equal(as_array(again), as_array(drawn))
    written = Image.open("video.gif" if request.num_frames else f"image_{request.seeds[-1]}.png")
    assert written.size == (64, 64)


def test_every_option_changes_the_image(studio, one_thread):
    """All images are different, so every option of the page has an effect."""
    plain = {**REQUESTS["a query"], **FAST}
    cat = plain["subjects"][0]
    variants = [
        plain,
        {**plain, "seeds": (4,)},
        {**plain, "prompt": "a cat on the beach"},
        {**plain, "negative_prompt": "snow"},
        {**plain, "num_inference_steps": 5},
        {**plain, "guidance_scale": 5.0},
        {**plain, "eta": 0.0},
        {**plain, "subject_start": 0.5},
        {**plain, "subject_end": 0.5},
        {**plain, "subjects": ()},
        {**plain, "subjects": (subject("car"),)},
        {**plain, "subjects": (subject(image=POCKET / "references" / "6_guitar_woman_cat.png"),)},
        {**plain, "subjects": (subject(scale=0.5),)},
        {**plain, "subjects": (subject(mask=half((64, 64), False)),)},
        {**plain, "subjects": (subject(region=half((64, 64), False)),)},
        {**plain, "subjects": (cat, subject("dog", HOUSE_AND_DOG))},
        {**plain, "edges": edges()},
        {**plain, "edges": edges(), "controlnet_conditioning_scale": 0.5},
    ]
    drawn = [as_array(studio.generate(GenerationRequest(**each))).astype(int) for each in variants]
    for (first, one), (second, other) in itertools.combinations(enumerate(drawn), 2):
        assert np.abs(one - other).max() > 2, (variants[first], variants[second])


@pytest.mark.parametrize("box, kind", [((36, 28, 60, 52), "cat"), ((4, 30, 28, 50), "car")])
def test_paint_without_a_name_selects_the_subject(studio, box, kind):
    mask = Image.new("L", (64, 64))
    mask.paste(255, box)
    choice = SubjectChoice(open_upload(CAT_AND_CAR), mask=mask)
    request = GenerationRequest("a thing in the meadow", (choice,), seeds=(1, 2, 3), num_inference_steps=12)
    scores = load_judge(POCKET).look_at(np.stack(studio.generate(request))).categories
    assert [CATEGORY_NAMES[each] for each in scores.argmax(1)] == [kind] * 3


def test_attention_depends_on_query_and_mask(studio):
    maps = [
        studio.attention(choice) for choice in (subject(), subject("car"), subject("", mask=half((64, 64), False)))
    ]
    assert all(each.shape == (64, 64) and 0 <= each.min() < each.max() <= 1 for each in maps)
    assert all(np.abs(one - other).max() > 0.1 for one, other in itertools.combinations(maps, 2))


def test_the_end_of_a_long_text_is_returned(studio):
    assert studio.cut_end("a cat in the snow") == ""
    text = "a cat in the snow " + "and on " * 20 + "a house"
    assert studio.cut_end(text).endswith("and on a house") and studio.cut_end(text) in text


@pytest.mark.parametrize("kind", ["a query", "edges", "video"])
@pytest.mark.parametrize("after", [0, 2, 4])
def test_cancellation_stops_after_the_current_step(studio, kind, after):
    request = GenerationRequest(**REQUESTS[kind], **FAST)
    steps = []
    with pytest.raises(Cancelled):
        studio.generate(request, lambda step, _: steps.append(step), lambda: len(steps) >= after)
    assert steps == list(range(1, after + 1))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"subjects": (subject(), subject(""))}, "Subject 2: .*query"),
        ({"subjects": (subject(mask=Image.new("L", (64, 64), 255)),)}, "Subject 1: .*mask"),
        ({"subjects": (subject(),), "subject_start": 0.8, "subject_end": 0.2}, "subject_start"),
    ],
)
def test_invalid_requests_raise_an_error_before_the_first_step(studio, wrong, message):
    with pytest.raises(ValueError, match=message):
        studio.generate(
            GenerationRequest("a cat", **wrong, **FAST), on_step=lambda *_: pytest.fail("a step was taken")
        )


def test_concurrent_requests_on_one_unet_do_not_affect_each_other(studio, one_thread):
    requests = [
        GenerationRequest(**{**REQUESTS[kind], **FAST, "seeds": (seed,)})
        for kind, seed in itertools.product(("a query", "two subjects with regions and step range", "edges"), (1, 2))
    ]
    alone = [as_array(studio.generate(request)) for request in requests]
    assert studio.pipeline("image").unet is studio.pipeline("along_edges").unet
    with ThreadPoolExecutor(3) as people:
        together = list(people.map(lambda request: as_array(studio.generate(request)), requests * 2))
    for expected, drawn in zip(alone * 2, together, strict=True):
        assert np.array_equal(drawn, expected)


# sessions and options


def test_cancel_only_affects_its_own_session_and_kind():
    sessions = Sessions()
    with (
        sessions.generating("anna", "image") as first,
        sessions.generating("anna", "video") as second,
        sessions.generating("ben", "image") as other,
    ):
        assert sessions.cancel("anna", "image") == 1
        assert first.is_set() and not second.is_set() and not other.is_set()
        assert sessions.cancel("anna") == 2
        assert second.is_set() and not other.is_set()
    assert sessions.cancel("anna") == sessions.cancel("nobody") == 0
    with sessions.generating("anna", "image") as later:
        assert not later.is_set()


def test_closing_a_session_removes_its_files():
    sessions = Sessions()
    file = sessions.file("anna", "image.zip")
    file.write_bytes(b"1")
    assert sessions.file("ben", "image.zip") != file
    with sessions.generating("anna", "image") as event:
        sessions.close("anna")
        assert event.is_set()
    assert not file.parent.exists()
    sessions.close("anna")


def test_checkpoints_from_options():
    assert Checkpoints.from_options(parse_args([])) == Checkpoints(
        str(POCKET), None, str(POCKET / "controlnet"), str(POCKET / "motion_adapter")
    )
    assert Checkpoints.from_options(parse_args(["--checkpoint", "owner/base"])) == Checkpoints("owner/base")
    given = [
        "--checkpoint",
        "owner/base",
        "--ssr",
        "owner/ssr",
        "--controlnet",
        "owner/canny",
        "--motion_adapter",
        "a/m",
    ]
    assert Checkpoints.from_options(parse_args(given)) == Checkpoints("owner/base", "owner/ssr", "owner/canny", "a/m")


def test_settings_and_description_depend_on_the_checkpoint(tmp_path):
    names = ("num_inference_steps", "guidance_scale", "eta", "scale")
    pocket, other = parse_args([]), parse_args(["--checkpoint", "owner/base", "--ssr", "owner/ssr", "--eta", "0.5"])
    assert [getattr(pocket, name) for name in names] == [25, 3.0, 0.9, 1.0]
    assert [getattr(other, name) for name in names] == [30, 7.5, 0.5, 0.65]
    text = Checkpoints.from_options(pocket).describe(64)
    assert "`pocket`" in text and "12 kinds of emoji (cat, " in text and "64 x 64" in text and str(POCKET) not in text
    text = Checkpoints.from_options(other).describe(512)
    assert text == "**Checkpoint:** `owner/base` with the SSR-Encoder `owner/ssr`, images of 512 x 512 pixels."


def test_page_listens_on_loopback_by_default(monkeypatch):
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    assert parse_args([]).host == "127.0.0.1"
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    assert parse_args([]).host == "0.0.0.0"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_missing_gradio_prints_the_install_command(arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "examples" / "app.py"), run_name="__main__")
    said = capsys.readouterr().out + str(end.value.code)
    assert 'pip install -e ".[app]"' in " ".join(said.split())
    assert bool(end.value.code) != bool(arguments)


@pytest.mark.parametrize(
    "error, said",
    [
        (ValueError("`subject_query` is empty"), "`subject_query` is empty"),
        (KeyError("secret"), "Something went wrong"),
    ],
)
def test_errors_are_shown_as_messages(error, said):
    gradio = pytest.importorskip("gradio", reason="the page needs Gradio")
    from page.messages import messages

    @messages()
    def fails():
        raise error

    with pytest.raises(gradio.Error, match=said) as shown:
        fails()
    assert "secret" not in str(shown.value.message) and not shown.value.print_exception


def test_the_page_is_served_on_a_busy_machine(monkeypatch):
    """Gradio refuses to start if the first answer takes longer than 3 seconds."""
    networking = pytest.importorskip("gradio.networking", reason="Gradio serves the page")
    monkeypatch.setattr(networking, "url_ok", lambda url: False)
    page = start(parse_args([]), wait=False)
    with urllib.request.urlopen(page.blocks.local_url) as answer:
        assert "SSR-Encoder" in answer.read().decode()
    page.blocks.close(verbose=False)
