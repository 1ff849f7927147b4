"""Rows, answers, prompts as ids, masks, batches and draws: what the models are fed, and what is counted."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers.convert_slow_tokenizer import bytes_to_unicode

import grpo
import sft

CPU = torch.device("cpu")
GSM8K = [json.loads(line) for line in (Path(__file__).parent / "data/gsm8k_sample.jsonl").read_text().splitlines()]

# ------------------------------------------------------------------------------------------------------------- answers

EXTRACTED = [
    ("#### 42", "42"),
    ("7+5=12\n12+9=21\n#### 21", "21"),
    ("####42", "42"),
    ("####   42   ", "42"),
    ("  #### 42", "42"),
    ("so it is #### 42", "42"),
    ("#### 42\nand more text, 7 or 8", "42"),
    ("#### 42\r\n", "42"),
    ("#### 1,234", "1234"),
    ("#### 1,234,567", "1234567"),
    ("#### $5", "5"),
    ("#### \\$5", "5"),
    ("#### $ 5", "5"),
    ("#### 5$", "5"),
    ("#### 18.0", "18"),
    ("#### 18.000", "18"),
    ("#### 18.50", "18.50"),
    ("#### 100", "100"),
    ("#### 0", "0"),
    ("#### 0.0", "0"),
    ("#### 42.", "42"),
    ("#### 42.0.", "42"),
    ("#### $1,000.00.", "1000"),
    ("#### -3", "-3"),
    ("#### -$1,200.0", "-1200"),
    ("#### 1,234,567", "1234567"),
    ("#### 1,2", "1,2"),  # two numbers, or a decimal comma: not 12
    ("#### (3, 4)", "(3, 4)"),
    ("#### 1,2345", "1,2345"),
    ("#### 1\n#### 2\n#### 3", "3"),
    ("#### 1 #### 2", "2"),
    ("\\boxed{12}", "12"),
    ("The answer is $\\boxed{1,000}$.", "1000"),
    ("\\boxed{$5.0$}", "5"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{a{b{c}d}e} {f}", "a{b{c}d}e"),
    ("\\boxed{1} or rather \\boxed{2}", "2"),
    ("#### 1\n\\boxed{2}", "2"),
    ("\\boxed{1}\n#### 2", "2"),
    ("#### \\boxed{3}", "3"),
    ("\\boxed{5", None),
    ("\\boxed{\\frac{1}{2}", None),
    ("\\boxed{}", None),
    ("\\boxed{ }", None),
    ("####", None),
    ("#### \n5", None),
    ("#### $", None),
    ("#### .", None),
    ("### 42", None),
    ("the answer is 42", None),
    ("boxed{42}", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "answer"), EXTRACTED)
@pytest.mark.parametrize("script", [sft, grpo])
def test_extract_answer(script, text, answer):
    """The last `####` line or `\\boxed{}` wins, whichever comes later; the table is the specification."""
    assert script.extract_answer(text) == answer


def test_a_stop_token_that_is_not_special_is_no_part_of_the_text():
    """Decoding skips special tokens alone: `#### 5` must not become `#### 5x` because x ends the completion."""
    tokenizer = sft.tiny_tokenizer()
    x, answer = tokenizer.encode("x"), tokenizer.encode("#### 5")
    completions = [answer + x, [*answer, tokenizer.eos_token_id], answer]
    assert grpo.decode(tokenizer, completions, [*x, tokenizer.eos_token_id]) == ["#### 5"] * 3
    assert grpo.decode(tokenizer, [answer + x], [tokenizer.eos_token_id]) == ["#### 5x"]


def test_normalise_drops_a_space_in_front_of_the_full_stop():
    """No space is left at either end: `5 .` is 5."""
    assert grpo.normalise(" 5 . ") == "5"


MATCHES = [
    ("#### 42", "42", 1.0),
    ("#### 42.0", "42", 1.0),
    ("#### 42", "42.0", 1.0),
    ("#### $1,200", "1200", 1.0),
    ("#### 1200", "$1,200.", 1.0),
    ("#### 72", "48/2 = <<48/2=24>>24 in May.\n#### 72", 1.0),
    ("\\boxed{72}", "48/2 = <<48/2=24>>24 in May.\n#### 72", 1.0),
    ("#### 72", "\\boxed{72}", 1.0),
    ("#### 24", "48/2 = <<48/2=24>>24 in May.\n#### 72", 0.0),
    ("#### -5", "5", 0.0),
    ("#### 5", "-5", 0.0),
    ("#### 420", "42", 0.0),
    ("#### 1,2", "12", 0.0),
    ("#### 4.2", "42", 0.0),
    ("42", "42", 0.0),  # no answer line
    ("#### 1\n#### 42", "42", 1.0),
    ("#### 42\n#### 1", "42", 0.0),
    ("\\boxed{42", "42", 0.0),
    ("", "42", 0.0),
    ("#### ", "", 0.0),  # nothing does not match nothing
    ("", "", 0.0),
    ("#### 42", "", 0.0),
    ("#### 42", 42, 1.0),  # a column of numbers
    ("#### 42", 42.0, 1.0),
    ("#### 0", 0, 1.0),
]


@pytest.mark.parametrize(("completion", "answer", "expected"), MATCHES)
def test_exact_match(completion, answer, expected):
    """1.0 if the last answer of the completion is the row's, bare or in a full solution; a float either way."""
    result = grpo.exact_match(completion=completion, answer=answer)
    assert result == expected and isinstance(result, float)


