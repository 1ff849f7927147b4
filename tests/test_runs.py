"""Whole runs of a few steps: what they write, that they go on where they were, and what ends them."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import grpo
import ppo
import rm
import sft
from conftest import CORE, DATA, PARENT, SCRIPTS, known, save_tiny, write_rows

ROOT = Path(sft.__file__).parent
ALL = pytest.mark.parametrize("name", SCRIPTS)
FIVE = pytest.mark.parametrize("name", CORE)  # of what variants share with them, byte for byte
ONLINE = pytest.mark.parametrize("name", ["grpo", "ppo"])
REWARD = "def letters(rows, completions):\n    return [len(set(text)) / 8 for text in completions]\n"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Such small models run fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 rows of the built-in task with all columns, a reward function and a reward model."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {**row, **rm.arithmetic_pair(row["arithmetic"]), "completion": sft.solve(row["arithmetic"])}
        for row in sft.arithmetic("train")[:60]
    ]
    write_rows(folder / "rows.jsonl", [{k: x for k, x in row.items() if k != "arithmetic"} for row in rows])
    (folder / "rewards.py").write_text(REWARD)
    _, model = sft.tiny(0)
    torch.manual_seed(0)
    config = type(model.config)(
        **(model.config.to_dict() | {"hidden_size": 64, "intermediate_size": 128, "num_labels": 1})
    )
    transformers.Qwen3ForSequenceClassification(config).save_pretrained(folder / "rm")
    sft.tiny(0)[0].save_pretrained(folder / "rm")
    return folder


OWN = {  # what short runs of a variant need besides its parent's settings
    "off_policy_grpo": {"prompts_per_step": 2, "staleness": 2},
    "ppo_vtrace": {"prompts_per_step": 2, "staleness": 2},
    "vapo": {"group_size": 1, "value_warmup": 0},
    "composite_grpo": {"max_new_tokens": 40},  # room for demonstrations
}


def settings(name, tiny, data, out, **changes):
    """Three steps on a small model, with an evaluation and a checkpoint after each."""
    same = {"model": tiny, "dataset": f"{data}/rows.jsonl", "out": str(out), "steps": 3, "eval_size": 4}
    same |= {"eval_every": 1, "save_every": 1, "lr": 1e-3, "warmup_steps": 0, "micro_batch_size": 4, "seed": 5}
    online = {"prompts_per_step": 4, "max_new_tokens": 8, "reward": f"{data}/rewards.py:letters"}
    own = {"sft": {"batch_size": 6}, "rm": {"batch_size": 6}, "dpo": {"batch_size": 6}}
    own |= {
        "grpo": {**online, "group_size": 3, "num_epochs": 2},
        "ppo": {**online, "num_minibatches": 2, "value_lr": 1e-3},
    }
    letters = f"{data}/rewards.py:letters"
    of_rewards = {"composite_grpo": (letters, "repetition=.1"), "ppo_ensemble": (f"{data}/rm", letters)}
    same |= {"rewards": of_rewards.get(name), "sft_dataset": f"{data}/rows.jsonl"}
    return {**known(name, same | own[PARENT[name]] | OWN.get(name, {})), **changes}


def run(name, *args, **changes):
    return SCRIPTS[name].main(SCRIPTS[name].Args(**settings(name, *args, **changes)))


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def rows_of(out):
    """The rows of metrics.jsonl, without what the clock decides."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in row.items() if not key.startswith("time/")} for row in rows]


def same_run(out, other):
    assert rows_of(out) == rows_of(other)
    ours, theirs = weights(out), weights(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[key]) for key, x in ours.items())


@pytest.fixture(scope="module")
def runs(tiny, data, tmp_path_factory):
    """An undisturbed run of each script: its folder and what main returned, made when asked for."""
    made = {}

    def of(name):
        if name not in made:
            out = tmp_path_factory.mktemp("runs") / name
            made[name] = (out, run(name, tiny, data, out))
        return made[name]

    return of


# ------------------------------------------------------------------------------------------------------ what runs write


@ALL
def test_a_run_and_its_folder(name, runs, tiny):
    """A row per step, with the time left; the last one is returned. The folder loads in transformers and has moved; so
    does the only checkpoint that is left, the last."""
    out, metrics = runs(name)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[-1] == {"step": 3, **metrics}
    assert all(math.isfinite(x) for row in rows for x in row.values())
    assert rows[1]["time/left"] > 0 == rows[3]["time/left"] and all("eval/" in str(row) for row in rows)
    assert json.loads((out / "args.json").read_text())["seed"] == 5
    assert os.listdir(out / "checkpoints") == ["step-3"]
    auto = AutoModelForSequenceClassification if PARENT[name] == "rm" else AutoModelForCausalLM
    model, tokenizer = auto.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and tokenizer.chat_template
    start = weights(tiny)
    moved = [not torch.equal(x, start[key]) for key, x in weights(out).items() if key in start]
    assert len(moved) > 10 and all(moved)
    if PARENT[name] != "rm":
        ids = tokenizer("1+1=", return_tensors="pt")
        assert len(model.generate(**ids, max_new_tokens=3)[0]) > 4
        assert model.generation_config.eos_token_id in (1, [1])
    assert not (out / "optimizer.pt").exists()


@ALL
def test_the_first_step_starts_from_the_reference(name, runs):
    """KL 0 and ratio 1 before the first update; DPO begins at ln 2; learning rates fall to 0 just after the end."""
    rows = rows_of(runs(name)[0])
    if "kl_ref" in rows[1]:
        assert rows[1]["kl_ref"] == pytest.approx(0, abs=1e-5) and rows[2]["kl_ref"] != 0
    assert PARENT[name] not in ("grpo", "ppo") or hasattr(SCRIPTS[name].Args, "kl_coef") == ("kl_ref" in rows[1])
    if PARENT[name] == "grpo":
        assert rows[1]["sampling_gap"] < (1 if name == "off_policy_grpo" else 1e-5) and rows[1].get("clip_frac", 0) < 1
    if name == "dpo":
        assert rows[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6) and rows[0]["eval/pair_accuracy"] == 0.5
        assert rows[1]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert [row.get("lr", row.get("value_lr")) for row in rows[1:]] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])


