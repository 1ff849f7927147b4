"""Several processes under torchrun give the run that one gives: two gloo ranks on the CPU, for every script."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

import dpo
import grpo
import ppo
import rm
import sft

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"sft": sft, "rm": rm, "ppo": ppo, "grpo": grpo, "dpo": dpo}
ALL = pytest.mark.parametrize("name", list(SCRIPTS))
LR = 1e-3
REWARDS = """
import os

def letters(prompts, completions, rows):
    with open(os.environ["CALLS"], "a") as file:
        file.write("called\\n")
    return [len(set(completion)) / 8 for completion in completions]
"""


# ------------------------------------------------------------------------------------------------- which rank does what


def shares(monkeypatch, widths: list[int], max_tokens: int, num_ranks: int) -> list[list[list[int]]]:
    """What `micro_batch_rows` gives each of `num_ranks` ranks."""
    monkeypatch.setattr(grpo, "WORLD_SIZE", num_ranks)
    found = []
    for rank in range(num_ranks):
        monkeypatch.setattr(grpo, "RANK", rank)
        found.append(grpo.micro_batch_rows(widths, max_tokens))
    return found


def test_one_rank_packs_the_widest_rows_first(monkeypatch):
    """Widths 3 9 4 2 4 with 10 tokens: the row of 9 alone, two of 4 (8), then 3 and 2 (2 * 3 = 6). Eleven is too wide
    for ten and comes alone."""
    assert shares(monkeypatch, [3, 9, 4, 2, 4], 10, 1) == [[[1], [2, 4], [0, 3]]]
    assert shares(monkeypatch, [5, 11, 5], 10, 1) == [[[1], [0, 2]]]


def test_a_number_of_micro_batches_that_does_not_divide_is_made_to(monkeypatch):
    """Widths 9 2 8 2, ten tokens: 9 and 8 alone, the two of 2 together. Two ranks take turns, so three micro-batches
    become four: the pair is split. Three ranks take one each."""
    assert shares(monkeypatch, [9, 2, 8, 2], 10, 2) == [[[0], [1]], [[2], [3]]]
    assert shares(monkeypatch, [9, 2, 8, 2], 10, 3) == [[[0]], [[2]], [[1, 3]]]


def test_single_rows_that_do_not_divide_among_the_ranks_are_joined(monkeypatch):
    """Three rows that only fit one by one, two ranks: one takes two at once. Of seven rows three of four ranks do."""
    assert shares(monkeypatch, [10, 10, 10], 10, 2) == [[[0, 2]], [[1]]]
    assert shares(monkeypatch, [10] * 7, 10, 4) == [[[0, 4]], [[1, 5]], [[2, 6]], [[3]]]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
def test_every_row_has_one_rank_and_all_ranks_have_as_many_micro_batches(num_ranks, monkeypatch):
    """Over many draws of widths: each row once, equal numbers, and within the budget but for a single row (or the two
    rows that could not be divided)."""
    generator = torch.Generator().manual_seed(num_ranks)
    for _ in range(200):
        num_rows, max_tokens = (int(torch.randint(low, 40, (), generator=generator)) for low in (num_ranks, 1))
        widths = torch.randint(1, 30, (num_rows,), generator=generator).tolist()
        found = shares(monkeypatch, widths, max_tokens, num_ranks)
        assert sorted(i for rank in found for batch in rank for i in batch) == list(range(num_rows))
        assert len({len(rank) for rank in found}) == 1 and all(batch for rank in found for batch in rank)
        for batch in [batch for rank in found for batch in rank]:
            width = max(widths[i] for i in batch)
            assert widths[batch[0]] == width
            spare = 2 if num_rows % num_ranks else 1
            assert width * len(batch) <= max_tokens or len(batch) <= spare


def test_fewer_rows_than_ranks_end_a_training_step_and_are_repeated_elsewhere(monkeypatch):
    """A gradient would count a row twice; a score that is only written does no harm."""
    with pytest.raises(SystemExit, match="2 rows for 3 processes"):
        shares(monkeypatch, [4, 5], 10, 3)
    with torch.no_grad():
        assert shares(monkeypatch, [4, 5], 5, 3) == [[[1]], [[0]], [[1]]]


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As each rank has: then only the number of ranks differs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with 40 rows of the built-in task, a reward, a small language model and a small reward model."""
    folder = tmp_path_factory.mktemp("data")
    rows = sft.arithmetic_rows("train", 40)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    config = Qwen3Config(
        vocab_size=261, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=4096, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    for name, architecture in (("small", Qwen3ForCausalLM), ("reward", Qwen3ForSequenceClassification)):
        model = architecture(config)
        if name == "reward":
            torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(folder / name)
        sft.tiny_tokenizer().save_pretrained(folder / name)
    return folder


def settings(name: str, data: Path, out: Path, **changes) -> dict:
    """Steps with a constant learning rate, in small micro-batches, whose number would differ between two ranks."""
    same = {"dataset": f"{data}/rows.jsonl", "out": str(out), "model": f"{data}/small", "eval_size": 7, "lr": LR}
    same |= {"eval_every": 1, "save_every": 1, "sample_every": 1, "warmup_steps": 0, "lr_schedule": "constant"}
    same |= {"micro_batch_tokens": 90}
    offline = {"batch_size": 6, "max_length": 200}
    online = {"prompts_per_step": 3, "max_prompt_length": 64, "max_new_tokens": 8, "num_epochs": 2, "sft_coef": 0.1}
    online |= {"sft_dataset": f"{data}/rows.jsonl", "reward": (f"{data}/rewards.py:letters", f"{data}/reward")}
    own = {
        "sft": {**offline, "max_new_tokens": 8},
        "rm": offline,
        "dpo": {**offline, "max_new_tokens": 8},
        "grpo": {**online, "group_size": 3, "rollout_batch_size": 6},
        "ppo": {**online, "prompts_per_step": 6, "group_size": 1, "num_minibatches": 2, "value_lr": LR},
    }
    return {**same, **own[name], **changes}


def command(name: str, wanted: dict, num_ranks: int) -> list[str]:
    """The command line of these settings: torchrun for more than one rank."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    words = [sys.executable, *(torchrun if num_ranks > 1 else []), str(ROOT / f"{name}.py")]
    for key, value in wanted.items():
        flag = "--" + key.replace("_", "-")
        words += [flag] if value is True else [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def environment(out: Path) -> dict:
    """One thread for each rank; the reward function notes its calls beside the output folder."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CALLS": str(out) + ".calls"}


