"""Tests of the page of examples/app.py in a browser."""

import io
import json
import os
import runpy
import shutil
import time
import urllib.request
import zipfile
from urllib.parse import urlparse

import numpy as np
import pytest
from conftest import POCKET
from page.request import GenerationRequest, SubjectChoice
from page.server import parse_args, start
from PIL import Image


pytest.importorskip("gradio", reason="the page needs Gradio")
pytest.importorskip("selenium", reason="controls the browser")

from selenium import webdriver  # noqa: E402
from selenium.webdriver import ActionChains  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(
        os.environ.get("RUN_SLOW") != "1" or not (CHROMIUM and DRIVER),
        reason="needs RUN_SLOW=1 (`make test-slow`), Chromium and chromedriver; test_app.py tests the images of the page",
    ),
    pytest.mark.filterwarnings("ignore::Warning:gradio"),  # about pandas
]

# the texts whose contrast with the background is less than 4.5:1
LOW_CONTRAST = """
const channels = (color) => color.match(/[\\d.]+/g).map(Number);
const light = (color) => color.slice(0, 3)
    .map((value) => value / 255)
    .map((value) => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
const over = (color, below) => {
    const alpha = color[3] ?? 1;
    return below.map((value, index) => value * (1 - alpha) + color[index] * alpha);
};
const background = (element) => element === null
    ? [255, 255, 255]
    : over(channels(getComputedStyle(element).backgroundColor), background(element.parentElement));
const contrast = (element) => {
    const below = background(element);
    const [darker, lighter] = [light(below), light(over(channels(getComputedStyle(element).color), below))].sort();
    return (lighter + 0.05) / (darker + 0.05);
};
return [...document.querySelectorAll("body *")]
    .filter((element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()))
    .filter((element) => element.checkVisibility({opacityProperty: true, visibilityProperty: true}))
    .filter((element) => element.getBoundingClientRect().width > 1 && contrast(element) < 4.5)
    .map((element) => [element.textContent, contrast(element)]);
"""
REFERENCE = POCKET / "references" / "1_cat_car.png"
STEPS = 4


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page on a local server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        page = start(parse_args(["--num_inference_steps", str(STEPS)]), wait=False)
        yield page
        page.blocks.close(verbose=False)


@pytest.fixture(scope="module")
def chromium():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    # root cannot use the sandbox, containers have little shared memory, and the editor uses WebGL
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--enable-unsafe-swiftshader"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


