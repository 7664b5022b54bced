"""tests/examples: in both scripts, they run, learn, resume, and print nothing else."""

import importlib.util
import re

import pytest
from conftest import ROOT, SCRIPTS, epoch_lines, validation_lines

PATHS = sorted((ROOT / "tests" / "examples").glob("*.py"))
# Of each: its package, the length of its dataset, and whether it runs only with --all.
EXAMPLES = {
    "digits": ("sklearn", 1, False),
    "averaged": ("sklearn", 1, False),  # it has its own length
    "contrastive": ("torch", 600, False),
    "tables": ("h5py", 600, False),
    "images": ("torchvision", 300, True),
    "texts": ("transformers", 2000, True),
    "language_model": ("transformers", 600, True),
    "graphs": ("torch_geometric", 600, True),
    "lora": ("peft", 600, True),
}
SHORT = "--epochs 2 --batch_size 16 --input_size 100 --dataset_length"
CASES = {2: {}}
each = []
for name, (package, length, slow) in EXAMPLES.items():
    workers = "--num_workers 2" if name == "tables" else ""
    flags = f"--definitions examples/{name}.py {SHORT} {length} {workers}"
    missing = importlib.util.find_spec(package) is None
    if not missing:
        CASES[2][name] = {"run": "example", "flags": flags, "slow": slow}
    marks = [pytest.mark.slow] * slow
    marks.append(pytest.mark.skipif(missing, reason=f"needs {package}"))
    each.append(pytest.param(name, marks=marks))
each = pytest.mark.parametrize("name", each)


@each
def test_it_learns_and_resumes(results, name):
    example = results[2][name]
    assert len(example["found"]) == 2 and "From examples/" in example["found"][0]
    first, last = epoch_lines("\n".join(example["first"]))
    assert last["loss"] < first["loss"]
    if name == "images":  # its schedule is made for a number of steps
        assert "steps of the scheduler was " in example["again"][0]
        example["again"] = []
    else:
        assert example["again"].pop(0).endswith("resuming after 2 epochs and 0 samples")
        assert len(epoch_lines("\n".join(example["again"]))) == 1
    for line in example["first"] + example["again"]:
        assert re.match(r"epoch \d|  validation |DDP training time: ", line), line
    if name == "contrastive":
        assert (
            set(last) == {"loss", "nearest", "top5"} and last["top5"] > last["nearest"]
        )
    assert len(validation_lines("\n".join(example["first"]))) == 2


@each
def test_ddp_is_right(results, name):
    figures = results[2][name]["compare"]
    assert figures["result"] is True and "WARNING" not in figures["says"]
    assert figures["says"].startswith("DDP is right"), figures["says"]
    assert figures["gradient_difference"] < 1e-5
    assert figures["ddp"][-1]["means"]["loss"] > 0


def test_one_process_makes_the_table_that_each_worker_opens(results):
    assert len(list(results["folder"].glob("table-*"))) == ("tables" in CASES[2])


@pytest.mark.slow
def test_images_in_folders(finish, folder):
    pytest.importorskip("torchvision")
    from PIL import Image

    for part, count in ("train", 64), ("val", 10):
        for colour in ("red", "blue"):
            place = folder / "images" / part / colour
            place.mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (40, 40 + number), colour)
                image.save(str(place / f"{number}.png"))
    path = ROOT / "tests" / "examples" / "images.py"
    flags = f"--definitions {path} {SHORT} 1"
    run = finish(SCRIPTS["torchrun"], flags, env={"IMAGES": str(folder / "images")})
    first, last = epoch_lines(run.stdout)
    assert last["loss"] < first["loss"]
    assert len(validation_lines(run.stdout)) == 2 and run.stderr == ""


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_how_it_looks(path):
    text = path.read_text()
    file = f"--definitions tests/examples/{path.name}"
    assert text.count("\n") <= 65
    assert max(map(len, text.splitlines())) <= 88
    docstring = text.split('"""')[1]
    assert text.startswith(f'"""{docstring}')
    assert f"    python ddp.py {file}" in docstring
    command = "torchrun --standalone --nproc_per_node=auto torchrun_ddp.py"
    assert f"    {command} \\\n        {file}" in docstring


def test_all_are_in_the_table():
    assert sorted(EXAMPLES) == [path.stem for path in PATHS]
