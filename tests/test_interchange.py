"""Weights from diffusers and for it: the same function, or an error that says why."""

import ast
import inspect
import json
import os
import pickle
import shutil
import stat
import struct
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm_core import files, interchange
from ddpm_core.interchange import (
    SCHEDULER_DEFAULTS,
    SCHEDULER_FITS,
    UNET_DEFAULTS,
    UNET_FITS,
    WEIGHTS,
    fit_weights,
    load_diffusers,
    our_name,
    read_scheduler_config,
    read_unet_config,
    save_diffusers,
    scheduler_fields,
    their_name,
    unet_fields,
)
from ddpm_core.process import p_mean_variance
from ddpm_core.samplers import ancestral, last
from ddpm_core.schedules import (
    Schedule,
    cosine,
    from_alpha_bar,
    from_beta,
    linear,
    respace,
    scaled_linear,
)
from ddpm_core.unet import UNET_CONFIGS, UNet, UNetConfig

TINY = UNetConfig(
    image_size=8,
    in_channels=2,
    out_channels=2,
    channels=8,
    channel_mult=(1, 2),
    blocks=1,
    attention=(4,),
    groups=4,
)
CONFIGS = {
    "tiny": TINY,
    "no attention": replace(TINY, attention=()),
    "attention everywhere": replace(TINY, attention=(8, 4)),
    "attention at the top": replace(TINY, attention=(8,), blocks=2),
    "heads": replace(TINY, heads=4),
    "heads everywhere": replace(TINY, heads=2, attention=(8, 4), channel_mult=(1, 1)),
    "one level": replace(TINY, channel_mult=(1,), attention=(8,), image_size=8),
    "one level, odd": replace(TINY, channel_mult=(1,), attention=(), image_size=5),
    "repeats": replace(TINY, channel_mult=(1, 1, 3, 3), attention=(4, 2), blocks=3),
    "narrower below": replace(TINY, channel_mult=(1, 3, 2), attention=(2,)),
    "other output": replace(TINY, in_channels=1, out_channels=3, dropout=0.1),
}
PUBLISHED = {  # google/ddpm-cifar10-32
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * 2],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": [*["UpBlock2D"] * 2, "AttnUpBlock2D", "UpBlock2D"],
}
PUBLISHED_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_large",
}
NEW_TO_OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Fill every parameter, also those that start at zero or one."""
    g = generator(seed)
    for p in model.parameters():
        draw = torch.randn(p.shape, generator=g, dtype=torch.float64)
        draw = draw / p[0].numel() ** 0.5 if p.ndim > 1 else 0.2 * draw + 0.7
        p.data = draw.to(p.dtype)


def ours(config: UNetConfig = TINY, seed: int = 0) -> UNet:
    model = UNet(config)
    randomise(model, seed)
    return model.eval()


def theirs(fields: dict[str, Any], seed: int = 0) -> UNet2DModel:
    model = UNet2DModel.from_config(fields).eval()
    randomise(model, seed)
    return model


def tiny(**change: Any) -> dict[str, Any]:
    """The fields of a small network as diffusers writes them, changed."""
    return {
        "_class_name": "UNet2DModel",
        "sample_size": 8,
        "in_channels": 2,
        "out_channels": 2,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": None,
        "norm_num_groups": 4,
        "norm_eps": 1e-6,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "downsample_padding": 0,
    } | change


def difference(model: UNet, other: UNet2DModel) -> float:
    """Largest difference of the outputs at five steps, over the output's spread.

    Both compute in float64, so that rounding, which depends on the processor and the
    number of threads, hides nothing and fails nothing.
    """
    model, other = deepcopy(model).double(), deepcopy(other).double()
    config = model.config
    shape = (5, config.in_channels, config.image_size, config.image_size)
    x = torch.randn(shape, generator=generator(9), dtype=torch.float64)
    t = torch.tensor([1, 2, 500, 999, 1000])
    with torch.no_grad():
        y, expected = model(x, t), other(x, t - 1).sample
    assert expected.std() > 0.05
    return float((y - expected).abs().max() / expected.std())


def written(folder: Path, **change: Any) -> Path:
    """A pipeline folder as diffusers writes it."""
    network = theirs(tiny(**change))
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("diffusers") / "theirs")


@pytest.fixture
def copy(shelf: Path, tmp_path: Path) -> Path:
    """A copy of a folder of diffusers' that a test may spoil."""
    return Path(shutil.copytree(shelf, tmp_path / "copy"))


def edit_tensors(folder: Path, change: Any) -> None:
    path = folder / "unet" / WEIGHTS
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    path.write_bytes(safetensors.torch.save(tensors))


