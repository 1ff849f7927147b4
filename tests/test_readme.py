"""README tells the truth: its commands name scripts and flags that exist, its table counts the lines there are."""

import re
import shlex

import pytest
import tyro

import dpo
import grpo
import ppo
import rm
import sft
import sync

README = (sync.ROOT / "README.md").read_text()
SCRIPTS = {"sft.py": sft, "rm.py": rm, "ppo.py": ppo, "grpo.py": grpo, "dpo.py": dpo}


def commands() -> list[str]:
    """Every command of README's bash blocks, continued lines joined."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            found += [part.strip() for part in line.split("&&")]
    return found


def test_readme_shows_commands_of_every_script():
    shown = {command.split()[1] for command in commands() if command.startswith("python ")}
    assert set(SCRIPTS) <= shown


@pytest.mark.parametrize(
    "command",
    [command for command in commands() if re.match(r"(python|torchrun [^.]*) (sft|rm|ppo|grpo|dpo)\.py", command)],
)
def test_commands_parse(command):
    """The flags exist and their values are accepted; Args checks the numbers itself."""
    words = shlex.split(command, comments=True)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    tyro.cli(SCRIPTS[words[script]].Args, args=words[script + 1 :])


def test_a_wrong_flag_would_be_noticed():
    with pytest.raises(SystemExit):
        tyro.cli(grpo.Args, args=["--no-such-flag", "1"])


@pytest.mark.parametrize("path", re.findall(r"python (\S+\.py)", README) + re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_files_that_readme_names_exist(path):
    assert (sync.ROOT / path).exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_line_counts(name):
    row = next(line for line in README.splitlines() if line.startswith(f"| [{name}]"))
    stated = int(row.split("|")[-2].strip().replace(",", ""))
    assert stated == len((sync.ROOT / name).read_text().splitlines())


def test_metrics_in_readme_are_documented_in_the_script():
    table = README.split("## What the metrics mean")[1].split("\n## ")[0]
    for name in re.findall(
        r"`([a-z_]+)`", " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    ):
        assert any(name in script.__doc__ for script in SCRIPTS.values()), name
