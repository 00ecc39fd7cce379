import gc
import os
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

# Thousands of tiny products: threads only wait for each other, badly so on a busy machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch.export keeps what operators give: of networks that hardly repeat one, that takes longer than they do.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")

import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=40, print_blob=True)
settings.register_profile("thorough", deadline=None, max_examples=2000, print_blob=True)
# What lands is judged by the same examples each time; `make test` and `thorough` look for new ones.
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, database=None)
settings.load_profile(os.environ.get("PYSOLVE_HYPOTHESIS", "default"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What modules hold stays for good, and so do graphs: no search for garbage in it, and few later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(50_000)
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Threads of tiny products only wait for each other."""
    # Not above: the process that only hands out tests needs no torch, and all others wait for it.
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _seeds_where_they_count() -> Iterator[None]:
    """Devices that are not there are not seeded: torch writes down where that was asked for, each time."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for kind in (torch.cuda, torch.xpu, torch.mtia):
            if not kind.is_available():
                patch.setattr(kind, "manual_seed_all", lambda seed: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _known_libraries() -> Iterator[None]:
    """What libraries of BLAS there are is asked again after imports alone, not in each call of a verb."""
    from threadpoolctl import ThreadpoolController

    known = {}

    def limits(count: int, user_api: str) -> object:
        if len(sys.modules) not in known:
            known.clear()
            known[len(sys.modules)] = ThreadpoolController()
        (controller,) = known.values()
        return controller.limit(limits=count, user_api=user_api)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pysolve.nn.threads.threadpool_limits", limits)
        yield


@pytest.fixture(scope="session", autouse=True)
def _shared_graphs() -> Iterator[None]:
    """Networks of one structure are traced once, and looked through once where their values are the same."""
    from graphs import calls, exported, sites_in, traced

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pysolve.nn.graph.export._export", exported)
        for place in ("nn.graph.export", "nn.graph.sites", "methods.studied"):
            patch.setattr(f"pysolve.{place}.trace", traced)
        patch.setattr("pysolve.methods.studied.sites_in", sites_in)
        patch.setattr("pysolve.nn.cost.per_sample.calls", calls)
        yield


@pytest.fixture(scope="session", autouse=True)
def _shared_fields() -> Iterator[None]:
    """What the fields of one configuration count is measured once."""
    from pysolve.nn.pretrained import stock

    measured, known = stock._fields, {}

    def fields(kind: type, config: object) -> object:
        key = kind, config.to_json_string(use_diff=False)
        if key not in known:
            known[key] = measured(kind, config)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock, "_fields", fields)
        yield


@pytest.fixture(scope="session", autouse=True)
def _few_runs() -> Iterator[None]:
    """Reports hold times, which hardly any test looks at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pysolve.nn.cost.profile.SECONDS", 0.0)
        patch.setattr("pysolve.nn.cost.profile.FEWEST", 3)
        yield


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's answer to an interrupt, also in the background, where shells have them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    """Folder of the four MNIST files, or a skip that says how to get them."""
    root = os.environ.get("PYSOLVE_DATA")
    folder = Path(root) / "mnist" if root else None
    if folder is None or not folder.is_dir():
        pytest.skip(
            "needs MNIST: put train/t10k-images/labels-idx?-ubyte.gz into DIR/mnist and set PYSOLVE_DATA=DIR"
        )
    return folder


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of real data and weights, or a skip."""
    root = os.environ.get("PYSOLVE_DATA")
    if root is None or not Path(root, "cifar10_jpeg").is_dir():
        pytest.skip("needs real data and weights: set PYSOLVE_DATA to a folder that holds cifar10_jpeg/")
    return Path(root)