class Person:
    """A browser window of one user: performs actions and reads the page."""

    def __init__(self, driver, address: str, width: int = 1280):
        self.driver = driver
        driver.switch_to.new_window("window")
        self.window = driver.current_window_handle
        size = {"width": width, "height": 800 if width < 600 else 1600, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        # all windows share the storage of the browser, which keeps what was entered
        driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": address.rstrip("/"), "storageTypes": "all"})
        driver.get(address)
        self.find("#generate-image")

    def look_here(self) -> None:
        self.driver.switch_to.window(self.window)

    def find(self, selector: str):
        wait = WebDriverWait(self.driver, 15, poll_frequency=0.05)
        return wait.until(lambda driver: driver.find_element(By.CSS_SELECTOR, selector), selector)

    def click(self, selector: str) -> None:
        self.driver.execute_script("arguments[0].click()", self.find(selector))

    def open_tab(self, name: str) -> None:
        tabs = self.driver.find_elements(By.CSS_SELECTOR, "button[role=tab]")
        tab = next(tab for tab in tabs if tab.text == name and tab.is_displayed())
        self.driver.execute_script("arguments[0].click()", tab)

    def upload(self, drop: str, file) -> None:
        self.find(f"{drop} input[type=file]").send_keys(str(file))

    def type(self, field: str, text: str) -> None:
        box = self.find(
            ", ".join(f"{field} {kind}" for kind in ("textarea", "input[type=number]", "input[type=text]"))
        )
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text)

    def paint(self, editor: str, left: float, right: float) -> None:
        """Paints a horizontal stroke in the middle of the canvas. `left` and `right` are fractions of its width."""
        canvas = self.find(f"{editor} canvas")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        time.sleep(0.5)  # waits for the image on the canvas
        side = canvas.size["height"] * 0.75
        actions = ActionChains(self.driver, duration=50)
        actions.move_to_element_with_offset(canvas, int((left - 0.5) * side), 0).click_and_hold()
        for _ in range(4):
            actions.move_by_offset(int((right - left) * side / 4), 8)
        actions.release().perform()
        time.sleep(0.3)

    def value(self, field: str) -> str:
        return self.find(f"{field} textarea, {field} input").get_property("value")

    def wait(self, script: str, seconds: float = 15):
        """Waits until the script returns something that is true, and returns it."""
        wait = WebDriverWait(self.driver, seconds, poll_frequency=0.05)
        return wait.until(lambda driver: driver.execute_script(f"return {script}"), script)

    def shown(self, place: str, other_than: list | None = None) -> list[tuple[str, str]]:
        """Waits for images at `place` that are different from `other_than`. Returns their addresses and names."""
        script = "return [...document.querySelectorAll(arguments[0] + ' img')].map((image) => [image.src, image.alt])"
        wait = WebDriverWait(self.driver, 15, poll_frequency=0.05)
        return wait.until(
            lambda driver: (found := driver.execute_script(script, place)) != other_than and found, place
        )

    def generate(self, kind: str = "image", other_than: list | None = None) -> list[tuple[str, str]]:
        self.click(f"#generate-{kind}")
        return self.shown(f"#results-{kind}", other_than)

    def message(self) -> str:
        """Waits for the next message, closes it and returns its text."""
        self.find(".toast-body")
        wait = WebDriverWait(self.driver, 10)  # the message fades in
        text = wait.until(lambda driver: driver.find_element(By.CSS_SELECTOR, ".toast-body").text)
        self.click(".toast-close")
        WebDriverWait(self.driver, 10).until_not(lambda driver: driver.find_elements(By.CSS_SELECTOR, ".toast-body"))
        return text


@pytest.fixture
def person(page, chromium):
    windows = set(chromium.window_handles)
    first = chromium.current_window_handle
    yield lambda width=1280: Person(chromium, page.blocks.local_url, width)
    for window in set(chromium.window_handles) - windows:
        chromium.switch_to.window(window)
        chromium.close()
    chromium.switch_to.window(first)


def pixels(address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(urllib.request.urlopen(address).read())).convert("RGB"), dtype=int)


def stack(results: list[tuple[str, str]]) -> np.ndarray:
    return np.stack([pixels(address) for address, _ in results])


def seeds(results: list[tuple[str, str]]) -> tuple[int, ...]:
    return tuple(int(caption.removeprefix("seed ").partition(":")[0]) for _, caption in results)


def bundle(person: Person, kind: str, folder) -> dict:
    """Downloads and unpacks the script and its images, runs the script and returns its variables."""
    behaviour = {"behavior": "allow", "downloadPath": str(folder)}
    person.driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    person.click(f"#repeat-{kind} button")
    person.click(f"#bundle-{kind}")
    file = folder / f"{kind}.zip"
    WebDriverWait(person.driver, 10, poll_frequency=0.05).until(lambda driver: file.exists())
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)
    return runpy.run_path(str(folder / "repeat.py"))


