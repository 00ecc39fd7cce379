"""Tensors and a record of them in one file: written whole or not at all, and read with distrust."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_bytes
from safetensors.torch import save_file
from torch import Tensor

from pysolve.errors import DataError
from pysolve.whole_files import replacing

# Dictionary of deflate, so that short records are compressed, too. Part of format 2, never to be changed.
WORDS = (
    '"measure","method":"relative_gap":"objective":"kkt":"iterations":"lam":"site":"density":"layout":'
    '"dense","csr","why":"dense_seconds":"new_seconds":"error":"pruned","kind":"low-rank","rank":'
    '"spatial":true,"params_left":"macs_left":few samples: 256 were given, and was fitted on rows for '
    'its inputs. Give 500 or better 1,000.the network\'s output → nothing","pinned":"the network\'s '
    'output","curve":[]}],"divergence":0.0layer1.0.conv1.weight.bn1.running_mean.running_var.'
    'num_batches_tracked":["int64",downsample.0.features.classifier.bfloat16 float16 float64 128 '
    "256x512x3x3 64 uint8 1024 2048 4096 768 3072 layers.encoder.self_attn.attention.query.key.value."
    'proj.dense.embeddings.LayerNorm.norm1.linear1.mlp.codes.scales.zeros.int8 values.centroids.["g",1,'
    '["a",0,255,1,["h",0,16,1,"r"]],["t",16,["p",0,0,"r",["a",0,["p","r","r","r",["t",13,"r",["a",0,13,'
    '1,{"version":2,"pysolve":"0.1.0","original":{"conv1.weight":"float32 32x3x5x5","conv1.bias":'
    '"float32 32","conv2.weight":"float32 64x32x3x3","conv2.bias":"float32 64","fc1.weight":"float32 '
    '512x1024","fc1.bias":"float32 512","fc2.weight":"float32 10x512","fc2.bias":"float32 10"},'
    '"stages":[[{"keep":"0-1 3-4","channels":32,"writers":["conv1"],"readers":["conv2"],"passed":[],'
    '"rows":{"conv1":"0-31"},"columns":{"conv2":"0-31"}},{"keep":""}}]],"factored":[{}],"biases":[],'
    '"sparse":[],"quantized":{},"masked":[],"training":false,"rows":{"conv1.weight":["float32 '
    '16x3x5x5",["t",16,"r",["a",0,16,1,]]],"conv1.bias":["float32 16","r"],"fc1.weight":["float32 ",'
    '"fc3.bias":["float32 10",["p",0,0,"r","r"]]},"aliases":{},"report":{"before":{"params":10,'
    '"nonzeros":10,"bytes":40,"macs":200},"after":{"params":,"nonzeros":,"bytes":,"macs":0},"sites":'
    '[{"name":"conv1 → conv2","channels":32,"kept":,"error":0.0,"predicted":0.000,"measured":0.000,'
    '"seconds":0.0,"pinned":null,"curve":[]},{"name":"fc1 → fc2","channels":512,"kept":,"error":0.0,'
    '"predicted":0.0,"measured":0.0,"seconds":0.0,"pinned":null,"curve":[]}],"divergence":0.0,'
    '"samples":,"held":,"score_before":null,"score_after":null,"retrained":null,"seconds":{"find":,'
    '"gather":0.,"measure":0.,"refit":0.,"apply":0.0,"report":0.},"notes":[],"target":null,"layers":[],'
    '"mass":[],"latencies":[[{"median":0.000,"low":0.000,"high":0.000,"batch_size":1,"threads":1},'
    '{"median":0.00,"low":0.00,"high":0.00,"batch_size":32,"threads":2}]],"solves":[],"warnings":[],'
    '"made_with":{"pysolve":"0.1.0","torch":"2.13.0+cpu","numpy":"2.4.6","scipy":"1.17.1","python":"3.'
    '11.7","machine":"x86_64","seed":"0"}},"checksums":{}}'
).encode()
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_KEY = "pysolve"
_SEALED = re.compile(r'\{"checksum":(\d{1,10}),"record":(.*)\}', re.DOTALL)
_VERSION = re.compile(r"\d+ ")
_SHORT = re.compile(r"2 (\d{1,10}) (\d{1,10})")
# The tensor that holds the record and what is coded; no parameter's name begins like that by accident.
STREAM = ":coded"
# Lists and objects take up to fifty times the memory of their JSON, and no network needs so many.
_PARTS = 1_000_000
# Reading a header takes some four times its size: of a file it may be a quarter, and so much more.
_HEADER, _HEADER_SHARE = 2_000_000, 4
# Errors that data types raise which torch does not have.
_LACKING = (AttributeError, KeyError, TypeError)


def write(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, object]) -> None:
    """Write a ``.safetensors`` file with a record, in the form of the record's ``version``.

    1: the metadata has one entry, ``pysolve``: JSON of ``{"checksum": n, "record": {…}}`` with the CRC-32 of
    the record's text. 2: the entry is ``2 c n``, of a tensor of bytes ``:coded``: its CRC-32, and that its
    first n bytes are the record, ``zipped``; the rest is the ``:coded`` that was given. To the record belong
    the ``checksums`` of all other tensors, which are added here.

    An existing file is replaced only once the new one is complete and on the disk. Raises DataError when
    there would be more record than ``read`` takes.
    """
    content, metadata = _sealed(tensors, record)
    with replacing(path, sum(one.nbytes for one in content.values())) as part:
        save_file(content, part, metadata=metadata)
        _check_header(part)


def size(tensors: Mapping[str, Tensor], record: Mapping[str, object]) -> int:
    """Bytes of the file that ``write`` would write."""
    content, metadata = _sealed(tensors, record)
    # One of the same header, without the tensors' bytes, would need the format written out once more.
    return len(save_bytes(content, metadata))


def read(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The record and the tensors, whose checksums are right, of a file that ``write`` wrote.

    Raises DataError when it is another one, or damaged; nothing larger than the file is allocated before.
    """
    if path.is_dir():
        inside = [file.name for file in sorted(path.glob("*.safetensors"))]
        raise DataError(f"{path} is a folder: give the file, of {', '.join(inside) or 'none'} in it.")
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            record, sealed = _opened((file.metadata() or {}).get(_KEY) or "", tensors, path.stat().st_size)
        _check_sums({name: tensors[name] for name in tensors.keys() - sealed}, record.get("checksums"))
    # RuntimeError: JSON that is nested too deeply.
    except (DataError, SafetensorError, ValueError, RuntimeError, *_LACKING) as error:
        why = str(error).rstrip(".")
        raise DataError(
            f"{path} is no file written by pysolve.save, or it is damaged: {why}. Save the network again, or "
            "copy the file anew."
        ) from error
    return record, tensors


