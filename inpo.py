"""The mathematics of INPO as pure functions, tensors in, tensors out. `python inpo.py` draws docs/inpo.png.

Shapes: B images, C latent channels, H x W cells. FLUX packs 2 x 2 cells into a token: L = HW/4, D = 4C.
(B, ...) is (B, C, H, W) or (B, L, D). S is a score, in squared units of the prediction; dS = S_theta - S_ref
is > 0 once the model has begun to forget. A bad shape, a NaN or a number <= 0: ValueError, with its argument.
Deviation: the paper's S is an expectation over t, inside gate and log. Here a step draws one (t, eps), the
same for theta and ref, and the caller averages losses over samples and steps: the expectation is outside."""
import argparse
import signal
import sys
from math import inf, log

def arguments(given=None):
    parser = argparse.ArgumentParser(description="Draw the gate, the loss, its derivative and their bound.")
    parser.add_argument("--out", default="docs/inpo.png", help="the picture to write (%(default)s)")
    parser.error = lambda why: parser.exit(2, f"error: {why}\n")  # one line, without the usage
    return parser.parse_args(given)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, of the import too: without a traceback
ARGS = arguments() if __name__ == "__main__" else None  # before the slow import: --help answers at once

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

def _check(conditions, **positive):
    """ValueError with the first message of {message: bool or bool tensor} that is false; positive: > 0."""
    conditions |= {f"{name} must be finite and > 0": 0 < x < inf for name, x in positive.items()}
    device = next((c.device for c in conditions.values() if torch.is_tensor(c)), "cpu")
    good = torch.stack([torch.as_tensor(c, device=device).all() for c in conditions.values()]).tolist()
    if not all(good):  # one copy from the GPU for all conditions: each would make it wait
        raise ValueError(list(conditions)[good.index(False)])

def _scale(beta, prefactor, **positive):
    _check({"prefactor must be 2beta or 2/beta": prefactor in ("2beta", "2/beta")}, beta=beta, **positive)
    return 2 * beta if prefactor == "2beta" else 2 / beta

def add_noise(x, eps, sigma):
    """Latents x, noise eps ~ N(0, 1), both (B, ...), sigma (B,) in [0, 1] -> z_t (B, ...) like x (Eq. 2)."""
    _check({"x must be finite": x.isfinite(),
            "eps must be finite, of x's shape": eps.isfinite() & (eps.shape == x.shape),
            "sigma must be (B,), in [0, 1]": (0 <= sigma) & (sigma <= 1) & (sigma.shape == x.shape[:1])})
    sigma = sigma.view(-1, *[1] * (x.ndim - 1))  # (B, 1, ...)
    return ((1 - sigma) * x + sigma * eps).to(x.dtype)  # (B, ...)  Eq. 2: its x_t, as in rectified flow

def score(prediction, target, mask=None, w=1.0, reduction="mask"):
    """Prediction and target (B, ...) -> S (B,), their squared error in the mask (Eq. 2, 8, 11), >= 32 bits.
    mask: bool or in [0, 1], (B, ...) or one channel, (B, 1, H, W) or (B, L, 1); None is all ones.
    w: w(t), a number or (B,). S is in units of the prediction, for FLUX the velocity v = eps - x. Eq. 8 has
       noise, and eps - eps_hat = (1 - sigma)(v - v_hat): w = 1 here is w(t) = (1 - sigma)^-2 there.
    reduction: "mask", the mean over mask and channels: only then does tau = 0.1 mean the same for any size
       of object; "latent", the mean over all elements; "sum", the norm as printed."""
    shape = prediction.shape
    one_channel = (*shape[:-1], 1) if len(shape) == 3 else (*shape[:1], 1, *shape[2:])
    mask = torch.ones_like(prediction) if mask is None else mask  # (B, ...) or one channel
    _check({"prediction must be (B, C, H, W) or (B, L, D)": len(shape) in (3, 4),
            "target, or reference, must have prediction's shape": target.shape == shape,
            "mask must have prediction's shape, or one channel": mask.shape in (shape, one_channel),
            "reduction must be mask, latent or sum": reduction in ("mask", "latent", "sum")})
    dtype = torch.promote_types(prediction.dtype, torch.float32)  # dS, a small difference, drowns in bf16
    d = prediction.to(dtype) - target  # (B, ...)
    mask = mask.to(d).expand(shape)  # (B, ...)
    area = mask.flatten(1).sum(1)  # (B,)
    w = torch.as_tensor(w, dtype=d.dtype, device=d.device)  # () or (B,)
    _check({"prediction must be finite": prediction.isfinite(),
            "target, or reference, must be finite": target.isfinite(),
            "mask must be in [0, 1]": (0 <= mask) & (mask <= 1), "mask is empty for a sample": area > 0,
            "w must be finite, a number or (B,)": w.isfinite() & (w.shape in ((), shape[:1]))})
    count = {"mask": area, "latent": d[0].numel(), "sum": 1}[reduction]  # (B,) or a number
    return w * (mask * d).square().flatten(1).sum(1) / count  # (B,)  Eq. 2, 8, 11: the mask is squared too

def gradient_ascent(S):
    """S (B,) -> the baseline's loss (B,) (Eq. 4), unbounded; its gradient (Eq. 5) grows with the error."""
    _check({"S must be finite, (B,)": S.isfinite() & (S.ndim == 1)})
    return -S  # (B,)  Eq. 4, 5

