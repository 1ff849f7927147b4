"""Bad input ends in SystemExit, at once, with a message that names the flag or the column, and nothing is written."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
import transformers

import dpo
import grpo
import ppo
import rm
import sft

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"sft": sft, "rm": rm, "ppo": ppo, "grpo": grpo, "dpo": dpo}
ROWS = sft.arithmetic_rows("train", 40)
OFFLINE = {"steps": 4, "batch_size": 4, "max_length": 200}
ONLINE = {"steps": 4, "prompts_per_step": 4, "max_prompt_length": 64, "warmup_steps": 0}
SMALL = {
    "sft": {**OFFLINE, "max_new_tokens": 8},
    "rm": OFFLINE,
    "ppo": {**ONLINE, "max_new_tokens": 8, "group_size": 1, "num_minibatches": 2, "num_epochs": 1},
    "grpo": {**ONLINE, "max_new_tokens": 8, "group_size": 2},
    "dpo": {**OFFLINE, "max_new_tokens": 8},
}
SAME = {"eval_size": 8, "eval_every": 100, "save_every": 2, "sample_every": 2}
ALL = pytest.mark.parametrize("name", list(SCRIPTS))
SAMPLED = pytest.mark.parametrize("name", ["ppo", "grpo"])
PAIRS = pytest.mark.parametrize("name", ["rm", "dpo"])

REWARD_FILE = """
import math

def good(prompts, completions, rows):
    return [len(set(completion)) / 8 for completion in completions]

def raises(prompts, completions, rows):
    return [1 / 0 for row in rows]

def too_many(prompts, completions, rows):
    return [0.0] * (len(rows) + 1)

def too_few(prompts, completions, rows):
    return []

def single(prompts, completions, rows):
    return 1.0

def nothing(prompts, completions, rows):
    pass

def nan(prompts, completions, rows):
    return [math.nan for row in rows]

def infinite(prompts, completions, rows):
    return [math.inf for row in rows]

def none(prompts, completions, rows):
    return [None for row in rows]

def text(prompts, completions, rows):
    return ["good" for row in rows]

def wrong_arguments(prompts):
    return [0.0 for prompt in prompts]

not_a_function = 3
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models run fastest on one thread, most of all when tests share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def signal_handlers():
    """Leaves the handlers of the test process as they are, whatever a run does to them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of good and bad data files and of the reward file."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps(row) for row in ROWS]
    (folder / "good.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "blank.jsonl").write_text("\n\n")
    (folder / "list.json").write_text("[]")
    (folder / "header.csv").write_text("prompt,completion,answer,chosen,rejected\n")
    (folder / "torn.jsonl").write_text("\n".join(lines[:20]) + "\n" + lines[20][:-9])
    (folder / "garbage.jsonl").write_text("this is no json\n" * 20)
    (folder / "garbage.parquet").write_text("this is no parquet file\n" * 20)
    (folder / "columns.jsonl").write_text('{"instruction": "2+2=", "output": "4"}\n' * 20)
    (folder / "no_answer.jsonl").write_text('{"prompt": "2+2=", "source": "4"}\n' * 20)
    (folder / "numbers.csv").write_text("prompt,completion,answer,chosen,rejected\n" + "12,4,4,4,5\n" * 20)
    none = [{**row, "prompt": None if i == 3 else row["prompt"]} for i, row in enumerate(ROWS)]
    (folder / "none.jsonl").write_text("".join(json.dumps(row) + "\n" for row in none))
    blank = [{**row, "prompt": "" if i == 3 else row["prompt"]} for i, row in enumerate(ROWS)]
    (folder / "blank_prompt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in blank))
    missing = [{**row, "answer": None if i == 5 else row["answer"]} for i, row in enumerate(ROWS)]
    (folder / "missing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in missing))
    (folder / "user_only.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n' * 20)
    (folder / "odd_messages.jsonl").write_text('{"messages": [{"from": "human", "value": "hello"}]}\n' * 20)
    (folder / "notes.txt").write_text("some notes\n")
    (folder / "rewards.py").write_text(REWARD_FILE)
    (folder / "broken.py").write_text("def reward(prompts, completions, rows:\n    return 1\n")
    (folder / "imports.py").write_text("import a_module_that_nobody_has\n")
    return folder


def settings(name: str, data: Path, tiny_folder: str, out: Path, **changes) -> dict:
    """A run that would work, with `changes`."""
    model = {"model": "tiny" if name == "sft" else tiny_folder}
    model |= {"reward": (f"{data}/rewards.py:good",)} if name in ("ppo", "grpo") else {}
    return {"dataset": f"{data}/good.jsonl", "out": str(out), **SAME, **SMALL[name], **model, **changes}


def snapshot(folder: Path) -> dict | None:
    """Every file below `folder` with its bytes and the time of its last change; None if there is no folder."""
    if not folder.is_dir():
        return folder.read_bytes() if folder.exists() else None
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


def refused(name: str, wanted: dict, *words: str) -> str:
    """Proves that the run ends in SystemExit, that its message holds `words`, and that `out` is as it was."""
    out = Path(wanted["out"])
    before = snapshot(out)
    with pytest.raises(SystemExit) as info:
        SCRIPTS[name].main(SCRIPTS[name].Args(**wanted))
    message = str(info.value)
    assert isinstance(info.value.code, str), f"the exit code is {info.value.code!r}, not a message"
    for word in words:
        assert word in message, f"{word!r} is not in the message: {message}"
    assert snapshot(out) == before
    return message


def write_rows(path: Path, rows: list[dict]) -> str:
    """Writes rows as .jsonl; its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# -------------------------------------------------------------------------------------------------------------- numbers

