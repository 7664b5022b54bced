"""The README's "Make it yours": its edits, applied to a copy, train on a real dataset."""

import re

import pytest
from conftest import DDP, ROOT, STANDALONE, edit, epoch_lines
from test_training import replace_body

README = (ROOT / "README.md").read_text()
SECTION = README[README.index("## Make it yours") : README.index("## Reading the")]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


def make_it_mine(script, evaluate):
    """Apply the README's edits to a copy of a script, as the text there says to."""
    model, dataset, function, call = BLOCKS
    for name, block in (("MyModel", model), ("MyDataset", dataset)):
        head, body = block.split("\n", 1)
        assert head.startswith(f"class {name}(")
        replace_body(script, name, body)
    if evaluate:
        before = "def train(args, device, snapshot):\n"
        edit(script, (before, function.strip() + "\n\n\n" + before))
        after = '        model, loader, optimizer, device, args, snapshot["epoch"], save\n    )\n'
        edit(script, (after, after + call))


@pytest.mark.parametrize("command", [DDP, STANDALONE], ids=["ddp", "torchrun"])
def test_the_edits_train_a_network_on_digits(finish, folder, command):
    make_it_mine(folder / command[-1], evaluate=command == STANDALONE)
    run = finish(command + ["--epochs", "10", "--learning_rate", "0.003"])
    assert float(epoch_lines(run.stdout)[-1][1]) > 97, run.stdout
    if command == STANDALONE:
        score = re.search(
            r"^accuracy on the test set: (\S+)%$", run.stdout, re.MULTILINE
        )
        assert float(score.group(1)) >= 97, run.stdout
    else:
        assert "as they have to with BatchNorm or dropout" in run.stdout
