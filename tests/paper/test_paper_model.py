"""The model, the tasks and what learners do, each by itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from example_programs import one_thread  # noqa: F401  # a fixture of every test here
from paper.base import Recipe, rate
from paper.learner import Learner, Pairs, new_pool, order_of
from paper.model import SHAPES, Model, log_probabilities, new_model, sample, seeded
from paper.runs import ALGORITHMS, OFFLINE, Run, of
from paper.tasks import TASKS, demonstrations, draw, evaluate, held_out, prompts_of, rewards


@pytest.fixture(scope="module")
def base() -> Model:
    return new_model(SHAPES["tiny"], 3)


def test_sampling_with_a_cache_is_what_the_whole_model_says(base: Model) -> None:
    prompts = prompts_of(TASKS["sort"], draw(3, seeded(1)))
    answers = sample(base, prompts, 6, 2, seeded(2))
    assert answers.shape == (6, 6)
    # the same draws from the logits of the whole sequence, without a cache
    generator, repeated = seeded(2), prompts.repeat_interleave(2, 0)
    tokens = repeated
    for _ in range(6):
        chances = base(tokens)[:, -1].softmax(-1)
        tokens = torch.cat((tokens, torch.multinomial(chances, 1, generator=generator)), 1)
    assert torch.equal(answers, tokens[:, 8:])


def test_it_is_llama(base: Model) -> None:
    """The weights in transformers' model, under the same names, say the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = base.shape
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    theirs = LlamaForCausalLM(config)
    theirs.load_state_dict(base.state_dict())
    tokens = torch.randint(0, 13, (3, 14), generator=seeded(1))
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, base(tokens), atol=1e-5)


def test_later_tokens_change_nothing_before_them(base: Model) -> None:
    prompts = prompts_of(TASKS["sum"], draw(1, seeded(1)))
    one, two = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[1, 2, 3, 9, 9, 9]])
    first, second = (log_probabilities(base, prompts, each)[0, :3] for each in (one, two))
    assert torch.allclose(first, second, atol=1e-6)


def test_right_answers() -> None:
    digits = torch.tensor([[3, 1, 2, 0, 9, 9]])
    assert TASKS["sort"].right(digits).tolist() == [[0, 1, 2, 3, 9, 9]]
    assert TASKS["sum"].right(digits).tolist() == [[3, 4, 6, 6, 5, 4]]
    for task in TASKS.values():
        assert rewards(task, digits, task.right(digits)).tolist() == [1.0]
        slip = task.slipped(task.right(digits), torch.tensor([[1]]))
        assert rewards(task, digits, slip).tolist() == [0.0]


def test_no_order_of_held_out_digits_is_trained_on() -> None:
    trained, held = draw(500, seeded(1)), draw(500, seeded(1), held=True)
    assert not held_out(trained).any()
    assert held_out(held).all()
    every = torch.tensor(list(itertools.permutations(held[0].tolist())))
    assert held_out(every).all()
    assert held_out(torch.randint(0, 10, (20_000, 6))).float().mean() == pytest.approx(
        0.1, abs=0.02
    )


def test_demonstrations_are_of_mixed_quality() -> None:
    for task in TASKS.values():
        generator = seeded(4)
        digits = draw(8000, generator)
        good = rewards(task, digits, demonstrations(task, digits, generator))
        odd = digits[:, 0] % 2 == 1
        # a slip that swaps two equal digits is none
        extra = 0.08 if task.name == "sort" else 0.02
        assert 0.58 < good[~odd].mean() < 0.6 + extra
        assert 0.28 < good[odd].mean() < 0.3 + extra


def test_the_learning_rate_of_the_base() -> None:
    recipe = Recipe()
    assert rate(recipe, 25) == pytest.approx(1e-3, rel=1e-6)
    assert rate(recipe, 50) == pytest.approx(2e-3)
    assert rate(recipe, 600) == pytest.approx(2e-4)


def test_evaluation_is_greedy_accuracy_and_the_chance_of_being_right(base: Model) -> None:
    task = TASKS["sort"]
    digits = draw(64, seeded(1), held=True)
    prompts, right = prompts_of(task, digits), task.right(digits)
    tokens = prompts
    for _ in range(6):
        tokens = torch.cat((tokens, base(tokens)[:, -1:].argmax(-1)), 1)
    found = evaluate(base, task, 64)
    assert found["accuracy"] == rewards(task, digits, tokens[:, 8:]).mean().item()
    chance = log_probabilities(base, prompts, right).sum(1).exp().mean().item()
    assert found["reward"] == pytest.approx(chance, rel=1e-5)


