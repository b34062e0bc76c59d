"""The U-Net against diffusers, PyTorch's attention and what its layers promise."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_core import unet
from ddpm_core.interchange import our_name
from ddpm_core.unet import (
    UNET_CONFIGS,
    Downsample,
    Dropout,
    GroupNorm,
    LeanNormSiLU,
    ResidualBlock,
    SelfAttention,
    UNet,
    UNetConfig,
    Upsample,
    attend,
    contracting_path,
    expanding_path,
    norm_silu,
    skip_widths,
    timestep_embedding,
)

TINY = UNetConfig(
    image_size=8,
    in_channels=2,
    out_channels=3,
    channels=8,
    channel_mult=(1, 2),
    blocks=1,
    attention=(4,),
    groups=4,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Fill every parameter, also those that start at zero or one."""
    g = generator(seed)
    for name, p in model.named_parameters():
        draw = torch.randn(p.shape, generator=g, dtype=p.dtype)
        if p.ndim > 1:
            p.data = draw / p[0].numel() ** 0.5
        else:
            p.data = 0.2 * draw + (1.0 if "norm" in name and "weight" in name else 0.0)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def meta(config: UNetConfig) -> UNet:
    with torch.device("meta"):
        return UNet(config)


# ---------------------------------------------------------------- the second opinion


def reference(config: UNetConfig) -> UNet2DModel:
    """The same network built by diffusers."""
    down = tuple(
        "AttnDownBlock2D" if side in config.attention else "DownBlock2D"
        for side in config.sides
    )
    up = tuple(name.replace("Down", "Up") for name in reversed(down))
    heads = None if config.heads == 1 else config.widths[-1] // config.heads
    return UNet2DModel(
        sample_size=config.image_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.widths,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=config.blocks,
        attention_head_dim=heads,
        norm_num_groups=config.groups,
        norm_eps=1e-6,
        freq_shift=1,
        flip_sin_to_cos=False,
        downsample_padding=0,
        dropout=config.dropout,
    )


def both(config: UNetConfig, dtype: torch.dtype) -> tuple[UNet, UNet2DModel]:
    """Ours and diffusers' network with the same random weights."""
    with torch.device("meta"):
        theirs = reference(config)
        ours = UNet(config)
    theirs = theirs.to_empty(device="cpu").to(dtype).eval()
    randomise(theirs)
    state = {str(our_name(name)): p for name, p in theirs.state_dict().items()}
    ours.load_state_dict(state, strict=True, assign=True)
    return ours.eval(), theirs


def difference(config: UNetConfig, dtype: torch.dtype, batch: int) -> float:
    """Largest difference of the two outputs, over the spread of the output."""
    ours, theirs = both(config, dtype)
    shape = (batch, config.in_channels, config.image_size, config.image_size)
    x = torch.randn(shape, generator=generator(1), dtype=dtype)
    t = torch.tensor([1, 2, 500, 999, 1000])[-batch:]
    with torch.no_grad():
        y = ours(x, t)
        expected = theirs(x, t - 1).sample
    assert expected.std() > 0.1
    return float((y - expected).abs().max() / expected.std())


def test_counts_are_the_papers() -> None:
    assert parameters(meta(UNET_CONFIGS["cifar10"])) == 35_746_307
    assert parameters(meta(UNET_CONFIGS["lsun256"])) == 113_673_219


@pytest.mark.parametrize("name", ["digits", "fashion32"])
def test_counts_agree_with_diffusers(name: str) -> None:
    config = UNET_CONFIGS[name]
    with torch.device("meta"):
        expected = parameters(reference(config))
    assert parameters(meta(config)) == expected


def test_cifar10_agrees_with_diffusers() -> None:
    config = UNET_CONFIGS["cifar10"]
    assert difference(config, torch.float64, batch=1) < 1e-9
    assert difference(config, torch.float32, batch=2) < 1e-5


