"""Tests of the page of examples/app.py in a browser."""

import io
import json
import runpy
import shutil
import time
import urllib.request
import zipfile
from urllib.parse import urlparse

import numpy as np
import pytest
from conftest import POCKET
from page.request import DrawingRequest, SubjectChoice
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
        not (CHROMIUM and DRIVER), reason="needs Chromium and chromedriver; test_app.py tests the pictures of the page"
    ),
    pytest.mark.filterwarnings("ignore::Warning:gradio"),  # about pandas
]

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

    def __init__(self, driver, address: str, width: int = 1400):
        self.driver = driver
        driver.switch_to.new_window("window")
        self.window = driver.current_window_handle
        size = {"width": width, "height": 1600, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(address)
        self.find("#draw-picture")

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
        time.sleep(0.5)  # waits for the picture on the canvas
        side = canvas.size["height"] * 0.75
        actions = ActionChains(self.driver, duration=50)
        actions.move_to_element_with_offset(canvas, int((left - 0.5) * side), 0).click_and_hold()
        for _ in range(4):
            actions.move_by_offset(int((right - left) * side / 4), 8)
        actions.release().perform()
        time.sleep(0.3)

    def shown(self, place: str, other_than: str | None = None) -> str:
        """Waits until the address of the picture at `place` is different from `other_than`, and returns it."""
        script = "const picture = document.querySelector(arguments[0] + ' img'); return picture && picture.src"
        wait = WebDriverWait(self.driver, 15, poll_frequency=0.05)
        return wait.until(
            lambda driver: (found := driver.execute_script(script, place)) != other_than and found, place
        )

    def draw(self, kind: str = "picture", other_than: str | None = None) -> str:
        self.click(f"#draw-{kind}")
        return self.shown(f"#drawn-{kind}", other_than)

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
    yield lambda width=1400: Person(chromium, page.blocks.local_url, width)
    for window in set(chromium.window_handles) - windows:
        chromium.switch_to.window(window)
        chromium.close()
    chromium.switch_to.window(first)


def pixels(address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(urllib.request.urlopen(address).read())).convert("RGB"), dtype=int)


def bundle(person: Person, kind: str, folder) -> dict:
    """Downloads and unpacks the script and its pictures, runs the script and returns its variables."""
    behaviour = {"behavior": "allow", "downloadPath": str(folder)}
    person.driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    person.click(f"#repeat-{kind} button")
    person.click(f"#bundle-{kind}")
    file = folder / f"{kind}.zip"
    WebDriverWait(person.driver, 10, poll_frequency=0.05).until(lambda driver: file.exists())
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)
    return runpy.run_path(str(folder / "repeat.py"))


def test_query_changes_the_picture_and_script_reproduces_it(page, person, tmp_path, monkeypatch):
    anna = person()
    anna.upload("#file-1", REFERENCE)
    anna.find("#painting-1 canvas")
    anna.type("#query-1", "cat\n")
    heat = anna.shown("#heat-1")
    anna.type("#prompt", "a thing in the snow")
    cat = anna.draw()
    choice = SubjectChoice(Image.open(REFERENCE).convert("RGB"), "cat")
    expected = page.studio.draw(DrawingRequest("a thing in the snow", (choice,), num_inference_steps=STEPS))
    assert np.array_equal(pixels(cat), np.asarray(expected))

    anna.type("#query-1", "car\n")
    other_heat = anna.shown("#heat-1", other_than=heat)
    assert np.abs(pixels(other_heat) - pixels(heat)).max() > 20
    car = anna.draw(other_than=cat)
    assert np.abs(pixels(car) - pixels(cat)).mean() > 2

    monkeypatch.chdir(tmp_path)
    repeated = bundle(anna, "picture", tmp_path)["image"]
    assert np.array_equal(pixels(car), np.asarray(repeated))
    assert 'query="car"' in anna.find("#script-picture").text

    hosts = {
        urlparse(message["params"]["request"]["url"]).hostname
        for message in (json.loads(entry["message"])["message"] for entry in anna.driver.get_log("performance"))
        if message["method"] == "Network.requestWillBeSent"
    }
    assert "127.0.0.1" in hosts and hosts <= {"127.0.0.1", None, ""}, hosts


def test_painted_mask_and_painted_region(person, tmp_path, monkeypatch):
    anna = person()
    anna.click("#examples-1 .gallery-item")
    anna.find("#painting-1 canvas")
    heat = anna.shown("#heat-1")
    anna.type("#query-1", " ")
    anna.paint("#painting-1", 0.1, 0.4)  # the car is on the left
    drawn = anna.draw()
    masked = pixels(anna.shown("#heat-1", other_than=heat))  # shown before the picture is generated
    assert np.abs(masked - pixels(heat)).max() > 20
    anna.click("#place-1 button")
    anna.paint("#region-1", 0.6, 0.9)
    placed = anna.draw(other_than=drawn)
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(pixels(placed), np.asarray(bundle(anna, "picture", tmp_path)["image"]))
    mask, region = (np.asarray(Image.open(tmp_path / f"subject_1_{kind}.png")) > 0 for kind in ("mask", "region"))
    assert 0.02 < mask.mean() < 0.4 and mask[:, :32].sum() > 20 * mask[:, 40:].sum()
    assert 0.01 < region.mean() < 0.4 and region[:, 256:].sum() > 20 * region[:, :256].sum()


