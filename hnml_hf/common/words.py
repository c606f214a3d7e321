"""Numbers in sentences."""

SINGULAR = {"are": "is", "were": "was", "have": "has", "give": "gives", "share": "shares", "come": "comes"}


def counted(number: int, noun: str, verb: str = "") -> str:
    """A number with what it counts: "1 image", "2,000 images", "0 classes", "1 row was".

    Args:
        number (`int`): at least 0.
        noun (`str`): in the singular; one whose plural is made by a rule.
        verb (`str`): in the plural, as in `SINGULAR`.
    """
    noun = noun if number == 1 else plural(noun)
    verb = SINGULAR[verb] if verb and number == 1 else verb
    return f"{number:,} {noun} {verb}".rstrip()


def plural(noun: str) -> str:
    """The plural of a noun by the rules of spelling: images, classes, copies."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"
