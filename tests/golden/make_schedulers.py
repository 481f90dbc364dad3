"""Makes ``schedulers.npz``: trajectories of diffusers' schedulers on a closed-form denoiser.

    pip install torch diffusers
    python tests/golden/make_schedulers.py

Data are two values with a little spread in each pixel, whose best prediction is known
(``helpers.mixture_denoiser``). Images are 1 x 1, so that NCHW is NHWC:

``x``: the state at the start, float64 ``[B, 1, 1, 1]``. ``noise``: ``[40, B, 1, 1, 1]``.
``NAME/times``: the network times. ``NAME/x``: the state after each step, in the variance-preserving
scale (or the flow's). ``spacing/NAME``: times, or noise levels sigma / alpha, of ten steps.
"""

from pathlib import Path

import diffusers
import numpy as np
import torch

MEAN, STD = 0.7, 0.25
TRAIN = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
BATCH, LONGEST = 64, 40

generator = np.random.default_rng(0)
START = torch.tensor(generator.standard_normal((BATCH, 1, 1, 1)))
NOISE = torch.tensor(generator.standard_normal((LONGEST, BATCH, 1, 1, 1)))


def predict(x, alpha, sigma):
    """x0 and eps of the mixture."""
    total = (alpha * STD) ** 2 + sigma**2
    mean = MEAN * torch.tanh(alpha * MEAN * x / total)
    x0 = mean + alpha * STD**2 / total * (x - alpha * mean)
    return x0, sigma / total * (x - alpha * mean)


class Given:
    """Stands in for diffusers' generator of noise: one array after another."""

    def __init__(self):
        self.count = 0

    def __call__(self, *_, **__):
        self.count += 1
        return NOISE[self.count - 1]


def drive(scheduler, steps, space="vp", noise=None):
    """The network times of the steps, and the state after each of them."""
    scheduler.set_timesteps(steps)
    alpha_bar = getattr(scheduler, "alphas_cumprod", None)
    # k-diffusion's schedulers hold x / alpha.
    level = scheduler.sigmas[0].double() if space == "ve" else None
    x = START * torch.sqrt(1 + level**2) if space == "ve" else START.clone()
    times, states = [], []
    for i, t in enumerate(scheduler.timesteps):
        if space == "flow":
            sigma = t.double() / 1000
            x0, eps = predict(x, 1 - sigma, sigma)
            output = eps - x0
        else:
            alpha, sigma = (
                alpha_bar[int(t)].double() ** 0.5,
                (1 - alpha_bar[int(t)].double()) ** 0.5,
            )
            _, output = predict(scheduler.scale_model_input(x, t), alpha, sigma)
        more = {} if noise is None else {"variance_noise": NOISE[i]}
        x = scheduler.step(output, t, x, **more).prev_sample
        times.append(float(t))
        if space == "ve":
            level = scheduler.sigmas[i + 1].double()
            states.append(x / torch.sqrt(1 + level**2))
        else:
            states.append(x.clone())
    return np.array(times), torch.stack(states).numpy()


def patch(name):
    """Gives a module of diffusers our noise."""
    module = getattr(diffusers.schedulers, name)
    module.randn_tensor = Given()


