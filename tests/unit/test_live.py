"""The view of a running training: what a step says, and its small plot."""

from __future__ import annotations

from advisor.ui.live import plot, step_note


def test_the_plot_shows_the_shape_of_the_loss() -> None:
    """High is high and low is low, however many steps there were; a flat line does not fail."""
    assert plot([], width=8) == plot([1.0], width=8) == ""
    falling = plot([8.0 - n / 100 for n in range(800)], width=8)
    assert falling == "█▇▆▅▄▃▂▁"
    assert plot([2.0, 2.0, 2.0], width=8) == "▁▁▁"
    assert len(plot([float(n) for n in range(5)], width=12)) == 5


def test_a_step_says_reward_and_margin_where_there_are_some() -> None:
    """Reinforcement and preference runs show what they are about."""
    assert step_note({"loss": 0.5, "reward": 0.25}) == "loss 0.500, reward 0.250"
    assert "margin 1.500" in step_note({"loss": 0.5, "margin": 1.5})
    assert step_note({}) == ""