def edit_json(path: Path, **change: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    return str(error.value)


# ----------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", [*(n for n, c in UNET_CONFIGS.items() if c.patch == 1), *CONFIGS]
)
def test_names_of_diffusers_go_over_and_come_back(name: str) -> None:
    config = (UNET_CONFIGS | CONFIGS)[name]
    with torch.device("meta"):
        here = UNet(config).state_dict()
        there = UNet2DModel.from_config(unet_fields(config)).state_dict()
    assert {our_name(n): x.shape for n, x in there.items()} == {
        n: x.shape for n, x in here.items()
    }
    assert {their_name(n) for n in here} == set(there)
    assert all(their_name(str(our_name(n))) == n for n in there)
    assert all(our_name(str(their_name(n))) == n for n in here)


def test_long_numbers_in_names_of_diffusers() -> None:
    name = "up_blocks.10.attentions.123.group_norm.bias"
    assert our_name(name) == "up.10.123.attention.norm.bias"
    assert their_name("up.10.123.attention.norm.bias") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "conv_in",
        "class_embedding.weight",
        "down_blocks.1.resnets.weight",
        "down_blocks.-1.resnets.0.norm1.weight",
        "down_blocks.1.resnets.0.norm3.weight",
        "mid_block.resnets.2.norm1.weight",
        "x.conv_in.weight",
        "../conv_in.weight",
        "down_blocks.٣.resnets.0.norm1.weight",
    ],
)
def test_other_names_are_none_of_diffusers(name: str) -> None:
    assert our_name(name) is None
    assert their_name(name) is None


# ------------------------------------------------------------------- the same function


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_reads_what_we_write_and_we_read_it_back(
    name: str, tmp_path: Path
) -> None:
    model = ours(CONFIGS[name]).train()
    save_diffusers(tmp_path / "net", model, linear(1000))
    assert model.training
    model.eval()
    other = UNet2DModel.from_pretrained(tmp_path / "net" / "unet").eval()
    assert difference(model, other) <= 1e-9
    other.save_pretrained(tmp_path / "again")
    with pytest.warns(UserWarning, match="no scheduler_config"):
        back, schedule, card = load_diffusers(tmp_path / "again")
    assert back.config == model.config
    assert not back.training
    assert all(p.requires_grad for p in back.parameters())
    for (n, a), (m, b) in zip(
        back.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert n == m
        assert torch.equal(a, b)
    assert (schedule.name, schedule.T, card["prediction"]) == ("linear", 1000, "eps")
    assert difference(back.double(), other.double()) <= 1e-10


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_small_networks_of_diffusers_in_float64(
    data: st.DataObject, tmp_path: Path
) -> None:
    draw = data.draw
    levels = draw(st.integers(1, 3))
    mult = [1, *draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))][:levels]
    sides = [2 ** (levels + 1 - i) for i in range(levels)]
    config = UNetConfig(
        image_size=sides[0],
        in_channels=draw(st.integers(1, 3)),
        out_channels=draw(st.integers(1, 3)),
        channels=4 * draw(st.integers(1, 2)),
        channel_mult=mult,
        blocks=draw(st.integers(1, 2)),
        attention=draw(st.lists(st.sampled_from(sides), unique=True)),
        heads=draw(st.sampled_from([1, 2])),
        groups=draw(st.sampled_from([1, 2, 4])),
    )
    model = ours(config).double()
    places = {m for m, s in zip(mult, sides, strict=True) if s in config.attention}
    folder = tmp_path / "net"
    shutil.rmtree(folder, ignore_errors=True)
    if config.heads > 1 and len(places | {mult[-1]}) > 1:
        with pytest.raises(ValueError, match="heads = 2"):
            save_diffusers(folder, model, linear(1000))
        assume(False)
    save_diffusers(folder, model, linear(1000))
    other = UNet2DModel.from_pretrained(folder / "unet", torch_dtype=torch.float64)
    assert difference(model, other.eval()) <= 1e-10
    back = load_diffusers(folder)[0]
    assert back.config == replace(config, attention=sorted(config.attention)[::-1])
    assert all(map(torch.equal, back.parameters(), model.parameters()))


def test_old_names_and_one_folder_as_diffusers_wrote_them_first(tmp_path: Path) -> None:
    """As published in 2022: all files side by side, the attention's old names."""
    fields = PUBLISHED | {
        "sample_size": 8,
        "block_out_channels": [8, 16, 16, 16],
        "norm_num_groups": 4,
    }
    network = theirs(fields)
    tensors = {}
    for name, x in network.state_dict().items():
        for new, old in NEW_TO_OLD.items():
            name = name.replace(f".{new}.", f".{old}.")
        tensors[name] = x.contiguous()
    assert any("proj_attn" in name for name in tensors)
    assert not any("to_q" in name for name in tensors)
    (tmp_path / WEIGHTS).write_bytes(safetensors.torch.save(tensors))
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "scheduler_config.json").write_text(json.dumps(PUBLISHED_SCHEDULER))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, schedule, card = load_diffusers(tmp_path)
    assert difference(model, network) <= 1e-9
    assert schedule.name == "linear"
    assert card["variance"] == "fixed_large"
    assert card["diffusers"] == {"unet": fields, "scheduler": PUBLISHED_SCHEDULER}
    read_by_them = UNet2DModel.from_pretrained(tmp_path, use_safetensors=True).eval()
    assert difference(model, read_by_them) <= 1e-9


