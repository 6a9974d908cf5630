"""The schedule, loss and samplers beside diffusers; guidance beside the papers' formulas."""

import diffusers.schedulers.scheduling_dpm_cogvideox as dpm_module
import pytest
import torch
from conftest import relative_error
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from checkpoint import BadInput
from diffusion import (add_noise, alpha_bar_schedule, denoise, equation_1, equation_2, sampling_timesteps, sugar_guidance,
                       text_guidance, v_prediction_loss, velocity)

OFFICIAL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
            "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
            "set_alpha_to_one": True, "clip_sample": False}


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_schedule_beside_diffusers(shift):
    config = {**OFFICIAL, "snr_shift_scale": shift}
    theirs = CogVideoXDDIMScheduler(**config)
    assert relative_error(alpha_bar_schedule(config), theirs.alphas_cumprod) < 1e-12
    for steps in (1, 7, 30, 50, 96, 999, 1000):
        theirs.set_timesteps(steps)
        assert sampling_timesteps(steps) == theirs.timesteps.tolist()[:steps]


def test_a_schedule_that_is_not_cogvideox_is_refused():
    with pytest.raises(BadInput, match="prediction_type = 'epsilon'"):
        alpha_bar_schedule({**OFFICIAL, "prediction_type": "epsilon"})


def test_noise_velocity_and_loss_beside_diffusers():
    scheduler, alpha_bar = CogVideoXDDIMScheduler(**OFFICIAL), alpha_bar_schedule({**OFFICIAL, "snr_shift_scale": 3.0})
    x_0, eps, v = torch.randn(3, 4, 3, 16, 6, 8)
    t = torch.tensor([0, 17, 500, 998])
    x_t = add_noise(x_0, eps, alpha_bar[t])
    assert relative_error(x_t, scheduler.add_noise(x_0, eps, t)) < 1e-6
    assert relative_error(velocity(x_0, eps, alpha_bar[t]), scheduler.get_velocity(x_0, eps, t)) < 1e-6
    # CogVideoX's own training: the error of x_0, which get_velocity() happens to give from v and x_t, weighted by
    # 1 / (1 - alpha_bar).
    predicted_x_0 = scheduler.get_velocity(v, x_t, t)
    weight = (1 / (1 - alpha_bar[t])).float()[:, None, None, None, None]
    official = (weight * (predicted_x_0 - x_0) ** 2).mean()
    assert v_prediction_loss(v, x_0, eps, alpha_bar[t]).item() == pytest.approx(official.item(), rel=1e-4)


def network(x, t):
    """Something that behaves like a network: smooth in x, different at each t."""
    return torch.tanh(0.7 * x.roll(1, -1) + 0.3 * x.flip(-2)) * (0.5 + t / 2000) - 0.2 * x


def oracle(scheduler, x, noises, monkeypatch):
    """diffusers' loop, as its pipeline runs it, in the dtype of x."""
    scheduler.set_timesteps(len(noises))
    old = None
    for i, t in enumerate(scheduler.timesteps):
        v = network(x, int(t))
        if isinstance(scheduler, CogVideoXDDIMScheduler):
            x = scheduler.step(v, int(t), x, return_dict=False)[0]
        else:
            monkeypatch.setattr(dpm_module, "randn_tensor", lambda *_, **__: noises[i].to(x.dtype))
            before = int(scheduler.timesteps[i - 1]) if i > 0 else None
            x, old = scheduler.step(v, old, int(t), before, x, return_dict=False)
    return x


@pytest.mark.parametrize("name,kind", [("ddim", CogVideoXDDIMScheduler), ("dpm", CogVideoXDPMScheduler)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [50, 30])
def test_trajectories_beside_diffusers(name, kind, shift, steps, monkeypatch):
    config = {**OFFICIAL, "snr_shift_scale": shift}
    x, noises = torch.randn(2, 3, 16, 6, 8), torch.randn(steps, 2, 3, 16, 6, 8)
    single, double = (oracle(kind(**config), start, noises, monkeypatch) for start in (x, x.double()))
    draws = iter(noises)
    ours = denoise(network, x, alpha_bar_schedule(config), steps, name, noise=lambda: next(draws))
    assert relative_error(ours, single) < 10 * relative_error(single, double)


# --- guidance ---------------------------------------------------------------------------------------------------------


class Eps:
    """eps(x_t, D or null, C or null, T or null): a random prediction for each set of conditions, and what was asked."""

    def __init__(self):
        self.table, self.asked = {}, []

    def __getitem__(self, conditions):
        return self.table.setdefault(conditions, torch.randn(2, 5, dtype=torch.float64))

    def __call__(self, *sets):
        self.asked.append(sets)
        return [self[conditions] for conditions in sets]


def test_equation_1_and_3_as_printed():
    eps, w_I, w_T = Eps(), *torch.rand(2, dtype=torch.float64).mul(10)
    one = eps[""] + w_I * (eps["DCT"] - eps["T"]) + w_T * (eps["T"] - eps[""])
    three = eps[""] + w_I * (eps["CT"] - eps["T"]) + w_T * (eps["T"] - eps[""])
    assert torch.allclose(equation_1(eps, w_I, w_T), one)
    assert torch.allclose(equation_1(eps, w_I, w_T, image="C"), three)


def test_equation_2_and_4_as_printed():
    eps, w_I, w_T = Eps(), *torch.rand(2, dtype=torch.float64).mul(10)
    two = eps[""] + w_T * (eps["DCT"] - eps["DC"]) + w_I * (eps["DC"] - eps[""])
    four = eps[""] + w_T * (eps["CT"] - eps["C"]) + w_I * (eps["C"] - eps[""])
    assert torch.allclose(equation_2(eps, w_I, w_T), two)
    assert torch.allclose(equation_2(eps, w_I, w_T, image="C"), four)


def test_text_guidance_keeps_switchs_reference_in_both_branches():
    eps = Eps()
    assert torch.allclose(text_guidance(eps, 6.0, image="R"), eps["R"] + 6 * (eps["RT"] - eps["R"]))
    assert torch.allclose(text_guidance(eps, 6.0), eps[""] + 6 * (eps["T"] - eps[""]))
    eps.asked.clear()
    assert torch.equal(text_guidance(eps, 1.0, image="R"), eps["RT"]) and eps.asked == [("RT",)]


@pytest.mark.parametrize("equation", [equation_1, equation_2])
@pytest.mark.parametrize("image", ["DC", "C", "D", ""])
def test_with_both_scales_one_guidance_is_the_conditional_prediction(equation, image):
    eps = Eps()
    assert torch.allclose(equation(eps, 1.0, 1.0, image), eps[image + "T"])


@pytest.mark.parametrize("drop,left", [("dino", "C"), ("clip", "D"), ("both", "")])
@pytest.mark.parametrize("equation,function", [(1, equation_1), (2, equation_2)])
def test_the_image_is_dropped_from_t_bar_up(drop, left, equation, function):
    eps = Eps()
    for t, image in ((999, left), (900, left), (899, "DC"), (0, "DC")):
        guided = sugar_guidance(eps, t, 3.0, 7.5, equation, t_bar=900, drop=drop)
        assert torch.equal(guided, function(eps, 3.0, 7.5, image))


def test_the_papers_default_never_drops():
    eps = Eps()
    for t in sampling_timesteps(50):
        sugar_guidance(eps, t)
    assert set(eps.asked) == {("", "DC", "DCT")}
