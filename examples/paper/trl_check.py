"""SFT, DPO, KTO and GRPO once more, with TRL's trainers: the same base, data, seed and optimizer.

TRL has its own losses, batches, reference models and, for GRPO, its own sampling. The model is
transformers' Llama around the same parameters; float32 masters and their rounding are ours, since
that is what the runs' arm is, and no part of an algorithm. Where the data is fixed before the run
(SFT, DPO, KTO) TRL is given the very rows of every step; GRPO draws its own prompts and samples.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ckdiff
from paper.build import Build, read_json, save_weights
from paper.learner import Learner
from paper.measure import cosine, densities
from paper.model import LONGEST, SHAPES, VOCABULARY, Shape
from paper.runs import Run, of
from paper.tasks import DIGITS, TASKS, draw, prompts_of, rewards
from paper.train import Setting, distance, pool_of, scores

NAME = "trl"  #: of the result
#: a word for each token, in order
WORDS = (*map(str, range(10)), "=", *TASKS)
#: no marker of roles and none of an end: answers are six digits, as in our own runs
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
Row = dict[str, Any]


def llama(shape: Shape, parameters: dict[str, torch.nn.Parameter]) -> Any:
    """Transformers' Llama of our shape, around these very parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=LONGEST,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,  # a token that pads would get no gradient
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(parameters, assign=True)
    return model


def tokenizer() -> Any:
    """Words to tokens. No row is padded and no answer ends early, so the task that is not trained
    lends its token for both.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="sum"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="sum", eos_token="sum", chat_template=TEMPLATE
    )


def said(role: str, tokens: Tensor) -> list[dict[str, str]]:
    """A message of these tokens."""
    return [{"role": role, "content": " ".join(WORDS[token] for token in tokens.tolist())}]


def sft_rows(learner: Learner) -> Iterator[Row]:
    """Prompts and right answers, in the order in which our run learns them."""
    task, run = learner.task, learner.run
    for _ in range(run.steps):
        digits = draw(run.prompts * run.samples, learner.generator)
        for prompt, answer in zip(prompts_of(task, digits), task.right(digits), strict=True):
            yield {"prompt": said("user", prompt), "completion": said("assistant", answer)}


def pair_rows(learner: Learner) -> Iterator[Row]:
    """The pairs of each step."""
    for step in range(learner.run.steps):
        pairs = learner.pairs(step, learner.run.prompts * learner.run.samples // 2)
        for prompt, good, bad in zip(pairs.prompts, pairs.chosen, pairs.rejected, strict=True):
            yield {
                "prompt": said("user", prompt),
                "chosen": said("assistant", good),
                "rejected": said("assistant", bad),
            }


def kto_rows(learner: Learner) -> Iterator[Row]:
    """The answers of each step's pairs, first the right ones."""
    count = learner.run.prompts * learner.run.samples // 2
    rows = list(pair_rows(learner))
    for start in range(0, len(rows), count):
        for key, label in (("chosen", True), ("rejected", False)):
            for row in rows[start : start + count]:
                yield {"prompt": row["prompt"], "completion": row[key], "label": label}


def grpo_rows(learner: Learner) -> Iterator[Row]:
    """Prompts, with their digits for the reward."""
    run = learner.run
    for digits in draw(run.steps * run.prompts, learner.generator):
        prompt = prompts_of(learner.task, digits[None])[0]
        yield {"prompt": said("user", prompt), "digits": digits.tolist()}


def judged(run: Run) -> Callable[..., list[float]]:
    """The task's reward, in the form that TRL asks for."""

    def reward(completion_ids: list[list[int]], digits: list[list[int]], **_: Any) -> list[float]:
        answers = [(each + [-1] * DIGITS)[:DIGITS] for each in completion_ids]
        found: list[float] = rewards(
            TASKS[run.task], torch.tensor(digits), torch.tensor(answers)
        ).tolist()
        return found

    return reward


