"""A top-1 with its doubt, and two of them compared on the same images."""

import math

import numpy as np
import pytest

from dfqlib.checkpoint import load_checkpoint, save_checkpoint
from dfqlib.scores import Score, pack, paired_difference, unpack


def test_a_score_is_its_top1_and_knows_its_standard_error():
    score = Score([True] * 80 + [False] * 20)
    assert score == 80 and f"{score:.1f}" == "80.0" and score.standard_error == pytest.approx(4)


def test_only_images_on_which_one_alone_is_right_count():
    first = Score([True] * 80 + [False] * 20)
    second = Score([True] * 70 + [False] * 28 + [True] * 2)  # 10 for the first, 2 for the second
    difference = paired_difference(first, second)
    assert difference.points == pytest.approx(8)
    assert difference.standard_error == pytest.approx(math.sqrt(12 - 64 / 100))
    assert (difference.low, difference.high) == pytest.approx((8 - 1.96 * 3.3705, 8 + 1.96 * 3.3705), abs=1e-3)
    assert difference.clear and not paired_difference(first, first).clear
    assert str(difference) == "+8.00 points (95 % interval +1.39 to +14.61, the same 100 images)"


def test_other_images_are_refused_and_a_diverged_network_has_no_difference():
    with pytest.raises(ValueError, match="scores on 2 and 3 images"):
        paired_difference(Score([True, False]), Score([True, False, True]))
    none = paired_difference(Score([True, False]), Score([False], diverged="lr too high"))
    assert not none.clear and "diverged" in str(none)


def test_the_intervals_hold_the_true_difference_as_often_as_they_say():
    random, held = np.random.default_rng(0), 0
    for _ in range(1000):
        easy = random.random(1000)
        first, second = (Score(easy + 0.1 * random.standard_normal(1000) < p) for p in (0.8, 0.75))
        difference = paired_difference(first, second)
        held += difference.low <= 5 <= difference.high
    assert 0.93 <= held / 1000 <= 0.97


def test_scores_outlive_a_checkpoint_and_text(tmp_path):
    score = Score([True, False, True], top5=100.0)
    save_checkpoint(tmp_path / "a.ckpt", {}, {"scores": [(1, score)]})
    ((_, read),) = load_checkpoint(tmp_path / "a.ckpt", {})["scores"]
    assert read == score and read.top5 == 100 and read.correct.tolist() == [True, False, True]
    assert unpack(pack(score.correct), 3).tolist() == [True, False, True]
