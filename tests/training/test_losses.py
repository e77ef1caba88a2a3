"""The loss and its gradients against the official trainer's formula on diffusers' network."""

import re
from collections.abc import Iterator
from typing import Any

import diffusers.models.embeddings
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import twins
from cogi2v_convert.sources.matching import TABLES
from cogi2v_convert.tables.rules import expand
from diffusers import CogVideoXDPMScheduler
from flax import nnx
from peft import LoraConfig
from tolerances import relative_error

from cogi2v_jax.config import TransformerConfig
from cogi2v_jax.models.positions import positions, sinusoid
from cogi2v_jax.sampling.programs import OFS
from cogi2v_jax.training.adapters import add_lora
from cogi2v_jax.training.losses import Levels, Noised, v_error
from cogi2v_jax.weights.pieces import leaf_names

TIMESTEPS = torch.tensor([999, 137])  # of two videos
SIZES = {"1.0": (5, 6, 10), "1.5": (4, 6, 10)}  # latent frames, rows, columns
# Relative L2 error of a gradient: float32 sums in another order, and float64's.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """float64 everywhere. The reference rotates in float32 whatever its dtype, and so do our
    tables."""

    def rotate(x: torch.Tensor, angles: Any, **_: Any) -> torch.Tensor:
        cos, sin = (table[None, None].to(x.dtype) for table in angles)
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack([-imaginary, real], dim=-1).flatten(3) * sin

    monkeypatch.setattr(diffusers.models.embeddings, "apply_rotary_emb", rotate)
    with jax.enable_x64(True):
        yield


def in_dtype(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    return torch.nn.Module.to(module, dtype)  # diffusers' own warns


class Reference:
    """Diffusers' network, a batch for it, and the official loss of both."""

    def __init__(self, family: str, dtype: torch.dtype, lora: LoraConfig | None = None):
        torch.manual_seed(0)
        module = in_dtype(twins.transformer(**twins.FAMILIES[family]), dtype)
        settings, (t, h, w) = module.config, SIZES[family]
        if lora is not None:
            module.requires_grad_(False)
            module.add_adapter(lora)
            for name, parameter in module.named_parameters():
                if "lora_" in name:  # B is zero at first, and with it the gradient of A
                    parameter.data = torch.randn(parameter.shape, dtype=dtype) * 0.1
        # The last bits of its own sinusoids differ from ours.
        width = settings.num_attention_heads * settings.attention_head_dim
        module.time_proj.forward = lambda steps: torch.tensor(sinusoid(steps.numpy(), width))
        if ofs := settings.ofs_embed_dim:
            module.ofs_proj.forward = lambda value: torch.tensor(sinusoid(value.numpy(), ofs))
        shape = len(TIMESTEPS), t, settings.out_channels, h, w
        self.latents, self.noise, self.image = (torch.randn(shape).to(dtype) for _ in range(3))
        self.image[:, 1:] = 0
        text = len(TIMESTEPS), settings.max_text_seq_length, settings.text_embed_dim
        self.text = torch.randn(text).to(dtype)
        self.scheduler = CogVideoXDPMScheduler(**twins.SCHEDULER)
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.double()
        self.module, self.family = module, family

    def loss(self) -> torch.Tensor:
        """The error of x0 with the weight 1 / (1 - alpha_bar), as the official trainer has it."""
        module, scheduler = self.module, self.scheduler
        config = TransformerConfig.from_json(dict(module.config), "transformer")
        where = positions(config, SIZES[self.family])
        rows = np.stack([where.cos, where.sin])[:, module.config.max_text_seq_length :]
        rotary = tuple(torch.tensor(rows).repeat_interleave(2, dim=-1))
        noisy = scheduler.add_noise(self.latents, self.noise, TIMESTEPS)
        v = module(
            torch.cat([noisy, self.image], dim=2),
            self.text,
            TIMESTEPS,
            ofs=torch.full((1,), OFS) if module.config.ofs_embed_dim else None,
            image_rotary_emb=rotary,  # the last bits of its own differ too
            return_dict=False,
        )[0]
        x0 = scheduler.get_velocity(v, noisy, TIMESTEPS)
        weights = 1 / (1 - scheduler.alphas_cumprod[TIMESTEPS]).to(x0.dtype)
        errors = weights[:, None, None, None, None] * (x0 - self.latents) ** 2
        return errors.flatten(1).mean(dim=1).mean()

    def given(self) -> Noised:
        """The same batch for us."""
        arrays = (twins.frames_last_exactly(x) for x in (self.latents, self.noise, self.image))
        latents, noise, image = map(jnp.asarray, arrays)
        timestep, text = jnp.asarray(TIMESTEPS.numpy()), jnp.asarray(self.text.numpy())
        return Noised(latents, noise, timestep, image, text)


