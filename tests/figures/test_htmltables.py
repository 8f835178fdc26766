"""Tables of notebooks: what is in them is text, and nothing gets lost without a word."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from ckdiff.errors import printable
from ckdiff.figures.htmltables import MOST, html_table, spread

TEXTS = st.text(st.characters(exclude_categories=()), max_size=12)
NASTY = "</td><script>alert(1)</script>\"'&\u202e\ud800\x1b[31m"


class Page(HTMLParser):
    """The tags of a piece of HTML, and the texts of its cells."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.all = ""
        self.inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.inside = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.all += data
        if self.inside:
            self.cells[-1] += data


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3), TEXTS)
def test_any_text_is_text(headline: str, cells: list[str], word: str) -> None:
    heads = [f"h{i}" for i in range(len(cells))]
    found = html_table(headline, heads, [cells], texts=len(cells), words=[word])
    found.encode()  # a notebook is a file
    page = Page(found)
    assert set(page.tags) <= {"div", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    assert page.all.startswith(printable(headline))
    assert page.all.endswith(printable(word))
    assert page.cells == [*heads, *map(printable, cells)]


def test_numbers_read_well() -> None:
    page = Page(html_table("h", ["n", "a", "b", "c"], [["x", 1234567, 0.123456, None]]))
    assert page.cells == ["n", "a", "b", "c", "x", "1,234,567", "0.1235", ""]


def test_what_is_left_out_is_said() -> None:
    assert "and 7 more" in html_table("h", ["n"], [["x"]], more=7)
    assert "more" not in html_table("h", ["n"], [["x"]])
    assert "<table" not in html_table("h", ["n"], [])


def test_colours_are_those_of_the_page() -> None:
    found = html_table(NASTY, [NASTY], [[NASTY]], words=[NASTY])
    assert "color:" not in found.replace("border-bottom", "")
    assert "<script" not in found


@given(st.integers(0, 10**6))
def test_some_rows_from_the_first_to_the_last(count: int) -> None:
    at = spread(count)
    assert at == sorted(set(at))
    assert len(at) == min(count, MOST)
    assert at[:1] == [0][:count]
    assert at[-1:] == [count - 1][:count]
