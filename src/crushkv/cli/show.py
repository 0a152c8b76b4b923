"""`crushkv plan`, `policies`, `inspect` and `profile`: what will be kept, and of what."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import CrushConfig
from ..errors import ConfigError
from ..files import write_text
from ..text import seconds, size
from .doctor import UNKNOWN, alike, key_lines, measured_keys
from .models import load, load_config, load_local
from .options import Json, ModelName, ModelOptions, PromptOptions, option, output_option, with_options
from .output import check_output, console, print_json, say

if TYPE_CHECKING:
    from rich.table import Table

    from ..importance import Policy
    from ..profile import Profile

NOT_LOADED = "`--load` or `crushkv doctor --model` measures it"
REQUIRED = "(required)"
BARS = "▁▂▃▄▅▆▇█"


@with_options()
def plan(
    tokens: Annotated[int, typer.Argument(help="Length of the prompt, in tokens.", metavar="TOKENS", min=1)],
    *,
    model: ModelName = None,
    measure: Annotated[bool, option("Load the model: how its keys turn, what its heads need.", None, "--load")] = False,
    as_json: Json = False,
    config: CrushConfig,
) -> None:
    """Show how a budget is split between the tiers, for a model and a prompt's length.

    Reads the model's configuration only, which does not say how its keys turn with the position, or what its heads
    need; `--load` finds that out. Bytes count 16 bits for a number that is not quantized.
    """
    from ..hf import plan_cache

    name, model_config = load_config(model)
    profile = None if config.heads == "equal" else _profile(model, config, measure)
    found = plan_cache(model_config, config, tokens, profile=profile)
    keys, unknown = measured_keys(model, tokens) if measure else ([], NOT_LOADED)
    layers = [
        {"layer": index, **dataclasses.asdict(split), **turned}
        for index, (split, turned) in enumerate(zip(found.layers, keys or [UNKNOWN] * len(found.layers), strict=True))
    ]
    if as_json:
        result = {
            "model": name,
            "tokens": tokens,
            "config": config.to_dict(),
            "untouched": found.untouched,
            "kv_bytes": found.nbytes,
            "full_kv_bytes": found.full_bytes,
            "bytes_fraction": found.fraction,
            "other_layers": found.other_layers,
            "rope_layers": sum(layer["rope"] is True for layer in layers) if keys else None,
            "keys_unknown": unknown,
            "heads": found.heads,
            "layers": layers,
        }
        print_json({"command": "plan", **result})
        return
    lines = [
        f"{name}, {tokens} tokens: {size(found.nbytes)} of {size(found.full_bytes)} ({found.fraction:.1%}, "
        f"{1 / found.fraction:.1f} times smaller)"
    ]
    if found.untouched:
        lines.append(f"A fraction leaves prompts of fewer than {config.min_tokens} tokens (min_tokens) as they are.")
    if not config.formats.raw:
        lines += key_lines(layers, unknown)
    if found.heads is not None:
        lines += _head_lines(found.heads, tokens)
    elif config.heads != "equal":
        lines.append("heads: shown as equal; which need more is known once the model is loaded (`--load`)")
    if found.other_layers:
        lines.append(f"{found.other_layers} layers (sliding or recurrent ones) are left alone and not counted.")
    console().print(_plan_table(layers, config, found.heads is not None), *lines, sep="\n", markup=False)


def _profile(model: str | None, config: CrushConfig, loads: bool) -> Profile | None:
    """The model's profile, as far as it is known without making one; `loads`: the weights may be read for it."""
    from ..hf.profiling import embedded_profile, find_profile
    from ..profile import Profile

    if config.profile is not None:
        return Profile.load(Path(config.profile))
    if loads:
        return find_profile(load_local(model))
    return embedded_profile() if model is None else None


