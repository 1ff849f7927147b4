# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "tyro==1.0.17", "wandb==0.31.0"]
# ///
"""RM: a reward model from preferences (Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

Maximise the likelihood of the preferences under P(chosen > rejected) = sigmoid(r_c - r_r). The loss that is minimised:

    loss     = 1/batch_size * sum_n [ -log sigmoid(r_c - r_r - margin) + center_coef * (r_c + r_r)^2 ]
    r        = score . hidden[length - 1]      one number for a whole text of `length` tokens, read at the last
    margin   a column of the data, in units of the reward; 0 where there is none (the metric `margin` is another thing)

Each step:  (1) batch: the next `batch_size` pairs of an endless stream of shuffled epochs
            (2) loss and gradient over token-budget micro-batches of whole pairs    (3) update

Signal: one comparison per pair. Its first term ignores a constant added to all rewards of a prompt, so `center_coef`
    (Eisenstein et al. 2023) is free to hold each pair's mean near 0.
KL: none.
Mask and normaliser: the last token (EOS, or what the chat template puts after it) is found by length, not by id. The
    mean is over the pairs of the whole step; a pair weighs sigmoid(r_r - r_c + margin) in the gradient of the first
    term, so one that is already right by far hardly counts.
Truncation: none. A pair of which either side exceeds `max_length` is dropped and counted.
Initialisation: the language model's weights, and a new head `score` without bias, drawn with mean 0 and variance
    1/(D+1) (Stiennon et al. 2020, arXiv:2009.01325); a reward model given as `model` keeps its head.
Unlike Ouyang et al.: pairs stand alone, not with all others of a prompt's 4 to 9 completions; margin and centering.

Data: rows of prompt + chosen + rejected, text or messages; or of chosen + rejected alone, whole conversations whose
    shared beginning is the prompt (messages, or text with turns marked as in HH-RLHF). `margin`, an optional column.

Run:  python sft.py && python rm.py                                                  a laptop CPU, under four minutes
      python rm.py --model Qwen/Qwen2.5-0.5B-Instruct ...  one GPU, or torchrun --nproc-per-node 8 rm.py ...; README

The model at `out` is an AutoModelForSequenceClassification with one label, whose pad token is no stop token, because
transformers reads the score at the last token that is not padding.
Metrics (metrics.jsonl), and what healthy looks like:
  loss                    at the start ln 2 = 0.69 and a little more, as the new head's draws are not 0; falls
  pair_accuracy, margin   of the step: share of pairs with r_c > r_r (0.5 if equal); mean gap r_c - r_r
  reward_mean, grad_norm, lr    the mean over both sides, near 0 if centred; the norm before clipping
  eval/loss, eval/pair_accuracy, eval/margin    held-out pairs, at step 0 too; eval/loss is the first term at margin 0
  eval/reward_mean, eval/reward_std    over both sides; the scale says how sure the model is, not how good it is
  eval/longer_wins        accuracy of preferring the longer side; eval/pair_accuracy should beat this and 1 - this
  eval/length_correlation    of reward with length, both less their pair's mean; near 1 or -1 it counts tokens
  eval/calibration_error  mean of |predicted_K - observed_K| over the bins K = 0 to 9, weighted by pairs_K
  calibration/predicted_K, calibration/observed_K, calibration/pairs_K    for the side with the higher reward: mean of
                          sigmoid(gap) in bin K, from 0.5 + K/20 to 0.55 + K/20; share of chosen ones; pairs in the bin
  skipped_updates         updates left out so far because they were not finite

Dimensions: N pairs (n in a micro-batch), 2N sequences (first the chosen, then the rejected ones), L tokens, D hidden.
"""

import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import datasets
import torch
import torch.distributed as dist
import transformers
import tyro
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

# ------------------------------------------------------------------------------------------------------------ settings


@dataclasses.dataclass
class Args:
    # model and data
    model: str = "runs/sft"
    """Model to start from: a local folder or a Hub id; `tiny`, in sft.py, is a small one with random weights."""
    dataset: str = "arithmetic"
    """`arithmetic` (built in), a local .jsonl/.json/.csv/.parquet file, or a Hub dataset as name[:config[:split]]."""
    eval_dataset: str | None = None
    """Evaluation rows, named like `dataset`; default: the Hub's test or validation split, else the last rows."""
    system_prompt: str | None = None
    """Text put in front of every prompt, as the system turn where there is a chat template."""
    max_length: int = 1024
    """Rows of more tokens than this are dropped and counted."""
    out: str = "runs/rm"
    """Folder for the final model, logs and checkpoints."""

    # algorithm
    center_coef: float = 0.01
    """Weight of (r_c + r_r)^2, which holds a pair's mean reward near 0; at 0 that may be anything."""  # paper: 0.01

    # optimisation
    epochs: int = 1
    """Passes over the training rows."""  # paper: 1
    steps: int | None = None
    """Rollouts in grpo.py and ppo.py (default: 200 and 100); else optimizer steps (default: all epochs)."""
    batch_size: int = 32
    """Rows per optimizer step."""  # paper: 64
    lr: float | None = None
    """Peak learning rate; default: one that suits the size of the model, printed and logged."""  # paper: 9e-6
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rate after the warm-up, to 0 just after the last step."""  # paper: cosine
    warmup_steps: int = 15
    """Steps over which the learning rate rises from 0."""
    adam_beta2: float = 0.95
    """Adam's decay rate of the squared gradient."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm."""
    micro_batch_tokens: int = 4096
    """Most tokens, padding included, in one forward and backward pass of a process, unless a single row has more."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile most of the model (torch.compile): up to a minute at the start, then shorter steps."""

    # run
    seed: int = 0
    """Seed of every random draw."""
    eval_every: int = 300
    """Steps between evaluations."""
    eval_size: int = 1000
    """Evaluation rows."""
    sample_every: int = 100
    """Steps between samples written to samples.jsonl."""
    save_every: int = 100
    """Steps between checkpoints."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the final model's weights."""
    resume: bool = False
    """Go on from the last checkpoint in `out`."""
    overwrite: bool = False
    """Remove the run that `out` holds and start anew."""
    track: bool = False
    """Log to Weights & Biases too (WANDB_MODE=offline works)."""
    wandb_project: str = "onefile-rlhf"
    """Weights & Biases project."""

    def __post_init__(self):
        check_numbers(self)


# ----------------------------------------------------------------------------------------------------------- algorithm


def bradley_terry_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, margin: Tensor | float = 0.0, center_coef: float = 0.0
) -> Tensor:
    """-log sigmoid(r_c - r_r - margin) + center_coef * (r_c + r_r)^2 of each pair; rewards, result: (N,), in nats.

    margin: (N,) or one number, in units of the reward. Ouyang et al. 2022, eq. 1; the margin as in Touvron et al.
    2023, eq. 2; the centering as in Eisenstein et al. 2023, arXiv:2312.09244. Raises ValueError on unequal shapes.
    """
    if chosen_rewards.shape != rejected_rewards.shape or chosen_rewards.dim() != 1:
        raise ValueError(f"rewards of shapes {chosen_rewards.shape} and {rejected_rewards.shape} are not (N,) twice")
    if isinstance(margin, Tensor) and margin.shape not in ((), chosen_rewards.shape):
        raise ValueError(f"a margin of shape {margin.shape} for {len(chosen_rewards)} pairs")
    preference = torch.nn.functional.logsigmoid(chosen_rewards - rejected_rewards - margin)
    return -preference + center_coef * (chosen_rewards + rejected_rewards) ** 2


