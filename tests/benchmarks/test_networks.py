"""The networks' speed, and that of a peer's script."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from pipeline.benchmarks import networks as networks_module
from pipeline.cli.main import app
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.models.build import build_network
from pipeline.recipe import Recipe
from pipeline.search.study import load_study
from pipeline.training.loop import PARTS

CPU = torch.device("cpu")


def test_command_prints_one_json_object_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks_module, "SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", "--model", "baseline", "--dataset", "digits", "--json"])
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)  # and nothing else on it
    (result,) = report["results"]
    assert (result["model"], result["device"], result["batch_size"]) == ("baseline", "cpu", 64)
    assert result["images_per_second"] > 0
    assert set(result["shares"]) == set(PARTS)
    assert sum(result["shares"].values()) == pytest.approx(1, abs=1e-4)
    assert result["bf16_peak_share"] is None, "a CPU's peak is not known"
    assert not list(tmp_path.iterdir())


def test_step_work_equals_the_count_by_hand(small_recipe: Recipe, digits: TrainingData) -> None:
    """A multiply-add is two operations; backward does a layer's work twice, but for the image's own gradient."""
    model = {"model.network": "baseline", "model.widths": (4,), "model.hidden": 3}
    recipe = small_recipe.changed(model | {"training.precision": "fp32"})
    work = networks_module.step_work(recipe, digits, CPU)
    network = build_network(recipe.model, len(digits.classes), 8, 0)
    layers = [module for module in network.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    each = [64 * 2 * layer.weight.numel() * (64 if isinstance(layer, torch.nn.Conv2d) else 1) for layer in layers]
    assert work.flop == 3 * sum(each) - each[0]
    half = networks_module.step_work(recipe.changed({"training.batch_size": 32}), digits, CPU)
    assert half.flop * 2 == work.flop
    assert work.bytes / 2 < half.bytes < work.bytes, "the weights are moved once a step whatever the batch"


@pytest.mark.parametrize("name", ["expert", "efficient"])
def test_step_work_counts_a_grouped_convolution_by_its_groups(name: str, digits: TrainingData) -> None:
    """torch's count is 42 times too high for `expert` in batches of 128: its convolutions have a group for each image."""
    recipe = load_study(name).base.changed(
        {"training.batch_size": 32}, {"data.dataset": "digits", "data.image_size": 8}
    )
    network = build_network(recipe.model, len(digits.classes), 8, seed=0).eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 8, 8))
    forward, work = 32 * counter.get_total_flops(), networks_module.step_work(recipe, digits, CPU)
    assert 2.5 * forward < work.flop < 3 * forward, "backward does a layer's work twice, but the first's"


def test_bytes_are_of_inputs_and_outputs_but_not_views() -> None:
    a, b = torch.zeros(10, 10), torch.zeros(10, 10)
    with networks_module._Traffic() as traffic:
        a.view(4, 25).t()
        assert traffic.bytes == 0
        a + b
        assert traffic.bytes == 3 * 400
        torch._foreach_add_([a, b], 1.0)
        assert traffic.bytes >= 3 * 400 + 800


def peer(folder: Path, body: str) -> Path:
    script = folder / "peer.py"
    script.write_text(f"import json, sys\n{body}\n")
    return script


def test_peers_speed_is_in_its_last_line(tmp_path: Path) -> None:
    script = peer(tmp_path, 'print("hello"); print(json.dumps({"images_per_second": 7, "words": sys.argv[1:]}))')
    assert networks_module.peer_speed(script, ["--model", "plain"]) == 7


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('raise SystemExit("no such model")', "exit code 1, and no images_per_second in its last line: no such model"),
        ("print('done')", "exit code 0, and no images_per_second in its last line: done"),
        ("print('[3]')", "last line: [3]"),
        ("", "last line: it printed nothing"),
    ],
)
def test_failed_peer_is_reported_with_its_last_line(body: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        networks_module.peer_speed(peer(tmp_path, body), [])


def test_ratio_to_a_peer_is_by_round(small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks_module, "ROUNDS", 1)
    monkeypatch.setattr(networks_module, "SECONDS", 0.0)
    script = peer(
        tmp_path,
        f'open({str(tmp_path / "got")!r}, "w").write(" ".join(sys.argv[1:]))\n'
        'print(json.dumps({"images_per_second": 0.5}))',
    )
    result = networks_module.against(script, "plain", small_recipe, tmp_path, CPU)
    workers = torch.get_num_threads() if torch.get_num_threads() > 1 else 0
    expected = f"--data {tmp_path} --model plain --images 2560 --batch 64 --workers {workers}"
    assert (tmp_path / "got").read_text() == expected
    (ours,) = result["images_per_second"]
    assert result["peer_images_per_second"] == [0.5]
    assert result["ratio"] == dict.fromkeys(("min", "median", "max"), round(ours / 0.5, 2))
    with pytest.raises(UserError, match="no such file"):
        networks_module.against(tmp_path / "none.py", "plain", small_recipe, tmp_path, CPU)
