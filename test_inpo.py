"""The mathematics of inpo.py, each equation against an oracle: autograd, a library, a closed form.

    pytest test_inpo.py          12 s on one core
    python test_inpo.py          prints the equation-to-line map of the README, made from the tags

Letters as in inpo.py. float64 throughout, except where the dtype is the point. Tests named `errata` show
where a formula of the paper does not hold as it is printed.
"""
import inspect
import itertools
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import inpo
from inpo import (add_noise, gate, gradient_ascent, gradient_bound, inpo_derivative, inpo_loss,
                  mask_to_latents, npo_loss, prior_loss, score)

HERE = Path(__file__).parent
IN_SCOPE = (2, 4, 5, 7, 8, *range(11, 21))
LOG2 = math.log(2)
# (gamma, eta, tau), the rows of Table 5
TABLE5 = [(1, 1, 0.1), (5, 1, 0.1), (3, 0.5, 0.1), (3, 3, 0.1), (3, 1, 0), (3, 1, 0.5), (3, 1, 0.1)]


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, rtol=1e-10, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)


# -------------------------------------------------------------------------- equations, lines, tests

def equation_map():
    """{equation: ([(line number, function)] of the lines tagged `# ... Eq. N, M`, [names of tests])}."""
    found = {number: ([], []) for number in IN_SCOPE}
    function = None
    for line_number, line in enumerate((HERE / "inpo.py").read_text().splitlines(), 1):
        if line.startswith("def "):
            function = re.match(r"def (\w+)", line)[1]
        code, _, comment = line.partition("#")
        tag = re.search(r"\bEq\. (\d+(?:, \d+)*)", comment)
        if tag and code.strip():  # a comment on a line of its own tags nothing
            for number in tag[1].split(", "):
                found[int(number)][0].append((line_number, function))
    for name in re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.M):
        for number in set(re.findall(r"eq(\d\d)", name)):
            found[int(number)][1].append(name)
    return found


def print_map():
    print("| Eq. | function | line | tests |\n|---|---|---|---|")
    for number, (lines, tests) in equation_map().items():
        functions = ", ".join(dict.fromkeys(f"`{function}`" for _, function in lines))
        links = ", ".join(f"[inpo.py:{n}](inpo.py#L{n})" for n, _ in lines)
        print(f"| {number} | {functions} | {links} | {len(tests)} |")


def test_every_equation_in_scope_has_a_tagged_line_and_a_test():
    for number, (lines, tests) in equation_map().items():
        assert lines, f"Eq. {number} has no tagged line in inpo.py"
        assert tests, f"Eq. {number} has no test"


def test_tags_sit_on_the_functions_they_belong_to():
    where = {number: {function for _, function in lines} for number, (lines, _) in equation_map().items()}
    assert where == {
        2: {"add_noise", "score"}, 4: {"gradient_ascent"}, 5: {"gradient_ascent"}, 7: {"npo_loss"},
        8: {"score"}, 11: {"score"}, 12: {"inpo_loss"}, 13: {"inpo_loss"}, 14: {"gate"}, 15: {"inpo_loss"},
        16: {"prior_loss"}, 17: {"inpo_loss"}, 18: {"inpo_derivative"}, 19: {"inpo_derivative"},
        20: {"gradient_bound"}}


# ------------------------------------------------------------------------------------- Eq. 2: noise

def test_eq02_noising_is_the_one_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler
    scheduler = FlowMatchEulerDiscreteScheduler()
    x, eps = normal(3, 4, 2, 2), normal(3, 4, 2, 2, seed=1)  # (B, C, H, W)
    picks = [10, 500, 990]
    sigma = scheduler.sigmas[picks]  # (B,), float32
    expected = scheduler.scale_noise(x, scheduler.timesteps[picks], eps)  # (B, C, H, W)
    close(add_noise(x, eps, sigma), expected, rtol=1e-6, atol=1e-7)
    close(add_noise(x.flatten(2), eps.flatten(2), sigma), expected.flatten(2), rtol=1e-6, atol=1e-7)


def test_eq02_noising_ends_and_its_velocity():
    x, eps, sigma = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1), f64(0, 1)
    z = add_noise(x, eps, sigma)
    assert torch.equal(z[0], x[0])
    assert torch.equal(z[1], eps[1])
    sigma = f64(0.3, 0.8)
    z = add_noise(x, eps, sigma)
    close(z - sigma.view(-1, 1, 1, 1) * (eps - x), x)  # along the target velocity eps - x, back to the image


def test_eq02_noise_keeps_the_dtype_of_the_latents():
    x, eps = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        sigma = torch.tensor([0.3, 0.7])
        z = add_noise(x.to(dtype), eps.to(dtype), sigma)
        assert z.dtype == dtype
        exact = add_noise(x.to(dtype).double(), eps.to(dtype).double(), sigma)
        # rounded once, at the end: sigma in float32 is not rounded to half precision first
        close(z.double(), exact, rtol=0.51 * torch.finfo(dtype).eps + 1e-6, atol=1e-6)


# -------------------------------------------------------------------------- Eq. 2, 8, 11: the score

MASK = torch.zeros(3, 1, 4, 5, dtype=torch.bool)  # (B, 1, H, W): three areas, none symmetric
MASK[0, 0, 0, 1:] = True
MASK[1, 0, 2, 3] = True
MASK[2] = True


