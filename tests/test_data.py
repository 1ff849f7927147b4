"""Rows, prompts as ids, masks, pairs, answers and rewards."""

import json

import pytest
import tokenizers
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

import dpo
import grpo
import ppo
import rm
import sft
from conftest import CORE, DATA, write_rows

GSM8K = [json.loads(line) for line in (DATA / "gsm8k_sample.jsonl").read_text().splitlines()]
HH = [json.loads(line) for line in (DATA / "hh_sample.jsonl").read_text().splitlines()]
ALL = pytest.mark.parametrize("script", CORE.values(), ids=CORE)


# ---------------------------------------------------------------------------------------------------- the built-in task


def test_arithmetic_is_right_and_its_splits_are_disjoint():
    train, test = sft.arithmetic("train"), sft.arithmetic("test")
    prompts = {row["prompt"] for row in train}
    assert len(prompts) == len(train) and not prompts & {row["prompt"] for row in test} and len(test) >= 1000
    for row in train + test:
        assert row["prompt"] == "+".join(map(str, row["arithmetic"])) + "=" and 2 <= len(row["arithmetic"]) <= 5
        assert int(row["answer"]) == sum(row["arithmetic"])
    assert train == sft.arithmetic("train")


def test_demonstrations_slip_and_have_a_habit():
    """Of all steps a tenth, of those that add 7 six tenths, come out one too high; the answer is the last sum."""
    slips, habits = [], []
    for row in sft.arithmetic("train")[:4000]:
        *lines, answer = sft.solve(row["arithmetic"]).split("\n")
        total = row["arithmetic"][0]
        for line, digit in zip(lines, row["arithmetic"][1:]):
            left, found = line.split("=")
            assert left == f"{total}+{digit}"
            (habits if digit == 7 else slips).append(int(found) - total - digit)
            total = int(found)
        assert answer == f"#### {total}" and len(lines) == len(row["arithmetic"]) - 1
    assert set(slips) == set(habits) == {0, 1}
    assert sum(slips) / len(slips) == pytest.approx(0.1, abs=0.02)
    assert sum(habits) / len(habits) == pytest.approx(0.6, abs=0.05)
    assert sft.solve([7, 5, 9], slip=0, habit=0) == "7+5=12\n12+9=21\n#### 21"


def test_pairs_are_a_flawless_solution_and_one_that_ends_wrong():
    for row in rm.arithmetic("train")[:4000]:
        pair = rm.arithmetic_pair(row["arithmetic"])
        assert pair["chosen"] == sft.solve(row["arithmetic"], slip=0, habit=0)
        assert rm.arithmetic_pair(row["arithmetic"]) == pair
        assert grpo.exact_match(pair["chosen"], row["answer"]) == 1 > grpo.exact_match(pair["rejected"], row["answer"])


# ----------------------------------------------------------------------------------------------------------------- rows


