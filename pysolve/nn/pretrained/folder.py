"""Networks of transformers in folders: those that it opens by itself, and those that need a plan."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from pysolve.compressed import Compressed
from pysolve.errors import DataError, PysolveError, path_of
from pysolve.nn.files.architecture import ordinary
from pysolve.nn.files.checkpoint import restored, save
from pysolve.nn.pretrained.blocks import blocks_of
from pysolve.nn.pretrained.reopening import Written, difference, outputs_again, reopened, written_of
from pysolve.nn.pretrained.shorter import partly_idle, without_idle_layers
from pysolve.nn.pretrained.stock import (
    NotStockError,
    PretrainedConfig,
    PretrainedModel,
    Stock,
    is_pretrained,
    skeleton,
    stock_of,
)
from pysolve.nn.running import Batch
from pysolve.whole_files import crc32_of, replacing_folder

# Beside the original's configuration, in folders that are for ``load_pretrained``.
FILE = "pysolve.safetensors"
# CRC-32 of each file that ``load_pretrained`` has transformers read.
SUMS = "pysolve.json"
_SUMMED = ("config.json", "generation_config.json", "model*.safetensors*")
# What belongs to a model beside its weights and its configurations.
_CARRIED = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model"),
    *("sentencepiece*", "*.tiktoken", "*.spm", "chat_template*", "normalizer.json"),
    *("preprocessor_config.json", "*processor_config.json", "*processor.json"),
)
# By how much buffers may differ: more than half types round.
_NEAR = 1e-2
_BLOCKS = (
    "layers differ, so it is written as block_configs of DeciLM: transformers needs that model's own "
    "code; Llama's own layers, of these widths, gave the outputs"
)


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


class Tokenizer(Protocol):
    """A tokenizer, a processor or the like of transformers."""

    def save_pretrained(self, folder: Path, /) -> object: ...


def save_pretrained(
    compressed: Compressed,
    folder: str | os.PathLike[str],
    *,
    stock: bool = True,
    batch: Batch = None,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> Pretrained:
    """Write a compressed network of transformers as a folder, and open it again to see that it is the same.

    With ``stock``, the folder is what transformers itself would write: ``config.json`` with the widths of the
    network, read back from its shapes, and ``model.safetensors`` with the names and ties of its class. Any
    program that opens such folders opens it. It is opened in a fresh process that does not know pysolve, and
    its outputs are compared, or nothing is left of it. Layers all of whose branches are gone are counted out.

    Llamas whose layers have MLPs of different widths, or lack a branch, are written as DeciLM's
    ``block_configs``, which vLLM and llama.cpp open and transformers needs that model's own code for; what is
    opened then is Llama's own layers, as the folder says.

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

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).eval()
    >>> batches = [{"input_ids": torch.randint(50, (16, 12))} for _ in range(8)]
    >>> smaller = ps.compress(model, batches, target={"macs": 0.7}, widths="uniform", latency=False)
    >>> ps.save_pretrained(smaller, "smaller").difference
    0.0
    >>> LlamaForCausalLM.from_pretrained("smaller").config.num_hidden_layers
    2
    """
    network, folder = _network_of(compressed), path_of("folder", folder)
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists: choose another folder, or overwrite=True.")
    with replacing_folder(folder, sum(one.nbytes for one in network.state_dict().values())) as part:
        if stock:
            written = write_stock(network, part, batch)
            apart = reopened([written])[0]
        else:
            written = written_of(network, part, batch)
            _write_configs(network, part)
            save(compressed, part / FILE)
            again = load_pretrained(part).to(written.device)
            apart = difference(written, outputs_again(again, written))
        _carry(network, part, tokenizer)
        names = sorted(file.name for pattern in _SUMMED for file in part.glob(pattern))
        (part / SUMS).write_text(_sums(part, names))
    return Pretrained(folder, stock, apart, written.note)


def load_pretrained(folder: str | os.PathLike[str]) -> nn.Module:
    """The network in a folder that ``save_pretrained`` wrote, or any other of transformers.

    Parameters
    ----------
    folder : str or path

    Returns
    -------
    nn.Module
        In evaluation mode, from ``.safetensors`` files alone. Where the folder has a plan, the class that its
        configuration names is made without values, and the plan's network from it.

    Raises
    ------
    DataError
        It is no such folder, or damaged: ``save_pretrained`` writes checksums of its files.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).eval()
    >>> batches = [{"input_ids": torch.randint(50, (16, 12))} for _ in range(8)]
    >>> smaller = ps.compress(model, batches, target={"macs": 0.7}, latency=False)
    >>> saved = ps.save_pretrained(smaller, "smaller", stock=False)  # widths of any layer
    >>> ps.load_pretrained("smaller")(**batches[0]).logits.shape
    torch.Size([16, 12, 50])
    """
    folder = path_of("folder", folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}.")
    _check_sums(folder)
    library = import_module("transformers")
    try:
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = getattr(library, (config.architectures or [""])[0], None)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no configuration of transformers: {error}") from error
    # A name of the library that makes no network would be called with what the folder says.
    if not (isinstance(kind, type) and issubclass(kind, library.PreTrainedModel)):
        raise DataError(f"{folder}/config.json names no class of transformers: {config.architectures}.")
    try:
        if not (folder / FILE).exists():
            return kind.from_pretrained(  # type: ignore[attr-defined, no-any-return]
                folder, dtype="auto", local_files_only=True, use_safetensors=True
            )
        network = restored(folder / FILE, _without_values(kind, config), empty=True).eval()
        if hasattr(network, "generation_config"):
            made = library.GenerationConfig.from_pretrained(folder, local_files_only=True)
            network.generation_config = made
    except (PysolveError, ImportError):
        raise
    # Classes of transformers do not name theirs.
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"{folder} cannot be opened: {why}. Copy it anew, or save the network again."
        ) from error
    return network


def _check_sums(folder: Path) -> None:
    """DataError where files are not those that were written; folders of others have no checksums."""
    file = folder / SUMS
    if not file.exists():
        return
    wrong = SUMS
    try:
        text = file.read_bytes().decode()
        known = json.loads(text)
        if text == _sums(folder, known):
            return
        wrong = next(name for name in known if known[name] != _crc32(folder / name))
    # RuntimeError: JSON that is nested too deeply. StopIteration: the checksums themselves are damaged.
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, StopIteration):
        pass
    raise DataError(
        f"{folder} is damaged, or {wrong} was changed: its checksum is another. Copy the folder anew; or "
        f"remove {SUMS} if the change was yours."
    )


def _sums(folder: Path, names: Iterable[str]) -> str:
    """Checksums of files as JSON."""
    return json.dumps({name: _crc32(folder / name) for name in names}, indent=1)


def _crc32(path: Path) -> int:
    with open(path, "rb") as file:
        return crc32_of(file, path.stat().st_size)


def write_stock(network: nn.Module, folder: Path, batch: Batch = None) -> Written:
    """Write a folder that transformers opens, which is to be opened again before it is trusted."""
    written, shorter = written_of(network, folder, batch), network
    try:
        shorter = without_idle_layers(network)
        found = stock_of(shorter)
        _check_buffers(shorter, found.config)
        _write_model(shorter, found, folder)
    except NotStockError as error:
        try:
            stock, blocks = blocks_of(shorter)
        except NotStockError as other:
            raise PysolveError(_refusal(shorter, error, other)) from error
        _write_model(shorter, stock, folder)
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **blocks}, indent=2))
        return replace(written, note=_BLOCKS)
    return written


def _check_buffers(network: PretrainedModel, config: PretrainedConfig) -> None:
    """Refuse a network with buffers that no file holds and the class makes otherwise: frequencies, say."""
    state, made = network.state_dict(), dict[str, Tensor]()
    for name, buffer in network.named_buffers():
        if name in state or not buffer.is_floating_point():
            continue
        made = made or dict(_without_values(type(network), config).named_buffers())
        own, other = buffer.double().cpu(), made.get(name)
        if other is None or own.shape != other.shape:
            continue
        if not torch.allclose(own, other.double(), rtol=_NEAR):
            raise PysolveError(
                f"no configuration of {type(network).__name__} describes this network: {name} holds other "
                "numbers than the class gives it. Compress with head_dims=False, which keeps frequencies, "
                "or save it with stock=False, for load_pretrained alone."
            )


def _refusal(network: nn.Module, error: NotStockError, other: NotStockError) -> str:
    """Why no folder of transformers describes a network, and what to do."""
    kind, more = type(network).__name__, f" ({other})" if "block_configs" in str(other) else ""
    rest = "save it with stock=False, for load_pretrained alone."
    partly = partly_idle(network)
    if partly is None:
        return (
            f"no configuration of {kind} describes this network: {error}{more}. Compress with "
            f'widths="uniform", or {rest}'
        )
    return (
        f"no configuration of {kind} describes {partly}, one of whose branches is gone{more}. Llamas are "
        "written with block_configs for such layers; of other networks let all branches of the layer go "
        f'(keep={{…: 0}} for each, widths="uniform"), for it is counted out then, or {rest}'
    )


def _network_of(compressed: Compressed) -> PretrainedModel:
    if not isinstance(compressed, Compressed):
        raise TypeError(f"compressed must be what compress returned, got {type(compressed).__name__}.")
    network = ordinary(compressed.model)
    if not is_pretrained(network):
        raise PysolveError(f"{type(network).__name__} is no network of transformers: use pysolve.save.")
    return network


def _write_model(network: PretrainedModel, found: Stock, folder: Path) -> None:
    """The files of transformers: configuration, weights, generation."""
    shell: PretrainedModel = skeleton(type(network), found.config)
    like = next(iter(network.parameters()))
    zeros = {name: torch.zeros(shape).to(like) for name, shape in found.zeros.items()}
    if getattr(network, "generation_config", None) is not None:
        shell.generation_config = copy.deepcopy(network.generation_config)
    # By which it writes the type of the values.
    shell.to(network.dtype)
    # Branches that are gone have left zeros.
    names = shell.state_dict().keys()
    own = {name: value for name, value in network.state_dict().items() if name in names}
    with _without_bars():
        shell.save_pretrained(folder, state_dict={**own, **zeros})


def _write_configs(network: PretrainedModel, folder: Path) -> None:
    """The configuration of the network that was given to the first compression."""
    config = copy.deepcopy(network.config)
    config.architectures, config.dtype = [type(network).__name__], network.dtype
    config.save_pretrained(folder)
    if network.can_generate():
        network.generation_config.save_pretrained(folder)


def _without_values(kind: type[nn.Module], config: PretrainedConfig) -> nn.Module:
    """The class of a configuration with parameters that hold nothing, and buffers as they are."""
    made = nn.Module.register_parameter

    def empty(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        made(self, name, param)

    # On the meta device alone, buffers would hold nothing, either.
    nn.Module.register_parameter = empty  # type: ignore[method-assign]
    try:
        return kind(config)
    finally:
        nn.Module.register_parameter = made  # type: ignore[method-assign]


def _carry(network: PretrainedModel, folder: Path, tokenizer: Tokenizer | None) -> None:
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
def _without_bars() -> Iterator[None]:
    logging = import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
