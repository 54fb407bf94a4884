"""The champion answers over HTTP as `predict` does, from files that were checked, and its server goes when it is told to."""

import base64
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from conftest import Trained, registered
from fork_server import shared_fork_server
from PIL import Image

from pipeline.data.images import read_image
from pipeline.errors import DataError, UserError
from pipeline.registry import serve
from pipeline.registry.package import Package
from pipeline.sections.data import Form

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "pipeline"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_champion_answers_curl_and_server_ends_with_command(trained: Trained, packed: Package, tmp_path: Path) -> None:
    if not shutil.which("curl"):
        pytest.skip("no curl on this machine")
    on_its_side = Image.Exif()
    on_its_side[0x0112] = 6
    bars = np.zeros((20, 30, 3), np.uint8)
    bars[:, 10:20] = 255
    Image.fromarray(bars).save(tmp_path / "cat.jpg", exif=on_its_side)
    home, log, port = trained.home.parent, tmp_path / "log", free_port()
    with registered(trained, packed), log.open("w") as out:
        serving = subprocess.Popen(
            [*COMMAND, "serve", "--port", str(port)], cwd=home, stdout=out, stderr=out, env=ENVIRONMENT
        )
        try:
            limit = time.monotonic() + 180
            while f"ready on http://127.0.0.1:{port}/invocations" not in log.read_text():
                assert serving.poll() is None and time.monotonic() < limit, log.read_text()
                time.sleep(0.1)
            said = log.read_text().splitlines()
            assert said[0].startswith("champion: image-classifier version 1, trial 0 of tiny-v1-digits, run ")
            assert "probabilities of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, in this order" in said[1]
            children = psutil.Process(serving.pid).children(recursive=True)
            listening = {c.laddr[:2] for p in children for c in p.net_connections("inet") if c.status == "LISTEN"}
            assert listening == {("127.0.0.1", port)}

            for wrong in (
                "{",
                '{"inputs": [[1, 2]]}',
                '{"inputs": "cat"}',
                json.dumps({"inputs": [[[[300] * 3] * 8] * 8]}),
            ):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request("POST", "/invocations", wrong, {"Content-Type": "application/json"})
                assert connection.getresponse().status == 400, wrong
                connection.close()

            for forged in ({"Host": "evil.example"}, {"Host": "10.evil.example"}, {"Origin": "http://evil.example"}):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request("POST", "/invocations", "{", {"Content-Type": "text/plain", **forged})
                assert connection.getresponse().status == 403, forged
                connection.close()

            json_type, form_type = "application/json", "application/x-www-form-urlencoded"
            part = (
                b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n\xff\xd8secret\r\n--x--\r\n'
            )
            shape = 'the body: should be {"images": ["<base64>"]}, 1 to 1,000 image files, with Content-Type: application/json'
            for wrong, content_type, detail in (
                ('{"images": []}', json_type, shape),
                ('{"images": ["secret"', json_type, shape),
                ('{"images": ["c2VjcmV0"]}', form_type, shape),
                (b"\xff\xd8secret", "image/jpeg", shape),
                (part, "multipart/form-data; boundary=x", shape),
                ('{"images": ["%"]}', json_type, "images.0: is not base64"),
                ('{"images": ["Y2F0"]}', json_type, "images.0: not a JPEG, PNG"),
            ):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request("POST", "/images", wrong, {"Content-Type": content_type})
                response = connection.getresponse()
                assert response.status == 400, wrong
                assert json.loads(response.read())["detail"].startswith(detail), wrong
                connection.close()

            answer = subprocess.check_output(["bash", "-c", said[2]], cwd=tmp_path, text=True, env=ENVIRONMENT)
            got = json.loads(answer)["predictions"]["probabilities"]
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            pixels = read_image(tmp_path / "cat.jpg", Form(8)).transpose(1, 2, 0).tolist()
            body = json.dumps({"inputs": [pixels]})
            connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
            same = json.loads(connection.getresponse().read())["predictions"]["probabilities"]
            np.testing.assert_allclose(same, got, atol=1e-6)
            table = tmp_path / "out.csv"
            words = ["predict", str(tmp_path / "cat.jpg"), "--output", str(table)]
            predicted = shared_fork_server().run(words, home)
            assert predicted.stdout.startswith("model: the champion, image-classifier version 1"), predicted.stderr
            [expected] = np.genfromtxt(table, delimiter=",", skip_header=1, ndmin=2)[:, 2:]
            np.testing.assert_allclose(got, [expected], atol=1e-4)
        finally:
            serving.send_signal(signal.SIGTERM)
            assert serving.wait(30) == 0
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert len(gone) >= 1 and not alive