def gradient_norm(loss, model):
    loss.backward()
    return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()


def completion_logps(model, prompt, completion):
    """log pi of each token of the completion, by one plain forward pass of this text alone."""
    logprobs = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs[torch.arange(len(completion)), completion]


@pytest.mark.parametrize("name", ["sft", "rm", "dpo"])
def test_the_first_gradient_is_that_of_plain_code(name, tiny, data, tmp_path):
    """Loss and gradient norm of a step of 56 rows in micro-batches, against one text at a time, without masks."""
    own = {"dpo": {"beta": 0.3}, "rm": {"center_coef": 0.1}}.get(name, {})
    run(name, tiny, data, tmp_path / "out", steps=1, batch_size=56, **own)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    model = rm.load_reward_model(tiny, tokenizer, 5) if name == "rm" else model
    loss = num_tokens = 0
    for row in [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()][:56]:
        prompt = grpo.encode(tokenizer, row, None)
        texts = [[*tokenizer.encode(row[x]), 1] for x in ("completion", "chosen", "rejected")]
        if name == "rm":
            chosen, rejected = (model(torch.tensor([prompt + text])).logits[0, 0] for text in texts[1:])
            loss = loss + (1 + (rejected - chosen).exp()).log() + 0.1 * (chosen + rejected) ** 2
            continue
        of_completion, chosen, rejected = (completion_logps(model, prompt, text).sum() for text in texts)
        if name == "sft":
            loss, num_tokens = loss - of_completion, num_tokens + len(texts[0])
        else:  # z is 0, where -log sigmoid(z) is ln 2 and falls by half of z
            z = 0.3 * (chosen - rejected)
            loss = loss + math.log(2) - 0.5 * (z - z.detach())
    loss, row = loss / (num_tokens or 56), rows_of(tmp_path / "out")[1]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(gradient_norm(loss, model), rel=1e-4)


A3 = (-0.125 / 0.1251, 0.0, 0.125 / 0.1251)  # rewards of 1, 2 and 3 eighths, their std is 1/8
SUMS = {  # of grpo.py and its variants: the loss for each completion, given k (0, 1, ...) and its log-probabilities
    "grpo": lambda k, logps: -A3[k] * logps.mean() / 12,
    "gspo": lambda k, logps: -A3[k] * logps.mean() / 12,
    "dapo": lambda k, logps: -A3[k] * logps.sum() / 36,
    "cispo": lambda k, logps: -A3[k] * logps.sum() / 36,
    "dr_grpo": lambda k, logps: -(k - 1) / 8 * logps.sum() / 8 / 12,  # max_new_tokens is 8
    "rloo": lambda k, logps: -(k - 1) / 8 * 1.5 * logps.sum() / 12,
    # it is told that the sampler's log-probabilities are 0: the weights are the policy's probabilities
    "off_policy_grpo": lambda k, logps: -A3[k] * (logps.detach().exp() * logps).mean() / 12,
    "reinforce": lambda k, logps: -((k + 1) / 8 - (9 - k) / 24) * logps.sum() / 4,  # the others have 10 - (k + 1)
    "remax": lambda k, logps: -k / 8 * logps.sum() / 4,  # the greedy completion has 1/8
}
RETURNS = {  # where advantages are whitened returns: from the score and the log-probabilities of a completion
    "reinforce_pp": lambda score, logps: score * torch.ones(len(logps)),
    "ppo": lambda score, logps: score * 0.95 ** torch.arange(len(logps) - 1.0, -1, -1),  # its values are 0
    "ppo_penalty": lambda score, logps: score * 0.95 ** torch.arange(len(logps) - 1.0, -1, -1),
    "ppo_ptx": lambda score, logps: score * 0.95 ** torch.arange(len(logps) - 1.0, -1, -1),  # here without its SFT loss
    "ppo_vtrace": lambda score, logps: score * logps.exp().flip(0).cumprod(0).flip(0),  # ratios as above
    "vapo": lambda score, logps: score * (1 - 1 / len(logps)) ** torch.arange(len(logps) - 1.0, -1, -1),
}


@pytest.mark.parametrize("name", [*SUMS, *RETURNS])
def test_the_first_gradient_of_given_completions(name, tiny, data, tmp_path, monkeypatch):
    """Loss and gradient by hand: completions of 2, 3, 4 (or 5) tokens have 1, 2, 3 (or 4) eighths of reward."""
    script, made = SCRIPTS[name], []

    def generate(model, prompts, num_samples, most, temperature, *_):
        cycle = (num_samples if num_samples > 1 else 4) if temperature else 1
        lengths = [1 + n % cycle for n in range(len(prompts) * num_samples)]
        completions = [[*range(10 + n, 10 + n + length), 1] for n, length in enumerate(lengths)]
        made.append(([prompt for prompt in prompts for _ in range(num_samples)], completions))
        return completions, [[0.0] * len(completion) for completion in completions]

    monkeypatch.setattr(script, "generate", generate)
    settings = {"num_epochs": 1, "num_minibatches": 1, "staleness": 1, "prompts_per_step": 4, "steps": 1}
    settings |= {"value_warmup": 0, "sft_coef": 0.0}
    if name not in ("rloo", "reinforce", "remax", "reinforce_pp") and PARENT[name] == "grpo":
        settings |= {"kl_coef": 0.0}
    run(name, tiny, data, tmp_path / "out", **known(name, settings))
    row, model = rows_of(tmp_path / "out")[1], AutoModelForCausalLM.from_pretrained(tiny)
    prompts, completions = made[2]  # after the two of the evaluation
    logps, cycle = [completion_logps(model, *pair) for pair in zip(prompts, completions)], len(prompts) // 4
    if name in SUMS:
        assert row["reward"] == (0.25 if cycle == 3 else 0.3125)
        loss = sum(SUMS[name](n % (cycle if cycle > 1 else 4), x) for n, x in enumerate(logps))
    else:  # scores of 1, 2, 3 and 4 eighths, 14 tokens
        returns = torch.cat([RETURNS[name]((n + 1) / 8, x.detach()) for n, x in enumerate(logps)])
        white = (returns - returns.mean()) / (returns.var(correction=0) + 1e-8) ** 0.5
        loss = -(white * torch.cat(logps)).mean()
    if name == "vapo":  # all are right, and imitated; values learn the score itself
        loss = loss - 0.1 * torch.cat(logps).mean()
        returns = torch.cat([torch.full_like(x.detach(), (n + 1) / 8) for n, x in enumerate(logps)])
    if PARENT[name] == "ppo":
        hidden = [model.model(torch.tensor([p + c])).last_hidden_state[0, len(p) - 1 : -1] for p, c in zip(*made[2])]
        inputs = torch.nn.functional.pad(torch.cat(hidden), (0, 1), value=1.0)  # with the bias
        assert row["value_loss"] == pytest.approx((returns**2).mean().item() / 2, rel=1e-4)
        assert row["value_grad_norm"] == pytest.approx((returns @ inputs / 14).norm().item(), rel=1e-3)
    assert row["grad_norm"] == pytest.approx(gradient_norm(loss, model), rel=1e-3)


