"""The page in a real browser: drawn, quiet, offline, sortable, and readable in every light and width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page

Open = Callable[..., Page]


@dataclass
class Visit:
    """A page that is open, what it asked for, and what it complained of."""

    file: Path
    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Open]:
    """Opens a file; after every test each page must have asked for that file alone and complained of nothing."""
    visits: list[Visit] = []

    def open_file(file: Path, *, width: int = 1280, scheme: str = "light", scripts: bool = True) -> Page:
        size = {"width": width, "height": 900}
        context = chromium.new_context(viewport=size, color_scheme=scheme, java_script_enabled=scripts)  # type: ignore[arg-type]
        seen = Visit(file, context.new_page())
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.on("console", lambda message: seen.complaints.append(message.text))
        seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        visits.append(seen)
        seen.page.goto(file.as_uri())
        return seen.page

    yield open_file
    for seen in visits:
        seen.page.context.close()
        assert [url for url in seen.requests if not url.startswith("data:")] == [seen.file.as_uri()]
        assert seen.complaints == []


def drawn_marks(figure: Locator) -> list[float]:
    """The widths and heights on the screen of a figure's visible marks in an arm's colour."""
    sizes: list[float] = figure.evaluate(
        """figure => [...figure.querySelectorAll(".plot svg")]
            .filter(svg => svg.getBoundingClientRect().width > 100)
            .flatMap(svg => [...svg.querySelectorAll("[fill^='var(--arm'], [stroke^='var(--arm']")])
            .map(mark => mark.getBoundingClientRect())
            .map(box => Math.max(box.width, box.height))"""
    )
    return sizes


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_every_chart_is_drawn(visit: Open, page_file: Path, width: int) -> None:
    figures = visit(page_file, width=width).locator("figure").all()
    assert len(figures) == 1 + 1 + 3 + 2 + 8 + 4
    for figure in figures:
        marks = drawn_marks(figure)
        assert len(marks) >= 3
        assert max(marks) > 5


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_networks_are_drawn_with_their_healthy_ranges(
    visit: Open, networks_file: Path, width: int, scheme: str
) -> None:
    section = visit(networks_file, width=width, scheme=scheme).locator("#networks")
    figures = section.locator("figure").all()
    assert len(figures) == 6
    for figure in figures:
        assert max(drawn_marks(figure)) > 50
        band = figure.locator(".plot:visible path[fill='var(--grid)']").bounding_box()
        assert band is not None
        assert band["height"] > 2
        assert band["width"] > 100


@pytest.mark.parametrize("width", [360, 1280])
def test_names_and_notes_of_comparisons_do_not_meet(visit: Open, many_file: Path, width: int) -> None:
    boxes = visit(many_file, width=width).evaluate(
        """[...document.querySelectorAll("#differences svg text")].map(text => text.getBoundingClientRect())
            .filter(box => box.width).map(box => [box.left, box.right, box.top, box.bottom])"""
    )
    assert len(boxes) > 6
    crowded = [(a, b) for a, b in combinations(boxes, 2) if max(a[0], b[0]) < min(a[1], b[1])]
    assert all(max(a[2], b[2]) >= min(a[3], b[3]) - 1 for a, b in crowded)


def test_charts_need_no_script(visit: Open, page_file: Path) -> None:
    page = visit(page_file, scripts=False)
    assert page.locator("figure .plot svg:visible").count() == page.locator("figure").count()
    assert page.locator(".switch:visible, .copy:visible").count() == 0


def colours(page: Page) -> tuple[str, str, str, str]:
    """Of the page, its text, an arm's line, and an axis's label, as computed."""
    computed = """(element, name) => getComputedStyle(element)[name]"""
    return (
        page.locator("body").evaluate(computed, "backgroundColor"),
        page.locator("body").evaluate(computed, "color"),
        page.locator("#learning path[stroke='var(--arm-0)']").first.evaluate(computed, "stroke"),
        page.locator("#learning .plot text").first.evaluate(computed, "fill"),
    )


def brightness(colour: str) -> int:
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))


def test_dark_scheme_turns_page_and_charts(visit: Open, page_file: Path) -> None:
    light, dark = (colours(visit(page_file, scheme=scheme)) for scheme in ("light", "dark"))
    assert brightness(light[0]) > 600 > 150 > brightness(dark[0])
    for before, after in zip(light[1:], dark[1:], strict=True):
        assert brightness(after) > brightness(before) + 60


@pytest.mark.parametrize("name", ["page_file", "rates_file", "image_file", "networks_file", "hostile_file"])
@pytest.mark.parametrize("width", [360, 800])
def test_page_does_not_scroll_sideways(visit: Open, request: pytest.FixtureRequest, name: str, width: int) -> None:
    page = visit(request.getfixturevalue(name), width=width)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_text_in_charts_is_legible_on_a_phone(visit: Open, page_file: Path) -> None:
    page = visit(page_file, width=360)
    sizes = page.evaluate(
        """[...document.querySelectorAll(".plot svg")].filter(svg => svg.getBoundingClientRect().width)
            .map(svg => 12 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)"""
    )
    assert len(sizes) > 15
    assert min(sizes) > 9


def column(page: Page, caption: str, head: str) -> tuple[Locator, Callable[[], list[str]]]:
    """The button in a table's head, and what its column reads from top to bottom."""
    table = page.locator("table", has=page.locator("caption", has_text=caption))
    heads = [text.strip() for text in table.locator("thead th").all_inner_texts()]
    place = heads.index(head)
    cells = table.locator(f"tbody tr > :nth-child({place + 1})")
    return table.locator("thead button").nth(place), cells.all_inner_texts


