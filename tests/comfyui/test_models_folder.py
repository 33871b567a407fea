"""ComfyUI's models folder: workflows run from it, on bundles that are exported on first use and kept.

The folder holds zimage-nano in ComfyUI's single files, beside a `comfy` folder with its tokenizer in three files.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shared import BUNDLE, ROOT

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402
from single_files import comfyui_names, ldm_vae  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from zimage_rt.bundle.manifest import read_manifest  # noqa: E402
from zimage_rt.comfyui.files import FolderFiles, find_file, list_files  # noqa: E402
from zimage_rt.comfyui.graph import WorkflowError  # noqa: E402
from zimage_rt.comfyui.kept_bundles import ExportFailed, to_toml  # noqa: E402
from zimage_rt.comfyui.made_parts import MissingPart, make_tokenizer  # noqa: E402
from zimage_rt.comfyui.model_parts import Parts, group  # noqa: E402
from zimage_rt.comfyui.models_folder import ModelsFolder  # noqa: E402
from zimage_rt.comfyui.plan import plan  # noqa: E402
from zimage_rt.comfyui.workflow_file import parse_workflow  # noqa: E402

NANO = ROOT / "checkpoints" / "zimage-nano"
LORA = ROOT / "checkpoints" / "zimage-nano-cyanotype" / "cyanotype.safetensors"
DATA = ROOT / "tests" / "data" / "comfyui"
GRAPHS: Mapping[str, dict[str, Any]] = json.loads((DATA / "graphs.json").read_text(encoding="utf-8"))
# What no tensor of nano shows: its VAE has 16 groups where Flux's has 32, and its text encoder another theta.
RECIPE = """
precision = "fp32"
[config.vae]
norm_num_groups = 16
[config.text_encoder]
rope_parameters = { rope_theta = 10000.0, rope_type = "default" }
"""
TRANSFORMER, ENCODER, VAE = "zimage_nano_bf16.safetensors", "qwen3_nano.safetensors", "ae_nano.safetensors"
FOLDERS = FolderFiles({}, None, None, (DATA,))
MODEL, CLIP, FULL = ("diffusion_models", TRANSFORMER), ("text_encoders", ENCODER), ("vae", VAE)


def save(tensors: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ComfyUI with `models` and `comfy`."""
    root = tmp_path_factory.mktemp("ComfyUI")
    models = root / "models"
    weights = load_file(NANO / "transformer" / "diffusion_pytorch_model.safetensors")
    save(comfyui_names(weights), models / "diffusion_models" / TRANSFORMER)
    encoder = load_file(NANO / "text_encoder" / "model.safetensors")
    save({f"model.{name}": tensor for name, tensor in encoder.items()}, models / "text_encoders" / ENCODER)
    vae = load_file(NANO / "vae" / "diffusion_pytorch_model.safetensors")
    save(
        {
            ldm_vae(name): tensor[:, :, None, None] if "attentions" in name and tensor.ndim == 2 else tensor
            for name, tensor in vae.items()
        },
        models / "vae" / VAE,
    )
    (models / "loras").mkdir()
    shutil.copy(LORA, models / "loras")
    tokenizer = root / "comfy" / "text_encoders" / "qwen25_tokenizer"
    tokenizer.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(NANO / "tokenizer" / name, tokenizer)
    (models / "zimage_rt").mkdir()
    (models / "zimage_rt" / "recipe.toml").write_text(RECIPE)
    return root


def save_taef1(models: Path) -> None:
    """Write nano's tiny VAE as the two files of ComfyUI's `vae_approx`, one of each format."""
    tensors = load_file(NANO / "tiny_vae" / "diffusion_pytorch_model.safetensors")
    for part, first in (("encoder", 0), ("decoder", 1)):  # the original's decoder begins with a clamp
        own = {name.split(".", 2)[2]: tensor for name, tensor in tensors.items() if name.startswith(part)}
        named = {f"{int(name.partition('.')[0]) + first}.{name.partition('.')[2]}": own[name] for name in own}
        path = models / "vae_approx" / f"taef1_{part}"
        if part == "encoder":
            save(named, path.with_suffix(".safetensors"))
        else:
            torch.save(named, path.with_suffix(".pth"))


