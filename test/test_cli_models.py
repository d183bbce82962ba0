"""glesam models: downloads that are cut, resumed, refused or wrong; files taken over; released weights adopted."""

from __future__ import annotations

import fcntl
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glesam_ros.cli.main import main
from glesam_ros.models.glesam import catalogue, download
from glesam_ros.models.glesam.catalogue import Base, Source

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from glesam_ros.models.glesam.weights import decoder_state, load_exactly, read_tensors  # noqa: E402

CONTENT = np.random.default_rng(0).bytes(3 * download.CHUNK + 17)


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; breaks the next `cuts` answers off in the middle; knows Range and lengths unless told otherwise.

    Below /hub it redirects as the hub does, and names `tag` on the way.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.cuts, self.knows_range, self.knows_length, self.asked, self.tag = 0, True, True, [], None


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/hub/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/hub"))
            self.send_header("X-Linked-Etag", f'"{self.server.tag}"')
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content = self.server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        first = 0
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if asked and self.server.knows_range:
            first = int(asked.removeprefix("bytes=").removesuffix("-"))
            if first >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
        self.send_response(206 if first else 200)
        part = content[first:]
        if self.server.knows_length:
            self.send_header("Content-Length", str(len(part)))
        else:  # one chunk
            self.send_header("Transfer-Encoding", "chunked")
            part = b"%x\r\n%s\r\n0\r\n\r\n" % (len(part), part)
        self.end_headers()
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
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
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


def test_a_cut_is_noticed_where_the_server_names_no_length(server, home):
    """As of files that are compressed on the way, which are small ones without a checksum."""
    server.files["/a/file.bin"], server.cuts, server.knows_length = CONTENT, 1, False
    with pytest.raises(download.DownloadError, match="goes on where it stopped"):
        fetch(server, home)
    assert not (home / "a/file.bin").exists()
    assert fetch(server, home).read_bytes() == CONTENT


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


def test_a_whole_part_is_not_fetched_again(server, home):
    server.files["/a/file.bin"] = CONTENT
    (home / "a").mkdir(parents=True)
    (home / "a/file.bin.partial").write_bytes(CONTENT)  # as after a kill between the last byte and the new name
    assert fetch(server, home).read_bytes() == CONTENT
    assert server.asked == [f"bytes={len(CONTENT)}-"]
    assert dict(download.verify(home)) == {"a/file.bin": "ok"}


@pytest.mark.parametrize("named", ["by the catalogue", "by the hub"])
def test_a_published_checksum_is_held_against_every_byte(server, home, named):
    server.files["/a/file.bin"], server.cuts = CONTENT, 1
    published = hashlib.sha256(CONTENT).hexdigest()
    known = source(server, sha256=published)
    if named == "by the hub":
        server.tag = published
        known = Source("a/file.bin", f"http://127.0.0.1:{server.server_port}/hub/a/file.bin", "none")

    def bring():
        return download.fetch(known, home, lambda *_: lambda _: None)

    with pytest.raises(download.DownloadError, match="goes on where it stopped"):
        bring()
    partial = home / "a/file.bin.partial"
    with partial.open("r+b") as file:  # the first half was of an older file
        file.write(b"old")
    with pytest.raises(download.DownloadError, match=f"expected SHA-256 {published}"):
        bring()
    assert len(server.asked) == 2 and server.asked[1] is not None  # the rest alone was asked for, also when redirected
    assert not partial.exists() and not (home / "a/file.bin").exists()
    assert bring().read_bytes() == CONTENT


def test_the_checksum_of_the_catalogue_counts_where_the_hub_names_another(server, home):
    """Who exchanges a file on the hub exchanges what the hub says of it, too."""
    server.files["/a/file.bin"], server.tag = CONTENT, hashlib.sha256(CONTENT).hexdigest()
    address = f"http://127.0.0.1:{server.server_port}/hub/a/file.bin"
    known = Source("a/file.bin", address, "none", sha256=hashlib.sha256(CONTENT[::-1]).hexdigest())
    with pytest.raises(download.DownloadError, match=f"expected SHA-256 {known.sha256}, got {server.tag}"):
        download.fetch(known, home, lambda *_: lambda _: None)
    assert not (home / "a/file.bin").exists()


def test_a_tag_of_a_small_file_is_no_checksum(server, home):
    server.files["/a/file.bin"], server.tag = CONTENT, "0" * 40
    known = Source("a/file.bin", f"http://127.0.0.1:{server.server_port}/hub/a/file.bin", "none")
    assert download.fetch(known, home, lambda *_: lambda _: None).read_bytes() == CONTENT


def test_two_downloads_of_one_file_do_not_write_into_each_other(server, home):
    """The second begins when the first has been told the size and has nothing written yet."""
    server.files["/a/file.bin"] = CONTENT

    def started(*_):
        with pytest.raises(download.DownloadError, match="/a/file.bin: another process .* wait for its end"):
            fetch(server, home)
        return lambda _: None

    assert download.fetch(source(server), home, started).read_bytes() == CONTENT
    assert server.asked == [None]
    assert dict(download.verify(home)) == {"a/file.bin": "ok"}


