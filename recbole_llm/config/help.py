"""What ``--help`` prints: a page that fits a screen; the keys of one model; all models or datasets by name."""

from __future__ import annotations

import importlib.util
import os
import textwrap
from collections.abc import Iterable, Mapping

from recbole_llm import registry
from recbole_llm.config.checks import did_you_mean
from recbole_llm.config.schema import Key, forms_of, keys_of_stock_models, known_keys, load_yaml, read_schema
from recbole_llm.config.settings import datasets_in, model_of
from recbole_llm.errors import UserError

WIDTH = 100
PAPER_LINES = 17

# What most runs set; described by their comments like every key.
USED_MOST = (
    "protocol backbone backbone_layers tuning epochs learning_rate train_batch_size micro_batch_tokens history_length "
    "results_file"
).split()


def help_text(data_path: str | os.PathLike = "dataset/", model: str | None = None, dataset: str | None = None) -> str:
    """Return what ``--help`` prints.

    Args:
        data_path: the folder of the user's datasets.
        model: models whose keys are printed, separated by commas; ``all``: the names of all models.
        dataset: ``all``: the names of all datasets.

    Raises:
        UserError: there is no such model.
    """
    if model == "all":
        return _listed("Models, ours first:", _runnable_models())
    if model:
        return "\n".join(_model_page(name) for name in dict.fromkeys(map(model_of, model.replace(",", " ").split())))
    if dataset == "all":
        here = _listed(f"Datasets under {data_path}:", datasets_in(data_path) or ["none"])
        return here + "\n" + _listed("Datasets that RecBole fetches, or has in its package:", _fetchable())
    return _first_page(data_path)


def _first_page(data_path: str | os.PathLike) -> str:
    schema = read_schema()
    models, stock = registry.models(), [name for name in _runnable_models() if not registry.is_ours(name)]
    backbones = [group.partition("/")[2] for group in schema if group.startswith("backbone/")]
    lines = [
        "recbole-llm run --model=SASRec,LLMSRec,LLMSTAR --dataset=ml-100k [--key=value ...]",
        "  trains and compares models. Keys may stand in a YAML file: --config_files=my.yaml. For one of",
        "  several models: --SASRec.epochs=5; a variant: --model=LLMSTAR,LLMSTAR:b --LLMSTAR:b.beta=0",
        "",
        "Models (--help --model=LLMSTAR lists the keys of one):",
        *_papers(models),
        _one_line(f"  and {len(stock)} without an LLM, such as SASRec, GRU4Rec, eSASRec; --help --model=all lists all."),
        "",
        _one_line(f"Datasets under {data_path}: {_some(datasets_in(data_path))}"),
        f"  ml-100k comes with RecBole, which fetches {len(_fetchable()) - 1} more; --help --dataset=all lists them.",
        _one_line(f"Backbones: {_some(backbones)};"),
        "  or any Hugging Face id, local folder or GGUF file of a causal language model.",
        "",
        "Keys that most runs set:",
    ]
    known = {**schema["overall"], **schema["llm"]}
    for name in USED_MOST:
        default = f"{name} = {_shown(known[name])}"
        lines.append(_one_line(f"  {default:<28} {known[name].meaning}"))
    return "\n".join(lines) + "\n"


def _papers(models: Mapping[str, registry.Entry]) -> list[str]:
    """A model and its paper a line, or two lines where there is space for it."""
    whole = [
        line
        for name, entry in models.items()
        for line in textwrap.wrap(f"{name:<10} {entry.paper}", WIDTH, initial_indent="  ", subsequent_indent=" " * 13)
    ]
    return whole if len(whole) <= PAPER_LINES else [_one_line(f"  {name:<10} {entry.paper}") for name, entry in models.items()]


def _model_page(name: str) -> str:
    """The keys of a model, grouped by form and section."""
    if name not in _runnable_models():
        raise UserError(f"model: there is no model named '{name}'{did_you_mean(name, _runnable_models()) or '.'}")
    ours = registry.is_ours(name)
    known = known_keys(name)
    if not ours:
        own = {key: said for key, said in known.items() if said.where.startswith(("recbole/model/", "model/"))}
        groups = {f"{name}": own}
        for key, said in keys_of_stock_models().items():
            groups.setdefault(said.section, {})[key] = said
        read = {key: said for key, said in known.items() if said.where == "recbole" and not said.mark and not said.meaning}
        of_recbole = f"{name}, a model of RecBole. Keys of ours hold where protocol is set."
        title = f"{name}: {registry.BASELINES[name].paper}" if name in registry.BASELINES else of_recbole
    else:
        groups, read = _groups_of_ours(name, known), {}
        title = f"{name}: {registry.models()[name].paper}"
    rest = {key: said for key, said in known.items() if key not in read and not any(key in group for group in groups.values())}
    schema = read_schema()
    protocol = load_yaml(registry.properties_of(name)).get("protocol") if ours else None
    preset = schema[f"protocol/{protocol or schema['overall']['protocol'].default}"]
    evaluation = {key: said for key, said in preset.items() if key not in schema["overall"]}
    for key in [*schema["overall"], *evaluation]:
        if said := rest.pop(key, None):
            groups.setdefault(said.section or "Evaluation", {})[key] = evaluation.get(key, said)
    groups["RecBole's own"] = {key: said for key, said in rest.items() if said.where.startswith("recbole") and said.meaning}
    lines = textwrap.wrap(title, WIDTH)
    for section, keys in groups.items():
        if keys:
            lines += ["", section]
            lines += [line for said in keys.values() for line in _described(said)]
    return "\n".join(lines) + "\n"


def _groups_of_ours(name: str, known: dict[str, Key]) -> dict[str, dict[str, Key]]:
    """The keys of one of our models: its own by section, its forms', then those of all LLM recommenders by section."""
    schema = read_schema()
    own, shared = schema[f"model/{name}"], schema["llm"]
    forms = {form: schema[f"form/{form}"] for form in forms_of(name)}
    taken: set[str] = set()
    groups: dict[str, dict[str, Key]] = {}

    def add(section: str, keys: Iterable[str]) -> None:
        for key in keys:
            if key in known and key not in taken:
                taken.add(key)
                groups.setdefault(section, {})[key] = known[key]

    elsewhere = set(shared).union(schema["overall"], *forms.values())
    its_own = [said for key, said in own.items() if key not in elsewhere]
    sections = {said.section for said in shared.values()}
    for said in its_own:
        if said.section not in sections:
            add(said.section or name, [said.name])
    for form, keys in forms.items():
        add(f"Asked by {form}", keys)
    for said in [*shared.values(), *its_own]:
        if said.name not in schema["overall"]:
            add(said.section, [said.name])
    return groups


def _described(key: Key) -> list[str]:
    kind = ", ".join(part for part in (key.type, key.constraint) if part)
    if key.where.startswith("recbole"):
        kind = kind.replace("str or int or float", "str")
    mark = f" [{key.mark}]" if key.mark else ""
    head = f"  {key.name} = {_shown(key)}" + (f"  ({kind})" if kind else "") + mark
    hanging = {"initial_indent": "      ", "subsequent_indent": "      "}
    first = textwrap.wrap(head, WIDTH, subsequent_indent="      ", break_on_hyphens=False)
    return [*first, *textwrap.wrap(key.meaning, WIDTH, break_on_hyphens=False, **hanging)]


def _shown(key: Key) -> str:
    if isinstance(key.default, str) and key.default.strip() != key.default:
        return repr(key.default)
    return str(key.default)


def _runnable_models() -> list[str]:
    """The names of all models whose libraries are there, ours first."""
    ours, stock = list(registry.models()), registry.stock_models()
    return [*ours, *(name for name in stock if name not in ("LightGBM", "XGBoost") or importlib.util.find_spec(name.lower()))]


def _fetchable() -> list[str]:
    """The datasets that come with RecBole or that it fetches."""
    urls = load_yaml(registry.recbole_folder() / "properties" / "dataset" / "url.yaml")
    return ["ml-100k", *sorted(set(urls) - {"ml-100k"})]


def _listed(title: str, names: Iterable[str]) -> str:
    indent = {"initial_indent": "  ", "subsequent_indent": "  "}
    return "\n".join([title, *textwrap.wrap(", ".join(names), WIDTH, break_on_hyphens=False, **indent)]) + "\n"


def _some(names: list[str]) -> str:
    shown = ""
    for number, name in enumerate(names):
        if len(shown) + len(name) > WIDTH - 50:
            return f"{shown} and {len(names) - number} more"
        shown += (", " if shown else "") + name
    return shown or "none"


def _one_line(text: str) -> str:
    return text if len(text) <= WIDTH else text[: WIDTH - 4].rstrip(" ,;") + " ..."