def test_query_changes_the_images_and_script_reproduces_them(page, person, tmp_path, monkeypatch):
    anna = person()
    anna.upload("#file-1", REFERENCE)
    anna.find("#painting-1 canvas")
    anna.type("#query-1", "cat")
    anna.type("#prompt", "a thing in the snow")
    cat = anna.generate()
    heat = anna.shown("#map-1")
    choice = SubjectChoice(Image.open(REFERENCE).convert("RGB"), "cat")
    request = GenerationRequest("a thing in the snow", (choice,), seeds=seeds(cat), num_inference_steps=STEPS)
    assert len(set(seeds(cat))) == 4
    assert np.array_equal(stack(cat), np.stack(page.studio.generate(request)))

    anna.type("#query-1", "car")
    car = anna.generate(other_than=cat)
    other_heat = anna.shown("#map-1", other_than=heat)
    assert np.abs(stack(other_heat[1:]) - stack(heat[1:])).max() > 20  # after the gray reference
    assert seeds(car) != seeds(cat) and np.abs(stack(car) - stack(cat)).mean() > 2
    assert sorted(anna.shown("#history")) == sorted(cat)
    assert "attention" in anna.find("#map-1").text

    monkeypatch.chdir(tmp_path)
    repeated = bundle(anna, "image", tmp_path)["images"]
    assert np.array_equal(stack(car), np.stack(repeated))
    assert 'query="car"' in anna.find("#script-image").text

    hosts = {
        urlparse(message["params"]["request"]["url"]).hostname
        for message in (json.loads(entry["message"])["message"] for entry in anna.driver.get_log("performance"))
        if message["method"] == "Network.requestWillBeSent"
    }
    assert "127.0.0.1" in hosts and hosts <= {"127.0.0.1", None, ""}, hosts


def test_examples_set_everything_and_the_prompt_follows_until_it_is_edited(person):
    anna = person()
    assert "12 kinds of emoji" in anna.find("#checkpoint").text and "`" not in anna.find("#checkpoint").text
    anna.click("#settings button")
    anna.type("#steps", "9\n")
    anna.type("#prompt", "a boat")
    anna.type("#query-1", "boat")
    assert anna.value("#prompt") == "a boat"
    anna.click("#examples-1 button.thumbnail-item")
    anna.find("#painting-1 canvas")
    anna.wait("document.querySelector('#prompt textarea').value == 'a car in the meadow'")
    assert (anna.value("#query-1"), anna.value("#steps")) == ("car", str(STEPS))
    anna.type("#query-1", "umbrella")
    assert anna.value("#prompt") == "an umbrella in the meadow"
    anna.open_tab("Subject 2")
    anna.click("#examples-2 button.thumbnail-item:nth-child(1)")
    anna.find("#painting-2 canvas")
    anna.wait("document.querySelector('#prompt textarea').value == 'an umbrella and a car in the meadow'")
    anna.find("#query-2 textarea, #query-2 input").send_keys(Keys.ENTER)
    assert len(anna.shown("#results-image")) == 4
    assert len(anna.shown("#map-1")) == len(anna.shown("#map-2")) == 2
    anna.type("#prompt", "an umbrella and a car on the beach" + " and on" * 20 + "\n")
    assert "The prompt is too long. Its end is not used: “and on and on" in anna.message()

    anna.find("#generate-image")
    anna.driver.refresh()
    anna.wait("document.querySelector('#query-2 input, #query-2 textarea, #query-1 input, #query-1 textarea')?.value")
    anna.find("#painting-1 canvas")
    assert anna.value("#prompt").startswith("an umbrella and a car on the beach")
    anna.type("#query-1", "car")
    assert anna.value("#prompt").startswith("an umbrella and a car on the beach")
    anna.type("#prompt", Keys.BACKSPACE)
    anna.type("#query-1", "cat")
    anna.wait("document.querySelector('#prompt textarea').value == 'a cat and a car in the meadow'")
    assert len(anna.generate()) == 4  # with the reference images that were kept


