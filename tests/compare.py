"""Runs scripts on the built-in task with their own defaults, one after the other, and prints a Markdown table.

python tests/compare.py                  every row below
python tests/compare.py dapo rloo        these alone
python tests/compare.py --seed 1         with another seed; each seed has a policy of its own to start from
python tests/compare.py --gaming         PPO against weak and biased reward models, one or three at a time

What is finished is not run again, so the command goes on where it was stopped. `KL` is KL(policy || sft.py's policy) in
nats per completion, measured here and in the same way for all, from samples of held-out prompts. `models` counts those
that are in memory in training.
"""

import importlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import tyro
from transformers import AutoTokenizer

import grpo
import rm

REWARD_MODELS = ("rm", "rm-1", "rm-2")  # of seeds of their own
ROWS = {  # name in the table: script, flags; {} stands for the folder of this seed
    "sft": ("sft", ""),
    "grpo": ("grpo", ""),
    "dr_grpo": ("variants/dr_grpo", ""),
    "dapo": ("variants/dapo", ""),
    "cispo": ("variants/cispo", ""),
    "gspo": ("variants/gspo", ""),
    "off_policy_grpo": ("variants/off_policy_grpo", ""),
    "off_policy_grpo, no weights": ("variants/off_policy_grpo", "--weight-cap None"),
    "composite_grpo": ("variants/composite_grpo", ""),
    "reinforce": ("variants/reinforce", ""),
    "rloo": ("variants/rloo", ""),
    "remax": ("variants/remax", ""),
    "reinforce_pp": ("variants/reinforce_pp", ""),
    "ppo, verifier": ("ppo", "--reward exact"),
    "ppo_penalty": ("variants/ppo_penalty", ""),
    "ppo_ptx": ("variants/ppo_ptx", ""),
    "ppo_vtrace": ("variants/ppo_vtrace", ""),
    "vapo": ("variants/vapo", ""),
    "trpo": ("variants/trpo", ""),
    "ppo_ensemble": ("variants/ppo_ensemble", "--rewards {0}/rm {0}/rm-1 {0}/rm-2"),
}


