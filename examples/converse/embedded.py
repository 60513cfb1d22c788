"""The whole way to the Moshi that ships with the package: corpus, codec, sentences in codes, training, figures. ::

    python -m examples.converse.embedded

Every stage goes on where it was interrupted, and one that is done is not done again. What each trains, and for how
long, is in the YAML files beside this one.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from transformers_moshi_flax.checkpoints.writing import write_text

from .assembling import write_assembled
from .card import card_of
from .corpus import make_corpus
from .evaluate import evaluate
from .moshi import write_moshi
from .pieces import DONE, write_pieces

HERE = Path(__file__).parent
ASSETS = HERE.parents[1] / "src" / "transformers_moshi_flax" / "assets" / "moshi-converse"
MOST_BYTES = 12_500_000
RUNS = ("autoencoder", "codebooks", "codec", "listening", "repeating", "mixed", "answering", "moshi")


@dataclass(frozen=True)
class Stage:
    """A part of the way.

    Attributes:
        name: what is printed.
        makes: what is there when it is done.
        run: does it.
    """

    name: str
    makes: Path
    run: Callable[[], None]


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        dialogues, utterances, held_out: of the corpus that is recorded.
        sentences: of users that are encoded by themselves.
        assembled, listening, answering: dialogues of these, rows of questions to listen to, and to answer.
        questions, rows, minutes, long_dialogues: of the evaluation.
        settings: replaced values of the YAML files, by their names.
    """

    dialogues: int = 100
    utterances: int = 4000
    held_out: int = 100
    sentences: int = 24_000
    assembled: int = 24_000
    listening: int = 12_500
    answering: int = 32_000
    questions: int = 300
    rows: int = 32
    minutes: float = 10.0
    long_dialogues: int = 8
    settings: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def of(self, name: str) -> tuple[str, ...]:
        """The replaced values of ``name``.yaml."""
        return dict(self.settings).get(name, ())


def moshi_flax(*arguments: str | Path) -> None:
    """Run the command in a process of its own.

    Raises:
        subprocess.CalledProcessError: it has failed.
    """
    code = "from transformers_moshi_flax.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)


def stages(folder: Path, assets: Path, size: Size) -> list[Stage]:
    """All stages, in their order, for a folder of runs and one of what ships."""
    corpus, moshi = folder / "corpus", folder / "moshi"
    runs = {name: folder / f"{name}-run" for name in RUNS}
    assembled = folder / "assembled"
    utterances, monologues = (
        (f"data.train={corpus}/{name}/all.jsonl", f"data.evaluation={corpus}/utterances/held-out/all.jsonl")
        for name in ("utterances/train", "monologues")
    )

    def train(command: str, file: str, run: str, *settings: str) -> None:
        settings = (*settings, f"run.output_dir={runs[run]}", *size.of(file))
        moshi_flax(command, HERE / f"{file}.yaml", *(word for each in settings for word in ("--set", each)))

    def learn(name: str, model: Path, evaluation: Path) -> Stage:
        """A stage of Moshi without a voice, on the assembled rows of its name."""
        settings = (f"model.path={model}", f"data.train={assembled / name}", f"data.evaluation={evaluation}")
        return Stage(
            name,
            runs[name] / "export" / "config.json",
            lambda: train("train", f"moshi-{name}", name, *settings),
        )

    def prepare(split: str) -> None:
        moshi_flax(
            "prepare", corpus / "dialogues" / split / "all.jsonl", folder / "prepared" / split, "--model", moshi
        )

    def write_figures() -> None:
        figures = evaluate(runs["moshi"] / "export", size.questions, size.long_dialogues, size.minutes, size.rows)
        write_text(folder / "figures.json", json.dumps(figures, indent=1) + "\n")

    def write_assets() -> None:
        moshi_flax(
            "export-checkpoint", runs["moshi"], folder / "assets", "--dtype", "bfloat16", "--to-pt", "--overwrite"
        )
        written = sum(path.stat().st_size for path in (folder / "assets").iterdir())
        if written > MOST_BYTES:
            raise SystemExit(f"the assets have {written:,} bytes, more than {MOST_BYTES:,}")
        figures = json.loads((folder / "figures.json").read_text("utf-8"))
        with safe_open(folder / "assets" / "model.safetensors", framework="numpy") as file:
            parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
        write_text(folder / "assets" / "README.md", card_of(figures, parameters))
        shutil.copytree(folder / "assets", assets, dirs_exist_ok=True)
        for side in ("known_voices", "held_out_voice"):
            del figures[side]["wrong"]  # every wrong answer: more than all the rest
        # last, as it tells that all is there
        write_text(assets / "figures.json", json.dumps(figures, indent=1) + "\n")

    return [
        Stage(
            "corpus",
            corpus / "dialogues" / "held-out-voice" / "all.jsonl",
            lambda: make_corpus(corpus, size.dialogues, size.utterances, size.held_out),
        ),
        Stage(
            "autoencoder",
            runs["autoencoder"] / "export" / "config.json",
            lambda: train("train-codec", "codec-autoencoder", "autoencoder", *utterances),
        ),
        Stage(
            "codebooks",
            runs["codebooks"] / "export" / "config.json",
            lambda: train(
                "train-codec", "codec-codebooks", "codebooks", *utterances, f"model.path={runs['autoencoder']}/export"
            ),
        ),
        Stage(
            "codec",
            runs["codec"] / "export" / "config.json",
            lambda: train(
                "train-codec", "codec-decoder", "codec", *monologues, f"model.path={runs['codebooks']}/export"
            ),
        ),
        Stage("model", moshi / "processor_config.json", lambda: write_moshi(runs["codec"] / "export", moshi)),
        Stage("prepare held-out", folder / "prepared" / "held-out" / "report.json", lambda: prepare("held-out")),
        Stage(
            "sentences",
            folder / "pieces" / DONE,
            lambda: write_pieces(runs["codec"] / "export", folder / "pieces", size.sentences),
        ),
        Stage(
            "dialogues",
            assembled / "mixed" / "index.json",
            lambda: write_assembled(
                folder / "pieces", moshi, assembled, size.assembled, size.listening, size.answering
            ),
        ),
        learn("listening", moshi, assembled / "listening-held-out"),
        learn("repeating", runs["listening"] / "export", assembled / "repeating-held-out"),
        learn("mixed", runs["repeating"] / "export", assembled / "answering-held-out"),
        learn("answering", runs["mixed"] / "export", assembled / "answering-held-out"),
        Stage(
            "moshi",
            runs["moshi"] / "export" / "config.json",
            lambda: train(
                "train",
                "moshi",
                "moshi",
                f"model.path={runs['answering']}/export",
                f"data.train={assembled}/dialogues",
                f"data.evaluation={folder}/prepared/held-out",
            ),
        ),
        Stage("figures", folder / "figures.json", write_figures),
        Stage("assets", assets / "figures.json", write_assets),
    ]


def make_embedded(folder: Path, assets: Path, size: Size = Size()) -> None:
    """Do what is not done yet."""
    for stage in stages(folder, assets, size):
        is_done = stage.makes.exists()
        print(f"{stage.name}: {'done' if is_done else 'begins'}", flush=True)
        if not is_done:
            stage.run()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/converse"))
    parser.add_argument("--assets", type=Path, default=ASSETS)
    given = parser.parse_args(arguments)
    make_embedded(given.folder, given.assets)


if __name__ == "__main__":
    main()