def test_painted_mask_and_painted_region(person, tmp_path, monkeypatch):
    anna = person()
    anna.click("#examples-1 button.thumbnail-item")
    anna.find("#painting-1 canvas")
    anna.type("#query-1", " ")
    anna.paint("#painting-1", 0.1, 0.4)  # the car is on the left
    generated = anna.generate()
    assert "often better if it says what the thing is" in anna.message()
    assert "mask" in anna.find("#map-1").text and "attention" not in anna.find("#map-1").text
    anna.find("#generate-image")
    for name, said in (
        ("cat", "“cat” does not seem to fit the painted thing"),
        ("bicycle", "does not know “bicycle”"),
    ):
        anna.type("#query-1", name)
        anna.click("#generate-image")
        assert said in anna.message()
        anna.find("#generate-image")  # waits for the end of the generation
    anna.type("#query-1", " ")
    generated = anna.generate(other_than=anna.shown("#results-image"))
    anna.find("#generate-image")
    anna.wait("document.querySelectorAll('#map-1 img').length == 2")
    shape = pixels(anna.shown("#map-1")[1][0]).sum(2) > 0  # the mask that is shown, on black
    assert 0.02 < shape.mean() < 0.4 and shape[:, :256].sum() > 20 * shape[:, 320:].sum()
    anna.click("#place-1 button")
    anna.paint("#region-1", 0.6, 0.9)
    placed = anna.generate(other_than=generated)
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(stack(placed), np.stack(bundle(anna, "image", tmp_path)["images"]))
    mask, region = (np.asarray(Image.open(tmp_path / f"subject_1_{kind}.png")) > 0 for kind in ("mask", "region"))
    assert 0.02 < mask.mean() < 0.4 and mask[:, :32].sum() > 20 * mask[:, 40:].sum()
    assert 0.01 < region.mean() < 0.4 and region[:, 256:].sum() > 20 * region[:, :256].sum()

    anna.type("#query-1", "cat")
    anna.click("#painting-1 button[aria-label='Clear canvas']")  # removes the subject
    anna.wait("document.querySelector('#prompt textarea').value == 'a thing in the meadow'")
    assert anna.value("#query-1") == ""


def test_two_users_at_the_same_time_and_cancellation(page, person, monkeypatch):
    taken = []
    generate = page.studio.generate

    def counted(request, on_step, cancelled):
        def step(number, steps):
            taken.append((request.kind, request.subjects[0].query))
            on_step(number, steps)

        return generate(request, step, cancelled)

    monkeypatch.setattr(page.studio, "generate", counted)
    anna, ben = person(), person(400)
    for someone, query in ((anna, "cat"), (ben, "car")):
        someone.look_here()
        someone.upload("#file-1", REFERENCE)
        someone.find("#painting-1 canvas")
        someone.type("#query-1", query)
        assert not someone.driver.find_elements(By.CSS_SELECTOR, "#cancel-image")
    anna.look_here()
    anna.click("#settings button")
    anna.type("#steps", "90\n")
    anna.open_tab("Video")
    anna.click("#generate-video")
    WebDriverWait(anna.driver, 30).until(lambda driver: "/90" in anna.find("#results-video").text)

    ben.look_here()
    car = ben.generate()
    choice = SubjectChoice(Image.open(REFERENCE).convert("RGB"), "car")
    request = GenerationRequest("a car in the meadow", (choice,), seeds=seeds(car), num_inference_steps=STEPS)
    assert np.array_equal(stack(car), np.stack(generate(request)))

    anna.look_here()
    anna.open_tab("Image")
    anna.click("#generate-image")  # no other request can run now
    WebDriverWait(anna.driver, 15).until(lambda driver: ("image", "cat") in taken)
    ben.look_here()
    before = taken.count(("image", "car"))
    ben.click("#generate-image")
    WebDriverWait(ben.driver, 15).until(lambda driver: "queue" in ben.find("#results-image").text)
    ben.click("#cancel-image")  # does not stop Anna's requests
    assert "cancelled" in ben.message()
    ben.find("#generate-image")
    assert not ben.driver.find_elements(By.CSS_SELECTOR, "#cancel-image")
    steps = len(taken)
    WebDriverWait(ben.driver, 15).until(lambda driver: len(taken) > steps)
    anna.look_here()
    for kind in ("video", "image"):
        anna.open_tab(kind.capitalize())
        anna.click(f"#cancel-{kind}")
        assert "cancelled" in anna.message()
        anna.find(f"#generate-{kind}")
    time.sleep(0.5)  # waits for the steps that are running
    after = len(taken)
    time.sleep(1)
    assert len(taken) == after and taken.count(("video", "cat")) < 90 and taken.count(("image", "cat")) < 90
    assert taken.count(("image", "car")) == before
    anna.type("#steps", f"{STEPS}\n")
    assert np.abs(stack(anna.generate()) - stack(car)).max() > 20


