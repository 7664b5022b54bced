"""The two scripts as texts: an equal pair, in step with each other and the README."""

import ast
import re

import pytest
from conftest import ROOT

NAMES = ("torchrun_ddp.py", "ddp.py")
OWN = {"main", "parse_args", "Trainer", "Metrics"}  # not the same, but for the names


def source(name):
    return (ROOT / name).read_text()


def definitions(name):
    """Return {name: source text} of a script's top-level definitions, in order."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    nodes = [n for n in ast.parse(source(name)).body if isinstance(n, kinds)]
    return {n.name: ast.get_source_segment(source(name), n) for n in nodes}


def test_what_both_scripts_define_is_the_same():
    one, other = (definitions(name) for name in NAMES)
    shared = [name for name in one if name in other and name not in OWN]
    assert {"MyDataset", "MyModel", "compute_loss", "make_loader"} < set(shared)
    for name in shared:
        assert one[name] == other[name], f"{name} differs between the scripts"


def test_the_marks_are_the_same_in_both_scripts_and_the_readme():
    orders = {"torchrun_ddp.py": "123456789", "ddp.py": "126345789"}  # as they are read
    for name, order in orders.items():
        code = source(name).split('"""', 2)[2]
        marks = re.findall(r"DDP (\d)(?=[:.])", code)  # not "DDP 5, again"
        assert "".join(marks) == order
    numbers = re.findall(r"^\| (\d) [a-z]", source("README.md"), re.MULTILINE)
    assert "".join(numbers) == "123456789"


@pytest.mark.parametrize("name", NAMES)
def test_python_3_8_syntax_and_nothing_private(name):
    for node in ast.walk(ast.parse(source(name), feature_version=(3, 8))):
        if isinstance(node, ast.Attribute):
            public = node.attr in ("_replace", "_asdict")  # of a namedtuple
            assert public or not re.match(r"_[a-z]", node.attr), node.attr


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_is_in_the_readme(name):
    for flag in re.findall(r'"(--[a-z_]+)"', source(name)):
        assert f"`{flag}" in source("README.md"), f"{flag} is not in the README"
