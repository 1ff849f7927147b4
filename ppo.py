# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "tyro==1.0.17", "wandb==0.31.0"]
# ///
"""PPO: proximal policy optimisation of a language model (Schulman et al. 2017, arXiv:1707.06347, eq. 7; for language
models Ouyang et al. 2022, arXiv:2203.02155, eq. 2).

Maximise E[score] - kl_coef * KL(policy || reference), of whole completions. The baseline is a value model. The loss:

    loss     = policy_loss + vf_coef * value_loss - entropy_coef * entropy + sft_coef * sft_loss
    policy_loss = 1/num_tokens * sum_n sum_t max(-A * ratio, -A * clip(ratio, 1 - clip_eps, 1 + clip_eps))
    value_loss  = 1/num_tokens * sum_n sum_t 1/2 * max((values - returns)^2, (clipped - returns)^2)
    clipped  = old_values + clip(values - old_values, -value_clip_eps, value_clip_eps); just values if that eps is 0
    ratio    = exp(logprobs - old_logprobs)    w = min(exp(old_logprobs - sampling_logprobs), is_cap); 1 if is_cap is 0
    rewards_t = -kl_coef * (old_logprobs - ref_logprobs)_t, plus the score at the last action
    A_t      = delta_t + gamma * lam * A_{t+1}        delta_t = rewards_t + gamma * old_values_{t+1} - old_values_t
    returns  = A + old_values; then A is whitened over the actions of the step, mean 0, biased variance 1, and times w

Each step:  (1) rollout: `prompts_per_step` prompts, `group_size` samples each, by temperature only    (2) scores
            (3) old_logprobs, ref_logprobs, old_values: one forward pass each    (4) rewards_t, A, returns
            (5) `num_epochs` times, for each of `num_minibatches` minibatches: loss and gradient, then (6) an update

Signal: one score per completion, at its last action (EOS unless cut); the value model spreads it over the tokens.
KL: k1 = old_logprobs - ref_logprobs in the reward of each token, not differentiated: at gamma 1, with lam 1 or exact
    values, its expected gradient is that of KL(policy || reference); k1 differentiated in the loss would have 0.
Mask and normaliser: EOS is an action; the num_tokens actions of a minibatch weigh alike, in the entropy too; sft_loss
    has its own token mean. A value never sees the token that it is the baseline of; after the last action it is 0.
Truncation: a completion cut at `max_new_tokens` loses `missing_eos_penalty`; it counts as ended, without bootstrap.
Four models: policy, reference (`model`, frozen), reward model or verifier, value model (a network and an optimizer of
    its own; it starts from the reward model, or from the policy with a head of zeros).
Unlike Ouyang et al.: no moving average of the weights, and a learning rate that decays to 0.

Run:  python sft.py && python rm.py && python ppo.py  a laptop CPU, eight minutes; --reward exact: no rm.py; GPU: README
Metrics (metrics.jsonl), and what healthy looks like:
  reward, reward_std, reward/NAME    weighted sum less `missing_eos_penalty`; std -> 0 is collapse; each reward as it is
  accuracy                where rows have an `answer`: if reward rises and this does not, the reward is being gamed
  kl_ref_k1, kl_ref_k3    KL to the reference per token, before the updates; kl_ref_seq: per completion, warns above 15
  loss, policy_loss, value_loss, sft_loss    means over updates, sft_loss over tokens; policy_loss near 0 by whitening
  clip_frac, approx_kl_old    share of ratios beyond clip_eps, a warning above 0.3; KL(old || policy); 0 at first update
  entropy                 of the distribution at `temperature`; a warning below a tenth of the first step's
  explained_variance, value_mean, return_mean    1 - Var(returns - old_values) / Var(returns), < 0 is harmful; means
  grad_norm, value_grad_norm, lr, value_lr, num_updates    norms before clipping, means; updates tried until `target_kl`
  completion_length, truncated_frac  tokens, EOS included; share cut at `max_new_tokens`
  sampling_gap_max, sampling_gap_mean    |sampling - training log-probability|: below 1e-3 in float32
  eval/accuracy_sampled, eval/accuracy_greedy, eval/answered_*, eval/reward_*    held-out prompts, without the penalty
  skipped_updates, is_weight    updates left out so far, not finite; mean of w: near 1
B prompts, G samples each, N = B*G sequences (a micro-batch has n), M minibatches, L tokens (prompt + completion),
V vocabulary, D hidden. Index t of an (N, L) tensor speaks of the decision to emit token t (read from the state at t-1).
"""

import copy
import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import random
import re
import runpy
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
import numpy as np
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
    reward: tuple[str, ...] = ("runs/rm",)
    """One or more of: exact, format, a reward-model folder or Hub id, file.py:function."""
    reward_weights: tuple[float, ...] = ()
    """One weight for each reward; default: all 1."""
    value_model: str | None = None
    """Model that the value model starts from; default: the first reward model in `reward`, else `model`."""
    max_prompt_length: int = 512
    """Prompts of more tokens than this are dropped and counted."""
    max_new_tokens: int = 64
    """Most tokens of a completion that is sampled."""
    out: str = "runs/ppo"
    """Folder for the final model, logs and checkpoints."""

    # algorithm; paper: Ouyang et al. 2022, appendix C.4
    steps: int | None = None
    """Rollouts in grpo.py and ppo.py (default: 200 and 100); else optimizer steps (default: all epochs)."""
    prompts_per_step: int = 256
    """Prompts per rollout."""  # paper: 512
    group_size: int = 1
    """Completions sampled per prompt."""  # paper: 1
    temperature: float = 1.0
    """Divides the logits when sampling and in every log-probability of a sample."""
    num_epochs: int = 1
    """Passes over each rollout."""  # paper: 1
    num_minibatches: int = 4
    """Parts into which each epoch splits the rollout, an update for each."""  # paper: 8
    clip_eps: float = 0.2
    """Half-width of the band in which the probability ratio is not clipped."""  # paper: 0.2
    value_clip_eps: float = 0.0
    """How far a value may move in a step before the clipping, in units of the reward; 0: freely."""  # Schulman 2017: 0
    gamma: float = 1.0
    """Discount per token."""  # paper: 1.0
    lam: float = 0.95
    """GAE's lambda: 1 is Monte Carlo, 0 the one-step TD residual."""  # Schulman et al. 2017: 0.95
    vf_coef: float = 1.0
    """Weight of the value loss; Adam divides it out, so it acts through `max_grad_norm` alone: see `value_lr`."""
    kl_coef: float = 0.05
    """Weight of the KL to the reference; at 0 none is loaded, unless `kl_stop` asks for it."""  # paper: 0.02
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    is_cap: float = 0.0
    """Weigh each token by its training over its sampling probability, at most this; 0: no weights."""
    missing_eos_penalty: float = 1.0
    """Taken off the reward of a completion that was cut before it ended."""
    sft_coef: float = 0.0
    """Weight of the SFT loss that is mixed in."""
    sft_dataset: str | None = None
    """Rows for the SFT loss, named like `dataset`; `prompts_per_step` of them are drawn each step."""
    target_kl: float | None = None
    """End the updates of a step once approx_kl_old (nats per token) passes this, without the update then due."""
    kl_stop: float | None = None
    """End the run once kl_ref_seq (nats per completion) passes this."""

    # optimisation
    lr: float | None = None
    """Peak learning rate; default: one that suits the size of the model, printed and logged."""
    value_lr: float | None = None
    """The value model's peak learning rate; default: one that suits its size, printed and logged."""  # paper: 9e-6
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rate after the warm-up, to 0 just after the last step."""
    warmup_steps: int = 8
    """Steps over which the learning rate rises from 0."""
    adam_beta2: float = 0.95
    """Adam's decay rate of the squared gradient."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm."""
    micro_batch_tokens: int = 4096
    """Most tokens, padding included, in one forward and backward pass of a process, unless a single row has more."""
    rollout_batch_size: int = 1024
    """Most sequences decoded at once: bounds the KV cache."""
    cache_memory: float = 0.5
    """Largest share of a GPU's free memory for the KV cache; where it is too little, fewer are decoded at once."""
    cuda_graphs: bool = True
    """On CUDA, if no layer's attention has a window: replay a recorded decoding step, which spares Python's time."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile most of the model (torch.compile): up to a minute at the start, then shorter steps."""

    # run
    seed: int = 0
    """Seed of every random draw."""
    eval_every: int = 100
    """Steps between evaluations."""
    eval_size: int = 1000
    """Evaluation rows."""
    sample_every: int = 10
    """Steps between samples written to samples.jsonl."""
    save_every: int = 10
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
        for name in ("gamma", "lam"):
            require(getattr(self, name) <= 1, f"--{name} {getattr(self, name)}: must be from 0 to 1")
        num_sequences = self.prompts_per_step * self.group_size
        parts = f"--num-minibatches {self.num_minibatches} must divide --prompts-per-step times --group-size"
        require(num_sequences % self.num_minibatches == 0, f"{parts}, {num_sequences}")
        enough = num_sequences >= WORLD_SIZE * self.num_minibatches
        require(enough, f"--num-minibatches {self.num_minibatches}: each of {WORLD_SIZE} processes needs a row of each")
        whole_groups = self.rollout_batch_size % self.group_size == 0
        require(whole_groups, f"--rollout-batch-size must be a multiple of --group-size {self.group_size}")
        require(0 < len(self.reward) == len(set(self.reward)), "--reward: name one or more, each of them once")
        weights = len(self.reward_weights) in (0, len(self.reward)) and all(map(math.isfinite, self.reward_weights))
        require(weights, "--reward-weights: give one number for each --reward")
        require(bool(self.sft_coef) == bool(self.sft_dataset), "--sft-coef and --sft-dataset need each other")
        shared = not self.sft_coef or self.prompts_per_step % self.num_minibatches == 0
        require(shared, "--num-minibatches must divide --prompts-per-step, so that --sft-coef can share its rows out")
        several = self.num_epochs * self.num_minibatches > 1
        require(self.target_kl is None or several, "--target-kl acts between updates: raise --num-epochs")