def test_every_published_solution_matches_its_own_answer_and_no_other():
    """32 rows of GSM8K: as a full solution and as the bare number after ####; rejected against all different ones."""
    bare = [re.search(r"#### (.+)$", row["answer"])[1] for row in GSM8K]
    assert len(GSM8K) == 32 and len(set(bare)) > 20
    for row, own in zip(GSM8K, bare):
        assert grpo.exact_match(row["answer"], row["answer"]) == grpo.exact_match(row["answer"], own) == 1.0
        for other, number in zip(GSM8K, bare):
            if number != own:
                assert grpo.exact_match(row["answer"], other["answer"]) == 0.0
                assert grpo.exact_match(row["answer"], number) == 0.0


FORMATTED = [
    ("#### 42", 1.0),
    ("7+5=12\n#### 12", 1.0),
    ("#### 12\n", 1.0),
    ("####12", 1.0),
    ("#### anything at all", 1.0),
    ("#### 1\n#### 2", 1.0),
    ("7+5=12\n#### 12\nand more", 0.0),
    ("it is #### 12", 0.0),
    ("####", 0.0),
    ("#### ", 0.0),
    ("####\n12", 0.0),
    ("##### 12", 0.0),
    ("### 12", 0.0),
    ("12", 0.0),
    ("", 0.0),
]


@pytest.mark.parametrize(("completion", "expected"), FORMATTED)
def test_format_reward(completion, expected):
    """1.0 where the last line is an answer line, right or wrong."""
    assert grpo.format_reward(["1+1="], [completion], [{"answer": "2"}]) == [expected]


def test_exact_reward_is_exact_match_row_by_row():
    """Right, wrong, unreadable."""
    rows = [{"answer": "1"}, {"answer": "#### 2"}, {"answer": "3"}]
    assert grpo.exact_reward(["", "", ""], ["#### 1", "#### 1", "3"], rows) == [1.0, 0.0, 0.0]


# ------------------------------------------------------------------------------------------------------ arithmetic task


def test_solve_by_hand():
    """The running sum, line by line, closed as GSM8K closes; a habit of 1 adds one to every 7, a slip of 1 errs always.

    habit 1: 7+5=12 (the 7 stands first), 12+7=20, 20+7=28.
    """

    def rng():
        return grpo.random.Random(0)

    assert grpo.solve([7, 5, 9], slip=0.0, habit=0.0, rng=rng()) == "7+5=12\n12+9=21\n#### 21"
    assert grpo.solve([0, 0], 0.0, 0.0, rng()) == "0+0=0\n#### 0"
    assert grpo.solve([7, 5, 7, 7], 0.0, 1.0, rng()) == "7+5=12\n12+7=20\n20+7=28\n#### 28"
    for seed in range(20):
        text = grpo.solve([3, 4, 5], slip=1.0, habit=0.0, rng=grpo.random.Random(seed))
        (a, b, first), (c, d, second) = (map(int, step) for step in re.findall(r"(\d+)\+(\d+)=(\d+)\n", text))
        assert (a, b, d) == (3, 4, 5) and c == first and text.endswith(f"#### {second}")  # the slip carries on
        assert first - 7 in (-1, 1, 2) and second - first - 5 in (-1, 1, 2)