def test_lsun256_agrees_with_diffusers() -> None:
    """At a quarter of the side: the weights do not depend on it."""
    config = replace(UNET_CONFIGS["lsun256"], image_size=64, attention=(4,))
    assert parameters(meta(config)) == 113_673_219
    assert difference(config, torch.float32, batch=2) < 1e-5


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("attention", [(), (8,), (4, 8)])
def test_small_nets_agree_with_diffusers(heads: int, attention: tuple[int]) -> None:
    mult = (1, 1) if heads > 1 else (1, 2)  # diffusers fixes channels a head, not heads
    config = replace(TINY, heads=heads, attention=attention, channel_mult=mult)
    assert difference(config, torch.float64, batch=5) < 1e-9


# ------------------------------------------------------------------------- embedding


def test_embedding_agrees_with_diffusers_bit_for_bit() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.arange(1000)
    for dim in (4, 32, 128):
        expected = get_timestep_embedding(t, dim, downscale_freq_shift=1)
        assert torch.equal(timestep_embedding(t, dim), expected)


@given(
    half=st.integers(2, 64),
    t=st.floats(0, 1000),
    k=st.floats(-50, 50),
    period=st.floats(10, 1e5),
)
def test_embedding_of_a_shift_is_a_rotation(
    half: int, t: float, k: float, period: float
) -> None:
    e = timestep_embedding(
        torch.tensor([t, t + k, k, 0.0], dtype=torch.float64), 2 * half, period
    )
    z = torch.complex(e[:, half:], e[:, :half])  # cos + i sin
    torch.testing.assert_close(z[1], z[0] * z[2], atol=1e-9, rtol=0)
    torch.testing.assert_close(e[0] @ e[1], e[3] @ e[2], atol=1e-8, rtol=0)


def test_embedding_runs_from_1_to_the_period() -> None:
    t = torch.tensor([1.0], dtype=torch.float64)
    e = timestep_embedding(t, 128)[0]
    angles = torch.atan2(e[:64], e[64:])
    assert float(angles[0]) == pytest.approx(1.0, abs=1e-12)
    assert float(angles[-1]) == pytest.approx(1e-4, rel=1e-9)  # half: 1.15e-4
    ratio = angles[1:] / angles[:-1]
    torch.testing.assert_close(ratio, ratio[:1].expand(63), rtol=1e-9, atol=0)


def test_embedding_refuses() -> None:
    t = torch.tensor([1])
    with pytest.raises(ValueError, match="dim = 5"):
        timestep_embedding(t, 5)
    with pytest.raises(ValueError, match="dim"):
        timestep_embedding(t, 2)
    with pytest.raises(ValueError, match="t must have 1 dim"):
        timestep_embedding(t[None], 4)
    with pytest.raises(ValueError, match="max_period"):
        timestep_embedding(t, 4, max_period=0.5)


# ------------------------------------------------------------------------- attention