BAD_NUMBERS = [
    ("all", "max_new_tokens", 0),
    ("all", "max_new_tokens", -1),
    ("all", "steps", 0),
    ("all", "steps", -5),
    ("all", "lr", 0.0),
    ("all", "lr", -1e-3),
    ("all", "lr", math.nan),
    ("all", "lr", math.inf),
    ("all", "warmup_steps", -1),
    ("all", "adam_beta2", 1.0),
    ("all", "adam_beta2", -0.1),
    ("all", "adam_beta2", math.nan),
    ("all", "max_grad_norm", 0.0),
    ("all", "max_grad_norm", -1.0),
    ("all", "micro_batch_tokens", 0),
    ("all", "rollout_batch_size", 0),
    ("all", "cache_memory", 0.0),
    ("all", "cache_memory", 1.5),
    ("all", "cache_memory", math.nan),
    ("all", "eval_every", 0),
    ("all", "eval_size", 0),
    ("all", "eval_size", -8),
    ("all", "sample_every", 0),
    ("all", "save_every", 0),
    ("all", "save_every", -1),
    ("sft rm dpo", "batch_size", 0),
    ("sft rm dpo", "epochs", 0),
    ("sft rm dpo", "max_length", 0),
    ("ppo grpo", "prompts_per_step", 0),
    ("grpo", "group_size", 1),
    ("ppo grpo", "group_size", 0),
    ("ppo grpo", "group_size", -2),
    ("ppo grpo", "max_prompt_length", 0),
    ("ppo grpo", "temperature", 0.0),
    ("ppo grpo", "temperature", -1.0),
    ("ppo grpo", "temperature", math.nan),
    ("ppo grpo", "num_epochs", 0),
    ("ppo grpo", "clip_eps", 0.0),
    ("ppo grpo", "clip_eps", -0.2),
    ("ppo grpo", "kl_coef", -0.1),
    ("ppo grpo", "kl_coef", math.nan),
    ("ppo grpo", "entropy_coef", -0.1),
    ("ppo grpo", "missing_eos_penalty", -1.0),
    ("ppo grpo", "sft_coef", -1.0),
    ("ppo grpo", "is_cap", -1.0),
    ("ppo grpo", "target_kl", 0.0),
    ("ppo grpo", "kl_stop", 0.0),
    ("ppo grpo", "kl_stop", math.nan),
    ("rm", "center_coef", -0.1),
    ("rm", "center_coef", math.nan),
    ("dpo", "beta", 0.0),
    ("dpo", "beta", -0.1),
    ("dpo", "beta", math.nan),
    ("dpo", "label_smoothing", -0.1),
    ("dpo", "label_smoothing", 0.5),
    ("dpo", "label_smoothing", 1.0),
    ("dpo", "label_smoothing", math.nan),
    ("ppo", "num_minibatches", 0),
    ("ppo", "num_minibatches", -1),
    ("ppo", "value_clip_eps", -0.2),
    ("ppo", "gamma", -0.1),
    ("ppo", "gamma", 1.5),
    ("ppo", "gamma", math.nan),
    ("ppo", "lam", -0.1),
    ("ppo", "lam", 1.5),
    ("ppo", "lam", math.nan),
    ("ppo", "vf_coef", -1.0),
    ("ppo", "vf_coef", math.nan),
    ("ppo", "value_lr", 0.0),
    ("ppo", "value_lr", -1e-3),
    ("ppo", "value_lr", math.inf),
]
BAD_NUMBERS = [
    (name, flag, value)
    for who, flag, value in BAD_NUMBERS
    for name, script in SCRIPTS.items()
    if name in who.split() or (who == "all" and flag in script.Args.__dataclass_fields__)
]


@pytest.mark.parametrize(("name", "flag", "value"), BAD_NUMBERS)
def test_a_number_out_of_range_names_its_flag(name, flag, value, data, tiny_folder, tmp_path):
    """Zero, negative and not-a-number values are refused by name, before anything is loaded."""
    wanted = settings(name, data, tiny_folder, tmp_path / "out", **{flag: value})
    refused(name, wanted, "--" + flag.replace("_", "-"))


UNFIT = [
    ("grpo", {"rollout_batch_size": 7}, ["--rollout-batch-size", "--group-size"]),
    ("grpo", {"rollout_batch_size": 1}, ["--rollout-batch-size", "--group-size"]),
    ("grpo", {"group_size": 3}, ["--rollout-batch-size", "--group-size"]),
    ("grpo", {"target_kl": 0.1}, ["--target-kl", "--num-epochs"]),
    ("ppo", {"group_size": 2, "rollout_batch_size": 7}, ["--rollout-batch-size", "--group-size"]),
    ("ppo", {"num_minibatches": 3}, ["--num-minibatches", "--prompts-per-step", "--group-size", "4"]),
    ("ppo", {"num_minibatches": 8}, ["--num-minibatches", "--prompts-per-step", "--group-size", "4"]),
    ("ppo", {"prompts_per_step": 3}, ["--num-minibatches", "--prompts-per-step", "--group-size", "3"]),
    ("ppo", {"target_kl": 0.1, "num_minibatches": 1}, ["--target-kl", "--num-epochs"]),
    ("both", {"reward": ("exact", "format"), "reward_weights": (1.0,)}, ["--reward-weights"]),
    ("both", {"reward_weights": (1.0, 2.0)}, ["--reward-weights"]),
    ("both", {"reward_weights": (math.nan,)}, ["--reward-weights"]),
    ("both", {"reward_weights": (math.inf,)}, ["--reward-weights"]),
    ("both", {"reward": ("exact", "exact"), "reward_weights": (1.0, 2.0)}, ["--reward"]),
    ("both", {"reward": ()}, ["--reward"]),
    (
        "ppo",
        {"sft_coef": 0.1, "sft_dataset": "arithmetic", "prompts_per_step": 3, "group_size": 2},
        ["--num-minibatches", "--prompts-per-step", "--sft-coef"],
    ),
    ("both", {"sft_coef": 0.1}, ["--sft-coef", "--sft-dataset"]),
    ("both", {"sft_dataset": "arithmetic"}, ["--sft-coef", "--sft-dataset"]),
]
UNFIT = [(name, changes, flags) for who, changes, flags in UNFIT for name in ("ppo", "grpo") if who in (name, "both")]


@pytest.mark.parametrize(("name", "changes", "flags"), UNFIT, ids=str)
def test_settings_that_do_not_fit_each_other_are_refused(name, changes, flags, data, tiny_folder, tmp_path):
    """Sizes that do not divide, a weight too few or too many, and half of a pair of flags name the flags to change."""
    refused(name, settings(name, data, tiny_folder, tmp_path / "out", **changes), *flags)


def test_ppo_takes_what_grpo_must_refuse(data, tiny_folder, tmp_path):
    """A group of one, the default of ppo.py, and a target KL with one epoch of two minibatches, which leaves an update
    to be stopped: the run ends well."""
    wanted = settings("ppo", data, tiny_folder, tmp_path / "out", group_size=1, target_kl=0.1, steps=1)
    assert ppo.main(ppo.Args(**wanted))["step"] == 1


# ------------------------------------------------------------------------------------------------------- model and data


@ALL
def test_a_model_folder_that_is_not_there(name, data, tiny_folder, tmp_path):
    """A path without a folder behind it names --model and the path."""
    for model in (str(tmp_path / "nowhere"), "./nowhere", "runs/nowhere"):
        refused(name, settings(name, data, tiny_folder, tmp_path / "out", model=model), "--model", "nowhere")


@pytest.mark.parametrize("name", ["rm", "ppo", "grpo", "dpo"])
def test_the_default_model_says_which_script_makes_it(name, data, tiny_folder, tmp_path, monkeypatch):
    """Each script in an empty folder points to sft.py."""
    monkeypatch.chdir(tmp_path)
    refused(name, settings(name, data, tiny_folder, tmp_path / "out", model="runs/sft"), "--model", "sft.py")


