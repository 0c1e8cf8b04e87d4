"""Tests of what a clock says."""

from __future__ import annotations

import pytest

timed = pytest.mark.flaky(reruns=9, reruns_delay=0.2)
"""A busy machine can disturb this test, and make it fail, but a fault fails it ten times."""
