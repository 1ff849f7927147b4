"""Proofs by enumeration: a tabular policy over 3 tokens and 2 steps, all 9 sequences, in float64.

An expectation over samples is a sum over sequences weighted by their probability, and the weights are held fixed, as
samples are: only what stands in the loss is differentiated. Exact gradients come from differentiating the sum itself.
"""

import itertools

import pytest
import torch

import grpo
import sft

V = 3
SEQUENCES = list(itertools.product(range(V), repeat=2))  # (a, b), 9 of them
REWARDS = [0.0, 1.0, -0.5, 2.0, 0.25, 0.0, -1.0, 1.5, 3.0]  # one for each sequence, of no particular shape
MASK = torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64)  # index 0 is the prompt


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def policy(seed, requires_grad=False):
    """Logits of the first token (V,) and of the second given the first (V, V), as one vector."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(V + V * V, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


def logprobs_of(theta, sequence):
    """(1, 3): 0 for the prompt, log pi(a), log pi(b | a)."""
    first, second = theta[:V].log_softmax(0), theta[V:].view(V, V).log_softmax(1)
    return torch.stack([theta.new_zeros(()), first[sequence[0]], second[sequence]])[None]


def probabilities(theta):
    """(9,): pi(a) pi(b | a)."""
    return torch.stack([logprobs_of(theta, sequence).sum().exp() for sequence in SEQUENCES])


def kl(p, q):
    """sum p log(p / q) of two probability vectors."""
    return (p * (p.log() - q.log())).sum()


def gradient(scalar, theta):
    """d scalar / d theta, (12,)."""
    return torch.autograd.grad(scalar, theta, retain_graph=True)[0]


def expectation(theta, of):
    """sum_y pi(y) of(y) with the weights held fixed; `of` takes the sequence's index and log-probabilities (1, 3)."""
    weights = probabilities(theta).detach()
    return sum(w * of(i, logprobs_of(theta, y)) for i, (w, y) in enumerate(zip(weights, SEQUENCES)))


def loss_of(
    logprobs, advantage, ref_logprobs=None, kl_coef=0.0, old_logprobs=None, mask=MASK, clip_eps=0.2, weights=None
):
    """grpo_loss of one sequence that is the whole step, on policy unless `old_logprobs` are given."""
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    advantages = torch.tensor([advantage], dtype=torch.float64)
    return grpo.grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, clip_eps, kl_coef, 1, weights)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def far(a, b):
    """Different by more than a hundredth of their size: no rounding, another quantity."""
    return (a - b).norm() > 0.01 * max(a.norm(), b.norm())


# ------------------------------------------------------------------------------------------------- value of k1 and k3


@pytest.mark.parametrize("seed", range(3))
def test_k1_and_k3_are_unbiased_estimates_of_the_kl(seed):
    """Summed over a completion, E[log pi - log ref] = E[k3] = KL(pi || ref) over the 9 sequences, not KL(ref || pi).

    k3 adds E[ref/pi - 1] = 0 in each state.
    """
    pi, ref = policy(seed), policy(seed + 100)
    p, q = probabilities(pi), probabilities(ref)
    k1 = expectation(pi, lambda i, logprobs: (logprobs - logprobs_of(ref, SEQUENCES[i])).sum())
    k3 = expectation(pi, lambda i, logprobs: grpo.kl_k3(logprobs, logprobs_of(ref, SEQUENCES[i])).sum())
    assert close(k1, kl(p, q)) and close(k3, kl(p, q))
    assert far(k3, kl(q, p))


def test_k3_varies_less_than_k1_near_the_reference():
    """Near the reference k3 is second order in log pi - log ref and k1 first order: the variance is far smaller."""
    pi = policy(0)
    ref = pi + 0.1 * policy(1)

    def variance(estimate):
        mean = expectation(pi, lambda i, logprobs: estimate(logprobs, logprobs_of(ref, SEQUENCES[i])).sum())
        return expectation(
            pi, lambda i, logprobs: (estimate(logprobs, logprobs_of(ref, SEQUENCES[i])).sum() - mean) ** 2
        )

    assert variance(grpo.kl_k3) < 0.1 * variance(lambda logprobs, ref_logprobs: logprobs - ref_logprobs)


# ----------------------------------------------------------------------------------------------- gradient of k1 and k3


