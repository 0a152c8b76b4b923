"""Compares scores of tokens at equal bytes, on any model: published ones, those of `readahead`, and what lies between.

    python benchmarks/research/scores.py run LIST... -o scores.jsonl --data-dir DIR [--model FOLDER --chat]
    python benchmarks/research/scores.py show scores.jsonl... [--base readahead]

LIST is a file with a configuration a line, as `crushkv fidelity --config` takes it; `{a,b}` stands for both. Its policy
may be `trial`, which is defined here. A line without a budget is measured at each of three, in pages of 16 and 16 bits.
The results are those of `crushkv sweep`, and `crushkv report` reads them where it knows the policies.

Prompts are taken from the end of a task's records, so that they are not those that a sweep takes.
"""

from __future__ import annotations

import argparse
import gc
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from crushkv import CrushConfig
from crushkv.cli.models import load
from crushkv.cli.options import ModelOptions
from crushkv.config_text import expand, parse_config
from crushkv.core import Evictor
from crushkv.evaluation import Sample, TaskSource, by_model, read_report_samples
from crushkv.evaluation.fidelity import Reference
from crushkv.evaluation.recording import Recording
from crushkv.evaluation.results import ResultsFile, prompt_hash, sample_key
from crushkv.evaluation.runner import _chat, _encode
from crushkv.evaluation.stacking import stack
from crushkv.evaluation.statistics import Estimate, Read, macro_mean
from crushkv.evaluation.tasks import Prompt, load_tasks, prompts
from crushkv.hf import CrushCache
from crushkv.importance import LayerView, ReadAhead, register
from crushkv.machine import versions

TASKS = (
    "trec_short_1k",
    "samsum_short_1k",
    "multi_news",
    "lcc",
    "retrieval_multikey_1k",
    "qasper",
)
BUDGETS = (0.125, 0.25, 0.0625)  # the middle one first, for runs that are cut off
PAGE = CrushConfig().page_size
SINK, WINDOW = CrushConfig().sink, CrushConfig().window


