# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "transformers==5.23.0", "datasets==5.2.0", "tyro==1.0.17", "wandb==0.31.0"]
# ///
"""SFT: supervised fine-tuning on demonstrations (Ouyang et al. 2022, arXiv:2203.02155, step 1).

Maximum likelihood: every token that the assistant wrote becomes more probable, given all that stands before it.

    logprobs[n, t] = log pi(ids[n, t] | ids[n, :t])
    mask[n, t]     = 1 on what the assistant wrote and on the token that ends its turn, else 0
    loss           = - sum_n sum_t mask[n, t] * logprobs[n, t] / num_tokens         num_tokens: of the whole step

Each step (1) takes the next `batch_size` rows, (2) adds up their loss and its gradient and (3) updates the policy.

Good to know
- The token that ends a turn is trained, or the policy would not learn to stop. What the template puts behind it is not.
- Imitation copies everything: the loss is KL(author || policy) plus the author's entropy. The built-in author slips now
  and then, and has a bad habit. Greedy decoding hides the slips, but not the habit: compare the two accuracies.

    python sft.py                                         makes a tiny model and teaches it to add up, on a laptop CPU
    python sft.py --model Qwen/Qwen2.5-0.5B --dataset openai/gsm8k:main ...                one GPU, see README
    torchrun --nproc-per-node 8 sft.py ...                several GPUs: weights are sharded (FSDP2)

Rows: `prompt` and `completion`, `question` and `answer`, or `messages`, of which every assistant turn is trained.
Shapes: n rows of a micro-batch, L tokens (padding on the right). Column t of every (n, L) tensor belongs to token t.
"""

import dataclasses
import json
import math
import os
import random
import shutil
import sys
import time
import types
import zlib
from collections import defaultdict
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
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
DEVICE = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16  # of forward passes; trained weights are float32
transformers.utils.logging.disable_progress_bar()


@dataclasses.dataclass
class Args:
    # model and data
    model: str = "tiny"  # folder or Hub id; `tiny` makes a small model with a tokenizer of bytes
    dataset: str = "arithmetic"  # the built-in task, a .jsonl or .parquet file, or a Hub name[:config[:split]]
    eval_dataset: str | None = None  # likewise; by default the last tenth of `dataset`, at most `eval_size` rows
    system_prompt: str | None = None  # before every prompt
    max_length: int = 1024  # tokens; longer rows are dropped
    out: str = "runs/sft"  # the trained model, metrics.jsonl and checkpoints

    # optimisation
    epochs: int = 2  # passes over the training rows; paper: 16
    steps: int = 0  # of training; 0: as many as `epochs` take
    batch_size: int = 16  # rows of a step, on all processes together; paper: 32
    lr: float | None = None  # peak; default: 1e-5 (paper: 9.65e-6); 2e-3 for models below 10 million parameters
    lr_schedule: Literal["linear", "constant"] = "linear"  # after the warm-up; linear falls to 0
    warmup_steps: int = 15  # over which the learning rate rises from 0
    micro_batch_size: int = 64  # sequences in a forward and backward pass, on each GPU
    gradient_checkpointing: bool = False  # keep only the layers' inputs, recompute the rest
    compile: bool = False  # torch.compile each layer

    # run
    seed: int = 0  # of every random draw in training
    eval_every: int = 500  # steps; 0: only before and after training
    eval_size: int = 500  # held-out rows, at most
    save_every: int = 500  # steps between checkpoints; 0: only at the end
    resume: bool = False  # go on from the last checkpoint in `out`; give all other flags again
    track: bool = False  # log to Weights & Biases


# ------------------------------------------------------------------------------------------------------------ algorithm


def sft_loss(logprobs: Tensor, mask: Tensor, num_tokens: float) -> Tensor:
    """What these n rows add to the step's loss, a scalar in nats per token; logprobs, mask: (n, L)."""
    return -(logprobs * mask).sum() / num_tokens


