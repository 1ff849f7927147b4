"""Two processes under torchrun (gloo, on the CPU) give the run that one gives."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rm
import sft
from conftest import CORE, PARENT, SCRIPTS, known, save_tiny, write_rows

ROOT = Path(sft.__file__).parent
# Runs a script's main with the settings in argv[2]. Completions are a function of the prompt, not drawn, if it says so;
# at the end each process writes down its weights: all of them, gathered, and those of its copy that samples.
WORKER = """
import dataclasses, importlib, json, sys, zlib
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
name, settings, weights = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
script = importlib.import_module(name)
fixed, models, load, save = settings.pop("fixed", False), [], getattr(script, "load_model", None), script.save

def generate(model, prompts, num_samples, max_new_tokens, temperature, eos_ids, generator):
    made = []
    for n in range(len(prompts) * num_samples):
        draw = zlib.crc32(str((prompts[n // num_samples], n % num_samples)).encode())
        made.append([5 + (draw >> k) % 200 for k in range(2 + draw % 6)] + [1])
    return made, [[0.0] * len(completion) for completion in made]

def load_model(*args):
    models.append(load(*args))
    return models[-1]

def note(args, step, last, tokenizer, **trained):
    save(args, step, last, tokenizer, **trained)
    found = {}
    for kind, (model, optimizer) in trained.items():
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        found |= {f"{kind}.{key}": x for key, x in whole.items()}
    if hasattr(script, "generate"):
        found |= {f"sampler.{key}": x for key, x in models[1].state_dict().items()}
    torch.save(found, f"{weights}.{script.RANK}")

script.save, script.load_model = note, load_model
if fixed:
    script.generate = generate
script.main(script.Args(**settings))
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As each process has: then only their number differs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model of two narrow layers, 60 rows of the built-in task, a reward function and the worker."""
    folder = tmp_path_factory.mktemp("data")
    save_tiny(folder / "tiny", hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    rows = [row | rm.arithmetic_pair(row["arithmetic"]) for row in sft.arithmetic("train")[:60]]
    write_rows(folder / "rows.jsonl", [{k: x for k, x in row.items() if k != "arithmetic"} for row in rows])
    (folder / "worker.py").write_text(WORKER)
    (folder / "rewards.py").write_text(
        "import os\n"
        "def letters(rows, texts): return [len(set(text)) / 8 for text in texts]\n"
        "def fails(rows, texts): return letters(rows, texts) if os.environ.get('RANK') == '0' else [None] * len(rows)\n"
    )
    return folder


def settings(name, data, out, **changes):
    same = {"model": f"{data}/tiny", "dataset": f"{data}/rows.jsonl", "out": str(out), "steps": 2, "eval_size": 4}
    same |= {"eval_every": 1, "save_every": 1, "lr": 1e-3, "warmup_steps": 0, "micro_batch_size": 2}
    same |= {"lr_schedule": "constant"}
    online = {"prompts_per_step": 4, "max_new_tokens": 8, "reward": f"{data}/rewards.py:letters"}
    own = {"grpo": {**online, "group_size": 3}, "ppo": {**online, "num_minibatches": 1, "value_lr": 1e-3}}
    if name == "ppo_vtrace":
        own["ppo"] |= {"prompts_per_step": 4, "staleness": 1}
    return {
        **known(name, {**same, **own.get(PARENT[name], {"batch_size": 6})}),
        "fixed": PARENT[name] in own,
        **changes,
    }


def start(name, num_processes, data, out, **changes):
    """The finished process of a run with its two outputs."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    module = SCRIPTS[name].__name__
    command = [sys.executable, *(torchrun if num_processes > 1 else []), str(data / "worker.py"), module]
    command += [json.dumps(settings(name, data, out, **changes)), f"{out}.weights"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def run(*args, **changes):
    process = start(*args, **changes)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def weights(out):
    return load_file(Path(out) / "model.safetensors")


@pytest.mark.parametrize("name", [*CORE, "dapo", "reinforce", "reinforce_pp", "ppo_vtrace"])
def test_two_processes_give_the_run_of_one(name, data, tmp_path):
    """Loss and gradient norm of the first step agree to 1e-5, all metrics and weights nearly; both processes hold the
    same weights at the end, and so do their copies that sample. A run of two goes on with one, and one of one with two,
    to the same end."""
    one, two = tmp_path / "one", tmp_path / "two"
    printed = run(name, 2, data, two, steps=1)
    run(name, 1, data, one, steps=1)
    assert len(re.findall("^step 1/1", printed, re.M)) == 1  # one process alone prints
    (_, ours), (_, theirs) = metrics(two), metrics(one)
    losses = [key for key in theirs if "loss" in key or "grad_norm" in key]
    assert len(losses) >= 2 and all(theirs[key] != 0 for key in losses if "grad" in key)
    for key in losses:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6), key
    for key, x in theirs.items():
        assert key.startswith("time/") or ours[key] == pytest.approx(x, rel=1e-3, abs=1e-4), key
    left, right = (torch.load(f"{two}.weights.{rank}", weights_only=True) for rank in (0, 1))
    assert left.keys() == right.keys() and all(torch.equal(x, right[key]) for key, x in left.items())
    for key in [key for key in left if key.startswith("sampler.")]:
        assert torch.equal(left[key], left[key.replace("sampler.", "policy.")]), key
    run(name, 1, data, two, steps=2, resume=True)
    run(name, 2, data, one, steps=2, resume=True)
    for x, y in ((one, two), (two, one)):
        assert [row["step"] for row in metrics(x)] == [0, 1, 2]
        ours, theirs = weights(x), weights(y)
        assert ours.keys() == theirs.keys()
        assert all((ours[key] - theirs[key]).abs().max() < 2e-4 for key in ours)  # a fifth of the learning rate


def test_two_processes_really_sample_and_may_compile(data, tmp_path):
    """ppo.py with two epochs of two minibatches, its early stop, and drawn completions: other draws in each process."""
    changes = {"num_epochs": 2, "num_minibatches": 2, "target_kl": 0.5, "gradient_checkpointing": True}
    run("ppo", 2, data, tmp_path / "ppo", fixed=False, **changes)
    assert metrics(tmp_path / "ppo")[-1]["num_updates"] > 1
    run("grpo", 2, data, tmp_path / "grpo", fixed=False, num_epochs=2, kl_coef=0.0)
    assert metrics(tmp_path / "grpo")[-1]["completion_length"] > 1


UNEVEN = """import os
def f(rows, texts, made=[]):
    made.append(len(rows))
    teaches = os.environ["RANK"] == "0" or {}  # after two evaluations
    return [float(n % 2 and teaches) for n in range(len(rows))]
"""


@pytest.mark.parametrize(("when", "rollouts", "groups"), [("len(made) > 3", 2, 4), ("False", 3, 2)])
def test_processes_of_dapo_stop_sampling_together(when, rollouts, groups, data, tmp_path):
    """Process 0 has its two groups at once. Process 1 finds its own in the second rollout; or never, and then computes
    discarded groups at mask 0, so that both make as many passes. They do not count: entropy is that of 2 groups."""
    (tmp_path / "r.py").write_text(UNEVEN.format(when))
    flags = {"group_size": 2, "max_rollouts": 3, "steps": 1, "reward": f"{tmp_path}/r.py:f", "fixed": False}
    run("dapo", 2, data, tmp_path / "out", **flags)
    row = metrics(tmp_path / "out")[1]
    assert (row["num_rollouts"], row["num_groups"]) == (rollouts, groups)
    assert row["frac_zero_std"] == pytest.approx(0.25 if rollouts == 2 else 0.5)
    assert 5 < row["entropy"] < 5.6 and row["sampling_gap"] < 1e-4  # entropy of a new model: ln 261 = 5.56


def test_held_out_pairs_without_an_answer(data, tmp_path):
    """One process alone sees the pair without an answer; neither then measures accuracy."""
    rows = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]
    del rows[-1]["answer"]
    run("dpo", 2, data, tmp_path / "out", dataset=write_rows(tmp_path / "rows.jsonl", rows), steps=1)
    assert not any("accuracy_" in key for row in metrics(tmp_path / "out") for key in row)


def test_a_reward_that_one_process_fails_to_compute_ends_both(data, tmp_path):
    process = start("grpo", 2, data, tmp_path / "out", reward=f"{data}/rewards.py:fails")
    assert process.returncode != 0 and "finite numbers" in process.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", CORE)
def test_a_batch_that_does_not_divide_is_refused(name, data, tmp_path, monkeypatch):
    script = SCRIPTS[name]
    monkeypatch.setattr(script, "WORLD", 4)
    wanted = settings(name, data, tmp_path / "out", **({"prompts_per_step": 6} if name in ("grpo", "ppo") else {}))
    wanted.pop("fixed", None)
    with pytest.raises(SystemExit, match="6: not a multiple of 4"):
        script.main(script.Args(**wanted))
