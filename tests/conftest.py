"""Fixtures that several test files share. One SFT model is trained per session; runs are shrunken and on the CPU."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # bit-exactness and tolerances are claims about the CPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on the network

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sft  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer():
    """The byte-level tokenizer of the tiny model."""
    return sft.tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder with the tiny model, random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    sft.tiny_model(0).save_pretrained(folder)
    sft.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny_model():
    """The tiny model with random weights, ready to train."""
    return sft.prepare_model(sft.tiny_model(0), torch.device("cpu"), False)


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory):
    """A shrunken run of sft.py: (folder, final metrics). About 50 s; it solves some of the task, not all."""
    folder = tmp_path_factory.mktemp("runs") / "sft"
    metrics = sft.main(sft.Args(out=str(folder), steps=500, eval_size=200, eval_every=1000, save_every=1000))
    return str(folder), metrics
