"""The plot of designs: a picture that stands alone, and a page with the numbers."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from samara.errors import ConfigError
from samara.measure.design import DesignInput
from samara.model.config import ModelConfig
from samara.report.design_plot import plot_designs

SVG = "{http://www.w3.org/2000/svg}"


def design(name: str, **model) -> DesignInput:
    fields = {"hidden_size": 64, "num_hidden_layers": 3, "head_dim": 16, "vocab_size": 100}
    return DesignInput(
        name=name,
        model=ModelConfig.model_validate({**fields, **model}).expand(),
        sequence_length=32,
        batch_size=8,
        micro_batch_size=4,
        tokens=10_000,
    )


DESIGNS = [
    design("plain"),
    design("growing", layerwise_scaling={}, ffn_dim_divisor=16, num_hidden_layers=5),
    design("low <rank>", cola={"rank": 16}),
    design("fourth"),
]


def test_the_picture_draws_every_layer_of_every_design(tmp_path):
    path = tmp_path / "designs.svg"
    plot_designs(DESIGNS, path)
    root = ElementTree.fromstring(path.read_text())
    drawings = root.findall(f"{SVG}svg")
    layers = [d.findall(f"{SVG}g") for d in drawings]
    assert [len(found) for found in layers] == [3, 5, 3, 3]
    assert {g.get("class") for g in layers[2]} == {"layer hollow"}
    assert [t.text for t in root.findall(f"{SVG}text")][::2] == [d.name for d in DESIGNS]


def test_drawings_stay_inside_the_picture_and_apart(tmp_path):
    path = tmp_path / "designs.svg"
    plot_designs(DESIGNS, path)
    root = ElementTree.fromstring(path.read_text())
    places = [
        tuple(float(d.get(key, "")) for key in ("x", "y", "width", "height"))
        for d in root.findall(f"{SVG}svg")
    ]
    for x, y, width, height in places:
        assert x >= 0
        assert y >= 0
        assert x + width <= float(root.get("width", ""))
        assert y + height <= float(root.get("height", ""))
    (x0, y0, width, height), (x1, y1, _, _), _, (x3, y3, _, _) = places
    assert x1 >= x0 + width
    assert (x3, y3 > y0 + height) == (x0, True)
    assert y1 < y0  # the deeper one is taller, from the same ground


def test_a_picture_is_the_same_bytes_again(tmp_path):
    for name in ("a.svg", "b.svg", "a.html", "b.html"):
        plot_designs(DESIGNS, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_picture_has_the_styles_it_names_and_loads_nothing(tmp_path):
    path = tmp_path / "one.svg"
    plot_designs(DESIGNS[2:3], path)
    text = path.read_text()
    for rule in (".shape .query", ".series rect", ".tick.end", ".shape .hollow", "--s0"):
        assert rule in text
    assert "url(" not in text
    assert "href" not in text


def test_the_page_has_numbers_beside_the_drawing(tmp_path):
    path = tmp_path / "designs.html"
    plot_designs(DESIGNS[:3], path)
    text = path.read_text()
    assert "<title>Design of plain, growing and low &lt;rank&gt;</title>" in text
    assert text.count("<summary>Numbers</summary>") == 3
    assert "<rank>" not in text


def test_another_ending_is_refused(tmp_path):
    path = tmp_path / "plot.png"
    with pytest.raises(ConfigError) as error:
        plot_designs(DESIGNS, path)
    assert str(error.value) == (f"--plot {path}: ends in neither .svg nor .html; name one of them")