def test_the_published_network_of_diffusers_is_ours() -> None:
    config = read_unet_config(PUBLISHED)
    assert config == replace(UNET_CONFIGS["cifar10"], dropout=0.0)
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(config).parameters()) == 35_746_307
    without = {k: v for k, v in PUBLISHED.items() if k != "attention_head_dim"}
    assert read_unet_config(without).heads == 32  # diffusers: 8 channels a head


def test_a_default_of_diffusers_is_its_default_here_too(tmp_path: Path) -> None:
    """Heads of 8 channels, if the file does not say anything about them."""
    fields = tiny()
    del fields["attention_head_dim"]
    network = theirs(fields)
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "net")
    path = tmp_path / "net" / "unet" / "config.json"
    path.write_text(json.dumps(fields))
    model = load_diffusers(tmp_path / "net")[0]
    assert model.config.heads == 2
    assert difference(model, network) <= 1e-9


def test_links_into_a_store_of_files_as_diffusers_downloads_them(
    copy: Path, tmp_path: Path
) -> None:
    store = tmp_path / "blobs"
    store.mkdir()
    for i, path in enumerate(sorted(copy.rglob("*.*"))):
        if path.is_file():
            path.rename(store / str(i))
            path.symlink_to(store / str(i))
    assert load_diffusers(copy)[0].config == read_unet_config(tiny())


