"""Files of tensors, exact loading, and the key layouts of LoRA and mask decoders."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from torch import nn  # noqa: E402

from glesam_ros.models.glesam import catalogue  # noqa: E402
from glesam_ros.models.glesam.weights import (  # noqa: E402
    decoder_state,
    load_exactly,
    lora_to_diffusers,
    lora_to_peft,
    read_tensors,
)

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


@pytest.mark.parametrize("wrap", ["", "model", "state_dict"])
def test_torch_files_with_and_without_a_wrapper(tmp_path, wrap):
    torch.save({wrap: STATE} if wrap else STATE, tmp_path / "x.pt")
    found = read_tensors(tmp_path / "x.pt")
    assert list(found) == list(STATE) and all(torch.equal(found[k], STATE[k]) for k in STATE)


def test_torch_files_of_the_layout_before_zip(tmp_path):
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    found = read_tensors(tmp_path / "old.pt")
    assert list(found) == list(STATE) and all(torch.equal(found[k], STATE[k]) for k in STATE)


def test_safetensors(tmp_path):
    safetensors.save_file(STATE, tmp_path / "x.safetensors")
    assert torch.equal(read_tensors(tmp_path / "x.safetensors")["a.weight"], STATE["a.weight"])


def test_safetensors_under_the_name_of_a_checkpoint(tmp_path):
    safetensors.save_file(STATE, tmp_path / "sam_vit_b_01ec64.pth")
    assert torch.equal(read_tensors(tmp_path / "sam_vit_b_01ec64.pth")["a.bias"], STATE["a.bias"])


def test_what_is_no_file_of_tensors(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no file"):
        read_tensors(tmp_path / "none.pt")
    for name in ("x.pt", "x.safetensors"):
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(ValueError, match="cannot read it"):
            read_tensors(tmp_path / name)
    torch.save({"weight": torch.ones(2), "step": 3}, tmp_path / "y.pt")
    with pytest.raises(ValueError, match="state dict of tensors, got step"):
        read_tensors(tmp_path / "y.pt")
    torch.save([1, 2], tmp_path / "z.pt")
    with pytest.raises(ValueError, match="got list"):
        read_tensors(tmp_path / "z.pt")


def test_every_wrong_key_is_named_and_nothing_is_loaded():
    module = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(1, 1)})
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = {"a.weight": torch.zeros(3, 3), "a.bias": torch.zeros(2), "c.weight": torch.zeros(1)}
    with pytest.raises(ValueError) as error:
        load_exactly(module, state, "my.pt")
    text = str(error.value)
    for part in ("my.pt", "missing: b.weight, b.bias", "unexpected: c.weight", "a.weight (3, 3) instead of (2, 3)"):
        assert part in text
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    load_exactly(module, {**STATE, "c.weight": torch.zeros(1)}, "my.pt", ignore=("b.", "c."))
    assert torch.equal(module["a"].weight, STATE["a.weight"])


def test_lora_layouts_are_inverse_and_know_all_spellings():
    down, up = torch.ones(2, 3), torch.ones(4, 2)
    published = {"unet.mid.to_out.0.lora.down.weight": down, "unet.mid.to_out.0.lora.up.weight": up}
    peft = {"mid.to_out.0.lora_A.default.weight": down, "mid.to_out.0.lora_B.default.weight": up}
    assert lora_to_peft(published) == peft
    assert lora_to_diffusers(peft) == published
    assert lora_to_peft({"unet.mid.to_out.0.lora_A.weight": down}) == {"mid.to_out.0.lora_A.default.weight": down}
    for convert in (lora_to_peft, lora_to_diffusers):
        with pytest.raises(ValueError, match="unet.mid.weight"):
            convert({"unet.mid.weight": down})


@pytest.mark.parametrize("prefix", ["module.mask_decoder.", "mask_decoder.", "sam_mask_decoder.", ""])
def test_the_decoder_of_every_layout(prefix):
    state = {f"{prefix}iou_prediction_head.layers.0.bias": torch.ones(1)}
    other = {"module.image_encoder.x": torch.ones(1)} if prefix else {}
    assert list(decoder_state({**state, **other})) == ["iou_prediction_head.layers.0.bias"]
    with pytest.raises(ValueError, match="image_encoder.x"):
        decoder_state({"module.image_encoder.x": torch.ones(1)})


@pytest.mark.parametrize("prefix, other", [("mask_decoder.", "prompt_encoder"), ("sam_mask_decoder.", "no_obj_ptr")])
def test_what_is_no_part_of_the_model_is_named(prefix, other):
    state = {f"module.{prefix}iou_prediction_head.layers.0.bias": torch.ones(1), f"module.{other}": torch.ones(1)}
    assert len(decoder_state(state)) == 1
    with pytest.raises(ValueError, match="unexpected: adapter.weight, unet.conv_in.bias$"):
        decoder_state({**state, "module.unet.conv_in.bias": torch.ones(1), "adapter.weight": torch.ones(1)})


def test_repositories_of_the_hub_stand_for_what_they_hold():
    known = {*catalogue.BASES, *catalogue.UNETS, *catalogue.RELEASED}
    assert all(set(held) <= known for held in catalogue.HUB.values())
    for repository, name in {
        "facebook/sam2.1-hiera-base-plus": "sam2.1_hiera_base_plus",
        "facebook/sam2-hiera-tiny+glesam++": "sam2_hiera_tiny+glesam++",
        "facebook/sam-vit-huge+glesam": "sam_vit_h+glesam",
        "stabilityai/stable-diffusion-2-1-base": "sd21-base",
        "runwayml/stable-diffusion-v1-5": "sd15",
        "sam_vit_b+glesam": "sam_vit_b+glesam",
        "nonsense": "nonsense",
    }.items():
        assert catalogue.own_name(repository) == name
    # what is downloaded from the hub comes from a repository whose name is known
    urls = [s.url for files in (*catalogue.UNETS.values(), *catalogue.RELEASED.values()) for s in files]
    assert {"/".join(url.split("/")[3:5]) for url in urls} <= set(catalogue.HUB)
    with pytest.raises(ValueError, match="one of facebook/sam2-hiera-tiny, .*/GleSAM; got 'facebook/sam3'.* --from"):
        catalogue.own_name("facebook/sam3+glesam")
    with pytest.raises(ValueError, match="guogq/GleSAM holds, sam_vit_b.glesam, sam_vit_l.glesam, sam_vit_h.glesam;"):
        catalogue.own_name("guogq/GleSAM")


def test_the_hub_names_of_sam2_are_those_of_its_package():
    pytest.importorskip("sam2")
    from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES as published

    ours = {name: catalogue.BASES[held[0]].source.path for name, held in catalogue.HUB.items() if "/sam2" in name}
    assert ours == {name: file for name, (_, file) in published.items()}


def test_names_of_models():
    names = catalogue.model_names()
    assert len(names) == len(set(names)) == len(catalogue.BASES) * (1 + len(catalogue.ENHANCERS))
    assert catalogue.split_name("sam2.1_hiera_tiny+glesam++") == ("sam2.1_hiera_tiny", "glesam++")
    assert catalogue.split_name("sam_vit_b") == ("sam_vit_b", None)
    for wrong in ("sam", "sam_vit_b+", "sam_vit_b+other", "+glesam"):
        with pytest.raises(ValueError, match="expected"):
            catalogue.split_name(wrong)


def test_missing_files_name_the_command(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"_01ec64.pth, found no file; get them: glesam models get sam"):
        catalogue.base_file("sam_vit_b", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"glesam.json, found no file; get it: glesam models get sam_vit_h"):
        catalogue.enhancer_folder("sam_vit_h+glesam", tmp_path)
    with pytest.raises(FileNotFoundError, match="nobody published it; train it"):
        catalogue.enhancer_folder("sam_vit_h+glesam++", tmp_path)
    monkeypatch.setenv("GLESAM_HOME", str(tmp_path))
    assert catalogue.home() == tmp_path
    monkeypatch.delenv("GLESAM_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert catalogue.home() == tmp_path / "glesam_ros" / "models"
