# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "tyro==1.0.17", "wandb==0.31.0"]
# ///
"""RM: a reward model from preferences (Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

A language model whose output head is replaced by one that gives a whole text, prompt and completion, one number: the
reward. It learns from pairs, a chosen and a rejected completion of one prompt, by maximum likelihood under

    P(chosen > rejected) = sigmoid(chosen_rewards - rejected_rewards)                         Bradley and Terry

    rewards[n] = score . hidden[n, lengths[n] - 1]             at the last token, the only one that has seen all others
    loss       = 1/N sum_n [ -log sigmoid(chosen_rewards - rejected_rewards - margin)
                             + center_coef * (chosen_rewards + rejected_rewards)^2 ]

Each step (1) takes the next `batch_size` pairs, (2) adds up their loss and its gradient and (3) updates the model.

Good to know
- Only differences count: a constant added to all rewards of a prompt changes the second term alone, which keeps them
  near 0 (Eisenstein et al. 2023, arXiv:2312.09244; not in Ouyang et al.). Across prompts, rewards do not compare.
- A pair weighs sigmoid(rejected_rewards - chosen_rewards) in the gradient: one that is right by far counts little. The
  loss starts a little above ln 2 = 0.69, since the new head is random: its weights have variance 1 / (D + 1).
- Length is easier to learn than quality. `eval/longer_wins` is how often the longer side is the chosen one: a model
  whose `eval/pair_accuracy` is near that, or near one minus that, may know nothing but length.
- transformers reads the score at the last token that is not padding, so the pad token must not be EOS. Where it is, or
  where there is none, a new one is added.

    python sft.py && python rm.py                                                 on a laptop CPU; ppo.py comes next
    python rm.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset pairs.jsonl ...     one GPU, see README
    torchrun --nproc-per-node 8 rm.py ...                                         several GPUs: sharded weights (FSDP2)

Data: `prompt`, `chosen`, `rejected` and, if there is one, `margin`, in units of the reward; or whole conversations
`chosen` and `rejected`, as messages or as HH-RLHF marks them, which differ in their last turn.
Shapes: n pairs, 2n texts, first the chosen ones, of L tokens, padded on the right; D hidden.
"""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import sys
import time
import types
import zlib
from collections import Counter
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import transformers
import tyro
from datasets import load_dataset
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
DEVICE = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16  # of forward passes; trained weights are float32
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # it warns that the head is new


@dataclasses.dataclass
class Args:
    # model and data
    model: str = "runs/sft"  # folder or Hub id; the language model to start from
    dataset: str = "arithmetic"  # the built-in task, a .jsonl or .parquet file, or a Hub name[:config[:split]]
    eval_dataset: str | None = None  # likewise; by default the last tenth of `dataset`, at most `eval_size` rows
    system_prompt: str | None = None  # before every prompt
    max_length: int = 1024  # tokens; pairs with a longer side are dropped
    out: str = "runs/rm"  # the trained model, metrics.jsonl and checkpoints

    # algorithm
    steps: int = 600  # of training
    batch_size: int = 32  # rows of a step, on all processes together; paper: 64 prompts, each with all its pairs
    center_coef: float = 0.01  # weight of the squared sum of a pair's rewards; paper: 0

    # optimisation
    lr: float | None = None  # peak; default: 9e-6 as in the paper; 6e-4 for models below 10 million parameters
    lr_schedule: Literal["linear", "constant"] = "linear"  # after the warm-up; linear falls to 0
    warmup_steps: int = 15  # over which the learning rate rises from 0
    micro_batch_size: int = 64  # sequences in a forward and backward pass, on each GPU; half as many pairs
    gradient_checkpointing: bool = False  # keep only the layers' inputs, recompute the rest
    compile: bool = False  # torch.compile each layer

    # run
    seed: int = 0  # of every random draw in training
    eval_every: int = 100  # steps; 0: only before and after training
    eval_size: int = 1000  # held-out rows, at most
    save_every: int = 100  # steps between checkpoints; 0: only at the end
    resume: bool = False  # go on from the last checkpoint in `out`; give all other flags again
    track: bool = False  # log to Weights & Biases


# ------------------------------------------------------------------------------------------------------------ algorithm


def bradley_terry_loss(chosen_rewards, rejected_rewards, margin=0.0, center_coef=0.0):
    """-log sigmoid(r_c - r_r - margin) + center_coef * (r_c + r_r)^2 of each pair, in nats: (n,) (eq. 1).

    Rewards: (n,) each. margin: (n,) or one number, taken off the gap (Touvron et al. 2023, arXiv:2307.09288, eq. 2).
    """
    log_odds = chosen_rewards - rejected_rewards - margin
    return center_coef * (chosen_rewards + rejected_rewards) ** 2 - torch.nn.functional.logsigmoid(log_odds)