def test_half_precision_of_diffusers_is_read_exactly(copy: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        for i, name in enumerate(sorted(tensors)):
            tensors[name] = tensors[name].to([torch.float16, torch.bfloat16][i % 2])

    edit_tensors(copy, halve)
    model = load_diffusers(copy)[0]
    content = (copy / "unet" / WEIGHTS).read_bytes()
    there = safetensors.torch.load(content)
    here = model.state_dict()
    assert {x.dtype for x in here.values()} == {torch.float32}
    assert all(torch.equal(here[str(our_name(n))], x.float()) for n, x in there.items())


def test_one_float64_tensor_of_diffusers_is_not_rounded() -> None:
    tensors = dict(theirs(tiny()).state_dict())
    tensors["conv_in.bias"] = torch.full((8,), 1 / 3, dtype=torch.float64)
    model = fit_weights(read_unet_config(tiny()), tensors)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert torch.equal(model.conv_in.bias, tensors["conv_in.bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_for_diffusers_keep_their_dtype(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = ours().to(dtype).to(memory_format=torch.channels_last)
    save_diffusers(tmp_path / "net", model, linear(1000))
    content = (tmp_path / "net" / "unet" / WEIGHTS).read_bytes()
    there = safetensors.torch.load(content)
    assert {x.dtype for x in there.values()} == {dtype}
    other = UNet2DModel.from_pretrained(tmp_path / "net" / "unet", torch_dtype=dtype)
    for name, x in other.state_dict().items():
        assert torch.equal(x, model.state_dict()[str(our_name(name))])


def test_the_card_of_a_network_of_diffusers_is_one_for_save_model(
    shelf: Path, tmp_path: Path
) -> None:
    model, _, card = load_diffusers(shelf)
    json.dumps(card, allow_nan=False)
    files.save_model(tmp_path / "m.safetensors", model, card)
    again, schedule, read = files.load_model(tmp_path / "m.safetensors")
    assert (again.config, schedule.name) == (model.config, "linear")
    assert read["prediction"] == card["prediction"]
    assert read["parameters"] == card["parameters"]


def test_the_package_does_not_import_diffusers() -> None:
    for path in Path(interchange.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in getattr(node, "names", [])]
            names.append(getattr(node, "module", None) or "")
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not any(n.split(".")[0] == "diffusers" for n in names), path


# --------------------------------------------------------------- fields of the network


def defaults(cls: type) -> dict[str, Any]:
    found = inspect.signature(cls.__init__).parameters.values()
    return {
        p.name: list(p.default) if isinstance(p.default, tuple) else p.default
        for p in found
        if p.name != "self"
    }


def test_defaults_are_those_of_diffusers() -> None:
    """Fails when a new version of diffusers has a new field or another default."""
    assert defaults(UNet2DModel) == UNET_DEFAULTS
    assert defaults(DDPMScheduler) == SCHEDULER_DEFAULTS


OTHER_VALUES: dict[str, Any] = {
    "center_input_sample": True,
    "time_embedding_type": "fourier",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": None,
    "mid_block_scale_factor": 2,
    "downsample_padding": 1,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "act_fn": "gelu",
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "scale_shift",
    "add_attention": False,
    "class_embed_type": "timestep",
    "num_class_embeds": 10,
}


@pytest.mark.parametrize("field", UNET_FITS)
def test_a_field_of_diffusers_that_we_have_not_is_named(field: str) -> None:
    value, fits = OTHER_VALUES[field], UNET_FITS[field]
    expected = f"{field} = {json.dumps(value)}; {json.dumps(fits)} would fit"
    with pytest.raises(ValueError, match="config does not fit") as error:
        read_unet_config(tiny(**{field: value}))
    assert message(error).endswith(f":\n- {expected}")


@pytest.mark.parametrize(
    "field",
    [
        *("center_input_sample", "freq_shift", "flip_sin_to_cos", "act_fn"),
        *("mid_block_scale_factor", "downsample_padding", "norm_eps"),
    ],
)
def test_the_fields_refused_would_change_the_function_of_diffusers(field: str) -> None:
    """And nobody would notice: the same weights go in without an error."""
    network = theirs(tiny()).double()
    changed = UNet2DModel.from_config(tiny(**{field: OTHER_VALUES[field]})).double()
    changed.load_state_dict(network.state_dict())
    model = fit_weights(read_unet_config(tiny()), network.state_dict()).eval()
    assert difference(model, network) <= 1e-10
    assert difference(model, changed.eval()) > 1e-6


def test_all_fields_of_diffusers_that_do_not_fit_are_in_one_error() -> None:
    with pytest.raises(ValueError, match="defaults of diffusers") as error:
        read_unet_config({}, "defaults of diffusers")
    for field in ("freq_shift", "flip_sin_to_cos", "downsample_padding", "norm_eps"):
        assert f"\n- {field} = " in message(error)
    assert message(error).count("(not in the file: diffusers' default)") == 5
    assert "sample_size must be an integer" in message(error)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "UNet2DConditionModel"}, '_class_name = "UNet2DCondition'),
        ({"new_thing": 3}, "new_thing = 3 is a field that we do not know"),
        ({"new_thing": False}, "new_thing = false"),
        ({"freq_shift": True}, "freq_shift = true"),
        ({"flip_sin_to_cos": 0}, "flip_sin_to_cos = 0; false"),
        ({"act_fn": None}, "act_fn = null"),
        ({"sample_size": None}, "sample_size must be an integer"),
        ({"sample_size": [8, 16]}, "sample_size must be an integer"),
        ({"sample_size": 8.0}, "sample_size must be an integer"),
        ({"sample_size": 9}, "image_size = 9 cannot be halved"),
        ({"in_channels": 0}, "in_channels"),
        ({"out_channels": 10**30}, "out_channels"),
        ({"block_out_channels": []}, "block_out_channels must be a list"),
        ({"block_out_channels": 8}, "block_out_channels must be a list"),
        ({"block_out_channels": [8, 12]}, "whole multiples of the first"),
        ({"block_out_channels": [16, 8]}, "whole multiples of the first"),
        ({"block_out_channels": [8, "16"]}, "block_out_channels"),
        ({"block_out_channels": [8, 16, 16]}, "not one length"),
        ({"block_out_channels": [1] * 9}, "1 to 8 integers"),
        ({"layers_per_block": 10**9}, "layers_per_block"),
        ({"layers_per_block": [1, 2]}, "layers_per_block"),
        ({"dropout": 2}, "dropout"),
        ({"dropout": None}, "dropout"),
        ({"norm_num_groups": None}, "norm_num_groups"),
        ({"norm_num_groups": 3}, "groups = 3 must divide"),
        ({"attention_head_dim": 5}, "attention_head_dim = 5 with [16]"),
        ({"attention_head_dim": 32}, "attention_head_dim = 32"),
        ({"attention_head_dim": "8"}, "attention_head_dim"),
        ({"attn_norm_num_groups": 2}, "attn_norm_num_groups = 2; null"),
        ({"time_embedding_dim": 64}, "time_embedding_dim = 64; null"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D"),
        ({"down_block_types": ["DownBlock2D", ["x"]]}, "down_block_types"),
        ({"down_block_types": "DownBlock2D"}, "down_block_types"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "mirrored"),
        ({"up_block_types": ["AttnDownBlock2D", "UpBlock2D"]}, "up_block_types"),
    ],
)
def test_impossible_fields_of_diffusers(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="config does not fit") as error:
        read_unet_config(tiny(**change))
    assert said in message(error)


def test_heads_of_diffusers_differ_from_level_to_level() -> None:
    both = {
        "down_block_types": ["AttnDownBlock2D"] * 2,
        "up_block_types": ["AttnUpBlock2D"] * 2,
    }
    with pytest.raises(ValueError, match=r"attention_head_dim = 8 with \[8, 16\]"):
        read_unet_config(tiny(attention_head_dim=8, **both))
    assert read_unet_config(tiny(**both)).heads == 1
    upper = {
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
    }
    with pytest.raises(ValueError, match=r"attention_head_dim = 8 with \[8, 16\]"):
        read_unet_config(tiny(attention_head_dim=8, **upper))  # the middle attends too
    with pytest.raises(ValueError, match=r"heads = 2 at widths \[8, 16\]"):
        unet_fields(replace(TINY, heads=2, attention=(8, 4)))


