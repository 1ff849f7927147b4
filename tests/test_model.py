"""Log-probabilities, sampling, values and rewards of real architectures, against plain forward passes."""

import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import dpo
import grpo
import ppo
import rm
import sft
from conftest import CORE, save_tiny

SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
ARCHITECTURES = {
    "qwen3": {},
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "gpt_neox": {"use_parallel_residual": True},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "mistral": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64},
}
SCALES_LOGITS = {"gemma2": {}, "cohere": {"logit_scale": 0.5}, "granite": {"logits_scaling": 2.0}}
SHARP = 4.0  # random weights are multiplied by this: a distribution with a shape, far from uniform


def build(kind, auto=AutoModelForCausalLM, seed=0, **changes):
    """A small model of an architecture with random weights."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **(SMALL | (ARCHITECTURES | SCALES_LOGITS)[kind] | changes))
    model = auto.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data *= SHARP if parameter.dim() > 1 else 1.0
    return model


def plain_logprobs(model, ids, temperature=1.0):
    """log pi(ids[t] | ids[:t]) of one sequence from a forward pass without cache or padding: (L,), 0 at t = 0."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double() / temperature
    return torch.nn.functional.pad(logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0], (1, 0))


def random_ids(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]


# ------------------------------------------------------------------------------------------------------- token_logprobs


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_are_those_of_a_plain_forward_pass(kind, temperature):
    """Ragged rows padded on the right, a mask with a hole; 0 where the mask is 0; the entropy is the distribution's."""
    model, rows = build(kind), random_ids(9, 14, 5)
    mask = grpo.pad([[0.0] * 3 + [1.0] * (len(row) - 3) for row in rows])
    mask[1, 6:8] = 0.0
    logprobs, entropy = grpo.token_logprobs(model, grpo.pad(rows), mask, temperature)
    for n, row in enumerate(rows):
        expected = plain_logprobs(model, row, temperature) * mask[n, : len(row)]
        assert torch.allclose(logprobs[n, : len(row)].double(), expected, atol=1e-4)
        p = (model(torch.tensor([row])).logits[0].double() / temperature).softmax(-1)
        expected = -(p * p.log()).nan_to_num(0.0).sum(-1)[2:-1] * mask[n, 3 : len(row)]
        assert torch.allclose(entropy[n, 3 : len(row)].double(), expected, atol=1e-4)
    assert (logprobs[mask == 0] == 0).all() and (entropy[mask == 0] == 0).all()


def test_the_head_worked_by_hand():
    """Logits (0, 0, ln 2): ln 1/2 and 3/2 ln 2 nats, at temperature 1/2 (0, 0, 2 ln 2): ln 2/3. entropy_grad alone
    decides whether the entropy takes a gradient."""
    head = torch.nn.Linear(1, 3, bias=False)
    head.weight.data = torch.tensor([[0.0], [0.0], [math.log(2)]])

    def decoder(input_ids, use_cache):
        return SimpleNamespace(last_hidden_state=torch.ones(1, 2, 1))

    model = SimpleNamespace(get_output_embeddings=lambda: head, get_decoder=lambda: decoder)
    ids, mask = torch.tensor([[0, 2]]), torch.tensor([[0.0, 1.0]])
    logprobs, entropy = grpo.token_logprobs(model, ids, mask)
    assert logprobs[0, 1].item() == pytest.approx(math.log(1 / 2)) and entropy[0, 1].item() == pytest.approx(1.039721)
    assert not entropy.requires_grad
    assert grpo.token_logprobs(model, ids, mask, 0.5)[0][0, 1].item() == pytest.approx(-0.405465)
    _, entropy = grpo.token_logprobs(model, ids, mask, entropy_grad=True)
    # dH/dlogits = -p (log p + H) = (.0866, .0866, -.1733); the weight's gradient, as the hidden state is 1
    (found,) = torch.autograd.grad(entropy.sum(), head.weight)
    assert found[:, 0].tolist() == pytest.approx([0.086643, 0.086643, -0.173287], abs=1e-5)


