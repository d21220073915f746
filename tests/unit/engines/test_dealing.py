"""The state machine that deals prompts to samplers: order, deaths, short answers; nothing is lost or doubled."""

import random

import pytest

from ray_vlm.engines.dealing import Dealer, Lengths, Portion, cut
from ray_vlm.errors import RunError


def _dealer(samplers: int, **options: int) -> Dealer[str]:
    dealer: Dealer[str] = Dealer(samplers, **options)
    for number in range(samplers):
        dealer.joined(number)
    return dealer


def _answers(portion: Portion) -> list[str]:
    return [f"{portion.call}-{row}" for row in portion.rows]


def test_portions_are_neighbours_and_the_longest_row_is_their_cost() -> None:
    assert cut([1, 5, 2, 2, 9], 2) == [(range(2), 10), (range(2, 4), 4), (range(4, 5), 9)]
    assert cut([], 3) == []


def test_the_longest_portion_is_dealt_first_and_a_sampler_has_one() -> None:
    dealer = _dealer(2)
    call = dealer.add([1, 7, 3, 5], 1)
    dealt = dealer.deal()
    assert [(sampler, list(portion.rows)) for sampler, portion in dealt] == [(0, [1]), (1, [3])]
    assert dealer.deal() == []
    assert dealer.answered(1, dealt[1][1], _answers(dealt[1][1]))
    (third,) = dealer.deal()
    assert (third[0], list(third[1].rows)) == (1, [2])  # the slow sampler 0 holds only its own portion
    assert dealer.answered(1, third[1], _answers(third[1]))
    (last,) = dealer.deal()
    assert dealer.answered(1, last[1], _answers(last[1]))
    assert not dealer.is_done(call)
    assert dealer.answered(0, dealt[0][1], _answers(dealt[0][1]))
    assert dealer.take(call) == ["0-0", "0-1", "0-2", "0-3"]


def test_what_one_sampler_is_to_answer_waits_for_it_and_goes_to_others_once_it_is_gone() -> None:
    dealer = _dealer(2)
    first, second = dealer.add([1], 1, only=1), dealer.add([9, 9], 1)
    dealt = dealer.deal()
    assert [(sampler, portion.call) for sampler, portion in dealt] == [(0, second), (1, first)]
    waiting = dealer.add([5], 1, only=1)
    assert dealer.answered(0, dealt[0][1], _answers(dealt[0][1]))
    (other,) = dealer.deal()
    assert other[1].call == second
    assert dealer.answered(0, other[1], _answers(other[1]))
    assert dealer.deal() == []
    dealer.died(1, now=0.0)
    assert dealer.deal() == [], "the free one may be gone too"
    assert dealer.due(0.0) == [0]
    dealer.joined(0)
    assert dealer.joins(0) == 1, "it was there all the time"
    for call in (first, waiting):
        ((sampler, portion),) = dealer.deal()
        assert (sampler, portion.call) == (0, call)
        assert dealer.answered(0, portion, _answers(portion))
        assert dealer.is_done(call)
    absent = dealer.add([5], 1, only=1)
    assert [(sampler, portion.call) for sampler, portion in dealer.deal()] == [(0, absent)]


def test_a_node_with_many_samplers_that_dies_is_one_death_of_a_portion() -> None:
    """Free samplers are dealt nothing until they have said that they are there, so those of the node get no portion."""
    dealer = _dealer(8, max_deaths=1)
    call = dealer.add([5], 1)
    ((sampler, _),) = dealer.deal()
    dealer.died(sampler, now=1.0, reason="its node is gone")
    assert dealer.deal() == []
    others = dealer.due(1.0)
    assert sorted([sampler, *others]) == list(range(8))
    for gone in others[:4]:
        dealer.absent(gone, now=1.0)
    dealer.joined(others[4])
    ((second, portion),) = dealer.deal()
    assert second == others[4]
    assert dealer.living() == sorted(others[4:])
    assert dealer.answered(second, portion, _answers(portion))
    assert dealer.is_done(call)


def test_a_sampler_that_was_ended_on_purpose_does_not_count() -> None:
    dealer = _dealer(2, max_deaths=0)
    dealer.add([5], 1)
    for _ in range(3):
        ((asked, _),) = dealer.deal()
        dealer.died(asked, now=0.0, ended=True)
        for sampler in range(2):
            dealer.joined(sampler)
    ((asked, _),) = dealer.deal()
    with pytest.raises(RunError, match="a sampler died while answering the same prompt"):
        dealer.died(asked, now=0.0)


def test_each_rank_begins_with_another_sampler_and_an_earlier_call_comes_first() -> None:
    dealer = _dealer(3, first=2)
    dealer.add([1], 1)
    dealer.add([9, 9, 9], 1)
    assert [(sampler, portion.call) for sampler, portion in dealer.deal()] == [(2, 0), (0, 1), (1, 1)]


