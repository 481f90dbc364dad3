"""Names to folders: downloads that break off, the hub's client, the cache, and the table."""

import dataclasses
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import GOLDEN, tiny_network

import tstitch_jax as ts
from tstitch_jax.hub import catalog, download, resolve
from tstitch_jax.models import clip, dit, inception, unet
from tstitch_jax.models.autoencoder import LatentAutoencoder
from tstitch_jax.models.measure import SIZES, count_params, module_macs, param_shapes

BODY = np.random.default_rng(0).bytes(3 * 2**20 + 12345)
HALF = 2**20 + 2**19


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.files`` with ranges, and whatever else its server is told to."""

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        s = self.server
        wanted = self.headers["Range"]
        s.seen.append(wanted if self.command == "GET" else self.command)
        if s.status != 200 or self.path not in s.files:
            return self.send_error(404 if s.status == 200 else s.status)
        body = s.files[self.path]
        tag = s.etag or f'"{hashlib.sha256(body).hexdigest()}"'
        start = int(wanted[6:-1]) if wanted and not s.ignores_range else 0
        if start >= len(body):
            return self.send_error(416)
        if start and self.headers["If-Range"] != tag and not s.ignores_if_range:
            start = 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Type", s.kind)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", tag)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if self.command == "GET":
            count = s.cuts.pop(0) if s.cuts else len(body)
            self.wfile.write(body[start : start + count])
            if s.stalls:
                self.wfile.flush()
                s.released.wait(20)


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.files = {"/net.pt": BODY}
    server.seen, server.cuts, server.released = [], [], threading.Event()
    server.status, server.etag, server.kind = 200, None, "application/octet-stream"
    server.ignores_range = server.ignores_if_range = server.stalls = False
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TSTITCH_CACHE", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "PAUSE", 0)
    return tmp_path


@pytest.fixture
def net(server, cache, monkeypatch):
    """A public network on the server; the file that is its download's."""
    entry = dataclasses.replace(
        catalog.PUBLIC["dit-xl-2-256"], files=("net.pt",), url=f"{server.url}/net.pt"
    )
    monkeypatch.setitem(catalog.PUBLIC, "net", entry)
    return cache / "downloads" / "net.pt"


def leave_part(server, net, cut=HALF):
    """A download that broke off after ``cut`` bytes."""
    server.cuts = [cut] + [0] * download.RETRIES
    with pytest.raises(ValueError, match=f"closed after {cut} of {len(BODY)} bytes"):
        download.download("net")
    assert Path(f"{net}.part").read_bytes() == BODY[:cut]
    assert not net.exists()
    server.cuts, server.seen = [], []


def check_download(net):
    assert download.download("net") == net
    assert net.read_bytes() == BODY
    assert sorted(f.name for f in net.parent.glob("net.pt.*")) in ([], ["net.pt.lock"])


def test_download_once(server, net, capsys):
    check_download(net)
    check_download(net)
    assert server.seen == [None]
    assert "net.pt: 100%" in capsys.readouterr().err


def archive_of(body, name="model.ckpt"):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.yaml", "no weights")
        archive.writestr(name, body)
    return stream.getvalue()


@pytest.fixture
def archived(server, net, monkeypatch):
    """The same file in an archive."""
    server.files["/net.zip"] = archive_of(BODY)
    entry = dataclasses.replace(
        catalog.PUBLIC["net"], url=f"{server.url}/net.zip", member="model.ckpt"
    )
    monkeypatch.setitem(catalog.PUBLIC, "net", entry)
    return net


def test_an_archive(server, archived):
    check_download(archived)
    check_download(archived)
    assert server.seen == [None]
    assert [p.name for p in archived.parent.iterdir() if ".zip" in p.name] == []