@pytest.fixture(scope="module")
def train_rows():
    return grpo.arithmetic_rows("train", 20_000)


def test_arithmetic_rows_are_deterministic_distinct_and_disjoint(train_rows):
    """Two calls agree, fewer rows are the first of more, no prompt occurs twice, no test prompt is trained on."""
    test_rows = grpo.arithmetic_rows("test", 2_000)
    assert sft.arithmetic_rows("train", 500) == grpo.arithmetic_rows("train", 500) == train_rows[:500]
    train, test = ({row["prompt"] for row in rows} for rows in (train_rows, test_rows))
    assert len(train) == 20_000 and len(test) == 2_000 and not train & test


def test_arithmetic_prompts_and_answers(train_rows):
    """Chains of 2 to 5 one-digit numbers, all four lengths and all ten digits; the answer is the true sum."""
    lengths, digits = set(), set()
    for row in train_rows:
        assert set(row) == {"prompt", "completion", "answer", "chosen", "rejected"}
        assert re.fullmatch(r"\d(\+\d){1,4}=", row["prompt"])
        numbers = list(map(int, row["prompt"][:-1].split("+")))
        assert row["answer"] == str(sum(numbers))
        lengths.add(len(numbers))
        digits.update(numbers)
    assert lengths == {2, 3, 4, 5} and digits == set(range(10))


def steps_of(row):
    """(total, number, result) of each line of a completion, whose form is checked on the way."""
    *lines, last = row["completion"].split("\n")
    numbers = list(map(int, row["prompt"][:-1].split("+")))
    total, steps = numbers[0], []
    assert len(lines) == len(numbers) - 1
    for line, number in zip(lines, numbers[1:]):
        result = int(line.rpartition("=")[2])
        assert line == f"{total}+{number}={result}"
        steps.append((total, number, result))
        total = result
    assert last == f"#### {total}"
    return steps


def assert_rate(hits, count, probability):
    """Within 5 standard deviations of a binomial count: a chance of 6e-7 for a right probability."""
    deviation = math.sqrt(count * probability * (1 - probability))
    assert abs(hits - count * probability) < 5 * deviation


def test_demonstrations_slip_and_have_their_habit_at_the_stated_rates(train_rows):
    """Every step but those that add 7 is wrong with probability .1, by -1, 1 or 2 alike.

    Adding 7 comes out one too high with probability .6 + .4 * .1 / 3 = .61333 and right with .4 * .9 = .36. About
    60,000 steps, so that 5 standard deviations are .7 points of the slip rate; a rate of .11 or .09 is rejected.
    """
    steps = [step for row in train_rows for step in steps_of(row)]
    errors = [result - total - number for total, number, result in steps if number != 7 and total + number]
    assert len(errors) > 40_000
    assert_rate(sum(error != 0 for error in errors), len(errors), 0.1)
    for size in (-1, 1, 2):
        assert_rate(errors.count(size), len(errors), 0.1 / 3)
    assert set(errors) == {-1, 0, 1, 2}
    sevens = [result - total - 7 for total, number, result in steps if number == 7]
    assert len(sevens) > 4_000
    assert_rate(sevens.count(1), len(sevens), 0.6 + 0.4 * 0.1 / 3)
    assert_rate(sevens.count(0), len(sevens), 0.36)
    with pytest.raises(AssertionError):
        assert_rate(sum(error != 0 for error in errors), len(errors), 0.11)
    with pytest.raises(AssertionError):
        assert_rate(sum(error != 0 for error in errors), len(errors), 0.09)


# ---------------------------------------------------------------------------------------------------------- tokenizers

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Drops what stands before </think> in every turn but the last, as reasoning models' templates do.
FORGETFUL = CHATML.replace(
    "message.content +", "(message.content if loop.last else message.content.split('</think>')[-1]) +"
)
MARKERS = ["<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|pad|>"]
VOCAB = {token: i for i, token in enumerate([*MARKERS, *bytes_to_unicode().values()])}
EOS, BOS, IM_START, IM_END, EOT, PAD = range(6)