def correlation(x: Tensor, y: Tensor) -> float:
    """Correlation of two quantities over both sides of every pair, each less its pair's mean; x, y: (N, 2).

    The prompt, which both sides share, thereby drops out. NaN if either never differs within a pair.
    """
    x, y = x[:, 0] - x[:, 1], y[:, 0] - y[:, 1]  # twice the distance from the pair's mean
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())


def calibration(chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, float]:
    """Predicted against observed preference for the side with the higher reward, in ten bins; rewards: (N,).

    predicted_K: mean sigmoid(|r_c - r_r|) of bin K, from 0.5 + K/20 to 0.55 + K/20; observed_K: how often that side is
    the chosen one, ties counting half; pairs_K: its size. error: mean |predicted_K - observed_K|, weighted by pairs_K.
    """
    gap = chosen_rewards - rejected_rewards
    predicted, observed = gap.abs().sigmoid(), (gap > 0).float() + 0.5 * (gap == 0)
    bins, result, error = ((predicted - 0.5) * 20).long().clamp(max=9), {}, 0.0
    for k in range(10):
        inside = bins == k
        values = predicted[inside].mean().item(), observed[inside].mean().item()  # NaN in an empty bin
        result |= {f"predicted_{k}": values[0], f"observed_{k}": values[1], f"pairs_{k}": int(inside.sum())}
        error += abs(values[0] - values[1]) * int(inside.sum()) if inside.any() else 0.0
    return {**result, "error": error / len(gap)}


# ----------------------------------------------------------------------------------------------------------------- data

ARITHMETIC_ROWS = {"train": 20_000, "test": 2_000}


def solve(numbers: list[int], slip: float, habit: float, rng: random.Random) -> str:
    """The running sum of `numbers`, line by line, closed by `#### total`, with the demonstrator's two faults.

    slip: probability of a wrong step that carries on. habit: probability that adding 7 comes out one too high.
    """
    total, lines = numbers[0], []
    for number in numbers[1:]:
        result = total + number
        if number == 7 and rng.random() < habit:
            result += 1
        elif rng.random() < slip:
            result += rng.choice((-1, 1, 2)) if result else 1
        lines.append(f"{total}+{number}={result}\n")
        total = result
    return "".join(lines) + f"#### {total}"


def arithmetic_rows(split: str, num_rows: int) -> list[dict]:
    """The built-in task: distinct chains of 2 to 5 one-digit numbers; a tenth of all prompts is the `test` split.

    completion: a demonstration with both faults. chosen: a flawless one. rejected: one whose faults made it wrong.
    """
    rng, pair_rng, rows, seen = random.Random(f"arithmetic {split}"), random.Random(f"pairs {split}"), [], set()
    while len(rows) < num_rows:
        numbers = [rng.randrange(10) for _ in range(rng.randint(2, 5))]
        prompt = "+".join(map(str, numbers)) + "="
        is_test = zlib.crc32(prompt.encode()) % 10 == 0
        if is_test == (split == "test") and prompt not in seen:
            seen.add(prompt)
            completion = solve(numbers, slip=0.1, habit=0.6, rng=rng)
            chosen = rejected = solve(numbers, slip=0.0, habit=0.0, rng=pair_rng)
            while rejected.rpartition(" ")[2] == str(sum(numbers)):
                rejected = solve(numbers, slip=0.1, habit=0.6, rng=pair_rng)
            row = {"prompt": prompt, "completion": completion, "answer": str(sum(numbers))}
            rows.append({**row, "chosen": chosen, "rejected": rejected})
    return rows


def as_messages(prompt: str | list[dict], system_prompt: str | None) -> list[dict]:
    """A prompt (text or messages) as messages, behind the system prompt if there is one."""
    if not prompt or not isinstance(prompt, (str, list)):
        raise ValueError(f"expected text or messages, found {prompt!r}")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*([{"role": "system", "content": system_prompt}] if system_prompt else []), *messages]


def render(tokenizer, messages: list[dict], generation_prompt: bool = False) -> str:
    """The text of a conversation: by the chat template where there is one, else all turns with a blank line between."""
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)


def encode_scored(tokenizer, prompt: str | list[dict], completion: str, system_prompt: str | None) -> list[int]:
    """What a reward model reads: the conversation by the chat template, else prompt, completion and EOS as text."""
    messages, eos = as_messages(prompt, system_prompt), tokenizer.eos_token_id
    if tokenizer.chat_template:
        messages = [*messages, {"role": "assistant", "content": completion}]
        return tokenizer.encode(render(tokenizer, messages), add_special_tokens=False)
    ids = tokenizer.encode(render(tokenizer, messages) + completion)  # with its own special tokens
    return ids if eos is None or ids[-1] == eos else [*ids, eos]


def encode_scored_pair(tokenizer, row: dict, system_prompt: str | None) -> tuple[tuple, tuple]:
    """(ids, mask) of the chosen and of the rejected text; mask is 1 on all of it."""
    sides = [encode_scored(tokenizer, row["prompt"], row[side], system_prompt) for side in ("chosen", "rejected")]
    return tuple((ids, [1] * len(ids)) for ids in sides)


