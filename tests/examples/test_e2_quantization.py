"""Linear layers at 8 bits: the example's steps on a stand-in, and its claim on the network itself."""

import pytest
import torch
from scripts import check_command, images_of, modules_of, one_of
from typer.testing import CliRunner

from pysolve.nn import QuantLinear
from pysolve.nn.zoo import Mlp

pytestmark = pytest.mark.slow


modules = modules_of("e2_pruning", "e2_quantization")
script = one_of("e2_quantization")
data = images_of()


def test_help_names_the_options_and_missing_data_are_one_sentence(script, tmp_path):
    check_command(script.app, tmp_path)


def test_layers_round_their_inputs_as_the_row_says(script, data):
    torch.manual_seed(0)
    model = Mlp((784, 24, 10)).eval()
    for scheme, dynamic in (("int8-dynamic", True), ("int8", False)):
        result = script.quantized(model, data, scheme, 40)
        layers = [one for one in result.model.modules() if isinstance(one, QuantLinear)]
        assert [layer.dynamic for layer in layers] == [dynamic] * 2


def test_the_whole_script_prints_its_table(modules, script, data, tmp_path, monkeypatch):
    monkeypatch.setattr(modules["e2_pruning"], "mnist", lambda folder, **how: data)
    result = CliRunner().invoke(script.app, ["--out", str(tmp_path), "--quick"])
    assert result.exit_code == 0, result.output
    rows = [line.split("|")[1:-1] for line in result.output.splitlines() if line.startswith("|")]
    names, published, ours, sizes = (
        [cell.strip() for cell in column] for column in [*zip(*rows[2:], strict=True)][:4]
    )
    assert names == ["as trained", "dynamic int8", "int8, inputs as they are"]
    assert published == ["", "97.24", ""]
    kilobytes = [float(size.replace(",", "")) for size in sizes]
    assert all(size < 0.26 * kilobytes[0] for size in kilobytes[1:])
    # One image of 30 is 3.3 %.
    assert all(abs(float(score) - float(ours[0])) <= 3.4 for score in ours)
    assert [file.name for file in tmp_path.iterdir()] == ["mlp.safetensors"]