def test_a_click_sorts_by_number(visit: Open, page_file: Path) -> None:
    page = visit(page_file)
    button, read = column(page, "Arms", "mean test error (%)")
    before = read()
    button.click()
    assert [float(text) for text in read()] == sorted(float(text) for text in before)
    assert button.locator("..").get_attribute("aria-sort") == "ascending"
    button.click()
    assert [float(text) for text in read()] == sorted((float(text) for text in before), reverse=True)


def test_signs_and_bounds_sort_by_value(visit: Open, page_file: Path) -> None:
    page = visit(page_file)
    button, read = column(page, "Comparisons", "95 % interval")
    button.click()
    lows = [float(text.split()[0]) for text in read()]
    assert lows == sorted(lows)
    assert min(lows) < 0


def test_thousands_sort_by_value(visit: Open, many_file: Path) -> None:
    page = visit(many_file)
    page.get_by_text("Every run (9)").click()
    button, read = column(page, "Every run", "images/s")
    for reverse in (False, True):
        button.click()
        rates = [float(text.replace(",", "")) for text in read()]
        assert rates == sorted(rates, reverse=reverse)
        assert max(rates) > 1e6 > 10 > min(rates)


def test_the_keyboard_sorts_and_empty_cells_stay_last(visit: Open, page_file: Path) -> None:
    page = visit(page_file)
    page.get_by_text("Every run (40)").click()
    button, read = column(page, "Every run", "test error (%)")
    button.focus()
    for reverse in (False, True):
        page.keyboard.press("Enter")
        shown = read()
        assert shown[-1] == ""
        assert [float(text) for text in shown[:-1]] == sorted((float(text) for text in shown[:-1]), reverse=reverse)


def test_scales_switch(visit: Open, page_file: Path) -> None:
    figure = visit(page_file).locator("#learning figure").first
    shown = [figure.locator(f".plot[data-scale={scale}]") for scale in ("log", "linear")]
    assert [plot.is_visible() for plot in shown] == [True, False]
    figure.get_by_role("button", name="linear").click()
    assert [plot.is_visible() for plot in shown] == [False, True]


def test_the_key_brings_an_arm_forward_and_back(visit: Open, page_file: Path) -> None:
    page = visit(page_file)
    button = page.locator("#learning .key button", has_text="ShiftedReLU")
    button.click()
    assert page.locator(".plot .dim[stroke='var(--arm-0)']").count() > 10
    assert page.locator(".plot .dim[stroke='var(--arm-3)'], .plot .dim[fill='var(--arm-3)']").count() == 0
    assert page.locator(".key button[aria-pressed=true]").all_inner_texts() == ["ShiftedReLU", "ShiftedReLU"]
    button.click()
    assert page.locator(".dim").count() == 0


def test_the_key_tells_arms_of_one_colour_apart(visit: Open, many_file: Path) -> None:
    page = visit(many_file)
    shown = [page.locator(f"#learning path[stroke='var(--arm-{arm})']").first for arm in (0, 8)]
    assert len({line.evaluate("line => getComputedStyle(line).stroke") for line in shown}) == 1
    page.locator("#learning .key button", has_text="LeakyReLU(0.9)").click()
    assert ["dim" in (line.get_attribute("class") or "") for line in shown] == [True, False]


def test_a_dot_says_which_run_it_is(visit: Open, page_file: Path) -> None:
    page = visit(page_file)
    page.locator("#seeds svg.wide [aria-label^='ELU, seed 4']").hover(force=True)
    assert page.locator("#tip").inner_text().startswith("ELU, seed ")


def test_the_command_can_be_copied(visit: Open, page_file: Path) -> None:
    page = visit(page_file)
    page.locator(".copy").click()
    page.locator(".copy", has_text="ed").wait_for()
    assert page.locator(".copy").inner_text() in ("Copied", "Selected")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_print_keeps_every_chart_and_is_light(visit: Open, page_file: Path, scheme: str) -> None:
    page = visit(page_file, width=718, scheme=scheme)
    page.emulate_media(media="print", color_scheme=scheme)  # type: ignore[arg-type]
    assert brightness(colours(page)[0]) > 700
    assert brightness(colours(page)[3]) < 400
    for figure in page.locator("figure").all():
        assert max(drawn_marks(figure)) > 5
    widest = page.evaluate(
        "Math.max(...[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().right))"
    )
    assert widest <= 718
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_hostile_text_does_nothing(visit: Open, hostile_file: Path) -> None:
    page = visit(hostile_file)
    page.locator("#seeds svg.wide [aria-label*='seed 4']").first.hover(force=True)
    page.locator("thead button").first.click()
    page.locator("#learning .key button").first.click()
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.locator("img").count() == 0
    assert page.locator("h1").inner_text().startswith("</script><img src=")
    assert "onerror=" in page.locator("#tip").all_text_contents()[0]


def test_a_screen_reader_finds_its_way(visit: Open, page_file: Path) -> None:
    page = visit(page_file)
    assert page.get_by_role("img").count() == page.locator(".plot svg:visible").count()
    assert page.get_by_role("heading", level=1).count() == 1
    assert page.get_by_role("navigation").get_by_role("link").count() == page.locator("main > section").count()
    assert all(text.strip() for text in page.locator("button, a").all_text_contents())
    assert page.locator("table:not(:has(caption))").count() == 0