def attention_by_hand(layer: SelfAttention, x: Tensor) -> Tensor:
    """Softmax of scaled products, by einsum, place by place."""
    b, c, height, width = x.shape
    tokens = layer.norm(x).reshape(b, c, height * width)

    def project(linear: nn.Module) -> Tensor:
        assert isinstance(linear, nn.Linear)
        y = torch.einsum("bcn,dc->bnd", tokens, linear.weight) + linear.bias
        return y.reshape(b, height * width, layer.heads, c // layer.heads)

    q, k, v = project(layer.query), project(layer.key), project(layer.value)
    score = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(c // layer.heads)
    weight = score.exp() / score.exp().sum(-1, keepdim=True)
    gathered = torch.einsum("bhij,bjhd->bihd", weight, v).reshape(b, -1, c)
    y: Tensor = layer.out(gathered)
    return x + y.transpose(1, 2).reshape(x.shape)


def attentions() -> Iterator[tuple[str, SelfAttention, int]]:
    """Every attention of every small configuration."""
    for name in ("digits", "fashion28", "fashion32"):
        model = UNet(UNET_CONFIGS[name])
        for place, layer in model.named_modules():
            if isinstance(layer, SelfAttention):
                yield f"{name}.{place}", layer, layer.query.in_features


def test_every_attention_is_softmax_of_scaled_products() -> None:
    found = 0
    for place, layer, channels in attentions():
        randomise(layer, seed=found)
        x = torch.randn(2, channels, 3, 5, generator=generator(found))
        expected = attention_by_hand(layer, x)
        torch.testing.assert_close(layer(x), expected, atol=2e-5, rtol=0, msg=place)
        found += 1
    small = [UNET_CONFIGS[name] for name in ("digits", "fashion28", "fashion32")]
    assert found == sum(len(c.attention) * (2 * c.blocks + 1) + 1 for c in small)


@given(
    heads=st.sampled_from([1, 2, 3]),
    channels=st.sampled_from([6, 12]),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_attention_by_hand_and_permutations(
    heads: int, channels: int, height: int, width: int, seed: int
) -> None:
    g = generator(seed)
    layer = SelfAttention(channels, heads=heads, groups=2).double()
    randomise(layer, seed)
    x = torch.randn(2, channels, height, width, generator=g, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y, attention_by_hand(layer, x), atol=1e-10, rtol=0)
    order = torch.randperm(height * width, generator=g)
    shuffled = layer(x.flatten(2)[:, :, order].reshape(x.shape))
    expected = y.flatten(2)[:, :, order].reshape(x.shape)
    torch.testing.assert_close(shuffled, expected, atol=1e-10, rtol=0)


def test_attention_uses_the_scale_of_torch() -> None:
    layer = SelfAttention(8, groups=4).double()
    randomise(layer)
    x = torch.randn(1, 8, 2, 3, generator=generator(), dtype=torch.float64)
    tokens = layer.norm(x).flatten(2).transpose(1, 2)
    gathered = F.scaled_dot_product_attention(
        layer.query(tokens), layer.key(tokens), layer.value(tokens)
    )
    expected = x + layer.out(gathered).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected)


# ---------------------------------------------------------------------------- layers


def test_residual_block_agrees_with_diffusers() -> None:
    from diffusers.models.resnet import ResnetBlock2D

    for width in (8, 16):
        theirs = ResnetBlock2D(
            in_channels=8, out_channels=width, temb_channels=32, groups=4, eps=1e-6
        ).double()
        randomise(theirs)
        ours = ResidualBlock(8, width, 32, groups=4).double()
        there, here = "mid_block.resnets.0.", "middle_1.block."
        ours.load_state_dict(
            {
                str(our_name(there + n)).removeprefix(here): p
                for n, p in theirs.state_dict().items()
            },
            strict=True,
        )
        x = torch.randn(2, 8, 5, 6, generator=generator(), dtype=torch.float64)
        e = torch.randn(2, 32, generator=generator(1), dtype=torch.float64)
        torch.testing.assert_close(ours(x, e), theirs(x, e), atol=1e-12, rtol=0)


def test_a_new_block_is_its_shortcut() -> None:
    x = torch.randn(2, 8, 4, 4, generator=generator())
    e = torch.randn(2, 16, generator=generator())
    same, wider = ResidualBlock(8, 8, 16, groups=4), ResidualBlock(8, 12, 16, groups=4)
    assert torch.equal(same(x, e), x)
    assert torch.equal(wider(x, e), wider.shortcut(x))
    assert torch.equal(SelfAttention(8, groups=4)(x), x)


def test_dropout_acts_in_training_only() -> None:
    block = ResidualBlock(8, 8, 16, dropout=0.5, groups=4)
    randomise(block)
    x, e = torch.randn(2, 8, 4, 4, generator=generator()), torch.zeros(2, 16)
    assert not torch.equal(block(x, e), block(x, e))
    block.eval()
    assert torch.equal(block(x, e), block(x, e))


@given(
    p=st.floats(0, 1),
    shape=st.tuples(*[st.integers(1, 5)] * 4),
    kind=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    last=st.booleans(),
)
def test_dropout_keeps_or_drops_and_scales(
    p: float, shape: tuple[int, ...], kind: torch.dtype, last: bool
) -> None:
    form = torch.channels_last if last else torch.contiguous_format
    x = torch.rand(shape).to(kind).add(1).to(memory_format=form).requires_grad_()
    torch.manual_seed(0)
    y = Dropout(p)(x)
    assert y.dtype == kind
    assert y.is_contiguous(memory_format=form)
    kept = y != 0
    dropped = round(p * 2**16) / 2**16
    if dropped < 1:
        scale = torch.tensor(1 / (1 - dropped), dtype=kind)
        assert torch.equal(y[kept], (x * scale)[kept])
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient != 0, kept)
    torch.manual_seed(0)
    assert torch.equal(Dropout(p)(x), y)
    assert Dropout(p).eval()(x) is x or torch.equal(Dropout(p).eval()(x), x)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_each_place_alone_with_probability_p(p: float) -> None:
    torch.manual_seed(1)
    n, drops = 400, []
    for _ in range(n):
        drops.append(Dropout(p)(torch.ones(1, 3, 5, 7)).flatten() == 0)
    seen = torch.stack(drops).double()
    each = (p * (1 - p) / n) ** 0.5
    assert (seen.mean(0) - p).abs().max() < 4.5 * each  # 105 places
    assert abs(seen.mean() - p) < 4 * each / 105**0.5
    pairs = torch.corrcoef(seen.T) - torch.eye(105)
    assert pairs.abs().max() < 5.5 / n**0.5  # 5,460 pairs
    with pytest.raises(ValueError, match=r"p must be a finite number.*got 1\.5"):
        Dropout(1.5)


@pytest.mark.parametrize("places", [3, 64])
def test_attention_step_by_step_is_the_fused_one(
    places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = generator()
    qkv = [torch.randn(2, 3, places, 8, generator=g).double() for _ in range(3)]
    push = torch.randn(2, 3, places, 8, generator=g).double()
    calls: list[str] = []
    fused = F.scaled_dot_product_attention

    def count(*qkv: Tensor) -> Tensor:
        calls.append("fused")
        return fused(*qkv)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    found = []
    for few in (places, places - 1):
        monkeypatch.setattr(unet, "FEW_PLACES", few)
        leaves = [x.clone().requires_grad_() for x in qkv]
        y = attend(*leaves)
        found.append([y, *torch.autograd.grad(y, leaves, push)])
    assert calls == ["fused"]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    attend(*qkv)  # no gradient
    assert calls == ["fused"] * 2


@given(
    batch=st.integers(1, 3),
    each=st.integers(1, 4),
    groups=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(2, 5),
    last=st.booleans(),
)
def test_the_lean_norm_and_its_gradient_are_those_of_pytorch(
    batch: int, each: int, groups: int, height: int, width: int, last: bool
) -> None:
    g = generator()
    norm = GroupNorm(groups, groups * each, eps=1e-6)
    randomise(norm)
    x = torch.randn(batch, groups * each, height, width, generator=g)
    form = torch.channels_last if last else torch.contiguous_format
    x = x.to(memory_format=form).requires_grad_()
    push = torch.randn(x.shape, generator=g)
    inputs = (x, norm.weight, norm.bias)
    lean = LeanNormSiLU.apply(*inputs, norm)
    plain = F.silu(norm(x))
    torch.testing.assert_close(lean, plain, atol=1e-5, rtol=1e-5)
    for one, other in zip(
        torch.autograd.grad(lean, inputs, push),
        torch.autograd.grad(plain, inputs, push),
        strict=True,
    ):
        size = float(other.abs().max()) + 1
        torch.testing.assert_close(one, other, atol=2e-5 * size, rtol=0)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_sixteen_bits_keep_only_the_map_for_the_gradient(kind: torch.dtype) -> None:
    norm = GroupNorm(4, 16)
    x = torch.randn(2, 16, 8, 8, generator=generator()).to(kind).requires_grad_()
    kept: list[Tensor] = []

    def remember(y: Tensor) -> Tensor:
        kept.append(y)
        return y

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda y: y):
        y = norm_silu(norm, x)
    assert sum(t.nbytes for t in kept) < x.nbytes + 1000
    expected = F.silu(F.group_norm(x.detach().double(), 4)).to(kind)
    torch.testing.assert_close(y.detach(), expected, atol=1e-2, rtol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(norm_silu(norm, x), y, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("low", [False, True])
def test_a_bf16_step_is_near_a_float32_step(low: bool) -> None:
    model = UNet(replace(TINY, dropout=0.0))
    randomise(model)
    x = torch.randn(4, 2, 8, 8, generator=generator())
    t = torch.tensor([1, 5, 50, 900])
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        model(x, t).float().square().mean().backward()
    plain = UNet(TINY).double()
    randomise(plain)
    plain.load_state_dict(model.state_dict())
    plain(x.double(), t).square().mean().backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    wrong = [(p.grad.double() - q.grad).norm() for p, q in pairs]  # type: ignore[union-attr]
    whole = [q.grad.norm() for q in plain.parameters()]  # type: ignore[union-attr]
    error = torch.stack(wrong).norm() / torch.stack(whole).norm()
    assert error < (0.05 if low else 1e-5)


def test_downsample_pads_right_and_bottom() -> None:
    layer = Downsample(1)
    nn.init.ones_(layer.conv.weight)
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 0] = 1.0  # top left: seen once, and not through any padding
    assert layer(x)[0, 0].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 2, 2] = 1.0  # seen by all four windows, as they start at 0 and 2
    assert layer(x)[0, 0].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_upsample_repeats_then_convolves() -> None:
    layer = Upsample(3).double()
    randomise(layer)
    x = torch.randn(2, 3, 4, 5, generator=generator(), dtype=torch.float64)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(layer(x), layer.conv(repeated), atol=1e-12, rtol=0)
    one, other = (
        torch.autograd.grad(y.square().sum(), layer.conv.weight)
        for y in (layer(x), layer.conv(repeated))
    )
    torch.testing.assert_close(one, other, atol=1e-10, rtol=0)
    half = layer.to(torch.bfloat16)  # repeats and convolves as told
    x, repeated = x.to(torch.bfloat16), repeated.to(torch.bfloat16)
    assert torch.equal(half(x), half.conv(repeated))


# ------------------------------------------------------------------------ the network


@pytest.mark.parametrize("name", ["digits", "fashion28", "fashion32", "cifar10"])
def test_a_new_net_answers_zero(name: str) -> None:
    config = UNET_CONFIGS[name]
    model = UNet(config)
    x = torch.randn(
        1, config.in_channels, config.image_size, config.image_size,
        generator=generator(),
    )  # fmt: skip
    assert torch.equal(model(x, torch.tensor([500])), torch.zeros_like(x))


@given(
    patch=st.sampled_from([2, 3]),
    halvings=st.integers(0, 1),
    colours=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_patches_are_a_rearrangement_of_the_pixels(
    patch: int, halvings: int, colours: int, seed: int
) -> None:
    """A net on patches is the net without them on rearranged images, put back."""
    side = 2 * 2**halvings
    config = UNetConfig(
        side * patch, colours, 3, 4, (1,) * (halvings + 1), 1, (side,), groups=2,
        patch=patch,
    )  # fmt: skip
    cut = replace(
        config,
        image_size=side,
        in_channels=colours * patch**2,
        out_channels=3 * patch**2,
        patch=1,
    )
    model, plain = UNet(config).double(), UNet(cut).double()
    randomise(model, seed)
    plain.load_state_dict(model.state_dict())
    shape = (2, colours, side * patch, side * patch)
    x = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    t = torch.tensor([1, 400])
    squares = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=patch, q=patch)
    expected = rearrange(
        plain(squares, t), "b (c p q) h w -> b c (h p) (w q)", p=patch, q=patch
    )
    y = model(x, t)
    assert y.shape == (2, 3, *x.shape[2:])
    assert y.std() > 0.01
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)


