"""The house stands as CONTRIBUTING.md draws it: a module imports only what stands above it, or its own folder."""

import ast
import re
from pathlib import Path


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cbd_hub"
TREE = (ROOT / "CONTRIBUTING.md").read_text().split("\ncbd_hub/\n")[1].split("\n```")[0]
# A module may import from the floors before its own; entries are modules or folders.
FLOORS = re.findall(r"^  (\w+)(?:\.py|/)", TREE, re.MULTILINE)
EXEMPT = {"__init__", "auto"}


def imports(path):
    """Names under cbd_hub that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"cbd_hub.{alias.name}" for alias in node.names] if node.module == "cbd_hub" else [node.module]
        yield from (name.split(".")[1] for name in names if name.startswith("cbd_hub."))


def floor_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def violations(files):
    found = []
    for path in files:
        here = floor_of(path)
        if here in EXEMPT:
            continue
        for name in imports(path):
            if name in ("model_cards", "spaces"):
                continue
            if name != here and FLOORS.index(name) > FLOORS.index(here):
                found.append(f"{path.name} imports {name}")
    return found


def test_no_import_goes_down():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 25
    assert not violations(files)


def test_the_tree_is_the_real_one():
    """Every module of the package is named in it but the tables of families, and nothing else is."""
    named = set(re.findall(r"(\w+)\.py\b", TREE))
    modules = {path.stem for path in PACKAGE.rglob("*.py") if path.parent.name != "families"} - {"__init__"}
    assert named == modules
    top = {floor_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert sorted(FLOORS) == sorted(top)


def test_a_planted_import_is_caught(tmp_path, monkeypatch):
    """The walk itself works: a lower floor imported from above is found."""
    monkeypatch.setattr("test_floors.PACKAGE", tmp_path)
    planted = tmp_path / "sizes.py"
    planted.write_text("def f():\n    from cbd_hub.model import CBDModel\n")
    assert violations([planted]) == ["sizes.py imports model"]


def test_files_can_be_read_in_one_sitting():
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert max(lengths.values()) < 450, lengths