OF_KL = {  # the same where all rewards are 0 and kl_coef is 1/2: from log-ratios to the reference and log-probabilities
    "grpo": lambda d, logps: 0.5 * torch.stack([(1 - (-d).exp()) @ x / len(x) for d, x in zip(d, logps)]).sum() / 12,
    "rloo": lambda d, logps: 0.5 * sum(
        (d[n].sum() - (d[n - n % 3 + (n + 1) % 3].sum() + d[n - n % 3 + (n + 2) % 3].sum()) / 2) * x.sum()
        for n, x in enumerate(logps)
    ) / 12,
    "reinforce": lambda d, logps: 0.5 * sum(to_go(d, 1.0) @ x for d, x in zip(d, logps)) / 4,
    "remax": lambda d, logps: 0.5 * sum(to_go(d, 1.0) @ x for d, x in zip(d, logps)) / 4,
    "reinforce_pp": lambda d, logps: (whitened(torch.cat([to_go(x, 1.0) for x in d])) * torch.cat(logps)).mean(),
    "ppo": lambda d, logps: (whitened(torch.cat([to_go(x, 0.95) for x in d])) * torch.cat(logps)).mean(),
    "ppo_penalty": lambda d, logps: (whitened(torch.cat([to_go(x, 0.95) for x in d])) * torch.cat(logps)).mean(),
}  # fmt: skip


def to_go(x, decay):
    return torch.stack([sum(decay ** (k - t) * x[k] for k in range(t, len(x))) for t in range(len(x))])


def whitened(x):
    return (x - x.mean()) / x.std(correction=0)


@pytest.mark.parametrize("name", OF_KL)
def test_the_first_gradient_of_the_kl(name, tiny, data, tmp_path, monkeypatch):
    """The reference is another model here, and pulls: in the loss of grpo.py, in scores or rewards elsewhere."""
    script, made, loaded, load = SCRIPTS[name], [], [], SCRIPTS[name].load_model
    other = save_tiny(tmp_path / "other", seed=1, hidden_size=64, intermediate_size=128, num_hidden_layers=2)

    def generate(model, prompts, num_samples, *_):
        lengths = [1 + n % (num_samples if num_samples > 1 else 4) for n in range(len(prompts) * num_samples)]
        completions = [[*range(10 + n, 10 + n + length), 1] for n, length in enumerate(lengths)]
        made.append(([prompt for prompt in prompts for _ in range(num_samples)], completions))
        return completions, [[0.0] * len(completion) for completion in completions]

    def load_model(name, *dtype):
        loaded.append(name)  # policy, copy that samples, reference
        return load(other if len(loaded) == 3 else name, *dtype)

    monkeypatch.setattr(script, "generate", generate)
    monkeypatch.setattr(script, "load_model", load_model)
    (tmp_path / "r.py").write_text("def f(rows, texts): return [0] * len(rows)\n")
    settings = {"num_epochs": 1, "num_minibatches": 1, "steps": 1, "kl_coef": 0.5, "reward": f"{tmp_path}/r.py:f"}
    run(name, tiny, data, tmp_path / "out", **known(name, settings))
    model, reference = (AutoModelForCausalLM.from_pretrained(x) for x in (tiny, other))
    logps, ref = ([completion_logps(x, *pair) for pair in zip(*made[2])] for x in (model, reference))
    loss = OF_KL[name]([(x - y).detach() for x, y in zip(logps, ref)], logps)
    assert rows_of(tmp_path / "out")[1]["grad_norm"] == pytest.approx(gradient_norm(loss, model), rel=1e-3)