def workflow(graph: dict[str, Any], models: Path, out: Path) -> subprocess.Popen[str]:
    file = out.parent / f"{out.name}.json"
    file.write_text(json.dumps(graph))
    command = [sys.executable, "-m", "zimage_rt.cli.main", "workflow", file, "--models", models, "-o", out]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def drawn(process: subprocess.Popen[str]) -> tuple[list[np.ndarray], str]:
    """The images of a command, and its standard error."""
    out, error = process.communicate()
    assert process.returncode == 0, error
    return [np.asarray(Image.open(line).convert("RGB")) for line in out.splitlines()], error


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / ((one.astype(float) - other.astype(float)) ** 2).mean()))


def with_node(graph: Mapping[str, Any], kind: str, links: Mapping[str, str], **inputs: Any) -> dict[str, Any]:
    """A graph with a further node `new`, and links to its first output: `{"4": "model"}` by node and input."""
    copied = copy.deepcopy(dict(graph))
    copied["new"] = {"class_type": kind, "inputs": inputs}
    for name, key in links.items():
        copied[name]["inputs"][key] = ["new", 0]
    return copied


def with_second_model(graph: Mapping[str, Any], unet: str, vae: str) -> dict[str, Any]:
    """A graph with a second sampler and decoder, of another model on the same prompts."""
    copied = with_node(graph, "UNETLoader", {}, unet_name=unet)
    copied["8b"], copied["9b"], copied["10b"] = (copy.deepcopy(copied[name]) for name in ("8", "9", "10"))
    copied["3b"] = {"class_type": "VAELoader", "inputs": {"vae_name": vae}}
    copied["8b"]["inputs"]["model"], copied["9b"]["inputs"]["samples"] = ["new", 0], ["8b", 0]
    copied["9b"]["inputs"]["vae"], copied["10b"]["inputs"]["images"] = ["3b", 0], ["9b", 0]
    return copied