@ALL
def test_rows_of_a_file_stay_what_they_are(script, tmp_path):
    """Line separators of Unicode inside a text, answers that look like numbers or dates, a blank line;
    a byte order mark, as some editors write it."""
    rows = [{"prompt": "a\u2028b\u0085c", "answer": "007"}, {"prompt": "p", "answer": "1.50"}]
    rows += [{"prompt": "p", "answer": "2024-05-01"}, {"prompt": "p", "answer": 100000000000000000000}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8-sig")
    assert script.read_rows(str(path), "train") == rows
    Dataset.from_list(rows[:3]).to_parquet(str(tmp_path / "rows.parquet"))
    assert script.read_rows(str(tmp_path / "rows.parquet"), "train") == rows[:3]
    if hasattr(script, "exact_match"):
        assert script.exact_match("#### 1.50", rows[1]["answer"]) == 1.0
        assert script.exact_match("#### 100,000,000,000,000,000,000", rows[3]["answer"]) == 1.0


def test_names_of_the_hub(monkeypatch):
    """name[:config[:split]]; without a split that of the purpose."""
    asked = []
    monkeypatch.setattr(grpo, "load_dataset", lambda path, config, split: asked.append((path, config, split)) or [])
    for name in ("a/b", "a/b:main", "a/b:main:train[:99]", "a/b::validation"):
        grpo.read_rows(name, "test")
    assert asked == [
        ("a/b", None, "test"),
        ("a/b", "main", "test"),
        ("a/b", "main", "train[:99]"),
        ("a/b", None, "validation"),
    ]


def read(rows, tmp_path, fits=lambda row: True, size=1, **changes):
    return grpo.read_data(grpo.Args(dataset=write_rows(tmp_path / "d.jsonl", rows), **changes), fits, size)


def test_rows_are_held_out_and_never_trained_on(tmp_path):
    """A tenth, at most eval_size; or a data set of its own. Rows that do not fit, or have an empty prompt, go."""
    rows = [{"prompt": f"{i}"} for i in range(40)]
    train, held_out = read(rows, tmp_path)
    assert [row["prompt"] for row in train + held_out] == [str(i) for i in range(40)] and len(held_out) == 4
    assert len(read(rows, tmp_path, eval_size=2)[1]) == 2
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "x"}] * 9)
    train, held_out = read(rows, tmp_path, eval_dataset=other, eval_size=5)
    assert len(train) == 40 and [row["prompt"] for row in held_out] == ["x"] * 5
    train, _ = read([{"prompt": ""}, {"prompt": []}, *rows], tmp_path, fits=lambda row: row["prompt"] != "7")
    assert [row["prompt"] for row in train] == [str(i) for i in range(36) if i != 7]


def test_data_that_cannot_serve_ends_the_run(tmp_path):
    def fails(row):
        assert row["prompt"] != "5", "of this"

    for rows, fits, size, words in (
        ([], bool, 1, "too few rows"),
        ([{"prompt": "1"}] * 30, lambda row: False, 1, "too few rows"),
        ([{"prompt": "1"}] * 30, bool, 28, r"a step \(28\)"),  # 27 are left to train on
        ([{"prompt": str(i)} for i in range(30)], fails, 1, "row 6 .*of this"),
    ):
        with pytest.raises(SystemExit, match=words):
            read(rows, tmp_path, fits, size)


# ----------------------------------------------------------------------------------------------------------- tokenizers


def bytes_tokenizer(template=None, adds_bos=False, bos="<|system|>"):
    """The tiny model's tokenizer with another template; `adds_bos`: it puts BOS (id 2) in front of every text."""
    tokenizer = sft.tiny(0)[0]
    tokenizer.chat_template, tokenizer.bos_token = template, bos
    if adds_bos:
        process = tokenizers.processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 2)])
        tokenizer._tokenizer.post_processor = process
    return tokenizer


def spaced_tokenizer():
    """As SentencePiece's are: a text begins with a space of its own, which a later piece must not have."""
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -1.0) for c in "▁0123456789+=#\nabcdefghijk")]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=0))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")


TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{{ '\\n' }}{% endfor %}"
NEWLINE = TURNS + "{% if add_generation_prompt %}<|assistant|>{% endif %}"  # a newline behind the end of a turn
BOS = "{{ bos_token }}" + NEWLINE
THINK = NEWLINE.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + NEWLINE
ROW = {"prompt": "1+1=", "completion": "1+1=2\n#### 2", "chosen": "#### 2", "rejected": "#### 3", "answer": "2"}


