"""Networks of transformers in folders: those that it opens by itself, and those that need a plan."""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pysolve.compressed import Compressed
from pysolve.errors import DataError, PysolveError
from pysolve.nn.files import reopen
from pysolve.nn.files.architecture import ordinary
from pysolve.nn.files.checkpoint import load, save
from pysolve.nn.running import Batch, device_of, evaluating, prepared
from pysolve.nn.stock import NotStockError, Stock, is_pretrained, skeleton, stock_of

# Beside the original's configuration, in folders that are for ``load_pretrained``.
FILE = "pysolve.safetensors"
# How far outputs may be apart, as a share of the largest, where kernels give other bits in another process.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
HALF_TOLERANCE = 1e-2
# What belongs to a model beside its weights and its configurations.
_CARRIED = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model"),
    *("sentencepiece*", "*.tiktoken", "*.spm", "chat_template*", "normalizer.json"),
    *("preprocessor_config.json", "*processor_config.json", "*processor.json"),
)
# Samples and tokens of the batch that is made where none is given.
_SAMPLES, _TOKENS = 2, 8


@dataclass(frozen=True)
class Pretrained:
    """A folder that was written, and opened again.

    Parameters
    ----------
    path : Path
    stock : bool
        Whether ``from_pretrained`` opens it without pysolve.
    difference : float
        Between the outputs of the network and of the opened one, as a share of the largest: 0 is bit for bit.
    note : str
        What else is to be known.
    """

    path: Path
    stock: bool
    difference: float
    note: str = ""


@dataclass(frozen=True, eq=False)
class Written:
    """A folder that is to be opened again, on these inputs, which must give these outputs."""

    folder: Path
    args: Sequence[Tensor]
    kwargs: Mapping[str, Any]
    outputs: Sequence[Tensor]
    options: Mapping[str, str]
    device: str
    note: str = field(default="")