@pytest.mark.parametrize(
    "change",
    [
        {"new_thing": None},
        {"_name_or_path": "../../etc/passwd"},
        {"_use_default_values": ["dropout"]},
        {"attn_norm_num_groups": 4},
        {"time_embedding_dim": 32},
        {"num_train_timesteps": 1000},
        {"mid_block_scale_factor": 1.0},
        {"sample_size": [8, 8]},
    ],
)
def test_fields_that_do_not_change_the_function_of_diffusers(
    change: dict[str, Any],
) -> None:
    assert read_unet_config(tiny(**change)) == read_unet_config(tiny())
    if "new_thing" not in change and "_use_default_values" not in change:
        network, other = theirs(tiny()), theirs(tiny(**change))
        model = fit_weights(read_unet_config(tiny()), other.state_dict()).eval()
        assert difference(model, network) <= 1e-9


def test_one_level_of_diffusers_is_never_resampled() -> None:
    one = {
        "block_out_channels": [8],
        "down_block_types": ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"],
        "downsample_padding": 1,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    }
    network = theirs(tiny(**one))
    model = fit_weights(read_unet_config(tiny(**one)), network.state_dict()).eval()
    assert difference(model, network) <= 1e-9


def test_a_config_with_more_than_diffusers_has_is_refused() -> None:
    with pytest.raises(ValueError, match="patch = 2"):
        unet_fields(UNET_CONFIGS["fashion28"])


# ------------------------------------------------------------------------ the schedule

SCHEDULES = {
    "linear": (linear(1000), "linear"),
    "linear, 50": (linear(50), "linear"),
    "cosine": (cosine(1000), "squaredcos_cap_v2"),
    "cosine, 7": (cosine(7), "squaredcos_cap_v2"),
    "scaled": (scaled_linear(1000), "scaled_linear"),
    "float32": (linear(1000).to(dtype=torch.float32), "linear"),
    "float32, cosine": (cosine(100).to(dtype=torch.float32), "squaredcos_cap_v2"),
    "own line": (from_beta(torch.linspace(1e-3, 0.3, 40, dtype=torch.double)), None),
    "nearly linear": (from_beta(linear(1000).beta[1:] * (1 + 1e-9)), None),
    "constant": (from_beta(torch.full((9,), 0.25)), None),
    "one step": (from_beta(torch.tensor([0.5])), None),
    "other cosine": (cosine(100, s=0.1), None),
    "other cut": (cosine(100, beta_max=0.9), None),
    "other recipe": (from_alpha_bar(torch.linspace(1, 0.01, 30).double()), None),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_to_diffusers_and_back(name: str, tmp_path: Path) -> None:
    schedule, recipe = SCHEDULES[name]
    fields = scheduler_fields(schedule, "v", "fixed_small", False)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(fields))
    there = DDPMScheduler.from_pretrained(tmp_path)
    beta = schedule.beta[1:].double()
    torch.testing.assert_close(there.betas.double(), beta, rtol=2e-5, atol=1e-9)
    if recipe:
        assert (fields["beta_schedule"], fields["trained_betas"]) == (recipe, None)
    back, options = read_scheduler_config(fields)
    assert torch.equal(back.beta.to(schedule.beta.dtype), schedule.beta)
    assert back.beta.dtype == torch.float64
    assert options == {"prediction": "v", "variance": "fixed_small", "clip": False}
    if recipe:
        assert back.name == schedule.name
        assert back.clipped == schedule.clipped


