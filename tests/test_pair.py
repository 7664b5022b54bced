"""The two scripts as texts: an equal pair, in step with each other and the README."""

import ast
import json
import re

import pytest
from conftest import ROOT, TORCHRUN

SCRIPTS = ("torchrun_ddp.py", "ddp.py")
SHARED = [
    "MyDataset",
    "MyModel",
    "collate",
    "make_loader",
    "make_optimizer",
    "clock",
    "train_loop",
    "choose_backend",
    "own_device",
    "leave_group",
    "is_orphan",
    "end_with_parent",
    "fail",
    "number",
    "make_parser",
    "parse",
]


def source(name):
    return (ROOT / name).read_text()


def definitions(name):
    """Return {name: source text} of a script's top-level definitions, in order."""
    text = source(name)
    lines = text.splitlines()
    nodes = [
        n
        for n in ast.parse(text).body
        if isinstance(n, (ast.FunctionDef, ast.ClassDef))
    ]
    return {n.name: "\n".join(lines[n.lineno - 1 : n.end_lineno]) for n in nodes}


def test_shared_definitions_are_the_same_and_in_the_same_order():
    one, other = (definitions(name) for name in SCRIPTS)
    for name in SHARED:
        assert one[name] == other[name], f"{name} differs between the scripts"
    assert [name for name in one if name in SHARED] == SHARED
    assert [name for name in other if name in SHARED] == SHARED


def test_the_same_numbered_steps_in_both_scripts_and_the_readme():
    numbers = [str(n) for n in range(1, 10)]
    for name in SCRIPTS:
        assert (
            sorted(
                set(
                    re.findall(
                        r"DDP (\d+)", source(name)[source(name).index("import") :]
                    )
                )
            )
            == numbers
        )
    assert re.findall(r"^\| (\d) \|", source("README.md"), re.MULTILINE) == numbers


@pytest.mark.parametrize("name", SCRIPTS)
def test_python_3_7_syntax_public_pytorch_and_flags_in_the_readme(name):
    ast.parse(source(name), feature_version=(3, 7))
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Attribute):
            private = node.attr.startswith("_") and not node.attr.endswith("__")
            assert not private or node.attr == "_exit", node.attr
    for flag in re.findall(r'"(--[a-z_]+)"', source(name)):
        assert f"`{flag}" in source("README.md"), f"{flag} is not in the README"


def test_the_benchmark_still_fits_the_loop_it_takes_apart(finish, folder):
    contenders = ["ours", "stripped", "limit", "tutorial", "with_item", "saving"]
    job = {"dataset_length": 256, "input_size": 10, "batch_size": 16, "repeats": 2}
    job.update(contenders=contenders, folder=str(folder))
    script = str(ROOT / "tests" / "benchmark.py")
    launch = ["--standalone", "--nproc_per_node=2", script, "--race", json.dumps(job)]
    finish(TORCHRUN + launch)
    seconds = json.loads((folder / "seconds.json").read_text())
    assert {name: len(seconds[name]) for name in seconds} == dict.fromkeys(
        contenders, 2
    )
