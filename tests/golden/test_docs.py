"""The docs name what there is: commands with their options, files, modules, pages and headings."""

import pathlib
import pkgutil
import re
import shlex
from collections.abc import Iterator

import click
import pytest

from mlt.cli import cli

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SPOKEN = ("gpu",)
"""Words behind the program's name where it is no command."""
names = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
_OPTION = re.compile(r"--[a-z][a-z-]*")
_EXAMPLE = re.compile(r"\b(x|test_x)\.py$")
"""Files that stand for one of the reader's own."""


def code(page: pathlib.Path) -> Iterator[str]:
    """What the page sets as code: the lines of its blocks, continued ones joined, and its spans."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for block in blocks:
        yield from block.splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose))


def commands(page: pathlib.Path, program: str) -> Iterator[list[str]]:
    """The words behind `program` of every command in the page's code; explanations stand behind three spaces or a #."""
    for line in code(page):
        for found in re.finditer(rf"(?:^|[\s$;&/]){program} ([^;|&#]*)", line):
            said = re.split(r"\s{{3,}}|\)$", found[1])[0]
            yield shlex.split(said) if said.count("'") % 2 == 0 and said.count('"') % 2 == 0 else said.split()


def unknown_options(words: list[str], known: set[str]) -> list[str]:
    return [option for word in words for option in _OPTION.findall(word)[:1] if word.startswith("--") and option not in known]


@names
def test_commands_and_options_of_mlt_exist(page):
    for words in commands(page, "mlt"):
        command, rest = cli.commands.get(words[0]) if words else None, words[1:]
        if command is None:
            assert words[0] in SPOKEN or words[0] in ("--help", "--version"), words
            continue
        if isinstance(command, click.Group) and rest:
            assert rest[0] in command.commands, words
            command = command.commands[rest[0]]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert not unknown_options(rest, known), words


@names
def test_tools_tests_and_their_options_exist(page):
    for words in commands(page, "python3?"):
        if words[:1] and words[0].startswith("tools/"):
            script = ROOT / words[0]
            assert script.is_file(), words
            known = set(_OPTION.findall(script.read_text(encoding="utf-8")))
            assert not unknown_options(words[1:], known), words
        if words[:2] == ["-m", "pytest"]:
            files = [word.partition("::")[0] for word in words[2:] if word.startswith("tests/")]
            assert all((ROOT / file).exists() for file in files), words


@names
def test_files_and_modules_exist(page):
    for text in code(page):
        for path in re.findall(r"(?:^|[\s(])((?:configs|docs|kernels|launch|mlt|tests|tools)/[\w./]*\w)", text):
            found = (ROOT / path).exists() or list((ROOT / path).parent.glob(f"{(ROOT / path).name}*"))
            assert found or _EXAMPLE.search(path) or "<" in text, path
        for name in re.findall(r"(?:^|[\s(])(mlt(?:_kernels)?(?:\.\w+)+)", text):
            pkgutil.resolve_name(name)


def headings(page: pathlib.Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@names
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_every_page_is_reached_from_the_readme():
    reached, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)\s#]+\.md)", page.read_text(encoding="utf-8"))
        left += {(page.parent / link).resolve() for link in links if "://" not in link} - reached
    assert set(PAGES) - reached == {ROOT / "CHANGELOG.md"}