def test_the_default_reward_of_ppo_says_which_script_makes_it(data, tiny_folder, tmp_path, monkeypatch):
    """ppo.py in a folder without a reward model points to rm.py, and to no other script."""
    monkeypatch.chdir(tmp_path)
    wanted = settings("ppo", data, tiny_folder, tmp_path / "out")
    del wanted["reward"]
    assert "sft.py" not in refused("ppo", wanted, "--reward", "runs/rm", "rm.py")


@ALL
def test_a_folder_without_a_model(name, data, tiny_folder, tmp_path):
    """A folder that holds no model, or whose weights are torn, names --model."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("nothing here")
    refused(name, settings(name, data, tiny_folder, tmp_path / "out", model=str(tmp_path / "model")), "--model")
    torn = shutil.copytree(tiny_folder, tmp_path / "torn") / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:10_000])
    refused(name, settings(name, data, tiny_folder, tmp_path / "out", model=str(tmp_path / "torn")), "--model")


@pytest.mark.parametrize(
    ("name", "flags"),
    [("sft", ["--model", "no-one/no-model"]), ("grpo", ["--dataset", "no-one/no-data"])],
)
def test_a_hub_name_is_not_retried_while_the_hub_is_out_of_reach(name, flags, data, tiny_folder, tmp_path):
    """With no Hub to talk to, a Hub name is given up within seconds: well below the half minute of the Hub's client."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    others = ["--dataset", f"{data}/good.jsonl", "--eval-size", "8"] if name == "sft" else ["--model", tiny_folder]
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / f"{name}.py"), *flags, *others, "--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert flags[0] in result.stderr and flags[1] in result.stderr
    assert "Traceback" not in result.stderr
    assert time.perf_counter() - start < 25
    assert not (tmp_path / "out").exists()


@ALL
@pytest.mark.parametrize("model", ["no-one/no-model", "no-model"])
def test_a_model_name_that_the_hub_does_not_have(name, model, data, tiny_folder, tmp_path):
    """A Hub id, offline, names --model and the id."""
    refused(name, settings(name, data, tiny_folder, tmp_path / "out", model=model), "--model", model)


@ALL
@pytest.mark.parametrize("flag", ["dataset", "eval_dataset"])
@pytest.mark.parametrize("dataset", ["nowhere.jsonl", "nowhere/rows.parquet", "no-one/no-data", "no-one/no-data:main"])
def test_a_dataset_that_is_not_there(name, flag, dataset, data, tiny_folder, tmp_path):
    """A file or Hub dataset that is not there names its own flag and the name."""
    wanted = settings(name, data, tiny_folder, tmp_path / "out", **{flag: dataset})
    refused(name, wanted, "--" + flag.replace("_", "-"), dataset.split(":")[0])


@SAMPLED
def test_an_sft_dataset_that_is_not_there_or_lacks_columns(name, data, tiny_folder, tmp_path):
    """--sft-dataset is checked like --dataset, and named."""
    for dataset, words in (("nowhere.jsonl", ["nowhere.jsonl"]), (f"{data}/columns.jsonl", ["instruction", "output"])):
        wanted = settings(name, data, tiny_folder, tmp_path / "out", sft_coef=0.1, sft_dataset=dataset)
        refused(name, wanted, "--sft-dataset", *words)


@ALL
@pytest.mark.parametrize("file", ["notes.txt", ""])
def test_a_path_that_is_no_dataset(name, file, data, tiny_folder, tmp_path):
    """A file of another format and a folder that mixes everything name --dataset."""
    refused(name, settings(name, data, tiny_folder, tmp_path / "out", dataset=f"{data}/{file}"), "--dataset")


@ALL
@pytest.mark.parametrize("flag", ["dataset", "eval_dataset"])
def test_missing_columns_list_those_that_are_there(name, flag, data, tiny_folder, tmp_path):
    """The message names the columns that the data has and those that the script needs."""
    needed = ["chosen+rejected"] if name in ("rm", "dpo") else ["prompt", "question"]
    wanted = settings(name, data, tiny_folder, tmp_path / "out", **{flag: f"{data}/columns.jsonl"})
    refused(name, wanted, "--" + flag.replace("_", "-"), "instruction", "output", *needed)


@SAMPLED
def test_a_prompt_without_answer_is_not_enough(name, data, tiny_folder, tmp_path):
    """sft.py needs a completion; the online scripts need an answer for --reward exact, and only for it."""
    dataset = f"{data}/no_answer.jsonl"
    refused(
        "sft", settings("sft", data, tiny_folder, tmp_path / "out", dataset=dataset), "prompt, source", "completion"
    )
    wanted = settings(name, data, tiny_folder, tmp_path / "out", dataset=dataset)
    refused(name, {**wanted, "reward": ("exact",)}, "prompt, source", "answer")
    refused(name, {**wanted, "reward": ("format", "exact")}, "prompt, source", "answer")
    metrics = SCRIPTS[name].main(SCRIPTS[name].Args(**{**wanted, "steps": 1}))
    assert not [key for key in metrics if "accuracy" in key]


@PAIRS
@pytest.mark.parametrize("flag", ["dataset", "eval_dataset"])
@pytest.mark.parametrize("dropped", ["rejected", "chosen"])
def test_pairs_that_lack_a_side(name, flag, dropped, data, tiny_folder, tmp_path):
    """One side is no preference: the message lists the columns that are there."""
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected") if key != dropped} for row in ROWS]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    there = ", ".join(rows[0])
    wanted = settings(name, data, tiny_folder, tmp_path / "out", **{flag: file})
    refused(name, wanted, "--" + flag.replace("_", "-"), f"columns {there};", "chosen+rejected")


