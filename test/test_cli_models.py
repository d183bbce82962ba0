"""glesam models: downloads that are cut, resumed, refused or wrong; files taken over; released weights adopted."""

from __future__ import annotations

import http.server
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from glesam_ros.cli.main import main
from glesam_ros.models.glesam import catalogue, download
from glesam_ros.models.glesam.catalogue import Base, Source

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

CONTENT = np.random.default_rng(0).bytes(3 * download.CHUNK + 17)


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; breaks the next `cuts` answers off in the middle; knows Range unless told otherwise."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.cuts, self.knows_range, self.asked = 0, True, []


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        first = 0
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if asked and self.server.knows_range:
            first = int(asked.removeprefix("bytes=").removesuffix("-"))
            if first >= len(content):
                return self.send_error(416)
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        part = content[first:]
        if self.server.cuts:
            self.server.cuts -= 1
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            return None
        return self.wfile.write(part)

    def log_message(self, *_):
        """Silent."""


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GLESAM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def source(server, path="a/file.bin", **known):
    return Source(path, f"http://127.0.0.1:{server.server_port}/{path}", "none", **known)


def fetch(server, home, **known):
    return download.fetch(source(server, **known), home, lambda *_: lambda _: None)


def test_a_cut_download_goes_on_where_it_stopped(server, home):
    server.files["/a/file.bin"], server.cuts = CONTENT, 1
    with pytest.raises(download.DownloadError, match="goes on where it stopped"):
        fetch(server, home)
    assert not (home / "a/file.bin").exists()
    part = (home / "a/file.bin.partial").stat().st_size
    assert 0 < part < len(CONTENT)
    assert fetch(server, home).read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={part}-"]
    assert not (home / "a/file.bin.partial").exists()
    assert fetch(server, home) and len(server.asked) == 2  # what is there is not asked for


def test_a_server_without_ranges_sends_all_again(server, home):
    server.files["/a/file.bin"], server.cuts, server.knows_range = CONTENT, 1, False
    with pytest.raises(download.DownloadError):
        fetch(server, home)
    assert fetch(server, home).read_bytes() == CONTENT


def test_a_part_of_another_file_is_thrown_away(server, home):
    server.files["/a/file.bin"] = CONTENT[:100]
    (home / "a").mkdir(parents=True)
    (home / "a/file.bin.partial").write_bytes(CONTENT)
    with pytest.raises(download.DownloadError, match="did not fit"):
        fetch(server, home)
    assert fetch(server, home).read_bytes() == CONTENT[:100]


def test_refusals_name_the_address(server, home):
    with pytest.raises(download.DownloadError, match=r"/a/file.bin: expected the file, the server answered 404"):
        fetch(server, home)
    server.files["/a/file.bin"] = CONTENT
    with pytest.raises(download.DownloadError, match=f"expected 5 bytes, the server has {len(CONTENT)}"):
        fetch(server, home, size=5)
    assert not (home / "a/file.bin").exists()


def test_another_file_under_the_same_name_is_noticed(server, home):
    server.files["/a/file.bin"] = CONTENT
    path = fetch(server, home)
    assert dict(download.verify(home)) == {"a/file.bin": "ok"}
    path.write_bytes(CONTENT[:-1] + b"?")
    assert dict(download.verify(home)) == {"a/file.bin": "changed"}
    path.unlink()
    assert dict(download.verify(home)) == {"a/file.bin": "missing"}
    server.files["/a/file.bin"] = CONTENT[::-1]
    with pytest.raises(download.DownloadError, match="expected SHA-256"):
        fetch(server, home)
    assert not path.exists()


def lora(width: int, rank: int = 4) -> dict:
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora"
    return {f"{key}.down.weight": torch.zeros(rank, width), f"{key}.up.weight": torch.zeros(64, rank)}


def released(folder: Path, width: int) -> Path:
    """The two files that the authors of GleSAM publish, small."""
    folder.mkdir(parents=True)
    safetensors.save_file(lora(width), folder / catalogue.LORA_FILE)
    state = {"module.mask_decoder.iou_token.weight": torch.ones(1, 8), "module.image_encoder.pos_embed": torch.ones(2)}
    torch.save(state, folder / catalogue.RELEASED_DECODER)
    return folder


@pytest.fixture
def small_sam(server, monkeypatch):
    """A catalogue whose files the server has."""
    sam = source(server, "sam.pth")
    monkeypatch.setitem(catalogue.BASES, "sam_vit_h", Base("sam", sam))
    unet = (source(server, "sd21-base/unet/config.json"), source(server, "sd21-base/tokenizer/vocab.json"))
    monkeypatch.setitem(catalogue.UNETS, "sd21-base", unet)
    server.files |= {"/sam.pth": b"weights", **{f"/{file.path}": b"{}" for file in unet}}
    return server