def test_a_size_that_patches_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"patches of side 3 and halved 1 times: .* 6"):
        UNetConfig(28, 1, 1, 4, (1, 2), groups=2, attention=(), patch=3)
    with pytest.raises(ValueError, match=r"sides \(14, 7\)"):
        UNetConfig(28, 1, 1, 4, (1, 2), groups=2, attention=(28,), patch=2)
    with pytest.raises(ValueError, match="patch"):
        UNetConfig(28, 1, 1, 4, (1, 2), groups=2, attention=(), patch=0)


def test_a_new_net_learns_from_the_last_layer_on() -> None:
    """After one step the gradient reaches every parameter but none is stuck."""
    model = UNet(TINY, generator())
    x = torch.randn(4, 2, 8, 8, generator=generator())
    y = torch.randn(4, 3, 8, 8, generator=generator(1))
    t = torch.tensor([1, 10, 100, 1000])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    live = []
    for _ in range(4):
        optimiser.zero_grad()
        (model(x, t) - y).square().mean().backward()
        grads = {n: float(p.grad.abs().max()) for n, p in model.named_parameters()
                 if p.grad is not None}  # fmt: skip
        live.append({n for n, size in grads.items() if size > 0})
        optimiser.step()
    assert live[0] == {"conv_out.weight", "conv_out.bias"}
    dead = {n for n, _ in model.named_parameters()} - live[-1]
    # the bias of a key adds the same number to all scores of a query: no effect
    assert all(n.endswith("key.bias") for n in dead)


