"""How the parameters of a command become options, and the options that several commands take."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..config import CrushConfig
from ..errors import ConfigError, one_line
from ..files import text_of
from ..presets import PRESETS

STDIN = "-"


def option(help: str, metavar: str | None = None, *flags: str, panel: str | None = None, **more: Any) -> Any:
    """An option. `flags` replace the one that is made from the parameter's name; `panel` is a section of the help."""
    return typer.Option(*flags, help=help, metavar=metavar, rich_help_panel=panel, **more)


def output_option(help: str) -> Any:
    return option(help, "FILE", "--output", "-o")


_model = functools.partial(option, panel="Model")
_prompt = functools.partial(option, panel="Prompt")
_config = functools.partial(option, panel="KV cache")


def _readable(texts: list[str] | None) -> list[str] | None:
    """Refuses a configuration that cannot be read before anything slow is imported or loaded."""
    if texts:
        from ..config_text import parse_configs

        parse_configs(texts)
    return texts


Json = Annotated[bool, option("Print JSON.", None, "--json")]
NewTokens = Annotated[int, option("Length of an answer at most.", "TOKENS", min=1)]
Configs = Annotated[
    list[str] | None,
    option(
        "full, a preset, POLICY:FIELD=VALUE,... or FIELD=VALUE,... Repeatable; {a,b} stands for both.",
        "TEXT",
        "--config",
        "--preset",
        "--method",
        callback=_readable,
    ),
]
ModelName = Annotated[
    str | None, _model("Hugging Face id or folder.  [default: SmolLM2-135M-Instruct, embedded]", "MODEL")
]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which model runs, and how. `model` None is the embedded one."""

    model: ModelName = None
    dtype: Annotated[str, _model("auto (as saved), float32, bfloat16 or float16.", "NAME")] = "auto"
    device: Annotated[str, _model("auto (a GPU if there is one), cpu, cuda, cuda:1, ...", "NAME")] = "auto"
    attn_implementation: Annotated[str, _model("sdpa, eager or flash_attention_2.", "NAME")] = "sdpa"
    prefill_chunk_size: Annotated[int | None, _model("Read prompts in pieces of this length.", "TOKENS", min=1)] = None
    trust_remote_code: Annotated[bool, _model("Run code that comes with the model.", None, "--trust-remote-code")] = (
        False
    )

    @property
    def generation(self) -> dict[str, Any]:
        """The arguments of `generate` among these options."""
        return {} if self.prefill_chunk_size is None else {"prefill_chunk_size": self.prefill_chunk_size}


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """How text becomes a prompt: through the chat template or not (None: if there is one)."""

    chat: Annotated[
        bool | None, _prompt("Use the chat template.  [default: if the model has one]", None, "--chat/--no-chat")
    ] = None
    system: Annotated[str | None, _prompt("System message.", "TEXT")] = None


@dataclasses.dataclass(frozen=True)
class PromptOptions(ChatOptions):
    """Where the prompt comes from."""

    prompt: Annotated[str | None, _prompt("The prompt; - is standard input.", "TEXT")] = None
    file: Annotated[str | None, _prompt("A file that is read before --prompt; - is standard input.", "FILE")] = None

    def read(self) -> str:
        """The text of `--prompt`, of `--file`, of both (the file first), or of standard input.

        Raises:
            ConfigError: there is no prompt, it is empty, or it cannot be read. The message names the option.
        """
        given = {"--file": self.file, "--prompt": self.prompt}
        given = {option: value for option, value in given.items() if value is not None}
        if not given:
            if sys.stdin is None or sys.stdin.isatty():
                raise ConfigError("--prompt: no prompt; give --prompt TEXT, --file FILE, or text on standard input")
            given = {"--file": STDIN}
        if list(given.values()) == [STDIN, STDIN]:
            raise ConfigError("--prompt and --file: only one of them can be standard input")
        parts = [
            value if option == "--prompt" and value != STDIN else read_text(option, value)
            for option, value in given.items()
            if value is not None
        ]
        if not any(part.strip() for part in parts):
            raise ConfigError(f"{' and '.join(given)}: the prompt is empty")
        return "\n\n".join(parts)


def read_text(option: str, name: str) -> str:
    """The text of a file, or of standard input where its name is `-`.

    Raises:
        ConfigError: it cannot be read, or is no text in UTF-8.
    """
    try:
        return text_of(sys.stdin.buffer.read() if name == STDIN else Path(name).expanduser().read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(str(error))
        source = f"{option} (standard input)" if name == STDIN else f"{option} {name!r}"
        raise ConfigError(f"{source}: {reason}") from None


@dataclasses.dataclass(frozen=True)
class ResultOptions:
    """Where the result goes."""

    output: Annotated[Path | None, output_option("Keep every single result in this file (JSON).")] = None
    as_json: Json = False


def with_options(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a command: a parameter whose type is a dataclass becomes an option for each of its fields.

    It adds `--debug`.

    Args:
        defaults: fields of these dataclasses that have another default in this command.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            kind: Any = parameter.annotation
            if not dataclasses.is_dataclass(kind):
                parameters.append(parameter)
                continue
            fields = dataclasses.fields(kind)
            build: Any = kind
            changed = {field.name: defaults[field.name] for field in fields if field.name in defaults}
            if kind is CrushConfig:
                options, build = _config_options(changed), functools.partial(_build_config, changed)
            else:
                hints = typing.get_type_hints(kind, include_extras=True)
                options = [_parameter(f.name, hints[f.name], changed.get(f.name, f.default)) for f in fields]
            groups[parameter.name] = build, [option.name for option in options]
            parameters += options

        @functools.wraps(command)
        def wrapper(debug: bool, **values: Any) -> None:
            built = {name: build(**{n: values.pop(n) for n in names}) for name, (build, names) in groups.items()}
            command(**values, **built)

        parameters.append(_DEBUG)
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _set_debug(context: typer.Context, value: bool) -> None:
    if value:
        context.find_root().obj.debug = True


_debug = option("Show tracebacks and all warnings.", None, "--debug", callback=_set_debug, is_eager=True)
_DEBUG = _parameter("debug", Annotated[bool, _debug], False)


def _config_options(changed: Mapping[str, Any]) -> list[inspect.Parameter]:
    """`--config`, and an option for each field of `CrushConfig`, with the first sentence about the field as its help.

    An option that is not given is None: then `--config` or the default holds.
    """
    forms = f"{', '.join(PRESETS)}, PRESET:FIELD=VALUE,..., POLICY:FIELD=VALUE,..., FIELD=VALUE,... or a JSON file."
    whole = _config(f"{forms} Options given beside it win.", "TEXT", "--config", "--preset")
    hints, documented = typing.get_type_hints(CrushConfig), _documentation(CrushConfig)
    options = [_parameter("config_text", Annotated[str | None, whole], None)]
    for field in dataclasses.fields(CrushConfig):
        kind, metavar, choices = _kind(hints[field.name])
        text = documented.get(field.name, "")
        if choices:
            text = f"{text.removesuffix('.')} ({', '.join(choices)})."
        default = changed.get(field.name, field.default)
        if default is not None and default is not dataclasses.MISSING:
            text += f"  [default: {str(default).lower()}]"
        flag = "--" + field.name.replace("_", "-")
        info = _config(text, metavar, flag.removesuffix("s") if kind == list[str] else flag)
        options.append(_parameter(field.name, Annotated[kind | None, info], None))
    return options


def _kind(hint: Any) -> tuple[Any, str, Iterable[str]]:
    """How the command line takes a field of that type: as what, the name of its value, and what can be chosen."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return str, "NAME", typing.get_args(hint)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return list[str], "NAME=VALUE", ()
    return (int, "INT", ()) if hint is int else (str, "true|false" if hint is bool else "VALUE", ())


