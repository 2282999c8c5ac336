"""What makes a step fast or small changes no loss curve."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial, partialmethod
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers.forks import in_a_fork
from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.models import activations, adapters, lora_layers
from lcm_lightning.models.activations import SPARING, SiluOfNorm, keep_fewer_activations
from lcm_lightning.models.adapters import LoraSettings, active_adapters
from lcm_lightning.models.lora_layers import FUSED_LAYERS
from lcm_lightning.models.stable_diffusion import load_stable_diffusion

STEPS = 10
# Both sides compute the same sums in another order. A float32 step differs by some 1e-6; AdamW divides gradients by
# their own size, which lets small ones differ visibly, and ten steps add up.
FLOAT32 = 1e-3
# A bf16 number has 8 bits, so a sum taken in another order differs by up to 0.4 %, and the Huber loss near 0 is as
# steep as anywhere: curves differ from step to step by a few per cent, and by no trend.
BFLOAT16 = 0.05


def batch(seed: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1,
        "captions": [f"photo {seed} {i}" for i in range(4)],
        "seed": torch.randint(2**62, (4,), generator=generator),
        "weight": torch.ones(4),
    }


def distillation(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> LcmLoraDistillation:
    return LcmLoraDistillation(
        load_stable_diffusion(str(folder), dtype=dtype, **options),
        distillation=ConsistencyDistillation(),
        lora=LoraSettings(rank=4, alpha=8),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
    )


def loss_curve(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> Tensor:
    """Losses of the first steps of a distillation, float32 [STEPS]."""
    torch.manual_seed(0)
    module = distillation(folder, dtype, **options)
    module.log = lambda *_, **__: None
    optimizer = module.make_optimizer(module.adapter_parameters())
    losses = []
    for step in range(STEPS):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            loss = module.training_step(batch(step), step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def assert_same_curve(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Every loss within `tolerance` of the curve's mean, on a curve on which training shows."""
    assert expected.std() > 0.01 * expected.mean()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.mean()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)])
@pytest.mark.parametrize("option", ["channels_last", "gradient_checkpointing"])
def test_options_of_the_model_keep_the_curve(pipeline_folder: Path, option: str, dtype: torch.dtype, tolerance: float):
    found = loss_curve(pipeline_folder, dtype, **{option: True})
    assert_same_curve(found, loss_curve(pipeline_folder, dtype), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_fused_adapters_keep_the_curve_of_peft_s_own(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, channels_last: bool, dtype: torch.dtype, tolerance: float
):
    found = loss_curve(pipeline_folder, dtype, channels_last=channels_last)
    monkeypatch.setattr(adapters, "FUSED_LAYERS", {})
    assert_same_curve(found, loss_curve(pipeline_folder, dtype, channels_last=channels_last), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)])
def test_activations_computed_anew_keep_the_curve(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
):
    found = loss_curve(pipeline_folder, dtype)
    monkeypatch.setattr(activations, "keep_fewer_activations", lambda unet: None)
    assert_same_curve(found, loss_curve(pipeline_folder, dtype), tolerance)


def own_layers(folder: Path, **options: object) -> int:
    """How many layers of the UNet in training are neither peft's nor diffusers'."""
    modules = distillation(folder, **options).model.unet.modules()
    return sum(type(module) in (*FUSED_LAYERS.values(), *SPARING.values()) for module in modules)


def test_fused_false_trains_through_the_libraries_own_layers(pipeline_folder: Path, caplog: pytest.LogCaptureFixture):
    assert own_layers(pipeline_folder) > 10 and own_layers(pipeline_folder, fused=False) == 0
    assert not caplog.records


@pytest.mark.parametrize(
    ("installed", "warned"),
    [
        ({}, False),
        ({"diffusers": "0.40.0"}, False),
        ({"diffusers": "0.43.0.dev0"}, True),
        ({"diffusers": "1.40"}, True),
        ({"peft": "0.22.0"}, True),
        ({"peft": "0.9.0"}, True),
    ],
    ids=str,
)
def test_versions_they_were_not_made_for_train_through_their_own_layers(
    pipeline_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    installed: dict[str, str],
    warned: bool,
):
    versions = {"diffusers": "0.42.1", "peft": "0.21.2"} | installed
    monkeypatch.setattr(lora_layers, "version", versions.__getitem__)
    assert (own_layers(pipeline_folder) == 0) == warned
    assert len(caplog.records) == warned
    assert all(f"{name} {number}: " in caplog.text for name, number in installed.items() if warned)
    caplog.clear()
    assert own_layers(pipeline_folder, fused=False) == 0 and not caplog.records


