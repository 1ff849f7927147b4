"""Proofs by enumeration: a tabular policy over 3 tokens and 2 steps, all 9 sequences, in float64.

An expectation over samples is a sum over sequences weighted by their probability, and the weights are held fixed, as
samples are: only what stands in the loss is differentiated. Exact gradients come from differentiating the sum itself.
"""

import itertools
import math

import pytest
import torch

import dpo
import grpo
import ppo
import rm
import sft
from variants import cispo, dr_grpo, off_policy_grpo, ppo_vtrace, reinforce, remax, rloo, trpo

V = 3
SEQUENCES = list(itertools.product(range(V), repeat=2))  # (a, b), 9 of them
REWARDS = torch.tensor([0.0, 1.0, -0.5, 2.0, 0.25, 0.0, -1.0, 1.5, 3.0], dtype=torch.float64)  # of no particular shape
MASK = torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64)  # column 0 is the prompt
SEEDS = pytest.mark.parametrize("seed", range(3))


def policy(seed, requires_grad=False):
    """Logits of the first token (V,) and of the second given the first (V, V), as one vector."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(V + V * V, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


def logprobs_of(theta):
    """(9, 3): 0 for the prompt, log pi(a), log pi(b | a)."""
    first, second = theta[:V].log_softmax(0), theta[V:].view(V, V).log_softmax(1)
    rows = [torch.stack([theta.new_zeros(()), first[a], second[a, b]]) for a, b in SEQUENCES]
    return torch.stack(rows)


def probabilities(theta):
    """(9,): pi(a) pi(b | a)."""
    return logprobs_of(theta).sum(1).exp()


def kl(p, q):
    return (p * (p.log() - q.log())).sum()


def kl_by_state(pi, ref, turned=False):
    """sum over states of KL(pi || ref) there, or turned round, states weighted by how often pi visits them (fixed)."""
    first, second = pi[:V].softmax(0), pi[V:].view(V, V).softmax(1)
    ref_first, ref_second = ref[:V].softmax(0), ref[V:].view(V, V).softmax(1)
    of = (lambda p, q: kl(q, p)) if turned else kl
    visits = first.detach()
    return of(first, ref_first) + sum(visits[a] * of(second[a], ref_second[a]) for a in range(V))


def gradient(scalar, theta):
    return torch.autograd.grad(scalar, theta, retain_graph=True)[0]


def expected_grpo(pi, advantages, ref=None, kl_coef=0.0, old=None, clip_eps=0.2):
    """E of grpo_loss of single sequences, drawn from `old` (the policy itself unless given). advantages: (9,)."""
    logprobs = logprobs_of(pi)
    old_logprobs = logprobs.detach() if old is None else logprobs_of(old)
    ref_logprobs = torch.zeros(9, 3) if ref is None else logprobs_of(ref)
    rows = zip(*(x.split(1) for x in (logprobs, old_logprobs, ref_logprobs, advantages)))
    losses = torch.stack([grpo.grpo_loss(*row, MASK, clip_eps, kl_coef, 1) for row in rows])
    return (old_logprobs.sum(1).exp() * losses).sum()


def close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def far(a, b):
    """Different by more than a hundredth of their size: no rounding, another quantity."""
    return (a - b).norm() > 0.01 * max(a.norm(), b.norm())


# ----------------------------------------------------------------------------------------------------------- estimators


@SEEDS
def test_k1_and_k3_are_unbiased_estimates_of_the_kl(seed):
    """Summed over a completion, E[log pi - log ref] = E[k3] = KL(pi || ref), not KL(ref || pi)."""
    pi, ref = policy(seed), policy(seed + 100)
    p, q = probabilities(pi), probabilities(ref)
    k1 = (p * (logprobs_of(pi) - logprobs_of(ref)).sum(1)).sum()
    k3 = (p * grpo.kl_k3(logprobs_of(pi), logprobs_of(ref)).sum(1)).sum()
    assert close(k1, kl(p, q)) and close(k3, kl(p, q)) and far(k3, kl(q, p))


@SEEDS
def test_the_gradient_of_k3_in_the_loss_is_that_of_the_other_kl(seed):
    """d k3 = (1 - ref/pi) d log pi; weighted by pi it is (pi - ref) d log pi = d KL(ref || pi), state by state. The
    loss is a mean over 2 tokens, hence the 2. It vanishes at the reference."""
    pi, ref, zero = policy(seed, requires_grad=True), policy(seed + 100), torch.zeros(9, dtype=torch.float64)
    found = 2 * gradient(expected_grpo(pi, zero, ref, 1.0), pi)
    assert close(found, gradient(kl_by_state(pi, ref, turned=True), pi))
    assert far(found, gradient(kl_by_state(pi, ref), pi))
    assert gradient(expected_grpo(pi, zero, pi.detach(), 1.0), pi).norm() < 1e-12


@SEEDS
def test_k1_acts_in_the_reward_and_not_in_the_loss(seed):
    """Differentiated in the loss its expected gradient is sum d pi = 0. As a reward of every token, detached, through
    returns and policy_loss (lambda 1, no values), it is the gradient of E[score] - kl_coef KL(pi || ref), whole."""
    pi, ref = policy(seed, requires_grad=True), policy(seed + 100)
    logprobs, mask, values = logprobs_of(pi), MASK.expand(9, 3), torch.zeros(9, 3, dtype=torch.float64)
    p = probabilities(pi)
    assert gradient((p.detach() * (logprobs - logprobs_of(ref)).sum(1)).sum(), pi).norm() < 1e-12
    rewards = ppo.kl_shaped_rewards(REWARDS, logprobs.detach(), logprobs_of(ref), mask, 0.3)
    advantages, _ = ppo.gae(rewards, values, mask, 1.0, 1.0)
    weighted = advantages * p.detach()[:, None]  # policy_loss is linear in the advantages
    loss = ppo.policy_loss(logprobs, logprobs.detach(), weighted, mask, 0.2, 1)
    objective = (p * REWARDS).sum() - 0.3 * kl(p, probabilities(ref))
    assert close(-gradient(loss, pi), gradient(objective, pi))


# ------------------------------------------------------------------------------------------------------ policy gradient


@SEEDS
@pytest.mark.parametrize("baseline", [0.0, 0.7, "mean"])
def test_the_gradient_of_the_loss_is_that_of_the_expected_reward(seed, baseline):
    """At ratio 1 and with A = reward - b, -2 d loss = d E[reward], whatever the constant b; 2 is the length."""
    pi = policy(seed, requires_grad=True)
    expected_reward = (probabilities(pi) * REWARDS).sum()
    b = expected_reward.detach() if baseline == "mean" else baseline
    assert close(-2 * gradient(expected_grpo(pi, REWARDS - b), pi), gradient(expected_reward, pi))


def test_a_baseline_that_sees_the_completion_biases_the_gradient():
    """With b = half of the completion's own reward the gradient is halved."""
    pi = policy(0, requires_grad=True)
    found = -2 * gradient(expected_grpo(pi, REWARDS - REWARDS / 2), pi)
    expected = gradient((probabilities(pi) * REWARDS).sum(), pi)
    assert close(2 * found, expected) and far(found, expected)