def linearised(config: UNetConfig) -> UNet:
    """Zero layers filled, GroupNorm replaced by the identity."""
    model = UNet(config).double()
    randomise(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return model


def test_each_input_pixel_reaches_each_output_pixel() -> None:
    model = linearised(TINY)
    x = torch.randn(1, 2, 8, 8, generator=generator(), dtype=torch.float64)
    t = torch.tensor([3])

    def run(flat: Tensor) -> Tensor:
        return model(flat.reshape(x.shape), t).flatten()

    jacobian = torch.autograd.functional.jacobian(run, x.flatten(), vectorize=True)
    assert jacobian.shape == (3 * 64, 2 * 64)
    assert bool((jacobian != 0).all())


def test_t_matters_and_batches_do_not() -> None:
    model = UNet(TINY).double()
    randomise(model)
    x = torch.randn(3, 2, 8, 8, generator=generator(), dtype=torch.float64)
    t = torch.tensor([1, 2, 1000])
    y = model(x, t)
    for i in range(3):
        one = model(x[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(one, y[i : i + 1], atol=1e-10, rtol=0)
    assert (model(x, t) - model(x, torch.tensor([2, 3, 999]))).abs().max() > 1e-3


def test_first_step_is_position_zero() -> None:
    """Step 1 is fed as 0 and step 1000 as 999, as in the paper's code."""
    seen = []
    model = UNet(TINY)
    model.time[0].register_forward_hook(lambda _, args, out: seen.append(args[0]))
    model(torch.zeros(2, 2, 8, 8), torch.tensor([1, 1000]))
    assert torch.equal(seen[0], timestep_embedding(torch.tensor([0, 999]), 8))


def test_same_generator_same_weights() -> None:
    one, two = UNet(TINY, generator(3)), UNet(TINY, generator(3))
    other = UNet(TINY, generator(4))
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert not torch.equal(one.conv_in.weight, other.conv_in.weight)


def test_initialise_is_xavier_with_zeros() -> None:
    model = UNet(UNET_CONFIGS["fashion32"], generator())
    zero = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        assert layer.bias is not None
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))
        if name.rsplit(".", 1)[-1] in ("conv_2", "out", "conv_out"):
            assert torch.equal(layer.weight, torch.zeros_like(layer.weight)), name
            zero += 1
            continue
        area = layer.weight[0, 0].numel()
        ends = (layer.weight.shape[0] + layer.weight.shape[1]) * area
        bound = (6 / ends) ** 0.5
        assert float(layer.weight.detach().abs().max()) <= bound, name
        if layer.weight.numel() > 1000:
            spread = float(layer.weight.detach().double().pow(2).mean())
            assert spread == pytest.approx(2 / ends, rel=0.1), name
    assert zero == 22 + 6 + 1  # blocks (8 down, 2 middle, 12 up), attentions, end


def test_skip_widths_are_those_of_the_maps() -> None:
    for name, config in UNET_CONFIGS.items():
        model = meta(config)
        side = config.image_size
        x = torch.zeros(1, config.in_channels, side, side, device="meta")
        maps = model.contract(x, torch.zeros(1, 4 * config.channels, device="meta"))
        assert [m.shape[1] for m in maps] == skip_widths(config), name
        assert [m.shape[-1] for m in maps][-1] == config.sides[-1]
        assert len(maps) == sum(map(len, expanding_path_lengths(config)))


def expanding_path_lengths(config: UNetConfig) -> list[range]:
    with torch.device("meta"):
        assert len(contracting_path(config)) == len(config.sides)
        return [range(len(level)) for level in expanding_path(config)]


# ---------------------------------------------------------------------- other devices


@pytest.mark.parametrize("name", sorted(UNET_CONFIGS))
def test_forward_and_backward_on_meta(name: str) -> None:
    config = UNET_CONFIGS[name]
    model = meta(config)
    side = config.image_size
    x = torch.zeros(2, config.in_channels, side, side, device="meta")
    y = model(x, torch.ones(2, dtype=torch.int64, device="meta"))
    assert y.shape == (2, config.out_channels, side, side)
    y.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_with_fake_cuda_tensors(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with FakeTensorMode(), torch.device("cuda"):
            model = UNet(UNET_CONFIGS["digits"])
            y = model(torch.zeros(2, 1, 8, 8), torch.tensor([1, 1000]))
    finally:
        torch.set_default_dtype(before)
    assert y.device.type == "cuda"
    assert y.dtype == dtype
    assert y.shape == (2, 1, 8, 8)


def test_bfloat16_on_the_cpu_stays_near() -> None:
    model = UNet(TINY)
    randomise(model)
    x = torch.randn(2, 2, 8, 8, generator=generator())
    t = torch.tensor([1, 1000])
    with torch.no_grad():
        y = model(x, t)
        low = model.to(torch.bfloat16)(x.to(torch.bfloat16), t)
    assert low.dtype == torch.bfloat16
    assert float((low.float() - y).abs().mean() / y.std()) < 0.1


# ---------------------------------------------------------------------------- refusals


@given(image_size=st.integers(1, 64), levels=st.integers(1, 5))
def test_sides_halve_or_are_refused(image_size: int, levels: int) -> None:
    def build() -> UNetConfig:
        return replace(
            TINY, image_size=image_size, channel_mult=(1,) * levels, attention=()
        )

    if image_size % 2 ** (levels - 1):
        with pytest.raises(ValueError, match=f"image_size = {image_size}"):
            build()
    else:
        sides = build().sides
        assert sides[0] == image_size
        assert all(a == 2 * b for a, b in itertools.pairwise(sides))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 9}, "multiple of 2"),
        ({"groups": 3}, "groups = 3 must divide channels = 8"),
        ({"heads": 3}, "heads = 3 must divide the 16"),
        ({"channels": 9, "groups": 9}, "channels = 9 must be even"),
        ({"attention": (5,)}, r"names \[5\]"),
        ({"channel_mult": ()}, "channel_mult is empty"),
        ({"channel_mult": (1, 0)}, "channel_mult"),
        ({"channels": 2, "groups": 1}, "channels"),
        ({"blocks": 0}, "blocks"),
        ({"groups": 0}, "groups"),
        ({"in_channels": 0}, "in_channels"),
        ({"dropout": 1.5}, "dropout"),
    ],
)
def test_impossible_configs(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)  # type: ignore[arg-type]