def test_two_users_at_the_same_time_and_cancellation(page, person, monkeypatch):
    taken = []
    draw = page.studio.draw

    def counted(request, on_step, cancelled):
        def step(number, steps):
            taken.append((request.kind, request.subjects[0].query))
            on_step(number, steps)

        return draw(request, step, cancelled)

    monkeypatch.setattr(page.studio, "draw", counted)
    anna, ben = person(), person(420)
    for someone, query in ((anna, "cat"), (ben, "car")):
        someone.look_here()
        someone.upload("#file-1", REFERENCE)
        someone.find("#painting-1 canvas")
        someone.type("#query-1", query)
    assert ben.driver.execute_script("return document.documentElement.scrollWidth") <= 420
    anna.look_here()
    anna.click("#settings button")
    anna.type("#steps", "90\n")
    anna.open_tab("Video")
    anna.click("#draw-video")
    WebDriverWait(anna.driver, 30).until(lambda driver: "/90" in anna.find("#drawn-video").text)

    ben.look_here()
    car = ben.draw()
    choice = SubjectChoice(Image.open(REFERENCE).convert("RGB"), "car")
    expected = draw(DrawingRequest("a cat in the snow", (choice,), num_inference_steps=STEPS))
    assert np.array_equal(pixels(car), np.asarray(expected))
    ben.click("#cancel-picture")  # does not stop Anna's video
    ben.message()
    before = len(taken)
    WebDriverWait(ben.driver, 15).until(lambda driver: len(taken) > before)

    anna.look_here()
    anna.open_tab("Picture")
    anna.click("#draw-picture")  # no other request can run now
    WebDriverWait(anna.driver, 15).until(lambda driver: ("picture", "cat") in taken)
    ben.look_here()
    before = taken.count(("picture", "car"))
    ben.click("#draw-picture")
    WebDriverWait(ben.driver, 15).until(lambda driver: "queue" in ben.find("#drawn-picture").text)
    ben.click("#cancel-picture")
    assert "cancelled" in ben.message()
    anna.look_here()
    for kind in ("video", "picture"):
        anna.click(f"#cancel-{kind}")
        assert "cancelled" in anna.message()
    time.sleep(0.5)  # waits for the steps that are running
    after = len(taken)
    time.sleep(1)
    assert len(taken) == after and taken.count(("video", "cat")) < 90 and taken.count(("picture", "cat")) < 90
    assert taken.count(("picture", "car")) == before
    anna.type("#steps", f"{STEPS}\n")
    assert np.abs(pixels(anna.draw()) - pixels(car)).max() > 20


def test_edges_and_video(person, tmp_path):
    anna = person()
    anna.click("#examples-1 .gallery-item")
    anna.shown("#heat-1")
    anna.open_tab("Along edges")
    anna.upload("#file-edges", POCKET / "references" / "3_house_dog.png")
    edges = pixels(anna.shown("#edges"))
    assert set(np.unique(edges)) == {0, 255}
    assert pixels(anna.draw("along_edges")).shape == (64, 64, 3)
    anna.open_tab("Video")
    address = anna.draw("video")
    assert Image.open(io.BytesIO(urllib.request.urlopen(address).read())).n_frames == 8


def test_user_errors_are_shown_as_messages(person, tmp_path):
    anna = person()
    (tmp_path / "notes.png").write_text("this is not a picture")
    (tmp_path / "half.png").write_bytes(REFERENCE.read_bytes()[:2000])
    anna.upload("#file-1", tmp_path / "notes.png")
    said = [anna.message()]
    anna.upload("#file-1", tmp_path / "half.png")
    said.append(anna.message())
    anna.click("#look-1")
    said.append(anna.message())
    anna.type("#query-1", "cat")
    anna.click("#draw-picture")  # a query without a picture
    said.append(anna.message())
    anna.type("#query-1", " ")
    anna.upload("#file-1", REFERENCE)
    anna.find("#painting-1 canvas")
    anna.click("#draw-picture")  # neither a query nor a mask
    said.append(anna.message())
    anna.type("#query-1", "cat")
    anna.open_tab("Along edges")
    anna.click("#draw-along_edges")
    said.append(anna.message())
    wanted = (
        "`notes.png` cannot be decoded",
        "`half.png` cannot be decoded",
        "no reference picture",
        "Subject 1 has a name or a region, but no reference picture",
        "Subject 1: ",
        "no picture yet",
    )
    for message, part in zip(said, wanted, strict=True):
        assert part in message and "Traceback" not in message and "File " not in message
