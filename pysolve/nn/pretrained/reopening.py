"""Saved networks of transformers opened again in a fresh process, and their outputs compared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pysolve.errors import PysolveError
from pysolve.nn.pretrained import reopen
from pysolve.nn.pretrained.stock import PretrainedModel
from pysolve.nn.running import Batch, device_of, evaluating, prepared

# How far outputs may be apart, as a share of the largest, where kernels give other bits in another process.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
HALF_TOLERANCE = 1e-2
# Samples and tokens of the batch that is made where none is given.
_SAMPLES, _TOKENS = 2, 8


@dataclass(frozen=True, eq=False)
class Written:
    """A folder that is to be opened again, on these inputs, which must give these outputs."""

    folder: Path
    args: Sequence[Tensor]
    kwargs: Mapping[str, object]
    outputs: Sequence[Tensor]
    options: Mapping[str, str]
    device: str
    note: str = ""


def written_of(network: PretrainedModel, folder: Path, batch: Batch) -> Written:
    """What the network gives, for a folder that is to hold it."""
    args, kwargs = prepared(network, example_of(network) if batch is None else batch)
    names = ("attn_implementation", "experts_implementation")
    given = {name: getattr(network.config, f"_{name}", None) for name in names}
    options = {name: value for name, value in given.items() if isinstance(value, str)}
    with evaluating(network, as_used=True):
        outputs = reopen.outputs_of(network, args, kwargs)
    return Written(folder, args, kwargs, outputs, options, str(device_of(network)))


def outputs_again(network: nn.Module, written: Written) -> list[Tensor]:
    with evaluating(network, as_used=True):
        return reopen.outputs_of(network, written.args, written.kwargs)


def difference(written: Written, found: Sequence[Tensor]) -> float:
    """Between outputs, as a share of the largest."""
    if [one.shape for one in found] != [one.shape for one in written.outputs]:
        raise PysolveError("the folder was opened again, and gives outputs of other shapes.")
    most = 0.0
    for own, other in zip(written.outputs, found, strict=True):
        apart = (own.cpu().double() - other.cpu().double()).abs()
        # Where both are infinite, or nothing, they are alike.
        apart[own.cpu().eq(other.cpu()) | (own.cpu().isnan() & other.cpu().isnan())] = 0.0
        share = float(apart.max()) / max(float(own.abs().max()), 1e-30) if apart.numel() else 0.0
        if not share <= TOLERANCE.get(own.dtype, HALF_TOLERANCE):
            raise PysolveError(
                f"the folder was opened again, and gives other outputs, {share:.2g} of the largest apart: "
                "the class computes something else than the network. Please report this."
            )
        most = max(most, share)
    return most


def _run(jobs: Path) -> None:
    """Let a fresh process open folders; what went wrong there, as an error."""
    # Without the folder of the script, whose files have names of other packages.
    command = [sys.executable, "-P", str(Path(reopen.__file__)), str(jobs)]
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise PysolveError(f"a fresh process cannot open the folder: {said[-1]}")


def reopened(written: Sequence[Written]) -> list[float]:
    """Open folders in one fresh process without pysolve, and compare outputs.

    Raises
    ------
    PysolveError
        One cannot be opened, or its outputs are others.
    """
    jobs, places = [], [one.folder.with_name(f"{one.folder.name}.check") for one in written]
    try:
        for one, place in zip(written, places, strict=True):
            place.mkdir()
            tensors = {str(i): value for i, value in enumerate(one.args)}
            tensors |= {name: value for name, value in one.kwargs.items() if isinstance(value, Tensor)}
            save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, place / "inputs")
            jobs.append(
                {
                    "folder": str(one.folder),
                    "inputs": str(place / "inputs"),
                    "outputs": str(place / "outputs"),
                    "plain": {name: value for name, value in one.kwargs.items() if name not in tensors},
                    "options": dict(one.options),
                    "device": one.device,
                    "threads": torch.get_num_threads(),
                }
            )
        (places[0] / "jobs").write_text(json.dumps(jobs))
        _run(places[0] / "jobs")
        found = [[*load_file(place / "outputs").items()] for place in places]
        ordered = [[value for _, value in sorted(one, key=lambda pair: int(pair[0]))] for one in found]
        return [difference(one, outputs) for one, outputs in zip(written, ordered, strict=True)]
    finally:
        for place in places:
            shutil.rmtree(place, ignore_errors=True)


def example_of(network: PretrainedModel) -> dict[str, Tensor]:
    """A batch for a network of tokens, images or sound."""
    config, what = network.config, network.main_input_name
    text = config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(0)
    longest = getattr(text, "max_position_embeddings", None) or _TOKENS

    def tokens() -> Tensor:
        shape = (_SAMPLES, min(_TOKENS, longest))
        return torch.randint(text.vocab_size, shape, generator=generator)

    found: dict[str, Tensor] = {}
    if what == "input_ids":
        found[what] = tokens()
    elif what == "pixel_values":
        size = config.image_size
        sizes = size if isinstance(size, list | tuple) else (size, size)
        found[what] = torch.randn(_SAMPLES, config.num_channels, *sizes, generator=generator)
    elif what == "input_features" and hasattr(config, "max_source_positions"):
        shape = (_SAMPLES, config.num_mel_bins, 2 * config.max_source_positions)
        found[what] = torch.randn(shape, generator=generator)
    else:
        raise PysolveError(f"no batch is known for {type(network).__name__}, of {what}: give batch=.")
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = tokens()
    home = device_of(network)
    return {
        name: value.to(home, network.dtype if value.is_floating_point() else None)
        for name, value in found.items()
    }