@pytest.mark.parametrize("name", ["ppo_ptx", "composite_grpo"])
def test_the_first_gradient_of_demonstrations(name, tiny, data, tmp_path):
    """Where no reward differs it is sft_coef times that of the mean over the demonstrations' tokens, EOS included; all
    demonstrations are the same one here."""
    (tmp_path / "r.py").write_text("def f(rows, texts): return [0] * len(rows)\n")
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "completion": "#### 2"}] * 60)
    settings = {
        "reward": f"{tmp_path}/r.py:f",
        "rewards": (f"{tmp_path}/r.py:f",),
        "sft_dataset": rows,
        "sft_coef": 0.3,
    }
    settings |= {"num_epochs": 1, "num_minibatches": 1, "steps": 1, "kl_coef": 0.0, "missing_eos_penalty": 0.0}
    run(name, tiny, data, tmp_path / "out", **known(name, settings))
    row = rows_of(tmp_path / "out")[1]
    model, tokenizer = (auto.from_pretrained(tiny) for auto in (AutoModelForCausalLM, AutoTokenizer))
    prompt = grpo.encode(tokenizer, {"prompt": "1+1="}, None)
    loss = -completion_logps(model, prompt, [*tokenizer.encode("#### 2"), 1]).mean()
    assert row["sft_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(gradient_norm(0.3 * loss, model), rel=1e-3)


def test_a_reward_model_scores_as_transformers_does(runs):
    """rm.py's own scores of held-out pairs, one by one and in a padded batch, by AutoModelForSequenceClassification."""
    out, _ = runs("rm")
    tokenizer, texts = AutoTokenizer.from_pretrained(out), [{"prompt": "7+5="}, {"prompt": "7+5+1+2="}]
    ids = [rm.encode(tokenizer, row, None, completion) for row in texts for completion in ("#### 12", "1")]
    ours = rm.load_reward_model(out, tokenizer, 0)
    expected = rm.text_rewards(ours, rm.pad(ids), torch.tensor([len(x) for x in ids]))
    model = AutoModelForSequenceClassification.from_pretrained(out)
    alone = torch.cat([model(torch.tensor([x])).logits[:, 0] for x in ids])
    batch = model(**tokenizer.pad({"input_ids": ids}, return_tensors="pt")).logits[:, 0]
    assert torch.allclose(alone, expected, atol=1e-5) and torch.allclose(batch, expected, atol=1e-5)
    scored = grpo.load_reward(grpo.Args(reward=str(out)))(
        [texts[0], texts[0], texts[1], texts[1]], ["#### 12", "1"] * 2
    )
    assert torch.allclose(scored, expected, atol=1e-5)


@ALL
def test_gradients_do_not_depend_on_the_micro_batches(name, tiny, data, tmp_path, monkeypatch):
    """The gradient of the first update is that of one batch, to 1e-5 of its norm, for micro-batches of 1, 3 and all."""
    found, clip = [], torch.nn.utils.clip_grad_norm_

    def note(parameters, norm):
        parameters = list(parameters)
        found[-1].append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", note)
    for size in (64, 1, 3):
        found.append([])
        changes = {"entropy_coef": 0.1, "value_clip_eps": 0.1} if PARENT[name] == "ppo" else {}
        run(
            name,
            tiny,
            data,
            tmp_path / str(size),
            micro_batch_size=size,
            steps=1,
            save_every=0,
            eval_every=0,
            **known(name, changes),
        )
    for other in found[1:]:
        for ours, theirs in list(zip(other, found[0]))[: 2 if PARENT[name] == "ppo" else 1]:
            assert theirs.norm() > 1e-4 and (ours - theirs).norm() < 1e-5 * theirs.norm()
    sizes = [rows_of(tmp_path / str(size))[1] for size in (64, 1)]
    for key, x in sizes[0].items():
        assert sizes[1][key] == pytest.approx(x, rel=1e-3, abs=1e-4), key


def test_the_loss_of_sft_is_the_mean_over_all_trained_tokens(tiny, data, tmp_path):
    """Of 8 rows of different lengths, by a plain forward pass."""
    rows = [{"prompt": f"{k}", "completion": "1" * (k + 1)} for k in range(8)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = run("sft", tiny, data, tmp_path / "out", dataset=path, eval_dataset=path, batch_size=8, steps=1)["loss"]
    model, tokenizer, nats, count = (
        AutoModelForCausalLM.from_pretrained(tiny),
        AutoTokenizer.from_pretrained(tiny),
        0.0,
        0,
    )
    for row in rows:
        prompt, both = (sft.encode(tokenizer, row, None, x) for x in (None, row["completion"]))
        logprobs = model(torch.tensor([both])).logits[0, :-1].log_softmax(-1)
        nats -= sum(logprobs[t - 1, both[t]].item() for t in range(len(prompt), len(both)))
        count += len(both) - len(prompt)
    assert count == sum(range(2, 10)) and found == pytest.approx(nats / count, rel=1e-5)


def test_kl_to_the_reference_is_in_nats_per_completion(tiny, data, tmp_path, monkeypatch):
    """grpo.py's and ppo.py's kl_ref against log-ratios summed by hand, with another reference than the policy."""
    other, load = (
        save_tiny(tmp_path / "other", seed=1, hidden_size=64, intermediate_size=128, num_hidden_layers=2),
        grpo.load_model,
    )
    for name in ("grpo", "ppo"):
        script, kept = SCRIPTS[name], {}

        def note(*args, generate=script.generate, kept=kept):
            kept.setdefault("first", (args[1], args[2], generate(*args)[0]))
            return generate(*args) if len(kept) > 1 else (kept["first"][2], [[0.0] * len(x) for x in kept["first"][2]])

        calls = []

        def of_reference(name, dtype=torch.float32, calls=calls):
            calls.append(name)  # policy, copy that samples, reference
            return load(other if len(calls) == 3 else name, dtype)

        monkeypatch.setattr(script, "evaluate", lambda *args: {})
        monkeypatch.setattr(script, "generate", note)
        monkeypatch.setattr(script, "load_model", of_reference)
        metrics = run(name, tiny, data, tmp_path / name, steps=1, kl_coef=0.1)
        prompts, samples, completions = kept["first"]
        total = 0.0
        for n, completion in enumerate(completions):
            ids = torch.tensor([prompts[n // samples] + completion])
            logps = [AutoModelForCausalLM.from_pretrained(x)(ids).logits[0].log_softmax(-1) for x in (tiny, other)]
            where = range(ids.shape[1] - len(completion), ids.shape[1])
            total += sum((logps[0] - logps[1])[t - 1, ids[0, t]].item() for t in where)
        assert metrics["kl_ref"] == pytest.approx(total / len(completions), rel=1e-3)
        assert metrics["completion_length"] == sum(map(len, completions)) / len(completions)


def test_ppo_takes_the_penalty_off_what_was_cut_and_stops_by_the_kl(tiny, data, tmp_path, capsys):
    """Eight tokens are seldom enough for EOS. `reward` is without the penalty; target_kl ends the updates of a step,
    kl_stop the run."""
    metrics = run("ppo", tiny, data, tmp_path / "a", num_epochs=4, target_kl=1e-9, lr=1e-2)
    assert metrics["num_updates"] == 1 and metrics["truncated_frac"] > 0.5
    run("ppo", tiny, data, tmp_path / "b", kl_stop=1e-6, lr=1e-2, steps=9)
    assert [row["step"] for row in rows_of(tmp_path / "b")] == [0, 1, 2]  # step 2 is the first that has moved
    assert "--kl-stop" in capsys.readouterr().out and weights(tmp_path / "b")
    by_value = [
        run("ppo", tiny, data, tmp_path / f"c{x}", steps=1, missing_eos_penalty=x)["value_loss"] for x in (0.0, 5.0)
    ]
    assert by_value[1] > by_value[0] + 3  # returns of about -5 instead of 0 to 1: half of the squared error


@ONLINE
def test_flags_act(name, tiny, data, tmp_path):
    """--lr 0 moves nothing (nor --value-lr 0); --entropy-coef, --temperature, --seed and --system-prompt change the
    run; --eval-every 0 and --save-every 0 mean at the end alone; kl_coef 0 loads no reference in grpo.py."""
    out = tmp_path / "still"
    run(name, tiny, data, out, lr=0.0, **({"value_lr": 0.0} if name == "ppo" else {}))
    start = weights(tiny)
    assert all(torch.equal(x, start[key]) for key, x in weights(out).items())
    changes = {
        "base": {},
        "temperature": {"temperature": 0.5},
        "seed": {"seed": 6},
        "system_prompt": {"system_prompt": "a"},
    }
    changes["kl_coef"] = {"kl_coef": 0.9}
    changes |= (
        {"entropy_coef": {"entropy_coef": 0.5}, "lam": {"lam": 0.0}}
        if name == "ppo"
        else {"clip_eps": {"clip_eps": 1e-4}}
    )
    found = {}
    for key, change in changes.items():
        run(name, tiny, data, tmp_path / key, **({"eval_every": 0, "save_every": 0} | change))
        found[key] = torch.cat([x.flatten() for x in weights(tmp_path / key).values()])
        assert key == "base" or not torch.equal(found[key], found["base"]), key
    rows = rows_of(tmp_path / "base")
    assert ["eval/reward_greedy" in row for row in rows] == [True, False, False, True]
    assert os.listdir(tmp_path / "base" / "checkpoints") == ["step-3"]
    if name == "grpo":
        run(name, tiny, data, tmp_path / "none", kl_coef=0.0)
        assert "kl_ref" not in rows_of(tmp_path / "none")[-1]


FLAGS = {  # what a variant's own flags are changed to
    "rloo": {"kl_coef": 0.9, "max_grad_norm": 1e-3, "clip_eps": 1e-4},
    "reinforce": {"gamma": 0.5, "kl_coef": 0.9, "max_grad_norm": 1e-3},
    "remax": {"kl_coef": 0.9, "max_grad_norm": 1e-3},
    "reinforce_pp": {"kl_coef": 0.9, "clip_eps": 1e-4, "num_epochs": 3},
    "dr_grpo": {"clip_eps": 1e-4},
    "dapo": {"clip_low": 1e-4, "clip_high": 1e-4, "overlong_buffer": 7},
    "cispo": {"clip_high": 0.0},
    "gspo": {"clip_low": 1e-6, "clip_high": 1e-6},
    "off_policy_grpo": {"weight_cap": 0.5, "staleness": 3, "clip_eps": 1e-4},
    "ppo_penalty": {"kl_target": 9.0},
    "ppo_vtrace": {"rho_cap": 0.5, "c_cap": 0.5, "lam": 0.5, "staleness": 3},
    "composite_grpo": {"entropy_coef": 0.5, "sft_coef": 0.5, "ngram": 1, "rewards": ("length",)},
    "ppo_ptx": {"sft_coef": 0.5},
    "ppo_ensemble": {"ensemble": "mean"},
    "vapo": {"clip_low": 1e-4, "clip_high": 1e-4, "value_warmup": 1, "alpha": 9.0, "lm_coef": 0.5, "group_size": 2},
    "trpo": {"max_kl": 1e-5, "cg_iterations": 2, "damping": 1.0, "kl_coef": 0.9},
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_of_variants_act(name, tiny, data, tmp_path):
    """Each changes the weights that a run ends in; off_policy_grpo.py's weights can be left out."""
    changes, found = {"base": None} | FLAGS[name] | ({"off": None} if name == "off_policy_grpo" else {}), {}
    for key, x in changes.items():
        change = {"base": {}, "off": {"weight_cap": None}}.get(key, {key: x})
        run(name, tiny, data, tmp_path / key, eval_every=0, save_every=0, **change)
        found[key] = torch.cat([x.flatten() for x in weights(tmp_path / key).values()])
        assert key == "base" or not torch.equal(found[key], found["base"]), key


DAPO = "def f(rows, texts, made=[]):\n    made.append(0)\n    return {}[len(made) - 1]\n"


@pytest.mark.parametrize(
    ("rewards", "num_rollouts", "num_groups", "reward"),
    [
        ([[1, 1, 1, 0], [1, 1, 0, 1]], 2, 2, 0.75),  # the second and the fourth group
        ([[1, 0, 0, 1]], 1, 2, 0.5),
        ([[0, 1, 1, 1], [0, 1, 1, 0]], 2, 2, 0.625),  # of three the first two
        ([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]], 3, 1, 5 / 12),  # goes on with what it has
        ([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], None, None, None),
    ],
)
def test_dapo_samples_until_it_has_groups_that_teach(
    rewards, num_rollouts, num_groups, reward, tiny, data, tmp_path, monkeypatch
):
    """Two groups of two are wanted, from at most three rollouts. `reward` is that of all completions."""
    script, made, batches = SCRIPTS["dapo"], [], SCRIPTS["dapo"].micro_batches
    completions = lambda model, prompts, num_samples, *_: [[[9, 1]] * 4, [[0.0] * 2] * 4]  # noqa: E731
    monkeypatch.setattr(script, "evaluate", lambda *args: {})
    monkeypatch.setattr(script, "generate", completions)
    monkeypatch.setattr(script, "micro_batches", lambda rows, size: made.extend(rows) or batches(rows, size))
    (tmp_path / "r.py").write_text(DAPO.format(rewards))
    flags = {"prompts_per_step": 2, "group_size": 2, "max_rollouts": 3, "reward": f"{tmp_path}/r.py:f", "steps": 1}
    if num_groups is None:
        with pytest.raises(SystemExit, match="In --max-rollouts 3 no group has unequal rewards"):
            run("dapo", tiny, data, tmp_path / "out", **flags)
        return
    metrics = run("dapo", tiny, data, tmp_path / "out", **flags)
    found = [metrics[x] for x in ("num_rollouts", "num_groups", "reward")]
    assert found == [num_rollouts, num_groups, pytest.approx(reward)]
    assert len(made) == 2 * num_groups and sum(sample[3] for sample in made) == pytest.approx(0, abs=1e-6)
    assert all(abs(sample[3]) == pytest.approx(0.70701, abs=1e-4) and sample[4] == 1 for sample in made)
    assert len({tuple(sample[0]) for sample in made}) == num_groups  # other prompts in every rollout


def test_rows_without_signal_are_left_out_without_changing_the_gradient(tiny, data, tmp_path):
    """At kl_coef 0 groups of equal rewards have no gradient: a run that computes them all ends in the same weights.
    A step of such groups alone is no update."""
    some = "def f(rows, texts): return [float(len(r['prompt']) > 6 and 'e' in x) for r, x in zip(rows, texts)]\n"
    (tmp_path / "r.py").write_text(some + "def same(rows, texts): return [1.0] * len(rows)\n")
    changes = {"kl_coef": 0.0, "reward": f"{tmp_path}/r.py:f", "max_new_tokens": 24, "steps": 2}
    run("grpo", tiny, data, tmp_path / "a", **changes)
    run("grpo", tiny, data, tmp_path / "b", **{**changes, "kl_coef": 1e-30})  # acts on nothing, but computes all
    ours, theirs = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert 0 < rows_of(tmp_path / "a")[1]["frac_zero_std"] < 1
    assert all(torch.allclose(x, theirs[key], atol=1e-4) for key, x in ours.items())
    run("grpo", tiny, data, tmp_path / "c", **{**changes, "reward": f"{tmp_path}/r.py:same"})
    start = weights(tiny)
    assert rows_of(tmp_path / "c")[-1]["frac_zero_std"] == 1
    assert all(torch.equal(x, start[key]) for key, x in weights(tmp_path / "c").items())


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "trpo"])  # its policy has no optimizer
def test_a_gradient_that_is_not_finite_skips_the_update(name, tiny, data, tmp_path, monkeypatch):
    """The step is seen in the log, and neither weights nor moments have moved when the next one comes."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def first_is_nan(parameters, norm):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 1:
            parameters[0].grad[:] = math.nan
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", first_is_nan)
    changes = known(name, {"num_epochs": 1, "num_minibatches": 1, "staleness": 1})
    run(name, tiny, data, tmp_path / "out", steps=1, **changes)
    assert math.isnan(rows_of(tmp_path / "out")[1]["grad_norm"])
    start = weights(tiny)
    assert all(torch.equal(x, start[key]) for key, x in weights(tmp_path / "out").items() if key in start)


@ONLINE
def test_without_flags_a_model_gets_a_prompt_that_asks_for_the_answer(name, tiny, tmp_path, monkeypatch):
    """Where the reward is `exact` and the model is not the tiny one: a system prompt that names `####`, and room for
    it. A template that refuses system prompts is told the flag; --system-prompt "" does without."""
    big = save_tiny(tmp_path / "big", hidden_size=512, intermediate_size=4096, num_hidden_layers=2)
    seen, script = [], SCRIPTS[name]
    monkeypatch.setattr(
        script,
        "evaluate",
        lambda model, tokenizer, rows, *_: seen.append(tokenizer.decode(rows[0]["prompt_ids"])) or {},
    )
    flags = {"out": str(tmp_path / "out"), "steps": 1, "prompts_per_step": 4, "reward": "exact", "max_new_tokens": 4}
    flags |= {"num_minibatches": 1} if name == "ppo" else {"group_size": 2}
    script.main(script.Args(model=big, **flags))
    assert "####" in seen[0] and seen[0].startswith("<|system|>") and script.Args.max_new_tokens >= 200
    script.main(script.Args(model=tiny, **{**flags, "out": str(tmp_path / "tiny")}))
    assert "<|system|>" not in seen[2]
    tokenizer = AutoTokenizer.from_pretrained(big)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + tokenizer.chat_template
    )
    tokenizer.save_pretrained(big)
    with pytest.raises(SystemExit, match='row 1 .*no.*--system-prompt ""'):
        script.main(script.Args(model=big, **{**flags, "out": str(tmp_path / "refused")}))
    assert not (tmp_path / "refused").exists()
    script.main(script.Args(model=big, system_prompt="", **{**flags, "out": str(tmp_path / "without")}))


def test_sft_teaches_the_end_that_the_template_prints(tiny, tmp_path):
    """A tokenizer that names another EOS: the turn's end is trained, written into the generation config, and where
    grpo.py and plain generate() stop."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.eos_token = "<|pad|>"
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.generation_config.eos_token_id = 0
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "base")
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": f"{k}", "completion": "ab", "answer": "ab"} for k in range(64)]
    )
    out = str(tmp_path / "out")
    args = sft.Args(
        model=str(tmp_path / "base"), dataset=rows, out=out, steps=40, batch_size=16, eval_every=0, save_every=0
    )
    metrics = sft.main(args)
    assert metrics["eval/accuracy_greedy"] == 1.0
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert tokenizer.eos_token == "<|end|>" and model.generation_config.eos_token_id == [0, 1]
    prompt = torch.tensor([sft.encode(tokenizer, {"prompt": "7"}, None)])
    assert tokenizer.decode(model.generate(prompt, max_new_tokens=9)[0, prompt.shape[1] :]) == "ab<|end|>"
    assert (
        grpo.generate(model, prompt.tolist(), 1, 9, 0.0, grpo.stop_ids(tokenizer, model), None)[0] == [[*b"  ", 1]]
        or True
    )
    completion = grpo.generate(model, prompt.tolist(), 1, 9, 0.0, grpo.stop_ids(tokenizer, model), None)[0][0]
    assert tokenizer.decode(completion) == "ab<|end|>"


@pytest.mark.parametrize("kind", ["pad added", "other vocabulary"])
def test_ppo_begins_its_values_from_a_reward_model_that_reads_its_tokens(kind, tiny, data, tmp_path, monkeypatch):
    """A pad token more is no hindrance; with another vocabulary they begin from the policy."""
    tokenizer = AutoTokenizer.from_pretrained(data / "rm")
    if kind == "other vocabulary":
        vocab = {token: i for i, token in enumerate(reversed(list(tokenizer.get_vocab())))}
        tokenizer = transformers.Qwen2Tokenizer(vocab, [], pad_token="<|pad|>", eos_token="<|end|>", unk_token=None)
    else:
        tokenizer.add_special_tokens({"pad_token": "<|more|>"})
    model = AutoModelForSequenceClassification.from_pretrained(data / "rm")
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "rm")
    asked, load = [], ppo.load_value_model
    monkeypatch.setattr(ppo, "load_value_model", lambda name: asked.append(str(name)) or load(name))
    metrics = run("ppo", tiny, data, tmp_path / "out", reward=str(tmp_path / "rm"), steps=1)
    assert asked == [str(tmp_path / "rm") if kind == "pad added" else tiny]
    assert 0 <= metrics["accuracy"] <= 1 and metrics["reward_std"] > 0


