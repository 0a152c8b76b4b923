"""Means, intervals and paired differences against plain computations."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crushkv import CrushConfig
from crushkv.config_text import parse_config
from crushkv.evaluation.plots import as_svg, figures, save
from crushkv.evaluation.report import render
from crushkv.evaluation.results import Sample
from crushkv.evaluation.statistics import Estimate, importance_only, macro_mean, paired, worst_prompt
from crushkv.evaluation.tables import method_of, rows

HOSTILE = '</td><script>document.title="hacked"</script><img src=x onerror=alert(1)> $x$'


def sample(name: str, task: str, number: int, kl: float, score: float | None = None) -> Sample:
    config = parse_config(name)
    return Sample(
        task=task,
        id=str(number),
        prompt_hash=f"{task}{number}",
        prompt_tokens=1000 + number,
        name=name,
        config=None if config is None else config.to_dict(),
        settings={"seed": 0, "measures": ["fidelity"]},
        bytes_held=250 if config else 1000,
        bytes_full=1000,
        model={"name": "m", "dtype": "float32", "device": "cpu"},
        versions={"crushkv": "0"},
        kl=kl,
        agreement=1 - kl,
        gold_nll=1 + kl,
        answer_tokens=31,
        score=score,
        metric=None if score is None else "score",
    )


def _plain_interval(by_task: dict[str, list[float]], resamples: int = 4000) -> tuple[float, float]:
    """One resample at a time."""
    draw = np.random.default_rng(7)
    means = []
    for _ in range(resamples):
        tasks = [np.mean(draw.choice(values, len(values))) for values in by_task.values()]
        means.append(np.mean(tasks))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def test_the_interval_equals_a_plain_bootstrap() -> None:
    draw = np.random.default_rng(0)
    by_task = {"a": list(draw.normal(1, 1, 30)), "b": list(draw.normal(3, 0.2, 12)), "c": [5.0]}
    found = macro_mean(by_task)
    assert found.mean == pytest.approx((np.mean(by_task["a"]) + np.mean(by_task["b"]) + 5) / 3)
    low, high = _plain_interval(by_task)
    assert found.low == pytest.approx(low, abs=0.02) and found.high == pytest.approx(high, abs=0.02)
    assert found.prompts == 43 and found.excludes_zero
    assert macro_mean(by_task) == found  # seeded


def test_a_lost_prompt_shows_beside_the_mean() -> None:
    """Median, 95th percentile and worst are of all prompts; the mean is of the tasks."""
    by_task = {"a": [0.0] * 19 + [3.0], "b": [0.1]}
    found = macro_mean(by_task)
    assert found.mean == pytest.approx((3 / 20 + 0.1) / 2)
    every = sorted(value for values in by_task.values() for value in values)
    assert (found.median, found.highest) == (0.0, 3.0)
    # The 95th percentile of 21 values is the last but one.
    assert found.percentile_95 == pytest.approx(every[19]) == pytest.approx(0.1)
    assert macro_mean({"a": [2.0]}) == Estimate(2, 2, 2, 2, 2, 2, 1)


def test_the_worst_prompt_has_a_name() -> None:
    measured = [sample("snapkv", "a", i, kl) for i, kl in enumerate((0.1, 0.9, 0.3))]
    worst = worst_prompt([*measured, replace(measured[0], id="not measured", kl=None)])
    assert worst is measured[1]
    assert worst_prompt([replace(measured[0], kl=None)]) is None


def test_the_interval_covers_what_it_says() -> None:
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        found = macro_mean({"a": list(draw.normal(0, 1, 40)), "b": list(draw.normal(0, 2, 40))})
        hits += found.low <= 0 <= found.high
    assert 86 <= hits <= 100


def test_few_prompts_prove_nothing() -> None:
    one = macro_mean({"a": [2.0], "b": [4.0]})
    assert (one.mean, one.low, one.high) == (3, 3, 3) and not one.excludes_zero
    with pytest.raises(ValueError, match="no values"):
        macro_mean({"a": []})


def test_differences_are_paired_by_prompt() -> None:
    ours = [sample("snapkv", "a", i, 0.1 * i) for i in range(5)] + [sample("snapkv", "b", 9, 1.0)]
    base = [sample("snapkv:representative_share=0", "a", i, 0.1 * i + 0.02) for i in (4, 2, 0)]
    found = paired(ours, base, lambda s: s.kl)
    assert found is not None and list(found.values) == ["a"]
    assert found.values["a"] == pytest.approx([-0.02] * 3)
    assert found.estimate.mean == pytest.approx(-0.02) and found.estimate.prompts == 3
    assert paired(ours, [sample("h2o", "c", 1, 0.0)], lambda s: s.kl) is None
    # The same number of a changed prompt is another prompt.
    moved = [replace(s, prompt_hash="other") for s in base]
    assert paired(ours, moved, lambda s: s.kl) is None


def test_importance_alone_is_the_same_without_representatives() -> None:
    config = CrushConfig(
        policy="h2o", budget=0.5, page_size=8, representative_share=0.25, anchor="zeros", grouping="random"
    )
    plain = importance_only(config.to_dict())
    assert CrushConfig.from_dict(plain) == CrushConfig(policy="h2o", budget=0.5, page_size=8, representative_share=0)


def results(seed: int = 3) -> list[Sample]:
    draw = np.random.default_rng(seed)
    names = ["full"] + [
        f"{policy}:budget={budget},page_size=1,representative_share={share}"
        for policy in ("h2o", "snapkv", "random")
        for budget in (0.5, 0.25)
        for share in (0, 0.1)
    ]
    return [
        sample(name, task, i, 0.0 if name == "full" else float(draw.random()) / 2, float(draw.random()))
        for name in names
        for task in ("one", "two")
        for i in range(6)
    ]


def test_rows_compare_with_the_right_configurations() -> None:
    samples = results()
    table = {row.name: row for row in rows(samples)}
    full = table["full"]
    assert full.score_to_full is None and full.kl_to_base is None and full.bytes_fraction == 1
    plain = table["h2o:budget=0.5,page_size=1,representative_share=0"]
    crushed = table["h2o:budget=0.5,page_size=1,representative_share=0.1"]
    assert plain.base is None and crushed.base == plain.name
    assert crushed.kl is not None and plain.kl is not None and crushed.kl_to_base is not None
    assert crushed.kl_to_base.estimate.mean == pytest.approx(crushed.kl.mean - plain.kl.mean)
    assert crushed.score is not None and full.score is not None and crushed.score_to_full is not None
    assert crushed.score_to_full.estimate.mean == pytest.approx(crushed.score.mean - full.score.mean)
    assert method_of("snapkv:budget=0.5", {}) == "snapkv" and method_of("full", None) == "full"
    assert method_of("h2o:page_size=1,budget=0.5,sink=2", {}) == "h2o:page_size=1,sink=2"
    assert method_of("budget=0.5,sink=2", {}) == f"{CrushConfig().policy}:sink=2"


def two_models() -> list[Sample]:
    """The same prompts and configurations, measured on two models."""
    other = [replace(s, model={**s.model, "name": "other/model"}) for s in results(seed=4)]
    return [s for pair in zip(results(), other, strict=True) for s in pair]


def test_rows_of_two_models_are_not_mixed() -> None:
    table = rows(two_models())
    assert table == rows(results()) + [
        replace(
            row,
            model="other/model",
            worst=row.worst and replace(row.worst, model={**row.worst.model, "name": "other/model"}),
        )
        for row in rows(results(seed=4))
    ]
    for row in table:
        assert row.prompts == 12 and row.kl is not None and row.worst is not None
        assert row.worst.kl == row.kl.highest and row.worst.model["name"] == row.model


def test_plots_are_drawn_and_stay_the_same(tmp_path: Path) -> None:
    drawn = figures(rows(results()))
    assert set(drawn) == {"kl-by-bytes", "score-by-bytes"}
    save(drawn, tmp_path / "plots")
    for name in drawn:
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "plots" / f"{name}.svg").read_text(encoding="utf-8")
    first, again = (as_svg(figures(rows(results()))["kl-by-bytes"]) for _ in range(2))
    assert first == again, "a report in version control should change only with its figures"
    # Two models have a panel each.
    assert [axis.get_title() for axis in figures(rows(two_models()))["kl-by-bytes"].axes] == ["m", "other/model"]
    # One configuration alone, without scores, is drawn too.
    few = [sample("snapkv:budget=0.25", "one", i, 0.1 + i / 10) for i in range(2)]
    assert list(figures(rows(few))) == ["kl-by-bytes"]


def test_a_plot_has_a_curve_for_each_method_and_the_presets() -> None:
    budgets = (0.5, 0.25)
    names = [f"snapkv:budget={budget},sink={sink}" for sink in range(12) for budget in budgets]
    samples = [sample(name, "one", 1, 0.1 + number / 100) for number, name in enumerate([*names, "h2o:budget=0.5"])]
    presets = [replace(sample(name, "one", 1, 0.01), bytes_held=held) for name, held in (("small", 120), ("tiny", 60))]
    (figure,) = figures(rows([*samples, *presets])).values()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == "presets" and labels[-1] == "5 others, which the table names"
    # Of equal curves of one policy the better ones have a colour; single points come last.
    assert labels[1:-1] == [f"snapkv:sink={sink}" for sink in range(8)]
    assert [text.get_text() for text in figure.axes[0].texts] == ["tiny", "small"]


def browser() -> str:
    found = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if found is None:
        pytest.skip("no Chromium here")
    return found


def opened(page: Path, fragment: str = "", *options: str) -> str:
    """The page's DOM after its script, in a real browser without a network."""
    command = [browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    return subprocess.run(
        [*command, *(options or ("--dump-dom",)), f"{page.as_uri()}{fragment}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render(results()), encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text
    dom = opened(page, "#sort=3&filter=h2o")
    assert 'data-ready="yes"' in dom and dom.count("<img id=") == 2
    body = dom.split('id="configurations"')[1].split("<tbody>")[1].split("</tbody>")[0]
    lines = [line for line in body.split("<tr") if "<td>" in line]
    shown = [line for line in lines if "hidden" not in line.split(">")[0]]
    assert len(lines) == 13 and len(shown) == 4 and all("h2o" in line for line in shown)
    kl = [float(line.split("<td>")[4].split("<")[0]) for line in lines]
    assert kl == sorted(kl) and kl[0] == 0
    picture = tmp_path / "page.png"
    opened(page, "", f"--screenshot={picture}", "--window-size=1200,2000")
    assert _colours(picture) > 50, "the plots are to be seen"


def test_the_page_fits_a_screen_and_has_a_dark_form(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    probe = "<script>document.body.dataset.wide = document.querySelector('.scroll').scrollWidth - innerWidth</script>"
    long = [replace(s, name=s.name.replace("budget=", "interval=0,min_tokens=0,budget=")) for s in two_models()]
    page.write_text(render(long) + probe, encoding="utf-8")
    dom = opened(page, "", "--window-size=1280,900", "--dump-dom")
    assert int(dom.split('data-wide="')[1].split('"')[0]) <= 0
    pictures = [tmp_path / "light.png", tmp_path / "dark.png"]
    for picture, scheme in zip(pictures, (1, 0), strict=True):
        chosen = f"--blink-settings=preferredColorScheme={scheme}"
        opened(page, "", chosen, f"--screenshot={picture}", "--window-size=1280,900")
    light, dark = (_brightness(picture) for picture in pictures)
    assert light > 0.8 and dark < 0.2, "the plot, too"


def test_the_page_names_both_models_and_the_worst_prompts() -> None:
    samples = two_models()
    table = rows(samples)
    text = render(samples, table=table)
    body = text.split('id="configurations"')[1].split("<tbody>")[1].split("</tbody>")[0]
    lines = [[cell.split("<")[0] for cell in line.split("<td>")[1:]] for line in body.split("<tr>")[1:]]
    assert [cells[0] for cells in lines] == [row.name for row in table]
    assert body.count("<small>m</small>") == body.count("<small>other/model</small>") == len(table) / 2
    for row, cells in zip(table, lines, strict=True):
        assert row.kl is not None and row.worst is not None
        assert cells[4:7] == [f"{value:.4f}" for value in (row.kl.median, row.kl.percentile_95, row.kl.highest)]
        assert f">{row.worst.task} {row.worst.id}</small>" in body
    assert text.count("<dt>model name</dt>") == 2 and text.count("<img id=") == 2
    one = render(results())
    assert one.count("<dt>model name</dt>") == 1 and "random:budget=0.25,page_size=1,representative_share=0<" in one


def _brightness(picture: Path) -> float:
    from matplotlib.image import imread

    return float(imread(picture)[..., :3].mean())


def _colours(picture: Path) -> int:
    from matplotlib.image import imread

    return len(np.unique((imread(picture)[..., :3] * 255).astype(np.uint8).reshape(-1, 3), axis=0))


def test_the_page_escapes_what_it_is_given(tmp_path: Path) -> None:
    samples = [
        replace(s, task=HOSTILE, name=f"{HOSTILE}{s.name}", model={"name": HOSTILE, HOSTILE: 1}, metric=HOSTILE)
        for s in results()
    ]
    page = tmp_path / "report.html"
    page.write_text(render(samples, title=HOSTILE), encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    assert text.count("<script>") == 1 and "<img src=x" not in text
    dom = opened(page)
    assert 'data-ready="yes"' in dom and "<title>&lt;/td&gt;" in dom and "<title>hacked" not in dom


def test_what_is_written_is_json(tmp_path: Path) -> None:
    from crushkv.evaluation import ResultsFile, read_samples

    odd = replace(results()[0], answer="\ud800 \x00 é \n </script>", task="日本")
    with ResultsFile(tmp_path / "a.jsonl", odd.model, odd.versions) as file:
        file.add(odd)
    (back,) = read_samples([tmp_path / "a.jsonl"])
    assert back.task == "日本" and back.answer is not None and back.answer.endswith("</script>")
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))["kl"] == 0