def split_pair(row: dict, chat: bool) -> dict | None:
    """The row with `prompt` and the texts `chosen` and `rejected`; None if the sides differ in more than the last turn.

    Without a prompt, or as lists of messages, the sides are whole conversations, and what precedes their last turn is
    the prompt: messages, or text in the layout of HH-RLHF, which becomes messages if `chat` (there is a template). A
    prompt of its own is taken as it is: text is one turn of the user.
    """
    prompt, chosen, rejected = row.get("prompt", row.get("question")), row["chosen"], row["rejected"]
    mark = "\n\nAssistant:"
    if type(chosen) is not type(rejected):
        raise ValueError("`chosen` and `rejected` must both be text or both be messages")
    if isinstance(chosen, list):
        if chosen[:-1] != rejected[:-1]:
            return None
        told = [message["content"] for message in chosen[:-1]]
        if told and prompt and not {message["content"] for message in as_messages(prompt, None)} <= set(told):
            raise ValueError("`prompt` holds turns that `chosen` does not repeat")
        prompt = chosen[:-1] or prompt
        if not prompt or {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
            raise ValueError("`chosen` and `rejected` must close with an assistant turn, after a prompt")
        chosen, rejected = chosen[-1]["content"], rejected[-1]["content"]
    elif not prompt:
        end = chosen.rfind(mark) + len(mark)
        if end < len(mark):
            raise ValueError("without a column `prompt` it needs turns marked `\\n\\nHuman:` and `\\n\\nAssistant:`")
        prompt, chosen, other, rejected = chosen[:end], chosen[end:], rejected[:end], rejected[end:]
        if prompt != other or any(turn in chosen + rejected for turn in (mark, "\n\nHuman:")):
            return None
        if chat:
            texts = re.split(r"\n\n(Human|Assistant):", "\n\n" + prompt.strip().removesuffix(mark))
            roles = ["system", *({"Human": "user", "Assistant": "assistant"}[name] for name in texts[1::2])]
            turns = [{"role": role, "content": text.strip()} for role, text in zip(roles, texts[::2])]
            prompt = turns if turns[0]["content"] else turns[1:]  # the system's turn: what precedes the first mark
            chosen, rejected = chosen.strip(), rejected.strip()
    return {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def select_pairs(rows: list[dict], chat: bool, flag: str) -> list[dict]:
    """The rows as `split_pair` makes them, without those that hold no preference; says what was dropped, and why."""
    kept, seen = [], set()
    dropped = dict.fromkeys(("equal sides", "sides that differ in more than the last turn", "an empty side"), 0)
    repeated = contradicted = 0
    for i, row in enumerate(rows):
        try:
            pair = split_pair(row, chat)
            equal = pair and pair["chosen"] == pair["rejected"]
            empty = pair and not (pair["chosen"].strip() and pair["rejected"].strip())
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # what a malformed row makes it raise
            raise SystemExit(f"{flag}: the sides of row {i} are no pair: {error!r}; the row is {row}") from error
        for reason, found in zip(dropped, (equal, pair is None, empty and not equal)):
            dropped[reason] += bool(found)
        if pair is None or equal or empty:
            continue
        sides = pair["chosen"], pair["rejected"]
        key, turned = (hash(json.dumps([pair["prompt"], *order])) for order in (sides, sides[::-1]))
        repeated, contradicted = repeated + (key in seen), contradicted + (turned in seen)
        seen.add(key)
        kept.append(pair)
    reasons = ", ".join(f"{count:,} with {reason}" for reason, count in dropped.items() if count)
    require(kept, f"{flag}: no preference remains of {len(rows):,} pairs: {reasons}")
    if reasons:
        print(f"{flag}: dropped of {len(rows):,} pairs: {reasons}")
    if repeated or contradicted:
        print(f"{flag}: {repeated:,} pairs repeat an earlier one and {contradicted:,} contradict one; all are kept")
    return kept


def audit(pairs: list[tuple], flag: str):
    """Prints how the sides differ in length, the commonest thing to learn instead of the preference."""
    lengths = torch.tensor([[len(ids) for ids, _ in pair] for pair in pairs], dtype=torch.float64)
    longer, equal = (lengths[:, 0] > lengths[:, 1]).double().mean(), (lengths[:, 0] == lengths[:, 1]).double().mean()
    means, largest = lengths.mean(0).tolist(), int(lengths.max())
    print(f"{flag}: {len(pairs):,} pairs; the chosen side is longer in {longer:.1%}, as long in {equal:.1%};", end=" ")
    print(f"mean tokens with the prompt {means[0]:.1f} chosen, {means[1]:.1f} rejected, at most {largest:,}")


def margin_of(row: dict) -> float:
    """The row's `margin`, 0 where there is none. Ends the run if it is no number."""
    message = f"column `margin`: {row.get('margin')!r} is not a number; the row is {row}"
    with end_on_error(message):
        margin = float(row.get("margin") or 0.0)
    require(math.isfinite(margin), message)
    return margin


# ----------------------------------------------------------------------------------------------------- model and scores


def load_scorer(name: str, device, gradient_checkpointing: bool, flag: str, head_scale: float, seed: int = 0):
    """A model with one scalar head `score` without bias, in float32, without dropout.

    A reward model's folder is loaded as it is; a language model gets a new head, N(0, head_scale^2 / (D + 1)) in
    variance (Stiennon et al. 2020 with 1). Ends the run if there are more labels, or another kind of head.
    """
    config = load_config(name, flag)
    is_scorer = "ForSequenceClassification" in str(config.architectures)
    require(not is_scorer or config.num_labels == 1, f"{flag} {name} has {config.num_labels} labels instead of one")
    config.num_labels, new = 1, () if is_scorer else ("score.weight",)
    model = load_weights(transformers.AutoModelForSequenceClassification, name, flag, config, new)
    head = getattr(model, "score", None)
    plain = isinstance(head, torch.nn.Linear) and head.bias is None
    require(plain, f"{flag} {name}: its classifier has no linear head `score` without bias: use a decoder")
    if not is_scorer:
        draws = torch.randn(head.weight.shape, generator=seeded(seed, "head", 0))
        head.weight.data = head_scale * draws / math.sqrt(head.in_features + 1)
    return to_device(model, device, gradient_checkpointing)


def prepare_reward_model(model, tokenizer, eos_ids: list[int]):
    """Gives the model a pad token that ends nothing, and ends the run if `score` is not what transformers computes.

    transformers reads the score at the last token that is not padding; with pad = EOS it would miss the EOS.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in eos_ids:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    before = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > before:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.get_input_embeddings().weight.data[before:] = 0.0  # no draws: padding is never seen
    pad_id = model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    row = torch.arange(8, device=model.device) + (pad_id + 1 if pad_id < 8 else 0)  # eight ids, none of them padding
    ids, mask = torch.stack([row, row]), torch.ones(2, 8, device=model.device)
    ids[1, 5:], mask[1, 5:] = pad_id, 0.0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float()
        same = (score(model, ids, mask) - expected).abs().max() < 1e-3 * max(1.0, expected.abs().max().item())
    require(same, "--model: transformers computes another score than the head on the last token: use a decoder")


def in_forward(function: Callable) -> Callable:
    """Makes `function(model, ...)` run as a forward pass of the model, in which FSDP gathers the weights."""

    @functools.wraps(function)
    def wrapped(model, *args, **options):
        if not isinstance(model, FSDPModule):
            return function(model, *args, **options)
        model.run = functools.partial(function, model)
        register_fsdp_forward_method(model, "run")
        return model.run(*args, **options)

    return wrapped


@in_forward
def score(model, ids: Tensor, mask: Tensor) -> Tensor:
    """The reward of each text, (N,) in float32: the head on the hidden state of the last token whose mask is 1.

    ids, mask: (N, L), right-padded; mask is 1 on the whole text. No attention mask: under a causal model, right padding
    is never seen. Higher is better; only differences between completions of one prompt have a meaning.
    """
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (N, L, D)
    last = mask.sum(1).long() - 1  # (N,)
    with torch.autocast(ids.device.type, enabled=False):
        return model.score(hidden[torch.arange(len(ids), device=ids.device), last].float())[:, 0]


@torch.no_grad()
def score_pairs(model, pairs: list[tuple], max_tokens: int) -> Tensor:
    """Rewards of the chosen and the rejected side of every pair, (N, 2) on the CPU."""
    rewards = torch.full((len(pairs), 2), -math.inf)
    for indices, ids, mask in pair_batches(pairs, max_tokens, model.device):
        with autocast(model.device):
            rewards[indices] = score(model, ids, mask).view(2, -1).T.cpu()
    return over_ranks(rewards, dist.ReduceOp.MAX)


def evaluate_rewards(rewards: Tensor, pairs: list[tuple]) -> dict[str, float]:
    """What the header lists under eval/ and calibration/, from rewards (N, 2) of held-out pairs."""
    lengths = torch.tensor([[float(len(ids)) for ids, _ in pair] for pair in pairs])  # (N, 2)
    (chosen, rejected), gap = rewards.unbind(1), rewards[:, 0] - rewards[:, 1]
    longer = lengths[:, 0] - lengths[:, 1]
    metrics = {
        "eval/loss": bradley_terry_loss(chosen, rejected).mean().item(),
        "eval/pair_accuracy": ((gap > 0).float() + 0.5 * (gap == 0)).mean().item(),
        "eval/margin": gap.mean().item(),
        "eval/reward_mean": rewards.mean().item(),
        "eval/reward_std": rewards.std(correction=0).item(),
        "eval/longer_wins": ((longer > 0).float() + 0.5 * (longer == 0)).mean().item(),
        "eval/length_correlation": correlation(rewards, lengths),
    }
    calibrated = calibration(chosen, rejected)
    metrics["eval/calibration_error"] = calibrated.pop("error")
    return metrics | {f"calibration/{name}": value for name, value in calibrated.items()}


def print_calibration(metrics: dict):
    """The ten bins of the last evaluation, as a table."""
    print("the side with the higher reward is the chosen one:\n  predicted  observed  pairs")
    for k in range(10):
        predicted, observed, pairs = (metrics[f"calibration/{x}_{k}"] for x in ("predicted", "observed", "pairs"))
        if pairs:
            print(f"  {predicted:9.3f}  {observed:8.3f}  {pairs:5,}")


# ---------------------------------------------------------------------------------------------------------------- main


def main(args: Args) -> dict[str, float]:
    """Trains, and returns the last row of metrics.jsonl beside the first evaluation (before/...)."""
    run, device = Run(args), pick_device()
    train_rows, eval_rows = load_data(args, ["chosen+rejected"])
    tokenizer, eos_ids = load_tokenizer(args.model, args.max_length)
    encode = functools.partial(encode_scored_pair, tokenizer, system_prompt=args.system_prompt)
    train_rows = select_pairs(train_rows, bool(tokenizer.chat_template), "--dataset")
    eval_rows = select_pairs(eval_rows, bool(tokenizer.chat_template), "--eval-dataset")
    train_rows, train_pairs = encode_rows(encode, train_rows, args.max_length, "--max-length")
    eval_rows, eval_pairs = encode_rows(encode, eval_rows, args.max_length, "--max-length")
    audit(train_pairs, "--dataset")
    audit(eval_pairs, "--eval-dataset")
    margins = torch.tensor([margin_of(row) for row in train_rows])
    if margins.any():
        print(f"--dataset: margins of mean {margins.mean():.3g}, at most {margins.max():.3g}, in units of the reward")
    require(len(train_pairs) >= args.batch_size, f"--batch-size: there are only {len(train_pairs)} pairs")
    steps = args.steps or math.ceil(args.epochs * len(train_pairs) / args.batch_size)
    if run.finished(steps):
        return run.summary()

    name = run.checkpoint or args.model
    model = load_scorer(name, device, args.gradient_checkpointing, "--model", head_scale=1.0, seed=args.seed)
    prepare_reward_model(model, tokenizer, eos_ids)
    model = shard(model, device, args)
    peak_lr = args.lr or (6e-4 if model.num_parameters() < 10_000_000 else 9e-6)
    optimizer = torch.optim.AdamW(model.parameters(), peak_lr, (0.9, args.adam_beta2), weight_decay=0.0, fused=True)
    print(f"{model.num_parameters():,} parameters on {device}, {len(train_pairs):,} pairs, peak lr {peak_lr:g}")
    run.start({"optimizer": optimizer}, peak_lr=peak_lr, steps=steps)
    if run.step == 0:
        run.log(0, steps, evaluate_rewards(score_pairs(model, eval_pairs, args.micro_batch_tokens), eval_pairs))

    for step in range(run.step + 1, steps + 1):
        # (1) batch
        clock = time.perf_counter()
        rows = shuffled_indices(len(train_pairs), args.seed, "pairs", step, args.batch_size)
        batch, means = [train_pairs[i] for i in rows], Means()

        # (2) loss: both sides of a pair in one micro-batch, since its loss is one of their difference
        for indices, ids, mask in pair_batches(batch, args.micro_batch_tokens, device):
            with autocast(device):
                chosen, rejected = score(model, ids, mask).chunk(2)  # (n,) each
            margin = margins[rows][indices].to(device)  # (n,)
            losses = bradley_terry_loss(chosen, rejected, margin, args.center_coef)  # (n,)
            run.backward(losses.sum() / args.batch_size)
            right = (chosen > rejected).float() + 0.5 * (chosen == rejected)
            means.add(pair_accuracy=right, margin=chosen - rejected, reward_mean=(chosen + rejected) / 2)
            if not run.shown:  # the token that the reward is read at stands in «»
                run.show_first_batch(tokenizer, ids, mask - torch.nn.functional.pad(mask, (0, 1))[:, 1:])

        # (3) update
        lr = learning_rate(args, step, steps, peak_lr)
        metrics = {**run.update(optimizer=lr), **means.result(), "lr": lr}
        seconds = time.perf_counter() - clock
        num_tokens = sum(len(ids) for pair in batch for ids, _ in pair)
        metrics |= {"time/step_s": seconds, "time/tokens_per_s": num_tokens / seconds}
        if step == steps or step % args.eval_every == 0:
            metrics |= evaluate_rewards(score_pairs(model, eval_pairs, args.micro_batch_tokens), eval_pairs)
        samples = []
        if step % args.sample_every == 0:
            for row, pair in zip(eval_rows, score_pairs(model, eval_pairs[:4], args.micro_batch_tokens).tolist()):
                texts = {name: row[name] for name in ("prompt", "chosen", "rejected")}
                samples.append({**texts, "chosen_reward": pair[0], "rejected_reward": pair[1]})
        run.log(step, steps, metrics, samples, "loss pair_accuracy margin grad_norm lr")
        if step == steps or run.signal or step % args.save_every == 0:
            run.save(step, model, tokenizer)
    print_calibration(run.rows[-1])
    return run.finish(steps, model, tokenizer)


# ------------------------------------------------------------------------------------------------------------ plumbing
# The same in every script: read it once.

# torchrun starts a process, a rank, for each GPU; without it there is one
RANK = int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def require(ok: bool, message: str):
    """Ends the run with `message` unless `ok`."""
    if not ok:
        raise SystemExit(message)


@contextmanager
def end_on_error(message: str):
    """Ends the run with `message` and the error, whatever the code inside raises: libraries raise anything."""
    try:
        yield
    except Exception as error:
        raise SystemExit(f"{message}: {type(error).__name__}: {error}") from error


def check_numbers(args: "Args"):
    """Ends the run unless counts are at least 1, other numbers at least 0, and those that divide or scale above 0."""
    for field in dataclasses.fields(args):
        value, flag = getattr(args, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            count = field.type in (int, int | None) and field.name not in ("seed", "warmup_steps")
            require(math.isfinite(value) and value >= count, f"{flag} {value}: must be at least {int(count)}")
    for name in ("lr", "value_lr", "beta", "temperature", "clip_eps", "max_grad_norm", "target_kl", "kl_stop"):
        require(getattr(args, name, None) != 0, f"--{name.replace('_', '-')} must be above 0")
    require(args.adam_beta2 < 1, f"--adam-beta2 {args.adam_beta2}: must be below 1")
    require(0 < getattr(args, "cache_memory", 1) <= 1, "--cache-memory must be above 0 and at most 1")
    for name in ("batch_size", "prompts_per_step"):
        enough = getattr(args, name, WORLD_SIZE) >= WORLD_SIZE
        require(enough, f"--{name.replace('_', '-')}: must be at least {WORLD_SIZE}, a row for each process")


def pick_device() -> torch.device:
    """CUDA, else MPS, else CPU. Under torchrun each rank takes its own GPU, and all but the first fall silent."""
    has_mps = torch.backends.mps.is_available() and WORLD_SIZE == 1
    device = torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    if WORLD_SIZE > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backends, timeout=datetime.timedelta(hours=4))  # the first may call a slow reward
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


def over_ranks(x: Tensor, operation=dist.ReduceOp.SUM) -> Tensor:
    """The sum of x over all ranks, or with MAX the largest: of rows that are -inf on all ranks but one, that one's."""
    if WORLD_SIZE > 1:
        x = x.clone()
        dist.all_reduce(x, operation)
    return x


def autocast(device: torch.device):
    """bfloat16 on CUDA, over float32 weights; float32 elsewhere. No cached copy: it would sum gradients in bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def seeded(seed: int, purpose: str, step: int) -> torch.Generator:
    """A generator that depends on the arguments alone, so that there is no generator state to save."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {purpose} {step}".encode()))


