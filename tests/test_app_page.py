"""The app's page as it is used, in a headless Chromium: typed, clicked, by keyboard alone, on a phone."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import statistics
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from PIL import Image

from lcm_lightning.app import engine as engine_module
from lcm_lightning.app.choices import Choices
from lcm_lightning.app.engine import Engine
from lcm_lightning.config.entry import configurations
from lcm_lightning.config.resolvers import PACKAGE, register_resolvers
from lcm_lightning.models.sampling import sample

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
pytest.importorskip("gradio", reason="the page is made of gradio; pip install 'lcm-lightning[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser; pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; apt-get install chromium"),
]
QUIET = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
ARGUMENTS = [f"--{name}" for name in (*QUIET.split(), "headless", "disable-sync")]
PATIENCE = 120_000  # ms: other programs may use the cores
PICTURES = "#pictures img"
# When the last key was pressed, and when pictures of which prompts could be seen.
WATCH = """() => {
    window.lastKey = 0; window.seen = [];
    document.querySelector('#prompt input, #prompt textarea').addEventListener(
        'input', () => { window.lastKey = performance.now(); });
    new MutationObserver(() => document.querySelectorAll('#pictures img').forEach(image => {
        const prompt = image.alt;
        image.decode().then(() => window.seen.push([prompt, performance.now()]));
    })).observe(document.querySelector('#pictures'), {subtree: true, childList: true, attributes: true});
}"""


@pytest.fixture(scope="module")
def begun() -> Iterator[list[tuple[int, int]]]:
    """Seed and steps of the drawings that were begun."""
    drawings: list[tuple[int, int]] = []

    def counted(*arguments: Any, **settings: Any) -> torch.Tensor:
        drawings.append((settings["seeds"][0], settings["steps"]))
        return sample(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "sample", counted)
        yield drawings


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, begun: list[tuple[int, int]]) -> Iterator[str]:
    """Of the page, as `python -m lcm_lightning.app` shows it where nothing has been trained."""
    from lcm_lightning.app.page import Page, serve

    outputs = tmp_path_factory.mktemp("outputs")
    leave_evaluation(outputs / "dogs" / "1" / "evaluation" / "quick")
    register_resolvers()
    before = HydraConfig.instance().cfg
    engine = Engine(torch.device("cpu"))
    with initialize_config_dir(str(configurations()), version_base="1.3"):
        cfg = compose("app", return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        page = Page(engine, Choices(cfg, outputs), outputs, "red heart")
        yield serve(page, "127.0.0.1", None, share=False)
        page.blocks.close()
        engine.close()
    HydraConfig.instance().cfg = before


def leave_evaluation(folder: Path) -> None:
    """As far as the page reads it."""
    (folder / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "images" / "a" / "000000.png")
    seconds = {"median": 0.25, "low": 0.2, "high": 0.3}
    stages = dict.fromkeys(("text_encoding", "denoising", "vae_decoding"), seconds)
    timed = {"batch_size": 1, "seconds_per_image": seconds, "fraction_of_peak": 0.1, "peak_memory_mb": 9, **stages}
    model = {"slug": "lcm_4", "teacher": "lcm_4", "role": "student", "label": "LCM-LoRA, 4 steps", "n_images": 1}
    model |= {"images": "images/a", "network_evaluations": 4, "seconds_per_image": seconds, "latency": [timed]}
    model |= {"fid": {"value": 12.3}, "flops_per_image": {"total": 1e9}}
    metrics = {"protocol": "quick", "dataset": "dogs/test", "models": [model], "warnings": ["few <images>"]}
    (folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(params=[(1100, 850)], ids=lambda size: f"{size[0]}px")
def page(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    """The page, arrived. It has no error in its console and asks no other machine for anything."""
    width, height = request.param
    shown = browser.new_page(viewport={"width": width, "height": height})
    errors: list[str] = []
    shown.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    shown.on("pageerror", lambda error: errors.append(str(error)))
    shown.on(
        "request",
        lambda request: None if request.url.startswith((address, "data:", "blob:")) else errors.append(request.url),
    )
    shown.set_default_timeout(PATIENCE)
    shown.goto(address)
    shown.locator("#prompt input, #prompt textarea").wait_for()
    yield shown
    shown.close()
    assert errors == []


def prompt(page: Any) -> Any:
    return page.locator("#prompt input, #prompt textarea").first


def await_pictures(page: Any, of: str, number: int = 2) -> Any:
    """Pictures of a prompt, once there are so many."""
    found = page.locator(f'{PICTURES}[alt^="{of},"]')
    playwright.expect(found).to_have_count(number, timeout=PATIENCE)
    return found


def files_of(found: Any) -> list[Image.Image]:
    addresses = [image.get_attribute("src") for image in found.all()]
    return [Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) for address in addresses]


def test_a_prompt_typed_and_a_click_show_teacher_and_student_side_by_side_with_their_seconds(page: Any):
    prompt(page).fill("green apple")
    page.click("#draw")
    found = await_pictures(page, "green apple")
    teacher, student = (image.bounding_box() for image in found.all())
    assert teacher["y"] == student["y"] and teacher["x"] + teacher["width"] <= student["x"]
    captions = page.locator("#pictures figcaption").all_inner_texts()
    assert captions[0].startswith("base, 50 steps") and "4 steps" in captions[1]
    assert all(re.search(r"\d+\.\d\d s", caption) for caption in captions)
    assert [file.info["parameters"].split("\n")[0] for file in files_of(found)] == ["green apple"] * 2


def test_a_saved_picture_holds_its_settings(page: Any, tmp_path: Path):
    prompt(page).fill("pizza")
    page.click("#draw")
    await_pictures(page, "pizza")
    with page.expect_download() as download:
        page.locator("#pictures figcaption a").last.click()
    assert download.value.suggested_filename.startswith("pizza-")
    download.value.save_as(tmp_path / "pizza.png")
    with Image.open(tmp_path / "pizza.png") as file:
        assert "Steps: 4, Sampler: TCD" in file.info["parameters"]


def test_it_can_be_used_by_the_keyboard_alone(page: Any):
    playwright.expect(prompt(page)).to_be_focused()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("blue bird")
    page.keyboard.press("Enter")
    await_pictures(page, "blue bird")
    page.keyboard.type("s")
    page.keyboard.press("Tab")
    playwright.expect(page.locator("#draw")).to_be_focused()
    page.keyboard.press("Enter")
    await_pictures(page, "blue birds")


@pytest.mark.parametrize("page", [(390, 844)], indirect=True, ids=["390px"])
def test_a_phone_s_width_is_enough(page: Any):
    page.click("#draw")
    found = await_pictures(page, "red heart")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert all(image.bounding_box()["x"] + image.bounding_box()["width"] <= 390 for image in found.all())


def test_fifty_clicks_in_five_seconds_leave_one_drawing_behind(page: Any, begun: list[tuple[int, int]]):
    prompt(page).fill("yellow star")
    page.get_by_label("Lock").uncheck()
    page.click("#draw")  # what is imported at first is there then
    await_pictures(page, "yellow star")
    del begun[:]
    clicks = "for (let n = 0; n < 50; n++) setTimeout(() => document.querySelector('#draw').click(), 100 * n)"
    page.evaluate(f"() => {{ {clicks} }}")
    page.wait_for_timeout(5200)
    seeds = len({seed for seed, _ in begun})
    page.wait_for_function("!document.querySelector('#message').innerText.trim()")
    after = len({seed for seed, _ in begun}) - seeds
    print(f"begun for {seeds} of 50 clicks, and for {after} after the last one")
    assert after <= 1
    await_pictures(page, "yellow star")


def test_a_picture_follows_what_is_typed(page: Any):
    page.locator("#steps input[type=number]").fill("1")
    page.locator("#typing input").check()
    page.evaluate(WATCH)
    seconds = []
    for word in ("red", "sun", "cat", "green apple", "frog"):
        prompt(page).fill("")
        page.wait_for_timeout(1000)
        prompt(page).press_sequentially(word, delay=60)
        seen = f"window.seen.find(each => each[0].startsWith('{word},'))"
        page.wait_for_function(f"() => {seen}")
        seconds.append(page.evaluate(f"({seen}[1] - window.lastKey) / 1000"))
        page.evaluate("window.seen = []")
    print(
        f"seconds from the last key to its picture: {statistics.median(seconds):.3f} of", *map("{:.3f}".format, seconds)
    )
    assert statistics.median(seconds) < 5  # other programs may use the cores


def test_a_lora_of_ones_own_is_dropped_and_drawn_with(page: Any):
    student = PACKAGE / "assets" / "tiny" / "student" / "lora" / "pytorch_lora_weights.safetensors"
    page.get_by_role("button", name="LoRAs of your own").click()
    page.locator("input[type=file]").set_input_files(student)
    playwright.expect(page.locator("#models")).to_contain_text(" on tiny", timeout=PATIENCE)
    prompt(page).fill("dog")
    page.click("#draw")
    found = await_pictures(page, "dog")
    assert "fine-tuned, 50 steps" in found.last.get_attribute("alt")


def test_a_mistake_is_a_sentence(page: Any):
    page.get_by_role("button", name="Teacher, negative prompt, size").click()
    page.get_by_label("Width").fill("33")
    page.get_by_label("Width").press("Tab")
    prompt(page).fill("tree")
    page.click("#draw")
    problem = page.locator("#pictures .failed").first
    problem.wait_for()
    assert "width=33: expected a positive multiple of" in problem.inner_text()
    assert "Traceback" not in page.content()


def test_an_evaluation_is_shown_with_its_tables_and_pictures(page: Any):
    page.get_by_role("tab", name="Evaluations").click()
    page.get_by_text("few <images>").wait_for()
    assert page.locator(".wide td", has_text="12.3").count() == 1
    assert page.locator(".wide img").count() == 1


def test_no_file_of_the_machine_is_served(address: str):
    for file in (PACKAGE / "__init__.py", Path("/etc/hostname"), Path("pyproject.toml").absolute()):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={file}")
        assert refused.value.code in (403, 404)