@SEEDS
def test_values_leave_the_gradient_unbiased_unless_they_see_their_own_token(seed):
    """V(s_t), any function of what stands before token t, drops out at every lambda 1; V that has seen token t does
    not. Column 1 is the first state, column 2 the state after token a."""
    pi = policy(seed, requires_grad=True)
    p, logprobs, mask = probabilities(pi), logprobs_of(pi), MASK.expand(9, 3)
    rewards = ppo.kl_shaped_rewards(REWARDS, logprobs.detach(), logprobs.detach(), mask, 0.0)
    blind = torch.tensor([[0.0, 0.4, 1.0 + a] for a, _ in SEQUENCES], dtype=torch.float64)
    seeing = torch.tensor([[0.0, 1.0 + a, 0.5 + b] for a, b in SEQUENCES], dtype=torch.float64)
    found = []
    for values in (blind, seeing):
        advantages, _ = ppo.gae(rewards, values, mask, 1.0, 1.0)
        loss = ppo.policy_loss(logprobs, logprobs.detach(), advantages * p.detach()[:, None], mask, 0.2, 1)
        found.append(-gradient(loss, pi))
    expected = gradient((p * REWARDS).sum(), pi)
    assert close(found[0], expected) and far(found[1], expected)


def test_samples_of_an_older_policy_are_corrected_by_the_ratio():
    """One-token completions, no ratio beyond the band: E_old[pi/old A] = E_pi[A], in value and gradient."""
    pi = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([0.0, 0.4, 0.1], dtype=torch.float64)
    logprobs, old_logprobs = pi.log_softmax(0)[:, None], old.log_softmax(0)[:, None]
    rows = zip(logprobs.split(1), old_logprobs.split(1), REWARDS[1 : V + 1].split(1))
    losses = [grpo.grpo_loss(row, was, None, reward, torch.ones(1, 1), 5.0, 0.0, 1) for row, was, reward in rows]
    loss = (old.softmax(0) * torch.stack(losses)).sum()
    expected_reward = (pi.softmax(0) * REWARDS[1 : V + 1]).sum()
    assert close(-loss, expected_reward) and close(-gradient(loss, pi), gradient(expected_reward, pi))


