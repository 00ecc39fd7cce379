"""Bytes in fewer bytes, by zlib: the text of a file's record, and rows."""

from __future__ import annotations

import zlib
from typing import Any

from pysolve.errors import DataError

# What records are made of: from here short texts are compressed, too. Part of format 2, never to be changed.
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


def zipped(text: bytes) -> bytes:
    """The text in raw deflate with the dictionary ``WORDS``."""
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS, zdict=WORDS)
    return packer.compress(text) + packer.flush()


def unzipped(data: bytes, most: int) -> bytes:
    """The text again, never more than ``most`` bytes; DataError when it is longer, or damaged."""
    return _whole(zlib.decompressobj(-zlib.MAX_WBITS, WORDS), data, most)


def inflated(data: bytes, size: int) -> bytes:
    """``size`` bytes from raw deflate; DataError when they are more or fewer."""
    found = _whole(zlib.decompressobj(-zlib.MAX_WBITS), data, size)
    if len(found) != size:
        raise DataError(f"expected {size} bytes, got {len(found)}.")
    return found


def _whole(unpacker: Any, data: bytes, most: int) -> bytes:
    try:
        found: bytes = unpacker.decompress(data, most + 1)
    except zlib.error as error:
        raise DataError(f"its packed bytes are damaged: {error}.") from error
    if len(found) > most:
        raise DataError(f"packed bytes take more than the {most} that they may.")
    if not unpacker.eof or unpacker.unused_data:
        raise DataError("its packed bytes end too early, or too late.")
    return found
