"""The design's rules as code: who may import whom, in which order, how long things may be, what may not be there."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROOF = ROOT / "fusion" / "run" / "cpp" / "proof.py"  # holds kernels against the reference, runs nothing by it
PACKAGES = ("moe_pipeline", "fusion", "omoe", "bliss")
HOUSE = ("configs", "scripts", "tests")
PACKAGE_FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FILES = PACKAGE_FILES + sorted(path for folder in ("configs", "scripts") for path in (ROOT / folder).rglob("*.py"))
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 50
MAX_PUBLIC_NAMES = 10
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
TOP_LEVEL = {
    *PACKAGES, "configs", "scripts", "tests", "pyproject.toml", "README.md", "LICENSE", "CITATION.cff",
    "CONTRIBUTING.md", "Makefile", "constraints.txt",
}  # fmt: skip


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all imports of a file, the names imported from a module included."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def listed_modules(package: Path) -> list[str]:
    """Modules and folders in the order of the package's docstring."""
    docstring = ast.get_docstring(parse(package / "__init__.py")) or ""
    return re.findall(r"^\s*(\w+)(?:\.py|/)\s{2,}\S", docstring, re.MULTILINE)


def public_functions(path: Path) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in parse(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (
                    inner
                    for inner in node.body
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_")
                )


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=name)
def test_a_package_imports_torch_and_itself_alone(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    allowed = {own, "torch", "triton", *sys.stdlib_module_names}
    foreign = {module for module in imported(path) if module.split(".")[0] not in allowed}
    assert not foreign, f"{name(path)} imports {sorted(foreign)}"
    if path.parent.name == "plan":
        assert not any(module.split(".")[0] == "torch" for module in imported(path)), f"{name(path)} imports torch"


@pytest.mark.parametrize("path", [path for path in FILES if "testbed" in path.parts], ids=name)
def test_only_the_verbs_and_their_schema_know_the_config_framework(path: Path) -> None:
    if path.name != "launch.py":
        assert not any(module.split(".")[0] in ("hydra", "omegaconf") for module in imported(path)), name(path)


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_import_only_what_the_docstring_lists_before_them(package: str) -> None:
    folder = ROOT / package
    order = listed_modules(folder)
    present = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    present |= {path.name for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(order) == present, f"{package}/__init__.py lists {order}, the folder holds {sorted(present)}"
    for position, module in enumerate(order):
        files = sorted((folder / module).rglob("*.py")) if (folder / module).is_dir() else [folder / f"{module}.py"]
        for path in files:
            for target in imported(path):
                parts = target.split(".")
                if parts[0] == package and len(parts) > 1 and parts[1] in order and path != PROOF:
                    assert order.index(parts[1]) <= position, f"{name(path)} imports {target}, which comes later"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_is_not_used_by_fast_code(package: str) -> None:
    assert (ROOT / package / "reference.py").is_file()
    for path in set((ROOT / package).rglob("*.py")) - {PROOF}:
        assert not any(f"{package}.reference" in target for target in imported(path)), name(path)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_entry_has_few_names_and_a_docstring(package: str) -> None:
    tree = parse(ROOT / package / "__init__.py")
    assert ast.get_docstring(tree)
    exported = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )
    assert len(exported) <= MAX_PUBLIC_NAMES, f"{package} exports {len(exported)} names"
    assert exported == sorted(exported, key=lambda word: (word.upper() != word, word[0].islower(), word)), exported


@pytest.mark.parametrize("path", FILES, ids=name)
def test_modules_and_functions_stay_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_MODULE_LINES, f"{name(path)} has {lines} lines"
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = node.end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
            assert length <= MAX_FUNCTION_LINES, f"{name(path)}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_are_named_for_a_concept(path: Path) -> None:
    assert path.stem not in BANNED_NAMES
    assert path.parent.name not in BANNED_NAMES


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=name)
def test_packages_keep_no_hidden_state(path: Path) -> None:
    tree = parse(path)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"{name(path)}: global"
        called = getattr(getattr(node, "func", None), "id", "")
        assert called not in ("print", "eval", "exec"), f"{name(path)}, line {getattr(node, 'lineno', 0)}: {called}"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{name(path)}: bare except"
    for node in tree.body:
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and getattr(node.targets[0] if isinstance(node, ast.Assign) else
                                                                    node.target, "id", "") != "__all__":  # fmt: skip
            mutable = isinstance(value, ast.List | ast.Set | ast.ListComp | ast.SetComp)
            assert not mutable, f"{name(path)}, line {node.lineno}: mutable module state"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_is_unpickled(path: Path) -> None:
    assert not {"pickle", "cloudpickle", "dill", "joblib"} & {module.split(".")[0] for module in imported(path)}
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(keyword.arg == "weights_only" for keyword in node.keywords), f"{name(path)}: torch.load"


@pytest.mark.parametrize("path", [path for path in PACKAGE_FILES if path.name != "__init__.py"], ids=name)
def test_every_public_name_says_what_it_is_and_where_it_comes_from(path: Path) -> None:
    for node in public_functions(path):
        signature_alone = ast.unparse(node.body[-1]) == "..."  # of a Protocol, whose own docstring speaks for it
        exempt = signature_alone or node.name == "extra_repr"
        assert ast.get_docstring(node) or exempt, f"{name(path)}: {node.name} has no docstring"
    tree = parse(path)
    texts = [ast.get_docstring(node) or "" for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
             and not node.name.startswith("_")]  # fmt: skip
    for text in texts:
        sourced = any(words in text for words in ("Source:", "not in the paper", "our definition"))
        assert sourced or "Source:" in (ast.get_docstring(tree) or ""), f"{name(path)}: no source in {text!r}"


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py"], ids=name)
def test_tests_mirror_packages(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] in PACKAGES and path.stem != "reference":
        mirror = ROOT / "tests" / path.relative_to(ROOT).with_name(f"test_{path.name}")
        assert mirror.is_file(), f"{name(path)} has no {name(mirror)}"


def test_tolerances_come_from_one_place() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        if path.name not in ("closeness.py", "test_architecture.py"):
            found = re.search(r"\b(atol|rtol|abs_tol|rel_tol)\b|pytest\.approx", path.read_text(encoding="utf-8"))
            assert not found, f"{name(path)} names a tolerance: {found and found.group()}"


def test_the_top_level_is_fixed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    top = {line.split("/")[0] for line in listed if line and not line.startswith(".")}
    assert top <= TOP_LEVEL, f"unexpected at the top level: {sorted(top - TOP_LEVEL)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_needs_torch_alone_and_does_nothing(package: str) -> None:
    """In a fresh process where every other third-party import fails, nothing is read, printed or switched."""
    script = f"""
import sys, importlib.abc, logging, os, time
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        root = fullname.split(".")[0]
        if root in {{"transformers", "datasets", "deepspeed", "hydra", "omegaconf", "accelerate", "sacrebleu",
                     "sklearn", "matplotlib", "rich", "tokenizers", "safetensors", "triton", "configs", "scripts"}}:
            raise ImportError(fullname)
import torch
sys.meta_path.insert(0, Refuse())
before = (dict(os.environ), logging.getLogger().handlers[:], torch.get_num_threads(), torch.get_default_dtype(),
          torch.initial_seed())
import {package}
after = (dict(os.environ), logging.getLogger().handlers[:], torch.get_num_threads(), torch.get_default_dtype(),
         torch.initial_seed())
assert before == after
others = set({PACKAGES!r}) - {{"{package}"}}
assert not others & set(sys.modules), others & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