def test_a_sequence_mean_weighs_long_completions_less():
    """Token 0 as the first one ends the completion. The loss then ascends E[A / length], not E[A]."""
    pi = policy(0, requires_grad=True)
    ends, first, logprobs, p = torch.tensor([[0.0, 1.0, 0.0]]), pi[:V].softmax(0), logprobs_of(pi), probabilities(pi)
    old = logprobs.detach()
    loss = objective = unweighted = torch.zeros((), dtype=torch.float64)
    for i, (a, b) in enumerate(SEQUENCES):
        if a == 0 and b > 0:
            continue  # the completion has ended: (0, 0) stands for all of them
        weight, mask, length = (first[0], ends, 1) if a == 0 else (p[i], MASK, 2)
        part = grpo.grpo_loss(logprobs[i : i + 1], old[i : i + 1], None, REWARDS[i : i + 1] + 1, mask, 0.2, 0.0, 1)
        loss = loss + weight.detach() * part
        objective, unweighted = objective + weight * (REWARDS[i] + 1) / length, unweighted + weight * (REWARDS[i] + 1)
    assert close(-gradient(loss, pi), gradient(objective, pi))
    assert far(gradient(objective, pi) * 2, gradient(unweighted, pi))


# ------------------------------------------------------------------------------------------- variants without a critic


@SEEDS
@pytest.mark.parametrize("name", ["rloo", "reinforce", "dr_grpo"])
def test_leaving_the_completion_out_of_its_baseline_leaves_the_gradient_unbiased(name, seed):
    """Over all 81 pairs of completions of one prompt, with the KL in the score: the gradient of E[reward] - .3 KL, for
    RLOO and for REINFORCE with the other's score as baseline. Dr. GRPO's mean of both halves it: (G - 1) / G."""
    pi, ref = policy(seed, requires_grad=True), policy(seed + 100)
    logprobs, mask, p, loss = logprobs_of(pi), MASK.expand(2, 3), probabilities(pi), 0.0
    scores = (REWARDS - 0.3 * (logprobs - logprobs_of(ref)).sum(1)).detach()
    for pair in itertools.product(range(9), repeat=2):
        both, old = logprobs[list(pair)], logprobs[list(pair)].detach()
        if name == "rloo":
            part = rloo.rloo_loss(both, old, rloo.rloo_advantages(scores[list(pair)], 2), mask, 0.2, 2)
        elif name == "dr_grpo":  # its constant, 1 here, stands for any
            advantages = dr_grpo.centered_advantages(scores[list(pair)], 2)
            part = 2 * dr_grpo.dr_grpo_loss(both, old, advantages, mask, 0.2, 1, 2)
        else:
            advantages = scores[list(pair)] - reinforce.leave_one_out(scores[list(pair)])
            part = reinforce.reinforce_loss(both, advantages[:, None].expand(2, 3), mask, 2)
        loss = loss + p[pair[0]].detach() * p[pair[1]].detach() * part
    objective = (p * REWARDS).sum() - 0.3 * kl(p, probabilities(ref))
    assert close(-gradient(loss, pi), gradient(objective, pi))