def test_edges_and_video(person, tmp_path):
    anna = person()
    anna.click("#examples-1 button.thumbnail-item")
    anna.find("#painting-1 canvas")
    anna.open_tab("Along edges")
    anna.upload("#file-edges", POCKET / "references" / "3_house_dog.png")
    edges = pixels(anna.shown("#edges")[0][0])
    assert set(np.unique(edges)) == {0, 255}
    assert stack(anna.generate("along_edges")).shape == (4, 64, 64, 3)
    anna.open_tab("Video")
    address = anna.generate("video")[0][0]
    assert Image.open(io.BytesIO(urllib.request.urlopen(address).read())).n_frames == 8


def test_user_errors_are_shown_as_messages(person, tmp_path):
    anna = person()
    (tmp_path / "notes.png").write_text("this is not an image")
    (tmp_path / "half.png").write_bytes(REFERENCE.read_bytes()[:2000])
    anna.upload("#file-1", tmp_path / "notes.png")
    said = [anna.message()]
    anna.upload("#file-1", tmp_path / "half.png")
    said.append(anna.message())
    anna.click("#look")
    said.append(anna.message())
    anna.click("#generate-image")
    said.append(anna.message())
    anna.type("#query-1", "cat")
    anna.click("#generate-image")  # a query without an image
    said.append(anna.message())
    anna.type("#query-1", " ")
    anna.upload("#file-1", REFERENCE)
    anna.find("#painting-1 canvas")
    anna.click("#generate-image")  # neither a query nor a mask
    said.append(anna.message())
    anna.type("#query-1", "cat")
    anna.type("#prompt", " ")
    anna.click("#generate-image")
    said.append(anna.message())
    anna.type("#prompt", "a cat")
    anna.open_tab("Along edges")
    anna.click("#generate-along_edges")
    said.append(anna.message())
    wanted = (
        "`notes.png` cannot be decoded",
        "`half.png` cannot be decoded",
        "There is no reference image yet",
        "There is no reference image yet",
        "Subject 1 has a name, but no reference image",
        "Which subject is meant in reference image 1?",
        "The prompt is empty",
        "There is no edge map yet",
    )
    for message, part in zip(said, wanted, strict=True):
        assert part in message and "Traceback" not in message and "File " not in message


def test_button_and_results_are_in_view_on_a_phone(person):
    ben = person(400)
    ben.upload("#file-1", REFERENCE)
    ben.find("#painting-1 canvas")
    in_view = """['#query-1 textarea, #query-1 input', '#generate-image', '#results-image'].every((selector) => {
        const place = document.querySelector(selector).getBoundingClientRect();
        return place.top >= 0 && place.bottom <= window.innerHeight + 1;
    })"""
    ben.wait(in_view)
    ben.type("#query-1", "cat\n")
    ben.shown("#results-image")
    ben.find("#generate-image")
    ben.wait(in_view)
    assert ben.driver.execute_script("return document.documentElement.scrollWidth") <= 400
    # all four are there without scrolling
    assert ben.wait(
        """(() => { const box = document.querySelector("#results-image").getBoundingClientRect();
        const images = [...document.querySelectorAll("#results-image img")].map((it) => it.getBoundingClientRect());
        return images.length == 4 && images.every((it) => it.height > 40 && it.bottom <= box.bottom + 1); })()"""
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_and_names_for_screen_readers(page, person, theme):
    anna = person()
    anna.driver.get(f"{page.blocks.local_url}?__theme={theme}")
    anna.click("#examples-1 button.thumbnail-item")
    anna.find("#painting-1 canvas")
    for closed in ("#settings", "#place-1"):
        anna.click(f"{closed} button")
    anna.generate()
    anna.shown("#map-1")
    anna.find("#generate-image")
    assert anna.driver.execute_script(LOW_CONTRAST) == []
    if theme == "dark":
        return
    anna.driver.execute_cdp_cmd("Accessibility.enable", {})
    roles = {"button", "checkbox", "combobox", "radio", "slider", "spinbutton", "tab", "textbox"}
    nodes = anna.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    names = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in roles
    ]
    assert len(names) > 40 and not [(role, name) for role, name in names if not name.strip()]