def is_compressed(path: Path) -> bool:
    """Whether a file is one that ``write`` wrote, as far as its header says."""
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            return _KEY in (file.metadata() or {})
    except (DataError, SafetensorError, OSError):
        return False


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as integers of the same size."""
    return in_order(tensor).view(_BITS[tensor.itemsize])


def type_and_shape(dtype: torch.dtype, shape: Sequence[int]) -> str:
    """Data type and shape as records have them: "float32 20x1x5x5"."""
    return f"{str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape))}".strip()


def in_order(tensor: Tensor) -> Tensor:
    """On the CPU, as a file has it; conjugates and negatives, which torch only marks as such, carried out."""
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def zipped(text: bytes) -> bytes:
    """The text in raw deflate with the dictionary ``WORDS``."""
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS, zdict=WORDS)
    return packer.compress(text) + packer.flush()


def unzipped(data: bytes, most: int) -> bytes:
    """The text again, never more than ``most`` bytes; DataError when it is longer, or damaged."""
    return _unpacked(zlib.decompressobj(-zlib.MAX_WBITS, WORDS), data, most)


def inflated(data: bytes, size: int) -> bytes:
    """``size`` bytes from raw deflate; DataError when they are more or fewer."""
    found = _unpacked(zlib.decompressobj(-zlib.MAX_WBITS), data, size)
    if len(found) != size:
        raise DataError(f"expected {size} bytes, got {len(found)}.")
    return found


def _check_header(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
    if start.startswith(b"PK"):
        raise DataError("torch.save wrote it.")
    length = int.from_bytes(start, "little")
    if size < 8 or length > size - 8:
        raise DataError(f"its header should take {length} bytes, but the file has {size}.")
    check_length(length, size)


def check_length(length: int, size: int) -> None:
    """DataError for more header than is read of a file of this size."""
    if length > _limit(size):
        raise DataError(f"its header takes {length} of its {size} bytes, more than a quarter and 2 MB.")


def _limit(size: int) -> int:
    """Bytes of header, or of record, that are read of a file of this size."""
    return _HEADER + size // _HEADER_SHARE


def _sealed(
    tensors: Mapping[str, Tensor], record: Mapping[str, object]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the file."""
    short = record.get("version") == 2
    others = {name: tensor for name, tensor in tensors.items() if not (short and name == STREAM)}
    record = {**record, "checksums": {name: checksum(tensor) for name, tensor in others.items()}}
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    if not short:
        return others, {_KEY: f'{{"checksum":{zlib.crc32(text)},"record":{text.decode()}}}'}
    stream = tensors.get(STREAM, torch.zeros(0, dtype=torch.uint8))
    check_length(len(text), stream.nbytes + sum(tensor.nbytes for tensor in others.values()))
    packed = zipped(text)
    whole = torch.cat([torch.frombuffer(bytearray(packed), dtype=torch.uint8), stream])
    return {STREAM: whole, **others}, {_KEY: f"2 {checksum(whole)} {len(packed)}"}