def test_chunks_change_no_number_and_no_gradient():
    """40 rows of 60 actions are 2,400: three chunks of the head, against whole logits."""
    model, rows = build("qwen3"), random_ids(*[61] * 40)
    ids = grpo.pad(rows)
    mask = torch.ones_like(ids, dtype=torch.float32)
    mask[:, 0] = 0
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    loss = (grpo.token_logprobs(model, ids, mask)[0] * weights).sum()
    found = torch.autograd.grad(loss, list(model.parameters()))
    logprobs = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    expected = torch.autograd.grad((logprobs * weights[:, 1:]).sum(), list(model.parameters()))
    for x, y in zip(found, expected):
        assert (x - y).norm() <= 1e-4 * y.norm() + 1e-6


def test_no_actions_at_all():
    model = build("qwen3")
    logprobs, entropy = grpo.token_logprobs(model, torch.tensor([[5, 6]]), torch.zeros(1, 2))
    assert logprobs.tolist() == entropy.tolist() == [[0.0, 0.0]]


MEMORY = """
import resource, sys, torch, transformers, grpo
config = transformers.Qwen3Config(vocab_size=32000, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, head_dim=32)
model = transformers.Qwen3ForCausalLM(config).eval()
ids, mask = torch.randint(0, 32000, (128, 128)), torch.ones(128, 128)
mask[:, 0] = 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "plain":
    logprobs = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
else:
    logprobs, entropy = grpo.token_logprobs(model, ids, mask)
logprobs.sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_peak_memory_is_at_most_a_fifth_of_that_of_whole_logits():
    """128 x 128 tokens and 32,000 words, forward and backward: whole logits alone are 2 GiB in float32."""
    peak = {}
    for way in ("plain", "ours"):
        command = [sys.executable, "-c", MEMORY, way]
        peak[way] = int(
            subprocess.run(command, capture_output=True, text=True, check=True, cwd=sft.__file__[:-6]).stdout
        )
    assert peak["plain"] > 2**21 and peak["ours"] < peak["plain"] / 5, peak


@pytest.mark.parametrize("kind", SCALES_LOGITS)
def test_models_that_change_their_logits_after_the_head_are_refused(kind, tmp_path):
    build(kind).save_pretrained(tmp_path)
    for script in (sft, dpo, grpo, ppo):
        with pytest.raises(SystemExit, match="after the head"):
            script.load_model(tmp_path)


# ------------------------------------------------------------------------------------------------------------- generate


def sample(model, prompts, num_samples=1, most=8, temperature=1.0, eos=(1,), seed=0):
    return grpo.generate(model, prompts, num_samples, most, temperature, list(eos), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_cached_decoding_equals_plain_forward_passes(kind):
    """Prompts of different lengths, three samples each, rows that leave at different times: the log-probability of
    every sampled token is that of a plain forward pass, and greedy tokens are its largest logits."""
    model, prompts = build(kind), random_ids(3, 11, 6)
    eos = set(range(3, 40))  # ends come early and unevenly
    for temperature in (1.0, 0.7, 0.0):
        completions, logprobs = sample(model, prompts, 3, 12, temperature, eos)
        assert len(completions) == len(logprobs) == 9
        for n, (completion, found) in enumerate(zip(completions, logprobs)):
            prompt = prompts[n // 3]
            expected = plain_logprobs(model, prompt + completion, temperature or 1.0)[len(prompt) :]
            assert torch.allclose(torch.tensor(found).double(), expected, atol=2e-4)
            assert not set(completion[:-1]) & eos and (completion[-1] in eos or len(completion) == 12)
            if temperature == 0:
                logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
                assert completion == logits.argmax(-1).tolist()
        assert temperature == 0 or len({len(completion) for completion in completions}) > 1


class Fixed(torch.nn.Module):
    """A model that has the same logits everywhere."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, input_ids, **_):
        logits = self.logits.expand(len(input_ids), 1, -1)
        return SimpleNamespace(logits=logits, past_key_values=transformers.DynamicCache())


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.0, (0.665241, 0.244728, 0.090031)), (0.5, (0.866814, 0.117310, 0.015876))]
)
def test_samples_follow_the_softmax(temperature, expected):
    """Chi squared of 20,000 draws from logits (2, 1, 0); with 2 degrees of freedom it is below 18.4 in 9,999 of 10,000
    cases. What a generation config says does not matter: the model is not asked."""
    model = Fixed([2.0, 1.0, 0.0])
    model.generation_config = transformers.GenerationConfig(temperature=0.6, top_k=2, repetition_penalty=1.1)
    completions, logprobs = sample(model, [[5]] * 4, 5000, 1, temperature, eos=())
    counts = torch.tensor([sum(completion == [k] for completion in completions) for k in range(3)])
    mean = 20_000 * torch.tensor(expected)
    assert ((counts - mean) ** 2 / mean).sum() < 18.4
    assert logprobs[0][0] == pytest.approx(math.log(expected[completions[0][0]]), abs=1e-5)


