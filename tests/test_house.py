"""Rules of the house that a machine can check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "zoo_compress"
FLOORS = {"errors": 0, "figures": 1, "structure": 1, "zoo": 1, "surgery": 2, "profiling": 3, "training": 4, "methods": 5, "plugin": 6}
TOP = 7
FILES = sorted(PACKAGE.rglob("*.py"))


def floor(module):
    return FLOORS.get(module, TOP)


def imported(path):
    """Names of the package's own folders and files that a file imports, anywhere in it."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level]
            target = (*base, *(node.module.split(".") if node.module else ()))
            yield from [target[0]] if target else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "zoo_compress":
            yield [*node.module.split("."), node.names[0].name][1]
        elif isinstance(node, ast.Import):
            yield from ("__init__" for alias in node.names if alias.name.split(".")[0] == "zoo_compress")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        return
    for target in imported(path):
        assert target == own or floor(target) < floor(own) or (floor(own) == floor(target) == TOP), f"{own} imports {target}"


@pytest.mark.parametrize("path", [p for p in FILES if "methods" in p.parts], ids=lambda p: p.name)
def test_methods_do_not_import_each_other(path):
    shared = {"criteria", "damage", "exiting", "saliency", "selection", "slimmable"}
    if path.name == "__init__.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            assert node.module in shared


def test_what_is_no_python_is_in_the_wheel():
    """Checkpoints, records, the index and templates: all that the package reads beside its own modules."""
    section = (ROOT / "pyproject.toml").read_text().partition("[tool.setuptools.package-data]")[2].partition("\n[")[0]
    patterns = {package: ast.literal_eval(globs) for package, globs in re.findall(r'^"([\w.]+)" = (\[.*\])$', section, re.M)}
    packed = {file for package, globs in patterns.items() for glob in globs for file in ROOT.joinpath(*package.split(".")).glob(glob)}
    there = {file for file in PACKAGE.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert there
    assert there == {file for file in packed if file.is_file()}


def test_structure_is_pure_data():
    for path in FILES:
        if "structure" in path.parts:
            for node in ast.walk(ast.parse(path.read_text())):
                names = (
                    [a.name for a in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
                assert not any(name.split(".")[0] in ("torch", "timm") for name in names), path


def test_the_engine_knows_no_model():
    """structure/ and surgery/ name no architecture and no module of timm's, and use of timm only what holds for all its models."""
    names = {*timm.list_models(exclude_filters="*__*"), *(module for module in timm.list_modules() if hasattr(timm.models, module))}
    general = {"FeatureInfo", "get_model_args", "get_model_input_config", "is_model"}
    general |= {"FrozenBatchNorm2d", "FrozenBatchNormAct2d", "freeze_batch_norm_2d"}  # what timm makes of BatchNorms
    for path in FILES:
        if {"structure", "surgery"} & set(path.parts):
            tree = ast.parse(path.read_text())
            strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
            assert not strings & names, path
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("timm"):
                    assert {alias.name for alias in node.names} <= general, path


def test_nothing_is_unpickled():
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"\bimport pickle\b|\btorch\.load\(|\btorch\.save\(|weights_only", text), path


def test_heavy_packages_are_imported_where_used():
    code = "import sys, zoo_compress; print([m for m in ('torch_pruning', 'matplotlib', 'sklearn', 'hypothesis') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_readme_python_runs(tmp_path, monkeypatch, hub):
    """Every Python example of the README, in order, in one namespace, with a Hub that is empty."""
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks((ROOT / "README.md").read_text())
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_readme_commands_exist():
    """Every zoo-compress command line of the README names a command and options that exist."""
    from click.testing import CliRunner

    from zoo_compress.cli import cli

    text = (ROOT / "README.md").read_text()
    lines = [
        line.split("#")[0].strip() for block in re.findall(r"```(?:shell|sh|bash)\n(.*?)```", text, re.S) for line in block.splitlines()
    ]
    commands = [line.split("zoo-compress ", 1)[1].split() for line in lines if "zoo-compress " in line]
    assert commands
    for name, *rest in commands:
        help_text = CliRunner().invoke(cli, [name, "--help"])
        assert help_text.exit_code == 0, name
        for option in (part for part in rest if part.startswith("-")):
            assert option in help_text.output, (name, option)
