"""How the documents are written: lines that fit a window, and sentences that can be read at once."""

import pytest

from tests.support.pages import OF_THEIR_TIME, PAGES, passages, sentences, words

COLUMNS, WORDS = 160, 40
WRITTEN = [page for page in PAGES if not page.startswith(OF_THEIR_TIME)]


@pytest.mark.parametrize("page", WRITTEN)
def test_lines_of_prose_fit_a_window(page):
    """A row of a table is one line, whatever its length."""
    assert not [line for line in PAGES[page].splitlines() if len(line) > COLUMNS and not line.startswith("|")]


@pytest.mark.parametrize("page", WRITTEN)
def test_no_sentence_has_over_40_words(page):
    said = [sentence for passage in passages(PAGES[page]) for sentence in sentences(passage)]
    assert not [sentence for sentence in said if len(words(sentence)) > WORDS]


def test_what_counts_as_a_sentence():
    """Sentences end at . ! ? and :, with their paragraph, list item or cell; code does not count, or as one word."""
    page = "# Head\n\nOne two\nthree: `a b` four. (Five.) Six\n- seven [eight](x.md)\n  nine\n\n    code\n\n"
    page += "| ten | `a`, `b` |\n"
    counted = [len(words(sentence)) for passage in passages(page) for sentence in sentences(passage)]
    assert [count for count in counted if count] == [1, 3, 2, 1, 1, 3, 1]