def test_get_brings_base_released_enhancer_and_its_diffusion_model(small_sam, home, tmp_path, monkeypatch, capsys):
    folder = released(tmp_path / "published", 1024)
    names = catalogue.LORA_FILE, catalogue.RELEASED_DECODER
    files = [source(small_sam, f"sam_vit_h+glesam/{name}") for name in names]
    monkeypatch.setitem(catalogue.RELEASED, "sam_vit_h+glesam", tuple(files))
    for file in files:
        small_sam.files[f"/{file.path}"] = (folder / Path(file.path).name).read_bytes()
    assert main(["models", "where", "sam_vit_h+glesam"]) == 1
    assert main(["models", "get", "sam_vit_h+glesam"]) == 0
    config = json.loads((home / "sam_vit_h+glesam/glesam.json").read_text())
    assert (config["base"], config["unet"], config["gamma"], config["rank"]) == ("sam_vit_h", "sd21-base", 5.0, 4)
    decoder = safetensors.load_file(home / "sam_vit_h+glesam/mask_decoder.safetensors")
    assert list(decoder) == ["iou_token.weight"]
    capsys.readouterr()
    assert main(["models", "where", "sam_vit_h+glesam"]) == 0
    out = capsys.readouterr().out
    assert "missing" not in out and str(home / "sd21-base/unet/config.json") in out
    assert main(["models", "verify"]) == 0
    (home / "sam.pth").write_bytes(b"other")
    assert main(["models", "verify"]) == 1


def test_the_text_encoder_is_not_fetched_once_the_prompt_is_there(small_sam, home):
    prompt = home / "sd21-base" / download.PROMPT_FILE
    prompt.parent.mkdir(parents=True)
    prompt.touch()
    assert [s.path for s in download.unet_files("sd21-base", home)] == ["sd21-base/unet/config.json"]


@pytest.mark.parametrize(("width", "unet", "gamma"), [(1024, "sd21-base", 5.0), (768, "sd15", 3.0)])
def test_the_shapes_of_the_lora_tell_its_diffusion_model(home, tmp_path, small_sam, monkeypatch, width, unet, gamma):
    monkeypatch.setitem(catalogue.UNETS, "sd15", ())
    folder = released(tmp_path / "mine", width)
    assert main(["models", "get", "sam_vit_h+glesam", "--from", str(folder)]) == 0
    config = json.loads((home / "sam_vit_h+glesam/glesam.json").read_text())
    assert (config["unet"], config["gamma"]) == (unet, gamma)


def test_lora_of_something_else_is_refused(home, tmp_path, small_sam, capsys):
    folder = released(tmp_path / "mine", 512)
    assert main(["models", "get", "sam_vit_h+glesam", "--from", str(folder)]) == 1
    assert "768 or 1024" in capsys.readouterr().err


def test_from_takes_a_checkpoint_and_a_trained_folder(home, tmp_path, small_sam, capsys):
    file = tmp_path / "my.pth"
    torch.save({"a": torch.ones(3)}, file)
    own = tmp_path / "run"
    own.mkdir()
    (own / "glesam.json").write_text(json.dumps({"base": "sam_vit_h", "kind": "small", "unet": "sd21-base"}))
    assert main(["models", "get", "sam_vit_h+glesam_small"]) == 1
    assert "nobody published" in capsys.readouterr().err
    (home / "sam.pth").unlink()
    small_sam.files.pop("/sam.pth")
    assert main(["models", "get", "sam_vit_h", "--from", str(file)]) == 0
    assert main(["models", "get", "sam_vit_h+glesam_small", "--from", str(own)]) == 0
    assert (home / "sam_vit_h+glesam_small/glesam.json").is_file()
    own.joinpath("glesam.json").write_text(json.dumps({"base": "sam_vit_b", "kind": "small", "unet": "sd21-base"}))
    assert main(["models", "get", "sam_vit_h+glesam", "--from", str(own)]) == 1
    assert "expected an enhancer of sam_vit_h" in capsys.readouterr().err


class Hostile:
    def __reduce__(self):
        return (open, (str(Path.cwd() / "ran"), "w"))


def test_a_pickle_that_would_run_code_is_refused_and_does_nothing(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Hostile()}, "hostile.pth")
    assert main(["models", "get", "sam_vit_b", "--from", "hostile.pth"]) == 1
    assert "may run code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not home.exists()
    torch.load("hostile.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


def test_names_and_folders_that_are_none(home, tmp_path, capsys):
    assert main(["models", "get", "sam_vit_x"]) == 1
    assert "expected one of sam_vit_b" in capsys.readouterr().err
    assert main(["models", "get", "sam_vit_b", "--from", str(tmp_path)]) == 1
    assert "glesam.json" in capsys.readouterr().err
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*catalogue.BASES, *catalogue.UNETS, *catalogue.RELEASED, *catalogue.ENHANCERS))