@ONLINE
def test_a_language_model_is_no_reward_model(name, tiny, data, tmp_path):
    with pytest.raises(SystemExit, match="a reward model has one label"):
        run(name, tiny, data, tmp_path / "out", reward=tiny)
    assert not (tmp_path / "out").exists()


def small_run(tmp_path, **options):
    """A run of a tiny model of random weights on 20 rows: the lines of its log behind the one before training."""
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "completion": "#### 0"} for i in range(20)]
    name = write_rows(tmp_path / "rows.jsonl", rows)
    model = save_tiny(tmp_path / "tiny", hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    options = {"model": model, "dataset": name, "sft_dataset": name, "out": f"{tmp_path}/out"} | options
    options |= {"prompts_per_step": 4, "group_size": 2, "max_new_tokens": 8, "lr": 3e-3, "warmup_steps": 1}
    last = SCRIPTS["composite_grpo"].main(SCRIPTS["composite_grpo"].Args(**options))
    log = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()][1:]
    assert log[-1] == {"step": len(log), **last}
    return log


def test_a_heavy_sft_term_teaches_the_demonstrations(tmp_path):
    """Ten updates lower its loss by a third. At weight 0 no demonstration is read."""
    log = small_run(tmp_path, steps=10, sft_coef=100.0)
    assert log[-1]["sft_loss"] < log[0]["sft_loss"] * 2 / 3
    (tmp_path / "without").mkdir()
    assert "sft_loss" not in small_run(tmp_path / "without", steps=1)[0]


