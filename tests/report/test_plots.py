"""Pictures show the numbers they are given, say what is wrong with others, and need no display."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from strategies import seeds

from pysolve.report.drawing import INK, NAMED, SHADES
from pysolve.report.plots import (
    plot_channels,
    plot_convergence,
    plot_elimination,
    plot_pareto,
    plot_weights,
)
from pysolve.report.report import Report
from pysolve.report.rows import SiteReport
from pysolve.solve.elimination import elimination_path
from pysolve.solve.solution import History
from pysolve.solve.solvers import newton

DOCS = Path(__file__).parents[2] / "docs"
HISTORY = History(np.array([0.1, 0.2, 0.3]), np.array([0.0, -3.0, -4.0]), np.array([4.0, 2.0, 0.4]))
CURVE = ((1, 0.5), (2, 0.1), (4, 0.01), (8, 0.0))
SITES = (
    SiteReport("conv1 → conv2", 8, 4, error=0.01, curve=CURVE),
    SiteReport("conv2 → fc1", 64, 32, error=0.2, curve=((1, 0.5), (64, 0.0))),
    SiteReport("fc1 → nothing", 10, 10, pinned="outputs"),
)
KEPT = [4, 16, 64]
CURVES = {"refitted": [80.0, 95.0, 99.0], "lasso": [40.0, 80.0, 98.0]}


def report(params=250, score=90.0, retrained=None, sites=()):
    before, after = {"params": 1000, "macs": 50}, {"params": params, "macs": 10}
    scores = {"score_before": 99.0, "score_after": score, "retrained": retrained}
    return Report(before, after, tuple(sites), 0.1, 100, 10, **scores)


def path_of(seed=0, d=6, **options):
    rng = np.random.default_rng(seed)
    x, W = rng.standard_normal((50, d)), rng.standard_normal((3, d))
    R = x.T @ x / 50
    return elimination_path(R, W @ R, **options)


PICTURES = {
    plot_pareto: [report(), report(500, 95.0)],
    plot_convergence: {"newton": HISTORY},
    plot_elimination: report(sites=SITES),
    plot_channels: report(sites=SITES),
    plot_weights: {"fc1": np.linspace(-1, 1, 50)},
}
draws = pytest.mark.parametrize(
    ("plot", "data"), PICTURES.items(), ids=lambda one: getattr(one, "__name__", "")
)


def points_of(ax, **look):
    """Every point that is drawn by lines of one look."""
    lines = [
        line for line in ax.get_lines() if all(getattr(line, f"get_{k}")() == v for k, v in look.items())
    ]
    return sorted({tuple(map(float, point)) for line in lines for point in line.get_xydata()})


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@draws
def test_it_is_drawn_where_asked_or_in_a_new_figure(plot, data):
    ax = Figure().add_subplot()
    assert plot(data, ax=ax) is ax
    other = plot(data)
    assert other.figure is not ax.figure
    assert ax.get_xlabel() == other.get_xlabel() != ""


@draws
@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_path_is_written_in_the_format_of_its_ending(plot, data, ending, start, tmp_path):
    plot(data, tmp_path / f"picture.{ending}")
    assert (tmp_path / f"picture.{ending}").read_bytes().startswith(start)


@draws
def test_text_and_lines_without_a_colour_of_their_own_share_one(plot, data, tmp_path):
    plot(data).figure.savefig(tmp_path / "picture.svg", transparent=True)
    colors = set(re.findall(r"#[0-9a-f]{6}", (tmp_path / "picture.svg").read_text()))
    assert INK in colors
    assert not {"#000000", "#ffffff", "#cccccc", "#b0b0b0"} & colors


def test_parts_of_a_figure_are_saved_with_the_whole(tmp_path):
    part = Figure().subfigures(1, 2)[0]
    plot_channels(report(sites=SITES), tmp_path / "picture.png", ax=part.add_subplot())
    assert (tmp_path / "picture.png").is_file()


scores = st.integers(0, 100).map(float)
sizes = st.integers(1, 1000)


@given(st.lists(st.tuples(sizes, scores, st.none() | scores), min_size=1, max_size=8))
def test_every_report_is_a_point_and_the_dense_network_a_star_at_100(rows):
    ax = plot_pareto([report(*row) for row in rows])
    stars = points_of(ax, marker="*")
    assert stars == [(100, 99)]
    drawn = points_of(ax, marker="o", markerfacecolor=ax.get_lines()[0].get_color())
    assert drawn == sorted({(100 * (params / 1000), score) for params, score, _ in rows})
    again = points_of(ax, markerfacecolor="none")
    assert again == sorted({(100 * (params / 1000), best) for params, _, best in rows if best is not None})


def test_dominated_reports_are_faint_and_not_joined():
    ax = plot_pareto([report(200, 90.0), report(100, 80.0), report(300, 85.0)])
    joined, others = ax.get_lines()[:2]
    assert joined.get_xydata().tolist() == [[10, 80], [20, 90]]
    assert (others.get_xydata().tolist(), others.get_linestyle()) == ([[30, 85]], "None")
    assert others.get_alpha() < 0.5


def test_lower_scores_may_be_the_better_ones():
    ax = plot_pareto([report(200, 9.0), report(100, 8.0)], lower_is_better=True, score="perplexity")
    assert ax.get_lines()[0].get_xydata().tolist() == [[10, 8]]
    assert ax.get_ylabel() == "perplexity"


def test_methods_have_a_colour_each_and_retraining_a_dashed_line_in_it():
    ax = plot_pareto({"ours": [report(200, 90.0, 95.0)], "theirs": [report(200, 80.0)]}, measure="macs")
    assert legend_of(ax) == ["ours", "ours, retrained", "theirs", "dense network"]
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert lines["ours"].get_color() == lines["ours, retrained"].get_color() != lines["theirs"].get_color()
    assert (lines["ours"].get_linestyle(), lines["ours, retrained"].get_linestyle()) == ("-", "--")
    assert ax.get_xlabel() == "MACs left (%)"
    assert lines["ours"].get_xdata() == [20]


def test_the_axis_of_sizes_is_logarithmic_when_little_is_left():
    assert plot_pareto([report(500)]).get_xscale() == "linear"
    ax = plot_pareto([report(20)])
    assert ax.get_xscale() == "log"
    ticks = [tick.get_text() for tick in ax.get_xticklabels() if 2 <= tick.get_position()[0] <= 100]
    assert ticks == ["2", "5", "10", "20", "50", "100"]


@pytest.mark.parametrize("nothing", [[], {}, {"ours": []}])
def test_no_reports_are_an_error(nothing):
    with pytest.raises(ValueError, match="pass what sweep returned"):
        plot_pareto(nothing)


def test_without_scores_the_divergence_is_drawn():
    found = [replace(report(n), score_before=None, score_after=None, divergence=1 / n) for n in (100, 250)]
    ax = plot_pareto(found)
    drawn = {(x, y) for line in ax.get_lines() for x, y in zip(*line.get_data(), strict=True)}
    assert drawn == {(10.0, 0.01), (25.0, 0.004), (100, 0.0)}
    assert ax.get_ylabel() == "divergence"


def test_reports_without_a_score_or_the_measure_say_what_to_do():
    with pytest.raises(
        ValueError,
        match=r"report 1 of 'ours' has no score, but others have: give sweep or compress evaluate=",
    ):
        plot_pareto({"ours": [report(), replace(report(), score_after=None)]})
    with pytest.raises(ValueError, match="no measure 'weight'; it has params, macs"):
        plot_pareto([report()], measure="weight")
    with pytest.raises(TypeError, match=r"pass \[it\]"):
        plot_pareto(report())


@pytest.mark.parametrize(
    ("against", "x", "label"), [("iteration", [1, 2], "iteration"), ("seconds", [0.2, 0.3], "time (s)")]
)
def test_gaps_are_relative_to_where_the_objective_ended(against, x, label):
    ax = plot_convergence({"newton": HISTORY}, against=against)
    (line,) = ax.get_lines()
    assert list(line.get_xdata()) == x
    np.testing.assert_allclose(line.get_ydata(), [0.5, 0.1])
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_xlabel()) == ("log", "log", label)


def test_a_solution_stands_for_its_history():
    solution = newton((np.eye(3), np.arange(1.0, 7).reshape(2, 3)), 0.1)
    for ax in (plot_convergence({"newton": solution}), plot_convergence({"newton": solution.history})):
        assert legend_of(ax) == ["newton"]
        assert len(ax.get_lines()[0].get_xdata()) == solution.iterations


def test_every_history_gets_a_line_when_there_are_more_than_colors():
    history = History(np.arange(1.0, 4), -np.ones(3), np.ones(3))
    ax = plot_convergence({str(i): history for i in range(9)}, colors=SHADES, lowest=1e-12)
    assert len(ax.get_lines()) == 9
    assert ax.get_ylim() == (1e-12, 1)


def test_a_solve_without_iterations_is_an_empty_line():
    history = History(np.zeros(1), np.zeros(1), np.zeros(1))
    (line,) = plot_convergence({"zero": history}).get_lines()
    assert len(line.get_xdata()) == 0


def test_histories_need_labels():
    with pytest.raises(TypeError, match=r"must be \{label: Solution or History\}, got History"):
        plot_convergence(HISTORY)
    with pytest.raises(ValueError, match="no solves"):
        plot_convergence({})


@given(seeds, st.booleans())
def test_a_path_is_drawn_as_a_share_of_what_keeping_nothing_misses(seed, with_energy):
    path = path_of(seed, r_yy=7.0 if with_energy else None)
    line = plot_elimination(path, lowest=1e-3).get_lines()[0]
    assert line.get_xdata().tolist() == [*range(7)]
    rest = path.error if with_energy else path.error - path.error[-1]
    np.testing.assert_allclose(line.get_ydata(), 100 * np.maximum(rest / rest[0], 1e-3))


def test_a_reports_curves_are_drawn_with_the_size_that_was_chosen():
    ax = plot_elimination(report(sites=SITES))
    assert legend_of(ax) == ["conv1 → conv2", "conv2 → fc1", "chosen"]
    np.testing.assert_allclose(points_of(ax, marker="o"), [(4, 1), (32, 20)])
    curve = ax.get_lines()[0].get_xydata()
    np.testing.assert_allclose(curve[:3], [(1, 50), (2, 10), (4, 1)])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_xlabel() == "channels kept"
    assert "%" in ax.get_ylabel()


def test_a_size_at_which_nothing_is_missed_is_marked_where_the_picture_ends():
    ax = plot_elimination(report(sites=[replace(SITES[0], kept=8, error=0.0)]))
    ((x, y),) = points_of(ax, marker="o")
    assert x == 8
    assert y == pytest.approx(ax.get_ylim()[0]) == pytest.approx(0.7)


def test_many_sites_are_coloured_in_order_over_the_share_of_their_channels():
    sites = [replace(SITES[i % 2], name=f"_layer{i}") for i in range(20)]
    ax = plot_elimination(report(sites=sites))
    assert legend_of(ax) == ["first: _layer0", "last: _layer19", "chosen"]
    assert (ax.get_xlabel(), ax.get_xscale()) == ("channels kept (%)", "linear")
    assert {point[0] for point in points_of(ax, marker="o")} == {50}
    lightness = [
        sum(int(to_hex(line.get_color())[i : i + 2], 16) for i in (1, 3, 5)) for line in ax.get_lines()
    ]
    assert lightness[0] < lightness[18] < lightness[38]


def test_curves_of_another_kind_say_what_is_wanted():
    with pytest.raises(TypeError, match=r"must be an EliminationPath, .* or a Report, got list"):
        plot_elimination([path_of()])
    with pytest.raises(ValueError, match="no error curves"):
        plot_elimination(report(sites=[SITES[2]]))
    with pytest.raises(ValueError, match="no curves"):
        plot_elimination({})


def test_a_bar_a_site_shows_what_it_keeps_with_pinned_ones_grey():
    ax = plot_channels(report(sites=SITES))
    kept, removed, pinned = ([bar.get_width() for bar in bars] for bars in ax.containers)
    assert (kept, removed, pinned) == ([50, 50], [50, 50], [100])
    assert [text.get_text() for text in ax.texts] == ["4 of 8", "32 of 64", "10 of 10"]
    assert [label.get_text() for label in ax.get_yticklabels()] == [site.name for site in SITES]
    assert legend_of(ax) == ["kept", "removed", "cannot shrink"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first site is on top"
    assert "outputs" not in str([text.get_text() for text in ax.texts])


@pytest.mark.parametrize("count", [1, 3, 25, 60])
def test_bars_and_their_names_never_overlap(count):
    long = "encoder.layer.{}.attention.query → encoder.layer.{}.output"
    ax = plot_channels(report(sites=[replace(SITES[0], name=long.format(i, i)) for i in range(count)]))
    ax.figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in (*ax.get_yticklabels(), *ax.texts)]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    page = ax.figure.bbox
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in boxes)
    assert page.y1 / ax.figure.dpi >= 0.2 * count


def test_a_report_without_sites_has_no_channels_to_draw():
    with pytest.raises(ValueError, match="no sites"):
        plot_channels(report())


@given(seeds, st.floats(0, 0.9), st.integers(1, 40))
def test_every_weight_but_the_zeros_is_counted_once(seed, share, bins):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((8, 9)) * (rng.random((8, 9)) >= share)
    ax = plot_weights({"fc1": weight}, bins=bins)
    assert ax.patches[0].get_data().values.sum() == np.count_nonzero(weight)
    zeros = 100 * (weight == 0).mean()
    assert legend_of(ax) == [f"fc1 ({zeros:.3g} % zeros)" if zeros else "fc1"]
    assert ax.get_yscale() == "log"


def test_thresholds_are_drawn_on_both_sides_of_zero():
    weights = {"a": np.linspace(-1, 1, 99), "b": np.linspace(-2, 2, 99)}
    ax = plot_weights(weights, thresholds=0.25)
    assert {x for line in ax.get_lines() for x in line.get_xdata()} == {-0.25, 0.25}
    assert legend_of(ax) == ["a", "b", "threshold ±0.25"]
    ax = plot_weights(weights, thresholds={"a": 0.25, "b": 0.5})
    colors = {line.get_xdata()[0]: line.get_color() for line in ax.get_lines()}
    assert colors[-0.25] == colors[0.25] != colors[0.5]


def test_a_threshold_cuts_no_bin_in_two():
    weight = np.random.default_rng(0).standard_normal(5000)
    ax = plot_weights({"fc1": np.where(abs(weight) < 0.3, 0, weight)}, thresholds=0.3)
    counts, edges, _ = ax.patches[0].get_data()
    assert not counts[(edges[:-1] > -0.299) & (edges[1:] < 0.299)].any()
    assert np.isclose(edges, 0.3).any()
    assert np.isclose(edges, -0.3).any()


def test_of_a_state_dict_the_matrices_are_drawn():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    assert legend_of(plot_weights(model.state_dict())) == ["0.weight", "2.weight"]
    assert legend_of(plot_weights({"half": model[0].weight.bfloat16()})) == ["half"]


def test_of_many_layers_the_first_and_the_last_are_named():
    ax = plot_weights({f"fc{i}": np.arange(5.0) for i in range(NAMED + 1)})
    assert legend_of(ax) == ["first: fc0 (20 % zeros)", f"last: fc{NAMED} (20 % zeros)"]
    assert len(ax.patches) == NAMED + 1


@pytest.mark.parametrize(
    "weights", [{"zero": np.zeros(4)}, {"same": np.full(4, 2.0)}, {"int": np.int8([-128, 127])}]
)
def test_weights_that_hardly_differ_or_are_integers_can_be_drawn(weights, tmp_path):
    ((_, weight),) = weights.items()
    ax = plot_weights(weights, tmp_path / "picture.png")
    assert ax.patches[0].get_data().values.sum() == np.count_nonzero(weight)


def test_bad_weights_and_thresholds_say_what_is_wrong():
    with pytest.raises(TypeError, match=r"got Linear: pass model.state_dict\(\)"):
        plot_weights(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no weights to draw"):
        plot_weights({})
    with pytest.raises(ValueError, match="fc1 has values that are not finite"):
        plot_weights({"fc1": np.array([1.0, np.nan])})
    with pytest.raises(ValueError, match="a threshold for 'fc2', but weights only of fc1"):
        plot_weights({"fc1": np.ones(3)}, thresholds={"fc2": 0.1})
    with pytest.raises(ValueError, match=r"at least 0, got -0.1"):
        plot_weights({"fc1": np.ones(3)}, thresholds=-0.1)


@pytest.mark.parametrize("name", ["picture.xyz", ".", ""])
def test_formats_that_cannot_be_written_are_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"path must end in one of .*\.png, .* got '"):
        plot_weights({"fc1": np.ones(3)}, name)


@pytest.mark.parametrize("given", [None, 3, "text", [None], {"a": 3}, {"a": [3]}])
def test_what_is_no_result_is_refused_by_what_it_is(given):
    with pytest.raises(TypeError, match="reports must be a list of results"):
        plot_pareto(given)
    with pytest.raises(TypeError, match=r"expected a Report, such as a result's .report, got"):
        plot_channels(given)
    with pytest.raises(TypeError, match=r"must be .*Solution or History"):
        plot_convergence(given)


@pytest.mark.parametrize("plot", PICTURES, ids=lambda plot: plot.__name__)
def test_the_documentation_shows_it(plot):
    text = (DOCS / "plots.md").read_text()
    assert f"## `{plot.__name__}`" in text
    assert f"(images/{plot.__name__}.png)" in text
    assert (DOCS / "images" / f"{plot.__name__}.png").is_file()