def test_a_workflow_runs_from_the_models_folder(comfyui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, graph = comfyui / "models", GRAPHS["01_template_turbo"]
    kept = models / "zimage_rt"
    lora = with_node(
        graph, "LoraLoaderModelOnly", {"4": "model"}, model=["1", 0], lora_name=LORA.name, strength_model=0.8
    )
    # Two processes at once: one exports, the other waits.
    started = [workflow(graph, models, tmp_path / "plain"), workflow(lora, models, tmp_path / "lora")]
    ((plain,), error), ((styled,), other_error) = (drawn(process) for process in started)
    assert psnr(plain, np.asarray(Image.open(DATA / "input_scene.png").convert("RGB"))) > 48
    assert psnr(plain, styled) < 30
    told = sorted([error.strip().splitlines(), other_error.strip().splitlines()], key=len)
    assert [len(lines) for lines in told] == [1, 2] and "waiting" in told[0][0], told
    assert "exporting" in told[1][0] and "exported in" in told[1][1], told
    (bundle,) = (path.parent for path in kept.glob("*/manifest.json"))
    manifest = read_manifest(bundle)
    assert "full_vae_decoder" in manifest.modules and "tiny_vae_decoder" not in manifest.modules
    assert manifest.pipeline.prompt_prefix == "<|im_start|>user\n"
    assert manifest.pipeline.prompt_suffix == "<|im_end|>\n<|im_start|>assistant\n"

    # Another model with the same text encoder has a bundle of its own, which shares files. Nothing else is exported,
    # although TAEF1 is there now: the first bundle does not need it.
    weights = load_file(NANO.with_name("zimage-nano-base") / "transformer" / "diffusion_pytorch_model.safetensors")
    save(comfyui_names(weights), models / "unet" / "z" / "base.safetensors")
    save_taef1(models)
    both = with_second_model(graph, "z\\base.safetensors", VAE)
    (first, second), error = drawn(workflow(both, models, tmp_path / "both"))
    assert (first == plain).all() and psnr(first, second) < 45
    assert error.count("exporting") == 1 and str(models / "unet" / "z" / "base.safetensors") in error
    (other,) = (path.parent for path in kept.glob("base-*/manifest.json"))
    assert (other / "text_encoder.safetensors").samefile(bundle / "text_encoder.safetensors")
    assert not (other / "transformer.safetensors").samefile(bundle / "transformer.safetensors")
    tiny = read_manifest(BUNDLE).files["tiny_vae_decoder.safetensors"]
    assert read_manifest(other).files["tiny_vae_decoder.safetensors"] == tiny

    # A file that was only touched is compared with what the bundle was exported from.
    said: list[str] = []
    path = models / "diffusion_models" / TRANSFORMER
    files = ModelsFolder(models).files(parse_workflow(graph), FOLDERS)
    os.utime(path, (1, 1))
    assert files.ready(files.bundle(*MODEL), said.append) == bundle
    assert len(said) == 1 and "compared" in said[0]
    assert files.ready(files.bundle(*CLIP), said.append) == bundle and len(said) == 1

    # One that changed is exported again, and so is a bundle without the tiny VAE that a workflow names. The exporter
    # fails here, and leaves the old bundle.
    no_exporter(tmp_path, monkeypatch)
    tiny_graph = copy.deepcopy(graph)
    tiny_graph["3b"] = {"class_type": "VAELoader", "inputs": {"vae_name": "taef1"}}
    tiny_files = ModelsFolder(models).files(parse_workflow(tiny_graph), FOLDERS)
    assert tiny_files.bundle(*MODEL) == tiny_files.bundle("vae", "taef1") == files.bundle(*MODEL)
    with pytest.raises(ExportFailed):
        tiny_files.ready(tiny_files.bundle("vae", "taef1"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ExportFailed):
        files.ready(files.bundle(*MODEL))
    assert read_manifest(bundle) == manifest
    path.write_bytes(content)
    assert files.ready(files.bundle(*MODEL)) == bundle
    shutil.rmtree(models / "vae_approx")


def no_exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the exporter's process end at once; the file that ends it."""
    torch_module = tmp_path / "path" / "torch" / "__init__.py"
    torch_module.parent.mkdir(parents=True)
    torch_module.write_text("raise ModuleNotFoundError('no torch', name='torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    return torch_module


# --- what a workflow's files are ----------------------------------------------------------------------------------


def parts(graph: dict[str, Any]) -> tuple[Parts, ...]:
    return group(parse_workflow(graph))


def test_loaders_that_meet_are_one_bundle() -> None:
    for graph in GRAPHS.values():
        assert parts(graph) == (Parts(MODEL, CLIP, FULL),)


def test_models_that_share_a_text_encoder_are_bundles_of_their_own() -> None:
    base = ("diffusion_models", "z/base.sft")
    for vae in (VAE, "other.safetensors"):
        graph = with_second_model(GRAPHS["01_template_turbo"], "z\\base.sft", vae)
        assert parts(graph) == (Parts(MODEL, CLIP, FULL), Parts(base, CLIP, ("vae", vae)))
    refined = with_second_model(GRAPHS["01_template_turbo"], "z/base.sft", "other.safetensors")
    refined["8b"]["inputs"]["latent_image"] = ["8", 0]
    assert parts(refined) == (Parts(MODEL, CLIP, FULL), Parts(base, CLIP, ("vae", "other.safetensors")))


def test_a_model_with_two_text_encoders_or_vaes_is_two_bundles(comfyui: Path) -> None:
    graph = with_second_model(GRAPHS["01_template_turbo"], TRANSFORMER, "taef1")
    assert parts(graph) == (Parts(MODEL, CLIP, FULL),)
    graph["3b"]["inputs"]["vae_name"] = "b.safetensors"
    assert parts(graph) == (Parts(MODEL, CLIP, FULL), Parts(MODEL, CLIP, ("vae", "b.safetensors")))
    graph["3b"]["inputs"]["vae_name"] = VAE
    graph["5b"] = {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox", "clip": ["2b", 0]}}
    graph["2b"] = {"class_type": "CLIPLoader", "inputs": {"clip_name": "b.safetensors"}}
    graph["8b"]["inputs"]["positive"] = graph["8b"]["inputs"]["negative"] = ["5b", 0]
    other = ("text_encoders", "b.safetensors")
    assert parts(graph) == (Parts(MODEL, CLIP, FULL), Parts(MODEL, other, FULL))
    models = comfyui / "models"
    (models / "clip").mkdir()
    (models / "clip" / "b.safetensors").touch()
    files = ModelsFolder(models).files(parse_workflow(graph), FOLDERS)
    model, encoder = files.bundle(*MODEL), files.bundle(*other)
    assert model != encoder == files.together("text_encoder", model, encoder)
    assert model == files.together("text_encoder", model, files.bundle(*CLIP))
    shutil.rmtree(models / "clip")


def test_a_controlnet_is_in_the_bundle_of_the_model_that_follows_it() -> None:
    graph = with_node(GRAPHS["05_img2img_denoise_05"], "ModelPatchLoader", {}, name="fun.safetensors")
    (sampler,) = (node for node in graph.values() if node["class_type"] == "KSampler")
    (decoder,) = (node for node in graph.values() if node["class_type"] == "VAEDecode")
    image = next(name for name, node in graph.items() if node["class_type"] == "LoadImage")
    follow = {"model": sampler["inputs"]["model"], "model_patch": ["new", 0], "vae": decoder["inputs"]["vae"]}
    graph["c"] = {"class_type": "QwenImageDiffsynthControlnet", "inputs": {**follow, "image": [image, 0]}}
    sampler["inputs"]["model"] = ["c", 0]
    assert parts(graph) == (Parts(MODEL, CLIP, FULL, ("model_patches", "fun.safetensors")),)


def test_a_checkpoint_has_all_parts(tmp_path: Path) -> None:
    graph = copy.deepcopy(GRAPHS["01_template_turbo"])
    graph["1"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "all/z.safetensors"}}
    graph["5"]["inputs"]["clip"], graph["9"]["inputs"]["vae"] = ["1", 1], ["1", 2]
    whole = ("checkpoints", "all/z.safetensors")
    assert parts(graph) == (Parts(whole, whole, whole),)
    (tmp_path / "checkpoints" / "all").mkdir(parents=True)
    (tmp_path / "checkpoints" / "all" / "z.safetensors").touch()
    shutil.copytree(NANO / "tokenizer", tmp_path / "tokenizer")
    made = ModelsFolder(tmp_path).ingredients(Parts(whole, whole, whole), {})
    assert list(made.recipe["parts"]) == ["tokenizer"]
    graph["9"]["inputs"]["vae"] = ["3", 0]
    assert parts(graph) == (Parts(whole, whole, FULL),)
    # Its text encoder cannot serve another model.
    graph["4"]["inputs"]["model"] = ["new", 0]
    graph["new"] = {"class_type": "UNETLoader", "inputs": {"unet_name": TRANSFORMER}}
    assert parts(graph) == (Parts(MODEL, whole, FULL),)
    with pytest.raises(MissingPart, match="load it with CLIPLoader"):
        ModelsFolder(tmp_path).ingredients(Parts(MODEL, whole), {})


def test_thousands_of_nodes_and_circles_are_grouped() -> None:
    graph = copy.deepcopy(GRAPHS["01_template_turbo"])
    last = "4"
    for i in range(9000):
        graph[f"s{i}"] = {"class_type": "ModelSamplingAuraFlow", "inputs": {"model": [last, 0], "shift": 3.0}}
        last = f"s{i}"
    graph["8"]["inputs"]["model"] = [last, 0]
    assert parts(graph) == (Parts(MODEL, CLIP, FULL),)
    graph["4"]["inputs"]["model"] = [last, 0]
    assert parts(graph) == ()


# --- names and faults -----------------------------------------------------------------------------------------------


def test_missing_files_are_faults_with_those_that_are_there(comfyui: Path) -> None:
    models = ModelsFolder(comfyui / "models")
    graph = copy.deepcopy(GRAPHS["01_template_turbo"])
    graph["1"]["inputs"]["unet_name"] = "../../models/diffusion_models/" + TRANSFORMER
    graph["2"]["inputs"]["clip_name"] = "x" * 5000 + ".safetensors"
    graph["3"]["inputs"]["vae_name"] = "taef1"
    with pytest.raises(WorkflowError) as caught:
        plan(parse_workflow(graph), models.files(parse_workflow(graph), FOLDERS))
    errors = {name: entry["errors"][0] for name, entry in caught.value.node_errors.items()}
    assert {error["type"] for error in errors.values()} == {"value_not_in_list"} and errors.keys() == {"1", "2", "3"}
    for name, file in (("1", TRANSFORMER), ("2", ENCODER), ("3", VAE)):
        assert file in errors[name]["message"] and len(errors[name]["message"]) < 1000
    assert "vae_approx" in errors["3"]["message"]


def test_names_have_either_separator_and_stay_in_their_folder(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.safetensors").touch()
    (tmp_path / "secret.safetensors").touch()
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "a" / "B.GGUF").touch()
    (tmp_path / "a" / "b" / "loop").symlink_to(tmp_path / "a")
    folder = (tmp_path / "a",)
    assert find_file("b/c.safetensors", folder) == find_file("b\\c.safetensors", folder) != None  # noqa: E711
    for name in ("../secret.safetensors", "b/../../secret.safetensors", str(tmp_path / "secret.safetensors"), "", "."):
        assert find_file(name, folder) is None
    for name in ("..\\secret.safetensors", "C:\\secret.safetensors", "x" * 5000, "\0", "\ud800"):
        assert find_file(name, folder) is None
    assert list_files(folder) == ["B.GGUF", "b/c.safetensors"]


def test_a_folder_lists_what_its_loaders_offer(comfyui: Path, tmp_path: Path) -> None:
    models = ModelsFolder(comfyui / "models")
    assert TRANSFORMER in models.list("diffusion_models") and models.list("unet") == models.list("diffusion_models")
    assert models.list("text_encoders") == models.list("clip") == [ENCODER]
    assert models.list("vae") == [VAE] and models.list("loras") == [LORA.name]
    assert models.list("checkpoints") == models.list("anything") == []
    save_taef1(comfyui / "models")
    assert models.list("vae") == [VAE, "taef1"]
    shutil.rmtree(comfyui / "models" / "vae_approx")
    with pytest.raises(MissingPart, match="expected ComfyUI's models folder"):
        ModelsFolder(tmp_path / "none")


def test_comfyuis_tokenizer_is_the_one_that_z_image_has(comfyui: Path, tmp_path: Path) -> None:
    make_tokenizer(comfyui / "comfy" / "text_encoders" / "qwen25_tokenizer", tmp_path)
    made = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert made == json.loads((NANO / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("<|im_start|>user").ids[0] == 3819


def test_without_a_tokenizer_the_error_says_what_to_add(comfyui: Path, tmp_path: Path) -> None:
    alone = tmp_path / "models"
    shutil.copytree(comfyui / "models", alone, ignore=shutil.ignore_patterns("zimage_rt"))
    files = ModelsFolder(alone).files(parse_workflow(GRAPHS["01_template_turbo"]), FOLDERS)
    with pytest.raises(MissingPart, match="`tokenizer` of Tongyi-MAI/Z-Image-Turbo"):
        files.ready(files.bundle(*MODEL))
    (alone / "zimage_rt").mkdir()
    (alone / "zimage_rt" / "recipe.toml").write_text('out = "x"')
    with pytest.raises(ExportFailed, match="expected no out"):
        ModelsFolder(alone).files({}, FOLDERS)


def test_the_exporters_errors_are_passed_on(comfyui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = copy.deepcopy(GRAPHS["01_template_turbo"])
    graph["1"]["inputs"]["unet_name"] = "flux.safetensors"
    flux = comfyui / "models" / "unet" / "flux.safetensors"
    save({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, flux)
    files = ModelsFolder(comfyui / "models", tmp_path / "kept").files(parse_workflow(graph), FOLDERS)
    bundle = files.bundle("diffusion_models", "flux.safetensors")
    with pytest.raises(ExportFailed, match=r"looks like a Flux transformer.*by hand: zimage-export .*\.toml"):
        files.ready(bundle)
    assert not Path(bundle).exists() and Path(f"{bundle}.toml").is_file()
    # Other ends of the exporter's process: a missing extra, a lack of memory, Ctrl-C.
    torch_module = no_exporter(tmp_path, monkeypatch)
    with pytest.raises(ExportFailed, match=r"pip install 'zimage-rt\[export\]'"):
        files.ready(bundle)
    torch_module.write_text("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(ExportFailed, match="ended by signal SIGKILL, often for lack of memory"):
        files.ready(bundle)
    torch_module.write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        files.ready(bundle)
    flux.unlink()


def test_a_recipe_is_toml() -> None:
    table = {"a": 'quote " back\\ \x7f é', "b": {"c d": [1, 2.5, True], "e": {"f": "g"}}, "h": False}
    assert tomllib.loads(to_toml(table)) == table