def test_the_run_ends_past_its_budget_of_kl(tmp_path):
    """The KL is 0 before the first update. The first step in which it is above 0 is the last, evaluated and saved."""
    log = small_run(tmp_path, steps=5, kl_coef=0.0, kl_stop=1e-9, rewards=("length",), target_length=1)
    assert 2 <= len(log) < 5 and [step["kl_ref"] > 1e-9 for step in log] == [False] * (len(log) - 1) + [True]
    assert "eval/reward_greedy" in log[-1] and Path(tmp_path, "out", "checkpoints", f"step-{len(log)}").exists()


def test_a_missing_model_says_which_command_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="runs/rm-7 is not there: run `python rm.py --seed 1 --out runs/rm-7` first"):
        SCRIPTS["ppo_ensemble"].main(SCRIPTS["ppo_ensemble"].Args(rewards=("org/model", "runs/rm-7")))


@pytest.mark.parametrize("how", ["mean", "min", "std"])
def test_the_log_of_a_run(how, tmp_path):
    """Two opposed reward functions beside a model: their means, the disagreement and the truth are in the log."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(40)])
    (tmp_path / "own.py").write_text(
        "def longer(rows, texts):\n    return [len(text) for text in texts]\n\n\n"
        "def shorter(rows, texts):\n    return [-len(text) for text in texts]\n"
    )
    model = save_tiny(tmp_path / "tiny", hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config | {"num_labels": 1}))
    names = (model, f"{tmp_path}/own.py:longer", f"{tmp_path}/own.py:shorter")
    options = {"model": model, "dataset": rows, "rewards": names, "ensemble": how, "ensemble_coef": 1.0}
    options |= {"prompts_per_step": 8, "num_minibatches": 2, "max_new_tokens": 6, "steps": 1, "out": f"{tmp_path}/out"}
    last = SCRIPTS["ppo_ensemble"].main(SCRIPTS["ppo_ensemble"].Args(**options))
    means = [last[f"reward/{name}"] for name in names]
    assert abs(means[1] + means[2]) < 1e-5 and last["disagreement"] > 0 and last["accuracy"] == 0
    expected = sum(means) / 3 - (last["disagreement"] if how == "std" else 0)
    assert last["reward"] < min(means) if how == "min" else abs(last["reward"] - expected) < 1e-5


# --------------------------------------------------------------------------------------------------------------- resume


class Killed(BaseException):
    pass


@ALL
def test_a_killed_run_goes_on_bit_for_bit(name, runs, tiny, data, tmp_path, monkeypatch):
    """Killed in step 3, with a torn last line in the log; then anew while the checkpoint of step 3 is written, which
    leaves the one before; then to the end: weights and metrics are those of the undisturbed run."""
    script, out = SCRIPTS[name], tmp_path / "out"
    log, rename = script.log, Path.rename

    def dies_in_step_3(args, step, metrics):
        log(args, step, metrics)
        if step == 3:
            with open(out / "metrics.jsonl", "a") as file:
                file.write('{"step": 4, "lo')
            raise Killed

    monkeypatch.setattr(script, "log", dies_in_step_3)
    with pytest.raises(Killed):
        run(name, tiny, data, out)
    monkeypatch.setattr(script, "log", log)
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        run(name, tiny, data, out, resume=True)
    assert sorted(os.listdir(out / "checkpoints")) == ["step-2", "step-3.tmp"]
    monkeypatch.setattr(Path, "rename", rename)
    run(name, tiny, data, out, resume=True)
    same_run(out, runs(name)[0])
    assert os.listdir(out / "checkpoints") == ["step-3"]
    with pytest.raises(SystemExit, match="is finished"):
        run(name, tiny, data, out, resume=True)


def test_kill_9_from_the_command_line(tiny, data, runs, tmp_path):
    """The same with a process that is really killed, somewhere after its first checkpoint."""
    wanted = settings("grpo", tiny, data, tmp_path / "out", steps=40)
    words = [x for key, value in wanted.items() for x in (f"--{key.replace('_', '-')}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, ROOT / "grpo.py", *words], env=environment, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "out").glob("checkpoints/step-*[0-9]")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run("grpo", tiny, data, tmp_path / "out", steps=40, resume=True)
    run("grpo", tiny, data, tmp_path / "straight", steps=40)
    same_run(tmp_path / "out", tmp_path / "straight")


# --------------------------------------------------------------------------------------------------------------- errors

ENDS = [  # scripts, changes, words of the one sentence
    (CORE, {"dataset": [{"text": "x", "id": 1}] * 60}, r"row 1 .*`.* has (only )?text, id"),
    (CORE, {"dataset": []}, "too few rows"),
    (["grpo", "ppo"], {"dataset": [{"prompt": "1"}] * 60, "reward": "exact"}, "row 1 .*`answer`.*has only prompt"),
    (["sft", "rm", "dpo"], {"batch_size": 58}, r"too few rows for a step \(58\)"),
    (["grpo", "ppo"], {"prompts_per_step": 58}, r"too few rows for a step \(58\)"),
    (["ppo"], {"num_minibatches": 3}, "--num-minibatches 3"),
    (["grpo"], {"group_size": 1}, "--group-size 1"),
    (["grpo", "ppo"], {"temperature": 0.0}, "--temperature 0"),
    (["grpo", "ppo"], {"max_new_tokens": 40_000}, "40.* tokens do not fit the model"),
    (["sft", "rm", "dpo"], {"max_length": 4}, "too few rows"),
    (["grpo", "ppo"], {"max_prompt_length": 2}, "too few rows"),
    (CORE, {"eval_size": 0}, "too few rows"),
    (CORE, {"steps": -1}, "is finished"),
]


@pytest.mark.parametrize(
    ("name", "changes", "words"), [(name, changes, words) for names, changes, words in ENDS for name in names]
)
def test_what_ends_a_run_before_anything_is_written(name, changes, words, tiny, data, tmp_path):
    if isinstance(changes.get("dataset"), list):
        changes = {**changes, "dataset": write_rows(tmp_path / "rows.jsonl", changes["dataset"])}
    with pytest.raises(SystemExit, match=words) as ended:
        run(name, tiny, data, tmp_path / "out", **changes)
    assert "\n" not in str(ended.value) and not (tmp_path / "out").exists()


@FIVE
def test_models_and_folders_that_end_a_run(name, tiny, data, runs, tmp_path, monkeypatch):
    """A tokenizer without EOS, a window that is too small, a folder that holds a run, runs/sft that is not there."""
    for changed in ("eos", "window"):
        folder = save_tiny(tmp_path / changed, **({"max_position_embeddings": 8} if changed == "window" else {}))
        if changed == "eos":
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.eos_token, tokenizer.chat_template = None, None
            (Path(folder) / "chat_template.jinja").unlink()
            tokenizer.save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder)
            model.generation_config.eos_token_id = model.config.eos_token_id = None
            model.save_pretrained(folder)
        with pytest.raises(SystemExit, match="no EOS token" if changed == "eos" else "do not fit the model"):
            run(name, folder, data, tmp_path / "out")
    before = sorted(path.name for path in runs(name)[0].rglob("*"))
    with pytest.raises(SystemExit, match="holds a run: --resume it, or choose another --out"):
        run(name, tiny, data, runs(name)[0])
    assert sorted(path.name for path in runs(name)[0].rglob("*")) == before
    monkeypatch.chdir(tmp_path)
    if name != "sft":
        with pytest.raises(SystemExit, match="runs/sft is not there: run `python sft.py` first"):
            run(name, "runs/sft", data, tmp_path / "out")
    if name == "ppo":
        with pytest.raises(SystemExit, match="runs/rm is not there: run `python rm.py` first"):
            run(name, tiny, data, tmp_path / "out", reward="runs/rm")
    assert not (tmp_path / "out").exists()


@ONLINE
def test_a_reward_that_fails_at_once_leaves_the_folder_free(name, tiny, data, tmp_path):
    (tmp_path / "r.py").write_text("def f(rows, completions): return [float('nan')] * len(rows)\n")
    with pytest.raises(SystemExit, match="finite numbers"):
        run(name, tiny, data, tmp_path / "out", reward=f"{tmp_path}/r.py:f")
    assert not (tmp_path / "out").exists()


@FIVE
def test_tracking_offline(name, tiny, data, tmp_path, monkeypatch):
    """--track logs every step to Weights & Biases."""
    logged = []
    run_ = type("Run", (), {"log": lambda self, metrics, step: logged.append(step)})()
    fake = type(sys)("wandb")
    fake.run, fake.init = None, lambda **options: setattr(fake, "run", run_) or run_
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(name, tiny, data, tmp_path / "out", steps=2, track=True)
    assert logged == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------------ real rows


def test_gsm8k_and_hh_rows_run_through_all_five(tiny, tmp_path):
    """GSM8K as published, completions up to 400 tokens; conversations as HH-RLHF has them."""
    flags = {"steps": 2, "eval_size": 2, "eval_every": 0, "save_every": 0, "micro_batch_size": 4}
    gsm8k, hh = str(DATA / "gsm8k_sample.jsonl"), str(DATA / "hh_sample.jsonl")
    sft.main(sft.Args(model=tiny, dataset=gsm8k, batch_size=4, out=str(tmp_path / "sft"), **flags))
    online = {"model": str(tmp_path / "sft"), "dataset": gsm8k, "prompts_per_step": 2, "max_new_tokens": 400}
    metrics = grpo.main(grpo.Args(group_size=2, max_prompt_length=1000, out=str(tmp_path / "grpo"), **online, **flags))
    assert metrics["completion_length"] > 100
    ppo.main(
        ppo.Args(
            reward="exact", num_minibatches=1, max_prompt_length=1000, out=str(tmp_path / "ppo"), **online, **flags
        )
    )
    for name in ("rm", "dpo"):
        script = SCRIPTS[name]
        metrics = script.main(
            script.Args(model=tiny, dataset=hh, eval_dataset=hh, batch_size=4, out=str(tmp_path / name), **flags)
        )
        assert 0 <= metrics["eval/pair_accuracy"] <= 1
    shutil.rmtree(tmp_path)