@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_k3_in_the_loss_is_that_of_the_other_kl(seed):
    """E[grad k3] = grad KL(ref || pi) in each state, states weighted by how often the policy visits them.

    k3 differentiates to (1 - ref/pi) grad log pi; weighted by pi it is (pi - ref) grad log pi, and sum pi grad log pi
    is 0. The loss averages over the 2 tokens, so its gradient is half of that. It is not that of KL(pi || ref).
    """
    pi, ref = policy(seed, requires_grad=True), policy(seed + 100)
    first, second = pi[:V].softmax(0), pi[V:].view(V, V).softmax(1)
    ref_first, ref_second = ref[:V].softmax(0), ref[V:].view(V, V).softmax(1)
    visits = first.detach()
    reverse = kl(ref_first, first) + sum(visits[a] * kl(ref_second[a], second[a]) for a in range(V))
    forward = kl(first, ref_first) + sum(visits[a] * kl(second[a], ref_second[a]) for a in range(V))

    loss = expectation(pi, lambda i, x: loss_of(x, 0.0, logprobs_of(ref, SEQUENCES[i]), kl_coef=1.0))
    assert close(2 * gradient(loss, pi), gradient(reverse, pi))
    assert far(2 * gradient(loss, pi), gradient(forward, pi))
    whole = kl(probabilities(pi), probabilities(ref))
    assert far(2 * gradient(loss, pi), gradient(whole, pi))


def test_k1_differentiated_in_the_loss_has_no_expected_gradient():
    """E[grad (log pi - log ref)] = sum grad pi = grad 1 = 0: k1 in the loss restrains nothing, k3 does."""
    pi, ref = policy(0, requires_grad=True), policy(100)
    k1 = expectation(pi, lambda i, logprobs: (logprobs - logprobs_of(ref, SEQUENCES[i])).sum())
    k3 = expectation(pi, lambda i, x: loss_of(x, 0.0, logprobs_of(ref, SEQUENCES[i]), kl_coef=1.0))
    assert gradient(k1, pi).norm() < 1e-12
    assert gradient(k3, pi).norm() > 0.1


def test_kl_term_vanishes_with_its_gradient_at_the_reference():
    """At pi = ref every k3 and every (1 - ref/pi) is 0: no pull on the first step."""
    pi = policy(0, requires_grad=True)
    ref = pi.detach().clone()
    loss = expectation(pi, lambda i, x: loss_of(x, 0.0, logprobs_of(ref, SEQUENCES[i]), kl_coef=1.0))
    assert loss.item() == 0.0 and gradient(loss, pi).norm() < 1e-12


# ---------------------------------------------------------------------------------------------------- policy gradient


def baselines(theta):
    """No baseline, a constant, and the expected reward."""
    return 0.0, 0.7, (probabilities(theta) * torch.tensor(REWARDS)).sum().item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("which", range(3))
def test_expected_gradient_of_the_loss_is_that_of_the_expected_reward(seed, which):
    """At ratio 1, with A = reward - b, the loss's expected gradient is -grad E[reward] / 2 whatever the constant b.

    E[A grad log pi(y)] = grad E[reward] - b grad 1. The 2 is the length of every completion.
    """
    pi = policy(seed, requires_grad=True)
    baseline = baselines(pi.detach())[which]
    loss = expectation(pi, lambda i, logprobs: loss_of(logprobs, REWARDS[i] - baseline))
    expected_reward = (probabilities(pi) * torch.tensor(REWARDS)).sum()
    assert close(-2 * gradient(loss, pi), gradient(expected_reward, pi))
    assert gradient(expected_reward, pi).norm() > 0.1


def test_a_baseline_that_sees_the_completion_biases_the_gradient():
    """With b = half of the completion's own reward the gradient is halved: it must not depend on what was sampled."""
    pi = policy(0, requires_grad=True)
    loss = expectation(pi, lambda i, logprobs: loss_of(logprobs, REWARDS[i] - REWARDS[i] / 2))
    expected_reward = (probabilities(pi) * torch.tensor(REWARDS)).sum()
    assert close(-4 * gradient(loss, pi), gradient(expected_reward, pi))
    assert far(-2 * gradient(loss, pi), gradient(expected_reward, pi))


def test_with_unequal_lengths_each_completion_weighs_by_one_over_its_length():
    """Token 0 as the first one ends the completion: lengths 1 and 2, seven completions.

    The loss's expected gradient is then -grad E[A / |y|], and a baseline no longer drops out: the length bias that
    averaging over each sequence has.
    """
    pi = policy(0, requires_grad=True)
    ends = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    first, p = pi[:V].softmax(0), probabilities(pi)
    losses, objectives = [], []
    for baseline in (0.0, 0.7):
        loss, objective = torch.zeros(()), torch.zeros(())
        for i, (a, b) in enumerate(SEQUENCES):
            if a == 0 and b == 0:
                logprobs = logprobs_of(pi, (0, 0)) * ends
                loss = loss + first[0].detach() * loss_of(logprobs, REWARDS[i] - baseline, mask=ends)
                objective = objective + first[0] * (REWARDS[i] - baseline) / 1
            elif a != 0:
                loss = loss + p[i].detach() * loss_of(logprobs_of(pi, (a, b)), REWARDS[i] - baseline)
                objective = objective + p[i] * (REWARDS[i] - baseline) / 2
        losses.append(gradient(loss, pi))
        objectives.append(gradient(objective, pi))
    assert close(-losses[0], objectives[0]) and close(-losses[1], objectives[1])
    assert far(losses[0], losses[1])