@SEEDS
def test_remax_is_unbiased_whatever_the_greedy_score(seed):
    """With the reward of the greedy completion as baseline, and the KL in the rewards of the tokens."""
    pi, ref = policy(seed, requires_grad=True), policy(seed + 100)
    logprobs, mask, p = logprobs_of(pi), MASK.expand(9, 3), probabilities(pi)
    first = pi[:V].argmax()
    greedy = REWARDS[V * first + pi[V:].view(V, V)[first].argmax()].expand(9)
    rewards = ppo.kl_shaped_rewards(REWARDS, logprobs.detach(), logprobs_of(ref), mask, 0.3)
    advantages = remax.remax_advantages(rewards, greedy, mask)
    loss = reinforce.reinforce_loss(logprobs, advantages * p.detach()[:, None], mask, 1)
    assert close(-gradient(loss, pi), gradient((p * REWARDS).sum() - 0.3 * kl(p, probabilities(ref)), pi))


TOKEN_REWARDS = torch.tensor([[0.0, 1.5 * a, 0.4 * a - b + 0.9 * b * b] for a, b in SEQUENCES]).double()


def six_forms(pi):
    """What may stand before grad log pi (Schulman et al. 2016, section 2); both tokens have a reward: (9, 3) each."""
    mask, second = MASK.expand(9, 3), pi[V:].view(V, V).softmax(1).detach()
    last = TOKEN_REWARDS[:, 2].view(V, V)
    value = (second * last).sum(1)  # of the state after the first token
    q = TOKEN_REWARDS[::V, 1] + value  # of the first token
    start = (pi[:V].softmax(0).detach() * q).sum()
    V_t = torch.stack([torch.tensor([0.0, start, value[a]]) for a, _ in SEQUENCES]).double()
    Q_t = torch.stack([torch.stack([start * 0, q[a], last[a, b]]) for a, b in SEQUENCES])
    returns = reinforce.returns_to_go(TOKEN_REWARDS, mask, 1.0)
    whole = TOKEN_REWARDS.sum(1, keepdim=True) * mask
    residual, _ = ppo.gae(TOKEN_REWARDS, V_t, mask, 1.0, 0.0)
    return {"R": whole, "G": returns, "G - V": returns - V_t, "Q": Q_t, "A": Q_t - V_t, "delta": residual}


@SEEDS
def test_six_forms_of_the_policy_gradient(seed):
    """R of the whole completion, return to go, that less a baseline, Q, the advantage and the TD residual have one
    expected gradient, that of the expected sum of rewards."""
    pi = policy(seed, requires_grad=True)
    logprobs, mask, p = logprobs_of(pi), MASK.expand(9, 3), probabilities(pi)
    expected = gradient((p * TOKEN_REWARDS.sum(1)).sum(), pi)
    for name, psi in six_forms(pi).items():
        loss = reinforce.reinforce_loss(logprobs, psi * p.detach()[:, None], mask, 1)
        assert close(-gradient(loss, pi), expected), name


