"""The page in a real Chromium: what people do on it, on a desk and on a phone, in light and in dark.

Screenshots go to the folder ``$TOOLKIT_SCREENSHOTS``, else to pytest's own.
"""

import base64
import csv
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import serving
from small_net import export, small_metadata, small_net

pytestmark = pytest.mark.browser
NEEDED = "BROWSER_NEEDED" in os.environ  # then nothing is skipped
load = importlib.import_module if NEEDED else pytest.importorskip
api = load("playwright.sync_api")
axe = load("axe_playwright_python.sync_playwright")

CHROMIUM = Path("/usr/bin/chromium")
EXAMPLES = Path(__file__).parents[1] / "serve" / "examples"
LABELS = ("airplane", "automobile", "bird", "frog", "horse", "ship", "truck")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page on two artifacts that agree, the second of which is never sure."""
    folder = tmp_path_factory.mktemp("browser")
    about = small_metadata().model_copy(update={"labels": LABELS})
    export(small_net(), about, folder / "student.onnx")
    shy = small_net()
    shy.net[-1].weight.data.mul_(0.02)
    shy.net[-1].bias.data.mul_(0.02)
    export(shy, about, folder / "teacher.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        with serving(folder / "student.onnx", folder / "teacher.onnx") as server:
            yield server.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not (NEEDED or CHROMIUM.exists()):
        pytest.skip(f"no Chromium at {CHROMIUM}")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield chromium
        chromium.close()


def _open(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """The page in a context of its own; fails where something is asked from elsewhere, or a script fails."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write", "camera"], **options)
    page = context.new_page()
    page.set_default_timeout(30_000)
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.wait_for_selector("#picture input[type=file]", state="attached")
    yield page
    context.close()
    assert not errors
    assert [address for address in asked if not address.startswith((url, "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def desk(browser: Any, url: str) -> Iterator[Any]:
    yield from _open(browser, url, viewport={"width": 1200, "height": 900}, color_scheme="light")


@pytest.fixture(scope="module")
def phone(browser: Any, url: str) -> Iterator[Any]:
    """375 pixels wide, and dark."""
    yield from _open(browser, url, viewport={"width": 375, "height": 812}, color_scheme="dark")


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("TOOLKIT_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def _clear(page: Any) -> None:
    _tab(page, "One picture")
    if page.get_by_label("Remove Image").count():
        page.get_by_label("Remove Image").click()
    page.wait_for_selector("#answer :text('comes here')")


def _upload(page: Any, path: Path) -> None:
    _clear(page)
    page.set_input_files("#picture input[type=file]", path)


def _check_reading(page: Any) -> None:
    """Names, roles and contrast, by the rules of WCAG 2.1 AA as axe-core tests them."""
    options = {
        "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"],
        "rules": {"nested-interactive": {"enabled": False}},  # Gradio's upload button holds its own input
    }
    found = axe.Axe().run(page, options=options).response["violations"]
    told = [(item["id"], [node["html"][:200] for node in item["nodes"]]) for item in found]
    assert not told, json.dumps(told, indent=1)


def test_an_upload_is_answered_by_both_models(desk: Any, shots: Path) -> None:
    _upload(desk, EXAMPLES / "ship.png")
    desk.wait_for_selector("#answer .bars")
    assert desk.locator("#answer .name").all_inner_texts() == ["student", "teacher"]
    assert desk.locator("#answer .bars tr").count() == 10
    assert "Both put" in desk.inner_text("#answer .agreement")
    assert "CPUExecutionProvider" in desk.inner_text("#answer")
    desk.get_by_label("Show where the model looked").check()
    desk.wait_for_selector("#looked figure")
    assert desk.locator("#looked img").count() == 4
    desk.screenshot(path=shots / "compare.png", full_page=True)
    _check_reading(desk)
    desk.get_by_label("Show where the model looked").uncheck()
    desk.wait_for_selector("#looked figure", state="detached")


def test_a_picture_is_dropped(desk: Any) -> None:
    data = base64.b64encode((EXAMPLES / "ship.png").read_bytes()).decode()
    carry = """async (data) => {
        const blob = await (await fetch(`data:image/png;base64,${data}`)).blob();
        const carried = new DataTransfer();
        carried.items.add(new File([blob], "ship.png", { type: "image/png" }));
        return carried;
    }"""
    _clear(desk)
    carried = {"dataTransfer": desk.evaluate_handle(carry, data)}
    target = desk.get_by_text("Drop a picture here")
    for event in ("dragenter", "dragover", "drop"):
        target.dispatch_event(event, carried)
    desk.wait_for_selector("#answer .bars")


def test_the_threshold_is_the_user_s(desk: Any, shots: Path) -> None:
    _upload(desk, EXAMPLES / "frog.png")
    desk.wait_for_selector("#answer .bars")
    number = desk.locator("#settings input[type=number]")
    confidences = [float(item.get_attribute("data-confidence")) for item in desk.locator("#answer article").all()]
    assert len(confidences) == 2
    for percent in ("0", "100", "60"):
        unsure = sum(confidence < int(percent) / 100 for confidence in confidences)
        number.fill(percent)
        number.press("Enter")
        desk.wait_for_function(
            "count => [...document.querySelectorAll('#answer p.if-unsure.verdict')]"
            ".filter(item => item.offsetParent).length === count",
            arg=unsure,
        )
        assert desk.locator("#answer .verdict.if-sure:visible").count() == 2 - unsure
        if percent == "100":
            desk.screenshot(path=shots / "not_sure.png", full_page=True)


def test_one_model_is_enough(desk: Any) -> None:
    _upload(desk, EXAMPLES / "ship.png")
    desk.get_by_label("Compare with").click()
    desk.get_by_role("option", name="nothing").click()
    desk.wait_for_selector("#answer .agreement", state="detached")
    assert desk.locator("#answer article").count() == 1
    desk.get_by_label("Compare with").click()
    desk.get_by_role("option", name="teacher").click()
    desk.wait_for_selector("#answer .agreement")


def test_a_picture_is_pasted(desk: Any) -> None:
    data = base64.b64encode((EXAMPLES / "horse.png").read_bytes()).decode()
    copy = """async (data) => {
        const blob = await (await fetch(`data:image/png;base64,${data}`)).blob();
        await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
    }"""
    _clear(desk)
    desk.evaluate(copy, data)
    for _ in range(2):  # the second one takes the place of the first
        with desk.expect_response("**/gradio_api/upload*"):
            desk.keyboard.press("Control+V")
        desk.wait_for_selector("#answer .bars")


def test_a_picture_is_taken_with_the_camera(desk: Any) -> None:
    _clear(desk)
    desk.get_by_label("Capture from camera").click()
    desk.get_by_text("Click to Access Webcam").click()
    desk.wait_for_function("document.querySelector('#picture video')?.readyState >= 2")  # somebody would wait, too
    desk.get_by_label("capture photo").click()
    desk.wait_for_selector("#answer .bars")
    desk.get_by_label("Remove Image").click()
    desk.get_by_label("Upload file").click()


def test_an_example_is_taken_by_keyboard(desk: Any) -> None:
    _clear(desk)
    desk.get_by_role("tab", name="One picture").focus()
    for _ in range(30):
        desk.keyboard.press("Tab")
        if desk.evaluate("document.activeElement.matches('.gallery button, .gallery-item')"):
            break
    desk.keyboard.press("Enter")
    desk.wait_for_selector("#answer .bars")


def test_an_error_is_one_line(desk: Any, shots: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes((EXAMPLES / "ship.png").read_bytes()[:3000])
    _upload(desk, broken)
    desk.wait_for_selector("#answer .problem")
    assert desk.inner_text("#answer") == "This picture is broken or cut short (image file is truncated)."
    desk.screenshot(path=shots / "error.png", full_page=True)
    large = tmp_path / "large.png"
    large.write_bytes(bytes(21 * 2**20))
    _upload(desk, large)
    desk.wait_for_selector("text=exceed the maximum allowed size of 20")
    desk.screenshot(path=shots / "too_large.png", full_page=True)


def test_several_pictures_and_their_csv(desk: Any, shots: Path, tmp_path: Path) -> None:
    _tab(desk, "Several")
    broken = tmp_path / "broken.png"
    broken.write_bytes((EXAMPLES / "ship.png").read_bytes()[:3000])
    files = [*sorted(EXAMPLES.glob("*.png")), broken]
    desk.set_input_files("#pictures input[type=file]", files)
    desk.wait_for_selector("#table .results")
    assert desk.locator("#table .gallery li").count() == len(files)
    assert desk.locator("#table .results tbody tr").count() == len(files)
    assert "1 has no answer" in desk.inner_text("#table .summary")
    with desk.expect_download() as download:
        desk.get_by_role("link", name="Download CSV").click()
    rows = list(csv.DictReader(Path(download.value.path()).read_text(encoding="utf-8-sig").splitlines()))
    assert [row["file"] for row in rows] == [file.name for file in files]
    assert rows[0]["student answer"] in LABELS
    assert rows[-1]["problem"]
    desk.screenshot(path=shots / "several.png", full_page=True)
    _check_reading(desk)


def test_the_models_cards(desk: Any, shots: Path) -> None:
    _tab(desk, "About")
    assert desk.locator("#cards .card:visible").count() == 2
    assert desk.get_by_text("What it is not").count() == 2
    desk.screenshot(path=shots / "about.png", full_page=True)
    _check_reading(desk)


def test_a_phone_in_the_dark(phone: Any, shots: Path) -> None:
    _upload(phone, EXAMPLES / "truck.png")
    phone.wait_for_selector("#answer .bars")
    phone.get_by_label("Show where the model looked").check()
    phone.wait_for_selector("#looked figure")
    for tab in ("One picture", "Several", "About"):
        _tab(phone, tab)
        if tab == "Several":
            phone.set_input_files("#pictures input[type=file]", sorted(EXAMPLES.glob("*.png")))
            phone.wait_for_selector("#table .results")
        phone.screenshot(path=shots / f"phone_{tab.lower().replace(' ', '_')}.png", full_page=True)
        assert phone.evaluate("document.documentElement.scrollWidth") <= 375
        _check_reading(phone)
    assert phone.evaluate("document.body.classList.contains('dark')")