@pytest.mark.parametrize("recipe", ["linear", "scaled_linear"])
@given(
    T=st.integers(1, 60), first=st.floats(1e-5, 0.5), last=st.floats(1e-5, 0.5)
)  # fmt: skip
def test_recipes_of_diffusers_in_our_float64(
    recipe: str, T: int, first: float, last: float
) -> None:
    fields = {
        "num_train_timesteps": T,
        "beta_start": first,
        "beta_end": last,
        "beta_schedule": recipe,
    }
    schedule, _ = read_scheduler_config(fields)
    there = DDPMScheduler.from_config(fields)
    torch.testing.assert_close(
        there.betas.double(), schedule.beta[1:], rtol=2e-6, atol=1e-9
    )


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [True, False])
def test_steps_of_the_scheduler_agree_with_diffusers(
    prediction: str, variance: str, clip: bool, tmp_path: Path
) -> None:
    schedule = linear(40)
    save_diffusers(
        tmp_path / "net",
        ours(),
        schedule,
        prediction=prediction,
        variance=variance,
        clip=clip,
    )
    there = DDPMScheduler.from_pretrained(tmp_path / "net" / "scheduler")
    _, read, card = load_diffusers(tmp_path / "net")
    assert (card["prediction"], card["variance"], card["clip"]) == (
        prediction, variance, clip
    )  # fmt: skip
    x = torch.randn(3, 2, 4, 4, generator=generator(1))
    output = torch.randn(3, 2, 4, 4, generator=generator(2))
    for t in (40, 39, 20, 2, 1):
        steps = torch.full((3,), t)
        law = p_mean_variance(
            read,
            x,
            steps,
            output,
            prediction=prediction,
            variance=variance,
            clip=clip,
        )
        z = torch.randn(x.shape, generator=generator(t))
        expected = law.mean + (law.variance.sqrt() * z if t > 1 else 0)
        step = there.step(output, t - 1, x, generator=generator(t))
        torch.testing.assert_close(step.prev_sample, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            step.pred_original_sample, law.x_0, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize("make", [linear, cosine])
def test_the_pipeline_of_diffusers_draws_the_same_images(
    make: Any, prediction: str, tmp_path: Path
) -> None:
    model, schedule = ours(), make(25)
    save_diffusers(tmp_path / "net", model, schedule, prediction=prediction)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "net", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        batch_size=3,
        generator=generator(5),
        num_inference_steps=25,
        output_type="numpy",
    ).images
    g = generator(5)
    x_T = torch.randn(3, 2, 8, 8, generator=g)
    states = ancestral(model, schedule, x_T, prediction=prediction, generator=g)
    x_0 = (last(states) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.from_numpy(drawn), x_0, rtol=0, atol=2e-3)
    pipeline.save_pretrained(tmp_path / "again")
    back, read, card = load_diffusers(tmp_path / "again")
    assert torch.equal(read.beta, schedule.beta)
    assert (card["prediction"], card["variance"]) == (prediction, "fixed_large")
    assert all(map(torch.equal, back.parameters(), model.parameters()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "DDIMScheduler"}, '"DDPMScheduler" would fit'),
        ({"beta_schedule": "sigmoid"}, "got 'sigmoid'"),
        ({"beta_schedule": "laplace"}, "got 'laplace'"),
        ({"beta_schedule": None}, "beta_schedule must be one of 'linear'"),
        ({"prediction_type": "flow"}, "prediction_type must be one of 'epsilon'"),
        ({"variance_type": "learned_range"}, "variance_type must be one of"),
        ({"variance_type": "fixed_large_log"}, "variance_type must be one of"),
        ({"variance_type": []}, "variance_type must be one of"),
        ({"clip_sample": 1}, "clip_sample must be true or false"),
        ({"clip_sample_range": 2.0}, "clip_sample_range = 2.0; 1.0 would fit"),
        ({"thresholding": True}, "thresholding = true; false would fit"),
        ({"steps_offset": 1}, "steps_offset = 1; 0 would fit"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = true"),
        ({"timestep_spacing": "karras"}, "timestep_spacing must be one of"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps"),
        ({"beta_start": 0}, "beta must lie in (0, 1]; got 0"),
        ({"beta_end": float("inf")}, "beta_end must be a finite number"),
        ({"beta_end": 1.5}, "beta_end"),
        ({"trained_betas": [0.1] * 10}, "trained_betas has 10 numbers"),
        ({"trained_betas": 0.1}, "trained_betas must be null or a list"),
        ({"trained_betas": ["a"], "num_train_timesteps": 1}, "trained_betas"),
        ({"trained_betas": [-0.1], "num_train_timesteps": 1}, "trained_betas"),
        ({"tensor_format": "pt"}, 'tensor_format = "pt" is a field that we do not'),
    ],
)
def test_schedulers_of_diffusers_that_we_have_not(
    change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match="scheduler does not fit") as error:
        read_scheduler_config(PUBLISHED_SCHEDULER | change)
    assert said in message(error)