def pair():
    return normal(3, 6, 4, 5), 2 * normal(3, 6, 4, 5, seed=1) + 0.3  # prediction, target (B, C, H, W)


def tokens(x):
    return x.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)


def test_eq02_eq08_score_without_a_mask_is_mse():
    prediction, target = pair()
    means = [F.mse_loss(p, t) for p, t in zip(prediction, target)]
    sums = [F.mse_loss(p, t, reduction="sum") for p, t in zip(prediction, target)]
    for reduction, expected in (("mask", means), ("latent", means), ("sum", sums)):
        close(score(prediction, target, reduction=reduction), expected)
        close(score(tokens(prediction), tokens(target), reduction=reduction), expected)
    close(score(prediction, target), means)  # the default
    close(score(prediction, target, torch.ones_like(prediction)), means)  # a mask of ones turns the mask off


def test_eq11_score_is_the_mean_over_mask_and_channels():
    prediction, target = pair()
    full = MASK.expand_as(prediction)  # (B, C, H, W)
    expected = [F.mse_loss(p[m], t[m]) for p, t, m in zip(prediction, target, full)]
    for mask in (MASK, full, MASK.double(), MASK.half()):
        close(score(prediction, target, mask), expected)
    for mask in (tokens(MASK), tokens(full)):  # (B, L, 1), (B, L, D)
        close(score(tokens(prediction), tokens(target), mask), expected)
    # a packed token holds 2 x 2 cells: its mask differs from element to element
    uneven = tokens(full) & (torch.arange(6) < 4)  # (B, L, D)
    expected = [F.mse_loss(p[m], t[m]) for p, t, m in zip(tokens(prediction), tokens(target), uneven)]
    close(score(tokens(prediction), tokens(target), uneven), expected)