def options_of(run: Run, batch: int, folder: Path) -> dict[str, Any]:
    """What all trainers are told: one pass over rows in their order, and nothing is written."""
    return {
        "output_dir": str(folder),
        "max_steps": run.steps,
        "per_device_train_batch_size": batch,
        "max_grad_norm": run.gradient_clip,
        "seed": run.seed,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def trainer_of(learner: Learner, setting: Setting, folder: Path) -> Any:
    """TRL's trainer of a run's algorithm, with its data and with our optimizer."""
    from datasets import Dataset

    trl: Any = importlib.import_module("trl")  # its types say of these that they are not there

    run, shape = learner.run, SHAPES[setting.scale]
    answers = run.prompts * run.samples
    batch = answers // 2 if run.algorithm == "dpo" else answers
    model = llama(shape, dict(learner.policy.named_parameters()))
    reference = llama(shape, dict(learner.reference.named_parameters()))
    options = options_of(run, batch, folder)
    in_order = {**options, "train_sampling_strategy": "sequential", "max_length": LONGEST}
    schedule = torch.optim.lr_scheduler.LambdaLR(
        learner.optimizer, lambda step: min(1.0, (step + 1) / max(1, run.warmup))
    )
    common = {
        "processing_class": tokenizer(),
        "optimizers": (learner.optimizer, schedule),
        "train_dataset": Dataset.from_list(list(ROWS[run.algorithm](learner))),
    }
    if run.algorithm == "sft":
        sft = trl.SFTConfig(**in_order, completion_only_loss=True)
        return trl.SFTTrainer(model, args=sft, **common)
    if run.algorithm == "dpo":
        dpo = trl.DPOConfig(**in_order, beta=run.beta)
        return trl.DPOTrainer(model, reference, args=dpo, **common)
    if run.algorithm == "kto":
        kto = trl.KTOConfig(**in_order, beta=run.beta)
        return trl.KTOTrainer(model, reference, args=kto, **common)
    grpo = trl.GRPOConfig(
        **options, num_generations=run.samples, max_completion_length=DIGITS, beta=run.beta,
        epsilon=run.clip, loss_type="grpo", shuffle_dataset=False,
    )  # fmt: skip
    return trl.GRPOTrainer(model, judged(run), args=grpo, **common)


#: the rows that TRL's trainer of each algorithm is given
ROWS: dict[str, Callable[[Learner], Iterator[Row]]] = {
    "sft": sft_rows,
    "dpo": pair_rows,
    "kto": kto_rows,
    "grpo": grpo_rows,
}


def train(setting: Setting, run: Run, folder: Path) -> Learner:
    """Train a run with TRL; gives the learner, whose masters and policy are trained."""
    from transformers import PrinterCallback

    base, start = (setting.model(setting.build.base) for _ in range(2))
    learner = Learner(run, base, start, pool=pool_of(setting, run), mask=None)

    def seen(*_: Any) -> None:
        pairs = zip(learner.policy.parameters(), learner.masters.parameters(), strict=True)
        for policy, master in pairs:
            master.grad = policy.grad

    learner.optimizer.register_step_pre_hook(seen)
    learner.optimizer.register_step_post_hook(lambda *_: learner.round())
    trainer = trainer_of(learner, setting, folder)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return learner


def check(setting: Setting, name: str) -> dict[str, Any]:
    """Train a run of the matrix with TRL, and hold it against ours, which must be done."""
    build = setting.build
    ours = read_json(build.result(name))
    run = Run(**ours["run"])
    twin = dataclasses.replace(run, name=f"trl-{run.name}", group="trl")
    began = time.process_time()
    learner = train(setting, twin, build.folder(twin.name))
    seconds = time.process_time() - began
    weights = learner.masters.state_dict()
    save_weights(build.tuned(twin.name), weights)
    save_weights(build.masters(twin.name), weights, rounded=False)
    stored = ckdiff.diff(
        build.base, build.tuned(twin.name), build.store(twin.name), workers=1, overwrite=True
    )
    trained = ckdiff.diff(build.base, build.masters(twin.name), workers=1)
    return {
        "run": name,
        "trl": {
            "end": scores(setting, learner.masters, run.task, setting.ends),
            "density": densities(stored)["exact"],
            "density_f32": densities(trained)["exact"],
            "kl": distance(learner, min(1024, setting.ends)),
            "cpu_seconds": round(seconds, 1),
        },
        "ours": {
            "end": ours["end"],
            "density": ours["measured"]["density"]["exact"],
            "density_f32": ours["measured"]["density_f32"]["exact"],
            "kl": ours["kl"],
            "cpu_seconds": ours["cpu_seconds"],
        },
        "agreement": agreement(build, name, twin.name),
    }


def agreement(build: Build, ours: str, theirs: str) -> dict[str, float]:
    """How far the two trainings of one run agree: masks, and float32 updates."""
    found = ckdiff.overlap([build.store(ours), build.store(theirs)], by="model", workers=1)
    (row,) = found.to_dict()["rows"]
    return {"jaccard": row["pairs"][0]["jaccard"], "cosine": cosine(build, ours, theirs)}


def check_all(setting: Setting, say: Callable[[str], None]) -> dict[str, Any]:
    """All four, beside seed 1 of ours; raises FileNotFoundError where one of ours is not done.

    On the CPU also where ours were trained on another device: trainers choose devices themselves.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import datasets
    import transformers
    import trl

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    setting = dataclasses.replace(setting, device="cpu")
    say(f"{'':6} {'density, TRL':>12} {'ours':>7} {'reward, TRL':>12} {'ours':>7} {'Jaccard':>8}")
    found: dict[str, Any] = {"trl": trl.__version__, "runs": {}}
    for name in ROWS:
        each = found["runs"][name] = check(setting, of(name, "main").name)
        theirs, ours = each["trl"], each["ours"]
        reward = [side["end"]["stored"]["reward"] for side in (theirs, ours)]
        say(
            f"{name:6} {theirs['density']:12.4f} {ours['density']:7.4f} "
            f"{reward[0]:12.4f} {reward[1]:7.4f} {each['agreement']['jaccard']:8.4f}"
        )
    return found