def kept_for_backward(folder: Path, **options: object) -> Counter[tuple[int, ...]]:
    """How many tensors of each shape, other than parameters, a bf16 step keeps for its backward pass."""
    module = distillation(folder, torch.bfloat16, **options)
    module.log = lambda *_, **__: None
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        return kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        module.training_step(batch(0), 0)
    return Counter(tuple(tensor.shape) for pointer, tensor in kept.items() if pointer not in parameters)


def test_neither_activations_nor_casts_of_the_adapter_are_kept(pipeline_folder: Path):
    lean, plain = (kept_for_backward(pipeline_folder, fused=fused) for fused in (True, False))
    unet = distillation(pipeline_folder).model.unet
    adapter_shapes = {tuple(p.shape) for name, p in unet.named_parameters() if "lora_" in name and p.dim() == 4}
    assert adapter_shapes & plain.keys()
    assert not adapter_shapes & lean.keys()
    feed_forwards = [module for module in unet.modules() if isinstance(module, FeedForward)]
    widths = {module.net[2].in_features for module in feed_forwards}
    plain_wide, lean_wide = (sum(kept[s] for s in kept if s and s[-1] in widths) for kept in (plain, lean))
    assert lean_wide <= plain_wide - 2 * len(feed_forwards)  # neither gelu(g) nor a gelu(g)
    maps = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    plain_maps, lean_maps = (sum(kept[s] for s in kept if len(s) == 4) for kept in (plain, lean))
    assert lean_maps <= plain_maps - 4 * len(maps)  # of each of two norms neither norm(x) nor silu(norm(x))
    assert lean.total() < plain.total()


def with_adapter(
    model: nn.Module,
    targets: list[str],
    layers: Mapping[type[nn.Module], type[nn.Module]] = FUSED_LAYERS,
    **settings: object,
) -> nn.Module:
    """`model` with a random adapter "a", the same at every call, in `layers` of our own or (none) peft's."""
    config = LoraConfig(r=3, target_modules=targets, init_lora_weights=False, **settings)
    config._register_custom_module(dict(layers))
    torch.manual_seed(2)
    return inject_adapter_in_model(config, model, "a")


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def resnet(out_channels: int = 8, **settings: object) -> ResnetBlock2D:
    return ResnetBlock2D(in_channels=8, out_channels=out_channels, temb_channels=6, groups=4, **settings)


LEAVES = (nn.GroupNorm, nn.SiLU, nn.Dropout, GEGLU, LoraLayer)
SPARING_BLOCKS = {
    "feed forward": FeedForward(6),
    "feed forward with dropout": FeedForward(6, dropout=0.5),
    "feed forward without a gate": FeedForward(6, activation_fn="gelu"),
    "resnet": resnet(),
    "shortcut": resnet(12),
    "scaled": resnet(output_scale_factor=2.0, skip_time_act=True),
    "scale and shift": resnet(time_embedding_norm="scale_shift"),
    "down": resnet(down=True),
}


def block_inputs(block: nn.Module) -> list[Tensor]:
    shapes = [(2, 3, 6)] if isinstance(block, FeedForward) else [(2, 8, 4, 4), (2, 6)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("adapter", ["fused", "dropout", "hooked", "trained norms", None])
@pytest.mark.parametrize("block", SPARING_BLOCKS.values(), ids=SPARING_BLOCKS)
def test_a_sparing_block_is_diffusers_own(block: nn.Module, adapter: str | None):
    results = []
    for sparing in (False, True):
        model = copy.deepcopy(block)
        if sparing:
            keep_fewer_activations(model)
            assert type(model) is SPARING[type(block)]
        if adapter is not None:
            targets = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "proj", "net.2"]
            model = with_adapter(model, targets, lora_dropout=0.5 if adapter == "dropout" else 0.0)
        for name, parameter in model.named_parameters():
            trains = adapter is None or "lora_" in name or (adapter == "trained norms" and "norm" in name)
            parameter.requires_grad_(trains)
        if adapter == "hooked":
            for layer in model.modules():
                if isinstance(layer, LEAVES):
                    layer.register_forward_hook(lambda _, __, found: 2 * found)
        inputs = block_inputs(block)
        torch.manual_seed(3)
        output = model(*inputs)
        results.append((output, *torch.autograd.grad(output.square().sum(), (*inputs, *trained(model)))))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("kind", ["feed forward", "shortcut"])