@pytest.mark.parametrize("ending", ["complete", "thrown away"])
def test_a_download_that_ends_before_the_next_one_has_the_lock_misleads_no_one(server, home, monkeypatch, ending):
    """What the second has opened has another name by then, or none: what it wrote there would be lost or in the way."""
    server.files["/a/file.bin"] = CONTENT
    path, partial = home / "a/file.bin", home / "a/file.bin.partial"
    ends, lock = [ending], fcntl.flock

    def flock(file: int, how: int) -> None:
        if ends:
            if ends.pop() == "complete":
                partial.write_bytes(CONTENT)
                partial.replace(path)
            else:
                partial.unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert fetch(server, home).read_bytes() == CONTENT
    assert server.asked == ([] if ending == "complete" else [None])
    assert [file.name for file in path.parent.iterdir()] == ["file.bin"]


def test_a_file_system_that_cannot_lock_is_as_good_for_one(server, home, monkeypatch):
    def flock(*_) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    server.files["/a/file.bin"] = CONTENT
    assert fetch(server, home).read_bytes() == CONTENT
    assert dict(download.verify(home)) == {"a/file.bin": "ok"}


def test_no_checksum_is_lost_where_several_are_recorded_at_once(home, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda k: download.take(tmp_path / "file", home / f"{k}/file", home), range(24)))
    assert dict(download.verify(home)) == {f"{k}/file": "ok" for k in range(24)}


def test_a_full_disk_is_said_before_the_download(server, home, monkeypatch):
    server.files["/a/file.bin"] = CONTENT
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=len(CONTENT) - 1))
    with pytest.raises(download.DownloadError, match=f"expected {len(CONTENT)} bytes free .* set GLESAM_HOME"):
        fetch(server, home)
    assert not (home / "a/file.bin.partial").exists()


def test_no_server(home):
    nobody = Source("a", "http://127.0.0.1:9/a", "none")
    with pytest.raises(download.DownloadError, match="127.0.0.1:9/a: .* goes on where it stopped"):
        download.fetch(nobody, home, lambda *_: lambda _: None)


def test_refusals_name_the_address(server, home):
    with pytest.raises(download.DownloadError, match=r"/a/file.bin: expected the file, the server answered 404"):
        fetch(server, home)
    server.files["/a/file.bin"] = CONTENT
    with pytest.raises(download.DownloadError, match=f"expected 5 bytes, the server has {len(CONTENT)}"):
        fetch(server, home, size=5)
    with pytest.raises(download.DownloadError, match=f"the server has {len(CONTENT)}"):
        fetch(server, home, size=len(CONTENT) + 1)  # one that is too short is as wrong
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
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora"
    other = "unet.conv_in.lora"
    return {
        f"{key}.down.weight": torch.zeros(rank, width), f"{key}.up.weight": torch.zeros(64, rank),
        f"{other}_A.weight": torch.zeros(rank, 256, 3, 3), f"{other}_B.weight": torch.zeros(64, rank, 1, 1),
    }


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
    vae = (source(server, "sd21-base/vae/config.json"),)
    monkeypatch.setitem(catalogue.VAES, "sd21-base", vae)
    server.files |= {"/sam.pth": b"weights", **{f"/{file.path}": b"{}" for file in (*unet, *vae)}}
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
    made = home / "sam_vit_h+glesam/mask_decoder.safetensors"  # here, out of what was published
    content = made.read_bytes()
    made.write_bytes(content[:-1])
    assert main(["models", "verify"]) == 1
    made.write_bytes(content)
    assert main(["models", "verify"]) == 0
    (home / "sam.pth").write_bytes(b"other")
    assert main(["models", "verify"]) == 1


def test_the_text_encoder_is_not_fetched_once_the_prompt_is_there(small_sam, home):
    prompt = home / "sd21-base" / download.PROMPT_FILE
    prompt.parent.mkdir(parents=True)
    prompt.touch()
    assert [s.path for s in download.unet_files("sd21-base", home)] == ["sd21-base/unet/config.json"]
    prompt.unlink()
    assert len(download.unet_files("sd21-base", home)) == 2


@pytest.mark.parametrize(("width", "unet", "gamma"), [(1024, "sd21-base", 5.0), (768, "sd15", 3.0)])
def test_the_shapes_of_the_lora_tell_its_diffusion_model(home, tmp_path, small_sam, monkeypatch, width, unet, gamma):
    monkeypatch.setitem(catalogue.UNETS, "sd15", ())
    folder = released(tmp_path / "mine", width)
    assert main(["models", "get", "sam_vit_h+glesam", "--from", str(folder)]) == 0
    config = json.loads((home / "sam_vit_h+glesam/glesam.json").read_text())
    assert (config["unet"], config["gamma"]) == (unet, gamma)
    assert config["alpha"] == config["rank"] == 4  # the authors' update is B A without a factor, whatever the rank