HUMAN = "\n\nHuman: 1+1=\n\nAssistant:"
NO_PAIRS = {
    "equal sides": ({"prompt": "1+1=", "chosen": "2", "rejected": "2"}, ["equal sides", "40"]),
    "equal conversations": ({"chosen": HUMAN + " 2", "rejected": HUMAN + " 2"}, ["equal sides", "40"]),
    "other prompts": ({"chosen": HUMAN + " 2", "rejected": HUMAN.replace("1+1", "1+2") + " 2"}, ["last turn", "40"]),
    "an empty side": ({"prompt": "1+1=", "chosen": "2", "rejected": " "}, ["empty side", "40"]),
    "no prompt": ({"chosen": "2", "rejected": "3"}, ["row 0", "prompt", "Human:", "Assistant:"]),
    "no prompt in messages": (
        {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")},
        ["row 0", "prompt"],
    ),
    "a user's turn last": (
        {
            side: [{"role": "user", "content": "1+1="}, {"role": "user", "content": side}]
            for side in ("chosen", "rejected")
        },
        ["row 0", "assistant"],
    ),
    "another notation": (
        {side: [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": side}] for side in ("chosen", "rejected")},
        ["row 0"],
    ),
    "numbers": ({"prompt": "1+1=", "chosen": 2, "rejected": 3}, ["row 0", "chosen"]),
    "a missing side": ({"prompt": "1+1=", "chosen": "2", "rejected": None}, ["row 0", "rejected"]),
}


@PAIRS
@pytest.mark.parametrize("kind", NO_PAIRS)
def test_rows_that_are_no_pairs(name, kind, data, tiny_folder, tmp_path):
    """Where no preference is left, the message says why; a row that is no pair is named, with what it needs."""
    row, words = NO_PAIRS[kind]
    file = write_rows(tmp_path / "rows.jsonl", [row] * 48)
    refused(name, settings(name, data, tiny_folder, tmp_path / "out", dataset=file), "--dataset", *words)


@PAIRS
def test_evaluation_rows_without_a_preference(name, data, tiny_folder, tmp_path):
    """Held-out pairs of equal sides measure nothing: refused, and it is said which rows they are."""
    file = write_rows(tmp_path / "rows.jsonl", [{**row, "rejected": row["chosen"]} for row in ROWS])
    wanted = settings(name, data, tiny_folder, tmp_path / "out", eval_dataset=file)
    refused(name, wanted, "--eval-dataset", "equal sides")


@pytest.mark.parametrize("margin", ["wide", "nan", math.nan, math.inf], ids=str)
def test_a_margin_that_is_no_number(margin, data, tiny_folder, tmp_path):
    """Text and NaN in the column `margin` name the column and the value; numbers and empty fields will do."""
    file = str(tmp_path / "rows.parquet")
    default = "0.5" if isinstance(margin, str) else 0.5
    rows = [{**row, "margin": margin if i == 7 else None if i == 8 else default} for i, row in enumerate(ROWS)]
    datasets.Dataset.from_list(rows).to_parquet(file)
    wanted = settings("rm", data, tiny_folder, tmp_path / "out", dataset=file)
    refused("rm", wanted, "`margin`", str(margin), ROWS[7]["prompt"])
    rows[7]["margin"] = default
    datasets.Dataset.from_list(rows).to_parquet(file)
    assert rm.main(rm.Args(**{**wanted, "steps": 1}))["step"] == 1


@ALL
@pytest.mark.parametrize("flag", ["dataset", "eval_dataset"])
@pytest.mark.parametrize("file", ["empty.jsonl", "blank.jsonl", "list.json", "header.csv"])
def test_an_empty_dataset(name, flag, file, data, tiny_folder, tmp_path):
    """A file of no rows, of blank lines, of an empty list or of a header alone names its flag."""
    wanted = settings(name, data, tiny_folder, tmp_path / "out", **{flag: f"{data}/{file}"})
    refused(name, wanted, "--" + flag.replace("_", "-"), file)


@ALL
@pytest.mark.parametrize("file", ["torn.jsonl", "garbage.jsonl", "garbage.parquet"])
def test_a_broken_file(name, file, data, tiny_folder, tmp_path):
    """A line that is torn and a file that is something else name the flag and the file."""
    refused(name, settings(name, data, tiny_folder, tmp_path / "out", dataset=f"{data}/{file}"), "--dataset", file)


@ALL
@pytest.mark.parametrize("file", ["none.jsonl", "blank_prompt.jsonl", "numbers.csv"])
def test_a_prompt_that_is_no_text(name, file, data, tiny_folder, tmp_path):
    """A prompt of None, an empty one and a number are refused, with the row and its column."""
    message = refused(name, settings(name, data, tiny_folder, tmp_path / "out", dataset=f"{data}/{file}"), "prompt")
    assert re.search(r"row (3|0)\b", message), message


@pytest.mark.parametrize("file", ["user_only.jsonl", "odd_messages.jsonl"])
def test_messages_without_an_assistant_turn(file, data, tiny_folder, tmp_path):
    """Conversations in which nobody answers, and those in another notation, name the row."""
    refused("sft", settings("sft", data, tiny_folder, tmp_path / "out", dataset=f"{data}/{file}"), "row 0", "messages")


@SAMPLED
def test_a_row_whose_answer_is_missing(name, data, tiny_folder, tmp_path):
    """The exact reward on a row without answer ends the run before it starts: it is no silent 0."""
    wanted = settings(name, data, tiny_folder, tmp_path / "out", dataset=f"{data}/missing.jsonl")
    refused(name, {**wanted, "reward": ("exact",)}, "answer", "row 5")
    wanted = settings(name, data, tiny_folder, tmp_path / "out", eval_dataset=f"{data}/missing.jsonl")
    refused(name, {**wanted, "reward": ("exact",)}, "answer", "row 5")


def test_sft_measures_no_accuracy_where_an_answer_is_missing(data, tiny_folder, tmp_path):
    """Rows without answer train all the same; the evaluation then has a loss and no accuracy."""
    evaluation = {"eval_dataset": f"{data}/missing.jsonl", "eval_size": 10, "steps": 1}
    wanted = settings("sft", data, tiny_folder, tmp_path / "out", dataset=f"{data}/missing.jsonl", **evaluation)
    metrics = sft.main(sft.Args(**wanted))
    assert math.isfinite(metrics["eval/loss"])
    assert not [key for key in metrics if "accuracy" in key]


@ALL
def test_every_row_too_long(name, data, tiny_folder, tmp_path):
    """The message names the flag that dropped all the rows."""
    flag = "max_prompt_length" if name in ("ppo", "grpo") else "max_length"
    wanted = settings(name, data, tiny_folder, tmp_path / "out", **{flag: 3})
    refused(name, wanted, "--" + flag.replace("_", "-"), "3")


@ALL
def test_more_rows_per_step_than_there_are(name, data, tiny_folder, tmp_path):
    """40 rows, 8 of them for evaluation, cannot fill a step of 33."""
    changes = {"prompts_per_step": 33} if name in ("ppo", "grpo") else {"batch_size": 33}
    flag = next(iter(changes))
    changes |= {"num_minibatches": 3} if name == "ppo" else {}
    wanted = settings(name, data, tiny_folder, tmp_path / "out", **changes)
    refused(name, wanted, "--" + flag.replace("_", "-"), "32")


@ALL
@pytest.mark.parametrize("size", [40, 1000])
def test_evaluation_rows_that_leave_none_to_train_on(name, size, data, tiny_folder, tmp_path):
    """Held-out rows are not trained on, so they cannot be all of them."""
    refused(name, settings(name, data, tiny_folder, tmp_path / "out", eval_size=size), "--eval-size", "40")


@ALL
def test_a_tokenizer_without_eos(name, data, tiny_folder, tmp_path):
    """Without EOS nothing could learn to end: refused by name."""
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer = sft.tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    refused(name, settings(name, data, tiny_folder, tmp_path / "out", model=str(model)), "--model", "eos")


@pytest.mark.parametrize(("name", "model"), [("sft", "tiny"), *((name, "folder") for name in SCRIPTS)])
def test_a_window_that_is_too_small(name, model, data, tiny_folder, tmp_path):
    """Prompt and completion together must fit the 4,096 tokens of the model; the message says how many fit."""
    flag = "max_prompt_length" if name in ("ppo", "grpo") else "max_length"
    changes = {flag: 4_097 if name == "rm" else 4_096, "model": "tiny" if model == "tiny" else tiny_folder}
    refused(name, settings(name, data, tiny_folder, tmp_path / "out", **changes), "--m", "4096")


# ------------------------------------------------------------------------------------------- reference and value model


def swapped_tokenizer(folder: Path) -> Path:
    """Saves a tokenizer of the tiny one's size in which two letters have changed places."""
    tokenizer = sft.tiny_tokenizer()
    vocab = tokenizer.get_vocab()
    vocab["x"], vocab["y"] = vocab["y"], vocab["x"]
    markers = [f"<|{role}|>" for role in ("system", "user", "assistant")]
    special = {"unk_token": None, "pad_token": "<|pad|>", "eos_token": "<|end|>", "extra_special_tokens": markers}
    other = transformers.Qwen2Tokenizer(vocab, [], **special)
    other.chat_template = tokenizer.chat_template
    assert len(other) == len(tokenizer) and other.get_vocab() != tokenizer.get_vocab()
    other.save_pretrained(folder)
    return folder


def test_a_reference_that_is_not_there_or_reads_other_ids(data, tiny_folder, tmp_path):
    """--reference is named like any model; with another tokenizer than the policy's its log-probabilities are of other
    text."""
    wanted = settings("dpo", data, tiny_folder, tmp_path / "out")
    for reference in (str(tmp_path / "nowhere"), "no-one/no-model"):
        refused("dpo", {**wanted, "reference": reference}, "--reference", reference)
    folder = swapped_tokenizer(shutil.copytree(tiny_folder, tmp_path / "other"))
    refused("dpo", {**wanted, "reference": str(folder)}, "--reference", "tokenizer")
    (folder / "model.safetensors").unlink()
    sft.tiny_tokenizer().save_pretrained(folder)
    refused("dpo", {**wanted, "reference": str(folder)}, "--reference")


def test_scoring_without_a_reference_or_over_another_file(data, tiny_folder, tmp_path):
    """--score-only has no reference to fall back on: that of the model itself would give 0 everywhere. What it has
    written stays without --overwrite."""
    wanted = settings("dpo", data, tiny_folder, tmp_path / "out", score_only=True)
    refused("dpo", wanted, "--score-only", "--reference")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "implicit_rewards.jsonl").write_text("the user's own")
    wanted["reference"] = tiny_folder
    refused("dpo", wanted, "--out", "implicit_rewards.jsonl", "--overwrite")
    assert dpo.main(dpo.Args(**wanted, overwrite=True))["chosen_reward"] == 0.0


def test_scoring_of_what_cannot_be_scored(data, tiny_folder, tmp_path):
    """Rows of other columns, a reference with another tokenizer, and an --out that is a file are named."""
    wanted = settings("dpo", data, tiny_folder, tmp_path / "out", score_only=True, reference=tiny_folder)
    refused("dpo", {**wanted, "dataset": f"{data}/columns.jsonl"}, "--dataset", "instruction, output", "completion")
    folder = swapped_tokenizer(shutil.copytree(tiny_folder, tmp_path / "other"))
    refused("dpo", {**wanted, "reference": str(folder)}, "--reference", "tokenizer")
    (tmp_path / "file").write_text("a file")
    refused("dpo", {**wanted, "out": str(tmp_path / "file")}, "--out")


def test_a_value_model_that_reads_other_ids(data, tiny_folder, tmp_path):
    """The value model reads the policy's ids: another tokenizer is refused, and where it came from --reward the message
    says that --value-model mends it. It does: the reward model itself reads text."""
    reward = swapped_tokenizer(reward_model(tmp_path / "reward"))
    wanted = settings("ppo", data, tiny_folder, tmp_path / "out")
    refused("ppo", {**wanted, "reward": (str(reward),)}, "--reward", "tokenizer", "--value-model")
    refused("ppo", {**wanted, "value_model": str(reward)}, "--value-model", "tokenizer")
    mended = {**wanted, "reward": (str(reward),), "value_model": tiny_folder, "steps": 1}
    assert ppo.main(ppo.Args(**mended))["step"] == 1


def test_a_value_model_that_is_none(data, tiny_folder, tmp_path):
    """A folder that is not there, weights that are torn and a classifier with two labels name --value-model."""
    wanted = settings("ppo", data, tiny_folder, tmp_path / "out")
    for name in (str(tmp_path / "nowhere"), "no-one/no-model"):
        refused("ppo", {**wanted, "value_model": name}, "--value-model", name)
    two = reward_model(tmp_path / "two", num_labels=2)
    refused("ppo", {**wanted, "value_model": str(two)}, "--value-model", "2 labels")
    torn = shutil.copytree(tiny_folder, tmp_path / "torn") / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:10_000])
    refused("ppo", {**wanted, "value_model": str(tmp_path / "torn")}, "--value-model")