# -------------------------------------------------------------------------------------------------- data and tiny model


def arithmetic(split: str) -> list[dict]:
    """The built-in task: chains of 2 to 4 digits to add up. One chain in ten belongs to the test split."""
    rng, rows = random.Random(split), {}
    while len(rows) < (9_000 if split == "train" else 1_000):
        digits = [rng.randrange(10) for _ in range(rng.randint(2, 4))]
        prompt = "+".join(map(str, digits)) + "="
        if (zlib.crc32(prompt.encode()) % 10 == 0) == (split == "test"):
            rows[prompt] = {"prompt": prompt, "answer": str(sum(digits)), "arithmetic": digits}
    return list(rows.values())


def solve(digits: list[int], slip=0.1, habit=0.6) -> str:
    """A demonstration: the sum, step by step. Steps come out one too high: few by a slip, most that add 7 by habit."""
    rng, total, lines = random.Random(str(digits)), digits[0], []
    for number in digits[1:]:
        error = int(rng.random() < (habit if number == 7 else slip))
        lines.append(f"{total}+{number}={total + number + error}\n")
        total += number + error
    return "".join(lines) + f"#### {total}"


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


def encode_row(tokenizer, args, row: dict) -> bool:
    """Gives a row its `ids`, their `mask`, 1.0 on completions, and the `start` of the last one. Do they fit?"""
    messages, ids, mask = row.get("messages", []), [], []
    pairs = [({"prompt": messages[:i]}, x["content"]) for i, x in enumerate(messages) if x["role"] == "assistant"]
    text = solve(row["arithmetic"]) if "arithmetic" in row else row.get("completion", row.get("answer"))
    for before, completion in pairs or [(row, text)]:
        assert isinstance(completion, str), f"no text in `completion`, `answer` or `messages`; it has {', '.join(row)}"
        prompt_ids = encode(tokenizer, before, args.system_prompt)
        both = [*encode(tokenizer, before, args.system_prompt, completion), tokenizer.eos_token_id]
        assert both[: len(ids)] == ids, "the chat template edits earlier turns: make it one row per turn"
        start = next((i for i, (x, y) in enumerate(zip(prompt_ids, both)) if x != y), len(prompt_ids))
        ids = both[: both.index(tokenizer.eos_token_id, start) + 1]  # what the template puts behind it is not trained
        mask += [0.0] * (start - len(mask)) + [1.0] * (len(ids) - start)
        whole_text = tokenizer.decode(tokenizer.encode(completion, add_special_tokens=False)).split()
        assert "".join(whole_text) in "".join(tokenizer.decode(ids).split()), "the chat template or EOS cuts its text"
    row.update(ids=ids, mask=mask, start=start)
    return not mask[0] and len(ids) <= args.max_length  # nothing stands before the first token to predict it from


def tiny(seed: int):
    """A tokenizer of bytes, whose pad token is not its EOS, and a Qwen3 of 0.6 million random parameters."""
    markers = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    vocab = {token: i for i, token in enumerate([*markers, *bytes_to_unicode().values()])}
    special = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "unk_token": None, "extra_special_tokens": markers[2:]}
    tokenizer = Qwen2Tokenizer(vocab, [], **special)
    turns = "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}<|end|>{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    config = Qwen3Config(
        vocab_size=261, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    return tokenizer, Qwen3ForCausalLM(config).to(DEVICE).eval()


# ---------------------------------------------------------------------------------------- log-probabilities, evaluation