def test_released_weights_that_cannot_be_made_a_model_leave_the_one_that_is_there(
    home, tmp_path, small_sam, monkeypatch
):
    from glesam_ros.models.glesam import enhancer

    def full(*_: Any) -> None:
        raise OSError("no space left")

    folder, own = released(tmp_path / "mine", 1024), home / "sam_vit_h+glesam"
    assert main(["models", "get", own.name, "--from", str(folder)]) == 0
    there = {file.name: file.read_bytes() for file in own.iterdir()}
    assert {catalogue.CONFIG_FILE, catalogue.DECODER_FILE} < there.keys()
    monkeypatch.setattr(enhancer, "write_tensors", full)
    with pytest.raises(OSError, match="no space left"):
        download.take_released(folder, own.name, home)
    assert {file.name: file.read_bytes() for file in own.iterdir()} == there
    assert {state for file, state in download.verify(home) if file.startswith(own.name)} == {"ok"}


def test_lora_of_something_else_is_refused(home, tmp_path, small_sam, capsys):
    folder = released(tmp_path / "mine", 512)
    assert main(["models", "get", "sam_vit_h+glesam", "--from", str(folder)]) == 1
    assert "768 or 1024" in capsys.readouterr().err
    other = {key.replace("down_blocks.0", "up_blocks.1"): value for key, value in lora(1024, rank=8).items()}
    safetensors.save_file({**lora(1024), **other}, folder / catalogue.LORA_FILE)
    assert main(["models", "get", "sam_vit_h+glesam", "--from", str(folder)]) == 1
    assert "expected LoRA of one rank for text embeddings of 768 or 1024, got ranks [4, 8]" in capsys.readouterr().err


def test_from_takes_a_checkpoint_and_a_trained_folder(home, tmp_path, small_sam, capsys):
    file = tmp_path / "my.pth"
    torch.save({"a": torch.ones(3)}, file)
    own = tmp_path / "run"
    own.mkdir()
    (own / "glesam.json").write_text(json.dumps({"base": "sam_vit_h", "kind": "small", "unet": "sd21-base"}))
    safetensors.save_file({"a": torch.ones(1)}, own / catalogue.SMALL_FILE)
    assert main(["models", "get", "sam_vit_h+glesam_small"]) == 1
    assert "nobody published" in capsys.readouterr().err
    (home / "sam.pth").unlink()
    small_sam.files.pop("/sam.pth")
    assert main(["models", "get", "sam_vit_h", "--from", str(file)]) == 0
    assert main(["models", "get", "sam_vit_h+glesam_small", "--from", str(own)]) == 0
    assert (home / "sam_vit_h+glesam_small/glesam.json").is_file()
    own.joinpath("glesam.json").write_text(json.dumps({"base": "sam_vit_b", "kind": "small", "unet": "sd21-base"}))
    assert main(["models", "get", "sam_vit_h+glesam", "--from", str(own)]) == 1
    assert "of sam_vit_b+glesam_small, expected that of sam_vit_h+glesam" in capsys.readouterr().err


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
    for name, expected in {
        "sam_vit_b": "of sam_vit_b or a folder with sam_vit_b_01ec64.pth or model.safetensors; found none",
        "sam_vit_b+glesam": "a folder with glesam.json or pytorch_lora_weights.safetensors, or a folder of diffusers",
        "sd15": "expected for sd15 a folder of diffusers with unet/config.json; found none",
    }.items():
        assert main(["models", "get", name, "--from", str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
    for action in ("where", "verify"):
        assert main(["models", action, "sam_vit_x"]) == 1
        assert "expected one of sam_vit_b" in capsys.readouterr().err
    assert main(["models", "verify"]) == 1
    assert f"found no files to verify in {home}" in capsys.readouterr().err
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*catalogue.BASES, *catalogue.UNETS, *catalogue.RELEASED, *catalogue.ENHANCERS))