def test_each_round_over_a_pool_takes_every_pair_once() -> None:
    taken = torch.cat([order_of(step, 4, 10, seed=1) for step in range(5)])
    assert sorted(taken[:10].tolist()) == sorted(taken[10:].tolist()) == list(range(10))
    assert taken[:10].tolist() != taken[10:].tolist()


def made_pool(base: Model, count: int = 64) -> Pairs:
    """A pool as it would be of a base that is sometimes right; this one never is."""
    task = TASKS["sort"]
    digits = draw(count, seeded(9))
    prompts = prompts_of(task, digits)
    right, wrong = task.right(digits), task.flawed(digits)
    with torch.no_grad():
        logs = [log_probabilities(base, prompts, each) for each in (right, wrong)]
    return Pairs(prompts, right, wrong, *logs)


def test_a_base_that_is_never_right_has_no_pool(
    base: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paper.learner.MOST_ROUNDS", 1)
    with pytest.raises(ValueError, match="hardly ever right at sum"):
        new_pool(base, TASKS["sum"], 1, 100)


def run_of(algorithm: str, **changed: object) -> Run:
    small: dict[str, object] = {"steps": 3, "prompts": 4, "samples": 4, "lr": 1e-3}
    return of(algorithm, "main", **{**small, **changed})


def bits(learner: Learner) -> list[torch.Tensor]:
    return [each.detach().clone() for each in learner.masters.parameters()]


def taught(base: Model, run: Run) -> Learner:
    from paper.algorithms import algorithm_of

    pool = made_pool(base) if run.algorithm in OFFLINE else None
    learner = Learner(run, base, base, pool=pool, mask=None)
    algorithm = algorithm_of(learner)
    for number in range(run.steps):
        learner.number = number
        log = algorithm.step(number)
        assert all(value == value for value in log.values()), log
    return learner


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_is_the_same_each_time(
    base: Model, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # rewards of half the samples, so that there is something to learn
    monkeypatch.setattr("paper.learner.rewards", lambda task, d, a: (a[:, 0] < 6).float())
    monkeypatch.setattr("paper.algorithms.ppo.WARMUP", 1)
    one, two = (taught(base, run_of(algorithm)) for _ in range(2))
    assert all(map(torch.equal, bits(one), bits(two)))
    before = [each.detach() for each in base.parameters()]
    assert not all(map(torch.equal, bits(one), before)), "it learnt something"
    assert one.taken == 3
    other = taught(base, run_of(algorithm, seed=2))
    assert not all(map(torch.equal, bits(one), bits(other)))


def test_offline_algorithms_make_the_right_answers_likelier(base: Model) -> None:
    pool = made_pool(base)
    for algorithm in OFFLINE:
        learner = taught(base, run_of(algorithm, steps=12, lr=3e-3))
        with torch.no_grad():
            right, wrong = (
                log_probabilities(learner.policy, pool.prompts, each).sum(1).mean()
                for each in (pool.chosen, pool.rejected)
            )
        before = pool.chosen_reference.sum(1).mean() - pool.rejected_reference.sum(1).mean()
        assert right - wrong > before, algorithm


def test_precisions(base: Model) -> None:
    mixed = taught(base, run_of("sft"))
    pairs = list(zip(mixed.policy.parameters(), mixed.masters.parameters(), strict=True))
    assert all(torch.equal(seen, master.bfloat16().float()) for seen, master in pairs)
    assert any(not torch.equal(seen, master) for seen, master in pairs)
    whole = taught(base, run_of("sft", precision="f32"))
    assert whole.policy is whole.masters
    half = taught(base, run_of("sft", precision="bf16"))
    assert {each.dtype for each in half.policy.parameters()} == {torch.bfloat16}


def test_off_policy_samples_are_the_base_s(base: Model) -> None:
    run = run_of("grpo", off_policy=0.5)
    learner = Learner(run, base, base, pool=None, mask=None)
    with torch.no_grad():
        for each in learner.masters.parameters():
            each.mul_(1.5)
    learner.round()
    rollout = learner.rollout()
    assert len(rollout.answers) == 16
    with torch.no_grad():
        said = log_probabilities(base, rollout.prompts, rollout.answers)
    assert torch.allclose(rollout.old[8:], said[8:], atol=1e-5)
    assert not torch.allclose(rollout.old[:8], said[:8], atol=1e-3)


def test_warm_up_and_clipping(base: Model) -> None:
    learner = taught(base, run_of("sft", optimizer="sgd", lr=1.0, gradient_clip=1e-3, steps=1))
    moved = [
        (one - two.detach()).norm() ** 2
        for one, two in zip(bits(learner), base.parameters(), strict=True)
    ]
    # one step of a tenth of the rate, along a gradient of length 1e-3; the base is rounded nowhere
    assert sum(moved).sqrt().item() == pytest.approx(1e-4, rel=1e-2)