def test_less_is_more_precise():
    """The variance of the gradient, summed over the logits, falls from R to G_t to G_t - V."""
    pi = policy(0, requires_grad=True)
    logprobs, mask, p, variance = logprobs_of(pi), MASK.expand(9, 3), probabilities(pi).detach(), []
    for name in ("R", "G", "G - V"):
        psi = six_forms(pi)[name]
        samples = [gradient(reinforce.reinforce_loss(logprobs[[n]], psi[[n]], mask[[n]], 1), pi) for n in range(9)]
        samples = torch.stack(samples)
        variance.append((p @ samples**2 - (p @ samples) ** 2).sum())
    assert variance[0] > 1.2 * variance[1] > 1.4 * variance[2]


def test_importance_weights_turn_samples_of_an_older_policy_into_its_successors():
    """One-token completions drawn from `old`, no weight cut: cispo.py and off_policy_grpo.py have the gradient of
    E_pi[A]; without weights it is another one."""
    pi = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([0.0, 0.4, 0.1], dtype=torch.float64)
    logprobs, sampling, mask, A = (
        pi.log_softmax(0)[:, None],
        old.log_softmax(0)[:, None],
        torch.ones(V, 1),
        REWARDS[1:4],
    )
    expected = gradient((pi.softmax(0) * A).sum(), pi)
    drawn = old.softmax(0) * A  # both losses are linear in the advantages
    found = -gradient(cispo.cispo_loss(logprobs, sampling, drawn, mask, 4.0, 1), pi)
    assert close(found, expected)
    for weights, same in (
        (off_policy_grpo.truncated_weights(logprobs, sampling, mask, 9.0), True),
        (mask, False),
    ):
        loss = off_policy_grpo.off_policy_loss(logprobs, logprobs.detach(), drawn, weights, mask, 0.2, 1)
        assert (close if same else far)(-gradient(loss, pi), expected)


# ---------------------------------------------------------------------------------------------------- with a critic


