"""Tests: each states a promise of the design and what would break it."""
