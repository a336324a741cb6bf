"""The report's colours by numbers: against both papers, and against one another."""

import itertools

import numpy as np
import pytest

from megagpt.report.colours import ALARM, COLOURS, DAY, GREY, NIGHT, NIGHT_PAPER, style

# Machado, Oliveira and Fernandes 2009, severity 1: what linear RGB becomes.
DEUTERANOPIA = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
PROTANOPIA = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
# OKLab (Ottosson 2020): linear RGB to cones, their cube roots to lightness and two hues.
CONES = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
LAB = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
PAPERS = [(DAY, list(NIGHT)), (NIGHT_PAPER, list(NIGHT.values()))]


def linear(colour: str) -> np.ndarray:
    shares = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    low, high = sorted(linear(colour) @ [0.2126, 0.7152, 0.0722] for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


def apart(a: str, b: str, seen: object) -> float:
    """The distance of two colours in OKLab, in hundredths, as an eye sees them."""
    there = (LAB @ np.cbrt(CONES @ np.clip(np.array(seen) @ linear(c), 0, 1)) for c in (a, b))
    return 100 * float(np.linalg.norm(next(there) - next(there)))


def test_the_oracles():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    # WebAIM's contrast checker: the lightest grey that is enough for text.
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)
    assert apart("#000000", "#ffffff", np.eye(3)) == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize(("paper", "colours"), PAPERS)
def test_every_colour_is_seen_on_its_paper(paper, colours):
    assert {c: contrast(c, paper) for c in colours if contrast(c, paper) < 3} == {}


@pytest.mark.parametrize(("paper", "colours"), PAPERS)
@pytest.mark.parametrize(("seen", "least"), [(np.eye(3), 15), (DEUTERANOPIA, 10), (PROTANOPIA, 10)])
def test_any_two_runs_are_told_apart(paper, colours, seen, least):
    pairs = itertools.combinations(colours[: len(COLOURS)], 2)
    assert [pair for pair in pairs if apart(*pair, seen) < least] == []


def test_the_page_knows_each_colour_by_day_and_by_night():
    day, night = style().split("@media")
    assert set(NIGHT) == {*COLOURS, ALARM, GREY}
    for colour, dark in NIGHT.items():
        name = colour.removeprefix("#")
        assert f"--{name}:{colour};" in day and f"--{name}:{dark};" in night