class Projections:
    """|W_o v| of the tokens of the prompt that is being measured, which no policy of the library sees.

    `norms[seed]` is `[Hq, S]` for the layer whose evictions have that seed: the sum of the magnitudes of what a token's
    value adds to the layer's output through each query head, at full attention (CriticalKV, arXiv 2502.03805).
    """

    norms: ClassVar[dict[int, Tensor]] = {}

    @classmethod
    def of(cls, model: Any, recording: Recording) -> None:
        cls.norms.clear()
        seed = Evictor(CrushConfig()).seed
        layers: Any = recording._source.layers
        for index, (block, layer) in enumerate(zip(model.model.layers, layers, strict=True)):
            values = layer.values[0]  # [Hkv, S, D]
            weight = block.self_attn.o_proj.weight.detach()  # [hidden, Hq D]
            heads = weight.shape[1] // values.shape[-1]
            by_head = weight.t().view(heads, values.shape[-1], -1)  # [Hq, D, hidden]
            group = heads // values.shape[0]
            norm = torch.stack([(values[head // group] @ by_head[head]).abs().sum(-1) for head in range(heads)])
            cls.norms[seed(index, recording.tokens)] = norm


@register
@dataclass(frozen=True)
class Trial(ReadAhead):
    """`readahead` with what others have published on scores, each as an option. For one prompt at a time.

    Attributes:
        over: what is taken over the window's queries: their mean, the mean of their squares (its root), their greatest
            (DefensiveKV, arXiv 2510.13334), or the mean of mean and greatest. With `half_life`, later ones count more.
        reads: how many of the last queries are read; 0: as many as the window has.
        heads: mean or max over the query heads that share a KV head.
        floor: no token's attention counts less than the mean of its head's (DefensiveKV's prior).
        weight: what attention is multiplied by: nothing, the norm of the value, |W_o v| (CriticalKV), or how far the
            value is from the head's output.
        late: attention is multiplied only after it has been smoothed, as CriticalKV does it.
        kept: the budget, which the next two need.
        first: with `late`, of the kept pages the share that is chosen by attention alone (CriticalKV's first stage).
        large: of the kept pages, the share that is kept for its largest value, by range (VaSE, arXiv 2606.03928).
    """

    name = "trial"
    paper = "benchmarks/research/scores.py"

    over: Literal["mean", "rms", "max", "mixed"] = "mean"
    reads: int = 0
    heads: Literal["mean", "max"] = "mean"
    floor: bool = False
    weight: Literal["none", "norm", "projected", "offset"] = "norm"
    late: bool = False
    kept: float = 0.0
    first: float = 0.0
    large: float = 0.0

    def queries(self, window: int) -> int:
        return self.reads or window

    def score(self, view: LayerView) -> Tensor:
        attention = self._attention(view)  # [Hq, T, S]
        mass = self._over_queries(attention)
        weight = self._weight(view, mass)
        if not self.late:
            mass = mass * weight
        past = mass.shape[-1] - attention.shape[1]
        mass[..., :past] = self._smooth(mass[..., :past])
        kv_heads = view.keys.shape[1]
        plain = self._over_heads(mass, kv_heads)
        if self.floor:
            plain = plain.maximum(plain[..., :past].mean(-1, keepdim=True))
        score = plain
        if self.late:
            score = plain * weight.unflatten(0, (kv_heads, -1)).mean(1)
        return self._pages(score, plain, view)[None]

    def _attention(self, view: LayerView) -> Tensor:
        """Causal attention of the queries."""
        assert view.queries is not None and view.real is None
        queries, keys = view.queries[0], view.keys[0]
        count, tokens = queries.shape[1], keys.shape[1]
        logits = queries @ keys.repeat_interleave(len(queries) // len(keys), 0).transpose(-1, -2) * view.scaling
        future = torch.ones((count, count), dtype=torch.bool).triu(1)
        logits[..., tokens - count :].masked_fill_(future, -torch.inf)
        return logits.softmax(-1)

    def _over_queries(self, attention: Tensor) -> Tensor:
        age = torch.arange(attention.shape[1] - 1, -1, -1)
        weight = 0.5 ** (age / self.half_life) if self.half_life else torch.ones(len(age))
        share = (weight / weight.sum())[:, None]
        mean = (attention * share).sum(1)
        if self.over == "mean":
            return mean
        if self.over == "rms":
            return (attention.square() * share).sum(1).sqrt()
        greatest = (attention * weight[:, None]).amax(1)
        return greatest if self.over == "max" else (mean + greatest) / 2

    def _weight(self, view: LayerView, mass: Tensor) -> Tensor:
        values = view.values[0]
        group = len(mass) // len(values)
        if self.weight == "none":
            return torch.ones_like(mass)
        if self.weight == "projected":
            return Projections.norms[view.seed]
        if self.weight == "offset":
            share = mass / mass.sum(-1, keepdim=True)
            output = share[:, None] @ values.repeat_interleave(group, 0)  # [Hq, 1, D]
            return (values.repeat_interleave(group, 0) - output).norm(dim=-1)
        return values.norm(dim=-1).repeat_interleave(group, 0)

    def _smooth(self, mass: Tensor) -> Tensor:
        pool = F.max_pool1d if self.pooling == "max" else F.avg_pool1d
        beside = self.kernel // 2
        return pool(F.pad(mass, (beside + self.ahead, beside)), self.kernel + self.ahead, stride=1)

    def _over_heads(self, mass: Tensor, kv_heads: int) -> Tensor:
        grouped = mass.unflatten(0, (kv_heads, -1))
        return grouped.mean(1) if self.heads == "mean" else grouped.amax(1)

    def _pages(self, score: Tensor, plain: Tensor, view: LayerView) -> Tensor:
        """What is decided page by page: a first stage, and pages kept for their values."""
        if not (self.first or self.large):
            return score
        tokens = score.shape[-1]
        pages = (tokens - SINK - WINDOW) // PAGE
        middle = slice(SINK, SINK + pages * PAGE)
        paged = score[:, middle].unflatten(-1, (pages, PAGE)).mean(-1)
        kept = int((self.kept * tokens - SINK - WINDOW) / PAGE)
        highest = 2 * float(paged.amax())
        if count := int(self.first * kept):
            by_attention = plain[:, middle].unflatten(-1, (pages, PAGE)).mean(-1)
            paged = paged.scatter(-1, by_attention.topk(count).indices, highest)
        if count := int(self.large * kept):
            values = view.values[0][:, middle]
            by_value = (values.amax(-1) - values.amin(-1)).unflatten(-1, (pages, PAGE)).amax(-1)
            paged = paged.scatter(-1, by_value.topk(count).indices, highest)
        score = score.clone()
        score[:, middle] = paged.repeat_interleave(PAGE, -1)
        return score


def read_lists(paths: list[Path]) -> dict[str, CrushConfig]:
    """Configurations by name, at each budget."""
    lines = (line.partition("#")[0].strip() for path in paths for line in path.read_text().splitlines())
    found = {}
    texts = [text for line in lines if line for text in expand(line)]
    for budget in BUDGETS:
        for policy, _, rest in (text.partition(":") for text in texts):
            if "budget=" in rest and f"budget={budget}" not in rest.split(","):
                continue
            fields = [field for field in rest.split(",") if field and not field.startswith("budget=")]
            name = f"{policy}:" + ",".join([f"budget={budget}", *fields])
            config = parse_config(name)
            assert config is not None
            if policy == Trial.name:
                config = config.replace(policy_options={**config.policy_options, "kept": budget})
            found[name] = config.replace(interval=0)
    return found


def chosen(
    task: Any, name: str, tokenizer: Any, chat: Any, limits: tuple[int, int], count: int, first: bool = False
) -> Iterator[tuple[Prompt, Tensor]]:
    """The last prompts of a fitting length, the last first; or the first ones, the first first."""
    given = prompts(task, name, chat, True)
    taken = 0
    for prompt in given if first else reversed(list(given)):
        if taken == count:
            return
        ids = _encode(tokenizer, prompt.text, chat is not None)
        if limits[0] <= ids.shape[1] <= limits[1]:
            taken += 1
            yield prompt, ids


@torch.no_grad()
def distances(model: Any, reference: Reference, caches: list[CrushCache]) -> list[tuple[float, float]]:
    """KL along the full cache's answer and agreement, as `Reference.compare` has them, of all caches in one pass."""
    together = stack(model, caches)
    together.prefill_end = together.get_seq_length() + len(reference.answer)
    logits = model(input_ids=reference.answer[:-1].expand(len(caches), -1), past_key_values=together).logits.float()
    target = reference._logits.log_softmax(-1)
    found = []
    for given in logits:
        kl = (target.exp() * (target - given.log_softmax(-1))).sum(-1).mean().clamp(min=0)
        found.append((float(kl), float((target.argmax(-1) == given.argmax(-1)).float().mean())))
    return found


def run(arguments: Any) -> None:
    torch.set_num_threads(arguments.threads)
    configs = read_lists(arguments.lists)
    loaded = load(ModelOptions(model=arguments.model, dtype="float32", device="cpu"))
    model, tokenizer = loaded.model, loaded.tokenizer
    chat = _chat(tokenizer) if arguments.chat else None
    settings = {"chat": arguments.chat, "measures": ["fidelity"], "answer_tokens": arguments.answer, "seed": 7}
    tasks = load_tasks(TASKS, TaskSource(arguments.data_dir, arguments.haystack, seed=7), tokenizer)
    streams = [
        chosen(task, name, tokenizer, chat, tuple(arguments.tokens), arguments.per_task) for name, task in tasks.items()
    ]
    environment = versions("lm_eval")
    with ResultsFile(arguments.output, loaded.describe(), environment) as results:
        for prompt, ids in (found for turn in zip_longest(*streams) for found in turn if found is not None):
            hashed = prompt_hash(prompt.text)
            missing = [
                name
                for name, config in configs.items()
                if sample_key(prompt.task, prompt.id, hashed, config, settings) not in results
            ]
            if not missing:
                continue
            recording = Recording(model, ids)
            reference = Reference(model, recording, None, arguments.answer)
            Projections.of(model, recording)
            for start in range(0, len(missing), arguments.batch):
                names = missing[start : start + arguments.batch]
                branches = [recording.branch(configs[name]) for name in names]
                caches = [cache for cache in branches if isinstance(cache, CrushCache)]
                for name, cache, (kl, agreement) in zip(
                    names, caches, distances(model, reference, caches), strict=True
                ):
                    results.add(
                        Sample(
                            task=prompt.task,
                            id=prompt.id,
                            prompt_hash=hashed,
                            prompt_tokens=recording.tokens,
                            name=name,
                            config=configs[name].to_dict(),
                            settings=settings,
                            bytes_held=cache.nbytes_at_16_bits,
                            bytes_full=recording.nbytes_at_16_bits,
                            model=loaded.describe(),
                            versions=environment,
                            kl=kl,
                            agreement=agreement,
                            answer_tokens=len(reference.answer) - 1,
                        )
                    )
                del caches, branches
            print(prompt.task, prompt.id, ids.shape[1], flush=True)
            del recording, reference
            gc.collect()


def show(arguments: Any) -> None:
    """For each budget a table of all models, with differences to the base on the prompts that both have.

    All prompts count alike, whatever their task: there are too few of a task to draw them within it.
    """
    models = by_model(read_report_samples(arguments.results))
    for budget in sorted(BUDGETS, reverse=True):
        groups = {model: _scores(samples, budget) for model, samples in models.items()}
        names = dict.fromkeys(name for own in groups.values() for name in own)
        print(f"\n### {budget:.2%} of the tokens\n")
        head = [cell for model in models for cell in ("n", model, f"minus {arguments.base}", "better on")]
        print("| " + " | ".join(["scores", *head]) + " |")
        print("|---|" + "---:|" * len(head))
        for name in names:
            found = [(own.get(name, []), own[arguments.base]) for own in groups.values()]
            if max(len(group) for group, _ in found) >= arguments.least:
                print("| " + " | ".join([name, *(cell for pair in found for cell in _cells(*pair))]) + " |")


def _scores(samples: list[Sample], budget: float) -> dict[str, list[Sample]]:
    """The samples of one budget, by their configuration's name without it."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if f"budget={budget}" in re.split("[:,]", sample.name):
            found[re.sub(rf"budget={budget},?", "", sample.name).removesuffix(":")].append(sample)
    return found


def _cells(group: list[Sample], base: list[Sample]) -> list[str]:
    """Prompts; mean, median, 95th percentile and worst; the difference of means, and on how many it is below 0."""
    if not group:
        return [""] * 4
    kl = _over_prompts(group, _kl)
    figures = f"{kl.mean:.3f}; {kl.median:.3f}, {kl.percentile_95:.3f}, {kl.highest:.3f}"
    other = {(sample.task, sample.id): sample.kl for sample in base}

    def difference(sample: Sample) -> float | None:
        before = other.get((sample.task, sample.id))
        return None if before is None or sample.kl is None else sample.kl - before

    if group is base:
        return [str(kl.prompts), figures, "", ""]
    change = _over_prompts(group, difference)
    mark = "**" if change.excludes_zero else ""
    better = sum((difference(sample) or 0) < 0 for sample in group)
    cell = f"{mark}{change.mean:+.3f} ({change.low:+.3f} to {change.high:+.3f}){mark}"
    return [str(kl.prompts), figures, cell, f"{better} of {change.prompts}"]


def _over_prompts(samples: list[Sample], read: Read) -> Estimate:
    """All prompts as if they were of one task."""
    return macro_mean({"all": [value for sample in samples if (value := read(sample)) is not None]})


def _kl(sample: Sample) -> float | None:
    return sample.kl


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.add_argument("lists", type=Path, nargs="+")
    running.add_argument("-o", "--output", type=Path, required=True)
    running.add_argument("--model", help="folder; the embedded model otherwise")
    running.add_argument("--chat", action="store_true", help="put prompts into the chat template")
    running.add_argument("--data-dir", type=Path, required=True, help="LongBench's records as JSON lines")
    running.add_argument("--haystack", type=Path)
    running.add_argument("--per-task", type=int, default=4)
    running.add_argument("--tokens", type=int, nargs=2, default=(700, 1700), metavar=("LEAST", "MOST"))
    running.add_argument("--answer", type=int, default=24, help="tokens of the full cache's answer")
    running.add_argument("--batch", type=int, default=8, help="configurations in one forward pass")
    running.add_argument("--threads", type=int, default=1)
    running.set_defaults(do=run)
    showing = commands.add_parser("show")
    showing.add_argument("results", type=Path, nargs="+")
    showing.add_argument("--base", default=ReadAhead.name, help="scores that the others are compared with")
    showing.add_argument("--least", type=int, default=1, help="leave out what fewer prompts were measured with")
    showing.set_defaults(do=show)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