def test_eq11_soft_mask_enters_squared():
    prediction, target = pair()
    soft = torch.rand(3, 1, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    norms = torch.stack([(m * (p - t)).norm() ** 2 for p, t, m in zip(prediction, target, soft)])
    close(score(prediction, target, soft, reduction="sum"), norms)
    close(score(prediction, target, soft, reduction="latent"), norms / (6 * 4 * 5))
    close(score(prediction, target, soft), norms / (6 * soft.sum((1, 2, 3))))


def test_eq02_weight_is_a_number_or_one_a_sample():
    prediction, target = pair()
    plain = score(prediction, target, MASK)
    close(score(prediction, target, MASK, w=0.1), 0.1 * plain, rtol=1e-14)  # 0.1 is not rounded to float32
    w = f64(0.5, 2, 3)
    for reduction in ("mask", "latent", "sum"):
        plain = score(prediction, target, MASK, reduction=reduction)
        close(score(prediction, target, MASK, w, reduction), w * plain)
    assert score(prediction.float(), target.float(), MASK, w).dtype == torch.float32


def test_eq08_velocity_score_is_the_noise_score_over_one_minus_sigma_squared():
    x, eps, v_hat = normal(3, 6, 4, 5), normal(3, 6, 4, 5, seed=1), normal(3, 6, 4, 5, seed=2)
    sigma = f64(0.1, 0.5, 0.9)
    z = add_noise(x, eps, sigma)
    eps_hat = z + (1 - sigma.view(-1, 1, 1, 1)) * v_hat  # the noise that a velocity implies
    close(score(v_hat, eps - x, MASK), score(eps_hat, eps, MASK, w=(1 - sigma) ** -2))


def test_eq11_half_precision_is_upcast_before_the_subtraction():
    for dtype in (torch.bfloat16, torch.float16):
        prediction, target = (x.to(dtype) for x in pair())
        exact = score(prediction.double(), target.double(), MASK)
        S = score(prediction, target, MASK)
        assert S.dtype == torch.float32
        close(S.double(), exact, rtol=2e-6)
        rounded = score((prediction - target).float(), torch.zeros(3, 6, 4, 5), MASK)  # what must not be
        assert (rounded - exact).abs().max() > 1e-5 * exact.max()
        close(score(prediction, target.float(), MASK).double(), exact, rtol=2e-6)
        close(score(prediction.float(), target, MASK).double(), exact, rtol=2e-6)
    big = torch.full((1, 1, 1, 1), 300.0, dtype=torch.float16)
    assert score(big, -big).item() == 360000  # overflows in float16, whose largest number is 65504


def test_eq11_float64_stays_float64():
    prediction, target = pair()
    assert score(prediction, target).dtype == torch.float64
    tiny = score(prediction + 1e-9, prediction)
    close(tiny, [1e-18] * 3, rtol=1e-5, atol=0)  # in float32 the difference would be 0
    assert score(prediction.bfloat16(), target).dtype == torch.float64


# ------------------------------------------------------------------------ Eq. 4, 5: gradient ascent

def test_eq04_gradient_ascent_is_minus_the_diffusion_loss():
    prediction, target = pair()
    w = f64(0.5, 2, 3)
    losses = [-w_ * F.mse_loss(p, t, reduction="sum") for p, t, w_ in zip(prediction, target, w)]
    close(gradient_ascent(score(prediction, target, w=w, reduction="sum")), losses)
    large = f64(-1e4, 1e4)
    assert torch.equal(gradient_ascent(large), -large)


def test_eq05_gradient_of_gradient_ascent():
    basis, eps, w = normal(7, 24), normal(1, 1, 24, seed=1), 1.7
    theta = normal(7, seed=2).requires_grad_()

    def loss(theta):
        eps_theta = (theta @ basis).view(1, 1, 24)  # (B, L, D)
        return gradient_ascent(score(eps_theta, eps, w=w, reduction="sum"))

    gradient, = torch.autograd.grad(loss(theta).sum(), theta)
    residual = (eps - theta @ basis).flatten()  # (D,): eps - eps_theta
    close(gradient, basis @ (2 * w * residual).detach())  # d eps_theta / d theta is the basis
    assert torch.autograd.gradcheck(loss, theta)


def test_eq05_gradient_ascents_gradient_does_not_decay_but_inpos_does():
    target = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    norms = {"ga": [], "inpo": []}
    for error in (1, 2, 4, 8):  # the model moves away
        for name, loss in (("ga", gradient_ascent), ("inpo", inpo_loss)):
            prediction = torch.full_like(target, error).requires_grad_()
            loss(score(prediction, target)).sum().backward()
            norms[name].append(prediction.grad.norm().item())
    assert norms["ga"] == sorted(norms["ga"]) and norms["ga"][-1] == pytest.approx(8 * norms["ga"][0])
    assert norms["inpo"] == sorted(norms["inpo"], reverse=True) and norms["inpo"][-1] < 1e-20


# ---------------------------------------------------------------------- Eq. 7, 12, 13: NPO and INPO

def test_eq07_npo_is_its_formula_over_a_likelihood_ratio():
    ratio = f64(1e-3, 0.2, 1, 3, 500)
    for beta in (0.1, 0.5, 1, 3):
        logs = [math.log(1 + r ** beta) for r in ratio.tolist()]
        close(npo_loss(ratio.log(), beta), [2 * beta * x for x in logs])
        close(npo_loss(ratio.log(), beta, "2beta"), [2 * beta * x for x in logs])
        close(npo_loss(ratio.log(), beta, prefactor="2/beta"), [2 / beta * x for x in logs])
    close(npo_loss(ratio.log()), npo_loss(ratio.log(), 1.0, "2/beta"))  # at beta = 1 they agree


def test_eq12_eq13_eq17_loss_is_npo_of_gaussian_likelihoods():
    # Where pi is a Gaussian of variance 1 / (2 lambda), log pi = const - lambda S holds exactly (Eq. 9, 10).
    x, theta, ref = normal(5), normal(5, seed=1), normal(5, seed=2)
    for beta, lam in ((1, 1), (0.5, 3), (2, 0.7)):
        sd = (1 / (2 * lam)) ** 0.5
        log_pi_theta = torch.distributions.Normal(theta, sd).log_prob(x)
        log_pi_ref = torch.distributions.Normal(ref, sd).log_prob(x)
        dS = score(theta.view(5, 1, 1), x.view(5, 1, 1)) - score(ref.view(5, 1, 1), x.view(5, 1, 1))
        for prefactor in ("2beta", "2/beta"):
            close(inpo_loss(dS, eta=beta * lam, tau=math.inf, beta=beta, prefactor=prefactor),
                  npo_loss(log_pi_theta - log_pi_ref, beta, prefactor))


# ------------------------------------------------------------------------- Eq. 14, 15, 17: the gate

def test_eq14_gate_is_its_formula():
    dS = torch.linspace(-5, 50, 111, dtype=torch.float64)
    for gamma, tau in itertools.product((0.5, 1, 3, 5), (-1, 0, 0.1, 0.5)):
        close(gate(dS, gamma, tau), [1 / (1 + math.exp(gamma * (x - tau))) for x in dS.tolist()], atol=0)
        assert gate(f64(tau), gamma, tau).item() == 0.5
    close(gate(f64(0)), [0.574], rtol=1e-3)
    assert (gate(dS).diff() < 0).all()  # monotone


def test_eq14_infinite_tau_turns_the_gate_off():
    dS = f64(-1e4, -1, 0, 1, 1e4).requires_grad_()
    alpha = gate(dS, tau=math.inf)
    assert torch.equal(alpha, torch.ones_like(dS))
    alpha.sum().backward()
    assert torch.equal(dS.grad, torch.zeros_like(dS))


def test_eq13_eq15_loss_is_its_formula():
    dS = torch.linspace(-5, 50, 56, dtype=torch.float64)
    for gamma, eta, tau in (*TABLE5, (3, 1, math.inf)):  # the last is Eq. 13, without the gate
        alpha = [1 / (1 + math.exp(gamma * (x - tau))) for x in dS.tolist()]
        expected = [a * math.log1p(math.exp(-eta * x)) for a, x in zip(alpha, dS.tolist())]
        for beta in (0.3, 1, 2):
            factor = {"2beta": 2 * beta, "2/beta": 2 / beta}
            for prefactor, detach in itertools.product(factor, (False, True)):
                loss = inpo_loss(dS, eta, gamma, tau, beta, prefactor, detach)
                close(loss, [factor[prefactor] * x for x in expected], atol=0)


def test_defaults_are_the_papers():
    for function in (inpo_loss, inpo_derivative):
        defaults = {k: p.default for k, p in inspect.signature(function).parameters.items() if k != "dS"}
        assert defaults == dict(eta=1, gamma=3, tau=0.1, beta=1, prefactor="2beta", detach_gate=False)
    assert torch.equal(gate(f64(0.3)), gate(f64(0.3), 3.0, 0.1))
    assert gradient_bound(1, 3) == gradient_bound(1.0, 3.0, 1.0, "2beta")


# -------------------------------------------------------------------------------- Eq. 16: the prior

def test_eq16_prior_is_the_mean_over_all_latent_elements():
    prediction, reference = pair()
    close(prior_loss(prediction, reference), [F.mse_loss(p, r) for p, r in zip(prediction, reference)])
    close(prior_loss(tokens(prediction), tokens(reference)), prior_loss(prediction, reference))
    assert prior_loss(prediction.bfloat16(), reference.bfloat16()).dtype == torch.float32
    assert torch.equal(prior_loss(prediction, prediction), torch.zeros(3, dtype=torch.float64))


# ----------------------------------------------------------------------- Eq. 18, 19: the derivative

# (beta, eta, gamma, tau)
GRID = list(itertools.product((0.3, 1, 2), (0.5, 1, 3, 20), (0.5, 1, 3, 5), (0, 0.1, 0.5, math.inf)))


def test_eq18_eq19_derivative_is_autograds():
    for beta, eta, gamma, tau in GRID:
        for prefactor, detach in itertools.product(("2beta", "2/beta"), (False, True)):
            dS = torch.linspace(-5, 50, 111, dtype=torch.float64, requires_grad=True)
            inpo_loss(dS, eta, gamma, tau, beta, prefactor, detach).sum().backward()
            closed = inpo_derivative(dS.detach(), eta, gamma, tau, beta, prefactor, detach)
            close(closed, dS.grad, rtol=1e-9, atol=1e-300)


def test_eq19_derivative_is_the_printed_formula():
    def sigma(u):
        return 1 / (1 + math.exp(-u))

    beta, b, gamma, tau = 0.7, 1.3, 3, 0.1
    for x in (-2, -0.5, 0, 0.1, 0.7, 3):
        alpha = sigma(-gamma * (x - tau))
        log = math.log(1 + math.exp(-b * x))
        printed = 2 * beta * (-gamma * alpha * (1 - alpha) * log - b * alpha * sigma(-b * x))
        close(inpo_derivative(f64(x), b, gamma, tau, beta), [printed])


def test_eq18_loss_passes_gradcheck():
    for beta, eta, gamma, tau in GRID[::5]:
        dS = f64(-5, -0.3, 0, 0.1, 0.4, 2, 7).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: inpo_loss(x, eta, gamma, tau, beta), dS)
        # finite differences cannot see a detach: hold the gate still instead
        still = gate(dS, gamma, tau).detach()
        detached, = torch.autograd.grad(inpo_loss(dS, eta, gamma, tau, beta, detach_gate=True).sum(), dS)
        close(detached, torch.autograd.grad((still * inpo_loss(dS, eta, gamma, math.inf, beta)).sum(), dS)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_eq05_eq07_eq15_eq19_are_finite_at_ten_thousand(dtype):
    for tau, prefactor, eta in itertools.product((0.1, 0, math.inf), ("2beta", "2/beta"), (1, 3)):
        dS = torch.tensor([-1e4, -50, 0, 50, 1e4], dtype=dtype, requires_grad=True)
        outputs = (gradient_ascent(dS), npo_loss(dS, eta, prefactor), gate(dS, tau=tau),
                   inpo_loss(dS, eta, tau=tau, prefactor=prefactor))
        for output in outputs:
            gradient, = torch.autograd.grad(output.sum(), dS)
            assert output.isfinite().all() and gradient.isfinite().all()
        assert inpo_derivative(dS.detach(), eta, tau=tau, prefactor=prefactor).isfinite().all()
    ends = f64(-1e4, 1e4)
    close(inpo_loss(ends), [2e4, 0])
    close(inpo_derivative(ends), [-2, 0])
    close(inpo_loss(ends, tau=math.inf), [2e4, 0])


def test_eq19_push_without_the_gates_share_is_2_8_times_weaker():
    weaker = inpo_derivative(f64(0)) / inpo_derivative(f64(0), detach_gate=True)
    close(weaker, [2.8], rtol=0, atol=0.05)


def test_eq11_eq19_errata_the_gradient_under_eq19_needs_the_mask_squared():
    prediction, target = pair()
    prediction.requires_grad_()
    soft = torch.rand(3, 1, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for mask, printed_holds in ((MASK.double(), True), (soft, False)):
        gradient, = torch.autograd.grad(score(prediction, target, mask, reduction="sum").sum(), prediction)
        close(gradient, 2 * mask ** 2 * (prediction - target).detach())
        printed = 2 * mask * (prediction - target).detach()  # E_t[w(t) 2 M (eps_theta - eps) grad eps_theta]
        assert torch.allclose(gradient, printed) == printed_holds


# -------------------------------------------------------------------------------- Eq. 20: the bound

def test_eq20_bound_is_its_formula():
    assert gradient_bound(20, 1) / 2 == pytest.approx(20.173287, abs=1e-6)
    for eta, gamma, beta in itertools.product((0.5, 1, 3), (1, 3, 5), (0.3, 1, 2)):
        for prefactor, factor in (("2beta", 2 * beta), ("2/beta", 2 / beta)):
            bound = gradient_bound(eta, gamma, beta, prefactor)
            assert bound == pytest.approx(factor * (gamma * LOG2 / 4 + eta))


def test_eq20_bound_and_a_sharper_one_hold_where_the_model_forgets():
    dS = torch.linspace(0, 50, 10001, dtype=torch.float64)
    for beta, eta, gamma, tau in GRID:
        steepest = inpo_derivative(dS, eta, gamma, tau, beta).abs().max()
        assert steepest <= gradient_bound(eta, gamma, beta)
        # sigma(-b dS) <= 1/2 for dS >= 0; at tau = inf and dS = 0 it is b / 2 exactly, hence the rounding
        assert steepest <= 2 * beta * (gamma * LOG2 / 4 + eta / 2) * (1 + 1e-12)


def test_eq20_errata_bound_fails_where_the_model_has_not_begun_to_forget():
    dS = torch.linspace(-50, 0, 50001, dtype=torch.float64)
    slope = inpo_derivative(dS, eta=20, gamma=1, tau=0).abs() / 2
    assert slope.max() == pytest.approx(22.0, abs=0.005)
    assert dS[slope.argmax()] == pytest.approx(-2.4, abs=0.005)
    assert slope.max() > gradient_bound(20, 1) / 2
    # at the paper's own setting there is room
    slope = inpo_derivative(torch.linspace(-50, 50, 50001, dtype=torch.float64)).abs() / 2
    assert slope.max() == pytest.approx(1.0, abs=0.005)
    assert gradient_bound(1, 3) / 2 == pytest.approx(1.52, abs=0.005)


# ------------------------------------------------------ Proposition 1: gradient ascent as beta -> 0

BETAS = (1e-2, 1e-4, 1e-6)
LAMBDA = 3.0  # held fixed, so that eta = beta lambda tends to 0 with beta


def test_eq07_eq13_errata_limit_with_two_over_beta_is_lambda_times_gradient_ascent():
    S_theta, S_ref = f64(0.7, 0.1, 2), f64(0.2, 0.4, 2)
    dS = S_theta - S_ref
    for beta in BETAS:
        ungated = dict(eta=beta * LAMBDA, tau=math.inf, beta=beta, prefactor="2/beta")
        close(inpo_loss(dS, **ungated) - 2 / beta * LOG2, -LAMBDA * dS, rtol=0, atol=4 * beta)
        close(inpo_derivative(dS, **ungated), [-LAMBDA] * 3, rtol=0, atol=4 * beta)  # gradient ascent's is -1
    # errata: Proposition 1 prints L_GA - S_ref, with the wrong sign on S_ref and without lambda
    limit = inpo_loss(dS, **ungated) - 2 / beta * LOG2
    close(limit, LAMBDA * (gradient_ascent(S_theta) + S_ref), rtol=0, atol=1e-4)
    printed = gradient_ascent(S_theta) - S_ref
    assert (limit - printed).abs().min() > 0.1
    assert (limit - LAMBDA * printed).abs().min() > 0.1
    assert (limit - (gradient_ascent(S_theta) + S_ref))[:2].abs().min() > 0.1


def test_eq13_errata_limit_with_two_beta_is_nothing():
    dS = f64(-0.5, 0.5, 2)
    for beta in BETAS:
        for tau in (math.inf, 0.1):
            printed = dict(eta=beta * LAMBDA, tau=tau, beta=beta, prefactor="2beta")
            assert (inpo_loss(dS, **printed) - 2 * beta * LOG2).abs().max() < 3 * beta
            assert inpo_derivative(dS, **printed).abs().max() < 3 * beta  # gradient ascent's is 1


def test_eq15_errata_limit_with_the_gate_on_diverges():
    dS = f64(0, 0.5, 2)
    losses = [inpo_loss(dS, beta * LAMBDA, beta=beta, prefactor="2/beta") - 2 / beta * LOG2 for beta in BETAS]
    slopes = [inpo_derivative(dS, beta * LAMBDA, beta=beta, prefactor="2/beta") for beta in BETAS]
    for values in (losses, slopes):
        for small, large in itertools.pairwise(values):
            close(large / small, [100] * 3, rtol=0.2)  # as 1 / beta


def test_eq14_errata_the_gate_holds_no_beta():
    assert "beta" not in inspect.signature(gate).parameters
    for beta in BETAS:  # "alpha -> 1 as beta -> 0": the loss over the ungated loss stays alpha
        ratio = inpo_loss(f64(0), beta=beta) / inpo_loss(f64(0), tau=math.inf, beta=beta)
        close(ratio, [0.574], rtol=0, atol=5e-4)


def test_eq13_weights_of_a_batch_become_equal_as_beta_tends_to_zero():
    dS = f64(-1, 0, 0.3, 2)
    spread = []
    for beta in (1, *BETAS):
        slope = inpo_derivative(dS, beta * LAMBDA, tau=math.inf, beta=beta, prefactor="2/beta")
        weights = slope / slope.sum()
        spread.append((weights.max() - weights.min()).item())
    assert spread[0] > 0.4  # at beta = 1 the loss attends to what is least forgotten
    assert spread == sorted(spread, reverse=True) and spread[-1] < 3e-6


# ---------------------------------------------------- Corollary 1: logarithmic divergence, on a toy

def descend(gamma, eta, tau, step_size, steps):
    """theta_0 = 0, theta_1, ... (steps + 1,): gradient descent on Eq. 15 where dS = theta, so G_max = 1."""
    theta = [torch.zeros(1, dtype=torch.float64)]
    for _ in range(steps):
        theta.append(theta[-1] - step_size * inpo_derivative(theta[-1], eta, gamma, tau))
    return torch.cat(theta)


def allowed(gamma, eta, steps):
    """The corollary's two bounds on |theta_t|, t = 1 ... steps: over the harmonic sum, and over 1 + log t."""
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    return gradient_bound(eta, gamma) * (1 / t).cumsum(0), gradient_bound(eta, gamma) * (1 + t.log())


def test_eq15_eq20_corollary_holds_at_step_size_one():
    steps = 10_000
    theta = descend(3, 1, 0.1, 1, steps)
    for bound in allowed(3, 1, steps):
        assert (theta[1:].abs() <= bound).all()
    i = torch.arange(steps + 1)
    assert (gate(theta, 3, 0.1) <= 1 / (i + 1)).all()  # the assumption that its proof needs
    assert (theta.diff() > 0).all()


def test_eq15_eq20_errata_corollary_assumes_what_fails_at_gamma_one():
    theta = descend(1, 1, 0.1, 1, 1000)
    for bound in allowed(1, 1, 1000):
        assert (theta[1:].abs() <= bound).all()  # the conclusion still holds
    i = torch.arange(1001)
    assert torch.equal(gate(theta, 1, 0.1) <= 1 / (i + 1), i < 5)


def test_eq15_eq20_errata_corollary_dropped_the_step_size():
    for gamma in (3, 1):
        theta = descend(gamma, 1, 0.1, 10, 300)
        for bound in allowed(gamma, 1, 300):
            assert theta[1] > bound[0]  # broken by the first step
            assert (theta[1:].abs() <= 10 * bound).all()  # whole with the step size put back


def test_eq19_eq20_errata_gradient_is_not_below_the_bound_times_alpha():
    dS = torch.linspace(0, 10, 10001, dtype=torch.float64)
    peaks = {}
    for gamma, eta, tau in TABLE5:
        claimed = gradient_bound(eta, gamma) * gate(dS, gamma, tau)  # C alpha G, at G = 1
        ratio = inpo_derivative(dS, eta, gamma, tau).abs() / claimed
        peaks[gamma, eta, tau] = ratio.max().item(), dS[ratio.argmax()].item()
    assert {row for row, (peak, _) in peaks.items() if peak > 1} == {(3, 0.5, 0.1), (5, 1, 0.1), (3, 1, 0)}
    for row, peak, at in (((3, 0.5, 0.1), 1.55, 0.70), ((5, 1, 0.1), 1.34, 0.40), ((3, 1, 0), 1.06, 0.25)):
        assert peaks[row] == (pytest.approx(peak, abs=0.005), pytest.approx(at, abs=0.006))
    assert peaks[3, 1, 0.1][0] == pytest.approx(0.987, abs=5e-4)


# ------------------------------------------------------------------------------ the mask in latents

def test_eq11_a_cell_is_in_if_any_of_its_pixels_is():
    mask = torch.rand(3, 1, 24, 40, generator=torch.Generator().manual_seed(0)) > 0.98  # (B, 1, Y, X)
    cells = mask_to_latents(mask, 3, 5)  # (B, 1, 3, 5), of 8 x 8 pixels
    assert cells.dtype == torch.bool and cells.shape == (3, 1, 3, 5)
    for b, row, column in itertools.product(range(3), range(3), range(5)):
        block = mask[b, 0, 8 * row:8 * row + 8, 8 * column:8 * column + 8]
        assert cells[b, 0, row, column] == block.any()
    assert 0 < cells.sum() < cells.numel()


# ------------------------------------------------------------- a real (tiny, random) FLUX with LoRA

class Flux:
    """A two-block FluxTransformer2DModel of random weights with a LoRA, its inputs, and its output before."""

    def __init__(self):
        from diffusers import FluxPipeline, FluxTransformer2DModel
        from peft import LoraConfig
        torch.manual_seed(0)
        self.pack = FluxPipeline._pack_latents
        self.transformer = FluxTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 6, 6))
        self.transformer.requires_grad_(False)
        B, C, H, W = 2, 16, 6, 8
        self.mask = torch.zeros(B, 1, H, W, dtype=torch.bool)
        self.mask[0, 0, 1, 2:7] = True  # asymmetric, and not made of whole tokens
        self.mask[0, 0, 5, 0] = True
        self.mask[1, 0, :3, 5] = True
        self.latents, self.eps = torch.randn(2, B, C, H, W)
        self.sigma = torch.tensor([0.3, 0.8])
        z = add_noise(self.latents, self.eps, self.sigma)
        self.tokens = self.pack(self.mask.float().expand(B, C, H, W), B, C, H, W)  # (B, L, D)
        self.target = self.pack(self.eps - self.latents, B, C, H, W)
        self.inputs = dict(
            hidden_states=self.pack(z, B, C, H, W), encoder_hidden_states=torch.randn(B, 5, 24),
            pooled_projections=torch.randn(B, 20), timestep=self.sigma, guidance=torch.full((B,), 3.5),
            img_ids=FluxPipeline._prepare_latent_image_ids(B, H // 2, W // 2, "cpu", torch.float32),
            txt_ids=torch.zeros(5, 3))
        with torch.no_grad():
            self.base = self.predict()
        layers = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"]
        self.transformer.add_adapter(
            LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=layers))

    def predict(self):
        return self.transformer(**self.inputs, return_dict=False)[0]  # (B, L, D)

    def perturb(self):
        """As if trained: B of a LoRA starts at 0."""
        for name, parameter in self.transformer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)