def shuffled_indices(num_rows: int, seed: int, purpose: str, step: int, count: int) -> list[int]:
    """The `count` rows of step 1, 2, ...: slices of an endless stream of epochs, each shuffled anew."""
    epoch, first = divmod((step - 1) * count, num_rows)
    epochs = (torch.randperm(num_rows, generator=seeded(seed, purpose, k)).tolist() for k in itertools.count(epoch))
    return list(itertools.islice(itertools.chain.from_iterable(epochs), first, first + count))


def micro_batch_rows(widths: list[int], max_tokens: int) -> list[list[int]]:
    """The row numbers of this rank's micro-batches, widest rows first: width * rows is at most `max_tokens`.

    Their number is the same on every rank: all must run together, or FSDP's gathering of weights would wait for ever.
    """
    order, batches = sorted(range(len(widths)), key=lambda i: -widths[i]), []
    if 0 < len(order) < WORLD_SIZE:
        few = f"{len(order)} rows for {WORLD_SIZE} processes: raise --batch-size, --prompts-per-step or --eval-size"
        require(not torch.is_grad_enabled(), few)
        order = (order * WORLD_SIZE)[:WORLD_SIZE]  # without a gradient nothing adds up: rows may come twice
    start = 0
    while start < len(order):
        count = max(1, max_tokens // widths[order[start]])
        batches.append(order[start : start + count])
        start += count
    wanted = min(math.ceil(len(batches) / WORLD_SIZE), len(order) // WORLD_SIZE) * WORLD_SIZE
    if len(batches) > wanted:  # single rows that do not divide among the ranks: some come in pairs, above `max_tokens`
        batches = [order[k::wanted] for k in range(wanted)]
    while len(batches) < wanted:  # halve the largest
        k = max(range(len(batches)), key=lambda k: len(batches[k]))
        half = len(batches[k]) // 2
        batches[k : k + 1] = [batches[k][:half], batches[k][half:]]
    return batches[RANK::WORLD_SIZE]


def pair_batches(pairs: list[tuple], max_tokens: int, device: torch.device) -> Iterator[tuple]:
    """This rank's pairs of (ids, mask), right-padded: indices (n), ids and mask (2n, L), the n chosen sides first."""
    widths = [max(len(ids) for ids, _ in pair) for pair in pairs]
    for batch in micro_batch_rows([2 * width for width in widths], max_tokens):
        width = widths[batch[0]]
        sides = [pairs[i][side] for side in (0, 1) for i in batch]
        ids, mask = ([row + [0] * (width - len(row)) for row in column] for column in zip(*sides))
        yield batch, torch.tensor(ids, device=device), torch.tensor(mask, dtype=torch.float32, device=device)


def learning_rate(args: "Args", step: int, steps: int, peak: float) -> float:
    """Linear warm-up to `peak` over `warmup_steps`, then the decay of `lr_schedule`, at step 1, 2, ... `steps`."""
    if step < args.warmup_steps:
        return peak * step / args.warmup_steps
    left = (steps + 1 - step) / (steps + 1 - args.warmup_steps)  # 1 at the end of the warm-up, 0 after the last step
    return peak * {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[args.lr_schedule]


@functools.cache
def hub_is_out_of_reach() -> bool:
    """Asked once, because the Hub's own client goes on trying for half a minute."""
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5).close()
    except OSError as error:
        return not isinstance(error, urllib.error.HTTPError)  # which would be an answer
    return False


def from_hub(loader, name: str, flag: str, **options):
    """loader.from_pretrained of a local folder or Hub id. Ends the run, naming the flag, if that fails."""
    local, is_path = Path(name).is_dir(), name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1
    hint = f"; `python {name[5:]}.py` makes it" if name in ("runs/sft", "runs/rm") else ""
    require(local or not is_path, f"{flag} {name}: there is no such folder{hint}")
    with end_on_error(f"{flag} {name} cannot be loaded"):
        return loader.from_pretrained(name, local_files_only=local or hub_is_out_of_reach(), **options)


def load_tokenizer(name: str, num_tokens: int):
    """The tokenizer and the ids that end a completion: its EOS, the generation config's, the template's end of turn."""
    tokenizer = from_hub(transformers.AutoTokenizer, name, "--model")
    require(tokenizer.eos_token_id is not None, f"--model {name}: its tokenizer has no eos_token, so nothing could end")
    config = load_config(name, "--model", num_tokens)
    stops, offline = config.get_text_config().eos_token_id, Path(name).is_dir() or hub_is_out_of_reach()
    with suppress(OSError):  # there may be no generation config
        stops = transformers.GenerationConfig.from_pretrained(name, local_files_only=offline).eos_token_id
    eos_ids = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "@answer@"}]
    tail = render(tokenizer, turns).rpartition("@answer@")[2]  # empty without a template
    eos_ids |= set(tokenizer.encode(tail, add_special_tokens=False)[:1]) & set(tokenizer.added_tokens_decoder)
    return tokenizer, sorted(eos_ids)