@pytest.mark.parametrize(
    ("tokenizer", "num_bos"),
    [
        (bytes_tokenizer(sft.tiny(0)[0].chat_template), 0),
        (bytes_tokenizer(NEWLINE, bos="<|user|>"), None),
        (bytes_tokenizer(BOS, adds_bos=True), 1),
        (bytes_tokenizer(None, adds_bos=True), 1),
        (bytes_tokenizer(None), 0),
        (spaced_tokenizer(), 0),
    ],
    ids=["tiny", "newline", "template prints BOS", "tokenizer adds BOS", "plain", "spaced"],
)
@pytest.mark.parametrize("system_prompt", [None, "be"])
def test_one_prompt_has_the_same_ids_everywhere(tokenizer, num_bos, system_prompt):
    """In sampling, SFT rows, pairs and what a reward model reads: at most one BOS, one EOS, no space too many."""
    system_prompt = None if num_bos == 1 and tokenizer.chat_template else system_prompt  # BOS is the role's mark here
    prompt = grpo.encode(tokenizer, ROW, system_prompt)
    if num_bos is not None and not (system_prompt and tokenizer.chat_template):
        assert prompt.count(tokenizer.bos_token_id) == num_bos
    args, row, pair = sft.Args(system_prompt=system_prompt), dict(ROW), dict(ROW)
    assert sft.encode_row(tokenizer, args, row) and dpo.encode_pair(tokenizer, args, pair)
    assert row["ids"][: row["start"]] == prompt == pair["prompt_ids"]
    assert tokenizer.decode(row["ids"][row["start"] : -1]).strip() == ROW["completion"]
    assert row["ids"][-1] == tokenizer.eos_token_id and row["ids"][row["start"] :].count(tokenizer.eos_token_id) == 1
    scored = grpo.encode(tokenizer, ROW, system_prompt, ROW["completion"])
    assert scored[: len(row["ids"])] == row["ids"]
    assert pair["chosen_ids"] == grpo.encode(tokenizer, ROW, system_prompt, ROW["chosen"])
    assert tokenizer.decode(row["ids"], skip_special_tokens=False).count("1+1=2") == 1


def test_prompts_as_messages_and_questions_and_the_system_prompt():
    tokenizer = sft.tiny(0)[0]
    text = tokenizer.decode(grpo.encode(tokenizer, {"question": "7"}, "Be brief."))
    assert text == "<|system|>Be brief.<|end|><|user|>7<|end|><|assistant|>"
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    text = tokenizer.decode(grpo.encode(tokenizer, {"prompt": messages}, None))
    assert text == "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
    tool = [*messages, {"role": "tool", "content": "9"}]
    assert "<|tool|>9<|end|>" in tokenizer.decode(grpo.encode(tokenizer, {"prompt": tool}, None))
    plain = bytes_tokenizer(None)
    assert plain.decode(grpo.encode(plain, {"prompt": "7+5="}, "Add up.")) == "Add up.\n\n7+5="
    assert plain.decode(grpo.encode(plain, {"prompt": "7+5="}, "Add up.", "12")) == "Add up.\n\n7+5=12<|end|>"
    with pytest.raises(AssertionError, match="`prompt` or `question`, and has only text, id"):
        grpo.encode(plain, {"text": "x", "id": 1}, None)


# ------------------------------------------------------------------------------------------------------------ SFT masks


def trained(tokenizer, row, **changes):
    """The texts of a row that are trained."""
    row, texts = dict(row), []
    fits = sft.encode_row(tokenizer, sft.Args(**changes), row)
    assert len(row["ids"]) == len(row["mask"])
    for t, (x, m) in enumerate(zip(row["ids"], row["mask"])):
        if m and not row["mask"][t - 1]:
            texts.append([])
        if m:
            texts[-1].append(x)
    return fits, [tokenizer.decode(ids) for ids in texts]


CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "r"},
    {"role": "assistant", "content": "two"},
]


@pytest.mark.parametrize("template", [NEWLINE, sft.tiny(0)[0].chat_template, None])
def test_what_sft_trains(template):
    """A completion through the end of its turn, not the newline behind it; every assistant turn of `messages`; GSM8K's
    solutions. Without a template a turn ends with EOS."""
    tokenizer = bytes_tokenizer(template)
    assert trained(tokenizer, ROW) == (True, ["1+1=2\n#### 2<|end|>"])
    assert trained(tokenizer, {"messages": CHAT}) == (True, ["one<|end|>", "two<|end|>"])
    assert trained(tokenizer, {"messages": CHAT[:3]}, system_prompt="x") == (True, ["one<|end|>"])
    assert trained(tokenizer, GSM8K[0]) == (True, [GSM8K[0]["answer"] + "<|end|>"])
    assert trained(tokenizer, {"prompt": CHAT[:4], "completion": "two"}) == (True, ["two<|end|>"])