def test_names_of_hugging_face_and_copies_of_its_repositories(small_sam, home, tmp_path, monkeypatch, capsys):
    """Local copies in the layouts of the hub: no network beyond this machine, no weights of any size."""
    base = Base("sam2", source(small_sam, "sam2.1_hiera_tiny.pt"))
    monkeypatch.setitem(catalogue.BASES, "sam2.1_hiera_tiny", base)
    copy = tmp_path / "sam2.1-hiera-tiny"
    copy.mkdir()
    safetensors.save_file({"layout": torch.ones(1)}, copy / "model.safetensors")  # that of transformers, not asked for
    torch.save({"model": {"a": torch.ones(3)}}, copy / "sam2.1_hiera_tiny.pt")
    assert main(["models", "get", "facebook/sam2.1-hiera-tiny", "--from", str(copy)]) == 0
    assert "sam2.1_hiera_tiny is complete" in capsys.readouterr().out
    assert torch.equal(read_tensors(home / "sam2.1_hiera_tiny.pt")["a"], torch.ones(3))
    for action in ("where", "verify"):
        assert main(["models", action, "facebook/sam2.1-hiera-tiny"]) == 0
        assert "sam2.1_hiera_tiny.pt" in capsys.readouterr().out

    # SAM lies on the hub in the layout of transformers alone
    monkeypatch.setitem(catalogue.BASES, "sam_vit_b", Base("sam", source(small_sam, "sam_vit_b_01ec64.pth")))
    (tmp_path / "sam-vit-base").mkdir()
    safetensors.save_file({"vision_encoder.pos_embed": torch.ones(2)}, tmp_path / "sam-vit-base" / "model.safetensors")
    assert main(["models", "get", "facebook/sam-vit-base", "--from", str(tmp_path / "sam-vit-base")]) == 0
    assert "sam_vit_b is complete" in capsys.readouterr().out
    assert torch.equal(read_tensors(home / "sam_vit_b_01ec64.pth")["vision_encoder.pos_embed"], torch.ones(2))

    diffusion = diffusers_folder(tmp_path / "stable-diffusion-2-1-base", 1024)
    assert main(["models", "get", "stabilityai/stable-diffusion-2-1-base", "--from", str(diffusion)]) == 0
    assert (home / "sd21-base/unet/config.json").read_text() == (diffusion / "unet/config.json").read_text()

    monkeypatch.setitem(
        catalogue.RELEASED, "sam_vit_h+glesam",
        tuple(Source(f"sam_vit_h+glesam/{name}", f"https://huggingface.co/x/y/resolve/main/all/H/{name}", "none")
              for name in (catalogue.LORA_FILE, catalogue.RELEASED_DECODER)),
    )
    released(tmp_path / "GleSAM/all/H", 1024)
    assert main(["models", "get", "facebook/sam-vit-huge+glesam", "--from", str(tmp_path / "GleSAM")]) == 0
    assert json.loads((home / "sam_vit_h+glesam/glesam.json").read_text())["base"] == "sam_vit_h"

    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert re.search("facebook/sam2.1-hiera-tiny +sam2.1_hiera_tiny\n", out)
    for wrong, said in {"facebook/sam3": "guogq/GleSAM; got 'facebook", "guogq/GleSAM": "sam_vit_l+glesam"}.items():
        for action in ("get", "where", "verify"):
            assert main(["models", action, wrong]) == 1
            error = capsys.readouterr().err
            assert said in error and error.count("\n") == 1


def test_the_catalogue_is_sound():
    sources = [base.source for base in catalogue.BASES.values()]
    assert all(re.fullmatch("[0-9a-f]{64}", s.sha256) and s.megabytes == round(s.size / 1e6) for s in sources)
    assert len({s.sha256 for s in sources}) == len({s.size for s in sources}) == len(sources)
    sources += [s for files in (*catalogue.UNETS.values(), *catalogue.RELEASED.values()) for s in files]
    assert len({s.path for s in sources}) == len({s.url for s in sources}) == len(sources)
    for s in sources:
        assert s.url.startswith("https://") and s.licence and not Path(s.path).is_absolute()
        assert Path(s.url).name == Path(s.path).name
    # as in the download scripts of the sam2 package; the folders are the days of the releases
    for name, day in (("sam2_hiera_small", "072824"), ("sam2.1_hiera_small", "092824")):
        address = f"https://dl.fbaipublicfiles.com/segment_anything_2/{day}/{name}.pt"
        assert catalogue.BASES[name].source.url == address


def test_the_released_decoder_is_one_of_sam(tmp_path):
    """Its published size is that of SAM's mask decoder and the names of its tensors; nothing else fits in."""
    ops = pytest.importorskip("glesam_ros.models.glesam.torchvision_ops")
    ops.allow_import_without_operators()
    modeling = pytest.importorskip("segment_anything.modeling")

    def make():
        return modeling.MaskDecoder(transformer_dim=256, transformer=modeling.TwoWayTransformer(2, 256, 8, 2048))

    decoder, other = make(), make()
    published = {f"module.mask_decoder.{key}": value for key, value in decoder.state_dict().items()}
    torch.save(published, tmp_path / "ft-decoder.pth")
    size = catalogue.RELEASED["sam_vit_h+glesam"][1].size
    assert (tmp_path / "ft-decoder.pth").stat().st_size == pytest.approx(size, rel=0.001)
    load_exactly(other, decoder_state(read_tensors(tmp_path / "ft-decoder.pth")), "ft-decoder.pth")
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in decoder.state_dict().items())


