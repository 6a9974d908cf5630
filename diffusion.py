"""Diffusion: the noise schedule, the training loss, the two samplers of CogVideoX, and guidance (SUGAR eq. 1 to 4).

Symbols: x_0 clean latents, x_t noisy latents, alpha_bar_t the cumulative product of the schedule, eps the noise;
    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps        v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0
The network predicts v. Guidance adds and subtracts predictions with weights that sum to one, and at a fixed x_t both eps
and x_0 are affine in v, so guiding v is the same as guiding the papers' eps.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from checkpoint import BadInput

T = 1000  # training steps; timesteps run 999..0


def alpha_bar_schedule(config: dict) -> Tensor:
    """alpha_bar [1000] in float64, from a checkpoint's scheduler_config.json.

    Scaled-linear betas, the signal-to-noise ratio divided by snr_shift_scale (3 for the 2b, 1 for the 5b), then shifted
    and scaled so that the last step is pure noise (zero terminal SNR).
    """
    wanted = {"num_train_timesteps": T, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction",
              "timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "set_alpha_to_one": True,
              "trained_betas": None}
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise BadInput(f"The scheduler's config has {name} = {config[name]!r}; CogVideoX has {value!r} and this code "
                           f"knows no other.")
    start, end = config.get("beta_start", 0.00085), config.get("beta_end", 0.012)
    betas = torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    shift = config.get("snr_shift_scale", 3.0)
    alpha_bar = alpha_bar / (shift + (1 - shift) * alpha_bar)
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def sampling_timesteps(steps: int) -> list[int]:
    """`steps` timesteps from 999 down, trailing spacing."""
    return (np.arange(T, 0, -T / steps)[:steps].round().astype(int) - 1).tolist()


# --- training ---------------------------------------------------------------------------------------------------------


def add_noise(x_0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t. x_0, eps: [B, ...]; alpha_bar: [B], already at each sample's t."""
    a = alpha_bar.to(x_0).view(-1, *[1] * (x_0.dim() - 1))
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def velocity(x_0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """v, the network's target. Shapes as in add_noise()."""
    a = alpha_bar.to(x_0).view(-1, *[1] * (x_0.dim() - 1))
    return a.sqrt() * eps - (1 - a).sqrt() * x_0


def v_prediction_loss(v: Tensor, x_0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Mean squared error of v: a scalar in float32. It equals the error of x_0 weighted by 1 / (1 - alpha_bar_t), which
    is how CogVideoX's own training writes it.
    """
    return (v.float() - velocity(x_0.float(), eps.float(), alpha_bar)).square().mean()


def training_loss(predict: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, eps: Tensor, t: Tensor,
                  alpha_bar: Tensor) -> Tensor:
    """The loss of a batch: noise it to t [B], let predict(x_t, t) say v, compare. alpha_bar: the whole schedule, [1000]."""
    return v_prediction_loss(predict(add_noise(x_0, eps, alpha_bar[t]), t), x_0, eps, alpha_bar[t])


# --- samplers ---------------------------------------------------------------------------------------------------------


def ddim_step(x_t: Tensor, x_0: Tensor, a_t: Tensor, a_s: Tensor) -> Tensor:
    """Deterministic DDIM from alpha_bar a_t to a_s > a_t: the noise that x_t and x_0 imply, at the lower level."""
    shrink = ((1 - a_s) / (1 - a_t)).sqrt()
    return shrink * x_t + (a_s.sqrt() - a_t.sqrt() * shrink) * x_0


def dpm_step(x_t: Tensor, x_0: Tensor, x_0_before: Tensor | None, a_t: Tensor, a_s: Tensor, a_before: Tensor,
             noise: Tensor) -> Tensor:
    """DPM-Solver++ (2M, SDE), CogVideoX's variant, from alpha_bar a_t to a_s.

    x_0_before and a_before are the previous step's; without them, or on the last step, first order is used. With the
    log-SNR lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)) and h = lambda_s - lambda_t:
        x_s = sigma_s / sigma_t e^-h x_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) noise.
    """
    decay = (a_t * (1 - a_s) / ((1 - a_t) * a_s)).sqrt()  # e^-h, finite also where lambda is not
    D = x_0
    if x_0_before is not None and a_s < 1:
        lambda_s, lambda_t, lambda_before = (0.5 * torch.log(a / (1 - a)) for a in (a_s, a_t, a_before))
        half = 0.5 * (lambda_s - lambda_t) / (lambda_t - lambda_before)  # 1 / 2r
        D = (1 + half) * x_0 - half * x_0_before
    return (((1 - a_s) / (1 - a_t)).sqrt() * decay * x_t + (1 - decay**2) * a_s.sqrt() * D
            + ((1 - a_s) * (1 - decay**2)).sqrt() * noise)


def denoise(predict: Callable[[Tensor, int], Tensor], x: Tensor, alpha_bar: Tensor, steps: int = 50,
            scheduler: str = "ddim", noise: Callable[[], Tensor] | None = None,
            progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
    """The sampling loop: from pure noise x to clean latents, both of any shape and in float32.

    predict(x_t, t) gives the guided v. `noise` draws the noise of a DPM step, shaped like x; DDIM needs none.
    """
    x_0_before = a_before = None
    for t in progress(sampling_timesteps(steps)):
        a_t, s = alpha_bar[t], t - T // steps  # where steps do not divide T not quite the next t: as in diffusers
        a_s = alpha_bar[s] if s >= 0 else torch.ones_like(a_t)
        v = predict(x, t).float()
        x_0 = a_t.sqrt() * x - (1 - a_t).sqrt() * v
        if scheduler == "ddim":
            x = ddim_step(x, x_0, a_t, a_s)
        else:
            x = dpm_step(x, x_0, x_0_before, a_t, a_s, a_before, noise())
        x_0_before, a_before = x_0, a_t
    return x


# --- guidance ---------------------------------------------------------------------------------------------------------
#
# Each takes a function `eps` that predicts under the conditions named by letters, and returns one prediction for each:
# D for DINO, C for CLIP, T for text, R for the reference (in all sets or in none). What is not named is null: eps("", "T", "DCT") gives the
# papers' eps(x_t, 0, 0, 0), eps(x_t, 0, 0, f_T5(c)) and eps(x_t, f_D(z), f_C(z), f_T5(c)), all in one batch.

Predictor = Callable[..., list[Tensor]]


def text_guidance(eps: Predictor, omega: float, image: str = "") -> Tensor:
    """Classifier-free guidance on the text. Switch keeps its reference in both branches: image="R"."""
    if omega == 1:
        return eps(image + "T")[0]
    null, text = eps(image, image + "T")
    return null + omega * (text - null)


def equation_1(eps: Predictor, omega_I: float, omega_T: float, image: str = "DC") -> Tensor:
    """SUGAR eq. 1: text guidance from the null prediction, identity added on top of the text. image="C" is eq. 3."""
    null, text, both = eps("", "T", image + "T")
    return null + omega_I * (both - text) + omega_T * (text - null)


def equation_2(eps: Predictor, omega_I: float, omega_T: float, image: str = "DC") -> Tensor:
    """SUGAR eq. 2: identity guidance from the null prediction, text added on top of identity. image="C" is eq. 4."""
    null, identity, both = eps("", image, image + "T")
    return null + omega_T * (both - identity) + omega_I * (identity - null)


def sugar_guidance(eps: Predictor, t: int, omega_I: float = 7.5, omega_T: float = 7.5, equation: int = 2,
                   t_bar: int = T, drop: str = "dino") -> Tensor:
    """SUGAR section 3.2, "Improved Sampling": for t_bar <= t <= T, early in sampling, part of the image is dropped.

    drop: "dino" (eq. 3 and 4), or Figure 9's "clip" and "both". The default t_bar = T never drops, as t is below T.
    """
    image = "DC" if t < t_bar else {"dino": "C", "clip": "D", "both": ""}[drop]
    return (equation_1 if equation == 1 else equation_2)(eps, omega_I, omega_T, image)
