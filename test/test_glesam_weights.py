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


def test_safetensors(tmp_path):
    safetensors.save_file(STATE, tmp_path / "x.safetensors")
    assert torch.equal(read_tensors(tmp_path / "x.safetensors")["a.weight"], STATE["a.weight"])


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