@pytest.mark.parametrize("name", ["sft", "ppo", "grpo", "dpo"])
def test_a_reward_model_is_no_policy(name, data, tiny_folder, tmp_path):
    """Its folder lacks nothing of a language model whose embeddings are tied, and would train without a word."""
    folder = reward_model(tmp_path / "reward")
    refused(name, settings(name, data, tiny_folder, tmp_path / "out", model=str(folder)), "--model", "reward model")
    if name == "dpo":
        wanted = settings(name, data, tiny_folder, tmp_path / "out", reference=str(folder))
        refused(name, wanted, "--reference", "reward model")


def test_a_classifier_with_two_labels_is_no_start_for_a_reward_model(data, tiny_folder, tmp_path):
    """rm.py goes on from a model with one label, not from any classifier."""
    folder = reward_model(tmp_path / "two", num_labels=2)
    refused(
        "rm",
        settings("rm", data, tiny_folder, tmp_path / "out", model=str(folder), max_length=100),
        "--model",
        "2 labels",
    )


# --------------------------------------------------------------------------------------------------------------- reward


@SAMPLED
@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("nowhere.py:reward", ["nowhere.py"]),
        ("{data}/rewards.py:nowhere", ["rewards.py", "nowhere"]),
        ("{data}/rewards.py:not_a_function", ["not_a_function"]),
        ("{data}/rewards.py", ["rewards.py", "function"]),
        ("{data}/broken.py:reward", ["broken.py"]),
        ("{data}/imports.py:reward", ["imports.py", "a_module_that_nobody_has"]),
        ("exakt", ["exakt", "exact"]),
        ("./nowhere", ["nowhere"]),
        ("no-one/no-model", ["no-one/no-model"]),
    ],
)
def test_a_reward_that_is_not_there(name, reward, words, data, tiny_folder, tmp_path):
    """A missing file, function, module or model, and a misspelt name, name --reward and what is missing."""
    wanted = settings(name, data, tiny_folder, tmp_path / "out", reward=(reward.format(data=data),))
    refused(name, wanted, "--reward", *words)