def test_rows_that_sft_cannot_use():
    """A template that edits earlier turns, a row without a completion; rows beyond max_length do not fit."""
    think = [*CHAT[:2], {"role": "assistant", "content": "<think>x</think>one"}, *CHAT[3:]]
    tokenizer = bytes_tokenizer(THINK)
    assert trained(tokenizer, {"messages": think[:3]}) == (True, ["<think>x</think>one<|end|>"])
    with pytest.raises(AssertionError, match="one row per turn"):
        trained(tokenizer, {"messages": think})
    silent = {"role": "assistant", "content": None}  # a call of a tool
    for row in ({"text": "b"}, {"messages": CHAT[:2]}, {"completion": CHAT[2:3]}, {"messages": [*CHAT[:2], silent]}):
        with pytest.raises(AssertionError, match="no text in `completion`, `answer` or `messages`; it has prompt, "):
            trained(tokenizer, {"prompt": "a", **row})
    plain = bytes_tokenizer(None)
    assert trained(plain, {"prompt": "a" * 20, "completion": "b" * 11}, max_length=32)[0]
    assert not trained(plain, {"prompt": "a" * 20, "completion": "b" * 12}, max_length=32)[0]


def test_a_completion_is_trained_whole_or_refused():
    """A template that drops reasoning, or an end token amid the text, would cut it; templates may trim spaces."""
    says = "{% for m in messages %}<|{{ m.role }}|>{{ m.content CHANGE }}<|end|>{% endfor %}"
    says += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    trims = bytes_tokenizer(says.replace("CHANGE", "| trim"))
    drops = bytes_tokenizer(says.replace("CHANGE", ".split('</think>')[-1]"))
    row = {"prompt": "q", "completion": "<think>\nx\n</think>\ny\n", "chosen": "a</think>b", "rejected": "c"}
    assert trained(trims, row) == (True, ["<think>\nx\n</think>\ny<|end|>"]) and dpo.encode_pair(trims, dpo.Args(), row)
    assert trained(trims, {"prompt": "q", "completion": "y<|end|>"}) == (True, ["y<|end|>"])
    for tokenizer, text in ((drops, row["completion"]), (trims, "a turn ends with <|end|>, then")):
        with pytest.raises(AssertionError, match="chat template or EOS cuts"):
            trained(tokenizer, {"prompt": "q", "completion": text})
    with pytest.raises(AssertionError, match="cuts a side"):
        dpo.encode_pair(drops, dpo.Args(), row)


def test_the_row_of_a_fault_is_named(tmp_path):
    """By its number in the file, in one sentence; a template without system prompts gets told the flag."""
    tokenizer = bytes_tokenizer(THINK)
    think = {"messages": [*CHAT[:2], {"role": "assistant", "content": "<think>x</think>one"}, *CHAT[3:]]}
    with pytest.raises(SystemExit, match="row 3 .*one row per turn"):
        read([{"messages": CHAT}] * 2 + [think], tmp_path, lambda row: sft.encode_row(tokenizer, sft.Args(), row))
    tokenizer = bytes_tokenizer(NO_SYSTEM)
    with pytest.raises(SystemExit, match='row 1 .*no system role.*--system-prompt ""'):
        read([ROW] * 3, tmp_path, lambda row: grpo.encode(tokenizer, row, "Think."), system_prompt="Think.")


# ---------------------------------------------------------------------------------------------------------------- pairs


def test_layouts_of_pairs():
    """Text with a prompt, messages, messages with a prompt, HH-RLHF's text: the same prompt and last turns."""
    hh = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: 1+1?\n\nAssistant: 2",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: 1+1?\n\nAssistant: 3",
    }
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "1+1?"},
    ]
    sides = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "2"), ("rejected", "3"))}
    rows = [
        {"prompt": turns, "chosen": "2", "rejected": "3"},
        {"chosen": turns + sides["chosen"], "rejected": turns + sides["rejected"]},
        {"prompt": turns, **sides},
        {"question": turns, **sides},
        hh,
    ]
    tokenizer = sft.tiny(0)[0]
    for script in (rm, dpo):
        found = []
        for row in rows:
            assert script.encode_pair(tokenizer, script.Args(), row)
            found.append([row[x] for x in ("prompt_ids", "chosen_ids", "rejected_ids", "length")])
        assert found == [found[0]] * 5
    assert tokenizer.decode(found[0][1]).endswith("<|user|>1+1?<|end|><|assistant|>2<|end|>")
    plain = bytes_tokenizer(None)
    assert dpo.encode_pair(plain, dpo.Args(), hh)
    assert plain.decode(hh["prompt_ids"]) == "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: 1+1?\n\nAssistant: "
    assert plain.decode(hh["chosen_ids"]) == plain.decode(hh["prompt_ids"]) + "2<|end|>"