@pytest.fixture
def flux():
    return Flux()


def test_eq13_flux_has_not_moved_at_initialisation(flux):
    from train import reference
    S_theta = score(flux.predict(), flux.target, flux.tokens)
    with reference(flux.transformer):
        assert not torch.is_grad_enabled()
        S_ref = score(flux.predict(), flux.target, flux.tokens)
    assert not S_ref.requires_grad
    dS = S_theta - S_ref
    assert torch.equal(dS, torch.zeros(2))  # exactly
    for beta in (1, 0.5):
        alpha = 1 / (1 + math.exp(-3 * 0.1))
        close(inpo_loss(dS, beta=beta), [2 * beta * alpha * LOG2] * 2, rtol=1e-6)
    inpo_loss(dS).mean().backward()
    trained = {name for name, p in flux.transformer.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained and all("lora_B" in name for name in trained)  # there is a push, though not yet on A


def test_eq11_flux_no_gradient_outside_the_mask(flux):
    flux.perturb()
    prediction = flux.predict()
    prediction.retain_grad()
    inpo_loss(score(prediction, flux.target, flux.tokens) - 0.1).mean().backward()
    inside = flux.tokens.bool()
    assert torch.equal(prediction.grad[~inside], torch.zeros(int((~inside).sum())))
    assert (prediction.grad[inside] != 0).all()


def test_eq12_flux_reference_is_the_base_bit_for_bit(flux):
    from train import reference
    flux.perturb()
    adapted = flux.predict()
    with pytest.raises(RuntimeError, match="out of memory"):
        with reference(flux.transformer):
            assert torch.equal(flux.predict(), flux.base)
            raise RuntimeError("out of memory")
    assert torch.equal(flux.predict(), adapted)  # adapters are back on after an exception, too
    assert (adapted - flux.base).abs().max() > 1e-3
    assert flux.predict().requires_grad


def test_eq11_flux_packed_mask_lands_on_the_cells_of_the_packed_latents(flux):
    B, C, H, W = flux.latents.shape
    address = torch.arange(B * C * H * W).view(B, C, H, W)  # every element is its own address
    packed = flux.pack(address, B, C, H, W)
    expected = address[flux.mask.expand(B, C, H, W)]
    assert torch.equal(packed[flux.tokens.bool()].sort().values, expected)
    assert flux.tokens.shape == flux.inputs["hidden_states"].shape == (B, H * W // 4, 4 * C)
    assert len(flux.tokens.unique(dim=2)[0, 0]) > 1  # a token is partly in: one number a token would not do
    # and so the packed score is the score
    prediction = torch.randn(B, C, H, W)
    velocity = flux.eps - flux.latents
    packed_score = score(flux.pack(prediction, B, C, H, W), flux.target, flux.tokens)
    close(packed_score, score(prediction, velocity, flux.mask), rtol=1e-6)


# ---------------------------------------------------------------------------------- what is refused

NAN, INF = math.nan, math.inf
X, S3 = torch.ones(3, 2, 4, 4), torch.tensor([0.1, 0.2, 0.3])


def spoilt(x, value=NAN):
    x = x.clone()
    x.view(-1)[-1] = value
    return x


def empty_for_one():
    mask = torch.ones(3, 1, 4, 4, dtype=torch.bool)
    mask[1] = False
    return mask


TENSORS = {
    "x-nan": ("x", lambda: add_noise(spoilt(X), X, S3)),
    "x-inf": ("x", lambda: add_noise(spoilt(X, INF), X, S3)),
    "eps-nan": ("eps", lambda: add_noise(X, spoilt(X), S3)),
    "eps-shape": ("eps", lambda: add_noise(X, X[:, :1], S3)),  # would broadcast
    "eps-rank": ("eps", lambda: add_noise(X, X[0, 0], S3)),
    "sigma-nan": ("sigma", lambda: add_noise(X, X, spoilt(S3))),
    "sigma-below": ("sigma", lambda: add_noise(X, X, spoilt(S3, -0.1))),
    "sigma-above": ("sigma", lambda: add_noise(X, X, spoilt(S3, 1.1))),
    "sigma-length": ("sigma", lambda: add_noise(X, X, S3[:1])),  # would broadcast
    "sigma-rank": ("sigma", lambda: add_noise(X, X, S3[0])),
    "prediction-rank-2": ("prediction", lambda: score(X[0, 0], X[0, 0])),
    "prediction-rank-5": ("prediction", lambda: score(X[None], X[None])),
    "prediction-nan": ("prediction", lambda: score(spoilt(X), X)),
    "prediction-inf": ("prediction", lambda: score(spoilt(X, -INF), X)),
    "target-shape": ("target", lambda: score(X, X[:, :1])),
    "target-rank": ("target", lambda: score(X, X[0])),
    "target-nan": ("target", lambda: score(X, spoilt(X))),
    "target-nan-outside-the-mask": ("target", lambda: score(X, spoilt(X), spoilt(X, 0.0))),
    "mask-shape": ("mask", lambda: score(X, X, X[:, :1, :1])),  # would broadcast over the cells
    "mask-batch": ("mask", lambda: score(X, X, X[:1])),  # would broadcast over the batch
    "mask-rank": ("mask", lambda: score(X, X, X[:, 0])),
    "mask-token-channel": ("mask", lambda: score(X[:, 0], X[:, 0], X[:, 0, :1])),  # (B, 1, D)
    "mask-nan": ("mask", lambda: score(X, X, spoilt(X))),
    "mask-above-one": ("mask", lambda: score(X, X, 1.01 * X)),
    "mask-below-zero": ("mask", lambda: score(X, X, spoilt(X, -1.0))),
    "mask-empty-for-a-sample": ("mask", lambda: score(X, X, empty_for_one())),
    "mask-empty-latent": ("mask", lambda: score(X, X, 0 * X, reduction="latent")),
    "mask-empty-sum": ("mask", lambda: score(X, X, 0 * X, reduction="sum")),
    "w-nan": ("w", lambda: score(X, X, w=NAN)),
    "w-inf": ("w", lambda: score(X, X, w=spoilt(S3, INF))),
    "w-length": ("w", lambda: score(X, X, w=S3[:2])),
    "w-rank": ("w", lambda: score(X, X, w=S3[:, None])),  # would make S (B, B)
    "reduction": ("reduction", lambda: score(X, X, reduction="mean")),
    "reference-shape": ("target, or reference", lambda: prior_loss(X, X[:1])),
    "reference-nan": ("target, or reference", lambda: prior_loss(X, spoilt(X))),
    "S-nan": ("S", lambda: gradient_ascent(spoilt(S3))),
    "S-rank": ("S", lambda: gradient_ascent(S3.mean())),
    "log_ratio-nan": ("log_ratio", lambda: npo_loss(spoilt(S3))),
    "log_ratio-inf": ("log_ratio", lambda: npo_loss(spoilt(S3, INF))),
    "log_ratio-rank": ("log_ratio", lambda: npo_loss(S3.mean())),
    "mask-dtype": ("mask", lambda: mask_to_latents(X[:, :1], 2, 2)),
    "mask-channels": ("mask", lambda: mask_to_latents(X.bool(), 2, 2)),
    "mask-three-axes": ("mask", lambda: mask_to_latents(X[:, :1, 0].bool(), 1, 2)),
    "height-divides": ("height", lambda: mask_to_latents(X[:, :1].bool(), 3, 2)),
    "width-divides": ("height, width", lambda: mask_to_latents(X[:, :1].bool(), 2, 3)),
    "height-larger": ("height", lambda: mask_to_latents(X[:, :1].bool(), 8, 4)),
    "height-zero": ("height", lambda: mask_to_latents(X[:, :1].bool(), 0, 2)),
    "width-zero": ("width", lambda: mask_to_latents(X[:, :1].bool(), 2, 0)),
}


@pytest.mark.parametrize("name, call", TENSORS.values(), ids=TENSORS)
def test_refused_tensors_are_named(name, call):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        call()


@pytest.mark.parametrize("function", [gate, inpo_loss, inpo_derivative])
def test_refused_score_differences_are_named(function):
    for dS in (spoilt(S3), spoilt(S3, INF), S3.mean(), S3[:, None]):  # a mean would gate the batch as one
        with pytest.raises(ValueError, match=r"\bdS\b"):
            function(dS)
    for tau in (NAN, -INF):
        with pytest.raises(ValueError, match=r"\btau\b"):
            function(S3, tau=tau)


@pytest.mark.parametrize("bad", [0, -1, NAN, INF, -INF])
def test_refused_numbers_are_named(bad):
    calls = {
        "gamma": (lambda: gate(S3, bad), lambda: inpo_loss(S3, gamma=bad),
                  lambda: inpo_derivative(S3, gamma=bad), lambda: gradient_bound(1, bad)),
        "eta": (lambda: inpo_loss(S3, bad), lambda: inpo_derivative(S3, bad), lambda: gradient_bound(bad, 3)),
        "beta": (lambda: npo_loss(S3, bad), lambda: npo_loss(S3, bad, "2/beta"),
                 lambda: inpo_loss(S3, beta=bad), lambda: inpo_derivative(S3, beta=bad),
                 lambda: gradient_bound(1, 3, bad))}
    for name, lambdas in calls.items():
        for call in lambdas:
            with pytest.raises(ValueError, match=rf"\b{name} must be finite and > 0"):
                call()


def test_refused_prefactors_are_named():
    for function in (npo_loss, inpo_loss, inpo_derivative):
        with pytest.raises(ValueError, match=r"\bprefactor\b"):
            function(S3, prefactor="beta")


# ----------------------------------------------------------------------------------- python inpo.py

def test_script_draws_its_picture(tmp_path):
    import numpy as np
    from PIL import Image
    out = tmp_path / "inpo.png"
    inpo.main(inpo.arguments(["--out", str(out)]))
    picture = Image.open(out)
    coloured = np.ptp(np.asarray(picture.convert("RGB")), axis=2) > 60  # the curves: axes and text are grey
    assert picture.width > 1000 and coloured.sum() > 3000


def test_script_says_in_one_line_where_it_cannot_write(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        inpo.main(inpo.arguments(["--out", str(tmp_path / "missing" / "inpo.png")]))
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_import_is_cheap(monkeypatch):
    """Of torch and the standard library alone."""
    with monkeypatch.context() as patch:
        for name in {name.partition(".")[0] for name in sys.modules} - {"torch", *sys.stdlib_module_names}:
            patch.setitem(sys.modules, name, None)  # whoever imports it gets an ImportError
        runpy.run_path(str(HERE / "inpo.py"))


if __name__ == "__main__":
    print_map()