def token_logprobs(model, ids: Tensor, mask: Tensor, temperature=1.0, entropy_grad=False) -> tuple[Tensor, Tensor]:
    """log pi(ids[n, t] | ids[n, :t]) where mask is 1, and the entropy of that distribution, in nats: (n, L) each.

    A causal model never sees padding on the right: no attention mask is needed. Only completions pass the output head,
    in chunks that the backward pass recomputes, so that n * L * vocabulary logits are never in memory.
    """
    n, t = mask.nonzero(as_tuple=True)

    def head(hidden, targets):
        log_p = (model.get_output_embeddings()(hidden).float() / temperature).log_softmax(-1)
        of_entropy = log_p if entropy_grad else log_p.detach()  # or its unused graph keeps log_p in memory
        return log_p.gather(1, targets[:, None])[:, 0], -(of_entropy.exp() * of_entropy).sum(-1)

    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda, cache_enabled=False):
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[n, t - 1]  # (actions, D)
        chunks = zip(hidden.split(1024), ids[n, t].split(1024))
        logprobs, entropy = zip(*(checkpoint(head, *chunk, use_reentrant=False) for chunk in chunks))
    zeros = torch.zeros(ids.shape, device=ids.device)
    return zeros.index_put((n, t), torch.cat(logprobs)), zeros.index_put((n, t), torch.cat(entropy))


def batches(rows, size):
    """`size` rows at a time, and their `ids` and `mask`, padded on the right: (n, L) each."""
    for part in (rows[i : i + size] for i in range(0, len(rows), size)):
        yield part, pad([row["ids"] for row in part]), pad([row["mask"] for row in part])


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # compiled layers would be compiled anew as the cache grows
def evaluate_sft(model, tokenizer, rows, args) -> dict[str, float]:
    """Loss on held-out rows and, where they have an `answer`, accuracy: sampled at temperature 1, and greedy."""
    answer_of = lambda text: text.rpartition("####")[2].strip().replace(",", "")  # noqa: E731
    num_tokens, longest = sum(sum(row["mask"]) for row in rows), max(len(row["ids"]) - row["start"] for row in rows)
    metrics, answered = defaultdict(float), all("answer" in row for row in rows)
    torch.manual_seed(RANK)  # `generate` draws from the global generator
    for part, ids, mask in batches(rows[RANK::WORLD], 4 * args.micro_batch_size):  # no backward pass: more rows fit
        metrics["eval/loss"] += sft_loss(model.token_logprobs(ids, mask)[0], mask, num_tokens)
        prompts = pad([row["ids"][: row["start"]] for row in part], left=True)  # (n, P)
        seen = pad([[1] * row["start"] for row in part], left=True)
        most = min(longest, model.config.max_position_embeddings - prompts.shape[1])
        options = {"do_sample": True, "max_new_tokens": most, "synced_gpus": WORLD > 1}
        for name, top_k in (("sampled", 0), ("greedy", 1)) if answered else ():  # 0 is all tokens, 1 the most probable
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ids.is_cuda):
                output = model.generate(prompts, attention_mask=seen, top_k=top_k, **options)
            texts = tokenizer.batch_decode(output[:, prompts.shape[1] :], skip_special_tokens=True)
            right = sum(answer_of(text) == answer_of(str(row["answer"])) for text, row in zip(texts, part))
            metrics[f"eval/accuracy_{name}"] += right / len(rows)
    return over_ranks(metrics)


