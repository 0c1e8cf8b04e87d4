"""Pictures: a plan and its step, and the seconds of a step against what is offloaded.

matplotlib draws them, imported when something is drawn; it comes with ``distorch[plot]``.
"""

from distorch.draw.canvas import check_picture, seconds_text
from distorch.draw.plan import draw_plan
from distorch.draw.sweep import SweepPoint, draw_sweep

__all__ = ["SweepPoint", "check_picture", "draw_plan", "draw_sweep", "seconds_text"]
