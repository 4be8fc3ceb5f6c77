import io
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from curricula.sampler import CurriculumSettings, DifficultySampler, build_curriculum
from posttrain.errors import DataError, SettingsError
from posttrain.types import Label, Message, Outcome, Prompt, Verdict

MESSAGE = (Message(role="user", content="?"),)
METADATA: dict[str, str] = {}
GROUP = 8


def prompt(index: int, domain: str = "d") -> Prompt:
    return Prompt(
        prompt_id=f"{index:016x}",
        messages=MESSAGE,
        reference=None,
        domain=domain,
        metadata=METADATA,
    )


def verdict(index: int, c: int, n: int = 8) -> Verdict:
    return Verdict(
        prompt_id=f"{index:016x}",
        judge="critic",
        critic="f00",
        num_samples=n,
        num_correct=c,
        outcomes={Outcome.CORRECT: c, Outcome.WRONG: n - c},
        posterior=(0.5 + c, 0.5 + n - c),
        label=Label.MEDIUM,
        decided_by="cap",
        sampling={},
    )


def build(num_prompts=200, verdicts=(), domains=("d",), seed=0, batch_size=1, **options):
    prompts = [prompt(i, domains[i % len(domains)]) for i in range(num_prompts)]
    chosen = CurriculumSettings(**options)
    return build_curriculum(prompts, verdicts, chosen, GROUP, seed, batch_size)


def number(drawn: Prompt) -> int:
    return int(drawn.prompt_id, 16)


def seats(curriculum) -> Iterator[str]:
    """The domains of one batch after the other."""
    while True:
        yield from curriculum.next_batch()


def draws(curriculum, count: int) -> list[Prompt]:
    return [curriculum.draw(domain) for domain in islice(seats(curriculum), count)]


def play(curriculum, truth, num_draws: int, seed: int = 1):
    """Draws, answers with the true pass rates, observes. Returns the draws and their counts."""
    rng = np.random.default_rng(seed)
    drawn = []
    for step, domain in enumerate(islice(seats(curriculum), num_draws)):
        index = number(curriculum.draw(domain))
        correct = int(rng.binomial(GROUP, truth[index]))
        curriculum.observe(f"{index:016x}", GROUP, correct, step)
        drawn.append((index, correct))
    return drawn


@pytest.mark.parametrize("kind", ["difficulty", "uniform"])
def test_a_seed_decides_everything(kind):
    truth = np.random.default_rng(0).beta(0.5, 0.5, 200)
    first, again, other = (play(build(seed=s, kind=kind), truth, 100) for s in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("kind", ["difficulty", "uniform"])
def test_a_restored_curriculum_goes_on_identically(kind):
    truth = np.random.default_rng(0).beta(0.5, 0.5, 200)
    options = {"kind": kind, "domains": ("a", "b", "c"), "batch_size": 8}
    original = build(**options)
    play(original, truth, 333)
    stored = io.BytesIO()
    np.savez(stored, **original.state_dict())
    stored.seek(0)
    restored = build(**options, seed=99)
    restored.load_state_dict(np.load(stored, allow_pickle=False))
    assert play(original, truth, 300) == play(restored, truth, 300)


@pytest.mark.parametrize("kind", ["difficulty", "uniform"])
def test_state_is_a_copy_and_fits_its_prompts_only(kind):
    curriculum = build(kind=kind)
    state = curriculum.state_dict()
    before = {name: np.array(value) for name, value in state.items()}
    play(curriculum, np.full(200, 0.5), 50)
    assert all(np.array_equal(state[name], before[name]) for name in before)
    with pytest.raises(DataError, match="another prompt set"):
        build(num_prompts=201, kind=kind).load_state_dict(state)


def test_fewer_groups_without_signal_than_uniform():
    truth = np.random.default_rng(0).beta(0.5, 0.5, 1000)
    wasted = {}
    for kind in ("difficulty", "uniform"):
        drawn = play(build(num_prompts=1000, kind=kind), truth, 3000)
        wasted[kind] = np.mean([correct in (0, GROUP) for _, correct in drawn])
    assert wasted["uniform"] == pytest.approx(np.mean(truth**8 + (1 - truth) ** 8), abs=0.03)
    assert wasted["difficulty"] < 0.5 * wasted["uniform"]


def test_verdicts_decide_the_first_draws():
    verdicts = [verdict(i, c=4 if i % 4 == 0 else 8 * (i % 2)) for i in range(400)]
    curriculum = build(num_prompts=400, verdicts=verdicts, cooldown=20)
    first = [number(p) for p in draws(curriculum, 400)]
    # A quarter was solved half the time; the rest promises nothing. 2% explore elsewhere.
    assert np.mean([i % 4 == 0 for i in first]) > 0.95


def test_no_signal_candidates_are_skipped_before_ranking():
    # 13 of 16, worth 8 answers, leaves E[p^8 + (1-p)^8] = .23; 16 of 16 leaves .71. With three
    # good prompts in 400, hopeless ones reach the best quarter of the candidates unless skipped.
    verdicts = [verdict(i, c=13 if i < 3 else 16, n=16) for i in range(400)]

    def share_of_hopeless(max_no_signal: float) -> float:
        curriculum = build(400, verdicts, cooldown=0, max_no_signal=max_no_signal)
        return float(np.mean([number(p) >= 3 for p in draws(curriculum, 1000)]))

    assert share_of_hopeless(0.9) > 0.2
    assert share_of_hopeless(0.5) < 0.1


def test_what_is_observed_moves_a_prompt_to_where_it_is_found_again():
    # Of 1000 prompts that the judge saw unsolved, the policy has since learned 50.
    verdicts = [verdict(i, c=0) for i in range(1000)]
    curriculum = build(1000, verdicts, cooldown=10)
    for index in range(50):
        curriculum.observe(f"{index:016x}", GROUP, 4, step=1)
    drawn = [number(p) for p in draws(curriculum, 500)]
    assert np.mean([i < 50 for i in drawn]) > 0.95


def test_where_all_promise_nothing_the_least_hopeless_is_drawn():
    verdicts = [verdict(i, c=0, n=4 if i < 20 else 8) for i in range(40)]
    curriculum = build(num_prompts=40, verdicts=verdicts, max_no_signal=0.1, cooldown=0)
    drawn = [number(p) for p in draws(curriculum, 200)]
    assert np.mean([i < 20 for i in drawn]) > 0.9


def test_every_bucket_gets_its_floor():
    # One bucket each of 100 prompts; without a floor the ends would hardly ever be drawn.
    verdicts = [verdict(i, c=(0, 1, 3, 5, 7, 8)[i % 6]) for i in range(600)]
    curriculum = build(num_prompts=600, verdicts=verdicts, floor=0.05, cooldown=10)
    drawn = Counter(number(p) % 6 for p in draws(curriculum, 6000))
    # 300 expected at the least, standard deviation 17.
    assert min(drawn.values()) > 300 - 4 * 17
    assert set(drawn) == set(range(6))


def test_nothing_is_given_up_for_good():
    truth = np.where(np.arange(60) < 30, 0.5, 0.0)
    curriculum = build(num_prompts=60, floor=0.05)
    late = [index for index, _ in play(curriculum, truth, 4000)][500:]
    assert set(late) == set(range(60))
    truth[59] = 0.5  # the policy has learned: its next draw shows it
    later = Counter(index for index, _ in play(curriculum, truth, 1500))
    assert later[59] > 3 * np.mean([later[i] for i in range(30, 59)])


def test_a_prompt_does_not_come_again_while_others_are_there():
    curriculum = build(num_prompts=200, cooldown=50)
    drawn = [number(p) for p in draws(curriculum, 2000)]
    gaps = [
        later - earlier
        for index in range(200)
        for places in [[t for t, i in enumerate(drawn) if i == index]]
        for earlier, later in pairwise(places)
    ]
    assert min(gaps) > 50
    only = build(num_prompts=1)
    assert [number(p) for p in draws(only, 5)] == [0] * 5


def test_unfinished_draws_hold_nothing_back():
    curriculum = build(num_prompts=20)
    drawn = Counter(number(p) for p in draws(curriculum, 400))
    assert set(drawn) == set(range(20))


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=4), st.sampled_from(["difficulty", "uniform"])
)
def test_every_batch_keeps_its_quotas(weights, kind):
    domains = tuple(f"d{i}" for i in range(len(weights)))
    quotas = dict(zip(domains, map(float, weights), strict=True))
    curriculum = build(
        num_prompts=40, domains=domains, quotas=quotas, batch_size=16, kind=kind, cooldown=4
    )
    for _ in range(6):
        batch = Counter(p.domain for p in draws(curriculum, 16))
        for name in domains:
            assert abs(batch[name] - 16 * quotas[name] / sum(weights)) <= 1 + 1e-9


