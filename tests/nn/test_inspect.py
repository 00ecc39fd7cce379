"""The table before any work: what it says is what removing the channels would do, and it fits a terminal."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pysolve as ps
from pysolve.errors import LayerNotFoundError
from pysolve.nn.evaluate import macs, nbytes, parameters
from pysolve.nn.inspect import Inspection, SiteRow, inspect
from pysolve.nn.zoo import DigitsNet, Mlp
from pysolve.plan import Site

DIGITS = torch.zeros(2, 1, 8, 8)
SITES = (
    Site(16, ("conv1",), ("conv2",)),
    Site(32, ("conv2",), ("fc1",)),
    Site(10, ("fc2",), (), pinned="the network's output"),
)


@given(st.lists(st.integers(1, 9), min_size=3, max_size=5))
def test_shares_are_what_is_missing_from_the_network_without_the_channels(sizes):
    x, full = torch.zeros(3, sizes[0]), Mlp(sizes)
    sites = [Site(K, (f"fc{i}",), (f"fc{i + 1}",)) for i, K in enumerate(sizes[1:-1], start=1)]
    found = inspect(full, x, sites=sites)
    assert (found.params, 3 * found.macs, found.bytes) == (parameters(full), macs(full, x), nbytes(full))
    for i, row in enumerate(found.rows, start=1):
        weights = sizes[i] * (sizes[i - 1] + sizes[i + 1])
        assert row.params == pytest.approx((weights + sizes[i]) / parameters(full))
        assert row.macs == pytest.approx(3 * weights / macs(full, x))


def test_rows_name_layers_and_reasons():
    first, second, last = inspect(DigitsNet(), DIGITS, sites=SITES).rows
    assert (first.name, first.channels, first.writers, first.readers) == (
        "conv1 → conv2",
        16,
        ("conv1",),
        ("conv2",),
    )
    assert second.params == pytest.approx((32 * 145 + 512 * 256) / 138_698)
    assert (last.params, last.macs, last.pinned) == (None, None, "the network's output")


def test_the_table_reads_like_this():
    assert str(inspect(DigitsNet(), DIGITS, sites=SITES)).splitlines() == [
        "138,698 parameters, 216,576 MACs a sample, 554,792 bytes in memory",
        "",
        "can shrink     channels    params      MACs",
        "conv1 → conv2        16     3.4 %    38.3 %",
        "conv2 → fc1          32    97.8 %    94.6 %",
        "params, MACs: the share that removing all channels of the site would save",
        "",
        "cannot shrink  channels  because",
        "fc2 → nothing        10  the network's output",
    ]


def test_sites_are_found_when_none_are_given():
    found = ps.inspect(DigitsNet(), DIGITS)
    assert [row.name for row in found.rows] == ["conv1 → conv2", "conv2 → fc1", "fc1 → fc2", "fc2 → nothing"]
    assert [row.pinned is None for row in found.rows] == [True, True, True, False]


def test_channels_that_hang_together_are_all_counted():
    model = nn.Sequential(nn.Embedding(9, 64), nn.TransformerEncoderLayer(64, 4, 8, batch_first=True))
    batches = [torch.zeros(8, 3, dtype=torch.long)]
    rows = {row.name: row.channels for row in inspect(model, batches[0]).rows}
    assert {name.split()[0]: width for name, width in rows.items()} == {
        "0": 64,
        "1.self_attn.q_proj": 4,
        "1.linear1": 8,
    }
    sites = ps.compress(model.eval(), batches, keep=0.5, progress=False).report.sites
    assert [(one.channels, one.kept) for one in sites] == [(64, 64), (4, 2), (8, 4)]


def test_layers_to_ignore_are_pinned():
    found = inspect(DigitsNet(), DIGITS, ignore=["re:conv.*"])
    assert [row.pinned is None for row in found.rows] == [False, False, True, False]
    with pytest.raises(LayerNotFoundError, match="conv3"):
        inspect(DigitsNet(), DIGITS, ignore=["conv3"])


NAMES = st.text("abc.", min_size=1, max_size=60)


@st.composite
def inspections(draw):
    rows = []
    for _ in range(draw(st.integers(0, 4))):
        writer, reader = draw(NAMES), draw(NAMES)
        pinned = draw(st.none() | st.text("word ", max_size=300))
        share = None if pinned is not None else draw(st.floats(0, 1))
        channels = draw(st.integers(1, 20_000))
        rows.append(SiteRow(f"{writer} → {reader}", channels, (writer,), (reader,), share, share, pinned))
    return Inspection(tuple(rows), *draw(st.tuples(*3 * [st.integers(0, 10**12)])))


@given(inspections())
def test_tables_fit_a_terminal_and_their_columns_align(found):
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 110
    ends = {line.index("channels") + len("channels") for line in lines if line.endswith(("MACs", "because"))}
    assert len(ends) == bool(found.rows)
    for row in found.rows:
        figure = f"  {row.channels:,}"
        assert any(line[: max(ends)].endswith(figure) for line in lines)


@given(inspections())
def test_reasons_are_printed_in_full(found):
    text = "".join(str(found).split())
    for row in found.rows:
        assert all(word in text for word in (row.pinned or "").split())


def test_long_names_lose_what_both_layers_share_and_then_their_beginnings():
    block = "transformer.encoder.layer.11"
    rows = [
        SiteRow(f"{block}.mlp.fc1 → {block}.mlp.fc2", 8, (), (), 0.5, 0.5, None),
        SiteRow(f"{block}.attention.self.query (+2) → {block}.attention.output.dense", 8, (), (), 0, 0, None),
        SiteRow(f"stem.convolution → {block}.attention.output.dense.projection", 8, (), (), 0, 0, None),
    ]
    names = [line[:52].strip() for line in str(Inspection(tuple(rows), 1, 1, 1)).splitlines()[3:6]]
    assert names == [
        "transformer.encoder.layer.11.mlp.fc1 → ….fc2",
        "…layer.11.attention.self.query (+2) → ….output.dense",
        "stem.convolution → …ttention.output.dense.projection",
    ]


def test_a_network_without_free_sites_says_so():
    text = str(inspect(nn.Flatten(), torch.zeros(1, 4), sites=[]))
    assert text.splitlines() == [
        "0 parameters, 0 MACs a sample, 0 bytes in memory",
        "",
        "no channels can be removed",
    ]


def test_a_network_without_macs_has_no_share_of_them():
    model = nn.Sequential(nn.Embedding(3, 4), nn.Flatten())
    row = inspect(model, torch.zeros(1, 2, dtype=torch.long), sites=[Site(4, ("0",), ())]).rows[0]
    assert (row.params, row.macs) == (1.0, 0.0)


def test_the_dictionary_is_json():
    found = inspect(DigitsNet(), DIGITS, sites=SITES)
    again = json.loads(json.dumps(found.as_dict()))
    assert again["rows"][0]["writers"] == ["conv1"]
    assert again["rows"][2]["pinned"] == "the network's output"
    assert np.isclose(again["rows"][0]["params"], found.rows[0].params)
    assert (again["params"], again["macs"], again["bytes"]) == (138_698, 216_576, 554_792)