def test_what_is_computed_anew_is_computed_in_autocast_as_before(kind: str, layout: torch.memory_format):
    results = []
    for sparing in (False, True):
        model = copy.deepcopy(SPARING_BLOCKS[kind]).requires_grad_(False).to(memory_format=layout)
        if sparing:
            keep_fewer_activations(model)
        model = with_adapter(model, ["conv1", "conv2", "net.2"])
        inputs = block_inputs(model)
        images = [x.to(memory_format=layout) if x.dim() == 4 else x for x in inputs]
        with torch.autocast("cpu", torch.bfloat16):
            output = model(*images)
        results.append((output, *torch.autograd.grad(output.float().square().sum(), (*inputs, *trained(model)))))
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_a_norm_s_weight_is_that_of_the_forward_pass():
    results = []
    for sparing in (False, True):
        model = copy.deepcopy(SPARING_BLOCKS["resnet"]).requires_grad_(False)
        if sparing:
            keep_fewer_activations(model)
        model = with_adapter(model, ["conv1", "conv2"])
        inputs = block_inputs(model)
        weights = dict(model.named_parameters()) | {"norm1.weight": 3 * model.norm1.weight + 1}
        output = torch.func.functional_call(model, weights, tuple(inputs))
        results.append(torch.autograd.grad(output.square().sum(), inputs))
        output = model(*inputs)
        model.norm1.weight.mul_(3)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(output.sum(), inputs)
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_a_norm_that_autocast_widens_is_widened_in_the_backward_pass():
    norm = nn.GroupNorm(4, 8).requires_grad_(False).to(torch.bfloat16)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    z, grad = torch.randn(2, 2, 8, 4, 4).requires_grad_(True).unbind()
    expected = F.silu(F.group_norm(z, 4, norm.weight.float(), norm.bias.float(), norm.eps))
    found, pullback = SiluOfNorm(norm).with_pullback(z.detach(), norm.weight, norm.bias)
    assert torch.equal(found, expected)
    torch.testing.assert_close(pullback(grad), torch.autograd.grad(expected, z, grad)[0])


def layer_and_input(kind: str) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "linear":
        return nn.Linear(12, 20), torch.randn(2, 5, 12, generator=generator)
    kernel, stride = {"conv1x1": (1, 1), "conv3x3": (3, 1), "downsample": (3, 2)}[kind.removesuffix(" nhwc")]
    layer = nn.Conv2d(12, 20, kernel, stride=stride, padding=kernel // 2)
    x = torch.randn(2, 12, 6, 8, generator=generator)
    if kind.endswith("nhwc"):
        return layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return layer, x


@pytest.mark.parametrize("kind", ["linear", "conv1x1", "conv3x3", "conv3x3 nhwc", "conv1x1 nhwc", "downsample nhwc"])
def test_a_fused_layer_is_peft_s_layer(kind: str):
    torch.manual_seed(0)
    base, x = layer_and_input(kind)
    results = []
    for custom in ({}, FUSED_LAYERS):
        config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False)
        config._register_custom_module(custom)
        torch.manual_seed(2)
        model = inject_adapter_in_model(config, nn.Sequential(copy.deepcopy(base)), "a").requires_grad_(False)
        weights = [p.requires_grad_(True) for name, p in model.named_parameters() if "lora_" in name]
        inputs = x.clone().requires_grad_(True)
        output = model(inputs)
        results.append((output, *torch.autograd.grad(output.square().sum(), (inputs, *weights))))
        assert (type(model[0]) in FUSED_LAYERS.values()) == bool(custom)
    for found, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))


def negated_output(*_: object) -> Tensor:
    return -_[-1]


def wrapped(layer: nn.Module) -> None:
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 1  # as accelerate's offloading does


LEFT_TO_PEFT = {
    "dropout": ({"lora_dropout": 0.5}, lambda _: None),
    "bias": ({"lora_bias": True}, lambda layer: nn.init.ones_(layer.lora_B["a"].bias)),
    "hook on the layer": ({}, lambda layer: layer.base_layer.register_forward_hook(negated_output)),
    "hook on A": ({}, lambda layer: layer.lora_A["a"].register_forward_hook(negated_output)),
    "hook before B": ({}, lambda layer: layer.lora_B["a"].register_forward_pre_hook(lambda _, x: (2 * x[0],))),
    "wrapped layer": ({}, lambda layer: wrapped(layer.base_layer)),
}