def load_config(name: str, flag: str, num_tokens: int = 0):
    """The configuration of a model that holds `num_tokens`, without dropout: sampling and training see one model."""
    config = from_hub(transformers.AutoConfig, name, flag)
    window = getattr(config.get_text_config(), "max_position_embeddings", num_tokens)
    require(num_tokens <= window, f"{flag} {name} holds {window} tokens, not {num_tokens}: lower the --max-... flags")
    for part in (config, config.get_text_config()):
        part.update({key: 0.0 for key in part.to_dict() if key.endswith(("dropout", "pdrop"))})
    return config


def load_weights(loader, name: str, flag: str, config, new: tuple[str, ...] = ()):
    """A model in float32, whatever its folder holds. Ends the run if weights are missing there, but for those `new`."""
    model, info = from_hub(loader, name, flag, config=config, dtype=torch.float32, output_loading_info=True)
    missing = sorted(set(info["missing_keys"]) - set(new))
    require(not missing, f"{flag} {name} lacks weights, so they would be random: {missing[:5]}")
    return model


def to_device(model, device: torch.device, gradient_checkpointing: bool):
    """The model on `device`, in training mode; where `shard` will follow, still on the CPU, as it may not fit."""
    model = model.to(device if WORLD_SIZE == 1 else "cpu").train()
    for parameter in model.parameters():  # fresh, aligned memory: a resumed run then adds up the same bits
        parameter.data = parameter.data.clone()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def whole(x: Tensor) -> Tensor:
    """A sharded tensor in full, on every rank; any other as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard(model, device: torch.device, args: "Args | None" = None):
    """The model with its layers compiled, if `args` say so, and a share of each weight on every rank (FSDP2)."""
    layers = [x for x in model.modules() if type(x).__name__ in (model._no_split_modules or ())]
    model.compiles = bool(args and args.compile)  # read by token_logprobs, where there is one
    for layer in layers if model.compiles else ():
        layer.compile(dynamic=True)
    if WORLD_SIZE > 1:
        mesh = dist.init_device_mesh(device.type, (WORLD_SIZE,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)  # so that its weights are always the sharded ones
    return model


def gathered(state: dict) -> dict:
    """A state dict with whole tensors for its sharded ones, tied ones still tied; they reach the first rank alone."""
    found = {}
    for x in state.values():
        if isinstance(x, DTensor) and id(x) not in found:
            full = whole(x.detach())  # in which all ranks take part
            found[id(x)] = full.cpu() if RANK == 0 else None
    return {name: found.get(id(x), x) for name, x in state.items()}


def share_of(x: Tensor, parameter: Tensor) -> Tensor:
    """Of an optimizer's state of a parameter, which every rank has read whole, this rank's share."""
    if not isinstance(parameter, DTensor) or x.shape != parameter.shape:
        return x
    return distribute_tensor(x, parameter.device_mesh, parameter.placements, src_data_rank=None)


def read_dataset(name: str, split: str, flag: str, wanted: list[str]) -> list[dict]:
    """Rows of `arithmetic`, a local file or a Hub dataset, if they have one of the `wanted` sets of columns."""
    if name == "arithmetic":
        return arithmetic_rows(split, ARITHMETIC_ROWS[split])
    formats = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    file_format = formats.get(Path(name.removesuffix(".gz")).suffix)
    require(not file_format or Path(name).is_file(), f"{flag} {name}: there is no such file")
    with end_on_error(f"{flag} {name} cannot be read"):
        if not file_format:
            hub_name, config, chosen = (*name.split(":", 2), "", "")[:3]
            datasets.config.HF_HUB_OFFLINE |= hub_is_out_of_reach()
            rows = list(datasets.load_dataset(hub_name, config or None, split=chosen or split))
        else:
            empty = Path(name).stat().st_size == 0
            rows = [] if empty else list(datasets.load_dataset(file_format, data_files=name, split="train"))
    require(len(rows) > 0, f"{flag} {name} holds no rows")
    found = [columns.split("+") for columns in wanted if set(columns.split("+")) <= set(rows[0])]
    require(found, f"{flag} {name} has the columns {', '.join(rows[0])}; this script needs {' or '.join(wanted)}")
    for i, row in enumerate(rows):
        require(all(row[column] is not None for column in found[0]), f"{flag} {name}: row {i} lacks a value: {row}")
    return rows


def load_data(args: "Args", wanted: list[str]) -> tuple[list[dict], list[dict]]:
    """Training and evaluation rows: `eval_dataset`, else the Hub's test or validation split, else the last rows."""
    rows, eval_dataset = read_dataset(args.dataset, "train", "--dataset", wanted), args.eval_dataset
    if not eval_dataset and args.dataset == "arithmetic":
        eval_dataset = args.dataset
    elif not eval_dataset and not Path(args.dataset).is_file():
        hub_name, config, chosen = (*args.dataset.split(":", 2), "", "")[:3]
        with end_on_error(f"--dataset {args.dataset}: its splits are unknown, so give --eval-dataset"):
            names = datasets.get_dataset_split_names(hub_name, config or None)
        splits = [name for name in ("test", "validation") if name in names and not chosen.startswith(name)]
        eval_dataset = f"{hub_name}:{config}:{splits[0]}" if splits else None
    if eval_dataset:
        return rows, read_dataset(eval_dataset, "test", "--eval-dataset", wanted)[: args.eval_size]
    require(args.eval_size < len(rows), f"--eval-size {args.eval_size} leaves no row of {len(rows)} to train on")
    return rows[: -args.eval_size], rows[-args.eval_size :]