def test_the_released_lora_is_as_diffusers_saves_one_of_sd21(tmp_path):
    """Its published size is that of the names and shapes that diffusers' own conversion gives, and those are read."""
    pytest.importorskip("glesam_ros.models.glesam.torchvision_ops").allow_import_without_operators()
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    from glesam_ros.models.glesam.enhancer import LORA_TARGETS, UNETS, replicate_channels
    from glesam_ros.models.glesam.weights import lora_to_peft

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**UNETS["sd21-base"])
        replicate_channels(unet, 256)
        unet.add_adapter(peft.LoraConfig(r=8, lora_alpha=8, target_modules=LORA_TARGETS))
    state = diffusers.utils.convert_state_dict_to_diffusers(peft.utils.get_peft_model_state_dict(unet))
    published = {f"unet.{key}": torch.zeros(value.shape) for key, value in state.items()}
    lora, decoder = catalogue.RELEASED["sam_vit_h+glesam"]
    file = tmp_path / Path(lora.path).name
    safetensors.save_file(published, file, {"format": "pt"})
    assert file.stat().st_size == lora.size
    torch.save({"module.mask_decoder.iou_token.weight": torch.ones(1, 8)}, tmp_path / Path(decoder.path).name)
    about, _ = download._released_parts(file, tmp_path / Path(decoder.path).name)
    assert (about["unet"], about["rank"]) == ("sd21-base", 8)
    own = {key for key, _ in unet.named_parameters() if ".lora_" in key}
    assert lora_to_peft(published).keys() == own and len(own) == 2 * 280


def diffusers_folder(folder: Path, width: int) -> Path:
    for part in ("unet", "tokenizer"):
        (folder / part).mkdir(parents=True)
    (folder / "unet/config.json").write_text(json.dumps({"cross_attention_dim": width}))
    (folder / "tokenizer/vocab.json").write_text("{}")
    return folder


def test_a_diffusion_model_by_its_own_name(small_sam, home, tmp_path, capsys):
    assert main(["models", "where", "sd21-base"]) == 1
    assert main(["models", "get", "sd21-base"]) == 0
    assert main(["models", "where", "sd21-base"]) == 0
    assert (home / "sd21-base/vae/config.json").is_file()
    assert {path.name for path in home.iterdir()} == {"sd21-base", "checksums.json"}
    folder = diffusers_folder(tmp_path / "mine", 768)
    assert main(["models", "get", "sd21-base", "--from", str(folder)]) == 1
    assert "expected the diffusion model sd21-base, got sd15" in capsys.readouterr().err
    (folder / "unet/config.json").write_text('{"cross_attention_dim": 1024, "mine": 1}')
    assert main(["models", "get", "sd21-base", "--from", str(folder)]) == 0
    assert "mine" in (home / "sd21-base/unet/config.json").read_text()
    (folder / "unet/config.json").write_text('{"cross_attention_dim": [1024]}')
    assert main(["models", "get", "sam_vit_h+glesam", "--from", str(folder)]) == 1
    assert "sd21-base or sd15, got another one" in capsys.readouterr().err


def test_a_copy_without_its_large_files_takes_the_place_of_nothing(home, tmp_path, monkeypatch, capsys):
    """As `git clone` makes one where Git LFS is not installed: pointers in place of the weights."""
    weights = "unet/diffusion_pytorch_model.safetensors"
    names = ("unet/config.json", weights)
    files = [Source(f"sd21-base/{name}", f"http://127.0.0.1:9/{name}", "none") for name in names]
    monkeypatch.setitem(catalogue.UNETS, "sd21-base", tuple(files))
    monkeypatch.setitem(catalogue.VAES, "sd21-base", ())
    folder = diffusers_folder(tmp_path / "mine", 1024)
    safetensors.save_file({"a": torch.ones(2)}, folder / weights)
    assert main(["models", "get", "sd21-base", "--from", str(folder)]) == 0
    there = {file.path: (home / file.path).read_bytes() for file in files}
    (folder / "unet/config.json").write_text('{"cross_attention_dim": 1024, "mine": 1}')
    (folder / weights).write_bytes(POINTER)
    assert main(["models", "get", "sd21-base", "--from", str(folder)]) == 1
    error = capsys.readouterr().err
    assert f"{folder / weights}: expected a safetensors file" in error and error.count("\n") == 1
    assert {file.path: (home / file.path).read_bytes() for file in files} == there
    (folder / "unet/config.json").write_text("")
    assert main(["models", "get", "sd21-base", "--from", str(folder)]) == 1
    assert f"{folder / 'unet/config.json'}: expected JSON" in capsys.readouterr().err


def test_a_taken_checkpoint_that_is_not_the_published_one_is_said(home, tmp_path, capsys):
    file = tmp_path / "fine-tuned.pth"
    torch.save({"a": torch.ones(3)}, file)
    assert main(["models", "get", "sam_vit_b", "--from", str(file)]) == 0
    assert "note:" in (error := capsys.readouterr().err) and catalogue.BASES["sam_vit_b"].source.sha256 in error
    assert main(["models", "verify", "sam_vit_b"]) == 0
    assert main(["models", "verify", "sam_vit_l"]) == 1
    # a file that was put there by hand is held against what is published
    (home / catalogue.BASES["sam_vit_l"].source.path).write_bytes(b"other")
    assert main(["models", "verify", "sam_vit_b"]) == 0
    capsys.readouterr()
    assert main(["models", "verify"]) == 1
    assert re.search(r"changed +sam_vit_l_0b3195.pth", capsys.readouterr().out)


