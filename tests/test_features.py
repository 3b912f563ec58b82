"""The table of features: every test and command that it names is there, no yes is without one, and the pages are what the data says."""

import ast
import importlib.util
import re
import shlex

import pytest
from test_docs import COMMANDS, ROOT, known_options, options


spec = importlib.util.spec_from_file_location("features", ROOT / "docs" / "features.py")
features = importlib.util.module_from_spec(spec)
spec.loader.exec_module(features)
DATA = features.load()
ROWS = [row for group in DATA["groups"] for row in group["rows"]]
PROOFS = sorted({proof for row in ROWS for proof in row.get("proof", ())})
NOTED = sorted({command for row in ROWS for command in re.findall(r"`((?:cbd|python|make) [^`]*)`", row.get("note", ""))})


def never_runs(mark):
    """Whether a mark leaves a test out wherever `make test-all` runs."""
    call = mark if isinstance(mark, ast.Call) else None
    name = ast.unparse(call.func if call else mark).removeprefix("pytest.mark.")
    condition = call.args[0].value if name == "skipif" and call and call.args and isinstance(call.args[0], ast.Constant) else None
    return name in ("skip", "nightly", "xfail") or condition is True or condition in ("True", "1")


def asserts(function, helpers):
    """Whether a function, or one of its file that it names, holds something to be so."""
    for node in ast.walk(function):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if isinstance(node, ast.Assert) or name == "raises" or name.startswith("assert_"):
            return True
        if name in helpers and asserts(helpers[name], {other: helper for other, helper in helpers.items() if other != name}):
            return True
    return False


def checked(source, name):
    """What is wrong with a test of that name in a file's text; None where it is there and runs."""
    tree = ast.parse(source)
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    if len(found) != 1:
        return f"{len(found)} tests of that name"
    marks = [node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"]
    if any(never_runs(mark) for value in marks for mark in (value.elts if isinstance(value, (ast.List, ast.Tuple)) else [value])):
        return "its file never runs"
    if any(map(never_runs, found[0].decorator_list)):
        return "it never runs"
    if any(isinstance(node, ast.Expr) and ast.unparse(node).startswith(("pytest.skip(", "pytest.xfail(")) for node in found[0].body):
        return "it always skips itself"
    return None if asserts(found[0], {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}) else "it asserts nothing"


def wrong_command(text):
    """What is wrong with a command; None where it can be typed as it stands."""
    program, *words = shlex.split(text)
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return None if words and set(words) <= set(targets) else f"no target {words}"
    if program == "cbd":
        return None if words[:1] and words[0] in COMMANDS and options(words) <= known_options(words[0]) else "no such command or option"
    if program != "python" or not (ROOT / words[0]).is_file():
        return "neither cbd, make, nor a script of this repository"
    calls = [node for node in ast.walk(ast.parse((ROOT / words[0]).read_text())) if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"]
    told = {argument.value for call in calls for argument in call.args if isinstance(argument, ast.Constant)}
    return None if options(words) <= told else f"no option {options(words) - told}"


@pytest.mark.parametrize("proof", PROOFS)
def test_what_is_named_is_there_and_runs(proof):
    path, _, name = proof.partition("::")
    assert (checked((ROOT / path).read_text(), name) if name else wrong_command(proof)) is None, proof


@pytest.mark.parametrize("command", NOTED)
def test_commands_in_notes_can_be_typed(command):
    assert wrong_command(command) is None


def test_no_yes_is_without_proof():
    for row in ROWS:
        assert (row["ours"], bool(row.get("proof"))) in (("full", True), ("part", True), ("none", False)), row["feature"]
        assert ("lacks" in row) == (row["ours"] == "part"), row["feature"]
        assert row["ours"] != "full" or any("::" in proof for proof in row["proof"]), f"{row['feature']}: a command alone is no test"


def test_rows_are_what_the_script_reads():
    """A mistyped key or peer would be a blank."""
    for row in ROWS:
        assert set(row) <= {"feature", "short", "ours", "lacks", "proof", "note", "have", "partly", "lack", "unread"}, row["feature"]
        named = [peer for key in ("have", "partly", "lack", "unread") for peer in row.get(key, ())]
        assert len(named) == len(set(named)), row["feature"]
        assert set(named) <= {*DATA["peers"], "others"}, row["feature"]
    assert len({row["feature"] for row in ROWS}) == len(ROWS)


def test_the_pages_are_what_the_data_says():
    """`python docs/features.py` writes them."""
    assert features.PAGE.read_text() == features.page(DATA)
    readme = features.README.read_text()
    assert readme == features.filled(readme, features.short(DATA))
    assert "in part" in features.short(DATA)
    assert "| no |" in features.short(DATA)


@pytest.mark.parametrize(("source", "wrong"), [
    ("def test_a():\n    assert 1", None), ("def test_b():\n    assert 1", "0 tests"), ("@pytest.mark.skip\ndef test_a():\n    assert 1", "never runs"),
    ("@pytest.mark.skip(reason='x')\ndef test_a():\n    assert 1", "never runs"), ("@pytest.mark.skipif(True, reason='x')\ndef test_a():\n    assert 1", "never runs"),
    ("@pytest.mark.skipif('X' not in os.environ, reason='x')\ndef test_a():\n    assert 1", None), ("def test_a():\n    pytest.skip('x')\n    assert 1", "always skips"),
    ("pytestmark = [pytest.mark.nightly]\ndef test_a():\n    assert 1", "file never runs"), ("@pytest.mark.slow\ndef test_a():\n    assert 1", None), ("def test_a():\n    pass", "asserts nothing"),
    ("def helper():\n    assert 1\ndef test_a():\n    helper()", None),
])
def test_a_proof_that_is_none_is_caught(source, wrong):
    found = checked(source, "test_a")
    assert (found is None) if wrong is None else (wrong in found)


@pytest.mark.parametrize("text", ["cbd", "cbd nope", "cbd make --nope", "make nope", "python benchmarks/nope.py", "python benchmarks/memory.py --nope", "rm -rf x"])
def test_a_command_that_is_none_is_caught(text):
    assert wrong_command(text) is not None