# ----------------------------------------------------------------------------------------------------------- algorithm


def kl_shaped_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * (logprobs - ref_logprobs) at every action, plus the score at the last one: (N, L), 0 where mask is 0.

    scores: (N,); logprobs (of the policy that sampled), ref_logprobs, mask: (N, L). A row sums to its score less
    kl_coef times its summed log-ratio. Ouyang et al. 2022, eq. 2. Raises ValueError on a wrong shape or an empty row.
    """
    if not logprobs.shape == ref_logprobs.shape == mask.shape or scores.shape != mask.shape[:1]:
        raise ValueError(f"shapes {scores.shape}, {logprobs.shape}, {ref_logprobs.shape} and mask {mask.shape}")
    if not mask.any(1).all():
        raise ValueError("a completion mask sums to 0: every row needs at least one action")
    position = torch.arange(mask.shape[1], device=mask.device)  # (L,)
    last = (position * mask).argmax(1, keepdim=True)  # (N, 1)
    return -kl_coef * (logprobs - ref_logprobs) * mask + scores[:, None] * (position == last)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns = advantages + values, (N, L) each, 0 where mask is 0.

    rewards, values, mask: (N, L); values[n, t] is that of the state before token t, and that after the last action is
    0. Positions with mask 0 are stepped over: value and advantage carry across a hole. Schulman et al. 2016
    (arXiv:1506.02438), eq. 16. Raises ValueError on a wrong shape.
    """
    if not rewards.shape == values.shape == mask.shape:
        raise ValueError(f"shapes {rewards.shape}, {values.shape} and mask {mask.shape}")
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # (N,)
    columns = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage, action = delta + gamma * lam * next_advantage, mask[:, t] > 0
        next_value = torch.where(action, values[:, t], next_value)
        next_advantage = torch.where(action, advantage, next_advantage)
        columns.append(advantage * mask[:, t])
    advantages = torch.stack(columns[::-1], 1)
    return advantages, advantages + values * mask


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / std over all actions, 0 where mask is 0: masked mean 0, masked biased variance 1. x, mask: (N, L).

    Where all are equal the result is exactly 0: rounding in the mean would be scaled up instead.
    """
    actions = x[mask > 0]
    if actions.max() == actions.min():
        return torch.zeros_like(x)
    return (x - actions.mean()) / actions.std(correction=0) * mask


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_eps: float, num_tokens: int
) -> Tensor:
    """sum_n sum_t max(-A * ratio, -A * clip(ratio, 1 - clip_eps, 1 + clip_eps)) / num_tokens, a scalar. Eq. 7.

    logprobs, old_logprobs, advantages, mask: (n, L). num_tokens counts the actions of the whole minibatch, so that the
    losses of its micro-batches add up to its own. Raises ValueError on a wrong shape.
    """
    if not logprobs.shape == old_logprobs.shape == advantages.shape == mask.shape:
        raise ValueError(f"shapes {logprobs.shape}, {old_logprobs.shape}, {advantages.shape} and mask {mask.shape}")
    ratio = (logprobs - old_logprobs).exp()  # (n, L)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return (torch.maximum(-advantages * ratio, -advantages * clipped) * mask).sum() / num_tokens


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_eps: float, num_tokens: int
) -> Tensor:
    """1/2 sum_n sum_t max((values - returns)^2, (clipped - returns)^2) / num_tokens, a scalar.

    values, old_values, returns, mask: (n, L); clipped: values within clip_eps of old_values, or values if that is 0.
    Schulman et al. 2017, eq. 9; 1/2 and clipping as in their published code. Raises ValueError on a wrong shape.
    """
    if not values.shape == old_values.shape == returns.shape == mask.shape:
        raise ValueError(f"shapes {values.shape}, {old_values.shape}, {returns.shape} and mask {mask.shape}")
    error = (values - returns) ** 2  # (n, L)
    if clip_eps:
        clipped = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return 0.5 * (error * mask).sum() / num_tokens


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over all actions; NaN where the returns do not vary. All (N, L).

    With lam below 1 the returns hold part of the values themselves, which flatters them.
    """
    values, returns = values[mask > 0], returns[mask > 0]
    variance = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / variance) if variance > 0 else math.nan


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = exp(d) - d - 1 with d = ref_logprobs - logprobs, in nats, any shape, never negative.

    Over tokens drawn from the first argument its mean is KL(first || second); its gradient, prefixes held fixed, is
    that of KL(second || first). Schulman 2020; Shao et al. 2024, eq. 4.
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


def sft_loss(logprobs: Tensor, mask: Tensor, num_tokens: int) -> Tensor:
    """-sum_n sum_t logprobs / num_tokens over mask = 1, a scalar in nats per token; logprobs, mask: (N, L).

    num_tokens counts the whole optimizer step, so the losses of micro-batches add up to that of the step.
    """
    return -(logprobs * mask).sum() / num_tokens


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """sum(x * mask) / sum(mask), a scalar."""
    return (x * mask).sum() / mask.sum()


# ----------------------------------------------------------------------------------------------------- data and reward

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


def extract_answer(text: str) -> str | None:
    """The last `#### answer` line or `\\boxed{answer}`, whichever comes later, normalised; None if there is none."""
    line, box = text.rfind("####"), text.rfind("\\boxed{")
    if line > box:
        return normalise(text[line:].lstrip("#").split("\n")[0])
    if box < 0:
        return None
    start = end = box + len("\\boxed{")
    depth = 1
    while end < len(text) and depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return normalise(text[start : end - 1]) if depth == 0 else None


def normalise(answer: str) -> str | None:
    """Drops spaces around it, `$`, thousands' commas, a closing full stop and a closing .0; None if nothing remains."""
    answer = re.sub(r"\\?\$|(?<=\d),(?=\d{3}(?!\d))", "", answer).strip().removesuffix(".").strip()
    return re.sub(r"(?<=\d)\.0+$", "", answer) or None


def exact_match(completion: str, answer: str) -> float:
    """1.0 if the completion's extracted answer equals `answer` (bare, or a full solution that closes with it)."""
    answer = str(answer)
    expected = extract_answer(answer) or normalise(answer)
    return float(expected is not None and extract_answer(completion) == expected)


def exact_reward(prompts: list, completions: list[str], rows: list[dict]) -> list[float]:
    """`--reward exact`: 1.0 where the answer is right."""
    return [exact_match(completion, row["answer"]) for completion, row in zip(completions, rows)]


