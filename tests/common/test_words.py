"""Numbers in sentences agree with what they count, and nothing in the package counts without that."""

import re

import pytest
from commands import ROOT

from hnml_hf.common.words import counted, plural


@pytest.mark.parametrize(
    ("number", "words", "text"),
    [
        (0, ("image",), "0 images"),
        (1, ("image",), "1 image"),
        (2000, ("label issue",), "2,000 label issues"),
        (1, ("class",), "1 class"),
        (3, ("class",), "3 classes"),
        (2, ("batch",), "2 batches"),
        (2, ("copy",), "2 copies"),
        (2, ("day",), "2 days"),
        (1, ("row", "were"), "1 row was"),
        (2, ("row", "were"), "2 rows were"),
    ],
)
def test_a_number_with_what_it_counts(number, words, text):
    assert counted(number, *words) == text


NOUNS = ("row", "image", "sample", "label issue", "annotation", "training sample", "training image", "file")
COUNT = re.compile(r"\{len\([^{}]*\)(:,)?\} (" + "|".join(plural(noun) for noun in NOUNS) + r")\b")


@pytest.mark.parametrize("folder", ["hnml_hf", "scripts"])
def test_messages_count_by_the_helper(folder):
    """What a message counts may be one: `{len(rows)} rows` would be "1 rows"."""
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not {"benchmarks", "maintenance"} & set(path.parts) and path.name != "walkthrough.py"
        for match in COUNT.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []
