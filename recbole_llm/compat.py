"""RecBole 1.2.1 on current PyTorch, NumPy, SciPy, Ray and hyperopt.

Each patch is one function, listed in ``PATCHES``, that fixes one thing, changes nothing where nothing is broken, and may
be called again without effect. Once RecBole has fixed it, the function can be removed. RecBole's issue and pull-request
numbers are those of github.com/RUCAIBox/RecBole.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from recbole_llm.errors import UserError

# The modules that read what RecBole's trainers wrote, each through its own global name `torch`.
CHECKPOINT_READERS = (
    "recbole.trainer.trainer",
    "recbole.model.general_recommender.convncf",
    "recbole.model.general_recommender.nais",
    "recbole.model.general_recommender.neumf",
    "recbole.model.general_recommender.ract",
    "recbole.model.sequential_recommender.s3rec",
    "recbole.model.context_aware_recommender.kd_dagfm",
)


def apply() -> None:
    """Apply all patches that this environment needs.

    Raises:
        UserError: pandas 3 is installed.
    """
    for patch in PATCHES:
        patch()


class RecBoleIsMissing:
    """The last of ``sys.meta_path``: says what to type where nothing else has found RecBole.

    From Python 3.12 on, pip cannot install RecBole 1.2.1 as a requirement: it requires a Ray that has no wheel there.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "recbole":
            return
        why = "pip cannot install it by itself on Python 3.12 and later, since it requires a Ray that is not made for them"
        without, reason = (" --no-deps", f" ({why})") if sys.version_info >= (3, 12) else ("", "")
        raise ModuleNotFoundError(f"RecBole is not installed: pip install{without} recbole==1.2.1{reason}", name=name)


# ---------------------------------------------------------------------------------------------------------------------
# Tools
# ---------------------------------------------------------------------------------------------------------------------


class Overlay(ModuleType):
    """A module as one of RecBole's modules sees it: a few names replaced, everything else the module's own.

    Put in the place of a global such as ``torch``, it changes what that one module calls, and nothing else in the
    process.
    """

    def __init__(self, module: ModuleType, **names: Any):
        super().__init__(module.__name__, module.__doc__)
        self.__dict__.update(names, _overlaid=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._overlaid, name)


def _overlaid_call(*args, _replacement, **kwargs):
    return _replacement(*args, **kwargs)


def redirect(function: FunctionType, make_replacement: Callable[[FunctionType], Callable]) -> None:
    """Make ``function`` call a replacement, whoever imported it and when.

    RecBole's modules, and those of its users, hold copies of its functions (``from recbole.utils import get_model``).
    Setting an attribute of a module misses those copies; so the function object that they all share gets a new body.

    Args:
        function: a module-level function (no closure).
        make_replacement: called with a function that does what ``function`` did; returns what it does from now on.
            A maker (by qualified name) that was applied to ``function`` before is not applied again.
    """
    makers = function.__dict__.setdefault("_redirected_by", [])
    if make_replacement.__qualname__ in makers:
        return
    signature = inspect.signature(function)
    stock = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    stock.__kwdefaults__ = function.__kwdefaults__
    stock.__doc__ = function.__doc__
    replacement = make_replacement(stock)
    function.__code__ = _overlaid_call.__code__.replace(co_name=function.__name__)
    function.__defaults__ = None
    function.__kwdefaults__ = {"_replacement": replacement}
    function.__signature__ = signature
    makers.append(make_replacement.__qualname__)


# ---------------------------------------------------------------------------------------------------------------------
# Patches
# ---------------------------------------------------------------------------------------------------------------------


def refuse_pandas_3() -> None:
    """Stop where RecBole would silently compute with corrupted data.

    With pandas 3, ``Series.agg(len)`` is the length of the series and no longer that of each element
    (``data/dataset/dataset.py``, ``sequential_dataset.py``: every history gets the dataset's length), and
    ``frame[field].fillna(..., inplace=True)`` fills a copy. Both lie in the middle of long methods; there is no small
    patch. No issue is filed upstream.

    Raises:
        UserError: pandas 3 or later is installed.
    """
    import pandas

    if int(pandas.__version__.split(".")[0]) >= 3:
        raise UserError(
            f"RecBole 1.2.1 corrupts data silently under pandas {pandas.__version__}: install pandas 2 "
            f"(pip install 'pandas<3')."
        )