def format_reward(prompts: list, completions: list[str], rows: list[dict]) -> list[float]:
    """`--reward format`: 1.0 where the last line is an answer line, `#### something`."""
    return [float(re.search(r"(^|\n)####[ \t]*[^\s#][^\n]*\s*$", completion) is not None) for completion in completions]


class RewardModel:
    """A classifier with one label, called like any reward function; higher is better, any scale.

    Text is tokenised anew by its own tokenizer and chat template, and `transformers` picks the token that is read, the
    last one that is not padding: a completion that was cut looks finished to it. `missing_eos_penalty` is for that.
    """

    def __init__(self, name: str, system_prompt: str | None, device: torch.device, max_tokens: int):
        self.name, self.system_prompt, self.device, self.max_tokens = name, system_prompt, device, max_tokens
        self.tokenizer = from_hub(transformers.AutoTokenizer, name, "--reward")
        config = load_config(name, "--reward")
        require(config.num_labels == 1, f"--reward {name} has {config.num_labels} labels; a reward model has one")
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id
        require(config.pad_token_id is not None, f"--reward {name}: set pad_token_id in its config.json, it has none")
        self.window = getattr(config.get_text_config(), "max_position_embeddings", math.inf)
        model = load_weights(transformers.AutoModelForSequenceClassification, name, "--reward", config)
        self.model = shard(to_device(model, device, False).requires_grad_(False).eval(), device)

    @torch.no_grad()
    def __call__(self, prompts: list, completions: list[str], rows: list[dict]) -> list[float]:
        sequences, scores = [], torch.full((len(prompts),), -math.inf)
        for prompt, completion in zip(prompts, completions):
            ids = encode_scored(self.tokenizer, prompt, completion, self.system_prompt)
            require(len(ids) <= self.window, f"--reward {self.name} holds {self.window} tokens; a text has {len(ids)}")
            sequences.append((ids, [1] * len(ids)))
        pad_id = self.model.config.pad_token_id
        for indices, ids, mask in micro_batches(sequences, self.max_tokens, self.device, pad_id):
            with autocast(self.device):
                logits = self.model(input_ids=ids, attention_mask=mask.long()).logits  # (n, 1)
            scores[indices] = logits[:, 0].float().cpu()
        return over_ranks(scores, dist.ReduceOp.MAX).tolist()


def names_a_model(spec: str) -> bool:
    """Whether a word of `--reward` is a reward model's folder or Hub id."""
    path = spec.partition(":")[0]
    return spec not in ("exact", "format") and not path.endswith(".py") and (Path(spec).is_dir() or "/" in spec)


def load_reward(spec: str, args: "Args", device: torch.device) -> Callable[[list, list[str], list[dict]], list[float]]:
    """The reward function that one word of `--reward` names."""
    path, _, name = spec.rpartition(":")
    if spec in ("exact", "format"):
        return {"exact": exact_reward, "format": format_reward}[spec]
    if names_a_model(spec):
        load_config(spec, "--reward", args.max_prompt_length + args.max_new_tokens)  # ends the run if they do not fit
        return RewardModel(spec, args.system_prompt, device, args.micro_batch_tokens)
    is_file = path.endswith(".py") and Path(path).is_file()
    require(is_file, f"--reward {spec}: give exact, format, a model's folder or Hub id, or file.py:function of a file")
    with end_on_error(f"--reward {spec}: {path} cannot be run"):
        function = runpy.run_path(path).get(name)
    require(callable(function), f"--reward {spec}: {path} has no function {name}(prompts, completions, rows)")
    return function


def call_reward(name: str, function: Callable, prompts: list, completions: list[str], rows: list[dict]) -> list[float]:
    """What one reward function says. Whatever it gets wrong ends the run."""
    try:
        values = list(function(prompts, completions, rows))
    except Exception as error:  # the user's own code may raise anything
        if len(rows) > 1 and not isinstance(function, RewardModel):  # row by row, to end at the one that it fails on
            for i in range(len(rows)):
                call_reward(name, function, prompts[i : i + 1], completions[i : i + 1], rows[i : i + 1])
        where = f"completion {completions[0]!r} of row {rows[0]}" if len(rows) == 1 else "a batch, not on any row alone"
        raise SystemExit(f"--reward {name} raised {error!r} on {where}") from error
    require(len(values) == len(rows), f"--reward {name} returned {len(values)} values for {len(rows)} completions")
    for value, completion, row in zip(values, completions, rows):
        finite = hasattr(value, "__float__") and math.isfinite(value)
        require(finite, f"--reward {name} returned {value!r}, not a number, on {completion!r} of row {row}")
    return [float(value) for value in values]


