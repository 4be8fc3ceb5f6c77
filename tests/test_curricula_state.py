import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curricula.buckets import BUCKETS, bucket_of
from curricula.catalogue import PromptCatalogue
from curricula.pool import BucketedPool
from curricula.state import NEVER, PosteriorState
from posttrain.errors import DataError
from posttrain.types import Label, Message, Outcome, Prompt, Verdict


def prompts_of(*domains: str) -> list[Prompt]:
    message = (Message(role="user", content="?"),)
    return [
        Prompt(prompt_id=f"p{i}", messages=message, reference=None, domain=domain)
        for i, domain in enumerate(domains)
    ]


def verdict(prompt_id: str, n: int, c: int) -> Verdict:
    return Verdict(
        prompt_id=prompt_id,
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


def state_of(count: int, forgetting: float = 0.9) -> PosteriorState:
    return PosteriorState(PromptCatalogue(prompts_of(*["d"] * count)), forgetting)


def test_buckets():
    rates = [0.0, 1e-9, 0.25, 0.2500001, 0.5, 0.75, 0.7500001, 0.999999, 1.0]
    assert bucket_of(rates).tolist() == [0, 1, 1, 2, 2, 3, 4, 4, 5]
    assert len(BUCKETS) == 6


def test_forgetting_update():
    state = state_of(2)
    state.observe(0, 8, 6, step=3)
    assert (state.a[0], state.b[0]) == (6.5, 2.5)
    state.observe(0, 4, 0, step=5)
    # .9·6.5 + .1·.5 + 0 and .9·2.5 + .1·.5 + 4
    assert state.a[0] == pytest.approx(5.9)
    assert state.b[0] == pytest.approx(6.3)
    assert state.last_step.tolist() == [5, NEVER]
    assert (state.a[1], state.b[1]) == (0.5, 0.5)


def test_an_older_policys_answers_do_not_make_a_prompt_look_longer_unseen():
    state = state_of(1)
    state.observe(0, 8, 6, step=9)
    state.observe(0, 16, 16, step=4)  # a judge that had begun earlier
    assert state.last_step.tolist() == [9]


def test_unscored_groups_change_nothing():
    state = state_of(1)
    state.observe(0, 8, 6, step=3)
    state.observe(0, 0, 0, step=9)
    assert (state.a[0], state.b[0], state.last_step[0]) == (6.5, 2.5, 3)


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="9 correct of 8"):
        state_of(1).observe(0, 8, 9, step=0)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)).map(sorted), max_size=40))
def test_evidence_stays_bounded_and_a_prompt_never_solved_stays_so(groups):
    state = state_of(1, forgetting=0.8)
    for correct, scored in groups:
        state.observe(0, scored, correct, step=0)
    everything = np.array([0])
    assert 0.5 <= state.a[0] <= 0.5 + 8 / (1 - 0.8)
    assert 0.5 <= state.b[0] <= 0.5 + 8 / (1 - 0.8)
    scored_anything = any(scored for _, scored in groups)
    never_solved = scored_anything and not any(correct for correct, _ in groups)
    always_solved = scored_anything and all(correct == scored for correct, scored in groups)
    assert (bucket_of(state.rate(everything))[0] == 0) == never_solved
    assert (bucket_of(state.rate(everything))[0] == 5) == always_solved


def test_figures_of_the_posterior():
    state = state_of(3)
    state.a[:] = [0.5, 4.5, 1.0]
    state.b[:] = [0.5, 4.5, 3.0]
    everything = np.arange(3)
    assert state.mean(everything) == pytest.approx([0.5, 0.5, 0.25])
    # ab/((a+b)(a+b+1)): .25/2, 20.25/90, 3/20
    assert state.signal(everything, 2)[0] == pytest.approx([0.125, 0.225, 0.15])
    # Beta(1, 3), G=2: E[p²] = 2/20, E[(1-p)²] = 12/20
    assert state.signal(everything, 2)[1][[0, 2]] == pytest.approx([0.75, 0.7])
    assert state.rate(everything) == pytest.approx([0.5, 0.5, 0.5 / 3])


