"""A release: what ``python -m build`` makes, installed where nothing else is, with the lowest and with the newest version of each dependency.

The slow tests build and install for real, in temporary folders, and need the package indexes that pip is set up for.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import tiny
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import cbd_hub
from cbd_hub.shapes import parameter_count


ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("peft", "space")  # what cbd_hub itself imports; the other extras are for examples and for this house
DATA = {
    "cbd_hub/py.typed", "cbd_hub/space/page.css",
    *(f"cbd_hub/model_cards/{name}.md.j2" for name in ("anchor", "chain", "citation", "cut", "interpolant", "retokenized", "teacher_cache")),
    *(f"cbd_hub/spaces/size_picker/{name}" for name in ("README.md", "app.py", "requirements.txt", "space.json")),
}
LITTER = (  # what lies about in a tree that is worked in, or lay there once
    "build/lib/cbd_hub/gone.py", "demo/chain/anchors/9M/model.safetensors", "cbd_hub/__pycache__/sizes.cpython-311.pyc", "spaces/size_picker/.cbd_hub/facts.json",
    "spaces/size_picker/model.safetensors", "tests/__pycache__/tiny.cpython-311.pyc", ".venv/pyvenv.cfg", "cbd_hub/model.gguf",
)
SMOKE = (  # every dependency at work, in minutes
    "test_manifest.py", "test_cards.py", "test_model.py", "test_remote.py::test_a_plan_prints_the_bytes_in_five_requests", "test_hub.py::test_a_chain_on_the_hub_is_a_chain",
    "test_cli.py::test_show_plan_make_generate_eval", "test_cli.py::test_errors_are_one_line_with_the_way_out", "test_cli.py::test_wrong_calls_exit_with_2", "test_cli.py::test_every_command_has_help_and_json",
    "test_recipe.py::test_files_of_every_kind_are_read", "test_recipe.py::test_a_recipe_survives_yaml", "test_align.py::test_a_permuted_copy_aligns_back",
    "test_distill.py::test_the_loss_is_the_dense_reference", "test_distill.py::test_stopped_and_resumed_equals_never_stopped",
    "test_distill.py::test_lora_students_learn_and_nothing_else_moves", "test_adapters.py::test_peft_loads_what_is_carried", "test_wrapping.py",
    "test_space.py::test_a_continuation_is_what_transformers_generates", "test_space.py::test_programs_ask_the_same", "test_space.py::test_an_agent_calls_the_tools",
    "test_space.py::test_a_space_is_deployed_and_its_app_serves_the_chain",
)
PLAIN = """
import sys
sys.modules["cbd_hub"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (auto.from_pretrained(sys.argv[1], local_files_only=True) for auto in (AutoModelForCausalLM, AutoTokenizer))
model.generate(**tokenizer("a small", return_tensors="pt"), max_new_tokens=2)
print(model.num_parameters())
"""
EVERY_MODULE = """
import importlib, pkgutil, cbd_hub
names = [found.name for found in pkgutil.walk_packages(cbd_hub.__path__, "cbd_hub.") if not found.name.startswith("cbd_hub.space.")]
print(len([importlib.import_module(name) for name in names]), cbd_hub.__file__)
"""


def requirements(*extras):
    """What the project and these extras of it need, as pyproject.toml has it."""
    return [Requirement(line) for line in [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]]


def lower_bound(need):
    (bound,) = [part.version for part in need.specifier if part.operator == ">="]
    return Version(bound)


def imported(path):
    """Top-level names that a file imports: with the module, and later."""
    tree = ast.parse(path.read_text())
    found = {True: set(), False: set()}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module" and isinstance(node.args[0], ast.Constant):
            names = [node.args[0].value]
        found[node in tree.body].update(name.split(".")[0] for name in names)
    return found[True], found[False]


def test_what_is_imported_is_declared():
    """With the bare project everything but the page imports; what is imported later may come with an extra."""
    where = packages_distributions()
    base, extra = ({canonicalize_name(need.name) for need in requirements(*extras)} for extras in ((), EXTRAS))
    for path in sorted((ROOT / "cbd_hub").rglob("*.py")):
        at_once, later = imported(path)
        for names, allowed in ((at_once, extra if path.parent.name == "space" else base), (later, extra)):
            for name in names - set(sys.stdlib_module_names) - {"cbd_hub", "deepspeed"}:  # deepspeed: only in a run that its own launcher started
                assert {canonicalize_name(dist) for dist in where.get(name, [])} & allowed, f"{path.name} imports {name}"


def test_each_dependency_has_one_lower_bound_and_no_upper_one():
    for need in requirements(*EXTRAS):
        assert [part.operator for part in need.specifier] == [">="], need


def test_the_version_stands_in_one_place():
    told = re.escape(PROJECT["version"])
    assert not [path.name for path in [*(ROOT / "cbd_hub").rglob("*.py"), ROOT / "CITATION.cff"] if re.search(rf"\b{told}\b", path.read_text())]
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == PROJECT["version"]
    assert cbd_hub.__version__ == PROJECT["version"]


def said(*command, cwd, **environment):
    """What a command prints; it sees nothing of this process's cbd_hub."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd, env={**clean, **environment}, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def tree():
    """A copy of the tree with litter in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        for name in LITTER:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_text("litter")
        yield copy


@pytest.fixture(scope="module")
def archives(tree):
    """The sdist of the tree and the wheel that is built from it."""
    pytest.importorskip("build", reason="the release's tests need build: pip install 'cbd-hub[release]'")
    said(sys.executable, "-m", "build", "--outdir", "dist", tree, cwd=tree.parent)
    (sdist,), (wheel,) = (list((tree.parent / "dist").glob(f"*{ending}")) for ending in (".tar.gz", ".whl"))
    return sdist, wheel


def contents(wheel):
    """Each file of a wheel with its checksum, but for the record of these."""
    with zipfile.ZipFile(wheel) as packed:
        return {info.filename: info.CRC for info in packed.infolist() if not info.filename.endswith("/RECORD")}


@pytest.mark.parametrize("name", SMOKE)
def test_what_is_run_with_other_versions_is_there(name):
    """Of `make test-all` alone, so that a test of another name would be noticed late."""
    path, _, test = name.partition("::")
    assert not test or f"\ndef {test}(" in (ROOT / "tests" / path).read_text()


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(archives):
    names = set(contents(archives[1]))
    info = f"cbd_hub-{PROJECT['version']}.dist-info"
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cbd_hub").rglob("*.py")} | {"cbd_hub/model_cards/__init__.py", "cbd_hub/spaces/__init__.py"}
    assert names == code | DATA | {f"{info}/{name}" for name in ("METADATA", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")}


@pytest.mark.slow
def test_the_sdist_holds_the_tree_and_gives_the_same_wheel(archives, tree):
    with tarfile.open(archives[0]) as packed:
        names = {member.name.split("/", 1)[1] for member in packed if member.isfile()}
    made = {name for name in names if name.startswith("cbd_hub.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    here = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()} - set(LITTER)
    left = {name for name in here - names if not name.startswith("cbd_hub.egg-info/")}
    assert names - made <= here
    assert left <= {".gitignore", ".ci/run"}, "all that `make test` needs is there"
    clean = tree.parent / "clean"
    shutil.copytree(tree, clean, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    said(sys.executable, "-m", "build", "--wheel", "--outdir", tree.parent / "direct", clean, cwd=tree.parent)
    (direct,) = (tree.parent / "direct").glob("*.whl")
    assert contents(direct) == contents(archives[1])


@cache
def torch_pin():
    """What pip is to install as the lowest torch without CUDA, which PyPI has for macOS and Windows alone; None where it is not to be had."""
    version = lower_bound(next(need for need in requirements() if need.name == "torch"))
    if sys.platform != "linux":
        return f"torch=={version}"
    with tempfile.TemporaryDirectory() as folder:
        local = f"torch=={version}+cpu"
        found = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, local], capture_output=True, check=False)
        return local if found.returncode == 0 else None


class Environment:
    """A virtual environment with nothing in it but what it is told to install."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.bin = self.folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
        said(sys.executable, "-m", "venv", "--upgrade-deps", self.folder / "venv", cwd=self.folder)

    def install(self, *wanted):
        self.run("python", "-m", "pip", "install", "--quiet", *wanted)

    def run(self, program, *arguments, **environment):
        return said(self.bin / program, *arguments, cwd=self.folder, HF_HOME=str(self.folder / "home"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", **environment)

    def versions(self):
        return {canonicalize_name(row["name"]): Version(row["version"]) for row in json.loads(self.run("python", "-m", "pip", "list", "--format", "json"))}


def our_torch():
    """The version of torch that runs these tests; an open range would bring several GB of CUDA on Linux."""
    return f"torch=={Version(torch.__version__).public}"


def journey(environment, folder, archive):
    """Ask for help, assemble a chain with its card, plan, make, and load what was made without cbd_hub."""
    models, chain = [tiny.save(tiny.llama(layers=layers, seed=layers), folder / f"m{layers}") for layers in (4, 2)], folder / "chain"
    environment.run("cbd", "assemble", *models, "--out", chain)
    assert "library_name: cbd-hub" in (chain / "README.md").read_text()
    size = parameter_count(tiny.llama(layers=3).config)
    assert environment.run("cbd", "--version").split()[-1] == PROJECT["version"], archive
    assert "distill" in environment.run("cbd", "--help")
    assert json.loads(environment.run("cbd", "plan", chain, "--size", size, "--json"))["parameters"] == size
    environment.run("cbd", "make", chain, "--size", size, "--out", folder / "model")
    assert int(environment.run("python", "-c", PLAIN, folder / "model")) == size


@pytest.mark.slow
def test_both_install_and_run_where_nothing_else_is(archives, tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        environment = Environment(folder)
        for archive in reversed(archives):
            environment.install(our_torch(), archive)
            count, where = environment.run("python", "-c", EVERY_MODULE).split()
            assert int(count) > 80
            assert Path(where).is_relative_to(environment.folder)
            journey(environment, tmp_path / archive.suffix, archive.name)
            environment.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", "cbd-hub")
        assert "gradio" not in environment.versions()


def pins():
    """Every direct dependency at its lower bound; torch as it runs here where its own cannot be had without CUDA."""
    for need in requirements(*EXTRAS):
        extras = f"[{','.join(sorted(need.extras))}]" if need.extras else ""
        pinned = f"{need.name}{extras}=={lower_bound(need)}"
        yield (torch_pin() or our_torch()) if need.name == "torch" else pinned


@pytest.mark.slow
@pytest.mark.parametrize("which", ["lowest", "newest"])
def test_the_suites_core_passes_with_versions(which, archives, tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        environment = Environment(folder)
        chosen = list(pins()) if which == "lowest" else ["--upgrade", "--upgrade-strategy", "eager", our_torch()]
        environment.install(*chosen, f"{archives[1]}[{','.join(EXTRAS)}]", "pytest", "hypothesis")
        environment.run("python", "-m", "pip", "check")
        found = environment.versions()
        if which == "lowest":
            higher = {need.name for need in requirements(*EXTRAS) if Version(found[canonicalize_name(need.name)].public) != lower_bound(need)}
            assert higher == (set() if torch_pin() else {"torch"})
        journey(environment, tmp_path, which)
        printed = environment.run("pytest", "-p", "no:cacheprovider", "-rs", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, *(ROOT / "tests" / name for name in SMOKE))
        assert re.search(r"^\d{2,} passed", printed, re.MULTILINE), printed[-3000:]
        assert not [line for line in printed.splitlines() if line.startswith("SKIPPED") and "torchao" not in line], "an extra that is not installed here, by intent"


@pytest.mark.slow
def test_the_lowest_torch_is_among_the_lowest():
    """Without it the lowest versions are tested with the torch that runs these tests."""
    if torch_pin() is None:
        pytest.skip("pip's indexes here have the lowest torch for this platform only with several GB of CUDA")
