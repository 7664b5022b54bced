"""tests/examples: in both scripts, they run, learn, resume, and print nothing else."""

import re
import shutil

import pytest
from conftest import ROOT, SCRIPTS, epoch_lines, side_by_side, validation_lines

WORKERS = {"tables": "--num_workers 2"}
SHORT = "--epochs 2 --batch_size 16 --dataset_length"


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# Of each: its name, its package, the length of its dataset, and whether the samples of
# a batch affect each other (BatchNorm, a loss that compares them).
each = pytest.mark.parametrize(
    "name, package, length, mixes",
    [
        ("digits", "sklearn", 1, True),  # it has its own length
        ("contrastive", "torch", 600, True),
        ("tables", "h5py", 600, False),
        slow("images", "torchvision", 300, True),
        slow("texts", "transformers", 2000, False),
        slow("language_model", "transformers", 600, False),
        slow("graphs", "torch_geometric", 600, True),
        slow("lora", "peft", 600, False),
    ],
)
PATHS = sorted((ROOT / "tests" / "examples").glob("*.py"))


@pytest.fixture
def train(folder, finish):
    """Run an example to its end, without a network; it may say nothing on stderr."""
    shutil.copytree(str(PATHS[0].parent), str(folder / "examples"))

    def train(script, name, flags, code=0, **env):
        env = {"TMPDIR": str(folder), "HF_HUB_OFFLINE": "1", **env}
        flags = f"--definitions examples/{name}.py {flags}"
        run = finish(SCRIPTS[script], flags, code, env)
        assert "WARNING" not in run.stdout
        assert code or not run.stderr, run.stderr
        return run

    return train


@each
def test_it_learns_and_resumes(train, folder, name, package, length, mixes):
    pytest.importorskip(package)
    flags = f"{SHORT} {length} --snapshot_path snapshot.pt {WORKERS.get(name, '')}"
    output = train("torchrun", name, flags).stdout
    (first, _), (last, _) = epoch_lines(output)
    assert last < first
    assert len(validation_lines(output)) == 2
    scheduled = name == "images"  # its schedule is made for a number of epochs
    again = train("torchrun", name, f"{flags} --epochs 3", code=1 if scheduled else 0)
    assert not scheduled or "it was made with --epochs 2" in again.stderr
    assert scheduled or "resuming" in again.stdout
    assert len(epoch_lines(again.stdout)) == (0 if scheduled else 1)
    assert_one_table(name, folder)


@each
def test_ddp_is_right(train, folder, name, package, length, mixes):
    pytest.importorskip(package)
    output = train("ddp", name, f"{SHORT} {length} {WORKERS.get(name, '')}").stdout
    text = " ".join(output.split())  # it is wrapped
    assert "DDP is right" in text
    assert float(re.search(r"\((\S+) off\)", text)[1]) < 1e-5
    assert ("affect each other" in text) == mixes
    assert len(side_by_side(output)) == 2
    assert_one_table(name, folder)


def assert_one_table(name, folder):
    """Check that one process made the table, which each worker opens."""
    assert len(list(folder.glob("table-*"))) == (name == "tables")


@pytest.mark.slow
def test_images_in_folders(train, folder):
    pytest.importorskip("torchvision")
    from PIL import Image

    for part, count in ("train", 64), ("val", 10):
        for colour in ("red", "blue"):
            place = folder / "images" / part / colour
            place.mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (40, 40 + number), colour)
                image.save(str(place / f"{number}.png"))
    images = str(folder / "images")
    output = train("torchrun", "images", f"{SHORT} 1", IMAGES=images).stdout
    (first, _), (last, _) = epoch_lines(output)
    assert last < first
    assert len(validation_lines(output)) == 2


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_how_it_looks(path):
    text = path.read_text()
    file = f"--definitions tests/examples/{path.name}"
    assert text.count("\n") <= 60
    assert max(map(len, text.splitlines())) <= 88
    docstring = text.split('"""')[1]
    assert text.startswith(f'"""{docstring}')
    assert f"    python ddp.py {file}" in docstring
    command = "torchrun --standalone --nproc_per_node=auto torchrun_ddp.py"
    assert f"    {command} \\\n        {file}" in docstring


def test_all_are_in_the_table():
    names = [getattr(row, "values", row)[0] for row in each.args[1]]
    assert sorted(names) == [path.stem for path in PATHS]