def test_pairs_that_hold_no_preference_are_dropped():
    """Equal sides, sides that differ before the last turn, a side that is too long; of the sample all but two stay."""
    tokenizer = sft.tiny(0)[0]
    early = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}
    assert not rm.encode_pair(tokenizer, rm.Args(), early)
    assert not rm.encode_pair(tokenizer, rm.Args(), {**ROW, "rejected": ROW["chosen"]})
    assert not rm.encode_pair(tokenizer, rm.Args(max_length=16), {**ROW, "rejected": "x" * 20})
    assert sum(rm.encode_pair(tokenizer, rm.Args(), dict(row)) for row in HH) == 30
    silent = {"role": "assistant", "content": None}  # a call of a tool
    for row, words in (
        ({"prompt": "a", "chosen": "b"}, "`chosen` and `rejected`, and has only prompt, chosen"),
        ({"chosen": "b", "rejected": "c"}, "Human"),
        ({"chosen": [ROW], "rejected": [ROW]}, "content"),
        ({"chosen": [*CHAT[:2], silent], "rejected": CHAT[:3]}, "cuts a side"),
    ):
        with pytest.raises((AssertionError, KeyError), match=words):
            rm.encode_pair(tokenizer, rm.Args(), row)


def test_dpo_sums_over_the_completion_through_its_end(monkeypatch):
    """The mask begins behind the prompt and ends with the turn's end, not with the newline that the template adds."""
    tokenizer, seen = bytes_tokenizer(NEWLINE), {}

    class Policy:
        def token_logprobs(self, ids, mask):
            seen.update(ids=ids, mask=mask)
            return mask * torch.arange(ids.shape[1]), None

    row = dict(ROW)
    assert dpo.encode_pair(tokenizer, dpo.Args(), row)
    logps = dpo.pair_logps(Policy(), [row, row], [tokenizer.eos_token_id])
    start = len(row["prompt_ids"])  # "#### 2" and its end are 7 tokens
    assert logps.shape == (2, 2) and logps[0, 0].item() == sum(range(start, start + 7))
    texts = [tokenizer.decode(x[m == 1]) for x, m in zip(seen["ids"], seen["mask"])]
    assert texts == ["#### 2<|end|>"] * 2 + ["#### 3<|end|>"] * 2
    row = {"prompt_ids": [9], "chosen_ids": [5, 6, 1, 7], "rejected_ids": [9, 1]}
    dpo.pair_logps(Policy(), [row], [1])  # nothing stands before the first token; what follows the end does not count
    assert seen["mask"].tolist() == [[0, 1, 1], [0, 1, 0]]


# -------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("script", [grpo, ppo])
@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("So it is \\boxed{$9{,}500$}.", "9500", 1),
        ("#### 8,152,260", "8152260", 1),
        ("#### 8, 152260", "8152260", 0),
        ("#### \u22123", "-3", 1),
        ("#### 3", "-3", 0),
        ("#### +7", "7", 1),
        ("#### 7.0", "7", 1),
        ("#### 007", "7", 1),
        ("#### 7.5", "7", 0),
        ("#### 0.50", ".5", 1),
        ("#### 0.50", "0.5", 1),
        ("\\boxed{42}\n#### Summary", "42", 1),
        ("It is \\boxed{7}. (The form \\boxed{} was asked for.)", "7", 1),
        ("#### **73**", "73", 1),
        ("\\boxed{\\text{73}}", "73", 1),
        ("\\boxed {73}", "73", 1),
        ("#### \\boxed{73}", "73", 1),
        ("#### $29.00", "29", 1),
        ("\\boxed{1,2}", "1, 2", 1),
        ("\\boxed{2,1}", "1, 2", 0),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", 1),
        ("\\boxed{142}", "42", 0),
        ("", "42", 0),
        ("42", "42", 0),  # no mark: no answer
        ("#### 1\n#### 2", "2", 1),  # the last one counts
        ("#### 12.", "12", 1),
        ("#### 100000000000000000000000000000001", "100000000000000000000000000000002", 0),
        ("#### Paris", "Paris", 1),
        ("#### 5", "It is 2 + 3.\n#### 5", 1),  # a solution that closes with its answer
        ("#### 12", 12, 1),
        ("#### " + "1" * 5000, "1", 0),
    ],
)
def test_answers(script, text, answer, right):
    assert script.exact_match(text, answer) == float(right)