def test_the_portion_of_a_dead_sampler_goes_to_another_and_its_late_answer_is_ignored() -> None:
    dealer = _dealer(2)
    call = dealer.add([4, 4], 1)
    (first, portion), (second, other) = dealer.deal()
    dealer.died(first, now=10.0)
    assert dealer.num_alive == 1
    assert not dealer.answered(first, portion, _answers(portion))
    assert dealer.answered(second, other, _answers(other))
    ((sampler, again),) = dealer.deal()
    assert (sampler, again) == (second, portion)
    assert dealer.answered(second, again, _answers(again))
    assert dealer.take(call) == ["0-0", "0-1"]


def test_an_absent_sampler_is_asked_less_and_less_often() -> None:
    dealer, now, gaps = _dealer(1), 0.0, []
    dealer.died(0, now)
    for _ in range(8):
        assert dealer.due(now) == []
        gaps.append(dealer.next_due() - now)
        now = dealer.next_due()
        assert dealer.due(now) == [0]
        assert dealer.due(now) == []  # one question at a time
        assert dealer.next_due() == float("inf")
        dealer.absent(0, now)
    assert gaps[:3] == [0.25, 0.5, 1.0]
    assert gaps[-1] == 10.0
    dealer.joined(0)
    dealer.died(0, now)
    assert dealer.next_due() - now == 0.25


def test_a_prompt_that_kills_each_sampler_ends_the_run() -> None:
    dealer = _dealer(2, max_deaths=2)
    dealer.add([4], 1)
    for _ in range(2):
        ((sampler, _),) = dealer.deal()
        dealer.died(sampler, 0.0)
        dealer.joined(sampler)
    ((sampler, _),) = dealer.deal()
    with pytest.raises(RunError, match=r"3 samplers, one after another, died .* cluster.max_failures=2\. .*: boom"):
        dealer.died(sampler, 0.0, "boom")


@pytest.mark.parametrize("all_rows", [True, False])
def test_too_few_answers_are_asked_for_once_more(all_rows: bool) -> None:
    dealer = _dealer(1)
    call = dealer.add([4, 4], 2)
    ((_, portion),) = dealer.deal()
    few = _answers(portion) if all_rows else _answers(portion)[:1]
    assert dealer.answered(0, portion, few, complete=not all_rows)
    assert not dealer.is_done(call)
    ((_, again),) = dealer.deal()
    assert again == portion
    with pytest.raises(RunError, match="2 prompts with fewer completions than asked, twice"):
        dealer.answered(0, again, few, complete=not all_rows)
    assert dealer.held() == {}


def test_a_dropped_call_is_forgotten() -> None:
    dealer = _dealer(1)
    call, other = dealer.add([4, 4], 1), dealer.add([1], 1)
    ((_, portion),) = dealer.deal()
    dealer.drop(call)
    assert not dealer.answered(0, portion, _answers(portion))
    ((_, next_one),) = dealer.deal()
    assert next_one.call == other
    assert dealer.num_waiting == 0


def test_expected_lengths() -> None:
    lengths = Lengths()
    assert lengths.expect(3) == 0
    lengths.learn(3, 10)
    lengths.learn(4, 20)
    lengths.learn(3, 12)
    assert (lengths.expect(3), lengths.expect(4), lengths.expect(5)) == (12, 20, 16)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_or_doubled(seed: int) -> None:
    """Samplers that die, answer late or too little, and come back, in any order."""
    chance, num_samplers = random.Random(seed), 1 + seed % 5
    dealer: Dealer[str] = Dealer(num_samplers, first=seed % num_samplers, max_deaths=10**6)
    now, running, taken, short = 0.0, [], [], set()
    calls = {}
    while len(taken) < 12:
        now += chance.random()
        if len(calls) < 12 and chance.random() < 0.3:
            costs = [chance.randrange(1, 50) for _ in range(chance.randrange(0, 9))]
            calls[dealer.add(costs, chance.randrange(1, 4))] = len(costs)
        for sampler in dealer.due(now):
            (dealer.joined(sampler) if chance.random() < 0.7 else dealer.absent(sampler, now))
        dealt = dealer.deal()
        assert len({sampler for sampler, _ in dealt}) == len(dealt)
        running += dealt
        chance.shuffle(running)
        if running and chance.random() < 0.8:
            sampler, portion = running.pop()
            is_held = dealer.held().get(sampler) == portion
            if chance.random() < 0.2 and is_held:
                dealer.died(sampler, now)
                running.append((sampler, portion))  # its answer comes too late
            else:
                complete = portion.number in short or chance.random() < 0.8 or not is_held
                short |= set() if complete else {portion.number}
                assert dealer.answered(sampler, portion, _answers(portion), complete) == is_held
        for call in [call for call in calls if call not in taken and dealer.is_done(call)]:
            assert dealer.take(call) == [f"{call}-{row}" for row in range(calls[call])]
            taken.append(call)
    assert dealer.num_waiting == 0