def numpy_2_aliases() -> None:
    """Let a Config be built under NumPy 2 (issue 1604, pull request 2203).

    ``Config.compatibility_settings`` brings back ``np.float`` and the like, which RecBole's own code uses, and makes
    them from names of which NumPy 2 has dropped ``float_``, ``complex_`` and ``unicode_``.
    """
    import numpy
    from recbole.config import Config

    if "float_" in vars(numpy) or hasattr(Config.compatibility_settings, "__wrapped__"):
        return
    aliases = {
        "bool": numpy.bool_,
        "int": numpy.int_,
        "float": numpy.float64,
        "complex": numpy.complex128,
        "object": numpy.object_,
        "str": numpy.str_,
        "long": numpy.int_,
        "unicode": numpy.str_,
    }

    @functools.wraps(Config.compatibility_settings)
    def compatibility_settings(self) -> None:
        for name, kind in aliases.items():
            if name not in vars(numpy):
                setattr(numpy, name, kind)

    Config.compatibility_settings = compatibility_settings


def numpy_2_sorts_tensors() -> None:
    """Sort interactions under NumPy 2 without a call that it deprecates (no issue is filed upstream).

    ``Interaction.sort`` gives ``np.argsort`` a tensor. NumPy makes an array of it and the result a tensor again, by PyTorch's
    ``__array_wrap__``, which lacks the arguments that NumPy 2 passes: it warns, and says that it will be an error.
    """
    import numpy
    import torch

    module = importlib.import_module("recbole.data.interaction")
    if isinstance(module.np, Overlay) or int(numpy.__version__.split(".")[0]) < 2:
        return

    def argsort(key: Any, **options: Any) -> Any:
        if not isinstance(key, torch.Tensor):
            return numpy.argsort(key, **options)
        return torch.from_numpy(numpy.argsort(key.numpy(), **options))

    module.np = Overlay(numpy, argsort=argsort)


def ray_only_inside_ray() -> None:
    """Import RecBole's quick start without Ray, and report to Ray only where Ray runs it (issues 1518, 1741, 1820).

    ``quick_start.py`` imports ``ray.tune`` at its top for one call at the end of ``objective_function``. Without Ray,
    or with one whose own dependencies are missing, nothing of the quick start can be imported; with it, a search that
    Ray does not drive (``HyperTuning``) gets warnings; and under Ray, the function's own result counts as a second
    report, without the metrics, which ends a search for the best metric in an error.

    So the module gets a ``tune`` that looks for Ray when it is used and does not report, and under Ray the result of
    ``objective_function`` holds the metrics, which reports them in every version of Ray. ``sys.modules`` is left as it
    was.
    """
    name = "recbole.quick_start.quick_start"
    if sys.modules.get("ray") is not None and name not in sys.modules:
        try:
            importlib.import_module(name)
        except Exception:  # whatever a half-installed Ray raises; below we do without it
            pass
    if name not in sys.modules:
        # Everything else that the module imports, so that nothing but the module itself meets the stand-in.
        for needed in ("recbole.config", "recbole.data", "recbole.data.transform", "recbole.utils"):
            importlib.import_module(needed)
        stand_in = ModuleType("ray")
        stand_in.tune = _TuneOnDemand()
        hidden = {key: module for key, module in sys.modules.items() if key == "ray"}
        sys.modules["ray"] = stand_in
        try:
            importlib.import_module(name)
        finally:
            del sys.modules["ray"]
            sys.modules.update(hidden)
    quick_start = sys.modules[name]
    if not isinstance(quick_start.tune, _TuneOnDemand):
        quick_start.tune = _TuneOnDemand()
    redirect(quick_start.objective_function, _reporting_by_its_result)