class Scripted(torch.nn.Module):
    """A model whose row n says script[n], whatever the order and number of rows in the batch."""

    def __init__(self, script):
        super().__init__()
        self.script, self.calls = script, []

    def forward(self, input_ids, position_ids, past_key_values=None, **_):
        cache = past_key_values or SimpleNamespace(rows=torch.arange(len(input_ids)))
        cache.reorder_cache = lambda index: setattr(cache, "rows", cache.rows[index])
        t = int(position_ids[0, -1])  # prompts have one token
        self.calls.append(len(input_ids))
        wanted = torch.tensor([(self.script[n] + [0] * 9)[t] for n in cache.rows])
        return SimpleNamespace(logits=100.0 * torch.nn.functional.one_hot(wanted, 12)[:, None], past_key_values=cache)


def test_completions_end_with_any_of_the_stop_ids():
    """Ends 5 (which is also the pad token) and 7, at most 3 tokens: lengths 2, 3, 3, 1, only the third is cut. Rows
    that have ended leave, and nothing is computed behind the last token."""
    model = Scripted([[9, 7, 9], [9, 9, 5], [9, 9, 9], [5, 5, 5]])
    completions, logprobs = sample(model, [[4], [4], [4], [4]], 1, 3, eos=(5, 7))
    assert completions == [[9, 7], [9, 9, 5], [9, 9, 9], [5]]
    assert [len(x) for x in logprobs] == [2, 3, 3, 1] and model.calls == [4, 3, 2]


def test_draws_depend_on_the_generator_alone():
    model, prompts = build("qwen3"), random_ids(4, 7)
    torch.manual_seed(0)
    first = sample(model, prompts, 4)
    torch.manual_seed(1)
    assert sample(model, prompts, 4) == first != sample(model, prompts, 4, seed=1)


