"""Our stages on the inputs of a trace: each fed with the reference's own input, and each running
freely from the prompt and the picture. They are the programs that make videos."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cogi2v_jax.devices.sharding import put, split, to_host
from cogi2v_jax.pipeline import Job, decode_frames, encode_pixels, prepare
from cogi2v_jax.request import Noise, Request
from cogi2v_jax.sampling import stages
from cogi2v_jax.sampling.noise import draw_as_torch
from cogi2v_jax.sampling.programs import Session
from cogi2v_jax.sampling.schedule import Tableau, draws, guide, step
from cogi2v_jax.weights.checkpoint import Models

from .trace import Trace

FED, FREE = "fed", "free"


class Ours(NamedTuple):
    """A result of ours, under the name of the reference's tensor in `trace.LAYOUTS`."""

    stage: str
    mode: str
    value: Any
    step: int | None = None


class Conditions(NamedTuple):
    """What the loop is conditioned on, on the devices."""

    text: Float[Any, "pairs p d"]
    image: Float[Any, "b t h w c"]


@dataclass(frozen=True)
class Replay:
    models: Models
    trace: Trace

    def results(self) -> Iterator[Ours]:
        """All results, in the order of the data. Raises ValueError for a trace of another
        checkpoint."""
        job, run = self.job, self.run
        yield Ours("ids", FED, job.ids)
        yield Ours("pixels", FED, job.pixels)
        yield Ours("text", FED, to_host(run(stages.encode_text, self.trace.read("ids"))))
        yield Ours("text", FREE, to_host(self.free.text))
        yield from self._image()
        yield from self._noise()
        yield Ours("timesteps", FED, job.tableau.timestep)
        yield Ours("guidance", FED, job.tableau.guidance)
        yield from self._steps()
        last = self.trace.read("latents", self.trace.steps - 1)
        for mode, latents in ((FED, last), (FREE, self.latents[-1])):
            video = to_host(decode_frames(run, latents[:, job.shape.padding :]))
            yield Ours("video", mode, np.clip(video.astype(np.float32) * 0.5 + 0.5, 0, 1))

    def _image(self) -> Iterator[Ours]:
        noise, scale = self.trace.read("posterior_noise"), self.job.image_scale

        def draw(moments: Any, noise: Any) -> Float[np.ndarray, "b t h w c"]:
            moments = self._put(moments, "video", self.models.dtype)
            rest = noise, self.job.keys, scale
            return to_host(run(stages.draw_image, moments, *rest, frames=self.job.shape.frames))

        run, image = self.run, to_host(self.free.image)
        yield Ours("moments", FED, to_host(encode_pixels(run, self.trace.read("pixels"))))
        yield Ours("moments", FREE, to_host(self.moments))
        yield Ours("posterior", FED, draw(self.trace.read("moments"), noise)[:, :1] / scale)
        yield Ours("posterior", FREE, image[:, :1] / scale)
        # A posterior without width around the reference's own sample.
        sample = self.trace.read("posterior")
        exact = np.concatenate([sample, np.full_like(sample, -np.inf)], axis=-1)
        yield Ours("image", FED, draw(exact, np.zeros_like(noise)))
        yield Ours("image", FREE, image)

    def _noise(self) -> Iterator[Ours]:
        """What `--noise torch` draws for the seed of the trace."""
        scheduler, steps = self.job.request.scheduler, self.trace.steps
        counts = draws(self.models.config.scheduler, scheduler, steps)
        seed, shape = self.trace.settings["seed"], self.job.shape[:4]
        posterior, initial, drawn = draw_as_torch([seed], self.models.dtype, shape, counts)
        yield Ours("posterior_noise", FED, posterior)
        yield Ours("initial", FED, initial)
        for index, noise in enumerate(() if drawn is None else drawn):
            yield Ours("noise", FED, noise, index)

    def _steps(self) -> Iterator[Ours]:
        """The network's predictions, their guidance and the steps."""
        text = self._put(self.trace.read("text"), "batch", self.models.dtype)
        fed = Conditions(text, self._put(self.trace.read("image"), "video"))
        x = self.trace.read("initial")
        for index in range(self.trace.steps):
            if self.trace.has("guided", index):
                yield from self._predictions(FED, x, index, fed)
                yield from self._predictions(FREE, self.latents[index], index, self.free)
                yield Ours("latents", FED, self._stepped(x, index), index)
            yield Ours("latents", FREE, self.latents[index + 1], index)
            x = self.trace.read("latents", index)

    def _predictions(self, mode: str, x: Any, index: int, given: Conditions) -> Iterator[Ours]:
        names = [name for name in ("unconditional", "conditional") if self.trace.has(name, index)]
        pair = {name: self._predict(x, index, given, name == "conditional") for name in names}
        yield from (Ours(name, mode, v, index) for name, v in pair.items())
        if mode == FED:
            pair = {name: jnp.asarray(self.trace.read(name, index)) for name in names}
        guided = guide(self._row(index), **pair) if len(pair) > 1 else pair["conditional"]
        yield Ours("guided", mode, guided, index)

    def _predict(
        self, x: Any, index: int, given: Conditions, conditional: bool
    ) -> Float[Array, "b t h w c"]:
        """One prediction of a pair, from the denoising loop itself: with guidance 0 or 1, and a
        schedule whose step returns v."""
        tableau = self.job.tableau
        zeros, ones = np.zeros_like(tableau.x0), np.ones_like(tableau.x0)
        returns_v = Tableau(
            timestep=tableau.timestep,
            guidance=float(conditional) * ones,
            image_guidance=ones,
            low_pass=zeros,
            alpha=zeros,
            sigma=-ones,
            x=zeros,
            x0=ones,
            past=np.zeros_like(tableau.past),
            noise=zeros,
            keep_x=zeros,
            keep_x0=zeros,
        )
        x = self._put(x, "video")
        return jnp.asarray(to_host(self._denoise(stages.State(x, (x,)), index, returns_v, given).x))

    def _denoise(
        self, state: stages.State, index: int, tableau: Tableau, given: Conditions
    ) -> stages.State:
        rows = np.int32(index), tableau, self.modulation, self.job.noise_of(index, 1)
        inputs = self.job.keys, given.image, given.text, self.positions
        return self.run(stages.denoise, state, *rows, *inputs, steps=1)

    def _stepped(self, x: Any, index: int) -> Float[Array, "b t h w c"]:
        """The latents after a step of ours with the reference's prediction."""
        given = [
            self.trace.read(name, index) if self.trace.has(name, index) else 0 * x
            for name in ("guided", "x0_prev", "noise")
        ]
        x, guided, x0_prev, noise = map(jnp.asarray, (x, *given))
        return step(self._row(index), x, guided, (x0_prev,), noise)[0]

    def _row(self, index: int) -> Tableau:
        return Tableau(*(column[index] for column in self.job.tableau))

    @cached_property
    def job(self) -> Job:
        """The request of the trace, with the reference's own noise."""
        request = Request(self.trace.read("picture"), **self.trace.settings)
        drawn = None
        if self.trace.has("noise", 0):
            drawn = np.stack([self.trace.read("noise", i) for i in range(self.trace.steps)])
        noise = Noise(self.trace.read("posterior_noise"), self.trace.read("initial"), drawn)
        return prepare(self.models, request, noise)

    @cached_property
    def run(self) -> Session:
        return Session(self.models, self.job)

    @cached_property
    def moments(self) -> Float[Any, "b 1 h w c2"]:
        return encode_pixels(self.run, self.job.pixels)

    @cached_property
    def modulation(self) -> Any:
        return self.run(stages.modulate, *self.job.time)

    @cached_property
    def positions(self) -> Any:
        return self.job.positions()

    @cached_property
    def free(self) -> Conditions:
        """From the prompt and the picture."""
        frames, drawn = self.job.shape.frames, (self.moments, *self.job.image_noise)
        image = self.run(stages.draw_image, *drawn, frames=frames)
        return Conditions(self.run(stages.encode_text, self.job.ids), image)

    @cached_property
    def latents(self) -> list[Float[np.ndarray, "b t h w c"]]:
        """Running freely: the initial noise, then the latents after every step, with padding."""
        start = self.job.noise.initial, self.job.keys
        state = self.run(stages.draw_start, *start, shape=tuple(self.job.shape[:4]))
        latents = [to_host(state.x)]
        for index in range(self.trace.steps):
            state = self._denoise(state, index, self.job.tableau, self.free)
            latents.append(to_host(state.x))
        return latents

    def _put(self, value: Any, axis: str, dtype: Any = np.float32) -> Any:
        return put(np.asarray(value, dtype), split(self.job.mesh, axis))
