"""Charts as SVG: ticks, what is left of many points, gaps, and where a value lies in the picture."""

import re
import xml.etree.ElementTree as xml

import pytest

from rlhfdsl.running import chart
from rlhfdsl.running.chart import Series, label_of, lines, short, stack, thinned, ticks

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        # (high - low) / 4 is 0.25, and the next of 1, 2, 5 times a power of ten is 0.5
        (0.0, 1.0, [0.0, 0.5, 1.0]),
        (0.1, 0.9, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),  # 0.8 / 4 = 0.2 is one of them itself
        (-3.0, 17.0, [-5.0, 0.0, 5.0, 10.0, 15.0, 20.0]),  # 20 / 4 = 5
        (0.0, 3e-5, [0.0, 1e-5, 2e-5, 3e-5]),  # 0.75e-5
        (0.0, 0.0, [0.0, 0.5, 1.0]),
        (100.0, 100.0, [90.0, 95.0, 100.0, 105.0, 110.0]),  # a tenth of room above and below; 20 / 4 = 5
    ],
)
def test_ticks(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("low, high", [(1.0, 1.0 + 1e-15), (-1e299, 1e299), (0.0, 5e-324), (-2e-9, 3e7)])
def test_ticks_enclose_any_two_numbers(low, high):
    found = ticks(low, high)
    seen = 1e-8 * (found[1] - found[0])  # a picture has 182 places for 2 steps or more
    assert found[0] <= low + seen and high - seen <= found[-1] and 2 <= len(found) <= 7


def test_numbers_have_the_digits_that_tell_them_apart():
    assert [label_of(v, 0.05) for v in (0.0, 0.05, -0.1)] == ["0", "0.05", "-0.10"]
    assert [label_of(v, 5000) for v in (5000.0, 10000.0, 1.5e6)] == ["5000", "10k", "1.5M"]
    assert [label_of(v, 5e-6) for v in (5e-6, 1e-5, 1.5e-5)] == ["5e-6", "1.0e-5", "1.5e-5"]
    assert label_of(1.05e-3, 5e-5) == "1.05e-3" and label_of(0.50002, 1e-5) == "0.50002"
    assert label_of(2e10, 1e10) == "2e10" and label_of(3 * 0.1, 0.1) == "0.3"
    assert [short(v) for v in (0.693147, 12345.0, 2.5e-6)] == ["0.6931", "1.234e4", "2.5e-6"]


def test_spikes_and_gaps_stay_when_points_are_left_out():
    values = [0.0] * 10_000
    values[1234], values[7777], values[5000] = 9.0, -9.0, NAN
    kept = thinned([(float(x), y) for x, y in enumerate(values)])
    assert (1234.0, 9.0) in kept and (7777.0, -9.0) in kept
    assert [x for x, y in kept if y != y] == [5000.0]
    # of 200 bins the least and the greatest; in a bin of equal values both are found, at its two ends; and one gap
    assert len(kept) == chart.MOST + 1
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    few = [(float(x), None if x == 3 else 1.0) for x in range(chart.MOST)]
    assert thinned(few) == few


def paths(svg: str, name: str) -> list[str]:
    """The paths of a class, of a picture that is well formed."""
    return [e.attrib["d"] for e in xml.fromstring(svg).iter("path") if name in e.attrib["class"].split()]


def test_where_a_line_lies():
    # One series has no legend: the plot is x 46 to 352, y 190 up to 8. Updates 0 to 3 are 102 apart; ticks are 0 to 4.
    (path,) = paths(lines("loss", [Series("loss", [(1, 4.0), (2, 0.0), (3, 2.0)])], "update"), "line")
    assert path == "M148.0 8.0L250.0 190.0L352.0 99.0"


def test_a_line_ends_where_a_number_is_missing():
    points = [(1, 4.0), (2, None), (3, 2.0), (4, NAN), (5, INF), (6, 0.0), (9, 0.0)]
    (path,) = paths(lines("loss", [Series("loss", points)], "update"), "line")
    # 9 updates of 34; a point between two gaps, and one at an end, is a dot
    assert path == "M80.0 8.0h0M148.0 99.0h0M250.0 190.0L352.0 190.0"


def test_evaluations_are_dots_on_the_same_axes():
    svg = lines("loss", [Series("training", [(1, 2.0), (2, 1.0)]), Series("held out", [(0, 4.0)], dots=True)], "update")
    # The legend's row is 16 high with 6 below it: the plot begins at y 22, and its ticks are 1 to 4 with 56 between two
    assert "M46.0 22.0h0" in paths(svg, "dot") and paths(svg, "line") == ["M199.0 134.0L352.0 190.0"]
    assert [t.text for t in xml.fromstring(svg).iter("text")][:2] == ["training", "held out"]


def test_parts_of_a_whole_lie_on_each_other():
    svg = stack("seconds", [Series("a", [(1, 1.0), (2, 1.0)]), Series("b", [(1, 3.0), (2, 1.0)])], "rollout")
    first, second = paths(svg, "area")
    # Ticks 0 to 4 over y 190 to 22: 42 a second. First the upper edge to the right, then the lower one back.
    assert first == "M199.0 148.0L352.0 148.0L352.0 190.0L199.0 190.0Z"
    assert second == "M199.0 22.0L352.0 106.0L352.0 148.0L199.0 148.0Z"
    gap = stack("s", [Series("a", [(1, 1.0), (2, None), (3, 1.0)]), Series("b", [(1, 1.0), (2, 1.0), (3, 1.0)])], "r")
    assert [path.count("L") for path in paths(gap, "area")] == [1, 1, 1, 1]  # two stretches of one rollout each


def test_what_is_pointed_at_says_its_numbers():
    found = lines("loss", [Series("loss", [(1, 0.5), (2, None)])], "update", [(2, "went on")])
    assert re.findall(r"<title>(.*?)</title>", found, re.DOTALL) == [
        "update 1\nloss: 0.5", "update 2\nloss: not a number", "went on",
    ]  # fmt: skip
    many = lines("loss", [Series("loss", [(x, x / 100) for x in range(1, 121)])], "update")
    titles = re.findall(r"<title>(.*?)</title>", many, re.DOTALL)
    assert len(titles) == chart.COLUMNS and titles[1] == "updates 3 to 4\nloss: 0.03 to 0.04"


def test_marks_lie_at_their_updates():
    svg = lines("loss", [Series("loss", [(1, 0.0), (10, 1.0)])], "update", [(5, "went on"), (11, "outside")])
    assert paths(svg, "mark") == ["M199.0 8.0V190m-4 6h8l-4 -6z"]


def test_names_are_text():
    svg = lines("<b>", [Series("<script>\x1b", [(1, 1.0)]), Series("&", [(1, 2.0)])], "update")
    assert "<script>" not in svg and "&lt;script&gt;\\x1b" in svg and xml.fromstring(svg).attrib["aria-label"] == "<b>"


def test_nothing_to_draw_is_drawn():
    for points in ([(1, None)], [(1, NAN), (2, INF)]):
        xml.fromstring(lines("loss", [Series("loss", points)], "update"))
        xml.fromstring(stack("loss", [Series("loss", points)], "update"))