@SEEDS
def test_vtrace_at_ratio_1_is_the_lambda_1_return_and_the_truth_is_its_fixed_point(seed):
    """Ratio 1: the sum of the rewards still to come, or with lambda below 1 the returns of GAE. With samples of another
    policy, uncut ratios and values that are right, the expected target is the value, at the start and after each first
    token, and the expected gradient with the advantages is that of the expected reward."""
    pi, old = policy(seed, requires_grad=True), policy(seed + 100)
    mask, ones, p, mu = MASK.expand(9, 3), torch.ones(9, 3).double(), probabilities(pi), probabilities(old)
    values = torch.randn(9, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    _, targets = ppo_vtrace.vtrace(TOKEN_REWARDS, values, ones, mask, 1.0, 1.0, 1.0)
    assert close(targets[:, 1], TOKEN_REWARDS.sum(1)) and close(targets[:, 2], TOKEN_REWARDS[:, 2])
    _, targets = ppo_vtrace.vtrace(TOKEN_REWARDS, values, ones, mask, 1.0, 1.0, 1.0, 0.6)
    assert close(targets, ppo.gae(TOKEN_REWARDS, values, mask, 1.0, 0.6)[1])
    value = (pi[V:].view(V, V).softmax(1) * TOKEN_REWARDS[:, 2].view(V, V)).sum(1).detach()
    start = (p * TOKEN_REWARDS.sum(1)).sum()
    true = torch.stack([torch.stack([0 * start, start, value[a]]) for a, _ in SEQUENCES]).detach()
    ratios = (logprobs_of(pi) - logprobs_of(old)).exp().detach()
    advantages, targets = ppo_vtrace.vtrace(TOKEN_REWARDS, true, ratios, mask, 1.0, 99.0, 99.0)
    assert close(mu @ targets[:, 1], start)
    assert close((mu * targets[:, 2]).view(V, V).sum(1) / mu.view(V, V).sum(1), value)
    before = torch.cat(
        [torch.ones(9, 2).double(), ratios[:, 1:2]], 1
    )  # the first token's ratio: how the state is reached
    weighted = advantages * before * mu[:, None]
    loss = reinforce.reinforce_loss(logprobs_of(pi), weighted, mask, 1)
    assert close(-gradient(loss, pi), gradient(start, pi))


# ------------------------------------------------------------------------- TRPO's theory: 3 states, 2 actions


GAMMA = 0.8


def process(seed):
    """Transitions (S, A, S), rewards (S, A), the start's distribution (S,) and logits (S, A), float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(3, 2, 3).softmax(2), draw(3, 2), draw(3).softmax(0), draw(3, 2)


def solved(transitions, rewards, start, logits):
    """eta; discounted visits of each state (S,), which add up to 1 / (1 - gamma); advantages (S, A), all exact."""
    policy = logits.softmax(1)
    chain = torch.einsum("sa,saz->sz", policy, transitions)
    inverse = torch.linalg.inv(torch.eye(3, dtype=torch.float64) - GAMMA * chain)
    values = inverse @ (policy * rewards).sum(1)
    return start @ values, start @ inverse, rewards + GAMMA * transitions @ values - values[:, None]


def local(new, old, visits, advantages):
    """L(new) - eta(old), the surrogate's sum over states and actions, weighted by how often old takes them."""
    new, old = new.log_softmax(1), old.log_softmax(1)
    return trpo.surrogate(new, old, visits[:, None] * old.exp() * advantages, torch.ones(3, 2), 1)


@pytest.mark.parametrize(("seed", "size"), itertools.product(range(3), (0.01, 0.3, 2.0)))
def test_performance_difference_and_the_bound(seed, size):
    """eta(new) = eta(old) + sum_s visits_new(s) sum_a new(a | s) A_old(s, a) (Kakade and Langford 2002). With old's
    visits it is L, which is off, but eta(new) >= L(new) - C max_s KL(old || new), C = 4 eps gamma / (1 - gamma)^2, eps
    the largest |A| (eq. 9)."""
    *world, old = process(seed)
    new = old + size * torch.randn(3, 2, generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64)
    eta, visits, advantages = solved(*world, old)
    new_eta, new_visits, _ = solved(*world, new)
    assert torch.allclose(visits.sum(), torch.tensor(1 / (1 - GAMMA), dtype=torch.float64))
    assert torch.allclose(new_eta - eta, local(new, old, new_visits, advantages), 1e-9, 1e-11)
    gap = new_eta - eta - local(new, old, visits, advantages)
    kl = (old.softmax(1) * (old.log_softmax(1) - new.log_softmax(1))).sum(1).max()
    assert gap.abs() > 1e-9 and gap >= -4 * advantages.abs().max() * GAMMA / (1 - GAMMA) ** 2 * kl


@pytest.mark.parametrize("seed", range(3))
def test_the_surrogate_matches_eta_to_first_order(seed):
    """One value and one gradient at old; a tenth of a step away their difference is a hundredth: second order."""
    *world, old = process(seed)
    eta, visits, advantages = (x.detach() for x in solved(*world, old))
    new = old.clone().requires_grad_()
    slopes = [torch.autograd.grad(x, new)[0] for x in (local(new, old, visits, advantages), solved(*world, new)[0])]
    assert local(old, old, visits, advantages).abs() < 1e-12 and torch.allclose(*slopes, 1e-9, 1e-11)
    away = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64)
    news = [old + size * away for size in (0.01, 0.001)]
    gaps = [solved(*world, new)[0] - eta - local(new, old, visits, advantages) for new in news]
    assert 50 < gaps[0] / gaps[1] < 200


# -------------------------------------------------------------------------------------------- imitation and preferences