@SAMPLED
@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", ["ZeroDivisionError"]),
        ("wrong_arguments", ["TypeError"]),
        ("too_many", ["2", "1"]),
        ("too_few", ["0", "1"]),
        ("single", []),
        ("nothing", ["None"]),
        ("nan", ["nan"]),
        ("infinite", ["inf"]),
        ("none", ["None"]),
        ("text", ["good"]),
    ],
)
def test_a_reward_function_that_cannot_work_is_found_before_anything_is_written(
    name, function, words, data, tiny_folder, tmp_path
):
    """It is tried on one row first: raising, the wrong number of values, NaN, None and text name --reward."""
    wanted = settings(name, data, tiny_folder, tmp_path / "out", reward=(f"{data}/rewards.py:{function}",))
    refused(name, wanted, "--reward", function, *words)


LATER = """
from pathlib import Path

calls = 0

def reward(prompts, completions, rows):
    global calls
    calls += 1
    values = [len(set(completion)) / 8 for completion in completions]
    if calls >= 6 and not Path(__file__).with_name("mended").exists():
        {fault}
    return values
"""


@pytest.mark.parametrize(
    ("name", "fault", "words"),
    [
        ("grpo", "values = [{}[row['answer']] for row in rows]", ["KeyError"]),
        ("grpo", "values[5] = float('nan')", ["nan"]),
        ("grpo", "values[5] = None", ["None"]),
        ("grpo", "values.pop()", ["7", "8"]),
        ("ppo", "values = [{}[row['answer']] for row in rows]", ["KeyError"]),
    ],
)
def test_a_reward_that_fails_later_stops_the_run_with_its_row(name, fault, words, tiny_folder, data, tmp_path):
    """The trial call, the first evaluation (two calls) and steps 1 and 2 work, step 3 fails: the run names the fault
    and the row; the checkpoint of step 2 is whole, and with the file mended --resume ends like a run without fault."""
    file = tmp_path / "later.py"
    file.write_text(LATER.replace("{fault}", fault))
    wanted = settings(name, data, tiny_folder, tmp_path / "out", reward=(f"{file}:reward",), group_size=2)
    with pytest.raises(SystemExit) as info:
        SCRIPTS[name].main(SCRIPTS[name].Args(**wanted))
    message = str(info.value)
    assert "--reward" in message and "later.py:reward" in message
    for word in words:
        assert word in message
    if "pop" not in fault:  # which value is missing is not to be seen
        assert "'prompt':" in message and "'answer':" in message, message
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-2"]
    (tmp_path / "mended").touch()
    SCRIPTS[name].main(SCRIPTS[name].Args(**wanted, resume=True))
    SCRIPTS[name].main(SCRIPTS[name].Args(**{**wanted, "out": str(tmp_path / "straight")}))
    final = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert final == (tmp_path / "straight" / "model.safetensors").read_bytes()


def test_the_row_that_a_reward_raises_on_is_the_one_named(data, tiny_folder, tmp_path):
    """A reward that fails on one row of a batch names that row, not the first."""
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]
    rewards = {"mine": lambda prompts, completions, rows: [1 / (int(row["answer"]) - 3) for row in rows]}
    with pytest.raises(SystemExit) as info:
        grpo.compute_rewards(rewards, [1.0], [row["prompt"] for row in rows], ["a", "b", "c", "d"], rows)
    assert "2+1=" in str(info.value) and "0+1=" not in str(info.value)


def reward_model(folder: Path, num_labels: int = 1, pad_token: str | None = "<|pad|>") -> Path:
    """A small classifier with the tiny tokenizer, saved by transformers itself."""
    tokenizer = sft.tiny_tokenizer()
    tokenizer.pad_token = pad_token
    config = transformers.Qwen3Config(
        vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_labels=num_labels, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    transformers.Qwen3ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@SAMPLED
@pytest.mark.parametrize(
    ("model", "words"), [({"num_labels": 2}, ["2 labels"]), ({"pad_token": None}, ["pad_token"])], ids=str
)
def test_a_classifier_that_is_no_reward_model(name, model, words, data, tiny_folder, tmp_path):
    """Two labels give no single score; without a pad token transformers could not find the last token."""
    folder = reward_model(tmp_path / "reward", **model)
    wanted = settings(name, data, tiny_folder, tmp_path / "out", reward=(str(folder),))
    refused(name, wanted, "--reward", *words)


@SAMPLED
def test_a_reward_model_that_cannot_hold_prompt_and_completion(name, data, tiny_folder, tmp_path):
    """Its window is compared with --max-prompt-length plus --max-new-tokens, 64 + 8, before anything is sampled."""
    folder = reward_model(tmp_path / "reward")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 71}
    (folder / "config.json").write_text(json.dumps(config))
    wanted = settings(name, data, tiny_folder, tmp_path / "out", reward=(str(folder),))
    refused(name, wanted, "--reward", "71", "72", "--max-")


@SAMPLED
def test_a_reward_model_without_its_head(name, data, tiny_folder, tmp_path):
    """A language model's folder, which has no score weights, is refused: its head would be random."""
    config = transformers.AutoConfig.from_pretrained(tiny_folder, num_labels=1)
    folder = shutil.copytree(tiny_folder, tmp_path / "reward")
    config.save_pretrained(folder)
    wanted = settings(name, data, tiny_folder, tmp_path / "out", reward=(str(folder),))
    refused(name, wanted, "--reward", "score")


# -------------------------------------------------------------------------------------------------------- output folder


