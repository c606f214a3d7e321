"""For mkdocs: links that lead out of `docs/`, and how docstrings name types and other objects."""

import re


OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)\s]+)\)")
NAMED = re.compile(r"\[<code>~?([\w.]+)</code>\]")  # [`~package.module.name`]
MARKED = re.compile(r"<code>([^<]*[`*][^<]*)</code>")  # a type as it is written: `str`, *optional*


def on_page_markdown(markdown: str, **_) -> str:
    """Links to code become the path of the file in the source tree."""

    def as_path(link: re.Match) -> str:
        text, path = link[1], link[2]
        return text if path in text or path.rpartition("/")[2] in text else f"{text} (`{path}`)"

    return OUTSIDE.sub(as_path, markdown)


def on_page_content(html: str, page, **_) -> str:
    """In the API reference, names without brackets and types without marks."""
    if page.file.src_uri != "api.md":
        return html
    html = NAMED.sub(lambda found: f"<code>{found[1].rpartition('.')[2]}</code>", html)
    return MARKED.sub(lambda found: f"<code>{re.sub('[`*]', '', found[1])}</code>", html)
