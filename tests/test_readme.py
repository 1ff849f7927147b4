"""README tells the truth: its commands name files and flags that exist, its table counts the lines there are."""

import re
import shlex
import subprocess

import pytest
import tyro

import sync
from conftest import CORE, PARENT, SCRIPTS, VARIANTS

README = (sync.ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Every command of the bash blocks, continued lines joined, comments gone."""
    blocks = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", README, re.S)]
    return [part.split("#")[0].strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]


RUNS = [command for command in commands() if re.search(rf"\b({'|'.join(SCRIPTS)})\.py", command)]


def test_every_script_has_commands():
    assert {re.search(r"(\w+)\.py", command)[1] for command in RUNS} >= set(CORE)
    assert any(command.startswith("torchrun ") for command in RUNS)
    assert "pip install -r requirements.txt && python sft.py && python grpo.py\n" in README
    assert "pip install -r requirements.txt && pytest\n" in README


@pytest.mark.parametrize("command", RUNS)
def test_commands_parse(command):
    words = shlex.split(command)
    where = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (sync.ROOT / words[where]).exists()
    tyro.cli(SCRIPTS[words[where][:-3].split("/")[-1]].Args, args=words[where + 1 :])


def test_a_wrong_flag_would_be_noticed():
    with pytest.raises(SystemExit):
        tyro.cli(SCRIPTS["grpo"].Args, args=["--no-such-flag", "1"])


@pytest.mark.parametrize(
    "flag",
    sorted(
        set(re.findall(r"--[a-z][a-z-]+", README)) - {"--nproc-per-node", "--help", "--name", "--no-index", "--gaming"}
    ),
)
def test_flags_in_the_text_exist(flag):
    name = flag[2:].replace("-", "_")
    assert any(name in script.Args.__dataclass_fields__ for script in SCRIPTS.values())


@pytest.mark.parametrize("path", re.findall(r"python (\S+\.py)", README) + re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_files_that_readme_names_exist(path):
    assert (sync.ROOT / path).exists()


@pytest.mark.parametrize("name", CORE)
def test_line_counts(name):
    row = next(line for line in README.splitlines() if line.startswith(f"| [{name}.py]"))
    assert f"| {len((sync.ROOT / f'{name}.py').read_text().splitlines())} |" in row


@pytest.mark.parametrize("name", VARIANTS)
def test_lines_that_a_variant_adds_and_removes(name):
    """As git counts them."""
    files = [f"{PARENT[name]}.py", f"variants/{name}.py"]
    command = ["git", "diff", "--no-index", "--numstat", *files]
    added, removed, _ = subprocess.run(command, cwd=sync.ROOT, capture_output=True, text=True).stdout.split(maxsplit=2)
    row = next(line for line in README.splitlines() if line.startswith(f"| [{name}.py](variants/{name}.py)"))
    assert f"| {files[0]} |" in row and f"| +{added} −{removed} |" in row


def test_metrics_that_readme_explains_are_logged():
    table = README.split("## What the metrics mean")[1].split("\n## ")[0]
    names = re.findall(
        r"`([a-z_]+)`", " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    )
    sources = [(sync.ROOT / f"{name}.py").read_text() for name in CORE]
    assert len(names) > 10
    for name in names:
        assert any(f'"{name}"' in source for source in sources), name


def test_length():
    """300 lines, and two for each variant."""
    assert len(README.splitlines()) <= 300 + 2 * len(VARIANTS)