def test_without_quotas_domains_get_what_they_hold():
    prompts = [prompt(i, "big" if i < 30 else "small") for i in range(40)]
    curriculum = build_curriculum(prompts, [], CurriculumSettings(), GROUP, 0, batch_size=8)
    assert Counter(p.domain for p in draws(curriculum, 80)) == {"big": 60, "small": 20}


@pytest.mark.parametrize(("fixed", "share"), [(True, 0.5), (False, 0.0)])
def test_quotas_follow_the_signal_unless_they_are_fixed(fixed, share):
    curriculum = build(domains=("a", "b"), fixed_quotas=fixed)
    for _ in range(400):
        curriculum.gated("a", trainable=True)
        curriculum.gated("b", trainable=False)
    expected = pytest.approx({"a": 1 - share, "b": share}, abs=1e-6)
    assert curriculum.quotas() == expected


def test_uniform_goes_through_all_before_any_comes_again():
    curriculum = build(num_prompts=30, kind="uniform", domains=("a", "b"))
    passes = [[number(p) for p in draws(curriculum, 30)] for _ in range(3)]
    assert all(sorted(p) == list(range(30)) for p in passes)
    assert passes[0] != passes[1]


def test_unknown_prompts_and_unfit_quotas_are_named():
    with pytest.raises(DataError, match="prompt nowhere is not among the 200"):
        build().observe("nowhere", 8, 4, 0)
    with pytest.raises(SettingsError, match="domain 'maths', which has no prompts"):
        build(quotas={"d": 0.5, "maths": 0.5})
    with pytest.raises(DataError, match="needs prompts"):
        build(num_prompts=0)
    with pytest.raises(ValidationError, match="floor"):
        CurriculumSettings(floor=0.001)
    with pytest.raises(ValidationError, match=r"quotas\.d"):
        CurriculumSettings(quotas={"d": -1.0})


def test_a_million_prompts_cost_neither_time_nor_memory():
    size = 1_000_000
    prompts = [prompt(i) for i in range(size)]
    sampler = build_curriculum(prompts, [], CurriculumSettings(), GROUP, 0)
    assert isinstance(sampler, DifficultySampler)
    parts = [sampler, sampler._catalogue, sampler._posterior, sampler._pool]
    arrays = [v for part in parts for v in vars(part).values() if isinstance(v, np.ndarray)]
    assert 30 * size < sum(array.nbytes for array in arrays) <= 64 * size
    seconds = []
    for step in range(300):
        start = time.perf_counter()
        drawn = sampler.draw("d")
        sampler.observe(drawn.prompt_id, GROUP, step % (GROUP + 1), step)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 1e-3