@pytest.fixture(scope="module")
def runs(data, tiny_folder, tmp_path_factory):
    """A finished run of each script: name -> (settings, folder). Tests work on copies of them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    finished = {}
    for name, script in SCRIPTS.items():
        folder = tmp_path_factory.mktemp("runs") / name
        wanted = settings(name, data, tiny_folder, folder)
        script.main(script.Args(**wanted))
        finished[name] = wanted, folder
    for number, handler in before.items():
        signal.signal(number, handler)
    return finished


@pytest.fixture
def unfinished(runs, tmp_path):
    """name -> (settings, folder): a copy of the run as a kill right after the checkpoint of step 2 leaves it."""

    def copy_of(name: str) -> tuple[dict, Path]:
        wanted, folder = runs[name]
        copy = shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("step-4"))
        for file in copy.iterdir():
            if file.name not in ("args.json", "metrics.jsonl", "samples.jsonl", "checkpoints"):
                file.unlink()
        record = json.loads((copy / "args.json").read_text())
        del record["finished"]
        (copy / "args.json").write_text(json.dumps(record))
        return {**wanted, "out": str(copy)}, copy

    return copy_of


@ALL
def test_a_folder_that_holds_a_run(name, runs):
    """Without --resume or --overwrite a run's folder is left alone; the message names both flags."""
    refused(name, runs[name][0], "--out", "--resume", "--overwrite")


@ALL
def test_resume_and_overwrite_together(name, runs):
    """They contradict each other."""
    refused(name, {**runs[name][0], "resume": True, "overwrite": True}, "--resume", "--overwrite")


@ALL
@pytest.mark.parametrize("changes", [{}, {"overwrite": True}, {"resume": True}], ids=str)
def test_the_folder_of_the_model_is_not_written_to(name, changes, data, tiny_folder, runs, tmp_path):
    """--out may be no folder that the run reads: the model's, by whatever spelling, a run's final model included."""
    for source in (tiny_folder, runs["sft"][1]):
        model = shutil.copytree(source, tmp_path / Path(source).name)
        wanted = settings(name, data, tiny_folder, model, model=f"{model.parent}/./{model.name}", **changes)
        refused(name, wanted, "--out")


@ALL
def test_a_checkpoint_inside_the_output_folder_is_not_overwritten_while_it_is_read(name, data, tiny_folder, unfinished):
    """--overwrite would remove the checkpoint that --model names."""
    folder = unfinished("sft")[1]
    wanted = settings(name, data, tiny_folder, folder, model=str(folder / "checkpoints" / "step-2"), overwrite=True)
    refused(name, wanted, "--out")


@ALL
def test_data_inside_the_output_folder_is_not_removed(name, data, tiny_folder, unfinished):
    """--overwrite would remove the samples of the run before, from which --dataset reads."""
    folder = unfinished("sft")[1]
    own = shutil.copy(data / "good.jsonl", folder / "samples.jsonl")
    for flag in ("dataset", "eval_dataset"):
        wanted = {**settings(name, data, tiny_folder, folder, overwrite=True), flag: str(own)}
        refused(name, wanted, "--out", "reads")


@pytest.mark.parametrize(
    ("name", "flag"), [("grpo", "reward"), ("ppo", "reward"), ("ppo", "value_model"), ("dpo", "reference")]
)
@pytest.mark.parametrize("changes", [{}, {"overwrite": True}], ids=str)
def test_the_folders_of_other_models_are_not_written_to(name, flag, changes, data, tiny_folder, tmp_path):
    """The same holds for --reward, --value-model and --reference."""
    folder = tmp_path / "read"
    if flag == "reference":
        shutil.copytree(tiny_folder, folder)
    else:
        reward_model(folder)
    wanted = settings(name, data, tiny_folder, folder, **changes)
    wanted[flag] = (str(folder),) if flag == "reward" else str(folder)
    refused(name, wanted, "--out", "reads")


@ALL
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        ["config.json", "model.safetensors", "tokenizer.json"],
        ["model.safetensors"],
        ["tokenizer.json"],
        ["metrics.jsonl"],
        ["samples.jsonl"],
        ["args.json", "config.json", "model.safetensors"],
        ["args.json"],
    ],
    ids=str,
)
def test_files_that_no_run_wrote_are_not_touched(name, files, overwrite, data, tiny_folder, tmp_path):
    """A folder with files of the same names from elsewhere, another program's args.json among them, is refused with and
    without --overwrite."""
    out = tmp_path / "out"
    out.mkdir()
    for file in files:
        content = json.dumps({"train_type": "lora"}) if file == "args.json" else "the user's own"
        (out / file).write_text(content)
    refused(name, settings(name, data, tiny_folder, out, overwrite=overwrite), "--out")


@ALL
def test_an_output_folder_that_is_a_file(name, data, tiny_folder, tmp_path):
    """A file in the place of the folder is refused before the run, and stays."""
    (tmp_path / "out").write_text("a file")
    refused(name, settings(name, data, tiny_folder, tmp_path / "out"), "--out")