def save_pretrained(
    compressed: Compressed,
    folder: str | os.PathLike[str],
    *,
    stock: bool = True,
    batch: Batch = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Pretrained:
    """Write a compressed network of transformers as a folder, and open it again to see that it is the same.

    With ``stock``, the folder is what transformers itself would write: ``config.json`` with the widths of the
    network, read back from its shapes, and ``model.safetensors`` with the names and ties of its class. Any
    program that opens such folders opens it. It is opened in a fresh process that does not know pysolve, and
    its outputs are compared, or nothing is left of it. Llamas whose layers have MLPs of different widths are
    written as DeciLM's ``block_configs``, which vLLM and llama.cpp open and transformers needs that model's
    own code for; what is opened then is Llama's own layers, of the widths that the folder says.

    Parameters
    ----------
    compressed : Compressed
        Whose network is one of transformers.
    folder : str or path
        Is written whole or not at all.
    stock : bool
        False: the original's configuration and a file as ``save`` writes it, from which ``load_pretrained``
        makes the network: for what no configuration describes, such as factored layers and integers.
    batch : one batch, optional
        To compare outputs on; by default one is made for networks of tokens, images and sound.
    tokenizer : optional
        Or processor, which is saved with the network; by default, files of the folder that the original came
        from are copied.
    overwrite : bool
        Whether an existing folder is replaced.

    Returns
    -------
    Pretrained

    Raises
    ------
    PysolveError
        No configuration describes the network: names the fields and layers. The opened network gives other
        outputs, or cannot be opened. No batch can be made.
    FileExistsError
        The folder exists.
    """
    network, folder = _network_of(compressed), Path(folder)
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists: choose another folder, or overwrite=True.")
    with _replacing(folder) as part:
        if stock:
            written = write_stock(network, part, batch)
            difference = reopened([written])[0]
        else:
            written = _written(network, part, batch)
            network.config.architectures = [type(network).__name__]
            _write_configs(network, network.config, part)
            save(compressed, part / FILE)
            again = load_pretrained(part).to(written.device)
            difference = _difference(written, _outputs(again, written))
        _carry(network, part, tokenizer)
    return Pretrained(folder, stock, difference, written.note)


def load_pretrained(folder: str | os.PathLike[str]) -> nn.Module:
    """The network in a folder that ``save_pretrained`` wrote, or any other of transformers.

    Parameters
    ----------
    folder : str or path

    Returns
    -------
    nn.Module
        In evaluation mode. Where the folder has a plan, the class that its configuration names is made without
        values, and the plan's network from it.

    Raises
    ------
    DataError
        It is no such folder.
    """
    folder = Path(folder)
    library = import_module("transformers")
    try:
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = getattr(library, (config.architectures or [""])[0], None)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no configuration of transformers: {error}") from error
    if kind is None:
        raise DataError(f"{folder}/config.json names no class of transformers: {config.architectures}.")
    if not (folder / FILE).exists():
        return kind.from_pretrained(folder, dtype="auto", local_files_only=True)  # type: ignore[no-any-return]
    network = load(folder / FILE, _without_values(kind, config)).eval()
    if hasattr(network, "generation_config"):
        network.generation_config = library.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return network


def write_stock(network: nn.Module, folder: Path, batch: Batch = None) -> Written:
    """Write a folder that transformers opens, which is to be opened again before it is trusted."""
    written = _written(network, folder, batch)
    try:
        found = stock_of(network)
    except NotStockError as error:
        raise PysolveError(
            f"no configuration of {type(network).__name__} describes this network: {error}. Compress with "
            'widths="uniform", or save it with stock=False, for load_pretrained alone.'
        ) from error
    _write_model(network, found, folder)
    return written


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
        return [_difference(one, outputs) for one, outputs in zip(written, ordered, strict=True)]
    finally:
        for place in places:
            shutil.rmtree(place, ignore_errors=True)


def example_of(network: Any) -> dict[str, Tensor]:
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
        raise PysolveError(f"no batch is known for {type(network).__name__}, which reads {what}: give batch=.")
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = tokens()
    home = device_of(network)
    return {
        name: value.to(home, network.dtype if value.is_floating_point() else None)
        for name, value in found.items()
    }


def _network_of(compressed: Compressed) -> Any:
    if not isinstance(compressed, Compressed):
        raise TypeError(f"compressed must be what compress returned, got {type(compressed).__name__}.")
    network = ordinary(compressed.model)
    if not is_pretrained(network):
        raise PysolveError(f"{type(network).__name__} is no network of transformers: use pysolve.save.")
    return network


def _written(network: Any, folder: Path, batch: Batch) -> Written:
    """What the network gives, for a folder that is to hold it."""
    args, kwargs = prepared(network, example_of(network) if batch is None else batch)
    names = ("attn_implementation", "experts_implementation")
    given = {name: getattr(network.config, f"_{name}", None) for name in names}
    options = {name: value for name, value in given.items() if isinstance(value, str)}
    with evaluating(network, as_used=True):
        outputs = reopen.outputs_of(network, args, kwargs)
    return Written(folder, args, kwargs, outputs, options, str(device_of(network)))


def _outputs(network: nn.Module, written: Written) -> list[Tensor]:
    with evaluating(network, as_used=True):
        return reopen.outputs_of(network, written.args, written.kwargs)


def _difference(written: Written, found: Sequence[Tensor]) -> float:
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


def _write_model(network: Any, found: Stock, folder: Path) -> None:
    """The files of transformers: configuration, weights, generation."""
    shell: Any = skeleton(type(network), found.config)
    state = network.state_dict()
    like = next(iter(network.parameters()))
    zeros = {name: torch.zeros(shape).to(like) for name, shape in found.zeros.items()}
    shell.load_state_dict({**state, **zeros}, assign=True)
    shell.tie_weights()
    if getattr(network, "generation_config", None) is not None:
        shell.generation_config = copy.deepcopy(network.generation_config)
    shell.save_pretrained(folder)


def _write_configs(network: Any, config: Any, folder: Path) -> None:
    config.save_pretrained(folder)
    if network.can_generate():
        network.generation_config.save_pretrained(folder)


def _without_values(kind: Any, config: Any) -> nn.Module:
    """The class of a configuration with parameters that hold nothing, and buffers as they are."""
    made = nn.Module.register_parameter

    def empty(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        made(self, name, parameter)

    nn.Module.register_parameter = empty  # type: ignore[method-assign]
    try:
        return kind(config)  # type: ignore[no-any-return]
    finally:
        nn.Module.register_parameter = made  # type: ignore[method-assign]


def _carry(network: Any, folder: Path, tokenizer: Any) -> None:
    """Files of the tokenizer or processor."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        return
    home = Path(getattr(network, "name_or_path", "") or "")
    for pattern in _CARRIED if str(home) != "." and home.is_dir() else ():
        for file in home.glob(pattern):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of ``folder`` once it is complete."""
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"{folder} cannot be written: there is no folder {folder.parent}.")
    part = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.part")
    part.mkdir()
    try:
        yield part
        if folder.exists():
            old = part.with_suffix(".old")
            os.replace(folder, old)
            os.replace(part, folder)
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
