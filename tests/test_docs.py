"""What the documents tell people to type exists: commands, options, names, recipes."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

import cbd_hub
from cbd_hub.cli import app
from cbd_hub.distill.schema import Recipe


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = typer.main.get_command(app).commands


def blocks(language):
    """The fenced blocks of all pages, with the page's name."""
    return [
        pytest.param(text, id=f"{page.stem}: {text.strip().splitlines()[0][:40]}")
        for page in PAGES for text in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    ]


def commands(text):
    """The lines of a shell block that call cbd, as words."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["cbd"]:
            yield words[1:]


def options(words):
    """The options among words."""
    return {word.split("=")[0] for word in words if word.startswith("--")}


def known_options(name):
    """The options of a cbd command."""
    return {option for parameter in COMMANDS[name].params for option in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("text", blocks("bash"))
def test_commands_and_their_options_exist(text):
    for name, *rest in commands(text):
        assert options(rest) <= known_options(name), name


def test_every_command_is_told_of():
    told = {words[0] for page in PAGES for text in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL) for words in commands(text)}
    assert told == set(COMMANDS)


@pytest.mark.parametrize("text", blocks("python"))
def test_python_parses_and_its_names_exist(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == "cbd_hub":
            assert {alias.name for alias in node.names} <= {*dir(cbd_hub), "auto"}


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipes_are_recipes(text):
    """Whole ones are read as they stand; a part of one has a whole one's keys."""
    values = yaml.safe_load(text.replace(", ...}", "}"))
    assert set(values) <= set(Recipe.model_fields)
    if "teacher" in values and "data" in values:
        Recipe.model_validate(values)
