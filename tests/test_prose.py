"""Plain English in everything that people read: phrases that sound translated have a better one."""

import re

import pytest
from commands import ROOT


AMERICAN = {  # spelling
    r"colour": "color",
    r"behaviour": "behavior",
    r"favour": "favor",
    r"neighbour": "neighbor",
    r"licence": "license",
    r"centre": "center",
    r"grey": "gray",
    r"artefact": "artifact",
    r"(?:un|mis|re)?labelled\b": "labeled",
    r"labelling": "labeling",
    r"(?:general|initial|local|maxim|memor|minim|normal|organ|penal|real|recogn|regular|standard|summar|synchron|util|"
    r"visual)is(?:e|ed|es|er|ing|ation)\b": "-ize",
}
INSTEAD = {
    r"in the place of": "instead of",
    r"but for\b": "except for",
    r"shall be": "will be",
    r"of one mind": "agree",
    r"(?:known|knows them|know it) by heart": "memorized",
    r"tells? nothing of": "says nothing about",
    r"cannot be had": "is not available",
    r"(?:is|are) not to be had": "is not available",
    r"be they": "whether they are",
    r"along a cosine": "with cosine decay",
    r"at a (?:large )?constant rate": "with a constant learning rate",
    r"labels you cannot trust": "noisy labels",
    r"take(?:s)? the place of": "replace",
    r"has a use for": "uses",
    r"the whole way": "from start to end",
    r"nothing of the kind": "no such",
    **AMERICAN,
}
PHRASES = re.compile("|".join(rf"\b(?:{phrase})" for phrase in INSTEAD), re.IGNORECASE)
TEXTS = sorted(
    path
    for place in ("README.md", "CONTRIBUTING.md", "docs", "hnml_hf", "scripts", "model_cards")
    for path in ([ROOT / place] if (ROOT / place).is_file() else (ROOT / place).rglob("*"))
    if path.suffix in {".md", ".py", ".yaml", ".jinja", ".js"}
)


def found(text: str) -> list[str]:
    """What to write, and where, for each phrase of a text."""
    lines = []
    for hit in PHRASES.finditer(text):
        better = next(better for phrase, better in INSTEAD.items() if re.match(phrase, hit[0], re.IGNORECASE))
        lines.append(f"line {text.count(chr(10), 0, hit.start()) + 1}: `{hit[0]}`: {better}")
    return lines


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_text_has_none_of_the_phrases(path):
    assert found(path.read_text(encoding="utf-8")) == []


def test_a_phrase_is_found_with_its_line():
    assert found("It is well.\nIt stands in the place of it.") == ["line 2: `in the place of`: instead of"]
    assert found("Nothing but forward passes.") == []


def test_spelling_is_american():
    assert found("normalised") == ["line 1: `normalised`: -ize"] and found("Colours") == ["line 1: `Colour`: color"]
    assert found("optimistic, `double_labelled`, premise, realistic") == []