def test_wrong_types_in_configs() -> None:
    with pytest.raises(TypeError, match="image_size"):
        replace(TINY, image_size=8.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="blocks"):
        replace(TINY, blocks=True)


def test_lists_become_tuples() -> None:
    config = replace(TINY, channel_mult=[1, 2], attention=[4])
    assert config == TINY
    assert hash(config) == hash(TINY)


def test_impossible_inputs() -> None:
    model = UNet(TINY)
    x, t = torch.zeros(2, 2, 8, 8), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="x must have shape"):
        model(x[:, :, :7], t)
    with pytest.raises(ValueError, match="x must have shape"):
        model(x[:, :1], t)
    with pytest.raises(ValueError, match="t must have shape"):
        model(x, t[:1])
    with pytest.raises(ValueError, match=r"t must lie in \[1, inf\]; got 0"):
        model(x, t - 1)
    with pytest.raises(TypeError, match="t must be"):
        model(x, t.float())
    with pytest.raises(TypeError, match="x must be"):
        model(x.long(), t)
    with pytest.raises(TypeError):
        model(x)
    with pytest.raises(ValueError, match="x must lie on the device of t"):
        model(x.to("meta"), t)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_is_float32_inside(dtype: torch.dtype) -> None:
    norm = GroupNorm(4, 16)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert norm(x).dtype == dtype
    assert torch.equal(norm(x), norm(x.float()).to(dtype))
    assert norm.to(dtype)(x).dtype == dtype  # weights of 16 bits as well
    wide = x.double()
    assert torch.equal(
        norm.double()(wide), F.group_norm(wide, 4, norm.weight, norm.bias)
    )