def our_loss(network: nnx.Module, config: TransformerConfig, reference: Reference) -> Any:
    """(a function of the network's state that returns the loss, the state)."""
    alphas = reference.scheduler.alphas_cumprod.numpy()
    ofs = sinusoid(np.array([OFS]), config.ofs_embed_dim) if config.ofs_embed_dim else None
    dtype = network.out.kernel.dtype
    roots = (np.sqrt(x).astype(dtype) for x in (alphas, 1 - alphas))
    time = sinusoid(np.arange(len(alphas)), config.width)
    table = jax.tree.map(jnp.asarray, Levels(*roots, time, ofs))
    where = twins.positions_of(config, SIZES[reference.family])
    layout = twins.one_device(len(where.is_text))
    graph, state = nnx.split(network)
    given = reference.given()

    def loss(state: Any) -> Any:
        merged = nnx.merge(graph, state)
        return v_error(merged, given, table, where, dtype=dtype, layout=layout)

    return loss, state


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64]
)
def test_loss_and_the_gradient_of_every_leaf_are_those_of_the_official_formula(
    family: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if dtype == torch.float64:
        request.getfixturevalue("double")
    reference = Reference(family, dtype)
    theirs = reference.loss()
    theirs.backward()
    network, config = twins.twin("transformer", reference.module, str(dtype).split(".")[1])
    loss, state = our_loss(network, config, reference)
    ours, grads = jax.jit(jax.value_and_grad(loss))(state)
    assert ours == pytest.approx(theirs.item(), rel=TOLERANCE[dtype])
    leaves = leaf_names(nnx.merge(nnx.split(network)[0], grads))
    errors, expected = {}, dict(reference.module.named_parameters())
    for name, (rule, layer) in expand(TABLES["transformer"](config), config.num_layers).items():
        if name in expected:  # the learned table is not trained by the reference
            leaf = leaves[rule.flax]
            leaf = leaf if layer is None else leaf[layer]
            errors[name] = relative_error(leaf, rule.to_flax(expected[name].grad.numpy()))
    assert len(errors) == len(expected)
    assert max(errors.values()) <= TOLERANCE[dtype], max(errors, key=lambda name: errors[name])


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64]
)
def test_the_gradient_of_every_lora_factor_is_pefts(
    family: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if dtype == torch.float64:
        request.getfixturevalue("double")
    modules = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=modules)
    reference = Reference(family, dtype, lora)
    theirs = reference.loss()
    theirs.backward()
    parameters = dict(reference.module.named_parameters())
    plain = in_dtype(twins.transformer(**twins.FAMILIES[family]), dtype)  # of the same seed
    network, config = twins.twin("transformer", plain, str(dtype).split(".")[1])
    add_lora(network, ("attention", "mlp"), rank=4, alpha=6.0)
    targets = expand(TABLES["transformer"](config), config.num_layers)
    values: dict[str, Any] = {
        name: np.zeros(leaf.shape) if ".lora." in name else np.array(leaf)
        for name, leaf in leaf_names(network).items()
    }
    expected = {}
    for name in parameters:
        if found := re.fullmatch(r"(.+)\.lora_A\.default\.weight", name):
            down, up = parameters[name], parameters[name.replace("lora_A", "lora_B")]
            rule, layer = targets[f"{found[1]}.weight"]
            pairs = zip(
                ("down", "up"), rule.factors(down.data.numpy(), up.data.numpy()), strict=True
            )
            grads = rule.factors(down.grad.numpy(), up.grad.numpy())
            for (side, value), grad in zip(pairs, grads, strict=True):
                leaf = f"{rule.flax.removesuffix('.kernel')}.lora.{side}"
                values[leaf] = values[leaf].astype(value.dtype)
                values[leaf][layer] = value
                expected[leaf, layer] = grad
    graph, state = nnx.split(network)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, str(dtype).split(".")[1]), state)
    network = twins.filled(nnx.merge(graph, state), lambda name, _: values[name])
    loss, state = our_loss(network, config, reference)
    ours, grads = jax.jit(jax.value_and_grad(loss))(state)
    assert ours == pytest.approx(theirs.item(), rel=TOLERANCE[dtype])
    leaves = leaf_names(nnx.merge(nnx.split(network)[0], grads))
    errors = {at: relative_error(leaves[at[0]][at[1]], grad) for at, grad in expected.items()}
    assert len(errors) == 2 * len(modules) * config.num_layers
    assert max(errors.values()) <= TOLERANCE[dtype], max(errors, key=lambda at: errors[at])
