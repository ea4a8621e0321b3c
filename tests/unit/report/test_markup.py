"""Escaping by construction."""

from __future__ import annotations

from samara.report.markup import Html, element, escaped, joined, paragraph, together


def test_text_is_escaped_and_markup_is_not():
    inner = element("b", "<i>")
    assert inner == "<b>&lt;i&gt;</b>"
    assert element("p", inner, " & ", None) == "<p><b>&lt;i&gt;</b> &amp; </p>"


def test_markup_in_an_f_string_is_text_again():
    inner = element("b", "x")
    assert paragraph(f"{inner}") == "<p>&lt;b&gt;x&lt;/b&gt;</p>"


def test_attributes():
    made = element(
        "circle", class_="a", stroke_width=1.25, r=3, aria_label='"<', hidden=True, id=None
    )
    assert made == (
        '<circle class="a" stroke-width="1.25" r="3" aria-label="&quot;&lt;" hidden></circle>'
    )
    assert element("br", hidden=False) == "<br>"


def test_what_html_forbids_becomes_a_replacement_character():
    assert escaped("a\x00b\x1b[0m\ud800\ufffe\r\nc\rd\te") == "a�b�[0m��\nc�d\te"


def test_joining():
    assert joined(["<", None, Html("<br>")], " & ") == "&lt; &amp; <br>"
    assert together() == ""