def encode_rows(encode: Callable, rows: list[dict], max_length: int, flag: str) -> tuple[list[dict], list]:
    """The rows that are not too long, and what `encode` makes of each: ids, (ids, mask), or a pair of (ids, mask)."""
    kept, encoded = [], []
    for i, row in enumerate(rows):
        try:
            item = encode(row)
        except Exception as error:  # a chat template may raise anything
            hint = " (drop --system-prompt?)" if "system" in str(error).lower() else ""
            raise SystemExit(f"row {i} cannot be encoded: {error}{hint}; the row is {row}") from error
        parts = item if isinstance(item, tuple) else (item,)
        if max(len(part[0] if isinstance(part, tuple) else part) for part in parts) <= max_length:
            kept.append(row)
            encoded.append(item)
        if (i + 1) % 50_000 == 0:
            print(f"encoded {i + 1:,} of {len(rows):,} rows", flush=True)
    require(len(kept) > 0, f"all {len(rows)} rows are longer than {flag} {max_length} (tokens): raise it")
    if len(kept) < len(rows):
        print(f"dropped {len(rows) - len(kept):,} of {len(rows):,} rows: longer than {flag} {max_length} (tokens)")
    return kept, encoded


class Means:
    """Sums and counts over all micro-batches, divided only at the end."""

    def __init__(self):
        self.sums, self.counts = {}, {}

    def add(self, mask: Tensor | None = None, **values):
        """values: numbers or tensors by name; with a mask of their shape, only where that is 1. Kept on the device."""
        for name, x in values.items():
            x = torch.as_tensor(x).detach().float()
            weight = torch.ones_like(x) if mask is None else mask
            self.sums[name] = self.sums.get(name, 0) + (x * weight).sum()
            self.counts[name] = self.counts.get(name, 0) + weight.sum()

    def result(self) -> dict[str, float]:
        """The means over all ranks."""
        here = torch.tensor([[self.sums[name], self.counts[name]] for name in self.sums], dtype=torch.float64)
        return {name: (total / count).item() for name, (total, count) in zip(self.sums, over_ranks(here))}


