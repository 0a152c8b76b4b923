"""`crushkv inspect`: buckets against the plain reference, what the page is made of, and the page in a browser."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import reference
from architectures import small_model
from crushkv.cli.show import inspect
from crushkv.config import Anchor, CrushConfig
from crushkv.core import Tier, select
from crushkv.core.buckets import stands_for
from crushkv.errors import ConfigError
from crushkv.evaluation.inspection import Inspection, inspect_prompt, render
from crushkv.evaluation.recording import Recording
from crushkv.evaluation.token_text import tokenize
from crushkv.hf import CrushCache
from evaluation_models import byte_model, byte_tokenizer

WORDS = ["lighthouse", "keeper", "wrote", "weather", "morning", "wind", "sea", "red", "ship", "anchor", "the", "\n"]
HOSTILE = (
    "</script><script>document.title='hacked'</script>\n<img src=x onerror=\"document.title='hacked'\"> &lt; é 😀\n"
)
CONFIGS: dict[str, dict[str, Any]] = {
    "pages": {"budget": 0.3, "page_size": 8, "window": 8, "representative_share": 0.3},
    "tokens": {"budget": 0.3, "page_size": 1, "window": 8, "representative_share": 0.3, "anchor": "random"},
    "half": {"budget": 90, "page_size": 4, "window": 8, "representative_share": 0.5},
    "in bits": {"budget": 0.15, "page_size": 4, "representative_share": 0.4, "bits": 4, "representative_bits": 2},
    "random": {"budget": 0.4, "page_size": 2, "representative_share": 0.4, "grouping": "random", "seed": 7},
    "mass": {"policy": "h2o", "budget": 0.3, "page_size": 4, "representative_share": 0.4},
    "pyramid": {"policy": "pyramidkv", "budget": 0.3, "page_size": 4, "representative_share": 0.2},
    "none": {"budget": 0.3, "page_size": 8, "window": 8, "representative_share": 0},
}
for fields in CONFIGS.values():
    fields["min_tokens"] = 0


def prompt(tokens: int, seed: int = 0) -> str:
    """English words and line breaks; a token of the byte tokenizer is a character."""
    draw = random.Random(seed)
    text = " ".join(draw.choice(WORDS) for _ in range(tokens))
    return text[:tokens]


@pytest.fixture(scope="module")
def model() -> Any:
    return byte_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def inspected(model: Any, tokenizer: Any) -> Callable[[str], Inspection]:
    """The inspection of one prompt by the name of a configuration."""
    return lambda name: inspect_prompt(model, tokenize(tokenizer, prompt(300)), CrushConfig(**CONFIGS[name]))


# Buckets


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    config = CrushConfig(
        sink=draw(st.integers(0, 3)),
        window=draw(st.integers(1, 5)),
        page_size=draw(st.sampled_from([1, 1, 2, 4])),  # powers of two, as for the group: means of integers are exact
        representative_share=draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9])),
        anchor=draw(st.sampled_from(get_args(Anchor))),
        grouping=draw(st.sampled_from(["signature", "signature", "position", "random"])),
        aggregate=draw(st.sampled_from(["mean", "max"])),
    )
    rows, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    tokens = draw(st.integers(1, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = draw(st.sampled_from([2, 4, 50]))  # few values make many ties
    budget = torch.randint(min(config.sink + config.window, tokens), tokens + 1, (rows,), generator=generator)
    return {
        "head_score": torch.randint(0, values, (rows, kv_heads * group, tokens), generator=generator).float(),
        "kv_heads": kv_heads,
        "budget": budget,
        "config": config,
        "seed": draw(st.integers(0, 99)),
    }


def plain_buckets(
    head_score: torch.Tensor, kv_heads: int, budget: int, config: CrushConfig, seed: int
) -> list[list[set[int]]]:
    """The units of each bucket, for each KV head of a row (`head_score [H, S]`)."""
    heads, tokens = head_score.shape
    group, page = heads // kv_heads, config.page_size
    sink, _, units, keep = reference.zones(tokens, budget, config)
    if not units:
        return [[] for _ in range(kv_heads)]
    scores = head_score[:, sink : sink + units * page].double()
    grouped = scores.view(kv_heads, group, units, page)
    joined = grouped.mean(1) if config.aggregate == "mean" else grouped.amax(1)
    unit_scores = joined.mean(-1).tolist()
    count = reference.share_of(keep, config)
    if config.grouping == "signature" and count:
        order = reference.unit_order(scores.tolist(), [(keep - count) * page] * heads, units, config, seed)
    elif config.grouping == "random":
        order = torch.randperm(units, generator=torch.Generator().manual_seed(seed)).tolist()
    else:
        order = list(range(units))
    buckets = []
    for h in range(kv_heads):
        important = reference.best(unit_scores[h], keep - count)
        listed = [unit for unit in order if unit not in important]
        mine: list[set[int]] = [set() for _ in range(count)]
        if count:
            for rank, unit in enumerate(listed):
                mine[rank * count // len(listed)].add(unit)
        buckets.append(mine)
    return buckets


@settings(max_examples=300, deadline=None)
@given(cases())
def test_every_bucket_has_its_representative(case: dict[str, Any]) -> None:
    positions = stands_for(**case)
    selection = select(**case)
    config, tokens = case["config"], case["head_score"].shape[-1]
    for row, budget in enumerate(case["budget"].tolist()):
        buckets = plain_buckets(case["head_score"][row], case["kv_heads"], budget, config, case["seed"])
        for head, mine in enumerate(buckets):
            kept = dict(
                zip(selection.kept.indices[row, head].tolist(), selection.kept.tiers[row, head].tolist(), strict=True)
            )
            kept = {token: tier for token, tier in kept.items() if tier}
            expected = [-1] * tokens
            for units in mine:
                members = {config.sink + unit * config.page_size: unit for unit in units}
                [first] = [token for token in members if kept.get(token) == Tier.REPRESENTATIVE]
                for token in members:
                    expected[token : token + config.page_size] = [first] * config.page_size
            assert positions[row, head].tolist() == expected


# What is inspected


@pytest.mark.parametrize("name", CONFIGS)
def test_tiers_are_those_of_the_cache(name: str, model: Any, tokenizer: Any, inspected: Any) -> None:
    inspection = inspected(name)
    ids = tokenizer(prompt(300), return_tensors="pt").input_ids
    cache = Recording(model, ids).branch(CrushConfig(**CONFIGS[name]))
    assert isinstance(cache, CrushCache)
    assert inspection.layers == tuple(range(len(cache.layers)))
    assert inspection.tiers.shape == inspection.stands_for.shape == (3, 2, 300)
    for row, layer in enumerate(cache.crushed_layers):
        for head in range(2):
            kept = dict(zip(layer.positions[0, head].tolist(), layer.tiers[0, head].tolist(), strict=True))
            assert inspection.tiers[row, head].tolist() == [kept.get(token, 0) for token in range(300)]
    assert inspection.report == cache.report()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_evicted_has_a_representative_that_is_kept(name: str, inspected: Any) -> None:
    inspection = inspected(name)
    config, tiers, leader = inspection.config, inspection.tiers.long(), inspection.stands_for.long()
    page = config.page_size
    assert (inspection.evicted > 0) and (inspection.representatives > 0) == (name != "none")
    # Representatives, and nobody else, stand for something; for themselves first of all.
    has = leader >= 0
    assert bool((tiers.gather(-1, leader.clamp(min=0))[has] == Tier.REPRESENTATIVE).all())
    representative = tiers == Tier.REPRESENTATIVE
    position = torch.arange(tiers.shape[-1]).expand_as(tiers)
    start = config.sink + (position - config.sink) // page * page
    assert torch.equal(leader[representative], start[representative])
    assert not bool((has & (tiers != 0) & ~representative).any())
    if config.representative_share:
        units = (300 - config.sink - config.window) // page
        contested = (position >= config.sink) & (position < config.sink + units * page)
        some = representative.any(-1, keepdim=True)  # a layer of a small budget may have none
        assert torch.equal(has, representative | ((tiers == 0) & contested & some))


def test_buckets_are_of_equal_size(inspected: Any) -> None:
    for leaders in inspected("tokens").stands_for.flatten(0, 1):
        counts = leaders[leaders >= 0].unique(return_counts=True)[1]
        assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize("name", ["pages", "mass"])
def test_a_prompt_read_in_pieces_is_the_same(name: str, model: Any, tokenizer: Any, inspected: Any) -> None:
    pieces = inspect_prompt(
        model, tokenize(tokenizer, prompt(300)), CrushConfig(**CONFIGS[name]), prefill_chunk_size=64
    )
    assert torch.equal(pieces.tiers, inspected(name).tiers)
    assert torch.equal(pieces.stands_for, inspected(name).stands_for)


def test_sliding_layers_are_left_out(tokenizer: Any) -> None:
    text = prompt(200).replace(" ", "-").replace("\n", "+")  # characters within the small vocabulary
    inspection = inspect_prompt(small_model("gemma3"), tokenize(tokenizer, text), CrushConfig(**CONFIGS["pages"]))
    assert inspection.layers == (1, 3)
    assert "2 of the model's 4 layers have a sliding window" in " ".join(inspection.notes)


@pytest.mark.filterwarnings("ignore:crushkv. budget")
def test_notes_say_when_there_is_nothing_to_see(model: Any, tokenizer: Any, inspected: Any) -> None:
    assert inspected("pages").notes == inspected("none").notes == []
    assert (
        "no room for representatives"
        in inspect_prompt(
            model, tokenize(tokenizer, prompt(300)), CrushConfig(budget=0.3, representative_share=0.01, min_tokens=0)
        ).notes[0]
    )
    for text in ("a", prompt(30)):
        inspection = inspect_prompt(model, tokenize(tokenizer, text), CrushConfig())
        assert not inspection.evicted and bool((inspection.tiers == Tier.RECENT).all())
        assert bool((inspection.stands_for == -1).all())
        assert "Nothing was evicted" in render(inspection)


def test_an_empty_prompt_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="prompt"):
        inspect_prompt(model, tokenize(tokenizer, ""), CrushConfig())


# The text of tokens


def test_pieces_are_slices_of_the_prompt(tokenizer: Any) -> None:
    text = "é 😀\n\n漢x"
    found = tokenize(tokenizer, text)
    assert "".join(found.pieces) == text
    assert found.pieces == ("é", "", " ", "😀", "", "", "", "\n", "\n", "漢", "", "", "x")
    assert torch.equal(found.ids, tokenizer(text, return_tensors="pt").input_ids)


def test_pieces_through_the_chat_template(tokenizer: Any) -> None:
    class WithTemplate(type(tokenizer)):  # type: ignore[misc]
        pass

    chatty = WithTemplate(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    chatty.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    assert "".join(tokenize(chatty, "né", system="be").pieces) == "[system]be<eos>[user]né<eos>"
    assert "".join(tokenize(chatty, "né", chat=False).pieces) == "né"
    messages = [{"role": "user", "content": "né"}]
    expected = chatty.apply_chat_template(messages, return_dict=True, return_tensors="pt")["input_ids"]
    assert torch.equal(tokenize(chatty, "né", chat=True).ids, expected)


# The page


def embedded(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match
    return json.loads(match[1])


def test_the_page_loads_nothing(inspected: Any) -> None:
    page = render(inspected("pages"))
    assert not re.search(r"https?://|<link(?! rel=\"icon\" href=\"data:,\")|<script src|@import|url\(", page)
    assert "default-src 'none'" in page


def test_hostile_text_is_escaped(model: Any, tokenizer: Any) -> None:
    inspection = inspect_prompt(
        model,
        tokenize(tokenizer, HOSTILE * 4),
        CrushConfig(**CONFIGS["pages"]),
        conditions={"model": {"name": HOSTILE, HOSTILE: 1}, "versions": {"x": HOSTILE}},
    )
    page = render(inspection)
    assert "".join(embedded(page)["pieces"]) == HOSTILE * 4
    assert "<img" not in page and page.count("</script>") == 2 and page.count("<script") == 2
    assert html.escape("<img src=x") in page


# The page in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome in PATH")
Browse = Callable[..., str]


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """The document after a page's script has run, and a script of the test behind it; no errors are accepted."""

    def dump(page: str, state: str = "", script: str = "") -> str:
        file = tmp_path / "page.html"
        file.write_text(page.replace("</body>", f"<script>{script}</script></body>") if script else page)
        command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user"]
        command += ["--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", f"{file.as_uri()}{state}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert 'data-ready="true"' in done.stdout, done.stderr
        assert ":CONSOLE" not in done.stderr, done.stderr
        return done.stdout

    return dump


def shown(document: str) -> list[str]:
    """The class of each token."""
    return re.findall(r'<span id="t\d+"[^>]*?class="(\w+)"', document)


def data(document: str, name: str) -> str:
    match = re.search(rf'<body[^>]* data-{name}="([^"]*)"', document)
    assert match
    return match[1]


@in_browser
def test_the_state_of_the_address(inspected: Any, browse: Browse) -> None:
    inspection = inspected("pages")
    page = render(inspection)
    document = browse(page, "#layer=1&head=0")
    assert [data(document, name) for name in ("layer", "head", "token", "view")] == ["1", "0", "none", "tiers"]
    assert shown(document) == [f"t{tier}" for tier in inspection.tiers[1, 0].tolist()]
    for tier, name in enumerate(("evicted", "sink", "important", "representative", "recent")):
        assert f'data-tier="{name}">{int((inspection.tiers[1, 0] == tier).sum())}<' in document

    document = browse(page, "#layer=2")
    kept = (inspection.tiers[2] != 0).sum(0)
    assert data(document, "view") == "shade"
    assert shown(document) == [f"k{level}" for level in (kept * 10 / 2).ceil().int().tolist()]

    for nonsense in ("", "#layer=99&head=-1&token=x"):
        document = browse(page, nonsense)
        assert [data(document, name) for name in ("layer", "head", "token")] == ["all", "all", "none"]
        kept = (inspection.tiers != 0).sum((0, 1))
        assert shown(document) == [f"k{level}" for level in (kept * 10 / 6).ceil().int().tolist()]


@in_browser
@pytest.mark.parametrize("name", ["pages", "tokens"])
def test_tokens_show_their_bucket(name: str, inspected: Any, browse: Browse) -> None:
    inspection = inspected(name)
    tiers, leaders = inspection.tiers[1, 1], inspection.stands_for[1, 1]
    token = int(((tiers == 0) & (leaders >= 0)).nonzero()[7])
    representative = int(leaders[token])
    page = inspection.config.page_size
    for chosen in (token, representative):
        document = browse(render(inspection), f"#layer=1&head=1&token={chosen}")
        assert f'data-representative="{representative}"' in document
        assert f'data-kept="{int((inspection.tiers[:, :, chosen] != 0).sum())}"' in document
        marks = dict(re.findall(r'<span id="t(\d+)"[^>]*?data-mark="(\w+)"', document))
        expected = dict.fromkeys((leaders == representative).nonzero().flatten().tolist(), "mate")
        expected |= dict.fromkeys(range(representative, representative + page), "representative")
        assert {int(i): mark for i, mark in marks.items()} == expected


@in_browser
def test_pointer_and_keys_change_the_address(inspected: Any, browse: Browse) -> None:
    inspection = inspected("pages")
    representatives = (inspection.tiers[0, 0] == Tier.REPRESENTATIVE).nonzero().flatten().tolist()
    document = browse(
        render(inspection),
        script="""
        const press = (key, node = document.body) => {
          node.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
        };
        const text = document.getElementById("text"), results = [];
        const note = () => results.push(["layer", "head", "token"].map((name) => document.body.dataset[name]).join());
        press("]"); note();
        press("."); note();
        press("n"); note();
        press("ArrowRight", text); press("End", text); note();
        press("Escape"); note();
        document.getElementById("t9").click(); note();
        document.getElementById("layer").value = "2";
        document.getElementById("layer").dispatchEvent(new Event("change")); note();
        document.querySelector('.matrix [aria-label^="layer 1, KV head 1"]').click(); note();
        setTimeout(() => { document.body.dataset.results = results.join(" ") + " " + location.hash; }, 500);
        """,
    )
    assert html.unescape(data(document, "results")).split(" ") == [
        "0,all,none",
        "0,0,none",
        f"0,0,{representatives[0]}",
        "0,0,299",
        "0,0,none",
        "0,0,9",
        "2,0,9",
        "1,1,9",
        "#layer=1&head=1&token=9",
    ]


@in_browser
def test_hostile_text_stays_text(model: Any, tokenizer: Any, browse: Browse) -> None:
    config, conditions = CrushConfig(**CONFIGS["pages"]), {"model": {"name": HOSTILE}}
    inspection = inspect_prompt(model, tokenize(tokenizer, HOSTILE * 4), config, conditions=conditions)
    script = "document.body.dataset.text = document.getElementById('text').textContent;"
    document = browse(render(inspection), "#layer=0&head=0&token=40", script)
    assert html.unescape(data(document, "text")) == HOSTILE * 4
    assert "<img" not in document
    assert not re.search("<title>hacked", document)


@in_browser
def test_a_page_without_evictions(model: Any, tokenizer: Any, browse: Browse) -> None:
    document = browse(
        render(inspect_prompt(model, tokenize(tokenizer, "a"), CrushConfig(budget=1.0))), "#layer=0&head=1&token=0"
    )
    assert shown(document) == ["t4"]


# The command


@pytest.fixture(scope="module")
def command() -> Callable[..., Any]:
    app = typer.Typer()
    app.command()(inspect)
    return lambda *args, **more: CliRunner().invoke(app, [str(arg) for arg in args], **more)


@pytest.fixture(scope="module")
def folder(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_command_writes_a_page(command: Any, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("an older page")
    args = (
        "--model",
        folder,
        "--prompt",
        prompt(300),
        "--page-size",
        4,
        "--min-tokens",
        0,
        "--prefill-chunk-size",
        100,
        "-o",
        page,
    )
    done = command(*args)
    assert done.exit_code == 0, done.output
    assert "72 of 300 tokens are kept" in " ".join(done.output.split())
    assert "".join(embedded(page.read_text())["pieces"]) == prompt(300)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.filterwarnings("ignore:crushkv. budget")
def test_a_short_prompt_from_standard_input(command: Any, folder: Path, tmp_path: Path) -> None:
    done = command("--model", folder, "--file", "-", "-o", tmp_path / "page.html", input="é")
    assert done.exit_code == 0, done.output
    assert "nothing was evicted" in done.output
    assert embedded((tmp_path / "page.html").read_text())["pieces"] == ["é", ""]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--prompt", "a", "-o", "missing/page.html"), "--output 'missing/page.html': the folder does not exist"),
        (("--prompt", "a", "-o", "."), "--output '.': it exists and is not a file"),
        (("--prompt", "a", "--system", "b"), "--system"),
        (("--prompt", " "), "--prompt: the prompt is empty"),
    ],
)
def test_refusals(
    command: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command("--model", folder, *args)
    assert isinstance(done.exception, (ConfigError, click.ClickException)), done.output
    assert message in str(done.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.model
@in_browser
def test_the_embedded_model(command: Any, tmp_path: Path, browse: Browse) -> None:
    document = Path(__file__).parents[1] / "src" / "crushkv" / "demo" / "document.txt"
    file = tmp_path / "prompt.txt"
    file.write_text(document.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    page = tmp_path / "page.html"
    done = command("--file", file, "--representative-share", 0.3, "-o", page)
    assert done.exit_code == 0, done.output
    found = embedded(page.read_text(encoding="utf-8"))
    assert 700 < len(found["pieces"]) < 1500
    assert found["layers"] == list(range(30)) and found["heads"] == 3
    assert file.read_text(encoding="utf-8") in "".join(found["pieces"])
    assert page.stat().st_size < 500_000
    shown_tiers = set(shown(browse(page.read_text(encoding="utf-8"), "#layer=20&head=2&token=100")))
    assert shown_tiers == {"t0", "t1", "t2", "t3", "t4"}