def test_the_gradient_of_the_sft_loss_is_that_of_the_kl_from_the_data():
    """E_data[-log pi] = KL(data || pi) + entropy of the data. With the policy as its own author it is stationary."""
    pi = policy(0, requires_grad=True)
    data = probabilities(policy(7))
    loss = sum(w * sft.sft_loss(x[None], MASK, 1) for w, x in zip(data, logprobs_of(pi)))
    assert close(loss, kl(data, probabilities(pi)) - (data * data.log()).sum())
    assert close(gradient(loss, pi), gradient(kl(data, probabilities(pi)), pi))
    own = sum(w * sft.sft_loss(x[None], MASK, 1) for w, x in zip(probabilities(pi).detach(), logprobs_of(pi)))
    assert gradient(own, pi).norm() < 1e-12


def expected_preferences(scores):
    """P(i is preferred to j) = sigmoid(scores_i - scores_j) for all pairs of different items: indices i, j, weights."""
    i, j = torch.tensor([(i, j) for i in range(len(scores)) for j in range(len(scores)) if i != j]).T
    return i, j, torch.sigmoid(scores[i] - scores[j])


def test_bradley_terry_recovers_the_rewards_that_made_the_preferences():
    """Up to a constant; centring alone fixes the constant: the gradient at rewards of mean 0 is 0 along it."""
    truth = REWARDS[:5] - REWARDS[:5].mean()
    rewards = (truth + 0.7).requires_grad_()
    i, j, weights = expected_preferences(truth)
    loss = (weights * rm.bradley_terry_loss(rewards[i], rewards[j])).sum()
    assert gradient(loss, rewards).norm() < 1e-12
    wrong = (truth * 1.5).requires_grad_()
    assert gradient((weights * rm.bradley_terry_loss(wrong[i], wrong[j])).sum(), wrong).norm() > 0.1
    centred = (weights * rm.bradley_terry_loss(rewards[i], rewards[j], center_coef=0.1)).sum()
    assert gradient(centred, rewards).sum() > 0.1  # pulls the constant down


def dpo_gradient(pi, ref, beta, score):
    """Of the expected dpo_loss over all pairs of sequences, by the logits of the policy."""
    logps, ref_logps = logprobs_of(pi).sum(1), logprobs_of(ref).sum(1)
    i, j, weights = expected_preferences(score)
    losses, _, _ = dpo.dpo_loss(logps[i], logps[j], ref_logps[i], ref_logps[j], beta)
    return gradient((weights * losses).sum(), pi)


@SEEDS
def test_the_optimum_of_dpo_is_the_reference_tilted_by_the_reward(seed):
    """pi* = pi_ref exp(r / beta) / Z; at it the gradient vanishes, at the reference it does not. A larger beta is
    closer to the reference there, and after one small step further away: it scales the gradient too."""
    ref, distance, gradients = policy(seed), [], []
    for beta in (0.5, 1.0):
        optimum = (logprobs_of(ref).sum(1) + REWARDS / beta).softmax(0).view(V, V)
        first, second = optimum.sum(1), optimum / optimum.sum(1, keepdim=True)
        pi = torch.cat([first.log(), second.log().flatten()]).requires_grad_()
        assert close(probabilities(pi), optimum.flatten())
        assert dpo_gradient(pi, ref, beta, REWARDS).norm() < 1e-10
        distance.append(kl(probabilities(pi), probabilities(ref)))
        start = ref.clone().requires_grad_()
        gradients.append(dpo_gradient(start, ref, beta, REWARDS).norm())
    assert distance[1] < distance[0] and gradients[1] > 1.5 * gradients[0] > 0


def test_the_best_policy_under_a_kl_is_that_optimum():
    """E[r] - beta KL(pi || pi_ref) is stationary at pi_ref exp(r / beta) / Z, and beta log Z there."""
    ref, beta = policy(3), 0.7
    tilted = logprobs_of(ref).sum(1) + REWARDS / beta
    logits = tilted.clone().requires_grad_()
    p = logits.softmax(0)
    objective = (p * REWARDS).sum() - beta * kl(p, probabilities(ref))
    assert gradient(objective, logits).norm() < 1e-12
    assert math.isclose(objective.item(), beta * tilted.logsumexp(0).item(), rel_tol=1e-12)