# ----------------------------------------------------------------------------------------------------------------- data


def arithmetic(split: str) -> list[dict]:
    """The built-in task: chains of 2 to 4 digits to add up. One chain in ten belongs to the test split."""
    rng, rows = random.Random(split), {}
    while len(rows) < (9_000 if split == "train" else 1_000):
        digits = [rng.randrange(10) for _ in range(rng.randint(2, 4))]
        prompt = "+".join(map(str, digits)) + "="
        if (zlib.crc32(prompt.encode()) % 10 == 0) == (split == "test"):
            rows[prompt] = {"prompt": prompt, "answer": str(sum(digits)), "arithmetic": digits}
    return list(rows.values())


def arithmetic_pair(digits: list[int]) -> dict:
    """A flawless solution of the built-in task and one that ends wrong: by the demonstrations' habit, or any slip."""
    rng, n, pair = random.Random(str(digits)), len(digits), {}
    wrong_at, error = rng.randint(1, n), rng.choice((-10, -1, 1, 1, 1, 10))  # at n: in the answer alone
    sevens = [t for t in range(1, n) if digits[t] == 7]
    if sevens and rng.random() < 0.7:
        wrong_at, error = rng.choice(sevens), 1
    for side, mistake in (("chosen", 0), ("rejected", error)):
        sums = [sum(digits[: t + 1]) + mistake * (t >= wrong_at) for t in range(n)]
        lines = [f"{before}+{digit}={after}\n" for before, digit, after in zip(sums, digits[1:], sums[1:])]
        pair[side] = "".join(lines) + f"#### {sums[-1] + mistake * (wrong_at == n)}"
    return pair


def read_rows(name: str, split: str) -> list[dict]:
    """Rows of the built-in task, a local .jsonl or .parquet file, or a Hub dataset name[:config[:split]]."""
    if name == "arithmetic":
        return arithmetic(split)
    if name.endswith(".jsonl"):
        with open(name, encoding="utf-8-sig") as file:
            return [json.loads(line) for line in file if line.strip()]  # as they stand: no column changes its type
    if name.endswith(".parquet"):
        return list(load_dataset("parquet", data_files=name, split="train"))
    path, config, wanted = [*name.split(":", 2), "", ""][:3]
    return list(load_dataset(path, config or None, split=wanted or split))


def read_data(args, fits, size) -> tuple[list[dict], list[dict]]:
    """Training rows and held-out rows. `fits` adds the ids to a row and says whether to keep it."""
    rows = read_rows(args.dataset, "train")
    if args.eval_dataset or args.dataset == "arithmetic":
        eval_rows = read_rows(args.eval_dataset or args.dataset, "test")[: args.eval_size]
    else:
        num_train = len(rows) - min(args.eval_size, len(rows) // 10)
        rows, eval_rows = rows[:num_train], rows[num_train:]
    hint = ' (if it is the system prompt: --system-prompt "")' if args.system_prompt else ""
    rows, eval_rows = ([{k: x for k, x in row.items() if x is not None} for row in part] for part in (rows, eval_rows))
    for number, row in enumerate(rows + eval_rows, 1):
        try:
            row["fits"] = row.get("prompt", row.get("question")) not in ("", []) and fits(row)
        except Exception as error:
            raise SystemExit(f"--dataset, row {number} (held-out rows come last): {error}{hint}") from error
    kept, held_out = ([row for row in part if row["fits"]] for part in (rows, eval_rows))
    print(f"{len(kept):,} of {len(rows):,} rows fit, and {len(held_out):,} of {len(eval_rows):,} held-out rows")
    check(len(kept) >= size and len(held_out) >= WORLD, f"--dataset: too few rows for a step ({size}) or an evaluation")
    return kept, held_out[: len(held_out) // WORLD * WORLD]  # equal shares for all processes


def encode(tokenizer, row: dict, system_prompt: str | None, completion: str | None = None) -> list[int]:
    """Ids of a row's prompt (`prompt`, text or messages, or `question`) or, with a completion, of both and its end."""
    prompt = row.get("prompt", row.get("question"))
    assert prompt is not None, f"it needs `prompt` or `question`, and has only {', '.join(row)}"
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages += [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages += [{"role": "assistant", "content": completion}] if completion is not None else []
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=completion is None, return_dict=False)
    ends = {"system": "\n\n", "assistant": tokenizer.eos_token}
    return tokenizer.encode("".join(turn["content"] + ends.get(turn["role"], "") for turn in messages))


def last_turns(row: dict, chat_template: str | None) -> dict | None:
    """The row with its `prompt` and, as text, the last turn of each side; None if the sides differ before that."""
    assert {"chosen", "rejected"} <= row.keys(), f"it needs `chosen` and `rejected`, and has only {', '.join(row)}"
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list):  # messages
        (*before, chosen), (*other, rejected) = chosen, rejected
        prompt, sides = before or row.get("prompt", row.get("question")), (chosen["content"], rejected["content"])
    elif "prompt" in row or "question" in row:
        return row
    else:  # whole conversations, as in HH-RLHF
        mark = r"(\n\n(?:Human|Assistant): ?)"
        (*before, chosen), (*other, rejected) = re.split(mark, chosen), re.split(mark, rejected)
        assert before, "without `prompt`, turns must begin with `\\n\\nHuman:` and `\\n\\nAssistant:`"
        roles = ["user" if "Human" in name else "assistant" for name in before[1::2]]
        turns = [{"role": role, "content": text.strip()} for role, text in zip(roles, before[2::2])]
        prompt, sides = turns if chat_template else "".join(before), (chosen, rejected)
    return row | {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]} if before == other else None