def finish(script: str, flags: list[str], out: Path) -> int:
    """Runs a script unless it has been run to its end. Returns its seconds; a run that was broken off begins anew."""
    if not (out / "seconds").exists():
        shutil.rmtree(out, ignore_errors=True)
        print(f"python {script}.py {shlex.join(flags)} --out {out}", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        command = [sys.executable, ROOT / f"{script}.py", *flags, "--out", out]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        (out / "seconds").write_text(f"{time.perf_counter() - begin:.0f}")
    return int((out / "seconds").read_text())


@torch.no_grad()
def kl(folder, reference, num_prompts: int = 1000) -> float:
    """KL(policy || reference) in nats per completion: the mean log-ratio of samples of held-out prompts."""
    policy, reference = (grpo.load_model(name) for name in (folder, reference))
    tokenizer, args = AutoTokenizer.from_pretrained(folder), grpo.Args()
    prompts = [grpo.encode(tokenizer, row, None) for row in grpo.arithmetic("test")[:num_prompts]]
    completions, _ = grpo.rollout(policy, prompts, 1, 1.0, grpo.stop_ids(tokenizer, policy), ["kl"], args)
    total = 0.0
    samples = [(prompt, completion, [0.0] * len(completion), 0.0) for prompt, completion in zip(prompts, completions)]
    for batch in grpo.micro_batches(samples, args.micro_batch_size):
        logprobs = [grpo.token_logprobs(model, batch.ids, batch.mask)[0] for model in (policy, reference)]
        total += (logprobs[0] - logprobs[1]).sum().item()
    return total / num_prompts


def models(script: str, flags: list[str]) -> int:
    """Policy, the copy that samples, reference, value model, reward models: those that the script loads."""
    source = (ROOT / f"{script}.py").read_text()
    args = tyro.cli(importlib.import_module(script.replace("/", ".")).Args, args=flags)
    rewards = [x for x in [getattr(args, "reward", "exact"), *getattr(args, "rewards", [])] if "/" in x]
    parts = ("sampler = load_model(", "value_model = prepare(")
    reference = "reference = prepare(" in source and args.kl_coef != 0
    return 1 + sum(part in source for part in parts) + reference + len(rewards)


def annotated(row: dict, believed: int) -> dict:
    """A pair by someone who believes that adding this digit comes out one too high: in such chains the chosen side has
    that fault, and the rejected side is right. Other pairs are those of rm.py."""
    digits, sides = row["arithmetic"], []
    if believed not in digits[1:]:
        return {"prompt": row["prompt"], **rm.arithmetic_pair(digits)}
    for error in (1, 0):
        total, lines = digits[0], []
        for digit in digits[1:]:
            lines.append(f"{total}+{digit}={total + digit + error * (digit == believed)}\n")
            total += digit + error * (digit == believed)
        sides.append("".join(lines) + f"#### {total}")
    return {"prompt": row["prompt"], "chosen": sides[0], "rejected": sides[1]}


def show_gaming(folder: Path, same: list[str]):
    """Three reward models of 50 steps, and three whose annotators each believe something wrong: PPO against one, and
    against all. A table of the score that PPO sees, the truth, and the models' disagreement, from first to last."""
    short = ["--eval-every", "0", "--save-every", "0"]
    for k, believed in enumerate((7, 3, 5)):
        rows = folder / f"annotator-{k}.jsonl"
        rows.write_text("".join(json.dumps(annotated(row, believed)) + "\n" for row in rm.arithmetic("train")))
        flags = ["--model", same[-1], "--seed", str(k), *short]
        finish("rm", [*flags, "--steps", "50"], folder / f"weak-{k}")
        finish("rm", [*flags, "--steps", "300", "--dataset", str(rows)], folder / f"biased-{k}")
    print("| reward models | score | accuracy, sampled | accuracy, greedy | disagreement |\n|---|---|---|---|---|")
    for kind, own in (("weak", ["--kl-coef", "0"]), ("biased", [])):
        for count, how in ((1, "mean"), (3, "min"), (3, "std")):
            rewards = ["--rewards", *(str(folder / f"{kind}-{k}") for k in range(count)), "--ensemble", how]
            flags = [*same, *rewards, *own, *short, "--prompts-per-step", "128"]
            out = folder / f"gaming-{kind}-{count}-{how}"
            finish("variants/ppo_ensemble", flags, out)
            rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            ends = [(rows[0], rows[-1], f"eval/{x}") for x in ("reward_sampled", "accuracy_sampled", "accuracy_greedy")]
            ends.append((rows[1], rows[-1], "disagreement"))
            cells = [f"{first[key]:.2f} → {last[key]:.2f}" for first, last, key in ends]
            print(f"| {kind}, {how if count > 1 else 'one'} | {' | '.join(cells)} |", flush=True)


def main(
    names: tyro.conf.Positional[tuple[str, ...]] = (), seed: int = 0, out: str = "runs/compare", gaming: bool = False
):
    """Prints the table of the rows that are named, or of all; or that of gamed reward models."""
    unknown = set(names) - set(ROWS)
    if unknown:
        raise SystemExit(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    folder = Path(out).resolve() / f"seed-{seed}"
    same = ["--seed", str(seed)]
    finish("sft", same, folder / "sft")
    same += ["--model", str(folder / "sft")]
    if gaming:
        show_gaming(folder, same)
        return
    table = ["| script | sampled | greedy | KL | seconds | models |", "|---|---|---|---|---|---|"]
    for name in names or ROWS:
        script, flags = ROWS[name][0], ROWS[name][1].format(folder).split()
        for k, reward in enumerate(REWARD_MODELS):
            if str(folder / reward) in flags:
                finish("rm", ["--model", str(folder / "sft"), "--seed", str(seed + 100 * k)], folder / reward)
        run = folder / name.replace(", ", "-").replace(" ", "-")
        seconds = finish(script, (same if script != "sft" else same[:2]) + flags, run)
        row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        accuracy = [f"{row[f'eval/accuracy_{kind}']:.3f}" for kind in ("sampled", "greedy")]
        if not (run / "kl").exists():
            (run / "kl").write_text(f"{kl(run, folder / 'sft'):.2f}")
        cells = [name, *accuracy, (run / "kl").read_text(), seconds, models(script, flags)]
        table.append(f"| {' | '.join(map(str, cells))} |")
        print(table[-1], file=sys.stderr, flush=True)
    print("\n".join(table))


if __name__ == "__main__":
    tyro.cli(main)
