"""A run that is killed at any moment and resumed ends like one that nobody disturbed, bit for bit.

Two ways to kill. Here a child process watches its own file operations inside the output folder and sends itself SIGKILL
in front of a chosen one, so that every moment between two writes can be hit, and hit again. With KILLS=10 in the
environment, `python sft.py` and the other scripts are killed ten times each from outside, at random times and as soon
as an unfinished checkpoint appears.

rm.py, dpo.py and ppo.py start from a model that is smaller than the tiny one, and are killed at fewer moments, to save
time; from outside all five are killed with the tiny model.
"""

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

import dpo
import grpo
import ppo
import rm
import sft

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"sft": sft, "rm": rm, "ppo": ppo, "grpo": grpo, "dpo": dpo}
KILLS = int(os.environ.get("KILLS", "0"))
ALL = pytest.mark.parametrize("name", list(SCRIPTS))
NEEDED = (Qwen2Tokenizer, Qwen3ForCausalLM)  # transformers loads its modules late: the fork server has them ready
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*SCRIPTS, "test_resume"])

REWARDS = """
def letters(prompts, completions, rows):
    return [len(set(completion)) / 8 for completion in completions]
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models run fastest on one thread; children fork from a server that finds the scripts on PYTHONPATH."""
    threads, path = torch.get_num_threads(), os.environ.get("PYTHONPATH")
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *([path] if path else [])])
    yield
    torch.set_num_threads(threads)
    del os.environ["PYTHONPATH"]
    if path is not None:
        os.environ["PYTHONPATH"] = path


@pytest.fixture(autouse=True)
def signal_handlers():
    """Leaves the handlers of the test process as they are, whatever a run does to them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with 40 rows of the built-in task, a reward that random completions differ in, a model that is smaller
    than the tiny one, and a reward model."""
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


def settings(name: str, data: Path, tiny_folder: str, out: Path, **changes) -> dict:
    """A run of 8 steps with checkpoints at 2, 4, 6, 8, samples at every step and evaluations at 0, 4, 8.

    The online scripts run with all that has a state or a draw of its own: two epochs, the reference, the SFT loss, and
    in ppo.py two minibatches and a value model that starts from a reward model.
    """
    same = {"dataset": f"{data}/rows.jsonl", "out": str(out), "steps": 8, "eval_size": 8, "eval_every": 4}
    same |= {"save_every": 2, "sample_every": 1, "warmup_steps": 3}
    online = {"prompts_per_step": 4, "max_prompt_length": 64, "max_new_tokens": 8, "num_epochs": 2, "sft_coef": 0.1}
    online |= {"sft_dataset": f"{data}/rows.jsonl"}
    rewards = (f"{data}/rewards.py:letters", f"{data}/reward")
    own = {
        "sft": {"batch_size": 4, "max_length": 200, "max_new_tokens": 8},
        "rm": {"model": f"{data}/small", "batch_size": 4, "max_length": 200},
        "dpo": {"model": f"{data}/small", "batch_size": 4, "max_length": 200, "max_new_tokens": 8},
        "grpo": {**online, "model": tiny_folder, "group_size": 2, "reward": rewards[:1]},
        "ppo": {**online, "model": f"{data}/small", "group_size": 1, "num_minibatches": 2, "reward": rewards},
    }
    return {**same, **own[name], **changes}