def _documentation(kind: Any) -> dict[str, str]:
    """The first sentence about each attribute in a docstring, as a sentence."""
    found = re.findall(r"^    (\w+): (.+?)(?=\n    \S|\n\n|\Z)", inspect.getdoc(kind) or "", re.MULTILINE | re.DOTALL)
    sentences = {}
    for name, text in found:
        sentence = re.split(r"(?<=[.;]) (?=[A-Z`0-9])", " ".join(text.split()), maxsplit=1)[0].rstrip(".;")
        sentences[name] = f"{sentence[:1].upper()}{sentence[1:]}."
    return sentences


def _build_config(changed: Mapping[str, Any], config_text: str | None, **given: Any) -> CrushConfig:
    """The configuration of `--config`, or of the defaults with `changed`, with the options that were given.

    Raises:
        ConfigError: names the option or the field.
    """
    base = CrushConfig(**changed) if config_text is None else read_config(config_text)
    changes = {name: _read(name, value) for name, value in given.items() if value not in (None, [])}
    if "policy_options" in changes and changes.get("policy", base.policy) == base.policy:
        changes["policy_options"] = {**base.policy_options, **changes["policy_options"]}
    return base.replace(**changes)


def read_config(text: str) -> CrushConfig:
    """A configuration from a JSON file, or from text as `parse_config` reads it.

    Raises:
        ConfigError: it is neither, or it is the full cache.
    """
    from ..config_text import parse_config

    try:
        if text.endswith(".json") or Path(text).expanduser().is_file():
            return CrushConfig.load(Path(text).expanduser())
        config = parse_config(text)
    except ConfigError as error:
        raise ConfigError(f"--config {text!r}: {error}") from None
    if config is None:
        raise ConfigError(f"--config {text!r}: the full cache is not compressed, so it has no configuration")
    return config


def _read(name: str, value: Any) -> Any:
    """An option's value as the field has it. `CrushConfig` checks it."""
    from ..config_text import read_field, read_value

    if name != "policy_options":
        return read_field(name, value) if isinstance(value, str) else value
    options: dict[str, Any] = {}
    for pair in value:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise ConfigError(f"--policy-option {pair!r}: accepted is NAME=VALUE, for example kernel=5")
        options[key] = read_value(text)
    return options