def test_fields_of_the_scheduler_of_diffusers_that_do_not_matter() -> None:
    for change in (
        {"clip_sample": False, "clip_sample_range": 3.0},
        {"timestep_spacing": "trailing"},
        {"sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9},
        {"trained_betas": linear(1000).beta[1:].tolist(), "beta_end": 0.5},
    ):
        assert read_scheduler_config(PUBLISHED_SCHEDULER | change)[0].name == "linear"
    assert all(value == SCHEDULER_DEFAULTS[f] for f, value in SCHEDULER_FITS.items())


@pytest.mark.parametrize(
    ("schedule", "options", "said"),
    [
        (respace(linear(1000), range(20, 1001, 20)), {}, "visits only some steps"),
        (from_beta(torch.tensor([2.0**-30, 0.5])), {}, "beta = 9.313"),
        (
            from_beta(torch.tensor([0.5, 1 - 1e-12], dtype=torch.float64)),
            {},
            "at t = 2 is 0 or 1 beside 1 in float32",
        ),
        (from_beta(torch.tensor([0.5, 1.0])), {}, "prediction must be 'x_0' or 'v'"),
        (linear(), {"prediction": "mean"}, "prediction must be one of"),
        (linear(), {"prediction": "epsilon"}, "prediction must be one of"),
        (linear(), {"variance": "fixed_large_reference"}, "variance must be one of"),
    ],
)
def test_schedules_that_diffusers_has_not(
    schedule: Schedule, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"must|step|beta") as error:
        save_diffusers(tmp_path / "net", ours(), schedule, **options)
    assert said in message(error)
    assert not list(tmp_path.iterdir())


def test_a_schedule_that_ends_in_noise_goes_to_diffusers_with_v(tmp_path: Path) -> None:
    schedule = from_beta(torch.tensor([0.5, 1.0]))
    save_diffusers(tmp_path / "net", ours(), schedule, prediction="v")
    there = DDPMScheduler.from_pretrained(tmp_path / "net" / "scheduler")
    assert there.betas.tolist() == [0.5, 1.0]
    assert torch.equal(load_diffusers(tmp_path / "net")[1].beta, schedule.beta)


# ------------------------------------------------------------------- damage and malice


def test_all_tensors_of_diffusers_that_do_not_fit_are_in_one_error(copy: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["../../escape.weight"] = torch.zeros(1)
        tensors["class_embedding.weight"] = torch.zeros(10, 32)
        tensors["conv_in.bias"] = torch.zeros(9)
        tensors["conv_out.bias"][1] = float("inf")
        tensors["conv_norm_out.bias"] = torch.zeros(8, dtype=torch.int32)
        tensors["mid_block.attentions.0.query.bias"] = torch.zeros(16)
        del tensors["time_embedding.linear_2.bias"]

    edit_tensors(copy, spoil)
    with pytest.raises(ValueError, match="does not fit") as error:
        load_diffusers(copy)
    said = message(error).split("\n- ")
    assert said[0].endswith(f"{WEIGHTS} does not fit:")
    assert sorted(said[1:]) == [
        "../../escape.weight [1] has no place in our U-Net",
        "class_embedding.weight [10, 32] has no place in our U-Net",
        "conv_in.bias has shape [9], not [8]",
        "conv_norm_out.bias holds torch.int32, not floating-point numbers",
        "conv_out.bias holds numbers that are not finite",
        "mid_block.attentions.0.to_q.bias is there twice, under its old and its new "
        "name",
        "time_embedding.linear_2.bias [32] is missing",
    ]


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os._exit, (3,))


def test_a_pickle_of_diffusers_is_refused_and_not_run(copy: Path) -> None:
    path = copy / "unet" / WEIGHTS
    path.unlink()
    path.with_suffix(".bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="is a pickle") as error:
        load_diffusers(copy)
    assert "UNet2DModel.from_pretrained(folder).save_pretrained" in message(error)
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_diffusers(copy)


def test_files_of_diffusers_that_are_not_there(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_diffusers(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_diffusers(copy / "model_index.json")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_diffusers(tmp_path)
    path = copy / "unet" / WEIGHTS
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"there are .*fp16\.safetensors"):
        load_diffusers(copy)


def test_more_parts_than_ours_in_a_pipeline_of_diffusers(copy: Path) -> None:
    index = copy / "model_index.json"
    edit_json(index, vqvae=["diffusers", "VQModel"], safety_checker=[None, None])
    with pytest.raises(ValueError, match="does not fit") as error:
        load_diffusers(copy)
    assert 'vqvae = ["diffusers", "VQModel"]: no part of ours' in message(error)
    assert "safety_checker" not in message(error)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"model_index\.json is no JSON object"):
        load_diffusers(copy)


def test_an_index_of_diffusers_leads_nowhere(copy: Path, tmp_path: Path) -> None:
    """Its entries are classes, not paths; nothing outside the folder is opened."""
    (tmp_path / "evil").mkdir()
    edit_json(copy / "model_index.json", unet=["../evil", "UNet2DModel"])
    assert load_diffusers(copy)[0].config == read_unet_config(tiny())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"\x00" * 100,
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1, "a": 2}',
        b'{"a": {"b": 1, "b": 1}}',
        b'{"a": ' + b"9" * 10_000 + b"}",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"{} trailing",
    ],
    ids=range(15),
)
@pytest.mark.parametrize(
    "part", ["unet/config.json", "scheduler/scheduler_config.json"]
)
def test_malformed_json_in_a_folder_of_diffusers(
    part: str, content: bytes, copy: Path
) -> None:
    (copy / part).write_bytes(content)
    with pytest.raises(ValueError, match="is no JSON object"):
        load_diffusers(copy)


