"""Tables, and the page that is made of real rollouts of a scripted policy."""

import base64
import json
import re
import sys
from html.parser import HTMLParser

import matplotlib.image
import pytest
from support.episodes import SEEDS, PushBlock
from support.general import load_script

from vla0_trl.envs.pusht.env import FPS, PushTEnv
from vla0_trl.evaluation.episode_log import EpisodeLog, provenance, video_name, write_json, write_video
from vla0_trl.evaluation.metrics import aggregate
from vla0_trl.evaluation.report.charts import training_curve
from vla0_trl.evaluation.report.page import write_report
from vla0_trl.evaluation.report.summary import energy_table, format_table, load_runs, task_table
from vla0_trl.evaluation.rollout import rollout

PROTOCOL = {"env": "gym_pusht/PushT-v0", "max_steps": 30, "success_coverage": 0.95, "n_action_steps": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two evaluations: `slow` without extras; `<fast>` with training log, offline.json, videos of three episodes."""
    root = tmp_path_factory.mktemp("runs")
    for name, n_action_steps in (("slow", 1), ("<fast>", 4)):
        checkpoint, folder = root / f"checkpoint {name}", root / name
        run = {"checkpoint": str(checkpoint), "checkpoint_hash": name * 10, "protocol": PROTOCOL}
        filmed = SEEDS[1:4] if name == "<fast>" else []
        with EpisodeLog(folder, run) as log:
            envs = [PushTEnv("full", 30) for _ in range(3)]
            for episode in rollout(PushBlock(n_action_steps=n_action_steps), envs, SEEDS, filmed, progress=False):
                if episode.frames:
                    path = folder / "videos" / f"episode_{episode.seed:06d}_failure.mp4"
                    write_video(path, episode.frames, FPS)
                log.append(episode)
            write_json(folder / "results.json", run | aggregate(log.episodes) | provenance("cpu", ("numpy",)))
    history = [{"step": s, "loss": 4 / s, "mean_token_accuracy": s / 40} for s in range(10, 31, 10)]
    history.append({"step": 30, "eval_loss": 0.2, "eval_mean_token_accuracy": 0.7})
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    stay = {"rmse": 43.125, "first_rmse": 23.0}
    offline = {
        "dataset": "data/dots",
        "episodes": "36:40",
        "num_frames": 200,
        "token_accuracy": 0.614,
        "rmse": 31.25,
        "first_rmse": 22.5,
        "baselines": {"stay": stay},
    }
    write_json(folder / "offline.json", run | offline | {"command": "python eval/eval_offline.py --episodes 36:40"})
    return [root / "slow", root / "<fast>"]


class _Page(HTMLParser):
    """Collects tags, the addresses that they point to, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_self_contained_and_complete(folders, tmp_path):
    runs = load_runs(folders)
    write_report(tmp_path / "report.html", runs, "Slow & fast")
    text = (tmp_path / "report.html").read_text()
    page = _Page(text)
    words = " ".join(page.words)
    assert page.links and all(link.startswith(("data:", "#")) for link in page.links)
    assert "url(http" not in text and "@import" not in text
    assert page.tags.count("svg") == 4  # success, coverage, loss, accuracy
    assert "Slow & fast" in words and "<fast>" in words  # escaped in the page, so these come back as text
    assert "python eval/eval_offline.py --episodes 36:40" in words
    assert "Frames of episodes 36:40 of data/dots." in words
    for number in ("61.4", "31.25", "43.12", f"{runs[1].results['mean_max_coverage']:.3f}"):
        assert number in words
    assert "nan" not in words.lower()


def test_the_best_and_the_worst_filmed_episode_are_shown(folders, tmp_path):
    runs = load_runs(folders)
    write_report(tmp_path / "report.html", runs, "t")
    text = (tmp_path / "report.html").read_text()
    filmed = sorted((e for e in runs[1].episodes if e["seed"] in SEEDS[1:4]), key=lambda e: e["max_coverage"])
    videos = re.findall(r'src="data:video/mp4;base64,([^"]+)".*?seed (\d+)', text, re.DOTALL)
    assert [int(seed) for _, seed in videos] == [filmed[-1]["seed"], filmed[0]["seed"]]
    assert base64.b64decode(videos[0][0]) == runs[1].video(filmed[-1]).read_bytes()

    runs[1].episodes = filmed[:1]  # the best is the worst
    write_report(tmp_path / "report.html", runs, "t")
    assert (tmp_path / "report.html").read_text().count("data:video/mp4") == 1


def test_whatever_an_evaluation_holds_is_text_on_the_page(folders, tmp_path):
    """Results are files, which somebody else may have written."""
    evil = "<script>alert(1)"
    [run] = load_runs(folders[1:])
    run.name, run.folder = evil, tmp_path
    run.results |= {"checkpoint": evil, "git_commit": evil, "versions": {evil: evil}, "successes": evil}
    del run.results["mean_max_coverage"]
    for row in run.episodes:
        row |= {"suite": "libero_object", "task_id": evil, "task": evil, "seed": evil}
        del row["max_coverage"]
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / video_name(run.episodes[0])).write_bytes(b"film")
    write_report(tmp_path / "report.html", [run], evil, commands=[evil])
    page = _Page((tmp_path / "report.html").read_text())
    assert "script" not in page.tags and "video" in page.tags
    shown = " ".join(page.words)
    assert shown.count(evil) > 10 and f"initial state {evil}" in shown