def test_an_archive_that_was_not_unpacked(server, archived, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", killed)
        with pytest.raises(KeyboardInterrupt):
            download.download("net")
    assert not archived.exists()
    check_download(archived)
    assert server.seen == [None]


DAMAGED = bytearray(archive_of(BODY))
DAMAGED[len(DAMAGED) // 2] ^= 255


@pytest.mark.parametrize("body", [b"no archive", archive_of(b"", "other.ckpt"), bytes(DAMAGED)])
def test_another_archive(server, archived, body):
    server.files["/net.zip"] = body
    with pytest.raises(ValueError, match=r"net.pt.zip is not an archive with an intact model.ckpt"):
        download.download("net")
    Path(f"{archived}.zip").unlink()
    server.files["/net.zip"] = archive_of(BODY)
    check_download(archived)


def test_an_archive_by_other_means(server, archived):
    server.status = 404
    said = rf"Save model.ckpt in {server.url}/net.zip as net.pt by other means"
    with pytest.raises(ValueError, match=said):
        download.download("net")


def test_a_dropped_connection_goes_on(server, net):
    server.cuts = [HALF, 1000]
    check_download(net)
    assert server.seen == [None, f"bytes={HALF}-", f"bytes={HALF + 1000}-"]


def test_a_later_call_goes_on(server, net):
    leave_part(server, net)
    check_download(net)
    assert server.seen == [f"bytes={HALF}-"]


def test_a_killed_process_leaves_its_part(server, net):
    code = (
        "import dataclasses; from tstitch_jax.hub import catalog, download\n"
        "entry = dataclasses.replace(catalog.PUBLIC['dit-xl-2-256'], files=('net.pt',), "
        f"url='{server.url}/net.pt')\ncatalog.PUBLIC['net'] = entry\ndownload.download('net')"
    )
    server.cuts, server.stalls = [2 * 2**20], True
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    part, patience = Path(f"{net}.part"), time.monotonic() + 60
    while not (part.exists() and part.stat().st_size >= 2**20) and time.monotonic() < patience:
        time.sleep(0.02)
    process.kill()
    process.wait()
    server.stalls = False
    server.released.set()
    have = part.stat().st_size
    assert have >= 2**20
    server.seen = []
    check_download(net)
    assert server.seen == [f"bytes={have}-"]


def another_source(url=None, validator=None):
    def damage(server, net):
        file = Path(f"{net}.part.source")
        old = file.read_text().split("\n")
        file.write_text(f"{url or old[0]}\n{validator or old[1]}")

    return damage


@pytest.mark.parametrize(
    ("damage", "seen"),
    [
        (lambda s, net: Path(f"{net}.part.source").write_text(""), [None]),
        (lambda s, net: Path(f"{net}.part.source").unlink(), [None]),
        (lambda s, net: Path(f"{net}.part").unlink(), [None]),
        (lambda s, net: Path(f"{net}.part").write_bytes(BODY), [f"bytes={len(BODY)}-", None]),
        (another_source(url="https://elsewhere.org/net.pt"), [None]),
        # The server notices that the part is of another file.
        (another_source(validator='"old"'), [f"bytes={HALF}-"]),
        (lambda s, net: setattr(s, "ignores_range", True), [f"bytes={HALF}-"]),
        # The server does not check.
        (
            lambda s, net: (
                setattr(s, "ignores_if_range", True),
                another_source(validator='"old"')(s, net),
            ),
            [f"bytes={HALF}-", None],
        ),
    ],
)
def test_what_cannot_go_on_starts_again(server, net, damage, seen):
    leave_part(server, net)
    Path(f"{net}.part").write_bytes(bytes(HALF))  # so that any byte kept would show
    damage(server, net)
    check_download(net)
    assert server.seen == seen


def test_a_weak_etag_never_resumes(server, net):
    server.etag = 'W/"1"'
    server.cuts = [HALF]
    check_download(net)
    assert server.seen == [None, None]


def test_a_server_that_always_sends_too_little(server, net):
    server.cuts = [HALF] * 99
    server.ignores_range = True
    with pytest.raises(ValueError, match=f"cannot download net: .* {HALF} of {len(BODY)} bytes"):
        download.download("net")
    assert len(server.seen) == 1 + download.RETRIES


@pytest.mark.parametrize("status", [403, 404, 500])
def test_http_errors(server, net, status):
    server.status = status
    with pytest.raises(ValueError, match=f"cannot download net: the server answers {status} "):
        download.download("net")
    assert server.seen == [None]


def test_a_web_page_is_not_a_file(server, net):
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(ValueError, match=r"sent a web page instead of the file.* by other means"):
        download.download("net")
    assert not net.exists()
    assert not Path(f"{net}.part").exists()


def test_a_full_disk_leaves_the_part(server, net, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 2 * 2**20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    with monkeypatch.context() as patch:
        patch.setattr(download, "open", Full, raising=False)
        with pytest.raises(OSError, match=r"cannot write .*net.pt.part: No space left .* resumes"):
            download.download("net")
    check_download(net)
    assert server.seen == [None, f"bytes={2 * 2**20}-"]


def pin(monkeypatch, digest):
    entry = dataclasses.replace(catalog.PUBLIC["net"], sha256=digest)
    monkeypatch.setitem(catalog.PUBLIC, "net", entry)


def test_a_pinned_checksum(server, net, monkeypatch):
    pin(monkeypatch, hashlib.sha256(b"published").hexdigest())
    with pytest.raises(ValueError, match=r"of net have changed: .* the catalog expects"):
        download.download("net")
    assert not net.exists()
    pin(monkeypatch, hashlib.sha256(BODY).hexdigest())
    check_download(net)


def test_a_changed_file_is_refused(server, net, cache):
    check_download(net)
    record = cache / "networks" / "net.sha256"
    assert record.read_text().strip() == hashlib.sha256(BODY).hexdigest()
    net.unlink()
    server.files["/net.pt"] = b"another version"
    with pytest.raises(ValueError, match=r"net.pt .* the first download had") as caught:
        download.download("net")
    assert str(record) in str(caught.value)
    assert not net.exists()
    server.files["/net.pt"] = BODY
    check_download(net)


def test_offline(server, net, cache, conversions):
    url = f"{server.url}/net.pt"
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match="Connection refused") as caught:
        resolve.load("net")
    out = cache / "networks" / "net"
    assert str(caught.value).endswith(
        f"Save {url} as net.pt by other means and run: tstitch convert net.pt {out} --family dit, "
        'then ts.load("net") finds it'
    )
    assert "\n" not in str(caught.value)


def run_hub(endpoint, home, *names, **settings):
    """What a process whose hub is ``endpoint`` prints for each download: a path or an error."""
    code = (
        "import sys, time; from tstitch_jax.hub import download\n"
        "time.sleep = lambda seconds: None  # the client's pauses\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(download.download(name))\n"
        "    except ValueError as error: print(error)\n"
    )
    settings |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    unset = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN")
    result = subprocess.run(
        [sys.executable, "-c", code, *names],
        env={k: v for k, v in os.environ.items() if k not in unset} | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(names)
    return lines


def test_the_hub(server, cache):
    server.files |= {
        "/nyu-visionx/SiT-collections/resolve/main/SiT-S-2-256.pt": BODY,
        "/stabilityai/sd-vae-ft-ema/resolve/main/config.json": b"{}",
        "/stabilityai/sd-vae-ft-ema/resolve/main/diffusion_pytorch_model.safetensors": BODY[:999],
    }
    names = ("sit-s-2-256", "sd-vae-ft-ema", "sit-s-2-256", "sit-b-2-256")
    file, folder, again, missing = run_hub(server.url, cache, *names)
    assert file == again
    assert Path(file).read_bytes() == BODY
    assert Path(folder, "config.json").read_bytes() == b"{}"
    assert Path(folder, "diffusion_pytorch_model.safetensors").read_bytes() == BODY[:999]
    assert Path(file).is_relative_to(cache / "hub")
    assert len(server.seen) - server.seen.count("HEAD") == 3
    assert missing.startswith("cannot download sit-b-2-256: ")
    assert "404" in missing

    server.shutdown()
    server.server_close()
    # What the client has needs no network.
    again, one, several = run_hub(server.url, cache, names[0], "sit-xl-2-256", "sd-vae-ft-mse")
    assert again == file
    at, out = f"{server.url}/nyu-visionx/SiT-collections/resolve/main", cache / "networks"
    assert "refused" in one
    assert one.endswith(
        f"Save {at}/SiT-XL-2-256.pt as SiT-XL-2-256.pt by other means and run: tstitch convert "
        f"SiT-XL-2-256.pt {out}/sit-xl-2-256 --family sit, then "
        'ts.load("sit-xl-2-256") finds it'
    )
    at = f"{server.url}/stabilityai/sd-vae-ft-mse/resolve/main"
    assert (
        f"Save {at}/config.json and {at}/diffusion_pytorch_model.safetensors into a folder "
        "sd-vae-ft-mse-files by other means and run: tstitch convert sd-vae-ft-mse-files "
        f"{out}/sd-vae-ft-mse "
    ) in several
    again, one = run_hub(server.url, cache, names[0], "sit-xl-2-256", HF_HUB_OFFLINE="1")
    assert again == file
    assert "offline mode is enabled" in one


@pytest.fixture
def conversions(monkeypatch):
    """A stand-in for the converter, and the calls of it."""
    calls = []

    def convert(source, out, **arguments):
        calls.append((source, out, arguments))
        time.sleep(0.2)
        if source.read_bytes() != BODY:
            raise ValueError(f"{source} is no checkpoint")
        ts.save(out, tiny_network())

    monkeypatch.setitem(sys.modules, "checkpoints_convert", SimpleNamespace(convert=convert))
    return calls


def test_fetch_converts_once(server, net, cache, conversions):
    threads = [threading.Thread(target=resolve.ensure_converted, args=("net",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    out = cache / "networks" / "net"
    entry = catalog.PUBLIC["net"]
    arguments = {"family": "dit", "name": "net", "source_name": entry.source}
    arguments |= {"text_encoder": "", "license": "CC-BY-NC-4.0", "data": "ImageNet 256"}
    assert conversions == [(net, out, arguments)]
    assert server.seen == [None]
    assert not net.exists()
    assert resolve.resolve("net") == resolve.ensure_converted("net") == out
    assert resolve.load("net").card == tiny_network().card
    assert len(conversions) == 1


def test_a_download_that_cannot_be_converted(server, net, conversions):
    server.files["/net.pt"] = b"something else"
    with pytest.raises(ValueError, match=f"is no checkpoint; delete {net} to download net again"):
        resolve.ensure_converted("net")
    server.files["/net.pt"] = BODY
    net.unlink()
    resolve.ensure_converted("net")


def test_find_in_order(server, net, conversions, cache, monkeypatch):
    monkeypatch.chdir(cache)
    (cache / "fashion-s").mkdir()
    assert resolve.resolve("fashion-s") == resolve.EMBEDDED / "fashion-s"
    (cache / "net").mkdir()
    assert resolve.resolve("net") == Path("net")
    (cache / "net").rmdir()
    assert resolve.resolve("net") == cache / "networks" / "net"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashion-x", "unknown network 'fashion-x'; did you mean 'fashion-xl'"),
        ("dit-xl-256", "unknown network 'dit-xl-256'; did you mean 'dit-xl-2-256'"),
        ("./runs/nothing", "no network folder at ./runs/nothing"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        resolve.load(name)


def test_unknown_public_names():
    for function in (download.download, resolve.ensure_converted):
        with pytest.raises(ValueError, match="unknown public network 'sit-s-2'; did you mean 'sit"):
            function("sit-s-2")


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("TSTITCH_CACHE", "/a/b")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert download.cache_folder() == Path("/a/b")
    monkeypatch.setenv("TSTITCH_CACHE", "")
    assert download.cache_folder() == Path("/c/tstitch_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert download.cache_folder() == Path.home() / ".cache" / "tstitch_jax"


def clip_of(name):
    """Radford et al. 2021, table 20; 64 features a head."""
    patch = int(name.rsplit("patch")[1])
    widths, depth, features = {32: ((512, 768), 12, 512), 14: ((768, 1024), 24, 768)}[patch]
    text, image = (
        dict(width=w, depth=d, num_heads=w // 64, mlp_width=4 * w)
        for w, d in zip(widths, (12, depth), strict=True)
    )
    text["vocabulary"], image["patch"] = 49408, patch
    return clip.CLIP(text, image, features, (224, 224, 3))


@pytest.mark.parametrize("name", catalog.PUBLIC)
def test_the_table_says_what_the_networks_are(name):
    entry = catalog.PUBLIC[name]
    if entry.family == "autoencoder":
        widths, latents, more = {
            "vq-f4": ((128, 256, 512), 3, dict(codebook=8192)),
            "vq-f8": ((128, 256, 256, 512), 4, dict(codebook=16384, attention=(3,))),
        }.get(name, ((128, 256, 512, 512), 4, {}))
        module = LatentAutoencoder(widths, 2, latents, entry.image_shape, **more)
    elif entry.family == "inception":
        module = inception.Inception(entry.num_classes, entry.image_shape)
    elif entry.family == "clip":
        module = clip_of(name)
    elif entry.family == "unet":
        of = {"sd-1-4": "sd-1", "sd-1-5": "sd-1"}.get(name, name)
        text = entry.image_shape == (64, 64, 4)
        more = dict(context=(77, 768)) if text else dict(num_classes=entry.num_classes)
        module = unet.UNet(**unet.SIZES[of], image_shape=entry.image_shape, **more)
    elif entry.family == "text_encoder":
        module = clip.TextTower(49408, 768, 12, 12, 3072)
    else:
        module = dit.DiT(
            **SIZES["dit-" + "-".join(name.split("-")[1:3])],
            image_shape=entry.image_shape,
            num_classes=entry.num_classes,
            learned_variance=entry.family == "dit",
        )
    params = param_shapes(module)
    assert entry.num_params == count_params(params)
    macs = module_macs(module)
    assert entry.macs == macs


def test_a_public_network_is_converted_once(cache, monkeypatch):
    """The autoencoder of the goldens takes the place of a real one."""
    golden = GOLDEN / "diffusers_tiny" / "vae"
    downloads = []
    monkeypatch.setattr(resolve, "download", lambda name: downloads.append(name) or golden)
    assert not download.is_cached("sd-vae-ft-ema")
    for _ in range(2):
        autoencoder = ts.load("sd-vae-ft-ema")
    assert downloads == ["sd-vae-ft-ema"]
    assert download.is_cached("sd-vae-ft-ema")
    card = autoencoder.card
    assert isinstance(autoencoder, ts.Autoencoder)
    assert card.name == "sd-vae-ft-ema"
    assert card.license == "MIT"
    assert card.source == "huggingface.co/stabilityai/sd-vae-ft-ema"
    assert len(card.source_checksum) == 64


def test_every_entry_has_one_place():
    for name, entry in catalog.PUBLIC.items():
        assert bool(entry.url) != bool(entry.repo)
        assert entry.license
        assert entry.repo or len(entry.files) == 1
        assert bool(entry.files) != bool(entry.part)
        assert name == name.lower()


class Repository:
    """Stands in for the hub: a folder, and what was asked of it."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.asked = folder, []
        monkeypatch.setattr("huggingface_hub.list_repo_files", self.list)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.download)

    def list(self, repo):
        files = [p for p in self.folder.rglob("*") if p.is_file()]
        return [str(p.relative_to(self.folder)) for p in files]

    def download(self, repo, file):
        self.asked.append((repo, file))
        return str(self.folder / file)


def test_a_pipeline_of_the_hub(cache, tmp_path, monkeypatch):
    """By the name of its repository; its weights are .bin, its scheduler is beside them."""
    given = json.loads((GOLDEN / "unet" / "names.json").read_text())["bk"]["config"]
    for part in ("unet", "scheduler", "text_encoder"):
        (tmp_path / "repo" / part).mkdir(parents=True)
    (tmp_path / "repo" / "unet" / "config.json").write_text(json.dumps(given))
    weights = tmp_path / "repo" / "unet" / "diffusion_pytorch_model.bin"
    shutil.copy(GOLDEN / "unet" / "bk.bin", weights)
    scheduler = tmp_path / "repo" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"prediction_type": "v_prediction"}))
    hub_ = Repository(tmp_path / "repo", monkeypatch)
    monkeypatch.chdir(tmp_path)
    network = ts.load("someone/anime-style")
    files = ["unet/config.json", "unet/diffusion_pytorch_model.bin",
             "scheduler/scheduler_config.json"]  # fmt: skip
    # What it is is read before the weights are fetched.
    assert hub_.asked == [("someone/anime-style", file) for file in (files[0], *files)]
    card = network.card
    assert (card.name, card.target) == ("someone/anime-style", "v")
    assert card.text_encoder == "someone/anime-style/text_encoder"
    assert card.source == "huggingface.co/someone/anime-style"
    assert card.license == "see huggingface.co/someone/anime-style"
    hub_.asked.clear()
    assert ts.load("someone/anime-style").card == card
    assert not hub_.asked
    # A known one has the usual text encoder.
    assert ts.load("bk-sdm-tiny").card.text_encoder == ""  # of contexts of another width
    assert hub_.asked[0] == ("nota-ai/bk-sdm-tiny", "unet/config.json")
    # It is kept once, by whichever name it is asked for.
    hub_.asked.clear()
    assert download.is_cached("nota-ai/bk-sdm-tiny")
    assert ts.load("nota-ai/bk-sdm-tiny").card.name == "bk-sdm-tiny"
    assert not hub_.asked
    with pytest.raises(ValueError, match=r"the repository someone/x has no weights in vae"):
        ts.load("someone/x/vae")
    hub_.asked.clear()
    later = given | {"addition_embed_type": "text_time"}
    (tmp_path / "repo" / "unet" / "config.json").write_text(json.dumps(later))
    with pytest.raises(ValueError, match="someone/xl is of Stable Diffusion 2, XL or later"):
        ts.load("someone/xl")
    assert hub_.asked == [("someone/xl", "unet/config.json")]
    (tmp_path / "someone").mkdir()
    with pytest.raises(ValueError, match="no network folder at someone/anime"):
        resolve.resolve("someone/anime")