@ALL
def test_other_files_in_the_output_folder_do_no_harm(name, data, tiny_folder, tmp_path):
    """Notes and plots of the user's own may lie in the folder of a new run, and stay."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    SCRIPTS[name].main(SCRIPTS[name].Args(**settings(name, data, tiny_folder, out, steps=1)))
    assert (out / "notes.txt").read_text() == "mine"


# --------------------------------------------------------------------------------------------------------------- resume

CHANGED = [
    ("all", "seed", 1),
    ("all", "lr", 1e-4),
    ("all", "lr_schedule", "constant"),
    ("all", "steps", 6),
    ("all", "warmup_steps", 2),
    ("all", "adam_beta2", 0.9),
    ("all", "max_grad_norm", 0.5),
    ("all", "max_new_tokens", 6),
    ("all", "system_prompt", "Add."),
    ("all", "eval_size", 6),
    ("sft rm dpo", "batch_size", 2),
    ("sft rm dpo", "max_length", 100),
    ("ppo grpo", "prompts_per_step", 2),
    ("ppo grpo", "group_size", 4),
    ("ppo grpo", "kl_coef", 0.0),
    ("ppo grpo", "temperature", 0.9),
    ("ppo grpo", "num_epochs", 3),
    ("ppo grpo", "missing_eos_penalty", 0.5),
    ("ppo grpo", "is_cap", 2.0),
    ("ppo grpo", "reward", ("format",)),
    ("rm", "center_coef", 0.1),
    ("dpo", "beta", 0.2),
    ("dpo", "label_smoothing", 0.2),
    ("ppo", "num_minibatches", 4),
    ("ppo", "value_clip_eps", 0.1),
    ("ppo", "gamma", 0.9),
    ("ppo", "lam", 0.5),
    ("ppo", "vf_coef", 0.5),
    ("ppo", "value_lr", 1e-4),
]
CHANGED = [
    (name, flag, value)
    for who, flag, value in CHANGED
    for name, script in SCRIPTS.items()
    if name in who.split() or (who == "all" and flag in script.Args.__dataclass_fields__)
]


@pytest.mark.parametrize(("name", "flag", "value"), CHANGED)
def test_a_changed_setting_that_changes_the_result_is_refused(name, flag, value, unfinished):
    """The message names the flag."""
    refused(name, {**unfinished(name)[0], "resume": True, flag: value}, "--resume", "--" + flag.replace("_", "-"))


@ALL
def test_another_dataset_or_model_is_refused(name, unfinished, data, tiny_folder, tmp_path):
    """What the run reads belongs to what changes the result."""
    shutil.copy(data / "good.jsonl", tmp_path / "other.jsonl")
    shutil.copytree(tiny_folder, tmp_path / "model")
    others = [("dataset", "other.jsonl"), ("eval_dataset", "other.jsonl"), ("model", "model")]
    others += {"ppo": [("value_model", "model")], "dpo": [("reference", "model")]}.get(name, [])
    before = unfinished(name)[0]
    for flag, value in others:
        wanted = {**before, "resume": True, flag: str(tmp_path / value)}
        refused(name, wanted, "--resume", "--" + flag.replace("_", "-"))


@ALL
def test_settings_that_cannot_change_the_result_are_free(name, unfinished, runs):
    """Saving, sampling for show and the number format of the export may change on --resume; the weights come out the
    same, here in bfloat16."""
    wanted, folder = unfinished(name)
    free = {"save_every": 3, "sample_every": 1, "save_dtype": "bfloat16", "wandb_project": "another"}
    SCRIPTS[name].main(SCRIPTS[name].Args(**{**wanted, **free, "resume": True}))
    classifier = transformers.AutoModelForSequenceClassification
    loader = classifier if name == "rm" else transformers.AutoModelForCausalLM
    final = loader.from_pretrained(folder, dtype="auto")
    straight = loader.from_pretrained(runs[name][1], dtype=torch.bfloat16)
    assert final.dtype == torch.bfloat16
    for key, value in straight.state_dict().items():
        assert torch.equal(value, final.state_dict()[key]), key


@pytest.mark.parametrize(("name", "steps"), [("sft", 1), *((name, 3) for name in SCRIPTS)])
def test_fewer_steps_than_were_done_are_refused(name, steps, data, tiny_folder, tmp_path):
    """Under a constant schedule `steps` is free to grow, not to fall below the steps that a checkpoint holds."""
    wanted = settings(name, data, tiny_folder, tmp_path / "out", lr_schedule="constant")
    SCRIPTS[name].main(SCRIPTS[name].Args(**wanted))
    refused(name, {**wanted, "resume": True, "steps": steps}, "--steps")


def truncate(path: Path):
    """Cuts a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BROKEN = [
    ("checkpoints/step-2/model.safetensors", "half"),
    ("checkpoints/step-2/model.safetensors", "missing"),
    ("checkpoints/step-2/state.pt", "half"),
    ("checkpoints/step-2/state.pt", "missing"),
    ("checkpoints/step-2/state.pt", "garbage"),
    ("checkpoints/step-2/config.json", "garbage"),
    ("args.json", "garbage"),
    ("args.json", "half"),
    ("args.json", "other"),
    ("metrics.jsonl", "garbage"),
    ("samples.jsonl", "garbage"),
]
BROKEN = [(name, *fault) for name in SCRIPTS for fault in BROKEN]
BROKEN += [
    ("ppo", f"checkpoints/step-2/value_model/{file}", "missing") for file in ("model.safetensors", "config.json")
]
BROKEN += [("ppo", "checkpoints/step-2/value_model/model.safetensors", "half")]


@pytest.mark.parametrize(("name", "file", "content"), BROKEN)
def test_a_broken_run_says_which_file_is_broken(name, file, content, unfinished):
    """A torn, missing or overwritten file of a checkpoint or of the records ends --resume with the file's name."""
    wanted, folder = unfinished(name)
    path = folder / file
    if content == "half":
        truncate(path)
    elif content == "missing":
        path.unlink()
    elif content == "other":
        path.write_text('{"train_type": "lora"}')
    else:
        path.write_text("garbage\n" + (path.read_text() if path.suffix == ".jsonl" else ""))
    place = "/".join(Path(file).parts[:2])  # the checkpoint's folder, or the file
    refused(name, {**wanted, "resume": True}, place)


@ALL
def test_a_torn_last_line_is_mended_in_silence(name, unfinished, runs):
    """A kill in the middle of a write tears the last line of metrics.jsonl or samples.jsonl: --resume drops it and the
    records come out as if nothing had happened."""
    wanted, folder = unfinished(name)
    for file in ("metrics.jsonl", "samples.jsonl"):
        text = (folder / file).read_text()
        kept = [line for line in text.splitlines(keepends=True) if json.loads(line)["step"] <= 3]
        (folder / file).write_text("".join(kept) + '{"step": 4, "loss": 0.12')
    SCRIPTS[name].main(SCRIPTS[name].Args(**{**wanted, "resume": True}))
    assert timeless(folder / "metrics.jsonl") == timeless(runs[name][1] / "metrics.jsonl")
    assert (folder / "samples.jsonl").read_text() == (runs[name][1] / "samples.jsonl").read_text()


def timeless(path: Path) -> list[dict]:
    """The rows of metrics.jsonl without what the clock decides."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


# ----------------------------------------------------------------------------------------------------------------- help


@ALL
def test_help_describes_every_flag(name, monkeypatch, capsys):
    """`--help` exits with 0 and shows every field of Args with its description; of sft.py from the command line."""
    environment = {"COLUMNS": "400", "NO_COLOR": "1"}
    if name == "sft":
        command = [sys.executable, str(ROOT / f"{name}.py"), "--help"]
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
        assert result.returncode == 0, result.stderr
        text = result.stdout
    else:
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        with pytest.raises(SystemExit) as info:
            sft.tyro.cli(SCRIPTS[name].Args, args=["--help"])
        assert info.value.code == 0
        text = capsys.readouterr().out
    text = " ".join(text.replace("│", " ").split())
    source = (ROOT / f"{name}.py").read_text().partition("class Args")[2].partition("__post_init__")[0]
    described = dict(re.findall(r'^    (\w+): .*\n    """(.+?)"""', source, flags=re.M))
    fields = list(SCRIPTS[name].Args.__dataclass_fields__)
    assert set(described) == set(fields)
    for field in fields:
        assert "--" + field.replace("_", "-") in text
        assert " ".join(described[field].split()) in text, field


@ALL
@pytest.mark.parametrize("flags", [["--no-such-flag", "1"], ["--lr", "fast"], ["--lr-schedule", "square"]], ids=str)
def test_an_unknown_flag_or_value_names_the_flag(name, flags, capsys):
    """What the command line cannot mean ends with the flag's name."""
    with pytest.raises(SystemExit) as info:
        sft.tyro.cli(SCRIPTS[name].Args, args=flags)
    assert info.value.code not in (0, None)
    captured = capsys.readouterr()
    assert flags[0] in captured.out + captured.err