@pytest.mark.parametrize("text", ["%", "é"])
def test_text_that_is_not_base64_is_named(text: str) -> None:
    with pytest.raises(UserError, match=r"^images\.0: is not base64$"):
        serve.decoded([text], Form(8))


def test_base64_in_lines_or_in_a_data_url_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "a.png")
    text = base64.encodebytes((tmp_path / "a.png").read_bytes()).decode()
    assert "\n" in text[:-1]
    for each in (text, f"data:image/png;base64,{text}"):
        assert serve.decoded([each], Form(8))[0, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("loader_module: mlflow.onnx", "loader_module: evil"),
        ("loader_module: mlflow.onnx", "code: code\n    loader_module: mlflow.onnx"),
        ("code: null", "code: code"),
        ("loader_module: mlflow.onnx", "loader_module: mlflow.pyfunc.model\n    python_model: model.pkl"),
        ("flavors:", "flavors:\n  sklearn:\n    pickled_model: model.pkl"),
        ("data: model.onnx", "data: ../elsewhere.onnx"),
        ("onnx_session_options: null", "onnx_session_options:\n      extra_session_config: {a: b}"),
        ("- CPUExecutionProvider", "- EvilProvider"),
    ],
)
def test_package_that_might_run_code_is_not_served(old: str, new: str, packed: Package, tmp_path: Path) -> None:
    assert serve.check(packed.folder) == serve.ServedModel(tuple("0123456789"), Form(8))
    folder = tmp_path / "model"
    shutil.copytree(packed.folder, folder)
    text = (folder / "MLmodel").read_text()
    assert old in text
    (folder / "MLmodel").write_text(text.replace(old, new))
    with pytest.raises(DataError, match="which export never writes"):
        serve.check(folder)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda path: path.write_bytes(b"no model"), "onnxruntime can't use it"),
        (lambda path: path.unlink(), "onnxruntime can't use it"),
        (lambda path: path.symlink_to(path.rename(path.with_name("other.onnx"))), "a link to a file elsewhere"),
        (lambda path: onnx.save(outside(path), path), "onnxruntime can't use it.* escapes model directory"),
        (lambda path: onnx.save(of_floats(), path), "takes or gives other than MLmodel says"),
    ],
    ids=["damaged", "missing", "link", "weights elsewhere", "another model"],
)
def test_onnx_unlike_its_package_is_not_served(
    fault: Callable[[Path], object], said: str, packed: Package, tmp_path: Path
) -> None:
    shutil.copytree(packed.folder, tmp_path / "model")
    fault(tmp_path / "model" / "model.onnx")
    with pytest.raises(DataError, match=said) as caught:
        serve.check(tmp_path / "model")
    assert len(caught.value.lines) == 1


def outside(path: Path) -> onnx.ModelProto:
    """The model with its largest weights in a file beside its folder."""
    model = onnx.load(path)
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    path.parent.with_name("secret").write_bytes(weights.raw_data)
    onnx.external_data_helper.set_external_data(weights, "../secret")
    weights.ClearField("raw_data")
    return model


def of_floats() -> onnx.ModelProto:
    images, same = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 8, 8, 3])
        for name in ("images", "probabilities")
    )
    node = onnx.helper.make_node("Identity", ["images"], ["probabilities"])
    graph = onnx.helper.make_graph([node], "same", [images], [same])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("content", [None, "", "flavors: 3", "\0", "flavors: {python_function: {}}"])
def test_folder_without_package_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "MLmodel").write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: no packed model (MLmodel); `export`")):
        serve.check(tmp_path)