def enhancer(folder: Path, base: str, *files: str, **config) -> Path:
    folder.mkdir(parents=True)
    (folder / "glesam.json").write_text(json.dumps({"base": base, "kind": "lora", "unet": "sd21-base", **config}))
    for file in files:
        safetensors.save_file({"a": torch.ones(1)}, folder / file)
    return folder


def test_no_file_of_an_old_enhancer_stays_beside_a_new_one(small_sam, home, tmp_path, capsys):
    old = enhancer(tmp_path / "old", "sam_vit_h", catalogue.LORA_FILE, catalogue.DECODER_FILE)
    new = enhancer(tmp_path / "new", "sam_vit_h", catalogue.LORA_FILE, rank=4, alpha=4)
    own = home / "sam_vit_h+glesam"
    for folder in (old, new):
        assert main(["models", "get", own.name, "--from", str(folder)]) == 0
        assert {p.name for p in own.iterdir()} == {p.name for p in folder.iterdir()}
    assert json.loads((own / "glesam.json").read_text())["rank"] == 4
    assert main(["models", "verify", own.name]) == 0
    (own / catalogue.LORA_FILE).write_bytes(b"other")
    assert main(["models", "verify", own.name]) == 1
    assert main(["models", "get", own.name, "--from", str(own)]) == 1
    assert "nothing to copy" in capsys.readouterr().err and (own / "glesam.json").is_file()
    for folder in (released(tmp_path / "published", 1024), new):
        assert main(["models", "get", own.name, "--from", str(folder)]) == 0
    assert {p.name for p in own.iterdir()} == {p.name for p in new.iterdir()}
    (old / catalogue.DECODER_FILE).write_bytes(POINTER)
    assert main(["models", "get", own.name, "--from", str(old)]) == 1
    assert f"{old / catalogue.DECODER_FILE}: expected a safetensors file" in capsys.readouterr().err
    assert main(["models", "verify", own.name]) == 0 and not (own / catalogue.DECODER_FILE).exists()


@pytest.mark.parametrize("config", [{"kind": "small"}, {"levels": True}, {"gamma": -1}, {"width": 3}])
def test_an_enhancer_of_another_kind_is_refused_and_the_old_one_stays(small_sam, home, tmp_path, capsys, config):
    own = enhancer(home / "sam_vit_h+glesam", "sam_vit_h", catalogue.LORA_FILE)
    other = enhancer(tmp_path / "other", "sam_vit_h", catalogue.LORA_FILE, **config)
    assert main(["models", "get", own.name, "--from", str(other)]) == 1
    error = capsys.readouterr().err
    assert str(other) in error and error.count("\n") == 1
    assert len(list(own.iterdir())) == 2


def test_released_weights_with_a_decoder_of_another_name(small_sam, home, tmp_path, capsys):
    folder = released(tmp_path / "mine", 1024)
    (folder / catalogue.RELEASED_DECODER).rename(folder / "GleSAM-l.pth")
    assert main(["models", "get", "sam_vit_h+glesam", "--from", str(folder)]) == 0
    assert safetensors.load_file(home / "sam_vit_h+glesam/mask_decoder.safetensors")
    (folder / "other.pth").touch()
    assert main(["models", "get", "sam_vit_h+glesam", "--from", str(folder)]) == 1
    assert "found GleSAM-l.pth, other.pth" in capsys.readouterr().err
    (folder / "other.pth").unlink()
    (folder / catalogue.LORA_FILE).write_bytes(b"no LoRA")
    assert main(["models", "get", "sam_vit_h+glesam", "--from", str(folder)]) == 1
    assert "cannot read it" in capsys.readouterr().err
    assert (home / "sam_vit_h+glesam/glesam.json").is_file()


def scr_file(path: Path, **other) -> Path:
    """What is trained of SCR, of no layer at all."""
    groups = {f"unet_lora_{group}_modules": [] for group in ("encoder", "decoder", "others")}
    torch.save({"rank_unet": 4, **groups, "state_dict_unet": {}, **other}, path)
    return path


def rass_file(path: Path) -> Path:
    """What is trained of a RASS of one class, without a weight."""
    config = {"classes": ["sky"]}
    torch.save({"config": config, "palette": [[0, 0, 0]], "state": {}, "prompt": torch.zeros(1), "scr": ""}, path)
    return path