class _TuneOnDemand:
    """``ray.tune`` for RecBole's quick start: imported when something of it is used."""

    def report(self, **metrics: float) -> None:
        """Do nothing: the result of ``objective_function`` is the report."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module("ray.tune"), name)


def _reporting_by_its_result(stock: FunctionType) -> Callable:
    def objective_function(config_dict=None, config_file_list=None, saved=True):
        result = stock(config_dict, config_file_list, saved)
        ray = sys.modules.get("ray")  # a Ray worker has imported it long before
        if ray is not None and ray.is_initialized():
            result = {**result["test_result"], **result}
        return result

    return objective_function


def read_own_checkpoints() -> None:
    """Let RecBole read the checkpoints that it writes (issues 2212, 2215; pull requests 2155, 2187, 2219).

    They hold a pickled Config, in pickle protocol 4; since PyTorch 2.6 ``torch.load`` refuses both unless it is told
    otherwise. It is told so in RecBole's own places only: evaluation with the best model, ``resume_checkpoint``,
    ``load_data_and_model``, and the pretrained weights of NeuMF, S3Rec, RaCT, NAIS, ConvNCF and KD_DAGFM. These are
    files that the user of this program names, and must trust: unpickling a file runs what it says. Every other
    ``torch.load`` in the process stays as strict as PyTorch made it.
    """
    import torch

    if inspect.signature(torch.load).parameters["weights_only"].default is False:
        return
    for name in CHECKPOINT_READERS:
        module = importlib.import_module(name)
        if not isinstance(module.torch, Overlay):
            module.torch = Overlay(torch, load=_load_trusted)
    # This function imports torch within its body.
    redirect(importlib.import_module("recbole.quick_start.quick_start").load_data_and_model, _reading_its_own_file)


def _load_trusted(file: Any, *args, **kwargs) -> Any:
    import torch

    kwargs.setdefault("weights_only", False)
    return torch.load(file, *args, **kwargs)


def _reading_its_own_file(stock: FunctionType) -> Callable:
    def load_data_and_model(model_file):
        with _trusting(model_file):
            return stock(model_file)

    return load_data_and_model


_TRUSTING = threading.RLock()


@contextmanager
def _trusting(trusted: Any) -> Iterator[None]:
    """Within the context, and in this thread, ``torch.load`` unpickles the file ``trusted``, and no other."""
    import torch

    with _TRUSTING:
        strict = torch.load
        thread = threading.get_ident()

        def load(file, *args, **kwargs):
            if file is trusted and threading.get_ident() == thread:
                kwargs.setdefault("weights_only", False)
            return strict(file, *args, **kwargs)

        torch.load = load
        try:
            yield
        finally:
            torch.load = strict


def dok_matrix_update() -> None:
    """Give sparse matrices back the private method by which RecBole fills them (issue 2034).

    SciPy 1.13 removed ``dok_matrix._update``; LightGCN, NGCF, NCL, GCMC, SpectralCF, KGIN and MCCLK call it.
    """
    from scipy.sparse import dok_matrix

    if hasattr(dok_matrix, "_update"):
        return

    def _update(self, entries: dict[tuple[int, int], float]) -> None:
        self._dict.update(entries)

    dok_matrix._update = _update


def hyperopt_random_state() -> None:
    """Let ``HyperTuning``'s exhaustive search run with hyperopt 0.2.7 and later (issue 1868).

    Since then hyperopt draws by ``Generator.integers``; RecBole gives it a ``RandomState``, where the same is named
    ``randint``. The draws stay those of the RandomState.
    """
    import numpy

    module = importlib.import_module("recbole.trainer.hyper_tuning")
    if isinstance(module.np, Overlay):
        return

    class RandomState(numpy.random.RandomState):
        integers = numpy.random.RandomState.randint

    module.np = Overlay(numpy, random=Overlay(numpy.random, RandomState=RandomState))


def no_anomaly_detection() -> None:
    """Keep autograd's anomaly detection as it was when RecBole's models are imported (no issue is filed upstream).

    ``sequential_recommender/sine.py`` switches it on at import, and looking up any model imports that package: from then
    on every backward pass in the process records stack traces and looks for NaN (measured: a training step of
    LLM-SRec takes 1.6 times as long).
    """
    import torch

    enabled = torch.is_anomaly_enabled()
    importlib.import_module("recbole.model.sequential_recommender.sine")
    torch.autograd.set_detect_anomaly(enabled)


PATCHES: tuple[Callable[[], None], ...] = (
    refuse_pandas_3,
    no_anomaly_detection,
    numpy_2_aliases,
    numpy_2_sorts_tensors,
    ray_only_inside_ray,
    read_own_checkpoints,
    dok_matrix_update,
    hyperopt_random_state,
)