def npo_loss(log_ratio, beta=1.0, prefactor="2beta"):
    """log(pi_theta / pi_ref) (B,) -> NPO (B,) (Eq. 7), times 2 beta, or 2 / beta as in NPO's own code."""
    _check({"log_ratio must be finite, (B,)": log_ratio.isfinite() & (log_ratio.ndim == 1)})
    return _scale(beta, prefactor) * -F.logsigmoid(-beta * log_ratio)  # (B,)  Eq. 7

def gate(dS, gamma=3.0, tau=0.1):
    """dS (B,) -> alpha (B,) in [0, 1], 1/2 at dS = tau (Eq. 14); tau is in units of S; inf: no gate."""
    _check({"dS must be finite, (B,)": dS.isfinite() & (dS.ndim == 1),
            "tau must be a number, or inf": tau > -inf}, gamma=gamma)
    return torch.sigmoid(-gamma * (dS - tau))  # (B,)  Eq. 14

def inpo_loss(dS, eta=1.0, gamma=3.0, tau=0.1, beta=1.0, prefactor="2beta", detach_gate=False):
    """dS (B,) -> INPO (B,) (Eq. 15). beta only scales it: eta is independent of it; lambda is eta / beta.
    detach_gate: no gradient through alpha, unlike Eq. 18; at dS = 0 the push is 2.8 times weaker."""
    _check({}, eta=eta, beta=beta)
    alpha = gate(dS, gamma, tau).detach() if detach_gate else gate(dS, gamma, tau)  # (B,)
    log_ratio = -eta / beta * dS  # (B,)  Eq. 12
    return alpha * npo_loss(log_ratio, beta, prefactor)  # (B,)  Eq. 13, 15, 17

def prior_loss(prediction, reference):
    """Prediction, reference (B, ...) -> mean squared difference (B,) (Eq. 16); a sum needs another lambda."""
    return score(prediction, reference, reduction="latent")  # (B,)  Eq. 16

def inpo_derivative(dS, eta=1.0, gamma=3.0, tau=0.1, beta=1.0, prefactor="2beta", detach_gate=False):
    """dS (B,) -> d inpo_loss / d dS (B,) in closed form (Eq. 19, whose b is eta)."""
    alpha = gate(dS, gamma, tau)  # (B,)
    by_gate = 0 if detach_gate else gamma * alpha * (1 - alpha) * F.logsigmoid(eta * dS)  # (B,)  Eq. 18, 19
    by_log = -eta * alpha * torch.sigmoid(-eta * dS)  # (B,)  Eq. 18, 19
    return _scale(beta, prefactor, eta=eta) * (by_gate + by_log)  # (B,)  Eq. 18, 19

def gradient_bound(eta, gamma, beta=1.0, prefactor="2beta"):
    """Bound on |inpo_derivative| if dS >= 0 (Eq. 20); below 0, log(1 + exp(-eta dS)) > log 2: it can fail."""
    return _scale(beta, prefactor, eta=eta, gamma=gamma) * (gamma * log(2) / 4 + eta)  # Eq. 20

def mask_to_latents(mask, height, width):
    """Pixels (B, 1, Y, X) -> cells (B, 1, height, width), bool; one pixel suffices, so thin parts survive."""
    pixels = mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == 1
    _check({"mask must be bool, (B, 1, Y, X)": pixels}, height=height, width=width)
    _check({"height, width must divide mask's": mask.shape[2] % height == 0 == mask.shape[3] % width})
    return F.adaptive_max_pool2d(mask.float(), (height, width)).bool()  # (B, 1, height, width)

def main(args):
    from matplotlib.figure import Figure  # here, so that `import inpo` stays cheap
    dS = torch.linspace(-3, 3, 601)  # (B,)
    panels = {
        "Gate (Eq. 14)": {f"gamma {g}, tau {t}": gate(dS, g, t) for g, t in ((1, .1), (3, .1), (3, .5))},
        "Loss (Eq. 15)": {"INPO": inpo_loss(dS), "no gate": inpo_loss(dS, tau=inf), "gradient ascent": -dS},
        "Derivative of the loss (Eq. 19)": {
            "INPO": inpo_derivative(dS), "no gate": inpo_derivative(dS, tau=inf), "gradient ascent": -dS**0,
            "INPO, gate detached": inpo_derivative(dS, detach_gate=True)},
        "|Derivative| / bound (Eq. 20), which fails above 1": {
            f"gamma {g}, eta {e}, tau {t}": inpo_derivative(dS, e, g, t).abs() / gradient_bound(e, g)
            for g, e, t in ((3, 1, .1), (3, 3, .1), (1, 20, 0))}}
    for ax, (title, curves) in zip(Figure((11, 8), layout="constrained").subplots(2, 2).flat, panels.items()):
        ax.plot(dS, torch.stack(list(curves.values()), 1), label=list(curves))
        ax.set(title=title, xlabel=r"$\Delta S = S_\theta - S_{\rm ref}$  (> 0: forgetting)")
        ax.grid(alpha=0.3)
        ax.legend()
    try:
        ax.figure.savefig(args.out, dpi=120, format="png")
    except (OSError, ValueError) as error:
        print(f"error: --out {args.out}: {error}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main(ARGS)