def test_the_page_without_extras_has_no_empty_sections(folders, tmp_path):
    write_report(tmp_path / "report.html", load_runs(folders[:1]), "t", commands=["make demo"])
    text = (tmp_path / "report.html").read_text()
    assert re.findall(r"<section><h2>(.*?)</h2>", text) == [
        "In the simulator",
        "Commands",
        "Where the numbers are from",
    ]
    assert "<code>make demo</code>" in text


def test_summarize_writes_table_picture_and_page(folders, tmp_path, monkeypatch, capsys):
    output = tmp_path / "summary"
    monkeypatch.setattr(sys, "argv", ["summarize.py", *map(str, folders), "--output", str(output)])
    load_script("eval/summarize.py").main()
    printed = capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir()) == ["report.html", "success.png", "summary.md"]
    rate, coverage = (load_runs(folders)[1].results[key] for key in ("success_rate", "mean_max_coverage"))
    for text in (printed, (output / "summary.md").read_text()):
        [line] = [line for line in text.splitlines() if "<fast>" in line and f"{coverage:.3f}" in line]
        assert f" {100 * rate:.1f} " in line
        assert "stay" in text
    assert matplotlib.image.imread(output / "success.png").std() > 0.05  # something is drawn


def test_an_unfinished_evaluation_is_one_clear_error(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["summarize.py", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        load_script("eval/summarize.py").main()
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} has no results.json")


def test_offline_metrics_of_another_checkpoint_are_refused(folders, tmp_path):
    for name in ("results.json", "episodes.jsonl"):
        (tmp_path / name).write_bytes((folders[0] / name).read_bytes())
    (tmp_path / "offline.json").write_bytes((folders[1] / "offline.json").read_bytes())
    with pytest.raises(ValueError, match=r"offline\.json is of checkpoint .*fast.*run eval_offline\.py again"):
        load_runs([tmp_path])


def test_folders_with_the_same_name_are_told_apart(folders, tmp_path):
    other = tmp_path / "slow"
    other.mkdir()
    for name in ("results.json", "episodes.jsonl"):
        (other / name).write_bytes((folders[0] / name).read_bytes())
    assert [run.name for run in load_runs([folders[0], other])] == [str(folders[0]), str(other)]


def test_energy_of_the_training_is_set_against_success(folders, tmp_path):
    """Found in the run's folder, also for a checkpoint inside it."""
    training = tmp_path / "run"
    (training / "checkpoint-20").mkdir(parents=True)
    write_json(training / "energy.json", {"kwh": 0.25, "seconds": 5400.0, "steps": 30, "samples": 480})
    runs = load_runs(folders)
    assert energy_table(runs) is None
    for name, checkpoint, rate in (("last", training, 0.5), ("early", training / "checkpoint-20", 0.0)):
        results = json.loads((folders[0] / "results.json").read_text())
        results |= {"checkpoint": str(checkpoint), "success_rate": rate}
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "results.json", results)
        (tmp_path / name / "episodes.jsonl").write_bytes((folders[0] / "episodes.jsonl").read_bytes())
    runs += load_runs([tmp_path / "last", tmp_path / "early"])
    header, rows = energy_table(runs)
    assert header[3:] == ["training kWh", "Wh per % of success"]
    assert rows == [["last", "480", "1.50", "0.25", "5"], ["early", "480", "1.50", "0.25", "–"]]
    write_report(tmp_path / "report.html", runs[2:], "t")
    assert "Wh per % of success" in (tmp_path / "report.html").read_text()


def test_several_tasks_get_a_row_each(folders):
    runs = load_runs(folders)
    assert task_table(runs) is None
    for run in runs:
        for row in run.episodes[:2]:
            row["task"] = "lift"
    header, rows = task_table(runs)
    assert [row[0] for row in rows][2:] == ["lift · slow", "lift · <fast>"]
    assert [row[header.index("episodes")] for row in rows] == ["4", "4", "2", "2"]


def test_format_table():
    table = ["run", "success"], [["untrained", "0.0 %"], ["a", "78.1 %"]]
    assert format_table(table) == "run        success\n---------  -------\nuntrained    0.0 %\na           78.1 %"
    markdown = "| run       | success |\n| --------- | ------: |\n| untrained |   0.0 % |\n| a         |  78.1 % |"
    assert format_table(table, markdown=True) == markdown


def test_a_metric_that_was_logged_once_is_a_dot():
    [line] = training_curve({"short": [{"step": 10, "loss": 2.0}]}, "loss", "loss").axes[0].lines
    assert line.get_marker() == "o" and line.get_xydata().tolist() == [[10, 2]]