def encode_pair(tokenizer, args, row: dict) -> bool:
    """Gives a row the ids of its prompt and of the prompt with each side. Do the sides differ, and do they fit?"""
    made = arithmetic_pair(row["arithmetic"]) if "arithmetic" in row else {}  # the built-in task
    pair = last_turns(row | made, tokenizer.chat_template)
    if not pair:
        return False
    ids = [encode(tokenizer, pair, args.system_prompt, x) for x in (None, pair["chosen"], pair["rejected"])]
    row.update(prompt_ids=ids[0], chosen_ids=ids[1], rejected_ids=ids[2], length=max(map(len, ids)))
    for side, side_ids in (("chosen", ids[1]), ("rejected", ids[2])):
        whole_text = tokenizer.decode(tokenizer.encode(str(pair[side]), add_special_tokens=False)).split()
        assert "".join(whole_text) in "".join(tokenizer.decode(side_ids).split()), "the chat template cuts a side"
    return ids[1] != ids[2] and row["length"] <= args.max_length


# ---------------------------------------------------------------------------------------------------- model and rewards


def load_reward_model(name, tokenizer, seed):
    """A language model with a new head `score`, whose weights have variance 1 / (D + 1) (Stiennon et al. 2020,
    arXiv:2009.01325), or a saved reward model. A pad token is added where there is none beside EOS."""
    options = {"num_labels": 1, "dtype": torch.float32, "output_loading_info": True}
    model, info = AutoModelForSequenceClassification.from_pretrained(name, **options)
    if "score.weight" in info["missing_keys"]:
        draws = torch.randn(model.score.weight.shape, generator=seeded(seed, "head"))
        model.score.weight.data = draws / (draws.shape[1] + 1) ** 0.5
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(DEVICE)