def byte_tokenizer(chat_template=None, bos_token=None, adds_bos=False, pad_token="<|pad|>"):
    """One token per byte and per marker; `adds_bos` puts BOS in front of whatever is encoded with special tokens."""
    special = {"unk_token": None, "eos_token": "<|endoftext|>", "bos_token": bos_token, "pad_token": pad_token}
    tokenizer = transformers.Qwen2Tokenizer(dict(VOCAB), [], extra_special_tokens=MARKERS, **special)
    if adds_bos:
        pieces = {"single": "<s> $A", "pair": "<s> $A <s> $B", "special_tokens": [("<s>", BOS)]}
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**pieces)
    tokenizer.chat_template = chat_template
    return tokenizer


def llama_tokenizer():
    """Metaspace and byte fallback: a piece that is encoded on its own gets a leading space, the whole text gets BOS."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    tokenizer = transformers.LlamaTokenizer({token: i for i, token in enumerate(tokens)}, [], add_bos_token=True)
    return tokenizer


def spell(text):
    """The ids of a text by hand: a marker is one id, any other character one per byte."""
    table, ids = bytes_to_unicode(), []
    for piece in re.split("(" + "|".join(map(re.escape, MARKERS)) + ")", text):
        ids += [VOCAB[piece]] if piece in MARKERS else [VOCAB[table[byte]] for byte in piece.encode()]
    return ids


KINDS = {  # tokenizer, how many BOS a prompt has
    "plain": (lambda: byte_tokenizer(), 0),
    "plain, BOS unused": (lambda: byte_tokenizer(bos_token="<s>"), 0),
    "plain, BOS is EOS and unused": (lambda: byte_tokenizer(bos_token="<|endoftext|>"), 0),
    "plain with BOS": (lambda: byte_tokenizer(bos_token="<s>", adds_bos=True), 1),
    "llama": (llama_tokenizer, 1),
    "chat": (sft.tiny_tokenizer, 0),
    "chatml": (lambda: byte_tokenizer(CHATML), 0),
    "chatml with BOS unused by the template": (lambda: byte_tokenizer(CHATML, "<s>", adds_bos=True), 0),
    "chatml with BOS": (lambda: byte_tokenizer("{{ bos_token }}" + CHATML, "<s>", adds_bos=True), 1),
    "chatml, pad is EOS": (lambda: byte_tokenizer(CHATML, pad_token="<|endoftext|>"), 0),
}
ROWS = [
    {"prompt": "2+2=", "completion": "2+2=4\n#### 4"},
    {"question": "How many?", "answer": "It is 3.\n#### 3"},
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "completion": "Hello"},
    {"prompt": "2+2=", "completion": [{"role": "assistant", "content": "4"}]},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS, ids=["text", "gsm8k", "messages", "both messages"])
@pytest.mark.parametrize("system_prompt", [None, "End with #### and the answer."])
def test_a_row_starts_with_the_ids_that_sampling_starts_from(kind, row, system_prompt):
    """Prompt ids are identical and not trained; the completion and one end of turn are; BOS occurs at most once."""
    make, num_bos = KINDS[kind]
    tokenizer = make()
    eos_ids = sorted({tokenizer.eos_token_id, IM_END} if "chatml" in kind else {tokenizer.eos_token_id})
    prompt = grpo.encode_prompt(tokenizer, row, system_prompt)
    ids, mask = grpo.encode_row(tokenizer, row, system_prompt, eos_ids)
    assert ids[: len(prompt)] == prompt
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    assert ids[-1] in eos_ids and not set(ids[len(prompt) : -1]) & set(eos_ids)
    completion = row.get("completion", row.get("answer"))
    completion = completion if isinstance(completion, str) else completion[0]["content"]
    assert tokenizer.decode(ids[len(prompt) : -1]).strip() == completion
    if kind != "plain, BOS is EOS and unused":
        assert prompt.count(tokenizer.bos_token_id) == ids.count(tokenizer.bos_token_id) == num_bos
    assert num_bos == 0 or prompt[0] == tokenizer.bos_token_id
    text = tokenizer.decode(prompt)
    assert (system_prompt or "") in text and "None" not in text


def test_plain_prompts_by_hand():
    """Without a template the messages are joined by an empty line; BOS only where the tokenizer itself adds it."""
    row = ROWS[2]
    assert grpo.encode_prompt(byte_tokenizer(), row, None) == spell("Be brief.\n\nHi")
    assert grpo.encode_prompt(byte_tokenizer(), {"prompt": "Hi"}, "Brief!") == spell("Brief!\n\nHi")
    assert grpo.encode_prompt(byte_tokenizer(bos_token="<s>"), {"prompt": "Hi"}, None) == spell("Hi")
    with_bos = byte_tokenizer(bos_token="<s>", adds_bos=True)
    assert grpo.encode_prompt(with_bos, {"prompt": "Hi"}, None) == [BOS, *spell("Hi")]
    assert grpo.encode_prompt(with_bos, {"prompt": "<s>Hi"}, None) == [BOS, *spell("Hi")]
    assert grpo.encode_row(byte_tokenizer(), {"prompt": "Hi", "completion": "Ho"}, None, [EOS]) == (
        spell("HiHo<|endoftext|>"),
        [0, 0, 1, 1, 1],
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("plain", "llama"))])
def test_plain_prompts_have_the_ids_that_the_tokenizer_itself_gives(kind):
    """A base model has seen text as its own tokenizer encodes it, special tokens and leading space included."""
    tokenizer = KINDS[kind][0]()
    assert grpo.encode_prompt(tokenizer, {"prompt": "How many?"}, None) == tokenizer.encode("How many?")


def test_chatml_prompt_by_hand():
    """The system turn, the user's and the opening of the assistant's, each marker one token."""
    expected = spell("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert grpo.encode_prompt(byte_tokenizer(CHATML), {"prompt": "Hi"}, "Be brief.") == expected
    with_bos = byte_tokenizer("{{ bos_token }}" + CHATML, "<s>", adds_bos=True)
    assert grpo.encode_prompt(with_bos, {"prompt": "Hi"}, "Be brief.") == [BOS, *expected]


CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
    {"role": "user", "content": "never answered"},
]


@pytest.mark.parametrize("pad_token", ["<|pad|>", "<|endoftext|>", "<|im_end|>"])
def test_every_assistant_turn_is_trained_with_its_end_and_nothing_else(pad_token):
    """By hand: both turns up to <|im_end|>; the newline that ChatML puts after it is not trained, and is not dropped.

    What follows the last assistant turn goes. Whether padding has a token of its own plays no part.
    """
    pieces = [
        ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", 0),
        ("Hello!<|im_end|>", 1),
        ("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", 0),
        ("So long.<|im_end|>", 1),
    ]
    tokenizer = byte_tokenizer(CHATML, pad_token=pad_token)
    ids, mask = sft.encode_row(tokenizer, {"messages": CONVERSATION}, None, [EOS, IM_END])
    assert ids == [token for text, _ in pieces for token in spell(text)]
    assert mask == [trained for text, trained in pieces for _ in spell(text)]
    again = sft.encode_prompt(tokenizer, {"prompt": CONVERSATION[:4]}, None)
    assert ids[: len(again)] == again  # the second turn, too, starts from what sampling would start from


def test_the_tiny_tokenizer_by_hand():
    """<|user|>Hi<|end|><|assistant|>Ho<|end|>: one token per marker and byte; only the completion and its end count."""
    tokenizer = sft.tiny_tokenizer()
    ids, mask = sft.encode_row(tokenizer, {"prompt": "Hi", "completion": "Ho"}, None, [tokenizer.eos_token_id])
    text = ["<|user|>", "H", "i", "<|end|>", "<|assistant|>", "H", "o", "<|end|>"]
    assert tokenizer.convert_ids_to_tokens(ids) == text and mask == [0, 0, 0, 0, 0, 1, 1, 1]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.bos_token_id is None


def test_a_template_without_an_end_of_turn_gets_the_eos():
    """The template closes a turn by a newline only: the newline stays, EOS follows and is trained."""
    template = CHATML.replace("<|im_end|>", "")
    ids, mask = sft.encode_row(byte_tokenizer(template), {"prompt": "Hi", "completion": "Ho"}, None, [EOS])
    prompt = spell("<|im_start|>user\nHi\n<|im_start|>assistant\n")
    assert ids == prompt + spell("Ho\n<|endoftext|>") and mask == [0] * len(prompt) + [1] * 4


def test_a_template_that_drops_earlier_content_is_refused():
    """Two assistant turns, the first with a thought that the template drops once another follows: no ids fit both."""
    messages = [dict(message) for message in CONVERSATION[:5]]
    messages[2]["content"] = "<think>They greet.</think>Hello!"
    with pytest.raises(ValueError, match="template"):
        sft.encode_row(byte_tokenizer(FORGETFUL), {"messages": messages}, None, [EOS, IM_END])
    sft.encode_row(byte_tokenizer(CHATML), {"messages": messages}, None, [EOS, IM_END])
    ids, mask = sft.encode_row(byte_tokenizer(FORGETFUL), {"messages": messages[:3]}, None, [EOS, IM_END])
    assert [token for token, trained in zip(ids, mask) if trained] == spell(messages[2]["content"] + "<|im_end|>")


def test_encode_rows_names_the_row_that_cannot_be_encoded():
    """The run ends, with the number of the row, its text and the reason."""
    thoughtful = [dict(message) for message in CONVERSATION[:5]]
    thoughtful[2]["content"] = "<think>They greet.</think>Hello!"
    rows = [{"messages": CONVERSATION}, {"messages": thoughtful}]
    tokenizer = byte_tokenizer(FORGETFUL)
    with pytest.raises(SystemExit, match=r"row 1\b.*template.*They greet"):
        sft.encode_rows(lambda row: sft.encode_row(tokenizer, row, None, [EOS, IM_END]), rows, 1000, "--max-length")


BAD_ROWS = [
    {"messages": CONVERSATION[:2]},
    {"messages": []},
    {"messages": [{"role": "assistant", "content": "Ho"}]},
    {"prompt": "", "completion": "Ho"},
    {"prompt": "Hi", "completion": ""},
    {"prompt": "Hi", "completion": None},
    {"prompt": None, "completion": "Ho"},
]


@pytest.mark.parametrize("row", BAD_ROWS)
@pytest.mark.parametrize("chat_template", [None, CHATML])
def test_rows_without_prompt_or_assistant_turn_are_refused(row, chat_template):
    """There is nothing to train on, or nothing to train it after."""
    with pytest.raises(ValueError):
        sft.encode_row(byte_tokenizer(chat_template), row, None, [EOS, IM_END])


def test_without_a_template_only_one_assistant_turn_at_the_end_is_possible():
    """Plain text has no turns: a lone last one is encoded, two are refused."""
    ids, mask = sft.encode_row(byte_tokenizer(), {"messages": CONVERSATION[:3]}, None, [EOS])
    prompt = spell("Be kind.\n\nHi")
    assert ids == prompt + spell("Hello!<|endoftext|>") and mask == [0] * len(prompt) + [1] * 7
    with pytest.raises(ValueError, match="template"):
        sft.encode_row(byte_tokenizer(), {"messages": CONVERSATION[:5]}, None, [EOS])


def test_rows_that_are_too_long_are_dropped_and_counted(capsys):
    """Of lengths 3, 5, 4 two are at most 4; ids alone, or with a mask; none at all ends the run and names the flag."""
    rows = [{"n": 3}, {"n": 5}, {"n": 4}]
    kept, encoded = grpo.encode_rows(lambda row: list(range(row["n"])), rows, 4, "--max-prompt-length")
    assert kept == [{"n": 3}, {"n": 4}] and encoded == [[0, 1, 2], [0, 1, 2, 3]]
    printed = capsys.readouterr().out
    assert "1 of 3" in printed and "--max-prompt-length" in printed
    kept, encoded = grpo.encode_rows(lambda row: ([0] * row["n"], [1] * row["n"]), rows, 5, "--max-length")
    assert kept == rows and [len(ids) for ids, _ in encoded] == [3, 5, 4] and capsys.readouterr().out == ""
    with pytest.raises(SystemExit, match="--max-length"):
        grpo.encode_rows(lambda row: [0] * row["n"], rows, 2, "--max-length")


# ------------------------------------------------------------------------------------------------------ load_tokenizer


def folder_with(path, tokenizer, config_eos=None, generation_eos=None, window=64):
    """A model folder without weights."""
    tokenizer.save_pretrained(path)
    config = transformers.Qwen3Config(
        vocab_size=len(VOCAB), hidden_size=16, num_hidden_layers=1, max_position_embeddings=window,
        eos_token_id=config_eos, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    config.save_pretrained(path)
    if generation_eos is not None:
        transformers.GenerationConfig(eos_token_id=generation_eos).save_pretrained(path)
    return str(path)


STOPS = {  # chat template, config's eos, generation config's eos -> all ids that end a completion
    "plain": (None, None, None, [EOS]),
    "config": (None, EOT, None, [EOS, EOT]),
    "generation config": (None, None, EOT, [EOS, EOT]),
    "generation config's list": (None, EOS, [EOS, EOT, PAD], [EOS, EOT, PAD]),
    "chatml": (CHATML, EOS, None, [EOS, IM_END]),
    "chatml and a list": (CHATML, EOS, [EOT], [EOS, IM_END, EOT]),
}


@pytest.mark.parametrize("kind", STOPS)
def test_a_completion_ends_with_each_of_the_eos_ids(kind, tmp_path):
    """The tokenizer's EOS, the generation config's (else the model config's) and the template's end of turn."""
    chat_template, config_eos, generation_eos, expected = STOPS[kind]
    name = folder_with(tmp_path, byte_tokenizer(chat_template), config_eos, generation_eos)
    tokenizer, eos_ids = grpo.load_tokenizer(name, 64)
    assert sorted(eos_ids) == sorted(expected)
    assert tokenizer.encode("ab<|im_end|>\n") == spell("ab<|im_end|>\n") and tokenizer.pad_token_id == PAD


def test_an_eos_of_id_zero_counts(tmp_path):
    """Token 0 is a token: a generation config that names it beside the tokenizer's own EOS is heard."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|eot|>"
    name = folder_with(tmp_path, tokenizer, config_eos=EOT, generation_eos=0)
    assert sorted(grpo.load_tokenizer(name, 64)[1]) == [0, EOT]


def test_text_that_follows_a_turn_is_no_end_of_turn(tmp_path):
    """A template that closes turns by an ordinary newline adds no stop token: a newline may occur in any completion."""
    name = folder_with(tmp_path, byte_tokenizer(CHATML.replace("<|im_end|>", "")))
    assert grpo.load_tokenizer(name, 64)[1] == [EOS]


def test_a_tokenizer_without_a_pad_token_will_do(tmp_path):
    """Masks come from lengths, so nothing depends on it."""
    tokenizer, eos_ids = grpo.load_tokenizer(folder_with(tmp_path, byte_tokenizer(CHATML, pad_token=None)), 64)
    assert tokenizer.encode("ab") == spell("ab") and sorted(eos_ids) == [EOS, IM_END]


def test_a_tokenizer_without_eos_or_a_window_too_small_ends_the_run(tmp_path):
    """Nothing could end, or positions would not exist: the message names what is missing, or both numbers."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(SystemExit, match="eos"):
        grpo.load_tokenizer(folder_with(tmp_path / "a", tokenizer), 64)
    with pytest.raises(SystemExit, match=r"64\b.*65\b"):
        grpo.load_tokenizer(folder_with(tmp_path / "b", byte_tokenizer()), 65)


# ------------------------------------------------------------------------------------------------ batches, draws, means


@pytest.mark.parametrize("budget", [1, 7, 8, 16, 30, 1000])
def test_micro_batches_hold_every_row_once_within_the_budget(budget):
    """Right-padded to the longest row of the batch; n * L within the budget, but for a longer row, alone."""
    lengths = [3, 7, 1, 7, 2, 5, 4, 8, 1]
    rows = []
    for n, k in enumerate(lengths):
        rows.append(([10 * n + t for t in range(k)], [t % 2 for t in range(k)], [-0.5 * t for t in range(k)]))
    seen = []
    for batch, ids, mask, column in grpo.micro_batches(rows, max_tokens=budget, device=CPU, pad_id=99):
        width = max(lengths[n] for n in batch)
        assert ids.shape == mask.shape == column.shape == (len(batch), width)
        assert ids.numel() <= budget or len(batch) == 1
        assert ids.dtype == torch.long and mask.dtype == column.dtype == torch.float32
        for n, row_ids, row_mask, row_column in zip(batch, ids.tolist(), mask.tolist(), column.tolist()):
            padding = width - lengths[n]
            assert row_ids == rows[n][0] + [99] * padding
            assert row_mask == rows[n][1] + [0] * padding and row_column == rows[n][2] + [0] * padding
        seen += batch
    assert sorted(seen) == list(range(9))


def test_micro_batches_of_nothing_are_none():
    """A step in which no row has a signal has no batches."""
    assert list(grpo.micro_batches([], max_tokens=100, device=CPU)) == []


@pytest.mark.parametrize("count", [1, 3, 4, 10, 25])
def test_shuffled_indices_are_slices_of_one_stream_of_epochs(count):
    """10 rows: each ten of the stream are a permutation, the slices of any width agree, and epochs differ."""
    steps = 50 // count
    stream = [i for step in range(1, steps + 1) for i in grpo.shuffled_indices(10, 0, "rows", step, count)]
    one_by_one = [grpo.shuffled_indices(10, 0, "rows", step, 1)[0] for step in range(1, 51)]
    assert stream == one_by_one[: len(stream)] and len(stream) == steps * count
    epochs = [stream[k : k + 10] for k in range(0, len(stream) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_shuffled_indices_depend_on_seed_and_purpose_and_on_nothing_else():
    """The same arguments give the same rows whatever the global generators have done meanwhile."""
    torch.manual_seed(1)
    first = grpo.shuffled_indices(1000, 0, "rows", 3, 100)
    torch.rand(5)
    assert first == grpo.shuffled_indices(1000, 0, "rows", 3, 100) == sft.shuffled_indices(1000, 0, "rows", 3, 100)
    others = [grpo.shuffled_indices(1000, *key, 100) for key in ((1, "rows", 3), (0, "sft", 3), (0, "rows", 4))]
    assert all(other != first for other in others)


def test_uniforms_depend_on_seed_purpose_and_step_and_on_nothing_else():
    """(rows, length) in [0, 1), the same for the same arguments, different for any other; the global state stays."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = grpo.draw_uniforms(0, "rollout", 3, 40, 50)
    assert torch.equal(state, torch.get_rng_state())
    assert first.shape == (40, 50) and first.min() >= 0 and first.max() < 1
    assert torch.equal(first, grpo.draw_uniforms(0, "rollout", 3, 40, 50))
    for other in ((1, "rollout", 3), (0, "evaluation", 3), (0, "rollout", 4)):
        assert (first == grpo.draw_uniforms(*other, 40, 50)).float().mean() < 0.01


def test_uniforms_are_uniform():
    """20,000 draws: mean 1/2 with standard deviation 1/sqrt(12 * 20,000) = .00204; within five of them, .0102.

    So for the squares: mean 1/3, variance 1/5 - 1/9 = 4/45, deviation .00211; and no two draws are equal.
    """
    draws = grpo.draw_uniforms(0, "rollout", 1, 200, 100)
    assert abs(draws.mean().item() - 1 / 2) < 0.0102 and abs((draws**2).mean().item() - 1 / 3) < 0.0106
    assert len(draws.unique()) == 20_000


def test_means_divide_the_sum_by_the_count_only_at_the_end():
    """Batches of 1 and 3 actions: (8 + 1 + 2 + 5) / 4 = 4; the mean of the two means would be (8 + 8/3) / 2."""
    means = grpo.Means()
    means.add(mask=torch.tensor([[1.0, 0.0]]), x=torch.tensor([[8.0, 100.0]]))
    means.add(mask=torch.tensor([[1.0, 1.0], [1.0, 0.0]]), x=torch.tensor([[1.0, 2.0], [5.0, 100.0]]))
    assert means.result() == {"x": 4.0}


def test_means_of_numbers_vectors_and_booleans():
    """(1 + 2) / 2; (1 + 2 + 6) / 3; one true of two unmasked is 1/2."""
    means = grpo.Means()
    for value in (1.0, 2):
        means.add(number=value)
    means.add(vector=torch.tensor([1.0, 2.0, 6.0], requires_grad=True))
    means.add(mask=torch.tensor([[1.0, 1.0, 0.0]]), flag=torch.tensor([[True, False, True]]))
    result = means.result()
    assert result == {"number": 1.5, "vector": 3.0, "flag": 0.5}
    assert all(isinstance(value, float) for value in result.values())


def test_means_of_nothing_are_empty():
    """No batch, no metric."""
    assert grpo.Means().result() == {}


def test_a_completion_of_several_messages_is_refused():
    """Only its first message would be trained on, and nobody would know."""
    turns = [{"role": "assistant", "content": text} for text in ("2", "4")]
    with pytest.raises(ValueError, match="messages"):
        sft.encode_row(sft.tiny_tokenizer(), {"prompt": "1+1=", "completion": turns}, None, [1])
    ids, mask = sft.encode_row(sft.tiny_tokenizer(), {"prompt": "1+1=", "completion": turns[:1]}, None, [1])
    assert sft.tiny_tokenizer().decode([x for x, m in zip(ids, mask) if m]) == "2<|end|>"