class Recorder(TorchDispatchMode):
    """Stands for a CUDA graph on the CPU: `torch.cuda.graph(g)` notes the operations and undoes what they changed;
    `g.replay()` runs them again on the same tensors, without any Python of the model."""

    def __init__(self, graph):
        super().__init__()
        self.graph, self.undo = graph, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for argument, value in zip(operation._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.undo.append((value, value.clone()))
        result = operation(*args, **kwargs)
        self.graph.tape.append((operation, args, kwargs, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        for value, before in reversed(self.undo):
            value.copy_(before)


class Graph:
    num_replays = 0

    def __init__(self):
        self.tape = []

    def replay(self):
        Graph.num_replays += 1
        for operation, args, kwargs, result in self.tape:
            again = operation(*args, **kwargs)
            for x, y in zip(*((r if isinstance(r, tuple | list) else [r]) for r in (result, again))):
                if isinstance(x, torch.Tensor) and x is not y:
                    x.copy_(y)


class CudaOnPaper(str):
    type = "cuda"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recorded_decoding_gives_the_tokens_of_plain_decoding(temperature, monkeypatch):
    """Through recordings, replays, rows that leave by halves, and the last column of the cache."""
    model, prompts, eos = build("qwen3"), random_ids(3, 9, 5, 5), set(range(3, 30))
    plain = sample(model, prompts, 4, 16, temperature, eos)
    monkeypatch.setattr(grpo, "DEVICE", CudaOnPaper("cpu"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recorder)
    before = Graph.num_replays
    recorded = sample(model, prompts, 4, 16, temperature, eos)
    assert Graph.num_replays > before + 5
    if temperature == 0:  # sampled, the generator serves another number of rows
        assert recorded[0] == plain[0]
    for n, (completion, found) in enumerate(zip(*recorded)):
        expected = plain_logprobs(model, prompts[n // 4] + completion, temperature or 1.0)[len(prompts[n // 4]) :]
        assert torch.allclose(torch.tensor(found).double(), expected, atol=2e-4)
    before = Graph.num_replays  # layers with windows or states of their own decode without a recording
    for kind in ("mistral", "gemma3_text", "lfm2"):
        assert sample(build(kind), prompts, 2, 8, 0.0, eos)[0]
    assert Graph.num_replays == before


# ------------------------------------------------------------------------------------------------ loading and preparing


def test_weights_train_in_float32_and_rotary_frequencies_stay_so(tmp_path):
    """Whatever the folder holds. In the bfloat16 copy that samples, positions would be off by a radian at 1000."""
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    policy, sampler = grpo.load_model(tmp_path), grpo.load_model(tmp_path, torch.bfloat16)
    assert {p.dtype for p in policy.parameters()} == {torch.float32} and not policy.training
    assert {p.dtype for p in sampler.parameters()} == {torch.bfloat16}
    assert [b.dtype for name, b in sampler.named_buffers() if name.endswith(".inv_freq")] == [torch.float32]


def arguments(**changes):
    return SimpleNamespace(**({"gradient_checkpointing": False, "compile": False} | changes))


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "opt"])
def test_gradient_checkpointing_changes_no_number(kind):
    """No dropout wakes up (gpt2 and opt have 0.1, and opt's layers call it themselves), and layers are recomputed."""
    rows = random_ids(9, 12)
    ids, mask = grpo.pad(rows), grpo.pad([[0.0] + [1.0] * (len(row) - 1) for row in rows])
    found, runs = [], []
    for checkpointing in (False, True):
        model = grpo.prepare(build(kind), arguments(gradient_checkpointing=checkpointing), grpo.token_logprobs)
        layers = [x for x in model.modules() if type(x).__name__ in model._no_split_modules]
        calls = []
        next(layers[0].children()).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        logprobs, _ = model.token_logprobs(ids, mask)
        gradients = torch.autograd.grad(logprobs.sum(), [p for p in model.parameters() if p.requires_grad])
        found.append([logprobs, *gradients])
        runs.append(len(calls))
    assert runs == [1, 2]
    assert all(torch.equal(x, y) for x, y in zip(*found))


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_layers_give_the_same_numbers_with_checkpointing_too():
    """Each layer is traced, also where it is recomputed, and evaluation does not compile as the cache grows."""
    rows = random_ids(9, 12)
    ids, mask = grpo.pad(rows), grpo.pad([[0.0] + [1.0] * (len(row) - 1) for row in rows])
    expected, _ = grpo.token_logprobs(build("llama"), ids, mask)
    for checkpointing in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = sft.prepare(
            build("llama"), arguments(compile=True, gradient_checkpointing=checkpointing), sft.token_logprobs
        )
        logprobs, _ = model.token_logprobs(ids, mask)
        logprobs.sum().backward()
        assert torch.allclose(logprobs, expected, atol=1e-4)
        traced = torch._dynamo.utils.counters["frames"]["ok"]
        assert traced > 0
        rows = [{"ids": ids[0].tolist()[:9], "mask": mask[0].tolist()[:9], "start": 3, "answer": "1"}]
        tokenizer = SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: ["#### 1"] * len(ids))
        metrics = sft.evaluate_sft(model, tokenizer, rows, sft.Args())
        assert metrics["eval/accuracy_greedy"] == 1.0
        assert torch._dynamo.utils.counters["frames"]["ok"] == traced


@pytest.mark.parametrize("name", CORE)
def test_stop_ids_and_the_generation_config_that_is_saved(name, tmp_path):
    """The tokenizer's EOS and those of the generation config, whose sampling options go: they would not be saved."""
    script = CORE[name]
    if script is rm:
        return
    model, tokenizer = build("qwen3"), sft.tiny(0)[0]
    model.generation_config = transformers.GenerationConfig(eos_token_id=[7, 5], temperature=0.6, top_k=3)
    assert script.stop_ids(tokenizer, model) == [1, 5, 7]
    model.save_pretrained(tmp_path)
    saved = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert saved.eos_token_id == [1, 5, 7] and saved.temperature in (None, 1.0) and saved.pad_token_id == 0
    model.generation_config.eos_token_id = None
    assert script.stop_ids(tokenizer, model) == [1]
    tokenizer.eos_token = None
    with pytest.raises(SystemExit, match="no EOS"):
        script.stop_ids(tokenizer, model)


# --------------------------------------------------------------------------------------------------- rewards and values


def test_a_new_reward_head_has_variance_1_over_d_plus_1_and_a_pad_token_of_its_own(tmp_path):
    """D = 1024: the standard deviation of 1,024 draws is 1/32 within a tenth. A pad token that is EOS is replaced."""
    folder = save_tiny(tmp_path, hidden_size=1024, intermediate_size=8, num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    model = rm.load_reward_model(folder, tokenizer, 0)
    assert model.score.weight.std().item() == pytest.approx(1025**-0.5, rel=0.1)
    assert tokenizer.pad_token_id == model.config.pad_token_id not in (None, tokenizer.eos_token_id)
    assert model.get_input_embeddings().num_embeddings > tokenizer.pad_token_id
    again = rm.load_reward_model(folder, tokenizer, 1)
    assert not torch.equal(model.score.weight, again.score.weight)


def rewards_of_transformers(folder, ids):
    """The scores of texts one by one, as transformers has them."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return torch.tensor([model(torch.tensor([x])).logits[0, 0].item() for x in ids])


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "opt", "mistral"])
def test_a_reward_model_scores_the_last_token_whatever_the_padding(kind, tmp_path):
    model, ids = build(kind, AutoModelForSequenceClassification, num_labels=1), random_ids(4, 9, 7)
    model.save_pretrained(tmp_path)
    lengths = torch.tensor([len(x) for x in ids])
    found = rm.text_rewards(model, rm.pad(ids), lengths)
    assert found.shape == (3,) and torch.allclose(found, rewards_of_transformers(tmp_path, ids), atol=1e-5)
    wider = torch.nn.functional.pad(rm.pad(ids), (0, 5), value=77)  # what stands in the padding does not matter
    assert torch.allclose(rm.text_rewards(model, wider, lengths), found, atol=1e-5)


def test_a_reward_model_whose_config_pads_with_another_id(tmp_path):
    """A row's score in a batch is its score alone, though its text holds the id that the config takes for padding."""
    _, model = save_tiny(tmp_path), build("qwen3", AutoModelForSequenceClassification, num_labels=1, pad_token_id=97)
    model.save_pretrained(tmp_path)
    args = grpo.Args(reward=str(tmp_path), micro_batch_size=2)
    rows, texts = [{"prompt": "1+1="}] * 3, ["#### 2", "a", "1+1=2 and so on\n#### 2"]
    together = grpo.load_reward(args)(rows, texts)
    alone = [grpo.load_reward(args)(rows[:1], [text]).item() for text in texts]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, pad_token_id=0)
    ids = grpo.encode(AutoTokenizer.from_pretrained(tmp_path), rows[0], None, texts[1])
    assert together[1].item() == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gpt_neox"])
def test_values_are_read_before_their_token(kind, tmp_path):
    """Changing token t changes no value up to t; dropout sleeps; a new head, whatever its name, is 0."""
    build(kind).save_pretrained(tmp_path)
    model = ppo.load_value_model(tmp_path)
    rows = random_ids(8, 11)
    ids, mask = ppo.pad(rows), ppo.pad([[0.0] * 2 + [1.0] * (len(row) - 2) for row in rows])
    assert (ppo.token_values(model, ids, mask) == 0).all()
    head = [x for x in model.modules() if isinstance(x, torch.nn.Linear)][-1]
    head.weight.data.normal_()
    values = ppo.token_values(model, ids, mask)
    assert torch.equal(values, ppo.token_values(model, ids, mask))
    assert ((values != 0) == (mask == 1)).all()
    changed = ids.clone()
    changed[:, 5] = 9
    other = ppo.token_values(model, changed, mask)
    assert torch.equal(values[:, :6], other[:, :6]) and not torch.equal(values[:, 6], other[:, 6])


def test_the_value_model_begins_as_the_reward_model(tmp_path):
    """Its value of a whole text is the reward model's score of that text; its own checkpoint keeps the head."""
    model, (row,) = build("qwen3", AutoModelForSequenceClassification, num_labels=1), random_ids(6)
    model.save_pretrained(tmp_path / "rm")
    value_model = ppo.load_value_model(tmp_path / "rm")
    ids = torch.tensor([[*row, 9]])  # a value is read before its token
    value = ppo.token_values(value_model, ids, torch.ones_like(ids, dtype=torch.float32))[0, -1]
    assert value.item() == pytest.approx(rewards_of_transformers(tmp_path / "rm", [row])[0].item(), abs=1e-5)
    value_model.save_pretrained(tmp_path / "value")
    again = ppo.load_value_model(tmp_path / "value")
    assert all(torch.equal(x, y) for x, y in zip(value_model.parameters(), again.parameters()))