def main(args: Args) -> dict[str, float]:
    """Trains and returns the last step's metrics."""
    check(args.batch_size % WORLD == 0, f"--batch-size {args.batch_size}: not a multiple of {WORLD}")
    first_step, folder = start_run(args)
    tokenizer, policy = tiny(args.seed) if args.model == "tiny" else (AutoTokenizer.from_pretrained(args.model), None)
    policy = policy if policy and not folder else load_model(folder / "policy" if folder else args.model)
    if tokenizer.chat_template:  # EOS is from now on what the template puts behind an assistant's text
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "@@"}]
        behind = tokenizer.tokenize(tokenizer.apply_chat_template(turns, tokenize=False).rpartition("@@")[2])
        tokenizer.eos_token = next((x for x in behind if x in tokenizer.get_added_vocab()), tokenizer.eos_token)
    stop_ids(tokenizer, policy)  # stored in its generation config
    rows, eval_rows = read_data(args, lambda row: encode_row(tokenizer, args, row), args.batch_size)
    longest = max(len(row["ids"]) for row in rows + eval_rows)
    check(longest <= policy.config.max_position_embeddings, f"--max-length: {longest} tokens do not fit the model")
    args.steps = args.steps or args.epochs * (len(rows) // args.batch_size)
    check(first_step <= args.steps, f"{args.out} is finished: it has all --steps {args.steps}")

    policy = prepare(policy, args, token_logprobs)
    peak_lr = args.lr if args.lr is not None else 2e-3 if policy.num_parameters() < 10_000_000 else 1e-5
    optimizer = torch.optim.AdamW(policy.parameters(), peak_lr, (0.9, 0.99), weight_decay=0.0)
    print(f"{WORLD} x {DEVICE}, {policy.num_parameters():,} parameters, learning rate {peak_lr:g}")
    if folder:
        state = torch.load(folder / "policy" / "optimizer.pt", weights_only=True, mmap=True)
        set_optimizer_state_dict(policy, optimizer, state, options=StateDictOptions(full_state_dict=True))
    else:
        log(args, 0, evaluate_sft(policy, tokenizer, eval_rows, args))

    begin = time.perf_counter()
    for step in range(first_step, args.steps + 1):
        # (1) batch; rows at the end of an epoch that fill none are left out
        clock, metrics = time.perf_counter(), defaultdict(float)
        epoch, k = divmod(step - 1, len(rows) // args.batch_size)
        drawn = torch.randperm(len(rows), generator=seeded(args.seed, "rows", epoch)).split(args.batch_size)[k]
        batch = sorted((rows[i] for i in drawn), key=lambda row: len(row["ids"]))  # neighbours are of like length
        num_tokens = sum(sum(row["mask"]) for row in batch)

        # (2) loss and gradient
        for _, ids, mask in batches(batch[RANK::WORLD], args.micro_batch_size):
            logprobs, _ = policy.token_logprobs(ids, mask)  # (n, L)
            loss = sft_loss(logprobs, mask, num_tokens)
            (loss * WORLD).backward()  # FSDP averages over the processes
            metrics["loss"] += loss.detach()

        # (3) update
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)).item()
        optimizer.param_groups[0]["lr"] = lr = learning_rate(args, step, peak_lr)
        if math.isfinite(grad_norm):  # NaN or infinite: no update
            optimizer.step()
        optimizer.zero_grad()

        metrics = over_ranks(metrics) | {"grad_norm": grad_norm, "lr": lr, "time/step": time.perf_counter() - clock}
        last = step == args.steps
        if last or step % (args.eval_every or args.steps) == 0:
            metrics |= evaluate_sft(policy, tokenizer, eval_rows, args)
        metrics["time/left"] = (time.perf_counter() - begin) / (step + 1 - first_step) * (args.steps - step)
        log(args, step, metrics)
        if last or step % (args.save_every or args.steps) == 0:
            save(args, step, last, tokenizer, policy=(policy, optimizer))
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


@torch.no_grad()
def load_model(name, dtype=torch.float32):
    """A policy in evaluation mode, without dropout; in float32 to train: an update of 1e-6 is lost in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(DEVICE)
    ids = torch.arange(9, device=DEVICE)[None]
    logits = model.get_output_embeddings()(model.get_decoder()(ids).last_hidden_state)
    check(torch.allclose(logits, model(ids).logits), f"--model {name} changes its logits after the head: not supported")
    return model


def stop_ids(tokenizer, model) -> list[int]:
    """The ids that end a completion: the tokenizer's EOS and the generation config's. The model is saved with both."""
    check(tokenizer.eos_token_id is not None, "--model: its tokenizer has no EOS token, so no completion could end")
    more = model.generation_config.eos_token_id
    found = sorted({tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None})
    model.generation_config = transformers.GenerationConfig(eos_token_id=found, pad_token_id=tokenizer.pad_token_id)
    return found


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
