"""rm.py and dpo.py on 32 conversations in the layout of HH-RLHF: what is kept, what is dropped, what is reported."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers

import dpo
import rm

SAMPLE = Path(__file__).parent / "data/hh_sample.jsonl"
SCRIPTS = {"rm": rm, "dpo": dpo}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models run fastest on one thread, most of all when tests share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def wanted(tiny_folder, tmp_path):
    """Two steps on all 32 pairs, four of them evaluated too."""
    same = {"dataset": str(SAMPLE), "eval_dataset": str(SAMPLE), "model": tiny_folder, "out": str(tmp_path / "out")}
    return {**same, "steps": 2, "batch_size": 4, "eval_size": 4, "sample_every": 1, "max_length": 700}


def test_the_sample_is_what_its_readme_says():
    """32 pairs of whole conversations, one with equal sides, six that share a first question and answer."""
    rows = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    assert len(rows) == 32 and all(set(row) == {"chosen", "rejected"} for row in rows)
    assert sum(row["chosen"] == row["rejected"] for row in rows) == 1
    assert sum(row["chosen"].count("\n\nHuman:") == 2 for row in rows) == 7  # one of them parts early


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_reports_drops_and_lengths(name, wanted, capsys):
    """30 pairs remain; the audit gives the share of longer chosen sides and mean lengths, counted here from the text:
    the template puts the same markers around both sides, and a byte is a token."""
    metrics = SCRIPTS[name].main(SCRIPTS[name].Args(**wanted))
    text = capsys.readouterr().out
    assert (
        "--dataset: dropped of 32 pairs: 1 with equal sides, 1 with sides that differ in more than the last turn"
        in text
    )
    rows = [json.loads(line) for line in SAMPLE.read_text().splitlines()][:30]
    longer = sum(len(row["chosen"].encode()) > len(row["rejected"].encode()) for row in rows) / 30
    assert f"--dataset: 30 pairs; the chosen side is longer in {longer:.1%}" in text
    assert metrics["step"] == 2 and all(math.isfinite(x) for x in metrics.values() if x is not None)
    samples = [json.loads(line) for line in (Path(wanted["out"]) / "samples.jsonl").read_text().splitlines()]
    assert "basil" in str(samples[0]["prompt"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_only_long_pairs_are_dropped_and_counted(name, wanted, capsys):
    """With room for 160 tokens those of which a side is longer go, and the count is printed."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(wanted["model"])
    rows = rm.select_pairs([json.loads(line) for line in SAMPLE.read_text().splitlines()], True, "--dataset")
    lengths = []
    for row in rows:
        turns = [[*row["prompt"], {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")]
        texts = [tokenizer.apply_chat_template(x, tokenize=False) for x in turns]
        lengths.append(max(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts))
    long = sum(length > 160 for length in lengths)
    assert 0 < long < 22
    SCRIPTS[name].main(SCRIPTS[name].Args(**{**wanted, "max_length": 160}))
    assert f"dropped {long} of 30 rows: longer than --max-length 160" in capsys.readouterr().out