def test_the_restorer_needs_stable_diffusion_whole_and_its_own_file(small_sam, home, tmp_path, capsys):
    pytest.importorskip("diffusers")
    scr = scr_file(tmp_path / "mine.pkl")
    assert main(["models", "where", "scr-sd21"]) == 1
    assert main(["models", "get", "scr-sd21", "--from", str(scr)]) == 0
    assert "restorer:=scr-sd21, or glesam restore --model scr-sd21" in capsys.readouterr().out
    expected = ["sd21-base/unet/config.json", "sd21-base/tokenizer/vocab.json", "sd21-base/vae/config.json"]
    assert main(["models", "where", "scr-sd21"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["here", str(home / name)] for name in [*expected, "rass/scr.pkl"]]
    assert main(["models", "verify", "scr-sd21"]) == 0
    (home / "rass/scr.pkl").write_bytes(b"other")
    assert main(["models", "verify", "scr-sd21"]) == 1
    assert re.search("changed +rass/scr.pkl", capsys.readouterr().out)
    # the enhancers do without the autoencoder
    assert not [file for file in download.unet_files("sd21-base", home) if "/vae/" in file.path]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 70000000\n"


def test_an_answer_that_is_not_the_file_is_neither_kept_nor_remembered(small_sam, home, tmp_path, monkeypatch, capsys):
    """Nothing is published of scr.pkl, so its first copy is the one that later ones are held against."""
    pytest.importorskip("diffusers")
    monkeypatch.setitem(catalogue.SYSTEMS, "scr-sd21", (source(small_sam, catalogue.SCR_FILE),))
    config = small_sam.files["/sd21-base/vae/config.json"]
    for path, content in (("/sd21-base/vae/config.json", b"<!DOCTYPE html>"), (f"/{catalogue.SCR_FILE}", POINTER)):
        small_sam.files[path] = content
        assert main(["models", "get", "scr-sd21"]) == 1
        error = capsys.readouterr().err
        said = f"{path}: expected {Path(path).name}, got {len(content)} bytes that begin with {content[:40]!r}"
        assert f"127.0.0.1:{small_sam.server_port}{said}" in error and "name it with --from" in error
        assert not list((home / path[1:]).parent.glob(f"{Path(path).name}*"))
        small_sam.files["/sd21-base/vae/config.json"] = config
    assert catalogue.SCR_FILE not in json.loads((home / download.CHECKSUMS).read_text())
    small_sam.files[f"/{catalogue.SCR_FILE}"] = scr_file(tmp_path / "right.pkl").read_bytes()
    assert main(["models", "get", "scr-sd21"]) == 0
    assert main(["models", "verify", "scr-sd21"]) == 0


def test_a_page_is_no_weights(small_sam, home):
    weights = source(small_sam, "sd21-base/unet/diffusion_pytorch_model.safetensors")
    small_sam.files[f"/{weights.path}"] = b"<html>Sign in to the network</html>"
    with pytest.raises(download.DownloadError, match="got 35 bytes that begin with b'<html>Sign in"):
        download.fetch(weights, home, lambda *_: lambda _: None)
    small_sam.files[f"/{weights.path}"] = safetensors.save({"a": torch.ones(2)})
    assert download.fetch(weights, home, lambda *_: lambda _: None).is_file()


def test_files_are_checked_without_torch(small_sam, home, tmp_path, monkeypatch):
    """It is needed by who runs the models, not by who downloads."""
    files = {"a/model.safetensors": safetensors.save({"a": torch.ones(2)})}
    for name, zipped in (("new", True), ("old", False)):
        torch.save({"a": torch.ones(2)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
        files[f"{name}/{catalogue.SCR_FILE}"] = (tmp_path / name).read_bytes()
    for module in ("torch", "safetensors", "diffusers"):
        monkeypatch.setitem(sys.modules, module, None)
    for path, data in files.items():
        small_sam.files[f"/{catalogue.SCR_FILE}" if "scr" in path else f"/{path}"] = data
        wanted = source(small_sam, catalogue.SCR_FILE if "scr" in path else path)
        got = download.fetch(wanted, home / path.partition("/")[0], lambda *_: lambda _: None)
        assert got.read_bytes() == data


def test_the_segmenter_is_fetched_by_hand(small_sam, home, tmp_path, capsys):
    pytest.importorskip("diffusers")
    folder = tmp_path / "run"
    folder.mkdir()
    scr_file(folder / "scr.pkl")
    assert main(["models", "get", "rass-sd21", "--from", str(folder)]) == 1  # it has SCR's part alone
    error = capsys.readouterr().err
    assert re.search("rass.pth: get it by hand from https://drive.google.com/.* and name it with --from", error)
    assert (home / "rass/scr.pkl").is_file() and error.count("\n") == 1
    rass = rass_file(folder / "rass.pth").read_bytes()
    assert main(["models", "get", "rass-sd21", "--from", str(folder / "rass.pth")]) == 0
    assert "semantic:=rass-sd21" in capsys.readouterr().out
    assert (home / "rass/rass.pth").read_bytes() == rass
    assert main(["models"]) == 0
    assert re.search(r"^scr-sd21 +yes .*\nrass-sd21 +yes ", capsys.readouterr().out, re.M)
    (home / "rass/scr.pkl").unlink()
    assert main(["models", "get", "rass-sd21", "--from", str(folder)]) == 0
    assert main(["models", "get", "rass-sd21", "--from", str(home / "rass")]) == 1
    assert "nothing to copy" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["the file", "its folder"])
def test_a_page_in_place_of_the_segmenter_leaves_the_one_that_is_there(small_sam, home, tmp_path, capsys, named):
    """What a browser saves where Google Drive asks whether a large file is wanted that it did not scan for viruses."""
    pytest.importorskip("diffusers")
    folder = tmp_path / "run"
    folder.mkdir()
    scr_file(folder / "scr.pkl")
    rass = rass_file(folder / "rass.pth").read_bytes()
    assert main(["models", "get", "rass-sd21", "--from", str(folder)]) == 0
    (folder / "rass.pth").write_bytes(b"<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title></html>")
    scr_file(folder / "scr.pkl", rank_unet=8)
    capsys.readouterr()
    before = (home / "rass/scr.pkl").read_bytes()
    given = folder / "rass.pth" if named == "the file" else folder
    assert main(["models", "get", "rass-sd21", "--from", str(given)]) == 1
    error = capsys.readouterr().err
    assert f"{folder / 'rass.pth'}: expected a checkpoint of torch" in error and error.count("\n") == 1
    assert (home / "rass/rass.pth").read_bytes() == rass and (home / "rass/scr.pkl").read_bytes() == before
    assert main(["models", "verify", "rass-sd21"]) == 0


def test_what_is_no_part_of_a_system_is_refused(small_sam, home, tmp_path, capsys):
    pytest.importorskip("diffusers")
    for path, expected in (
        (tmp_path / "no", "expected for scr-sd21 scr.pkl, a folder with it, or a folder of diffusers"),
        (tmp_path, "expected for scr-sd21 scr.pkl"),
        (scr_file(tmp_path / "a.pkl", rank_unet="4"), "rank_unet is str"),
    ):
        assert main(["models", "get", "scr-sd21", "--from", str(path)]) == 1
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
    assert not (home / "rass").exists()
    folder = diffusers_folder(tmp_path / "sd", 768)
    assert main(["models", "get", "scr-sd21", "--from", str(folder)]) == 1
    assert "expected the diffusion model sd21-base, got sd15" in capsys.readouterr().err
    (folder / "unet/config.json").write_text('{"cross_attention_dim": 1024}')
    (folder / "vae").mkdir()
    (folder / "vae/config.json").write_text('{"mine": 1}')
    scr_file(home.parent / "scr.pkl")
    assert main(["models", "get", "scr-sd21", "--from", str(home.parent / "scr.pkl")]) == 0
    assert main(["models", "get", "scr-sd21", "--from", str(folder)]) == 0
    assert "mine" in (home / "sd21-base/vae/config.json").read_text()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"kind": "lora", "unet": "sd3"}'])
def test_a_broken_glesam_json_is_one_line(home, capsys, text):
    own = enhancer(home / "sam_vit_h+glesam", "sam_vit_h")
    (own / "glesam.json").write_text(text)
    for action in ("get", "where", "verify"):
        assert main(["models", action, own.name]) == 1
        error = capsys.readouterr().err
        assert str(own / "glesam.json") in error and error.count("\n") == 1


def test_the_catalogue_and_its_commands_need_no_torch(tmp_path):
    code = (
        "import sys, glesam_ros.models.registry, glesam_ros.models.glesam.download as _; "
        "from glesam_ros.cli.main import main; main(['models', 'list']); "
        "print([m for m in ('torch', 'safetensors', 'tqdm', 'diffusers') if m in sys.modules])"
    )
    environment = {**os.environ, "GLESAM_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_file_that_is_gone_fails_verify_as_one_that_changed_does(home, tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"x")
    download.take(tmp_path / "file", home / "a/file", home)
    assert main(["models", "verify"]) == 0
    (home / "a/file").unlink()
    assert main(["models", "verify"]) == 1
    assert capsys.readouterr().out.split() == ["ok", "a/file", "missing", "a/file"]


def test_a_system_is_here_when_all_its_files_are(home, capsys):
    scr = home / catalogue.SCR_FILE
    scr.parent.mkdir(parents=True)
    scr.write_bytes(b"x")
    assert main(["models"]) == 0
    assert re.search(r"^scr-sd21 +no", capsys.readouterr().out, re.MULTILINE)
    for source in download.needed("scr-sd21", home):
        (home / source.path).parent.mkdir(parents=True, exist_ok=True)
        (home / source.path).write_bytes(b"x")
    assert main(["models"]) == 0
    assert re.search(r"^scr-sd21 +yes", capsys.readouterr().out, re.MULTILINE)