def compute_rewards(
    functions: dict[str, Callable], weights: list[float], prompts: list, completions: list[str], rows: list[dict]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of all rewards (N,), and each of them by name."""
    by_name = {}
    for name, function in functions.items():
        mine = RANK == 0 or isinstance(function, RewardModel)  # all ranks run a reward model, only the first a function
        values = call_reward(name, function, prompts, completions, rows) if mine else [-math.inf] * len(rows)
        by_name[name] = over_ranks(torch.tensor(values), dist.ReduceOp.MAX)
    return sum(weight * values for weight, values in zip(weights, by_name.values())), by_name


def as_messages(prompt: str | list[dict], system_prompt: str | None) -> list[dict]:
    """A prompt (text or messages) as messages, behind the system prompt if there is one."""
    if not prompt or not isinstance(prompt, (str, list)):
        raise ValueError(f"expected text or messages, found {prompt!r}")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*([{"role": "system", "content": system_prompt}] if system_prompt else []), *messages]


def prompt_of(row: dict) -> str | list[dict]:
    """The prompt of a row, text or messages: its column `prompt`, else `question`."""
    return row["prompt"] if "prompt" in row else row["question"]


def render(tokenizer, messages: list[dict], generation_prompt: bool = False) -> str:
    """The text of a conversation: by the chat template where there is one, else all turns with a blank line between."""
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)


def encode_prompt(tokenizer, row: dict, system_prompt: str | None) -> list[int]:
    """The one function that turns a prompt into ids. Plain text gets one BOS if the tokenizer uses BOS."""
    text = render(tokenizer, as_messages(prompt_of(row), system_prompt), generation_prompt=True)
    ids, bos = tokenizer.encode(text, add_special_tokens=False), tokenizer.bos_token_id
    if tokenizer.chat_template or bos is None or ids[:1] == [bos] or tokenizer.encode("a")[:1] != [bos]:
        return ids  # a template brings its own BOS
    return [bos, *ids]


def encode_scored(tokenizer, prompt: str | list[dict], completion: str, system_prompt: str | None) -> list[int]:
    """What a reward model reads: the conversation by the chat template, else prompt, completion and EOS as text."""
    messages, eos = as_messages(prompt, system_prompt), tokenizer.eos_token_id
    if tokenizer.chat_template:
        messages = [*messages, {"role": "assistant", "content": completion}]
        return tokenizer.encode(render(tokenizer, messages), add_special_tokens=False)
    ids = tokenizer.encode(render(tokenizer, messages) + completion)  # with its own special tokens
    return ids if eos is None or ids[-1] == eos else [*ids, eos]


def extend(tokenizer, ids: list[int], done: str, text: str) -> list[int]:
    """Ids of what follows `done` in `text`: encoded together, if that leaves the ids of `done` as `ids`, else alone."""
    whole = tokenizer.encode(text, add_special_tokens=False)
    if whole[: len(ids)] == ids:
        return whole[len(ids) :]
    return tokenizer.encode(text[len(done) :], add_special_tokens=False)


def encode_row(tokenizer, row: dict, system_prompt: str | None, eos_ids: list[int]) -> tuple[list[int], list[int]]:
    """A row of SFT data as ids and mask: 1 on what is trained, up to and including its end of turn, else 0.

    Of `messages` every assistant turn is trained, else the completion alone. A prompt has the very ids that sampling
    will start from. Raises ValueError if the chat template changes earlier text once a turn follows.
    """
    if "messages" in row:
        messages = as_messages(row["messages"], system_prompt)
    else:
        completion = as_messages(row["completion" if "completion" in row else "answer"], None)
        if len(completion) > 1:
            raise ValueError("its completion is more than one message: use a column `messages`")
        messages = [*as_messages(prompt_of(row), system_prompt), {**completion[0], "role": "assistant"}]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    turns = turns if "messages" in row else turns[-1:]
    if not turns or (not tokenizer.chat_template and turns != [len(messages) - 1]):
        raise ValueError("it needs an assistant turn: just one, as the last, if the tokenizer has no chat template")
    ids, mask, done = [], [], ""
    for i in turns:
        if tokenizer.chat_template:
            prompt, turn = render(tokenizer, messages[:i], generation_prompt=True), render(tokenizer, messages[: i + 1])
            if not (prompt.startswith(done) and turn.startswith(prompt)):
                raise ValueError(f"the chat template changes what precedes turn {i} once it follows: one row per turn")
            prompt_ids = extend(tokenizer, ids, done, prompt)
            completion_ids, done = extend(tokenizer, ids + prompt_ids, prompt, turn), turn
        else:
            prompt_ids = encode_prompt(tokenizer, {"prompt": messages[:i]}, None)
            completion_ids = tokenizer.encode(messages[i]["content"], add_special_tokens=False)
        ends = [k + 1 for k, token in enumerate(completion_ids) if token in eos_ids]
        if not ends:
            completion_ids, ends = [*completion_ids, tokenizer.eos_token_id], [len(completion_ids) + 1]
        ids += prompt_ids + completion_ids  # what the template puts after the end of turn, a newline say, has mask 0
        mask += [0] * len(prompt_ids) + [1] * ends[0] + [0] * (len(completion_ids) - ends[0])
    length = len(mask) - mask[::-1].index(1)
    return ids[:length], mask[:length]


def load_sft_data(args: "Args", tokenizer, eos_ids: list[int]) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of the rows for the SFT loss; none if `sft_coef` is 0."""
    if not args.sft_coef:
        return []
    wanted = ["messages", "prompt+completion", "question+answer"]
    rows = read_dataset(args.sft_dataset, "train", "--sft-dataset", wanted)
    encode = functools.partial(encode_row, tokenizer, system_prompt=args.system_prompt, eos_ids=eos_ids)
    limit, flag = args.max_prompt_length + args.max_new_tokens, "--max-prompt-length + --max-new-tokens"
    return encode_rows(encode, rows, limit, flag)[1]


# ------------------------------------------------------------------------------------------ model and log-probabilities


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


@functools.cache
def compiled(function: Callable, compiles: bool) -> Callable:
    """`function` as it is or, if it `compiles`, through torch.compile: one program for all shapes, made once."""
    return torch.compile(function, dynamic=True) if compiles else function


@in_forward
def token_logprobs(
    model, ids: Tensor, mask: Tensor, temperature: float = 1.0, with_entropy: bool = True, entropy_grad: bool = True
) -> tuple[Tensor, Tensor]:
    """log pi(ids[n, t] | ids[n, :t]) and the entropy (nats) of that distribution where mask is 1, else 0.

    ids, mask: (N, L), right-padded; results: (N, L) float32, differentiable. The logits are divided by `temperature`.
    No attention mask: under a causal model, right padding is never seen. Only positions with mask 1 go through the
    output head, a chunk at a time and recomputed in the backward pass, so the logits of no more than a chunk live.
    Without `with_entropy` the entropy is 0, without `entropy_grad` it has no gradient: both save time. Raises
    ValueError if an action stands at index 0, where nothing precedes it.
    """
    if ids.shape != mask.shape or mask[:, 0].any():
        raise ValueError(f"ids {ids.shape} and mask {mask.shape} must agree, and no action may be the first token")
    n, t = mask.nonzero(as_tuple=True)  # (num_actions,) each; Python waits for the GPU here, so before the decoder
    hidden = model.get_decoder()(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # (N, L - 1, D)
    hidden, targets = hidden[n, t - 1], ids[n, t]  # the state before token t decides it
    head, device = model.get_output_embeddings(), ids.device.type
    weight = head.weight
    if head.bias is not None:  # as one more column
        hidden = torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)
        weight = torch.cat([weight, head.bias[:, None]], 1)
    if torch.is_autocast_enabled(device):  # which does not reach into ChunkedHead's backward pass
        hidden = hidden.to(torch.get_autocast_dtype(device))
    options = (temperature, with_entropy, entropy_grad, getattr(model, "compiles", False))  # set by `shard`
    logprobs, entropy, _ = ChunkedHead.apply(hidden, weight, targets, *options)  # (num_actions,) each
    zeros = torch.zeros(ids.shape, device=ids.device)
    return zeros.index_put((n, t), logprobs), zeros.index_put((n, t), entropy if entropy_grad else entropy.detach())


class ChunkedHead(torch.autograd.Function):
    """The output head: `head_logprobs` of all rows, (3, M), a chunk at a time.

    hidden: (M, D), in the number format to compute in; weight: (V, D), in that of its gradient. Nothing of size M * V
    is kept: the backward pass computes the logits anew.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, with_entropy, entropy_grad, compiles):
        num_logits = 2**24  # in a chunk: 64 MiB in float32
        if hidden.is_cuda:  # more, or the GPU would wait for Python; compiled, they exist in bfloat16 alone
            num_logits = 2**29 if compiles else 2**27
        ctx.chunk = max(1, num_logits // len(weight))  # rows at a time
        of_chunk, matrix = compiled(head_logprobs, compiles), weight.to(hidden.dtype)
        chunks = zip(hidden.split(ctx.chunk), targets.split(ctx.chunk))
        outputs = torch.cat([of_chunk(h, matrix, y, temperature, with_entropy) for h, y in chunks], 1)
        ctx.save_for_backward(hidden, weight, targets, outputs)
        ctx.compiles, ctx.options = compiles, (temperature, with_entropy and entropy_grad)
        return outputs

    @staticmethod
    def backward(ctx, grad_outputs):
        hidden, weight, targets, outputs = ctx.saved_tensors
        matrix, of_chunk = weight.to(hidden.dtype), compiled(head_gradient, ctx.compiles)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            of_rows = (targets[rows], outputs[:, rows], grad_outputs[:, rows])
            grad_logits = of_chunk(hidden[rows], matrix, *of_rows, *ctx.options)
            grad_hidden[rows] = grad_logits @ matrix
            grad_weight += grad_logits.T @ hidden[rows]
        return grad_hidden, grad_weight, *[None] * 5


def head_logprobs(hidden, weight, targets, temperature: float, with_entropy: bool) -> Tensor:
    """Log-probabilities of targets (m,), entropies (0 without `with_entropy`) and normalisers, (3, m) in float32."""
    logits = hidden @ weight.T  # (m, V)
    logits = logits if temperature == 1 else logits.float() / temperature  # at 1 no float32 copy
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    chosen, logit = (x.gather(1, targets[:, None])[:, 0] for x in (log_p, logits))
    entropy = -(log_p.exp() * log_p).sum(-1) if with_entropy else torch.zeros_like(chosen)
    return torch.stack([chosen, entropy, logit - chosen])


def head_gradient(hidden, weight, targets, outputs, grad_outputs, temperature: float, entropy_grad: bool) -> Tensor:
    """The gradient by the logits z, (m, V), from what `head_logprobs` returned and the gradient by that, (3, m) each.

    With p = softmax(z / T): T * dlog p[y] / dz = onehot(y) - p, and T * dH / dz = -p * (log p + H).
    """
    _, entropy, normaliser = outputs[..., None]  # (m, 1) each
    grad_chosen, grad_entropy, _ = grad_outputs[..., None] / -temperature  # with the minus of -p

    def of_p(log_p):  # the gradient without onehot(y)
        factor = grad_chosen + grad_entropy * (log_p + entropy) if entropy_grad else grad_chosen
        return log_p.exp_().mul_(factor)

    logits = hidden @ weight.T
    logits = logits if temperature == 1 else logits.float() / temperature
    gradient = of_p(logits - normaliser).to(weight.dtype)  # computed in float32
    of_targets = of_p(logits.gather(1, targets[:, None]) - normaliser) - grad_chosen  # before bfloat16 rounds it away
    return gradient.scatter_(1, targets[:, None], of_targets.to(weight.dtype))


@in_forward
def token_values(model, ids: Tensor, mask: Tensor) -> Tensor:
    """V(ids[n, :t]), the value of the state before token t, where mask is 1, else 0: (N, L) in float32.

    ids, mask: (N, L), right-padded. Read from the hidden state at t-1: a value that saw token t would bias the policy
    gradient.
    """
    hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # (N, L - 1, D)
    with torch.autocast(ids.device.type, enabled=False):
        values = model.score(hidden.float())[..., 0]  # (N, L - 1)
    return torch.nn.functional.pad(values, (1, 0)) * mask


def value_source(args: Args, tokenizer, num_tokens: int) -> tuple[str, str]:
    """What the value model starts from, and its flag. Ends the run if it cannot read what the policy writes."""
    learned = list(filter(names_a_model, args.reward))
    name, flag = (args.value_model, "--value-model") if args.value_model else (args.model, "--model")
    if learned and not args.value_model:
        name, flag = learned[0], "--reward"
    vocabulary = from_hub(transformers.AutoTokenizer, name, flag).get_vocab()
    same = tokenizer.get_vocab().items() <= vocabulary.items()  # a reward model may have a pad token more
    hint = "--value-model cannot start from it" if args.value_model else "name another model with --value-model"
    require(same, f"{flag} {name} has another tokenizer than --model {args.model}: {hint}")
    load_config(name, flag, num_tokens)  # ends the run if they do not fit
    return name, flag


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


# ------------------------------------------------------------------------------------------------------------- rollout


class Decoder:
    """The rows that are being sampled: their KV cache, the columns each row sees, the position of its last token."""

    def __init__(self, model, cache, attention_mask: Tensor, position: Tensor):
        self.model, self.cache, self.attention_mask, self.position = model, cache, attention_mask, position

    def keep(self, rows: Tensor):
        """Goes on with these rows alone."""
        self.cache.batch_select_indices(rows)
        self.attention_mask, self.position = self.attention_mask[rows], self.position[rows]

    def step(self, token: Tensor) -> Tensor:
        """Reads the next token of each row, (rows, 1), and returns the logits of the one after it, (rows, 1, V)."""
        self.attention_mask = torch.cat([self.attention_mask, self.attention_mask.new_ones(len(token), 1)], 1)
        self.position = self.position + 1
        return self.forward(token)

    def forward(self, token: Tensor) -> Tensor:
        options = {"attention_mask": self.attention_mask, "position_ids": self.position, "past_key_values": self.cache}
        return self.model(input_ids=token, use_cache=True, **options).logits


class GraphDecoder(Decoder):
    """A Decoder whose step is a CUDA graph, recorded once and then replayed without Python between.

    A graph works on the same addresses each time. So the cache has room for columns to come, and a mask tells those in
    use. When the room is full, or rows leave, a new cache is made and a new graph recorded. The result of `step` is
    overwritten by the next one. The mask is what is added to the scores here: 0 is seen, -inf is not.
    """

    def __init__(self, model, cache, attention_mask: Tensor, position: Tensor, max_new_tokens: int):
        self.used = attention_mask.shape[1]  # columns filled so far; the cache counts them too, on the device
        self.end = self.used + max_new_tokens
        mask = torch.zeros_like(attention_mask, dtype=model.dtype).masked_fill(attention_mask == 0, -math.inf)
        super().__init__(model, cache, mask[:, None, None], position)  # (rows, 1, 1, columns)
        self.keep(slice(None))  # all rows, now in a cache with room

    def keep(self, rows: Tensor | slice):
        """Goes on with these rows, in a new cache: room for twice what is used, or for all if that is little more."""
        room = max(2 * self.used, 256)
        room = self.end if self.end < 1.25 * room else room
        room += -room % 64  # aligned, as fast kernels want it
        cache = transformers.StaticCache(self.model.config, max_cache_len=room)
        for k, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[rows, :, : self.used], layer.values[rows, :, : self.used], k)
            layer.keys = layer.values = None  # freed
        self.cache, self.position = cache, self.position[rows]
        mask = self.attention_mask[rows, ..., : self.used]
        self.attention_mask = torch.nn.functional.pad(mask, (0, room - self.used), value=-math.inf)
        self.token, self.graph = torch.zeros_like(self.position), None

    def step(self, token: Tensor) -> Tensor:
        if self.used == self.attention_mask.shape[-1]:
            self.keep(slice(None))  # all rows, in a larger cache
        self.token.copy_(token)
        self.attention_mask[..., self.used] = 0
        self.position += 1
        self.used += 1
        if self.graph is not None:
            self.graph.replay()
            return self.logits
        with end_on_error("this model cannot decode with a recorded step, so give --no-cuda-graphs"):
            logits = self.forward(self.token)  # warms up what is recorded next
            self.record()
        return logits

    def record(self):
        """Records a step, on CUDA; on the CPU (in tests) each step simply runs."""
        if self.token.is_cuda:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.forward(self.token)  # recorded, not run


def inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the draw: (rows, 1), from (rows, V) and (rows, 1).

    A large vocabulary goes in two stages, blocks of tokens and then those of one block, so that it is read but once. Of
    NaN probabilities any token is drawn: its log-probability, NaN too, shows it.
    """
    last, dtype = probs.shape[1] - 1, uniforms.dtype
    below_1 = 1 - torch.finfo(dtype).eps  # keeps a draw below the sum, so that some cumulative probability exceeds it
    if last < 1024:
        cdf = probs.cumsum(-1, dtype=dtype)
        return torch.searchsorted(cdf, uniforms.clamp(max=below_1) * cdf[:, -1:], right=True).clamp(max=last)
    if probs.shape[1] % 64:  # blocks need a common size
        probs = torch.nn.functional.pad(probs, (0, -probs.shape[1] % 64))
    size = next(x for x in (512, 256, 128, 64) if probs.shape[1] % x == 0)
    blocks = probs.unflatten(1, (-1, size))  # (rows, V / size, size)
    cdf = torch.nn.functional.pad(blocks.sum(-1).cumsum(-1, dtype=dtype), (1, 0))
    draw = uniforms.clamp(max=below_1) * cdf[:, -1:]
    block = (torch.searchsorted(cdf, draw, right=True) - 1).clamp(max=blocks.shape[1] - 1)  # (rows, 1); beyond if NaN
    draw = draw - cdf.gather(1, block)  # what is left of it for the block
    chosen = blocks.gather(1, block[..., None].expand(-1, -1, size))[:, 0]  # (rows, size)
    cdf = chosen.cumsum(-1, dtype=dtype)
    token = torch.searchsorted(cdf, torch.minimum(draw, below_1 * cdf[:, -1:]), right=True)
    return (block * size + token).clamp(max=last)


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The next token of each row, (rows, 1), and its log-probability, (rows,), from logits, (rows, V)."""
    scaled = logits if temperature in (0, 1) else logits.float() / temperature
    logprobs = scaled.log_softmax(-1, dtype=torch.float32)
    token = inverse_cdf(logprobs.exp(), uniforms) if temperature else logprobs.argmax(-1, keepdim=True)
    return token, logprobs.gather(1, token)[:, 0]


@torch.no_grad()
def generate(
    model, prompts, num_samples: int, max_new_tokens: int, temperature: float, eos_ids, uniforms, graphs: bool = False
) -> tuple[list[list[int]], list[list[float]]]:
    """Samples `num_samples` completions of each prompt: ids and their log-probabilities, prompt-major, B*G of each.

    prompts: B lists of ids. uniforms: (B*G, max_new_tokens) in [0, 1): row i draws token t from uniforms[i, t] by
    inverse CDF of softmax(logits / temperature): but for rounding, neither its neighbours nor chunking matter.
    Temperature 0 is greedy, with log-probabilities at temperature 1. A completion ends with the first of `eos_ids`,
    which it keeps, or at `max_new_tokens`. Nothing of the model's generation config applies. graphs: see GraphDecoder.

        prefill, once per prompt     decode, one row per sample; finished rows leave (graphs: late, and by halves)
        [pad pad p0 p1] | .          left padding here alone: every row's next token has the same column
        [p0  p1  p2 p3] | .
    """
    was_training, device, num_rows = model.training, model.device, len(prompts) * num_samples
    model.eval()  # training mode may checkpoint gradients, and that drops the cache
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)  # (B, P)
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    position = (seen.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=seen, position_ids=position, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    cache.batch_repeat_interleave(num_samples)
    logits, seen, position = (x.repeat_interleave(num_samples, 0) for x in (output.logits, seen, position[:, -1:]))
    # a recorded step needs full attention by SDPA: a window, or a bias cut to size, needs Python
    full = all(type(layer) is transformers.cache_utils.DynamicLayer for layer in cache.layers)
    graphs = graphs and full and model.config._attn_implementation == "sdpa"
    state = (model, cache, seen, position)
    decoder = GraphDecoder(*state, max_new_tokens) if graphs else Decoder(*state)
    batch = torch.arange(num_rows, device=device)  # the rows in it; with graphs, ended ones stay for a while
    ended = torch.zeros_like(batch, dtype=torch.bool)
    tokens = torch.full((num_rows, max_new_tokens), -1, device=device)
    logprobs = torch.zeros(num_rows, max_new_tokens, device=device)
    uniforms = uniforms.to(device, torch.float32 if device.type == "mps" else torch.float64)  # MPS has no float64
    stops = torch.tensor(eos_ids, dtype=torch.long, device=device)
    draw = compiled(draw_tokens, getattr(model, "compiles", False))  # set by `sampling_copy`
    for t in range(max_new_tokens):
        token, logprobs[batch, t] = draw(logits[:, -1], uniforms[batch, t, None], temperature)  # (rows, 1), (rows,)
        tokens[batch, t] = token[:, 0].masked_fill(ended, -1)
        ended = ended | torch.isin(token[:, 0], stops)
        if t + 1 == max_new_tokens:
            break
        if not graphs or t % 16 == 15:  # seldom with graphs: Python must wait for the GPU to know what is left
            left = (~ended).nonzero()[:, 0]
            if not len(left):
                break
            # ended rows leave at once; a graph is recorded anew for each size, so there only once half of over 32 ended
            if (len(batch) > 32 and len(left) <= len(batch) // 2) if graphs else len(left) < len(batch):
                decoder.keep(left)
                batch, token, ended = batch[left], token[left], ended[left]
        logits = decoder.step(token)
    model.train(was_training)
    lengths, tokens, logprobs = (tokens >= 0).sum(1).tolist(), tokens.tolist(), logprobs.tolist()
    return [x[:k] for x, k in zip(tokens, lengths)], [x[:k] for x, k in zip(logprobs, lengths)]


def free_memory(device: torch.device) -> float:
    """Bytes of a GPU that tensors could still take; without bound elsewhere."""
    if device.type != "cuda":
        return math.inf
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


@torch.no_grad()
def cache_rows(sampler, length: int, share: float) -> float:
    """How many sequences of `length` tokens have a KV cache that fits into this share of the free memory."""
    free = free_memory(sampler.device)
    if free == math.inf:  # no bound; and on the CPU the sampler is the model in training mode, which may keep no cache
        return free
    token = torch.zeros(1, 1, dtype=torch.long, device=sampler.device)
    cache = sampler(input_ids=token, use_cache=True).past_key_values
    size = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers if x.keys is not None)  # bytes per token
    return share * free / (size * length)


def rollout(sampler, prompts, num_samples, temperature, eos_ids, uniforms, args) -> tuple[list, list]:
    """`generate`, shared among the ranks, as many prompts at a time as `args` and the memory have room for."""
    found, length = [], uniforms.shape[1]  # of each chunk: completions and their log-probabilities
    rows = cache_rows(sampler, max(map(len, prompts)) + length, args.cache_memory)
    chunk = max(1, int(min(args.rollout_batch_size, rows)) // num_samples)  # prompts at a time
    graphs = args.cuda_graphs and sampler.device.type == "cuda"
    first, end = (len(prompts) * rank // WORLD_SIZE for rank in (RANK, RANK + 1))
    for start in range(first, end, chunk):
        stop = min(start + chunk, end)
        draws = uniforms[start * num_samples : stop * num_samples]
        found.append(generate(sampler, prompts[start:stop], num_samples, length, temperature, eos_ids, draws, graphs))
    shares = [found]  # of all ranks
    if WORLD_SIZE > 1:
        shares = [None] * WORLD_SIZE
        dist.all_gather_object(shares, found)
    completions, logprobs = zip(*itertools.chain(*shares))  # of all chunks, in the order of the prompts
    return list(itertools.chain(*completions)), list(itertools.chain(*logprobs))


def decode(tokenizer, completions: list[list[int]], eos_ids: list[int]) -> list[str]:
    """The texts of completions without what ended them: not every stop token is a special one, which decoding skips."""
    return tokenizer.batch_decode([x[:-1] if x[-1] in eos_ids else x for x in completions], skip_special_tokens=True)


def evaluate(sampler, tokenizer, rows, prompts, reward_of, args, eos_ids) -> dict[str, float]:
    """Accuracy (where rows have an `answer`) and mean reward on held-out prompts, sampled at temperature 1 and greedy.

    Sampling always takes the same draws. prompts: their ids. reward_of: `compute_rewards` for prompts, completions
    and rows, or None. answered_*: the share of completions that hold a readable answer, right or wrong.
    """
    metrics, answers = {}, [row.get("answer") for row in rows]
    uniforms = draw_uniforms(0, "evaluation", 0, len(prompts), args.max_new_tokens)
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        completions, _ = rollout(sampler, prompts, 1, temperature, eos_ids, uniforms, args)
        texts = decode(tokenizer, completions, eos_ids)
        if None not in answers:
            metrics[f"eval/accuracy_{name}"] = sum(map(exact_match, texts, answers)) / len(rows)
            metrics[f"eval/answered_{name}"] = sum(extract_answer(text) is not None for text in texts) / len(rows)
        if reward_of is not None:
            metrics[f"eval/reward_{name}"] = reward_of([prompt_of(row) for row in rows], texts, rows)[0].mean().item()
    return metrics


def pad(rows: list[list[float]], device: torch.device) -> Tensor:
    """Rows of unequal length as one tensor (N, L), right-padded with 0."""
    columns = [torch.tensor(row, dtype=torch.float32) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True).to(device)


@torch.no_grad()
def over_rollout(sequences: list[tuple], max_tokens: int, device: torch.device, function: Callable) -> list[Tensor]:
    """Whatever `function` makes of (ids, mask), (n, L) each, for all rows and in their order: (N, L) each."""
    results, length = [], max(len(ids) for ids, _ in sequences)
    for indices, ids, mask in micro_batches(sequences, max_tokens, device):
        with autocast(device):
            parts = function(ids, mask)
        parts = parts if isinstance(parts, tuple) else (parts,)
        results = results or [torch.full((len(sequences), length), -math.inf, device=device) for _ in parts]
        for result, part in zip(results, parts):
            result[indices] = torch.nn.functional.pad(part, (0, length - ids.shape[1]))
    return [over_ranks(result, dist.ReduceOp.MAX) for result in results]


def minibatches(num_rows: int, args: Args, step: int) -> Iterator[list[int]]:
    """Row numbers of the step's minibatches: `num_epochs` shuffles of all rows, cut into `num_minibatches` each."""
    for epoch in range((step - 1) * args.num_epochs + 1, step * args.num_epochs + 1):
        order = shuffled_indices(num_rows, args.seed, "minibatches", epoch, num_rows)
        size = num_rows // args.num_minibatches
        yield from (order[start : start + size] for start in range(0, num_rows, size))


def accuracy_of(completions: list[str], rows: list[dict]) -> dict[str, float]:
    """The true accuracy of the rollout, where all rows have an `answer`."""
    answers = [row.get("answer") for row in rows]
    if None in answers:
        return {}
    return {"accuracy": sum(map(exact_match, completions, answers)) / len(rows)}


def warn(rows: list[dict], metrics: dict[str, float]):
    """Prints what leaves its healthy range in this step; once, until it is back. rows: metrics.jsonl so far."""
    before = rows[-1] if rows else {}
    first = next((row["entropy"] for row in rows if row.get("entropy")), metrics["entropy"])
    limits = {
        "kl_ref_seq": (15.0, "the policy is far from the reference: raise --kl-coef, lower --lr, or set --kl-stop"),
        "clip_frac": (0.3, "the updates move too far: lower --lr, make fewer updates of a rollout, or set --target-kl"),
    }
    for name, (limit, advice) in limits.items():
        if metrics.get(name, 0.0) > limit >= (before.get(name) or 0.0):
            print(f"warning: {name} {metrics[name]:.3g} is above {limit:g}: {advice}")
    if metrics["entropy"] < 0.1 * first <= (before.get("entropy") or first):
        print(f"warning: entropy {metrics['entropy']:.3g} is below a tenth of the first step's:", end=" ")
        print("if samples are not yet good, the policy has collapsed: raise --entropy-coef or --kl-coef")
    if metrics["reward_std"] == 0.0 != before.get("reward_std"):
        print("warning: all rewards of this step are equal: collapse, or nothing left to learn")


def check_sampling(gap: Tensor, mask: Tensor, means: "Means"):
    """Prints the gap (n, L) between sampling and training log-probabilities; one of 1e-3, off CUDA, ends the run."""
    if "kl_ref_seq" in means.sums:
        print(f"KL to the reference {means.result()['kl_ref_seq']:.1e} per completion")
    mean, largest = masked_mean(gap, mask).item(), (gap * mask).max().item()
    print(f"|sampling - training log-probability|: mean {mean:.1e}, max {largest:.1e}")
    allowed = largest < 1e-3 or gap.device.type == "cuda"  # where sampling is in bfloat16
    require(allowed, "sampling and training differ by more than 1e-3: this model's cached decoding is not exact")
    if mean > 0.02:
        print("warning: sampling and training log-probabilities differ by more than 0.02 on average")


# ---------------------------------------------------------------------------------------------------------------- main


def main(args: Args) -> dict[str, float]:
    """Trains, and returns the last row of metrics.jsonl beside the first evaluation (before/...)."""
    run, device = Run(args), pick_device()
    steps, B, G, M = args.steps or 100, args.prompts_per_step, args.group_size, args.num_minibatches
    if run.finished(steps):
        return run.summary()
    wanted = ["prompt+answer", "question+answer"] if "exact" in args.reward else ["prompt", "question"]
    train_rows, eval_rows = load_data(args, wanted)
    limit, flag = args.max_prompt_length, "--max-prompt-length"
    tokenizer, eos_ids = load_tokenizer(args.model, limit + args.max_new_tokens)
    value_name, value_flag = value_source(args, tokenizer, limit + args.max_new_tokens)
    encode = functools.partial(encode_prompt, tokenizer, system_prompt=args.system_prompt)
    train_rows, train_prompts = encode_rows(encode, train_rows, limit, flag)
    eval_rows, eval_prompts = encode_rows(encode, eval_rows, limit, flag)
    require(len(train_rows) >= B, f"--prompts-per-step {B}: there are only {len(train_rows)} prompts")
    sft_data = load_sft_data(args, tokenizer, eos_ids)
    functions = {name: load_reward(name, args, device) for name in args.reward}
    reward_of = functools.partial(compute_rewards, functions, args.reward_weights or [1.0] * len(functions))
    reward_of([prompt_of(train_rows[0])], [""], train_rows[:1])  # what cannot work fails here, not after hours

    policy, reference = load_model(run.checkpoint or args.model, device, args.gradient_checkpointing), None
    sampler, policy = sampling_copy(policy, device, args), shard(policy, device, args)
    value_name = f"{run.checkpoint}/value_model" if run.checkpoint else value_name
    value_model = load_scorer(value_name, device, args.gradient_checkpointing, value_flag, head_scale=0.0)
    value_model = shard(value_model, device, args)
    if args.kl_coef or args.kl_stop:
        reference = shard(load_model(args.model, device).requires_grad_(False), device, args)
    peak_lr = args.lr or (3e-4 if policy.num_parameters() < 10_000_000 else 1e-6)
    value_peak_lr = args.value_lr or (2e-3 if value_model.num_parameters() < 10_000_000 else 9e-6)
    adam = functools.partial(torch.optim.AdamW, betas=(0.9, args.adam_beta2), weight_decay=0.0, fused=True)
    optimizers = {"optimizer": adam(policy.parameters(), peak_lr)}
    optimizers["value_optimizer"] = adam(value_model.parameters(), value_peak_lr)
    print(f"{policy.num_parameters():,} parameters on {device}, {len(train_rows):,} prompts, peak lr {peak_lr:g}")
    print(f"the value model starts from {value_name}, peak lr {value_peak_lr:g}")
    run.start(optimizers, peak_lr=peak_lr, value_peak_lr=value_peak_lr, steps=steps)
    evaluation = (sampler, tokenizer, eval_rows, eval_prompts, reward_of, args, eos_ids)
    if run.step == 0:
        run.log(0, steps, evaluate(*evaluation))
        if run.rows[-1].get("eval/answered_sampled") == 0:
            print("warning: no sample holds an answer line, `#### 42`: ask for it by --system-prompt, or run sft.py")

    for step in range(run.step + 1, steps + 1):
        if args.kl_stop and (run.rows[-1].get("kl_ref_seq") or 0.0) > args.kl_stop:  # here, so that --resume ends too
            print(f"stopped: kl_ref_seq {run.rows[-1]['kl_ref_seq']:.2f} has passed --kl-stop {args.kl_stop}")
            break
        # (1) rollout: (N,) lists; the completions of a prompt are neighbours, n = b * G + g
        clock = time.perf_counter()
        chosen = shuffled_indices(len(train_rows), args.seed, "prompts", step, B)
        prompts = [train_prompts[i] for i in chosen]  # (B,)
        uniforms = draw_uniforms(args.seed, "rollout", step, B * G, args.max_new_tokens)
        completions, sampling_logprobs = rollout(sampler, prompts, G, args.temperature, eos_ids, uniforms, args)
        rollout_seconds = time.perf_counter() - clock

        # (2) scores
        rows = [train_rows[i] for i in chosen for _ in range(G)]
        texts = decode(tokenizer, completions, eos_ids)
        scores, by_name = reward_of([prompt_of(row) for row in rows], texts, rows)  # (N,)
        truncated = torch.tensor([float(completion[-1] not in eos_ids) for completion in completions])  # (N,)
        scores = scores - args.missing_eos_penalty * truncated

        # (3) log-probabilities of the policy that sampled, recomputed, and of the reference, values: (N, L) each
        sequences = []  # ids and mask of each row
        for n, completion in enumerate(completions):
            prompt = prompts[n // G]
            sequences.append((prompt + completion, [0] * len(prompt) + [1] * len(completion)))
        on_rollout = functools.partial(over_rollout, sequences, args.micro_batch_tokens, device)
        mask = pad([mask for _, mask in sequences], device)
        sampled = pad([[0] * len(prompts[n // G]) + x for n, x in enumerate(sampling_logprobs)], device)
        old_logprobs, entropies = on_rollout(functools.partial(token_logprobs, policy, temperature=args.temperature))
        ref_logprobs = old_logprobs  # without a reference the KL is 0
        if reference is not None:
            frozen = functools.partial(token_logprobs, reference, temperature=args.temperature, with_entropy=False)
            ref_logprobs, _ = on_rollout(frozen)
        (old_values,) = on_rollout(functools.partial(token_values, value_model))

        # (4) rewards and advantages
        rewards = kl_shaped_rewards(scores.to(device), old_logprobs, ref_logprobs, mask, args.kl_coef)  # (N, L)
        raw_advantages, returns = gae(rewards, old_values, mask, args.gamma, args.lam)
        advantages, means = whiten(raw_advantages, mask), Means()
        if args.is_cap:  # sampling was not quite the policy's: weigh each token by their ratio
            is_weights = (old_logprobs - sampled).exp().clamp(max=args.is_cap)
            advantages = advantages * is_weights
            means.add(mask, is_weight=is_weights)
        log_ratio, gap = old_logprobs - ref_logprobs, (old_logprobs - sampled).abs()
        means.add(mask, entropy=entropies, sampling_gap_mean=gap, value_mean=old_values, return_mean=returns)
        if reference is not None:
            means.add(mask, kl_ref_k1=log_ratio, kl_ref_k3=kl_k3(old_logprobs, ref_logprobs))
            means.add(kl_ref_seq=log_ratio.sum(1))
        drawn = shuffled_indices(len(sft_data), args.seed, "sft", step, B) if args.sft_coef else []
        lr, value_lr = (learning_rate(args, step, steps, peak) for peak in (peak_lr, value_peak_lr))

        # (5) loss: each minibatch is an optimizer step of its own
        num_updates = 0
        for k, minibatch in enumerate(minibatches(B * G, args, step)):
            batch, kl_sum, losses = [sequences[n] for n in minibatch], 0.0, 0.0
            num_tokens = sum(sum(actions) for _, actions in batch)
            for indices, ids, actions in micro_batches(batch, args.micro_batch_tokens, device):
                picked, L = [minibatch[i] for i in indices], ids.shape[1]
                of_rollout = (old_logprobs, advantages, old_values, returns)
                old, advantage, old_value, target = (x[picked, :L] for x in of_rollout)  # (n, L), like all below
                with autocast(device):
                    logprobs, entropy = token_logprobs(policy, ids, actions, args.temperature, args.entropy_coef > 0)
                policy_part = policy_loss(logprobs, old, advantage, actions, args.clip_eps, num_tokens)
                run.backward(policy_part - args.entropy_coef * (entropy * actions).sum() / num_tokens)
                with autocast(device):  # after the policy's backward pass: only one model's activations are in memory
                    values = token_values(value_model, ids, actions)
                value_part = value_loss(values, old_value, target, actions, args.value_clip_eps, num_tokens)
                run.backward(args.vf_coef * value_part)
                losses = losses + torch.stack([policy_part, value_part]).detach()
                outside, kl = ((logprobs - old).exp() - 1).abs() > args.clip_eps, kl_k3(old, logprobs).detach()
                kl_sum = kl_sum + (kl * actions).sum()
                means.add(actions, clip_frac=outside, approx_kl_old=kl)  # KL(old || policy)
                if not run.shown:
                    run.show_first_batch(tokenizer, ids, actions)
                    check_sampling((logprobs - sampled[picked, :L]).abs(), actions, means)
            if args.target_kl and over_ranks(kl_sum) / num_tokens > args.target_kl:
                run.discard()
                break
            demonstrations = [sft_data[i] for i in drawn[k % M :: M]]  # 1/M of the step's, the same in each epoch
            sft_tokens = sum(sum(actions) for _, actions in demonstrations)
            for _, ids, actions in micro_batches(demonstrations, args.micro_batch_tokens, device):
                with autocast(device):
                    logprobs, _ = token_logprobs(policy, ids, actions, with_entropy=False)
                run.backward(args.sft_coef * sft_loss(logprobs, actions, sft_tokens))
                means.add(actions, sft_loss=-logprobs)

            # (6) update
            losses, num_updates = over_ranks(losses), k + 1
            result = run.update(optimizer=lr, value_optimizer=value_lr)
            if all(map(math.isfinite, result.values())):  # an update that is skipped has no place in the means
                means.add(**result, policy_loss=losses[0], value_loss=losses[1])
        refresh(sampler, policy)

        seconds = time.perf_counter() - clock
        metrics = {
            "reward": scores.mean().item(), "reward_std": scores.std(correction=0).item(),
            **{f"reward/{name}": values.mean().item() for name, values in by_name.items()}, **accuracy_of(texts, rows),
            "explained_variance": explained_variance(old_values, returns, mask), "sampling_gap_max": gap.max().item(),
            "completion_length": sum(map(len, completions)) / (B * G), "truncated_frac": truncated.mean().item(),
            **means.result(), "num_updates": num_updates, "lr": lr, "value_lr": value_lr,
            "time/rollout_s": rollout_seconds, "time/step_s": seconds,
            "time/tokens_per_s": sum(len(ids) for ids, _ in sequences) / seconds,
        }  # fmt: skip
        warn(run.rows, metrics)
        last = step == steps or bool(args.kl_stop and metrics["kl_ref_seq"] > args.kl_stop)
        if last or step % args.eval_every == 0:
            metrics |= evaluate(*evaluation)
        samples = [
            {"prompt": prompt_of(rows[n]), "completion": texts[n], "reward": scores[n].item()}
            for n in range(min(8, B * G) if step % args.sample_every == 0 else 0)
        ]
        shown = "reward accuracy kl_ref_seq entropy clip_frac explained_variance"
        run.log(step, steps, metrics, samples, shown)
        if last or run.signal or step % args.save_every == 0:
            run.save(step, policy, tokenizer, value_model=value_model)
    return run.finish(steps, policy, tokenizer)


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


def draw_uniforms(seed: int, purpose: str, step: int, num_rows: int, length: int) -> Tensor:
    """(num_rows, length) float64 in [0, 1)."""
    return torch.rand(num_rows, length, generator=seeded(seed, purpose, step), dtype=torch.float64)


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


def micro_batches(rows: list[tuple], max_tokens: int, device: torch.device, pad_id: int = 0) -> Iterator[tuple]:
    """This rank's rows of (ids, mask, ...), right-padded: indices (n), ids (n, L), mask (n, L), ..."""
    for batch in micro_batch_rows([len(row[0]) for row in rows], max_tokens):
        width = len(rows[batch[0]][0])
        ids, *others = zip(*(rows[i] for i in batch))
        columns = [np.array([row + [pad_id] * (width - len(row)) for row in ids])]  # padding is causally never seen
        for column in others:
            columns.append(np.array([row + [0] * (width - len(row)) for row in column], dtype=np.float32))
        yield batch, *(torch.tensor(column, device=device) for column in columns)


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


def load_model(name: str, device: torch.device, gradient_checkpointing: bool = False, flag: str = "--model"):
    """A causal language model, ready to train."""
    config = load_config(name, flag)
    require("ForSequenceClassification" not in str(config.architectures), f"{flag} {name} is a reward model")
    model = load_weights(transformers.AutoModelForCausalLM, name, flag, config)
    return prepare_model(model, device, gradient_checkpointing)


def to_device(model, device: torch.device, gradient_checkpointing: bool):
    """The model on `device`, in training mode; where `shard` will follow, still on the CPU, as it may not fit."""
    model = model.to(device if WORLD_SIZE == 1 else "cpu").train()
    for parameter in model.parameters():  # fresh, aligned memory: a resumed run then adds up the same bits
        parameter.data = parameter.data.clone()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def prepare_model(model, device: torch.device, gradient_checkpointing: bool):
    """The model on `device`, ready to train. Ends the run if its logits are not those that token_logprobs computes."""
    model = to_device(model, device, gradient_checkpointing)
    ids = torch.arange(8, device=model.device)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        logprobs, _ = token_logprobs(model, ids, (ids > 0).float())
    same = (expected.gather(1, ids[0, 1:, None])[:, 0] - logprobs[0, 1:]).abs().max() < 1e-3
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # shows on large logits only
    require(same and not capped, "--model: its logits are more than lm_head(hidden), all that token_logprobs knows")
    return model


def sampling_copy(model, device: torch.device, args: "Args | None" = None):
    """What rollouts run on: an unsharded copy, in bfloat16 on CUDA; the model itself where that will do.

    With --compile its norms and MLPs are compiled; not its attention, whose cache is another in each layer.
    """
    if device.type != "cuda" and WORLD_SIZE == 1 and not (args and args.compile):
        return model
    sampler = copy.deepcopy(model).requires_grad_(False).eval()
    sampler.compiles = bool(args and args.compile)  # read by `generate`
    for module in sampler.modules() if sampler.compiles else ():
        if type(module).__name__.endswith(("RMSNorm", "MLP")):
            module.compile(dynamic=True)
    for parameter in sampler.parameters():  # and no buffers: rotary frequencies need float32
        parameter.data = parameter.data.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return sampler.to(device)


def whole(x: Tensor) -> Tensor:
    """A sharded tensor in full, on every rank; any other as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@torch.no_grad()
def refresh(sampler, model):
    """Gives a sampling copy the model's present weights."""
    if sampler is not model:
        for ours, theirs in zip(sampler.parameters(), model.parameters()):
            ours.copy_(whole(theirs))


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