def operations(out: Path, log: list | None = None, kill_at: tuple[str, int] | None = None):
    """An audit hook that sees what this process does inside `out`: appends "write metrics.jsonl" and the like to `log`,
    or kills the process in front of the n-th operation that the pattern of kill_at = (pattern, n) finds."""
    verbs = {
        "open": "write",
        "os.rename": "rename",
        "os.remove": "remove",
        "os.mkdir": "mkdir",
        "shutil.rmtree": "remove",
    }
    count = 0

    def hook(event: str, details: tuple):
        nonlocal count
        if event not in verbs or not isinstance(details[0], (str, os.PathLike)):
            return
        if event == "open" and not (isinstance(details[1], str) and set(details[1]) & set("wax+")):
            return
        if event == "os.remove" and details[1] >= 0:  # a part of shutil.rmtree, relative to an open folder
            return
        path = os.path.abspath(details[0])
        if not path.startswith(f"{out}{os.sep}"):
            return
        operation = f"{verbs[event]} {os.path.relpath(path, out)}"
        if log is not None:
            log.append(operation)
        if kill_at and re.search(kill_at[0], operation):
            count += 1
            if count == kill_at[1]:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def child(
    name: str, wanted: dict, printed: str, log_file: str | None, kill_at: tuple[str, int] | None, as_main: bool = False
):
    """What a child process does: one run, its output in the file `printed`, its operations in `log_file`.

    as_main: as `python SCRIPT` does it, which is where signals are handled.
    """
    with open(printed, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    log: list[str] = []
    sys.addaudithook(operations(Path(wanted["out"]), log, kill_at))
    if as_main:
        SCRIPTS[name].__name__ = "__main__"
    SCRIPTS[name].main(SCRIPTS[name].Args(**wanted))
    if log_file:
        Path(log_file).write_text(json.dumps(log))
    sys.stdout.flush()


def launch(name: str, wanted: dict, log_file: Path | None = None, kill_at: tuple[str, int] | None = None) -> int:
    """Runs a script in a process of its own; the exit code, -9 if it was killed. Its output lies beside `out`."""
    printed = Path(wanted["out"]).with_suffix(".printed")
    process = CONTEXT.Process(target=child, args=(name, wanted, str(printed), log_file and str(log_file), kill_at))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def printed(wanted: dict) -> str:
    """What the runs of an output folder have printed so far."""
    return Path(wanted["out"]).with_suffix(".printed").read_text()


def timeless(path: Path) -> list[dict]:
    """The rows of metrics.jsonl without what the clock decides."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def equal(x, y) -> bool:
    """Whether two states of nested dicts and lists are equal, bit for bit."""
    if isinstance(x, torch.Tensor):
        return torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(equal(value, y[key]) for key, value in x.items())
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(equal, x, y))
    return x == y


def assert_same_run(folder: Path, straight: Path):
    """Weights, metrics, samples, tokenizer and the set of files are those of the undisturbed run; no row twice. In the
    last two checkpoints all weights (ppo.py has a value model too) and all states of the optimizers are the same."""
    for name in ("model.safetensors", "samples.jsonl", "config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (straight / name).read_bytes(), f"{name} differs"
    rows = timeless(folder / "metrics.jsonl")
    steps = [row["step"] for row in rows]
    assert steps == list(range(len(steps))), f"rows doubled or lost: {steps}"
    assert rows == timeless(straight / "metrics.jsonl")
    files = [sorted(str(path.relative_to(x)) for path in x.rglob("*")) for x in (folder, straight)]
    assert files[0] == files[1]
    for file in files[0]:
        if file.endswith(".safetensors"):
            assert (folder / file).read_bytes() == (straight / file).read_bytes(), f"{file} differs"
        elif file.endswith("state.pt"):
            states = [torch.load(x / file, weights_only=True) for x in (folder, straight)]
            assert equal(*states), f"{file} differs"


def auto_class(name: str):
    """The class that loads the final model of a script."""
    return AutoModelForSequenceClassification if name == "rm" else AutoModelForCausalLM


def snapshot(folder: Path) -> dict:
    """Every file below `folder` with its bytes and the time of its last change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def straight(data, tiny_folder, tmp_path_factory):
    """An undisturbed run of each script: name -> (folder, the file operations that it did)."""
    runs = {}
    for name in SCRIPTS:
        out = tmp_path_factory.mktemp("straight") / name
        wanted = settings(name, data, tiny_folder, out)
        assert launch(name, wanted, out.with_suffix(".log")) == 0, printed(wanted)
        runs[name] = out, json.loads(out.with_suffix(".log").read_text())
    return runs


# -------------------------------------------------------------------------------------------------------------- kill -9

MOMENTS = {
    "the folder has just been made": (r"^write ", 1),
    "before the settings are written": (r"^write args\.json", 1),
    "before the settings are renamed in": (r"^rename args\.json", 1),
    "before the first row": (r"^write metrics\.jsonl$", 1),
    "between the first evaluation and step 1": (r"^write metrics\.jsonl$", 2),
    "between the samples and the metrics of step 2": (r"^write metrics\.jsonl$", 3),
    "in the middle of the first save": (r"^write checkpoints/step-2\.tmp/tokenizer", 1),
    "before the first checkpoint is renamed in": (r"^rename checkpoints/step-2\.tmp", 1),
    "right after the first checkpoint": (r"^write samples\.jsonl$", 3),
    "while resuming, before the metrics are cut back": (r"^rename metrics\.jsonl\.tmp", 1),
    "between two checkpoints": (r"^write metrics\.jsonl$", 2),
    "in the middle of the second save": (r"^write checkpoints/step-4\.tmp/", 2),
    "before the oldest checkpoint goes": (r"^rename checkpoints/step-2$", 1),
    "while the oldest checkpoint goes": (r"^remove checkpoints/step-", 1),
    "right after the last checkpoint": (r"checkpoints/final\.tmp", 1),
    "in the middle of the final save": (r"^write checkpoints/final\.tmp/tokenizer", 1),
    "while the final files are renamed in": (r"^rename checkpoints/final\.tmp/", 3),
    "before the run is marked as finished": (r"^rename args\.json", 2),
}
CHOSEN = [  # rm.py, dpo.py and ppo.py have the plumbing of the other two: what each saves itself is what matters
    "between the first evaluation and step 1",
    "in the middle of the first save",
    "before the first checkpoint is renamed in",
    "between two checkpoints",
    "in the middle of the second save",
    "while the oldest checkpoint goes",
    "in the middle of the final save",
    "while the final files are renamed in",
]
VALUE_MODEL = {"between the policy and the value model of a save": (r"^write checkpoints/step-4\.tmp/value_model/", 1)}


def moments_of(name: str) -> dict[str, tuple[str, int]]:
    """The moments at which a script is killed, in the order of a run; ppo.py saves two models."""
    if name in ("sft", "grpo"):
        return MOMENTS
    moments = {}
    for moment in CHOSEN:
        if name == "ppo" and moment == "in the middle of the second save":
            moments |= VALUE_MODEL
        moments[moment] = MOMENTS[moment]
    return moments


@ALL
def test_a_run_killed_at_every_kind_of_moment_ends_like_an_undisturbed_one(name, straight, data, tiny_folder, tmp_path):
    """One run, killed and resumed at each of these moments in turn: before its first checkpoint, during saves, between
    them, during a resume and during the final save."""
    wanted = {**settings(name, data, tiny_folder, tmp_path / "run"), "resume": True}
    for moment, kill_at in moments_of(name).items():
        code = launch(name, wanted, kill_at=kill_at)
        assert code == -9, f"{moment}: exit code {code}\n{printed(wanted)}"
    assert launch(name, wanted) == 0, printed(wanted)
    assert_same_run(tmp_path / "run", straight[name][0])


@pytest.mark.parametrize(
    ("name", "draw"), [("sft", 0), ("sft", 1), ("grpo", 0), ("grpo", 1), ("rm", 0), ("dpo", 0), ("ppo", 0)]
)
def test_a_run_killed_at_a_random_file_operation_ends_like_an_undisturbed_one(
    name, draw, straight, data, tiny_folder, tmp_path
):
    """A moment between any two file operations, drawn from those that an undisturbed run does."""
    folder, log = straight[name]
    position = random.Random(f"{name} {draw}").randrange(len(log))
    wanted = settings(name, data, tiny_folder, tmp_path / "run")
    assert launch(name, wanted, kill_at=("", position + 1)) == -9, log[position]
    assert launch(name, {**wanted, "resume": True}) == 0, f"after a kill before {log[position]}\n{printed(wanted)}"
    assert_same_run(tmp_path / "run", folder)


@ALL
def test_a_final_model_that_is_not_whole_has_no_config(name, data, tiny_folder, tmp_path):
    """config.json comes last: a run that is killed while its final files are renamed in leaves a folder that does not
    pass for a model, and right after that one that does."""
    wanted = settings(name, data, tiny_folder, tmp_path / "run", steps=1)
    assert launch(name, wanted, kill_at=(r"^rename checkpoints/final\.tmp/config\.json", 1)) == -9
    assert (tmp_path / "run" / "model.safetensors").exists() and (tmp_path / "run" / "tokenizer.json").exists()
    assert not (tmp_path / "run" / "config.json").exists()
    assert launch(name, {**wanted, "resume": True}, kill_at=(r"^write args\.json", 2)) == -9
    auto_class(name).from_pretrained(tmp_path / "run")
    AutoTokenizer.from_pretrained(tmp_path / "run")


def command(name: str, wanted: dict) -> list[str]:
    """The command line of these settings."""
    words = [sys.executable, str(ROOT / f"{name}.py")]
    for key, value in wanted.items():
        flag = "--" + key.replace("_", "-")
        words += [flag] if value is True else [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


@pytest.mark.skipif(not KILLS, reason="KILLS=10 in the environment kills each script ten times from outside")
@ALL
def test_killed_from_outside_at_random_times(name, data, tiny_folder, tmp_path):
    """`kill -9` of `python SCRIPT`: in turn while a checkpoint is being written, at a random time of the training, and
    at a random time of the whole. One run is killed KILLS times, resumed each time, and ends like the undisturbed."""
    changes = {"steps": 60, "save_every": 3, "eval_every": 30, "lr_schedule": "constant"}
    changes |= {} if name == "sft" else {"model": tiny_folder}
    wanted = settings(name, data, tiny_folder, tmp_path / "straight", **changes)
    rng, moments = random.Random(name), []
    start = time.time()
    subprocess.run(command(name, wanted), check=True, capture_output=True)
    whole = time.time() - start
    rows = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    training = sum(row.get("time/step_s", 0.0) for row in rows)
    wanted = {**wanted, "out": str(tmp_path / "run"), "resume": True}
    folders, settings_file = tmp_path / "run" / "checkpoints", tmp_path / "run" / "args.json"
    while len(moments) < KILLS:
        kind, start, begun = len(moments) % 3, time.time(), None
        delay = rng.uniform(0, training if kind == 1 else whole)
        process = subprocess.Popen(command(name, wanted), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None:
            now = time.time()
            with contextlib.suppress(FileNotFoundError):  # folders come and go
                if begun is None and settings_file.stat().st_mtime > start:
                    begun = now
                if kind == 0 and any(path.stat().st_mtime > start for path in folders.glob("step-*.tmp")):
                    break
            if (kind == 1 and begun and now - begun > delay) or (kind == 2 and now - start > delay):
                break
            time.sleep(0.0005)
        process.kill()
        output = process.communicate()[0].decode()
        if process.returncode == 0:  # it was quicker: start anew
            assert_same_run(tmp_path / "run", tmp_path / "straight")
            shutil.rmtree(tmp_path / "run")
            continue
        assert process.returncode == -9, output
        saved = sorted(path.name for path in folders.glob("*"))
        moments.append(f"{name}: after {time.time() - start:.1f} s, training begun: {begun is not None}, {saved}")
    subprocess.run(command(name, wanted), check=True, capture_output=True)
    print(*moments, sep="\n")
    assert_same_run(tmp_path / "run", tmp_path / "straight")


# -------------------------------------------------------------------------------------------------------------- signals


SIGNALS = [
    ("sft", signal.SIGTERM, 143),
    ("rm", signal.SIGINT, 130),
    ("ppo", signal.SIGTERM, 143),
    ("grpo", signal.SIGINT, 130),
    ("dpo", signal.SIGINT, 130),
]


@pytest.mark.parametrize(("name", "number", "code"), SIGNALS)
def test_a_signal_finishes_the_step_and_saves(name, number, code, data, tiny_folder, tmp_path):
    """SIGTERM and Ctrl-C end the run after its step, with a checkpoint of that step and exit codes 143 and 130;
    resumed, it equals an undisturbed run. (sft.py runs from the command line, the others in a fork of this process
    that takes them for the main module.)"""
    changes = {"steps": 5000, "lr_schedule": "constant", "save_every": 1000, "eval_every": 1000, "sample_every": 3}
    wanted = settings(name, data, tiny_folder, tmp_path / "run", **changes)
    if name == "sft":
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command(name, wanted), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        for line in process.stdout:
            if line.startswith("step 2/"):
                process.send_signal(number)
                break
        rest, exit_code = process.communicate(timeout=60)[0], process.returncode
    else:
        file, start = (tmp_path / "run").with_suffix(".printed"), time.time()
        process = CONTEXT.Process(target=child, args=(name, wanted, str(file), None, None, True))
        process.start()
        while not (file.exists() and "\nstep 2/" in file.read_text()):
            assert process.exitcode is None and time.time() - start < 60, printed(wanted)
            time.sleep(0.005)
        os.kill(process.pid, number)
        process.join(60)
        rest, exit_code = printed(wanted), process.exitcode
    assert exit_code == code, rest
    assert "--resume" in rest and "Traceback" not in rest
    last = timeless(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert 2 <= last < 5000
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{last}"]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    changes |= {"steps": last + 2}
    assert launch(name, settings(name, data, tiny_folder, tmp_path / "run", **changes, resume=True)) == 0
    assert launch(name, settings(name, data, tiny_folder, tmp_path / "straight", **changes)) == 0
    for file in ("model.safetensors", "samples.jsonl"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()
    assert timeless(tmp_path / "run" / "metrics.jsonl") == timeless(tmp_path / "straight" / "metrics.jsonl")


# ---------------------------------------------------------------------------------------------------- resume, overwrite


@ALL
def test_a_finished_run_says_so_and_changes_nothing(name, straight, data, tiny_folder, capsys):
    """--resume of a finished run returns what the run had returned, says that it is finished, and touches no file."""
    out = straight[name][0]
    before = snapshot(out)
    metrics = SCRIPTS[name].main(SCRIPTS[name].Args(**settings(name, data, tiny_folder, out), resume=True))
    assert "finished" in capsys.readouterr().out
    assert snapshot(out) == before
    rows = timeless(out / "metrics.jsonl")
    key = "margin" if name in ("rm", "dpo") else "reward_sampled" if name in ("ppo", "grpo") else "loss"
    assert metrics["step"] == 8 and metrics[f"eval/{key}"] == rows[-1][f"eval/{key}"]
    assert metrics[f"before/{key}"] == rows[0][f"eval/{key}"] != metrics[f"eval/{key}"]


@pytest.mark.parametrize("name", ["sft"])  # the others are killed at every kind of moment from such a start
def test_resume_without_a_run_starts_one(name, straight, data, tiny_folder, tmp_path):
    """So that a job may always be started with --resume."""
    assert launch(name, settings(name, data, tiny_folder, tmp_path / "run", resume=True)) == 0
    assert_same_run(tmp_path / "run", straight[name][0])


@ALL
def test_more_steps_under_a_constant_schedule_equal_a_longer_run(name, data, tiny_folder, tmp_path):
    """A finished run of 4 steps that is resumed to 8 has the weights and rows of a run of 8; killed on its way there
    and resumed once more, too. Step 4 is an evaluation step of both."""
    changes = {"lr_schedule": "constant", "model": "tiny" if name == "sft" else f"{data}/small"}
    short = settings(name, data, tiny_folder, tmp_path / "run", steps=4, **changes)
    assert launch(name, short) == 0
    longer = settings(name, data, tiny_folder, tmp_path / "run", resume=True, **changes)
    assert launch(name, longer, kill_at=(r"^rename checkpoints/step-8\.tmp", 1)) == -9
    assert launch(name, longer) == 0, printed(longer)
    assert launch(name, settings(name, data, tiny_folder, tmp_path / "straight", **changes)) == 0
    assert_same_run(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("name", ["sft", "rm", "dpo"])
def test_more_epochs_under_a_constant_schedule_equal_a_longer_run(name, data, tiny_folder, tmp_path):
    """The same for `epochs`: 32 rows are 4 steps of 8, so two epochs are 8 steps."""
    changes = {"lr_schedule": "constant", "steps": None, "batch_size": 8}
    assert launch(name, settings(name, data, tiny_folder, tmp_path / "run", **changes, epochs=1)) == 0
    assert launch(name, settings(name, data, tiny_folder, tmp_path / "run", **changes, epochs=2, resume=True)) == 0
    assert launch(name, settings(name, data, tiny_folder, tmp_path / "straight", **changes, epochs=2)) == 0
    assert_same_run(tmp_path / "run", tmp_path / "straight")


@ALL
def test_overwrite_removes_what_a_run_wrote_and_nothing_else(name, straight, data, tiny_folder, tmp_path):
    """The user's own files stay, those with names like a model's among them; of the old run nothing remains."""
    out = shutil.copytree(straight[name][0], tmp_path / "run")
    own = ["notes.txt", "plots/curve.svg", "tokenizer-notes.txt", "vocab-ideas.txt", "model-card.md"]
    (out / "plots").mkdir()
    for file in own:
        (out / file).write_text("mine")
    changes = {"steps": 2, "seed": 1, "save_every": 1}
    assert launch(name, settings(name, data, tiny_folder, out, overwrite=True, **changes)) == 0
    assert launch(name, settings(name, data, tiny_folder, tmp_path / "straight", **changes)) == 0
    assert {file: (out / file).read_text() for file in own if (out / file).exists()} == dict.fromkeys(own, "mine")
    shutil.rmtree(out / "plots")
    for file in own:
        (out / file).unlink(missing_ok=True)
    assert_same_run(out, tmp_path / "straight")


@ALL
def test_overwrite_that_is_killed_leaves_a_folder_that_either_flag_can_go_on_with(
    name, straight, data, tiny_folder, tmp_path
):
    """Half of the old run is gone: --resume must not take it for finished, and --overwrite must not refuse it."""
    out = shutil.copytree(straight[name][0], tmp_path / "run")
    wanted = settings(name, data, tiny_folder, out)
    assert launch(name, {**wanted, "overwrite": True}, kill_at=(r"^(remove|rename) ", 3)) == -9
    copy = shutil.copytree(out, tmp_path / "copy")
    assert launch(name, {**wanted, "resume": True}) == 0, printed(wanted)
    assert_same_run(out, straight[name][0])
    assert launch(name, {**wanted, "out": str(copy), "overwrite": True}) == 0
    assert_same_run(copy, straight[name][0])


@ALL
def test_the_last_two_checkpoints_are_kept(name, straight):
    """After 8 steps with a checkpoint at every second one: steps 6 and 8, nothing unfinished, each a whole model folder
    with the optimizer's state; the last one holds the final weights."""
    out = straight[name][0]
    folders = sorted((out / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-6", "step-8"]
    for folder in folders:
        auto_class(name).from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
        state = torch.load(folder / "state.pt", weights_only=True)
        assert state["optimizer"]["state"]
        if name == "ppo":
            assert state["value_optimizer"]["state"]
            AutoModelForSequenceClassification.from_pretrained(folder / "value_model")
        if name == "dpo":  # 32 pairs to train on and 8 to evaluate, both sides
            assert state["references"].shape == (40, 2)
    assert (folders[1] / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert (folders[0] / "model.safetensors").read_bytes() != (out / "model.safetensors").read_bytes()
    if name == "ppo":
        values = [(folder / "value_model" / "model.safetensors").read_bytes() for folder in folders]
        assert values[0] != values[1]


# -------------------------------------------------------------------------------------------------------------- kl_stop


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_kl_stop_ends_the_run_and_a_killed_one_ends_the_same(name, data, tiny_folder, tmp_path):
    """The run ends once kl_ref_seq has passed --kl-stop: it says so, evaluates, saves, and writes the final model.
    Killed right after that step, and again in the final save, it does no step more."""
    changes = {"kl_stop": 0.05, "kl_coef": 0.0, "lr": 3e-3, "steps": 30, "sft_coef": 0.0, "sft_dataset": None}
    changes |= {"eval_every": 1000, "save_every": 1000, "model": f"{data}/small"}
    wanted = settings(name, data, tiny_folder, tmp_path / "straight", **changes)
    assert launch(name, wanted) == 0, printed(wanted)
    rows = timeless(tmp_path / "straight" / "metrics.jsonl")
    over = [row["step"] for row in rows[1:] if row["kl_ref_seq"] > 0.05]
    assert over == [rows[-1]["step"]] and 1 < over[0] < 30, rows
    assert "eval/accuracy_greedy" in rows[-1]
    assert re.search(r"kl[-_]stop", printed(wanted))
    assert "finished" in json.loads((tmp_path / "straight" / "args.json").read_text())
    killed = {**wanted, "out": str(tmp_path / "run"), "resume": True}
    kills = [(r"^write metrics\.jsonl$", over[0] + 1), (r"^rename checkpoints/step-.*tmp", 1)]
    for kill_at in [*kills, (r"checkpoints/final\.tmp", 1), (r"^rename checkpoints/final\.tmp", 2)]:
        assert launch(name, killed, kill_at=kill_at) == -9, printed(killed)
    assert launch(name, killed) == 0, printed(killed)
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    before = snapshot(tmp_path / "run")
    assert launch(name, killed) == 0
    assert snapshot(tmp_path / "run") == before


def test_signals_are_handled_as_before_once_a_run_is_over(data, tiny_folder, tmp_path):
    """main, called from Python, gives SIGINT and SIGTERM back: Ctrl-C in a notebook works after the run as before it,
    also when the run ended in an error."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sft.main(sft.Args(**settings("sft", data, tiny_folder, tmp_path / "run", steps=1)))
    assert {number: signal.getsignal(number) for number in before} == before
    (tmp_path / "rewards.py").write_text(REWARDS + "    \ncalls = []\n" + FAILS_LATER)
    wanted = settings("grpo", data, tiny_folder, tmp_path / "failed", reward=(f"{tmp_path}/rewards.py:fails",))
    with contextlib.suppress(SystemExit):
        grpo.main(grpo.Args(**wanted))
    assert (tmp_path / "failed").exists()
    assert {number: signal.getsignal(number) for number in before} == before


FAILS_LATER = """
def fails(prompts, completions, rows):
    calls.append(1)
    return [0.0 if len(calls) < 4 else None for row in rows]
"""