@pytest.mark.parametrize("base", [nn.Linear(12, 20), nn.Conv2d(12, 20, 1)], ids=["linear", "convolution"])
@pytest.mark.parametrize(("settings", "change"), LEFT_TO_PEFT.values(), ids=LEFT_TO_PEFT)
def test_what_is_not_a_plain_adapter_on_a_plain_layer_is_left_to_peft(
    base: nn.Module, settings: dict[str, float], change: Callable[[nn.Module], object]
):
    results = []
    for custom in ({}, FUSED_LAYERS):
        model = with_adapter(nn.Sequential(copy.deepcopy(base)), ["0"], custom, **settings)
        change(model[0])
        torch.manual_seed(3)
        results.append(model(torch.ones(2, 12, *(() if isinstance(base, nn.Linear) else (4, 4)))))
    assert torch.equal(*results)


def test_two_adapters_at_once_are_left_to_peft():
    results = []
    for custom in ({}, FUSED_LAYERS):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(12, 20))
        for name in ("a", "b"):
            config = LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
            config._register_custom_module(custom)
            inject_adapter_in_model(config, model, name)
        model[0].set_adapter(["a", "b"])
        results.append(model(torch.ones(2, 12)))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("base", "shape"), [(nn.Linear(12, 20), (12,)), (nn.Conv2d(12, 20, 1), (12, 4, 4))], ids=["vector", "image"]
)
def test_an_input_without_a_batch_is_taken(base: nn.Module, shape: tuple[int, ...]):
    model = with_adapter(nn.Sequential(copy.deepcopy(base)), ["0"])
    x = torch.ones(shape, requires_grad=True)
    (without,) = torch.autograd.grad(model(x).sum(), x)
    (within,) = torch.autograd.grad(model(x[None]).sum(), x)
    torch.testing.assert_close(without, within)


@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
@pytest.mark.parametrize("backward_too", [False, True], ids=["forward in autocast", "backward in autocast"])
def test_autocast_may_differ_between_forward_and_backward(kind: str, backward_too: bool):
    base, x = layer_and_input(kind)
    model = with_adapter(nn.Sequential(copy.deepcopy(base)), ["0"])
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    with autocast(enabled=not backward_too):
        output = model(x)
    with autocast(enabled=not backward_too):
        expected = torch.autograd.grad(output.float().sum(), list(trained(model)), retain_graph=True)
    with autocast(enabled=backward_too):
        found = torch.autograd.grad(output.float().sum(), list(trained(model)))
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, wanted)


def test_switching_adapters_changes_nothing_that_trains(pipeline_folder: Path):
    model = load_stable_diffusion(str(pipeline_folder))
    adapters.add_lora(model.unet, "lcm", LoraSettings(rank=4, alpha=4))
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    with active_adapters(model.unet, ()):
        assert all(layer.disable_adapters for layer in adapters.lora_layers(model.unet))
        assert trainable == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(
        layer.active_adapters == ["lcm"] and not layer.disable_adapters for layer in adapters.lora_layers(model.unet)
    )


def test_gradients_are_freed_with_the_step_and_kept_until_then(pipeline_folder: Path):
    module = distillation(pipeline_folder)
    held = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            held.append(any(p.grad is not None for p in module.parameters()))

    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[Watch()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([batch(seed) for seed in range(4)], batch_size=None))
    assert held == [True, False, True, False]


@pytest.mark.slow
@in_a_fork
def test_a_compiled_unet_keeps_the_curve_and_is_traced_once_for_each_use(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    # Traced and guarded as ever, run without the code generator, which takes minutes.
    generator = partialmethod(nn.Module.compile, backend="eager")
    monkeypatch.setattr(UNet2DConditionModel, "compile", generator)
    torch._dynamo.reset()
    traced = torch._dynamo.utils.counters["stats"]
    before = traced["unique_graphs"]
    found = loss_curve(pipeline_folder, compile=True)
    assert traced["unique_graphs"] - before == 3  # teacher, target and student
    assert_same_curve(found, loss_curve(pipeline_folder), FLOAT32)