@given(st.floats(0.5, 100, width=32), st.floats(0.5, 100, width=32), st.integers(2, 16))
def test_no_signal_agrees_with_numerical_integration(a, b, group_size):
    state = state_of(1)
    state.a[0], state.b[0] = a, b
    # p = sin²(t) takes the poles out of the density at 0 and 1.
    t = (np.arange(20_000) + 0.5) / 20_000 * np.pi / 2
    p = np.sin(t) ** 2
    log_weight = (2 * a - 1) * np.log(np.sin(t)) + (2 * b - 1) * np.log(np.cos(t))
    weight = np.exp(log_weight - log_weight.max())
    expected = (weight * (p**group_size + (1 - p) ** group_size)).sum() / weight.sum()
    assert state.signal(np.array([0]), group_size)[1][0] == pytest.approx(expected, rel=1e-4)


def test_warm_start_weighs_verdicts():
    state = state_of(4)
    verdicts = [
        verdict("p0", 16, 4),  # worth 8: 2 correct, 6 wrong
        verdict("p1", 4, 3),  # fewer than 8: as it is
        verdict("p2", 16, 0),
        verdict("p2", 16, 16),  # the later one counts
        verdict("elsewhere", 16, 8),
        verdict("p3", 0, 0),
    ]
    state.warm_start(verdicts, strength=8)
    assert state.a.tolist() == [2.5, 3.5, 8.5, 0.5]
    assert state.b.tolist() == [6.5, 1.5, 0.5, 0.5]
    untouched = state_of(1)
    untouched.warm_start([], strength=8)
    assert untouched.a.tolist() == [0.5]


def test_state_round_trip_and_other_prompts():
    state = state_of(3)
    state.observe(1, 8, 3, step=7)
    copy = state_of(3)
    copy.load_state_dict(state.state_dict())
    assert copy.a.tolist() == state.a.tolist()
    assert copy.b.tolist() == state.b.tolist()
    assert copy.last_step.tolist() == [NEVER, 7, NEVER]
    copy.observe(0, 8, 8, step=8)
    assert state.a[0] == 0.5
    with pytest.raises(DataError, match="another prompt set"):
        state_of(4).load_state_dict(state.state_dict())


def test_catalogue_numbers_prompts_and_domains():
    catalogue = PromptCatalogue(prompts_of("sorting", "gcd", "sorting"))
    assert catalogue.domains == ("gcd", "sorting")
    assert catalogue.domain.tolist() == [1, 0, 1]
    assert catalogue.sizes() == {"gcd": 1, "sorting": 2}
    assert [catalogue.index_of(f"p{i}") for i in range(3)] == [0, 1, 2]
    assert catalogue.indices_of(["p2", "unknown", "p0"]).tolist() == [2, -1, 0]
    with pytest.raises(DataError, match="prompt unknown is not among the 3"):
        catalogue.index_of("unknown")


def test_catalogue_refuses_nothing_and_duplicates():
    with pytest.raises(DataError, match="got none"):
        PromptCatalogue([])
    with pytest.raises(DataError, match=r"1 prompts have an id that another has, e\.g\. p0 in a"):
        PromptCatalogue([*prompts_of("a", "b"), *prompts_of("a")])


def test_fingerprint_depends_on_prompts_domains_and_order():
    base = prompts_of("a", "b")
    variants = [base, base[::-1], prompts_of("a", "a"), prompts_of("a", "b", "b")]
    assert len({PromptCatalogue(v).fingerprint for v in variants}) == 4


@given(st.data())
def test_pool_stays_sorted_whatever_moves(data):
    domain = np.array(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=30)), np.int16)
    size = len(domain)
    buckets = st.integers(0, len(BUCKETS) - 1)
    bucket = np.array(data.draw(st.lists(buckets, min_size=size, max_size=size)))
    pool = BucketedPool(domain, bucket, 3)
    for index, target in data.draw(st.lists(st.tuples(st.integers(0, size - 1), buckets))):
        pool.move(index, target)
        bucket[index] = target
    restored = BucketedPool(domain, bucket, 3)
    restored.load_state_dict(pool.state_dict())
    for d in range(3):
        for b in range(len(BUCKETS)):
            members = np.flatnonzero((domain == d) & (bucket == b))
            assert pool.counts(d)[b] == len(members)
            places = (np.arange(len(members)) + 0.5) / max(len(members), 1)
            for some_pool in (pool, restored):
                found = some_pool.pick(d, np.full(len(members), b), places)
                assert sorted(found.tolist()) == members.tolist()