@contextlib.contextmanager
def started(name: str, num_ranks: int, wanted: dict):
    """The running process of these settings, its output a pipe; whatever happens, nothing of it outlives the test."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment(wanted["out"])}
    process = subprocess.Popen(command(name, wanted, num_ranks), **options)
    timer = threading.Timer(200, process.terminate)  # which makes torchrun end its ranks
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        process.terminate()
        process.wait(60)


def run_here(name: str, wanted: dict):
    """One run of one rank in this process, which saves a start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALLS", environment(wanted["out"])["CALLS"])
        SCRIPTS[name].main(SCRIPTS[name].Args(**wanted))


def run(name: str, num_ranks: int, wanted: dict) -> str:
    """One run from the command line; what it prints."""
    with started(name, num_ranks, wanted) as process:
        printed = process.communicate()[0]
    assert process.returncode == 0, printed
    return printed


def rows_of(log: Path) -> list[dict]:
    """The rows of a log without what the clock decides."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def gradient(folder: Path, optimizer: str) -> torch.Tensor:
    """The gradient of the first update: Adam's mean of it is then a tenth of it."""
    state = torch.load(folder / "state.pt", weights_only=True)[optimizer]["state"]
    return torch.cat([10 * state[i]["exp_avg"].flatten() for i in sorted(state)])


def assert_close(out: Path, straight: Path):
    """After the same steps: texts equal, numbers to 1e-3, no weight further apart than a tenth of the learning rate."""
    for log in ("metrics.jsonl", "samples.jsonl"):
        ours, theirs = rows_of(out / log), rows_of(straight / log)
        assert len(ours) == len(theirs)
        for row, expected in zip(ours, theirs):
            assert row.keys() == expected.keys()
            for key, value in row.items():
                close = value if isinstance(value, str | None) else pytest.approx(value, rel=1e-3, abs=2e-4)
                assert expected[key] == close, f"{key} of step {row['step']}"
    for file in straight.rglob("model.safetensors"):
        ours, theirs = load_file(out / file.relative_to(straight)), load_file(file)
        assert ours.keys() == theirs.keys()
        for key, x in ours.items():
            assert (x - theirs[key]).abs().max() < 0.1 * LR, f"{key} of {file}"