def main():
    out = {"x": START.numpy(), "noise": NOISE.numpy()}
    d = diffusers

    def keep(name, result):
        times, states = result
        out[f"{name}/times"], out[f"{name}/x"] = times, states

    plain = dict(TRAIN, clip_sample=False, timestep_spacing="trailing")
    keep("ddim", drive(d.DDIMScheduler(**plain), 10))
    patch("scheduling_ddpm")
    keep("ddpm", drive(d.DDPMScheduler(**plain, variance_type="fixed_small"), 12))
    patch("scheduling_ddpm")
    # The last time is 0 here: at any other, diffusers adds noise to the clean image.
    large = dict(plain, variance_type="fixed_large", timestep_spacing="leading")
    keep("ddpm_large", drive(d.DDPMScheduler(**large), 10))
    spaced = dict(TRAIN, timestep_spacing="trailing")
    for steps in (10, 20):
        for order in (1, 2, 3):
            multistep = d.DPMSolverMultistepScheduler(**spaced, solver_order=order)
            keep(f"dpmpp_{order}_{steps}", drive(multistep, steps))
            keep(
                f"unipc_{order}_{steps}",
                drive(d.UniPCMultistepScheduler(**spaced, solver_order=order), steps),
            )
        for order in (1, 2):
            multistep = d.DPMSolverMultistepScheduler(
                **spaced, solver_order=order, algorithm_type="sde-dpmsolver++"
            )
            keep(f"dpmpp_sde_{order}_{steps}", drive(multistep, steps, noise=NOISE))
    keep("euler", drive(d.EulerDiscreteScheduler(**spaced), 12, space="ve"))
    patch("scheduling_euler_ancestral_discrete")
    keep("euler_ancestral", drive(d.EulerAncestralDiscreteScheduler(**spaced), 12, space="ve"))

    heun = d.HeunDiscreteScheduler(**spaced)
    times, states = drive(heun, 12, space="ve")
    # Two calls a step, but for the last: keep the state after the second.
    out["heun/times"] = np.append(times[0], times[1:-1:2][: len(times) // 2])
    ends = [*range(1, len(times) - 1, 2), len(times) - 1]
    out["heun/x"] = states[ends]

    pndm = d.PNDMScheduler(**TRAIN, skip_prk_steps=True, set_alpha_to_one=True,
                           timestep_spacing="leading")  # fmt: skip
    times, states = drive(pndm, 10)
    # The second call is the first step's far end.
    out["pndm/times"] = np.delete(times, 2)
    out["pndm/x"] = states[1:]

    patch("scheduling_lcm")
    keep("lcm", drive(d.LCMScheduler(**TRAIN, clip_sample=False, set_alpha_to_one=True), 4))
    keep("flow_euler", drive(d.FlowMatchEulerDiscreteScheduler(1000), 12, space="flow"))
    flow_heun = d.FlowMatchHeunDiscreteScheduler(1000)
    times, states = drive(flow_heun, 12, space="flow")
    ends = [*range(1, len(times) - 1, 2), len(times) - 1]
    out["flow_heun/times"] = times[[0, *range(1, len(times), 2)]][: len(ends)]
    out["flow_heun/x"] = states[ends]

    for name in ("leading", "trailing"):
        scheduler = d.DDIMScheduler(**{**plain, "timestep_spacing": name})
        scheduler.set_timesteps(10)
        out[f"spacing/{name}"] = scheduler.timesteps.numpy()
    offset = d.DDIMScheduler(**{**plain, "timestep_spacing": "leading"}, steps_offset=1)
    offset.set_timesteps(10)
    out["spacing/leading+1"] = offset.timesteps.numpy()
    for name, option in (("linspace", {}), ("karras", {"use_karras_sigmas": True}),
                         ("exponential", {"use_exponential_sigmas": True})):  # fmt: skip
        scheduler = d.EulerDiscreteScheduler(**TRAIN, timestep_spacing="linspace", **option)
        scheduler.set_timesteps(10)
        out[f"spacing/{name}"] = scheduler.sigmas.numpy()[:-1]
        out[f"spacing/{name}/times"] = scheduler.timesteps.numpy()
    lcm = d.LCMScheduler(**TRAIN)
    lcm.set_timesteps(4)
    out["spacing/lcm"] = lcm.timesteps.numpy()
    zero = d.DDIMScheduler(**TRAIN, rescale_betas_zero_snr=True)
    out["zero_snr/alphas_cumprod"] = zero.alphas_cumprod.numpy()
    np.savez_compressed(Path(__file__).parent / "schedulers.npz", **out)
    print(diffusers.__version__, {k: v.shape for k, v in out.items()})


if __name__ == "__main__":
    main()
