"""Makes README the page of a release on PyPI; all else about the package is in setup.cfg.

PyPI shows README alone, so that a link from file to file leads nowhere. Where the repository's
address is told, as the workflow of a release does, links and pictures are those of the version's
tag there. Otherwise a link is its text, and pictures are left out.
"""

import os
import pathlib
import re

from setuptools import setup

HERE = pathlib.Path(__file__).parent
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
# To a file: neither to an address nor to a heading of the page.
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\[\]]*)\]\((?P<path>[^()\s:#][^()\s:]*)\)")


def page(readme, repository=None, tag=None):
    """README with links that are right on any other page.

    Args:
        readme: The text of README.
        repository: Address of the repository, on GitHub; `None` where nobody knows it.
        tag: The tag of the version.
    """

    def turned(link):
        picture, text, path = link.group("picture", "text", "path")
        if not repository:
            return "" if picture else text
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/{tag}/{path})"

    # Links are not looked for in code.
    parts = CODE.split(readme)
    return "".join(part if part.startswith("`") else LINK.sub(turned, part) for part in parts)


if __name__ == "__main__":
    repository = os.environ.get("KERAS_MOE_REPOSITORY")
    package = (HERE / "keras_moe" / "__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.*)"$', package, re.MULTILINE)
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=page(readme, repository, f"v{version}"),
        project_urls={"Repository": repository} if repository else {},
    )
