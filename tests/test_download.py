"""Downloads of benchmarks, from a server on the loopback."""

import http.server
import io
import os
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from support.benchmarks import pfwillow
from support.download import BENCHMARKS, download


def fails(name: str, root: Path) -> str:
    """The one line that a download fails with."""
    with pytest.raises(ValueError) as found:
        download(name, str(root))
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.fixture
def site(monkeypatch):
    """A loopback server: contents and announced lengths by path, and the paths that were asked for."""
    contents, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body, length = contents.get(self.path, (b"", 0))
            self.send_response(200 if self.path in contents else 404)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for name, benchmark in list(BENCHMARKS.items()):
        lists = {file: f"{url}/{file}" for file in benchmark.lists}
        changed = benchmark._replace(archive=f"{url}/{name}", lists=lists)
        monkeypatch.setitem(BENCHMARKS, name, changed if benchmark.archive else benchmark)
    yield contents, asked
    server.shutdown()
    server.server_close()


def zipped(*members: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        for member in members:
            packed.writestr(member, "x" * 3000)
    return content.getvalue()


def tarred(member: str, body: bytes = b"picture") -> bytes:
    content, info = io.BytesIO(), tarfile.TarInfo(member)
    info.size = len(body)
    with tarfile.open(fileobj=content, mode="w:gz") as packed:
        packed.addfile(info, io.BytesIO(body))
    return content.getvalue()


LIST = b"imageA,imageB" + b",x" * 40 + b"\nP/car(G)/1.png,P/car(G)/2.png" + b",5,6" * 20 + b"\n"
WILLOW = zipped("PF-dataset/car(G)/1.png", "PF-dataset/car(G)/2.png", "__MACOSX/PF-dataset/junk")
SPAIR_TAR = tarred("SPair-71k/JPEGImages/cow/1.jpg")


def test_a_benchmark_and_its_lists_are_fetched_once_and_what_is_there_is_left_alone(tmp_path, site):
    contents, asked = site
    splits = ("train", "val", "test")
    lists = {f"/{split}_pairs_pf_pascal.csv": (split.encode(), len(split)) for split in splits}
    pascal = zipped("PF-dataset-PASCAL/JPEGImages/a.jpg", "PF-dataset-PASCAL/val_pairs_pf_pascal.csv")
    contents |= {"/pfwillow": (WILLOW, len(WILLOW)), "/test_pairs_pf.csv": (LIST, len(LIST))} | lists
    contents |= {"/pfpascal": (pascal, len(pascal)), "/spair": (SPAIR_TAR, len(SPAIR_TAR))}
    for name in ("pfwillow", "pfpascal", "spair"):
        download(name, str(tmp_path / "new"))
    found = {str(p.relative_to(tmp_path / "new")): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    willow = {"PF-WILLOW/car(G)/1.png": b"x" * 3000, "PF-WILLOW/car(G)/2.png": b"x" * 3000}
    pascal = {f"PF-PASCAL/{split}_pairs_pf_pascal.csv": split.encode() for split in ("train", "test")}
    pascal |= {"PF-PASCAL/val_pairs_pf_pascal.csv": b"x" * 3000, "PF-PASCAL/JPEGImages/a.jpg": b"x" * 3000}
    spair = {"SPair-71k/JPEGImages/cow/1.jpg": b"picture"}
    assert found == willow | {"PF-WILLOW/test_pairs_pf.csv": LIST} | pascal | spair
    assert len(list((tmp_path / "new").iterdir())) == 3 and len(pfwillow(str(tmp_path / "new"))) == 1
    (tmp_path / "empty/PF-WILLOW").mkdir(parents=True)
    for root in ("new", "new/PF-WILLOW", "empty"):
        download("pfwillow", str(tmp_path / root))
    assert len(asked) == 7 - 1  # val was in the archive
    assert not list((tmp_path / "empty/PF-WILLOW").iterdir())


BAD = {
    "cut on the way": ("pfwillow", WILLOW[:-700], 700, f"{len(WILLOW) - 700} of {len(WILLOW)} bytes"),
    "cut before": ("pfwillow", WILLOW[:-700], 0, "/pfwillow: "),
    "changed": ("pfwillow", WILLOW.replace(b"xxx", b"xyx", 1), 0, "CRC"),
    "a web page": ("spair", b"<html>moved</html>", 0, "/spair: "),
    "a cut tar": ("spair", tarred("a", os.urandom(9000))[:-90], 0, "/spair: "),
    "another tar": ("spair", tarred("readme"), 0, "no SPair-71k/JPEGImages"),
    "a list that is gone": ("pfwillow", WILLOW, 0, "/test_pairs_pf.csv: HTTP Error 404"),
    "zip upwards": ("pfwillow", zipped("../evil.txt"), 0, "evil"),
    "zip absolute": ("pfwillow", zipped("/tmp/evil-member"), 0, "evil"),
    "tar upwards": ("spair", tarred("a/../../evil.txt"), 0, "evil"),
}


@pytest.mark.parametrize(("name", "body", "missing", "says"), BAD.values(), ids=BAD)
def test_a_failed_download_says_what_to_do_by_hand_and_leaves_nothing(
    tmp_path, site, name, body, missing, says
):
    site[0][f"/{name}"] = (body, len(body) + missing)
    text, benchmark = fails(name, tmp_path), BENCHMARKS[name]
    assert text.startswith("cannot download http://127.0.0.1") and says in text
    assert f"by hand: unpack {benchmark.archive} as {tmp_path}/{benchmark.folders[0]}" in text
    assert list(tmp_path.rglob("*")) == [] and not Path("/tmp/evil-member").exists()


def test_an_interrupted_download_leaves_nothing_and_a_file_address_serves_too(tmp_path, site, monkeypatch):
    assert fails("shapes", tmp_path).endswith("known: pfwillow, pfpascal, spair")
    (tmp_path / "archive").write_bytes(SPAIR_TAR)
    changed = BENCHMARKS["spair"]._replace(archive=(tmp_path / "archive").as_uri())
    monkeypatch.setitem(BENCHMARKS, "spair", changed)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tarfile, "open", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        download("spair", str(tmp_path))
    assert list(tmp_path.iterdir()) == [tmp_path / "archive"]
    download("spair", str(tmp_path))
    assert (tmp_path / "SPair-71k/JPEGImages/cow/1.jpg").read_bytes() == b"picture"


def test_a_web_page_in_the_place_of_a_list_is_no_list(tmp_path, site):
    site[0].update({"/pfwillow": (WILLOW, len(WILLOW)), "/test_pairs_pf.csv": (b"\n<!doctype html>", 16)})
    assert "/test_pairs_pf.csv: a web page" in fails("pfwillow", tmp_path) and list(tmp_path.iterdir()) == []


def test_without_a_path_a_set_is_fetched_into_datasets_and_found_there(tmp_path, site, monkeypatch):
    contents, asked = site
    contents |= {"/pfwillow": (WILLOW, len(WILLOW)), "/test_pairs_pf.csv": (LIST, len(LIST))}
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COCR_DATA", raising=False)
    with pytest.raises(ValueError, match="evaluate.py --dataset pfwillow --download$"):
        pfwillow(None)
    for _ in range(2):
        download("pfwillow", None)
    assert [str(path) for path in Path().iterdir()] == ["datasets"]
    assert len(pfwillow(None)) == 1 and asked == ["/pfwillow", "/test_pairs_pf.csv"]


@pytest.mark.parametrize("place", ["here", "elsewhere"])
def test_what_lies_here_or_in_the_folder_of_the_environment_is_not_fetched_again(
    tmp_path, site, monkeypatch, place
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COCR_DATA", str(tmp_path / "elsewhere"))
    (tmp_path / place / "SPair-71k/JPEGImages").mkdir(parents=True)
    download("spair", None)
    assert site[1] == [] and not Path("datasets").exists()
    site[0]["/spair"] = (SPAIR_TAR, len(SPAIR_TAR))
    download("spair", "given")
    assert Path("given/SPair-71k/JPEGImages/cow/1.jpg").read_bytes() == b"picture"