def _opened(metadata: str, tensors: dict[str, Tensor], size: int) -> tuple[dict[str, object], set[str]]:
    """The record, and the names of tensors whose checksum is verified; ``:coded`` loses the record."""
    plain, version = _SEALED.fullmatch(metadata), _VERSION.match(metadata)
    if plain is None and version is None:
        raise DataError("it has no record of a compressed network, which a state dict alone does not have.")
    if plain is None and (short := _SHORT.fullmatch(metadata)) is not None and STREAM in tensors:
        whole, length = tensors[STREAM], int(short[2])
        _check_seal(whole.dtype == torch.uint8 and checksum(whole) == int(short[1]))
        text = unzipped(whole[:length].numpy().tobytes(), _limit(size))
        tensors[STREAM] = whole[length:]
    elif plain is not None:
        text = plain[2].encode()
        _check_seal(zlib.crc32(text) == int(plain[1]))
    else:
        raise DataError(
            f"it has format version {metadata[:9]!r}, but this pysolve reads 1 and 2: update pysolve."
        )
    if sum(map(text.count, (b",", b"[", b"{"))) > _PARTS:
        raise DataError(f"its record has more than {_PARTS} parts.")
    record = json.loads(text)
    if not isinstance(record, dict) or (record.get("version") == 2) != (plain is None):
        raise DataError("its record is none of such a file.")
    return record, set() if plain else {STREAM}


def _check_seal(right: bool) -> None:
    if not right:
        raise DataError("the checksum of its record is wrong.")


def _check_sums(tensors: Mapping[str, Tensor], checksums: object) -> None:
    if not isinstance(checksums, dict) or set(checksums) != set(tensors):
        raise DataError("its tensors are not those that its record names.")
    for name, tensor in tensors.items():
        if checksums[name] != checksum(tensor):
            raise DataError(f"the checksum of {name} is wrong.")


def checksum(tensor: Tensor) -> int:
    """CRC-32 of data type, shape and bytes."""
    start = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    return zlib.crc32(bits(tensor).numpy().data, start)


def _unpacked(unpacker: zlib._Decompress, data: bytes, most: int) -> bytes:
    try:
        found = unpacker.decompress(data, most + 1)
    except zlib.error as error:
        raise DataError(f"its packed bytes are damaged: {error}.") from error
    if len(found) > most:
        raise DataError(f"packed bytes take more than the {most} that they may.")
    if not unpacker.eof or unpacker.unused_data:
        raise DataError("its packed bytes end too early, or too late.")
    return found
