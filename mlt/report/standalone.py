"""An HTML file that stands alone: the style is in it, and nothing is loaded from elsewhere."""

import html
import time
from importlib import resources

from mlt.report.text import moment


def standalone(title: str, body: str, command: str) -> str:
    """The whole file.

    Args:
      title: plain text, for the window.
      body: HTML.
      command: plain text, which command wrote it.
    """
    style = resources.files("mlt.report").joinpath("page.css").read_text()
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"<footer>Written {moment(time.time())} by <code>{html.escape(command)}</code></footer>\n</main>\n</body>\n</html>\n"
    )