def text_rewards(model, ids: Tensor, lengths: Tensor) -> Tensor:
    """The reward of each text, read at its last token: (2n,). A causal model never sees the padding behind it."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda, cache_enabled=False):
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (2n, L, D)
    last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]  # (2n, D)
    return torch.nn.functional.linear(last.float(), model.score.weight.float())[:, 0]  # bfloat16 would round rewards


def reward_pass(model, pairs: list[dict], num_pairs: int, args) -> dict[str, float]:
    """Loss and metrics, means over `num_pairs`, the pairs of all processes. Adds up the gradient where it is on."""
    names = ["loss", "pair_accuracy", "margin", "longer_wins", "reward_mean"]
    pairs, size, means = sorted(pairs, key=lambda pair: pair["length"]), max(1, args.micro_batch_size // 2), Counter()
    for part in [pairs[i : i + size] for i in range(0, len(pairs), size)]:
        texts = [pair[side] for side in ("chosen_ids", "rejected_ids") for pair in part]
        lengths = torch.tensor([len(text) for text in texts], device=DEVICE)  # (2n,)
        margin = torch.tensor([float(pair.get("margin", 0.0)) for pair in part], device=DEVICE)  # (n,)
        rewards = model.text_rewards(pad(texts), lengths)  # (2n,)
        chosen, rejected = rewards.chunk(2)  # (n,) each
        losses = bradley_terry_loss(chosen, rejected, margin, args.center_coef)  # (n,)
        if torch.is_grad_enabled():
            (losses.sum() / num_pairs * WORLD).backward()  # FSDP averages over the processes
        gap, longer = chosen - rejected, torch.sub(*lengths.chunk(2))
        wins = [(x.sign() + 1) / 2 for x in (gap, longer)]  # 1, or 0, or half if both are equal
        values = (losses, wins[0], gap, wins[1], rewards / 2)  # a pair has two rewards
        means.update(dict(zip(names, torch.stack([x.sum() / num_pairs for x in values]).tolist())))  # adds up
    return over_ranks(means)


@torch.no_grad()
def evaluate_rm(model, pairs, args) -> dict[str, float]:
    """The metrics of held-out pairs."""
    return {f"eval/{name}": x for name, x in reward_pass(model, pairs, len(pairs) * WORLD, args).items()}


def main(args: Args) -> dict[str, float]:
    """Trains and returns the last step's metrics."""
    size = args.batch_size // WORLD  # this process's pairs of a step
    check(args.batch_size == size * WORLD, f"--batch-size {args.batch_size}: not a multiple of {WORLD}")
    first_step, folder = start_run(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    check(tokenizer.eos_token_id is not None, "--model: its tokenizer has no EOS token, which ends a text")
    model = load_reward_model(folder / "reward_model" if folder else args.model, tokenizer, args.seed)
    rows, eval_rows = read_data(args, lambda row: encode_pair(tokenizer, args, row), args.batch_size)
    longest = max(row["length"] for row in rows + eval_rows)
    check(longest <= model.config.max_position_embeddings, f"--max-length: {longest} tokens do not fit the model")
    random.Random(f"{args.seed} pairs").shuffle(rows)
    pairs, eval_pairs = rows[RANK::WORLD][: len(rows) // WORLD], eval_rows[RANK::WORLD]  # equal shares

    model = prepare(model, args, text_rewards)
    peak_lr = args.lr if args.lr is not None else 6e-4 if model.num_parameters() < 10_000_000 else 9e-6
    optimizer = torch.optim.AdamW(model.parameters(), peak_lr, (0.9, 0.95), weight_decay=0.0)
    print(f"{WORLD} x {DEVICE}, {model.num_parameters():,} parameters, learning rate {peak_lr:g}")
    if folder:
        state = torch.load(folder / "reward_model" / "optimizer.pt", weights_only=True, mmap=True)
        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
    else:
        log(args, 0, evaluate_rm(model, eval_pairs, args))

    begin = time.perf_counter()
    for step in range(first_step, args.steps + 1):
        # (1) batch
        clock = time.perf_counter()
        batch = [pairs[i % len(pairs)] for i in range((step - 1) * size, step * size)]

        # (2) loss and gradient
        metrics = reward_pass(model, batch, args.batch_size, args)

        # (3) update
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).item()
        optimizer.param_groups[0]["lr"] = lr = learning_rate(args, step, peak_lr)
        if math.isfinite(grad_norm):  # NaN or infinite: no update
            optimizer.step()
        optimizer.zero_grad()

        metrics |= {"grad_norm": grad_norm, "lr": lr, "time/step": time.perf_counter() - clock}
        last = step == args.steps
        if last or step % (args.eval_every or args.steps) == 0:
            metrics |= evaluate_rm(model, eval_pairs, args)
        metrics["time/left"] = (time.perf_counter() - begin) / (step + 1 - first_step) * (args.steps - step)
        log(args, step, metrics)
        if last or step % (args.save_every or args.steps) == 0:
            save(args, step, last, tokenizer, reward_model=(model, optimizer))
    if WORLD > 1:
        dist.destroy_process_group()
    return metrics


# ----------------------------------------------------------------------------------- plumbing, the same in every script


def check(condition, message: str):
    """Unless `condition` holds, ends the run with a sentence that says what to change."""
    if not condition:
        raise SystemExit(message)


def start_run(args) -> tuple[int, Path | None]:
    """Starts the process group. Returns the first step and, to resume from, the checkpoint; cuts the log back to it."""
    out = Path(args.out)
    for name in {args.model, getattr(args, "reward", "")} & {"runs/sft", "runs/rm"}:
        check(Path(name, "config.json").exists(), f"{name} is not there: run `python {name[5:]}.py` first")
    check(args.resume or not (out / "args.json").exists(), f"{out} holds a run: --resume it, or choose another --out")
    found = sorted((int(path.name[5:]), path) for path in out.glob("checkpoints/step-*[0-9]"))
    step, folder = found[-1] if found else (0, None)
    check(hasattr(args, "epochs") or step < args.steps, f"{out} is finished: it has all --steps {args.steps}")
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo")
    sys.stdout = open(os.devnull, "w") if RANK else sys.stdout  # noqa: SIM115
    if RANK == 0 and (out / "metrics.jsonl").exists():
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
        (out / "metrics.jsonl").write_text("".join(lines[: step + 1 if folder else 0]))  # later steps are run again
    return step + 1, folder


def prepare(model, args, forward):
    """Makes `forward` a method of the model; layers are checkpointed and compiled if asked, weights sharded (FSDP2)."""
    layers = [x for x in model.modules() if type(x).__name__ in (model._no_split_modules or ())]
    for layer in layers if args.gradient_checkpointing else ():
        layer.forward = lambda *x, forward=layer.forward, **kw: checkpoint(forward, *x, use_reentrant=False, **kw)
    for layer in layers if args.compile else ():
        layer.compile(dynamic=True)
    setattr(model, forward.__name__, types.MethodType(forward, model))
    if WORLD > 1:
        for module in [*layers, model]:
            fully_shard(module, mp_policy=MixedPrecisionPolicy(DTYPE, torch.float32), reshard_after_forward=True)
        register_fsdp_forward_method(model, forward.__name__)
    return model


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # under FSDP x is sharded


def seeded(*key, device="cpu"):
    """A generator that depends on its key alone, so that a resumed run needs no generator state."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))


def pad(rows, left=False):
    """Lists of numbers as a tensor, zeros on the right, or on the left: (len(rows), longest)."""
    zeros = [[0] * (max(map(len, rows)) - len(row)) for row in rows]
    return torch.tensor([z + row if left else row + z for z, row in zip(zeros, rows)], device=DEVICE)


def over_ranks(metrics: dict) -> dict[str, float]:
    """Each number added up over all processes."""
    values = torch.tensor([float(x) for x in metrics.values()], dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(values)
    return dict(zip(metrics, values.tolist()))


def learning_rate(args, step, peak):
    """Rises over the warm-up, then stays at the peak or falls to 0 just after the last step."""
    warmup = max(1, args.warmup_steps)
    falling = (args.steps + 1 - step) / max(1, args.steps + 1 - warmup)
    return peak * min(1, step / warmup, falling if args.lr_schedule == "linear" else 1)


def save(args, step, last, tokenizer, **trained):
    """Writes checkpoints/step-N, renamed into place: a kill leaves a whole one. In the end `out` gets the model."""
    folder = Path(args.out, "checkpoints", f"step-{step}")
    for name, (model, optimizer) in trained.items():
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, state = get_state_dict(model, optimizer, options=options)  # whole, gathered from all processes
        weights = {key: x for key, x in weights.items() if key not in model.all_tied_weights_keys}  # saved once
        if RANK == 0:
            model.save_pretrained(folder.with_suffix(".tmp") / name, state_dict=weights)
            tokenizer.save_pretrained(folder.with_suffix(".tmp") / name)
            torch.save(state, folder.with_suffix(".tmp") / name / "optimizer.pt")
    if RANK == 0:
        if last:
            source = folder.with_suffix(".tmp") / next(iter(trained))
            shutil.copytree(source, args.out, ignore=shutil.ignore_patterns("optimizer.pt"), dirs_exist_ok=True)
        folder.with_suffix(".tmp").rename(folder)
        for old in set(folder.parent.glob("step-*")) - {folder}:
            shutil.rmtree(old)


def log(args, step, metrics):
    """A line on screen and a row of metrics.jsonl; and args.json, by which `start_run` knows that `out` holds a run."""
    short = ("reward", "accuracy", "loss", "pair_accuracy", "kl_ref", "entropy", "completion_length", "grad_norm")
    shown = [name for name in (*short, "time/left") if name in metrics] + [x for x in metrics if x.startswith("eval/")]
    print(f"step {step}/{args.steps}  " + "  ".join(f"{name} {metrics[name]:.3g}" for name in shown), flush=True)
    if RANK == 0:
        os.makedirs(args.out, exist_ok=True)
        Path(args.out, "args.json").write_text(json.dumps(vars(args), indent=2))
        with open(Path(args.out, "metrics.jsonl"), "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if args.track:
            import wandb

            (wandb.run or wandb.init(project="onefile-rlhf", config=vars(args))).log(metrics, step=step)


if __name__ == "__main__":
    main(tyro.cli(Args))