def _head_lines(heads: tuple[tuple[int, ...], ...], tokens: int) -> Iterator[str]:
    """A picture of what each head keeps."""
    kept = [count for layer in heads for count in layer]
    yield f"heads: {min(kept)} to {max(kept)} tokens. A line is a KV head, a column a layer, a full block all tokens:"
    for head in zip(*heads, strict=True):
        yield "  " + "".join(BARS[min(len(BARS) - 1, count * len(BARS) // tokens)] for count in head)


def _plan_table(layers: list[dict[str, Any]], config: CrushConfig, by_head: bool) -> Table:
    """One line for layers that do the same; where heads have budgets of their own, one for all layers."""
    from rich.table import Table

    from ..timing.figures import TIERS

    table = Table("layers", *TIERS, "bytes a layer")
    if by_head:
        columns = [[layer[name] for layer in layers] for name in (*TIERS, "nbytes")]
        shown = [[str(min(x)), str(max(x))] for x in columns[:-1]] + [[size(min(columns[-1])), size(max(columns[-1]))]]
        table.add_row(f"0-{len(layers) - 1}", *(" to ".join(dict.fromkeys(ends)) for ends in shown))
    else:
        for span, layer in alike(layers, lambda layer: [layer[name] for name in (*TIERS, "nbytes")]):
            table.add_row(span, *(str(layer[tier]) for tier in TIERS), size(layer["nbytes"]))
    bits = config.to_dict()
    table.add_section()
    important, recent = str(bits["bits"]), str(bits["recent_bits"])
    table.add_row("bits a number", recent, important, str(bits["representative_bits"] or important), recent, "")
    return table


@with_options()
def policies(*, as_json: Json = False) -> None:
    """List the importance policies and their options."""
    from rich.table import Table
    from rich.text import Text

    from ..importance import failed_policies
    from ..importance import policies as known_policies

    found = [_describe(policy) for policy in known_policies().values()]
    if as_json:
        print_json({"command": "policies", "policies": found, "failed": failed_policies()})
        return
    table = Table("policy", "options", "queries", "paper")
    for policy in found:
        options = "\n".join(f"{name}={value}" for name, value in policy["options"].items())
        table.add_row(policy["name"], options, policy["queries"], policy["paper"])
    failed = [Text(f"{name}: the entry point {reason}", style="red") for name, reason in failed_policies().items()]
    console().print(table, *failed, sep="\n")


def _describe(policy: type[Policy]) -> dict[str, Any]:
    """Name, paper, options with their defaults, and which queries the scores come from."""
    import inspect

    options = {}
    for field in dataclasses.fields(policy):
        default = field.default
        if default is dataclasses.MISSING:
            default = REQUIRED if field.default_factory is dataclasses.MISSING else field.default_factory()
        options[field.name] = default
    return {
        "name": policy.name,
        "paper": policy.paper,
        "summary": (inspect.getdoc(policy) or "").split("\n\n")[0],
        "options": options,
        "queries": None if REQUIRED in options.values() else _queries(policy()),
        "layer_budget": policy.layer_budget,
    }


def _queries(policy: Policy) -> str:
    if policy.streams:
        return "all"
    small, large = policy.queries(1), policy.queries(2)
    return "window" if small < large else f"last {small}" if small else "none"


@with_options()
def inspect(
    *,
    prompt: PromptOptions,
    config: CrushConfig,
    output: Annotated[Path, output_option("The page; a file of that name is replaced.")] = Path("inspect.html"),
    model: ModelOptions,
) -> None:
    """Show which tokens of a prompt each layer and KV head keeps, as one HTML page.

    The prompt is --prompt, --file, both (the file first), or standard input.
    """
    from ..evaluation.inspection import inspect_prompt, render
    from ..evaluation.token_text import tokenize

    check_output(output)
    text = prompt.read()
    loaded = load(model)
    tokens = tokenize(loaded.tokenizer, text, prompt.chat, prompt.system)
    loaded.check_room(tokens.ids.shape[-1])
    say(f"Reading {tokens.ids.shape[-1]} tokens")
    inspection = inspect_prompt(loaded.model, tokens, config, model.prefill_chunk_size, loaded.conditions())
    target = output.expanduser().resolve()
    write_text(target, render(inspection))
    report = inspection.report
    kept = f"{report.tokens_held:.0f} of {report.tokens_seen} tokens are kept per layer and KV head"
    if not inspection.evicted:
        kept = f"all {report.tokens_seen} tokens are kept, nothing was evicted"
    say(f"{output} ({size(target.stat().st_size)}): {kept}")


@with_options()
def profile(
    name: Annotated[str | None, typer.Argument(help="Hugging Face id or folder, as --model.", metavar="MODEL")] = None,
    *,
    output: Annotated[
        Path | None, output_option("The profile.  [default: in the user's cache folder, where it is found]")
    ] = None,
    model: ModelOptions,
) -> None:
    """Measure how much each channel of a model's keys matters, and keep that as a small file.

    crushkv looks for profiles in the user's cache folder, and beside the model's files as crushkv-profile.safetensors.
    """
    from ..hf import profile_model
    from ..hf.profiling import keep_profile

    if name is not None and model.model is not None:
        raise ConfigError(f"--model {model.model!r}: the model is given already, as {name!r}")
    check_output(output)
    loaded = load(dataclasses.replace(model, model=name or model.model))
    begin = time.perf_counter()
    made = profile_model(loaded.model, loaded.tokenizer, say)
    say(f"Measured in {seconds(time.perf_counter() - begin)}")
    if output is None:
        keep_profile(loaded.model, made, say)
        return
    made.save(output)
    layers, heads, channels = made.keys.shape
    say(f"{output} ({size(output.stat().st_size)}): {layers} layers, {heads} KV heads, {channels} channels")