@ALL
def test_two_ranks_give_the_run_of_one(name, data, tmp_path):
    """The first gradient to 1e-5 of its norm. A run that two ranks begin and one goes on with, and one the other way
    round, end like a run that one rank does alone; its folder loads as any other."""
    one, two, alone = (tmp_path / f"{name}-{x}" for x in ("one", "two", "alone"))
    first = {"steps": 1, **({"num_epochs": 1, "num_minibatches": 1} if name == "ppo" else {})}
    first |= {"num_epochs": 1} if name == "grpo" else {}
    run_here(name, settings(name, data, one, **first))
    printed = run(name, 2, settings(name, data, two, **first))
    assert printed.count("wrote ") == 1 and "step 1/1" in printed
    for optimizer in ("optimizer", "value_optimizer") if name == "ppo" else ("optimizer",):
        ours, theirs = (gradient(out / "checkpoints" / "step-1", optimizer) for out in (two, one))
        assert theirs.norm() > 1e-3 and (ours - theirs).norm() < 1e-5 * theirs.norm()
    if name in ("ppo", "grpo"):  # a function of the user's own is called by one rank alone
        assert Path(f"{two}.calls").read_text() == Path(f"{one}.calls").read_text()
    rest = {**first, "steps": 3}
    run(name, 1, settings(name, data, alone, **rest))
    run_here(name, settings(name, data, two, resume=True, **rest))
    run(name, 2, settings(name, data, one, resume=True, **rest))
    assert_close(one, alone)
    assert_close(two, alone)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler here")
def test_two_ranks_that_compile_give_the_run_of_one_that_does_not(data, tmp_path):
    """Layers are compiled first and sharded then; of the copy that samples, which is whole, norms and MLPs are."""
    one, two = tmp_path / "one", tmp_path / "two"
    run_here("sft", settings("sft", data, one, steps=2))
    printed = run("sft", 2, settings("sft", data, two, steps=2, compile=True))
    assert "recompile_limit" not in printed
    assert_close(two, one)


def test_several_epochs_and_minibatches_on_two_ranks(data, tmp_path):
    """ppo.py with two epochs of two minibatches, an importance weight and a bound on the KL between updates."""
    changes = {"steps": 2, "is_cap": 2.0, "target_kl": 0.5}
    run_here("ppo", settings("ppo", data, tmp_path / "1", **changes))
    run("ppo", 2, settings("ppo", data, tmp_path / "2", **changes))
    assert_close(tmp_path / "2", tmp_path / "1")


def test_a_killed_rank_ends_all_and_the_run_goes_on(data, tmp_path):
    """`kill -9` of one rank ends torchrun with an error within a minute; --resume then ends like an undisturbed run."""
    changes = {"steps": 8, "eval_every": 100}
    run("grpo", 2, settings("grpo", data, tmp_path / "alone", **changes))
    wanted = settings("grpo", data, tmp_path / "run", **changes)
    with started("grpo", 2, wanted) as process:
        for line in process.stdout:
            if line.startswith("step 2/"):
                children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
                os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
                killed = time.monotonic()
                break
        printed = process.communicate()[0]
        assert process.returncode not in (0, None) and time.monotonic() - killed < 60, printed
    assert re.search(r"SIGKILL|exitcode\s*:\s*-9", printed), printed
    assert len(rows_of(tmp_path / "run" / "metrics.jsonl")) < 9
    run("grpo", 2, {**wanted, "resume": True})
    assert_close(tmp_path / "run", tmp_path / "alone")


def test_a_signal_to_torchrun_finishes_the_step_and_saves(data, tmp_path):
    """SIGTERM to torchrun reaches both ranks, which agree on the step after which they save and end."""
    changes = {"steps": 2000, "eval_every": 10_000, "save_every": 10_000}
    wanted = settings("sft", data, tmp_path / "run", **changes)
    with started("sft", 2, wanted) as process:
        for line in process.stdout:
            if line.startswith("step 2/"):
                process.send_signal(signal.SIGTERM)
                break
        printed = process.communicate()[0]
    assert process.returncode != 0, printed
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert 2 <= step < 2000 and rows_of(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == step


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [(name, {}, "--batch-size" if name in ("sft", "rm", "dpo") else "--prompts-per-step") for name in SCRIPTS]
    + [("ppo", {"prompts_per_step": 16, "num_minibatches": 4}, "--num-minibatches")],
)
def test_too_few_rows_for_all_processes_are_refused_at_once(name, changes, word, monkeypatch):
    """Before anything is loaded or removed, by the flag to raise: eight processes, and a row fewer or four minibatches
    of four rows. With a row for each the settings stand."""
    few = changes or {"batch_size" if name in ("sft", "rm", "dpo") else "prompts_per_step": 7}
    few |= {"num_minibatches": 1} if name == "ppo" and not changes else {}
    monkeypatch.setattr(SCRIPTS[name], "WORLD_SIZE", 8)
    with pytest.raises(SystemExit, match=f"{word}.*8"):
        SCRIPTS[name].Args(**few)
    monkeypatch.setattr(SCRIPTS[name], "WORLD_SIZE", 4)
    SCRIPTS[name].Args(**few)
