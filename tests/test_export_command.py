"""What `python -m lcm_lightning.export` writes is opened by programs that are not ours, and means the same to them."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from helpers.commands import in_process
from helpers.pipelines import build_tiny_sdxl, save_full_lcm
from helpers.single_files import TINY, build_pipeline, checkpoint, unet_tensors
from lcm_lightning.errors import UserError
from lcm_lightning.exports.adapter_files import _saved_layer, joint_state_dict, write_diffusers_lora, write_kohya_lora
from lcm_lightning.exports.fused import fuse, write_pipeline
from lcm_lightning.exports.graphs import Graph, Unet, graphs, largest_difference
from lcm_lightning.exports.metadata import Described
from lcm_lightning.exports.network_folder import write_network_folder
from lcm_lightning.exports.onnx_folder import export as export_onnx
from lcm_lightning.exports.onnx_folder import write_onnx
from lcm_lightning.exports.openvino_folder import known_scheduler, save_model, write_openvino
from lcm_lightning.exports.single_checkpoint import original_key, original_state_dict, vae_tensors, write_single_file
from lcm_lightning.exports.usage import diffusers_folder, diffusers_lora, openvino_folder, optimum_folder, settings
from lcm_lightning.methods.dmd2_lora import Dmd2LoraDistillation
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.methods.lora import LoraFinetuning
from lcm_lightning.methods.pcm_lora import PcmLoraDistillation
from lcm_lightning.methods.tcd_lora import TcdLoraDistillation
from lcm_lightning.models import single_file
from lcm_lightning.models.adapters import load_lora, merged_adapters, set_active_adapters
from lcm_lightning.models.architectures import SD1, SD2, SD15_SCHEDULER, SDXL, Architecture
from lcm_lightning.models.kinds import KOHYA_FILE, LORA_FILE, AdapterKind
from lcm_lightning.models.lora_files import adaptable_layers, save_lora
from lcm_lightning.models.sampling import make_scheduler, sample
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from lcm_lightning.output.files import whole_files
from lcm_lightning.runs.contents import Adapter, write_manifest

KINDS = tuple(TINY)  # Stable Diffusion 1 and 2, SDXL
STUDENT, STYLE = LcmLoraDistillation.kind, LoraFinetuning.kind
ROUNDING = 2e-5  # of weights and outputs of order 1, in float32


def build(kind: str) -> DiffusionPipeline:
    return build_tiny_sdxl() if kind == "xl_base" else build_pipeline(TINY[kind])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saved pipelines of the three versions, each once."""
    made: dict[str, Path] = {}

    def saved(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            build(kind).save_pretrained(made[kind])
        return made[kind]

    return saved


def random_lora(
    model: StableDiffusion, path: Path, rank: int, alpha: float, endings: tuple[str, ...], seed: int
) -> Path:
    """A LoRA of every layer of UNet and text encoders with one of these endings; of convolutions, of twice the rank."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for network, module in {"unet": model.unet, **model.text_encoders}.items():
        for name, layer in adaptable_layers(module):
            if not name.endswith(endings):
                continue
            shape = layer.weight.shape
            r, key = rank * (2 if len(shape) == 4 else 1), f"{network}.{name}"
            tensors[f"{key}.lora_A.weight"] = 0.1 * torch.randn(r, *shape[1:], generator=generator)
            tensors[f"{key}.lora_B.weight"] = 0.1 * torch.randn(
                shape[0], r, *[1] * (len(shape) - 2), generator=generator
            )
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    save_lora(tensors, path)
    return path


STUDENT_LAYERS = ("to_q", "conv1", "proj_in", "ff.net.2", "time_emb_proj")
STYLE_LAYERS = ("to_q", "to_v", "q_proj", "fc1")


@pytest.fixture
def adapted(folders: Callable[[str], Path], tmp_path: Path) -> Callable[[str], StableDiffusion]:
    """A model with a student's LoRA, and a style's of which there is 0.5 that is on the text encoders too."""

    def make(kind: str) -> StableDiffusion:
        model = load_stable_diffusion(str(folders(kind)))
        student = random_lora(model, tmp_path / "student.safetensors", 4, 2.0, STUDENT_LAYERS, 1)
        style = random_lora(model, tmp_path / "style.safetensors", 2, 3.0, STYLE_LAYERS, 2)
        load_lora(model, student, STUDENT.name)
        load_lora(model, style, STYLE.name, scale=0.5)
        set_active_adapters(model, [STUDENT.name, STYLE.name])
        return model

    return make


def weights(network: nn.Module) -> dict[str, Tensor]:
    """Of all layers a LoRA can be on, as they are now."""
    return {name: layer.get_parameter("weight").detach().clone() for name, layer in adaptable_layers(network)}


def merged(model: StableDiffusion) -> dict[str, dict[str, Tensor]]:
    """The weights that our own drawing uses, by network."""
    with merged_adapters(model, [STUDENT.name, STYLE.name]):
        return {name: weights(network) for name, network in {"unet": model.unet, **model.text_encoders}.items()}


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# ---- LoRA files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_gets_the_sum_of_all_adapters_of_one_file(kind: str, adapted, folders, tmp_path: Path):
    model = adapted(kind)
    expected = merged(model)
    tensors = joint_state_dict(model, [STUDENT.name, STYLE.name])
    write_diffusers_lora(tensors, model, (STYLE, STUDENT), tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(folders(kind))
    pipeline.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    pipeline.fuse_lora()
    for network, by_layer in expected.items():
        found = weights(getattr(pipeline, network))
        for layer, weight in by_layer.items():
            torch.testing.assert_close(found[layer], weight, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_kohya_s_formula_gives_the_sum_of_all_adapters(kind: str, adapted, folders, tmp_path: Path):
    model = adapted(kind)
    expected = merged(model)
    tensors = joint_state_dict(model, [STUDENT.name, STYLE.name])
    written = load_file(write_kohya_lora(tensors, model, (STYLE, STUDENT), tmp_path))
    network = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}
    # The reader is ours; test_lora_files.py and test_sdxl_lora.py hold it against diffusers and kohya's names.
    fresh = load_stable_diffusion(str(folders(kind)))
    load_lora(fresh, tmp_path / KOHYA_FILE, "x")
    with merged_adapters(fresh, ["x"]):
        for name, by_layer in expected.items():
            found = weights({"unet": fresh.unet, **fresh.text_encoders}[name])
            for layer, weight in by_layer.items():
                torch.testing.assert_close(found[layer], weight, atol=ROUNDING, rtol=0)
    assert {network[key.split("_")[0] + "_" + key.split("_")[1]] for key in written} == set(expected)
    assert all(written[f"{key.partition('.')[0]}.alpha"] == len(t) for key, t in written.items() if "lora_down" in key)


@pytest.mark.parametrize(
    ("kind", "spec", "base", "v2"),
    [
        ("v1", "stable-diffusion-v1", "sd_v1", "False"),
        ("v2", "stable-diffusion-v2-512", "sd_v2", "True"),
        ("xl_base", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "False"),
    ],
)
def test_headers_say_the_base_model_as_others_read_it(
    kind: str, spec: str, base: str, v2: str, adapted, tmp_path: Path
):
    model = adapted(kind)
    tensors = joint_state_dict(model, [STUDENT.name])
    for write in (write_diffusers_lora, write_kohya_lora):
        said = header(write(tensors, model, (STUDENT,), tmp_path, Described(title="Mine", author="me")))
        assert said["modelspec.sai_model_spec"] == "1.0.0" and said["modelspec.architecture"] == f"{spec}/lora"
        assert (said["ss_base_model_version"], said["ss_v2"]) == (base, v2)
        assert (said["modelspec.title"], said["modelspec.author"]) == ("Mine", "me")
        assert said["modelspec.prediction_type"] == "epsilon" and said["modelspec.date"].endswith("Z")
        assert said["modelspec.resolution"] == f"{model.default_resolution}x{model.default_resolution}"
        assert (said["sampler"], said["steps"], said["guidance_scale"]) == ("LCMScheduler", "4", "1")
        assert json.loads(said["sampler_settings"])["original_inference_steps"] == 50


def test_the_hash_is_of_everything_behind_the_header(adapted, tmp_path: Path):
    model = adapted("v1")
    tensors = joint_state_dict(model, [STUDENT.name])
    file = write_kohya_lora(tensors, model, (STUDENT,), tmp_path)
    content = file.read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert header(file)["modelspec.hash_sha256"] == f"0x{digest}"


@pytest.mark.parametrize("names", [[STUDENT], [STYLE], [STYLE, STUDENT]])
def test_diffusers_reads_rank_and_alpha_from_the_header(names: list[AdapterKind], adapted, folders, tmp_path: Path):
    model = adapted("v1")
    tensors = joint_state_dict(model, [kind.name for kind in names])
    write_diffusers_lora(tensors, model, names, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(folders("v1"))
    pipeline.load_lora_weights(tmp_path, adapter_name="x")
    for network in {key.partition(".")[0] for key in tensors}:
        config = getattr(pipeline, network).peft_config["x"]
        assert config.r == config.lora_alpha and config.rank_pattern == config.alpha_pattern
    for name, layer in pipeline.unet.named_modules():
        if hasattr(layer, "lora_A") and "x" in layer.lora_A:
            assert layer.r["x"] == layer.lora_alpha["x"] == len(tensors[f"unet.{name}.lora_A.weight"])
            assert layer.scaling["x"] == 1


def test_kohya_s_rank_is_a_number_where_all_layers_have_it(adapted, tmp_path: Path):
    model = adapted("v1")
    linear = {k: v for k, v in joint_state_dict(model, [STYLE.name]).items() if v.dim() == 2}
    said = header(write_kohya_lora(linear, model, (STYLE,), tmp_path))
    assert (said["ss_network_module"], said["ss_network_dim"], said["ss_network_alpha"]) == ("networks.lora", "2", "2")
    both = joint_state_dict(model, [STYLE.name, STUDENT.name])
    said = header(write_kohya_lora(both, model, (STYLE, STUDENT), tmp_path))
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("Dynamic", "Dynamic")


def test_text_encoders_of_two_ranks_are_told_apart(folders, tmp_path: Path):
    """Layers of both have the same names."""
    layer = "text_model.encoder.layers.0.mlp.fc1"
    tensors = {
        f"{network}.{layer}.lora_{side}.weight": torch.zeros(shape)
        for network, rank in (("text_encoder", 4), ("text_encoder_2", 8))
        for side, shape in (("A", (rank, 32)), ("B", (37, rank)))
    }
    said = header(write_kohya_lora(tensors, load_stable_diffusion(str(folders("xl_base"))), (STYLE,), tmp_path))
    assert said["ss_network_dim"] == "Dynamic"


def test_a_lora_of_a_text_projection_keeps_its_name():
    assert _saved_layer("text_encoder_2", "text_projection") == "text_projection"
    assert _saved_layer("text_encoder_2", "encoder.layers.0.mlp.fc1") == "text_model.encoder.layers.0.mlp.fc1"


# ---- whole models --------------------------------------------------------------------------------------------------


def of_types(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_names_are_those_that_an_independent_list_gives(kind: str, folders):
    found = original_state_dict(load_stable_diffusion(str(folders(kind))))
    expected = checkpoint(build(kind))  # which adds what training code kept and diffusers drops
    dropped = {key for key in expected.keys() - found.keys() if not key.endswith("text_projection")}
    assert all(key.endswith("logit_scale") for key in dropped) and found.keys() <= expected.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key


PUBLISHED = [  # how many tensors the UNets of Runway's and Stability AI's own files have, and some of their names
    (SD1, 686, ["input_blocks.3.0.op.weight", "output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.bias"]),
    (SD2, 686, ["input_blocks.1.1.proj_in.weight", "output_blocks.11.1.transformer_blocks.0.norm1.bias"]),
    (SDXL, 1680, ["label_emb.0.2.bias", "output_blocks.2.2.conv.weight", "input_blocks.8.1.proj_out.weight"]),
]


@pytest.mark.parametrize(("architecture", "count", "some"), PUBLISHED)
def test_networks_of_full_size_have_the_names_that_were_published(
    architecture: Architecture, count: int, some: list[str]
):
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**architecture.unet), AutoencoderKL(**architecture.vae)
    found = {original_key(key, unet.config) for key in unet.state_dict()}
    assert len(found) == count and {*some, "out.0.weight", "out.2.bias", "time_embed.2.weight"} <= found
    assert {f"model.diffusion_model.{name}" for name in found} == set(unet_tensors(unet))
    decoded = dict(vae_tensors(vae))
    assert len(decoded) == 248 and decoded["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert {"decoder.up.3.upsample.conv.weight", "encoder.down.0.downsample.conv.bias"} <= decoded.keys()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("v1", torch.float32), ("v1", torch.float16), ("v2", torch.bfloat16), ("xl_base", torch.float16)],
)
def test_a_single_file_comes_back_tensor_for_tensor(
    kind: str, dtype: torch.dtype, adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(single_file, "ARCHITECTURES", TINY)
    model = adapted(kind)
    expected = merged(model)
    file = write_single_file(model, (STYLE, STUDENT), tmp_path, dtype, Described())
    assert {t.dtype for t in load_file(file).values() if t.is_floating_point()} == {dtype}
    again = load_stable_diffusion(str(file), dtype=dtype)  # by diffusers' conversions
    for network, by_layer in expected.items():
        found = weights({"unet": again.unet, **again.text_encoders}[network])
        for layer, weight in by_layer.items():
            assert torch.equal(found[layer], weight.to(dtype)), layer
    for name in ("unet", "vae", *model.text_encoders):
        ours, theirs = (getattr(one, name).state_dict() for one in (model, again))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
    said = header(file)
    assert (
        said["modelspec.title"].endswith(" + fine-tuned + LCM-LoRA") and "/lora" not in said["modelspec.architecture"]
    )


def test_a_single_file_says_that_it_predicts_velocity(folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(single_file, "ARCHITECTURES", TINY)
    model = load_stable_diffusion(str(folders("v1")), prediction_type="v_prediction")
    model.scheduler_config["rescale_betas_zero_snr"] = True
    file = write_single_file(model, (STUDENT,), tmp_path, torch.float32, Described())
    assert {"v_pred", "ztsnr"} <= load_file(file).keys() and header(file)["modelspec.prediction_type"] == "v"
    assert load_stable_diffusion(str(file)).prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"beta_end": 0.02}, "noise schedule"),
        ({"beta_schedule": "linear"}, "noise schedule"),
        ({"num_train_timesteps": 500}, "noise schedule"),
        ({"scaling_factor": 1.0}, "scale of latents, 1, where programs take 0.18215"),
        ({"shift_factor": 0.1}, "latents are shifted"),
        ({"prediction_type": "sample"}, "predicts the sample"),
    ],
)
def test_a_model_that_one_file_cannot_say_is_refused(change: dict[str, Any], said: str, tmp_path: Path):
    pipeline = build("v1")
    if change.keys() & {"scaling_factor", "shift_factor"}:
        pipeline.vae.register_to_config(**change)
    else:
        pipeline.scheduler = DDIMScheduler.from_config({**SD15_SCHEDULER, **change})
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=f"format=single_file: .*{said}.*; set format=fused"):
        write_single_file(
            load_stable_diffusion(str(tmp_path / "model")), (), tmp_path / "out", torch.float32, Described()
        )
    assert not (tmp_path / "out").exists()


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def student(folders, tmp_path: Path) -> Path:
    """A run's folder with a TCD student and its teacher's LoRA, as training leaves it."""
    model = load_stable_diffusion(str(folders("v1")))
    lora = tmp_path / "run" / "lora"
    random_lora(model, lora / "teacher_lora_weights.safetensors", 2, 2.0, ("to_q", "to_v"), 4)
    random_lora(model, lora / LORA_FILE, 4, 4.0, STUDENT_LAYERS, 3)
    kind = TcdLoraDistillation.kind
    write_manifest(lora, [Adapter(STYLE, "teacher_lora_weights.safetensors"), Adapter(kind)])
    (tmp_path / "run" / "config.yaml").write_text(
        "name: tiny\ndata: null\nmodel:\n  _target_: lcm_lightning.models.stable_diffusion.load_stable_diffusion\n"
        f"  path: {folders('v1')}\n"
    )
    return tmp_path / "run"


def export(*options: str) -> None:
    in_process("lcm_lightning.export", *options)


def test_a_fused_folder_draws_our_picture_in_plain_diffusers(student: Path, tmp_path: Path, folders):
    export(f"run={student}", "format=fused", "dtype=float32", f"output={tmp_path / 'fused'}")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "fused")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is StableDiffusionPipeline and type(pipeline.scheduler) is TCDScheduler
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}
    found = pipeline("a dog", generator=torch.Generator().manual_seed(7), **options).images

    kind, model = TcdLoraDistillation.kind, load_stable_diffusion(str(folders("v1")))
    load_lora(model, student / "lora" / "teacher_lora_weights.safetensors", STYLE.name)
    load_lora(model, student, kind.name)
    way = {"seeds": [7], "steps": 4, "guidance_scale": 1.0, "sampler": kind.sampler}
    base = sample(load_stable_diffusion(str(folders("v1"))), ["a dog"], **way)
    with merged_adapters(model, [STYLE.name, kind.name]):
        expected = sample(model, ["a dog"], **way)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (expected - base).abs().max() > 1e-2


def test_the_command_says_what_it_wrote_and_how_to_use_it(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    export(f"run={student}", "format=diffusers")
    file = student / "exports" / "diffusers" / LORA_FILE
    said = capsys.readouterr().out
    assert file.is_file() and f"{file}  " in said and "TCDScheduler.from_config" in said
    code = said[said.index("from diffusers") :].replace('"a photo of a dog"', '"a dog", output_type="pt"')
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        exec(code, names)  # what is printed runs as it is
    assert names["image"].shape == (3, 32, 32) and type(names["pipe"].scheduler) is TCDScheduler


@pytest.mark.parametrize("source", ["file", "zero_snr"])
def test_the_printed_program_walks_as_generate_does(
    source: str, tmp_path: Path, student: Path, folders, monkeypatch: pytest.MonkeyPatch
):
    """Of a model in one file, which no `DiffusionPipeline` opens; and of one whose schedule ends in noise alone."""
    monkeypatch.setattr(single_file, "ARCHITECTURES", TINY)
    if source == "file":
        model = load_stable_diffusion(str(folders("v1")), prediction_type="v_prediction")
        path = write_single_file(model, (), tmp_path, torch.float32, Described())
    else:
        path = tmp_path / "model"
        zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "leading"}
        build_pipeline(TINY["v1"], **zero_snr).save_pretrained(path)
    model = load_stable_diffusion(str(path))
    load_lora(model, student / "lora" / LORA_FILE, STYLE.name)
    file = write_diffusers_lora(joint_state_dict(model, [STYLE.name]), model, (STYLE,), tmp_path / "lora")
    code = diffusers_lora(file, model, (STYLE,))
    loading = re.search(r"pipe = (\w+)\.(\w+)\(", code)
    assert loading is not None and hasattr(getattr(diffusers, loading[1]), loading[2])
    if source == "file":  # diffusers reads one of full size alone, or asks the hub
        assert loading.groups() == ("StableDiffusionPipeline", "from_single_file")
        base = build("v1").scheduler.config
    else:
        base = DiffusionPipeline.from_pretrained(path).scheduler.config
    line = next(line for line in code.splitlines() if line.startswith("pipe.scheduler"))
    pipe = SimpleNamespace(scheduler=SimpleNamespace(config=base))
    exec(line, {"pipe": pipe, "DDIMScheduler": DDIMScheduler})
    expected: Any = make_scheduler(STYLE.sampler, model.scheduler_config)
    assert pipe.scheduler.config.prediction_type == expected.config.prediction_type == "v_prediction"
    for scheduler in (pipe.scheduler, expected):
        scheduler.set_timesteps(4)
    assert torch.equal(pipe.scheduler.timesteps, expected.timesteps)
    assert torch.equal(pipe.scheduler.alphas_cumprod, expected.alphas_cumprod)


@pytest.mark.parametrize(
    ("kind", "sampler"), [(Dmd2LoraDistillation.kind, "LCM"), (PcmLoraDistillation.kind, "TCD"), (STYLE, "DDIM")]
)
def test_what_to_set_is_named_as_interfaces_do(kind: AdapterKind, sampler: str):
    assert f" steps of {sampler} at CFG" in settings(kind)


def test_a_lora_s_file_gives_the_other_layout(folders, student: Path, tmp_path: Path):
    options = ("model=sd15", f"model.path={folders('v1')}", f"lora={student / 'lora' / LORA_FILE}", "lora_role=tcd")
    export(*options, "format=kohya", "dtype=float16", f"output={tmp_path / 'out'}")
    tensors = load_file(tmp_path / "out" / KOHYA_FILE)
    assert {t.dtype for key, t in tensors.items() if "lora_" in key.partition(".")[2]} == {torch.float16}
    assert header(tmp_path / "out" / KOHYA_FILE)["sampler"] == "TCDScheduler"


def test_a_folder_written_over_holds_nothing_of_what_it_held(folders, tmp_path: Path):
    """diffusers takes shards where there are any, and a network's `.bin` where its `.safetensors` has another name."""
    old = build("v1")
    with torch.no_grad():
        for parameter in old.unet.parameters():
            parameter.fill_(7.0)
    old.save_pretrained(tmp_path, max_shard_size="50KB")
    (tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors").touch()
    (tmp_path / "unet" / "model.onnx").touch()
    (tmp_path / ".writing.tmp" / "unet").mkdir(parents=True)  # of an export that was killed
    kept = [tmp_path / "notes.txt", tmp_path / "unet" / "notes.txt", tmp_path / "mine" / "other.safetensors"]
    kept[2].parent.mkdir()
    for file in kept:
        file.touch()
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    model = load_stable_diffusion(str(folders("v1")))
    write_pipeline(model, (), tmp_path, torch.float32)
    assert sorted(file.name for file in (tmp_path / "unet").iterdir()) == [
        *("config.json", "diffusion_pytorch_model.safetensors", "notes.txt")
    ]
    assert all(file.is_file() for file in kept) and not (tmp_path / ".writing.tmp").exists()
    assert [file.name for file in (tmp_path / "vae").glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(again.unet.conv_in.weight, model.unet.conv_in.weight)


def test_what_cannot_be_written_leaves_the_folder_as_it_was(tmp_path: Path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.safetensors").write_text("before")
    with pytest.raises(OSError, match="disk"), whole_files(tmp_path, last="model_index.json") as temporary:
        (temporary / "unet").mkdir()
        (temporary / "unet" / "other.safetensors").touch()
        raise OSError("the disk is full")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["unet", "unet/model.safetensors"]


def write_without_runtime(model: StableDiffusion, folder: Path) -> None:
    """A folder of graphs, without the graphs."""
    pipeline = fuse(model, (), torch.float32)
    write_network_folder(pipeline, graphs(pipeline, timestep_rank=0), folder, lambda graph, place: 0.0, "model.onnx")


@pytest.mark.parametrize("kind", ["full", "fused", "graphs"])
def test_folders_do_not_say_where_their_model_was(kind: str, tmp_path: Path):
    source = tmp_path / "home" / "alice" / "model"
    if kind == "full":
        save_full_lcm(build("v1"), source)
    else:
        build("v1").save_pretrained(source)
    model = load_stable_diffusion(str(source))
    (write_without_runtime if kind == "graphs" else partial(write_pipeline, kinds=(), dtype=torch.float32))(
        model=model, folder=tmp_path / "out"
    )
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {"unet", "text_encoder"} <= {file.parent.name for file in files}
    assert not [file for file in files if b"alice" in file.read_bytes()]


def test_transformers_4_opens_the_tokenizers_of_graphs_folders(folders, tmp_path: Path):
    write_without_runtime(load_stable_diffusion(str(folders("xl_base"))), tmp_path)
    for name in ("tokenizer", "tokenizer_2"):
        assert {"vocab.json", "merges.txt"} <= {file.name for file in (tmp_path / name).iterdir()}


# ---- other runtimes ------------------------------------------------------------------------------------------------

Run = Callable[[str, dict[str, np.ndarray]], np.ndarray]


def draw_elsewhere(folder: Path, run: Run, scheduler: Any, prompt: str, seed: int, steps: int) -> Tensor:
    """An image [1, 3, H, W] in [0, 1] by networks that `run` runs by name; torch's is nothing but the scheduler."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer([prompt], padding="max_length", truncation=True, return_tensors="np").input_ids.astype(np.int64)
    text = run("text_encoder", {"input_ids": ids})
    unet, vae = (json.loads((folder / name / "config.json").read_text()) for name in ("unet", "vae_decoder"))
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, unet["in_channels"], unet["sample_size"], unet["sample_size"], generator=generator)
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        inputs = {"sample": latents.numpy(), "timestep": timestep.numpy(), "encoder_hidden_states": text}
        output = torch.from_numpy(run("unet", inputs))
        latents = scheduler.step(output, timestep, latents, generator=generator).prev_sample
    image = torch.from_numpy(run("vae_decoder", {"latent_sample": (latents / vae["scaling_factor"]).numpy()}))
    return (image / 2 + 0.5).clamp(0, 1)


def with_student(folder: Path, run: Path, kind: AdapterKind) -> tuple[Tensor, Tensor]:
    """Our picture of a dog, and the base model's."""
    model, base = load_stable_diffusion(str(folder)), load_stable_diffusion(str(folder))
    load_lora(model, run / "lora" / LORA_FILE, kind.name)
    way = {"seeds": [7], "steps": kind.steps, "guidance_scale": 1.0, "sampler": kind.sampler}
    with merged_adapters(model, [kind.name]):
        return sample(model, ["a dog"], **way), sample(base, ["a dog"], **way)


def student_alone(run: Path, kind: AdapterKind) -> None:
    """Make the run one of the student `kind` on the base model itself."""
    write_manifest(run / "lora", [Adapter(kind)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_onnxruntime_alone_draws_the_student_s_picture(
    dtype: str, student: Path, tmp_path: Path, folders, capsys: pytest.CaptureFixture[str]
):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    student_alone(student, STUDENT)
    export(f"run={student}", "format=onnx", f"dtype={dtype}", f"output={tmp_path / 'onnx'}")
    differences = [float(x) for x in re.findall(r"onnxruntime is off torch by at most (\S+)", capsys.readouterr().out)]
    assert len(differences) == 4 and max(differences) < (1e-4 if dtype == "float32" else 0.1)

    def run(name: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        session = onnxruntime.InferenceSession(tmp_path / "onnx" / name / "model.onnx")
        half = {x.name for x in session.get_inputs() if x.type == "tensor(float16)"}
        cast = {key: value.astype(np.float16) if key in half else value for key, value in inputs.items()}
        return session.run(None, cast)[0].astype(np.float32)

    scheduler = LCMScheduler.from_pretrained(tmp_path / "onnx" / "scheduler")
    found = draw_elsewhere(tmp_path / "onnx", run, scheduler, "a dog", 7, STUDENT.steps)
    expected, base = with_student(folders("v1"), student, STUDENT)
    torch.testing.assert_close(found, expected, atol=1e-4 if dtype == "float32" else 0.05, rtol=0)
    assert (expected - base).abs().max() > 1e-2


def graph_of(module: nn.Module) -> Graph:
    inputs, axes = {"x": torch.randn(2, 3)}, {"x": {0: "batch_size"}}
    return Graph("unet", module, None, inputs, axes, ("y",))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.5])
def test_a_network_that_another_runtime_computes_wrongly_is_refused(wrong: float):
    right = torch.ones(2, 3)
    found = right.clone()
    found[1, 1] += wrong
    graph = graph_of(nn.Identity())
    with pytest.raises(UserError, match=r"unet is off torch by .*set dtype=float32"):
        largest_difference(graph, [right, found], [right, right], limit=0.1)
    with pytest.raises(UserError, match="unet is off torch"):
        largest_difference(graph, [found, right], [right, right], limit=0.1)
    assert largest_difference(graph, [100 * right + 1], [100 * right], limit=0.1) == 1  # a share of the values


@pytest.mark.parametrize(("kind", "vae"), [("xl_base", "float32"), ("v1", "float16")])
def test_a_vae_that_overflows_in_float16_is_written_in_float32_for_every_runtime(
    kind: str, vae: str, folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    onnx, openvino = dict[str, str](), dict[str, str]()

    def to_onnx(graph: Graph, place: Path) -> float:
        (dtype,) = {parameter.dtype for parameter in graph.module.parameters()}
        onnx[graph.folder] = str(dtype).removeprefix("torch.")
        return 0.0

    def to_openvino(graph: Graph, place: Path, *, half: bool) -> float:
        openvino[graph.folder] = "float16" if half else "float32"
        return 0.0

    monkeypatch.setattr("lcm_lightning.exports.onnx_folder.export", to_onnx)
    monkeypatch.setattr("lcm_lightning.exports.openvino_folder.export_network", to_openvino)
    monkeypatch.setattr("lcm_lightning.exports.openvino_folder.export_tokenizer", lambda tokenizer, place: None)
    for write in (write_onnx, write_openvino):
        write(load_stable_diffusion(str(folders(kind))), (), tmp_path / write.__name__, torch.float16)
    for written in (onnx, openvino):
        assert {written.pop("vae_decoder"), written.pop("vae_encoder")} == {vae}
        assert set(written.values()) == {"float16"} and "unet" in written
    assert ("VAE overflows in it" in caplog.text) == (vae == "float32")


def test_a_disk_that_is_full_is_no_error_of_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(save_model=full))
    with pytest.raises(OSError, match="basic_ios"):
        save_model(None, tmp_path / "x.xml", half=False)


def test_a_unet_that_projects_captions_first_is_traced_with_captions_as_wide_as_it_takes(folders):
    pipeline = build("v1")
    pipeline.unet = UNet2DConditionModel.from_config(
        {**pipeline.unet.config, "encoder_hid_dim": 24, "encoder_hid_dim_type": "text_proj"}
    )
    (unet,) = (graph for graph in graphs(pipeline, timestep_rank=0) if graph.folder == "unet")
    with torch.no_grad():
        assert unet.module(*unet.inputs.values())[0].shape == unet.inputs["sample"].shape


@pytest.mark.parametrize("name", ["it's", 'a "b"', "back\\slash"])
def test_a_printed_program_takes_any_path(name: str, folders, tmp_path: Path):
    model = load_stable_diffusion(str(folders("v1")))
    model.name_or_path = name
    for code in (
        diffusers_lora(tmp_path / name / "x.safetensors", model, ()),
        diffusers_folder(tmp_path / name, model, (), torch.float16),
        optimum_folder(tmp_path / name, model, ()),
        openvino_folder(tmp_path / name, model, ()),
    ):
        texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
        assert str(tmp_path / name) in texts


def test_onnx_graphs_do_not_say_where_their_code_was(tmp_path: Path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    assert export_onnx(graph_of(OneOutput()), tmp_path) < 1e-5
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert not [file for file in tmp_path.iterdir() if b".py" in file.read_bytes()]


class OneOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 512)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layer(x),)


def tcd(solver_steps: int, eta: float = 0.0) -> AdapterKind:
    """A TCD student of a solver of so many steps."""
    kind = TcdLoraDistillation.kind
    settings = {**kind.sampler.settings, "original_inference_steps": solver_steps, "eta": eta}
    return replace(kind, sampler=replace(kind.sampler, settings=settings))


@pytest.mark.parametrize(("prediction", "drawn"), [("epsilon", True), ("v_prediction", False)])
def test_it_is_said_where_openvino_genai_cannot_draw(prediction: str, drawn: bool, caplog: pytest.LogCaptureFixture):
    schedule = {**SD15_SCHEDULER, "prediction_type": prediction}
    known_scheduler(make_scheduler(STUDENT.sampler, schedule), STUDENT, schedule)
    assert ("OpenVINO GenAI cannot draw" in caplog.text) != drawn


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (STUDENT, "LCMScheduler"),
        (tcd(8), "DDIMScheduler"),  # 999, 749, 499, 249 are DDIM's steps too
        (tcd(50), "TCDScheduler"),  # 999, 759, 499, 259 are not
        (tcd(8, eta=0.3), "TCDScheduler"),
    ],
)
def test_a_scheduler_that_openvino_genai_does_not_have_is_one_that_it_has_where_both_take_the_same_steps(
    kind: AdapterKind, name: str, folders, caplog: pytest.LogCaptureFixture
):
    model = load_stable_diffusion(str(folders("v1")))
    model.scheduler_config["set_alpha_to_one"] = True
    own: Any = make_scheduler(kind.sampler, model.scheduler_config)
    found = known_scheduler(own, kind, model.scheduler_config)
    assert type(found).__name__ == name
    assert ("OpenVINO GenAI has no TCDScheduler" in caplog.text) == (name == "TCDScheduler")
    if name == "DDIMScheduler":
        output, x_t = torch.randn(2, 1, 4, 8, 8)
        for timestep in own.timesteps:
            expected = own.step(output, timestep, x_t, eta=0.0).prev_sample
            torch.testing.assert_close(found.step(output, timestep, x_t).prev_sample, expected)


@pytest.mark.slow
def test_openvino_alone_draws_the_student_s_picture(student: Path, tmp_path: Path, folders):
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("openvino_tokenizers")
    student_alone(student, tcd(8))
    export(f"run={student}", "format=openvino", f"output={tmp_path / 'ov'}")
    index = json.loads((tmp_path / "ov" / "model_index.json").read_text())
    assert index["scheduler"][1] == "DDIMScheduler"

    def run(name: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        network = openvino.compile_model(tmp_path / "ov" / name / "openvino_model.xml", "CPU", exact)
        return network({key: value.reshape(1) if key == "timestep" else value for key, value in inputs.items()})[0]

    scheduler = DDIMScheduler.from_pretrained(tmp_path / "ov" / "scheduler")
    found = draw_elsewhere(tmp_path / "ov", run, scheduler, "a dog", 7, 4)
    expected, base = with_student(folders("v1"), student, tcd(8))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (expected - base).abs().max() > 1e-2
    tokens = openvino.compile_model(tmp_path / "ov" / "tokenizer" / "openvino_tokenizer.xml", "CPU")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "ov" / "tokenizer")
    for prompt in ("a dog", "", "a very long prompt about nothing at all " * 9):
        assert tokens([prompt])["input_ids"][0].tolist() == tokenizer(prompt, truncation=True).input_ids


@pytest.mark.slow
def test_sdxl_s_networks_are_the_same_in_onnxruntime_and_openvino(folders, tmp_path: Path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino_tokenizers")
    for write, dtype, limit in (
        (write_onnx, torch.float32, 1e-4),
        (write_onnx, torch.float16, 1e-2),
        (write_openvino, torch.float32, 1e-4),
    ):
        model, place = load_stable_diffusion(str(folders("xl_base"))), tmp_path / f"{write.__name__} {dtype}"
        found = write(model, (), place, dtype)
        assert {file.split("/")[0] for file in found} == {
            *("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder")
        }
        assert max(found.values()) < limit


def test_sdxl_s_pooled_embedding_is_as_precise_as_the_sizes_it_stands_beside():
    """torch raises the one to the other's float32 by itself, and exports a graph that no runtime takes."""
    told: dict[str, Tensor] = {}

    class Network(nn.Module):
        def forward(self, *_: Tensor, added_cond_kwargs: dict[str, Tensor], **__: object) -> tuple[Tensor]:
            told.update(added_cond_kwargs)
            return (told["text_embeds"],)

    half = torch.zeros(1, dtype=torch.float16)
    Unet(Network(), ("text_embeds", "time_ids"))(half, half, half, half, half)
    assert (told["text_embeds"].dtype, told["time_ids"].dtype) == (torch.float32, torch.float16)


def test_a_missing_package_is_named_with_the_extra(
    student: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lcm_lightning.export.find_spec", lambda name: None)
    for name, package in (("onnx", "onnx"), ("openvino", "openvino")):
        said = refused(capsys, f"run={student}", f"format={name}")
        assert f"format={name}: needs {package}; pip install 'lcm-lightning[{name}]'" in said


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        export(*options)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_written_is_refused_with_a_remedy(
    student: Path, tmp_path: Path, folders, capsys: pytest.CaptureFixture[str]
):
    assert "format=kohia: expected one of diffusers, kohya" in refused(capsys, f"run={student}", "format=kohia")
    for nothing in ((), ("format=null",)):
        assert "error: format is not set: expected one of diffusers, kohya" in refused(
            capsys, f"run={student}", *nothing
        )
    base = ("model=sd15", f"model.path={folders('v1')}", f"output={tmp_path / 'out'}")
    assert "there is none; give run=outputs/... or lora=..." in refused(capsys, *base, "format=kohya")
    assert not (tmp_path / "out").exists()
    assert "has no header to say it in" in refused(capsys, *base, "format=fused", "title=Mine")
    assert "dtype=int8: format=kohya takes float32" in refused(capsys, *base, "format=kohya", "dtype=int8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    assert "holds files already; set overwrite=true" in refused(capsys, *base, "format=fused")
    save_full_lcm(build("v1"), tmp_path / "full")
    full = ("model=sd15", f"model.path={tmp_path / 'full'}", f"output={tmp_path / 'of_full'}")
    assert "set format=fused" in refused(capsys, *full, "format=single_file")
    assert "set format=fused" in refused(capsys, *full, "format=diffusers")


def test_a_full_lcm_s_folder_draws_as_it_did(tmp_path: Path):
    save_full_lcm(build("v1"), tmp_path / "full")
    export(
        "model=sd15", f"model.path={tmp_path / 'full'}", "format=fused", "dtype=float32", f"output={tmp_path / 'out'}"
    )
    before, after = (DiffusionPipeline.from_pretrained(tmp_path / name) for name in ("full", "out"))
    assert type(after.scheduler) is LCMScheduler and type(after) is type(before)
    drawn = [
        pipe("a dog", num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="pt").images
        for pipe in (before, after)
    ]
    torch.testing.assert_close(*drawn, atol=1e-5, rtol=0)