def test_samples_of_an_older_policy_are_corrected_by_the_ratio():
    """One-token completions, no ratio beyond the band: E_old[pi/old A] = E_pi[A], in value and gradient.

    Only then: the ratio is that of a token, not of a sequence.
    """
    pi = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([0.0, 0.4, 0.1], dtype=torch.float64)
    mask, loss = torch.ones(1, 1, dtype=torch.float64), torch.zeros(())
    for token in range(V):
        logprobs, old_logprobs = pi.log_softmax(0)[token].view(1, 1), old.log_softmax(0)[token].view(1, 1)
        part = loss_of(logprobs, REWARDS[token + 1], old_logprobs=old_logprobs, mask=mask, clip_eps=5.0)
        loss = loss + old.softmax(0)[token] * part
    expected_reward = (pi.softmax(0) * torch.tensor(REWARDS[1 : V + 1])).sum()
    assert close(-loss, expected_reward)
    assert close(-gradient(loss, pi), gradient(expected_reward, pi))


def test_samples_that_another_network_drew_are_corrected_by_the_weight():
    """One-token completions drawn by a sampler in another arithmetic: weighted by pi / sampler the expected gradient at
    ratio 1 is that of E_pi[A]. Unweighted it is not, and a cap below the largest weight leaves a bias."""
    pi = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    sampler = torch.tensor([0.0, 0.4, 0.1], dtype=torch.float64).log_softmax(0)
    mask = torch.ones(1, 1, dtype=torch.float64)
    expected_reward = (pi.softmax(0) * torch.tensor(REWARDS[1 : V + 1])).sum()
    found = {}
    for cap in (0.0, 1.1, 5.0):
        loss = torch.zeros(())
        for token in range(V):
            logprobs = pi.log_softmax(0)[token].view(1, 1)
            weights = (logprobs.detach() - sampler[token]).exp().clamp(max=cap) if cap else None
            loss = loss + sampler[token].exp() * loss_of(logprobs, REWARDS[token + 1], mask=mask, weights=weights)
        found[cap] = -gradient(loss, pi)
    assert close(found[5.0], gradient(expected_reward, pi))
    assert far(found[0.0], found[5.0]) and far(found[1.1], found[5.0])


def test_reward_and_kl_together_ascend_the_stated_objective():
    """With both terms the expected gradient is -1/2 (grad E[reward] - kl_coef grad KL(ref || pi)), state by state."""
    pi, ref = policy(2, requires_grad=True), policy(102)
    first, second = pi[:V].softmax(0), pi[V:].view(V, V).softmax(1)
    ref_first, ref_second = ref[:V].softmax(0), ref[V:].view(V, V).softmax(1)
    visits = first.detach()
    penalty = kl(ref_first, first) + sum(visits[a] * kl(ref_second[a], second[a]) for a in range(V))
    objective = (probabilities(pi) * torch.tensor(REWARDS)).sum() - 0.3 * penalty
    loss = expectation(pi, lambda i, x: loss_of(x, REWARDS[i], logprobs_of(ref, SEQUENCES[i]), kl_coef=0.3))
    assert close(-2 * gradient(loss, pi), gradient(objective, pi))


# ----------------------------------------------------------------------------------------------------------------- sft


def test_gradient_of_the_sft_loss_is_that_of_the_kl_from_the_data():
    """E_data[-log pi] = KL(data || pi) + entropy of the data, and the entropy does not depend on the policy."""
    pi = policy(0, requires_grad=True)
    data = policy(7).softmax(0)[: len(SEQUENCES)]
    data = data / data.sum()
    loss = sum(w * sft.sft_loss(logprobs_of(pi, y), MASK, 1) for w, y in zip(data, SEQUENCES))
    divergence = kl(data, probabilities(pi))
    assert close(loss, divergence - (data * data.log()).sum())
    expected = gradient(divergence, pi)
    assert close(gradient(loss, pi), expected)
    assert far(gradient(kl(probabilities(pi), data), pi), expected)


def test_the_sft_loss_is_stationary_at_the_data_distribution():
    """With the policy itself as the demonstrator the expected gradient is -sum grad pi = 0."""
    pi = policy(0, requires_grad=True)
    loss = expectation(pi, lambda i, logprobs: sft.sft_loss(logprobs, MASK, 2))
    assert gradient(loss, pi).norm() < 1e-12