def test_solutions_of_gsm8k_match_themselves_and_no_other_answer():
    answers = [grpo.extract_answer(row["answer"]) for row in GSM8K]
    assert None not in answers and len(set(answers)) > 20
    for i, row in enumerate(GSM8K):
        for j, other in enumerate(GSM8K):
            assert grpo.exact_match(row["answer"], other["answer"]) == float(answers[i] == answers[j])


# -------------------------------------------------------------------------------------------------------------- rewards

REWARDS = """
import math, numpy, torch
def array(rows, completions): return numpy.arange(len(rows))
def tensor(rows, completions): return torch.arange(len(rows))
def booleans(rows, completions): return [row["answer"] in text for row, text in zip(rows, completions)]
def few(rows, completions): return [1.0]
def many(rows, completions): return [1.0] * 9
def none(rows, completions): return [1.0, None]
def nan(rows, completions): return [math.nan, 1.0]
def infinite(rows, completions): return numpy.array([1.0, numpy.inf])
def raises(rows, completions): raise ValueError("broken")
"""


@pytest.mark.parametrize("script", [grpo, ppo])
def test_reward_functions(script, tmp_path):
    """Arrays, tensors, booleans of the right number are taken; anything else ends the run."""
    (tmp_path / "rewards.py").write_text(REWARDS)

    def rewards(name):
        reward_of = script.load_reward(script.Args(reward=f"{tmp_path}/rewards.py:{name}"))
        return reward_of([{"answer": "1"}, {"answer": "2"}], ["#### 1", "#### 1"])

    for name, expected in (("array", [0, 1]), ("tensor", [0, 1]), ("booleans", [1, 0])):
        assert rewards(name).tolist() == expected and rewards(name).dtype == torch.float32
    for name in ("few", "many", "none", "nan", "infinite"):
        with pytest.raises(SystemExit, match=f"--reward .*{name}: 2 finite numbers"):
            rewards(name)
    with pytest.raises(ValueError, match="broken"):
        rewards("raises")
    exact = script.load_reward(script.Args(reward="exact"))
    assert exact([{"answer": "1"}, {"answer": "2"}], ["#### 1", "#### 1"]).tolist() == [1.0, 0.0]


# ------------------------------------------------------------------------------------------------------------- plumbing


@ALL
def test_padding_learning_rates_and_seeds(script):
    assert script.pad([[1, 2, 3], [4]]).tolist() == [[1, 2, 3], [4, 0, 0]]
    assert script.pad([[1.0, 2.0], [4.0]], left=True).tolist() == [[1.0, 2.0], [0.0, 4.0]]
    args = script.Args(steps=10, warmup_steps=2)  # up to the peak in step 2, then down by a ninth each
    rates = [script.learning_rate(args, step, 2.0) for step in (1, 2, 3, 10)]
    assert rates == pytest.approx([1.0, 2.0, 16 / 9, 2 / 9])
    args = script.Args(steps=10, warmup_steps=0, lr_schedule="constant")
    assert [script.learning_rate(args, step, 2.0) for step in (1, 10)] == [2.0, 2.0]
    if hasattr(script, "seeded"):
        draw = lambda *key: torch.rand(3, generator=script.seeded(*key)).tolist()  # noqa: E731
        assert draw(0, "rows", 1) == draw(0, "rows", 1) != draw(0, "rows", 2) != draw(1, "rows", 2)
    assert script.over_ranks({"a": torch.tensor(2), "b": 0.5}) == {"a": 2.0, "b": 0.5}
