"""The curves of benchmarks/scale.py: growths, departures and the drawing, on made-up costs."""

from xml.etree import ElementTree

import pytest

from benchmarks.scale import Curve, Model, Point, draw, sequence, table


def curve(costs: dict[int, float], power: float = 1.0) -> Curve:
    points = tuple(Point(size, cost, float(size) ** power) for size, cost in costs.items())
    return Curve("made up", "things", "a step", "n", points)


def test_a_growth_is_the_exponent() -> None:
    squares = curve({n: 3e-4 * n**2 for n in (1, 2, 4, 8, 16)}, power=1.0)
    assert squares.growth(lambda p: p.cost) == pytest.approx(2)
    assert squares.growth(lambda p: p.expected) == pytest.approx(1)
    # What a small size costs besides does not hide how large ones grow.
    with_start = curve({n: 5.0 + n for n in (1, 10, 10**3, 10**4, 10**5, 10**6)})
    assert with_start.growth(lambda p: p.cost) == pytest.approx(1, abs=1e-3)


def test_it_is_told_where_a_cost_departs() -> None:
    assert curve({n: 0.5 * n for n in (1, 2, 4)}).departures() == "nowhere"
    bent = curve({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0, 16: 24.0})
    assert bent.departures() == "+50% at 16"
    assert "| 16 | 24 | 1.50 |" in table(bent)


def test_the_operations_are_those_of_the_causal_convention() -> None:
    model = Model(layers=1, width=2, heads=1, sequence=3, batch=1, vocabulary=5)
    # A token: 2 * 12 * width^2 for the layer's weights, 2 * length * width of attention, 2 * 5 * width; three times.
    assert model.operations() == 3 * 3 * (24 * 4 + 2 * 3 * 2 + 2 * 5 * 2)


def test_every_curve_is_drawn() -> None:
    root = ElementTree.fromstring(draw([curve({1: 1.0, 2: 2.5, 4: 4.0})] * 4))
    names = [element.tag.rpartition("}")[2] for element in root]
    assert names.count("polyline") == 4 and names.count("circle") == 12


def test_the_step_that_is_measured_is_pretrains() -> None:
    found = sequence(quick=True, steps=1)
    assert [point.size for point in found.points] == [64, 128, 256]
    assert all(point.cost > 0 for point in found.points)
