"""A hook of MkDocs: pages of the repository outside docs/ join the site, with links that work.

In the repository a link leads from file to file, as its readers there need it. On the site the
files of docs/ stand at the root. So a link is read as the repository's, and written as the site's.
"""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

REPOSITORY = pathlib.Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks/index.md",
    "saved_models/README.md": "saved_models/index.md",
}
ORIGINS = {page: path for path, page in PAGES.items()}
LINK = re.compile(r"\[((?:[^\[\]]|!?\[[^\[\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files, config):
    """Adds the pages."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(REPOSITORY / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns the links of one page."""
    here = page.file.src_uri
    origin = ORIGINS.get(here, f"docs/{here}")

    def turned(match):
        text, target = match.groups()
        target, hash_sign, anchor = target.partition("#")
        if not target or ":" in target:
            return match.group()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        page_there = PAGES.get(path, path.removeprefix("docs/"))
        if page_there == path and (REPOSITORY / path).exists():
            return text  # A file that the site doesn't show.
        there = posixpath.relpath(page_there, posixpath.dirname(here) or ".")
        return f"[{text}]({there}{hash_sign}{anchor})"

    # Links are not looked for in code.
    parts = re.split(r"(^```.*?^```|`[^`\n]+`)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("`") else LINK.sub(turned, part) for part in parts)