def test_endless_json_in_a_folder_of_diffusers(copy: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(interchange, "LONGEST_JSON", 100)
    with pytest.raises(ValueError, match="too long for a configuration"):
        load_diffusers(copy)


def header_and_data(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_headers_of_diffusers_files_that_lie(copy: Path) -> None:
    path = copy / "unet" / WEIGHTS
    whole = path.read_bytes()
    header, data = header_and_data(whole)
    name = "conv_in.bias"
    spoiled: list[bytes] = [
        b"",
        whole[:4],
        whole[:8],
        whole[:200],
        whole[:-1],
        whole + b"\0",
        struct.pack("<Q", 2**63) + whole[8:],
        struct.pack("<Q", len(whole)) + whole[8:],
        struct.pack("<Q", 200_000_000) + whole[8:],
        struct.pack("<Q", 2) + b"{}" + data,
    ]
    for change in (
        {"dtype": "F128"},
        {"dtype": "F64"},
        {"shape": [2**62]},
        {"shape": [2**40, 2**40]},
        {"shape": [-8]},
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [2**60, 0]},
        {"data_offsets": [-32, 0]},
        {"data_offsets": header["conv_out.bias"]["data_offsets"]},
    ):
        text = json.dumps(header | {name: header[name] | change}).encode()
        spoiled.append(struct.pack("<Q", len(text)) + text + data)
    for content in spoiled:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"no whole safetensors file|does not fit"):
            load_diffusers(copy)


def test_two_hundred_flips_and_cuts_of_our_file_for_diffusers(tmp_path: Path) -> None:
    """Our files carry a digest: each damage is found, wherever it is."""
    config = replace(TINY, channels=4, attention=(), groups=2)
    save_diffusers(tmp_path / "net", ours(config), linear(1000))
    path = tmp_path / "net" / "unet" / WEIGHTS
    whole = path.read_bytes()
    g = generator(7)
    for i in range(200):
        place = int(torch.randint(len(whole), (), generator=g))
        content = bytearray(whole)
        content[place] ^= 1 << i % 8
        path.write_bytes(bytes(content) if i % 4 else whole[:place])
        with pytest.raises(ValueError, match=r"safetensors|does not fit"):
            load_diffusers(tmp_path / "net")
    path.write_bytes(whole)
    load_diffusers(tmp_path / "net")


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    place=st.integers(0, 20_000),
    value=st.binary(min_size=1, max_size=3),
    part=st.sampled_from(["unet/" + WEIGHTS, "unet/config.json"]),
)
def test_any_damage_to_a_file_of_diffusers_is_an_error_or_finite_weights(
    place: int, value: bytes, part: str, shelf: Path, copy: Path
) -> None:
    """No digest of theirs: a changed number is read; nothing worse happens."""
    whole = (shelf / part).read_bytes()
    place %= len(whole)
    path = copy / part
    path.write_bytes(whole[:place] + value + whole[place + len(value) :])
    try:
        model = load_diffusers(copy)[0]
    except ValueError:
        pass
    else:
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    finally:
        path.write_bytes(whole)


# ------------------------------------------------------------------------------ saving


def test_a_folder_for_diffusers_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: Any
) -> None:
    real = interchange.write_atomically
    for last_one in range(4):
        calls = []

        def crash(*arguments: Any, calls: list[Any] = calls, n: int = last_one) -> None:
            calls.append(arguments)
            if len(calls) > n:
                raise KeyboardInterrupt
            real(*arguments)

        with monkeypatch.context() as patch:
            name = "write_atomically" if last_one < 3 else "replace"
            patch.setattr(
                interchange, name, crash if last_one < 3 else lambda *_: 1 / 0
            )
            with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
                save_diffusers(tmp_path / "net", ours(), linear(1000))
        assert not list(tmp_path.iterdir())
    save_diffusers(tmp_path / "net", ours(), linear(1000))
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    assert sorted(p.name for p in (tmp_path / "net").rglob("*")) == [
        "config.json",
        WEIGHTS,
        "model_index.json",
        "scheduler",
        "scheduler_config.json",
        "unet",
    ]


def test_a_folder_for_diffusers_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    with pytest.raises(FileNotFoundError):
        save_diffusers(folder / "deeper", ours(), linear(1000))
    folder.mkdir()
    save_diffusers(folder, ours(seed=1), linear(1000))  # empty: fine
    before = (folder / "unet" / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="is not empty"):
        save_diffusers(folder, ours(seed=2), linear(1000))
    assert (folder / "unet" / WEIGHTS).read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_others_may_read_a_folder_for_diffusers_as_any_new_one(tmp_path: Path) -> None:
    save_diffusers(tmp_path / "net", ours(), linear(1000))
    (tmp_path / "plain").mkdir()
    modes = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("net", "plain")]
    assert modes[0] == modes[1]


def test_bad_arguments_for_diffusers_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    with pytest.raises(TypeError, match="model must be a UNet"):
        save_diffusers(folder, nn.Linear(2, 2), linear(1000))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="clip must be true or false"):
        save_diffusers(folder, ours(), linear(1000), clip=1)  # type: ignore[arg-type]
    broken = ours()
    broken.conv_in.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"conv_in\.bias must be finite"):
        save_diffusers(folder, broken, linear(1000))
    assert not list(tmp_path.iterdir())


def test_fit_weights_of_diffusers_leaves_the_tensors_alone() -> None:
    tensors = theirs(tiny()).state_dict()
    before = {name: x.clone() for name, x in tensors.items()}
    model = fit_weights(read_unet_config(tiny()), tensors)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert all(torch.equal(x, before[name]) for name, x in tensors.items())