class Run:
    """The output folder: args.json, metrics.jsonl, samples.jsonl, checkpoints/step-N, and the final model.

    Whatever is more than a line is written beside its place and renamed: a kill leaves what --resume goes on from.
    """

    may_change = ("resume", "overwrite", "track", "wandb_project", "sample_every", "save_every", "save_dtype", "out")
    files = """metrics.jsonl samples.jsonl checkpoints wandb config.json generation_config.json chat_template.jinja
        additional_chat_templates model.safetensors model.safetensors.index.json model-*-of-*.safetensors tokenizer.json
        tokenizer_config.json tokenizer.model added_tokens.json vocab.json vocab.txt merges.txt"""

    def __init__(self, args: "Args"):
        """Decides between a new run and a resumed one and refuses what would lose something. Writes nothing."""
        self.args, self.out, self.settings = args, Path(args.out), json.loads(json.dumps(vars(args)))
        self.step, self.checkpoint = 0, None  # the step that this process begins after, and the folder to load it from
        self.rows, self.record = [], {}  # of metrics.jsonl; the content of args.json
        self.optimizers, self.state = {}, {}  # by name; what state.pt holds beside them
        self.loss = self.skipped = self.skipped_in_a_row = 0
        self.received = self.signal = 0  # the signal that came here; the one that all ranks know of
        self.shown, self.wandb, self.clock = False, None, 0.0
        inputs = ("model", "reference", "value_model", "dataset", "eval_dataset", "sft_dataset")
        read = [getattr(args, name, None) or "" for name in inputs]
        for folder in filter(os.path.exists, (*read, *getattr(args, "reward", ()))):
            inside = Path(folder).resolve().is_relative_to(self.out.resolve())
            require(not inside, f"--out {self.out} holds {folder}, which this run reads: choose another --out")
        require(not (args.resume and args.overwrite), "--resume goes on from a run, --overwrite removes it: give one")
        require(not self.out.is_file(), f"--out {self.out} is a file: name a folder")
        held = sorted(path.name for pattern in ("args.json " + self.files).split() for path in self.out.glob(pattern))
        with end_on_error(f"--out {self.out}: its args.json is broken, so choose another --out"):
            self.record = json.loads((self.out / "args.json").read_text()) if "args.json" in held else {}
        ours = {"args", "resolved"} <= set(self.record)
        require(ours or not held, f"--out {self.out} holds {held}, which no run of ours wrote: choose another --out")
        may_go = not ours or args.resume or args.overwrite
        require(may_go, f"--out {self.out} holds a run: go on with --resume, or start anew with --overwrite")
        if not args.resume or not ours:
            self.record = {}
            return
        for name, value in self.settings.items():
            free = name in self.may_change or (name in ("steps", "epochs") and args.lr_schedule == "constant")
            before, flag = self.record["args"].get(name), "--" + name.replace("_", "-")
            require(free or value == before, f"--resume: {flag} was {before!r}; {value!r} would change the result")
        for folder in self.checkpoints():  # the last one counts
            self.step, self.checkpoint = int(folder.name.removeprefix("step-")), str(folder)

    def checkpoints(self) -> list[Path]:
        """The folders of the checkpoints that are whole, in the order of their steps."""
        folders = (self.out / "checkpoints").glob("step-*[0-9]")
        return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")))

    def prune(self, keep: int):
        """Removes all checkpoints but the last `keep`, so that a kill leaves each of them whole or not at all."""
        for old in self.checkpoints()[::-1][keep:]:
            shutil.rmtree(old.rename(old.with_suffix(".tmp")))

    def finished(self, steps: int) -> bool:
        """Whether there is nothing left to do; says so."""
        require(steps >= self.step, f"--steps {steps}: the last checkpoint is at step {self.step} already")
        over, before = self.record.get("finished"), self.record.get("resolved", {}).get("steps", steps)
        same = before == steps or self.args.lr_schedule == "constant"
        require(same, f"--resume: --steps was {before}; {steps} would change the result")
        hint = "has no checkpoint to go on from: choose another --out, or start anew with --overwrite"
        require(over in (None, steps) or self.checkpoint, f"--resume: {self.out} is a finished run and {hint}")
        if over == steps:
            print(f"{self.out}: this run is finished")
            self.close()
        return over == steps

    def start(self, optimizers: dict[str, torch.optim.Optimizer], **resolved):
        """Makes the folder or, resuming, restores the optimizers and cuts the logs back to the checkpoint's step."""
        self.optimizers, logs = optimizers, {"metrics.jsonl": [], "samples.jsonl": []}
        if self.checkpoint:
            with end_on_error(f"--resume: {self.checkpoint} is broken; remove it to use the one before"):
                self.state = torch.load(f"{self.checkpoint}/state.pt", "cpu", weights_only=True, mmap=WORLD_SIZE > 1)
                for name, optimizer in optimizers.items():  # of which a rank needs but its share
                    saved, (group,) = self.state.pop(name), optimizer.param_groups
                    for i, moments in saved["state"].items():
                        saved["state"][i] = {key: share_of(x, group["params"][i]) for key, x in moments.items()}
                    optimizer.load_state_dict(saved)
                self.skipped, self.skipped_in_a_row = self.state["skipped"], self.state["skipped_in_a_row"]
            for name in logs:
                with end_on_error(f"--resume: {self.out / name} is broken"):
                    lines = (self.out / name).read_text().split("\n")[:-1]  # a kill may have torn what follows
                    logs[name] = [row for row in map(json.loads, lines) if row["step"] <= self.step]
        self.rows = logs["metrics.jsonl"]
        steps = over_ranks(torch.tensor([self.step, -self.step]), dist.ReduceOp.MAX)  # all have read what now changes
        require(steps.sum() == 0, f"--out {self.out} is not one folder for all processes: name one that they share")
        if RANK == 0:
            self.open_folder(logs, resolved)
        if __name__ == "__main__":  # a notebook keeps its own Ctrl-C
            signal.signal(signal.SIGINT, self.on_signal)
            signal.signal(signal.SIGTERM, self.on_signal)
        self.clock = time.perf_counter()

    def open_folder(self, logs: dict[str, list[dict]], resolved: dict):
        """Makes the folder or clears it, and writes args.json and the logs up to the step that the run begins after."""
        if self.args.track:
            with end_on_error("--track needs wandb, pip install wandb"):
                import wandb
            self.wandb = wandb
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / "args.json"
        if self.args.overwrite and file.exists():  # in an order in which no kill leaves a mixture of two runs
            write_beside(file, json.dumps(json.loads(file.read_text()) | {"finished": None}))
        self.prune(0 if self.args.overwrite else 2)
        wandb_id = self.record.get("wandb_id") or os.urandom(4).hex()
        self.record = {"args": self.settings, "resolved": resolved, "wandb_id": wandb_id}
        write_beside(file, json.dumps(self.record, indent=2))  # marks the folder as a run's
        patterns = "checkpoints/*.tmp" if self.checkpoint else self.files  # of a run before, or of one just begun
        for path in [path for pattern in patterns.split() for path in self.out.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, rows in logs.items():
            write_beside(self.out / name, "".join(json.dumps(row) + "\n" for row in rows))
        if self.args.resume:
            print(f"resuming {self.out} from step {self.step}")
        if self.args.track:
            options = {"id": self.record["wandb_id"], "resume": "allow", "dir": self.out, "name": self.out.name}
            self.wandb.init(project=self.args.wandb_project, config=self.settings | resolved, **options)

    def on_signal(self, number: int, frame):
        """The first signal lets the step finish and be saved; a second one stops at once."""
        if self.received and (WORLD_SIZE == 1 or number == signal.SIGINT):  # torchrun repeats what a scheduler sends
            raise KeyboardInterrupt
        self.received = number
        print("stopping after this step; once more to stop at once", flush=True)

    def show_first_batch(self, tokenizer, ids: Tensor, mask: Tensor):
        """Shows what is trained: the first row as text, and counts of tokens."""
        self.shown, actions, text = True, mask.bool(), ""
        end = int(actions[0].nonzero()[-1]) + 1
        for trained, tokens in itertools.groupby(range(end), key=actions[0].tolist().__getitem__):
            piece = tokenizer.decode(ids[0, list(tokens)])
            text += f"«{piece}»" if trained else piece
        num_bos, targets = ids[0, :end].tolist().count(tokenizer.bos_token_id), ids[actions].tolist()
        counts = f"{len(targets)} trained, {targets.count(tokenizer.eos_token_id)} of them EOS"
        print(f"first row, trained tokens in «», BOS {num_bos} times:\n{text}")
        print(f"first micro-batch: {len(ids)} rows, {ids.numel()} tokens with padding, {counts}")

    def backward(self, loss: Tensor):
        """Adds to the gradient. The losses of a step's micro-batches, on all ranks, add up to the loss of the step."""
        (loss * WORLD_SIZE).backward()  # FSDP averages over the ranks
        self.loss = self.loss + loss.detach()

    def discard(self):
        """Forgets the gradient and the loss that have added up."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        self.loss = 0

    def update(self, **rates: float) -> dict[str, float]:
        """Clips each model's gradient to max_grad_norm and steps each optimizer at the rate given under its name.

        Returns loss, grad_norm (value_grad_norm for `value_optimizer`). Ten in a row that are not finite end the run.
        """
        metrics = {"loss": float(over_ranks(torch.as_tensor(self.loss)))}
        for name, lr in rates.items():
            (group,) = self.optimizers[name].param_groups
            for parameter in group["params"]:
                if parameter.grad is None:  # no row had a signal: Adam's momentum still acts
                    parameter.grad = torch.zeros_like(parameter)
            norm = whole(torch.nn.utils.clip_grad_norm_(group["params"], self.args.max_grad_norm)).item()
            group["lr"], metrics[name.replace("optimizer", "grad_norm")] = lr, norm
        if all(map(math.isfinite, metrics.values())):
            for name in rates:
                self.optimizers[name].step()
            self.skipped_in_a_row = 0
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            print(f"update skipped: {metrics}", flush=True)
            require(self.skipped_in_a_row < 10, "ten updates in a row were not finite: lower --lr, or look at the data")
        self.discard()
        return metrics

    def log(self, step: int, steps: int, metrics: dict, samples: list[dict] = (), shown: str = ""):
        """A row in metrics.jsonl, the samples in samples.jsonl, and a line on screen with the `shown` metrics."""
        metrics = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        self.rows.append({"step": step, **metrics, "skipped_updates": self.skipped})
        self.signal = int(over_ranks(torch.tensor(self.received), dist.ReduceOp.MAX))  # all ranks agree before a save
        if RANK > 0:
            return
        for name, rows in (("samples", [{"step": step, **sample} for sample in samples]), ("metrics", self.rows[-1:])):
            with open(self.out / f"{name}.jsonl", "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        if step == self.step:  # the first evaluation says nothing of the time that a step takes
            self.clock = time.perf_counter()
        else:
            left = (time.perf_counter() - self.clock) / (step - self.step) * (steps - step)
            text = "  ".join(f"{x} {metrics[x]:.4g}" for x in shown.split() if metrics.get(x) is not None)
            speed = f"{metrics['time/tokens_per_s']:,.0f} tokens/s"
            print(f"step {step}/{steps}  {text}  {speed}  {left // 60:.0f}:{left % 60:02.0f} left", flush=True)
        evaluated = [f"{x[5:]} {metrics[x]:.4g}" for x in metrics if x.startswith("eval/") and metrics[x] is not None]
        if evaluated:
            print(f"evaluation at step {step}:  {'  '.join(evaluated)}", flush=True)
        if self.wandb:
            data = [[str(value) for value in sample.values()] for sample in samples]
            table = {"samples": self.wandb.Table(list(samples[0]), data)} if samples else {}
            self.wandb.log(self.rows[-1] | table, step=step)

    def write_model(self, folder: Path, model, tokenizer):
        """A plain Hugging Face folder, whole weights whatever the number of ranks."""
        weights = gathered(model.state_dict(keep_vars=True))  # the parameters themselves, so that tied ones are one
        if RANK == 0:
            model.save_pretrained(folder, state_dict={name: x.detach() for name, x in weights.items()})
            tokenizer.save_pretrained(folder)

    def save(self, step: int, model, tokenizer, value_model=None, **tensors):
        """checkpoints/step-N, a model folder with the optimizers' state and `tensors`. Exits if a signal came."""
        beside = self.out / "checkpoints" / f"step-{step}.tmp"
        self.write_model(beside, model, tokenizer)
        if value_model is not None:
            self.write_model(beside / "value_model", value_model, tokenizer)
        state = {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row, **tensors}
        for name, optimizer in self.optimizers.items():
            saved = optimizer.state_dict()
            state[name] = saved | {"state": {i: gathered(moments) for i, moments in saved["state"].items()}}
        if RANK == 0:
            torch.save(state, beside / "state.pt")
            beside.rename(beside.with_suffix(""))
            self.prune(2)
        if self.signal:
            print(f"stopped at step {step}: go on with --resume", flush=True)
            self.close()
            raise SystemExit(128 + self.signal)

    def close(self):
        """Ends the tracking, and the ranks: none of them may end before all are done."""
        if self.wandb:
            self.wandb.finish()
        if dist.is_initialized():
            over_ranks(torch.zeros(1))  # waits until the first has written
            dist.destroy_process_group()

    def finish(self, steps: int, model, tokenizer) -> dict[str, float]:
        """Writes the final model to `out`, config.json last, and returns the final metrics."""
        beside = self.out / "checkpoints" / "final.tmp"
        self.write_model(beside, model.to(getattr(torch, self.args.save_dtype)), tokenizer)
        if RANK == 0:
            for path in sorted(beside.iterdir(), key=lambda path: path.name == "config.json"):
                shutil.rmtree(self.out / path.name, ignore_errors=True)  # a folder cannot be replaced
                path.replace(self.out / path.name)
            beside.rmdir()
            write_beside(self.out / "args.json", json.dumps(self.record | {"finished": steps}, indent=2))
        self.close()
        print(f"wrote {self.out}")
        return self.summary()

    def summary(self) -> dict[str, float]:
        """The last row of metrics.jsonl, and the first evaluation as before/..."""
        rows = self.rows or [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        before = {x.replace("eval/", "before/"): value for x, value in rows[0].items() if x.startswith("eval/")}
        return before | rows[-1]


def write_beside(path: Path, text: str):
    """Writes a file so that a kill leaves the old one or the new one, never a part."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    beside.replace(path)


if __name__ == "__main__":
    main(tyro.cli(Args))
